"""The facts of a clip from its detections: who acts on what, how it moves, when hands touch and let go."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from egohod.data.detections import OTHER_PERSON, SELF_CONTACT, STATIONARY_OBJECT
from egohod.hod import contact, paths, tracks
from egohod.hod.contact import ContactParams
from egohod.hod.facts import LEFT, RIGHT, ClipFacts, HandFacts, ObjectFacts
from egohod.hod.paths import MotionParams
from egohod.hod.tracks import Track, TrackParams, Tracks


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
    (:func:`egohod.hod.camera.shifts`), None to leave it in. Without any box there are no hands and no object.
    """
    params = params or FactsParams()
    seconds, kept = np.unique(seconds, return_index=True)
    found = tracks.build(rows, seconds, None if shifts is None else shifts[kept], params.track)
    times = seconds - start
    touched = {side: contact.touching(hand, found.objects, params.contact) for side, hand in found.hands.items()}
    active = _active(found, touched, params.contact)
    holds = {
        side: contact.attached(hand, active, touched[side], params.contact)
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
            int(contact.attached(hand, thing, touched[side], params).sum()) for side, hand in found.hands.items()
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
    boxes = tracks.guessed_object(hand.boxes, side)
    towards = tracks.guessed_object(
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
) -> paths.Motion:
    pair = [track] if partner is None else [track, partner]
    slope = paths.depth_slope([each.centre[window] for each in pair], [each.size[window] for each in pair], aspect)
    usual = float(np.sqrt(np.nanmedian(track.extent.prod(axis=1))))
    said = paths.course(track.centre[window], usual, slope, aspect, params)
    return paths.motion(track.centre, track.size, times, said, aspect, params)


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
