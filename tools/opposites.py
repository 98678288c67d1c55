"""Count the captions of a table that have an opposite by rule (egohod/data/opposites.py), and show a random sample.

    python tools/opposites.py EPIC_100_train.csv --column narration --sample 50 --seed 0
    python tools/opposites.py clips.csv --column text --output clips_with_opposites.csv

With --output, the table is written with a column "opposite", to be corrected and named by
data.train.NAME.opposite_column. A list of narrations counts as one caption, which has an opposite if one of them has.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from egohod import cli
from egohod.data.formats.base import read_csv
from egohod.data.opposites import opposite
from egohod.data.table import narrations_in
from egohod.errors import UserError, nearest
from egohod.runtime import atomic_write

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="csv with a caption in every row")
    parser.add_argument("--column", default="text", help="the captions' column (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=10, help="pairs to show (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the sample (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the table with a column 'opposite'")
    options = parser.parse_args(argv)
    rows = read_csv(options.table, ())
    if options.column not in rows.columns:
        raise UserError(f"{options.table}: no column '{options.column}'{nearest(options.column, list(rows.columns))}")
    captions = [str(text) for text in rows[options.column]]
    opposites = list[str]()
    for cell in captions:
        texts = narrations_in(cell)
        reverse = [opposite(text) or text for text in texts]
        # In a list, a narration without an opposite is left as it is, which a training run counts as none.
        column = reverse[0] if len(texts) == 1 else str(reverse)
        opposites.append("" if reverse == list(texts) else column)
    numbers = [i for i, text in enumerate(opposites) if text]
    share = 100 * len(numbers) / max(1, len(captions))
    log.info("%s: %d of %d captions (%.1f %%) have an opposite", options.table, len(numbers), len(captions), share)
    # With the row, so that a label of a pair can be looked up again.
    chosen = np.random.default_rng(options.seed).permutation(numbers)[: options.sample].tolist()
    for i in sorted(chosen):
        print(f"{i + 1}\t{captions[i]}\n\t{opposites[i]}")
    if options.output:
        with atomic_write(options.output) as part:
            rows.assign(opposite=opposites).to_csv(part, index=False)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
