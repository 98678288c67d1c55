"""Facts of a clip measured from its tracks: who acts on what, how it moves, when hands touch things and let go.

Narrators caption them, the check compares captions with them. Positions are shares of the picture (x from the left, y
from the top), with the camera's own motion removed; times are seconds from the clip's start; speeds are picture widths
a second. Distances in metres are estimates, with the usual size of the hand's box as their ruler, or true ones where
there are 3-D hands (:mod:`egohod.hod.hands3d`). Sides are the wearer's: ``left`` is their left hand.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from egohod.data.detections import EDGES, NO_CONTACT, OTHER_PERSON, SELF_CONTACT, STATIONARY_OBJECT, UNKNOWN_STATE
from egohod.hod.camera import move_boxes
from egohod.hod.config import TracksConfig

SIDES = ("left", "right")  # in the order of the sides' numbers in the table of detections
_AT_EDGE = 0.005  # a box that comes so close to the picture's edge is assumed to be cut off by it

# --- Tracks ---


@dataclass(frozen=True)
class Track:
    """One hand or object over the sampled times."""

    boxes: np.ndarray  # [T, 4] of the detector, NaN where there is none
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
class _Box:
    """One row of the table of detections."""

    edges: np.ndarray
    score: float
    state: int
    offset: np.ndarray
    name: str | None


_Chain = dict[int, _Box]  # by sample


def _build_tracks(
    rows: pa.Table, seconds: np.ndarray, camera: np.ndarray, params: TracksConfig
) -> tuple[dict[str, Track], list[Track]]:
    """Link the boxes of one clip over time: hands by side, without those that are never detected, and objects.

    A row belongs to the nearest of ``seconds`` [T], which ascend without repeats, and is ignored if that is farther
    than the samples are apart. ``camera`` [T, 3, 3] is as for :func:`facts_of`.
    """
    hands: list[list[list[_Box]]] = [[[] for _ in seconds] for _ in SIDES]  # by side and sample
    objects: list[list[_Box]] = [[] for _ in seconds]
    near = np.diff(seconds).max() / 2 if len(seconds) > 1 else np.inf
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
            tracks[side] = _track(whole, seconds, camera, params)
    return tracks, [_track(chain, seconds, camera, params) for chain in _link(objects, params.max_jump)]


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


def _track(chain: _Chain, seconds: np.ndarray, camera: np.ndarray, params: TracksConfig) -> Track:
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
    centre, extent = move_boxes(camera, (whole[:, :2] + whole[:, 2:]) / 2, whole[:, 2:] - whole[:, :2])
    size = np.where(is_cut, np.nan, np.sqrt(extent.prod(axis=1)))
    return Track(
        boxes=boxes,
        centre=_smooth_path(centre, seconds, params),
        extent=_fill_gaps(extent, seconds, params.max_gap),
        size=size,
        state=state,
        target=move_boxes(camera, (boxes[:, :2] + boxes[:, 2:]) / 2 + offset, np.zeros_like(offset))[0],
        score=float(np.mean([box.score for box in chain.values()])),
        name=next((box.name for box in chain.values() if box.name), None),
    )


def _smooth_path(path: np.ndarray, seconds: np.ndarray, params: TracksConfig) -> np.ndarray:
    """A path [T, N] with short gaps filled, smoothed over time; NaN in longer gaps."""
    filled = _fill_gaps(path, seconds, params.max_gap)
    # Gaussian, with weights renormalised where samples are missing.
    finite = np.isfinite(filled[:, 0])
    weight = np.exp(-0.5 * ((seconds[:, None] - seconds[None]) / max(params.smooth, 1e-9)) ** 2) * finite
    smooth = weight @ np.nan_to_num(filled) / np.maximum(weight.sum(axis=1, keepdims=True), 1e-12)
    return np.where(finite[:, None], smooth, np.nan)


def _fill_gaps(values: np.ndarray, seconds: np.ndarray, max_gap: float) -> np.ndarray:
    """``values`` [T, N] with gaps of at most ``max_gap`` seconds interpolated linearly."""
    filled = values.copy()
    for before, after in itertools.pairwise(np.flatnonzero(np.isfinite(values[:, 0]))):
        if after - before > 1 and seconds[after] - seconds[before] <= max_gap:
            share = (seconds[before + 1 : after] - seconds[before]) / max(seconds[after] - seconds[before], 1e-9)
            filled[before + 1 : after] = values[before] + share[:, None] * (values[after] - values[before])
    return filled


def _guess_object(hand: np.ndarray, side: str) -> np.ndarray:
    """Boxes of a hand [T, 4] -> where its object likely is, for want of an object detector [T, 4].

    A heuristic, not a detection: a box of the hand's size at its fingers, half a hand up and a quarter inward, as hands
    enter an egocentric picture from below and from their own side.
    """
    width, height = hand[:, 2] - hand[:, 0], hand[:, 3] - hand[:, 1]
    inward = 0.25 * width * (1 if side == SIDES[0] else -1)
    moved = hand + np.stack([inward, -0.5 * height, inward, -0.5 * height], axis=1)
    return np.clip(moved, 0, 1)


# --- Contact ---


_OVERLAP = 0.15  # least intersection over the smaller box's area of a hand and what it touches
_APART = 0.35  # most relative motion of the two between two samples, as a share of the hand's own
_JITTER = 0.02  # the same for hands that hardly move, in shares of the picture
_POINTING = 0.12  # how far a hand's offset may miss the box that it points to, in shares of the picture


def _touching(hand: Track, objects: list[Track]) -> np.ndarray:
    """Whether the hand touches anything, bool [T]: by the detector's contact state, without one by overlap."""
    has_state = hand.state != UNKNOWN_STATE
    if not has_state.any():
        touched = np.zeros(len(hand.state), dtype=bool)
        for each in objects:
            touched |= _overlaps_and_follows(hand, each)
        return touched
    # Samples without a state follow their neighbours if those agree: a dropped frame is no release.
    flags, valid = hand.state > NO_CONTACT, np.flatnonzero(has_state)
    places = np.arange(len(flags))
    before = valid[np.clip(np.searchsorted(valid, places, side="right") - 1, 0, None)]
    after = valid[np.clip(np.searchsorted(valid, places), None, len(valid) - 1)]
    return np.where(has_state, flags, flags[before] & flags[after])


def _touches_thing(hand: Track, thing: Track, touched: np.ndarray) -> np.ndarray:
    """Where a hand that is ``touched`` [T] touches this thing, bool [T]: by its offset, without one by overlap."""
    miss = np.abs(hand.target - thing.centre) - thing.extent / 2
    has_offset = np.isfinite(hand.target[:, 0])
    hits = (miss <= _POINTING).all(axis=1)
    return touched & np.where(has_offset, hits, _overlaps_and_follows(hand, thing))


def _overlaps_and_follows(hand: Track, thing: Track) -> np.ndarray:
    """Where the boxes overlap and do not move relative to each other, to the next or from the last sample [T].

    Overlap alone is no contact: a hand that passes over a cup covers it too, but leaves it behind.
    """
    low = np.maximum(hand.centre - hand.extent / 2, thing.centre - thing.extent / 2)
    high = np.minimum(hand.centre + hand.extent / 2, thing.centre + thing.extent / 2)
    common = np.clip(high - low, 0, None).prod(axis=1)
    smaller = np.minimum(hand.extent.prod(axis=1), thing.extent.prod(axis=1))
    # NaN, where either is unknown, is no overlap.
    overlaps = np.nan_to_num(common / np.maximum(smaller, 1e-9)) >= _OVERLAP
    own, relative = np.diff(hand.centre, axis=0), np.diff(hand.centre - thing.centre, axis=0)
    follows = np.hypot(*relative.T) <= np.maximum(_APART * np.hypot(*own.T), _JITTER)
    if not len(follows):  # a single sample has no motion
        return overlaps
    return overlaps & (np.append(follows, False) | np.insert(follows, 0, False))


_FLICKER = 0.2  # a contact, or an end of it, that is shorter in seconds, or is seen in a single sample, is flicker


def _grasps(hand: Track, thing: Track, touched: np.ndarray, holds: np.ndarray, times: np.ndarray) -> list[slice]:
    """The samples of each time that a hand holds a thing, in order, without the detector's flicker.

    ``touched`` [T] where it touches anything, ``holds`` [T] where it touches this thing. It lets go only where that is
    seen: a frame without the hand, or without the thing that a closed hand holds, is no release.
    """
    lets_go = ~holds & hand.seen & (thing.seen | ~touched)
    grasps: list[slice] = []
    for sample in np.flatnonzero(holds).tolist():
        if grasps:
            last = grasps[-1].stop - 1
            if lets_go[last + 1 : sample].sum() < 2 or times[sample] - times[last] <= _FLICKER:
                grasps[-1] = slice(grasps[-1].start, sample + 1)
                continue
        grasps.append(slice(sample, sample + 1))
    return [each for each in grasps if times[each.stop - 1] - times[each.start] >= _FLICKER]


# --- Words ---


LEFT, RIGHT = SIDES
UP, DOWN, AWAY, CLOSER = "up", "down", "away", "closer"  # away and closer are along the line of sight
CLOCKWISE, COUNTERCLOCKWISE, STILL, SHAKING = "clockwise", "counterclockwise", "still", "back and forth"
PARALLEL, MIRRORED = "parallel", "mirrored"


# The results of runs hold these fields by name: a renamed one would make every cached result unreadable.
@dataclass(frozen=True)
class Motion:
    """How one thing moves."""

    path: np.ndarray  # [T, 2] centre of the box; NaN where unknown even after filling gaps
    size: np.ndarray  # [T] square root of the box's area, as a share of the picture; NaN where unknown
    # Its legs in order, in the words above: a wipe that goes left and comes back is (left, right); (still,) at rest
    directions: tuple[str, ...]
    repeats: int  # how often the motion recurs: two quick taps are 2; 1 for everything that does not recur
    speed: float  # mean while it moves
    start_region: str  # where it is first detected: one of nine words such as "upper left", "centre"
    end_region: str
    # Length of its legs in metres, and metres a second while it moves; None where no hand's size is known. Estimated
    # from the size of the hand's box unless is_metric: then from 3-D hands.
    distance: float | None = None
    pace: float | None = None
    is_metric: bool = False

    @property
    def is_moving(self) -> bool:
        """Whether it moves at all."""
        return self.directions not in ((STILL,), ())


@dataclass(frozen=True)
class HandFacts:
    """One hand of a clip."""

    side: str
    seen: float  # share of the sampled frames in which it was detected
    motion: Motion
    contact: float | None  # when it first touches something, 0.0 if from the start; None where it touches nothing
    release: float | None  # when it lets go, if it does before the clip ends
    approach: float | None  # when it starts to move towards what it then touches
    # object (the clip's active object), other object, surface, other hand or other person; None where nothing is
    # touched, and where the detector gives neither contact states nor objects
    touches: str | None
    # Of the acting hand while it touches something: "onto" or "off" the active object, as with a lid
    relation: str | None = None
    regrasps: tuple[float, ...] = ()  # when it takes hold of the active object again, after it let go of it
    # Usual size of its box in picture widths, the ruler; the other hand's if it is always cut off, None if that is too
    size: float | None = None
    grasp: str | None = None  # with 3-D hands: open, closed, opening or closing


@dataclass(frozen=True)
class ObjectFacts:
    """The active object of a clip."""

    name: str | None  # its class, where the detector gives one
    guessed: bool  # whether its box is the heuristic at the hand, for want of an object detector
    motion: Motion


@dataclass(frozen=True)
class PairFacts:
    """What two detected hands do together."""

    moves: str | None  # PARALLEL, both the same way, or MIRRORED, one the way of the other in a mirror; else None
    steadies: str | None  # side of the hand that holds a thing still while the other one works with something
    shares: bool  # whether both hold the active object at the same time
    handed_to: str | None  # side that takes over the active object from the other hand


@dataclass(frozen=True)
class ClipFacts:
    """All facts of one clip."""

    video_id: str
    start: float  # of the clip in its video, seconds
    end: float
    times: np.ndarray  # [T] the sampled times, seconds from the clip's start
    hands: dict[str, HandFacts]  # by side, without hands that are never detected
    object: ObjectFacts | None
    acting: str | None  # side of the hand that touches the active object, else of the one that moves most
    hands_together: str | None  # of two detected hands: apart, together, closing or parting
    pair: PairFacts | None = None  # of two detected hands


def without_rare(facts: ClipFacts, min_seen: float) -> ClipFacts:
    """The facts without hands that were detected in a smaller share of the frames: captions may not mention these."""
    hands = {side: hand for side, hand in facts.hands.items() if hand.seen >= min_seen}
    if len(hands) == len(facts.hands):
        return facts
    acting = facts.acting if facts.acting in hands else None
    return replace(facts, hands=hands, acting=acting, hands_together=None, pair=None)


# --- Facts. The thresholds were tuned on the demo world's val split; lengths are in picture widths ---

# What moves less than this share of its own size, or of the hand's, is still. By the hand and not by the picture, so
# that the same motion has the same words from near and far.
_STILL = 0.3
_LEAST = 0.05  # where the hand's size is not known: what moves less than this is still
_DEPTH = 0.25  # decrease of the logarithm of the size per picture width of way up, from which up means away
_ROUND_AREA = 0.4  # a turn's area, relative to the ellipse of its width and height: a line 0, an ellipse 1
_ROUND_ASPECT = 0.35  # shorter over longer side of a turn
_LEG = 0.8  # least length of a leg, in what a thing moves at least if it is not still
_MINOR = 0.35  # legs shorter than this share of the longest one are ignored
_SHAKES = 5  # so many legs to and fro are a shake; two quick taps have four
# Of a hand that touches something for this share of the clip the motion meanwhile counts: it handles the thing. A
# briefer touch (a tap) is part of a motion, and the whole clip counts.
_HELD = 0.3
_OFF = 0.5  # least way, in their mean size, by which a hand that touches a thing moves onto or off it
_NEAR = 1.2  # hands closer than this many of their sizes are together
_SAME = 0.85  # correlation of two paths around their middles from which hands move the same way, or mirrored
_UNEQUAL = 2  # most that one of these moves farther than the other
_STEADY = 0.5  # least share of the clip in which a hand touches a thing that it steadies
_HAND_OVER = 0.5  # seconds within which the other hand takes what is handed to it; later it was put down first
# Mean distance of four fingertips from the wrist in lengths of the palm: a flat hand has 1.9, a fist 1.
_OPEN, _CLOSED, _OPENING = 1.6, 1.3, 0.25
_PALM, _TIPS = 9, (8, 12, 16, 20)  # the middle finger's knuckle, and fingertips without the thumb's


class _Ruler(NamedTuple):
    """What lengths are measured with: the usual size of a hand's box."""

    size: float  # picture widths; NaN where no hand's is known
    metres: float

    def still(self, own: float = 0.0) -> float:
        """How far a thing of the size ``own`` moves at least if it is not still, in picture widths."""
        return _STILL * max(own, self.size) if self.size > 0 else max(_LEAST, _STILL * own)


def facts_of(
    rows: pa.Table,
    seconds: np.ndarray,
    *,
    video_id: str,
    start: float,
    end: float,
    aspect: float = 4 / 3,
    camera: np.ndarray | None = None,
    joints: np.ndarray | None = None,
    focal: float = np.nan,
    params: TracksConfig | None = None,
) -> ClipFacts:
    """Facts from the detections of one clip.

    ``rows`` are the clip's boxes in the schema of detections, ``seconds`` [T] the sampled times of the video, ascending
    (repeats are ignored), ``aspect`` the picture's width over its height, and ``camera`` [T, 3, 3] the maps from places
    in each picture to those in the first (:func:`~egohod.hod.camera.camera_transforms`), None to leave the camera's
    motion in. Without any box there are no hands and no object.

    ``joints`` [T, 2, 21, 3] are 3-D hands by side, see :meth:`egohod.hod.hands3d.Hands3d.at`; NaN or None where there
    are none. ``focal`` is the camera's focal length in longer sides of the picture, without which its motion is left
    in their paths.
    """
    params = params or TracksConfig()
    seconds, first = np.unique(seconds, return_index=True)
    camera = np.tile(np.eye(3), (len(seconds), 1, 1)) if camera is None else camera[first]
    tracks, objects = _build_tracks(rows, seconds, camera, params)
    times = seconds - start

    # --- Rulers: the usual size of each hand; one that is always cut off has the other's ---
    sizes = {side: _median(hand.size) / np.sqrt(aspect) for side, hand in tracks.items()}
    measured = [size for size in sizes.values() if size > 0]  # NaN is not
    rulers = {
        side: _Ruler(size if size > 0 else (measured or [np.nan])[0], params.hand_metres)
        for side, size in sizes.items()
    }
    bodies = {side: joints[first, SIDES.index(side)] for side in tracks} if joints is not None else {}
    wrists = {
        side: _wrist_path(body, tracks[side], camera, seconds, aspect, focal, params) for side, body in bodies.items()
    }
    touched = {side: _touching(hand, objects) for side, hand in tracks.items()}

    # --- Which object, which hand ---
    # The object that hands touch longest, else the one that is detected longest with the highest confidence. A hand
    # that rests counts half: the bowl that it steadies is not the spoon that the other one stirs with.
    moves = {side: _way(hand.centre) > rulers[side].still() for side, hand in tracks.items()}
    contacts = [{side: _touches_thing(hand, each, touched[side]) for side, hand in tracks.items()} for each in objects]
    weights = [
        (
            sum(float(where.sum()) * (1 if moves[side] else 0.5) for side, where in contact.items()),
            each.score * float(each.seen.mean()),
        )
        for contact, each in zip(contacts, objects, strict=True)
    ]
    active, holds = None, {side: np.zeros(len(times), dtype=bool) for side in tracks}
    if weights:
        place = weights.index(max(weights))
        active, holds = objects[place], contacts[place]
    # Of two hands that touch it, or none, the one that moves most acts.
    holding = [side for side in tracks if holds[side].any()]
    acting = max(holding or tracks, key=lambda side: _way(tracks[side].centre), default=None)
    guessed = active is None and acting is not None
    if guessed:
        assert acting is not None
        hand = tracks[acting]
        # The motion of the hand with gaps filled, not of its raw boxes.
        corners = np.concatenate([hand.centre - hand.extent / 2, hand.centre + hand.extent / 2], axis=1)
        boxes, moved = (_guess_object(each, acting) for each in (hand.boxes, corners))
        active = replace(hand, boxes=boxes, centre=(moved[:, :2] + moved[:, 2:]) / 2, name=None)

    # --- Hands ---
    grasps = {
        side: _grasps(hand, active, touched[side], holds[side], times) if active is not None and not guessed else []
        for side, hand in tracks.items()
    }
    hands = {}
    for side, hand in tracks.items():
        partner = active if side == acting and not guessed else None
        window = slice(None)
        if touched[side].mean() >= _HELD:
            places = np.flatnonzero(touched[side])
            window = slice(int(places[0]), int(places[-1]) + 1)
        relation = None
        if partner and holds[side].any():
            ends = _distances(hand, partner, touched[side], aspect)
            if ends is not None and abs(ends[1] - ends[0]) >= _OFF:
                relation = "onto" if ends[1] < ends[0] else "off"
        touches = None
        if holds[side].any():
            touches = "object"
        elif touched[side].any():
            states = np.bincount(hand.state[touched[side] & (hand.state > 0)], minlength=1)
            words = {SELF_CONTACT: "other hand", OTHER_PERSON: "other person", STATIONARY_OBJECT: "surface"}
            touches = words.get(int(np.argmax(states)), "other object")
        motion = _motion(hand, partner, window, times, aspect, rulers[side], wrists.get(side))
        when = _contact_times(hand.centre, touched[side], times, aspect, rulers[side])
        hands[side] = HandFacts(
            side,
            float(hand.seen.mean()),
            motion,
            *when,
            touches=touches,
            relation=relation,
            regrasps=tuple(float(times[each.start]) for each in grasps[side][1:]),
            size=rulers[side].size if measured else None,
            grasp=_grasp_of(bodies[side]) if wrists.get(side) is not None else None,
        )

    # --- The object, over the whole clip: it does nothing before it is touched ---
    thing = None
    if active is not None:
        ruler = rulers.get(acting or "", _Ruler(np.nan, params.hand_metres))
        motion = _motion(active, tracks.get(acting or ""), slice(None), times, aspect, ruler)
        thing = ObjectFacts(active.name, guessed, motion)

    # --- Relation of the two hands ---
    both = len(tracks) == 2
    ends = _distances(tracks[LEFT], tracks[RIGHT], True, aspect) if both else None
    together = None
    if ends is not None and abs(ends[1] - ends[0]) > 0.5:
        together = "closing" if ends[1] < ends[0] else "parting"
    elif ends is not None:
        together = "together" if max(ends) < _NEAR else "apart"
    pair = _pair_facts(hands, touched, grasps, acting, times, aspect) if both else None
    return ClipFacts(video_id, start, end, times, hands, thing, acting, together, pair)


def _median(values: np.ndarray) -> float:
    """The median of what is known, NaN where nothing is."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else np.nan


def _pair_facts(
    hands: dict[str, HandFacts],
    touched: dict[str, np.ndarray],
    grasps: dict[str, list[slice]],
    acting: str | None,
    times: np.ndarray,
    aspect: float,
) -> PairFacts:
    """What two hands do together, by where they touch anything, and hold the active object."""
    steadies = None
    for one, other in (SIDES, SIDES[::-1]):
        holds_still = not hands[one].motion.is_moving and hands[one].touches in ("object", "other object")
        works = other == acting and hands[other].motion.is_moving and touched[other].mean() >= _HELD
        if holds_still and works and touched[one].mean() >= _STEADY:
            steadies = one
    held = np.zeros((len(SIDES), len(times)), dtype=bool)
    for row, side in zip(held, SIDES, strict=True):
        for each in grasps[side]:
            row[each] = True
    shares = bool(held.all(axis=0).mean() >= _HELD)
    return PairFacts(_shared_motion(hands, aspect), steadies, shares, _handed_to(grasps, times))


def _shared_motion(hands: dict[str, HandFacts], aspect: float) -> str | None:
    """Whether two hands that move do so in PARALLEL or MIRRORED, by how their paths correlate over time."""
    if not all(hand.motion.is_moving for hand in hands.values()):
        return None
    paths = np.stack([hands[side].motion.path / (1, aspect) for side in SIDES])
    paths = paths[:, np.isfinite(paths).all(axis=(0, 2))]
    if paths.shape[1] < 3:
        return None
    one, two = paths - paths.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(one), np.linalg.norm(two)
    if max(lengths) > _UNEQUAL * min(lengths):
        return None
    product = float(np.prod(lengths))
    # Up and down are the same in a mirror: hands that move so together are parallel.
    if (one * two).sum() >= _SAME * product:
        return PARALLEL
    return MIRRORED if (one * two * (-1, 1)).sum() >= _SAME * product else None


def _handed_to(grasps: dict[str, list[slice]], times: np.ndarray) -> str | None:
    """The side that takes over what the other one held first and lets go of, if any."""
    for giver, taker in (SIDES, SIDES[::-1]):
        if grasps[giver] and grasps[taker]:
            given, taken = grasps[giver][-1], grasps[taker][-1]
            alone_before = times[taken.start] - times[grasps[giver][0].start]
            alone_after = times[taken.stop - 1] - times[given.stop - 1]
            gap = times[taken.start] - times[given.stop - 1]  # negative while both hold it
            first = grasps[taker][0].start >= given.start
            if first and min(alone_before, alone_after) >= _FLICKER and gap <= _HAND_OVER:
                return taker
    return None


def _wrist_path(
    joints: np.ndarray,
    hand: Track,
    camera: np.ndarray,
    seconds: np.ndarray,
    aspect: float,
    focal: float,
    params: TracksConfig,
) -> np.ndarray | None:
    """Joints of a hand [T, 21, 3] -> path of its wrist [T, 3] in metres: right, down and away from the camera.

    None where they are known in less than half of the samples in which the hand was detected.
    """
    wrist = joints[:, 0]
    if np.isfinite(wrist[hand.seen, 0]).sum() < max(2, hand.seen.sum() / 2):
        return None
    if np.isfinite(focal):
        picture = (min(1.0, aspect), min(1.0, 1 / aspect))  # width and height in longer sides
        place = 0.5 + focal * wrist[:, :2] / wrist[:, 2:] / picture
        moved, _ = move_boxes(camera, place, np.zeros_like(place))
        ray = np.append((moved - 0.5) * picture / focal, np.ones((len(moved), 1)), axis=1)
        # A turn of the head changes where a hand is seen and its depth, but not how far away it is.
        wrist = ray * (np.linalg.norm(wrist, axis=1) / np.linalg.norm(ray, axis=1))[:, None]
    return _smooth_path(wrist, seconds, params)


def _grasp_of(joints: np.ndarray) -> str | None:
    """Joints of a hand [T, 21, 3] -> open, closed, opening or closing, by how far its fingertips are from the wrist."""
    reach = np.linalg.norm(joints[:, _TIPS] - joints[:, :1], axis=2).mean(axis=1)
    spread = reach / np.maximum(np.linalg.norm(joints[:, _PALM] - joints[:, 0], axis=1), 1e-6)
    spread = spread[np.isfinite(spread)]
    if not len(spread):
        return None
    third = max(1, len(spread) // 3)
    change = float(np.median(spread[-third:]) - np.median(spread[:third]))
    if abs(change) >= _OPENING:
        return "opening" if change > 0 else "closing"
    usual = float(np.median(spread))
    return "open" if usual >= _OPEN else "closed" if usual <= _CLOSED else None


def _way(path: np.ndarray) -> float:
    """The longer side of the box around a path [T, 2], NaN where unknown."""
    points = path[np.isfinite(path[:, 0])]
    return float(np.ptp(points, axis=0).max()) if len(points) else 0.0


def _contact_times(
    centre: np.ndarray, touched: np.ndarray, times: np.ndarray, aspect: float, ruler: _Ruler
) -> tuple[float | None, float | None, float | None]:
    """When the hand touches, lets go, and starts towards what it touches."""
    places = np.flatnonzero(touched)
    if not len(places):
        return None, None, None
    first, last = int(places[0]), int(places[-1])
    visible = np.isfinite(centre[:, 0])
    from_start = not visible[:first].any()
    # The end of the clip, or of the hand's track, is no release.
    release = float(times[last + 1]) if visible[last + 1 :].any() else None
    approach = None
    if not from_start and visible[first]:
        away = np.hypot(*((centre[: first + 1] - centre[first]) / (1, aspect)).T)
        if np.nanmax(away) > ruler.still():
            # The last time that it is nearly as far away as it gets.
            approach = float(times[np.flatnonzero(away >= 0.9 * np.nanmax(away))[-1]])
    return 0.0 if from_start else float(times[first]), release, approach


def _distances(one: Track, other: Track, where: np.ndarray | bool, aspect: float) -> tuple[float, float] | None:
    """Distance of two things in the first and in the last third of the samples ``where`` both are known, in their mean
    size; None if they never are."""
    both = where & np.isfinite(one.centre[:, 0] + other.centre[:, 0])
    if not both.any():
        return None
    distance = np.hypot(*((one.centre - other.centre)[both] / (1, aspect)).T)
    distance /= np.median(np.sqrt((one.extent[both].prod(axis=1) + other.extent[both].prod(axis=1)) / 2 / aspect))
    # Medians of thirds rather than the end points, which jitter.
    third = max(1, len(distance) // 3)
    return float(np.median(distance[:third])), float(np.median(distance[-third:]))


def _motion(
    track: Track,
    partner: Track | None,
    window: slice,
    times: np.ndarray,
    aspect: float,
    ruler: _Ruler,
    wrist: np.ndarray | None = None,
) -> Motion:
    """Motion of a track; its directions are those within ``window``, judged together with a ``partner`` in depth.

    With a ``wrist`` [T, 3] in metres directions and lengths are its.
    """
    pair = [track] if partner is None else [track, partner]
    slope = _depth_slope([each.centre[window] for each in pair], [each.size[window] for each in pair], aspect)
    places = np.flatnonzero(np.isfinite(track.centre).all(axis=1))
    assert len(places), "a track has at least one box"
    own = float(np.sqrt(np.nanmedian(track.extent.prod(axis=1)) / aspect))
    is_metric = wrist is not None and np.isfinite(wrist[window, 0]).sum() > 1
    if wrist is not None and is_metric:
        path, least, metres = wrist, _STILL * ruler.metres, 1.0
    else:
        path, least, metres = track.centre / (1, aspect), ruler.still(own), ruler.metres / ruler.size
    directions, repeats = directions_of(path[window], least, slope)
    length = speed = pace = 0.0
    if directions != (STILL,):
        length, pace = _length(path[window], least), _mean_speed(path, times, least)
        speed = _mean_speed(track.centre / (1, aspect), times, ruler.still(own))
    has_length = np.isfinite(metres)
    return Motion(
        path=track.centre,
        size=track.size,
        directions=directions,
        repeats=repeats,
        speed=speed,
        start_region=_region(track.centre[places[0]]),
        end_region=_region(track.centre[places[-1]]),
        distance=float(metres * length) if has_length else None,
        pace=float(metres * pace) if has_length else None,
        is_metric=is_metric,
    )


def _mean_speed(points: np.ndarray, times: np.ndarray, least: float) -> float:
    """Of a path [T, N] while it moves, per second."""
    finite = np.isfinite(points[:, 0])
    steps, passed = np.linalg.norm(np.diff(points[finite], axis=0), axis=1), np.diff(times[finite])
    # A step that would not leave the still zone within a second is jitter.
    moving = (passed > 0) & (steps > least * passed)
    return float(steps[moving].sum() / passed[moving].sum()) if moving.any() else 0.0


def _region(point: np.ndarray) -> str:
    """One of nine words for the place of a point [2]."""
    column = ("left", "centre", "right")[int(np.clip(point[0] * 3, 0, 2))]
    row = ("upper", "", "lower")[int(np.clip(point[1] * 3, 0, 2))]
    return f"{row} {column}".strip()


def _depth_slope(centres: list[np.ndarray], sizes: list[np.ndarray], aspect: float) -> float:
    """Least-squares slope of the logarithm of the size over the way down, per picture width, of things that move
    together: ``centres`` [T, 2] and ``sizes`` [T] of each; 0 where nothing is known.

    Positive: what is lower in the picture looks larger, as on a table before the camera.
    """
    covariance, variance = 0.0, 0.0
    for centre, size in zip(centres, sizes, strict=True):
        valid = np.isfinite(centre[:, 1]) & np.isfinite(size) & (size > 0)
        y, z = centre[valid, 1] / aspect, np.log(size[valid])
        # Of what hardly moves, the ratio of two errors would be all there is.
        if len(y) and np.ptp(y) >= _LEAST:
            covariance += float(((y - y.mean()) * (z - z.mean())).sum())
            variance += float(((y - y.mean()) ** 2).sum())
    return covariance / variance if variance > 1e-9 else 0.0


def _length(path: np.ndarray, least: float) -> float:
    """Length of a path's legs; jitter, which adds up along the path itself, adds nothing to them."""
    points = path[np.isfinite(path).all(axis=1)]
    return float(np.linalg.norm(np.diff(points[_corners(points, least)], axis=0), axis=1).sum())


def directions_of(path: np.ndarray, least: float, slope: float) -> tuple[tuple[str, ...], int]:
    """Directions and repeats (see :class:`Motion`) of a ``path`` [T, 2] in picture widths, NaN where unknown.

    What goes less than ``least`` is still. ``slope`` is the growth of the logarithm of the size per picture width of
    way down. A path [T, 3] has the distance from the camera too, whatever the unit; then that, instead of ``slope``,
    tells away and closer from up and down.
    """
    points = path[np.isfinite(path).all(axis=1)]
    extent = np.ptp(points, axis=0) if len(points) else np.zeros(2)
    if len(points) < 2 or extent.max() < least:
        return (STILL,), 1

    # --- Does it go round? The area that the closed path sweeps, in ellipses of its width and height, positive
    # clockwise as seen; a path there and back sweeps none. ---
    width, height = extent[:2]
    if min(width, height) >= _ROUND_ASPECT * extent.max():
        x, y = points[:, :2].T
        area = 0.5 * float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())
        turns = area / (np.pi / 4 * width * height)
        # An arc that ends elsewhere sweeps an area with its chord, but is no turn.
        closed = np.linalg.norm(points[-1] - points[0]) < 0.4 * extent.max()
        if abs(turns) >= _ROUND_AREA and (closed or abs(turns) > 1.2):
            return (CLOCKWISE if turns > 0 else COUNTERCLOCKWISE,), max(1, round(abs(turns)))

    # --- Straight legs between corners, successive ones of the same direction merged ---
    ways = np.diff(points[_corners(points, least)], axis=0)
    lengths = np.linalg.norm(ways, axis=1)
    legs: list[str] = []
    for way in ways[lengths >= max(_LEG * least, _MINOR * lengths.max())]:
        axis = int(np.argmax(np.abs(way)))
        if axis == 0:
            word = RIGHT if way[0] > 0 else LEFT
        elif axis == 2:
            word = AWAY if way[2] > 0 else CLOSER
        elif len(way) == 3:
            word = DOWN if way[1] > 0 else UP
        elif slope > _DEPTH:  # it shrinks on the way up: along a table, not into the air
            word = CLOSER if way[1] > 0 else AWAY
        else:
            word = DOWN if way[1] > 0 else UP
        if not legs or legs[-1] != word:
            legs.append(word)
    if not legs:
        return (STILL,), 1
    alternates = len(legs) > 3 and legs[0] != legs[1] and all(a == b for a, b in zip(legs, legs[2:], strict=False))
    if alternates and len(legs) >= _SHAKES:
        return (SHAKING,), len(legs) // 2
    if alternates:
        return (legs[0], legs[1]), len(legs) // 2
    return tuple(legs), 1


def _corners(points: np.ndarray, least: float) -> list[int]:
    """Indices of the corners of a path, ends included; ``least`` is how far a thing moves that is not still.

    Splits where the path is farthest off its chord (Ramer 1972; Douglas and Peucker 1973), and also where it runs back
    along the chord by a leg, which that distance does not see.
    """
    chord = points[-1] - points[0]
    length = float(np.linalg.norm(chord))
    off = points - points[0]
    share = off @ chord / length**2 if length > 1e-9 else np.zeros(len(points))
    distance = np.linalg.norm(off - np.clip(share, 0, 1)[:, None] * chord, axis=1)
    split = int(np.argmax(distance))
    if distance[split] <= least / 2:
        back = np.maximum.accumulate(share) - share
        lowest = int(np.argmax(back))
        if back[lowest] * length <= _LEG * least:
            return [0, len(points) - 1]
        split = int(np.argmax(share[:lowest])) or lowest
    return _corners(points[: split + 1], least)[:-1] + [split + i for i in _corners(points[split:], least)]
