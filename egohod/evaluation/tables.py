"""What a benchmark is made of: rows that point at clips and texts, and a way to score their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

# A metric's chance level stands beside it under its name and this ending.
CHANCE = "_chance"
# What a temporal control took away stands beside the score under it.
DROP = "_drop"


class EvaluationTable(Protocol):
    """One evaluation over the clips of a dataset: retrieval, classification or multiple choice."""

    @property
    def texts(self) -> Sequence[str]:
        """The texts to embed, in the order in which ``evaluate`` takes their features."""

    def evaluate(self, video: Tensor, text: Tensor) -> dict[str, float]:
        """Metrics from features of all clips [N, D] and of ``texts`` [M, D], both L2-normalised float32 on the CPU.

        Percent, except ranks, which count from 1. ``<metric>_chance`` is what guessing reaches.
        """


def with_chance(metrics: Mapping[str, float], chance: Mapping[str, float]) -> dict[str, float]:
    """``metrics`` with the chance level of each one that has one right behind it."""
    both: dict[str, float] = {}
    for key, value in metrics.items():
        both[key] = value
        if key in chance:
            both[key + CHANCE] = chance[key]
    return both


def with_controls(plain: Mapping[str, float], controls: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """``plain`` metrics and ``<control>/<metric>`` of each temporal control, with the drop where more is better.

    Chance levels are the same under every control and are not repeated.
    """
    both = dict(plain)
    for control, metrics in controls.items():
        for key, value in metrics.items():
            if key.endswith(CHANCE):
                continue
            both[f"{control}/{key}"] = value
            if not is_rank(key):
                both[f"{control}/{key}{DROP}"] = plain[key] - value
    return both


def is_rank(metric: str) -> bool:
    """Whether a metric counts ranks from 1, where less is better; all others are percent."""
    return "rank" in metric
