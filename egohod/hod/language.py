"""The verbs and things that a narration names, and whether another narration names the same.

Words are compared by their lemma and by the groups of :mod:`egohod.hod.vocabulary`; a word in no group by its lemma
alone.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import simplemma

from egohod.hod import vocabulary as known

LEFT, RIGHT = "left", "right"
OTHER = {LEFT: RIGHT, RIGHT: LEFT}

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

    text: str
    """Lower case."""
    sides: tuple[str, ...]
    """Hands of the clause in order; inherited from the clause before (or, at the start, after) where it names none."""
    named: bool
    """Whether it names its hands itself."""


def clauses(text: str) -> list[Clause]:
    """Cut a narration into clauses. "The other hand" is the one that the clauses before did not speak of last."""
    text = " ".join(text.lower().replace("’", "'").split())
    spans, start = [], 0
    pairs = [match.span() for match in _HANDS.finditer(text) if match["pair"]]
    for match in _BREAK.finditer(text):
        if not any(first <= match.start() < last for first, last in pairs):  # not within "left and right hand"
            spans.append(text[start : match.start()])
            start = match.end()
    spans.append(text[start:])
    found: list[tuple[str, tuple[str, ...]]] = []
    last: tuple[str, ...] = ()
    for span in spans:
        if span.strip(" '\""):
            own = _sides(span, last)
            last = own or last
            found.append((span.strip(), own))
    # What is said before the first hand is named belongs to that hand: "moves the cup with the left hand".
    current = next((own for _, own in found if own), ())
    result = []
    for span, own in found:
        current = own or current
        result.append(Clause(span, current, bool(own)))
    return result


def sides(text: str) -> tuple[str, ...]:
    """The hands that a narration names, in order of mention, with repetitions."""
    return tuple(side for clause in clauses(text) if clause.named for side in clause.sides)


def _sides(span: str, last: tuple[str, ...]) -> tuple[str, ...]:
    sides: list[str] = []
    for match in _HANDS.finditer(span):
        if match["pair"]:
            sides += [LEFT, RIGHT] if match["pair"].startswith(("left", "both", "two", "the")) else [RIGHT, LEFT]
        elif match["side"]:
            sides.append(match["side"])
        elif len(last) == 1:
            sides.append(OTHER[last[0]])
    return tuple(dict.fromkeys(sides))


_PHRASE = re.compile("|".join(f"(?P<p{i}>(?<![a-z])(?:{text})(?![a-z]))" for i, text in enumerate(known.PHRASES)))
_PHRASE_VALUES = list(known.PHRASES.values())


@functools.lru_cache(maxsize=65536)
def lemma(word: str) -> str:
    """The dictionary form of a lower-case English word."""
    found = word if word == "dice" else simplemma.lemmatize(word, lang="en").lower()
    found = known.ODD_LEMMAS.get(found, found)
    if found.endswith("ing"):  # "the heating of the oil", "cutting it in half"
        stem = found[:-3]
        single = stem[:-1] if stem[-1:] == stem[-2:-1] else stem
        return next((verb for verb in (stem, stem + "e", single) if verb in known.VERBS), found)
    return found


@dataclass(frozen=True)
class Named:
    """What a narration names, as lemmas in order of appearance."""

    verbs: tuple[str, ...]
    things: tuple[str, ...]
    deeds: tuple[str, ...]
    """The verbs, and what says how something is or was done: "the sliced meat", "stirring"."""
    heads: tuple[str, ...]
    """What stands where a thing stands, though it is a degree, a shape or a kind: "holds the light"."""
    all: tuple[str, ...]
    """Every word, for whether something is named at all."""


def named(text: str) -> Named:
    """The verbs and things of an English narration; function words, sides, kinds and degrees are left out."""
    text = text.lower().replace("’", "'")
    text = _PHRASE.sub(lambda match: f" {_PHRASE_VALUES[int(match.lastgroup[1:])]} ", text)  # type: ignore[index]
    verbs: list[str] = []
    things: list[str] = []
    deeds: list[str] = []
    heads: list[str] = []
    every: list[str] = []
    before = "."
    tokens = re.findall(r"[^\W\d_]+(?:[-'][^\W\d_]+)*|[.,;:()]", text)
    for token, after in itertools.zip_longest(tokens, tokens[1:], fillvalue="."):
        form = token.removesuffix("'s")
        for word in [form] if form in known.THINGS or form in known.VERBS else re.split(r"[-']", form):
            if word[0].isalpha():
                base = word if word in known.THINGS else lemma(word)
                every += [base, word]
                kind = _kind(word, base, before, after)
                inflected = word != base and (word[-1] != "s" or base in known.MOTION)
                if kind == "verb" or (kind is None and base in known.VERBS and (inflected or base in known.MOTION)):
                    deeds.append(base)
                if kind:
                    (verbs if kind == "verb" else things).append(base)
                elif before in known.BEFORE_THINGS and (after in known.AFTER_THINGS or not after[0].isalpha()):
                    heads.append(base)
            before = word
    return Named(
        tuple(dict.fromkeys(verbs)),
        tuple(dict.fromkeys(things)),
        tuple(dict.fromkeys(deeds)),
        tuple(dict.fromkeys(heads)),
        tuple(dict.fromkeys(every)),
    )


def _kind(word: str, base: str, before: str, after: str) -> str | None:
    """verb, thing or None, by the word and its neighbours."""
    if len(word) < 3 or base in known.MOTION or word.endswith("ly"):
        return None
    is_thing, is_verb = base in known.THINGS, base in known.VERBS
    # An unknown word that something does to something: "the right hand glues", "and vacuums the"
    acts = before in known.ACTORS or (not is_thing and before in known.LICENCE and after in known.DETERMINERS)
    if word in known.SOFT or base in known.SOFT:
        return "verb" if acts and is_verb and base not in known.PLAIN else None
    # "the sliced meat" says how the meat is, not what is done
    participle = word.endswith("ed") and base != word and not acts and before not in known.BEING
    noun_like = before in known.BEFORE_THINGS or (is_thing and lemma(before) in known.THINGS)
    # "pork slices", "the spring onion leaves": what may be a thing is done only where something does it
    free = base in known.SHAPES or base in known.KINDS
    noun_like = noun_like or ((is_thing or free) and before not in known.LICENCE and not before.endswith("ly"))
    # "which have been seasoned"
    noun_like = noun_like and not (before in known.BEING and base != word and word.endswith("ed"))
    if acts or (is_verb and not noun_like and not participle):
        return "verb"
    last = after in known.SOFT or not after[0].isalpha()  # nothing follows that it could be the kind of
    if (
        base in known.SHAPES
        or participle
        or ((base in known.KINDS or (is_verb and not is_thing)) and not (noun_like and last))
    ):
        return None
    return "thing"


def alike(first: str, second: str, groups: dict[str, frozenset[int]] | None = None) -> bool:
    """Whether narrators use two lemmas for one another; by the groups of verbs, things or (None) either."""
    if first == second:
        return True
    if frozenset((first, second)) in known.APART:
        return False
    for some in (known.VERBS, known.THINGS) if groups is None else (groups,):
        if some.get(first, frozenset()) & some.get(second, frozenset()):
            return True
    short, long = sorted((first, second), key=len)
    return len(short) >= 5 and (long.endswith(short) or (len(long) - len(short) < 5 and long.startswith(short[:-1])))


@dataclass(frozen=True)
class Comparison:
    """How the words of a caption differ from those of its source."""

    new_verbs: tuple[str, ...]
    """Verbs of the caption that the source has nothing like; without those of any handling."""
    lost_verbs: tuple[str, ...]
    new_things: tuple[str, ...]
    lost_things: tuple[str, ...]
    invented: tuple[str, ...]
    """Of the new things those that no narrator takes as understood, tools that the deed does not need among them."""
    kept: float
    """Share of the source's verbs and things that the caption still names; 1.0 where there are none."""


def compare(source: str, caption: str, thing: str = "") -> Comparison:
    """Hold a caption's verbs and things against its source's; ``thing`` may be named besides.

    A word stands for another only where that other is not named itself: next to "cuts", "peels" is no word for it.
    """
    old, new = named(source), named(caption)
    pool = (*old.all, *named(thing).all)
    light = known.LIGHT | known.PLAIN

    # verbs
    fresh = tuple(word for word in new.verbs if word not in light and word not in old.all)
    gone = tuple(word for word in old.verbs if word not in new.all)
    strange = tuple(word for word in fresh if not _like(word, old.all, known.VERBS))
    more = tuple(word for word in fresh if word not in strange and not _like(word, gone, known.VERBS))
    lost_verbs = tuple(word for word in gone if word not in light and not _like(word, new.all, known.VERBS))
    told = light - known.PLACING
    replaced = tuple(word for word in gone if word not in told and not _like(word, fresh, known.VERBS))
    if more and replaced:
        strange, lost_verbs = (*strange, *more), tuple(dict.fromkeys((*lost_verbs, *replaced)))
    # things
    fresh = tuple(word for word in new.things if word not in pool)
    gone = tuple(word for word in old.things if word not in new.all)
    lost_things = tuple(word for word in gone if not _like(word, new.all, known.THINGS))
    new_things = tuple(word for word in fresh if not _like(word, pool, known.THINGS))
    more = tuple(
        word
        for word in (*fresh, *new.heads)
        if word not in (*pool, *new_things, *known.GENERIC) and not _like(word, gone, known.THINGS)
    )
    replaced = tuple(word for word in gone if not _like(word, fresh, known.THINGS))
    if more and replaced:
        new_things, lost_things = (*new_things, *more), tuple(dict.fromkeys((*lost_things, *replaced)))
    total = sum(word not in light for word in (*old.verbs, *old.things))
    if not any(word in known.THINGS for word in (*new_things, *lost_things)) and lost_things:
        # Turns of phrase ("halfway" for "50 % hot"): what counts is how much is kept.
        new_things = ()
    return Comparison(
        strange,
        lost_verbs,
        new_things,
        lost_things,
        tuple(word for word in new_things if telling(word) or _made_up(word, old)),
        1 - (len(lost_verbs) + len(lost_things)) / total if total else 1.0,
    )


def _like(word: str, others: Iterable[str], groups: dict[str, frozenset[int]]) -> bool:
    return any(alike(word, other, groups) for other in others)


def telling(thing: str) -> bool:
    """Whether it is a known thing, none that actions are done with as a matter of course, and no word for many."""
    return thing in known.THINGS and thing not in known.TOOLS and thing not in known.GENERIC


def _made_up(thing: str, source: Named) -> bool:
    """Whether it is a tool, and none that goes with what is done without saying."""
    deeds = known.UNDERSTOOD.get(thing)
    return deeds is not None and not deeds.intersection(source.all)


def crossed(source: str, caption: str) -> bool:
    """Whether a caption gives to one hand what its source gives to the other.

    Both name both hands; each hand's words are those of its clauses. Where the words do not tell, the order in which
    the hands are named does.
    """
    old, new = _words_by_side(source), _words_by_side(caption)
    if not (old[LEFT] and old[RIGHT] and new[LEFT] and new[RIGHT]):
        return False

    def shared(first: set[str], second: set[str]) -> int:
        return sum(any(alike(word, other) for other in second) for word in first)

    own = [old[LEFT] - old[RIGHT], old[RIGHT] - old[LEFT]]
    straight = shared(own[0], new[LEFT]) + shared(own[1], new[RIGHT])
    across = shared(own[0], new[RIGHT]) + shared(own[1], new[LEFT])
    if straight != across:
        return across > straight
    order, new_order = sides(source), sides(caption)
    return bool(order) and order[0] != new_order[0]


def _words_by_side(text: str) -> dict[str, set[str]]:
    words: dict[str, set[str]] = {LEFT: set(), RIGHT: set()}
    for clause in clauses(text):
        if len(clause.sides) == 1:
            found = named(clause.text)
            words[clause.sides[0]] |= {*found.verbs, *found.things}
    return words
