"""Retrieval and classification metrics as fractions in 0..1 (ranks from 1), and scores with chance and interval.

Legend: Q queries, N items of the gallery, C classes or choices.

Ties are broken by the lower index, so a result does not depend on a sorting library; scores that are not finite are
refused, since their ranks would be arbitrary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


@dataclass(frozen=True)
class Directions:
    """A metric from video to text, from text to video, and their mean.

    ``left_out`` counts the (video, text) queries without a relevant item; they are in no average.
    """

    v2t: float
    t2v: float
    mean: float
    left_out: tuple[int, int]

    def __iter__(self) -> Iterator[float]:
        """V->T, T->V and their mean."""
        return iter((self.v2t, self.t2v, self.mean))


@dataclass(frozen=True)
class GradedScores:
    """Both graded metrics of EPIC-KITCHENS multi-instance retrieval."""

    mean_average_precision: Directions
    ndcg: Directions


def graded_scores(sim: ArrayLike, rel: ArrayLike) -> GradedScores:
    """mAP and nDCG of a similarity matrix [videos, texts] against relevancies of the same shape.

    One ranking per query serves both metrics; memory beyond the two matrices is constant.
    Definitions: :func:`graded_per_query`. Raises :class:`UserError` on unequal shapes or non-finite scores.
    """
    sim, rel = _matrices(sim, rel)
    (ap_v2t, ndcg_v2t), (ap_t2v, ndcg_t2v) = graded_per_query(sim, rel), graded_per_query(sim.T, rel.T)
    return GradedScores(_directions(ap_v2t, ap_t2v), _directions(ndcg_v2t, ndcg_t2v))


def mean_average_precision(sim: ArrayLike, rel: ArrayLike) -> Directions:
    """Graded mAP of a similarity matrix [videos, texts], see :func:`graded_scores`."""
    return graded_scores(sim, rel).mean_average_precision


def ndcg(sim: ArrayLike, rel: ArrayLike) -> Directions:
    """nDCG of a similarity matrix [videos, texts], see :func:`graded_scores`."""
    return graded_scores(sim, rel).ndcg


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

    def block(start: int) -> None:
        rows = slice(start, start + step)
        ap[rows], gain[rows] = _graded_block(sim[rows], np.ascontiguousarray(rel[rows]))

    # NumPy's sort releases the GIL, so threads scale.
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(block, range(0, queries, step)))
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
    packed = np.zeros(slots.shape)
    packed[slots] = gains
    full = gains == 1
    precision = np.cumsum(packed, axis=1)[slots][full] / rank[full]
    ap = _ratio(np.bincount(query[full], precision, queries), np.bincount(query[full], minlength=queries))

    discount = 1.0 / np.log2(np.arange(items) + 2.0)
    # The published evaluation cuts nDCG at as many ranks as there are relevant items, not at a fixed k.
    counted = rank <= counts[query]
    gained = np.bincount(query[counted], (gains * discount[rank - 1])[counted], queries)
    packed.sort(axis=1)
    return ap, _ratio(gained, packed[:, ::-1] @ discount[: packed.shape[1]])


def rank_items(scores: ArrayLike) -> IntArray:
    """Indices [Q, N] of the items of each row from the highest score to the lowest, equal scores by lower index."""
    scores = np.ascontiguousarray(scores)
    _require_finite(scores)
    if scores.dtype != np.float32:
        return np.argsort(-scores, axis=1, kind="stable").astype(np.int64, copy=False)
    # Features are float32, so the large matrices are. Their bits, made monotonous, and the index share one
    # 64-bit key: sorting keys is half the price of a stable argsort, and no two keys are equal.
    bits = (scores + np.float32(0)).view(np.int32)  # + 0 turns -0.0 into 0.0, which has other bits
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)  # rising, as integers
    keys = np.invert(bits, out=bits).astype(np.int64)
    keys <<= 32
    keys |= np.arange(scores.shape[1])
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


def recall_at_k(ranks: ArrayLike, k: int) -> float:
    """Share of the queries whose first relevant item has rank <= k; rank 0 (no such item) is left out."""
    return _mean(_answerable(ranks) <= k)


def median_rank(ranks: ArrayLike) -> float:
    """Median of the ranks, from 1; rank 0 (no relevant item) is left out."""
    ranks = _answerable(ranks)
    return float(np.median(ranks)) if ranks.size else float("nan")


def topk_accuracy(scores: ArrayLike, labels: ArrayLike, k: int = 1) -> float:
    """Share of rows of ``scores`` [Q, C] whose label [Q] is among the k highest."""
    return recall_at_k(label_ranks(scores, labels), k)


def label_ranks(scores: ArrayLike, labels: ArrayLike) -> IntArray:
    """Rank [Q], from 1, of the label [Q] of each row of ``scores`` [Q, C]."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    _require_labels(scores, labels)
    return first_relevant_rank(scores, np.arange(scores.shape[1]) == labels[:, None])


def mean_class_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Accuracy within each class that occurs in ``labels`` [Q], averaged over these classes.

    Classes without a single clip have no accuracy and are left out (LaViLa's helper counts them as 0).
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    _, codes = np.unique(labels, return_inverse=True)
    return _mean(np.bincount(codes, weights=predictions == labels) / np.bincount(codes))


def multilabel_average_precision(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Average precision of each class, float64 [C], NaN for one without a positive video; Charades' mAP averages it.

    ``scores`` [N, C], ``labels`` [N, C] bool: which classes occur in each video. As in the challenge's own program,
    videos in which no class occurs rank behind all others.
    """
    scores, labels = _matrices(scores, labels)
    labels = labels.astype(bool)
    _require_finite(scores)
    labelled = labels.any(axis=1)
    ranked = np.take_along_axis(labels[labelled].T, rank_items(scores[labelled].T), axis=1)
    precision = np.cumsum(ranked, axis=1) / np.arange(1, ranked.shape[1] + 1)
    return _ratio((precision * ranked).sum(axis=1), ranked.sum(axis=1))


def multiple_choice_accuracy(scores: ArrayLike, answers: ArrayLike, kinds: ArrayLike) -> dict[str, float]:
    """Accuracy of each kind of question, e.g. EgoMCQ's inter-video and intra-video ones.

    ``scores`` [Q, C], where -inf marks a choice that a question with fewer choices does not have; ``answers`` [Q]
    index of the right choice; ``kinds`` [Q] any labels, which become the keys as strings.
    """
    right, kinds = multiple_choice_right(scores, answers), np.asarray(kinds).astype(str)
    return {str(kind): _mean(right[kinds == kind]) for kind in np.unique(kinds)}


def multiple_choice_right(scores: ArrayLike, answers: ArrayLike) -> NDArray[np.bool_]:
    """Whether each question is answered rightly, bool [Q]; arguments as of :func:`multiple_choice_accuracy`."""
    scores, answers = np.asarray(scores), np.asarray(answers)
    _require_labels(scores, answers)
    # A missing choice is -inf by definition; anything else must be finite, and each question needs a real answer.
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise UserError("the scores of the choices hold NaN or infinite values: the features are not finite")
    if answers.size and not np.isfinite(scores[np.arange(len(answers)), answers]).all():
        raise UserError("a question names an answer that is not among its choices")
    # argmax takes the first of equal scores, as all metrics here do.
    return scores.argmax(axis=1) == answers if answers.size else np.zeros(0, dtype=bool)


def expected_graded_scores(rel: ArrayLike) -> GradedScores:
    """mAP and nDCG that random scores reach on average on relevancies [videos, texts]: the chance level, exactly.

    An item of relevancy 1 has each rank k of N with equal probability, and each of the others (relevancies adding up
    to S - 1) stands before it with (k - 1)/(N - 1); so AP averages ``mean_k((1 + (k - 1) (S - 1)/(N - 1)) / k)``.
    For nDCG every rank holds the mean relevancy.
    """
    # Exactly, not by sampling: a chance level must not change between runs.
    rel = np.asarray(rel)
    (ap_v2t, ndcg_v2t), (ap_t2v, ndcg_t2v) = _expected_per_query(rel), _expected_per_query(rel.T)
    return GradedScores(_directions(ap_v2t, ap_t2v), _directions(ndcg_v2t, ndcg_t2v))


def expected_average_precision(labels: ArrayLike) -> NDArray[np.float64]:
    """Average precision of each class that random scores reach on average: float64 [C] from ``labels`` [N, C] bool."""
    return _expected_per_query(np.asarray(labels, dtype=np.float64).T)[0]


def expected_recall(relevant: ArrayLike, items: int) -> NDArray[np.float64]:
    """Recall at k = 1 .. ``items`` of random scores: float64 [items].

    ``relevant`` [Q] number of relevant items of each query; queries with 0 are left out.
    """
    counts, queries = np.unique(_answerable(relevant), return_counts=True)
    drawn = np.arange(items)
    # Drawing without replacement: the share of queries that have missed all relevant items after each draw.
    missed = (np.clip(items - counts[:, None] - drawn, 0, None) / (items - drawn)).cumprod(axis=1)
    return 1 - queries @ missed / max(queries.sum(), 1)


def _expected_per_query(rel: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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


def _answerable(ranks: ArrayLike) -> IntArray:
    ranks = np.asarray(ranks)
    return ranks[ranks > 0]


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _mean(values: ArrayLike) -> float:
    values = np.asarray(values, dtype=np.float64)
    return float(values.mean()) if values.size else float("nan")


def _directions(v2t: NDArray[np.float64], t2v: NDArray[np.float64]) -> Directions:
    # NaN marks queries without a relevant item.
    valid = [values[~np.isnan(values)] for values in (v2t, t2v)]
    means = [_mean(values) for values in valid]
    left_out = (len(v2t) - len(valid[0]), len(t2v) - len(valid[1]))
    return Directions(means[0], means[1], sum(means) / 2, left_out)


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

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """The 95 % bootstrap interval: percentiles 2.5 and 97.5."""
        return _percentiles(self.draw(np.random.default_rng(seed)))

    def drop_to(self, other: Score, seed: int = 0) -> tuple[float, tuple[float, float]]:
        """The difference to ``other`` and its 95 % interval, over the same resampled clips."""
        ours, theirs = (score.draw(np.random.default_rng(seed)) for score in (self, other))
        return self.value - other.value, _percentiles(ours - theirs)


def percent(parts: Sequence[ArrayLike], chance: float | None) -> Score:
    """The mean of the parts' means in percent; each part (direction of retrieval, split) is resampled by itself.

    A part has a fraction for each query; NaN is left out.
    """
    values = [part[~np.isnan(part)] for part in (np.asarray(part, dtype=np.float64) for part in parts)]
    if not values or any(not len(part) for part in values):
        return Score(float("nan"), chance, lambda _: np.full(RESAMPLES, np.nan))

    def draw(rng: np.random.Generator) -> NDArray[np.float64]:
        return 100 * np.mean([_resampled(part, rng) for part in values], axis=0)

    return Score(100 * float(np.mean([part.mean() for part in values])), chance, draw)


def median(ranks: ArrayLike, chance: float | None) -> Score:
    """The median of ranks from 1; rank 0 (no relevant item) is left out."""
    valid = np.asarray(ranks, dtype=np.float64)
    valid = valid[valid > 0]
    if not len(valid):
        return Score(float("nan"), chance, lambda _: np.full(RESAMPLES, np.nan), is_rank=True)
    return Score(float(np.median(valid)), chance, lambda rng: _resampled(valid, rng, np.median), is_rank=True)


def flat(scores: Mapping[str, Score]) -> dict[str, float]:
    """Values by name, each followed by its chance level if it has one."""
    numbers: dict[str, float] = {}
    for name, score in scores.items():
        numbers[name] = score.value
        if score.chance is not None:
            numbers[name + CHANCE] = score.chance
    return numbers


def flat_with_controls(scores: Mapping[str, Mapping[str, Score]], plain: str) -> dict[str, float]:
    """Values of the order ``plain``, and ``<control>/<metric>`` and its ``_drop`` of every temporal control."""
    numbers = flat(scores[plain])
    for control, controlled in scores.items():
        if control == plain:
            continue
        # Chance levels do not depend on the order of frames and are not repeated.
        for name, score in controlled.items():
            numbers[f"{control}/{name}"] = score.value
            if not score.is_rank:  # of ranks less is better: a drop would read the wrong way
                numbers[f"{control}/{name}{DROP}"] = scores[plain][name].value - score.value
    return numbers


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


def _percentiles(draws: NDArray[np.float64]) -> tuple[float, float]:
    # One resampling without a single valid query spoils the interval: none is better than a wrong one.
    if np.isnan(draws).any():
        return float("nan"), float("nan")
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
