"""The narrations in a cell of an annotation file: one, several, or what programs write where there is none.

Lists come as Python, JSON, NumPy and pandas print them: ``['a', 'b']``, ``["a", null]``, ``['a' 'b']`` (NumPy prints no
commas, and Python would read one text), ``array(['a', 'b'], dtype=object)``, ``('a', 'b')``, nested too. They are taken
apart by a grammar of their own; nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# How programs spell that there is nothing; as the whole of a narration it is none.
_NOTHING = r"(?:nan|null|none|n/?a|#n/a|<na>|nat|pd\.na)"
_PANDAS = r"<\w+Array>\s*(\[.*\])\s*Length: \d+, dtype: \S+"
_LIST = rf"(?s)^\s*(?:\[.*\]|array\(\s*\[.*\)|\(\s*['\"].*\)|{_PANDAS})\s*$"
# Lists that may hold nothing at all; only these few are taken apart while reading.
_BARE_LIST = (
    rf"(?i)^(?:[\s,\[\]()'\"]|array|<\w+Array>|Length: \d+|dtype: \S+|np\.str_|dtype\s*=\s*[^\s,]+|{_NOTHING})*$"
)
_TOKEN = re.compile(
    rf"""(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<open>(?:array|np\.str_)?\(|\[)|(?P<close>[\])])"""
    rf"""|(?P<number>[-+]?\d+(?:\.\d+)?(?=[\s,\])]))|{_NOTHING}(?=[\s,\])])|[\s,]+|dtype\s*=\s*(?:\w+|'[^']*')""",
    re.IGNORECASE | re.DOTALL,
)
# Texts and lists of one entry.
_MOST_ITEMS = 10_000


def narrations_in(cell: str) -> tuple[str, ...]:
    """The narrations of a cell, without blanks around them; empty if it says nothing."""
    cell = cell.strip()
    if cell.startswith("<") and (printed := re.fullmatch(_PANDAS, cell, re.DOTALL)):
        cell = printed[1]
    found = _items(cell) if re.match(_LIST, cell) else None
    # '[unsure] stirs [the pot]' is a narration, not a list
    texts = (cell,) if found is None else (item.strip() for item in found)
    return tuple(text for text in texts if text and not re.fullmatch(_NOTHING, text, re.IGNORECASE))


def lists(cells: pa.ChunkedArray) -> np.ndarray:
    """Which cells look like lists, bool [N]."""
    return pc.match_substring_regex(cells, _LIST).to_numpy()


def nothing(cells: pa.ChunkedArray) -> np.ndarray:
    """Which cells hold no narration, bool [N]."""
    empty = pc.match_substring_regex(cells, rf"(?i)^\s*{_NOTHING}?\s*$").to_numpy().copy()
    doubtful = np.flatnonzero(lists(cells) & pc.match_substring_regex(cells, _BARE_LIST).to_numpy())
    empty[doubtful] = [not narrations_in(cells[int(i)].as_py()) for i in doubtful]
    return empty


def flat_texts(value: Any, depth: int = 8) -> Iterator[Any]:
    """What a value from a pickle holds, lists taken apart (up to ``depth`` in each other) and None and NaN left out.

    A value with too many lists in it comes out as it is: lists that hold the same list again and again may be short in
    a file and without end here.
    """
    found, todo = list[Any](), [(value, depth)]
    for _ in range(_MOST_ITEMS):
        if not todo:
            yield from found
            return
        item, left = todo.pop()
        if isinstance(item, (list, tuple)) and left:
            if len(item) + len(todo) > _MOST_ITEMS:
                break
            todo += [(inner, left - 1) for inner in reversed(item)]
        elif item is not None and item == item:  # NaN differs from itself
            found.append(item)
    yield value


def _items(cell: str) -> list[str] | None:
    """The texts and numbers in a printed list; None if it is none."""
    items, depth, at = list[str](), 0, 0
    while at < len(cell):
        token = _TOKEN.match(cell, at)
        if token is None or (at and not depth):
            return None
        depth += (token["open"] is not None) - (token["close"] is not None)
        if token["text"] or token["number"]:
            items.append(_unquoted(token["text"]) if token["text"] else token["number"])
        at = token.end()
    return None if depth else items


def _unquoted(text: str) -> str:
    """What a quoted text spells: as JSON writes it or, if it is none, as Python does."""
    if "\\" in text:
        for read in (json.loads, ast.literal_eval):
            try:
                return str(read(text))
            except (ValueError, SyntaxError):
                continue
    return text[1:-1]
