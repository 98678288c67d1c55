"""The ``decode`` part of ``tools/bench.py``: what it costs to read the frames of a clip, by decoder and kind of file.

CPU milliseconds of one process for 2 s of a 426x320 video: with a key frame every 15 frames, every 250, and as
``tools/chunk_videos.py`` makes it at a short side of 256. Decoders take turns, clip by clip.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_loader import (
    CHUNK_SECONDS,
    CLIP_SECONDS,
    KEYFRAME_EVERY,
    ORIGINAL_KEYFRAME_EVERY,
    chunked,
    write_chunk,
)

from egohod.data.decoders import choose_decoder
from egohod.data.videos import read_clip
from egohod.errors import UserError

DECODERS = ("pyav", "torchcodec", "decord")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``decode`` to the commands of ``tools/bench.py``."""
    parser = commands.add_parser("decode", help="CPU time to read a clip, by decoder and kind of file")
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 16], help="frames per clip (default: 4 16)")
    parser.add_argument("--clips", type=int, default=24, help="clips per decoder and kind of file (default: 24)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Make the files, measure, print."""
    with tempfile.TemporaryDirectory() as name:
        rows = [
            {"file": kind, "frames": frames, **measure(path, frames, options.clips)}
            for kind, path in files(Path(name)).items()
            for frames in options.frames
        ]
    if options.json:
        print(json.dumps(rows))
        return
    print("CPU ms a clip".ljust(34) + "".join(f"{name:>12}" for name in DECODERS))
    for row in rows:
        cells = (f"{row[name]:12.1f}" if name in row else f"{'-':>12}" for name in DECODERS)
        print(f"{row['file']}, {row['frames']} frames".ljust(34) + "".join(cells))


def files(folder: Path) -> dict[str, Path]:
    """One chunk of each kind."""
    close, far = folder / "close.mp4", folder / "videos" / "v" / "0000.mp4"
    write_chunk(close, 0, KEYFRAME_EVERY)
    write_chunk(far, 0, ORIGINAL_KEYFRAME_EVERY)
    ours = next(chunked(folder, 1).rglob("*.mp4"))
    return {f"key frame every {KEYFRAME_EVERY}": close, f"every {ORIGINAL_KEYFRAME_EVERY}": far, "chunk_videos": ours}


def measure(path: Path, frames: int, clips: int) -> dict[str, float]:
    """Median CPU milliseconds by decoder; one that does not load is left out."""
    openers = {}
    for name in DECODERS:
        try:
            openers[name] = choose_decoder(name)[1]
        except UserError:
            continue
    spent: dict[str, list[float]] = {name: [] for name in openers}
    for start in np.random.default_rng(0).uniform(0, CHUNK_SECONDS - CLIP_SECONDS, clips):
        for name, opener in openers.items():
            before = time.process_time()
            read_clip(opener, path, str(path), start, start + CLIP_SECONDS, frames)
            spent[name].append(1000 * (time.process_time() - before))
    return {name: statistics.median(each) for name, each in spent.items()}
