"""Narrations of a cell, in the spellings of the programs that write annotation files."""

from __future__ import annotations

import csv
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from egohod.data.config import SourceConfig
from egohod.data.formats import read_clips
from egohod.data.table import inspect_cells, narrations_in

WORDS = ['cuts the dog\'s "red" onion', "台所, stirs", "#C C [unsure] 100%", "back\\slash\nline", "it's", 'a "b"']

LISTS: dict[str, tuple[str, ...]] = {
    "['a', 'b']": ("a", "b"),
    "['a' 'b']": ("a", "b"),  # NumPy; Python reads "ab"
    "['a'\n 'b']": ("a", "b"),
    str(np.array(WORDS, dtype=object)): tuple(WORDS),
    str(np.array(["x" * 60, "y" * 60])): ("x" * 60, "y" * 60),  # on two lines
    repr(np.array(WORDS, dtype=object)): tuple(WORDS),
    repr(np.array(["a", "b"])): ("a", "b"),
    repr(list(np.array(["a", "b"]))): ("a", "b"),  # [np.str_('a'), np.str_('b')]
    repr(pd.array(["b", "a", None], dtype="string")): ("b", "a"),
    repr(WORDS): tuple(WORDS),
    json.dumps(WORDS): tuple(WORDS),
    json.dumps(WORDS, ensure_ascii=False): tuple(WORDS),
    '["\\ud83d\\ude00 \\/"]': ("😀 /",),
    repr(tuple(WORDS)): tuple(WORDS),
    "('a',)": ("a",),
    "['c', None]": ("c",),
    '["c", null]': ("c",),
    "['c', nan]": ("c",),
    "[nan 'c' None]": ("c",),
    "['c', 'nan', '', ' ', 'NULL']": ("c",),
    "[['a', 'b'], ['c']]": ("a", "b", "c"),
    "[[], 'a', [None, [' b ']]]": ("a", "b"),
    "[1, 2.5]": ("1", "2.5"),
}
NOTHING = ["nan", "NaN", "NULL", "null", "None", "none", "N/A", "n/a", "NA", "#N/A", "<NA>", "NaT", " nan ", "", "\n"]
NOTHING += ["[]", "[nan]", "[None, 'null']", '["", null]', "[[], [None]]", "array([], dtype=object)", "('',)"]
PLAIN = ["#C C says none", "none left", "null and void", "#C C puts nan bread down", "[unsure] stirs [it]", "[unsure]"]
PLAIN += [
    "(laughs)",
    "(none)",
    "['a', b]",
    "['a'] and ['b']",
    "['a",
    "[a, b]",
    "array",
    "['a']]",
    "[none taken]",
    "['a'",
]
PLAIN += ["__import__('os').system('x')", "['a' + 'b']", "[f'a']", "[" * 5000, "[" * 5000 + "'"]


@pytest.mark.parametrize("cell", LISTS)
def test_lists_are_taken_apart(cell: str) -> None:
    assert narrations_in(cell) == narrations_in(f" {cell}\n") == LISTS[cell]


def test_nothing_and_what_only_looks_like_it() -> None:
    assert [cell for cell in NOTHING if narrations_in(cell)] == []
    assert [cell for cell in PLAIN if narrations_in(cell) != (cell,)] == []
    cells = [*NOTHING, *PLAIN, *LISTS]
    empty, _ = inspect_cells(pa.chunked_array([pa.array(cells, pa.large_string())]))
    assert [cell for cell, nothing in zip(cells, empty, strict=True) if nothing] == NOTHING


CLIPS = [*LISTS, *NOTHING, "#C C says none"]


def write_hod(path: Path, cells: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "start_second", "end_second", "text"])
        writer.writerows([f"v{i}", 0, 2, cell] for i, cell in enumerate(cells))


def write_egoclip(path: Path, cells: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["video_uid", "clip_start", "clip_end", "clip_text"])
        writer.writerows([f"v{i}", 0, 2, cell] for i, cell in enumerate(cells))


def write_pickle(path: Path, cells: list[str]) -> None:
    path.write_bytes(pickle.dumps([(f"v{i}", 0, 2, cell) for i, cell in enumerate(cells)]))


def write_ego4d(path: Path, cells: list[str]) -> None:
    narrations = ([{"timestamp_sec": 1, "narration_text": cell}] for cell in cells)
    path.write_text(
        json.dumps({f"v{i}": {"narration_pass_1": {"narrations": each}} for i, each in enumerate(narrations)})
    )


@pytest.mark.parametrize("write", [write_hod, write_egoclip, write_pickle, write_ego4d])
def test_every_format_gives_the_same_narrations_and_counts_the_rest(write: object, tmp_path: Path) -> None:
    path = tmp_path / {write_pickle: "a.pkl", write_ego4d: "a.json"}.get(write, "a.csv")  # type: ignore[call-overload]
    write(path, CLIPS)  # type: ignore[operator]
    table = read_clips(path)
    assert table.report.left_out == {"no narration": len(NOTHING)}
    assert [table.row(i).texts for i in range(len(table))] == [*LISTS.values(), ("#C C says none",)]


def test_lists_in_a_pickle_may_hold_nothing_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "clips.pkl"
    deep: list[object] = ["x"]
    for _ in range(200):
        deep = [deep]
    texts = [["a", None, math.nan, ["b", ("c",)]], None, math.nan, [], [None], ["d", 5], ['it\'s "e"\n'], deep]
    path.write_bytes(pickle.dumps([(f"v{i}", 0, 2, each) for i, each in enumerate(texts)]))
    table = read_clips(path)
    assert [row.texts for row in map(table.row, range(len(table)))] == [("a", "b", "c"), ('it\'s "e"',)]
    assert table.report.left_out == {"malformed": 2, "no narration": 4}


def test_a_class_may_be_called_none(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("video,start,end,label\nv,0,2,none\nv,2,4,N/A\nv,4,6,cut\n")
    table = read_clips(SourceConfig(metadata=str(path), format="labels"), strict=True)
    assert table.column("label").tolist() == ["none", "N/A", "cut"]
    assert table.row(0).texts == ("none",)
