"""A number with its chance level, and with the resampling that tells how far it can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# A metric's chance level stands beside it under its name and this ending, and what a temporal control took away.
CHANCE, DROP = "_chance", "_drop"
RESAMPLES = 1000
_CHUNK = 50

Draw = Callable[[np.random.Generator], NDArray[np.float64]]


@dataclass(frozen=True)
class Score:
    """``value`` and ``chance`` in percent, or ranks from 1; ``draw`` gives the values of ``RESAMPLES`` resamplings.

    With equal generators the scores of one benchmark under two orders of frames draw the same clips.
    """

    value: float
    chance: float | None
    draw: Draw
    is_rank: bool = False

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """The 95 % bootstrap interval: percentiles 2.5 and 97.5."""
        return _percentiles(self.draw(np.random.default_rng(seed)))

    def drop_to(self, other: Score, seed: int = 0) -> tuple[float, tuple[float, float]]:
        """What ``other`` lacks to this score, with the interval of the difference over the same resampled clips."""
        here, there = (score.draw(np.random.default_rng(seed)) for score in (self, other))
        return self.value - other.value, _percentiles(here - there)


def percent(parts: Sequence[ArrayLike], chance: float | None) -> Score:
    """The mean of the parts' means, as percent; each part is resampled by itself.

    A part holds a fraction per query: directions of retrieval, splits of a benchmark. NaN is left out.
    """
    values = [part[~np.isnan(part)] for part in (np.asarray(part, dtype=np.float64) for part in parts)]
    if not values or any(not len(part) for part in values):
        return Score(float("nan"), chance, lambda _: np.full(RESAMPLES, np.nan))

    def draw(rng: np.random.Generator) -> NDArray[np.float64]:
        return 100 * np.mean([_resampled(part, rng) for part in values], axis=0)

    return Score(100 * float(np.mean([part.mean() for part in values])), chance, draw)


def median(ranks: ArrayLike, chance: float | None) -> Score:
    """The median of ranks from 1; 0, which stands for no relevant item, is left out."""
    kept = np.asarray(ranks, dtype=np.float64)
    kept = kept[kept > 0]
    if not len(kept):
        return Score(float("nan"), chance, lambda _: np.full(RESAMPLES, np.nan), is_rank=True)
    return Score(float(np.median(kept)), chance, lambda rng: _resampled(kept, rng, np.median), is_rank=True)


def flat(scores: Mapping[str, Score]) -> dict[str, float]:
    """Plain numbers by name, the chance level of each one that has one right behind it."""
    numbers: dict[str, float] = {}
    for name, score in scores.items():
        numbers[name] = score.value
        if score.chance is not None:
            numbers[name + CHANCE] = score.chance
    return numbers


def flat_with_controls(scores: Mapping[str, Mapping[str, Score]], plain: str) -> dict[str, float]:
    """Plain numbers of the order ``plain``, and ``<control>/<metric>`` of each control with its drop.

    A drop is told where more is better; chance levels are the same under every control and are not repeated.
    """
    numbers = flat(scores[plain])
    for control, under in scores.items():
        if control == plain:
            continue
        for name, score in under.items():
            numbers[f"{control}/{name}"] = score.value
            if not score.is_rank:
                numbers[f"{control}/{name}{DROP}"] = scores[plain][name].value - score.value
    return numbers


def _resampled(
    values: NDArray[np.float64], rng: np.random.Generator, statistic: Callable[..., NDArray[np.float64]] = np.mean
) -> NDArray[np.float64]:
    """The statistic of ``RESAMPLES`` samples drawn with replacement, a few at a time to save memory."""
    count = len(values)
    return np.concatenate(
        [
            statistic(values[rng.integers(0, count, (_CHUNK, count), dtype=np.int32)], axis=1)
            for _ in range(RESAMPLES // _CHUNK)
        ]
    )


def _percentiles(draws: NDArray[np.float64]) -> tuple[float, float]:
    if np.isnan(draws).any():
        return float("nan"), float("nan")
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
