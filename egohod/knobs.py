"""Declare settings: dataclass fields with a reason and a range; list them, check them, print them for ``--help``.

Every package owns the dataclasses of its own settings (``egohod/<package>/config.py``), made of :func:`knob` fields;
:mod:`egohod.config` composes them and reads files. This module imports nothing of the project.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Any, get_args, get_origin

from omegaconf import ListConfig


def knob(
    default: Any,
    why: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its reason and its range.

    Args:
        default: lists and dicts are copied.
        why: what it is for and where the default comes from; ``--help`` prints it.
        choices: the allowed values.
        low, high: inclusive bounds.
        above: an exclusive bound.
    """
    metadata = {"why": why, "choices": choices, "low": low, "high": high, "above": above}
    # A mutable default would be shared by all instances; dataclasses refuse it.
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def part(cls: type) -> Any:
    """A nested section."""
    return field(default_factory=cls)


# --------------------------------------------------------------------------------------------------
# The schema
# --------------------------------------------------------------------------------------------------


def knobs(schema: type, tree: Any = None, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """All leaf fields under ``schema`` as (dotted name, field, type), in order.

    Sections that a user names himself (``data.train.NAME``) are those of ``tree``, a nested dict; without one they
    appear once, as NAME.
    """
    hints = typing.get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        name, kind = f"{prefix}{entry.name}", hints[entry.name]
        # The tree is only needed for the names that a user chose; the rest follows from the schema.
        inner = None if tree is None else tree[entry.name]
        if section := section_of(kind):
            yield from knobs(section, inner, f"{name}.")
        elif named := named_sections(kind):
            for key in ["NAME"] if inner is None else inner:
                yield from knobs(named, None if inner is None else inner[key], f"{name}.{key}.")
        else:
            yield name, entry, kind


def section_of(kind: Any) -> type | None:
    """The dataclass of a section."""
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def named_sections(kind: Any) -> type | None:
    """The dataclass of sections whose names the user chooses."""
    return section_of(get_args(kind)[1]) if get_origin(kind) is dict else None


def out_of_range(config: Any) -> list[tuple[str, str]]:
    """Every knob of a dataclass of knobs whose value is not allowed, as (key, what is wrong with it)."""
    problems: list[tuple[str, str]] = []
    tree = dataclasses.asdict(config)
    for name, entry, _ in knobs(type(config), tree):
        value: Any = tree
        for key in name.split("."):
            value = value[key]
        # Whether null is allowed is a matter of the type, which the loader has checked.
        if value is not None and (wrong := _out_of_range(value, entry.metadata)):
            problems.append((name, f"{name} is {value!r}, but {wrong}"))
    return problems


def _out_of_range(value: Any, rule: Any) -> str | None:
    # The range of a list is that of each of its values.
    if isinstance(value, (list, ListConfig)):
        return next((wrong for each in value if (wrong := _out_of_range(each, rule))), None)
    # The nearest word: most of what is not allowed is a slip of the keyboard.
    if rule["choices"] is not None and value not in rule["choices"]:
        near = difflib.get_close_matches(str(value), [str(c) for c in rule["choices"]], n=1)
        return f"must be one of {', '.join(map(str, rule['choices']))}" + (f"; did you mean {near[0]}?" if near else "")
    # YAML's .nan compares as neither above nor below any bound.
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    bad = (
        (rule["low"] is not None and value < rule["low"])
        or (rule["high"] is not None and value > rule["high"])
        or (rule["above"] is not None and value <= rule["above"])
    )
    return f"must be {allowed_values(rule)}" if bad else None


def help_text(schema: type) -> str:
    """Every knob with type, default, range and reason, one paragraph per section."""
    lines, section = [], None
    for name, entry, kind in knobs(schema):
        head = name.rpartition(".")[0]
        if head != section:
            section, owner = head, schema
            for key in filter(None, head.split(".")):
                owner = named_sections(owner) or typing.get_type_hints(owner)[key]
            # The first line of the docstring of the dataclass that the section is made of.
            lines.append(f"\n{head or 'on top'}: {(owner.__doc__ or '').strip().splitlines()[0]}")
        factory = entry.default_factory
        default = entry.default if factory is dataclasses.MISSING else factory()
        # As YAML writes it, so that a line of --help can be copied into a file or a command.
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        allowed = allowed_values(entry.metadata)
        lines.append(f"  {name}={shown}  ({type_name(kind)}{'; ' + allowed if allowed else ''})")
        lines.append(f"      {entry.metadata['why']}")
    return "\n".join(lines).lstrip("\n")


def allowed_values(rule: Any) -> str:
    """The range of a knob in words, from its metadata; empty where everything is allowed."""
    if not rule:  # a field that is no knob
        return ""
    if rule["choices"] is not None:
        return "one of " + ", ".join(map(str, rule["choices"]))
    words = {"above": "above", "low": "at least", "high": "at most"}
    return " and ".join(f"{text} {rule[bound]}" for bound, text in words.items() if rule[bound] is not None)


def type_name(kind: Any) -> str:
    """A declared type as ``--help`` and messages show it."""
    # str | None is written "str | null": null is what users type.
    if get_origin(kind) is not None and type(None) in get_args(kind):
        return " | ".join("null" if part is type(None) else type_name(part) for part in get_args(kind))
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)
