"""Whether a caption is true to its clip: to the narration that it was made from, and to the tracks.

:func:`check` judges the caption of any narrator by rules over words, not by a model, so that every refusal names the
words at fault. One half compares verbs, objects and which hand does what with the narration before; the other half
compares hands, directions and contact with the tracks.

Words are compared by their lemma and by the groups of synonyms of ``vocabulary.yml``, which holds all word lists with
the reason for each; a word in no group is compared by its lemma alone. No embedding does that: "left" and "right" are
close to each other in every one.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import simplemma
import yaml

from egohod.data.opposites import opposite_fault
from egohod.hod.config import CheckConfig
from egohod.hod.facts import (
    AWAY,
    CLOCKWISE,
    CLOSER,
    COUNTERCLOCKWISE,
    DOWN,
    LEFT,
    MIRRORED,
    PARALLEL,
    RIGHT,
    SHAKING,
    STILL,
    UP,
    ClipFacts,
    HandFacts,
    Motion,
)


@dataclass(frozen=True)
class Verdict:
    """The result of checking a caption."""

    score: float  # 0 to 1: share of the source's words that remain times share of statements that the tracks support
    # Why it is refused: the words at fault, after one of the names length, prompt, language, side, verb, object, hand,
    # direction, times, contact, distance and a colon.
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


def check_opposite(caption: str, opposite: str, settings: CheckConfig, prompt: str = "") -> tuple[str, ...]:
    """Why a text is not the opposite of a caption that passed :func:`check`; empty if nothing is against it.

    The reasons begin like those of a :class:`Verdict`, with ``word`` for a change of anything but directions. Tracks
    have no say: they are of the clip, which the opposite must not describe.
    """
    reasons = _faults_of_form(opposite, caption, settings, prompt)
    before, after = sides(caption), sides(opposite)
    if not reasons and before != after:
        reasons = [f"side: {', '.join(after) or 'no hand'} for {', '.join(before) or 'no hand'}"]
    # Nouns are among the words that must stay.
    return tuple(reasons) or tuple(filter(None, [opposite_fault(caption, opposite)]))


def check_coarse(coarse: str, caption: str, source: str, settings: CheckConfig, prompt: str = "") -> tuple[str, ...]:
    """Why a text is not a coarse caption of the clip that ``caption`` describes; empty if nothing is against it.

    It has the verbs and objects of the narration before, ``source`` (without one, they are not compared), may be
    shorter than a caption, and names no hand, direction or contact that the narration does not. Tracks have no say:
    there is nothing in it that they measure. The reasons begin like those of a :class:`Verdict`.
    """
    reasons = _faults_of_form(coarse, source, replace(settings, min_words=1), prompt)
    if reasons:
        return tuple(reasons)
    if settings.words and source.strip() and is_english(source, settings.language):
        reasons, _ = compare_words(coarse, source, None, "")
    if set(sides(coarse)) - set(sides(source)):
        reasons.append("hand: a coarse caption names none that the narration does not")
    # "Picks up" is a claim too; where there is no narration it may be the caption's, which the tracks support.
    known = {claim.what for claim in claims(source if source.strip() else caption)}
    reasons += [f"direction: {claim.words!r} is not coarse" for claim in claims(coarse) if claim.what not in known]
    return tuple(dict.fromkeys(reasons))


# --- Form: length, text of a prompt, language ---

# Orders to a model, whoever gives them.
_ORDER = re.compile(
    r"\b(?:ignore|disregard|forget)\b.{0,30}\b(?:above|previous|instructions?|prompt|rules)\b"
    r"|\b(?:system|user) prompt\b",
    re.IGNORECASE,
)
# Words of models about their task; about a clip only if the narration has them, as in "reads the instructions".
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


# --- Vocabulary ---

# The loader in C where PyYAML has it: 0.4 ms instead of 20.
_LISTS = yaml.load(
    Path(__file__).with_name("vocabulary.yml").read_text(encoding="utf-8"),
    Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader),
)
_Groups = dict[str, frozenset[int]]


def _groups(name: str) -> _Groups:
    """The groups of each word; a line of the list is one."""
    groups: dict[str, set[int]] = {}
    for number, line in enumerate(_LISTS[name].strip().splitlines()):
        for word in line.split():
            groups.setdefault(word, set()).add(number)
    return {word: frozenset(numbers) for word, numbers in groups.items()}


_VERBS, _THINGS = _groups("verbs"), _groups("things")
_DIFFERENT = frozenset(
    frozenset((first, second))
    for first, *others in (line.split() for line in _LISTS["different_verbs"].strip().splitlines())
    for second in others
)
_WORDS = {name: frozenset(text.split()) for name, text in _LISTS.items() if isinstance(text, str)}
_FUNCTION_WORDS, _SHAPES, _KINDS, _GENERIC = (_WORDS[x] for x in ("function_words", "shapes", "kinds", "generic"))
_MOTION, _LIGHT, _PLAIN, _PLACING = (_WORDS[x] for x in ("motion", "light", "plain", "placing"))
_BEFORE_THINGS, _AFTER_THINGS, _BEFORE_VERBS = (_WORDS[x] for x in ("before_things", "after_things", "before_verbs"))
_ACTORS, _DETERMINERS, _BEING, _TOOLS = (_WORDS[x] for x in ("actors", "determiners", "being", "tools"))
_TOOLS_OF_ACTIONS = {tool: frozenset(verbs.split()) for tool, verbs in _LISTS["tools_of_actions"].items()}
# One pattern of all phrases; the number of the group that matches tells which.
_PHRASES = list(_LISTS["phrases"].values())
_PHRASE = re.compile("|".join(f"(?P<p{i}>(?<![a-z])(?:{text})(?![a-z]))" for i, text in enumerate(_LISTS["phrases"])))

# --- Clauses ---

_BREAK = re.compile(r"[.;,:!?()]+(?=\s|$)|\b(?:while|whilst|whereas|meanwhile|and|but|then)\b")
_HANDS = re.compile(
    r"\b(?P<pair>(?:left|right)(?: hand)? (?:and|or) (?:the |your |my |his |her |their )?(?:left|right)(?=[- ]hand)"
    r"|both(?= (?:of )?(?:the |your |my |his |her |their |c's )?(?:\w+ )?hands?\b)|both(?= of them\b)|two(?= hands)"
    r"|the hands\b)"
    r"|\b(?P<side>left|right)(?=[- ]hand|'s hand|(?: index| middle| ring| little)? "
    r"(?:palm|fist|wrist|arm|finger|thumb))"
    r"|\b(?P<other>other)(?= hand\b)"
)  # fmt: skip


@dataclass(frozen=True)
class Clause:
    """A part of a narration between stops and conjunctions."""

    text: str  # lower case
    sides: tuple[str, ...]  # hands in order; those of the clause before (at the start: after) where it names none
    named: bool  # whether it names its hands itself


def clauses(text: str) -> list[Clause]:
    """Cut a narration into clauses. "The other hand" is the one that the clauses before did not mention last."""
    text = " ".join(text.lower().replace("’", "'").split())
    spans, start = [], 0
    pairs = [match.span() for match in _HANDS.finditer(text) if match["pair"]]
    for match in _BREAK.finditer(text):
        if not any(first <= match.start() < last for first, last in pairs):  # not within "left and right hand"
            spans.append(text[start : match.start()])
            start = match.end()
    spans.append(text[start:])
    parts: list[tuple[str, tuple[str, ...]]] = []
    last: tuple[str, ...] = ()
    for span in spans:
        if not span.strip(" '\""):
            continue
        hands: list[str] = []
        for match in _HANDS.finditer(span):
            if match["pair"]:
                left_first = match["pair"].startswith(("left", "both", "two", "the"))
                hands += [LEFT, RIGHT] if left_first else [RIGHT, LEFT]
            elif match["side"]:
                hands.append(match["side"])
            elif len(last) == 1:
                hands.append(RIGHT if last[0] == LEFT else LEFT)
        own = tuple(dict.fromkeys(hands))
        last = own or last
        parts.append((span.strip(), own))
    # What comes before the first named hand belongs to that hand: "moves the cup with the left hand".
    current = next((own for _, own in parts if own), ())
    result = []
    for span, own in parts:
        current = own or current
        result.append(Clause(span, current, bool(own)))
    return result


def sides(text: str) -> tuple[str, ...]:
    """The hands that a narration names, in order of mention, with repetitions."""
    return tuple(side for clause in clauses(text) if clause.named for side in clause.sides)


# --- Verbs and things ---


@dataclass(frozen=True)
class Words:
    """The lemmas of a narration by their role, in order of appearance."""

    verbs: tuple[str, ...]
    things: tuple[str, ...]
    heads: tuple[str, ...]  # what is in a thing's place though it is a degree, a shape or a kind: "holds the light"
    all: tuple[str, ...]  # every word, for whether something is named at all


@functools.lru_cache(maxsize=65536)
def lemma(word: str) -> str:
    """The dictionary form of a lower-case English word."""
    base = word if word == "dice" else simplemma.lemmatize(word, lang="en").lower()
    base = _LISTS["lemmas"].get(base, base)
    if base.endswith("ing"):  # the lemmatiser takes them for nouns: "the heating of the oil", "cutting it in half"
        stem = base[:-3]
        single = stem[:-1] if stem[-1:] == stem[-2:-1] else stem
        return next((verb for verb in (stem, stem + "e", single) if verb in _VERBS), base)
    return str(base)


def extract_words(text: str) -> Words:
    """The verbs and things of an English narration, without function words, sides, kinds and degrees."""
    text = text.lower().replace("’", "'")
    text = _PHRASE.sub(lambda match: f" {_PHRASES[int(match.lastgroup[1:])]} ", text)  # type: ignore[index]
    verbs, things, heads, every = (list[str]() for _ in range(4))
    before = "."
    tokens = re.findall(r"[^\W\d_]+(?:[-'][^\W\d_]+)*|[.,;:()]", text)
    for token, after in itertools.zip_longest(tokens, tokens[1:], fillvalue="."):
        form = token.removesuffix("'s")
        for word in [form] if form in _THINGS or form in _VERBS else re.split(r"[-']", form):
            if word[0].isalpha():
                base = word if word in _THINGS else lemma(word)
                every += [base, word]
                role = _role(word, base, before, after)
                if role:
                    (verbs if role == "verb" else things).append(base)
                elif before in _BEFORE_THINGS and (after in _AFTER_THINGS or not after[0].isalpha()):
                    heads.append(base)
            before = word
    return Words(*(tuple(dict.fromkeys(each)) for each in (verbs, things, heads, every)))


def _role(word: str, base: str, before: str, after: str) -> str | None:
    """verb, thing or None, by the word and its neighbours.

    A tagger of parts of speech would be one more model to download.
    """
    if len(word) < 3 or base in _MOTION or word.endswith("ly"):
        return None
    is_thing, is_verb = base in _THINGS, base in _VERBS
    # An unknown word that something does to something: "the right hand glues", "and vacuums the"
    acts = before in _ACTORS or (not is_thing and before in _BEFORE_VERBS and after in _DETERMINERS)
    if word in _FUNCTION_WORDS or base in _FUNCTION_WORDS:
        return "verb" if acts and is_verb and base not in _PLAIN else None
    # "the sliced meat" is how the meat is, not what is done
    participle = word.endswith("ed") and base != word and not acts and before not in _BEING
    noun_like = before in _BEFORE_THINGS or (is_thing and lemma(before) in _THINGS)
    # "pork slices", "the spring onion leaves": what may be a thing is a verb only where something does it
    free = base in _SHAPES or base in _KINDS
    noun_like = noun_like or ((is_thing or free) and before not in _BEFORE_VERBS and not before.endswith("ly"))
    # "which have been seasoned"
    noun_like = noun_like and not (before in _BEING and base != word and word.endswith("ed"))
    if acts or (is_verb and not noun_like and not participle):
        return "verb"
    is_last = after in _FUNCTION_WORDS or not after[0].isalpha()  # no noun follows that it could modify
    modifies = base in _KINDS or (is_verb and not is_thing)
    if base in _SHAPES or participle or (modifies and not (noun_like and is_last)):
        return None
    return "thing"


# --- Comparison ---


def are_synonyms(first: str, second: str, groups: _Groups | None = None) -> bool:
    """Whether narrators use two lemmas for one another; by the groups of verbs, things or (None) either."""
    if first == second:
        return True
    if frozenset((first, second)) in _DIFFERENT:
        return False
    for some in (_VERBS, _THINGS) if groups is None else (groups,):
        if some.get(first, frozenset()) & some.get(second, frozenset()):
            return True
    # Compounds and endings that the lemmatiser leaves as they are: "washcloth" and "cloth".
    short, long = sorted((first, second), key=len)
    return len(short) >= 5 and (long.endswith(short) or (len(long) - len(short) < 5 and long.startswith(short[:-1])))


def _matches(word: str, others: Iterable[str], groups: _Groups) -> bool:
    return any(are_synonyms(word, other, groups) for other in others)


@dataclass(frozen=True)
class Comparison:
    """Differences between the words of a caption and those of its source."""

    new_verbs: tuple[str, ...]  # verbs of the caption without a synonym in the source; without light and plain ones
    lost_verbs: tuple[str, ...]
    new_things: tuple[str, ...]
    lost_things: tuple[str, ...]
    invented: tuple[str, ...]  # new things that are never understood, and tools that the action does not need
    coverage: float  # share of the source's verbs and things that the caption still names; 1.0 where there are none


def compare(source: str, caption: str, thing: str = "") -> Comparison:
    """Compare a caption's verbs and things with its source's; ``thing`` may be named besides.

    A word replaces another only where that other is not named itself: next to "cuts", "peels" is no word for it.
    """
    old, new = extract_words(source), extract_words(caption)
    allowed = (*old.all, *extract_words(thing).all)
    weak = _LIGHT | _PLAIN

    # --- Verbs ---
    added = tuple(word for word in new.verbs if word not in weak and word not in old.all)
    removed = tuple(word for word in old.verbs if word not in new.all)
    new_verbs = tuple(word for word in added if not _matches(word, old.all, _VERBS))
    # One with a synonym in the source, but none among the removed ones, is one too many: the source names that itself.
    surplus = tuple(word for word in added if word not in new_verbs and not _matches(word, removed, _VERBS))
    lost_verbs = tuple(word for word in removed if word not in weak and not _matches(word, new.all, _VERBS))
    unreplaced = tuple(word for word in removed if word not in weak - _PLACING and not _matches(word, added, _VERBS))
    if surplus and unreplaced:
        new_verbs, lost_verbs = (*new_verbs, *surplus), tuple(dict.fromkeys((*lost_verbs, *unreplaced)))

    # --- Things ---
    added = tuple(word for word in new.things if word not in allowed)
    removed = tuple(word for word in old.things if word not in new.all)
    new_things = tuple(word for word in added if not _matches(word, allowed, _THINGS))
    surplus = tuple(
        word
        for word in (*added, *new.heads)
        if word not in (*allowed, *new_things, *_GENERIC) and not _matches(word, removed, _THINGS)
    )
    lost_things = tuple(word for word in removed if not _matches(word, new.all, _THINGS))
    unreplaced = tuple(word for word in removed if not _matches(word, added, _THINGS))
    if surplus and unreplaced:
        new_things, lost_things = (*new_things, *surplus), tuple(dict.fromkeys((*lost_things, *unreplaced)))
    if not any(word in _THINGS for word in (*new_things, *lost_things)) and lost_things:
        # Turns of phrase ("halfway" for "50 % hot"): only the coverage counts.
        new_things = ()
    invented = []
    for word in new_things:
        is_tool = word in _TOOLS_OF_ACTIONS
        if is_specific(word) or (is_tool and not _TOOLS_OF_ACTIONS[word].intersection(old.all)):
            invented.append(word)
    total = sum(word not in weak for word in (*old.verbs, *old.things))
    coverage = 1 - (len(lost_verbs) + len(lost_things)) / total if total else 1.0
    return Comparison(new_verbs, lost_verbs, new_things, lost_things, tuple(invented), coverage)


def is_specific(thing: str) -> bool:
    """Whether the vocabulary has it as a thing, no common tool, and no word for many things."""
    return thing in _THINGS and thing not in _TOOLS and thing not in _GENERIC


def swaps_hands(source: str, caption: str) -> bool:
    """Whether a caption assigns to one hand what its source assigns to the other.

    Only where both name both hands; each hand's words are those of its clauses. Where the words do not decide, the
    order in which the hands are named does.
    """
    by_side: list[dict[str, set[str]]] = []
    for text in (source, caption):
        words: dict[str, set[str]] = {LEFT: set(), RIGHT: set()}
        for clause in clauses(text):
            if len(clause.sides) == 1:
                extracted = extract_words(clause.text)
                words[clause.sides[0]] |= {*extracted.verbs, *extracted.things}
        by_side.append(words)
    old, new = by_side
    if not (old[LEFT] and old[RIGHT] and new[LEFT] and new[RIGHT]):
        return False

    def shared(first: set[str], second: set[str]) -> int:
        return sum(any(are_synonyms(word, other) for other in second) for word in first)

    # Words that the source has for both hands tell nothing.
    own_left, own_right = old[LEFT] - old[RIGHT], old[RIGHT] - old[LEFT]
    straight = shared(own_left, new[LEFT]) + shared(own_right, new[RIGHT])
    across = shared(own_left, new[RIGHT]) + shared(own_right, new[LEFT])
    if straight != across:
        return across > straight
    order, new_order = sides(source), sides(caption)
    return bool(order) and order[0] != new_order[0]


# --- Against the narration before ---

_WITH = re.compile(r"\b(?:with|using|uses?|by) (?:the |his |her |their |your |my )?(left|right) hand\b")
# The hand that does not act may do this as well; whether it does is in the tracks.
_SHARED = frozenset({"hold", "keep"})
# Least share of the source's verbs and things that a caption names
_LEAST_COVERAGE = 0.6
# Of more verbs or things than this one may be missing
_FEW = 2


def compare_words(caption: str, source: str, facts: ClipFacts | None, thing: str) -> tuple[list[str], float]:
    """The half of the check that needs no tracks: reasons, and the share of the source's words that remains.

    ``facts`` may allow hands that the source does not name; ``thing`` is a further object that may be named.
    """
    reasons = []
    words = compare(source, caption, thing)
    before = extract_words(source)
    if words.new_verbs or (words.lost_verbs and len(before.verbs) <= _FEW):
        new, lost = ", ".join(words.new_verbs), ", ".join(words.lost_verbs)
        reasons.append(f"verb: {new or 'nothing'} for {lost or 'none of the source'}")
    if (words.new_things and words.lost_things) or words.invented:
        lost = ", ".join(words.lost_things)
        reasons.append(f"object: {', '.join(words.new_things)} for {lost or 'none of the source'}")
    elif words.coverage < _LEAST_COVERAGE or (
        len(before.things) <= _FEW and any(is_specific(each) for each in words.lost_things)
    ):
        reasons.append(f"object: {', '.join((*words.lost_verbs, *words.lost_things))} left out")
    old_sides, new_sides = set(sides(source)), set(sides(caption))
    if old_sides:
        if old_sides - new_sides or new_sides - old_sides - set(facts.hands if facts is not None else ()):
            new, old = (" and ".join(sorted(each)) or "no hand" for each in (new_sides, old_sides))
            reasons.append(f"side: {new} for {old}")
        elif swaps_hands(source, caption):
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
        actions = [each for each in extract_words(clause.text).verbs if any(are_synonyms(each, verb) for verb in verbs)]
        if clause.sides and acting not in clause.sides:
            others += actions
        else:
            own.update(actions)
    return next((action for action in others if action not in _SHARED & own), None)


# --- Against the tracks ---

TWICE, ONCE, ABSENT, CONTACT, RELEASE = "twice", "once", "out of sight", "contact", "release"
CLOSING, PARTING = "closing", "parting"
REGRASP, DISTANCE, TO_LEFT_HAND, TO_RIGHT_HAND = "regrasp", "distance", "to the left hand", "to the right hand"

# Seen from the head, what goes away over a table goes up in the picture: narrators write either.
_AXES = ({LEFT: -1, RIGHT: 1}, {UP: -1, AWAY: -1, DOWN: 1, CLOSER: 1})
_TURNS = (CLOCKWISE, COUNTERCLOCKWISE)
# A distance in a caption may differ from the measured one by this factor, as the estimate from the hand's size does
_ROUGHLY = 2
# Least net way, in shares of the picture, for "from the left side to the right side" of a motion with several legs
_NET = 0.05

_GO = (
    r"(?:(?:mov|slid|push|pull|shift|wip|swip|sweep|turn|drag|drift|travel|head|swing|stir|brush|circl|tilt|go|goe)"
    r"(?:e|es|s|ed|ing)?|slid|went|swept|swung)"
)
_SELF = r"(?:the |their |his |her |your |my )?(?:body|self|camera|wearer|chest|viewer|c|him|her|me|you|himself|herself)"
_IT = r"(?:it|them|the \w+)"
_GIVE = rf"(?:pass|hand|switch|transfer)(?:e?s|ed|ing)? {_IT} (?:over )?(?:in)?to (?:the |his |her |their |your )?"
_FROM, _TO = (rf"{word} (?:the |his |her |their |your )?" for word in ("from", "(?:in)?to"))
_PATTERNS: list[tuple[str, tuple[str, ...]]] = [
    (rf"{_FROM}left(?: hand)? {_TO}right hand|{_GIVE}right hand", (TO_RIGHT_HAND,)),
    (rf"{_FROM}right(?: hand)? {_TO}left hand|{_GIVE}left hand", (TO_LEFT_HAND,)),
    (rf"re-?grasp(?:s|ed|ing)?|(?:grasp|grip|tak|pick)(?:e?s|ing)? {_IT} (?:up )?again"
     rf"|(?:releas(?:es|ing)|let(?:s|ting)? go of) {_IT} in between", (REGRASP,)),
    (r"in parallel|(?:in )?the same way|in step with", (PARALLEL,)),
    (r"symmetrically|in mirror image|mirroring (?:it|each other|the (?:left|right|other) hand)", (MIRRORED,)),
    (r"steadies|steadying|stabili[sz](?:es?|ing)", (CONTACT, STILL)),
    (r"(?:about |around |roughly |some )?[0-9]+(?:\.[0-9]+)? ?(?:cm|centimet(?:er|re)s?|m|met(?:er|re)s?)\b",
     (DISTANCE,)),
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

    A caption that names no hand although one acts is no hand-object narration. A hand's motion or contact in the source
    is accepted without the tracks; where it names no hand it speaks of the one that acts.
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
    who, pair = f"the {hand.side} hand", facts.pair
    handed = f"to the {pair.handed_to} hand" if pair is not None else None  # TO_LEFT_HAND, TO_RIGHT_HAND
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
        elif claim.what == RELEASE and hand.release is None and not hand.regrasps:
            yield f'contact: "{claim.words}", but {who} does not let go'
        elif claim.what == REGRASP and not hand.regrasps:
            yield f'contact: "{claim.words}", but {who} takes nothing again'
        elif claim.what in (TO_LEFT_HAND, TO_RIGHT_HAND) and claim.what != handed:
            yield f'contact: "{claim.words}", but nothing is handed over so'
        elif claim.what in (PARALLEL, MIRRORED) and (pair is None or pair.moves != claim.what):
            yield f'direction: "{claim.words}", but the hands do not move so'
        elif claim.what == DISTANCE and not any(_is_about(claim.words, motion.distance) for motion in motions):
            yield f'distance: "{claim.words}", but {who} goes {_centimetres(hand.motion.distance)}'
        elif claim.what in (CLOSING, PARTING) and facts.hands_together not in (None, claim.what):
            yield f'direction: "{claim.words}", but the hands are {facts.hands_together}'


def _is_about(words: str, distance: float | None) -> bool:
    """Whether a distance in words is a measured one, in metres."""
    number = re.search(r"[0-9.]+", words)
    assert number, "the pattern has one"
    stated = float(number[0]) / (100 if "c" in words else 1)
    return distance is not None and distance / _ROUGHLY <= stated <= distance * _ROUGHLY


def _centimetres(distance: float | None) -> str:
    return "an unknown distance" if distance is None else f"{100 * distance:.0f} cm"


def _goes(directions: list[str], motion: Motion) -> bool:
    """Whether a motion's legs begin with these directions, or lead there on the whole."""
    if directions[0] in _TURNS or directions[0] == SHAKING:
        return all(each in motion.directions for each in directions)
    number = next(i for i, axis in enumerate(_AXES) if directions[0] in axis)
    axis = _AXES[number]
    wanted, legs = (
        [way for way, _ in itertools.groupby(axis[each] for each in ways if each in axis)]
        for ways in (directions, motion.directions)
    )
    if legs[: len(wanted)] == wanted:
        return True
    path = motion.path[np.isfinite(motion.path).all(axis=1)]
    net = path[-1, number] - path[0, number] if len(path) else 0.0
    return len(wanted) == 1 and bool(legs) and legs[-1] == wanted[0] and net * wanted[0] > _NET
