"""The ``probe`` part of ``tools/bench.py``: how long the probes of tools/probe.py take, on made-up features.

Each class is a cluster so wide that neighbours are often of another class, as features of real clips are.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from egohod.evaluation.tasks import knn_probe, linear_probe

TEST_CLIPS, NOISE = 1000, 4.0


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("probe", help="linear and k-NN probes on cached features: seconds, CPU seconds")
    parser.add_argument("--clips", type=int, default=10_000, help="training clips (default: 10,000)")
    parser.add_argument("--width", type=int, default=512, help="numbers of a feature (default: 512)")
    parser.add_argument("--classes", type=int, default=100, help="classes (default: 100)")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(options.clips + TEST_CLIPS) % options.classes
    centres = torch.randn(options.classes, options.width, generator=generator)
    features = centres[labels] + NOISE * torch.randn(len(labels), options.width, generator=generator)
    result = {name: vars(options)[name] for name in ("clips", "width", "classes", "threads")}
    known, asked = slice(options.clips), slice(options.clips, None)
    for name, probe in (("linear", linear_probe), ("knn", knn_probe)):
        wall, cpu = time.monotonic(), time.process_time()
        found = probe(features[known], labels[known], features[asked], options.classes)
        result |= {f"{name}_s": time.monotonic() - wall, f"{name}_cpu_s": time.process_time() - cpu}
        result[f"{name}_top1"] = 100 * float((found.classes == labels[asked]).float().mean())
    print(json.dumps(result) if options.json else text(result))


def text(result: dict[str, float]) -> str:
    head = f"{result['clips']:,} clips, {result['width']} numbers each, {result['classes']} classes, "
    lines = [head + f"{result['threads']} threads; the time includes choosing weight decay and k"]
    for name in ("linear", "knn"):
        seconds, cpu, top1 = (result[f"{name}_{each}"] for each in ("s", "cpu_s", "top1"))
        lines.append(f"{name:<7}{seconds:6.1f} s ({cpu:.1f} s of CPU), top-1 {top1:.1f} % of {TEST_CLIPS:,} test clips")
    return "\n".join(lines)
