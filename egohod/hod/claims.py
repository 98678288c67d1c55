"""What a caption claims of hands and motion, and whether the tracks say so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

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
from egohod.hod.language import Clause, clauses

TWICE, ONCE, ABSENT, CONTACT, RELEASE, OTHER_HAND = "twice", "once", "out of sight", "contact", "release", "other hand"
CLOSING, PARTING = "closing", "parting"

# Seen from the head, what goes away over a table goes up in the picture: narrators say either.
_AXES = ({LEFT: -1, RIGHT: 1}, {UP: -1, AWAY: -1, DOWN: 1, CLOSER: 1})
_TURNS = (CLOCKWISE, COUNTERCLOCKWISE)
# Least net way, in shares of the picture, for "from the left side to the right side" of a motion with several legs
_NET = 0.05

_GO = (
    r"(?:(?:mov|slid|push|pull|shift|wip|swip|sweep|turn|drag|drift|travel|head|swing|stir|brush|circl|tilt|go|goe)"
    r"(?:e|es|s|ed|ing)?|slid|went|swept|swung)"
)
_SELF = r"(?:the |their |his |her |your |my )?(?:body|self|camera|wearer|chest|viewer|c|him|her|me|you|himself|herself)"
_PATTERNS: list[tuple[str, tuple[str, ...]]] = [
    (r"(?:from )?side to side|back and forth|to and fro", (SHAKING,)),
    (r"from (?:the )?(?:far )?left(?: side)?,? (?:in)?to (?:the )?(?:far )?right\b(?! hand)(?: side)?", (RIGHT,)),
    (r"from (?:the )?(?:far )?right(?: side)?,? (?:in)?to (?:the )?(?:far )?left\b(?! hand)(?: side)?", (LEFT,)),
    (r"from near to far|first far\b|then far\b", (AWAY,)),
    (r"from far to near|first near\b|then near\b", (CLOSER,)),
    (r"from the counter into the air", (UP,)),
    (r"from the air onto the counter", (DOWN,)),
    (rf"(?:to|towards?) (?:the |their |his |her )?(?P<to>left|right)(?![- ]?hand|most)(?! of\b| (?:arm|palm|wrist))"
     rf"|(?:first |back |^)(?P<then>left|right)(?![- ]?hand| (?:arm|palm|wrist|away))"
     rf"|{_GO} (?:(?:it|them|the \w+|\w+ly) )?(?P<go>left|right)(?= *$| and| then| before| in\b| on\b| across| over)"
     rf"|(?P<ward>left|right)wards?", ()),
    (r"counter-?clockwise|anti-?clockwise", (COUNTERCLOCKWISE,)),
    (r"(?<!counter)(?<!counter-)(?<!anti)(?<!anti-)clockwise", (CLOCKWISE,)),
    (r"upwards?|(?<!pick )(?<!picks )(?<!picking )up(?= and down| high|$| in\b| into the air| off\b| from\b| then)"
     r"|(?:lift|rais)(?:e|es|s|ing)?\b", (UP,)),
    (r"downwards?|(?:lower)(?:s|ing)?\b(?! (?:left|right|centre|center|side|part|half))"
     r"|(?<!put )(?<!puts )down(?=$| onto| to the (?:table|counter)| then)", (DOWN,)),
    (r"(?<!throw )(?<!throws )(?<!put )(?<!puts )(?<!right )(?<!straight )(?<!take )(?<!takes )away\b"
     r"|farther|further off", (AWAY,)),
    (rf"closer|nearer|(?:toward|towards) {_SELF}\b", (CLOSER,)),
    (r"still(?! \w+ing)|motionless|immobile|stationary|idle|idly|unmoving|does(?: not|n't) move|stays? put|at rest"
     r"|rest(?:s|ing)?\b(?! (?:of|the|his|her)\b)", (STILL,)),
    (r"twice|two (?:quick )?(?:times|taps|touches)|two quick", (TWICE,)),
    (r"(?<!at )once(?! (?:the|again|more|it|they|he|she|all|every))|one (?:slow|single) (?:time|tap|touch)", (ONCE,)),
    (r"out of (?:sight|view|frame)|not visible|invisible|unseen|hidden|off[- ]?screen|not in (?:view|sight)",
     (ABSENT,)),
    (r"(?<!without )(?<!not )(?:touch(?:es|ing)?(?! nothing)|in contact|grasp(?:s|ing)?|grip(?:s|ping)?|grab(?:s|bing)?"
     r"|hold(?:s|ing)?(?! still)|clutch(?:es|ing)?)\b", (CONTACT,)),
    (r"releas(?:e|es|ing)|let(?:s|ting)? go", (RELEASE,)),
    (r"(?:come|move|brought|closing) together|towards each other", (CLOSING,)),
    (r"(?:mov|draw|pull)(?:e|es|s|ing)? apart|away from each other", (PARTING,)),
]  # fmt: skip
_CLAIM = re.compile("|".join(rf"(?P<c{i}>\b(?:{pattern}))" for i, (pattern, _) in enumerate(_PATTERNS)))
_VALUES = [values for _, values in _PATTERNS]


@dataclass(frozen=True)
class Claim:
    """One statement about a hand, or about the action where no hand is named."""

    sides: tuple[str, ...]
    """Empty: the hand that acts."""
    what: str
    """A direction of :mod:`egohod.hod.facts`, or one of this module's words."""
    words: str
    """As the caption has it."""


def claims(text: str) -> list[Claim]:
    """All statements of a caption about motion and contact, in order."""
    return [claim for clause in clauses(text) for claim in _of_clause(clause)]


def _of_clause(clause: Clause) -> Iterator[Claim]:
    for match in _CLAIM.finditer(clause.text):
        assert match.lastgroup is not None
        side = match["to"] or match["then"] or match["go"] or match["ward"]
        number = next(i for i in range(len(_VALUES)) if match[f"c{i}"] is not None)
        for what in (side,) if side else _VALUES[number]:
            yield Claim(clause.sides, what, match.group())


def unsupported(caption: str, source: str, facts: ClipFacts, min_seen: float) -> tuple[list[str], int]:
    """What the tracks do not say, as reasons; and how many statements there were.

    A caption that names no hand although one acts is no hand-object narration.
    What the source says of a hand's motion or contact stands without the tracks; where it names no hand it speaks of
    the one that acts.
    """
    before = claims(source)
    given = claims(caption)
    reasons: list[str] = []
    named = {side for clause in clauses(caption) if clause.named for side in clause.sides}
    absent = {side for claim in given if claim.what == ABSENT for side in claim.sides}
    in_source = {side for clause in clauses(source) if clause.named for side in clause.sides}
    hands = {side: hand for side, hand in facts.hands.items() if hand.seen >= min_seen}
    if facts.acting in hands and not named:
        reasons.append(f"hand: nothing is said of the {facts.acting} hand")
    for side in sorted(named - in_source):
        if side in absent and side in hands and hands[side].seen > 0.5:
            reasons.append(f"hand: the {side} hand is in sight")
        elif side not in absent and side not in hands:
            reasons.append(f"hand: no {side} hand was found")
    for sides in dict.fromkeys(claim.sides for claim in given):
        own = [claim for claim in given if claim.sides == sides]
        for side in sides or ((facts.acting,) if facts.acting else ()):
            if side in hands:
                said = {claim.what for claim in before if side in (claim.sides or (facts.acting or side,))}
                reasons += _of_hand(own, hands[side], facts, said)
    return list(dict.fromkeys(reasons)), len(given) + len(named)


def _of_hand(own: list[Claim], hand: HandFacts, facts: ClipFacts, said: set[str]) -> Iterator[str]:
    who = f"the {hand.side} hand"
    motions = [hand.motion]
    if hand.side == facts.acting and facts.object is not None and not facts.object.guessed:
        motions.append(facts.object.motion)
    motions = [motion for motion in motions if motion.directions]
    touching = hand.touches is not None or hand.contact is not None
    ways = ", then ".join(hand.motion.directions)
    for group in _directions(own):
        rest = [claim for claim in group if claim.what not in said]
        ways_said = [[claim.what for claim in some] for some in (group, rest) if some]
        if motions and rest and not any(_goes(each, motion) for motion in motions for each in ways_said):
            yield f'direction: "{", ".join(claim.words for claim in group)}", but {who} goes {ways}'
    for claim in (each for each in own if each.what not in said):
        # A hand rests by itself, whatever it touches does.
        resting = motions[:1] if claim.words.startswith("rest") else motions
        if claim.what == STILL and resting and not any(motion.directions == (STILL,) for motion in resting):
            yield f'direction: "{claim.words}", but {who} goes {ways}'
        elif claim.what in (ONCE, TWICE) and motions:
            times = 2 if claim.what == TWICE else 1
            if all(motion.repeats != times or motion.directions == (STILL,) for motion in motions):
                yield f'times: "{claim.words}", but it was {motions[0].repeats}'
        elif claim.what == CONTACT and not touching:
            yield f'contact: "{claim.words}", but {who} touches nothing'
        elif claim.what == RELEASE and hand.release is None:
            yield f'contact: "{claim.words}", but {who} does not let go'
        elif claim.what in (CLOSING, PARTING) and facts.hands_together not in (None, claim.what):
            yield f'direction: "{claim.words}", but the hands are {facts.hands_together}'


def _directions(own: list[Claim]) -> list[list[Claim]]:
    """The claims of each axis in order; turns and shaking by themselves."""
    groups = [[claim for claim in own if claim.what in axis] for axis in _AXES]
    groups += [[claim for claim in own if claim.what in _TURNS], [claim for claim in own if claim.what == SHAKING]]
    return [group for group in groups if group]


def _goes(said: list[str], motion: Motion) -> bool:
    """Whether a motion's legs begin as said, or lead there on the whole."""
    if said[0] in _TURNS or said[0] == SHAKING:
        return all(each in motion.directions for each in said)
    number = next(i for i, axis in enumerate(_AXES) if said[0] in axis)
    axis = _AXES[number]
    wanted = _runs([axis[each] for each in said])
    legs = _runs([axis[each] for each in motion.directions if each in axis])
    if legs[: len(wanted)] == wanted:
        return True
    known = motion.path[np.isfinite(motion.path).all(axis=1)]
    net = known[-1, number] - known[0, number] if len(known) else 0.0
    return len(wanted) == 1 and bool(legs) and legs[-1] == wanted[0] and net * wanted[0] > _NET


def _runs(values: list[int]) -> list[int]:
    return [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
