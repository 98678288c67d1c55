"""Boxes and facts as plain JSON values, and back: what stands in the blocks.

Numbers are rounded to a hundred-thousandth, of the picture or of a second, before anybody reads them: a stage sees the
same whether the one before ran just now or last week.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from egohod.data.detections import SCHEMA

_DIGITS = 5
Record = TypeVar("Record")


def boxes_to_plain(boxes: pa.Table) -> dict[str, list[Any]]:
    """Rows of the detections' schema -> a list for each column; the video's id, alike in all, is left out."""
    return {name: plain(boxes[name].to_pylist()) for name in SCHEMA.names if name != "video_id"}


def boxes_from_plain(columns: dict[str, list[Any]], video_id: str) -> pa.Table:
    """The inverse of :func:`boxes_to_plain`, up to rounding."""
    rows = len(columns["second"])
    return pa.table({"video_id": [video_id] * rows} | columns).select(SCHEMA.names).cast(SCHEMA)


def plain(value: Any) -> Any:
    """A dataclass of numbers, texts, arrays and such as what JSON can spell; NaN becomes null."""
    if dataclasses.is_dataclass(value):
        return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        return plain(value.item())
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    return value


def read(kind: type[Record], value: Any) -> Record:
    """The dataclass ``kind`` of what :func:`plain` made of one. null in an array is NaN."""
    return typing.cast(Record, _read(kind, value))


def _read(kind: Any, value: Any) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (part for part in parts if part is not types.NoneType)
        return None if value is None else _read(inner, value)
    if origin is dict:
        return {key: _read(parts[1], each) for key, each in value.items()}
    if origin in (tuple, list):
        return origin(_read(parts[0], each) for each in value)
    if kind is np.ndarray:
        return np.array(value, dtype=np.float64)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _read(hints[name], each) for name, each in value.items()})  # type: ignore[operator]
    return value
