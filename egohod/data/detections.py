"""Boxes of hands and objects, in the schema of EPIC-KITCHENS' hand-object detections, as a table.

One row a box, in a parquet file (or a folder of them). The names are those of the published protobuf messages;
``second`` stands beside ``frame_number``, since a training clip asks for times: it is the middle of the time that the
frame is on display, (frame + 1/2) / fps, so that neighbours are never confused. Coordinates are shares of the picture.

    video_id, frame_number, second     where the box was seen
    kind                               hand or object
    side, state                        of hands: LEFT or RIGHT, and the contact state below; -1 for objects, and as
                                       the state where a detector tells none
    score                              the detector's confidence
    left, top, right, bottom           the box
    offset_x, offset_y                 of hands that touch something: from their centre to that object's, else NaN
    name                               of objects: their class, where a detector tells one; files may lack this column
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from egohod.errors import UserError

LEFT, RIGHT = 0, 1
UNKNOWN_STATE = -1
NO_CONTACT, SELF_CONTACT, OTHER_PERSON, PORTABLE_OBJECT, STATIONARY_OBJECT = range(5)
EDGES = ("left", "top", "right", "bottom")
ROLES = ("left hand", "right hand", "active object")
"""What :meth:`BoxTable.at` tells of each moment, in this order."""

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
OPTIONAL = "name"  # not of the published schema; files made before it was told do without
# A clip's frame takes the boxes of the nearest picture that was looked at, if it is no farther than this.
NEAREST_SECONDS = 0.1


class DetectionError(UserError):
    """A file of detections that cannot be used."""


class BoxTable:
    """Both hands and the active object at any time of any video; numpy arrays only, so workers share them."""

    def __init__(self, detections: pd.DataFrame) -> None:
        """``detections`` has the columns of ``SCHEMA``; see :meth:`read` for files."""
        moments = ["video_id", "second"]
        index = pd.MultiIndex.from_frame(detections[moments]).unique().sort_values()
        boxes = np.full((len(index), len(ROLES), len(EDGES)), np.nan, dtype=np.float32)
        best = detections.sort_values("score", kind="stable", ascending=False)
        hands = best[best["kind"] == "hand"].drop_duplicates([*moments, "side"])
        for role, found in enumerate(
            (hands[hands["side"] == LEFT], hands[hands["side"] == RIGHT], _active(best, hands))
        ):
            boxes[index.get_indexer(pd.MultiIndex.from_frame(found[moments])), role] = found[list(EDGES)].to_numpy()
        self._boxes = boxes
        self._seconds = index.get_level_values("second").to_numpy(np.float64)
        codes, videos = pd.factorize(index.get_level_values("video_id"))
        # Sorted, as the moments are; one name a video, so that millions of moments hold no text.
        self._videos = videos.to_numpy().astype(str)
        self._first = np.searchsorted(codes, np.arange(len(videos)))
        self._end = np.append(self._first[1:], len(index))

    @classmethod
    def read(cls, path: str | Path) -> BoxTable:
        """See :func:`read`."""
        return cls(read(path).to_pandas())

    def __len__(self) -> int:
        """Moments with a box."""
        return len(self._seconds)

    def at(self, video_id: str, seconds: np.ndarray) -> np.ndarray:
        """``seconds`` [T] -> boxes float32 [T, 3, 4]: left hand, right hand, active object; NaN where none is known."""
        boxes = np.full((len(seconds), len(ROLES), len(EDGES)), np.nan, dtype=np.float32)
        video = int(np.searchsorted(self._videos, video_id))
        if video == len(self._videos) or self._videos[video] != video_id:
            return boxes
        known = slice(self._first[video], self._end[video])
        times = self._seconds[known]
        after = np.searchsorted(times, seconds).clip(max=len(times) - 1)
        before = (after - 1).clip(min=0)
        nearest = np.where(np.abs(times[before] - seconds) <= np.abs(times[after] - seconds), before, after)
        near = np.abs(times[nearest] - seconds) <= NEAREST_SECONDS
        boxes[near] = self._boxes[known][nearest[near]]
        return boxes


def write(detections: pa.Table, path: Path) -> None:
    """Write a table of ``SCHEMA``."""
    pa.parquet.write_table(detections.cast(SCHEMA), path)


def read(path: str | Path) -> pa.Table:
    """A parquet file, or all parquet files of a folder -> table of ``SCHEMA``. Raises :class:`DetectionError`."""
    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DetectionError(f"{path}: the folder holds no parquet file")
    return pa.concat_tables([_read(file) for file in files])


def check(detections: pa.Table, name: str) -> None:
    """Raise :class:`DetectionError` with the first row of ``name`` that holds no box as ``SCHEMA`` means it."""
    column = {each: detections.column(each).to_numpy(zero_copy_only=False) for each in (*EDGES, "second", "side")}
    edges = np.stack([column[edge] for edge in EDGES], axis=1)
    kind = np.asarray(detections.column("kind").to_pylist(), dtype=object)
    wrong = ~((edges >= 0) & (edges <= 1)).all(axis=1) | (edges[:, :2] > edges[:, 2:]).any(axis=1)
    wrong |= ~np.isin(kind, ("hand", "object")) | ~np.isfinite(column["second"])
    wrong |= (kind == "hand") & ~np.isin(column["side"], (LEFT, RIGHT))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DetectionError(
            f"{name}: row {row + 1} is no box of a hand or an object with edges from 0 to 1: "
            f"{detections.slice(row, 1).to_pylist()[0]}"
        )


def _read(path: Path) -> pa.Table:
    try:
        table = pa.parquet.read_table(path)
        names = table.column_names
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last for names of columns
        raise DetectionError(f"{path}: not readable as parquet: {' '.join(str(error).split())}") from error
    if OPTIONAL not in names:
        table = table.append_column(OPTIONAL, pa.nulls(len(table), pa.string()))
    missing = [name for name in SCHEMA.names if name not in (*names, OPTIONAL)]
    if missing:
        raise DetectionError(f"{path}: lacks the columns {', '.join(missing)}; there are {', '.join(SCHEMA.names)}")
    try:
        table = table.select(SCHEMA.names).cast(SCHEMA)
        table.validate(full=True)  # such as texts that are no UTF-8
    except (pa.ArrowException, ValueError) as error:
        raise DetectionError(f"{path}: a column is of another type: {' '.join(str(error).split())}") from error
    check(table, str(path))
    return table


def _active(best: pd.DataFrame, hands: pd.DataFrame) -> pd.DataFrame:
    """One object a moment: where a touching hand points to, else the surest. Rows come the surest first."""
    moments = ["video_id", "second"]
    objects = best[best["kind"] == "object"]
    pointing = hands[hands["offset_x"].notna() & (hands["state"] > NO_CONTACT)].drop_duplicates(moments)
    target = pointing[moments].assign(
        x=(pointing["left"] + pointing["right"]) / 2 + pointing["offset_x"],
        y=(pointing["top"] + pointing["bottom"]) / 2 + pointing["offset_y"],
    )
    both = objects.merge(target, on=moments, how="left")
    x, y = (both["left"] + both["right"]) / 2, (both["top"] + both["bottom"]) / 2
    # Where no hand points all distances are alike, and a stable sort leaves the surest in front.
    both["distance"] = np.nan_to_num(np.hypot(x - both["x"], y - both["y"]))
    return both.sort_values("distance", kind="stable").drop_duplicates(moments)
