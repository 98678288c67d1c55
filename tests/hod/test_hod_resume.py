"""A pipeline that reads real clips in real processes: killed, run again, and what is then written."""

from __future__ import annotations

import ctypes
import math
import os
import random
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from egohod.data.detections import RIGHT, SCHEMA
from egohod.data.formats import read_clips
from egohod.data.videos import Frames
from egohod.errors import UserError
from egohod.hod import store
from egohod.hod.config import DETECTORS, HodConfig
from egohod.hod.detectors import Detector
from egohod.hod.detectors.files import DetectionFiles
from egohod.hod.pipeline import DETECT, TRACK, DetectStage, Pipeline, Stage, Task, build, open_videos
from egohod.hod.store import Outcome, Shard, text_file
from egohod.runtime import Workers
from tests.hod.test_pipeline import SUMMARY
from tests.support import Command

WHOLE = Shard()


class Mean(DetectStage):
    """How bright each frame is, instead of boxes."""

    def prepare(self) -> None:
        pass

    def look(self, frames: Frames, video_id: str) -> dict[str, Any]:
        time.sleep(0.005)
        assert len(frames.pictures) == len(frames.seconds) == len(frames.numbers) == 4
        return {"mean": frames.pictures.mean(axis=(1, 2, 3)).round(3).tolist(), "numbers": frames.numbers.tolist()}


class Caption(Stage):
    """The brightness as a narration."""

    name, version, group = TRACK, 2, 7

    def __init__(self) -> None:
        self.settings = {}

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        for task in tasks:
            yield task, Outcome({"text": str(task.outcomes[DETECT].parsed()["mean"])} | SUMMARY)


def test_shards_that_write_the_same_settings_at_once(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    with text_file(path) as first, text_file(path) as second:
        first.write("frames: 16\n")
        second.write("frames: 16\n")
    assert [each.name for each in tmp_path.iterdir()] == ["config.yml"]
    assert path.read_text() == "frames: 16\n"


def made(
    metadata: Path, videos: Path, output: Path, workers: int, look: type[DetectStage] = Mean, clip_seconds: float = 120
) -> Pipeline:
    """``clip_seconds`` is long: on a machine under load a clip that is only slow would fail."""
    cfg = HodConfig(output=str(output), frames=4, block=5, workers=workers, clip_seconds=clip_seconds)
    cfg.source.metadata, cfg.source.root = str(metadata), str(videos)
    cfg.detector.kind, cfg.detector.options = "detections", {"path": "none.parquet"}
    table = read_clips(cfg.source)
    return Pipeline(cfg, table, [look(cfg, open_videos(cfg, table), {}), Caption()])


def run(pipeline: Pipeline, shard: Shard = WHOLE) -> None:
    pipeline.run_all(shard)
    pipeline.finish(shard)


def merge(pipeline: Pipeline, shards: int = 1) -> bytes:
    pipeline.merge(shards)
    return pipeline.store.output.read_bytes() + pipeline.store.failures.read_bytes()


def stored(pipeline: Pipeline) -> set[tuple[str, ...]]:
    """Every result that another process can see."""
    rows = set[tuple[str, ...]]()
    for path in pipeline.store.folder.rglob("*.sqlite"):
        with closing(sqlite3.connect(path, timeout=30)) as database:
            # The file may be so new that it has no tables.
            if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'results'").fetchone():
                rows |= set(database.execute("SELECT clip, stage, value FROM results"))
    return rows


def fork(work: Callable[[], object]) -> int:
    """A child process that does ``work`` and exits with 0, with 1 after an exception; never into pytest."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


@pytest.fixture(scope="module")
def whole(demo_world: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an uninterrupted run writes."""
    train = demo_world / "train"
    pipeline = made(train / "narrations.csv", train / "videos", tmp_path_factory.mktemp("whole") / "hod.csv", 2)
    run(pipeline)
    return merge(pipeline)


@pytest.mark.parametrize(("after", "is_local"), [(1, True), (40, True), (70, True), (40, False)])
def test_a_killed_run_loses_the_clips_in_work_and_resumes_to_the_same_bytes(
    demo_world: Path, tmp_path: Path, whole: bytes, after: int, is_local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_local:
        monkeypatch.setattr(store, "_LOCAL_FILE_SYSTEMS", frozenset())
    train = demo_world / "train"
    pipeline = made(train / "narrations.csv", train / "videos", tmp_path / "hod.csv", 2)
    child = fork(lambda: (run(pipeline), time.sleep(300)))  # a fast machine may be done before the signal comes
    deadline = time.monotonic() + 300
    while len(stored(pipeline)) < after and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    before = stored(pipeline)
    assert len(before) >= after
    run(pipeline)
    assert merge(pipeline) == whole
    rows = stored(pipeline)
    assert len(rows) == 2 * len(pipeline.table)
    assert before <= rows, "nothing that was done is done again"


def test_runs_that_are_killed_at_random_moments_write_the_same_bytes(
    demo_world: Path, tmp_path: Path, whole: bytes
) -> None:
    """Two shards, each killed again and again until it is finished."""
    train, rng = demo_world / "train", random.Random(0)
    pipeline = made(train / "narrations.csv", train / "videos", tmp_path / "hod.csv", 2)
    kills = 0
    for shard in Shard.all(2):
        before = set[tuple[str, ...]]()

        def run_claimed(shard: Shard = shard) -> None:
            with pipeline.store.claim(shard):
                run(pipeline, shard)

        while True:
            child = fork(run_claimed)
            # By results, not by time: on a fast machine a shard is finished before any delay that suits a slow one.
            enough = len(before) + rng.randint(0, 3)
            while len(stored(pipeline)) < enough and not os.waitid(
                os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if status == 0:
                break
            assert status == signal.SIGKILL
            kills += 1
            after = stored(pipeline)
            assert before <= after
            before = after
    assert kills > 1
    assert merge(pipeline, 2) == whole


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only: the kernel ends a worker with its parent")
def test_a_killed_run_whose_worker_hangs_leaves_no_lock(demo_world: Path, tmp_path: Path) -> None:
    class Hang(Mean):
        """A decoder that hangs in native code and holds the interpreter's lock, which PyDLL does not release."""

        def look(self, frames: Frames, video_id: str) -> dict[str, Any]:
            (tmp_path / "hangs").touch()
            ctypes.PyDLL(None).sleep(60)
            return {}

    train = demo_world / "train"
    pipeline = made(train / "narrations.csv", train / "videos", tmp_path / "hod.csv", 2, Hang)

    def run_claimed() -> None:
        with pipeline.store.claim(WHOLE):
            run(pipeline)

    child = fork(run_claimed)
    deadline = time.monotonic() + 60
    while not (tmp_path / "hangs").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with pipeline.store.claim(WHOLE):
        pass


def test_workers_change_nothing(demo_world: Path, tmp_path: Path, whole: bytes) -> None:
    train = demo_world / "train"
    pipeline = made(train / "narrations.csv", train / "videos", tmp_path / "hod.csv", 0)
    run(pipeline)
    assert merge(pipeline) == whole


def test_clips_that_cannot_be_read_are_failures_with_a_reason(demo_world: Path, tmp_path: Path) -> None:
    train = demo_world / "train"
    video = (train / "narrations.csv").read_text().splitlines()[1].split(",")[0]
    rows = ["video_id,start_second,end_second,text", "gone,1,2,moves a cup", f"{video},900,901,moves a cup"]
    rows += [f"{video},48.5,300,moves a cup", f"{video},3,3.01,moves a cup"]
    path = tmp_path / "clips.csv"
    path.write_text("\n".join(rows) + "\n")
    pipeline = made(path, train / "videos", tmp_path / "hod.csv", 2)
    run(pipeline)
    merge(pipeline)
    ledger = pipeline.store.failures.read_text().splitlines()[1:]
    assert len(ledger) == 2
    assert "no such file" in ledger[0]
    assert "no such file" in ledger[1] or "the video ends" in ledger[1]
    assert len(pipeline.store.output.read_text().splitlines()) == 3


def test_results_of_older_code_are_made_again(
    demo_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = demo_world / "train"
    lines = (train / "narrations.csv").read_text().splitlines()[:4]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")

    def done() -> tuple[int, int]:
        pipeline = made(tmp_path / "clips.csv", train / "videos", tmp_path / "hod.csv", 0)
        return pipeline.run([DETECT], WHOLE)[DETECT].done, pipeline.run([TRACK], WHOLE)[TRACK].done

    assert done() == (3, 3)
    assert done() == (0, 0)
    monkeypatch.setattr(Caption, "version", Caption.version + 1)
    assert done() == (0, 3)
    monkeypatch.setattr(Mean, "version", Mean.version + 1)
    assert done() == (3, 3)


def test_a_clip_that_kills_or_hangs_its_worker_is_a_failure_and_left_alone_by_the_next_run(
    demo_world: Path, tmp_path: Path
) -> None:
    train = demo_world / "train"
    lines = (train / "narrations.csv").read_text().splitlines()[:9]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    middles = [sum(map(float, line.split(",")[1:3])) / 2 for line in lines[1:]]
    log = tmp_path / "log"

    class Poison(Mean):
        """A decoder that one clip kills, and that hangs at another."""

        def look(self, frames: Frames, video_id: str) -> dict[str, Any]:
            with log.open("a") as file:
                file.write(f"{video_id}\n")
            if frames.seconds[0] < middles[2] < frames.seconds[-1]:
                os._exit(7)
            if frames.seconds[0] < middles[5] < frames.seconds[-1]:
                signal.pause()
            return super().look(frames, video_id)

    for _ in range(2):
        pipeline = made(tmp_path / "clips.csv", train / "videos", tmp_path / "hod.csv", 2, Poison, clip_seconds=8)
        run(pipeline)
        merge(pipeline)
        ledger = (tmp_path / "hod.csv.failures.csv").read_text()
        assert "died (exit code 7)" in ledger
        assert "longer than 8 s" in ledger
        assert len(ledger.splitlines()) == 3
        assert len((tmp_path / "hod.csv").read_text().splitlines()) == 7
        assert len(log.read_text().splitlines()) == 8, "each clip was looked at once"


class Odd(Exception):
    """Does not come back from a pickle."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


def odd(task: int) -> int:
    error = Odd("task", str(task))
    error.add_note("row 8")
    raise error


def test_an_error_that_cannot_be_pickled_is_reported_as_itself() -> None:
    with Workers(1, odd, 10.0) as workers, pytest.raises(RuntimeError, match="Odd: task: 7") as raised:
        list(workers.unordered([7]))
    assert raised.value.__notes__ == ["row 8"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unexpected_error_names_its_clip(demo_world: Path, tmp_path: Path, workers: int) -> None:
    class Broken(Mean):
        def look(self, frames: Frames, video_id: str) -> dict[str, Any]:
            raise KeyError("of somebody's detector")

    train = demo_world / "train"
    pipeline = made(train / "narrations.csv", train / "videos", tmp_path / "hod.csv", workers, Broken)
    with pytest.raises(KeyError) as raised:
        run(pipeline)
    assert "narrations.csv: row " in raised.value.__notes__[0]


BOX = dict.fromkeys(SCHEMA.names) | {"frame_number": 3, "second": 0.3, "kind": "hand", "side": RIGHT, "state": 0}
BOX |= {"video_id": "v", "score": 0.9, "left": 0.1, "top": 0.2, "right": 0.3, "bottom": 0.4}


class Custom(Detector):
    """Somebody's detector: gives a table of the test's."""

    answer: Any = None

    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None
    ) -> pa.Table:
        return type(self).answer


@pytest.fixture
def custom_detector(demo_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HodConfig:
    """The settings of a run with :class:`Custom`."""
    monkeypatch.setattr("egohod.hod.detectors.files.Custom", Custom, raising=False)
    monkeypatch.setitem(DETECTORS, "custom", "files.Custom")
    train = demo_world / "train"
    cfg = HodConfig(output=str(tmp_path / "hod.csv"), frames=4, workers=0)
    cfg.source.metadata, cfg.source.root = str(train / "narrations.csv"), str(train / "videos")
    cfg.detector.kind = "custom"
    return cfg


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"side": 5}, "row 1"),
        ({"kind": "object", "side": 5}, "row 1"),
        ({"left": math.nan}, "row 1"),
        ({"left": 0.5}, "row 1"),
        ({"score": 5.0}, "row 1"),
        ({"score": math.nan}, "row 1"),
        ({"state": None}, "row 1"),
        ({"second": math.inf}, "row 1"),
        ({"kind": "foot"}, "row 1"),
        ("score", "lacks the columns score"),
        ("side", "lacks the columns side"),
        (None, "NoneType instead of a table"),
    ],
)
def test_boxes_against_the_schema_name_detector_and_clip(
    custom_detector: HodConfig, monkeypatch: pytest.MonkeyPatch, change: Any, pattern: str
) -> None:
    table = None
    if change is not None:
        table = pa.Table.from_pylist([BOX | (change if isinstance(change, dict) else {})], SCHEMA)
        table = table.drop_columns(change) if isinstance(change, str) else table
    monkeypatch.setattr(Custom, "answer", table)
    with pytest.raises(UserError, match=rf"detector\.kind=custom, boxes of demo_train_0000 .*{pattern}"):
        next(build(custom_detector).try_clip(Task(0)))


def test_boxes_that_follow_the_schema_are_stored(custom_detector: HodConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, and without the optional column."""
    table = pa.Table.from_pylist([BOX, BOX | {"kind": "object", "side": -1}]).drop_columns("name")
    monkeypatch.setattr(Custom, "answer", table)
    stage, outcome, _ = next(build(custom_detector).try_clip(Task(0)))
    assert stage == DETECT
    assert outcome.value["boxes"]["score"] == [0.9, 0.9]


def test_a_dry_run_loads_the_detector_once(few: list[str], inside: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is no part of the time of a clip."""
    made = []

    class Counted(Custom):
        def __init__(self) -> None:
            made.append(os.getpid())

    monkeypatch.setattr("egohod.hod.detectors.files.Counted", Counted, raising=False)
    monkeypatch.setitem(DETECTORS, "torchvision", "files.Counted")
    monkeypatch.setattr(Custom, "answer", pa.Table.from_pylist([BOX], SCHEMA))
    done = inside("generate_hod.py", *few, "detector.kind=torchvision", "workers=2", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("->") == 3
    assert made == [os.getpid()]


class Folder(DetectionFiles):
    """Reads files, from an option with a name of its own."""

    def __init__(self, where: str) -> None:
        super().__init__(where)


def test_a_detector_that_reads_files_may_call_its_option_as_it_likes(
    demo_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("egohod.hod.detectors.files.Folder", Folder, raising=False)
    monkeypatch.setitem(DETECTORS, "folder", "files.Folder")
    train = demo_world / "train"
    cfg = HodConfig(output=str(tmp_path / "hod.csv"), frames=4, workers=0)
    cfg.source.metadata, cfg.source.root = str(train / "narrations.csv"), str(train / "videos")
    cfg.detector.kind, cfg.detector.options = "folder", {"where": str(train / "detections.parquet")}
    assert next(build(cfg).try_clip(Task(0)))[1].fault is None
    boxes = pa.parquet.read_table(train / "detections.parquet")
    other = boxes.set_column(0, "video_id", pa.array(["other"] * len(boxes)))
    pa.parquet.write_table(other, tmp_path / "other.parquet")
    cfg.detector.options = {"where": str(tmp_path / "other.parquet")}
    with pytest.raises(UserError, match=r"detector\.options\.where=.*other\.parquet: has detections of none"):
        next(build(cfg).try_clip(Task(0)))


def test_frames_have_their_numbers_in_the_video(demo_world: Path, tmp_path: Path) -> None:
    train = demo_world / "train"
    pipeline = made(train / "narrations.csv", train / "videos", tmp_path / "hod.csv", 0)
    source = open_videos(pipeline.cfg, pipeline.table)
    for index in (0, 5, 6, 12):  # within the first chunk, across its end, within the second
        frames = source.read(pipeline.table.row(index), 16, None)
        assert frames.numbers == pytest.approx(frames.seconds * 12 - 0.5, abs=1e-3)
