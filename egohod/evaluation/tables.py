"""What a benchmark is made of: rows that point at clips and texts, and a way to score their features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from egohod.evaluation.scores import Score, flat


class EvaluationTable(ABC):
    """One evaluation over the clips of a dataset: retrieval, classification, multiple choice or several labels."""

    texts: Sequence[str]
    """The texts to embed, in the order in which ``measure`` takes their features."""

    @abstractmethod
    def measure(self, video: Tensor, text: Tensor) -> dict[str, Score]:
        """Metrics from features of all clips and of ``texts`` [M, D], L2-normalised float32 on the CPU.

        ``video`` is [N, D], or [N, V, D] where the best of V views counts, see :func:`similarity`.
        """

    @abstractmethod
    def details(self, video: Tensor, text: Tensor) -> Mapping[str, Any]:
        """What the numbers are made of, clip by clip, in plain values that JSON can hold."""

    @abstractmethod
    def restricted(self, kept: NDArray[Any]) -> EvaluationTable:
        """The same over the clips where ``kept`` [N] is true, renumbered."""

    def evaluate(self, video: Tensor, text: Tensor) -> dict[str, float]:
        """Percent, except ranks, which count from 1; ``<metric>_chance`` is what guessing reaches."""
        return flat(self.measure(video, text))


def similarity(video: Tensor, text: Tensor) -> Tensor:
    """Similarity of clips [N, D] or their views [N, V, D] to texts [M, D]: [N, M], of views the largest."""
    if video.dim() == 2:
        return video @ text.T
    # View by view: all at once would hold V matrices.
    best = video[:, 0] @ text.T
    for view in range(1, video.shape[1]):
        torch.maximum(best, video[:, view] @ text.T, out=best)
    return best
