"""Human narrations, their rewrites by a language model, and falsified copies of those: what the check is measured on.

The copies are made with the corpus's own classes of words, never with the check's. A word's stand-in is a word of the
corpus of a class that neither text has, which the rewrites never put for it themselves ("pan" for "pot" is no fault).
"""

from __future__ import annotations

import argparse
import ast
import collections
import csv
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplemma

from egohod.config import PROJECT
from egohod.data.table import swap_sides
from egohod.hod.check import Verdict, compare_words
from egohod.hod.config import load
from egohod.hod.judge import make_judging
from egohod.hod.vocabulary import load_vocabulary

ROWS, SEED = 300, 0
_KINDS = {
    "sides": "sides swapped",
    "verb": "verb replaced",
    "object": "object replaced",
    "added": "an action added",
}


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

    def with_added_verb(self, row: dict[str, str], rng: random.Random) -> str:
        """The rewrite, after which a further action is done with the same thing."""
        text = row["narration_en_hand_prompt"]
        own = [self.verb_classes.get(lemma(each), set()) for each in _tokens(row["narration_en"] + " " + text)]
        seen = set[int]().union(*own)
        verb = rng.choice([each for each in self.verbs if not self.verb_classes[each] & seen])
        return f"{text.rstrip(' .')}, and then {_inflected(verb, 'takes', 'verb')} it."

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


@dataclass(frozen=True)
class Pair:
    """A narration and a text that is judged against it."""

    kind: str  # rewrites, or how the rewrite was falsified
    source: str
    text: str


def pairs(corpus: Corpus, seed: int = SEED) -> list[Pair]:
    """The held rows' rewrites, and their falsified copies of each kind."""
    rng = random.Random(seed)
    # Of its own, so that the copies of the other kinds do not depend on this one.
    more = random.Random(f"added {seed}")
    made = []
    for row in corpus.held:
        source, rewrite = row["narration_en"], row["narration_en_hand_prompt"]
        texts = {"rewrites": rewrite}
        texts |= {kind: corpus.falsified(row, kind, rng) for kind in ("sides", "verb", "object")}
        texts["added"] = corpus.with_added_verb(row, more)
        made += [Pair(kind, source, text) for kind, text in texts.items() if text is not None]
    return made


def shares(judged: Iterable[tuple[Pair, bool]]) -> dict[str, tuple[float, int]]:
    """(share that passes, number) of each kind."""
    passed = collections.defaultdict[str, list[bool]](list)
    for pair, passes in judged:
        passed[pair.kind].append(passes)
    return {kind: (sum(each) / len(each), len(each)) for kind, each in passed.items()}


def main() -> None:
    """Print what rules, judge and both make of the 300 held rows; ``check.judge=...`` and other keys choose the judge.

    A clip's facts are unknown here: the rules are those over words, and a judge gets the narration alone.
    """
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, default=PROJECT.parent / "shared" / "annotations" / "egoexolearn")
    parser.add_argument(
        "knobs", nargs="*", help="such as check.judge=endpoint narrator.endpoint=http://127.0.0.1:8000/v1"
    )
    args = parser.parse_args()
    cfg = load("configs/hod/default.yml", ["narrator.kind=llm", *args.knobs])
    vocabulary = load_vocabulary(cfg.check.vocabulary)
    every = pairs(Corpus(args.annotations))
    rules = []
    for pair in every:
        reasons, score = compare_words(pair.text, pair.source, None, "", vocabulary)
        rules.append(Verdict(score, tuple(reasons)))
    columns = {"rules": shares((pair, each.passed) for pair, each in zip(every, rules, strict=True))}
    judging = make_judging(cfg)
    if judging is not None:
        items = [(pair.source, None, pair.text, each) for pair, each in zip(every, rules, strict=True)]
        # Of all pairs, asked once each: also of those that the mode leaves to the rules.
        decided = list(judging.decide(items))
        missing = sum(opinion.entailed is None for _, _, opinion in decided)
        if missing:
            print(f"{missing} of {len(every)} pairs have no answer of the judge; the rules decide on them")
        columns["judge"] = shares((every[n], bool(opinion.entailed)) for n, _, opinion in decided)
        columns[cfg.check.judge_mode] = shares((every[n], verdict.passed) for n, verdict, _ in decided)
    print(f"{'':28}{'rows':>6}" + "".join(f"{name:>10}" for name in columns))
    for kind, (_, count) in columns["rules"].items():
        found = (column[kind][0] if kind == "rewrites" else 1 - column[kind][0] for column in columns.values())
        label = "rewrites accepted" if kind == "rewrites" else f"rejected: {_KINDS[kind]}"
        print(f"{label:28}{count:>6}" + "".join(f"{100 * share:.1f} %".rjust(10) for share in found))


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


if __name__ == "__main__":
    main()
