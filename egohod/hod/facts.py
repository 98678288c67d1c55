"""What is known of a clip's hands and objects: the measured facts that narrators word and the check holds them to.

Positions are shares of the picture (x from the left, y from the top), with the camera's own motion taken out; times are
seconds from the clip's start; speeds are picture widths a second. Sides are the wearer's: ``left`` is their left hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

LEFT, RIGHT, UP, DOWN, AWAY, CLOSER = "left", "right", "up", "down", "away", "closer"
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
