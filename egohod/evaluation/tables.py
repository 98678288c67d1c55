"""What a benchmark is made of: rows that point at clips and texts, and a way to score their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

# A metric's chance level stands beside it under its name and this ending.
CHANCE = "_chance"


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
