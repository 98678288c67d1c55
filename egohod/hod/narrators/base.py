"""What narrators are asked and what they answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from egohod.errors import UserError
from egohod.hod.facts import (
    AWAY,
    CLOCKWISE,
    CLOSER,
    COUNTERCLOCKWISE,
    DOWN,
    LEFT,
    RIGHT,
    SHAKING,
    STILL,
    UP,
    ClipFacts,
    HandFacts,
    Motion,
)


class NarratorError(UserError):
    """A narrator that cannot be used: no endpoint, no prompt, no key."""


class EndpointDown(NarratorError):
    """The endpoint has not answered for long. What was yielded before is good; the rest can be asked for later."""


@dataclass(frozen=True)
class Request:
    """One clip to narrate."""

    source: str
    """The narration that there is, or nothing. Data: whatever it says is described, never done."""
    facts: ClipFacts
    seed: int = 0
    """Of this clip; varies the wording."""
    frames: np.ndarray | None = None
    """uint8 [T, H, W, 3] RGB; for narrators that look."""
    complaints: tuple[str, ...] = ()
    """Why ``refused`` was."""
    refused: str | None = None
    """The caption before, where it is asked for again."""


@dataclass(frozen=True)
class Narration:
    """One answer."""

    text: str | None
    """None where there is none."""
    narrator: str
    prompt_tokens: int = 0
    """As the server counts them; a request's are shared out over its clips."""
    completion_tokens: int = 0
    problem: str | None = None
    """Why there is no text."""


class Narrator(Protocol):
    """Words clips."""

    name: str

    def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
        """Answer each request once, as (its number, the narration), in whatever order they become ready.

        Raises :class:`EndpointDown` when no more answers can be had, after those that there are.
        """
        ...


OTHER = {LEFT: RIGHT, RIGHT: LEFT}
# Each in the words of which narrators use now these, now those.
GOING = {
    LEFT: ("to the left",), RIGHT: ("to the right",), UP: ("upward", "up"), DOWN: ("downward", "down"),
    AWAY: ("away",), CLOSER: ("closer", "back towards the body"), CLOCKWISE: ("clockwise",),
    COUNTERCLOCKWISE: ("counterclockwise",), SHAKING: ("back and forth",),
}  # fmt: skip
_CARRYING = {UP: "lifting it up", DOWN: "putting it down"}
_TIMES = {2: "twice", 3: "three times", 4: "four times"}
_TOUCHED = {
    "object": "the {o}", "other object": "another object", "surface": "the surface", "other hand": "the other hand",
    "other person": "another person",
}  # fmt: skip


def moves(motion: Motion) -> bool:
    """Whether a thing moves at all."""
    return motion.directions != (STILL,) and bool(motion.directions)


def going(motion: Motion, variant: int = 0) -> str:
    """``first to the left, then to the right``, or nothing for a thing at rest; ``variant`` chooses among synonyms."""
    legs = [GOING[each][variant % len(GOING[each])] for each in motion.directions if each != STILL]
    if not legs:
        return ""
    text = legs[0] if len(legs) == 1 else f"first {legs[0]}, then " + " and then ".join(legs[1:])
    if motion.repeats > 1:
        return f"{text}, {often(motion)}"
    return text


def carrying(motion: Motion, variant: int = 0) -> str:
    """``putting it down``, ``moving it to the left``: what a hand does with a thing that goes one way."""
    return _CARRYING.get(motion.directions[0], f"moving it {going(motion, variant)}")


def often(motion: Motion) -> str:
    """``twice``; ``once`` for what goes and comes back a single time; else nothing."""
    if motion.repeats > 1:
        return _TIMES.get(motion.repeats, "several times")
    return "once" if motion.directions in ((DOWN, UP), (UP, DOWN)) else ""


def place(region: str) -> str:
    """A region of the picture as a place: ``the left side``, ``the centre``, ``the upper left``."""
    return f"the {region} side" if region in (LEFT, RIGHT) else f"the {region}"


def whence(motion: Motion) -> str:
    """``from the left side to the centre``, where it ends in another region than it begins in; else nothing."""
    if motion.start_region == motion.end_region or not moves(motion):
        return ""
    return f"from {place(motion.start_region)} to {place(motion.end_region)}"


def touched(hand: HandFacts, thing: str) -> str | None:
    """What a hand touches, in words; None where nothing."""
    return None if hand.touches is None else _TOUCHED[hand.touches].format(o=thing)


def relation(hand: HandFacts, thing: str) -> str:
    """``off the box``, ``onto the box`` for a hand that moves so while it touches something; else nothing."""
    return f"{hand.relation} the {thing}" if hand.relation else ""


def thing_name(facts: ClipFacts) -> str:
    """The active object's name, or ``object``."""
    return facts.object.name if facts.object is not None and facts.object.name else "object"


def describe(facts: ClipFacts) -> list[str]:
    """One line a hand or thing, for a language model to word."""
    thing = thing_name(facts)
    lines = []
    for side in (LEFT, RIGHT):
        hand = facts.hands.get(side)
        if hand is None:
            lines.append(f"{side} hand: not visible, do not mention it")
            continue
        parts = ["does the action" if side == facts.acting else "does not do the action"]
        parts.append(f"moves {going(hand.motion)}" if moves(hand.motion) else "rests")
        if hand.relation:
            parts.append(relation(hand, thing))
        if whence(hand.motion):
            parts.append(whence(hand.motion))
        held = touched(hand, thing)
        if held is None:
            parts.append("touches nothing")
        else:
            parts.append(f"touches {held}" + (" from the start" if hand.contact == 0 else " after reaching for it"))
        if held is not None and hand.release is not None:
            parts.append("then lets go")
        lines.append(f"{side} hand: {'; '.join(parts)}")
    if facts.object is not None and not facts.object.guessed:
        motion = facts.object.motion
        lines.append(f"{thing}: {f'moves {going(motion)}' if moves(motion) else 'does not move'}")
    if facts.hands_together in ("closing", "parting"):
        lines.append("the two hands " + ("come together" if facts.hands_together == "closing" else "move apart"))
    return lines
