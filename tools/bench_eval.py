"""The ``eval`` part of ``tools/bench.py``: the metrics of a full benchmark, and clips a second.

The baseline is what the definitions say, written down plainly: for each metric and direction one argsort of the whole
float64 matrix, and one more of the relevancies for the best possible gain.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import tracemalloc
from typing import Any

import numpy as np
import torch
from bench_step import peak_bytes

from egohod import config
from egohod.data.decoders import choose_decoder
from egohod.data.frames import segment_indices
from egohod.distributed import setup
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.embed import embed_clips
from egohod.evaluation.metrics import graded_scores
from egohod.evaluation.runner import PROTOCOLS, benchmark, execution_of, read_benchmark, tasks_of
from egohod.model.config import IMAGE_STATS
from egohod.model.egovideo import create_model

CHUNK = 15.0


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("eval", help="mAP and nDCG of a full benchmark, against full-matrix sorting")
    parser.add_argument("--videos", type=int, default=9668)
    parser.add_argument("--texts", type=int, default=3842)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", metavar="FOLDER", help="MIR and CLS of the real EK100 csvs there, random features")
    parser.add_argument("--demo", metavar="FOLDER", help="clips a second on this split of a demo world (--benchmarks)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes with --demo (default: 2)")
    parser.add_argument("--precision", default="fp32", help="evaluate.precision with --demo, of both (default: fp32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Alternate both, so that a noisy machine disturbs both."""
    if options.full:
        return full_size(options)
    if options.demo:
        return throughput(options)
    rng = np.random.default_rng(0)
    sim = rng.standard_normal((options.videos, options.texts))
    rel = rng.choice([0, 0.25, 0.5, 1], size=sim.shape, p=[0.9, 0.05, 0.045, 0.005])
    times: dict[str, list[float]] = {"ours": [], "baseline": []}
    for _ in range(options.rounds):
        start = time.perf_counter()
        scores = graded_scores(sim.astype(np.float32), rel)
        times["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        plain = [(mean_average_precision(s, r), ndcg(s, r)) for s, r in ((sim, rel), (sim.T, rel.T))]
        times["baseline"].append(time.perf_counter() - start)
    ours = [(scores.mean_average_precision.v2t, scores.ndcg.v2t), (scores.mean_average_precision.t2v, scores.ndcg.t2v)]
    single = sim.astype(np.float32)
    tracemalloc.start()
    graded_scores(single, rel)
    _, extra = tracemalloc.get_traced_memory()
    result = {
        "ours_s": float(np.median(times["ours"])),
        "baseline_s": float(np.median(times["baseline"])),
        "ratios": [slow / fast for slow, fast in zip(times["baseline"], times["ours"], strict=True)],
        "extra_mb": extra / 1e6,
        "largest_difference": float(np.abs(np.subtract(ours, plain)).max()),
    }
    print(json.dumps(result) if options.json else text(result, options))
    return None


def text(result: dict[str, float], options: argparse.Namespace) -> str:
    ratios = sorted(result["ratios"])  # type: ignore[call-overload]
    return (
        f"mAP and nDCG, both directions, {options.videos:,} x {options.texts:,}: {result['ours_s']:.1f} s, plainly "
        f"{result['baseline_s']:.1f} s\nratio {np.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}); "
        f"{result['extra_mb']:.0f} MB extra; largest difference {result['largest_difference']:.1e}"
    )


def mean_average_precision(sim: np.ndarray, rel: np.ndarray) -> float:
    ranked = np.take_along_axis(rel, np.argsort(-sim, axis=1), axis=1)
    precision = np.cumsum(ranked, axis=1) / np.arange(1, rel.shape[1] + 1)
    full = ranked == 1
    return float(np.mean((precision * full).sum(axis=1) / full.sum(axis=1)))


def ndcg(sim: np.ndarray, rel: np.ndarray) -> float:
    rank = np.arange(1, rel.shape[1] + 1)
    counted = (rank <= (rel > 0).sum(axis=1, keepdims=True)) / np.log2(rank + 1)
    gain, ideal = (np.take_along_axis(rel, np.argsort(-by, axis=1), axis=1) * counted for by in (sim, rel))
    return float(np.mean(gain.sum(axis=1) / ideal.sum(axis=1)))


def full_size(options: argparse.Namespace) -> None:
    """MIR and CLS of the real EPIC-KITCHENS-100 csvs, end to end but for the videos: features are random."""
    protocol, start = PROTOCOLS["clean"], time.perf_counter()
    generator = torch.Generator().manual_seed(0)

    def features(rows: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, 512, generator=generator), dim=-1)

    for kind in ("ek100_mir", "ek100_cls"):
        config = BenchmarkConfig(kind=kind, metadata=options.full, root=".")
        data = read_benchmark(kind, config, protocol.prompts)[1]
        video = features(len(data.clips))
        for table in tasks_of(data):
            text = features(len(table.texts))
            for name, score in table.measure(video, text).items():
                low, high = score.interval()
                print(f"{kind}/{name:<20} {score.value:6.2f} [{low:.2f}, {high:.2f}]  chance {score.chance:.2f}")
            table.details(video, text)
        print(*data.notes, sep="\n")
    print(f"{time.perf_counter() - start:.0f} s, peak memory of the process {peak_bytes() / 1e9:.1f} GB")


def throughput(options: argparse.Namespace) -> None:
    """Clips a second of an evaluation, against a loop that decodes, transforms and encodes one clip at a time.

    Threads must not spin while they wait, as in exps/eval.sh: set OMP_WAIT_POLICY=PASSIVE.
    """
    knobs = [f"data.workers={options.workers}", "data.decoder=auto", f"evaluate.precision={options.precision}"]
    cfg = config.load(config.PROJECT / "configs" / "demo.yml", knobs)
    dist = setup("cpu")
    model = create_model(cfg.model, cfg.loss).eval()
    settings = BenchmarkConfig(
        kind="ek100_cls", metadata=f"{options.demo}/benchmarks/ek100", root=f"{options.demo}/videos"
    )
    bench = benchmark(cfg, "ek100_cls", settings, execution_of(cfg, dist))
    size, clips = bench.dataset.size, bench.dataset.clips
    times: dict[str, list[float]] = {"ours": [], "loop": []}
    work: dict[str, list[float]] = {"ours": [], "loop": []}
    waiting, decoding = [], []
    precision = bench.execution.precision
    for _ in range(options.rounds):
        start, before, children = time.perf_counter(), cpu_seconds(), cpu_seconds(resource.RUSAGE_CHILDREN)
        _, found = embed_clips(
            model, bench.dataset, batch_size=cfg.evaluate.batch_size, workers=options.workers, dist=dist,
            precision=precision,
        )  # fmt: skip
        times["ours"].append(time.perf_counter() - start)
        work["ours"].append(cpu_seconds() - before)
        decoding.append((cpu_seconds(resource.RUSAGE_CHILDREN) - children) / work["ours"][-1])
        waiting.append(found.waiting / found.seconds)
        start, before = time.perf_counter(), cpu_seconds()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            for i in range(len(clips)):
                one_clip(model, options.demo, clips.videos[i], clips.start[i], clips.end[i], cfg.model.num_frames, size)
        times["loop"].append(time.perf_counter() - start)
        work["loop"].append(cpu_seconds() - before)
    ratios = sorted(slow / fast for slow, fast in zip(times["loop"], times["ours"], strict=True))
    ours, loop = (len(clips) / float(np.median(times[name])) for name in ("ours", "loop"))
    print(f"{len(clips)} clips of {cfg.model.num_frames} frames: {ours:.1f} clips/s, one at a time {loop:.1f} clips/s")
    print(
        f"ratio {np.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); waits for clips {np.median(waiting):.0%}"
    )
    spent = [1000 * float(np.median(work[name])) / len(clips) for name in ("ours", "loop")]
    print(
        f"CPU time a clip: {spent[0]:.1f} ms, of which {np.median(decoding):.0%} in the decoding processes; "
        f"one at a time {spent[1]:.1f} ms"
    )


def cpu_seconds(*processes: int) -> float:
    """Of this process and of the workers that have ended, or of one of both."""
    return sum(
        sum(resource.getrusage(who)[:2]) for who in processes or (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


@torch.no_grad()
def one_clip(model: Any, root: str, video: str, start: float, end: float, frames: int, size: int) -> torch.Tensor:
    """The usual way: decord to full frames, float32, resize, crop, normalise, encode."""
    choose_decoder("decord")  # which not every machine has
    import decord

    pictures = []
    for number in range(int(start // CHUNK), int(np.nextafter(end, start) // CHUNK) + 1):
        reader = decord.VideoReader(f"{root}/videos/{video}/{number:04d}.mp4", num_threads=1)
        fps = reader.get_avg_fps()
        wanted = segment_indices(round(start * fps), round(end * fps), frames) - round(number * CHUNK * fps)
        wanted = wanted[(wanted >= 0) & (wanted < len(reader))]
        if len(wanted):
            pictures.append(reader.get_batch(wanted.tolist()).asnumpy())
    clip = torch.from_numpy(np.concatenate(pictures)).permute(3, 0, 1, 2).float() / 255
    height, width = clip.shape[2:]
    scale = size / min(height, width)
    clip = torch.nn.functional.interpolate(
        clip.transpose(0, 1), (round(height * scale), round(width * scale)), mode="bicubic", antialias=True
    )
    left = (clip.shape[3] - size) // 2
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in IMAGE_STATS["clip"])
    return model.encode_video(((clip[..., left : left + size] - mean) / std).transpose(0, 1)[None], normalize=True)
