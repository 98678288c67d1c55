"""Words of narrations: clauses and the hands that they name, verbs and things, and whether two narrations agree.

Words are compared by their lemma and by the groups of synonyms of ``vocabulary.yml``, which holds all word lists with
the reason for each; a word in no group is compared by its lemma alone. Rules instead of an embedding: the check names
the word that it refuses, and "left" and "right" are close to each other in every embedding.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import simplemma
import yaml

LEFT, RIGHT = "left", "right"

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


def _words(name: str) -> frozenset[str]:
    return frozenset(_LISTS[name].split())


_VERBS, _THINGS = _groups("verbs"), _groups("things")
_DIFFERENT = frozenset(
    frozenset((first, second))
    for first, *others in (line.split() for line in _LISTS["different_verbs"].strip().splitlines())
    for second in others
)
_FUNCTION_WORDS, _SHAPES, _KINDS, _GENERIC = (_words(x) for x in ("function_words", "shapes", "kinds", "generic"))
_MOTION, _LIGHT, _PLAIN, _PLACING = (_words(x) for x in ("motion", "light", "plain", "placing"))
_BEFORE_THINGS, _AFTER_THINGS, _BEFORE_VERBS = (_words(x) for x in ("before_things", "after_things", "before_verbs"))
_ACTORS, _DETERMINERS, _BEING, _TOOLS = (_words(x) for x in ("actors", "determiners", "being", "tools"))
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
    """Whether it is a known thing, no common tool, and no word for many things."""
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
