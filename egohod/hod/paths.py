"""Words for a path: which way something goes, whether it turns, shakes or recurs, and where it begins and ends.

Inside, lengths are in picture widths, with y downward as in the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from egohod.hod.facts import (
    AWAY,
    CLOCKWISE,
    CLOSER,
    COUNTERCLOCKWISE,
    DOWN,
    LEFT,
    RIGHT,
    SHAKING,
    STILL,
    UP,
    Motion,
)


@dataclass(frozen=True)
class MotionParams:
    """When a change of place is a motion. Tuned on the demo world's val split."""

    still: float = 0.3
    """What moves less than this share of its own size is still."""
    least: float = 0.05
    """What moves less than this is still whatever its size, in picture widths."""
    depth: float = 0.25
    """How fast the logarithm of the size must fall with the way up, per picture width, for up to mean away."""
    round_area: float = 0.4
    """A turn's area, relative to the ellipse that its width and height span; a line has none, an ellipse 1."""
    round_aspect: float = 0.35
    """Shorter over longer side of a turn."""
    minor: float = 0.35
    """A leg shorter than this share of the longest one is an aside that is not told."""
    shakes: int = 5
    """So many legs to and fro are a shake; two quick taps have four."""


@dataclass(frozen=True)
class Course:
    """The words alone, see :class:`~egohod.hod.facts.Motion`."""

    directions: tuple[str, ...]
    repeats: int


def depth_slope(centres: list[np.ndarray], sizes: list[np.ndarray], aspect: float) -> float:
    """How the logarithm of the size grows with the way down, per picture width, over things that move together.

    ``centres`` [T, 2] and ``sizes`` [T] of each. Positive: what is lower in the picture looks larger, as on a table
    that lies before the camera. 0 where nothing is known.
    """
    above, below = 0.0, 0.0
    for centre, size in zip(centres, sizes, strict=True):
        known = np.isfinite(centre[:, 1]) & np.isfinite(size) & (size > 0)
        if known.sum() > 1:
            y, z = centre[known, 1] / aspect, np.log(size[known])
            above += float(((y - y.mean()) * (z - z.mean())).sum())
            below += float(((y - y.mean()) ** 2).sum())
    return above / below if below > 1e-9 else 0.0


def course(path: np.ndarray, size: float, slope: float, aspect: float, params: MotionParams) -> Course:
    """Words of a ``path`` [T, 2] of something ``size`` large (both in shares of the picture); NaN where unknown."""
    points = path[np.isfinite(path).all(axis=1)] / (1, aspect)
    least = max(params.least, params.still * size / np.sqrt(aspect)) if np.isfinite(size) else params.least
    if len(points) < 2 or np.ptp(points, axis=0).max() < least:
        return Course((STILL,), 1)
    turns = _turns(points, params)
    if turns:
        return Course((CLOCKWISE if turns > 0 else COUNTERCLOCKWISE,), max(1, round(abs(turns))))
    legs = _legs(points, least, slope, params)
    if not legs:
        return Course((STILL,), 1)
    to_and_fro = len(legs) > 3 and legs[0] != legs[1] and all(a == b for a, b in zip(legs, legs[2:], strict=False))
    if to_and_fro and len(legs) >= params.shakes:
        return Course((SHAKING,), len(legs) // 2)
    if to_and_fro:
        return Course((legs[0], legs[1]), len(legs) // 2)
    return Course(tuple(legs), 1)


def speed(path: np.ndarray, times: np.ndarray, size: float, aspect: float, params: MotionParams) -> float:
    """Mean speed while it moves, in picture widths a second; 0 where it does not."""
    known = np.isfinite(path).all(axis=1)
    points, at = path[known] / (1, aspect), times[known]
    if len(points) < 2:
        return 0.0
    steps, passed = np.hypot(*np.diff(points, axis=0).T), np.diff(at)
    # A step that would not leave the still zone within a second is jitter.
    least = max(params.least, params.still * size) if np.isfinite(size) else params.least
    moving = (passed > 0) & (steps > least * passed)
    return float(steps[moving].sum() / passed[moving].sum()) if moving.any() else 0.0


def region(point: np.ndarray) -> str:
    """One of nine words for where a point [2] lies."""
    column = ("left", "centre", "right")[int(np.clip(point[0] * 3, 0, 2))]
    row = ("upper", "", "lower")[int(np.clip(point[1] * 3, 0, 2))]
    return f"{row} {column}".strip()


def motion(
    path: np.ndarray, size: np.ndarray, times: np.ndarray, said: Course, aspect: float, params: MotionParams
) -> Motion:
    """All of a motion from its ``path`` [T, 2], ``size`` [T] and words."""
    known = np.flatnonzero(np.isfinite(path).all(axis=1))
    assert len(known), "a track has at least one box"
    usual = float(np.nanmedian(size)) if np.isfinite(size).any() else np.nan
    moves = said.directions != (STILL,)
    return Motion(
        path=path,
        size=size,
        directions=said.directions,
        repeats=said.repeats,
        speed=speed(path, times, usual, aspect, params) if moves else 0.0,
        start_region=region(path[known[0]]),
        end_region=region(path[known[-1]]),
    )


def _turns(points: np.ndarray, params: MotionParams) -> float:
    """How often ``points`` [N, 2] go round, positive clockwise as seen; 0 where they do not.

    The area that the closed path sweeps, in ellipses of its width and height; a path there and back sweeps none.
    """
    width, height = np.ptp(points, axis=0)
    if min(width, height) < params.round_aspect * max(width, height):
        return 0.0
    x, y = points.T
    area = 0.5 * float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())
    turns = area / (np.pi / 4 * width * height)
    # An arc that ends elsewhere sweeps an area with its chord, but goes nowhere round.
    closed = np.hypot(*(points[-1] - points[0])) < 0.4 * max(width, height)
    if abs(turns) < params.round_area or not (closed or abs(turns) > 1.2):
        return 0.0
    return turns


def _legs(points: np.ndarray, least: float, slope: float, params: MotionParams) -> list[str]:
    """Words of the straight parts of a path [N, 2], those alike in a row said once."""
    ways = np.diff(points[_corners(points, least / 2)], axis=0)
    lengths = np.hypot(*ways.T)
    words: list[str] = []
    for way in ways[lengths >= max(0.8 * least, params.minor * lengths.max())]:
        if abs(way[0]) >= abs(way[1]):
            word = RIGHT if way[0] > 0 else LEFT
        elif slope > params.depth:
            word = CLOSER if way[1] > 0 else AWAY
        else:
            word = DOWN if way[1] > 0 else UP
        if not words or words[-1] != word:
            words.append(word)
    return words


def _corners(points: np.ndarray, tolerance: float) -> list[int]:
    """Indices of the corners of a path, ends included.

    Splits where the path is farthest off its chord (Ramer 1972; Douglas and Peucker 1973), and also where it runs back
    along the chord, which that distance does not see.
    """
    chord = points[-1] - points[0]
    length = float(np.hypot(*chord))
    off = points - points[0]
    share = off @ chord / length**2 if length > 1e-9 else np.zeros(len(points))
    distance = np.hypot(*(off - np.clip(share, 0, 1)[:, None] * chord).T)
    split = int(np.argmax(distance))
    if distance[split] <= tolerance:
        back = np.maximum.accumulate(share) - share
        lowest = int(np.argmax(back))
        if back[lowest] * length <= 2 * tolerance:
            return [0, len(points) - 1]
        split = int(np.argmax(share[:lowest])) or lowest
    return _corners(points[: split + 1], tolerance)[:-1] + [split + i for i in _corners(points[split:], tolerance)]
