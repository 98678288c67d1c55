"""Print what there is to evaluate on, with its size, chance level, licence and source: egohod benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from egohod.errors import DONE
from egohod.evaluation.cards import list_benchmarks


def main(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    for card in list_benchmarks():
        print(f"{card.name}: {card.task}\n    {card.size}; chance in percent: {card.chance}")
        print(f"    {card.licence}; {card.source}")
    return DONE
