"""Which frames of a clip: index arithmetic and nothing else."""

from __future__ import annotations

import numpy as np

# A shorter clip of a chunked video is widened to this, as upstream does (SPEC 5).
MIN_SECONDS = 1.0
RULES = ("middle", "upstream", "lavila", "avion")
"""How the published loaders turn seconds into frame numbers, see :func:`clip_indices`."""


def clip_indices(
    start: float,
    end: float,
    stop: float,
    fps: float,
    n: int,
    rng: np.random.Generator | None = None,
    rule: str = "middle",
    chunk_start: float | None = None,
) -> np.ndarray:
    """``n`` frame numbers of [start, end) seconds of a video that ends at ``stop``, ascending, int64 [n].

    ``chunk_start`` is the second at which the chunk that holds ``start`` begins, None for a whole file. First the range
    of frames [a, b), never beyond the video's last frame:

    - *middle* (this project's): a = round(start * fps), b = round(end * fps);
    - *upstream*: the same in chunks; in whole files b = a + max(int((end - start) * fps), n): at least n frames;
    - *avion*: as upstream, but a frame early where a clip ends with the last chunk it touches or later;
    - *lavila*: b = round(start * fps) and ceil(end * fps) in whole files; in chunks as upstream's whole files, with
      frames counted from the start of the chunk.

    Then one frame for each of n segments of it, see :func:`segment_indices`; for *avion* :func:`floored_midpoints`.
    Without exception numbers are rounded half to even, counted from the start of the video: rounding within a chunk
    picks another frame for 0.6 % (30 fps) to 1.8 % (25 fps) of clips whose times have milliseconds.
    """
    assert rule in RULES, rule
    whole = chunk_start is None
    if rule == "avion" and not whole:
        stop -= 1 / fps
    end = min(end, stop)
    if rule == "lavila" and not whole:
        assert chunk_start is not None
        first = round((start - chunk_start) * fps) + round(chunk_start * fps)
    else:
        first = round(start * fps)
    if rule == "lavila" and whole:
        # Rounded up, a clip that was cut at the video's end may pass it: 749 / 29.97 * 29.97 is more than 749.
        last = min(int(np.ceil(end * fps)), round(stop * fps))
    elif rule == "middle" or (rule in ("upstream", "avion") and not whole):
        last = round(end * fps)
    else:
        last = min(first + max(int((end - start) * fps), n), round(stop * fps))
    return (floored_midpoints if rule == "avion" else segment_indices)(first, last, n, rng)


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


def floored_midpoints(start_frame: int, end_frame: int, n: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """``n`` frame numbers, the floored midpoints of ``n`` equal parts of [start_frame, end_frame), int64 [n].

    AVION's rule. With ``rng`` each midpoint is moved by up to half of (end - start - 1) / n to either side. An empty
    range counts as one frame.
    """
    assert n > 0
    end_frame = max(end_frame, start_frame + 1)
    edges = np.linspace(start_frame, end_frame, n + 1)
    middle = 0.5 * edges[:-1] + 0.5 * edges[1:]
    if rng is not None:
        middle += (rng.random(n) - 0.5) * (end_frame - start_frame - 1) / n
    return np.clip(np.floor(middle).astype(np.int64), start_frame, end_frame - 1)


def frame_times(indices: np.ndarray, fps: float) -> np.ndarray:
    """Seconds at which each frame is surely on display: the middle of its interval, float64 [n].

    Asking for the middle rather than the start keeps rounding of time stamps from picking the neighbour.
    """
    return (np.asarray(indices, dtype=np.float64) + 0.5) / fps
