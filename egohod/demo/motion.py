"""How hands and objects of the demo world move.

Lengths and positions are in picture widths (x from 0 to 1, y from 0 at the top to 0.75), times in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from egohod.demo.world import EVENT_SECONDS, VERBS, XY, Clip

GRIP_OFFSET: XY = (0.05, 0.095)  # from an object's centre to the right hand's grip; mirrored for the left hand
LID_TOP: XY = (0.0, -0.075)  # from a body's centre to its closed lid


@dataclass(frozen=True)
class Pose:
    """Where the acting hand and its object are at one moment."""

    hand: XY
    touching: bool
    grip: str
    object: XY
    depth: float  # size relative to the resting object
    turn: float  # degrees
    lid: XY | None  # only while a lid is off
    height: float  # above the counter, in widths


def side(hand: str) -> int:
    """1 to the right, -1 to the left."""
    return 1 if hand == "right" else -1


def rest_point(hand: str) -> XY:
    """Where an idle hand lies."""
    return 0.5 + 0.3 * side(hand), 0.68


def _smooth(x: float) -> float:
    x = min(max(x, 0.0), 1.0)
    return x * x * (3 - 2 * x)


def mix(a: XY, b: XY, s: float) -> XY:
    """The point that far from a to b."""
    return a[0] + (b[0] - a[0]) * s, a[1] + (b[1] - a[1]) * s


def sway(clip: Clip, t: float) -> XY:
    """Offset of the whole picture by the moving head."""
    ax, ay, fx, fy, px, py = clip.sway
    return ax * math.sin(2 * math.pi * fx * t + px), ay * math.sin(2 * math.pi * fy * t + py)


def pose(clip: Clip, t: float) -> Pose:
    """The acting hand and its object ``t`` seconds into the clip.

    The second verb of a pair is the first one's path run backwards (``tap twice`` instead passes through the same
    positions for the same time, in two humps), so a single frame holds no hint of which of the two it is.
    """
    verb = VERBS[clip.verb]
    if verb.kind == "state_changing":
        u = t / clip.seconds
        return _state_changing(clip, 1 - u if verb.backwards else u)
    p = min(max((t - clip.begin) / EVENT_SECONDS, 0.0), 1.0) if verb.brief else t
    if verb.path == "tap":
        return _tap(clip, abs(math.sin(math.pi * p * (2 if verb.backwards else 1))))
    return _carry(clip, verb.path, 1 - p if verb.backwards else p)


def _grip(clip: Clip, at: XY, depth: float = 1.0) -> XY:
    return at[0] + side(clip.hand) * GRIP_OFFSET[0] * depth, at[1] + GRIP_OFFSET[1] * depth


def _state_changing(clip: Clip, u: float) -> Pose:
    """Reach, act, withdraw: ``u`` from 0 to 1."""
    path, s, reach = VERBS[clip.verb].path, _smooth((u - clip.begin) / (1 - clip.begin - clip.end)), 0.2
    near = _smooth((u - clip.begin + reach) / reach) * (
        1.0 if path == "lift" else 1 - _smooth((u - 1 + clip.end) / reach)
    )
    rest, c, depth, lid, height = rest_point(clip.hand), clip.centre, 1.0, None, 0.0
    if path == "lift":
        at = mix((c, 0.5), (c + 0.06 * side(clip.hand), 0.5 - 0.27 * clip.size), s)
        depth, height = 1 + 0.35 * s, 0.2 * s
    elif path == "push":
        at = mix((c, 0.38 + 0.15 * clip.size), (c, 0.38 - 0.15 * clip.size), s)
        depth = 1.12 - 0.32 * s
    elif path == "slide":
        at = mix((c + 0.2 * clip.size, 0.4), (c - 0.2 * clip.size, 0.4), s)
    else:
        at = (c - 0.1 * side(clip.hand), 0.38)
        x, y = mix((at[0] + LID_TOP[0], at[1] + LID_TOP[1]), (at[0] + 0.3 * side(clip.hand), 0.46), s)
        lid = (x, y - 0.1 * math.sin(math.pi * s))
    # A hand on a lid covers it as little as a hand on an object does
    hand = mix(rest, _grip(clip, lid or at, depth), near)
    return Pose(
        hand, near > 0.98, "grip" if near > 0.5 else "open", at, depth, clip.tilt * (path != "open"), lid, height
    )


def _carry(clip: Clip, path: str, p: float) -> Pose:
    """An object that stays in the hand and makes one loop: ``p`` from 0 to 1 (for a shake, seconds)."""
    wave, turn, depth = math.sin(2 * math.pi * p), clip.tilt, 1.0
    x, y = clip.centre, 0.4
    if path == "wipe":
        x -= 0.2 * clip.size * wave
    elif path == "flick":
        y -= 0.16 * clip.size * wave
        depth -= 0.15 * wave
    elif path == "circle":  # from the bottom of the circle over its left side: clockwise
        x -= 0.15 * clip.size * wave
        y += 0.12 - 0.15 * clip.size * (1 - math.cos(2 * math.pi * p))
    elif path == "shake":
        shake = math.sin(2 * math.pi * 2.4 * p)
        x, turn = x + 0.07 * shake, turn + 18 * shake
    return Pose(_grip(clip, (x, y), depth), True, "grip", (x, y), depth, turn, None, 0.02)


def _tap(clip: Clip, s: float) -> Pose:
    at = (clip.centre, 0.27)
    touch = (at[0] + 0.02 * side(clip.hand), at[1] + 0.06)
    hand = mix((touch[0] + 0.04 * side(clip.hand), touch[1] + 0.28 * clip.size), touch, s)
    return Pose(hand, s > 0.9, "point", at, 1.0, clip.tilt, None, 0.0)
