"""Print what there is to evaluate on, with its size, chance level, licence and published numbers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from egohod.errors import DONE, UserError, nearest
from egohod.evaluation.cards import list_benchmarks


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="names to list, e.g. 'ek100*' (default: all)")
    patterns = [each for each in [parser.parse_args(arguments).pattern] if each]
    if not (cards := list_benchmarks(*patterns)):
        names = [card.name for card in list_benchmarks()]
        raise UserError(f"egohod benchmarks {patterns[0]}: no benchmark matches{nearest(patterns[0], names)}")
    for card in cards:
        print(f"{card.name}: {card.task}\n    {card.size}; chance in percent: {card.chance}")
        print(f"    {card.licence}; {card.source}")
        for each in card.published:
            print(f"    published: {each.model} {each.metric} {each.value:g} ({each.source})")
    return DONE
