"""The HOD pipeline on many clips: ``hod_scale`` of ``tools/bench.py``.

A csv of ``--clips`` rows and generated boxes, so that no video is decoded: what is measured is everything else, and
whether it grows with the whole instead of the shard. Each shard is a process of tools/generate_hod.py with the
variables of its task in a Slurm array. One is killed in its middle and resumed, and compared with the same shard of a
run that was left alone. Everything is in ``--folder``: rerun the command to resume, delete the folder to start again.

``python -m benches.hod_scale REPORT TOOL ...`` is one of these processes: a tool with generated boxes, which leaves its
peak memory in the file REPORT.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib
import json
import logging
import os
import platform
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from _common import ROOT

from egohod import cli
from egohod.data.detections import EDGES, LEFT, RIGHT, SCHEMA
from egohod.data.table import ClipRow, ClipTable
from egohod.data.videos import Frames, VideoError
from egohod.errors import UserError
from egohod.hod import pipeline
from egohod.hod.store import Outcome, Shard
from egohod.runtime import usable_cores, write_text

log = logging.getLogger(__name__)

CLIPS_OF_A_VIDEO, CLIP_SECONDS, FRAMES = 100, 4.0, 4
# One clip in so many cannot be read, and fails.
FAILS_EVERY = 997
VERBS, NOUNS = ("moves", "opens", "washes", "lifts", "turns"), ("the cup", "a jar", "the pan", "a drawer", "the sponge")
# How much of the shard that is killed is done by then.
KILLED_AT = 0.5


# --- The processes: tools on generated boxes ---


class GeneratedDetect(pipeline.DetectStage):
    """The detect stage without a detector: a hand and an object that it moves, in one of eight ways by the clip."""

    def prepare(self) -> None:
        """See :class:`pipeline.Stage`."""

    def look(self, frames: Frames, video_id: str) -> dict[str, Any]:
        """See :class:`pipeline.DetectStage`."""
        clip = int(frames.seconds[0] / CLIP_SECONDS)
        side, step = (LEFT, RIGHT)[clip % 2], ((0.1, 0.0), (0.0, 0.1), (-0.1, 0.0), (0.0, -0.1))[clip // 2 % 4]
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names if name != "video_id"}
        for number, second in enumerate(frames.seconds.tolist()):
            x, y = 0.45 + number * step[0], 0.45 + number * step[1]
            hand = {"kind": "hand", "side": side, "state": 3, "score": 0.9}
            for what in (hand, {"kind": "object", "side": -1, "state": 0, "score": 0.5}):
                row = what | {"frame_number": int(frames.numbers[number]), "second": round(second, 5)}
                row |= {edge: round(at, 5) for edge, at in zip(EDGES, (x - 0.1, y - 0.1, x + 0.1, y + 0.1), strict=True)}
                for name, values in columns.items():
                    values.append(row.get(name))
        return {"seconds": frames.seconds.round(5).tolist(), "aspect": 4 / 3, "boxes": columns, "shifts": None}


class GeneratedTracks(pipeline.TrackStage):
    """The track stage, whose facts of each of the eight ways are computed once in a process."""

    def run(self, tasks: Iterable[pipeline.Task]) -> Iterator[tuple[pipeline.Task, Outcome]]:
        """See :class:`pipeline.Stage`."""
        facts = dict[int, dict[str, Any]]()
        for task in tasks:
            row = self._table.row(task.index)
            way = int(row.start / CLIP_SECONDS) % 8
            if way not in facts:
                ((_, outcome),) = super().run([task])
                facts[way] = outcome.value
            yield task, Outcome(facts[way] | {"video_id": row.video_id, "start": row.start, "end": row.end})


class NoVideos:
    """A reader of clips without videos: small black frames, and a failure now and then."""

    def __init__(self, cfg: Any, table: ClipTable) -> None:
        self.table = table

    def read(self, row: ClipRow, num_frames: int, rng: np.random.Generator | None) -> Frames:
        """See :meth:`ClipReader.read`."""
        if row.row % FAILS_EVERY == 0:
            raise VideoError(f"{row.video_id}: no such file")
        seconds = row.start + (np.arange(num_frames) + 0.5) / num_frames * (row.end - row.start)
        return Frames(np.zeros((num_frames, 24, 32, 3), np.uint8), seconds, np.round(seconds * 2).astype(np.int64))


def run_tool_on_generated_boxes(arguments: Sequence[str]) -> int:
    """A tool by its name and arguments; the first argument is the file for the peak memory of this process."""
    report, tool, *rest = arguments
    pipeline.open_videos = NoVideos  # type: ignore[assignment,misc]
    pipeline.STAGES = (GeneratedDetect, GeneratedTracks, *pipeline.STAGES[2:])
    module = importlib.import_module(tool)
    if hasattr(module, "open_videos"):
        module.open_videos = NoVideos
    try:
        return int(module.main(rest))
    finally:
        # VmHWM, not ru_maxrss, which begins with that of the parent.
        status = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
        peak = {"peak_mb": int(status["VmHWM"]) / 1000, "own_mb": int(status["RssAnon"]) / 1000}
        write_text(report, json.dumps(peak | {"cpu_s": time.process_time()}))


# --- The run ---


def hod_scale_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--clips", type=int, default=1_000_000, help="rows of the metadata (default: 1,000,000)")
    add("--shards", type=int, default=64, help="tasks of the array (default: 64)")
    add("--at_once", type=int, default=2, help="tasks that run at the same time (default: 2)")
    add("--folder", type=Path, default=Path("hod_scale"), help="of the run, to resume it (default: hod_scale)")


def hod_scale(options: argparse.Namespace) -> dict[str, Any]:
    """Memory and clips/s of a shard, of the merge and of a page, on many clips without videos."""
    folder, shards = options.folder, Shard.all(options.shards)
    folder.mkdir(parents=True, exist_ok=True)
    metadata, output, page = folder / "clips.csv", folder / "hod.csv", folder / "page.html"
    steps = _Steps(folder / "steps.json", {"clips": options.clips, "shards": options.shards})
    knobs = ["--metadata", str(metadata), "--root", "none", "detector.kind=detections", "workers=0"]
    knobs += ["detector.options.path=none", f"frames={FRAMES}", "tracks.camera=false"]
    if "metadata" not in steps.done:
        _write_metadata(metadata, options.clips)
        steps.record("metadata", {"mb": metadata.stat().st_size / 1e6})

    def start(tool: str, *arguments: str, task: int | None = None) -> _Process:
        return _Process(folder, tool, [*arguments, *knobs], task)

    # As an array with a limit of tasks at a time: the next task starts when one ends.
    killed = options.shards // 2
    waiting, running = [shard for shard in shards if f"shard {shard}" not in steps.done], dict[Shard, _Process]()
    while waiting or running:
        while waiting and len(running) < options.at_once:
            shard = waiting.pop(0)
            arguments = ["--output", str(output), "--shard", str(shard)]
            running[shard] = start("generate_hod", *arguments, task=shard.index)
        for shard, process in list(running.items()):
            results = output.with_name("hod.csv.work") / "results" / f"{shard.stem}.sqlite"
            if shard.index == killed and "kill" not in steps.done and _results(results) > KILLED_AT * 4 * len(
                shard.clips(options.clips, 256)
            ):
                os.kill(process.id, signal.SIGKILL)
                process.wait()
                steps.record("kill", {"results": _results(results)})
                waiting.insert(0, shard)
                del running[shard]
            elif process.has_ended():
                steps.record(f"shard {shard}", process.wait())
                log.info("shard %s: %s", shard, steps.done[f"shard {shard}"])
                del running[shard]
        time.sleep(0.2)
    if "alone" not in steps.done:  # the shard that was killed, in a run of its own that was not
        alone = folder / "alone.csv"
        start("generate_hod", "--output", str(alone), "--shard", str(shards[killed])).wait()
        files = [path.with_name(path.name + ".work") / "results" / f"{shards[killed].stem}.sqlite" for path in (output, alone)]
        first, second = map(_content, files)
        if first != second:
            raise UserError(f"{files[0]} is not {files[1]}: a kill changed results")
        steps.record("alone", {"results": _results(files[0]), "sha256": first})
    if "merge" not in steps.done:
        steps.record("merge", start("generate_hod", "--output", str(output), "--merge").wait() | _verify(output, options.clips))
    if "page" not in steps.done:
        steps.record("page", start("visualize_hod", "--output", str(output), "--page", str(page)).wait())
    return steps.done


class _Steps:
    """What is done of a run, in a file: a rerun goes on behind it. Raises :class:`UserError` for another run's file."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self.done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": settings}
        if self.done["settings"] != settings:
            raise UserError(f"{path}: of a run with {self.done['settings']}, not {settings}; use another --folder")

    def record(self, name: str, values: dict[str, Any]) -> None:
        """Note a step as done."""
        self.done[name] = values
        write_text(self._path, json.dumps(self.done, indent=1))


class _Process:
    """A tool on generated boxes, as task ``task`` of a Slurm array if it is given."""

    def __init__(self, folder: Path, tool: str, arguments: Sequence[str], task: int | None) -> None:
        name = tool if task is None else f"{tool}-{task}"
        self._report, self._log, self._began = folder / f"{name}.json", folder / f"{name}.log", time.perf_counter()
        self._report.unlink(missing_ok=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT)])}
        if task is not None:
            environment |= {"SLURM_JOB_ID": str(1001 + task), "SLURM_ARRAY_JOB_ID": "1000"}
            environment |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
        command = [sys.executable, "-m", "benches.hod_scale", str(self._report), tool, *arguments]
        with self._log.open("w") as file:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        self.id = self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> dict[str, Any]:
        """Seconds and peak memory. Raises :class:`UserError` if it failed."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return {}
        if code:
            raise UserError(f"{self._log}: exit code {code}: {self._log.read_text().splitlines()[-1:]}")
        return {"seconds": time.perf_counter() - self._began} | json.loads(self._report.read_text())


def _write_metadata(path: Path, clips: int) -> None:
    rng = np.random.default_rng(0)
    verbs, nouns = rng.integers(len(VERBS), size=clips), rng.integers(len(NOUNS), size=clips)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "start_second", "end_second", "text", "uid"])
        for index in range(clips):
            video, number = divmod(index, CLIPS_OF_A_VIDEO)
            start = number * CLIP_SECONDS
            text = f"#C C {VERBS[verbs[index]]} {NOUNS[nouns[index]]} and puts it back on the table number {index % 50}"
            writer.writerow([f"{video:08d}-0000-4000-8000-{video:012d}", start, start + CLIP_SECONDS, text, f"clip_{index:08d}"])


def _results(path: Path) -> int:
    """How many results another process has stored so far."""
    with contextlib.suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT count(*) FROM results").fetchone()[0])
    return 0


def _content(path: Path) -> str:
    """A checksum of all results in their order."""
    digest = hashlib.sha256()
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        for row in database.execute("SELECT clip, stage, fault, is_fallback, value FROM results ORDER BY clip, stage"):
            digest.update(repr(row).encode())
    return digest.hexdigest()


def _verify(output: Path, clips: int) -> dict[str, int]:
    """Every clip is in the output or in its ledger, once and in order. Raises :class:`UserError`."""

    def numbers(path: Path) -> Iterator[int]:
        with path.open(newline="") as file:
            yield from (int(row["uid"].removeprefix("clip_")) for row in csv.DictReader(file))

    failures = list(numbers(output.with_name(output.name + ".failures.csv")))
    failed, expected, narrations = set(failures), iter(range(clips)), 0
    for number in numbers(output):
        while (index := next(expected)) in failed:
            pass
        if index != number:
            raise UserError(f"{output}: clip {number} where {index} is due")
        narrations += 1
    if narrations + len(failed) != clips or len(failed) != len(failures):
        raise UserError(f"{output}: {narrations} narrations and {len(failures)} failures of {clips} clips")
    return {"narrations": narrations, "failures": len(failures)}


if __name__ == "__main__":
    sys.exit(cli.run(run_tool_on_generated_boxes))
