"""Which clips a page shows: some that were told right and some that were told wrong, evenly from all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# So many cards of each sort, or the page of a large benchmark would grow without bound.
CARDS, _ANSWERS = 6, 3


@dataclass(frozen=True)
class Answer:
    """What a model said, how similar it found it, and whether that is right."""

    text: str
    similarity: float | None
    right: bool
    relevancy: float | None = None


@dataclass(frozen=True)
class Card:
    """One clip or question: its pictures with captions (rows of the clips), the truth, and the answers."""

    right: bool
    title: str
    pictures: Sequence[tuple[str, int]]
    truth: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Gallery:
    """Cards of one table, and how many there would be."""

    title: str
    right: Sequence[Card]
    wrong: Sequence[Card]
    right_of_all: int
    wrong_of_all: int


def gallery(table: Mapping[str, Any], clips: Mapping[str, Any]) -> Gallery:
    """The cards of a table of ``details/*.json`` over the ``clips`` there."""
    title, right, card = _KINDS[table["kind"]](table, clips)
    hits, misses = np.flatnonzero(right), np.flatnonzero(~right)
    return Gallery(title, [card(i) for i in _evenly(hits)], [card(i) for i in _evenly(misses)], len(hits), len(misses))


_Cards = tuple[str, np.ndarray, Callable[[int], Card]]


def _retrieval(table: Mapping[str, Any], clips: Mapping[str, Any]) -> _Cards:
    texts, best, similarity, relevancy = (table[name] for name in ("texts", "best_texts", "similarity", "relevancy"))
    right = np.array([row[0] >= 1 for row in relevancy], dtype=bool)

    def card(row: int) -> Card:
        answers = [
            Answer(texts[text], sim, rel >= 1, rel)
            for text, sim, rel in zip(best[row], similarity[row], relevancy[row], strict=True)
        ]
        truth = texts[table["most_relevant_text"][row]]
        return Card(bool(right[row]), _name(clips, row), [("", row)], truth, answers[:_ANSWERS])

    return "Retrieval: the texts nearest to a clip", right, card


def _classification(table: Mapping[str, Any], clips: Mapping[str, Any]) -> _Cards:
    classes, best = table["classes"], table["best_classes"]
    several = table["kind"] == "multilabel"
    labels = [set(each) if several else {each} for each in table["labels"]]
    right = np.array([row[0] in true for row, true in zip(best, labels, strict=True)], dtype=bool)

    def card(row: int) -> Card:
        similarity = table["similarity"][row] if "similarity" in table else [None] * len(best[row])
        answers = [Answer(classes[c], sim, c in labels[row]) for c, sim in zip(best[row], similarity, strict=True)]
        truth = ", ".join(classes[c] for c in sorted(labels[row])) or "none of the classes"
        return Card(bool(right[row]), _name(clips, row), [("", row)], truth, answers[:_ANSWERS])

    return "Classification: the classes nearest to a clip", right, card


def _multiple_choice(table: Mapping[str, Any], clips: Mapping[str, Any]) -> _Cards:
    texts, questions = table["texts"], table["questions"]
    right = np.array([each["taken"] == each["answer"] for each in questions], dtype=bool)

    def card(row: int) -> Card:
        asked = questions[row]
        taken, answer = asked["taken"], asked["answer"]
        shown = [taken] if taken == answer else [taken, answer]

        def answers(names: Sequence[str]) -> list[Answer]:
            return [Answer(name, asked["similarity"][i], i == answer) for name, i in zip(names, shown, strict=True)]

        kind = asked["kind"].replace("_", " ")
        if asked["query_is_clip"]:
            said = [texts[asked["choices"][i]] for i in shown]
            clip = asked["query"]
            return Card(taken == answer, f"{kind}: {_name(clips, clip)}", [("", clip)], said[-1], answers(said))
        # A text asks for its clip: the pictures are the answers.
        rows = [asked["choices"][i] for i in shown]
        captions = ["taken" if i == taken else "right" for i in shown]
        names = [_name(clips, clip) for clip in rows]
        pictures = list(zip(captions, rows, strict=True))
        return Card(taken == answer, kind, pictures, texts[asked["query"]], answers(names))

    return "Multiple choice: what was taken", right, card


_KINDS = {
    "retrieval": _retrieval,
    "classification": _classification,
    "multilabel": _classification,
    "multiple_choice": _multiple_choice,
}


def _name(clips: Mapping[str, Any], row: int) -> str:
    start, end = clips["start"][row], clips["end"][row]
    return clips["id"][row] if end is None else f"{clips['id'][row]}, {start:.2f}–{end:.2f} s"


def _evenly(rows: np.ndarray) -> list[int]:
    count = min(len(rows), CARDS)
    return [int(row) for row in rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]] if count else []
