"""Human narrations, their rewrites by a language model, and falsified copies of those: what the check is measured on.

The copies are made with the corpus's own classes of words, never with the check's. A word's stand-in is a word of the
corpus of a class that neither text has, which the rewrites never put for it themselves ("pan" for "pot" is no fault).
"""

from __future__ import annotations

import ast
import collections
import csv
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplemma

from egohod.data.table import swap_sides

ROWS, SEED = 300, 0


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SIDES = re.compile(r"\b(left|right|both)\b")
_WORD = re.compile(r"[A-Za-z]+(?:-[a-z]+)*")
# Handling of any kind: replacing these, or replacing others by these, need not make a sentence false.
_HANDLING = _words(
    "take grab get pick hold use keep put place bring move carry lift pass transfer set give return leave hand raise "
    "fetch collect gather grasp grip have contain display see view release start serve point draw drop stand light "
    "come remove"
)
_LIGHT = _words("take hold use get grab pick have keep give")
# In the classes of verbs and nouns, but hardly ever used as such
_NO_VERBS = _words("low bottom empty")
_NO_THINGS = _words("hand left right side finger time top bottom back end part they low surface measure like pair head")
_BEFORE_NOUNS = _words("the a an of in with into on from some his her its")

Classes = dict[str, set[int]]


class Corpus:
    """EgoExoLearn's association annotations, cut into the rows to measure on and all others."""

    def __init__(self, folder: Path) -> None:
        with (folder / "association_exo_train.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["narration_en"] and row["narration_en_hand_prompt"]]
        named = [tuple(_sides(row[key]) for key in ("narration_en", "narration_en_hand_prompt")) for row in rows]
        rows = [row for row, (first, second) in zip(rows, named, strict=True) if first == second != frozenset()]
        once: dict[str, dict[str, str]] = {}
        for row in rows:
            once.setdefault(row["narration_en"], row)
        rows = list(once.values())
        held = set(np.random.default_rng(SEED).choice(len(rows), ROWS, replace=False).tolist())
        self.held = [row for i, row in enumerate(rows) if i in held]
        self.others = [row for i, row in enumerate(rows) if i not in held]
        self.verb_classes = _classes(folder / "narration_verb_taxonomy.csv")
        self.noun_classes = _classes(folder / "narration_noun_taxonomy.csv")
        self.interchanged, used = set[tuple[str, str]](), collections.Counter[str]()
        for row in self.others:
            old, new = (
                {lemma(word) for word in _tokens(row[key])} for key in ("narration_en", "narration_en_hand_prompt")
            )
            self.interchanged |= {(a, b) for a in old - new for b in new - old}
            used.update(old)
            used.update(new)
        self.verbs = self._pool("verb", self.verb_classes, used, 10, _HANDLING | _NO_VERBS)
        self.nouns = self._pool("noun", self.noun_classes, used, 5, _NO_THINGS)

    def _pool(
        self, key: str, classes: Classes, used: collections.Counter[str], least: int, but: frozenset[str]
    ) -> list[str]:
        """Words of the classes that the corpus has, used at least so often."""
        others = {number for row in self.others for number in ast.literal_eval(row[key])}
        return sorted(
            word
            for word, own in classes.items()
            if own & others and re.fullmatch("[a-z]{3,}", word) and word not in but and used[word] >= least
        )

    def falsified(self, row: dict[str, str], kind: str, rng: random.Random) -> str | None:
        """The rewrite with its sides swapped, or with one verb or object replaced; None where it has none."""
        text = row["narration_en_hand_prompt"]
        if kind == "sides":
            swapped = swap_sides(text)
            return swapped if swapped != text else None
        classes, pool = (self.verb_classes, self.verbs) if kind == "verb" else (self.noun_classes, self.nouns)
        own = set(ast.literal_eval(row["verb" if kind == "verb" else "noun"]))
        matches = [word for word in self._words(text, kind) if classes.get(lemma(word), set()) & own]
        matches = [word for word in matches if kind != "verb" or lemma(word) not in _LIGHT] or matches
        if not matches:
            return None
        word = rng.choice(sorted(set(matches)))
        seen = own.union(*(classes.get(lemma(each), set()) for each in _tokens(row["narration_en"] + " " + text)))
        base = lemma(word)
        other = rng.choice(
            [each for each in pool if not classes[each] & seen and not {(base, each), (each, base)} & self.interchanged]
        )
        return re.sub(rf"\b{word}\b", _inflected(other, word, kind), text, flags=re.IGNORECASE)

    @staticmethod
    def _words(text: str, kind: str) -> list[str]:
        words = [match.group().lower() for match in _WORD.finditer(text)]
        if kind == "object":
            return [word for word in words if lemma(word) not in _NO_THINGS]
        return [
            word
            for before, word in zip(["", *words], words, strict=False)
            if word not in ("hand", "hands")
            and not word.endswith("ed")
            and "-" not in word
            and before not in _BEFORE_NOUNS
        ]


def measure(corpus: Corpus, passes: Callable[[str, str], bool], seed: int = SEED) -> dict[str, tuple[float, int]]:
    """(share that passes, number) of the held rows' rewrites and of each kind of falsified copies."""
    rng = random.Random(seed)
    passed = collections.defaultdict[str, list[bool]](list)
    for row in corpus.held:
        source = row["narration_en"]
        passed["rewrites"].append(passes(source, row["narration_en_hand_prompt"]))
        for kind in ("sides", "verb", "object"):
            copy = corpus.falsified(row, kind, rng)
            if copy is not None:
                passed[kind].append(passes(source, copy))
    return {kind: (sum(each) / len(each), len(each)) for kind, each in passed.items()}


def lemma(word: str) -> str:
    base = simplemma.lemmatize(word, lang="en").lower()
    return "mix" if base == "mixe" else base


def _tokens(text: str) -> list[str]:
    return [match.group() for match in _WORD.finditer(text.lower())]


def _sides(text: str) -> frozenset[str]:
    return frozenset(_SIDES.findall(text.lower()))


def _classes(path: Path) -> Classes:
    classes: Classes = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            for word in ast.literal_eval(row["group"]):
                classes.setdefault(lemma(word.strip()), set()).add(number)
    return classes


def _inflected(word: str, like: str, kind: str) -> str:
    """``word`` in the form that ``like`` has."""
    plural = like.endswith("s") and not like.endswith("ss") and lemma(like) != like
    if kind == "verb" and like.endswith("ing"):
        return (word[:-1] if word.endswith("e") and not word.endswith("ee") else word) + "ing"
    if not plural:
        return word
    if word.endswith(("s", "sh", "ch", "x", "z")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") and word[-2] not in "aeiou" else word + "s"
