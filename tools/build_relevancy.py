"""Build the relevancy matrix of an EK100-like retrieval split from its csvs, or compare it with a published one.

    python tools/build_relevancy.py --clips EPIC_100_retrieval_test.csv \
        --sentences EPIC_100_retrieval_test_sentence.csv --output relevancy.npy
    python tools/build_relevancy.py ... --compare caption_relevancy_EPIC_100_retrieval_test.pkl

main_eval.py builds and caches the matrix by itself; this tool prints its statistics and compares a published pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _common import run_tool, tool_parser

from egohod import cli
from egohod.data.formats.ek100 import csv_relevancy, read_relevancy, save_matrix
from egohod.errors import UserError


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("--clips", type=Path, required=True, help="csv of the clips with verb_class, all_noun_classes")
    parser.add_argument("--sentences", type=Path, required=True, help="csv of the sentences: narration_id, narration")
    parser.add_argument("--output", type=Path, help="npy file to write")
    parser.add_argument("--compare", type=Path, help="a published matrix (pkl or npy)")
    args = parser.parse_args(arguments)
    # Rows are clips, columns sentences: the mean IoU of their verb and noun classes.
    matrix = csv_relevancy(args.clips, args.sentences)
    print(
        f"{matrix.shape[0]:,} clips x {matrix.shape[1]:,} sentences, {len(np.unique(matrix))} distinct values, "
        # In float64: all printed digits of a sum over 37 million cells have to be right.
        f"{100 * np.mean(matrix == 1):.3f} % exactly 1, sum {matrix.sum(dtype=np.float64):,.2f}"
    )
    # Before the comparison, which may fail: building the matrix takes the longest.
    if args.output:
        save_matrix(matrix, args.output)
    if args.compare:
        other = read_relevancy(args.compare)
        if other.shape != matrix.shape:
            raise UserError(f"{args.compare}: is {list(other.shape)}, not {list(matrix.shape)}")
        # Published pickles are float64 from another implementation: only differences above rounding matter.
        print(f"largest difference to {args.compare.name}: {np.abs(other - matrix).max():.1e}")
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
