"""Benchmarks of the data side: ``decode``, ``loader`` and ``table`` of ``tools/bench.py``.

``decode``: CPU milliseconds of one process to read a clip of 2 s from a 426x320 video: with a key frame every 15
frames, every 250, and as ``tools/chunk_videos.py`` makes it at a short side of 256. Decoders alternate, clip by clip.

``loader``: from a video file to a training-ready batch, against the usual way. Both read the same clips (2 s, 16
frames at 224 px) of the same chunks (426 x 320, 30 fps, H.264, a key frame every 15 frames) with the same number of
processes, in alternating rounds. The usual way is what the field's loaders do for one stream: decord to float32 full
frames, one bicubic random resized crop and the normalisation, all in the worker. Ours is ``egohod.data``: uint8 to the
main process and normalised there, which is part of the time measured. With ``--chunked`` the usual way reads the
original instead, a key frame every 250 frames, and ours what ``tools/chunk_videos.py`` makes of it at a short side of
256. With ``--s3`` ours also reads the same chunks, in the same rounds, from an S3 server on loopback (moto, a process
of its own on the same cores) without a cache; and then once more in turns within one process, where neither starting
workers nor connecting counts.

``table``: a large annotation file, from start to first batch, and its memory. A csv with as many rows as Ego4D has
narrations, over some thousand videos (hard links to one small file), is read, shuffled and fed by worker processes.
Memory is the proportional set size (PSS) of the whole process tree, compared with the same tree over a few rows.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from egohod.config import Config
from egohod.data.chunking import ChunkSettings, write_chunks
from egohod.data.config import DataConfig, SourceConfig
from egohod.data.dataset import ClipDataset, Tokenizer, normalise, random_box
from egohod.data.decoders import choose_decoder
from egohod.data.formats import read_clips
from egohod.data.loader import BatchPlan, train_loader
from egohod.data.videos import read_clip, segment_indices
from egohod.errors import UserError
from egohod.model.config import IMAGE_STATS, ModelConfig
from egohod.training.build import build_dataset, build_plan
from egohod.training.config import TrainConfig

DECODERS = ("pyav", "torchcodec", "decord")
# As in EK100_320p_15sec, the form in which AVION trains: a short side of 320 pixels, chunks of 15 s.
WIDTH, HEIGHT, FPS, CHUNK_SECONDS, KEYFRAME_EVERY = 426, 320, 30, 15, 15
CLIP_SECONDS = 2.0
CROP_SCALE_MIN = 0.5
# Of the original that is chunked: what cameras and archives have.
ORIGINAL_KEYFRAME_EVERY, CHUNKED_SHORT_SIDE = 250, 256
BUCKET = "egohod-bench"
WARM_TURNS, WARM_CLIPS = 12, 16
MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the benchmark closes the pipe or is gone
"""
BATCH, BATCHES, SIZE, FRAMES, SECONDS = 64, 8, 32, 4, 60
FEW_ROWS = BATCH * BATCHES
VERBS = ["picks up", "puts down", "opens", "closes", "cuts", "stirs", "washes", "wipes", "holds", "turns"]
THINGS = ["the red cup", "a spoon", "the dough", "an onion", "the tap", "a plate", "the lid of the pot", "the knife"]


# --------------------------------------------------------------------------------------------------
# decode
# --------------------------------------------------------------------------------------------------


def decode_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 16], help="frames per clip (default: 4 16)")
    parser.add_argument("--clips", type=int, default=24, help="clips per decoder and kind of file (default: 24)")


def decode(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Median CPU milliseconds by kind of file, frames and decoder; a decoder that does not load is left out."""
    openers = {}
    for name in DECODERS:
        with contextlib.suppress(UserError):
            openers[name] = choose_decoder(name)[1]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        close, far = folder / "close.mp4", folder / "videos" / "v" / "0000.mp4"
        write_chunk(close, 0, KEYFRAME_EVERY)
        write_chunk(far, 0, ORIGINAL_KEYFRAME_EVERY)
        kinds = {f"key frame every {KEYFRAME_EVERY}": close, f"every {ORIGINAL_KEYFRAME_EVERY}": far}
        kinds["chunk_videos"] = next(chunked(folder, 1).rglob("*.mp4"))
        for kind, path in kinds.items():
            for frames in options.frames:
                spent: dict[str, list[float]] = {name: [] for name in openers}
                for start in np.random.default_rng(0).uniform(0, CHUNK_SECONDS - CLIP_SECONDS, options.clips):
                    for name, opener in openers.items():
                        before = time.process_time()
                        read_clip(opener, path, str(path), start, start + CLIP_SECONDS, frames)
                        spent[name].append(1000 * (time.process_time() - before))
                medians = {name: statistics.median(each) for name, each in spent.items()}
                rows.append({"file": kind, "frames": frames, **medians})
    return rows


def decode_text(rows: list[dict[str, Any]]) -> str:
    lines = ["CPU ms a clip".ljust(34) + "".join(f"{name:>12}" for name in DECODERS)]
    for row in rows:
        cells = (f"{row[name]:12.1f}" if name in row else f"{'-':>12}" for name in DECODERS)
        lines.append(f"{row['file']}, {row['frames']} frames".ljust(34) + "".join(cells))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# loader
# --------------------------------------------------------------------------------------------------


def loader_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (default: 2)")
    parser.add_argument("--frames", type=int, default=16, help="frames per clip (default: 16)")
    parser.add_argument("--size", type=int, default=224, help="pixels of the crop (default: 224)")
    parser.add_argument("--batch_size", type=int, default=8, help="clips per batch (default: 8)")
    parser.add_argument("--clips", type=int, default=64, help="clips per round (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each way (default: 3)")
    parser.add_argument("--chunks", type=int, default=4, help="chunks of 15 s to draw clips from (default: 4)")
    parser.add_argument("--decoder", default="auto", help="our decoder (default: auto)")
    parser.add_argument("--chunked", action="store_true", help="ours on chunks made of the original by chunk_videos")
    parser.add_argument("--s3", action="store_true", help="also read from an S3 server on loopback, without a cache")


def loader(options: argparse.Namespace) -> dict[str, Any]:
    """Clips/s of all ways in alternating rounds, and the median of the rounds' ratios."""
    # Workers and the main process share the cores; with more threads they would disturb one another.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_videos(
            folder, options.chunks, options.clips, ORIGINAL_KEYFRAME_EVERY if options.chunked else KEYFRAME_EVERY
        )
        videos = chunked(folder, options.chunks) if options.chunked else folder / "videos"
        with s3_server(videos) if options.s3 else contextlib.nullcontext() as server:
            return compare_loaders(folder, videos, rows, options, server)


def loader_text(result: dict[str, Any]) -> str:
    s3 = ""
    if "s3_ratio" in result:
        each_round = ", ".join(f"{ratio:.2f}" for ratio in result["s3_ratios"])
        s3 = (
            f"\negohod.data from S3 on loopback           {result['s3_clips_per_second']:6.1f} clips/s, "
            f"{result['s3_milliseconds_per_clip']:.0f} ms CPU each and {result['server_milliseconds_per_clip']:.1f} ms "
            f"in the server\ndisk to S3 {result['s3_ratio']:.2f} (rounds: {each_round})\n"
            f"in one process that is connected {result['warm_s3_ratio']:.2f}: "
            f"{result['warm_milliseconds_per_clip']:.0f} and {result['warm_s3_milliseconds_per_clip']:.0f} ms CPU each"
        )
    return (
        f"{result['workers']} workers, {result['frames']} frames at {result['size']} px, "
        f"batches of {result['batch_size']}, "
        f"{result['baseline_kilobits_per_second']:.0f} kbit/s, ours {result['kilobits_per_second']:.0f} kbit/s\n"
        f"usual way (decord, float32 in the worker) {result['baseline_clips_per_second']:6.1f} clips/s, "
        f"{result['baseline_milliseconds_per_clip']:.0f} ms CPU each\n"
        f"egohod.data ({result['decoder']}, uint8){'':13}{result['clips_per_second']:6.1f} clips/s, "
        f"{result['milliseconds_per_clip']:.0f} ms CPU each\n"
        f"ratio {result['ratio']:.2f} (rounds: {', '.join(f'{ratio:.2f}' for ratio in result['ratios'])})" + s3
    )


def our_dataset(folder: Path, root: str, options: argparse.Namespace) -> ClipDataset:
    """Our dataset over the videos below ``root``."""
    return ClipDataset(
        [
            (
                read_clips(folder / "clips.csv"),
                SourceConfig(root=root, layout="chunks", chunk_seconds=CHUNK_SECONDS),
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


def compare_loaders(
    folder: Path,
    videos: Path,
    rows: list[tuple[str, float, str]],
    options: argparse.Namespace,
    server: psutil.Process | None,
) -> dict[str, Any]:
    """See :func:`loader`; ``videos`` holds the files that our loader reads."""
    dataset = our_dataset(folder, str(videos), options)
    remote = our_dataset(folder, f"s3://{BUCKET}", options) if server else None
    plan = BatchPlan(len(dataset), options.batch_size, seed=0)
    usual = UsualDataset(folder / "videos", rows, options.frames, options.size)
    ours, theirs, from_s3, busy = [], [], [], []
    for number in range(options.rounds + 1):
        start = number * plan.steps_per_epoch
        when = {"start_step": start, "total_steps": start + plan.steps_per_epoch, "workers": options.workers}
        theirs.append(rate(DataLoader(usual, options.batch_size, shuffle=True, num_workers=options.workers)))
        ours.append(rate(train_loader(dataset, plan, **when)))
        if remote and server:
            before = sum(server.cpu_times()[:2])
            from_s3.append(rate(train_loader(remote, plan, **when)))
            busy.append(1000 * (sum(server.cpu_times()[:2]) - before) / (plan.steps_per_epoch * plan.batch_size))
    # The first round warms the page cache and the imports.
    ours, theirs, from_s3, busy = ours[1:], theirs[1:], from_s3[1:], busy[1:]
    ratios = [a / b for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    s3 = {}
    if remote:
        s3_ratios = [a / b for (a, _), (b, _) in zip(ours, from_s3, strict=True)]
        s3 = {
            "s3_clips_per_second": statistics.median(each for each, _ in from_s3),
            "s3_ratio": statistics.median(s3_ratios),
            "s3_ratios": s3_ratios,
            "s3_milliseconds_per_clip": statistics.median(each for _, each in from_s3),
            "server_milliseconds_per_clip": statistics.median(busy),
            **warm(dataset, remote),
        }
    return {
        "clips_per_second": statistics.median(each for each, _ in ours),
        "baseline_clips_per_second": statistics.median(each for each, _ in theirs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "milliseconds_per_clip": statistics.median(each for _, each in ours),
        "baseline_milliseconds_per_clip": statistics.median(each for _, each in theirs),
        **s3,
        "decoder": dataset.decoder,
        "kilobits_per_second": kilobits(videos) / (options.chunks * CHUNK_SECONDS),
        "baseline_kilobits_per_second": kilobits(folder / "videos") / (options.chunks * CHUNK_SECONDS),
        **{name: getattr(options, name) for name in ("workers", "frames", "size", "batch_size", "clips", "chunked")},
    }


def warm(dataset: ClipDataset, remote: ClipDataset) -> dict[str, float]:
    """One process that has its connection already, as in the middle of a long run: a few clips of each in turns."""
    wall, busy = [], []
    for turn in range(WARM_TURNS + 1):
        keys = [(turn, i % len(dataset)) for i in range(turn * WARM_CLIPS, (turn + 1) * WARM_CLIPS)]
        for source in (dataset, remote):
            began, before = time.perf_counter(), time.process_time()
            for key in keys:
                source[key]
            wall.append(time.perf_counter() - began)
            busy.append(1000 * (time.process_time() - before) / WARM_CLIPS)
    # The first turn connects.
    return {
        "warm_s3_ratio": statistics.median(s3 / disk for disk, s3 in zip(wall[2::2], wall[3::2], strict=True)),
        "warm_milliseconds_per_clip": statistics.median(busy[2::2]),
        "warm_s3_milliseconds_per_clip": statistics.median(busy[3::2]),
    }


def kilobits(folder: Path) -> float:
    """Size of all chunks below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.mp4")) * 8 / 1000


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[psutil.Process]:
    """A moto server with the files of ``folder``, to which this process's S3 requests go."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", MOTO], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = process.stdout.readline()
            if not port:
                sys.exit("error: --s3 needs a server: pip install -r tests/requirements.txt")
            os.environ.update(
                AWS_ENDPOINT_URL=f"http://127.0.0.1:{int(port)}",
                AWS_ACCESS_KEY_ID="bench",
                AWS_SECRET_ACCESS_KEY="bench",
                AWS_DEFAULT_REGION="us-east-1",
            )
            system = fsspec.filesystem("s3", skip_instance_cache=True)
            system.mkdir(BUCKET)
            for path in folder.rglob("*.mp4"):
                system.pipe_file(f"{BUCKET}/{path.relative_to(folder)}", path.read_bytes())
            yield psutil.Process(process.pid)
        finally:
            process.stdin.close()
            process.kill()


def rate(loader: DataLoader[Any]) -> tuple[float, float]:
    """Clips/s until the last batch is ready to be trained on, and CPU milliseconds per clip, those of workers too."""
    clips, began, busy = 0, time.perf_counter(), cpu_seconds()
    for batch in loader:
        video = batch["video"]
        if video.dtype == torch.uint8:
            video = normalise(video)
        clips += len(video)
    seconds = time.perf_counter() - began
    # The workers have ended with the loop, so that their time is known.
    return clips / seconds, 1000 * (cpu_seconds() - busy) / clips


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


class UsualDataset(Dataset[dict[str, torch.Tensor]]):
    """decord to float32 full frames, one bicubic random resized crop and the normalisation, in the worker."""

    def __init__(self, root: Path, rows: list[tuple[str, float, str]], frames: int, size: int) -> None:
        choose_decoder("decord")  # which not every machine has
        self.root, self.rows, self.frames, self.size = root, rows, frames, size
        self.tokenizer = SimpleTokenizer(context_length=77)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        import decord

        video_id, start, text = self.rows[index]
        rng = np.random.default_rng()  # unseeded, as in the loaders that it stands for
        chunk, offset = divmod(start, CHUNK_SECONDS)
        reader = decord.VideoReader(str(self.root / video_id / f"{int(chunk):04d}.mp4"), num_threads=1)
        first = round(offset * reader.get_avg_fps())
        last = min(len(reader), first + round(CLIP_SECONDS * reader.get_avg_fps()))
        frames = reader.get_batch(segment_indices(first, last, self.frames, rng).tolist()).asnumpy()
        video = torch.from_numpy(frames.astype(np.float32)).permute(3, 0, 1, 2)
        top, left, height, width = random_box(HEIGHT, WIDTH, CROP_SCALE_MIN, rng)
        video = video[:, :, top : top + height, left : left + width]
        video = F.interpolate(video, (self.size, self.size), mode="bicubic", align_corners=False)
        if rng.random() < 0.5:
            video = video.flip(-1)
        mean, std = (255 * torch.tensor(each).view(3, 1, 1, 1) for each in IMAGE_STATS["clip"])
        return {"video": (video - mean) / std, "tokens": self.tokenizer([text])[0]}


# --------------------------------------------------------------------------------------------------
# table
# --------------------------------------------------------------------------------------------------


def table_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=4_000_000, help="clips in the table (default: 4 million)")
    parser.add_argument("--videos", type=int, default=9000, help="videos that hold them (default: 9,000)")
    parser.add_argument("--workers", type=int, default=4, help="loader processes (default: 4)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)


def table(options: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first batch and memory of all processes, over all rows and over a few."""
    if options.measure:
        return feed_table(options.measure, options.workers)
    with tempfile.TemporaryDirectory() as name:
        few, many = (write_world(Path(name), rows, options.videos) for rows in (FEW_ROWS, options.rows))
        empty, full = (_feed_in_a_child(path, options.workers) for path in (few, many))
        size = many.stat().st_size
    return {
        "rows": options.rows,
        "workers": options.workers,
        "csv_mb": size / 1e6,
        "first_batch_s": full["first_batch_s"],
        "first_batch_empty_s": empty["first_batch_s"],
        "pss_mb": full["pss_mb"],
        "pss_empty_mb": empty["pss_mb"],
        "pss_above_empty_mb": full["pss_mb"] - empty["pss_mb"],
    }


def table_text(result: dict[str, float]) -> str:
    return (
        f"{result['rows']:,.0f} rows ({result['csv_mb']:.0f} MB of csv), {result['workers']:.0f} workers\n"
        f"start to first batch  {result['first_batch_s']:.1f} s ({result['first_batch_empty_s']:.1f} s with few rows)\n"
        f"PSS of all processes  {result['pss_mb']:.0f} MB, {result['pss_above_empty_mb']:.0f} MB above few rows"
    )


def write_world(folder: Path, rows: int, videos: int) -> Path:
    """A csv in the form of the released HOD files, and its videos; the csv's path."""
    rng = random.Random(0)  # the same table in both processes that are compared
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
            text = f"#C C {rng.choice(VERBS)} {rng.choice(THINGS)} with the left hand while the right hand"
            text += f" {rng.choice(VERBS)} {rng.choice(THINGS)}, {i} times"
            writer.writerow([rng.choice(names), f"{start:.3f}", f"{start + 1.5:.3f}", text, "ego4d", f"u{i:08d}"])
    return path


def write_video(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(10 * SECONDS):
            frame = np.full((48, 64, 3), i % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _feed_in_a_child(path: Path, workers: int) -> dict[str, float]:
    command = [sys.executable, sys.argv[0], "table", "--json", "--measure", str(path)]
    done = subprocess.run([*command, "--workers", str(workers)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def feed_table(path: Path, workers: int) -> dict[str, float]:
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


# --------------------------------------------------------------------------------------------------
# Videos for decode and loader
# --------------------------------------------------------------------------------------------------


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
