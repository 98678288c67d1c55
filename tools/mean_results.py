"""The mean of several evaluations, such as EGTEA's three splits.

    python tools/mean_results.py runs/egtea_split1 runs/egtea_split2 runs/egtea_split3

Prints a table of every metric that all of them have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _common import run_tool, tool_parser

from egohod import cli
from egohod.evaluation.results import mean_table


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="output folders of evaluations")
    # Read as results.json has them: a mean of rounded numbers could differ in the digit that papers print.
    print(mean_table(parser.parse_args(arguments).folders))
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
