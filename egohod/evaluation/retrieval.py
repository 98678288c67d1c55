"""Retrieval between clips and texts, graded (EPIC-KITCHENS MIR) and by rank of the clip's own text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from egohod.evaluation.metrics import (
    GradedScores,
    IntArray,
    expected_graded_scores,
    expected_recall,
    first_relevant_rank,
    graded_scores,
    median_rank,
    recall_at_k,
)
from egohod.evaluation.tables import with_chance

log = logging.getLogger(__name__)

RECALL_AT = (1, 5)


@dataclass(frozen=True)
class RetrievalTable:
    """Every clip searches all distinct texts, and every text all clips.

    ``texts`` M distinct texts; ``text_of_clip`` [N] the own text of each clip; ``relevancy`` [N, M] in 0..1, where 1
    is a full match (what counts as a hit in mAP).
    """

    texts: Sequence[str]
    text_of_clip: IntArray
    relevancy: NDArray[Any]

    def evaluate(self, video: Tensor, text: Tensor) -> dict[str, float]:
        """mAP and nDCG by relevancy; recall@k (percent) and median rank (from 1) of a clip's own text and back."""
        sim = (video @ text.T).numpy()
        own = self.text_of_clip[:, None] == np.arange(len(self.texts))
        graded = graded_scores(sim, self.relevancy)
        _warn_left_out(graded)
        metrics, chance = _percent(graded), _percent(expected_graded_scores(self.relevancy))
        for direction, scores, relevant in (("v2t", sim, own), ("t2v", sim.T, own.T)):
            ranks = first_relevant_rank(scores, relevant)
            by_chance = expected_recall(relevant.sum(axis=1), relevant.shape[1])
            for k in RECALL_AT:
                metrics[f"recall_{k}_{direction}"] = 100 * recall_at_k(ranks, k)
                chance[f"recall_{k}_{direction}"] = 100 * float(by_chance[min(k, len(by_chance)) - 1])
            metrics[f"median_rank_{direction}"] = median_rank(ranks)
            chance[f"median_rank_{direction}"] = float(np.searchsorted(by_chance, 0.5) + 1)
        return with_chance(metrics, chance)


def _percent(scores: GradedScores) -> dict[str, float]:
    named = (("map", scores.mean_average_precision), ("ndcg", scores.ndcg))
    return {
        name + ending: 100 * value
        for name, metric in named
        for ending, value in (("", metric.mean), ("_v2t", metric.v2t), ("_t2v", metric.t2v))
    }


def _warn_left_out(scores: GradedScores) -> None:
    for name, metric in (("mAP", scores.mean_average_precision), ("nDCG", scores.ndcg)):
        if any(metric.left_out):
            log.warning("%s leaves out %d clips and %d texts to which nothing is relevant", name, *metric.left_out)
