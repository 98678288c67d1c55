"""Check a file for an EPIC-KITCHENS-100 challenge against the organisers' rules.

    python tools/check_submission.py ek100_mir.zip --metadata epic-kitchens-100-annotations
    python tools/check_submission.py test.json --metadata epic-kitchens-100-annotations --split validation

main_eval.py checks what evaluate.submission writes; this program checks any file, and runs nothing that is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _common import run_tool, tool_parser

from egohod import cli
from egohod.data.config import SourceConfig
from egohod.data.formats.base import look_for, read_csv
from egohod.errors import UserError
from egohod.evaluation.submission import check_submission, is_retrieval

# Of action recognition; retrieval has one split.
SPLITS = {"test": "EPIC_100_test_timestamps.csv", "validation": "EPIC_100_validation.csv"}


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("file", type=Path, help="the zip, or the test.json or test.pkl inside")
    add("--metadata", required=True, metavar="FOLDER", help="EPIC-KITCHENS-100's annotations")
    add("--split", choices=list(SPLITS), default="test", help="of action recognition (default: test)")
    args = parser.parse_args(arguments)
    if not args.file.is_file():
        raise UserError(f"{args.file}: no such file")
    names = [SPLITS[args.split]]
    if is_retrieval(args.file):
        names = ["EPIC_100_retrieval_test.csv", "EPIC_100_retrieval_test_sentence.csv"]
    ids = []
    for name in names:
        path = look_for(SourceConfig(metadata=args.metadata), name)
        if path is None:
            hint = "; a file of the validation split needs --split validation" if name == SPLITS["test"] else ""
            raise UserError(f"--metadata {args.metadata}: no {name} there{hint}")
        ids.append(read_csv(path, ("narration_id",))["narration_id"].tolist())
    print(check_submission(args.file, *ids))
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
