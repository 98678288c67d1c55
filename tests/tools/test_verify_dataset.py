"""Tools that check a dataset before a training run: unreadable clips, and a picture of a batch."""

from __future__ import annotations

import csv
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import show_batch
import verify_dataset
from PIL import Image
from verify_dataset import Verifier

from egohod.data.config import SourceConfig
from egohod.data.decoders import choose_decoder
from egohod.data.formats import read_clips
from egohod.data.storage import StorageError
from egohod.data.table import ClipReader, ClipRow
from egohod.errors import UserError
from egohod.runtime import Progress
from tests.data.video_files import encode, encode_sizes
from tests.support import Command

HEADER = "video_id,start_second,end_second,text\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good videos, one that is none and one that is missing; every fault in a row of its own."""
    for name in ("v0", "v1"):
        encode(tmp_path / "videos" / f"{name}.mp4", 40)
    (tmp_path / "videos" / "fake.mp4").write_bytes(b"no video at all")
    rows = ["v0,0,2,a", "fake,0,2,b", "v1,0,2,c", "none,3,5,d", "v0,99,101,e", "v1,1,3,f"]
    (tmp_path / "clips.csv").write_text(HEADER + "\n".join(rows) + "\n")
    (tmp_path / "config.yml").write_text(
        f"data: {{train: {{own: {{metadata: {tmp_path}/clips.csv, root: {tmp_path}/videos}}}}, workers: 0}}\n"
        "model: {name: DEMO}\ntrain: {global_batch_size: 2}\n"
    )
    return tmp_path


def source(folder: Path, root: str = "") -> tuple[SourceConfig, ClipReader]:
    config = SourceConfig(metadata=str(folder / "clips.csv"), root=root or str(folder / "videos"))
    return config, ClipReader(read_clips(config), config, choose_decoder("pyav")[1])


class Interrupting(Progress):
    """Stands in for the signal that comes when ``total`` clips are done."""

    def update(self, done: float, *, total: float | None = None, note: str = "") -> None:
        if done >= self.total:
            raise KeyboardInterrupt


def test_what_is_missing_or_broken_is_listed_and_then_left_out(
    folder: Path, program: Command, caplog: pytest.LogCaptureFixture
) -> None:
    # Spawned, whose processes have to import the program itself, too.
    command = ["tools/verify_dataset.py", "--config_file", folder / "config.yml", "--output", folder / "out"]
    done = program(*command, EGOHOD_START_METHOD="spawn")
    assert done.returncode == 1, done.stderr
    assert "own: 100 %  6 of 6 clips, ETA 0:00:00, 3 unreadable" in done.stderr
    with (folder / "out" / "own_exclude.csv").open(newline="") as file:
        listed = {row["video_id"]: row for row in csv.DictReader(file)}
    assert {name: row["row"] for name, row in listed.items()} == {"fake": "2", "none": "4", "v0": "5"}
    assert "not a video" in listed["fake"]["reason"]
    assert "no such file" in listed["none"]["reason"]
    assert "the video ends at" in listed["v0"]["reason"]
    report = json.loads((folder / "out" / "report.json").read_text())["own"]
    assert (report["clips"], report["unreadable"]) == (6, 3)
    assert sorted(report["reasons"].values()) == [1, 1, 1]
    exclude = f"data.train.own.exclude={folder}/out/own_exclude.csv"
    caplog.set_level(logging.INFO)
    assert verify_dataset.main(["--config_file", f"{folder}/config.yml", "--output", f"{folder}/2", exclude]) == 0
    assert "3 left out: on the exclude list" in caplog.text


def test_a_picture_that_changes_its_proportions_costs_its_clips_alone(folder: Path) -> None:
    encode_sizes(folder / "videos" / "fake.mp4", [(96, 64), (64, 96)])
    (folder / "clips.csv").write_text(HEADER + "fake,0,2,before\nfake,1,3,across\nfake,2,4,after\n")
    ((index, reason),) = Verifier("own", source(folder)[1], folder).run(0).faults
    assert index == 1
    assert "fake.mp4: the picture size changes from 96x64 to 64x96 at 2." in reason


def test_an_interrupted_run_resumes_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_dataset, "BLOCK", 2)
    read: list[int] = []
    inner = ClipReader.read
    monkeypatch.setattr(ClipReader, "read", lambda self, row, *more: read.append(row.row) or inner(self, row, *more))
    expected = Verifier("own", source(folder)[1], folder).run(0)
    assert len(expected.faults) == 3
    assert len(read) == 6

    with pytest.raises(KeyboardInterrupt):
        Verifier("own", source(folder)[1], folder).run(0, Interrupting("own", 4))
    with (folder / "own_progress.jsonl").open("a") as notes:
        notes.write("[2, [[")  # killed while writing
    read.clear()
    assert Verifier("own", source(folder)[1], folder).run(0) == expected
    assert len(read) == 2
    read.clear()
    (folder / "videos" / "fake.mp4").write_bytes((folder / "videos" / "v0.mp4").read_bytes())
    assert len(Verifier("own", source(folder)[1], folder).run(0).faults) == 2, "a finished run begins anew"
    assert len(read) == 6


def test_other_settings_are_another_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "empty").mkdir()
    wrong = source(folder, root=str(folder / "empty"))[1]
    with pytest.raises(KeyboardInterrupt):
        Verifier("own", wrong, folder).run(0, Interrupting("own", 1))
    assert len(Verifier("own", source(folder)[1], folder).run(0).faults) == 3


def test_what_stops_a_run_stops_it_at_once_in_several_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("s3://videos: the credentials have expired")

    monkeypatch.setattr(ClipReader, "read", refuse)
    with pytest.raises(StorageError, match=r"^s3://videos: the credentials have expired$"):
        Verifier("own", source(folder)[1], folder).run(2)


def test_a_video_that_makes_its_process_crash_or_hang_is_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As decoders do on some damaged files."""
    inner = ClipReader.read

    def read(self: ClipReader, row: ClipRow, *more: Any) -> Any:
        if row.video_id == "v1" and row.start < 1:
            os._exit(7)
        if row.video_id == "fake":
            time.sleep(600)
        return inner(self, row, *more)

    monkeypatch.setattr(ClipReader, "read", read)
    monkeypatch.setattr(verify_dataset, "_PATIENCE", 3.0)
    faults = dict(Verifier("own", source(folder)[1], folder).run(1).faults)
    assert faults[2] == "v1: the process that worked on it died (exit code 7)"
    assert faults[1] == "fake: it took longer than 3 s"
    assert sorted(faults) == [1, 2, 3, 4]


def test_several_processes_give_the_same_result(folder: Path) -> None:
    one, two = (Verifier(name, source(folder)[1], folder).run(n) for name, n in (("one", 0), ("two", 2)))
    assert one == two


def test_strict_stops_at_the_first_and_a_dry_run_writes_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"clips\.csv: row \d: "):
        Verifier("own", source(folder)[1], folder).run(0, strict=True)
    command = ["--config_file", f"{folder}/config.yml", "--output", f"{folder}/no", "--workers", "1"]
    caplog.set_level(logging.INFO)
    assert verify_dataset.main([*command, "--dry_run"]) == 0
    assert "6 clips of 4 videos, about 0:00:00" in caplog.text
    assert not (folder / "no").exists()
    with pytest.raises(UserError, match=r"clips\.csv: row \d: "):
        verify_dataset.main([*command, "--strict"])


def test_a_picture_of_a_batch(folder: Path, inside: Command) -> None:
    options = ["data.flip=1", "train.global_batch_size=6", "model.num_frames=3", "--config_file"]
    options.append(f"{folder}/config.yml")
    done = inside("show_batch.py", *options, "--output", folder / "batch.png")
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(folder / "batch.png"))
    assert 3 * 112 < picture.shape[0] < 4 * 150  # the three clips that can be read
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    with pytest.raises(UserError, match=r"cannot write .*batch\.xyz"):
        show_batch.main([*options, "--output", f"{folder}/batch.xyz"])
    with pytest.raises(UserError, match=r"clips\.csv: row [245]: .*videos/"):
        show_batch.main([*options, "--output", f"{folder}/none.png", "--strict"])
    assert show_batch.main([*options, "--output", f"{folder}/none.png", "--dry_run"]) == 0
    assert not (folder / "none.png").exists()


def test_chunks_of_another_length_are_reported(tmp_path: Path) -> None:
    """Every moment can be read, but under the name of a chunk that covers another one."""
    for number in range(3):
        encode(tmp_path / "videos" / "v" / f"{number:04d}.mp4", 300, first=300 * number)
    (tmp_path / "clips.csv").write_text(HEADER + "v,3,5,a\nv,21,23,b\nv,55,57,c\n")
    config = SourceConfig(metadata=str(tmp_path / "clips.csv"), root=str(tmp_path / "videos"))
    for seconds, faults in ((15.0, 3), (30.0, 0)):
        config.chunk_seconds = seconds
        clips = ClipReader(read_clips(config), config, choose_decoder("pyav")[1])
        verdict = Verifier("own", clips, tmp_path).run(0)
        assert len(verdict.faults) == faults
        assert len(verdict.reasons) == min(faults, 1)
        assert all("has 30.00 s, but chunk_seconds is 15; set chunk_seconds=30" in why for _, why in verdict.faults)
