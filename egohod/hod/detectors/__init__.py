"""Detectors: pictures of a clip in, boxes of hands and objects in the schema of detections out.

mediapipe     hands from MediaPipe's landmarks; no objects, no contact
detections    files made elsewhere: our parquet, or EPIC-KITCHENS' protobuf files
torchvision   your own Faster R-CNN checkpoint with a label map
oracle        files again, spoiled on purpose: jitter and dropped frames, to see what the rest bears
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from egohod.hod.detectors.base import Detector, DetectorError

DETECTORS = {
    "mediapipe": "egohod.hod.detectors.mediapipe_hands:MediapipeHands",
    "detections": "egohod.hod.detectors.files:DetectionFiles",
    "torchvision": "egohod.hod.detectors.torchvision_boxes:TorchvisionBoxes",
    "oracle": "egohod.hod.detectors.files:Oracle",
}
"""Where the class of each is."""


def make_detector(name: str, options: Mapping[str, Any]) -> Detector:
    """The detector called ``name``, of ``DETECTORS``; ``options`` are the arguments of its class.

    Raises :class:`DetectorError` for unknown names and options, for those of another type, and what the detector itself
    raises.
    """
    return _class_of(name)(**typed_options(name, options))


def typed_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a detector's class with the types that it declares; a configuration holds them as text.

    Raises :class:`DetectorError` for unknown names and options, and for those of another type.
    """
    detector = _class_of(name)
    allowed = inspect.signature(detector).parameters
    unknown = [each for each in options if each not in allowed]
    lacking = [key for key, each in allowed.items() if each.default is each.empty and key not in options]
    if unknown or lacking:
        what = f"does not know {', '.join(unknown)}" if unknown else f"needs {', '.join(lacking)}"
        raise DetectorError(f"detector {name} {what}; its options are {', '.join(allowed)}")
    hints, typed = typing.get_type_hints(detector.__init__), dict(options)
    for key, value in options.items():
        if isinstance(value, str) and not _fits(value, hints[key]):
            typed[key] = value = _number(value, hints[key])
        if not _fits(value, hints[key]):
            kind = str(allowed[key].annotation)
            raise DetectorError(f"detector.options.{key} is {value!r}, but must be {kind.replace('None', 'null')}")
    return typed


def _class_of(name: str) -> Any:
    if name not in DETECTORS:
        raise DetectorError(f"detector is '{name}', but must be one of {', '.join(DETECTORS)}")
    module, _, attribute = DETECTORS[name].partition(":")
    # Imported where it is wanted: each brings packages of its own.
    return getattr(importlib.import_module(module), attribute)


def _number(text: str, hint: Any) -> Any:
    """The number that a text spells, where a type takes numbers; else the text."""
    for kind in (int, float):
        if _fits(kind(), hint):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, or of one of several."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [typing.get_origin(kind) or kind for kind in kinds]
    if float in plain:
        plain.append(int)
    return isinstance(value, tuple(plain)) and not isinstance(value, bool)
