"""Facts of clips, written out."""

from __future__ import annotations

from typing import Any

import numpy as np

from egohod.hod.facts import ClipFacts, HandFacts, Motion, ObjectFacts

_STEP = {"left": (-0.1, 0), "right": (0.1, 0), "up": (0, -0.1), "away": (0, -0.1), "down": (0, 0.1), "closer": (0, 0.1)}


def motion(*directions: str, repeats: int = 1) -> Motion:
    """A motion with these legs, from the middle of the picture."""
    steps = np.array([(0, 0), *(_STEP.get(each, (0, 0)) for each in directions)])
    path = np.cumsum(steps, axis=0) + 0.5
    moves = directions != ("still",)
    return Motion(path, np.full(len(path), 0.2), directions, repeats, 0.3 * moves, "centre", "centre")


def hand(side: str, *directions: str, **more: Any) -> HandFacts:
    """A hand; by default it touches nothing and rests."""
    values = {"seen": 1.0, "contact": None, "release": None, "approach": None, "touches": None}
    return HandFacts(
        side, motion=motion(*(directions or ("still",)), repeats=more.pop("repeats", 1)), **{**values, **more}
    )


def clip(*hands: HandFacts, acting: str | None = "right", thing: str | None = "sponge", **more: Any) -> ClipFacts:
    """A clip whose object, if any, moves with the acting hand."""
    by_side = {each.side: each for each in hands}
    moved = by_side[acting].motion if acting in by_side else motion("still")
    active = ObjectFacts(thing, False, moved) if thing else None
    values = {"hands_together": None, **more}
    return ClipFacts("video", 0.0, 2.0, np.linspace(0, 2, 16), by_side, active, acting, **values)


WIPE = clip(hand("right", "left", "right", touches="object", contact=0.0), hand("left"))
"""The right hand goes left and comes back; the left one rests."""
