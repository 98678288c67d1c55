"""What is shown of the results: a console table and a JSON file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from egohod.distributed import Distributed
from egohod.evaluation.tables import CHANCE

log = logging.getLogger(__name__)

RESULTS_FILE = "results.json"


def report(folder: str | Path, dist: Distributed, results: Mapping[str, float]) -> None:
    """Log the table of ``results`` and write them to ``folder/results.json``; only the first process does.

    Raises :class:`OSError` when the file cannot be written; an older file is then untouched.
    """
    if not dist.is_main:
        return
    log.info("results\n%s", table(results))
    path = Path(folder) / RESULTS_FILE
    # A number that is not one (a metric without a single query) has no spelling in JSON but null.
    clean = {key: value if value == value else None for key, value in results.items()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(clean, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def table(results: Mapping[str, float], title: str = "") -> str:
    """Results as a console table, the chance level beside each number."""
    shown = [(key, value) for key, value in results.items() if not key.endswith(CHANCE)]
    width = max([len(key) for key, _ in shown] + [len(title)])
    lines = [f"{title:<{width}}  {'result':>8}  {'chance':>8}"]
    for key, value in shown:
        unit = " " if "rank" in key else "%"
        chance = results.get(key + CHANCE)
        beside = "-" if chance is None else f"{chance:.1f}{unit}"
        lines.append(f"{key:<{width}}  {value:7.1f}{unit}  {beside:>8}")
    return "\n".join(line.rstrip() for line in lines)
