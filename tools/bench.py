"""Measure the parts of a training run on this machine.

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

from collections.abc import Sequence

import bench_decode
import bench_eval
import bench_hod
import bench_loader
import bench_memory
import bench_probe
import bench_slowfast
import bench_step
import bench_table
from _common import run_tool, tool_parser

from egohod import cli


def main(argv: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    bench_decode.register(commands)
    bench_loader.register(commands)
    bench_step.register(commands)
    bench_slowfast.register(commands)
    bench_memory.register(commands)
    bench_table.register(commands)
    bench_eval.register(commands)
    bench_hod.register(commands)
    bench_probe.register(commands)
    options = parser.parse_args(argv)
    options.run(options)
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
