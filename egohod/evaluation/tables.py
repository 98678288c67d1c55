"""What a benchmark is made of: rows that point at clips and texts, and a way to score their features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from egohod.evaluation.scores import Score, flat


class EvaluationTable(ABC):
    """One evaluation over the clips of a dataset: retrieval, classification, multiple choice or several labels."""

    texts: Sequence[str]
    """The texts to embed, in the order in which ``measure`` takes their features."""

    @abstractmethod
    def measure(self, video: Tensor, text: Tensor) -> dict[str, Score]:
        """Metrics from features of all clips [N, D] and of ``texts`` [M, D], both L2-normalised float32 on the CPU."""

    @abstractmethod
    def details(self, video: Tensor, text: Tensor) -> Mapping[str, Any]:
        """What the numbers are made of, clip by clip, in plain values that JSON can hold."""

    @abstractmethod
    def restricted(self, kept: NDArray[Any]) -> EvaluationTable:
        """The same over the clips where ``kept`` [N] is true, renumbered."""

    def evaluate(self, video: Tensor, text: Tensor) -> dict[str, float]:
        """Percent, except ranks, which count from 1; ``<metric>_chance`` is what guessing reaches."""
        return flat(self.measure(video, text))
