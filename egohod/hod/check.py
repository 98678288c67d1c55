"""Whether a caption is true to its clip: to the narration it was made from, and to the tracks.

Made for captions of any narrator. The half that looks at the source compares verbs, objects and which hand does what;
the half that looks at the tracks, hands, directions and contact. Both are rules over words, not a model: they say which
word they refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplemma

from egohod.hod import language
from egohod.hod.config import CheckSettings
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
from egohod.hod.language import Clause, clauses, sides

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
    for pair in dict.fromkeys(claim.sides for claim in given):
        own = [claim for claim in given if claim.sides == pair]
        for side in pair or ((facts.acting,) if facts.acting else ()):
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
    wanted = _without_repeats([axis[each] for each in said])
    legs = _without_repeats([axis[each] for each in motion.directions if each in axis])
    if legs[: len(wanted)] == wanted:
        return True
    known = motion.path[np.isfinite(motion.path).all(axis=1)]
    net = known[-1, number] - known[0, number] if len(known) else 0.0
    return len(wanted) == 1 and bool(legs) and legs[-1] == wanted[0] and net * wanted[0] > _NET


def _without_repeats(values: list[int]) -> list[int]:
    return [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]


NAMES = ("length", "prompt", "language", "side", "verb", "object", "hand", "direction", "times", "contact")
"""What reasons begin with, followed by a colon and the words at fault."""

# Orders to a model, whoever gives them.
_ORDER = re.compile(
    r"\b(?:ignore|disregard|forget)\b.{0,30}\b(?:above|previous|instructions?|prompt|rules)\b"
    r"|\b(?:system|user) prompt\b",
    re.IGNORECASE,
)
# Said by models about their task; of a clip only if the narration has it, as in "reads the instructions".
_TALK = re.compile(
    r"\bas an ai\b|\bi(?:'m| am) sorry\b|\bi can(?:'t|not)\b|\bhere (?:is|are)\b|\bsure[,!]|\bcertainly\b"
    r"|\b(?:caption|narration|output|answer|rewritten|facts?|clip \d+) ?:|\binstructions?\b|\bjson\b"
    r"|https?://|```|[{}<>\[\]]",
    re.IGNORECASE,
)
_WITH = re.compile(r"\b(?:with|using|uses?|by) (?:the |his |her |their |your |my )?(left|right) hand\b")
_ECHO_WORDS = 6
# A source of so few words tells no language: "open tupperware" is English.
_SHORT = 2
# The hand that does not act may do this as well; whether it does, the tracks say.
_SHARED = frozenset({"hold", "keep"})
# Of the source's verbs and things, the least share that a caption names
_KEPT = 0.6
# Of more verbs or things than this one may go missing
_FEW = 2


@dataclass(frozen=True)
class Verdict:
    """What the check says of a caption."""

    score: float
    """0 to 1: the share of the source's words that are kept times the share of statements that the tracks support."""
    reasons: tuple[str, ...]
    """Why it is refused, each ``name: what``; see ``NAMES``."""

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons


def check(caption: str, source: str, facts: ClipFacts | None, settings: CheckSettings, prompt: str = "") -> Verdict:
    """Judge a caption.

    ``source`` is the narration before, or nothing; words are not compared with one that is not English. ``facts`` is
    None where there are no tracks. ``prompt`` are the narrator's instructions, which no caption may repeat.
    """
    reasons = _form(caption, source, settings, prompt)
    if reasons:
        return Verdict(0.0, tuple(reasons))
    kept = supported = 1.0
    if settings.words and source.strip() and is_english(source, settings.language):
        # What the tracks have no name for is an object, as in "the left hand holds another object".
        name = facts.object.name if facts is not None and facts.object is not None else None
        reasons, kept = compare_words(caption, source, facts, f"{name or ''} object" if facts is not None else "")
    if settings.tracks and facts is not None:
        wrong, statements = unsupported(caption, source, facts, settings.min_seen)
        reasons += wrong
        supported = 1 - min(len(wrong) / max(statements, 1), 1.0)
    return Verdict(kept * supported, tuple(reasons))


def is_english(text: str, least: float) -> bool:
    """Whether at least this share of a text's words are English; names and numbers aside."""
    found = _spelled(text)
    if not found:
        return False
    if sum(word.isascii() for word in found) < least * len(found):
        return False
    return simplemma.in_target_language(" ".join(found), lang="en") >= least


def _spelled(text: str) -> list[str]:
    """Words of two letters and more, those of marks such as #C aside."""
    return re.findall(r"[^\W\d_]{2,}", re.sub(r"^#\s*\w+|#\w+", " ", text))


def compare_words(caption: str, source: str, facts: ClipFacts | None, thing: str) -> tuple[list[str], float]:
    """The half of the check that needs no tracks: reasons, and the share of the source's words that is kept.

    ``facts`` may allow hands that the source does not name, ``thing`` is a further object that may be named.
    """
    reasons = []
    found = language.compare(source, caption, thing)
    told = language.extract_words(source)
    if found.new_verbs or (found.lost_verbs and len(told.verbs) <= _FEW):
        put, gone = ", ".join(found.new_verbs), ", ".join(found.lost_verbs)
        reasons.append(f"verb: {put or 'nothing'} for {gone or 'none of the source'}")
    if (found.new_things and found.lost_things) or found.invented:
        reasons.append(
            f"object: {', '.join(found.new_things)} for {', '.join(found.lost_things) or 'none of the source'}"
        )
    elif found.coverage < _KEPT or (
        len(told.things) <= _FEW and any(language.is_specific(each) for each in found.lost_things)
    ):
        reasons.append(f"object: {', '.join((*found.lost_verbs, *found.lost_things))} left out")
    old, new = set(sides(source)), set(sides(caption))
    if old:
        more = new - old - set(facts.hands if facts is not None else ())
        if old - new or more:
            reasons.append(f"side: {_spoken(new)} for {_spoken(old)}")
        elif language.swaps_hands(source, caption):
            reasons.append("side: the hands have changed places")
    elif new and facts is not None and facts.acting is not None:
        deed = _done_by_another(caption, told.verbs, facts.acting)
        if deed:
            reasons.append(f"side: {deed} is done by the {facts.acting} hand")
    return reasons, found.coverage


def _done_by_another(caption: str, verbs: tuple[str, ...], acting: str) -> str | None:
    """The deed that a caption gives to the hand that does not act."""
    own, others = set[str](), list[str]()
    for clause in clauses(caption):
        means = _WITH.search(clause.text)
        if means and means[1] != acting:
            return means.group()
        did = [
            each
            for each in language.extract_words(clause.text).verbs
            if any(language.are_synonyms(each, verb) for verb in verbs)
        ]
        if clause.sides and acting not in clause.sides:
            others += did
        else:
            own.update(did)
    return next((deed for deed in others if deed not in _SHARED & own), None)


def _form(caption: str, source: str, settings: CheckSettings, prompt: str) -> list[str]:
    """Length, prompt text and language."""
    said = re.findall(r"[\w'-]+", caption)
    if not settings.min_words <= len(said) <= settings.max_words:
        return [f"length: {len(said)} words, not {settings.min_words} to {settings.max_words}"]
    talk = [each.group() for each in _ORDER.finditer(caption)]
    talk += [each.group() for each in _TALK.finditer(caption) if each.group().lower() not in source.lower()]
    if talk:
        return [f"prompt: {talk[0]!r}"]
    repeated = (_runs(caption) & _runs(prompt)) - _runs(source)
    if repeated:
        return [f"prompt: {' '.join(min(repeated))!r}"]
    if settings.language:
        if not is_english(caption, settings.language):
            return ["language: not English"]
        if _copies(caption, source) and not is_english(source, settings.language):
            return ["language: the narration's own words, which are not English"]
    return []


def _copies(caption: str, source: str) -> bool:
    """Whether a caption has most of the source's words; hung on with English ones, they would pass as English."""
    own = set(_spelled(source))
    return len(own) > _SHORT and len(own & set(_spelled(caption))) > len(own) / 2


def _runs(text: str) -> set[tuple[str, ...]]:
    """All runs of some words of a text."""
    said = re.findall(r"[\w'-]+", text.lower())
    return {tuple(said[i : i + _ECHO_WORDS]) for i in range(len(said) - _ECHO_WORDS + 1)}


def _spoken(hands: set[str]) -> str:
    return " and ".join(sorted(hands)) or "no hand"
