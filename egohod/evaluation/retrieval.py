"""Retrieval between clips and texts, graded (EPIC-KITCHENS MIR) and by rank of the clip's own text."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from egohod.evaluation.metrics import (
    IntArray,
    expected_graded_scores,
    expected_recall,
    first_relevant_rank,
    graded_per_query,
    rank_items,
)
from egohod.evaluation.scores import Score, median, percent
from egohod.evaluation.tables import EvaluationTable, similarity

log = logging.getLogger(__name__)

RECALL_AT = (1, 5)
_SHOWN = 5


@dataclass(frozen=True)
class RetrievalTable(EvaluationTable):
    """Every clip searches all distinct texts, and every text all clips.

    ``texts`` M distinct texts; ``text_of_clip`` [N] the own text of each clip, None where a benchmark has no such
    thing; ``relevancy`` [N, M] in 0..1, where 1 is a full match (what counts as a hit in mAP).
    """

    texts: Sequence[str]
    text_of_clip: IntArray | None
    relevancy: NDArray[Any]

    def measure(self, video: Tensor, text: Tensor) -> dict[str, Score]:
        """mAP and nDCG by relevancy; recall@k (percent) and median rank (from 1) of a clip's own text and back."""
        sim = similarity(video, text).numpy()
        v2t, t2v = graded_per_query(sim, self.relevancy), graded_per_query(sim.T, self.relevancy.T)
        scores = {}
        for name, here, there in zip(("map", "ndcg"), v2t, t2v, strict=True):
            if np.isnan(here).any() or np.isnan(there).any():
                counts = int(np.isnan(here).sum()), int(np.isnan(there).sum())
                log.warning("%s leaves out %d clips and %d texts to which nothing is relevant", name, *counts)
            for ending, parts in (("", (here, there)), ("_v2t", (here,)), ("_t2v", (there,))):
                scores[name + ending] = percent(parts, self._chance[name + ending])
        if self.text_of_clip is not None:
            own = self.text_of_clip[:, None] == np.arange(len(self.texts))
            for direction, each, relevant in (("v2t", sim, own), ("t2v", sim.T, own.T)):
                scores |= _ranks(first_relevant_rank(each, relevant), relevant, direction)
        return scores

    def details(self, video: Tensor, text: Tensor) -> Mapping[str, Any]:
        """The best texts of each clip with their similarity and relevancy, and its average precision."""
        sim = similarity(video, text).numpy()
        precision, _ = graded_per_query(sim, self.relevancy)
        best = np.concatenate([rank_items(rows)[:, :_SHOWN] for rows in np.array_split(sim, len(sim) // 1000 + 1)])
        rows = np.arange(len(sim))[:, None]
        return {
            "kind": "retrieval",
            "texts": list(self.texts),
            "average_precision": [None if np.isnan(value) else round(float(value), 4) for value in precision],
            "best_texts": best.tolist(),
            "similarity": sim[rows, best].round(4).tolist(),
            "relevancy": self.relevancy[rows, best].round(4).tolist(),
            "most_relevant_text": self.relevancy.argmax(axis=1).tolist(),
        }

    def restricted(self, kept: NDArray[Any]) -> RetrievalTable:
        """See :class:`EvaluationTable`; all texts stay."""
        own = None if self.text_of_clip is None else self.text_of_clip[kept]
        return dataclasses.replace(self, text_of_clip=own, relevancy=self.relevancy[kept])

    @cached_property
    def _chance(self) -> dict[str, float]:
        expected = expected_graded_scores(self.relevancy)
        return {
            name + ending: 100 * value
            for name, metric in (("map", expected.mean_average_precision), ("ndcg", expected.ndcg))
            for ending, value in (("", metric.mean), ("_v2t", metric.v2t), ("_t2v", metric.t2v))
        }


def _ranks(ranks: IntArray, relevant: NDArray[Any], direction: str) -> dict[str, Score]:
    by_chance = expected_recall(relevant.sum(axis=1), relevant.shape[1])
    scores = {
        f"recall_{k}_{direction}": percent([ranks[ranks > 0] <= k], 100 * float(by_chance[min(k, len(by_chance)) - 1]))
        for k in RECALL_AT
    }
    return scores | {f"median_rank_{direction}": median(ranks, float(np.searchsorted(by_chance, 0.5) + 1))}
