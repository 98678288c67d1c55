"""Measure the parts of a training run on this machine; ``--json`` prints one JSON object instead of text.

python tools/bench.py decode             # CPU time to read a clip, by decoder and kind of file
python tools/bench.py loader --json      # file to training-ready batch, against the usual way
python tools/bench.py loader --s3        # also from an S3 server on loopback, without a cache
python tools/bench.py step --json        # a training step: clips/s, share of the matmul peak, memory
python tools/bench.py slowfast           # a co-training step of both paths, against one with all weights trained
python tools/bench.py memory             # batch, frames, checkpointing, accumulation -> peak memory
python tools/bench.py table              # four million rows: start to first batch, memory of all processes
python tools/bench.py hod                # the HOD pipeline by stage, memory of a worker
python tools/bench.py eval               # mAP and nDCG of a full benchmark, against full-matrix sorting
python tools/bench.py probe              # linear and k-NN probes on cached features
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from _common import run_tool, tool_parser
from benches import data, inference, training

from egohod import cli


def values(result: dict[str, Any]) -> str:
    """One line per value: the text of a benchmark that has no form of its own."""
    width = max(map(len, result))
    lines = ((name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in result.items())
    return "\n".join(f"{name:>{width}}  {value}" for name, value in lines)


class Benchmark(NamedTuple):
    """A benchmark: its options, the measurement that returns what ``--json`` prints, and that result as text."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], Any]
    text: Callable[[Any], str] = values


BENCHMARKS = {
    "decode": Benchmark(
        "CPU time to read a clip, by decoder and kind of file", data.decode_options, data.decode, data.decode_text
    ),
    "loader": Benchmark(
        "clips/s from file to training-ready batch, ours and the usual way",
        data.loader_options,
        data.loader,
        data.loader_text,
    ),
    "step": Benchmark("a training step: speed, share of the matmul peak, memory", training.step_options, training.step),
    "slowfast": Benchmark(
        "a co-training step against one with all weights trained", training.slowfast_options, training.slowfast
    ),
    "memory": Benchmark(
        "batch, frames, checkpointing, accumulation -> peak memory",
        training.memory_options,
        training.memory,
        training.memory_text,
    ),
    "table": Benchmark(
        "millions of rows: start to first batch, memory of all processes",
        data.table_options,
        data.table,
        data.table_text,
    ),
    "eval": Benchmark(
        "mAP and nDCG of a full benchmark, against full-matrix sorting",
        inference.eval_options,
        inference.evaluation,
        inference.eval_text,
    ),
    "hod": Benchmark(
        "clips a second of the HOD pipeline by stage, and memory of a worker",
        inference.hod_options,
        inference.hod,
        inference.hod_text,
    ),
    "probe": Benchmark(
        "linear and k-NN probes on cached features: seconds, CPU seconds",
        inference.probe_options,
        inference.probe,
        inference.probe_text,
    ),
}


def main(argv: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    commands = parser.add_subparsers(required=True, dest="benchmark", metavar="NAME")
    for name, each in BENCHMARKS.items():
        command = commands.add_parser(name, help=each.help)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        each.add_options(command)
    options = parser.parse_args(argv)
    benchmark = BENCHMARKS[options.benchmark]
    result = benchmark.measure(options)
    print(json.dumps(result) if options.json else benchmark.text(result))
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
