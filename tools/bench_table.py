"""The ``table`` part of ``tools/bench.py``: a large annotation file, from start to first batch, and its memory.

A csv with as many rows as Ego4D has narrations, over some thousand videos (links to one small file), is read, shuffled
and fed by worker processes. Memory is the proportional set size (PSS) of the whole process tree, compared with the
same tree over a table of a few rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import av
import numpy as np
import psutil

from egohod.config import Config
from egohod.data.config import DataConfig, SourceConfig
from egohod.data.loader import train_loader
from egohod.model.config import ModelConfig
from egohod.training.config import TrainConfig
from egohod.training.setup import build_dataset, build_plan

BATCH, BATCHES, SIZE, FRAMES, SECONDS = 64, 8, 32, 4, 60
FEW_ROWS = BATCH * BATCHES
VERBS = ["picks up", "puts down", "opens", "closes", "cuts", "stirs", "washes", "wipes", "holds", "turns"]
THINGS = ["the red cup", "a spoon", "the dough", "an onion", "the tap", "a plate", "the lid of the pot", "the knife"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("table", help="millions of rows: start to first batch, memory of all processes")
    parser.add_argument("--rows", type=int, default=4_000_000, help="clips in the table (default: 4 million)")
    parser.add_argument("--videos", type=int, default=9000, help="videos they lie in (default: 9,000)")
    parser.add_argument("--workers", type=int, default=4, help="loader processes (default: 4)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    if options.measure:
        print(json.dumps(measure(options.measure, options.workers)))
        return
    with tempfile.TemporaryDirectory() as name:
        few, many = (write_world(Path(name), rows, options.videos) for rows in (FEW_ROWS, options.rows))
        empty, full = (measure_in_a_child(path, options.workers) for path in (few, many))
        size = many.stat().st_size
    result = {
        "rows": options.rows,
        "workers": options.workers,
        "csv_mb": size / 1e6,
        "first_batch_s": full["first_batch_s"],
        "first_batch_empty_s": empty["first_batch_s"],
        "pss_mb": full["pss_mb"],
        "pss_empty_mb": empty["pss_mb"],
        "pss_above_empty_mb": full["pss_mb"] - empty["pss_mb"],
    }
    print(json.dumps(result) if options.json else text(result))


def text(result: dict[str, float]) -> str:
    return (
        f"{result['rows']:,.0f} rows ({result['csv_mb']:.0f} MB of csv), {result['workers']:.0f} workers\n"
        f"start to first batch  {result['first_batch_s']:.1f} s ({result['first_batch_empty_s']:.1f} s with few rows)\n"
        f"PSS of all processes  {result['pss_mb']:.0f} MB, {result['pss_above_empty_mb']:.0f} MB above few rows"
    )


def write_world(folder: Path, rows: int, videos: int) -> Path:
    """A csv in the form of the released HOD files, and its videos; the csv's path."""
    rng = random.Random(0)
    names = [str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(videos)]
    (folder / "videos").mkdir(exist_ok=True)
    original = folder / "original.mp4"
    if not original.exists():
        write_video(original)
        for name in names:
            os.link(original, folder / "videos" / f"{name}.mp4")
    path = folder / f"hod-{rows}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "start_second", "end_second", "text", "dataset", "uid"])
        for i in range(rows):
            start = rng.random() * (SECONDS - 3)
            said = f"#C C {rng.choice(VERBS)} {rng.choice(THINGS)} with the left hand while the right hand"
            said += f" {rng.choice(VERBS)} {rng.choice(THINGS)}, {i} times"
            writer.writerow([rng.choice(names), f"{start:.3f}", f"{start + 1.5:.3f}", said, "ego4d", f"u{i:08d}"])
    return path


def write_video(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(10 * SECONDS):
            frame = np.full((48, 64, 3), i % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def measure_in_a_child(path: Path, workers: int) -> dict[str, float]:
    command = [sys.executable, __file__.replace("bench_table", "bench"), "table", "--measure", str(path)]
    done = subprocess.run([*command, "--workers", str(workers)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(path: Path, workers: int) -> dict[str, float]:
    """Feed a few batches from a table; seconds from the start of this process to the first, and the tree's PSS then."""
    source = SourceConfig(metadata=str(path), root=str(path.parent / "videos"), layout="whole")
    cfg = Config(
        model=ModelConfig(name="DEMO", num_frames=FRAMES),
        data=DataConfig(train={"bench": source}, workers=workers),
        train=TrainConfig(global_batch_size=BATCH),
    )
    dataset = build_dataset(cfg, SIZE)
    batches = iter(train_loader(dataset, build_plan(cfg, dataset), start_step=0, total_steps=BATCHES, workers=workers))
    next(batches)
    first = time.time() - psutil.Process().create_time()
    for _ in range(BATCHES - 2):
        next(batches)
    me = psutil.Process()
    tree = [me, *me.children(recursive=True)]
    assert len(tree) == 1 + workers, "workers must be alive while memory is measured"
    pss = sum(process.memory_full_info().pss for process in tree) / 1e6
    return {"first_batch_s": first, "pss_mb": pss}
