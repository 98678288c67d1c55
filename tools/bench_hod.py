"""The ``hod`` part of ``tools/bench.py``: what each stage of the HOD pipeline costs a clip, and what a worker holds.

The baseline is a loop that reads, detects, tracks, narrates and checks one clip after the other and keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from egohod import cli
from egohod.hod import config
from egohod.hod.pipeline import STAGES, Pipeline, build
from egohod.hod.store import Shard


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("hod", help="clips a second of the HOD pipeline by stage, and memory of a worker")
    cli.add_config_file(parser, "configs/hod/demo.yml")
    parser.add_argument("--clips", type=int, default=60, help="of the first clips of the metadata (default: 60)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="knobs of the pipeline")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Alternate both, so that a noisy machine disturbs both."""
    spent: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "loop")}
    memory = Memory()
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            # A shard of one block is the first clips.
            pipeline = _pipeline(options, Path(folder))
            shard = Shard(0, -(-len(pipeline.table) // options.clips))
            clips = pipeline.clips(shard)
            with memory:
                for stage in STAGES:
                    began = time.perf_counter()
                    pipeline.run([stage], shard)
                    spent[stage].append(time.perf_counter() - began)
            began = time.perf_counter()
            alone = _pipeline(options, Path(folder), "workers=0")
            for index in clips:
                for _ in alone.try_clip(index):
                    pass
            spent["loop"].append(time.perf_counter() - began)
    ours = [sum(spent[stage][i] for stage in STAGES) for i in range(options.rounds)]
    result: dict[str, Any] = {
        "clips": len(clips),
        "workers": pipeline.cfg.workers,
        "clips_per_second": len(clips) / statistics.median(ours),
        "share": {
            stage: statistics.median(part / whole for part, whole in zip(spent[stage], ours, strict=True))
            for stage in STAGES
        },
        "milliseconds": {stage: 1000 * statistics.median(spent[stage]) / len(clips) for stage in STAGES},
        "ratio_to_a_loop": statistics.median(slow / fast for slow, fast in zip(spent["loop"], ours, strict=True)),
        "worker_mb": memory.worker,
        "main_mb": memory.main,
    }
    print(json.dumps(result) if options.json else text(result))


class Memory:
    """Within, looks now and then at how much memory (MB) this process has, and each of its workers for itself alone.

    What a worker starts, such as MediaPipe, counts as its own.
    """

    def __init__(self) -> None:
        self.main = self.worker = 0.0

    def __enter__(self) -> Memory:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        this = psutil.Process()
        while not self._over.wait(0.1):
            self.main = max(self.main, this.memory_info().rss / 1e6)
            for each in this.children():
                try:
                    own = [each, *each.children(recursive=True)]
                    self.worker = max(self.worker, sum(one.memory_full_info().uss for one in own) / 1e6)
                except psutil.NoSuchProcess:
                    continue


def text(result: dict[str, Any]) -> str:
    stages = ", ".join(
        f"{stage} {result['milliseconds'][stage]:.1f} ms ({result['share'][stage]:.0%})" for stage in STAGES
    )
    return (
        f"{result['clips']} clips, {result['workers']} workers: {result['clips_per_second']:.1f} clips/s, "
        f"{result['ratio_to_a_loop']:.2f} x a loop in one process\na clip: {stages}\n"
        f"peak memory: a worker {result['worker_mb']:.0f} MB of its own, the main process {result['main_mb']:.0f} MB"
    )


def _pipeline(options: argparse.Namespace, folder: Path, *more: str) -> Pipeline:
    knobs = [*options.overrides, f"block={options.clips}", f"output={folder / 'hod.csv'}", *more]
    return build(config.load(options.config_file, knobs))
