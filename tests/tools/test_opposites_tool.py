"""Counting opposite captions, and the column that a training run reads."""

from __future__ import annotations

import csv
from pathlib import Path

from egohod.data.config import SourceConfig
from egohod.data.decoders import PyavDecoder
from egohod.data.formats import read_clips
from egohod.data.table import ClipReader, narrations_in
from tests.support import Command


def test_a_list_of_narrations_has_an_opposite_of_each(tmp_path: Path, program: Command) -> None:
    """As a training run reads them, which takes a copy of the narration for none."""
    table, out = tmp_path / "clips.csv", tmp_path / "out.csv"
    cells = [
        """['opens the jar', "washes the cup's lid"]""",
        "['washes the cup', 'cuts it']",
        "['opens', 'closes']",
        "[]",
    ]
    rows = [f'v,{i},{i + 1},"{cell.replace(chr(34), chr(34) * 2)}"' for i, cell in enumerate(cells)]
    table.write_text("\n".join(["video_id,start_second,end_second,text", *rows]) + "\n")
    done = program("tools/opposites.py", table, "--output", out)
    assert "2 of 4 captions" in done.stderr
    with out.open(newline="") as file:
        opposites = [row["opposite"] for row in csv.DictReader(file)]
    assert [narrations_in(cell) for cell in opposites] == [
        ("closes the jar", "washes the cup's lid"),
        (),
        ("closes", "opens"),
        (),
    ]
    source = SourceConfig(metadata=str(out), root=str(tmp_path), opposite_column="opposite", list_text="random")
    reader = ClipReader(read_clips(source, extra=["opposite"]), source, opener=PyavDecoder)
    assert [reader.opposite(0, text) for text in reader.table.row(0).texts] == ["closes the jar", None]


def test_a_table_gets_a_column_of_opposites(tmp_path: Path, program: Command) -> None:
    table = tmp_path / "clips.csv"
    table.write_text("video_id,text\na,opens the jar\nb,washes the cup\nc,turns the tap on\n")
    done = program("tools/opposites.py", table, "--output", tmp_path / "out.csv", "--sample", "1")
    assert done.returncode == 0, done.stderr
    assert "2 of 3 captions (66.7 %) have an opposite" in done.stderr
    assert len(done.stdout.splitlines()) == 2
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["opposite"] for row in rows] == ["closes the jar", "", "turns the tap off"]
    assert [row["video_id"] for row in rows] == ["a", "b", "c"]
    wrong = program("tools/opposites.py", table, "--column", "txt")
    assert wrong.returncode == 2
    assert "no column 'txt' (did you mean 'text'?)" in wrong.stderr
