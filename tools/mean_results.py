"""The mean of several evaluations, such as EGTEA's three splits.

    python tools/mean_results.py runs/egtea_split1 runs/egtea_split2 runs/egtea_split3

Prints a table of every metric that all of them have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _common import run_tool, tool_parser

from egohod import cli
from egohod.errors import UserError
from egohod.evaluation.features import read_json
from egohod.evaluation.metrics import CHANCE
from egohod.evaluation.results import FORMAT, RESULTS_FILE


def table(folders: Sequence[Path]) -> str:
    """Every common metric: of each folder, and the mean. Raises :class:`UserError` if there is none."""
    found = [read_json(each / RESULTS_FILE, FORMAT, "main_eval.py and main_finetune.py write it") for each in folders]
    metrics = [_numbers(one.get("metrics")) for one in found]
    common = [name for name in metrics[0] if all(name in one for one in metrics) and not name.endswith(CHANCE)]
    if not common:
        raise UserError(f"{', '.join(map(str, folders))}: have no metric in common")
    lines = [f"{'metric':<32}" + "".join(f"{each.name[-14:]:>16}" for each in folders) + f"{'mean':>10}"]
    for name in common:
        values = [one[name] for one in metrics]
        lines.append(f"{name:<32}" + "".join(f"{value:>16.2f}" for value in values) + f"{np.mean(values):>10.2f}")
    return "\n".join(lines)


def _numbers(metrics: object) -> dict[str, float]:
    """Metrics by name, but for those that have no value (of not a single query)."""
    named = metrics.items() if isinstance(metrics, dict) else ()
    return {name: value for name, value in named if isinstance(value, (int, float))}


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="output folders of evaluations")
    print(table(parser.parse_args(arguments).folders))
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
