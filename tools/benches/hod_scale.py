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
import os
import platform
import re
import sqlite3
import statistics
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
from egohod.hod.config import HodConfig
from egohod.hod.pipeline import STAGES
from egohod.hod.store import Outcome, Shard
from egohod.runtime import usable_cores, write_text

CLIPS_OF_A_VIDEO, CLIP_SECONDS, FRAMES = 100, 4.0, 4
# One clip in so many cannot be read, and fails.
FAILS_EVERY = 997
VERBS, NOUNS = ("moves", "opens", "washes", "lifts", "turns"), ("the cup", "a jar", "the pan", "a drawer", "the sponge")
# The check is a matter of the single clip, and would be most of the time.
KNOBS = (
    "detector.kind=detections", "detector.options.path=none", f"frames={FRAMES}", "tracks.camera=false", "workers=0",
    "check.words=false", "check.tracks=false", "check.language=0",
)  # fmt: skip
PAGES: dict[str, tuple[str, ...]] = {
    "page": (),
    "page, filtered": ("--where", "word=wash", "--where", "hand=left", "--where", "direction=up"),
    "page, failures": ("--where", "reason=no such file"),
}
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
                row |= {
                    edge: round(at, 5) for edge, at in zip(EDGES, (x - 0.1, y - 0.1, x + 0.1, y + 0.1), strict=True)
                }
                for name, values in columns.items():
                    values.append(row.get(name))
        return {"seconds": frames.seconds.round(5).tolist(), "aspect": 4 / 3, "boxes": columns, "camera": None}


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
    add("--results", type=Path, metavar="JSON", help="write the result to this file too")
    add("--folder", type=Path, default=Path("hod_scale"), help="of the run, to resume it (default: hod_scale)")


def hod_scale(options: argparse.Namespace) -> dict[str, Any]:
    """Memory and clips/s of a shard, of the merge and of a page, on many clips without videos."""
    folder, shards = options.folder.resolve(), Shard.all(options.shards)
    folder.mkdir(parents=True, exist_ok=True)
    metadata, output, killed = folder / "clips.csv", folder / "hod.csv", shards[options.shards // 2]
    steps = _Steps(folder / "steps.json", {"clips": options.clips, "shards": options.shards})
    if "metadata" not in steps.done:
        _write_metadata(metadata, options.clips)
        steps.record("metadata", {"mb": metadata.stat().st_size / 1e6})
    _write_sbatch(folder / "bin")

    def start(tool: str, output: Path, *arguments: str, task: int | None = None) -> _Process:
        places = ["--metadata", str(metadata), "--root", "none", "--output", str(output)]
        return _Process(folder, tool, [*places, *arguments, *KNOBS], task)

    def results(output: Path, shard: Shard) -> Path:
        return output.with_name(output.name + ".work") / "results" / f"{shard.stem}.sqlite"

    if "submit" not in steps.done:  # which reads the metadata for all tasks
        steps.record("submit", start("generate_hod", output, "--submit", str(options.shards)).wait())
    # As an array with a limit of tasks at a time: the next task starts when one ends.
    waiting, running = [shard for shard in shards if f"shard {shard}" not in steps.done], dict[Shard, _Process]()
    try:
        while waiting or running:
            while waiting and len(running) < options.at_once:
                shard = waiting.pop(0)
                running[shard] = start("generate_hod", output, "--shard", str(shard), task=shard.index)
            for shard, process in list(running.items()):
                if shard == killed and "kill" not in steps.done:
                    done = _count_results(results(output, shard))
                    # After its half, when the boxes of all its clips are stored and the first captions are.
                    if done > KILLED_AT * len(STAGES) * len(shard.clips(options.clips, HodConfig().block)):
                        process.kill()
                        steps.record("kill", {"results": done})
                        waiting.insert(0, shard)
                        del running[shard]
                elif process.has_ended():
                    steps.record(
                        f"shard {shard}", process.wait() | {"clips": len(shard.clips(options.clips, HodConfig().block))}
                    )
                    del running[shard]
            time.sleep(0.1)
    finally:
        for process in running.values():  # after an error or Ctrl-C; finished clips are kept
            process.kill()
    if "alone" not in steps.done:  # the shard that was killed, in a run of its own that was not
        alone = folder / "alone.csv"
        start("generate_hod", alone, "--shard", str(killed)).wait()
        checksums = [_content(results(path, killed)) for path in (output, alone)]
        if checksums[0] != checksums[1]:
            raise UserError(f"{results(output, killed)} is not {results(alone, killed)}: a kill changed results")
        steps.record("alone", {"sha256": checksums[0]})
    if "merge" not in steps.done:
        merged = start("generate_hod", output, "--merge").wait()
        steps.record("merge", merged | _verify(output, options.clips))
    for name, filters in PAGES.items():
        if name not in steps.done:
            page = folder / f"{name}.html"
            drawn = start("visualize_hod", output, "--page", str(page), *filters).wait()
            steps.record(name, drawn | {"page_mb": page.stat().st_size / 1e6})
    result = _summary(steps.done, options)
    if options.results:
        write_text(options.results, json.dumps(result, indent=1) + "\n")
    return result


def hod_scale_text(result: dict[str, Any]) -> str:
    """The result for people."""
    head = f"{result['clips']:,} clips on {result['shards']} shards, {result['at_once']} at a time"
    lines = [f"{head}: {result['minutes']:.0f} min"]
    for name, each in result["processes"].items():
        cpu = f"{each['cpu_s']:7.1f} s of CPU"
        lines.append(f"{name:<16} {each['seconds']:7.1f} s  {cpu}  peak {each['peak_mb']:.0f} MB")
    lines.append(f"a shard: {result['clips_per_second_of_a_shard']:.0f} clips/s; a resumed one has the same results")
    return "\n".join(lines)


def _summary(done: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    # Here: it loads PyTorch, which would be most of the memory of the measured processes.
    from egohod.training.telemetry import git_commit

    shards = [values for name, values in done.items() if name.startswith("shard ")]
    keys = ("seconds", "cpu_s", "peak_mb", "own_mb")
    # Of shards the highest, whose memory a job has to ask for, and the median.
    worst = {key: max(each[key] for each in shards) for key in keys}
    usual = {key: statistics.median(each[key] for each in shards) for key in keys}
    others = {name: {key: done[name][key] for key in keys} for name in ("submit", "merge", *PAGES)}
    return {
        "command": f"python tools/bench.py hod_scale --clips {options.clips} --shards {options.shards}",
        "commit": git_commit(),
        "machine": f"{platform.machine()}, {usable_cores()} cores, Python {platform.python_version()}",
        "load": os.getloadavg()[2],
        "clips": options.clips,
        "shards": options.shards,
        "at_once": options.at_once,
        "metadata_mb": done["metadata"]["mb"],
        "minutes": (sum(each["seconds"] for each in shards) / options.at_once + others["merge"]["seconds"]) / 60,
        "clips_per_second_of_a_shard": statistics.median(each["clips"] / each["seconds"] for each in shards),
        "processes": {"shard (median)": usual, "shard (highest)": worst, **others},
        # None where the shard was too quick to be killed.
        "killed_with_results": done.get("kill", {}).get("results"),
        "narrations": done["merge"]["narrations"],
        "failures": done["merge"]["failures"],
    }


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
        environment["PATH"] = os.pathsep.join([str(folder / "bin"), environment["PATH"]])
        if task is not None:
            environment |= {"SLURM_JOB_ID": str(1001 + task), "SLURM_ARRAY_JOB_ID": "1000"}
            environment |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
        command = [sys.executable, "-m", "benches.hod_scale", str(self._report), tool, *arguments]
        with self._log.open("w") as file:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        self.id = self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self) -> dict[str, Any]:
        """Seconds and peak memory. Raises :class:`UserError` if it failed."""
        code = self._process.wait()
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
            writer.writerow(
                [f"{video:08d}-0000-4000-8000-{video:012d}", start, start + CLIP_SECONDS, text, f"clip_{index:08d}"]
            )


def _write_sbatch(folder: Path) -> None:
    """Programs in place of Slurm's, which take jobs and run none."""
    folder.mkdir(exist_ok=True)
    for name in ("sbatch", "srun"):
        (folder / name).write_text("#!/bin/sh\necho Submitted batch job 1000\n")
        (folder / name).chmod(0o755)


def _count_results(path: Path) -> int:
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
