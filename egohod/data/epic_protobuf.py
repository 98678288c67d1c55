"""The hand-object detections that EPIC-KITCHENS publishes, one file a video, to our table and back.

A file is a pickled list of bytes; each of them is a serialised protobuf message ``Detections`` of one frame. The schema
(proto3, package ``model.detections``) is built here, so no generated module is needed. Only lists and bytes are taken
from the pickle: whatever asks for more is refused before anything runs.

Source: epic-kitchens/epic-kitchens-100-hand-object-bboxes, ``types.proto`` and ``hoa/io.py``. Frames count from 1 there
and from 0 in our table.
"""

from __future__ import annotations

import pickle
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from egohod import pickles
from egohod.data.detections import EDGES, NO_CONTACT, SCHEMA, UNKNOWN_STATE, DetectionError, check

FIRST_FRAME = 1
_PACKAGE = "model.detections"
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
_SCALARS = {
    "float": descriptor_pb2.FieldDescriptorProto.TYPE_FLOAT,
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
}


def _message_class() -> Any:
    """The class of ``Detections``, in a pool of its own: another library may have registered the same names."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="egohod_epic.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, each in enumerate(fields.split(", "), start=1):
            called, kind = each.rstrip("*").split(" ")
            label = field.LABEL_REPEATED if each.endswith("*") else field.LABEL_OPTIONAL
            added = message.field.add(name=called, number=number, label=label)
            if kind in _SCALARS:
                added.type = _SCALARS[kind]
            else:
                added.type = field.TYPE_ENUM if "." in kind else field.TYPE_MESSAGE
                added.type_name = f".{_PACKAGE}.{kind}"
        if name == "HandDetection":
            for called, values in (("HandState", _STATES), ("HandSide", _SIDES)):
                enum = message.enum_type.add(name=called)
                for value, word in enumerate(values):
                    enum.value.add(name=word, number=value)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Detections"))


_Detections = _message_class()


def read(path: str | Path, fps: float) -> pa.Table:
    """One video's file -> table of ``SCHEMA``; ``fps`` is the video's frame rate and gives each row its second.

    Raises :class:`DetectionError` with the file, and the frame where there is one: no such file, cut off, not a list
    of messages, a pickle that asks for more than that, boxes that are no shares of the picture.
    """
    path = Path(path)
    try:
        # EPIC's own files were written by Python 3; a text of Python 2 would arrive as bytes as well.
        messages = pickles.load(path, "a list of detections", encoding="bytes")
    except OSError as error:
        raise DetectionError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise DetectionError(f"{path}: no pickled list of detections, or cut off: {error}") from error
    if not isinstance(messages, list) or not all(isinstance(each, bytes) for each in messages):
        raise DetectionError(f"{path}: holds {reprlib.repr(messages)} instead of a list of messages, one a frame")
    rows: list[dict[str, Any]] = []
    for place, message in enumerate(messages, start=1):
        try:
            rows += _rows(_Detections.FromString(message), fps)
        except DecodeError as error:
            raise DetectionError(f"{path}: message {place} of {len(messages)} is cut off or no detections") from error
    table = pa.Table.from_pylist(rows, SCHEMA)
    check(table, str(path))
    return table


def write(detections: pa.Table, folder: str | Path) -> list[Path]:
    """A table of ``SCHEMA`` -> ``folder/<video_id>.pkl`` for each of its videos, as EPIC-KITCHENS publishes them.

    The schema knows neither an unknown contact state, which becomes no contact, nor names of objects. Raises
    :class:`DetectionError` for a video id that is no file name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    frames: dict[str, dict[int, Any]] = {}
    for row in detections.cast(SCHEMA).to_pylist():
        video, number = row["video_id"], row["frame_number"] + FIRST_FRAME
        messages = frames.setdefault(video, {})
        if number not in messages:
            messages[number] = _Detections(video_id=video, frame_number=number)
        _add(messages[number], row)
    written = []
    for video, messages in frames.items():
        if not video or Path(video).name != video:
            raise DetectionError(f"{folder}: video id '{video}' cannot name a file")
        path = folder / f"{video}.pkl"
        path.write_bytes(pickle.dumps([messages[number].SerializeToString() for number in sorted(messages)]))
        written.append(path)
    return written


def _rows(message: Any, fps: float) -> Iterator[dict[str, Any]]:
    number = message.frame_number - FIRST_FRAME
    moment = {"video_id": message.video_id, "frame_number": number, "second": (number + 0.5) / fps}
    for kind, boxes in (("hand", message.hands), ("object", message.objects)):
        for found in boxes:
            row = dict.fromkeys(SCHEMA.names) | moment | {"kind": kind, "side": -1, "state": UNKNOWN_STATE}
            row |= {edge: getattr(found.bbox, edge) for edge in EDGES} | {"score": found.score}
            if kind == "hand":
                row |= {"side": found.side, "state": found.state}
                if found.state != NO_CONTACT:
                    row |= {"offset_x": found.object_offset.x, "offset_y": found.object_offset.y}
            yield row


def _add(message: Any, row: dict[str, Any]) -> None:
    added = (message.hands if row["kind"] == "hand" else message.objects).add(score=row["score"])
    for edge in EDGES:
        setattr(added.bbox, edge, row[edge])
    if row["kind"] == "hand":
        added.side, added.state = row["side"], max(row["state"], NO_CONTACT)
        for axis in ("x", "y"):
            offset = row[f"offset_{axis}"]
            setattr(added.object_offset, axis, 0.0 if offset is None or np.isnan(offset) else offset)
