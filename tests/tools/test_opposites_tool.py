"""Counting opposite captions, and the column that a training run reads."""

from __future__ import annotations

import csv
from pathlib import Path

from tests.support import Command


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
