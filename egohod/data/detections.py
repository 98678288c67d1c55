"""Boxes of hands and objects, in the schema of EPIC-KITCHENS' hand-object detections, as a table.

One row a box, in a parquet file (or a folder of them). The names are those of the published protobuf messages;
``second`` is beside ``frame_number``, since training looks boxes up by time: it is the middle of the time that the
frame is on display, (frame + 1/2) / fps, so that neighbours are never confused. Coordinates are shares of the picture.

    video_id, frame_number, second     where the box was seen
    kind                               hand or object
    side, state                        of hands: LEFT or RIGHT, and the contact state below; -1 for objects, and as
                                       the state where a detector predicts none
    score                              the detector's confidence
    left, top, right, bottom           the box
    offset_x, offset_y                 of hands that touch something: from their centre to that object's, else NaN
    name                               of objects: their class, if a detector predicts one; files may lack this column

EPIC-KITCHENS' own files are one a video: a pickled list of bytes, each of them a serialised protobuf message
``Detections`` of one frame, which :func:`read_epic` and :func:`write_epic` convert. Only lists and bytes are taken from
the pickle: anything else is refused before it runs.

Source: epic-kitchens/epic-kitchens-100-hand-object-bboxes, ``types.proto`` and ``hoa/io.py``. Frames count from 1 there
and from 0 in our table.
"""

from __future__ import annotations

import functools
import pickle
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from egohod import pickles
from egohod.errors import UserError
from egohod.runtime import UNFINISHED_PREFIX, atomic_write

LEFT, RIGHT = 0, 1
UNKNOWN_STATE = -1
NO_CONTACT, SELF_CONTACT, OTHER_PERSON, PORTABLE_OBJECT, STATIONARY_OBJECT = range(5)
CONTACT = {
    UNKNOWN_STATE: "unknown",
    NO_CONTACT: "no contact",
    SELF_CONTACT: "self contact",
    OTHER_PERSON: "other person",
    PORTABLE_OBJECT: "portable object",
    STATIONARY_OBJECT: "stationary object",
}
"""Contact states in words."""
EDGES = ("left", "top", "right", "bottom")
ROLES = ("left hand", "right hand", "active object")
"""The boxes that :meth:`BoxTable.at` returns of each moment, in this order."""
ROLE_COLOURS = ((40, 120, 230), (240, 160, 20), (40, 180, 80))
"""Colours of the roles in pictures (RGB)."""

SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("frame_number", pa.int64()),
        ("second", pa.float64()),
        ("kind", pa.string()),
        ("side", pa.int8()),
        ("state", pa.int8()),
        ("score", pa.float32()),
        *((edge, pa.float32()) for edge in EDGES),
        ("offset_x", pa.float32()),
        ("offset_y", pa.float32()),
        ("name", pa.string()),
    ]
)
OPTIONAL = "name"  # not of the published schema; files made before it was added do without
# A clip's frame takes the boxes of the nearest frame with detections, if it is no farther than this.
NEAREST_SECONDS = 0.1


class BoxTable:
    """Both hands and the active object at any time of any video; numpy arrays only, so that workers share them."""

    def __init__(self, detections: pd.DataFrame) -> None:
        """``detections`` has the columns of ``SCHEMA``; see :meth:`read` for files."""
        moments = ["video_id", "second"]
        # One dense row a moment, so that :meth:`at` is a binary search and an index, without pandas in the workers.
        index = pd.MultiIndex.from_frame(detections[moments]).unique().sort_values()
        boxes = np.full((len(index), len(ROLES), len(EDGES)), np.nan, dtype=np.float32)
        best = detections.sort_values("score", kind="stable", ascending=False)
        # Of several left hands in a frame, such as another person's, the one of the highest score.
        hands = best[best["kind"] == "hand"].drop_duplicates([*moments, "side"])
        for role, rows in enumerate(
            (hands[hands["side"] == LEFT], hands[hands["side"] == RIGHT], _active(best, hands))
        ):
            boxes[index.get_indexer(pd.MultiIndex.from_frame(rows[moments])), role] = rows[list(EDGES)].to_numpy()
        self._boxes = boxes
        self._seconds = index.get_level_values("second").to_numpy(np.float64)
        codes, videos = pd.factorize(index.get_level_values("video_id"))
        # Sorted, as the moments are; one name a video, so that millions of moments hold no text.
        self._videos = videos.to_numpy().astype(str)
        self._first = np.searchsorted(codes, np.arange(len(videos)))
        self._end = np.append(self._first[1:], len(index))

    @classmethod
    def read(cls, path: str | Path) -> BoxTable:
        """Read files, see :func:`read`."""
        return cls(read(path).to_pandas())

    def __len__(self) -> int:
        """Count of the moments with a box."""
        return len(self._seconds)

    def at(self, video_id: str, seconds: np.ndarray) -> np.ndarray:
        """``seconds`` [T] -> boxes float32 [T, 3, 4]: left hand, right hand, active object; NaN where there is none."""
        boxes = np.full((len(seconds), len(ROLES), len(EDGES)), np.nan, dtype=np.float32)
        video = int(np.searchsorted(self._videos, video_id))
        # searchsorted gives a neighbour's place for a video without detections.
        if video == len(self._videos) or self._videos[video] != video_id:
            return boxes
        moments = slice(self._first[video], self._end[video])
        times = self._seconds[moments]
        after = np.searchsorted(times, seconds).clip(max=len(times) - 1)
        before = (after - 1).clip(min=0)
        # Of two equally near ones the earlier.
        nearest = np.where(np.abs(times[before] - seconds) <= np.abs(times[after] - seconds), before, after)
        near = np.abs(times[nearest] - seconds) <= NEAREST_SECONDS
        boxes[near] = self._boxes[moments][nearest[near]]
        return boxes


def write(detections: pa.Table, path: Path) -> None:
    """Write a table of ``SCHEMA``."""
    with atomic_write(path) as temporary:
        pa.parquet.write_table(detections.cast(SCHEMA), temporary)


def read(path: str | Path) -> pa.Table:
    """Read a parquet file, or all of a folder, into a table of ``SCHEMA``. Raises :class:`UserError`."""
    return pa.concat_tables([table for _, _, table in parts(path)])


def parts(path: str | Path) -> Iterator[tuple[Path, int, pa.Table]]:
    """The row groups of a parquet file, or of all of a folder: (file, its number in there, table of ``SCHEMA``).

    One after the other, since the boxes of a million clips do not fit in memory. Raises :class:`UserError`.
    """
    path = Path(path)
    # Sorted: where two files hold the same box, the table must not depend on the order of the file system.
    files = [path]
    if path.is_dir():
        files = sorted(each for each in path.glob("*.parquet") if not each.name.startswith(UNFINISHED_PREFIX))
    if not files:
        raise UserError(f"{path}: the folder holds no parquet file")
    for file in files:
        first, group, groups = 0, 0, 1
        while group < groups:
            table, groups = _row_group(file, group)
            table = conform(table, table.column_names, str(file), first)
            yield file, group, table
            first, group = first + len(table), group + 1


def read_part(file: Path, group: int, video_id: str) -> pa.Table:
    """The boxes of one video in a row group that :func:`parts` has checked. Raises :class:`UserError`."""
    table, _ = _row_group(file, group)
    videos = table["video_id"].cast(SCHEMA.field("video_id").type)
    return conform(table.filter(pc.equal(videos, video_id)), table.column_names, str(file))


def _row_group(file: Path, group: int) -> tuple[pa.Table, int]:
    """A row group, and how many there are; of a file without any an empty table."""
    try:
        with pa.parquet.ParquetFile(file) as parquet:
            groups = parquet.num_row_groups
            return parquet.read_row_group(group) if groups else parquet.schema_arrow.empty_table(), groups
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last for names of columns
        raise UserError(f"{file}: not readable as parquet: {' '.join(str(error).split())}") from error


def conform(table: pa.Table, names: Sequence[str], name: str, first: int = 0) -> pa.Table:
    """A table with the columns ``names`` in the types and order of ``SCHEMA``, checked.

    Rows are counted behind ``first`` others. Raises :class:`UserError`, with ``name`` as its origin, for columns that
    are missing or of another type and for what :func:`check` refuses.
    """
    if OPTIONAL not in names:
        table = table.append_column(OPTIONAL, pa.nulls(len(table), pa.string()))
    missing = [column for column in SCHEMA.names if column not in (*names, OPTIONAL)]
    if missing:
        raise UserError(f"{name}: lacks the columns {', '.join(missing)}; there are {', '.join(SCHEMA.names)}")
    try:
        # The cast takes what other programs write for the same numbers, such as float64.
        table = table.select(SCHEMA.names).cast(SCHEMA)
        table.validate(full=True)  # such as texts that are no UTF-8
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{name}: a column is of another type: {' '.join(str(error).split())}") from error
    check(table, name, first)
    return table


def check(detections: pa.Table, name: str, first: int = 0) -> None:
    """Raise :class:`UserError` with the first row of ``name`` that is no box by the rules of ``SCHEMA``."""
    column = {key: detections.column(key).to_numpy(zero_copy_only=False) for key in (*EDGES, "second", "side")}
    edges = np.stack([column[edge] for edge in EDGES], axis=1)
    kind = np.asarray(detections.column("kind").to_pylist(), dtype=object)
    # Comparisons with NaN are false, so a missing edge is wrong as well.
    wrong = ~((edges >= 0) & (edges <= 1)).all(axis=1) | (edges[:, :2] > edges[:, 2:]).any(axis=1)
    wrong |= ~np.isin(kind, ("hand", "object")) | ~np.isfinite(column["second"])
    wrong |= (kind == "hand") & ~np.isin(column["side"], (LEFT, RIGHT))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(
            f"{name}: row {first + row + 1} is no box of a hand or an object with edges from 0 to 1: "
            f"{detections.slice(row, 1).to_pylist()[0]}"
        )


def link_objects(detections: pd.DataFrame, aspect: float = 1.0) -> np.ndarray:
    """Which object each hand touches: for each row the position of that object's row, -1 where there is none, int [N].

    It is the object of the same moment whose centre is nearest to where the hand's offset points, at any distance and
    for every kind of contact; several hands may touch one. Of equally near ones the first row's. ``aspect`` is the
    picture's width / height, by which distances in pixels differ from those in shares. Source: the association of
    ddshan/hand_object_detector, and ``get_hand_object_interactions`` of EPIC-KITCHENS' ``hoa/types.py``.
    """
    links, moments = np.full(len(detections), -1), ["video_id", "second"]
    rows = detections.assign(
        row=np.arange(len(detections)),
        x=(detections["left"] + detections["right"]) / 2,
        y=(detections["top"] + detections["bottom"]) / 2,
    )
    hands = rows[(rows["kind"] == "hand") & (rows["state"] > NO_CONTACT) & rows["offset_x"].notna()]
    both = hands.merge(rows.loc[rows["kind"] == "object", [*moments, "row", "x", "y"]], on=moments)
    across = (both["x_x"] + both["offset_x"] - both["x_y"]) * aspect
    both["distance"] = np.hypot(across, both["y_x"] + both["offset_y"] - both["y_y"])
    both = both.sort_values(["distance", "row_y"], kind="stable").drop_duplicates("row_x")
    links[both["row_x"]] = both["row_y"]
    return links


def _active(best: pd.DataFrame, hands: pd.DataFrame) -> pd.DataFrame:
    # One object a moment: what the first touching hand touches, else that of the highest score. ``best`` is sorted by
    # score, and ``hands`` are those of its rows that count.
    moments = ["video_id", "second"]
    touching = hands[hands["offset_x"].notna() & (hands["state"] > NO_CONTACT)].drop_duplicates(moments)
    objects = best[best["kind"] == "object"]
    rows = pd.concat([touching, objects])
    touched = link_objects(rows)[: len(touching)]
    return pd.concat([rows.iloc[touched[touched >= 0]], objects]).drop_duplicates(moments)


# --------------------------------------------------------------------------------------------------
# EPIC-KITCHENS' own files
# --------------------------------------------------------------------------------------------------

FIRST_FRAME = 1
_PACKAGE = "model.detections"
# Enumerations count from 0 in this order, as in ``types.proto``.
_STATES = ("NO_CONTACT", "SELF_CONTACT", "ANOTHER_PERSON", "PORTABLE_OBJECT", "STATIONARY_OBJECT")
_SIDES = ("LEFT", "RIGHT")
# Field names in the order of their numbers, each with its type; * marks a repeated one.
_MESSAGES = {
    "FloatVector": "x float, y float",
    "BBox": "left float, top float, right float, bottom float",
    "HandDetection": "bbox BBox, score float, state HandDetection.HandState, object_offset FloatVector, "
    "side HandDetection.HandSide",
    "ObjectDetection": "bbox BBox, score float",
    "Detections": "video_id string, frame_number int32, hands HandDetection*, objects ObjectDetection*",
}


@functools.cache
def epic_message_class() -> Any:
    """The protobuf class ``Detections`` of one frame's detections.

    The schema is built here, so that no generated module is needed, in a pool of its own, since another library may
    have registered the same names. Raises :class:`UserError` where protobuf cannot be used.
    """
    try:
        # Nothing else in the project needs protobuf, and many environments have one that is broken.
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except Exception as error:
        raise UserError(
            f"EPIC-KITCHENS' files need protobuf, which cannot be used ({error}); pip install --force-reinstall "
            "protobuf"
        ) from error
    field = descriptor_pb2.FieldDescriptorProto
    scalars = {"float": field.TYPE_FLOAT, "string": field.TYPE_STRING, "int32": field.TYPE_INT32}
    file = descriptor_pb2.FileDescriptorProto(name="egohod_epic.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, declaration in enumerate(fields.split(", "), start=1):
            field_name, kind = declaration.rstrip("*").split(" ")
            label = field.LABEL_REPEATED if declaration.endswith("*") else field.LABEL_OPTIONAL
            added = message.field.add(name=field_name, number=number, label=label)
            if kind in scalars:
                added.type = scalars[kind]
            else:  # a message or, nested in one, an enumeration
                added.type = field.TYPE_ENUM if "." in kind else field.TYPE_MESSAGE
                added.type_name = f".{_PACKAGE}.{kind}"
        if name == "HandDetection":
            for enum_name, words in (("HandState", _STATES), ("HandSide", _SIDES)):
                enum = message.enum_type.add(name=enum_name)
                for value, word in enumerate(words):
                    enum.value.add(name=word, number=value)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Detections"))


def read_epic(path: str | Path, fps: float) -> pa.Table:
    """Read one video's file of EPIC-KITCHENS into a table of ``SCHEMA``; ``fps`` of the video gives the seconds.

    Raises :class:`UserError` with the file, and the frame where there is one: no such file, cut off, not a list
    of messages, a pickle that asks for more than that, boxes that are no shares of the picture.
    """
    path = Path(path)
    try:
        # EPIC's own files were written by Python 3; a text of Python 2 would arrive as bytes as well.
        # The unpickler refuses everything but lists and bytes.
        messages = pickles.load(path, "a list of detections", encoding="bytes")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: no pickled list of detections, or cut off: {error}") from error
    if not isinstance(messages, list) or not all(isinstance(each, bytes) for each in messages):
        raise UserError(f"{path}: holds {reprlib.repr(messages)} instead of a list of messages, one a frame")
    message_class = epic_message_class()
    from google.protobuf.message import DecodeError

    rows: list[dict[str, Any]] = []
    for place, message in enumerate(messages, start=1):
        try:
            rows += _epic_rows(message_class.FromString(message), fps)
        except DecodeError as error:
            raise UserError(f"{path}: message {place} of {len(messages)} is cut off or no detections") from error
    table = pa.Table.from_pylist(rows, SCHEMA)
    check(table, str(path))
    return table


def write_epic(
    detections: pa.Table, folder: str | Path, looked_at: Mapping[str, Iterable[int]] | None = None
) -> list[Path]:
    """Write ``folder/<video_id>.pkl`` for each video of a table of ``SCHEMA``, as EPIC-KITCHENS publishes them.

    ``looked_at`` are frame numbers by video: those without boxes become messages too, as in the published files, and
    videos without boxes files. The messages have neither an unknown contact state, which becomes no contact, nor names
    of objects; offsets are cut at a whole picture. A video id with slashes is a file in folders. Raises
    :class:`UserError` for a video id that is no file within ``folder``.
    """
    folder = Path(folder)
    # A frame has several rows, in any order: one message is collected for each.
    frames: dict[str, dict[int, Any]] = {}

    def message_of(video: str, frame_number: int) -> Any:
        number = frame_number + FIRST_FRAME
        if not video or any(part in ("", ".", "..") for part in video.split("/")):  # it would lead out of the folder
            raise UserError(f"{folder}: video id '{video}' cannot name a file")
        messages = frames.setdefault(video, {})
        if number not in messages:
            messages[number] = epic_message_class()(video_id=video, frame_number=number)
        return messages[number]

    for video, numbers in (looked_at or {}).items():
        for each in numbers:
            message_of(video, int(each))
    for row in detections.cast(SCHEMA).to_pylist():
        message = message_of(row["video_id"], row["frame_number"])
        box = (message.hands if row["kind"] == "hand" else message.objects).add(score=row["score"])
        for edge in EDGES:
            setattr(box.bbox, edge, row[edge])
        if row["kind"] == "hand":
            box.side, box.state = row["side"], max(row["state"], NO_CONTACT)
            for axis in ("x", "y"):
                offset = row[f"offset_{axis}"]
                setattr(box.object_offset, axis, 0.0 if offset is None or np.isnan(offset) else min(max(offset, -1), 1))
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for video, messages in frames.items():
        path = folder / f"{video}.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            content = [messages[number].SerializeToString() for number in sorted(messages)]
            temporary.write_bytes(pickle.dumps(content))
        written.append(path)
    return written


def _epic_rows(message: Any, fps: float) -> Iterator[dict[str, Any]]:
    number = message.frame_number - FIRST_FRAME
    moment = {"video_id": message.video_id, "frame_number": number, "second": (number + 0.5) / fps}
    for kind, boxes in (("hand", message.hands), ("object", message.objects)):
        for box in boxes:
            row = dict.fromkeys(SCHEMA.names) | moment | {"kind": kind, "side": -1, "state": UNKNOWN_STATE}
            row |= {edge: getattr(box.bbox, edge) for edge in EDGES} | {"score": box.score}
            if kind == "hand":
                row |= {"side": box.side, "state": box.state}
                # proto3 has no absent field: an offset of a hand without contact is zeros that mean nothing.
                if box.state != NO_CONTACT:
                    row |= {"offset_x": box.object_offset.x, "offset_y": box.object_offset.y}
            yield row
