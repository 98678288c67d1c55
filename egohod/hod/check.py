"""Whether a caption is true to its clip: to the narration that it was made from, and to the tracks.

:func:`check` judges the caption of any narrator by rules over words, not by a model, so that every refusal names the
words at fault. One half compares verbs, objects and which hand does what with the narration before; the other half
compares hands, directions and contact with the tracks.

Words are compared by their lemma and by the groups of synonyms of a :class:`~egohod.hod.vocabulary.Vocabulary`, which
has all word lists and patterns; a word in no group is compared by its lemma alone. No embedding does that: "left" and
"right" are close to each other in every one. Functions that take no settings take the vocabulary as their last
argument, the packaged one by default.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import simplemma

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
from egohod.hod.vocabulary import (
    ABSENT,
    CLOSING,
    CONTACT,
    DISTANCE,
    ONCE,
    PARTING,
    REGRASP,
    RELEASE,
    SIDE,
    TO_LEFT_HAND,
    TO_RIGHT_HAND,
    TWICE,
    Groups,
    Vocabulary,
    load_vocabulary,
)


@dataclass(frozen=True)
class Verdict:
    """The result of checking a caption."""

    score: float  # 0 to 1: share of the source's words that remain times share of statements that the tracks support
    # Why it is refused: the words at fault, after one of the names length, prompt, language, side, verb, object,
    # negation, hand, direction, times, contact, distance and a colon.
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether there is no reason against it."""
        return not self.reasons


# --- Two verdicts: the rules and a judge ---

# The reasons of the rules that a judge may overrule: they come from lists of words. Sides, directions and contact are
# measured, and form is no matter of opinion.
OF_WORDS = ("verb", "object")


@dataclass(frozen=True)
class Opinion:
    """What a judge makes of one caption."""

    judge: str  # kind and model
    entailed: bool | None  # None: no answer
    probability: float | None = None  # of entailment, where the judge has one
    reason: str = ""  # the judge's own words, or why there is no answer
    overruled: tuple[str, ...] = ()  # reasons of the rules that the caption passed in spite of

    def __str__(self) -> str:
        verdict = "entailed" if self.entailed else "not entailed"
        certainty = "" if self.probability is None else f" (p = {self.probability:.2f})"
        return f"judge: {self.judge} says {verdict}{certainty}" + (f": {self.reason}" if self.reason else "")


def may_ask(verdict: Verdict, mode: str) -> bool:
    """Whether an opinion could change the rules' verdict."""
    if verdict.passed:
        return mode in ("veto", "both")
    return mode in ("rescue", "both") and all(reason.partition(":")[0] in OF_WORDS for reason in verdict.reasons)


def combine(verdict: Verdict, opinion: Opinion, mode: str) -> tuple[Verdict, Opinion]:
    """The verdict of rules and judge, and the opinion with what it overruled; without an answer the rules decide."""
    if opinion.entailed is None or not may_ask(verdict, mode):
        return verdict, opinion
    if verdict.passed and not opinion.entailed:
        return Verdict(0.0, (str(opinion),)), opinion
    if opinion.entailed and not verdict.passed:
        return Verdict(verdict.score, ()), replace(opinion, overruled=verdict.reasons)
    return verdict, opinion


# --- The rules ---


def check(caption: str, source: str, facts: ClipFacts | None, settings: CheckConfig, prompt: str = "") -> Verdict:
    """Judge a caption.

    Args:
        caption: the sentence to judge.
        source: the narration before, or nothing; its words are not compared if it is not English.
        facts: of the tracks; None where there are none.
        settings: what a caption must satisfy.
        prompt: the narrator's instructions, which no caption may repeat.
    """
    vocabulary = load_vocabulary(settings.vocabulary)
    # First: a caption that is no sentence of English has no claims that could be compared.
    reasons = _faults_of_form(caption, source, settings, prompt)
    if reasons:
        return Verdict(0.0, tuple(reasons))
    coverage = support = 1.0
    if settings.words and source.strip() and is_english(source, settings.language):
        # What the tracks have no name for is an object, as in "the left hand holds another object".
        name = facts.object.name if facts is not None and facts.object is not None else None
        more = f"{name or ''} object" if facts is not None else ""
        reasons, coverage = compare_words(caption, source, facts, more, vocabulary)
    if settings.tracks and facts is not None:
        unsupported, statements = unsupported_claims(caption, source, facts, settings.min_seen, vocabulary)
        reasons += unsupported
        support = 1 - min(len(unsupported) / max(statements, 1), 1.0)
    return Verdict(coverage * support, tuple(reasons))


def check_opposite(caption: str, opposite: str, settings: CheckConfig, prompt: str = "") -> tuple[str, ...]:
    """Why a text is not the opposite of a caption that passed :func:`check`; empty if nothing is against it.

    The reasons begin like those of a :class:`Verdict`, with ``word`` for a change of anything but directions. Tracks
    have no say: they are of the clip, which the opposite must not describe.
    """
    reasons = _faults_of_form(opposite, caption, settings, prompt)
    vocabulary = load_vocabulary(settings.vocabulary)
    before, after = sides(caption, vocabulary), sides(opposite, vocabulary)
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
    vocabulary = load_vocabulary(settings.vocabulary)
    reasons = _faults_of_form(coarse, source, replace(settings, min_words=1), prompt)
    if reasons:
        return tuple(reasons)
    if settings.words and source.strip() and is_english(source, settings.language):
        reasons, _ = compare_words(coarse, source, None, "", vocabulary)
    if set(sides(coarse, vocabulary)) - set(sides(source, vocabulary)):
        reasons.append("hand: a coarse caption names none that the narration does not")
    # "Picks up" is a claim too; where there is no narration it may be the caption's, which the tracks support.
    allowed = {claim.what for claim in claims(source if source.strip() else caption, vocabulary)}
    added = [claim for claim in claims(coarse, vocabulary) if claim.what not in allowed]
    reasons += [f"direction: {claim.words!r} is not coarse" for claim in added]
    return tuple(dict.fromkeys(reasons))


# --- Form: length, text of a prompt, language ---

# A run of so many words of the prompt is an echo of it; shorter ones are ordinary English.
_ECHO_WORDS = 6
# A source of so few words does not show its language: "open tupperware" is English.
_SHORT = 2


def _faults_of_form(caption: str, source: str, settings: CheckConfig, prompt: str) -> list[str]:
    length = len(re.findall(r"[\w'-]+", caption))
    if not settings.min_words <= length <= settings.max_words:
        return [f"length: {length} words, not {settings.min_words} to {settings.max_words}"]
    vocabulary = load_vocabulary(settings.vocabulary)
    talk = [match.group() for match in vocabulary.orders.finditer(caption)]
    phrases = (match.group() for match in vocabulary.talk.finditer(caption))
    talk += [words for words in phrases if words.lower() not in source.lower()]
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


# --- Clauses ---

# What the vocabulary's patterns of both hands stand for.
_PAIRS = {"left_and_right": (LEFT, RIGHT), "right_and_left": (RIGHT, LEFT)}


@dataclass(frozen=True)
class Clause:
    """A part of a narration between stops and conjunctions."""

    text: str  # lower case
    sides: tuple[str, ...]  # hands in order; those of the clause before (at the start: after) where it names none
    named: bool  # whether it names its hands itself


def clauses(text: str, vocabulary: Vocabulary | None = None) -> list[Clause]:
    """Cut a narration into clauses. "The other hand" is the one that the clauses before did not mention last."""
    vocabulary = vocabulary or load_vocabulary()
    text = " ".join(text.lower().replace("’", "'").split())
    spans, start = [], 0
    pairs = [match.span() for match in vocabulary.hands.finditer(text) if match.lastgroup in _PAIRS]
    for match in vocabulary.breaks.finditer(text):
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
        for match in vocabulary.hands.finditer(span):
            if match.lastgroup in _PAIRS:
                hands += _PAIRS[match.lastgroup]
            elif match.lastgroup == SIDE:
                hands.append(match["s0"])
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


def sides(text: str, vocabulary: Vocabulary | None = None) -> tuple[str, ...]:
    """The hands that a narration names, in order of mention, with repetitions."""
    return tuple(side for clause in clauses(text, vocabulary) if clause.named for side in clause.sides)


# --- Verbs and things ---


@dataclass(frozen=True)
class Words:
    """The lemmas of a narration by their role, in order of appearance."""

    verbs: tuple[str, ...]
    things: tuple[str, ...]
    heads: tuple[str, ...]  # what is in a thing's place though it is a degree, a shape or a kind: "the diced light in"
    held: tuple[str, ...]  # of those what follows a determiner: "holds the light", but not "a bit of" or "into cubes"
    all: tuple[str, ...]  # every word, for whether something is named at all
    is_place: Mapping[str, set[bool]]  # of each word, whether it is where something is done: "in the bowl"


@functools.lru_cache(maxsize=65536)
def lemma(word: str, vocabulary: Vocabulary) -> str:
    """The dictionary form of a lower-case English word."""
    corrections = vocabulary.lemmas
    base = corrections.get(word) or simplemma.lemmatize(word, lang="en").lower()
    base = corrections.get(base, base)
    # The lemmatiser takes them for nouns: "the heating of the oil", "cutting it in half".
    if base.endswith("ing") and base not in vocabulary.things:
        stem = base[:-3]
        single = stem[:-1] if stem[-1:] == stem[-2:-1] else stem
        return next((verb for verb in (stem, stem + "e", single) if verb in vocabulary.verbs), base)
    return str(base)


def extract_words(text: str, vocabulary: Vocabulary | None = None) -> Words:
    """The verbs and things of an English narration, without function words, sides, kinds and degrees."""
    vocabulary = vocabulary or load_vocabulary()
    lists = vocabulary.words
    text = text.lower().replace("’", "'")
    phrases = vocabulary.phrase_words
    text = vocabulary.phrases.sub(lambda match: f" {phrases[int(match.lastgroup[1:])]} ", text)  # type: ignore[index]
    verbs, things, heads, held, every = (list[str]() for _ in range(5))
    places: dict[str, set[bool]] = {}
    earlier, before, in_place = ".", ".", False
    tokens = re.findall(r"[^\W\d_]+(?:[-'][^\W\d_]+)*|[.,;:()]", text)
    for token, after in itertools.zip_longest(tokens, tokens[1:], fillvalue="."):
        form = token.removesuffix("'s")
        for word in [form] if form in vocabulary.things or form in vocabulary.verbs else re.split(r"[-']", form):
            if word[0].isalpha():
                base = word if word in vocabulary.things else lemma(word, vocabulary)
                every += [base, word]
                role = _role(word, base, before, after, vocabulary)
                if word in lists["of_places"]:
                    in_place = True
                elif role == "verb" or word in lists["actors"] or word in lists["of_means"]:
                    in_place = False
                else:  # also "of", "and" and adjectives, which go on with what was before
                    places.setdefault(base, set()).add(in_place)
                if role:
                    (verbs if role == "verb" else things).append(base)
                elif _is_head(word, before, after, lists):
                    heads.append(base)
                is_named = before in lists["determiners"] or earlier in lists["determiners"]
                if role != "verb" and is_named and after != "of" and _is_head(word, "the", after, lists):
                    held.append(base)
            # Not the hand of "the hand's spoon": what follows a hand is a verb.
            earlier, before = before, word if form == token else token
    unique = [tuple(dict.fromkeys(each)) for each in (verbs, things, heads, held, every)]
    return Words(unique[0], unique[1], unique[2], unique[3], unique[4], places)


def _is_head(word: str, before: str, after: str, lists: Mapping[str, frozenset[str]]) -> bool:
    """Whether a word that is no thing by itself is in the place of one: "cuts the light", "the diced mixture in"."""
    begins = before in lists["before_things"] or before in lists["kinds"] or before.endswith("ed")
    ends = after in lists["after_things"] or not after[0].isalpha()
    return begins and ends and len(word) > 2 and not word.endswith(("ed", "ing")) and word not in lists["before_things"]


def _role(word: str, base: str, before: str, after: str, vocabulary: Vocabulary) -> str | None:
    """verb, thing or None, by the word and its neighbours.

    A tagger of parts of speech would be one more model to download.
    """
    lists = vocabulary.words
    if len(word) < 3 or base in lists["motion"] or word.endswith("ly"):
        return None
    is_thing, is_verb = base in vocabulary.things, base in vocabulary.verbs
    # An unknown word that something does to something: "the right hand glues", "and vacuums the"
    begins = before in lists["before_verbs"]
    acts = before in lists["actors"] or (not is_thing and begins and after in lists["determiners"])
    if word in lists["function_words"] or base in lists["function_words"]:
        return "verb" if acts and is_verb and base not in lists["plain"] else None
    # "the sliced meat" is how the meat is, not what is done
    participle = word.endswith("ed") and base != word and not acts and before not in lists["being"]
    if before in lists["perfect"]:
        return None
    if not is_thing and not is_verb and word.endswith(tuple(lists["adjective_endings"])):
        return None
    is_adverb = before.endswith("ly") and before not in lists["shapes"]
    noun_like = before in lists["before_things"] or (is_thing and lemma(before, vocabulary) in vocabulary.things)
    # "pork slices", "the spring onion leaves": what may be a thing is a verb only where something does it
    free = base in lists["shapes"] or base in lists["kinds"]
    noun_like = noun_like or ((is_thing or free) and not begins and not is_adverb)
    # "which is seasoned"
    noun_like = noun_like and not (before in lists["being"] and base != word and word.endswith("ed"))
    if acts or (is_verb and not noun_like and not participle):
        return "verb"
    is_last = after in lists["function_words"] or not after[0].isalpha()  # no noun follows that it could modify
    modifies = base in lists["kinds"] or (is_verb and not is_thing)
    if base in lists["shapes"] or participle or (modifies and not (noun_like and is_last)):
        return None
    return "thing"


# --- Comparison ---


def are_synonyms(first: str, second: str, vocabulary: Vocabulary, groups: Groups | None = None) -> bool:
    """Whether narrators use two lemmas for one another; by the groups of verbs, things or (None) either."""
    if first == second:
        return True
    if frozenset((first, second)) in vocabulary.different:
        return False
    for some in (vocabulary.verbs, vocabulary.things) if groups is None else (groups,):
        if some.get(first, frozenset()) & some.get(second, frozenset()):
            return True
    # Compounds and endings that the lemmatiser leaves as they are: "washcloth" and "cloth".
    short, long = sorted((first, second), key=len)
    return len(short) >= 5 and (long.endswith(short) or (len(long) - len(short) < 5 and long.startswith(short[:-1])))


@dataclass(frozen=True)
class Comparison:
    """Differences between the words of a caption and those of its source."""

    new_verbs: tuple[str, ...]  # verbs of the caption without a synonym in the source; without light and plain ones
    lost_verbs: tuple[str, ...]
    keeps_verbs: bool  # whether the caption names an action of the source, and none besides
    new_things: tuple[str, ...]
    lost_things: tuple[str, ...]
    invented: tuple[str, ...]  # new things that are never understood, and tools that the action does not need
    coverage: float  # share of the source's verbs and things that the caption still names; 1.0 where there are none


def compare(source: str, caption: str, thing: str = "", vocabulary: Vocabulary | None = None) -> Comparison:
    """Compare a caption's verbs and things with its source's; ``thing`` may be named besides.

    A word replaces another only where that other is not named itself: next to "cuts", "peels" is no word for it.
    """
    vocabulary = vocabulary or load_vocabulary()
    lists, verbs, things = vocabulary.words, vocabulary.verbs, vocabulary.things
    old, new = extract_words(source, vocabulary), extract_words(caption, vocabulary)
    allowed = (*old.all, *extract_words(thing, vocabulary).all)
    weak = lists["light"] | lists["plain"]

    def matches(word: str, others: Iterable[str], groups: Groups) -> bool:
        return any(are_synonyms(word, other, vocabulary, groups) for other in others)

    # --- Verbs ---
    added = added_verbs = tuple(word for word in new.verbs if word not in weak and word not in old.all)
    removed = tuple(word for word in old.verbs if word not in new.all)
    new_verbs = tuple(word for word in added if not matches(word, old.all, verbs))
    # One with a synonym in the source, but none among the removed ones, is one too many: the source names that itself.
    surplus = tuple(word for word in added if word not in new_verbs and not matches(word, removed, verbs))
    lost_verbs = tuple(word for word in removed if word not in weak and not matches(word, new.all, verbs))
    free = weak - lists["placing"]
    # Against all verbs that the source does not have as verbs: "slices it" stands for "cuts it into slices".
    instead = tuple(word for word in new.verbs if word not in old.verbs)
    unreplaced = tuple(word for word in removed if word not in free and not matches(word, instead, verbs))
    if surplus and unreplaced:
        new_verbs, lost_verbs = (*new_verbs, *surplus), tuple(dict.fromkeys((*lost_verbs, *unreplaced)))
    elif not unreplaced:
        # All of the source's actions are there: a step that one of its words implies, as a spoonful does the scooping,
        # is no other action.
        steps = vocabulary.implied_verbs
        new_verbs = tuple(word for word in new_verbs if not steps.get(word, frozenset()).intersection(old.all))

    # --- Things ---
    added = tuple(word for word in new.things if word not in allowed)
    removed = tuple(word for word in old.things if word not in new.all)
    new_things = tuple(word for word in added if not matches(word, allowed, things))
    lost_things = tuple(word for word in removed if not matches(word, new.all, things))
    # Where a thing is lost that is no mere tool, even a word for many things may have taken its place.
    is_lost = any(is_specific(word, vocabulary) for word in lost_things)
    candidates = (
        (*added, *new.heads) if is_lost else (*(word for word in added if word not in lists["generic"]), *new.held)
    )
    surplus = tuple(
        word for word in candidates if word not in (*allowed, *new_things) and not matches(word, removed, things)
    )
    unreplaced = tuple(word for word in removed if not matches(word, added, things))

    # What is where something is done takes the place of no object or tool, nor the other way round: source and caption
    # may each name what the other does not.
    def replaces(word: str, others: Iterable[str]) -> bool:
        own = new.is_place.get(word, {True, False})
        return any(own & old.is_place.get(other, own) for other in others)

    surplus = tuple(word for word in dict.fromkeys(surplus) if replaces(word, unreplaced))
    new_things = tuple(
        word for word in new_things if is_specific(word, vocabulary) or not lost_things or replaces(word, lost_things)
    )
    if surplus and unreplaced:
        new_things, lost_things = (*new_things, *surplus), tuple(dict.fromkeys((*lost_things, *unreplaced)))
    if not any(word in things for word in (*new_things, *lost_things)) and lost_things:
        # Turns of phrase ("halfway" for "50 % hot"): only the coverage counts.
        new_things = ()
    invented = []
    for word in new_things:
        actions = vocabulary.tools_of_actions.get(word)
        if is_specific(word, vocabulary) or (actions is not None and not actions.intersection(old.all)):
            invented.append(word)
    total = sum(word not in weak for word in (*old.verbs, *old.things))
    coverage = 1 - (len(lost_verbs) + len(lost_things)) / total if total else 1.0
    keeps = not added_verbs and any(word not in weak and word not in lost_verbs for word in old.verbs)
    return Comparison(new_verbs, lost_verbs, keeps, new_things, lost_things, tuple(invented), coverage)


def is_specific(thing: str, vocabulary: Vocabulary) -> bool:
    """Whether the vocabulary has it as a thing, no common tool, and no word for many things."""
    lists = vocabulary.words
    return thing in vocabulary.things and thing not in lists["tools"] and thing not in lists["generic"]


# Both hands take and hold: such words tell less of which one does what.
_LIGHT_WEIGHT = 0.4


def swaps_hands(source: str, caption: str, vocabulary: Vocabulary) -> bool:
    """Whether a caption assigns to one hand what its source assigns to the other.

    Only where both name both hands; each hand's words are those of its clauses. Where the words do not decide, the
    order in which the hands are named does.
    """
    by_side: list[dict[str, set[str]]] = []
    for text in (source, caption):
        words: dict[str, set[str]] = {LEFT: set(), RIGHT: set()}
        for clause in clauses(text, vocabulary):
            if len(clause.sides) == 1:
                extracted = extract_words(clause.text, vocabulary)
                words[clause.sides[0]] |= {*extracted.verbs, *extracted.things}
        by_side.append(words)
    old, new = by_side
    if not (old[LEFT] and old[RIGHT] and new[LEFT] and new[RIGHT]):
        return False

    light = vocabulary.words["light"]

    def shared(first: set[str], second: set[str]) -> float:
        return sum(
            _LIGHT_WEIGHT if word in light else 1.0
            for word in first
            if any(are_synonyms(word, other, vocabulary) for other in second)
        )

    # Words that the source has for both hands tell nothing.
    own_left, own_right = old[LEFT] - old[RIGHT], old[RIGHT] - old[LEFT]
    straight = shared(own_left, new[LEFT]) + shared(own_right, new[RIGHT])
    across = shared(own_left, new[RIGHT]) + shared(own_right, new[LEFT])
    if straight != across:
        return across > straight
    order, new_order = sides(source, vocabulary), sides(caption, vocabulary)
    return bool(order) and order[0] != new_order[0]


# --- Against the narration before ---

# Least share of the source's verbs and things that a caption names
_LEAST_COVERAGE = 0.6
# Of more verbs or things than this one may be missing
_FEW = 2


def compare_words(
    caption: str, source: str, facts: ClipFacts | None, thing: str, vocabulary: Vocabulary | None = None
) -> tuple[list[str], float]:
    """The half of the check that needs no tracks: reasons, and the share of the source's words that remains.

    ``facts`` may allow hands that the source does not name; ``thing`` is a further object that may be named.
    """
    vocabulary = vocabulary or load_vocabulary()
    reasons = []
    negations = [_negation(text, vocabulary) for text in (source, caption)]
    if bool(negations[0]) != bool(negations[1]):
        reasons.append(f"negation: {negations[1] or 'nothing'} for {negations[0] or 'none of the source'}")
    words = compare(source, caption, thing, vocabulary)
    before = extract_words(source, vocabulary)
    if words.new_verbs or (words.lost_verbs and len(before.verbs) <= _FEW and not words.keeps_verbs):
        new, lost = ", ".join(words.new_verbs), ", ".join(words.lost_verbs)
        reasons.append(f"verb: {new or 'nothing'} for {lost or 'none of the source'}")
    if (words.new_things and words.lost_things) or words.invented:
        lost = ", ".join(words.lost_things)
        reasons.append(f"object: {', '.join(words.new_things)} for {lost or 'none of the source'}")
    elif words.coverage < _LEAST_COVERAGE or (
        len(before.things) <= _FEW and any(is_specific(each, vocabulary) for each in words.lost_things)
    ):
        reasons.append(f"object: {', '.join((*words.lost_verbs, *words.lost_things))} left out")
    old_sides, new_sides = set(sides(source, vocabulary)), set(sides(caption, vocabulary))
    if old_sides:
        if old_sides - new_sides or new_sides - old_sides - set(facts.hands if facts is not None else ()):
            new, old = (" and ".join(sorted(each)) or "no hand" for each in (new_sides, old_sides))
            reasons.append(f"side: {new} for {old}")
        elif swaps_hands(source, caption, vocabulary):
            reasons.append("side: the hands have changed places")
    elif new_sides and facts is not None and facts.acting is not None:
        action = _action_of_other_hand(caption, before.verbs, facts.acting, vocabulary)
        if action:
            reasons.append(f"side: {action} is done by the {facts.acting} hand")
    return reasons, words.coverage


def _negation(text: str, vocabulary: Vocabulary) -> str | None:
    """A word by which a text says that something is not done; claims about motion and sight have rules of their own."""
    match = vocabulary.negations.search(vocabulary.claims.sub(" ", text.lower().replace("’", "'")))
    return match.group() if match else None


def _action_of_other_hand(caption: str, verbs: tuple[str, ...], acting: str, vocabulary: Vocabulary) -> str | None:
    """One of the source's actions that a caption attributes to the hand that does not act."""
    own, others = set[str](), list[str]()
    for clause in clauses(caption, vocabulary):
        means = vocabulary.means.search(clause.text)
        if means and acting not in means.groups():
            return means.group()
        actions = [
            each
            for each in extract_words(clause.text, vocabulary).verbs
            if any(are_synonyms(each, verb, vocabulary) for verb in verbs)
        ]
        if clause.sides and acting not in clause.sides:
            others += actions
        else:
            own.update(actions)
    return next((action for action in others if action not in vocabulary.words["shared"] & own), None)


# --- Against the tracks ---

# Seen from the head, what goes away over a table goes up in the picture: narrators write either.
_AXES = ({LEFT: -1, RIGHT: 1}, {UP: -1, AWAY: -1, DOWN: 1, CLOSER: 1})
_TURNS = (CLOCKWISE, COUNTERCLOCKWISE)
# A distance in a caption may differ from the measured one by this factor, as the estimate from the hand's size does
_ROUGHLY = 2
# In metres, by how their names begin; the last is for all others
_UNITS = (("mm", 0.001), ("milli", 0.001), ("c", 0.01), ("in", 0.0254), ("f", 0.3048), ("", 1.0))
# Least net way, in shares of the picture, for "from the left side to the right side" of a motion with several legs
_NET = 0.05


@dataclass(frozen=True)
class Claim:
    """One statement about a hand, or about the action where no hand is named."""

    sides: tuple[str, ...]  # empty: the hand that acts
    what: str  # of STATEMENTS in vocabulary.py
    words: str  # as the caption has it


def claims(text: str, vocabulary: Vocabulary | None = None) -> list[Claim]:
    """All statements of a caption about motion and contact, in order."""
    vocabulary = vocabulary or load_vocabulary()
    statements = []
    for clause in clauses(text, vocabulary):
        for match in vocabulary.claims.finditer(clause.text):
            assert match.lastgroup is not None
            number = int(match.lastgroup[1:])
            for what in vocabulary.claim_kinds[number]:
                statements.append(Claim(clause.sides, match[f"s{number}"] if what == SIDE else what, match.group()))
    return statements


def unsupported_claims(
    caption: str, source: str, facts: ClipFacts, min_seen: float, vocabulary: Vocabulary | None = None
) -> tuple[list[str], int]:
    """What the tracks do not support, as reasons; and the number of statements.

    A caption that names no hand although one acts is no hand-object narration. A hand's motion or contact in the source
    is accepted without the tracks; where it names no hand it speaks of the one that acts.
    """
    before, statements = claims(source, vocabulary), claims(caption, vocabulary)
    # Another distance than the source's, as of "2 cm pieces", needs the tracks.
    stated = {_metres(claim.words) for claim in before if claim.what == DISTANCE}
    before = [claim for claim in before if claim.what != DISTANCE]
    statements = [claim for claim in statements if claim.what != DISTANCE or _metres(claim.words) not in stated]
    reasons: list[str] = []
    named, in_source = (set(sides(text, vocabulary)) for text in (caption, source))
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
    metres = _metres(words)
    if metres is None:  # a user's pattern: such a statement has nothing that could be compared
        return True
    return distance is not None and distance / _ROUGHLY <= metres <= distance * _ROUGHLY


def _metres(words: str) -> float | None:
    """The distance in words, None if there is no number with a unit."""
    stated = re.search(r"([0-9][0-9,.]*)[ -]?([a-z]+)", words)
    if stated is None:
        return None
    number = re.sub(r",(?=[0-9]{3}\b)", "", stated[1]).replace(",", ".")  # 1,000 mm, and 0,2 m
    try:
        return float(number) * next(size for unit, size in _UNITS if stated[2].startswith(unit))
    except ValueError:
        return None


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
