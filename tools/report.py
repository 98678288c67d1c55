"""Make report.html of an evaluation's output folder again, e.g. after the videos were put where they belong.

    python tools/report.py results/demo_ek100_cls

main_eval.py writes the page by itself. It is one file, opens from disk, and asks the network for nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from egohod import cli
from egohod.evaluation.html_report import write_report


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what --output of main_eval.py was")
    parser.add_argument("--decoder", default="auto", help="pyav, torchcodec, decord or auto (default)")
    args = parser.parse_args(arguments)
    write_report(args.folder, decoder=args.decoder)
    return cli.DONE


if __name__ == "__main__":
    sys.exit(cli.run(main))
