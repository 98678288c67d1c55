"""Narrations by a language model, with or without a look at the frames."""

from __future__ import annotations

import base64
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jsonschema
import numpy as np
from PIL import Image

from egohod.hod.config import NarratorSettings
from egohod.hod.narrators.base import Narration, NarratorError, Request, describe
from egohod.hod.narrators.endpoint import Answer, Endpoint, Unanswerable

# Asked of the server, and held against its answer: one truth.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "captions": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"clip": {"type": "integer"}, "caption": {"type": "string", "minLength": 1}},
                "required": ["clip", "caption"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["captions"],
    "additionalProperties": False,
}
_BLOCKS = ("instructions", "examples", "request")
# How reasoning models mark what they think aloud, unless the server takes it out.
_REASONING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning|analysis)>", re.IGNORECASE)
_ANSWER = re.compile(r'\{\s*"captions"\s*:')
_TRIES = 8


class LanguageModelNarrator:
    """Asks an endpoint, several clips at a time."""

    def __init__(self, settings: NarratorSettings, prompt: Path, endpoint: Endpoint | None = None) -> None:
        """``prompt`` is a Jinja file with the blocks ``instructions``, ``examples`` and ``request``.

        Raises :class:`NarratorError` naming the file or the key at fault.
        """
        self.name = settings.kind
        self._settings = settings
        self._endpoint = endpoint or Endpoint(settings)
        self._prompt = _load(prompt)
        self.instructions = self._render("instructions", [])
        self._system = self.instructions + "\n\n" + self._render("examples", [])
        self._looks = settings.kind == "vlm"

    def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
        """See :class:`~egohod.hod.narrators.base.Narrator`; without text for a batch whose answer is no use."""
        size = self._settings.batch
        batches = [range(first, min(first + size, len(requests))) for first in range(0, len(requests), size)]
        bodies = (self._body([requests[number] for number in batch]) for batch in batches)
        for place, answer in self._endpoint.ask_all(bodies):
            batch = batches[place]
            yield from zip(batch, self._narrations(answer, len(batch)), strict=True)

    def _body(self, requests: Sequence[Request]) -> dict[str, Any]:
        # What a narration says is data: as a JSON string it cannot end its own quotation.
        clips = [
            {
                "clip": number,
                "narration": request.source,
                "facts": describe(request.facts),
                "refused": request.refused,
                "complaints": list(request.complaints),
            }
            for number, request in enumerate(requests, 1)
        ]
        text = self._render("request", clips)
        content: str | list[dict[str, Any]] = text
        if self._looks:
            content = [{"type": "text", "text": text}]
            for number, request in enumerate(requests, 1):
                content.append({"type": "text", "text": f"Frames of clip {number}:"})
                content += [{"type": "image_url", "image_url": {"url": url}} for url in self._pictures(request)]
        body: dict[str, Any] = {
            "messages": [{"role": "system", "content": self._system}, {"role": "user", "content": content}],
            "temperature": self._settings.temperature,
            "max_tokens": self._settings.max_tokens * len(requests),
            "seed": self._settings.seed + requests[0].seed,
        }
        if self._settings.model:
            body["model"] = self._settings.model
        if self._settings.answer_format == "json_schema":
            schema = {"name": "captions", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self._settings.answer_format == "json_object_schema":
            body["response_format"] = {"type": "json_object", "schema": SCHEMA}
        elif self._settings.answer_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def _pictures(self, request: Request) -> Iterator[str]:
        """Data URLs of a clip's frames."""
        if request.frames is None or not len(request.frames):
            raise NarratorError("narrator.kind=vlm needs the frames of each clip")
        for at in np.linspace(0, len(request.frames) - 1, min(self._settings.frames, len(request.frames))).round():
            image = Image.fromarray(request.frames[int(at)])
            image.thumbnail((self._settings.frame_size, self._settings.frame_size))
            held = io.BytesIO()
            image.save(held, "JPEG", quality=self._settings.jpeg_quality)
            yield "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()

    def _narrations(self, answer: Answer | Unanswerable, count: int) -> list[Narration]:
        """One narration a clip of the batch."""
        if isinstance(answer, Unanswerable):
            return [Narration(None, self.name, problem=f"no answer: {answer}")] * count
        texts, problem = _captions(answer.text)
        if problem and answer.is_cut:
            problem += "; cut off at its limit of tokens, raise narrator.max_tokens"
        wrong = f"schema: {problem}" if problem else "schema: the answer leaves this clip out, or has it twice"
        shares = zip(_shared(answer.prompt_tokens, count), _shared(answer.completion_tokens, count), strict=True)
        return [
            Narration(texts.get(number), self.name, *tokens, None if number in texts else wrong)
            for number, tokens in enumerate(shares, 1)
        ]

    def _render(self, block: str, clips: list[dict[str, Any]]) -> str:
        context = self._prompt.new_context({"clips": clips})
        try:
            return "".join(self._prompt.blocks[block](context)).strip()
        except Exception as error:  # what its expressions raise
            raise NarratorError(f"{self._prompt.filename}: {type(error).__name__}: {error}") from error


def _load(path: Path) -> jinja2.Template:
    try:
        source = path.read_text(encoding="utf-8-sig")
        template = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(source)
    except (OSError, ValueError, RecursionError, jinja2.TemplateError) as error:
        raise NarratorError(f"{path}: not usable as a prompt: {error}") from error
    missing = [block for block in _BLOCKS if block not in template.blocks]
    if missing:
        raise NarratorError(f"{path}: a prompt needs the blocks {', '.join(_BLOCKS)}; there is no {missing[0]}")
    template.filename = str(path)
    return template


def _captions(text: str) -> tuple[dict[int, str], str | None]:
    """Captions by clip, and what is wrong with the answer as a whole."""
    said = _without_reasoning(text)
    if not said.strip():
        return {}, "nothing follows the model's reasoning"
    fitting, problem = None, None
    # The last that fits: before it a model may quote the request, draft and talk in braces.
    for start in reversed(list(_ANSWER.finditer(said))[-_TRIES:]):
        try:
            answer, _ = json.JSONDecoder().raw_decode(said, start.start())
            _read_numbers(answer)
            jsonschema.validate(answer, SCHEMA)
            fitting = answer
            break
        except (ValueError, RecursionError) as error:
            problem = problem or f"not JSON ({' '.join(str(error).split())[:80]})"
        except jsonschema.ValidationError as error:
            problem = problem or f"{error.json_path}: {error.validator} is not met"
    if fitting is None:
        return {}, problem or "not JSON of the form {captions: [...]}"
    numbers = [each["clip"] for each in fitting["captions"]]
    return {
        each["clip"]: _printable(each["caption"]) for each in fitting["captions"] if numbers.count(each["clip"]) == 1
    }, None


def _without_reasoning(text: str) -> str:
    """What follows the model's reasoning; some chat templates open it in the prompt, so that only its end is here.

    Reasoning without an end is no answer, whatever drafts are in it.
    """
    marks = list(_REASONING.finditer(text))
    closing = [mark.end() for mark in marks if mark.group(1)]
    start = closing[-1] if closing else 0
    unclosed = [mark.start() for mark in marks if mark.start() >= start]
    return text[start : unclosed[0] if unclosed else None]


def _read_numbers(answer: dict[str, Any]) -> None:
    """Clip numbers that are written as text become numbers."""
    captions = answer.get("captions")
    for each in captions if isinstance(captions, list) else ():
        number = each.get("clip") if isinstance(each, dict) else None
        if isinstance(number, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", number):
            each["clip"] = int(number)


def _printable(text: str) -> str:
    """On one line, without control characters and halves of a character."""
    return " ".join("".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs")).split())


def _shared(total: int, count: int) -> list[int]:
    """A request's tokens shared out over its clips; the sum stays."""
    return [total // count + (place < total % count) for place in range(count)]
