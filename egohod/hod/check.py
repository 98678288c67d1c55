"""Whether a caption is true to its clip: to the narration that it was made from, and to the tracks.

:func:`check` judges the caption of any narrator by rules over words, not by a model, so that every refusal names the
words at fault. One half compares verbs, objects and which hand does what with the narration before; the other half
compares hands, directions and contact with the tracks. :func:`check_narrations` decides what happens to captions that
are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import simplemma

from egohod.hod import language
from egohod.hod.config import CheckConfig
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
from egohod.hod.language import clauses, sides
from egohod.hod.narrators.base import Narration, Narrator, Request
from egohod.hod.narrators.template import TemplateNarrator


@dataclass(frozen=True)
class Verdict:
    """The result of checking a caption."""

    score: float  # 0 to 1: share of the source's words that remain times share of statements that the tracks support
    # Why it is refused: the words at fault, after one of the names length, prompt, language, side, verb, object, hand,
    # direction, times, contact and a colon.
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether there is no reason against it."""
        return not self.reasons


def check(caption: str, source: str, facts: ClipFacts | None, settings: CheckConfig, prompt: str = "") -> Verdict:
    """Judge a caption.

    Args:
        caption: the sentence to judge.
        source: the narration before, or nothing; its words are not compared if it is not English.
        facts: of the tracks; None where there are none.
        settings: what a caption must satisfy.
        prompt: the narrator's instructions, which no caption may repeat.
    """
    # First: a caption that is no sentence of English has no claims that could be compared.
    reasons = _faults_of_form(caption, source, settings, prompt)
    if reasons:
        return Verdict(0.0, tuple(reasons))
    coverage = support = 1.0
    if settings.words and source.strip() and is_english(source, settings.language):
        # What the tracks have no name for is an object, as in "the left hand holds another object".
        name = facts.object.name if facts is not None and facts.object is not None else None
        more = f"{name or ''} object" if facts is not None else ""
        reasons, coverage = compare_words(caption, source, facts, more)
    if settings.tracks and facts is not None:
        unsupported, statements = unsupported_claims(caption, source, facts, settings.min_seen)
        reasons += unsupported
        support = 1 - min(len(unsupported) / max(statements, 1), 1.0)
    return Verdict(coverage * support, tuple(reasons))


# --- The policy for captions that are refused ---


@dataclass(frozen=True)
class Checked:
    """A caption that went through the check."""

    text: str | None  # None where not even the template has something true to say
    narrator: str  # whose caption it is in the end; template too where it replaced another's
    verdict: Verdict
    attempts: int  # how often the narrator was asked: 1 or 2
    refusals: tuple[str, ...]  # why its captions were refused, if it was asked twice or replaced
    prompt_tokens: int
    completion_tokens: int
    unanswered: bool  # the narrator had no usable answer at least once: another day it may have one


def check_narrations(
    requests: Sequence[Request],
    narrations: Sequence[Narration],
    narrator: Narrator,
    settings: CheckConfig,
    template: TemplateNarrator,
) -> Iterator[tuple[int, Checked]]:
    """Check the first narration of each request, and replace those that are refused.

    A refused caption is asked for once more, with the reasons (``settings.ask_again``; never of the template, which
    would say the same). If that is refused too, ``template`` narrates the source, and if that fails, the facts alone.
    Yields (index of the request, result) once for each, as soon as it is decided. Raises what the narrator raises.
    """
    instructions = getattr(narrator, "instructions", "")
    answers: list[list[Narration]] = [[] for _ in requests]
    refusals: list[tuple[str, ...]] = [() for _ in requests]

    def result(number: int, text: str | None, who: str, verdict: Verdict) -> tuple[int, Checked]:
        own = answers[number]
        prompt_tokens, completion_tokens = sum(a.prompt_tokens for a in own), sum(a.completion_tokens for a in own)
        unanswered = any(answer.problem is not None for answer in own)
        history = (len(own), refusals[number], prompt_tokens, completion_tokens, unanswered)
        return number, Checked(text, who, verdict, *history)

    def judge(number: int, answer: Narration) -> Verdict:
        answers[number].append(answer)
        if answer.text is None:
            verdict = Verdict(0.0, (answer.problem or "no answer",))
        else:
            request = requests[number]
            verdict = check(answer.text, request.source, request.facts, settings, instructions)
        refusals[number] += verdict.reasons
        return verdict

    refused = []
    for number, answer in enumerate(narrations):
        verdict = judge(number, answer)
        if verdict.passed:
            yield result(number, answer.text, answer.narrator, verdict)
        else:
            refused.append(number)
    if refused and settings.ask_again and narrator.name != "template":
        numbers, refused = refused, []
        again = [replace(requests[n], complaints=refusals[n], refused=answers[n][0].text) for n in numbers]
        for place, answer in narrator.narrate(again):
            verdict = judge(numbers[place], answer)
            if verdict.passed:
                yield result(numbers[place], answer.text, answer.narrator, verdict)
            else:
                refused.append(numbers[place])
    for number in refused:
        request = requests[number]
        text, verdict = None, Verdict(0.0, refusals[number])
        for source in dict.fromkeys((request.source, "")):
            caption = template.caption(source, request)
            # The facts alone are checked as what they are, a caption without a narration before.
            prompt = instructions if source == request.source else ""
            verdict = check(caption, source, request.facts, settings, prompt)
            if verdict.passed:
                text = caption
                break
        yield result(number, text, "template", verdict)


# --- Form: length, text of a prompt, language ---

# Orders to a model, whoever gives them.
_ORDER = re.compile(
    r"\b(?:ignore|disregard|forget)\b.{0,30}\b(?:above|previous|instructions?|prompt|rules)\b"
    r"|\b(?:system|user) prompt\b",
    re.IGNORECASE,
)
# What models say about their task; about a clip only if the narration has it, as in "reads the instructions".
_TALK = re.compile(
    r"\bas an ai\b|\bi(?:'m| am) sorry\b|\bi can(?:'t|not)\b|\bhere (?:is|are)\b|\bsure[,!]|\bcertainly\b"
    r"|\b(?:caption|narration|output|answer|rewritten|facts?|clip \d+) ?:|\binstructions?\b|\bjson\b"
    r"|https?://|```|[{}<>\[\]]",
    re.IGNORECASE,
)
# A run of so many words of the prompt is an echo of it; shorter ones are ordinary English.
_ECHO_WORDS = 6
# A source of so few words does not show its language: "open tupperware" is English.
_SHORT = 2


def _faults_of_form(caption: str, source: str, settings: CheckConfig, prompt: str) -> list[str]:
    length = len(re.findall(r"[\w'-]+", caption))
    if not settings.min_words <= length <= settings.max_words:
        return [f"length: {length} words, not {settings.min_words} to {settings.max_words}"]
    talk = [match.group() for match in _ORDER.finditer(caption)]
    talk += [match.group() for match in _TALK.finditer(caption) if match.group().lower() not in source.lower()]
    if talk:
        return [f"prompt: {talk[0]!r}"]
    echo = (_word_runs(caption) & _word_runs(prompt)) - _word_runs(source)
    if echo:
        return [f"prompt: {' '.join(min(echo))!r}"]
    if settings.language:
        if not is_english(caption, settings.language):
            return ["language: not English"]
        # Most words of a foreign source with English ones added would pass as English.
        source_words = set(_words(source))
        is_copy = len(source_words & set(_words(caption))) > len(source_words) / 2
        if len(source_words) > _SHORT and is_copy and not is_english(source, settings.language):
            return ["language: the narration's own words, which are not English"]
    return []


def is_english(text: str, least: float) -> bool:
    """Whether at least this share of a text's words are English; names and numbers do not count."""
    words = _words(text)
    # simplemma knows no script but its languages': other alphabets are counted first.
    if not words or sum(word.isascii() for word in words) < least * len(words):
        return False
    return simplemma.in_target_language(" ".join(words), lang="en") >= least


def _words(text: str) -> list[str]:
    """Words of at least two letters, without marks such as #C."""
    return re.findall(r"[^\W\d_]{2,}", re.sub(r"^#\s*\w+|#\w+", " ", text))


def _word_runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w'-]+", text.lower())
    return {tuple(words[i : i + _ECHO_WORDS]) for i in range(len(words) - _ECHO_WORDS + 1)}


# --- Against the narration before ---

_WITH = re.compile(r"\b(?:with|using|uses?|by) (?:the |his |her |their |your |my )?(left|right) hand\b")
# The hand that does not act may do this as well; whether it does is in the tracks.
_SHARED = frozenset({"hold", "keep"})
# Least share of the source's verbs and things that a caption names
_LEAST_COVERAGE = 0.6
# Of more verbs or things than this one may be missing
_FEW = 2


def compare_words(caption: str, source: str, facts: ClipFacts | None, thing: str) -> tuple[list[str], float]:
    """The half of the check that needs no tracks: reasons, and the share of the source's words that is kept.

    ``facts`` may allow hands that the source does not name; ``thing`` is a further object that may be named.
    """
    reasons = []
    words = language.compare(source, caption, thing)
    before = language.extract_words(source)
    if words.new_verbs or (words.lost_verbs and len(before.verbs) <= _FEW):
        new, lost = ", ".join(words.new_verbs), ", ".join(words.lost_verbs)
        reasons.append(f"verb: {new or 'nothing'} for {lost or 'none of the source'}")
    if (words.new_things and words.lost_things) or words.invented:
        lost = ", ".join(words.lost_things)
        reasons.append(f"object: {', '.join(words.new_things)} for {lost or 'none of the source'}")
    elif words.coverage < _LEAST_COVERAGE or (
        len(before.things) <= _FEW and any(language.is_specific(each) for each in words.lost_things)
    ):
        reasons.append(f"object: {', '.join((*words.lost_verbs, *words.lost_things))} left out")
    old_sides, new_sides = set(sides(source)), set(sides(caption))
    if old_sides:
        if old_sides - new_sides or new_sides - old_sides - set(facts.hands if facts is not None else ()):
            new, old = (" and ".join(sorted(each)) or "no hand" for each in (new_sides, old_sides))
            reasons.append(f"side: {new} for {old}")
        elif language.swaps_hands(source, caption):
            reasons.append("side: the hands have changed places")
    elif new_sides and facts is not None and facts.acting is not None:
        action = _action_of_other_hand(caption, before.verbs, facts.acting)
        if action:
            reasons.append(f"side: {action} is done by the {facts.acting} hand")
    return reasons, words.coverage


def _action_of_other_hand(caption: str, verbs: tuple[str, ...], acting: str) -> str | None:
    """One of the source's actions that a caption attributes to the hand that does not act."""
    own, others = set[str](), list[str]()
    for clause in clauses(caption):
        means = _WITH.search(clause.text)
        if means and means[1] != acting:
            return means.group()
        actions = [
            each
            for each in language.extract_words(clause.text).verbs
            if any(language.are_synonyms(each, verb) for verb in verbs)
        ]
        if clause.sides and acting not in clause.sides:
            others += actions
        else:
            own.update(actions)
    return next((action for action in others if action not in _SHARED & own), None)


# --- Against the tracks ---

TWICE, ONCE, ABSENT, CONTACT, RELEASE = "twice", "once", "out of sight", "contact", "release"
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
# One expression with a group for each pattern, which tells what matched: of two that match at a place the first wins.
_CLAIM = re.compile("|".join(rf"(?P<c{i}>\b(?:{pattern}))" for i, (pattern, _) in enumerate(_PATTERNS)))


@dataclass(frozen=True)
class Claim:
    """One statement about a hand, or about the action where no hand is named."""

    sides: tuple[str, ...]  # empty: the hand that acts
    what: str  # a direction of egohod.hod.facts, or one of the words above
    words: str  # as the caption has it


def claims(text: str) -> list[Claim]:
    """All statements of a caption about motion and contact, in order."""
    statements = []
    for clause in clauses(text):
        for match in _CLAIM.finditer(clause.text):
            side = match["to"] or match["then"] or match["go"] or match["ward"]
            number = next(i for i in range(len(_PATTERNS)) if match[f"c{i}"] is not None)
            for what in (side,) if side else _PATTERNS[number][1]:
                statements.append(Claim(clause.sides, what, match.group()))
    return statements


def unsupported_claims(caption: str, source: str, facts: ClipFacts, min_seen: float) -> tuple[list[str], int]:
    """What the tracks do not support, as reasons; and the number of statements.

    A caption that names no hand although one acts is no hand-object narration. What the source says of a hand's motion
    or contact is accepted without the tracks; where it names no hand it speaks of the one that acts.
    """
    before, statements = claims(source), claims(caption)
    reasons: list[str] = []
    named, in_source = (
        {side for clause in clauses(text) if clause.named for side in clause.sides} for text in (caption, source)
    )
    absent = {side for claim in statements if claim.what == ABSENT for side in claim.sides}
    hands = {side: hand for side, hand in facts.hands.items() if hand.seen >= min_seen}
    if facts.acting in hands and not named:
        reasons.append(f"hand: nothing is said of the {facts.acting} hand")
    for side in sorted(named - in_source):
        # A hand that is in the picture for less than half of the clip may be called out of sight.
        if side in absent and side in hands and hands[side].seen > 0.5:
            reasons.append(f"hand: the {side} hand is in sight")
        elif side not in absent and side not in hands:
            reasons.append(f"hand: no {side} hand was found")
    # By the hands that they are about: directions of one hand in one sentence are one motion.
    for pair in dict.fromkeys(claim.sides for claim in statements):
        own = [claim for claim in statements if claim.sides == pair]
        for side in pair or ((facts.acting,) if facts.acting else ()):
            if side in hands:
                accepted = {claim.what for claim in before if side in (claim.sides or (facts.acting or side,))}
                reasons += _unsupported_of_hand(own, hands[side], facts, accepted)
    return list(dict.fromkeys(reasons)), len(statements) + len(named)


def _unsupported_of_hand(
    statements: list[Claim], hand: HandFacts, facts: ClipFacts, accepted: set[str]
) -> Iterator[str]:
    who = f"the {hand.side} hand"
    motions = [hand.motion]
    # The motion of what the hand moves may be meant as well, unless its box was only guessed from the hand's.
    if hand.side == facts.acting and facts.object is not None and not facts.object.guessed:
        motions.append(facts.object.motion)
    motions = [motion for motion in motions if motion.directions]
    ways = ", then ".join(hand.motion.directions)
    # Directions of one axis are judged together, in order: "to the left, then to the right" is one motion.
    for group in (*_AXES, _TURNS, (SHAKING,)):
        directions = [claim for claim in statements if claim.what in group]
        rest = [claim for claim in directions if claim.what not in accepted]
        readings = [[claim.what for claim in each] for each in (directions, rest) if each]
        if motions and rest and not any(_goes(each, motion) for motion in motions for each in readings):
            yield f'direction: "{", ".join(claim.words for claim in directions)}", but {who} goes {ways}'
    for claim in (each for each in statements if each.what not in accepted):
        # A hand that rests does so itself, whatever happens to what it touches.
        resting = motions[:1] if claim.words.startswith("rest") else motions
        if claim.what == STILL and resting and not any(motion.directions == (STILL,) for motion in resting):
            yield f'direction: "{claim.words}", but {who} goes {ways}'
        elif claim.what in (ONCE, TWICE) and motions:
            times = 2 if claim.what == TWICE else 1
            if all(motion.repeats != times or motion.directions == (STILL,) for motion in motions):
                yield f'times: "{claim.words}", but it was {motions[0].repeats}'
        elif claim.what == CONTACT and hand.touches is None and hand.contact is None:
            yield f'contact: "{claim.words}", but {who} touches nothing'
        elif claim.what == RELEASE and hand.release is None:
            yield f'contact: "{claim.words}", but {who} does not let go'
        elif claim.what in (CLOSING, PARTING) and facts.hands_together not in (None, claim.what):
            yield f'direction: "{claim.words}", but the hands are {facts.hands_together}'


def _goes(directions: list[str], motion: Motion) -> bool:
    """Whether a motion's legs begin with these directions, or lead there on the whole."""
    if directions[0] in _TURNS or directions[0] == SHAKING:
        return all(each in motion.directions for each in directions)
    number = next(i for i, axis in enumerate(_AXES) if directions[0] in axis)
    axis = _AXES[number]
    wanted = _without_repeats([axis[each] for each in directions])
    legs = _without_repeats([axis[each] for each in motion.directions if each in axis])
    if legs[: len(wanted)] == wanted:
        return True
    path = motion.path[np.isfinite(motion.path).all(axis=1)]
    net = path[-1, number] - path[0, number] if len(path) else 0.0
    return len(wanted) == 1 and bool(legs) and legs[-1] == wanted[0] and net * wanted[0] > _NET


def _without_repeats(values: list[int]) -> list[int]:
    return [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
