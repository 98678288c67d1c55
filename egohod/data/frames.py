"""Which frames of a clip: index arithmetic and nothing else."""

from __future__ import annotations

import numpy as np


def segment_indices(start_frame: int, end_frame: int, n: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """``n`` frame numbers from ``n`` equal segments of [start_frame, end_frame), ascending, int64 [n].

    Without ``rng`` the middle of each segment: with s = (end - start - 1) / n, frame i is
    (round(s * i) + round(s * (i + 1))) // 2 + start (SPEC 5). With ``rng`` a random frame of each segment, borders
    included. An empty range counts as one frame; short ranges repeat frames.
    """
    assert n > 0
    last = max(end_frame - start_frame, 1) - 1
    edges = np.round(last / n * np.arange(n + 1)).astype(np.int64)
    middle = (edges[:-1] + edges[1:]) // 2 if rng is None else rng.integers(edges[:-1], edges[1:], endpoint=True)
    return np.clip(middle, 0, last) + start_frame


def frame_times(indices: np.ndarray, fps: float) -> np.ndarray:
    """Seconds at which each frame is surely on display: the middle of its interval, float64 [n].

    Asking for the middle rather than the start keeps rounding of time stamps from picking the neighbour.
    """
    return (np.asarray(indices, dtype=np.float64) + 0.5) / fps
