"""The ``eval`` part of ``tools/bench.py``: the metrics of a full benchmark.

The baseline is what the definitions say, written down plainly: for each metric and direction one argsort of the whole
float64 matrix, and one more of the relevancies for the best possible gain.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc

import numpy as np

from egohod.evaluation.metrics import graded_scores


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("eval", help="mAP and nDCG of a full benchmark, against full-matrix sorting")
    parser.add_argument("--videos", type=int, default=9668)
    parser.add_argument("--texts", type=int, default=3842)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Alternate both, so that a noisy machine disturbs both."""
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
    tracemalloc.start()
    graded_scores(sim, rel)
    _, extra = tracemalloc.get_traced_memory()
    result = {
        "ours_s": float(np.median(times["ours"])),
        "baseline_s": float(np.median(times["baseline"])),
        "ratios": [slow / fast for slow, fast in zip(times["baseline"], times["ours"], strict=True)],
        "extra_mb": extra / 1e6,
        "largest_difference": float(np.abs(np.subtract(ours, plain)).max()),
    }
    print(json.dumps(result) if options.json else text(result, options))


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
