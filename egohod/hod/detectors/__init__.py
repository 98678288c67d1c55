"""Detectors of hands and objects: their base class, how one is made by name, and what they share.

To add one: a module in this package with a subclass of :class:`Detector`, and a line in ``DETECTORS`` of
:mod:`egohod.hod.config`. The arguments of its constructor, with their annotations and defaults, are what users may give
as ``detector.options``; type checks and cache keys follow from them.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from egohod.data.detections import EDGES, SCHEMA, UNKNOWN_STATE
from egohod.errors import UserError
from egohod.hod.config import DETECTORS

_SAME_HAND = 0.5  # intersection over union above which two boxes are two detections of one hand
_SIDE_BY_SIDE = 0.1  # in picture widths; the order of hands that are closer does not tell their sides


class Detector(ABC):
    """Finds boxes of hands and objects in the frames of a clip. The constructor's arguments are its options."""

    reads_files = False
    """Whether boxes are read from files (option ``path``). Such a detector is made once, before the workers start, and
    shared by them, and :meth:`videos` is checked against the clips; a model is loaded by each worker."""

    @abstractmethod
    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None
    ) -> pa.Table:
        """Boxes in ``pictures`` uint8 [T, H, W, 3] of a video, seen at ``seconds`` [T], as a table of ``SCHEMA``.

        ``pictures`` may be None for detectors that read files. A table without rows where there are no boxes. Raises
        :class:`VideoError` for a clip that it cannot process: that clip fails and the run continues.
        """

    def videos(self) -> set[str]:
        """Ids of the videos of which the files hold boxes; only of detectors that read files."""
        raise NotImplementedError


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

    Raises :class:`UserError` for unknown names and options, for missing options and for values of a wrong type.
    """
    cls = detector_class(name)
    parameters = inspect.signature(cls).parameters
    unknown = [key for key in options if key not in parameters]
    missing = [key for key, each in parameters.items() if each.default is each.empty and key not in options]
    if unknown or missing:
        problem = f"does not know {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise UserError(f"detector {name} {problem}; its options are {', '.join(parameters)}")
    # get_type_hints: with postponed annotations, those of the signature are text.
    hints, typed = typing.get_type_hints(cls.__init__), dict(options)
    for key, value in options.items():
        union = isinstance(hints[key], types.UnionType)
        kinds = tuple(
            typing.get_origin(kind) or kind for kind in (typing.get_args(hints[key]) if union else [hints[key]])
        )
        if float in kinds:
            kinds += (int,)
        # Configurations hold options as text, since their types are known only here: "07" and "5e-2" are numbers.
        for number in (int, float):
            if isinstance(typed[key], str) and str not in kinds and number in kinds:
                try:
                    typed[key] = number(value)
                except ValueError:
                    continue
        # bool is a subclass of int: "seed: true" is a mistake.
        if not isinstance(typed[key], kinds) or isinstance(typed[key], bool):
            kind = str(parameters[key].annotation).replace("None", "null")
            raise UserError(f"detector.options.{key} is {value!r}, but must be {kind}")
    return typed


# --- What they share ---


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
