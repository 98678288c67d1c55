"""Retrieval and classification metrics as fractions in 0..1 (ranks from 1), and scores with chance and interval.

Legend: Q queries, N items of the gallery, C classes or choices.

Ties are broken by the lower index, so a result does not depend on a sorting library; scores that are not finite are
refused, since their ranks would be arbitrary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from egohod.errors import UserError
from egohod.runtime import usable_cores

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.int64]

# Elements of a similarity matrix that are ranked at a time: a few arrays of 1 MB, which stay in a core's cache.
BLOCK_ELEMENTS = 2**17
# Blocks that are ranked at the same time.
THREADS = min(8, usable_cores())


def graded_per_query(sim: ArrayLike, rel: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average precision and nDCG of each row: float64 [Q], float64 [Q], NaN for a query without a relevant item.

    ``sim`` [Q, N] scores, ``rel`` [Q, N] relevancies in 0..1, as EPIC-KITCHENS-100 multi-instance retrieval has them:

    * average precision: over the ranks k that hold an item of relevancy 1, the sum of the relevancies of the first
      k items divided by k, averaged over the items of relevancy 1. Items of lower relevancy count in the sums.
    * nDCG: gain = relevancy, discount = log2(rank + 1), cut at k = number of items of relevancy above 0.
    """
    sim, rel = _matrices(sim, rel)
    queries, items = sim.shape
    ap, gain = np.full(queries, np.nan), np.full(queries, np.nan)
    step = max(1, BLOCK_ELEMENTS // max(items, 1))
    blocks = [slice(start, start + step) for start in range(0, queries, step)]
    # NumPy's sort releases the GIL, so threads scale.
    with ThreadPoolExecutor(THREADS) as threads:
        # A block of texts is a slice of columns, which is copied once for several passes over it.
        parts = threads.map(lambda rows: _graded_block(sim[rows], np.ascontiguousarray(rel[rows])), blocks)
        for rows, part in zip(blocks, parts, strict=True):
            ap[rows], gain[rows] = part
    return ap, gain


def _graded_block(sim: NDArray[Any], rel: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """:func:`graded_per_query` of a few rows, ``rel`` contiguous."""
    # Items of relevancy 0 add nothing to any sum, and they are nine in ten: after the ranking, only matrices [Q, P] of
    # the positives in ranked order are computed with, P that of the query with the most, padded with zeros.
    queries, items = rel.shape
    positive = rel > 0
    counts = np.count_nonzero(positive, axis=1)
    place = rank_items(sim)
    place += np.arange(queries)[:, None] * items  # flat: several times faster to look up than row by row
    hits = np.flatnonzero(positive.reshape(-1).take(place))
    query = np.repeat(np.arange(queries), counts)
    rank = hits - query * items + 1
    gains = rel.reshape(-1)[place.reshape(-1)[hits]].astype(np.float64)

    slots = np.arange(counts.max(initial=0)) < counts[:, None]
    packed = np.zeros(slots.shape)  # in float64: a sum over thousands of positives loses digits in float32
    packed[slots] = gains
    full = gains == 1
    precision = np.cumsum(packed, axis=1)[slots][full] / rank[full]
    ap = _ratio(np.bincount(query[full], precision, queries), np.bincount(query[full], minlength=queries))

    discount = 1.0 / np.log2(np.arange(items) + 2.0)
    # The published evaluation cuts nDCG at as many ranks as there are relevant items, not at a fixed k.
    counted = rank <= counts[query]
    gained = np.bincount(query[counted], (gains * discount[rank - 1])[counted], queries)
    packed.sort(axis=1)  # ascending, so the ideal order is read backwards
    return ap, _ratio(gained, packed[:, ::-1] @ discount[: packed.shape[1]])


def rank_items(scores: ArrayLike) -> IntArray:
    """Indices [Q, N] of the items of each row from the highest score to the lowest, equal scores by lower index."""
    scores = np.ascontiguousarray(scores)
    _require_finite(scores)  # NaN has no place in any order
    if scores.dtype != np.float32:
        return np.argsort(-scores, axis=1, kind="stable").astype(np.int64, copy=False)
    # Features are float32, so the large matrices are. Their bits, made monotonous, and the index share one
    # 64-bit key: sorting keys is half the price of a stable argsort, and no two keys are equal.
    bits = (scores + np.float32(0)).view(np.int32)  # + 0 turns -0.0 into 0.0, which has other bits
    # Negative floats count downwards as integers: with all bits but the sign flipped they count upwards, too.
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    keys = np.invert(bits, out=bits).astype(np.int64)  # the highest score first
    keys <<= 32
    keys |= np.arange(scores.shape[1])  # of equal scores the lower index first
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return keys


def first_relevant_rank(sim: ArrayLike, relevant: ArrayLike) -> IntArray:
    """Rank [Q], from 1, of the best-placed relevant item of each row; 0 for a query without one.

    ``sim`` [Q, N] scores, ``relevant`` [Q, N] bool.
    """
    sim, relevant = _matrices(sim, relevant)
    relevant = relevant.astype(bool)
    _require_finite(sim)
    best = np.where(relevant, sim, -np.inf).max(axis=1, initial=-np.inf)
    # argmax finds the first of equal items, which is the one that ties are broken for.
    position = (relevant & (sim == best[:, None])).argmax(axis=1)
    ahead = (sim > best[:, None]) | ((sim == best[:, None]) & (np.arange(sim.shape[1]) < position[:, None]))
    return np.where(relevant.any(axis=1), ahead.sum(axis=1) + 1, 0)


def label_ranks(scores: ArrayLike, labels: ArrayLike) -> IntArray:
    """Rank [Q], from 1, of the label [Q] of each row of ``scores`` [Q, C]."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    _require_labels(scores, labels)
    return first_relevant_rank(scores, np.arange(scores.shape[1]) == labels[:, None])


def mean_class_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Accuracy within each class that occurs in ``labels`` [Q], averaged over these classes; NaN without a label."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    # By the classes that occur: LaViLa's helper counts one without a single clip as 0, which is no accuracy.
    _, codes = np.unique(labels, return_inverse=True)
    accuracy = np.bincount(codes, weights=predictions == labels) / np.bincount(codes)
    return float(accuracy.mean()) if accuracy.size else float("nan")


def multilabel_average_precision(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Average precision of each class, float64 [C], NaN for one without a positive video; Charades' mAP averages it.

    ``scores`` [N, C], ``labels`` [N, C] bool: which classes occur in each video. As in the challenge's own program,
    videos in which no class occurs rank behind all others.
    """
    scores, labels = _matrices(scores, labels)
    _require_finite(scores)
    labels = labels.astype(bool)
    labelled = labels.any(axis=1)
    ranked = np.take_along_axis(labels[labelled].T, rank_items(scores[labelled].T), axis=1)
    precision = np.cumsum(ranked, axis=1) / np.arange(1, ranked.shape[1] + 1)
    return _ratio((precision * ranked).sum(axis=1), ranked.sum(axis=1))


def multiple_choice_right(scores: ArrayLike, answers: ArrayLike) -> NDArray[np.bool_]:
    """Whether each question is answered rightly, bool [Q].

    ``scores`` [Q, C], where -inf marks a choice that a question with fewer choices does not have; ``answers`` [Q]
    index of the right choice.
    """
    scores, answers = np.asarray(scores), np.asarray(answers)
    _require_labels(scores, answers)
    # A missing choice is -inf by definition; anything else must be finite, and each question needs a real answer.
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise UserError("the scores of the choices hold NaN or infinite values: the features are not finite")
    if answers.size and not np.isfinite(scores[np.arange(len(answers)), answers]).all():
        raise UserError("a question names an answer that is not among its choices")
    # argmax takes the first of equal scores, as all metrics here do.
    return scores.argmax(axis=1) == answers if answers.size else np.zeros(0, dtype=bool)


def expected_graded_per_query(rel: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average precision and nDCG that random scores reach on average, as :func:`graded_per_query`; ``rel`` [Q, N].

    An item of relevancy 1 has each rank k of N with equal probability, and each of the others (relevancies adding up
    to S - 1) precedes it with (k - 1)/(N - 1); so AP averages ``mean_k((1 + (k - 1) (S - 1)/(N - 1)) / k)``.
    For nDCG every rank holds the mean relevancy.
    """
    # Exactly, not by sampling: a chance level must not change between runs.
    rel = np.asarray(rel)
    items = rel.shape[1]
    rank = np.arange(1, items + 1)
    discount = 1.0 / np.log2(rank + 1.0)
    total = rel.sum(axis=1, dtype=np.float64)
    harmonic = float(np.mean(1.0 / rank))
    # mean_k((1 + (k - 1) x) / k) = H + (1 - H) x for x = (S - 1)/(N - 1) and the mean reciprocal rank H.
    ap = harmonic + (1 - harmonic) * (total - 1) / max(items - 1, 1)
    positives = (rel > 0).sum(axis=1)
    gained = total / items * np.concatenate([[0.0], discount.cumsum()])[positives]
    ideal = np.sort(rel, axis=1)[:, ::-1] @ discount
    return np.where((rel == 1).any(axis=1), ap, np.nan), _ratio(gained, ideal)


def expected_recall(relevant: ArrayLike, items: int) -> NDArray[np.float64]:
    """Recall at k = 1 .. ``items`` of random scores: float64 [items].

    ``relevant`` [Q] number of relevant items of each query; queries with 0 are left out.
    """
    counts, queries = np.unique(np.asarray(relevant), return_counts=True)
    counts, queries = counts[counts > 0], queries[counts > 0]
    drawn = np.arange(items)
    # Drawing without replacement: the share of queries that have missed all relevant items after each draw.
    missed = (np.clip(items - counts[:, None] - drawn, 0, None) / (items - drawn)).cumprod(axis=1)
    return 1 - queries @ missed / max(queries.sum(), 1)


def _matrices(sim: ArrayLike, rel: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    sim, rel = np.asarray(sim), np.asarray(rel)
    if sim.ndim != 2 or sim.shape != rel.shape:
        raise UserError(f"similarities {list(sim.shape)} and relevancies {list(rel.shape)} must be matrices alike")
    return sim, rel


def _require_finite(scores: NDArray[Any]) -> None:
    if not np.isfinite(scores).all():
        raise UserError("the scores hold NaN or infinite values: the features they come from are not finite")


def _require_labels(scores: NDArray[Any], labels: NDArray[Any]) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise UserError(f"scores {list(scores.shape)} need one label per row, not {list(labels.shape)}")
    if labels.size and (labels.min() < 0 or labels.max() >= scores.shape[1]):
        raise UserError(f"labels run from {labels.min()} to {labels.max()}, but there are {scores.shape[1]} columns")


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    # NaN, not 0, where there is nothing to find: means leave such a query out.
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


# Suffixes of a metric's name in results: its chance level, and its loss under a temporal control.
CHANCE, DROP = "_chance", "_drop"
RESAMPLES = 1000
# Resamplings at a time: all thousand of 10,000 queries would be 80 MB of indices.
_RESAMPLES_AT_A_TIME = 50

Draw = Callable[[np.random.Generator], NDArray[np.float64]]


@dataclass(frozen=True)
class Score:
    """A metric's ``value`` and ``chance`` level, in percent or as a rank from 1, and its bootstrap.

    ``draw`` returns the values of ``RESAMPLES`` resamplings; it draws the same clips for equal generators, so that two
    orders of frames are compared clip by clip.
    """

    value: float
    chance: float | None
    draw: Draw
    is_rank: bool = False

    def interval(self, minus: Score | None = None, seed: int = 0) -> tuple[float, float]:
        """The 95 % bootstrap interval of the value, or of its difference to ``minus`` over the same resampled clips."""
        draws = self.draw(np.random.default_rng(seed))
        if minus is not None:
            # A generator of the same seed: resampled apart, the noise of both would hide a small drop.
            draws = draws - minus.draw(np.random.default_rng(seed))
        # One resampling without a single valid query spoils the interval: none is better than a wrong one.
        if np.isnan(draws).any():
            return float("nan"), float("nan")
        low, high = np.percentile(draws, [2.5, 97.5])
        return float(low), float(high)


def percent(parts: Sequence[ArrayLike], chance: float | None) -> Score:
    """The mean of the parts' means in percent; each part (direction of retrieval, split) is resampled by itself.

    A part has a fraction for each query; NaN is left out.
    """
    values = [part[~np.isnan(part)] for part in (np.asarray(part, dtype=np.float64) for part in parts)]
    if not values or any(not len(part) for part in values):
        return Score(float("nan"), chance, lambda _: np.full(RESAMPLES, np.nan))
    mean = 100 * float(np.mean([part.mean() for part in values]))
    return Score(mean, chance, lambda rng: 100 * np.mean([_resampled(part, rng) for part in values], axis=0))


def median(ranks: ArrayLike, chance: float | None) -> Score:
    """The median of ranks from 1; rank 0 (no relevant item) is left out."""
    valid = np.asarray(ranks, dtype=np.float64)
    valid = valid[valid > 0]
    if not len(valid):
        return Score(float("nan"), chance, lambda _: np.full(RESAMPLES, np.nan), is_rank=True)
    return Score(float(np.median(valid)), chance, lambda rng: _resampled(valid, rng, np.median), is_rank=True)


def _resampled(
    values: NDArray[np.float64], rng: np.random.Generator, statistic: Callable[..., NDArray[np.float64]] = np.mean
) -> NDArray[np.float64]:
    count = len(values)
    # int32: half the memory traffic of the default, which is what this spends its time on.
    return np.concatenate(
        [
            statistic(values[rng.integers(0, count, (_RESAMPLES_AT_A_TIME, count), dtype=np.int32)], axis=1)
            for _ in range(RESAMPLES // _RESAMPLES_AT_A_TIME)
        ]
    )
