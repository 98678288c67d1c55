"""Captions of a table that are false of their clips: opposites, or replaced verbs; counts them and shows a sample.

    python tools/opposites.py EPIC_100_train.csv --column narration --sample 50 --seed 0
    python tools/opposites.py clips.csv --column text --output clips_with_opposites.csv
    python tools/opposites.py clips.csv --replacements 10 --output clips_with_replacements.csv
    python tools/opposites.py clips.csv --replacements 10 --output clips_with_replacements.csv \\
        --narrator configs/hod/default.yml narrator.kind=llm narrator.endpoint=http://127.0.0.1:8000/v1

By the rules of egohod/data/opposites.py and replacements.py, or with --narrator by verbs of the language model that the
HOD pipeline uses. With --output, the table is written with a column "opposite" or "replacements", to be corrected and
named by data.train.NAME.opposite_column or replacement_column. A list of narrations counts as one caption, which has an
opposite if one of them has, and no replacements.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from _common import run_tool

from egohod.data.formats.base import read_csv
from egohod.data.opposites import opposite
from egohod.data.replacements import Verbs, false_verbs
from egohod.data.table import narrations_in
from egohod.errors import UserError, nearest
from egohod.hod.config import NarratorConfig
from egohod.hod.config import load as load_hod
from egohod.runtime import atomic_write

log = logging.getLogger(__name__)


def opposite_cell(cell: str) -> str:
    """The opposite of a caption, or a list literal for a list of them; empty where there is none."""
    texts = narrations_in(cell)
    reverse = [opposite(text) or text for text in texts]
    # In a list, a narration without an opposite is left as it is, which a training run counts as none.
    column = reverse[0] if len(texts) == 1 else str(reverse)
    return "" if reverse == list(texts) else column


def replacements_by_model(captions: Sequence[str], count: int, settings: NarratorConfig) -> dict[str, list[str]]:
    """Up to ``count`` captions with verbs that a language model writes; those without a usable answer have none.

    Raises :class:`UserError` if the endpoint cannot be used.
    """
    from egohod.hod.facts import ClipFacts
    from egohod.hod.narrators import PROMPTS, Request
    from egohod.hod.narrators.llm import LanguageModelNarrator

    # The prompt asks for verbs alone, whatever captions the pipeline has.
    narrator = LanguageModelNarrator(replace(settings, captions=["fine"]), PROMPTS / "verbs.jinja")
    # The prompt has no place for facts.
    nothing = ClipFacts("", 0.0, 0.0, np.zeros(0), {}, None, None, None)
    results, problems = dict[str, list[str]](), list[str]()
    for number, narration in narrator.narrate([Request(caption, nothing) for caption in captions]):
        # Verbs alone are the model's: the rest of the caption cannot change.
        results[captions[number]] = false_verbs(captions[number], narration.text or "", count)
        problems += [narration.problem] if narration.problem else []
    if problems:
        log.warning("%d of %d captions have no answer; the first: %s", len(problems), len(captions), problems[0])
    return results


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="csv with a caption in every row")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of --narrator")
    parser.add_argument("--column", default="text", help="the captions' column (default: %(default)s)")
    parser.add_argument("--replacements", type=int, metavar="N", help="captions with other verbs, up to N for each")
    parser.add_argument("--narrator", metavar="FILE", help="a configuration of the HOD pipeline with narrator.kind=llm")
    parser.add_argument("--sample", type=int, default=10, help="pairs to show (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the sample and the verbs (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the table with a further column")
    options = parser.parse_intermixed_args(argv)
    if options.narrator is None and options.overrides:
        raise UserError(f"{options.overrides[0]}: settings are those of --narrator, which is not given")
    if options.narrator is not None and not options.replacements:
        raise UserError("--narrator needs --replacements; opposites by a model are written by tools/generate_hod.py")
    rows = read_csv(options.table, ())
    if options.column not in rows.columns:
        raise UserError(f"{options.table}: no column '{options.column}'{nearest(options.column, list(rows.columns))}")
    captions = [str(text) for text in rows[options.column]]
    if options.replacements:
        name, what = "replacements", "replacements"
        # Narrations repeat: of equal ones one is enough.
        texts = [text for cell in captions for text in narrations_in(cell)]
        distinct = sorted(set(texts))
        if options.narrator is None:
            verbs, rng = Verbs(texts), np.random.default_rng(options.seed)
            written = {text: verbs.replace(text, options.replacements, rng) for text in distinct}
        else:
            settings = load_hod(options.narrator, options.overrides).narrator
            if settings.kind != "llm":
                raise UserError(f"{options.narrator}: narrator.kind is '{settings.kind}', but --narrator needs llm")
            written = replacements_by_model(distinct, options.replacements, settings)
        cells = [str(written[cell]) if written.get(cell) else "" for cell in captions]
    else:
        name, what, cells = "opposite", "an opposite", [opposite_cell(cell) for cell in captions]
    numbers = [i for i, text in enumerate(cells) if text]
    share = 100 * len(numbers) / max(1, len(captions))
    log.info("%s: %d of %d captions (%.1f %%) have %s", options.table, len(numbers), len(captions), share, what)
    # With the row, so that a label of a pair can be looked up again.
    chosen = np.random.default_rng(options.seed).permutation(numbers)[: options.sample].tolist()
    for i in sorted(chosen):
        print(f"{i + 1}\t{captions[i]}\n\t{cells[i]}")
    if options.output:
        with atomic_write(options.output) as part:
            rows.assign(**{name: cells}).to_csv(part, index=False)
    return 0


if __name__ == "__main__":
    run_tool(main)
