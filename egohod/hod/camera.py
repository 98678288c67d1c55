"""How far the camera's motion moves the scene in the picture, told from what lies outside of hands and objects."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from PIL import Image

WIDTH = 96
"""Pictures are compared at this many columns; the parabola through the peak gives parts of one."""
REACH = 0.25
"""Largest motion between two samples that is looked for, in shares of the picture."""
_LEAST_SHARED = 0.2  # of the picture must be free of boxes in both, and overlap
_MUCH_ALIKE = 0.7
_FARNESS = 0.1  # correlation that a motion of REACH must be better by than none
_LEAST_LIKENESS = 0.3  # correlation below is chance: the pictures show different things, or nothing


def shifts(pictures: np.ndarray, seconds: np.ndarray, rows: pa.Table) -> np.ndarray:
    """Pictures uint8 [T, H, W, 3] seen at ``seconds`` [T] -> place of the scene since the first one [T, 2].

    Shares of width and height; subtract them from positions to take the camera's motion out. ``rows``, in the schema of
    detections, tell what is left out: objects, hands, and the arms below them. The translation between two pictures is
    where their masked normalised cross-correlation is largest (Padfield, "Masked object registration in the Fourier
    domain", 2012), over shifts up to ``REACH``; pictures that nowhere correlate count as not moved. Each picture is
    compared with the same earlier one as long as that is much alike, so that errors do not add up.
    """
    height = max(8, round(WIDTH * pictures.shape[1] / pictures.shape[2]))
    small = [
        np.asarray(Image.fromarray(each).convert("L").resize((WIDTH, height), Image.Resampling.BOX), dtype=np.float64)
        for each in pictures
    ]
    masks = [np.ones((height, WIDTH)) for _ in small]
    for row in rows.to_pylist():
        mask = masks[int(np.argmin(np.abs(seconds - row["second"])))]
        left, right = row["left"] * WIDTH, row["right"] * WIDTH
        # Arms come from below, and are about as wide as hands.
        bottom = height if row["kind"] == "hand" else row["bottom"] * height
        mask[int(row["top"] * height) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = 0
    places, reference = np.zeros((len(small), 2)), 0
    for i in range(1, len(small)):
        moved, likeness = _translation(small[reference], masks[reference], small[i], masks[i])
        if reference < i - 1 and (likeness < _MUCH_ALIKE or np.abs(moved).max() > REACH / 2):
            reference = i - 1
            moved, likeness = _translation(small[reference], masks[reference], small[i], masks[i])
        places[i] = places[reference] + (moved if likeness >= _LEAST_LIKENESS else 0)
    return places


def _translation(
    one: np.ndarray, one_mask: np.ndarray, two: np.ndarray, two_mask: np.ndarray
) -> tuple[np.ndarray, float]:
    """How far ``two`` [h, w] lies from ``one``, in shares of width and height [2], and their correlation there."""
    size = np.array(one.shape)
    reach = np.floor(REACH * size).astype(int)
    padded = [int(each) for each in size + reach]
    # Around its mean the sums of squares stay small, and with them the rounding of the transforms.
    one, two = (one - one.mean()) * one_mask, (two - two.mean()) * two_mask
    first, second = (
        [np.fft.rfft2(each, padded) for each in (picture, picture**2, mask)]
        for picture, mask in ((one, one_mask), (two, two_mask))
    )

    def sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of a * b over the common part at every shift of b."""
        whole = np.fft.irfft2(np.conj(a) * b, padded)
        rows, columns = (np.arange(-n, n + 1) for n in reach)
        return whole[np.ix_(rows, columns)]

    count = sums(first[2], second[2])
    shared = np.maximum(np.round(count), 1)
    mean_one, mean_two = sums(first[0], second[2]), sums(first[2], second[0])
    cross = sums(first[0], second[0]) - mean_one * mean_two / shared
    spread = (sums(first[1], second[2]) - mean_one**2 / shared) * (sums(first[2], second[1]) - mean_two**2 / shared)
    enough = (count >= _LEAST_SHARED * one.size) & (spread > 1e-6 * max(float(spread.max()), 1.0))
    likeness = np.where(enough, cross / np.sqrt(np.maximum(spread, 1e-12)), -1.0)
    # Of two places that are much alike the nearer one: tiles and grain repeat.
    far = np.hypot(*np.meshgrid(*(np.linspace(-1, 1, n) for n in likeness.shape), indexing="ij"))
    row, column = (int(each) for each in np.unravel_index(int(np.argmax(likeness - _FARNESS * far)), likeness.shape))
    peak = np.array([column + _vertex(likeness[row], column), row + _vertex(likeness[:, column], row)])
    return (peak - reach[::-1]) / size[::-1], float(likeness[row, column])


def _vertex(values: np.ndarray, peak: int) -> float:
    """Where the parabola through a peak and its neighbours has its top, from the peak, -0.5 to 0.5."""
    if not 0 < peak < len(values) - 1:
        return 0.0
    before, at, after = values[peak - 1 : peak + 2]
    bend = before - 2 * at + after
    return float(np.clip(0.5 * (before - after) / bend, -0.5, 0.5)) if bend < -1e-12 and before > -1 < after else 0.0
