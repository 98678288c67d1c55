"""Measure the parts of a training run on this machine.

python tools/bench.py loader --json      # file to training-ready batch, against the usual way
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import bench_loader


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    bench_loader.register(commands)
    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    main()
