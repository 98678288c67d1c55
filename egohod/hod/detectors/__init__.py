"""Detectors of hands and objects: the registry.

To add one: a module in this package with a subclass of :class:`~egohod.hod.detectors.base.Detector`, and one line in
``DETECTORS``. The arguments of its constructor, with their annotations and defaults, are what users may give as
``detector.options``; `--help`, type checks and cache keys follow from them.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from egohod.errors import UserError
from egohod.hod.detectors.base import Detector

# Names instead of classes: each module imports packages that the others do without (torchvision, protobuf).
DETECTORS = {
    "mediapipe": "mediapipe_hands:MediapipeHands",
    "detections": "files:DetectionFiles",
    "torchvision": "torchvision_boxes:TorchvisionBoxes",
    "oracle": "files:Oracle",
}


def detector_class(name: str) -> type[Detector]:
    """The class of the detector ``name``. Raises :class:`UserError` for names that are not in ``DETECTORS``."""
    if name not in DETECTORS:
        raise UserError(f"detector is '{name}', but must be one of {', '.join(DETECTORS)}")
    module, _, attribute = DETECTORS[name].partition(":")
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
