"""What is known of a clip's hands and objects: the measured facts that narrators word and the check holds them to.

Positions are shares of the picture (x from the left, y from the top), with the camera's own motion taken out; times are
seconds from the clip's start; speeds are picture widths a second. Sides are the wearer's: ``left`` is their left hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from egohod.data.detections import OTHER_PERSON, SELF_CONTACT, STATIONARY_OBJECT
from egohod.hod import tracking
from egohod.hod.tracking import SIDES, ContactParams, Track, TrackParams, Tracks

LEFT, RIGHT = SIDES
UP, DOWN, AWAY, CLOSER = "up", "down", "away", "closer"
CLOCKWISE, COUNTERCLOCKWISE, STILL, SHAKING = "clockwise", "counterclockwise", "still", "back and forth"
DIRECTIONS = (LEFT, RIGHT, UP, DOWN, AWAY, CLOSER, CLOCKWISE, COUNTERCLOCKWISE, STILL, SHAKING)
"""The words for a hand's or an object's motion; ``away`` and ``closer`` are along the line of sight."""


@dataclass(frozen=True)
class Motion:
    """How one thing moves."""

    path: np.ndarray
    """Centre of the box at each sampled time [T, 2]; NaN where it is not known even after filling gaps."""
    size: np.ndarray
    """Square root of the box's area at each sampled time [T], as a share of the picture; NaN where unknown."""
    directions: tuple[str, ...]
    """Its legs in order, each of ``DIRECTIONS``: a wipe that goes left and comes back is (left, right); (still,) alone
    where it does not move."""
    repeats: int
    """How often the motion recurs: two quick taps are 2; 1 for everything that does not recur."""
    speed: float
    """Mean speed while it moves."""
    start_region: str
    """Where it is first seen: one of nine words such as ``upper left``, ``centre``, ``lower right``."""
    end_region: str
    """Where it is last seen."""


@dataclass(frozen=True)
class HandFacts:
    """One hand of a clip."""

    side: str
    """left or right."""
    seen: float
    """Share of the sampled frames in which the detector found it."""
    motion: Motion
    contact: float | None
    """When it first touches something, or 0.0 where it does so from the start; None where it touches nothing."""
    release: float | None
    """When it lets go, if it does before the clip ends."""
    approach: float | None
    """When it starts to move towards what it then touches."""
    touches: str | None
    """``object`` (the clip's active object), ``other object``, ``surface``, ``other hand`` or ``other person``; None
    where nothing is touched, and where the detector tells no contact and finds no objects."""
    relation: str | None = None
    """Of the acting hand, while it touches something: ``onto`` or ``off`` the active object, as with a lid; None where
    it stays with it."""


@dataclass(frozen=True)
class ObjectFacts:
    """The active object of a clip."""

    name: str | None
    """Its class where the detector tells one."""
    guessed: bool
    """Whether its box is the heuristic around the hand, for want of an object detector."""
    motion: Motion


@dataclass(frozen=True)
class ClipFacts:
    """All that the tracks say of one clip."""

    video_id: str
    start: float
    """Of the clip in its video, seconds."""
    end: float
    times: np.ndarray
    """The sampled times [T], seconds from the clip's start."""
    hands: dict[str, HandFacts]
    """By side; a hand that is never seen is absent."""
    object: ObjectFacts | None
    acting: str | None
    """Side of the hand that does the action: the one that touches the active object, else the one that moves most."""
    hands_together: str | None
    """Relation of the two hands where both are seen: ``apart``, ``together``, ``closing`` or ``parting``."""


def without_rare(facts: ClipFacts, min_seen: float) -> ClipFacts:
    """The facts without hands that were found in a smaller share of the frames: of those nothing may be said."""
    hands = {side: hand for side, hand in facts.hands.items() if hand.seen >= min_seen}
    if len(hands) == len(facts.hands):
        return facts
    return replace(facts, hands=hands, acting=facts.acting if facts.acting in hands else None, hands_together=None)


@dataclass(frozen=True)
class MotionParams:
    """When a change of place is a describe_motion. Tuned on the demo world's val split."""

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


def describe_motion(
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


@dataclass(frozen=True)
class FactsParams:
    """How detections become facts."""

    track: TrackParams = field(default_factory=TrackParams)
    contact: ContactParams = field(default_factory=ContactParams)
    motion: MotionParams = field(default_factory=MotionParams)
    held: float = 0.3
    """Who touches something for this share of the clip handles it: what its hand does meanwhile is the motion that is
    told. A briefer touch (a tap) is part of a motion, and the whole clip is told."""
    off: float = 0.5
    """Least way, in their mean size, by which a hand that touches a thing moves onto or off it."""
    near: float = 1.2
    """Hands closer than this many of their sizes are together."""


def facts_of(
    rows: pa.Table,
    seconds: np.ndarray,
    *,
    video_id: str,
    start: float,
    end: float,
    aspect: float = 4 / 3,
    shifts: np.ndarray | None = None,
    params: FactsParams | None = None,
) -> ClipFacts:
    """What the detections of one clip say.

    ``rows`` are the clip's boxes in the schema of detections, ``seconds`` [T] the sampled times of the video, ascending
    (repeats are left out), ``aspect`` the picture's width over its height, and ``shifts`` [T, 2] the camera's motion
    (:func:`egohod.hod.tracking.camera_shifts`), None to leave it in. Without any box there are no hands and no object.
    """
    params = params or FactsParams()
    seconds, kept = np.unique(seconds, return_index=True)
    found = tracking.build(rows, seconds, None if shifts is None else shifts[kept], params.track)
    times = seconds - start
    touched = {side: tracking.touching(hand, found.objects, params.contact) for side, hand in found.hands.items()}
    active = _active(found, touched, params.contact)
    holds = {
        side: tracking.attached(hand, active, touched[side], params.contact)
        if active
        else np.zeros(len(times), dtype=bool)
        for side, hand in found.hands.items()
    }
    acting = _acting(found, holds)
    guessed = active is None and acting is not None
    if guessed:
        assert acting is not None
        active = _guessed(found.hands[acting], acting)
    windows = {side: _window(touched[side], params.held) for side in found.hands}
    hands = {}
    for side, hand in found.hands.items():
        thing = active if side == acting and not guessed else None
        relation = _on_or_off(hand, thing, touched[side], aspect, params) if thing and holds[side].any() else None
        moved = _motion(hand, thing, windows[side], times, aspect, params.motion)
        when = _times(hand.centre, touched[side], times, aspect, params.motion.least)
        what = _touches(hand, touched[side], holds[side])
        hands[side] = HandFacts(side, float(hand.seen.mean()), moved, *when, touches=what, relation=relation)
    thing_facts = None
    if active is not None:
        # An object is told of over the whole clip: it does nothing before it is touched.
        partner = found.hands.get(acting or "")
        moved = _motion(active, partner, slice(None), times, aspect, params.motion)
        thing_facts = ObjectFacts(active.name, guessed, moved)
    together = _relation(found.hands, aspect, params.near)
    return ClipFacts(video_id, start, end, times, hands, thing_facts, acting, together)


def _active(found: Tracks, touched: dict[str, np.ndarray], params: ContactParams) -> Track | None:
    """The object that hands touch longest, else the one that is surest and longest in sight."""

    def weight(thing: Track) -> tuple[float, float]:
        touches = sum(
            int(tracking.attached(hand, thing, touched[side], params).sum()) for side, hand in found.hands.items()
        )
        return touches, thing.score * float(thing.seen.mean())

    return max(found.objects, key=weight, default=None)


def _acting(found: Tracks, holds: dict[str, np.ndarray]) -> str | None:
    """The hand that touches the active object; of two that do, or none, the one that moves most."""
    holding = [side for side in found.hands if holds[side].any()]
    if len(holding) == 1:
        return holding[0]

    def way(side: str) -> float:
        known = found.hands[side].centre[np.isfinite(found.hands[side].centre[:, 0])]
        return float(np.ptp(known, axis=0).max()) if len(known) else 0.0

    return max(holding or found.hands, key=way, default=None)


def _guessed(hand: Track, side: str) -> Track:
    boxes = tracking.guessed_object(hand.boxes, side)
    towards = tracking.guessed_object(
        np.concatenate([hand.centre - hand.extent / 2, hand.centre + hand.extent / 2], axis=1), side
    )
    return replace(hand, boxes=boxes, centre=(towards[:, :2] + towards[:, 2:]) / 2, name=None)


def _window(touched: np.ndarray, held: float) -> slice:
    """The samples whose motion is told of a hand."""
    if touched.mean() < held:
        return slice(None)
    places = np.flatnonzero(touched)
    return slice(int(places[0]), int(places[-1]) + 1)


def _motion(
    track: Track, partner: Track | None, window: slice, times: np.ndarray, aspect: float, params: MotionParams
) -> Motion:
    pair = [track] if partner is None else [track, partner]
    slope = depth_slope([each.centre[window] for each in pair], [each.size[window] for each in pair], aspect)
    usual = float(np.sqrt(np.nanmedian(track.extent.prod(axis=1))))
    said = course(track.centre[window], usual, slope, aspect, params)
    return describe_motion(track.centre, track.size, times, said, aspect, params)


def _times(
    centre: np.ndarray, touched: np.ndarray, times: np.ndarray, aspect: float, least: float
) -> tuple[float | None, float | None, float | None]:
    """When the hand touches, lets go, and sets out for what it touches."""
    places = np.flatnonzero(touched)
    if not len(places):
        return None, None, None
    first, last = int(places[0]), int(places[-1])
    known = np.isfinite(centre[:, 0])
    begins = not known[:first].any()
    touch = 0.0 if begins else float(times[first])
    # The end of the clip, or of what is known of the hand, is no letting go.
    release = float(times[last + 1]) if known[last + 1 :].any() else None
    approach = None
    if not begins and known[first]:
        away = np.hypot(*((centre[: first + 1] - centre[first]) / (1, aspect)).T)
        if np.nanmax(away) > least:
            approach = float(times[np.flatnonzero(away >= 0.9 * np.nanmax(away))[-1]])
    return touch, release, approach


def _touches(hand: Track, touched: np.ndarray, holds: np.ndarray) -> str | None:
    if not touched.any():
        return None
    if holds.any():
        return "object"
    state = np.bincount(hand.state[touched & (hand.state > 0)], minlength=1)
    words = {SELF_CONTACT: "other hand", OTHER_PERSON: "other person", STATIONARY_OBJECT: "surface"}
    return words.get(int(np.argmax(state)), "other object")


def _relation(hands: dict[str, Track], aspect: float, near: float) -> str | None:
    """How the two hands lie to each other, from the first to the last third of the time that both are known."""
    ends = _distances(hands[LEFT], hands[RIGHT], True, aspect) if len(hands) == 2 else None
    if ends is None:
        return None
    if abs(ends[1] - ends[0]) > 0.5:
        return "closing" if ends[1] < ends[0] else "parting"
    return "together" if max(ends) < near else "apart"


def _on_or_off(hand: Track, thing: Track, touched: np.ndarray, aspect: float, params: FactsParams) -> str | None:
    """Whether a hand moves onto or off the thing while it is ``touched`` [T]."""
    ends = _distances(hand, thing, touched, aspect)
    if ends is None or abs(ends[1] - ends[0]) < params.off:
        return None
    return "onto" if ends[1] < ends[0] else "off"


def _distances(one: Track, other: Track, where: np.ndarray | bool, aspect: float) -> tuple[float, float] | None:
    """How far two things are from each other in the first and in the last third of the samples ``where`` both are
    known, in their mean size; None if they never are."""
    both = where & np.isfinite(one.centre[:, 0] + other.centre[:, 0])
    if not both.any():
        return None
    distance = np.hypot(*((one.centre - other.centre)[both] / (1, aspect)).T)
    distance /= np.median(np.sqrt((one.extent[both].prod(axis=1) + other.extent[both].prod(axis=1)) / 2 / aspect))
    third = max(1, len(distance) // 3)
    return float(np.median(distance[:third])), float(np.median(distance[-third:]))
