"""Measure the parts of a training run on this machine; ``--json`` prints one JSON object instead of text.

python tools/bench.py decode             # CPU time to read a clip, by decoder and kind of file
python tools/bench.py loader --json      # file to training-ready batch, against the usual way
python tools/bench.py loader --s3        # also from an S3 server on loopback, without a cache
python tools/bench.py step --json        # a training step: clips/s, share of the matmul peak, memory
python tools/bench.py step --model timm/vit_base_patch16_clip_224 --against CLIP_VITB16    # two models in turns
python tools/bench.py slowfast           # a co-training step of both paths, against one with all weights trained
python tools/bench.py accumulation       # cached features: how much a step waits for clips that come as fast
python tools/bench.py memory             # batch, frames, checkpointing, accumulation -> peak memory
python tools/bench.py sharding           # models beyond one GPU's memory: state and batch by how weights are split
python tools/bench.py table              # four million rows: start to first batch, memory of all processes
python tools/bench.py hod                # the HOD pipeline by stage, memory of a worker
python tools/bench.py hod_scale          # a million clips on 64 shards, merge, page: memory, time, resuming
python tools/bench.py eval               # mAP and nDCG of a full benchmark, against full-matrix sorting
python tools/bench.py probe              # linear and k-NN probes on cached features
python tools/bench.py serve              # an answer of egohod serve over 100,000 moments; overlapping windows
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from _common import run_tool, tool_parser
from benches import data, hod_scale, inference, training

from egohod import cli


def values(result: dict[str, Any]) -> str:
    """One line per value: the text of a benchmark that has no form of its own."""
    width = max(map(len, result))
    lines = ((name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in result.items())
    return "\n".join(f"{name:>{width}}  {value}" for name, value in lines)


class Benchmark(NamedTuple):
    """A benchmark: its options, the measurement that returns what ``--json`` prints, and that result as text."""

    add_options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], Any]
    text: Callable[[Any], str] = values


# What training and its data cost first, then what runs on a trained model.
BENCHMARKS = {
    "decode": Benchmark(data.decode_options, data.decode, data.decode_text),
    "loader": Benchmark(data.loader_options, data.loader, data.loader_text),
    "step": Benchmark(training.step_options, training.step),
    "slowfast": Benchmark(training.slowfast_options, training.slowfast),
    "accumulation": Benchmark(training.accumulation_options, training.accumulation),
    "memory": Benchmark(training.memory_options, training.memory, training.memory_text),
    "sharding": Benchmark(training.sharding_options, training.sharding, training.sharding_text),
    "table": Benchmark(data.table_options, data.table, data.table_text),
    "eval": Benchmark(inference.eval_options, inference.evaluation, inference.eval_text),
    "hod": Benchmark(inference.hod_options, inference.hod, inference.hod_text),
    "hod_scale": Benchmark(hod_scale.hod_scale_options, hod_scale.hod_scale, hod_scale.hod_scale_text),
    "probe": Benchmark(inference.probe_options, inference.probe, inference.probe_text),
    "serve": Benchmark(inference.serve_options, inference.serve),
}


def main(argv: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    commands = parser.add_subparsers(required=True, dest="benchmark", metavar="NAME")
    for name, each in BENCHMARKS.items():
        # From the docstring of the measurement: a second text would only get out of date.
        command = commands.add_parser(name, help=each.measure.__doc__)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        each.add_options(command)
    options = parser.parse_args(argv)
    benchmark = BENCHMARKS[options.benchmark]
    result = benchmark.measure(options)
    # On one line: benchmarks that start themselves again read the last line that a process printed.
    print(json.dumps(result) if options.json else benchmark.text(result))
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
