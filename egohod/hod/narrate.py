"""Narrating with a check: what is done about captions that are refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from egohod.hod.check import Verdict, check
from egohod.hod.config import CheckSettings
from egohod.hod.narrators.base import Narrator, Request
from egohod.hod.narrators.template import TemplateNarrator

_TEMPLATE = TemplateNarrator()


@dataclass(frozen=True)
class Checked:
    """A caption that went through the check."""

    text: str | None
    """None where not even the template has something true to say."""
    narrator: str
    """Who worded it in the end; ``template`` too where it stood in for another."""
    verdict: Verdict
    attempts: int
    """How often the narrator was asked: 1 or 2."""
    refusals: tuple[str, ...]
    """Reasons for which its captions were refused, if it was asked twice or replaced."""
    prompt_tokens: int
    completion_tokens: int
    unanswered: bool
    """Whether the narrator had no usable answer, at least once: asked another day it may have one."""


def narrate_checked(
    narrator: Narrator,
    requests: Sequence[Request],
    settings: CheckSettings,
    template: TemplateNarrator = _TEMPLATE,
) -> Iterator[tuple[int, Checked]]:
    """Narrate and check; the policy for what is refused, in one place.

    A refused caption is asked for once more, with the reasons (``settings.ask_again``; never of the template, which
    would say the same); if that is refused too, ``template`` words the source, and if its check fails, the facts alone.
    Each request is answered once, as (its number, result), as soon as it is settled. Raises what the narrator raises.
    """

    def judged(request: Request, text: str | None, problem: str | None) -> Verdict:
        if text is None:
            return Verdict(0.0, (problem or "no answer",))
        return check(text, request.source, request.facts, settings, prompt=getattr(narrator, "instructions", ""))

    spent = dict.fromkeys(range(len(requests)), (0, 0))
    attempts = dict.fromkeys(spent, 0)
    refusals: dict[int, tuple[str, ...]] = dict.fromkeys(spent, ())
    unanswered = set[int]()

    def settle(number: int, text: str | None, who: str, verdict: Verdict) -> tuple[int, Checked]:
        return number, Checked(
            text, who, verdict, attempts[number], refusals[number], *spent[number], number in unanswered
        )

    open_, asked = list(requests), list(spent)
    rounds = 2 if settings.ask_again and narrator.name != "template" else 1
    for _ in range(rounds):
        again: dict[int, Request] = {}
        for place, answer in narrator.narrate(open_):
            number = asked[place]
            before = spent[number]
            spent[number] = (before[0] + answer.prompt_tokens, before[1] + answer.completion_tokens)
            attempts[number] += 1
            if answer.problem is not None:
                unanswered.add(number)
            verdict = judged(requests[number], answer.text, answer.problem)
            if verdict.passed:
                yield settle(number, answer.text, answer.narrator, verdict)
                continue
            refusals[number] += verdict.reasons
            again[number] = replace(requests[number], complaints=verdict.reasons, refused=answer.text)
        asked, open_ = list(again), list(again.values())
        if not open_:
            return
    for number in asked:
        request = requests[number]
        verdict = Verdict(0.0, refusals[number])
        for source in dict.fromkeys((request.source, "")):
            text = template.caption(source, request)
            verdict = (
                judged(request, text, None) if source == request.source else check(text, "", request.facts, settings)
            )
            if verdict.passed:
                yield settle(number, text, "template", verdict)
                break
        else:
            yield settle(number, None, "template", verdict)
