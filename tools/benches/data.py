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
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import av
import fsspec
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from benches.training import alternate, json_of, timed
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
CLIP_SECONDS, CROP_SCALE_MIN = 2.0, 0.5
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
# Of the table: small pictures and few frames, so that rows and not pixels decide time and memory.
BATCH, BATCHES, SIZE, FRAMES, SECONDS = 64, 8, 32, 4, 60
VERBS = ["picks up", "puts down", "opens", "closes", "cuts", "stirs", "washes", "wipes", "holds", "turns"]
THINGS = ["the red cup", "a spoon", "the dough", "an onion", "the tap", "a plate", "the lid of the pot", "the knife"]

Row = tuple[str, float, str]
"""Video, start in seconds and text of a clip."""


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
        # decord has no wheel for ARM, and torchcodec needs a matching FFmpeg.
        with contextlib.suppress(UserError):
            openers[name] = choose_decoder(name)[1]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        close, far = folder / "close.mp4", folder / "videos" / "v" / "0000.mp4"
        # The same pictures in all files: only the encoding differs.
        write_chunk(close, 0, KEYFRAME_EVERY)
        write_chunk(far, 0, ORIGINAL_KEYFRAME_EVERY)
        kinds = {f"key frame every {KEYFRAME_EVERY}": close, f"every {ORIGINAL_KEYFRAME_EVERY}": far}
        kinds["chunk_videos"] = next(chunked(folder, 1).rglob("*.mp4"))
        for kind, path in kinds.items():
            for frames in options.frames:
                spent: dict[str, list[float]] = {name: [] for name in openers}
                # The same moments for all: what a clip costs depends on how far the last key frame is.
                for start in np.random.default_rng(0).uniform(0, CHUNK_SECONDS - CLIP_SECONDS, options.clips):
                    for name, opener in openers.items():
                        read = partial(read_clip, opener, path, str(path), start, start + CLIP_SECONDS, frames)
                        spent[name].append(1000 * timed(read).cpu)
                rows.append({"file": kind, "frames": frames, **{name: median(each) for name, each in spent.items()}})
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
    add = parser.add_argument
    add("--workers", type=int, default=2, help="decoding processes (default: 2)")
    add("--frames", type=int, default=16, help="frames per clip (default: 16)")
    add("--size", type=int, default=224, help="pixels of the crop (default: 224)")
    add("--batch_size", type=int, default=8, help="clips per batch (default: 8)")
    add("--clips", type=int, default=64, help="clips per round (default: 64)")
    add("--rounds", type=int, default=3, help="rounds of each way (default: 3)")
    add("--chunks", type=int, default=4, help="chunks of 15 s to draw clips from (default: 4)")
    add("--decoder", default="auto", help="our decoder (default: auto)")
    add("--chunked", action="store_true", help="ours on chunks made of the original by chunk_videos")
    add("--s3", action="store_true", help="also read from an S3 server on loopback, without a cache")


def loader(options: argparse.Namespace) -> dict[str, Any]:
    """Clips/s of all ways in alternating rounds, and the median of the rounds' ratios."""
    # Workers and the main process share the cores; with more threads they would disturb one another.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keyframe_every = ORIGINAL_KEYFRAME_EVERY if options.chunked else KEYFRAME_EVERY
        rows = make_videos(folder, options.chunks, options.clips, keyframe_every)
        videos = chunked(folder, options.chunks) if options.chunked else folder / "videos"
        with s3_server(videos) if options.s3 else contextlib.nullcontext() as server:
            return _compare_loaders(folder, videos, rows, options, server)


def loader_text(result: dict[str, Any]) -> str:
    def line(title: str, prefix: str, more: str = "") -> str:
        speed, cpu = result[f"{prefix}clips_per_second"], result[f"{prefix}milliseconds_per_clip"]
        return f"{title:<41} {speed:6.1f} clips/s, {cpu:.0f} ms CPU each{more}"

    def rounds(name: str) -> str:
        return f"{result[f'{name}ratio']:.2f} (rounds: {', '.join(f'{each:.2f}' for each in result[f'{name}ratios'])})"

    lines = [
        f"{result['workers']} workers, {result['frames']} frames at {result['size']} px, batches of "
        f"{result['batch_size']}, {result['baseline_kilobits_per_second']:.0f} kbit/s, "
        f"ours {result['kilobits_per_second']:.0f} kbit/s",
        line("usual way (decord, float32 in the worker)", "baseline_"),
        line(f"egohod.data ({result['decoder']}, uint8)", ""),
        f"ratio {rounds('')}",
    ]
    if "s3_ratio" in result:
        server = f" and {result['server_milliseconds_per_clip']:.1f} ms in the server"
        lines += [line("egohod.data from S3 on loopback", "s3_", server), f"disk to S3 {rounds('s3_')}"]
        disk, s3 = result["warm_milliseconds_per_clip"], result["warm_s3_milliseconds_per_clip"]
        ratio = f"in one process that is connected {result['warm_s3_ratio']:.2f}"
        lines.append(f"{ratio}: {disk:.0f} and {s3:.0f} ms CPU each")
    return "\n".join(lines)


def _compare_loaders(
    folder: Path, videos: Path, rows: list[Row], options: argparse.Namespace, server: psutil.Process | None
) -> dict[str, Any]:
    # videos holds the files that our loader reads: the original ones, or their chunks.

    def ours(root: str) -> ClipDataset:
        source = SourceConfig(root=root, layout="chunks", chunk_seconds=CHUNK_SECONDS)
        sampling = {"num_frames": options.frames, "size": options.size, "crop_scale_min": CROP_SCALE_MIN, "flip": 0.5}
        clips = [(read_clips(folder / "clips.csv"), source)]
        return ClipDataset(clips, tokenizer=Tokenizer(), decoder=options.decoder, train=True, **sampling)

    usual = UsualDataset(folder / "videos", rows, options.frames, options.size)
    # By what their numbers' names begin with.
    datasets = {"": ours(str(videos))} | ({"s3_": ours(f"s3://{BUCKET}")} if server else {})
    plan = BatchPlan(len(datasets[""]), options.batch_size, seed=0)
    rates: dict[str, list[tuple[float, float]]] = {prefix: [] for prefix in ("baseline_", *datasets)}
    in_server = []
    for number in range(options.rounds + 1):
        start = number * plan.steps_per_epoch
        when = {"start_step": start, "total_steps": start + plan.steps_per_epoch, "workers": options.workers}
        rates["baseline_"].append(rate(DataLoader(usual, plan.batch_size, shuffle=True, num_workers=options.workers)))
        for prefix, dataset in datasets.items():
            before = sum(server.cpu_times()[:2]) if server else 0.0
            rates[prefix].append(rate(train_loader(dataset, plan, **when)))
            spent = sum(server.cpu_times()[:2]) - before if server else 0.0
        in_server.append(1000 * spent / (plan.steps_per_epoch * plan.batch_size))  # of the last way, which is S3
    result: dict[str, Any] = {}
    for prefix, of_way in rates.items():
        # The first round warms the page cache and the imports.
        del of_way[0]
        result[f"{prefix}clips_per_second"] = median(speed for speed, _ in of_way)
        result[f"{prefix}milliseconds_per_clip"] = median(cpu for _, cpu in of_way)
    for prefix, fast, slow in (("", "", "baseline_"), ("s3_", "", "s3_")):
        if slow in rates:
            ratios = [a / b for (a, _), (b, _) in zip(rates[fast], rates[slow], strict=True)]
            result |= {f"{prefix}ratio": median(ratios), f"{prefix}ratios": ratios}
    if server:
        result |= {"server_milliseconds_per_clip": median(in_server[1:])} | _warm(datasets[""], datasets["s3_"])
    return result | {
        "decoder": datasets[""].decoder,
        "kilobits_per_second": kilobits(videos) / (options.chunks * CHUNK_SECONDS),
        "baseline_kilobits_per_second": kilobits(folder / "videos") / (options.chunks * CHUNK_SECONDS),
        **{name: getattr(options, name) for name in ("workers", "frames", "size", "batch_size", "clips", "chunked")},
    }


def _warm(disk: ClipDataset, s3: ClipDataset) -> dict[str, float]:
    """One process that has its connection already, as in the middle of a long run: a few clips of each in turns."""
    turn = {"disk": 0, "s3": 0}

    def read(name: str, dataset: ClipDataset) -> None:
        first = turn[name] * WARM_CLIPS
        for i in range(first, first + WARM_CLIPS):
            dataset[turn[name], i % len(dataset)]
        turn[name] += 1

    runs = alternate(WARM_TURNS + 1, {"disk": partial(read, "disk", disk), "s3": partial(read, "s3", s3)})
    # The first turn connects.
    of_disk, of_s3 = runs["disk"][1:], runs["s3"][1:]
    return {
        "warm_s3_ratio": median(b.seconds / a.seconds for a, b in zip(of_disk, of_s3, strict=True)),
        "warm_milliseconds_per_clip": 1000 * median(run.cpu for run in of_disk) / WARM_CLIPS,
        "warm_s3_milliseconds_per_clip": 1000 * median(run.cpu for run in of_s3) / WARM_CLIPS,
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
                # moto is a package of the tests, which a user need not have.
                sys.exit("error: --s3 needs a server: pip install -r tests/requirements.txt")
            os.environ.update(
                AWS_ENDPOINT_URL=f"http://127.0.0.1:{int(port)}",
                AWS_ACCESS_KEY_ID="bench",
                AWS_SECRET_ACCESS_KEY="bench",
                AWS_DEFAULT_REGION="us-east-1",
            )
            # fsspec would return a connection to an earlier address.
            system = fsspec.filesystem("s3", skip_instance_cache=True)
            system.mkdir(BUCKET)
            for path in folder.rglob("*.mp4"):
                system.pipe_file(f"{BUCKET}/{path.relative_to(folder)}", path.read_bytes())
            yield psutil.Process(process.pid)
        finally:
            process.stdin.close()
            process.kill()


def rate(loader: Iterable[Any]) -> tuple[float, float]:
    """Clips/s until the last batch is ready to be trained on, and CPU milliseconds per clip, those of workers too."""

    def read() -> int:
        clips = 0
        for batch in loader:
            video = batch["video"]
            # What ours leaves to the main process, or to the GPU.
            if video.dtype == torch.uint8:
                video = normalise(video)
            clips += len(video)
        return clips

    # The workers have ended with the loop, so that their time counts.
    clips, seconds, cpu = timed(read)
    return clips / seconds, 1000 * cpu / clips


class UsualDataset(Dataset[dict[str, torch.Tensor]]):
    """decord to float32 full frames, one bicubic random resized crop and the normalisation, in the worker."""

    def __init__(self, root: Path, rows: list[Row], frames: int, size: int) -> None:
        choose_decoder("decord")  # which not every machine has
        self.root, self.rows, self.frames, self.size = root, rows, frames, size
        # open_clip's, which the usual loaders call for every clip.
        self.tokenizer = SimpleTokenizer(context_length=77)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        import decord

        video_id, start, text = self.rows[index]
        rng = np.random.default_rng()  # unseeded, as in the loaders that it imitates
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
        # The pixels still count to 255.
        mean, std = (255 * torch.tensor(each).view(3, 1, 1, 1) for each in IMAGE_STATS["clip"])
        return {"video": (video - mean) / std, "tokens": self.tokenizer([text])[0]}


# --------------------------------------------------------------------------------------------------
# table
# --------------------------------------------------------------------------------------------------


def table_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=4_000_000, help="clips in the table (default: 4 million)")
    parser.add_argument("--videos", type=int, default=9000, help="videos that hold them (default: 9,000)")
    parser.add_argument("--workers", type=int, default=4, help="loader processes (default: 4)")
    # Of the process that this benchmark starts itself.
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)


def table(options: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first batch and memory of all processes, over all rows and over a few."""
    if options.measure:
        return feed_table(options.measure, options.workers)
    workers = str(options.workers)
    results = []
    with tempfile.TemporaryDirectory() as name:
        for rows in (BATCH * BATCHES, options.rows):
            path = write_world(Path(name), rows, options.videos)
            # In a fresh process, whose start is part of the time and whose memory holds nothing else.
            command = [sys.executable, sys.argv[0], "table", "--json", "--measure", str(path), "--workers", workers]
            results.append(json_of(command))
        size = path.stat().st_size
    few, full = results
    return {
        "rows": options.rows,
        "workers": options.workers,
        "csv_mb": size / 1e6,
        "first_batch_s": full["first_batch_s"],
        "first_batch_empty_s": few["first_batch_s"],
        "pss_mb": full["pss_mb"],
        "pss_empty_mb": few["pss_mb"],
        "pss_above_empty_mb": full["pss_mb"] - few["pss_mb"],
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
    original = folder / "original.mp4"
    if not original.exists():
        (folder / "videos").mkdir()
        grey = (np.full((48, 64, 3), i % 256, np.uint8) for i in range(10 * SECONDS))
        encode(original, grey, 64, 48, 10, g="10", preset="ultrafast")
        for name in names:
            # A link each: thousands of copies would take longer to write than to read.
            os.link(original, folder / "videos" / f"{name}.mp4")
    path = folder / f"hod-{rows}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "start_second", "end_second", "text", "dataset", "uid"])
        for i in range(rows):
            start = rng.random() * (SECONDS - 3)
            # As long as a HOD narration, and each another: equal texts could share their memory.
            text = f"#C C {rng.choice(VERBS)} {rng.choice(THINGS)} with the left hand while the right hand"
            text += f" {rng.choice(VERBS)} {rng.choice(THINGS)}, {i} times"
            writer.writerow([rng.choice(names), f"{start:.3f}", f"{start + 1.5:.3f}", text, "ego4d", f"u{i:08d}"])
    return path


def feed_table(path: Path, workers: int) -> dict[str, float]:
    """Feed a few batches from a table; seconds from the start of this process to the first, and the tree's PSS then."""
    source = SourceConfig(metadata=str(path), root=str(path.parent / "videos"), layout="whole")
    cfg = Config(
        model=ModelConfig(name="DEMO", num_frames=FRAMES),
        data=DataConfig(train={"bench": source}, workers=workers),
        train=TrainConfig(global_batch_size=BATCH),
    )
    dataset = build_dataset(cfg, SIZE)
    # As a run does, but without its model, which would take most of the memory.
    batches = iter(train_loader(dataset, build_plan(cfg, dataset), start_step=0, total_steps=BATCHES, workers=workers))
    next(batches)
    me = psutil.Process()
    first = time.time() - me.create_time()
    # Not to the end, where the workers leave.
    for _ in range(BATCHES - 2):
        next(batches)
    tree = [me, *me.children(recursive=True)]
    assert len(tree) == 1 + workers, "workers must be alive while memory is measured"
    # PSS divides a page among those that share it: the table, which forked workers share, counts once.
    pss = sum(process.memory_full_info().pss for process in tree) / 1e6
    return {"first_batch_s": first, "pss_mb": pss}


# --------------------------------------------------------------------------------------------------
# Videos
# --------------------------------------------------------------------------------------------------


def chunked(folder: Path, chunks: int) -> Path:
    """What the chunking makes of each file of ``make_videos``; the folder that holds it."""
    settings = ChunkSettings(seconds=CHUNK_SECONDS, short_side=CHUNKED_SHORT_SIDE)
    for name in ("one", "chunked/v"):
        (folder / name).mkdir(parents=True)
    for number in range(chunks):
        # Each file is a video to the chunking, which calls its only chunk the first.
        write_chunks(folder / "videos" / "v" / f"{number:04d}.mp4", folder / "one", settings)
        (folder / "one" / settings.name(0)).rename(folder / "chunked" / "v" / settings.name(number))
    return folder / "chunked"


def make_videos(folder: Path, chunks: int, clips: int, keyframe_every: int) -> list[Row]:
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
    rng, margin = np.random.default_rng(seed), 64
    wide, high = WIDTH + 2 * margin, HEIGHT + 2 * margin
    coarse = rng.integers(0, 256, (high // 16, wide // 16, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(coarse).resize((wide, high), Image.Resampling.BICUBIC)).astype(np.int16)
    scene = scene + rng.normal(0, 8, scene.shape).astype(np.int16)

    def views() -> Iterator[np.ndarray]:
        for number in range(FPS * CHUNK_SECONDS):
            x = margin + round(50 * np.sin(number / 17 + seed))
            y = margin + round(50 * np.cos(number / 23))
            # Every frame has its own noise: without it H.264 makes files that decode far faster than filmed ones.
            noise = rng.integers(-2, 3, (HEIGHT, WIDTH, 1), dtype=np.int16)
            yield (scene[y : y + HEIGHT, x : x + WIDTH] + noise).clip(0, 255).astype(np.uint8)

    path.parent.mkdir(parents=True, exist_ok=True)
    # With one thread the file is the same on every machine.
    encode(path, views(), WIDTH, HEIGHT, FPS, g=str(keyframe_every), threads="1")


def encode(path: Path, pictures: Iterable[np.ndarray], width: int, height: int, rate: int, **options: str) -> None:
    """Write uint8 [H, W, 3] pictures as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
