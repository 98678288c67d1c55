"""Counting opposite captions, and the column that a training run reads."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from egohod.data.config import SourceConfig
from egohod.data.decoders import PyavDecoder
from egohod.data.formats import read_clips
from egohod.data.replacements import Verbs
from egohod.data.table import ClipReader, narrations_in
from tests.hod.chat_server import ChatServer, clips_of
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


def test_a_table_gets_a_column_of_replacements(tmp_path: Path, program: Command) -> None:
    table, out = tmp_path / "clips.csv", tmp_path / "out.csv"
    texts = ["opens the jar", "washes the cup", "taps the box twice", "['opens the jar', 'washes the pot']"] * 2
    rows = [f'v,{i},{i + 1},"{text}"' for i, text in enumerate(texts)]
    table.write_text("\n".join(["video_id,start_second,end_second,text", *rows]) + "\n")
    done = program("tools/opposites.py", table, "--replacements", "2", "--output", out)
    assert done.returncode == 0, done.stderr
    assert "6 of 8 captions (75.0 %) have replacements" in done.stderr
    with out.open(newline="") as file:
        cells = [row["replacements"] for row in csv.DictReader(file)]
    assert set(narrations_in(cells[0])) == {"washes the jar", "taps the jar twice"}
    assert cells[3] == ""
    source = SourceConfig(metadata=str(out), root=str(tmp_path), replacement_column="replacements")
    reader = ClipReader(read_clips(source, extra=["replacements"]), source, opener=PyavDecoder)
    drawn = reader.replacements(0, "opens the jar", 5, Verbs([]), np.random.default_rng(0))
    assert set(drawn) == set(narrations_in(cells[0]))


def test_a_language_model_writes_verbs_and_nothing_else(tmp_path: Path, program: Command) -> None:
    table, out, config = (tmp_path / name for name in ("clips.csv", "out.csv", "hod.yml"))
    table.write_text("text\nopens the jar\nwashes the cup\nopens the jar\n")
    config.write_text("narrator: {kind: llm, captions: [fine, coarse, opposite]}\n")
    command = ["tools/opposites.py", table, "--replacements", "3", "--narrator", config, "--output", out]
    with ChatServer(lambda clip: "opens; breaks; picks up; a whole other sentence; shakes; cuts") as server:
        done = program(*command, f"narrator.endpoint={server.address}")
        # Equal captions are sent once.
        assert sum(len(clips_of(body)) for body in server.bodies) == 2
        # The captions of the pipeline are no part of it.
        assert "coarse" not in str(server.bodies)
        assert "opposite" not in str(server.bodies)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        cells = [narrations_in(row["replacements"]) for row in csv.DictReader(file)]
    assert cells[0] == cells[2] == ("breaks the jar", "picks up the jar", "shakes the jar")
    assert cells[1] == ("opens the cup", "breaks the cup", "picks up the cup")
    for wrong, message in (
        ([*command, "narrator.kind=template"], "narrator.kind is 'template', but --narrator needs llm"),
        (["tools/opposites.py", table, "--narrator", config], "--narrator needs --replacements"),
        (["tools/opposites.py", table, "narrator.kind=llm"], "settings are those of --narrator"),
    ):
        done = program(*wrong)
        assert done.returncode == 2
        assert message in done.stderr
