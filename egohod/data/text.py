"""Narrations to tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

# Text lengths in a batch are rounded up to this, so that few different shapes reach the device.
LENGTH_MULTIPLE = 8
# Narrations repeat within an epoch far less than across; this many per process cost about 20 MB.
_CACHED_TEXTS = 32768


class Tokenizer:
    """CLIP's byte-pair tokens through open_clip's tokenizer (works offline)."""

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length
        self._inner = SimpleTokenizer(context_length=context_length)
        self._one = lru_cache(_CACHED_TEXTS)(self._encode)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens of texts, int64 [len(texts), context_length]: start, words, end-of-text (the largest id), zeros.

        Longer texts are cut, the end-of-text token stays last.
        """
        texts = [texts] if isinstance(texts, str) else texts
        return torch.from_numpy(np.stack([self._one(text) for text in texts]).astype(np.int64))

    def _encode(self, text: str) -> np.ndarray:
        return self._inner([text])[0].numpy().astype(np.int32)


def trim(tokens: Tensor) -> Tensor:
    """[B, L] -> [B, l]: the columns after the last end-of-text token of the batch are cut, l a multiple of 8 or L.

    What stands after the end-of-text token of a causal text tower changes nothing. Call it on the CPU: the new
    length is a number the host must know.
    """
    needed = int(tokens.argmax(dim=1).max()) + 1
    return tokens[:, : -(-needed // LENGTH_MULTIPLE) * LENGTH_MULTIPLE]


_WORD = re.compile(
    r"\b(?:(?P<side>left|right)(?P<tail>(?:most|wards?|side|[- ]?hand(?:s|ed)?)\b)?"
    r"|(?P<turn>(?:(?:counter|anti)[- ]?)?clock[- ]?wise))\b",
    re.IGNORECASE,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What comes as a left and a right one
_PAIRED = _words(
    "hand hands arm arms forearm forearms leg legs foot feet side sides finger fingers thumb thumbs index palm "
    "palms wrist wrists elbow elbows knee knees eye eyes ear ears shoulder shoulders fist fists hip toe shoe "
    "shoes glove gloves sleeve sleeves corner edge end half pocket burner lane tap knob"
)
_BEFORE_A_SIDE = _words(
    "the his her my your their its our bottom top upper lower front rear far near middle center centre extreme "
    "towards toward slightly sharply"
)
# "left or right", "left to right", "first left, then right"
_LINKS = _words("and or to then from")
# "turns left in the corridor"
_TURNING = re.compile(
    r"(?:turn|look|lean|move|step|go|walk|swing|tilt|face|slide|bend|shift|rotate|swipe|wipe|drag|steer|veer|sway)"
    r"(?:s|es|d|ed|ing)?"
)
# The verb of leaving: "left the room", "she left", "what was left"
_OBJECTS = _words("the a an his her their my your its our it them him some this that these those all everything")
_LEAVING = _words(
    "c he she they who which that what what's someone somebody person man woman lady boy girl then is are was "
    "were be been being has have had having just all not"
)
# "oil left in the pan", "no water left", "right after that", "right there", "left to dry"
_ADVERBS = _words(
    "over overs away now after before behind off out back up alone running unattended unused empty open "
    "uncovered there here in on at by for inside under above below beside near around through along across onto "
    "into underneath until next again aside as within where when enough to"
)
_NUMBERS = _words("one two three four five six seven eight nine ten")
_REMAINING = _NUMBERS | _words(
    "no any some little much many more few only nothing anything everything bit amount lot rest"
)
# "the right amount"
_FITTING = _words(
    "balance amount size temperature time way thickness consistency order moment fit quantity proportion "
    "proportions degree length shape texture method tool tools place position angle angles setting ratio dose "
    "volume"
)


def swap_sides(text: str) -> str:
    """Mirror a narration: words, possessives, compounds ("leftmost", "right-hand side") and rotations; case is kept.

    Mirrored twice it is the same again; only a rotation that is not spelled "counterclockwise" or "clockwise" comes
    back in that spelling.
    """
    return _WORD.sub(lambda match: _mirrored(match) if _is_side(text, match) else match.group(), text)


def _is_side(text: str, match: re.Match[str]) -> bool:
    """Whether a "left" or "right" is one, by its neighbours; the first rule that fits decides."""
    before = re.findall(r"[\w'#]+|[.,;:!?]", text[: match.start()].lower())[-6:]
    clause = re.split(r"[.,;:!?()\"]", text[match.end() : match.end() + 60].lower(), maxsplit=1)[0]
    after, second, third, *_ = [*re.findall(r"[\w']+", clause), "", "", ""]
    last = before[-1] if before else ""
    sides = {"left", "right"}
    if match["turn"] or match["tail"] or after in _PAIRED:
        return True
    if (after in _LINKS and (second in sides or third in sides)) or (last in _LINKS and sides & set(before[-4:])):
        return True
    if after in ("over", "overs"):
        return False
    if last in ("from", "to") and not after:
        return True
    if last in _BEFORE_A_SIDE:
        return after not in _FITTING
    if _TURNING.fullmatch(last):
        return after not in _OBJECTS | {"away", "now", "after", "before", "at", "back"}
    # People of Ego4D are called by single letters: "#O the man X left".
    if last in _LEAVING or len(last.strip("#")) == 1 or after in _ADVERBS | _OBJECTS | _FITTING:
        return False
    return bool(after) or not _REMAINING & set(before)


def _mirrored(match: re.Match[str]) -> str:
    word = match.group()
    if match["side"]:
        mirrored = ("right" if match["side"].lower() == "left" else "left") + (match["tail"] or "")
    else:
        mirrored = "counterclockwise" if match["turn"].lower() == "clockwise" else "clockwise"
    if word.isupper():
        return mirrored.upper()
    return mirrored[0].upper() + mirrored[1:] if word[0].isupper() else mirrored
