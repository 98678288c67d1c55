"""The ``loader`` part of ``tools/bench.py``: from a video file to a training-ready batch, against the usual way.

Both ways read the same clips (2 s, 16 frames at 224 px) of the same chunks (426 x 320, 30 fps, H.264, a key frame every
15 frames) with the same number of processes, in alternating rounds. The usual way is what the field's loaders do for
one stream: decord to float32 full frames, one bicubic random resized crop and the normalisation, all in the worker.
Ours is ``egohod.data``: uint8 to the main process and normalised there, which is part of the time measured.

With ``--chunked`` the usual way reads the original instead, a key frame every 250 frames, and ours what
``tools/chunk_videos.py`` makes of it at a short side of 256.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from egohod.config import SourceConfig
from egohod.data import transforms
from egohod.data.chunking import ChunkSettings, write_chunks
from egohod.data.clips import ClipDataset
from egohod.data.frames import segment_indices
from egohod.data.loader import BatchPlan, train_loader
from egohod.data.table import ClipTable
from egohod.data.text import Tokenizer

WIDTH, HEIGHT, FPS, CHUNK_SECONDS, KEYFRAME_EVERY = 426, 320, 30, 15, 15
CLIP_SECONDS = 2.0
CROP_SCALE_MIN = 0.5
# Of the original that is chunked: what cameras and archives have.
ORIGINAL_KEYFRAME_EVERY, CHUNKED_SHORT_SIDE = 250, 256


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``loader`` to the commands of ``tools/bench.py``."""
    parser = commands.add_parser("loader", help="clips/s from file to training-ready batch, ours and the usual way")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (default: 2)")
    parser.add_argument("--frames", type=int, default=16, help="frames per clip (default: 16)")
    parser.add_argument("--size", type=int, default=224, help="pixels of the crop (default: 224)")
    parser.add_argument("--batch_size", type=int, default=8, help="clips per batch (default: 8)")
    parser.add_argument("--clips", type=int, default=64, help="clips per round (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each way (default: 3)")
    parser.add_argument("--chunks", type=int, default=4, help="chunks of 15 s to draw clips from (default: 4)")
    parser.add_argument("--chunked", action="store_true", help="ours on chunks made of the original by chunk_videos")
    parser.add_argument("--decoder", default="auto", help="our decoder (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Make the files, measure, print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options)
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{options.workers} workers, {options.frames} frames at {options.size} px, batches of {options.batch_size}, "
        f"{result['baseline_kilobits_per_second']:.0f} kbit/s, ours {result['kilobits_per_second']:.0f} kbit/s\n"
        f"usual way (decord, float32 in the worker) {result['baseline_clips_per_second']:6.1f} clips/s\n"
        f"egohod.data ({result['decoder']}, uint8){'':13}{result['clips_per_second']:6.1f} clips/s\n"
        f"ratio {result['ratio']:.2f} (rounds: {', '.join(f'{ratio:.2f}' for ratio in result['ratios'])})"
    )


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Alternate rounds of both ways; clips/s and the median of the rounds' ratios."""
    rows = make_videos(
        folder, options.chunks, options.clips, ORIGINAL_KEYFRAME_EVERY if options.chunked else KEYFRAME_EVERY
    )
    videos = chunked(folder, options.chunks) if options.chunked else folder / "videos"
    dataset = ClipDataset(
        [
            (
                ClipTable.read(folder / "clips.csv"),
                SourceConfig(root=str(videos), layout="chunks", chunk_seconds=CHUNK_SECONDS),
            )
        ],
        size=options.size,
        num_frames=options.frames,
        tokenizer=Tokenizer(),
        decoder=options.decoder,
        train=True,
        crop_scale_min=CROP_SCALE_MIN,
        flip=0.5,
    )
    plan = BatchPlan(len(dataset), options.batch_size, seed=0)
    usual = UsualDataset(folder / "videos", rows, options.frames, options.size)
    ours, theirs = [], []
    for number in range(options.rounds + 1):
        start = number * plan.steps_per_epoch
        batches = train_loader(
            dataset, plan, start_step=start, total_steps=start + plan.steps_per_epoch, workers=options.workers
        )
        theirs.append(rate(DataLoader(usual, options.batch_size, shuffle=True, num_workers=options.workers)))
        ours.append(rate(batches))
    # The first round warms the page cache and the imports.
    ours, theirs = ours[1:], theirs[1:]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "clips_per_second": statistics.median(ours),
        "baseline_clips_per_second": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "decoder": dataset.decoder,
        "kilobits_per_second": kilobits(videos) / (options.chunks * CHUNK_SECONDS),
        "baseline_kilobits_per_second": kilobits(folder / "videos") / (options.chunks * CHUNK_SECONDS),
        **{name: getattr(options, name) for name in ("workers", "frames", "size", "batch_size", "clips", "chunked")},
    }


def kilobits(folder: Path) -> float:
    """Size of all chunks below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.mp4")) * 8 / 1000


def rate(loader: DataLoader[Any]) -> float:
    """Clips/s until the last batch is ready to be trained on."""
    clips, began = 0, time.perf_counter()
    for batch in loader:
        video = batch["video"]
        if video.dtype == torch.uint8:
            video = transforms.normalise(video)
        clips += len(video)
    return clips / (time.perf_counter() - began)


class UsualDataset(Dataset[dict[str, torch.Tensor]]):
    """decord to float32 full frames, one bicubic random resized crop and the normalisation, in the worker."""

    def __init__(self, root: Path, rows: list[tuple[str, float, str]], frames: int, size: int) -> None:
        self.root, self.rows, self.frames, self.size = root, rows, frames, size
        self.tokenizer = SimpleTokenizer(context_length=77)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        video_id, start, text = self.rows[index]
        rng = np.random.default_rng()
        chunk, offset = divmod(start, CHUNK_SECONDS)
        reader = decord.VideoReader(str(self.root / video_id / f"{int(chunk):04d}.mp4"), num_threads=1)
        first = round(offset * reader.get_avg_fps())
        last = min(len(reader), first + round(CLIP_SECONDS * reader.get_avg_fps()))
        frames = reader.get_batch(segment_indices(first, last, self.frames, rng).tolist()).asnumpy()
        video = torch.from_numpy(frames.astype(np.float32)).permute(3, 0, 1, 2)
        top, left, height, width = transforms._random_box(HEIGHT, WIDTH, CROP_SCALE_MIN, rng)
        video = video[:, :, top : top + height, left : left + width]
        video = F.interpolate(video, (self.size, self.size), mode="bicubic", align_corners=False)
        if rng.random() < 0.5:
            video = video.flip(-1)
        mean, std = (255 * torch.tensor(each).view(3, 1, 1, 1) for each in (transforms.CLIP_MEAN, transforms.CLIP_STD))
        return {"video": (video - mean) / std, "tokens": self.tokenizer([text])[0]}


def chunked(folder: Path, chunks: int) -> Path:
    """What the chunking makes of each file of ``make_videos``; the folder that holds it."""
    settings = ChunkSettings(seconds=CHUNK_SECONDS, short_side=CHUNKED_SHORT_SIDE)
    for name in ("one", "chunked/v"):
        (folder / name).mkdir(parents=True)
    for number in range(chunks):
        write_chunks(folder / "videos" / "v" / f"{number:04d}.mp4", folder / "one", settings)
        (folder / "one" / settings.name(0)).rename(folder / "chunked" / "v" / settings.name(number))
    return folder / "chunked"


def make_videos(folder: Path, chunks: int, clips: int, keyframe_every: int) -> list[tuple[str, float, str]]:
    """One video of ``chunks`` chunks, and clips that lie within a chunk (the usual way reads one file a clip)."""
    for number in range(chunks):
        write_chunk(folder / "videos" / "v" / f"{number:04d}.mp4", number, keyframe_every)
    rng = np.random.default_rng(0)
    starts = rng.integers(chunks, size=clips) * CHUNK_SECONDS + rng.uniform(0, CHUNK_SECONDS - CLIP_SECONDS, clips)
    rows = [("v", float(start), f"#C C moves cup {i} with the left hand") for i, start in enumerate(starts)]
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("video_id", "start_second", "end_second", "text"))
        writer.writerows((video, start, start + CLIP_SECONDS, text) for video, start, text in rows)
    return rows


def write_chunk(path: Path, seed: int, keyframe_every: int) -> None:
    """A textured scene under a moving camera with sensor noise, by libx264 with its default settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, margin = np.random.default_rng(seed), 64
    wide, high = WIDTH + 2 * margin, HEIGHT + 2 * margin
    coarse = rng.integers(0, 256, (high // 16, wide // 16, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(coarse).resize((wide, high), Image.Resampling.BICUBIC)).astype(np.int16)
    scene = scene + rng.normal(0, 8, scene.shape).astype(np.int16)
    with av.open(str(path), "w") as container:
        options = {"g": str(keyframe_every), "threads": "1"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FPS * CHUNK_SECONDS):
            x = margin + round(50 * np.sin(number / 17 + seed))
            y = margin + round(50 * np.cos(number / 23))
            view = scene[y : y + HEIGHT, x : x + WIDTH] + rng.integers(-2, 3, (HEIGHT, WIDTH, 1), dtype=np.int16)
            frame = av.VideoFrame.from_ndarray(view.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
