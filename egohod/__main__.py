"""The command ``egohod``: a door to the main programs, which ``python main_eval.py`` and so on run directly.

egohod eval --checkpoint runs/demo --benchmark all ...     main_eval.py
egohod benchmarks [PATTERN]                                what there is to evaluate on; published numbers
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from egohod import cli
from egohod.config import PROJECT
from egohod.errors import DONE, UserError, nearest

_PROGRAMS = {"eval": "main_eval", "pretrain": "main_pretrain", "finetune": "main_finetune"}


def main(arguments: Sequence[str]) -> int:
    """Run the program that the first argument names. Raises :class:`UserError` if there is none."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(__doc__)
        return DONE
    if command == "benchmarks":
        from egohod.evaluation.cards import list_benchmarks

        if not (cards := list_benchmarks(*rest[:1])):
            names = [card.name for card in list_benchmarks()]
            raise UserError(f"egohod benchmarks {rest[0]}: no benchmark matches{nearest(rest[0], names)}")
        for card in cards:
            print(f"{card.name}: {card.task}\n    {card.size}; chance in percent: {card.chance}")
            print(f"    {card.licence}; {card.source}")
            for each in card.published:
                print(f"    published: {each.model} {each.metric} {each.value:g} ({each.source})")
        return DONE
    if command not in _PROGRAMS:
        raise UserError(f"egohod {command}: no such command{nearest(command, [*_PROGRAMS, 'benchmarks'])}")
    # The programs are files of the checkout, where their configurations are, too.
    if not (PROJECT / f"{_PROGRAMS[command]}.py").exists():
        raise UserError(f"{PROJECT} has no {_PROGRAMS[command]}.py; install egohod from a checkout: pip install -e .")
    sys.path.insert(0, str(PROJECT))
    return int(importlib.import_module(_PROGRAMS[command]).main(rest))


def run() -> None:
    """The entry point of the command; see :func:`egohod.cli.run` for exit codes."""
    sys.exit(cli.run(main))


if __name__ == "__main__":
    run()
