"""Boxes of single pictures become tracks: linked over time, short gaps filled, jitter smoothed, the camera taken out.

T sampled times; positions are shares of the picture, from the left and from the top.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from egohod.data.detections import EDGES, NO_CONTACT, UNKNOWN_STATE

SIDES = ("left", "right")
"""In the order of the sides' numbers in the table of detections."""
_AT_EDGE = 0.005  # a box that comes so close to the picture's edge is taken to be cut off by it


@dataclass(frozen=True)
class TrackParams:
    """How boxes become tracks."""

    min_score: float = 0.3
    """Boxes below are not looked at."""
    max_gap: float = 0.6
    """Longest time without a box that is bridged, in seconds; longer ones stay unknown."""
    smooth: float = 0.04
    """Width of the Gaussian that smooths jitter, in seconds: short, since a quick tap lasts a quarter of one."""
    max_jump: float = 0.35
    """Farthest that a box moves between two samples, in shares of the picture."""


@dataclass(frozen=True)
class Track:
    """One hand or object over the sampled times."""

    boxes: np.ndarray
    """As the detector gave them [T, 4], NaN where it gave none."""
    centre: np.ndarray
    """[T, 2] of the whole thing even where the picture cuts it off; gaps filled, smoothed, camera motion taken out."""
    extent: np.ndarray
    """Width and height of the whole thing [T, 2], gaps filled."""
    size: np.ndarray
    """Square root of the box's area [T]; NaN where the picture cuts it off or it is not seen."""
    state: np.ndarray
    """Contact state of a hand as the detector tells it, int [T]; ``UNKNOWN_STATE`` where it tells none."""
    target: np.ndarray
    """Where a touching hand's offset points to, [T, 2], camera motion taken out; NaN where it does not point."""
    score: float
    """Mean confidence where it was found."""
    name: str | None
    """Class of an object, where the detector tells one."""

    @property
    def seen(self) -> np.ndarray:
        """Where the detector found it, bool [T]."""
        return np.isfinite(self.boxes[:, 0])


@dataclass(frozen=True)
class Tracks:
    """All that is followed through one clip."""

    hands: dict[str, Track]
    """By side; a hand that is never found is absent."""
    objects: list[Track]


@dataclass(frozen=True)
class _Box:
    """One row of the table."""

    edges: np.ndarray
    score: float
    state: int
    offset: np.ndarray
    name: str | None

    @property
    def centre(self) -> np.ndarray:
        return (self.edges[:2] + self.edges[2:]) / 2


_Chain = dict[int, _Box]  # by sample


def build(
    rows: pa.Table, seconds: np.ndarray, shifts: np.ndarray | None = None, params: TrackParams | None = None
) -> Tracks:
    """Link the boxes of one clip.

    ``rows`` are in the schema of detections, ``seconds`` [T] the sampled times of its video, ascending; a row counts
    for the nearest of them, and is left out if that is farther than the samples lie apart. ``shifts`` [T, 2] is how far
    the scene has moved in the picture since the first sample (:func:`egohod.hod.tracking.camera_shifts`).
    """
    params = params or TrackParams()
    shifts = np.zeros((len(seconds), 2)) if shifts is None else shifts
    hands, objects = _by_moment(rows, seconds, params.min_score)

    def finish(chain: _Chain) -> Track:
        return _finished(chain, seconds, shifts, params)

    found = {side: _merged(_link(moments, params.max_jump)) for side, moments in zip(SIDES, hands, strict=True)}
    return Tracks(
        {side: finish(chain) for side, chain in found.items() if chain},
        [finish(chain) for chain in _link(objects, params.max_jump)],
    )


def guessed_object(hand: np.ndarray, side: str) -> np.ndarray:
    """Boxes of a hand [T, 4] -> where its object likely is, for want of an object detector [T, 4].

    A heuristic, not a detection: a box of the hand's size that lies at its fingers, half a hand up and a quarter
    inward, as hands enter an egocentric picture from below and from their own side.
    """
    width, height = hand[:, 2] - hand[:, 0], hand[:, 3] - hand[:, 1]
    inward = 0.25 * width * (1 if side == SIDES[0] else -1)
    moved = hand + np.stack([inward, -0.5 * height, inward, -0.5 * height], axis=1)
    return np.clip(moved, 0, 1)


def _by_moment(
    rows: pa.Table, seconds: np.ndarray, min_score: float
) -> tuple[list[list[list[_Box]]], list[list[_Box]]]:
    """Boxes by side and sample, and of objects by sample."""
    hands: list[list[list[_Box]]] = [[[] for _ in seconds] for _ in SIDES]
    objects: list[list[_Box]] = [[] for _ in seconds]
    unique = np.unique(seconds)
    near = np.diff(unique).max() / 2 if len(unique) > 1 else np.inf
    for row in rows.to_pylist():
        sample = int(np.argmin(np.abs(seconds - row["second"])))
        if row["score"] < min_score or abs(seconds[sample] - row["second"]) > near + 1e-6:
            continue
        offset = [np.nan if row[name] is None else row[name] for name in ("offset_x", "offset_y")]
        box = _Box(np.array([row[e] for e in EDGES]), row["score"], row["state"], np.array(offset), row["name"])
        (objects if row["kind"] == "object" else hands[row["side"]])[sample].append(box)
    return hands, objects


def _link(moments: list[list[_Box]], max_jump: float) -> list[_Chain]:
    """Boxes of successive samples joined to chains, the nearest first; the most certain chain comes first."""
    chains: list[_Chain] = []
    for sample, boxes in enumerate(moments):
        pairs = []
        for i, chain in enumerate(chains):
            last = max(chain)
            for j, box in enumerate(boxes):
                step = float(np.hypot(*(box.centre - chain[last].centre)))
                if step <= max_jump * (sample - last):
                    # The likelier of two equally near boxes, if one is sure and one is not.
                    pairs.append((step + 0.1 * (1 - box.score), i, j))
        taken_chains, taken_boxes = set[int](), set[int]()
        for _, i, j in sorted(pairs):
            if i not in taken_chains and j not in taken_boxes:
                chains[i][sample] = boxes[j]
                taken_chains.add(i)
                taken_boxes.add(j)
        chains += [{sample: box} for j, box in enumerate(boxes) if j not in taken_boxes]
    return sorted(chains, key=lambda chain: -sum(box.score for box in chain.values()))


def _merged(chains: list[_Chain]) -> _Chain:
    """One hand from the chains of its side: the surest one, and of others what lies where it was not seen."""
    whole: _Chain = {}
    for chain in chains:
        whole = chain | whole
    return whole


def _finished(chain: _Chain, seconds: np.ndarray, shifts: np.ndarray, params: TrackParams) -> Track:
    boxes, offset = np.full((len(seconds), 4), np.nan), np.full((len(seconds), 2), np.nan)
    state = np.full(len(seconds), UNKNOWN_STATE)
    for sample, box in chain.items():
        boxes[sample], offset[sample], state[sample] = box.edges, box.offset, box.state
    whole, cut = _completed(boxes)
    centre, extent = (whole[:, :2] + whole[:, 2:]) / 2 - shifts, whole[:, 2:] - whole[:, :2]
    size = np.where(cut, np.nan, np.sqrt(extent.prod(axis=1)))
    return Track(
        boxes=boxes,
        centre=_smoothed(_filled(centre, seconds, params.max_gap), seconds, params.smooth),
        extent=_filled(extent, seconds, params.max_gap),
        size=size,
        state=state,
        target=(boxes[:, :2] + boxes[:, 2:]) / 2 + offset - shifts,
        score=float(np.mean([box.score for box in chain.values()])),
        name=next((box.name for box in chain.values() if box.name), None),
    )


def _completed(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [T, 4] that the picture's edge cuts off, grown over it to their usual size; and which are cut [T]."""
    whole, cut = boxes.copy(), np.zeros(len(boxes), dtype=bool)
    for low, high in ((0, 2), (1, 3)):
        length = boxes[:, high] - boxes[:, low]
        at_low, at_high = boxes[:, low] < _AT_EDGE, boxes[:, high] > 1 - _AT_EDGE
        free = length[np.isfinite(length) & ~at_low & ~at_high]
        usual = np.median(free) if len(free) else np.nanmax(length)
        grown = np.maximum(length, usual)
        whole[at_low, low] = (boxes[:, high] - grown)[at_low]
        whole[at_high & ~at_low, high] = (boxes[:, low] + grown)[at_high & ~at_low]
        cut |= at_low | at_high
    return whole, cut


def _filled(values: np.ndarray, seconds: np.ndarray, max_gap: float) -> np.ndarray:
    """``values`` [T, 2] with gaps of at most ``max_gap`` seconds bridged by straight lines."""
    known = np.flatnonzero(np.isfinite(values[:, 0]))
    filled = values.copy()
    for before, after in itertools.pairwise(known):
        if after - before > 1 and seconds[after] - seconds[before] <= max_gap:
            share = (seconds[before + 1 : after] - seconds[before]) / max(seconds[after] - seconds[before], 1e-9)
            filled[before + 1 : after] = values[before] + share[:, None] * (values[after] - values[before])
    return filled


def _smoothed(values: np.ndarray, seconds: np.ndarray, width: float) -> np.ndarray:
    known = np.isfinite(values[:, 0])
    weight = np.exp(-0.5 * ((seconds[:, None] - seconds[None]) / max(width, 1e-9)) ** 2) * known
    smooth = weight @ np.nan_to_num(values) / np.maximum(weight.sum(axis=1, keepdims=True), 1e-12)
    return np.where(known[:, None], smooth, np.nan)


@dataclass(frozen=True)
class ContactParams:
    """What counts as touching."""

    overlap: float = 0.15
    """Least share of the smaller box that both cover."""
    apart: float = 0.35
    """Most that hand and object may move apart between two samples, as a share of the way that the hand goes."""
    jitter: float = 0.02
    """The same for hands that hardly move, in shares of the picture."""
    reach: float = 0.12
    """How far a hand's offset may miss the box that it points to, in shares of the picture."""


def touching(hand: Track, objects: list[Track], params: ContactParams) -> np.ndarray:
    """Whether the hand touches anything at each sample, bool [T]."""
    told = hand.state != UNKNOWN_STATE
    if told.any():
        return _bridged(hand.state > NO_CONTACT, told)
    touched = np.zeros(len(hand.state), dtype=bool)
    for each in objects:
        touched |= (overlap(hand, each) >= params.overlap) & _together(hand, each, params)
    return touched


def attached(hand: Track, thing: Track, touched: np.ndarray, params: ContactParams) -> np.ndarray:
    """Where a hand that is ``touched`` [T] touches this thing, bool [T]: it points there, else their boxes overlap."""
    miss = np.abs(hand.target - thing.centre) - thing.extent / 2
    points = np.isfinite(hand.target[:, 0])
    hits = (miss <= params.reach).all(axis=1)
    return touched & np.where(points, hits, (overlap(hand, thing) >= params.overlap) & _together(hand, thing, params))


def overlap(one: Track, other: Track) -> np.ndarray:
    """Common area of two things over the smaller one's [T]; 0 where either is unknown."""
    low = np.maximum(one.centre - one.extent / 2, other.centre - other.extent / 2)
    high = np.minimum(one.centre + one.extent / 2, other.centre + other.extent / 2)
    common = np.clip(high - low, 0, None).prod(axis=1)
    smaller = np.minimum(one.extent.prod(axis=1), other.extent.prod(axis=1))
    return np.nan_to_num(common / np.maximum(smaller, 1e-9))


def _together(hand: Track, thing: Track, params: ContactParams) -> np.ndarray:
    """Where the two do not move against each other, towards the next or from the last sample [T]."""
    own, relative = np.diff(hand.centre, axis=0), np.diff(hand.centre - thing.centre, axis=0)
    joint = np.hypot(*relative.T) <= np.maximum(params.apart * np.hypot(*own.T), params.jitter)
    if not len(joint):
        return np.ones(len(hand.centre), dtype=bool)
    return np.append(joint, False) | np.insert(joint, 0, False)


def _bridged(flags: np.ndarray, told: np.ndarray) -> np.ndarray:
    """``flags`` where nothing is told follow their neighbours if those agree."""
    places, known = np.arange(len(flags)), np.flatnonzero(told)
    before = known[np.clip(np.searchsorted(known, places, side="right") - 1, 0, None)]
    after = known[np.clip(np.searchsorted(known, places), None, len(known) - 1)]
    return np.where(told, flags, flags[before] & flags[after])


WIDTH = 96
"""Pictures are compared at this many columns; the parabola through the peak gives parts of one."""
REACH = 0.25
"""Largest motion between two samples that is looked for, in shares of the picture."""
_LEAST_SHARED = 0.2  # of the picture must be free of boxes in both, and overlap
_MUCH_ALIKE = 0.7
_FARNESS = 0.1  # correlation that a motion of REACH must be better by than none
_LEAST_LIKENESS = 0.3  # correlation below is chance: the pictures show different things, or nothing


def camera_shifts(pictures: np.ndarray, seconds: np.ndarray, rows: pa.Table) -> np.ndarray:
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
