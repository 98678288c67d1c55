"""Captions with another verb, and the verb and nouns of a caption, by rule. Nothing here needs PyTorch.

"opens the jar with the left hand" becomes "shakes the jar with the left hand", "slides the jar to the left with the
left hand": the hard negatives of EgoNCE++ (2405.17719), whose authors draw verbs from the training captions or from a
language model. A verb here is a pattern, "slides ... to the left": its particle and direction are exchanged with it, as
they would betray a replaced verb. Verbs that may be true of the same clip ("takes", "lifts") never replace one another,
and those that captions have with the same object come first: "eats the tap" is false without a look at the clip.
Unlike :mod:`egohod.data.opposites` the rules need no list of all verbs, which makes them wider and less certain.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from egohod.data import opposites
from egohod.data.opposites import BASE, ING, PAST, THIRD

# Who acts, if anyone is named, and "uses the left hand and", in front of the verb.
_HEAD = re.compile(
    r"\s*(?:#\w\s+)?(?:(?:the|an?|his|her|their|my)\s+)?(?:(?:left|right|other|both)\s+)?"
    r"(?:(?:[b-z]|he|she|i|you|we|they|man|woman|person|lady|boy|girl|guy|someone|camera wearer|hands?)\s+)?"
    r"(?:(?:then|also|again|still|just|\w+ly)\s+)*"
    r"(?:us(?:e|es|ed|ing)\s+(?:[\w']+\s+){1,3}?hands?(?:,|\s+and|\s+to)\s+)?",
    re.IGNORECASE,
)
_PARTICLES = opposites.word_set("up down out away back together apart aside")  # and "on" in "turns on"
# Behind the object: "slides the cup to the left", "turns the tap on". The last group only where the clause ends, since
# "on" may begin a place.
_TAIL = re.compile(
    r"(?:(?:over )?to the (?:left|right)|(?:up|down|for|back)wards?|away|closer|back|up|down|still|once|twice|"
    r"(?:counter|anti)?clockwise|together|apart|aside)\b(?! (?:the|hand)\b)|"
    r"(?:on|off|in|out|over|open|shut)\b(?=\s*(?:[.,;:!?]|$|with\b|while\b|and\b|using\b))",
    re.IGNORECASE,
)
# An object, and with the second set the clause of the verb, ends here.
_LINKS = opposites.word_set(
    "with from into onto in on at to off under over near by for through against around towards toward using"
)
_ENDS = opposites.word_set("while and then until as so before after but who which that when where because if or is are")
_DIVIDING = _LINKS | opposites.DETERMINERS | {"of"}
_NO_NOUNS = (
    opposites.DETERMINERS
    | opposites.PRONOUNS
    | _PARTICLES
    | opposites.word_set("left right hand hands other still once twice again")
)
_NO_VERBS = (
    _LINKS
    | _ENDS
    | opposites.DETERMINERS
    | opposites.PRONOUNS
    | opposites.word_set("can will must should has does i first next one two once twice")
)
# Verbs of one group may be true of one clip, beside those that the rules for opposites know.
_ALIKE = """
cut slice chop dice mince carve trim peel; wash rinse clean scrub wipe dry soap lather; stir mix whisk beat blend;
look check inspect examine read watch; walk go step; press push squeeze; knead roll flatten; tap pat knock hit touch;
throw toss drop; turn rotate twist spin; adjust arrange fix set; put pour empty sprinkle drizzle transfer; cook fry
heat boil; break tear crack split
"""
# True of too many clips to be false of one, unless how is mentioned.
_VAGUE = "use hold held prepare touch move handle work have keep do get grip continue start make change"
# Things are put "into the pot", and taken "from the pot" or "in the right hand": another verb would not fit.
_GOAL = re.compile(r"\s*(?:in|on)?to\b")
_SOURCE = re.compile(r"\s*(?:from|off|out of|in (?:\w+ ){0,2}hands?)\b")
# Opening and closing these looks like what stands beside them.
_OPENED = opposites.word_set("drawer door fridge freezer oven cupboard cabinet tap faucet lid cap cover bottle")
_BY = {"pull", "push", "slide", "turn", "take", "put"}
# Captions that have a verb, and their share: a rare one may be a misspelling, or no verb.
_LEAST, _LEAST_SHARE = 2, 1 / 2000
# Share of an object's captions that have a verb which fits it.
_LEAST_FIT = 1 / 100


class Pattern(NamedTuple):
    """A verb as captions have it: "slides", "", "to the left"; "picks", "up", ""."""

    verb: str
    particle: str
    tail: str
    form: int
    has_object: bool

    @property
    def words(self) -> tuple[str, str, str]:
        """Equal for all forms of the verb."""
        return stem_of(self.verb), self.particle, self.tail

    @property
    def is_vague(self) -> bool:
        """Whether it is true of most clips: "holds the cup", but not "holds the cup still"."""
        return not self.tail and stem_of(self.verb) in _vague()

    @property
    def meaning(self) -> tuple[str, ...]:
        """Equal for verbs that may be true of one clip."""
        stem = stem_of(self.verb)
        sense = opposites.senses_of_words().get(self.verb, ("", ""))[0]
        # "picks up", "pulls out" and "lifts" are one; of all others the direction counts.
        if sense in ("take", "put") and (stem not in ("push", "pull") or self.particle == "out"):
            return (sense,)
        sense = sense if sense not in ("take", "put", "") else _group_of().get(stem, stem)
        return (sense, *filter(None, (self.particle, self.tail)))


class Parsed(NamedTuple):
    """Where the pattern of a caption is, and the nouns of its clause in the singular."""

    pattern: Pattern
    verb: tuple[int, int]
    tail: tuple[int, int]
    nouns: tuple[str, ...]


@cache
def stem_of(verb: str) -> str:
    """The base form of a verb that the rules know, else a form that its inflections share in most cases."""
    if verb in opposites.FORM_OF:
        return opposites.FORM_OF[verb][0]
    stem = re.sub(r"(?:ing|ed|es|s)$", "", verb) if len(verb) > 4 else re.sub(r"(?<!s)s$", "", verb)
    return re.sub(r"(.)\1$", r"\1", stem).removesuffix("e")


@cache
def _group_of() -> dict[str, str]:
    return {stem_of(verb): group.split()[0] for group in _ALIKE.split(";") for verb in group.split()}


@cache
def _vague() -> set[str]:
    return {stem_of(verb) for verb in _VAGUE.split()}


# Narrations repeat; a worker meets each of them every epoch.
@lru_cache(32768)
def parse(caption: str) -> Parsed | None:
    """The verb, its object's end and the nouns of a caption's first clause; None where no verb is."""
    head = _HEAD.match(caption)
    offset = head.end() if head else 0
    words = [*re.compile(r"[\w']+").finditer(caption, offset)]
    texts = [word.group().lower() for word in words]
    # "Evenly", "in the left hand is": no verb where narrations have theirs.
    if not words or not texts[0].isalpha() or texts[0].endswith("ly") or texts[0] in _NO_VERBS:
        return None
    # The clause ends at punctuation and conjunctions.
    gaps = (caption[one.end() : other.start()] for one, other in pairwise(words))
    ends = (i for i, gap in enumerate(gaps, 1) if texts[i] in _ENDS or re.search(r"[.,;:!?]", gap))
    clause = next(ends, len(words))
    verb, particle, first = texts[0], texts[1] if clause > 1 else "", 2
    # "put in fridge" names the place alone.
    phrase = f"{stem_of(verb)} {particle}"
    if not (particle in _PARTICLES or phrase in opposites.PLACED or phrase in opposites.CHANGED):
        particle, first = "", 1
    end, tail = first, None
    while end < clause:
        tail = _TAIL.match(caption, words[end].start())
        if tail or texts[end] in _LINKS:
            break
        end += 1
    # Nouns are the last words of what determiners and prepositions divide.
    chunks: list[list[str]] = [[]]
    for text in texts[first:clause]:
        if text in _DIVIDING:
            chunks.append([])
        elif text not in _NO_NOUNS and not text.endswith(("ly", "wise", "wards", "closer", "ing")):
            chunks[-1].append(text)
    nouns = dict.fromkeys(re.sub(r"(?<=[^s])s$", "", chunk[-1]) for chunk in chunks if chunk)
    if verb in opposites.FORM_OF:
        form = opposites.FORM_OF[verb][1]
    else:
        suffix = re.search(r"(ing|ed|[^s]s)$", verb)
        form = {"g": ING, "d": PAST, "s": THIRD}[verb[-1]] if suffix else BASE
    place = words[end - 1].end()
    return Parsed(
        Pattern(verb, particle, tail.group().lower() if tail else "", form, has_object=end > first),
        (words[0].start(), words[first - 1].end()),
        (place, tail.end() if tail else place),
        tuple(nouns),
    )


def verb_and_nouns(caption: str) -> tuple[list[str], list[str]]:
    """A name of what is done, with its direction, and the nouns of the same clause; nothing where there is no verb."""
    parsed = parse(caption)
    return ([" ".join(parsed.pattern.meaning)], list(parsed.nouns)) if parsed else ([], [])


class Verbs:
    """The verbs of ``captions``, to replace one another."""

    def __init__(self, captions: Iterable[str]) -> None:
        counts, of_object = Counter[Pattern](), dict[str, Counter[tuple[str, ...]]]()
        for parsed in filter(None, map(parse, captions)):
            counts[parsed.pattern] += 1
            for noun in parsed.nouns[:1]:
                of_object.setdefault(noun, Counter())[parsed.pattern.words] += 1
        self._of_object = {
            noun: {words for words, count in verbs.items() if count >= max(_LEAST, _LEAST_FIT * verbs.total())}
            for noun, verbs in of_object.items()
        }
        least = max(_LEAST, _LEAST_SHARE * counts.total())
        # By form and whether there is an object, with their meanings, which every draw compares.
        self._of_kind: dict[tuple[int, bool], list[tuple[Pattern, tuple[str, ...]]]] = {}
        # In an order that the order of the captions does not change: a draw is a number.
        for pattern in sorted(pattern for pattern, count in counts.items() if count >= least):
            if not pattern.is_vague:
                self._of_kind.setdefault(pattern[3:], []).append((pattern, pattern.meaning))

    def __len__(self) -> int:
        return sum(map(len, self._of_kind.values()))

    def replace(self, caption: str, count: int, rng: np.random.Generator) -> list[str]:
        """Up to ``count`` distinct captions with another verb in the same form, drawn by ``rng``.

        Verbs that some caption has with the same object come first, as far as there are any.
        """
        parsed = parse(caption)
        if parsed is None:
            return []
        own, noun = parsed.pattern.meaning, next(iter(parsed.nouns), "")
        unfit = set[str]()
        if parsed.pattern.is_vague:
            # What is held or used has been taken, will be put down, and is often pressed onto a board.
            unfit |= {"take", "put", "press"}
        if _GOAL.match(caption, parsed.tail[1]):
            unfit.add("take")
        elif _SOURCE.match(caption, parsed.tail[1]):
            unfit.add("put")
        if noun in _OPENED and own[0] in _BY | {"open", "close"}:
            unfit |= {"open", "close"} if own[0] in _BY else _BY
        others = [
            pattern
            for pattern, meaning in self._of_kind.get(parsed.pattern[3:], ())
            if meaning != own and meaning[0] not in unfit
        ]
        of_object = self._of_object.get(noun, ())
        drawn = [others[i] for i in rng.permutation(len(others)).tolist()]
        # The order of the draw stays within both parts.
        drawn.sort(key=lambda pattern: pattern.words not in of_object)
        return [with_verb(caption, parsed, pattern) for pattern in drawn[:count]]


def with_verb(caption: str, parsed: Parsed, new: Pattern) -> str:
    """``caption`` with the pattern ``new`` in place of its own."""
    (start, end), (before, after) = parsed.verb, parsed.tail
    verb = f"{new.verb} {new.particle}".strip()
    verb = verb[:1].upper() + verb[1:] if caption[start].isupper() else verb
    return caption[:start] + verb + caption[end:before] + f" {new.tail}".rstrip() + caption[after:]


def false_verbs(caption: str, answer: str, count: int) -> list[str]:
    """Up to ``count`` captions by the verbs of a language model's answer, a list with semicolons.

    A verb of more than three words is no verb, and one that the rules hold true of the same clip is left out.
    """
    parsed, results = parse(caption), dict[str, None]()
    for phrase in re.split(r"[;,\n]", answer):
        words = re.findall(r"[A-Za-z']+", phrase)
        if parsed is None or not 1 <= len(words) <= 3:
            continue
        new = parsed.pattern._replace(verb=words[0].lower(), particle=" ".join(words[1:]).lower(), tail="")
        if new.meaning[:1] != parsed.pattern.meaning[:1]:
            results[with_verb(caption, parsed, new)] = None
    return list(results)[:count]
