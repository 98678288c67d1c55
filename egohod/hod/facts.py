"""Facts of a clip measured from its tracks: who acts on what, how it moves, when hands touch things and let go.

Narrators caption them, the check compares captions with them. Positions are shares of the picture (x from the left, y
from the top), with the camera's own motion removed; times are seconds from the clip's start; speeds are picture widths
a second. Sides are the wearer's: ``left`` is their left hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from egohod.data.detections import OTHER_PERSON, SELF_CONTACT, STATIONARY_OBJECT
from egohod.hod import tracking
from egohod.hod.tracking import SIDES, ContactParams, Track, TrackParams, Tracks

LEFT, RIGHT = SIDES
UP, DOWN, AWAY, CLOSER = "up", "down", "away", "closer"  # away and closer are along the line of sight
CLOCKWISE, COUNTERCLOCKWISE, STILL, SHAKING = "clockwise", "counterclockwise", "still", "back and forth"


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


@dataclass(frozen=True)
class ObjectFacts:
    """The active object of a clip."""

    name: str | None  # its class, where the detector gives one
    guessed: bool  # whether its box is the heuristic at the hand, for want of an object detector
    motion: Motion


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


def without_rare(facts: ClipFacts, min_seen: float) -> ClipFacts:
    """The facts without hands that were detected in a smaller share of the frames: captions may not mention these."""
    hands = {side: hand for side, hand in facts.hands.items() if hand.seen >= min_seen}
    if len(hands) == len(facts.hands):
        return facts
    return replace(facts, hands=hands, acting=facts.acting if facts.acting in hands else None, hands_together=None)


@dataclass(frozen=True)
class MotionParams:
    """When a change of place is a motion. Tuned on the demo world's val split. Lengths are in picture widths."""

    still: float = 0.3  # what moves less than this share of its own size is still
    least: float = 0.05  # what moves less than this is still whatever its size
    depth: float = 0.25  # decrease of the logarithm of the size per picture width of way up, from which up means away
    round_area: float = 0.4  # a turn's area, relative to the ellipse of its width and height: a line 0, an ellipse 1
    round_aspect: float = 0.35  # shorter over longer side of a turn
    minor: float = 0.35  # legs shorter than this share of the longest one are ignored
    shakes: int = 5  # so many legs to and fro are a shake; two quick taps have four


@dataclass(frozen=True)
class FactsParams:
    """How detections become facts."""

    track: TrackParams = field(default_factory=TrackParams)
    contact: ContactParams = field(default_factory=ContactParams)
    motion: MotionParams = field(default_factory=MotionParams)
    # Of a hand that touches something for this share of the clip the motion meanwhile counts: it handles the thing. A
    # briefer touch (a tap) is part of a motion, and the whole clip counts.
    held: float = 0.3
    off: float = 0.5  # least way, in their mean size, by which a hand that touches a thing moves onto or off it
    near: float = 1.2  # hands closer than this many of their sizes are together


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
    """Facts from the detections of one clip.

    ``rows`` are the clip's boxes in the schema of detections, ``seconds`` [T] the sampled times of the video, ascending
    (repeats are ignored), ``aspect`` the picture's width over its height, and ``shifts`` [T, 2] the camera's motion
    (:func:`~egohod.hod.tracking.camera_shifts`), None to leave it in. Without any box there are no hands and no object.
    """
    params = params or FactsParams()
    seconds, first = np.unique(seconds, return_index=True)
    tracks = tracking.build(rows, seconds, None if shifts is None else shifts[first], params.track)
    times = seconds - start
    touched = {side: tracking.touching(hand, tracks.objects, params.contact) for side, hand in tracks.hands.items()}

    # --- Which object, which hand ---
    # The object that hands touch longest, else the one that is detected longest with the highest confidence.
    touch_counts = [
        sum(tracking.attached(hand, each, touched[side], params.contact).sum() for side, hand in tracks.hands.items())
        for each in tracks.objects
    ]
    weights = [
        (int(count), each.score * float(each.seen.mean()))
        for count, each in zip(touch_counts, tracks.objects, strict=True)
    ]
    active = tracks.objects[weights.index(max(weights))] if weights else None
    holds = {
        side: tracking.attached(hand, active, touched[side], params.contact)
        if active
        else np.zeros(len(times), dtype=bool)
        for side, hand in tracks.hands.items()
    }
    acting = _acting_hand(tracks, holds)
    guessed = active is None and acting is not None
    if guessed:
        assert acting is not None
        hand = tracks.hands[acting]
        boxes = tracking.guess_object(hand.boxes, acting)
        # The motion of the hand with gaps filled, not of its raw boxes.
        corners = np.concatenate([hand.centre - hand.extent / 2, hand.centre + hand.extent / 2], axis=1)
        moved = tracking.guess_object(corners, acting)
        active = replace(hand, boxes=boxes, centre=(moved[:, :2] + moved[:, 2:]) / 2, name=None)

    # --- Hands ---
    hands = {}
    for side, hand in tracks.hands.items():
        partner = active if side == acting and not guessed else None
        window = slice(None)
        if touched[side].mean() >= params.held:
            places = np.flatnonzero(touched[side])
            window = slice(int(places[0]), int(places[-1]) + 1)
        relation = None
        if partner and holds[side].any():
            ends = _distances(hand, partner, touched[side], aspect)
            if ends is not None and abs(ends[1] - ends[0]) >= params.off:
                relation = "onto" if ends[1] < ends[0] else "off"
        touches = None
        if holds[side].any():
            touches = "object"
        elif touched[side].any():
            states = np.bincount(hand.state[touched[side] & (hand.state > 0)], minlength=1)
            words = {SELF_CONTACT: "other hand", OTHER_PERSON: "other person", STATIONARY_OBJECT: "surface"}
            touches = words.get(int(np.argmax(states)), "other object")
        motion = _motion(hand, partner, window, times, aspect, params.motion)
        when = _contact_times(hand.centre, touched[side], times, aspect, params.motion.least)
        hands[side] = HandFacts(side, float(hand.seen.mean()), motion, *when, touches=touches, relation=relation)

    # --- The object, over the whole clip: it does nothing before it is touched ---
    thing = None
    if active is not None:
        motion = _motion(active, tracks.hands.get(acting or ""), slice(None), times, aspect, params.motion)
        thing = ObjectFacts(active.name, guessed, motion)

    # --- Relation of the two hands ---
    both = len(tracks.hands) == 2
    ends = _distances(tracks.hands[LEFT], tracks.hands[RIGHT], True, aspect) if both else None
    together = None
    if ends is not None and abs(ends[1] - ends[0]) > 0.5:
        together = "closing" if ends[1] < ends[0] else "parting"
    elif ends is not None:
        together = "together" if max(ends) < params.near else "apart"
    return ClipFacts(video_id, start, end, times, hands, thing, acting, together)


def _acting_hand(tracks: Tracks, holds: dict[str, np.ndarray]) -> str | None:
    """The hand that touches the active object; of two that do, or none, the one that moves most."""
    holding = [side for side in tracks.hands if holds[side].any()]

    def way(side: str) -> float:
        centre = tracks.hands[side].centre
        finite = centre[np.isfinite(centre[:, 0])]
        return float(np.ptp(finite, axis=0).max()) if len(finite) else 0.0

    return max(holding or tracks.hands, key=way, default=None)


def _contact_times(
    centre: np.ndarray, touched: np.ndarray, times: np.ndarray, aspect: float, least: float
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
        if np.nanmax(away) > least:
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
    track: Track, partner: Track | None, window: slice, times: np.ndarray, aspect: float, params: MotionParams
) -> Motion:
    """Motion of a track; its directions are those within ``window``, judged together with a ``partner`` in depth."""
    pair = [track] if partner is None else [track, partner]
    slope = _depth_slope([each.centre[window] for each in pair], [each.size[window] for each in pair], aspect)
    usual = float(np.sqrt(np.nanmedian(track.extent.prod(axis=1))))
    directions, repeats = directions_of(track.centre[window], usual, slope, aspect, params)

    visible = np.isfinite(track.centre).all(axis=1)
    places = np.flatnonzero(visible)
    assert len(places), "a track has at least one box"
    size = float(np.nanmedian(track.size)) if np.isfinite(track.size).any() else np.nan
    speed = 0.0
    if directions != (STILL,) and len(places) > 1:
        steps = np.hypot(*np.diff(track.centre[visible] / (1, aspect), axis=0).T)
        passed = np.diff(times[visible])
        # A step that would not leave the still zone within a second is jitter.
        least = max(params.least, params.still * size) if np.isfinite(size) else params.least
        moving = (passed > 0) & (steps > least * passed)
        speed = float(steps[moving].sum() / passed[moving].sum()) if moving.any() else 0.0
    first, last = _region(track.centre[places[0]]), _region(track.centre[places[-1]])
    return Motion(track.centre, track.size, directions, repeats, speed, first, last)


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
        if valid.sum() > 1:
            y, z = centre[valid, 1] / aspect, np.log(size[valid])
            covariance += float(((y - y.mean()) * (z - z.mean())).sum())
            variance += float(((y - y.mean()) ** 2).sum())
    return covariance / variance if variance > 1e-9 else 0.0


def directions_of(
    path: np.ndarray, size: float, slope: float, aspect: float, params: MotionParams
) -> tuple[tuple[str, ...], int]:
    """Directions and repeats (see :class:`Motion`) of a ``path`` [T, 2], NaN where unknown.

    ``size`` of the thing and ``path`` are in shares of the picture, ``slope`` is the growth of the logarithm of the
    size per picture width of way down. Inside, lengths are in picture widths.
    """
    points = path[np.isfinite(path).all(axis=1)] / (1, aspect)
    least = max(params.least, params.still * size / np.sqrt(aspect)) if np.isfinite(size) else params.least
    if len(points) < 2 or np.ptp(points, axis=0).max() < least:
        return (STILL,), 1

    # --- Does it go round? The area that the closed path sweeps, in ellipses of its width and height, positive
    # clockwise as seen; a path there and back sweeps none. ---
    width, height = np.ptp(points, axis=0)
    if min(width, height) >= params.round_aspect * max(width, height):
        x, y = points.T
        area = 0.5 * float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())
        turns = area / (np.pi / 4 * width * height)
        # An arc that ends elsewhere sweeps an area with its chord, but is no turn.
        closed = np.hypot(*(points[-1] - points[0])) < 0.4 * max(width, height)
        if abs(turns) >= params.round_area and (closed or abs(turns) > 1.2):
            return (CLOCKWISE if turns > 0 else COUNTERCLOCKWISE,), max(1, round(abs(turns)))

    # --- Straight legs between corners, successive ones of the same direction merged ---
    ways = np.diff(points[_corners(points, least / 2)], axis=0)
    lengths = np.hypot(*ways.T)
    legs: list[str] = []
    for way in ways[lengths >= max(0.8 * least, params.minor * lengths.max())]:
        if abs(way[0]) >= abs(way[1]):
            word = RIGHT if way[0] > 0 else LEFT
        elif slope > params.depth:  # it shrinks on the way up: along a table, not into the air
            word = CLOSER if way[1] > 0 else AWAY
        else:
            word = DOWN if way[1] > 0 else UP
        if not legs or legs[-1] != word:
            legs.append(word)
    if not legs:
        return (STILL,), 1
    alternates = len(legs) > 3 and legs[0] != legs[1] and all(a == b for a, b in zip(legs, legs[2:], strict=False))
    if alternates and len(legs) >= params.shakes:
        return (SHAKING,), len(legs) // 2
    if alternates:
        return (legs[0], legs[1]), len(legs) // 2
    return tuple(legs), 1


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
