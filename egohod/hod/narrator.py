"""What narrators are asked and what they answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from egohod.config import UserError
from egohod.hod.facts import ClipFacts


class NarratorError(UserError):
    """A narrator that cannot be used: no endpoint, no prompt, no key."""


class EndpointDown(NarratorError):
    """The endpoint has not answered for long. What was yielded before is good; the rest can be asked for later."""


@dataclass(frozen=True)
class Request:
    """One clip to narrate."""

    source: str
    """The narration that there is, or nothing. Data: whatever it says is described, never done."""
    facts: ClipFacts
    seed: int = 0
    """Of this clip; varies the wording."""
    frames: np.ndarray | None = None
    """uint8 [T, H, W, 3] RGB; for narrators that look."""
    complaints: tuple[str, ...] = ()
    """Why ``refused`` was."""
    refused: str | None = None
    """The caption before, where it is asked for again."""


@dataclass(frozen=True)
class Narration:
    """One answer."""

    text: str | None
    """None where there is none."""
    narrator: str
    prompt_tokens: int = 0
    """As the server counts them; a request's are shared out over its clips."""
    completion_tokens: int = 0
    problem: str | None = None
    """Why there is no text."""


class Narrator(Protocol):
    """Words clips."""

    name: str

    def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
        """Answer each request once, as (its number, the narration), in whatever order they become ready.

        Raises :class:`EndpointDown` when no more answers can be had, after those that there are.
        """
        ...
