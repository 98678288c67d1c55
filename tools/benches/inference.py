"""Benchmarks of what runs on a trained model: ``eval``, ``probe``, ``hod`` and ``serve`` of ``tools/bench.py``.

``eval``: mAP and nDCG of a full benchmark. The baseline follows the definitions literally: for each metric and
direction one argsort of the whole float64 matrix, and one more of the relevancies for the best possible gain.
``--full`` runs the real EK100 csvs on random features, ``--demo`` measures clips per second on a demo world.

``probe``: the time of the probes of tools/probe.py on synthetic features. Each class is a cluster so wide that
neighbours are often of another class, as features of real clips are.

``hod``: what each stage of the HOD pipeline costs a clip, and the memory of a worker. The baseline is a loop that
reads, detects, tracks, narrates and checks one clip after the other and stores nothing.

``serve``: the answer of the page's server to a query that is encoded, on random features; and the processor time that
the pictures of windows that overlap by half take when they are decoded together and one by one.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
import tracemalloc
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from benches.data import ORIGINAL_KEYFRAME_EVERY, write_chunk
from benches.training import alternate, cpu_seconds, peak_bytes, timed

from egohod import cli
from egohod import config as training_config
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, EvalProtocol, collate_views
from egohod.data.decoders import choose_decoder
from egohod.data.formats.custom import windows
from egohod.data.loader import eval_loader
from egohod.data.videos import segment_indices
from egohod.distributed import setup
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.embed import embed_clips
from egohod.evaluation.features import open_index, write_video
from egohod.evaluation.metrics import graded_per_query
from egohod.evaluation.runner import PROTOCOLS, benchmark, execution_of, read_benchmark, tasks_of
from egohod.evaluation.tasks import knn_probe, linear_probe
from egohod.hod import config
from egohod.hod.pipeline import STAGES, Pipeline, Task, build
from egohod.hod.store import Shard
from egohod.model.config import IMAGE_STATS
from egohod.model.dual_encoder import create_model

CHUNK_SECONDS = 15.0
# Of the probe: noise as wide as the classes are apart, or one guess would do.
TEST_CLIPS, NOISE = 1000, 4.0

# --------------------------------------------------------------------------------------------------
# eval
# --------------------------------------------------------------------------------------------------


def eval_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    # As many as the retrieval test split of EPIC-KITCHENS-100 has.
    add("--videos", type=int, default=9668)
    add("--texts", type=int, default=3842)
    add("--rounds", type=int, default=3)
    add("--full", metavar="FOLDER", help="MIR and CLS of the real EK100 csvs there, random features")
    add("--demo", metavar="FOLDER", help="clips a second on this split of a demo world (--benchmarks)")
    add("--workers", type=int, default=2, help="decoding processes with --demo (default: 2)")
    add("--precision", default="fp32", help="evaluate.precision with --demo, of both (default: fp32)")


def evaluation(options: argparse.Namespace) -> dict[str, Any]:
    """Time of graded metrics against full-matrix sorting, or one of the two end-to-end variants."""
    if options.full:
        return _full_benchmark(options.full)
    if options.demo:
        return _throughput(options)
    rng = np.random.default_rng(0)
    sim = rng.standard_normal((options.videos, options.texts))
    # A tenth of the pairs is related at all, one in two hundred fully.
    rel = rng.choice([0, 0.25, 0.5, 1], size=sim.shape, p=[0.9, 0.05, 0.045, 0.005])

    def plain() -> list[tuple[float, float]]:
        results = []
        for s, r in ((sim, rel), (sim.T, rel.T)):
            order = np.argsort(-s, axis=1)
            ranks = np.arange(1, r.shape[1] + 1)
            ranked = np.take_along_axis(r, order, axis=1)
            full = ranked == 1
            precision = np.cumsum(ranked, axis=1) / ranks
            average_precision = (precision * full).sum(axis=1) / full.sum(axis=1)
            # nDCG sorts once more, as public code does; its gain is cut at the number of relevant items.
            counted = (ranks <= (r > 0).sum(axis=1, keepdims=True)) / np.log2(ranks + 1)
            gain, ideal = (np.take_along_axis(r, np.argsort(-by, axis=1), axis=1) * counted for by in (s, r))
            results.append((float(np.mean(average_precision)), float(np.mean(gain.sum(axis=1) / ideal.sum(axis=1)))))
        return results

    def ours(single: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [graded_per_query(s, r) for s, r in ((single, rel), (single.T, rel.T))]

    runs = alternate(options.rounds, {"ours": lambda: ours(sim.astype(np.float32)), "baseline": plain})
    scores = [tuple(float(np.nanmean(values)) for values in direction) for direction in runs["ours"][-1].result]
    single = sim.astype(np.float32)
    # Traced separately: tracing slows every allocation down.
    tracemalloc.start()
    ours(single)
    _, extra = tracemalloc.get_traced_memory()
    return {
        "videos": options.videos,
        "texts": options.texts,
        "ours_s": median(run.seconds for run in runs["ours"]),
        "baseline_s": median(run.seconds for run in runs["baseline"]),
        "ratios": [slow.seconds / fast.seconds for slow, fast in zip(runs["baseline"], runs["ours"], strict=True)],
        "extra_mb": extra / 1e6,
        # Fast but wrong would be no comparison.
        "largest_difference": float(np.abs(np.subtract(scores, runs["baseline"][-1].result)).max()),
    }


def eval_text(result: dict[str, Any]) -> str:
    if "lines" in result:
        return "\n".join(result["lines"])
    ratios = sorted(result["ratios"])
    return (
        f"mAP and nDCG, both directions, {result['videos']:,} x {result['texts']:,}: {result['ours_s']:.1f} s, "
        f"by plain sorting {result['baseline_s']:.1f} s\n"
        f"ratio {median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}); "
        f"{result['extra_mb']:.0f} MB extra; largest difference {result['largest_difference']:.1e}"
    )


def _full_benchmark(folder: str) -> dict[str, Any]:
    """MIR and CLS of the real EPIC-KITCHENS-100 csvs, end to end except for the videos: features are random."""
    generator = torch.Generator().manual_seed(0)

    def features(rows: int) -> torch.Tensor:
        # They must score at chance, which is printed beside each number.
        return F.normalize(torch.randn(rows, 512, generator=generator), dim=-1)

    lines, start = [], time.perf_counter()
    for kind in ("ek100_mir", "ek100_cls"):
        settings = BenchmarkConfig(kind=kind, metadata=folder, root=".")
        content = read_benchmark(kind, settings, PROTOCOLS["clean"].prompts)[1]
        video = features(len(content.clips))
        for table in tasks_of(content):
            text = features(len(table.texts))
            for name, score in table.measure(video, text).items():
                low, high = score.interval()
                lines.append(f"{kind}/{name:<20} {score.value:6.2f} [{low:.2f}, {high:.2f}]  chance {score.chance:.2f}")
            # Not printed, but part of every evaluation's time.
            table.details(video, text)
        lines += content.notes
    seconds, peak = time.perf_counter() - start, peak_bytes() / 1e9
    lines.append(f"{seconds:.0f} s, peak memory of the process {peak:.1f} GB")
    return {"seconds": seconds, "peak_gb": peak, "lines": lines}


def _throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Clips per second of an evaluation, against a loop that decodes, transforms and encodes one clip at a time.

    Threads must not spin while they wait, as in exps/eval.sh: set OMP_WAIT_POLICY=PASSIVE.
    """
    knobs = [f"data.workers={options.workers}", "data.decoder=auto", f"evaluate.precision={options.precision}"]
    cfg = training_config.load(training_config.PROJECT / "configs" / "demo.yml", knobs)
    # Random weights: what a clip costs does not depend on them.
    model = create_model(cfg.model, cfg.loss).eval()
    metadata, root = f"{options.demo}/benchmarks/ek100", f"{options.demo}/videos"
    settings = BenchmarkConfig(kind="ek100_cls", metadata=metadata, root=root)
    bench = benchmark(cfg, "ek100_cls", settings, execution_of(cfg, setup("cpu")))
    clips, precision, frames = bench.dataset.clips, bench.execution.precision, cfg.model.num_frames
    decoding: list[float] = []

    def ours() -> Any:
        before = cpu_seconds(resource.RUSAGE_CHILDREN)
        report = embed_clips(model, bench.dataset, bench.execution)[1]
        decoding.append(cpu_seconds(resource.RUSAGE_CHILDREN) - before)
        return report

    def loop() -> None:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            for video, start, end in zip(clips.videos, clips.start, clips.end, strict=True):
                _one_clip(model, f"{root}/{video}", start, end, frames, bench.dataset.size)

    runs = alternate(options.rounds, {"ours": ours, "loop": loop})
    ratios = sorted(slow.seconds / fast.seconds for slow, fast in zip(runs["loop"], runs["ours"], strict=True))
    speed = {name: len(clips) / median(run.seconds for run in each) for name, each in runs.items()}
    cpu_ms = {name: 1000 * median(run.cpu for run in each) / len(clips) for name, each in runs.items()}
    waiting = median(run.result.waiting / run.result.seconds for run in runs["ours"])
    decoded = median(part / run.cpu for part, run in zip(decoding, runs["ours"], strict=True))
    lines = [
        f"{len(clips)} clips of {frames} frames: {speed['ours']:.1f} clips/s, one at a time {speed['loop']:.1f}",
        f"ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); waits for clips {waiting:.0%}",
        f"CPU time a clip: {cpu_ms['ours']:.1f} ms, of which {decoded:.0%} in the decoding processes; "
        f"one at a time {cpu_ms['loop']:.1f} ms",
    ]
    return {
        "clips_per_second": speed["ours"],
        "baseline_clips_per_second": speed["loop"],
        "ratios": ratios,
        "lines": lines,
    }


@torch.no_grad()
def _one_clip(model: Any, folder: str, start: float, end: float, frames: int, size: int) -> torch.Tensor:
    # The usual way: decord to full frames, float32, resize, crop, normalise, encode; one clip after the other.
    choose_decoder("decord")  # which not every machine has
    import decord

    pictures = []
    # A clip may lie in two chunks; one that ends at a border does not touch the chunk behind it.
    for number in range(int(start // CHUNK_SECONDS), int(np.nextafter(end, start) // CHUNK_SECONDS) + 1):
        reader = decord.VideoReader(f"{folder}/{number:04d}.mp4", num_threads=1)
        fps = reader.get_avg_fps()
        wanted = segment_indices(round(start * fps), round(end * fps), frames) - round(number * CHUNK_SECONDS * fps)
        wanted = wanted[(wanted >= 0) & (wanted < len(reader))]
        if len(wanted):
            pictures.append(reader.get_batch(wanted.tolist()).asnumpy())
    clip = torch.from_numpy(np.concatenate(pictures)).permute(0, 3, 1, 2).float() / 255
    height, width = clip.shape[2:]
    scale = size / min(height, width)
    clip = F.interpolate(clip, (round(height * scale), round(width * scale)), mode="bicubic", antialias=True)
    left = (clip.shape[3] - size) // 2
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in IMAGE_STATS["clip"])
    clip = (clip[..., left : left + size] - mean) / std
    return model.encode_video(clip.transpose(0, 1)[None], normalize=True)


# --------------------------------------------------------------------------------------------------
# probe
# --------------------------------------------------------------------------------------------------


def probe_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--clips", type=int, default=10_000, help="training clips (default: 10,000)")
    add("--width", type=int, default=512, help="dimension of a feature (default: 512)")
    add("--classes", type=int, default=100, help="classes (default: 100)")
    add("--threads", type=int, default=2, help="threads to compute with (default: 2)")


def probe(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, CPU seconds and top-1 accuracy of both probes."""
    # Given, so that two machines with other numbers of cores can be compared.
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(options.clips + TEST_CLIPS) % options.classes
    centres = torch.randn(options.classes, options.width, generator=generator)
    features = centres[labels] + NOISE * torch.randn(len(labels), options.width, generator=generator)
    result = {name: vars(options)[name] for name in ("clips", "width", "classes", "threads")}
    train, test = slice(options.clips), slice(options.clips, None)
    for name, fit in (("linear", linear_probe), ("knn", knn_probe)):
        answer, seconds, cpu = timed(partial(fit, features[train], labels[train], features[test], options.classes))
        result |= {f"{name}_s": seconds, f"{name}_cpu_s": cpu}
        result[f"{name}_top1"] = 100 * float((answer.classes == labels[test]).float().mean())
    return result


def probe_text(result: dict[str, Any]) -> str:
    head = f"{result['clips']:,} clips, {result['width']} numbers each, {result['classes']} classes, "
    lines = [head + f"{result['threads']} threads; the time includes choosing weight decay and k"]
    for name in ("linear", "knn"):
        seconds, cpu, top1 = (result[f"{name}_{each}"] for each in ("s", "cpu_s", "top1"))
        lines.append(f"{name:<7}{seconds:6.1f} s ({cpu:.1f} s of CPU), top-1 {top1:.1f} % of {TEST_CLIPS:,} test clips")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# hod
# --------------------------------------------------------------------------------------------------


_HOD_STAGES = [stage.name for stage in STAGES]


def hod_options(parser: argparse.ArgumentParser) -> None:
    cli.add_config_file(parser, "configs/hod/demo.yml")
    parser.add_argument("--clips", type=int, default=60, help="of the first clips of the metadata (default: 60)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="knobs of the pipeline")


def hod(options: argparse.Namespace) -> dict[str, Any]:
    """Clips per second of the pipeline, the share of each stage, and peak memory."""
    spent: dict[str, list[float]] = {stage: [] for stage in (*_HOD_STAGES, "loop")}
    memory = _MemoryPeak()

    def pipeline_in(folder: str, *more: str) -> Pipeline:
        knobs = [*options.overrides, f"block={options.clips}", f"output={folder}/hod.csv", *more]
        return build(config.load(options.config_file, knobs))

    # Pipeline and loop alternate, so that a noisy machine disturbs both.
    for _ in range(options.rounds):
        # A folder of its own: a round must not read what an earlier one stored.
        with tempfile.TemporaryDirectory() as folder:
            pipeline = pipeline_in(folder)
            # A shard of one block is the first clips.
            shard = Shard(0, -(-len(pipeline.table) // options.clips))
            clips = pipeline.clips(shard)
            with memory:
                for stage in _HOD_STAGES:
                    spent[stage].append(timed(partial(pipeline.run, [stage], shard)).seconds)
            start = time.perf_counter()
            alone = pipeline_in(folder, "workers=0")
            # A generator of stages: it has to be read to its end.
            for index in clips:
                for _ in alone.try_clip(Task(index)):
                    pass
            spent["loop"].append(time.perf_counter() - start)
    ours = [sum(spent[stage][i] for stage in _HOD_STAGES) for i in range(options.rounds)]
    shares = {
        stage: median(part / all_ for part, all_ in zip(spent[stage], ours, strict=True)) for stage in _HOD_STAGES
    }
    return {
        "clips": len(clips),
        "workers": pipeline.cfg.workers,
        "clips_per_second": len(clips) / median(ours),
        "share": shares,
        "milliseconds": {stage: 1000 * median(spent[stage]) / len(clips) for stage in _HOD_STAGES},
        "ratio_to_a_loop": median(slow / fast for slow, fast in zip(spent["loop"], ours, strict=True)),
        "worker_mb": memory.worker,
        "main_mb": memory.main,
    }


def hod_text(result: dict[str, Any]) -> str:
    stages = (f"{stage} {result['milliseconds'][stage]:.1f} ms ({result['share'][stage]:.0%})" for stage in _HOD_STAGES)
    return (
        f"{result['clips']} clips, {result['workers']} workers: {result['clips_per_second']:.1f} clips/s, "
        f"{result['ratio_to_a_loop']:.2f} x a loop in one process\na clip: {', '.join(stages)}\n"
        f"peak memory: a worker {result['worker_mb']:.0f} MB of its own, the main process {result['main_mb']:.0f} MB"
    )


class _MemoryPeak:
    """Within, samples the memory (MB) of this process and of the largest worker, that of its children included.

    A detector such as MediaPipe is a child of its worker and counts as the worker's.
    """

    def __init__(self) -> None:
        self.main = self.worker = 0.0

    def __enter__(self) -> _MemoryPeak:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        this = psutil.Process()
        # In a thread of this process: a child of its own would be counted as a worker.
        while not self._over.wait(0.1):
            self.main = max(self.main, this.memory_info().rss / 1e6)
            for each in this.children():
                try:
                    processes = [each, *each.children(recursive=True)]
                    # USS: pages that a forked worker shares with its parent are counted once, as the parent's.
                    self.worker = max(self.worker, sum(one.memory_full_info().uss for one in processes) / 1e6)
                except psutil.NoSuchProcess:  # it ended between the listing and the look
                    continue


# --------------------------------------------------------------------------------------------------
# serve
# --------------------------------------------------------------------------------------------------


def serve_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--moments", type=int, default=100_000, help="moments of the index (default: 100000)")
    add("--videos", type=int, default=100, help="videos that they are of (default: 100)")
    add("--dim", type=int, default=512, help="length of a feature (default: 512)")
    add("--queries", type=int, default=50, help="queries (default: 50)")


def serve(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of an answer of egohod serve, without encoding the query; CPU seconds of overlapping windows."""
    # Here: the server is an extra, which the other benchmarks do without.
    from egohod.serve.app import Access, create_app
    from egohod.serve.index import Library, Marks

    rng, each = np.random.default_rng(0), options.moments // options.videos
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name, "index"), Path(name, "videos")
        root.mkdir()
        settings = {"weights": "", "protocol": {}, "root": str(root), "layout": "whole", "chunk_seconds": 15.0}
        videos = [f"day {number}" for number in range(options.videos)]
        open_index(folder, {"format": 1, **settings, "videos": dict.fromkeys(videos, "")})
        start = np.arange(each, dtype=float)
        for video in videos:
            features = F.normalize(torch.from_numpy(rng.standard_normal((each, options.dim), np.float32))).numpy()
            write_video(folder, video, features, start, start + 2, [""] * each, "")
        begin = time.perf_counter()
        library = Library(folder)
        opened = time.perf_counter() - begin
        app = create_app([library], Marks(folder / "marks.json"), Access("127.0.0.1"))
        answer = next(route.endpoint for route in app.routes if getattr(route, "path", "") == "/api/search")
        spent, used = list[float](), cpu_seconds()
        for row in rng.integers(options.moments // 2, size=options.queries).tolist():
            begin = time.perf_counter()
            answer(q="", side=0, row=row, top=24, video="", start=0.0, end=np.inf, overlapping=False)
            spent.append(1000 * (time.perf_counter() - begin))
        used = cpu_seconds() - used
        write_chunk(root / "original.mp4", 0, ORIGINAL_KEYFRAME_EVERY)
        clips, _ = windows(str(root), 2.0, 1.0)
        source = SourceConfig(root=str(root), layout="whole", min_clip_seconds=0.0)
        seconds = dict[str, float]()
        for way, batch_size in (("together", 16), ("one by one", 1)):
            data = ClipDataset([(clips, source)], protocol=EvalProtocol(frames=4), size=224)
            begin = cpu_seconds()
            for _ in eval_loader(data, range(len(data)), batch_size, 0, collate=collate_views):
                pass
            seconds[way] = cpu_seconds() - begin
    return {
        "moments": options.moments,
        "seconds to open": opened,
        "median ms of an answer": median(spent),
        "slowest ms": max(spent),
        "CPU ms of an answer": 1000 * used / options.queries,
        **{f"CPU s of {len(clips)} windows {way}": value for way, value in seconds.items()},
    }
