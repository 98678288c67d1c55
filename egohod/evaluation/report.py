"""What is shown of the results: a console table and a JSON file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from egohod.distributed import Distributed
from egohod.evaluation.tables import CHANCE, DROP, is_rank
from egohod.evaluation.temporal import CONTROLS

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
    """Results as a console table; beside each number its chance level and the scores under the temporal controls."""
    controls = [name for name in CONTROLS if any(_control(key) == name for key in results)]
    shown = [(key, value) for key, value in results.items() if not key.endswith((CHANCE, DROP)) and not _control(key)]
    width = max([len(key) for key, _ in shown] + [len(title)])
    lines = ["  ".join([f"{title:<{width}}", *(f"{name:>8}" for name in ("result", "chance", *controls))])]
    for key, value in shown:
        group, slash, metric = key.rpartition("/")
        beside = [results.get(key + CHANCE), *(results.get(f"{group}{slash}{name}/{metric}") for name in controls)]
        cells = [value, *beside]
        unit = " " if is_rank(key) else "%"
        lines.append(
            "  ".join([f"{key:<{width}}", *(f"{'-' if cell is None else f'{cell:.1f}{unit}':>8}" for cell in cells)])
        )
    return "\n".join(line.rstrip() for line in lines)


def _control(key: str) -> str | None:
    """The temporal control that a result was measured under."""
    return next((part for part in key.split("/")[:-1] if part in CONTROLS), None)
