"""Detectors of hands and objects: their base class, how one is made by name, and what they share.

To add one: a module in this package with a subclass of :class:`Detector`, and a line in ``DETECTORS`` of
:mod:`egohod.hod.config`. The arguments of its constructor, with their annotations and defaults, are what users may give
as ``detector.options``; type checks and cache keys follow from them.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from egohod.data import detections
from egohod.data.detections import EDGES, LEFT, RIGHT, SCHEMA, UNKNOWN_STATE
from egohod.errors import UserError
from egohod.hod.config import DETECTORS

log = logging.getLogger(__name__)

_SAME_HAND = 0.5  # intersection over union above which two boxes are two detections of one hand
_SIDE_BY_SIDE = 0.1  # in picture widths; the order of hands that are closer does not tell their sides


class Detector(ABC):
    """Finds boxes of hands and objects in the frames of a clip. The constructor's arguments are its options."""

    reads_files = False
    """Whether boxes are read from files. Such a detector is made once, before the workers start, and shared by them,
    and :meth:`videos` is checked against the clips; a model is loaded by each worker."""
    is_batched = False
    """Whether a picture's boxes depend on nothing but the picture, so that unrelated ones may be given together."""

    @abstractmethod
    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None
    ) -> pa.Table:
        """Boxes in ``pictures`` uint8 [T, H, W, 3] of a video, seen at ``seconds`` [T], as a table of ``SCHEMA``.

        ``pictures`` may be None for detectors that read files. A table without rows where there are no boxes; one that
        does not follow the schema (:func:`check_boxes`) ends the run. Raises :class:`VideoError` for a clip that it
        cannot process: that clip fails and the run continues.
        """

    def videos(self) -> set[str]:
        """Ids of the videos of which the files hold boxes; only of detectors that read files."""
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027  # most have nothing to end
        """End what the constructor started."""


# --- By name ---


def detector_class(name: str) -> type[Detector]:
    """The class of the detector ``name``. Raises :class:`UserError` for names that are not in ``DETECTORS``."""
    if name not in DETECTORS:
        raise UserError(f"detector is '{name}', but must be one of {', '.join(DETECTORS)}")
    module, _, attribute = DETECTORS[name].rpartition(".")
    return typing.cast("type[Detector]", getattr(importlib.import_module(f"{__name__}.{module}"), attribute))


def make_detector(name: str, options: Mapping[str, Any]) -> Detector:
    """The detector ``name`` with ``options`` as arguments of its constructor.

    Raises :class:`UserError` for unknown names and options, for values of a wrong type, and what the detector raises.
    """
    return detector_class(name)(**typed_options(name, options))


def typed_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with the types that the detector's constructor declares.

    Options that only other detectors have are left out with a warning: ``detector.kind=...`` over a configuration of
    another detector leaves its options behind, and no override takes a key away. Raises :class:`UserError` for unknown
    names and options, for missing options and for values of a wrong type.
    """
    parameters = inspect.signature(detector_class(name)).parameters
    unknown = [key for key in options if key not in parameters]
    if unknown:
        others = set[str]()
        for other in DETECTORS:
            # The module of a detector that is not used may need packages that are not installed.
            with contextlib.suppress(ImportError):
                others.update(inspect.signature(detector_class(other)).parameters)
        for key in others.intersection(unknown):
            log.warning("detector.options.%s is ignored: detector.kind=%s does not read it", key, name)
        options = {key: value for key, value in options.items() if key in parameters or key not in others}
        unknown = [key for key in unknown if key not in others]
    missing = [key for key, each in parameters.items() if each.default is each.empty and key not in options]
    if unknown or missing:
        problem = f"does not know {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise UserError(f"detector {name} {problem}; its options are {', '.join(parameters)}")
    # get_type_hints: with postponed annotations, those of the signature are text.
    hints, typed = typing.get_type_hints(detector_class(name).__init__), dict[str, Any]()
    for key, value in options.items():
        try:
            typed[key] = _convert(value, hints.get(key, Any))
        except (ValueError, TypeError):
            annotation = parameters[key].annotation
            kind = annotation.__name__ if isinstance(annotation, type) else str(annotation)
            kind = kind.replace("None", "null").replace("typing.", "")
            raise UserError(f"detector.options.{key} is {value!r}, but must be {kind}") from None
    return typed


def _convert(value: Any, kind: Any) -> Any:
    """``value`` as the annotation ``kind``, elements of containers too. Raises ValueError or TypeError if it is none.

    Configurations hold options as text, since their types are known only here: "07" and "5e-2" are numbers.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        # Text first: where it is allowed, "0123" is a name.
        for part in sorted(parts, key=lambda part: part is not str):
            try:
                return _convert(value, part)
            except (ValueError, TypeError):
                continue
        raise ValueError
    if origin is typing.Literal:
        return parts[[str(part) for part in parts].index(str(value))]  # no index: ValueError
    if kind is bool and isinstance(value, str):
        return (False, True)[("false", "true").index(value.lower())]
    if kind in (int, float):
        # bool is a subclass of int: "seed: true" is a mistake.
        if isinstance(value, bool) or not isinstance(value, (str, int, float) if kind is float else (str, int)):
            raise TypeError
        # An integer stays one where a float is allowed: cache keys contain it as it is written.
        try:
            return int(value) if isinstance(value, str) else value
        except ValueError:
            if kind is int:
                raise
            return float(value)
    # Text is a sequence of characters, but no list that anybody meant.
    is_text = isinstance(value, str) and origin is not None
    if is_text or not isinstance(value, (list, tuple) if origin is tuple else origin or kind):
        raise TypeError
    if not parts:
        return value
    if isinstance(value, Mapping):
        return {_convert(key, parts[0]): _convert(each, parts[1]) for key, each in value.items()}
    if origin is tuple and parts[-1] is not Ellipsis:
        return tuple(_convert(each, part) for each, part in zip(value, parts, strict=True))
    converted = [_convert(each, parts[0]) for each in value]
    return tuple(converted) if origin is tuple else converted


# --- What they share ---


def check_boxes(boxes: Any, name: str) -> pa.Table:
    """A detector's output ``boxes`` as a table of ``SCHEMA``.

    Raises :class:`UserError`, with ``name`` as its origin, for anything else: columns that are missing or of another
    type, edges that are not from 0 to 1 or not in order, an unknown kind or side, numbers that are missing or not
    finite, a score that is not from 0 to 1.
    """
    # Here, where detector and clip are known: NaN in a box would end the track stage in the middle of its arithmetic.
    if not isinstance(boxes, pa.Table):
        raise UserError(f"{name}: {type(boxes).__name__} instead of a table")
    boxes = detections.conform(boxes, boxes.column_names, name)
    # Beyond what files must satisfy: a score in per cent would pass every threshold, a missing state ends tracking.
    score, side = (boxes[column].to_numpy() for column in ("score", "side"))
    wrong = ~((score >= 0) & (score <= 1)) | ~np.isin(np.nan_to_num(side, nan=-1), (-1, LEFT, RIGHT))
    wrong |= boxes["state"].is_null().to_numpy() | boxes["frame_number"].is_null().to_numpy()
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(
            f"{name}: row {row + 1} has no score from 0 to 1, or no side (-1, {LEFT}, {RIGHT}), state or frame number: "
            f"{boxes.slice(row, 1).to_pylist()[0]}"
        )
    return boxes


def row(
    video_id: str, frame_number: int, second: float, box: np.ndarray, score: float, *, side: int = -1, name: str = ""
) -> dict[str, Any]:
    """One row of ``SCHEMA`` without contact state: a hand of ``side``, or an object where that is -1."""
    # Detectors draw boxes over the picture's edge.
    edges = dict(zip(EDGES, np.clip(box, 0, 1).tolist(), strict=True))
    kind = "object" if side < 0 else "hand"
    values = {"video_id": video_id, "frame_number": int(frame_number), "second": float(second), "kind": kind}
    values |= {"side": side, "state": UNKNOWN_STATE, "score": float(score), "name": name or None}
    return dict.fromkeys(SCHEMA.names) | values | edges


def assign_sides(boxes: np.ndarray, scores: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most one hand a side in one picture: indices of the boxes that remain [K], and their sides [K].

    ``boxes`` [N, 4], ``scores`` [N] and ``sides`` [N] (0 left, 1 right, -1 unknown) are a detector's output. Of
    duplicates the box with the higher score remains, and never more than two.
    """
    chosen: list[int] = []
    # stable: of equal scores the detector's first
    for i in np.argsort(-scores, kind="stable").tolist():
        if len(chosen) < 2 and all(_iou(boxes[i], boxes[j]) < _SAME_HAND for j in chosen):
            chosen.append(i)
    middle = (boxes[:, 0] + boxes[:, 2]) / 2
    # Without a side from the detector: the wearer's left hand is in the left half of most pictures.
    assigned = np.array([sides[i] if sides[i] >= 0 else int(middle[i] > 0.5) for i in chosen], dtype=np.int64)
    if len(chosen) == 2 and assigned[0] == assigned[1]:
        first, second = middle[chosen]
        if abs(first - second) >= _SIDE_BY_SIDE:
            assigned = np.array([0, 1] if first < second else [1, 0])
        else:  # one above the other: the place decides nothing, so the higher score does
            assigned[1] = 1 - assigned[0]
    return np.array(chosen, dtype=np.int64), assigned


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    common = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None).prod()
    return float(common / max((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - common, 1e-9))
