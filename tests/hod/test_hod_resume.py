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

from egohod.config import SourceConfig
from egohod.data.decoders import choose_decoder
from egohod.data.source import ClipSource
from egohod.data.table import ClipTable
from egohod.data.video import Frames
from egohod.hod.blocks import Found
from egohod.hod.pipeline import COLUMNS, Pipeline, Task, uid_of
from egohod.hod.shards import Shard, Work
from egohod.hod.stages import DETECT, TRACK, Looking, Thinking

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


def made(metadata: Path, videos: Path, output: Path, workers: int) -> Pipeline:
    settings = SourceConfig(metadata=str(metadata), root=str(videos))
    table = ClipTable.read(settings)
    looking = Looking(ClipSource(table, settings, choose_decoder()[1]), 4, Mean(), {}, workers)
    thinking = Thinking(TRACK, think, {}, group=7)
    return Pipeline(table, [looking, thinking], Work(output), block=5)


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


def test_frames_tell_their_numbers_in_the_video(demo_world: Path, tmp_path: Path) -> None:
    train = demo_world / "train"
    pipeline = made(train / "narrations.csv", train / "videos", tmp_path / "hod.csv", 0)
    source = pipeline.stages[0]._source  # type: ignore[attr-defined]
    for index in (0, 5, 6, 12):  # within the first chunk, across its end, within the second
        found = source.read(source.table.row(index), 16, None)
        assert found.numbers == pytest.approx(found.seconds * 12 - 0.5, abs=1e-3)
