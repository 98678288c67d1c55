"""A pipeline that reads real clips in real processes: killed, run again, and what is then written."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from egohod.data.config import SourceConfig
from egohod.data.decoders import choose_decoder
from egohod.data.formats import read_clips
from egohod.data.table import ClipSource
from egohod.data.videos import Frames
from egohod.hod.config import COLUMNS
from egohod.hod.pipeline import DETECT, TRACK, VERSIONS, Looking, Pipeline, Task, Thinking, uid_of
from egohod.hod.store import Found, Shard, Work, written
from egohod.runtime import Workers

WHOLE = Shard()


class Mean:
    """How bright each frame is."""

    def begin(self) -> None:
        pass

    def __call__(self, frames: Frames, video_id: str) -> dict[str, Any]:
        time.sleep(0.005)
        assert len(frames.pictures) == len(frames.seconds) == len(frames.numbers) == 4
        return {"mean": frames.pictures.mean(axis=(1, 2, 3)).round(3).tolist(), "numbers": frames.numbers.tolist()}


def think(tasks: Sequence[Task]) -> Iterator[tuple[int, Found]]:
    for place, task in enumerate(tasks):
        yield place, Found({"text": str(task.before[DETECT]["mean"])})


def test_shards_that_write_the_same_settings_at_once(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    with written(path) as first, written(path) as second:
        first.write("frames: 16\n")
        second.write("frames: 16\n")
    assert [each.name for each in tmp_path.iterdir()] == ["config.yml"]
    assert path.read_text() == "frames: 16\n"


def made(metadata: Path, videos: Path, output: Path, workers: int) -> Pipeline:
    settings = SourceConfig(metadata=str(metadata), root=str(videos))
    table = read_clips(settings)
    looking = Looking(ClipSource(table, settings, choose_decoder()[1]), 4, Mean(), {}, workers)
    thinking = Thinking(TRACK, think, {}, group=7)
    return Pipeline(table, [looking, thinking], Work(output), lambda index: table.row(index).texts[0], block=5)


def run(pipeline: Pipeline) -> bytes:
    def row(index: int, value: Any) -> list[str]:
        clip = pipeline.table.row(index)
        return [clip.video_id, str(clip.start), str(clip.end), value["text"], "", uid_of(pipeline.table, index, clip)]

    pipeline.run(DETECT, WHOLE)
    pipeline.run(TRACK, WHOLE)
    pipeline.finish(WHOLE, "print", row, COLUMNS)
    pipeline.work.merge(1, "print", len(pipeline.table), 5)
    return pipeline.work.output.read_bytes()


def lines(pipeline: Pipeline) -> list[bytes]:
    paths = sorted(pipeline.work.folder.rglob("*.jsonl"))
    return [line for path in paths for line in path.read_bytes().splitlines(keepends=True)]


@pytest.fixture(scope="module")
def whole(demo_world: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an uninterrupted run writes."""
    train = demo_world / "train"
    return run(made(train / "narrations.csv", train / "videos", tmp_path_factory.mktemp("whole") / "hod.csv", 2))


@pytest.mark.parametrize("after", [1, 40, 70])
def test_a_killed_run_loses_the_clips_in_work_and_goes_on_to_the_same_bytes(
    demo_world: Path, tmp_path: Path, whole: bytes, after: int
) -> None:
    train = demo_world / "train"
    pipeline = made(train / "narrations.csv", train / "videos", tmp_path / "hod.csv", 2)
    child = os.fork()
    if child == 0:
        run(pipeline)
        time.sleep(60)  # a fast machine may be done before the signal comes
        os._exit(0)
    deadline = time.monotonic() + 60
    while len(lines(pipeline)) < after and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    kept = [line for line in lines(pipeline) if line.endswith(b"\n")]
    assert len(kept) >= after
    assert run(pipeline) == whole
    found = [json.loads(line) for line in lines(pipeline)]
    assert len({(each["stage"], each["key"]) for each in found}) == len(found) == 2 * len(pipeline.table)
    assert set(kept) <= set(lines(pipeline)), "nothing that was done is done again"


def test_workers_change_nothing(demo_world: Path, tmp_path: Path, whole: bytes) -> None:
    train = demo_world / "train"
    assert run(made(train / "narrations.csv", train / "videos", tmp_path / "hod.csv", 0)) == whole


def test_clips_that_cannot_be_read_are_failures_with_a_reason(demo_world: Path, tmp_path: Path) -> None:
    train = demo_world / "train"
    narrated = (train / "narrations.csv").read_text().splitlines()
    video = narrated[1].split(",")[0]
    rows = ["video_id,start_second,end_second,text", "gone,1,2,moves a cup", f"{video},900,901,moves a cup"]
    rows += [f"{video},48.5,300,moves a cup", f"{video},3,3.01,moves a cup"]
    path = tmp_path / "clips.csv"
    path.write_text("\n".join(rows) + "\n")
    pipeline = made(path, train / "videos", tmp_path / "hod.csv", 2)
    run(pipeline)
    ledger = pipeline.work.failures.read_text().splitlines()[1:]
    assert len(ledger) == 2
    assert "no such file" in ledger[0]
    assert "no such file" in ledger[1] or "the video ends" in ledger[1]
    assert len(pipeline.work.output.read_text().splitlines()) == 3


def test_what_older_code_made_is_made_anew(demo_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = demo_world / "train"
    lines = (train / "narrations.csv").read_text().splitlines()[:4]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")

    def done() -> tuple[int, int]:
        pipeline = made(tmp_path / "clips.csv", train / "videos", tmp_path / "hod.csv", 0)
        return pipeline.run(DETECT, WHOLE).done, pipeline.run(TRACK, WHOLE).done

    assert done() == (3, 3)
    assert done() == (0, 0)
    monkeypatch.setitem(VERSIONS, TRACK, VERSIONS[TRACK] + 1)
    assert done() == (0, 3)
    monkeypatch.setitem(VERSIONS, DETECT, VERSIONS[DETECT] + 1)
    assert done() == (3, 3)


class Poison(Mean):
    """A decoder that one clip makes die, and another hang."""

    def __init__(self, dies: float, hangs: float, log: Path) -> None:
        """``dies`` and ``hangs`` are moments within those clips."""
        self.dies, self.hangs, self.log = dies, hangs, log

    def __call__(self, frames: Frames, video_id: str) -> dict[str, Any]:
        with self.log.open("a") as file:
            file.write(f"{video_id}\n")
        if frames.seconds[0] < self.dies < frames.seconds[-1]:
            os._exit(7)
        if frames.seconds[0] < self.hangs < frames.seconds[-1]:
            signal.pause()
        return super().__call__(frames, video_id)


def test_a_clip_that_kills_or_hangs_its_worker_is_a_failure_and_left_alone_by_the_next_run(
    demo_world: Path, tmp_path: Path
) -> None:
    train = demo_world / "train"
    lines = (train / "narrations.csv").read_text().splitlines()[:9]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    middles = [sum(map(float, line.split(",")[1:3])) / 2 for line in lines[1:]]
    log = tmp_path / "log"

    def poisoned() -> Pipeline:
        pipeline = made(tmp_path / "clips.csv", train / "videos", tmp_path / "hod.csv", 2)
        look = Poison(middles[2], middles[5], log)
        pipeline.stages[0] = Looking(pipeline.stages[0]._source, 4, look, {}, 2, patience=3)  # type: ignore[attr-defined]
        return pipeline

    run(poisoned())
    ledger = (tmp_path / "hod.csv.failures.csv").read_text()
    assert "died (exit code 7)" in ledger
    assert "longer than 3 s" in ledger
    assert len(ledger.splitlines()) == 3
    assert len((tmp_path / "hod.csv").read_text().splitlines()) == 7
    assert len(log.read_text().splitlines()) == 8, "each clip was looked at once"
    run(poisoned())
    assert len(log.read_text().splitlines()) == 8, "nothing is tried a second time"


class Odd(Exception):
    """Does not come back from a pickle."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


def odd(task: int) -> int:
    raise Odd("task", str(task))


def test_an_error_that_cannot_be_pickled_is_told_and_no_dead_process() -> None:
    with Workers(1, odd, 10.0) as workers, pytest.raises(RuntimeError, match="Odd: task: 7"):
        list(workers.unordered([7]))


def test_frames_tell_their_numbers_in_the_video(demo_world: Path, tmp_path: Path) -> None:
    train = demo_world / "train"
    pipeline = made(train / "narrations.csv", train / "videos", tmp_path / "hod.csv", 0)
    source = pipeline.stages[0]._source  # type: ignore[attr-defined]
    for index in (0, 5, 6, 12):  # within the first chunk, across its end, within the second
        found = source.read(source.table.row(index), 16, None)
        assert found.numbers == pytest.approx(found.seconds * 12 - 0.5, abs=1e-3)
