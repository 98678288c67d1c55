"""Narrations put together from phrases: offline, the same for the same seed.

The source's words are kept as they are; hands, sides, directions and contact are hung on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from egohod.hod.facts import ClipFacts, HandFacts
from egohod.hod.language import sides
from egohod.hod.narrators import base
from egohod.hod.narrators.base import Narration, Request

_WEARER = re.compile(r"^(#?\s*c(?:\s+c)?)\b\s*", re.IGNORECASE)
_OTHERS = re.compile(r"^#\s*o\b", re.IGNORECASE)
# "with his hand" says no side yet; of several hands none is the one.
_A_HAND = re.compile(r"\b(with|using|by) (?:an?|one|the|his|her|their|your|my)(?: one)? hand\b", re.IGNORECASE)
_HANDS = re.compile(r"\b(?:with|using|by) (?:\w+ ){0,2}hands\b", re.IGNORECASE)
# What says how something moves; said already, it is not said again.
_MOVING = re.compile(
    r"\b(?:to (?:the )?(?:left|right)|away|closer|(?:counter|anti)?clockwise|upwards?|downwards?|still"
    r"|back and forth)\b",
    re.IGNORECASE,
)


class TemplateNarrator:
    """Needs nothing but the facts."""

    name = "template"

    def __init__(self, seed: int = 0, varied: bool = True) -> None:
        self._seed = seed
        self._varied = varied

    def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
        """See :class:`~egohod.hod.narrators.base.Narrator`; one narration a request, at once."""
        for number, request in enumerate(requests):
            yield number, Narration(self.word(request.source, request), self.name)

    def word(self, source: str, request: Request) -> str:
        """What it says of a request whose narration were ``source``."""
        return template(source, request.facts, (self._seed, request.seed) if self._varied else None)


def template(source: str, facts: ClipFacts, seed: int | Sequence[int] | None = 0) -> str:
    """Word a clip: ``#C C moves the sponge`` becomes ``#C C moves the sponge with the right hand, first to the left,
    then to the right, while the left hand rests``.

    An empty ``source`` is narrated from the facts alone; what the tracks do not know is not said, and where they
    know of no hand either there is nothing to say. The narration of
    somebody else's action ("#O ...") gets what the wearer's hands do, and no hand for the action itself.
    Without a ``seed`` the same facts are always said in the same few words.
    """
    rng = None if seed is None else np.random.default_rng(seed)
    source = " ".join(source.split()).rstrip(" .,;")
    named = set(sides(source))
    # Whose hands do it is said, and not as one hand's deed.
    others = bool(_OTHERS.match(source)) or bool(not named and _HANDS.search(source))
    acting = facts.hands.get(facts.acting or "")
    idle = [hand for side, hand in sorted(facts.hands.items()) if hand is not acting or others]
    if not source:
        text = _of_facts_alone(facts, acting)
        if acting is None:
            idle = idle[1:]
    else:
        text = source if others or acting is None else _with_hand(source, facts, acting, rng)
    while_ = [_idle(hand, base.thing_name(facts)) for hand in idle if hand.side not in named]
    if while_:
        text += (", while " if rng is None or rng.integers(2) else "; ") + " and ".join(while_)
    return text


def _with_hand(source: str, facts: ClipFacts, hand: HandFacts, rng: np.random.Generator | None) -> str:
    """The source with the acting hand and how it moves; a source that names hands keeps its own."""
    named = sides(source)
    tail = [] if _MOVING.search(source) else _tail(facts, hand, rng)
    if named and hand.side not in named:  # the narrator saw another hand than the tracks: do not mix them
        return source
    start = _WEARER.match(source)
    action = source[start.end() :] if start else ""
    third_person = re.match(r"[a-z]+(?:s|es)\b", action)
    if not named and _A_HAND.search(source):
        text = _A_HAND.sub(rf"\1 the {hand.side} hand", source, count=1)
    elif not named and start and third_person and _at_times(rng):
        text = f"{start[1]} uses the {hand.side} hand and {action}"
    elif not named:
        text = f"{source} with the {hand.side} hand"
    else:
        text = source
    return ", ".join([text, *tail])


def _tail(facts: ClipFacts, hand: HandFacts, rng: np.random.Generator | None) -> list[str]:
    """How the hand moves, from where to where, what it touches."""
    motion, variant, carried = hand.motion, 0 if rng is None else int(rng.integers(2)), False
    # The thing's own motion is the action's, where it is known; a hand may come from elsewhere.
    if facts.object is not None and not facts.object.guessed and base.moves(facts.object.motion):
        motion, carried = facts.object.motion, hand.touches == "object" and len(facts.object.motion.directions) == 1
    if not base.moves(motion):
        tail = ["keeping still"]
    else:
        worded = base.carrying if carried and rng is not None and rng.integers(2) else base.going
        tail = [worded(motion, variant)]
        if motion.repeats == 1 and base.often(motion):
            tail.append(base.often(motion))
        if base.whence(motion) and _at_times(rng):
            tail.append(base.whence(motion))
    if hand.relation:
        tail.append(base.relation(hand, base.thing_name(facts)))
    if hand.touches in ("object", "other object") and _at_times(rng):
        reached = "after reaching for it" if hand.contact else "in contact from the start"
        tail.append(reached)
    return tail


def _at_times(rng: np.random.Generator | None) -> bool:
    return rng is not None and rng.integers(3) == 0


def _of_facts_alone(facts: ClipFacts, acting: HandFacts | None) -> str:
    hand = acting or next((hand for _, hand in sorted(facts.hands.items())), None)
    if hand is None:
        return ""
    thing = base.thing_name(facts)
    held = base.touched(hand, thing)
    if not base.moves(hand.motion):
        return f"The {hand.side} hand " + (f"holds {held} still" if held else "rests")
    way = base.going(hand.motion)
    if hand.relation:
        return f"The {hand.side} hand moves {way}, {base.relation(hand, thing)}"
    if held and hand.touches in ("object", "other object"):
        return f"The {hand.side} hand moves {held} {way}"
    return f"The {hand.side} hand moves {way}" + (f", touching {held}" if held else "")


def _idle(hand: HandFacts, thing: str) -> str:
    """What a hand does that does not act."""
    held = base.touched(hand, thing)
    who = f"the {hand.side} hand"
    if not base.moves(hand.motion):
        graspable = hand.touches in ("object", "other object")
        return f"{who} holds {held} still" if graspable else f"{who} rests"
    return f"{who} moves {base.going(hand.motion)}" + (f", touching {held}" if held else "")
