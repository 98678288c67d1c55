"""Detections of single frames -> tracks of hands and objects, camera motion, and when hands touch things.

T sampled times; positions are shares of the picture, from the left and from the top.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from egohod.data.detections import EDGES, NO_CONTACT, UNKNOWN_STATE

SIDES = ("left", "right")  # in the order of the sides' numbers in the table of detections
_AT_EDGE = 0.005  # a box that comes so close to the picture's edge is assumed to be cut off by it

# --- Tracks ---


@dataclass(frozen=True)
class TrackParams:
    """How boxes become tracks."""

    min_score: float = 0.3  # boxes with a lower confidence are ignored
    max_gap: float = 0.6  # longest time without a box that is interpolated, in seconds; longer ones stay unknown
    smooth: float = 0.04  # width of the Gaussian that smooths jitter, in seconds; a quick tap lasts a quarter of one
    max_jump: float = 0.35  # farthest that a box moves between two samples, in shares of the picture


@dataclass(frozen=True)
class Track:
    """One hand or object over the sampled times."""

    boxes: np.ndarray  # [T, 4] of the detector, NaN where it found none
    # [T, 2] of the whole thing even where the picture cuts it off; gaps filled, smoothed, camera motion removed
    centre: np.ndarray
    extent: np.ndarray  # [T, 2] width and height of the whole thing, gaps filled
    size: np.ndarray  # [T] square root of the box's area; NaN where the picture cuts it off or it is not detected
    state: np.ndarray  # int [T] contact state of a hand; UNKNOWN_STATE where the detector gives none
    target: np.ndarray  # [T, 2] where a touching hand's offset points, camera motion removed; NaN without offset
    score: float  # mean confidence of its detections
    name: str | None  # class of an object, where the detector gives one

    @property
    def seen(self) -> np.ndarray:
        """Where it was detected, bool [T]."""
        return np.isfinite(self.boxes[:, 0])


@dataclass(frozen=True)
class Tracks:
    """Hands and objects of one clip."""

    hands: dict[str, Track]  # by side, without hands that are never detected
    objects: list[Track]


@dataclass(frozen=True)
class _Box:
    """One row of the table of detections."""

    edges: np.ndarray
    score: float
    state: int
    offset: np.ndarray
    name: str | None


_Chain = dict[int, _Box]  # by sample


def build(
    rows: pa.Table, seconds: np.ndarray, shifts: np.ndarray | None = None, params: TrackParams | None = None
) -> Tracks:
    """Link the boxes of one clip over time.

    ``rows`` are in the schema of detections, ``seconds`` [T] the sampled times of its video, ascending; a row belongs
    to the nearest of them, and is ignored if that is farther than the samples are apart. ``shifts`` [T, 2] is the
    motion of the scene in the picture since the first sample (:func:`camera_shifts`).
    """
    params = params or TrackParams()
    shifts = np.zeros((len(seconds), 2)) if shifts is None else shifts
    hands: list[list[list[_Box]]] = [[[] for _ in seconds] for _ in SIDES]  # by side and sample
    objects: list[list[_Box]] = [[] for _ in seconds]
    unique = np.unique(seconds)
    near = np.diff(unique).max() / 2 if len(unique) > 1 else np.inf
    for row in rows.to_pylist():
        sample = int(np.argmin(np.abs(seconds - row["second"])))
        # The microsecond: times of detections went through text and rounding.
        if row["score"] < params.min_score or abs(seconds[sample] - row["second"]) > near + 1e-6:
            continue
        offset = [np.nan if row[name] is None else row[name] for name in ("offset_x", "offset_y")]
        box = _Box(np.array([row[e] for e in EDGES]), row["score"], row["state"], np.array(offset), row["name"])
        (objects if row["kind"] == "object" else hands[row["side"]])[sample].append(box)
    tracks = {}
    for side, samples in zip(SIDES, hands, strict=True):
        # There is one hand a side: the most confident chain, completed by others where that has no box.
        whole: _Chain = {}
        for chain in _link(samples, params.max_jump):
            whole = chain | whole
        if whole:
            tracks[side] = _track(whole, seconds, shifts, params)
    return Tracks(tracks, [_track(chain, seconds, shifts, params) for chain in _link(objects, params.max_jump)])


def _link(samples: list[list[_Box]], max_jump: float) -> list[_Chain]:
    """Join boxes of successive samples to chains, the nearest pairs first; the most confident chain comes first."""
    chains: list[_Chain] = []
    for sample, boxes in enumerate(samples):
        pairs = []
        for i, chain in enumerate(chains):
            last = max(chain)
            before = chain[last].edges
            for j, box in enumerate(boxes):
                moved = (box.edges[:2] + box.edges[2:]) / 2 - (before[:2] + before[2:]) / 2
                step = float(np.hypot(*moved))
                if step <= max_jump * (sample - last):
                    # Of two equally near boxes the one with the higher confidence.
                    pairs.append((step + 0.1 * (1 - box.score), i, j))
        # Greedy, not the optimal assignment: a box that jumps must not take the partner of one that stays.
        linked_chains, linked_boxes = set[int](), set[int]()
        for _, i, j in sorted(pairs):
            if i not in linked_chains and j not in linked_boxes:
                chains[i][sample] = boxes[j]
                linked_chains.add(i)
                linked_boxes.add(j)
        chains += [{sample: box} for j, box in enumerate(boxes) if j not in linked_boxes]
    return sorted(chains, key=lambda chain: -sum(box.score for box in chain.values()))


def _track(chain: _Chain, seconds: np.ndarray, shifts: np.ndarray, params: TrackParams) -> Track:
    """Complete, fill and smooth the boxes of one thing."""
    boxes, offset = np.full((len(seconds), 4), np.nan), np.full((len(seconds), 2), np.nan)
    state = np.full(len(seconds), UNKNOWN_STATE)
    for sample, box in chain.items():
        boxes[sample], offset[sample], state[sample] = box.edges, box.offset, box.state
    # A hand that leaves the picture shrinks to a strip at its edge. Grown over the edge to its usual size it keeps its
    # centre: otherwise leaving to the right would look like stopping, and the change of size like motion in depth.
    whole, is_cut = boxes.copy(), np.zeros(len(boxes), dtype=bool)
    for low, high in ((0, 2), (1, 3)):
        length = boxes[:, high] - boxes[:, low]
        at_low, at_high = boxes[:, low] < _AT_EDGE, boxes[:, high] > 1 - _AT_EDGE
        free = length[np.isfinite(length) & ~at_low & ~at_high]
        grown = np.maximum(length, np.median(free) if len(free) else np.nanmax(length))
        whole[at_low, low] = (boxes[:, high] - grown)[at_low]
        whole[at_high & ~at_low, high] = (boxes[:, low] + grown)[at_high & ~at_low]
        is_cut |= at_low | at_high
    extent = whole[:, 2:] - whole[:, :2]
    size = np.where(is_cut, np.nan, np.sqrt(extent.prod(axis=1)))
    centre = _fill_gaps((whole[:, :2] + whole[:, 2:]) / 2 - shifts, seconds, params.max_gap)
    # Gaussian smoothing over time with weights renormalised where samples are missing.
    finite = np.isfinite(centre[:, 0])
    weight = np.exp(-0.5 * ((seconds[:, None] - seconds[None]) / max(params.smooth, 1e-9)) ** 2) * finite
    smooth = weight @ np.nan_to_num(centre) / np.maximum(weight.sum(axis=1, keepdims=True), 1e-12)
    return Track(
        boxes=boxes,
        centre=np.where(finite[:, None], smooth, np.nan),
        extent=_fill_gaps(extent, seconds, params.max_gap),
        size=size,
        state=state,
        target=(boxes[:, :2] + boxes[:, 2:]) / 2 + offset - shifts,
        score=float(np.mean([box.score for box in chain.values()])),
        name=next((box.name for box in chain.values() if box.name), None),
    )


def _fill_gaps(values: np.ndarray, seconds: np.ndarray, max_gap: float) -> np.ndarray:
    """``values`` [T, 2] with gaps of at most ``max_gap`` seconds interpolated linearly."""
    filled = values.copy()
    for before, after in itertools.pairwise(np.flatnonzero(np.isfinite(values[:, 0]))):
        if after - before > 1 and seconds[after] - seconds[before] <= max_gap:
            share = (seconds[before + 1 : after] - seconds[before]) / max(seconds[after] - seconds[before], 1e-9)
            filled[before + 1 : after] = values[before] + share[:, None] * (values[after] - values[before])
    return filled


def guess_object(hand: np.ndarray, side: str) -> np.ndarray:
    """Boxes of a hand [T, 4] -> where its object likely is, for want of an object detector [T, 4].

    A heuristic, not a detection: a box of the hand's size at its fingers, half a hand up and a quarter inward, as hands
    enter an egocentric picture from below and from their own side.
    """
    width, height = hand[:, 2] - hand[:, 0], hand[:, 3] - hand[:, 1]
    inward = 0.25 * width * (1 if side == SIDES[0] else -1)
    moved = hand + np.stack([inward, -0.5 * height, inward, -0.5 * height], axis=1)
    return np.clip(moved, 0, 1)


# --- Contact ---


@dataclass(frozen=True)
class ContactParams:
    """What counts as touching."""

    overlap: float = 0.15  # least intersection over the smaller box's area
    apart: float = 0.35  # most relative motion of hand and object between two samples, as a share of the hand's own
    jitter: float = 0.02  # the same for hands that hardly move, in shares of the picture
    reach: float = 0.12  # how far a hand's offset may miss the box that it points to, in shares of the picture


def touching(hand: Track, objects: list[Track], params: ContactParams) -> np.ndarray:
    """Whether the hand touches anything, bool [T]: by the detector's contact state, without one by overlap."""
    has_state = hand.state != UNKNOWN_STATE
    if not has_state.any():
        touched = np.zeros(len(hand.state), dtype=bool)
        for each in objects:
            touched |= _overlaps_and_follows(hand, each, params)
        return touched
    # Samples without a state follow their neighbours if those agree: a dropped frame is no release.
    flags, valid = hand.state > NO_CONTACT, np.flatnonzero(has_state)
    places = np.arange(len(flags))
    before = valid[np.clip(np.searchsorted(valid, places, side="right") - 1, 0, None)]
    after = valid[np.clip(np.searchsorted(valid, places), None, len(valid) - 1)]
    return np.where(has_state, flags, flags[before] & flags[after])


def attached(hand: Track, thing: Track, touched: np.ndarray, params: ContactParams) -> np.ndarray:
    """Where a hand that is ``touched`` [T] touches this thing, bool [T]: by its offset, without one by overlap."""
    miss = np.abs(hand.target - thing.centre) - thing.extent / 2
    has_offset = np.isfinite(hand.target[:, 0])
    hits = (miss <= params.reach).all(axis=1)
    return touched & np.where(has_offset, hits, _overlaps_and_follows(hand, thing, params))


def _overlaps_and_follows(hand: Track, thing: Track, params: ContactParams) -> np.ndarray:
    """Where the boxes overlap and do not move relative to each other, to the next or from the last sample [T].

    Overlap alone is no contact: a hand that passes over a cup covers it too, but leaves it behind.
    """
    low = np.maximum(hand.centre - hand.extent / 2, thing.centre - thing.extent / 2)
    high = np.minimum(hand.centre + hand.extent / 2, thing.centre + thing.extent / 2)
    common = np.clip(high - low, 0, None).prod(axis=1)
    smaller = np.minimum(hand.extent.prod(axis=1), thing.extent.prod(axis=1))
    # NaN, where either is unknown, is no overlap.
    overlaps = np.nan_to_num(common / np.maximum(smaller, 1e-9)) >= params.overlap
    own, relative = np.diff(hand.centre, axis=0), np.diff(hand.centre - thing.centre, axis=0)
    follows = np.hypot(*relative.T) <= np.maximum(params.apart * np.hypot(*own.T), params.jitter)
    if not len(follows):  # a single sample has no motion
        return overlaps
    return overlaps & (np.append(follows, False) | np.insert(follows, 0, False))


# --- Camera motion ---

_WIDTH = 96  # pictures are compared at this many columns; the parabola through the peak gives fractions of one
_REACH = 0.25  # largest motion between two samples that is searched, in shares of the picture
_MIN_SHARED = 0.2  # share of the picture that must be free of boxes in both, and overlap
_SIMILAR = 0.7  # correlation above which the reference frame is kept
_FAR_PENALTY = 0.1  # correlation that a motion of _REACH must gain over none
_MIN_CORRELATION = 0.3  # below, the correlation is chance: the pictures show different things, or nothing


def camera_shifts(pictures: np.ndarray, seconds: np.ndarray, rows: pa.Table) -> np.ndarray:
    """Pictures uint8 [T, H, W, 3] seen at ``seconds`` [T] -> place of the scene since the first one [T, 2].

    Shares of width and height; subtract them from positions to remove the camera's motion. ``rows``, in the schema of
    detections, mask what moves by itself: objects, hands, and the arms below them. The translation between two pictures
    maximises their masked normalised cross-correlation (Padfield, "Masked object registration in the Fourier domain",
    2012) over shifts up to a quarter of the picture; pictures that nowhere correlate count as not moved.
    """
    height = max(8, round(_WIDTH * pictures.shape[1] / pictures.shape[2]))
    small = [
        np.asarray(Image.fromarray(each).convert("L").resize((_WIDTH, height), Image.Resampling.BOX), dtype=np.float64)
        for each in pictures
    ]
    masks = [np.ones((height, _WIDTH)) for _ in small]
    for row in rows.to_pylist():
        mask = masks[int(np.argmin(np.abs(seconds - row["second"])))]
        left, right = row["left"] * _WIDTH, row["right"] * _WIDTH
        # Arms come from below, and are about as wide as hands.
        bottom = height if row["kind"] == "hand" else row["bottom"] * height
        mask[int(row["top"] * height) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = 0
    places, reference = np.zeros((len(small), 2)), 0
    for i in range(1, len(small)):
        moved, correlation = _translation(small[reference], masks[reference], small[i], masks[i])
        # One reference as long as it is similar: chained from frame to frame the errors would add up.
        if reference < i - 1 and (correlation < _SIMILAR or np.abs(moved).max() > _REACH / 2):
            reference = i - 1
            moved, correlation = _translation(small[reference], masks[reference], small[i], masks[i])
        places[i] = places[reference] + (moved if correlation >= _MIN_CORRELATION else 0)
    return places


# Our own: skimage's masked registration wants scikit-image for this alone and finds whole pixels only, and OpenCV's
# phase correlation takes no masks, without which a hand that fills half of the picture is taken for the scene.
def _translation(
    one: np.ndarray, one_mask: np.ndarray, two: np.ndarray, two_mask: np.ndarray
) -> tuple[np.ndarray, float]:
    """How far ``two`` [h, w] is from ``one``, in shares of width and height [2], and their correlation there."""
    size = np.array(one.shape)
    reach = np.floor(_REACH * size).astype(int)
    padded = [int(each) for each in size + reach]
    # Around its mean the sums of squares stay small, and with them the rounding of the transforms.
    one, two = (one - one.mean()) * one_mask, (two - two.mean()) * two_mask
    first, second = (
        [np.fft.rfft2(each, padded) for each in (picture, picture**2, mask)]
        for picture, mask in ((one, one_mask), (two, two_mask))
    )

    def sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Sums of a * b over the common part at every shift of b."""
        whole = np.fft.irfft2(np.conj(a) * b, padded)
        rows, columns = (np.arange(-n, n + 1) for n in reach)
        return whole[np.ix_(rows, columns)]

    count = sums(first[2], second[2])
    shared = np.maximum(np.round(count), 1)
    mean_one, mean_two = sums(first[0], second[2]), sums(first[2], second[0])
    cross = sums(first[0], second[0]) - mean_one * mean_two / shared
    spread = (sums(first[1], second[2]) - mean_one**2 / shared) * (sums(first[2], second[1]) - mean_two**2 / shared)
    # Where both are flat, rounding would be divided by rounding.
    enough = (count >= _MIN_SHARED * one.size) & (spread > 1e-6 * max(float(spread.max()), 1.0))
    correlation = np.where(enough, cross / np.sqrt(np.maximum(spread, 1e-12)), -1.0)
    # Of two places with a similar correlation the nearer one: tiles and grain repeat.
    far = np.hypot(*np.meshgrid(*(np.linspace(-1, 1, n) for n in correlation.shape), indexing="ij"))
    best = np.unravel_index(int(np.argmax(correlation - _FAR_PENALTY * far)), correlation.shape)
    row, column = (int(each) for each in best)
    peak = np.array([column + _vertex(correlation[row], column), row + _vertex(correlation[:, column], row)])
    return (peak - reach[::-1]) / size[::-1], float(correlation[row, column])


def _vertex(values: np.ndarray, peak: int) -> float:
    """Where the parabola through a peak and its neighbours has its top, from the peak, -0.5 to 0.5."""
    if not 0 < peak < len(values) - 1:
        return 0.0
    before, at, after = values[peak - 1 : peak + 2]
    bend = before - 2 * at + after
    # A neighbour of -1 has no correlation: no parabola goes through it.
    return float(np.clip(0.5 * (before - after) / bend, -0.5, 0.5)) if bend < -1e-12 and before > -1 < after else 0.0
