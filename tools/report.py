"""Write report.html of an evaluation's output folder again, e.g. after its videos were moved back.

    python tools/report.py results/demo_ek100_cls

main_eval.py writes the page by itself. It is one file, opens from disk, and needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _common import run_tool, tool_parser

from egohod import cli
from egohod.evaluation.report import write_report


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("folder", type=Path, help="the --output folder of main_eval.py")
    parser.add_argument("--decoder", default="auto", help="pyav, torchcodec, decord or auto (default)")
    args = parser.parse_args(arguments)
    # Thumbnails are decoded again from the videos; all else is in the folder.
    write_report(args.folder, decoder=args.decoder)
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
