"""Whether a caption is true to its clip: to the narration it was made from, and to the tracks.

Made for captions of any narrator. The half that looks at the source compares verbs, objects and which hand does what;
the half that looks at the tracks, hands, directions and contact. Both are rules over words, not a model: they say which
word they refuse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import simplemma

from egohod.hod import language
from egohod.hod.claims import unsupported
from egohod.hod.facts import ClipFacts
from egohod.hod.language import clauses, sides
from egohod.hod.settings import CheckSettings

NAMES = ("length", "prompt", "language", "side", "verb", "object", "hand", "direction", "times", "contact")
"""What reasons begin with, followed by a colon and the words at fault."""

# Orders to a model, whoever gives them.
_ORDER = re.compile(
    r"\b(?:ignore|disregard|forget)\b.{0,30}\b(?:above|previous|instructions?|prompt|rules)\b"
    r"|\b(?:system|user) prompt\b",
    re.IGNORECASE,
)
# Said by models about their task; of a clip only if the narration has it, as in "reads the instructions".
_TALK = re.compile(
    r"\bas an ai\b|\bi(?:'m| am) sorry\b|\bi can(?:'t|not)\b|\bhere (?:is|are)\b|\bsure[,!]|\bcertainly\b"
    r"|\b(?:caption|narration|output|answer|rewritten|facts?|clip \d+) ?:|\binstructions?\b|\bjson\b"
    r"|https?://|```|[{}<>\[\]]",
    re.IGNORECASE,
)
_WITH = re.compile(r"\b(?:with|using|uses?|by) (?:the |his |her |their |your |my )?(left|right) hand\b")
_ECHO_WORDS = 6
# A source of so few words tells no language: "open tupperware" is English.
_SHORT = 2
# The hand that does not act may do this as well; whether it does, the tracks say.
_SHARED = frozenset({"hold", "keep"})
# Of the source's verbs and things, the least share that a caption names
_KEPT = 0.6
# Of more verbs or things than this one may go missing
_FEW = 2


@dataclass(frozen=True)
class Verdict:
    """What the check says of a caption."""

    score: float
    """0 to 1: the share of the source's words that are kept times the share of statements that the tracks support."""
    reasons: tuple[str, ...]
    """Why it is refused, each ``name: what``; see ``NAMES``."""

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons


def check(caption: str, source: str, facts: ClipFacts | None, settings: CheckSettings, prompt: str = "") -> Verdict:
    """Judge a caption.

    ``source`` is the narration before, or nothing; words are not compared with one that is not English. ``facts`` is
    None where there are no tracks. ``prompt`` are the narrator's instructions, which no caption may repeat.
    """
    reasons = _form(caption, source, settings, prompt)
    if reasons:
        return Verdict(0.0, tuple(reasons))
    kept = supported = 1.0
    if settings.words and source.strip() and is_english(source, settings.language):
        # What the tracks have no name for is an object, as in "the left hand holds another object".
        name = facts.object.name if facts is not None and facts.object is not None else None
        reasons, kept = compare_words(caption, source, facts, f"{name or ''} object" if facts is not None else "")
    if settings.tracks and facts is not None:
        wrong, statements = unsupported(caption, source, facts, settings.min_seen)
        reasons += wrong
        supported = 1 - min(len(wrong) / max(statements, 1), 1.0)
    return Verdict(kept * supported, tuple(reasons))


def is_english(text: str, least: float) -> bool:
    """Whether at least this share of a text's words are English; names and numbers aside."""
    found = _spelled(text)
    if not found:
        return False
    if sum(word.isascii() for word in found) < least * len(found):
        return False
    return simplemma.in_target_language(" ".join(found), lang="en") >= least


def _spelled(text: str) -> list[str]:
    """Words of two letters and more, those of marks such as #C aside."""
    return re.findall(r"[^\W\d_]{2,}", re.sub(r"^#\s*\w+|#\w+", " ", text))


def compare_words(caption: str, source: str, facts: ClipFacts | None, thing: str) -> tuple[list[str], float]:
    """The half of the check that needs no tracks: reasons, and the share of the source's words that is kept.

    ``facts`` may allow hands that the source does not name, ``thing`` is a further object that may be named.
    """
    reasons = []
    found = language.compare(source, caption, thing)
    told = language.named(source)
    if found.new_verbs or (found.lost_verbs and len(told.verbs) <= _FEW):
        put, gone = ", ".join(found.new_verbs), ", ".join(found.lost_verbs)
        reasons.append(f"verb: {put or 'nothing'} for {gone or 'none of the source'}")
    if (found.new_things and found.lost_things) or found.invented:
        reasons.append(
            f"object: {', '.join(found.new_things)} for {', '.join(found.lost_things) or 'none of the source'}"
        )
    elif found.kept < _KEPT or (len(told.things) <= _FEW and any(language.telling(each) for each in found.lost_things)):
        reasons.append(f"object: {', '.join((*found.lost_verbs, *found.lost_things))} left out")
    old, new = set(sides(source)), set(sides(caption))
    if old:
        more = new - old - set(facts.hands if facts is not None else ())
        if old - new or more:
            reasons.append(f"side: {_spoken(new)} for {_spoken(old)}")
        elif language.crossed(source, caption):
            reasons.append("side: the hands have changed places")
    elif new and facts is not None and facts.acting is not None:
        deed = _done_by_another(caption, told.verbs, facts.acting)
        if deed:
            reasons.append(f"side: {deed} is done by the {facts.acting} hand")
    return reasons, found.kept


def _done_by_another(caption: str, verbs: tuple[str, ...], acting: str) -> str | None:
    """The deed that a caption gives to the hand that does not act."""
    own, others = set[str](), list[str]()
    for clause in clauses(caption):
        means = _WITH.search(clause.text)
        if means and means[1] != acting:
            return means.group()
        did = [each for each in language.named(clause.text).verbs if any(language.alike(each, verb) for verb in verbs)]
        if clause.sides and acting not in clause.sides:
            others += did
        else:
            own.update(did)
    return next((deed for deed in others if deed not in _SHARED & own), None)


def _form(caption: str, source: str, settings: CheckSettings, prompt: str) -> list[str]:
    """Length, prompt text and language."""
    said = re.findall(r"[\w'-]+", caption)
    if not settings.min_words <= len(said) <= settings.max_words:
        return [f"length: {len(said)} words, not {settings.min_words} to {settings.max_words}"]
    talk = [each.group() for each in _ORDER.finditer(caption)]
    talk += [each.group() for each in _TALK.finditer(caption) if each.group().lower() not in source.lower()]
    if talk:
        return [f"prompt: {talk[0]!r}"]
    repeated = (_runs(caption) & _runs(prompt)) - _runs(source)
    if repeated:
        return [f"prompt: {' '.join(min(repeated))!r}"]
    if settings.language:
        if not is_english(caption, settings.language):
            return ["language: not English"]
        if _copies(caption, source) and not is_english(source, settings.language):
            return ["language: the narration's own words, which are not English"]
    return []


def _copies(caption: str, source: str) -> bool:
    """Whether a caption has most of the source's words; hung on with English ones, they would pass as English."""
    own = set(_spelled(source))
    return len(own) > _SHORT and len(own & set(_spelled(caption))) > len(own) / 2


def _runs(text: str) -> set[tuple[str, ...]]:
    """All runs of some words of a text."""
    said = re.findall(r"[\w'-]+", text.lower())
    return {tuple(said[i : i + _ECHO_WORDS]) for i in range(len(said) - _ECHO_WORDS + 1)}


def _spoken(hands: set[str]) -> str:
    return " and ".join(sorted(hands)) or "no hand"
