"""Narrations from phrases: offline, the same for the same seed.

The source's words stay as they are; hands, sides, directions and contact are added to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from egohod.hod.check import sides
from egohod.hod.config import NarratorConfig
from egohod.hod.facts import DOWN, MIRRORED, PARALLEL, UP, ClipFacts, HandFacts
from egohod.hod.narrators import (
    OTHER,
    Narration,
    Request,
    direction_phrase,
    distance_phrase,
    regions_phrase,
    thing_name,
    times_phrase,
    touched_phrase,
)

# Ego4D's narrations mark the wearer as "#C C", another person as "#O".
_WEARER = re.compile(r"^(#?\s*c(?:\s+c)?)\b\s*", re.IGNORECASE)
_OTHER_PERSON = re.compile(r"^#\s*o\b", re.IGNORECASE)
# "with his hand" names no side yet; of several hands none is the one.
_A_HAND = re.compile(r"\b(with|using|by) (?:an?|one|the|his|her|their|your|my)(?: one)? hand\b", re.IGNORECASE)
_HANDS = re.compile(r"\b(?:with|using|by) (?:\w+ ){0,2}hands\b", re.IGNORECASE)
# A source that has a direction gets no second one.
_HAS_DIRECTION = re.compile(
    r"\b(?:to (?:the )?(?:left|right)|away|closer|(?:counter|anti)?clockwise|upwards?|downwards?|still"
    r"|back and forth)\b",
    re.IGNORECASE,
)
_CARRYING = {UP: "lifting it up", DOWN: "putting it down"}


class TemplateNarrator:
    """Needs nothing but the facts."""

    name = "template"

    def __init__(self, settings: NarratorConfig | None = None) -> None:
        self._settings = settings or NarratorConfig()

    def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
        """See :class:`~egohod.hod.narrators.Narrator`; at once, in order."""
        for number, request in enumerate(requests):
            yield number, Narration(self.caption(request.source, request), self.name)

    def caption(self, source: str, request: Request) -> str:
        """The caption of a request, with ``source`` instead of its own narration."""
        seeds = (self._settings.seed, request.seed) if self._settings.varied else None
        return template(source, request.facts, seeds, self._settings.distances)

    def coarse(self, source: str, request: Request) -> str:
        """The coarse caption of a request, with ``source`` instead of its own narration."""
        return coarse_template(source, request.facts)


def coarse_template(source: str, facts: ClipFacts) -> str:
    """What is done, without hands and directions: the source, else ``A hand moves the cup`` from the facts."""
    source = " ".join(source.split()).rstrip(" .,;")
    hand = facts.hands.get(facts.acting or "") or next((each for _, each in sorted(facts.hands.items())), None)
    if source or hand is None:
        return source
    held = touched_phrase(hand, thing_name(facts))
    if held is None:
        return "A hand " + ("moves" if hand.motion.is_moving else "rests")
    if hand.touches not in ("object", "other object"):
        return f"A hand touches {held}"
    return f"A hand {'moves' if hand.motion.is_moving else 'holds'} {held}"


def template(source: str, facts: ClipFacts, seed: int | Sequence[int] | None = 0, distances: bool = False) -> str:
    """Caption a clip: ``#C C moves the sponge`` becomes ``#C C moves the sponge with the right hand, first to the left,
    then to the right, while the left hand rests``.

    Without a ``source`` from the facts alone; nothing where there is no hand either. The narration of somebody else's
    action ("#O ...") gets what the wearer's hands do, and no hand for the action itself. Without a ``seed`` the same
    facts always give the same few words. ``distances`` adds how far the acting hand moves.
    """
    # Each choice draws from this in a fixed order: captions of earlier versions stay the same.
    rng = None if seed is None else np.random.default_rng(seed)
    source = " ".join(source.split()).rstrip(" .,;")
    named = set(sides(source))
    # The source names whose hands act, and not one hand alone.
    of_others = bool(_OTHER_PERSON.match(source)) or bool(not named and _HANDS.search(source))
    acting = facts.hands.get(facts.acting or "")
    thing, pair = thing_name(facts), facts.pair
    # The acting hand first: the check takes the action before them for that of the first hand.
    order = sorted(facts.hands.values(), key=lambda hand: (hand is not acting, hand.side))
    idle = [hand for hand in order if hand is not acting or of_others]
    # Hands that the first words describe as well: both carry the thing, or it goes from one to the other.
    both = pair is not None and pair.shares and (pair.moves == PARALLEL or not _any_moves(facts))
    if (both or (pair is not None and pair.handed_to)) and not of_others and not named:
        idle = []
    if not source:  # windows of videos without narrations
        text = _from_facts_alone(facts, acting, thing, both)
        if acting is None:
            idle = idle[1:]  # the first one is the subject of the sentence
    else:
        text = source if of_others or acting is None else _with_hand(source, facts, acting, both, rng, distances)
    clauses = []
    idle = [hand for hand in idle if hand.side not in named]
    link = ", while " if rng is None or not idle or rng.integers(2) else "; "
    for hand in idle:
        held = touched_phrase(hand, thing)
        if hand.motion.is_moving:
            way = direction_phrase(hand.motion)
            if pair is not None and pair.moves == MIRRORED:
                way += " symmetrically"
            elif pair is not None and pair.moves == PARALLEL and not of_others and rng is not None and rng.integers(2):
                way = "the same way"
            does = f"moves {way}" + (f", touching {held}" if held else "")
        elif pair is not None and pair.steadies == hand.side and rng is not None and rng.integers(2):
            does = f"steadies {held}"
        else:
            does = f"holds {held} still" if hand.touches in ("object", "other object") else "rests"
        clauses.append(f"the {hand.side} hand {does}")
    return text + (link + " and ".join(clauses) if clauses else "")


def _any_moves(facts: ClipFacts) -> bool:
    return any(hand.motion.is_moving for hand in facts.hands.values())


def _from_facts_alone(facts: ClipFacts, acting: HandFacts | None, thing: str, both: bool) -> str:
    if facts.pair is not None and facts.pair.handed_to:
        return f"The {thing} goes from the {OTHER[facts.pair.handed_to]} hand to the {facts.pair.handed_to} hand"
    hand = acting or next((hand for _, hand in sorted(facts.hands.items())), None)
    if hand is None:
        return ""
    held = touched_phrase(hand, thing)
    if both:
        way = direction_phrase(hand.motion)
        return f"Both hands move the {thing} {way}" if way else f"Both hands hold the {thing} still"
    if not hand.motion.is_moving:
        return f"The {hand.side} hand " + (f"holds {held} still" if held else "rests")
    way = direction_phrase(hand.motion)
    if hand.relation:
        return f"The {hand.side} hand moves {way}, {hand.relation} the {thing}"
    if held and hand.touches in ("object", "other object"):
        return f"The {hand.side} hand moves {held} {way}"
    return f"The {hand.side} hand moves {way}" + (f", touching {held}" if held else "")


def _with_hand(
    source: str, facts: ClipFacts, hand: HandFacts, both: bool, rng: np.random.Generator | None, distances: bool
) -> str:
    """The source with the acting hand, or both, and its motion; a source that names hands keeps its own."""
    named = sides(source)
    tail = [] if _HAS_DIRECTION.search(source) else _motion_phrases(facts, hand, rng, distances)
    doing = "both hands" if both else f"the {hand.side} hand"
    if named and hand.side not in named:  # narrator and tracks disagree on the hand: do not mix them
        return source
    start = _WEARER.match(source)
    action = source[start.end() :] if start else ""
    third_person = re.match(r"[a-z]+(?:s|es)\b", action)
    if named:
        text = source
    elif facts.pair is not None and facts.pair.handed_to:
        # Two hands move: what only one does is not said.
        text = " ".join(_A_HAND.sub("", source, count=1).split())
        return f"{text} from the {OTHER[facts.pair.handed_to]} hand to the {facts.pair.handed_to} hand"
    elif _A_HAND.search(source):
        text = _A_HAND.sub(rf"\1 {doing}", source, count=1)
    # "uses the right hand and cuts" needs a verb in the third person.
    elif start and third_person and _sometimes(rng):
        text = f"{start[1]} uses {doing} and {action}"
    else:
        text = f"{source} with {doing}"
    return ", ".join([text, *tail])


def _motion_phrases(facts: ClipFacts, hand: HandFacts, rng: np.random.Generator | None, distances: bool) -> list[str]:
    """How the acting hand moves, from where to where, what it touches."""
    motion, variant, carried = hand.motion, 0 if rng is None else int(rng.integers(2)), False
    # The thing's own motion is the action's, where it is measured; a hand may come from elsewhere.
    if facts.object is not None and not facts.object.guessed and facts.object.motion.is_moving:
        motion, carried = facts.object.motion, hand.touches == "object" and len(facts.object.motion.directions) == 1
    if not motion.is_moving:
        phrases = ["keeping still"]
    else:
        way = direction_phrase(motion, variant)
        if carried and rng is not None and rng.integers(2):
            way = _CARRYING.get(motion.directions[0], f"moving it {way}")
        if distances and distance_phrase(motion):
            way += f" {distance_phrase(motion)}"
        phrases = [way]
        if motion.repeats == 1 and times_phrase(motion):
            phrases.append(times_phrase(motion))
        if regions_phrase(motion) and _sometimes(rng):
            phrases.append(regions_phrase(motion))
    if hand.relation:
        phrases.append(f"{hand.relation} the {thing_name(facts)}")
    if hand.touches in ("object", "other object") and _sometimes(rng):
        phrases.append("after reaching for it" if hand.contact else "in contact from the start")
    if hand.regrasps and rng is not None:
        phrases.append("regrasping it" if rng.integers(2) else "letting go of it in between")
    return phrases


def _sometimes(rng: np.random.Generator | None) -> bool:
    # One in three: a phrase that nearly every caption has teaches a text tower nothing.
    return rng is not None and rng.integers(3) == 0
