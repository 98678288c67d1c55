"""How hands and objects of the demo world move.

Lengths and positions are in picture widths (x from 0 to 1, y from 0 at the top to 0.75), times in seconds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from egohod.demo.world import EVENT_SECONDS, VERBS, XY, Clip

SIDE = {"left": -1, "right": 1}
REST: dict[str, XY] = {"left": (0.2, 0.68), "right": (0.8, 0.68)}  # where an idle hand lies
LID_HEIGHT = 0.075  # from a body's centre to its closed lid
REACH = 0.2  # share of a clip in which the hand reaches an object or leaves it


class Pose(NamedTuple):
    """Where the acting hand and its object are at one moment."""

    hand: XY
    touching: bool
    grip: str
    object: XY
    depth: float = 1.0  # size relative to the resting object
    turn: float = 0.0  # degrees
    lid: XY | None = None  # only while a lid is off
    height: float = 0.0  # above the counter, in widths


def mix(a: XY, b: XY, s: float) -> XY:
    """The point that far from a to b."""
    return a[0] + (b[0] - a[0]) * s, a[1] + (b[1] - a[1]) * s


def grip_point(hand: str, at: XY, depth: float = 1.0) -> XY:
    """Where a hand takes hold of what is there."""
    return at[0] + SIDE[hand] * 0.05 * depth, at[1] + 0.095 * depth


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
        return _state_changing(clip, verb.path, 1 - u if verb.backwards else u)
    p = min(max((t - clip.begin) / EVENT_SECONDS, 0.0), 1.0) if verb.brief else t
    if verb.path == "tap":
        return _tap(clip, abs(math.sin(math.pi * p * (2 if verb.backwards else 1))))
    return _carry(clip, verb.path, 1 - p if verb.backwards else p)


def _smooth(x: float) -> float:
    x = min(max(x, 0.0), 1.0)
    return x * x * (3 - 2 * x)


def _state_changing(clip: Clip, path: str, u: float) -> Pose:
    """Reach, act, withdraw: ``u`` from 0 to 1."""
    s = _smooth((u - clip.begin) / (1 - clip.begin - clip.end))
    near = _smooth((u - clip.begin + REACH) / REACH)
    if path != "lift":
        near *= 1 - _smooth((u - 1 + clip.end) / REACH)
    c, sign, depth, turn, lid, height = clip.centre, SIDE[clip.hand], 1.0, clip.tilt, None, 0.0
    if path == "lift":
        at = mix((c, 0.5), (c + 0.06 * sign, 0.5 - 0.27 * clip.size), s)
        depth, height = 1 + 0.35 * s, 0.2 * s
    elif path == "push":
        at = mix((c, 0.38 + 0.15 * clip.size), (c, 0.38 - 0.15 * clip.size), s)
        depth = 1.12 - 0.32 * s
    elif path == "slide":
        at = mix((c + 0.2 * clip.size, 0.4), (c - 0.2 * clip.size, 0.4), s)
    else:
        at, turn = (c - 0.1 * sign, 0.38), 0.0
        x, y = mix((at[0], at[1] - LID_HEIGHT), (at[0] + 0.3 * sign, 0.46), s)
        lid = (x, y - 0.1 * math.sin(math.pi * s))
    # A hand on a lid covers it as little as a hand on an object does
    hand = mix(REST[clip.hand], grip_point(clip.hand, lid or at, depth), near)
    return Pose(hand, near > 0.98, "grip" if near > 0.5 else "open", at, depth, turn, lid, height)


def _carry(clip: Clip, path: str, p: float) -> Pose:
    """An object that stays in the hand and makes one loop: ``p`` from 0 to 1 (for a shake, seconds)."""
    wave, x, y, depth, turn = math.sin(2 * math.pi * p), clip.centre, 0.4, 1.0, clip.tilt
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
    return Pose(grip_point(clip.hand, (x, y), depth), True, "grip", (x, y), depth, turn, height=0.02)


def _tap(clip: Clip, s: float) -> Pose:
    x, y, sign = clip.centre, 0.27, SIDE[clip.hand]
    touch = (x + 0.02 * sign, y + 0.06)
    hand = mix((touch[0] + 0.04 * sign, touch[1] + 0.28 * clip.size), touch, s)
    return Pose(hand, s > 0.9, "point", (x, y), turn=clip.tilt)
