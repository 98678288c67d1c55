"""Stand-ins for the objects that lie beside weights in a pickle: they hold what they were made of and do nothing.

A checkpoint of another project often carries its configuration and scores: argparse, OmegaConf and numpy objects. None
of their classes is imported to read it. Each is replaced by a stand-in, which cannot run code whatever a file says;
:func:`plain` turns stand-ins into plain values for people to read. Any class that is not listed here is refused.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from torch import Tensor


class Inert:
    """Holds the arguments and the state that a pickle gives an object."""

    name: ClassVar[str] = "object"
    parts: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __setstate__(self, state: Any) -> None:
        self.state = state


_MOST_VALUES = 10_000


def _empty(*_: Any) -> dict[Any, Any]:
    return {}


_OMEGACONF = (
    *("dictconfig.DictConfig", "listconfig.ListConfig", "base.Metadata", "base.ContainerMetadata", "nodes.AnyNode"),
    *("nodes.StringNode", "nodes.IntegerNode", "nodes.FloatNode", "nodes.BooleanNode"),
)
_NUMPY = ("dtype", "ndarray", "core.multiarray.scalar", "core.multiarray._reconstruct")
_NUMPY_2 = ("_core.multiarray.scalar", "_core.multiarray._reconstruct")
_TYPES = ("typing.Any", *(f"builtins.{name}" for name in ("dict", "list", "tuple", "str", "int", "float", "bool")))

ALLOWED = (
    "argparse.Namespace",
    *(f"omegaconf.{name}" for name in _OMEGACONF),
    *(f"numpy.{name}" for name in (*_NUMPY, *_NUMPY_2)),
    *_TYPES,
)
"""Classes and functions that have a stand-in. ``collections.defaultdict`` becomes a plain dict."""


def stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What to hand to ``torch.serialization.safe_globals``; made anew, so that no file can leave a mark on them."""
    return [
        *((type("Inert", (Inert,), {"name": name}), name) for name in ALLOWED),
        (_empty, "collections.defaultdict"),
    ]


def plain(value: Any) -> Any:
    """Stand-ins as plain values: dicts, lists, numbers, text; what has no plain form becomes its name.

    Of values that hold one another, or the same one many times, so much is shown as a person may want to read.
    """
    left = _MOST_VALUES

    def walk(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if depth > 20 or left < 0:
            return "..."
        if isinstance(value, Inert):
            held = _content(value)
            return walk(held, depth + 1) if isinstance(held, (Mapping, list, Inert)) else held
        if isinstance(value, Mapping):
            return {_key(key): walk(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(inner, depth + 1) for inner in value]
        if isinstance(value, Tensor):
            return f"tensor {list(value.shape)}"
        return value if value is None or isinstance(value, (str, int, float, bool)) else type(value).__name__

    return walk(value, 0)


def _key(key: Any) -> Any:
    return key if isinstance(key, (str, int, float)) else type(key).__name__


def _content(value: Inert) -> Any:
    """What a stand-in's object is about."""
    kind = value.name.rpartition(".")[2]
    state = value.state if isinstance(value.state, Mapping) else {}
    if kind == "Namespace":
        return state
    if kind in ("DictConfig", "ListConfig"):
        return state.get("_content")
    if kind.endswith("Node"):
        return state.get("_val")
    if kind == "scalar":
        return _number(value)
    if kind == "_reconstruct":
        shape = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else "?"
        return f"array {reprlib.repr(shape)}"
    return value.name


def _number(scalar: Inert) -> Any:
    """The value of numpy's ``scalar(dtype, bytes)``."""
    match scalar.parts:
        case (Inert(parts=(str(code), *_)), bytes(content)) if re.fullmatch(r"[biuf]\d", code):
            if len(content) == int(code[1]):
                return np.frombuffer(content, dtype=code)[0].item()
    return scalar.name


def describe(value: Any) -> str:
    """What lies beside the weights, in one line."""
    kind = f"{value.name}: " if isinstance(value, Inert) and "numpy" not in value.name else ""
    value = plain(value)
    if isinstance(value, dict):
        shown = [f"{key}={_short(inner)}" for key, inner in islice(value.items(), 12)]
        more = f", ... ({len(value)} in all)" if len(value) > 12 else ""
        return f"{kind}{', '.join(shown)}{more}" if value else f"{kind}empty"
    return f"{kind}{_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{len(value)} values}}"
    if isinstance(value, list) and len(value) > 4:
        return f"[{len(value)} values]"
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
