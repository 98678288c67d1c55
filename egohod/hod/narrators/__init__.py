"""Narrators, which turn facts of a clip into a sentence: their protocol, how one is made by name, how their captions
are checked and replaced, facts as phrases.

To add one: a module in this package with a :class:`Narrator` that is built as ``Class(settings)``, and a line in
``NARRATORS`` of :mod:`egohod.hod.config`, whose :class:`~egohod.hod.config.NarratorConfig` also has its settings.
"""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from egohod.config import PROJECT
from egohod.data.opposites import opposite as opposite_by_rule
from egohod.hod.check import Opinion, Verdict, check, check_coarse, check_opposite, combine
from egohod.hod.config import FURTHER_CAPTIONS, NARRATORS, CheckConfig, NarratorConfig
from egohod.hod.facts import (
    AWAY,
    CLOCKWISE,
    CLOSER,
    COUNTERCLOCKWISE,
    DOWN,
    LEFT,
    PARALLEL,
    RIGHT,
    SHAKING,
    STILL,
    UP,
    ClipFacts,
    HandFacts,
    Motion,
)

if TYPE_CHECKING:
    from egohod.hod.judge import Judging
    from egohod.hod.narrators.template import TemplateNarrator

log = logging.getLogger(__name__)

PROMPTS = PROJECT / "configs" / "hod" / "prompts"
# Added to the prompts, which may be a user's own, for the captions beside fine; in this order. Under these names they
# are part of what results are stored under.
FURTHER_PROMPTS = {"opposite": PROMPTS / "opposites.jinja", "coarse": PROMPTS / "coarse.jinja"}


@dataclass(frozen=True)
class Request:
    """One clip to narrate."""

    source: str  # the existing narration, or nothing. Untrusted: instructions in it are data
    facts: ClipFacts
    seed: int = 0  # of this clip; varies the wording
    frames: np.ndarray | None = None  # uint8 [T, H, W, 3] RGB, for vision-language models
    complaints: tuple[str, ...] = ()  # the check's reasons against ``refused``
    refused: str | None = None  # the previous caption, on a retry


@dataclass(frozen=True)
class Narration:
    """The caption of one clip."""

    text: str | None
    narrator: str
    prompt_tokens: int = 0  # as the server counts them; a request's are shared out over its clips
    completion_tokens: int = 0
    problem: str | None = None  # why there is no text
    opposite: str | None = None  # the text with its motion run backwards, if the narrator writes one
    coarse: str | None = None  # what is done, without hands and directions, if the narrator writes it


@dataclass(frozen=True)
class Usage:
    """What one request to a model took."""

    clips: int
    seconds: float
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Cost:
    """What a clip takes of a model on average, second requests after a refusal included."""

    requests: float
    seconds: float  # with as many requests at a time as the settings have
    prompt_tokens: float | None  # None where the server does not count them
    completion_tokens: float | None
    price: float | None  # None without prices

    @classmethod
    def measured(cls, alone: Sequence[Usage], together: Usage | None, clips: int, settings: NarratorConfig) -> Cost:
        """Extrapolate from a few requests to those of a run, which have ``settings.batch`` clips.

        ``alone`` are requests of one clip each for ``clips`` clips, ``together`` is one of several. Instructions are in
        each request once: what a request takes is a constant and a part for each clip, which these two determine.
        Without ``together`` each clip counts as one alone, which is too much. Nothing is assumed of discounts, for a
        prefix that requests share or for batches, nor of a server that slows down with more requests at a time.
        """
        size, share = settings.batch, len(alone) / clips / settings.batch

        def of_clip(name: str) -> float:
            one = sum(getattr(each, name) for each in alone) / len(alone)
            further = one if together is None else (getattr(together, name) - one) / (together.clips - 1)
            return (one + min(max(further, 0.0), one) * (size - 1)) * share

        tokens = of_clip("prompt_tokens"), of_clip("completion_tokens")
        prices = settings.price_per_million_input, settings.price_per_million_output
        is_priced = any(tokens) and any(each is not None for each in prices)
        price = sum(number * (each or 0.0) for number, each in zip(tokens, prices, strict=True)) / 1e6
        prompt, completion = tokens if any(tokens) else (None, None)
        seconds = of_clip("seconds") / settings.concurrency
        return cls(share, seconds, prompt, completion, price if is_priced else None)


class Narrator(Protocol):
    """Captions clips."""

    name: str

    def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
        """Answer each request once, as (its number, the narration), in whatever order they become ready.

        Raises :class:`UserError` when no more answers can be had, after those that there are.
        """
        ...


# --- By name ---


# Which settings each reads, where not all; those of the template always: it replaces captions that are refused.
_TEMPLATE = ("kind", "seed", "varied", "captions", "distances")
_MODEL = (*_TEMPLATE, "model", "prompt", "batch", "temperature", "max_tokens", "answer_format")
_READ = {"template": _TEMPLATE, "llm": _MODEL, "vlm": (*_MODEL, "frames", "frame_size", "jpeg_quality")}
# Settings of the endpoint, its timing and prices, which do not change the content of a request: no part of what results
# are stored under, so that a run can be resumed with another server.
_ROUTE = (
    *("endpoint", "api_key_env", "concurrency", "timeout_seconds", "retries", "give_up_seconds"),
    *("price_per_million_input", "price_per_million_output"),
)


def make_narrator(settings: NarratorConfig) -> Narrator:
    """The narrator ``settings.kind``, with a warning for every setting that it does not read.

    Raises :class:`UserError` for what is missing: a prompt, a key.
    """
    ignored_settings(settings)
    module, _, name = NARRATORS[settings.kind].rpartition(".")
    narrator: Narrator = getattr(importlib.import_module(f"{__name__}.{module}"), name)(settings)
    return narrator


def ignored_settings(settings: NarratorConfig) -> list[str]:
    """Warn of settings that differ from their default though the chosen narrator does not read them; their names."""
    read = (*_READ.get(settings.kind, vars(settings)), *(_ROUTE if settings.kind != "template" else ()))
    default = type(settings)()
    ignored = [
        name for name in vars(settings) if name not in read and getattr(settings, name) != getattr(default, name)
    ]
    for name in ignored:
        log.warning("narrator.%s is ignored: narrator.kind=%s does not read it", name, settings.kind)
    return ignored


def prompt_path(settings: NarratorConfig) -> Path:
    """The prompt of a language model: ``settings.prompt``, else the project's own."""
    return Path(settings.prompt or PROMPTS / f"{settings.kind}.jinja")


def caption_settings(settings: NarratorConfig) -> dict[str, Any]:
    """The settings that captions depend on, with the text of the prompt instead of its place."""
    values = {name: getattr(settings, name) for name in _READ.get(settings.kind, vars(settings)) if name not in _ROUTE}
    captions = values.pop("captions")
    prompts = {"prompt": prompt_path(settings)} if "prompt" in values else {}
    # Results of releases without these captions stay valid: what is not requested is no part of their hash, and
    # opposites have the name that they had.
    for name in FURTHER_CAPTIONS:
        key = "opposites" if name == "opposite" else name
        if name in captions and prompts:
            prompts[key] = FURTHER_PROMPTS[name]
        elif name in captions:
            values[key] = True
    if not values["distances"]:
        del values["distances"]
    for name, path in prompts.items():
        # A prompt that is missing, or no text, is reported by the narrator.
        values[name] = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else str(path)
    return values


# --- Captions that pass the check ---


@dataclass(frozen=True)
class Checked:
    """A caption that went through the check."""

    text: str | None  # None where even the template's caption is refused
    narrator: str  # whose caption it is in the end; template too where it replaced another's
    verdict: Verdict
    attempts: int  # requests to the narrator: 1 or 2
    refusals: tuple[str, ...]  # why its captions were refused, if there was a second request or a replacement
    prompt_tokens: int
    completion_tokens: int
    unanswered: bool  # the narrator had no usable answer at least once: another day it may have one
    opposite: str | None = None  # the text with its motion run backwards; None where it has none
    opposite_refusals: tuple[str, ...] = ()  # why the narrator's opposite was refused; then it is the rules', if any
    coarse: str | None = None  # what is done, without hands and directions; None where none passes
    coarse_refusals: tuple[str, ...] = ()  # why the narrator's was refused; then it is the template's, if any
    opinions: tuple[Opinion, ...] = ()  # the judge's, on each caption of the narrator that it was asked about


def check_narrations(
    requests: Sequence[Request],
    narrations: Sequence[Narration],
    narrator: Narrator,
    settings: CheckConfig,
    template: TemplateNarrator,
    captions: Sequence[str] = ("fine",),
    judging: Judging | None = None,
) -> Iterator[tuple[int, Checked]]:
    """Check the first narration of each request, and replace those that are refused.

    A refused caption is requested once more, with the reasons (``settings.ask_again``; never from the template, which
    would repeat it). If that is refused too, ``template`` narrates the source, and if that fails, the facts alone.
    ``captions`` are those of the settings. A caption's opposite is the narrator's, which may be none; for captions of
    the template, and where the narrator's is refused, it is the rules'. The coarse caption is the narrator's, whoever
    wrote the fine one, else the template's. Neither costs a second request, nor the fine caption. ``judging`` adds
    a judge's opinion to the verdicts on the narrator's captions.
    Yields (index of the request, result) once for each, as soon as it is decided. Raises what the narrator raises, and
    AssertionError if it leaves a request without an answer.
    """
    instructions = getattr(narrator, "instructions", "")
    answers: list[list[Narration]] = [[] for _ in requests]
    refusals: list[tuple[str, ...]] = [() for _ in requests]
    refused: list[int] = []
    opinions: list[tuple[Opinion, ...]] = [() for _ in requests]
    undecided = set(range(len(requests)))

    def second_answers() -> Iterator[tuple[int, Narration]]:
        if refused and settings.ask_again and narrator.name != "template":
            numbers = refused.copy()
            refused.clear()
            again = [replace(requests[n], complaints=refusals[n], refused=answers[n][0].text) for n in numbers]
            for place, answer in narrator.narrate(again):
                yield numbers[place], answer

    def result(number: int, text: str | None, who: str, verdict: Verdict) -> tuple[int, Checked]:
        own = answers[number]
        undecided.remove(number)
        tokens = sum(answer.prompt_tokens for answer in own), sum(answer.completion_tokens for answer in own)
        # By a judge either: where it had no answer the rules alone have decided.
        unanswered = any(answer.problem is not None for answer in own)
        unanswered = unanswered or any(opinion.entailed is None for opinion in opinions[number])
        opposite = coarse = None
        opposite_faults, coarse_faults = tuple[str, ...](), tuple[str, ...]()
        if "opposite" in captions and text is not None:
            by_rule = opposite_by_rule(text)
            written = by_rule if who == "template" else own[-1].opposite
            # A refused one is not requested again: the rules need no request. A model that names none has its reasons.
            for candidate in dict.fromkeys(filter(None, (written, written and by_rule))):
                reasons = check_opposite(text, candidate, settings, instructions)
                if not reasons:
                    opposite = candidate
                    break
                opposite_faults += reasons
        if "coarse" in captions and text is not None:
            request = requests[number]
            candidates = [(each.coarse, request.source) for each in reversed(own) if each.coarse][:1]
            # As for the fine caption below: the facts alone are checked as what they are.
            candidates += [(template.coarse(source, request), source) for source in (request.source, "")]
            for candidate, source in dict.fromkeys(candidates):
                if candidate:
                    prompt = instructions if source == request.source else ""
                    reasons = check_coarse(candidate, text, source, settings, prompt)
                    if not reasons:
                        coarse = candidate
                        break
                    coarse_faults += reasons
        kinds = opposite, opposite_faults, coarse, coarse_faults
        return number, Checked(
            *(text, who, verdict, len(own), refusals[number], *tokens, unanswered, *kinds, opinions[number])
        )

    def verdicts(numbered: Iterable[tuple[int, Narration]]) -> Iterator[tuple[int, Narration, Verdict]]:
        """Each answer with its verdict; those that the judge is asked about come last, together."""
        pending: list[tuple[int, Narration, Verdict]] = []
        for number, answer in numbered:
            request, verdict = requests[number], Verdict(0.0, (answer.problem or "no answer",))
            if answer.text is not None:
                verdict = check(answer.text, request.source, request.facts, settings, instructions)
                if judging is not None and judging.asks(verdict):
                    pending.append((number, answer, verdict))
                    continue
            yield number, answer, verdict
        if judging is not None:
            items = [(requests[n].source, requests[n].facts, answer.text or "", each) for n, answer, each in pending]
            for place, verdict, opinion in judging.decide(items):
                number, answer, _ = pending[place]
                opinions[number] += (opinion,)
                yield number, answer, verdict

    # The second answers are requested after all of the first are checked: their requests are then full.
    every = itertools.chain(verdicts(enumerate(narrations)), verdicts(second_answers()))
    for number, answer, verdict in every:
        answers[number].append(answer)
        refusals[number] += verdict.reasons
        if verdict.passed:
            yield result(number, answer.text, answer.narrator, verdict)
        else:
            refused.append(number)
    for number in refused:
        request, text, verdict = requests[number], None, Verdict(0.0, refusals[number])
        for source in dict.fromkeys((request.source, "")):
            caption = template.caption(source, request)
            # The facts alone are checked as what they are, a caption without a narration before.
            verdict = check(caption, source, request.facts, settings, instructions if source == request.source else "")
            if verdict.passed:
                text = caption
                break
        yield result(number, text, "template", verdict)
    # Not the template's caption: with an answer missing, which numbers the others have is in doubt too.
    assert not undecided, f"narrator {narrator.name} has not answered the requests {sorted(undecided)}"


def second_request(
    request: Request, narration: Narration, opinions: Sequence[Opinion], settings: CheckConfig, prompt: str
) -> Request | None:
    """The request after a refused caption, with the reasons; None for one that passes the check, or is missing.

    ``opinions`` are the judge's on the captions of this clip so far, the first one's first.
    """
    if narration.text is None:
        return None
    verdict = check(narration.text, request.source, request.facts, settings, prompt)
    if opinions:  # of another caption only where the rules refuse this one, and no judge was asked
        verdict, _ = combine(verdict, opinions[0], settings.judge_mode)
    return None if verdict.passed else replace(request, complaints=verdict.reasons, refused=narration.text)


# --- Phrases ---

# Synonyms are those of human narrators, who use now one, now the other.
_DIRECTIONS = {
    LEFT: ("to the left",), RIGHT: ("to the right",), UP: ("upward", "up"), DOWN: ("downward", "down"),
    AWAY: ("away",), CLOSER: ("closer", "back towards the body"), CLOCKWISE: ("clockwise",),
    COUNTERCLOCKWISE: ("counterclockwise",), SHAKING: ("back and forth",),
}  # fmt: skip
OTHER = {LEFT: RIGHT, RIGHT: LEFT}
"""The other hand, by side."""
_TIMES = {2: "twice", 3: "three times", 4: "four times"}
_TOUCHED = {
    "object": "the {o}", "other object": "another object", "surface": "the surface", "other hand": "the other hand",
    "other person": "another person",
}  # fmt: skip


def direction_phrase(motion: Motion, variant: int = 0) -> str:
    """``first to the left, then to the right``, or nothing for a thing at rest; ``variant`` chooses among synonyms."""
    legs = [_DIRECTIONS[each][variant % len(_DIRECTIONS[each])] for each in motion.directions if each != STILL]
    if not legs:
        return ""
    text = legs[0] if len(legs) == 1 else f"first {legs[0]}, then " + " and then ".join(legs[1:])
    return f"{text}, {times_phrase(motion)}" if motion.repeats > 1 else text


def times_phrase(motion: Motion) -> str:
    """``twice``; ``once`` for what goes and comes back a single time; else nothing."""
    if motion.repeats > 1:
        return _TIMES.get(motion.repeats, "several times")
    return "once" if motion.directions in ((DOWN, UP), (UP, DOWN)) else ""


def distance_phrase(motion: Motion) -> str:
    """``by about 20 cm``, for what goes one way; nothing where that is less than 5 cm or unknown."""
    if motion.distance is None or motion.distance < 0.05 or len(motion.directions) != 1 or motion.repeats > 1:
        return ""
    # In steps of 5 cm, of 10 from half a metre: more digits would claim what the estimate does not have.
    step = 5 if motion.distance < 0.5 else 10
    return f"by about {step * round(100 * motion.distance / step)} cm"


def regions_phrase(motion: Motion) -> str:
    """``from the left side to the centre``, where it ends in another region than it begins in; else nothing."""
    if motion.start_region == motion.end_region or not motion.is_moving:
        return ""
    start, end = (
        f"the {region} side" if region in (LEFT, RIGHT) else f"the {region}"
        for region in (motion.start_region, motion.end_region)
    )
    return f"from {start} to {end}"


def touched_phrase(hand: HandFacts, thing: str) -> str | None:
    """What a hand touches, in words; None where nothing."""
    return None if hand.touches is None else _TOUCHED[hand.touches].format(o=thing)


def thing_name(facts: ClipFacts) -> str:
    """The active object's name, or ``object``."""
    return facts.object.name if facts.object is not None and facts.object.name else "object"


def describe(facts: ClipFacts, distances: bool = False) -> list[str]:
    """One line for each hand and thing, the input of language models; with ``distances`` also how far hands move."""
    thing = thing_name(facts)
    lines = []
    for side in (LEFT, RIGHT):
        hand = facts.hands.get(side)
        if hand is None:
            # Without this line a model may invent the hand.
            lines.append(f"{side} hand: not visible, do not mention it")
            continue
        parts = ["does the action" if side == facts.acting else "does not do the action"]
        parts.append(f"moves {direction_phrase(hand.motion)}" if hand.motion.is_moving else "rests")
        if distances and hand.motion.is_moving and distance_phrase(hand.motion):
            parts[-1] += f" {distance_phrase(hand.motion)}"
        if hand.relation:
            parts.append(f"{hand.relation} the {thing}")
        if regions_phrase(hand.motion):
            parts.append(regions_phrase(hand.motion))
        touched = touched_phrase(hand, thing)
        if touched is None:
            parts.append("touches nothing")
        else:
            parts.append(f"touches {touched}" + (" from the start" if hand.contact == 0 else " after reaching for it"))
            if hand.regrasps:
                parts.append("lets go of it in between and takes it again")
            if hand.release is not None:
                parts.append("then lets go")
        lines.append(f"{side} hand: {'; '.join(parts)}")
    if facts.object is not None and not facts.object.guessed:
        motion = facts.object.motion
        lines.append(f"{thing}: {f'moves {direction_phrase(motion)}' if motion.is_moving else 'does not move'}")
    if facts.hands_together in ("closing", "parting"):
        lines.append("the two hands " + ("come together" if facts.hands_together == "closing" else "move apart"))
    pair = facts.pair
    if pair is not None:
        if pair.moves is not None:
            lines.append("the two hands move " + ("the same way" if pair.moves == PARALLEL else "symmetrically"))
        if pair.handed_to is not None:
            lines.append(f"the {thing} goes from the {OTHER[pair.handed_to]} hand to the {pair.handed_to} hand")
        elif pair.shares:
            lines.append(f"both hands hold the {thing}")
        if pair.steadies is not None:
            lines.append(f"the {pair.steadies} hand steadies what it holds")
    return lines
