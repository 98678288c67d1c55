"""A narration in clauses, each with the hand that it speaks of."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
