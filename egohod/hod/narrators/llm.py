"""Narrations by a language model (kind llm) or a vision-language model that also gets the frames (kind vlm)."""

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

from egohod.errors import UserError
from egohod.hod.config import NarratorConfig
from egohod.hod.narrators import prompt_path
from egohod.hod.narrators.base import Narration, Request, describe
from egohod.hod.narrators.endpoint import Answer, Endpoint

# Sent to the server and checked on its answer: few servers enforce it completely.
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
# How reasoning models mark their reasoning, unless the server strips it.
_REASONING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning|analysis)>", re.IGNORECASE)
_ANSWER = re.compile(r'\{\s*"captions"\s*:')
_MAX_CANDIDATES = 8  # each costs a parse of the rest of the text: thousands of braces would take minutes


class LanguageModelNarrator:
    """Captions several clips with each request to an endpoint."""

    def __init__(self, settings: NarratorConfig, prompt: Path, endpoint: Endpoint | None = None) -> None:
        """``prompt`` is a Jinja file with the blocks ``instructions``, ``examples`` and ``request``.

        Raises :class:`UserError` naming the file or the key at fault.
        """
        self.name = settings.kind
        self._settings = settings
        self._endpoint = endpoint or Endpoint(settings)
        try:
            source = prompt.read_text(encoding="utf-8-sig")
            self._prompt = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(source)
        except (OSError, ValueError, RecursionError, jinja2.TemplateError) as error:
            raise UserError(f"{prompt}: not usable as a prompt: {error}") from error
        missing = [block for block in _BLOCKS if block not in self._prompt.blocks]
        if missing:
            raise UserError(f"{prompt}: a prompt needs the blocks {', '.join(_BLOCKS)}; there is no {missing[0]}")
        self._prompt.filename = str(prompt)
        # Rendered once, and first in every request: servers cache the prefix that requests have in common.
        self.instructions = self._render("instructions", [])
        self._system = self.instructions + "\n\n" + self._render("examples", [])

    @classmethod
    def from_settings(cls, settings: NarratorConfig) -> LanguageModelNarrator:
        """The narrator of a configuration."""
        return cls(settings, prompt_path(settings))

    def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
        """See :class:`~egohod.hod.narrators.base.Narrator`. A batch without usable answer has no texts."""
        size = self._settings.batch
        batches = [range(first, min(first + size, len(requests))) for first in range(0, len(requests), size)]
        # A generator: the frames of a batch are encoded when it is sent, not all at once.
        bodies = (self._body([requests[number] for number in batch]) for batch in batches)
        for place, answer in self._endpoint.ask_all(bodies):
            batch = batches[place]
            yield from zip(batch, self._narrations(answer, len(batch)), strict=True)

    def _body(self, requests: Sequence[Request]) -> dict[str, Any]:
        """The JSON body of a chat request for a batch of clips, which are numbered from 1."""
        settings = self._settings
        # Prompts write narrations as JSON strings: such text is data and cannot end its own quotation.
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
        if settings.kind == "vlm":
            content = [{"type": "text", "text": text}]
            for number, request in enumerate(requests, 1):
                frames = request.frames
                if frames is None or not len(frames):
                    raise UserError("narrator.kind=vlm needs the frames of each clip")
                content.append({"type": "text", "text": f"Frames of clip {number}:"})
                for at in np.linspace(0, len(frames) - 1, min(settings.frames, len(frames))).round():
                    image = Image.fromarray(frames[int(at)])
                    image.thumbnail((settings.frame_size, settings.frame_size))
                    buffer = io.BytesIO()
                    image.save(buffer, "JPEG", quality=settings.jpeg_quality)
                    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
                    content.append({"type": "image_url", "image_url": {"url": url}})
        body: dict[str, Any] = {
            "messages": [{"role": "system", "content": self._system}, {"role": "user", "content": content}],
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens * len(requests),
            "seed": settings.seed + requests[0].seed,
        }
        if settings.model:
            body["model"] = settings.model
        if settings.answer_format == "json_schema":
            schema = {"name": "captions", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif settings.answer_format == "json_object_schema":
            body["response_format"] = {"type": "json_object", "schema": SCHEMA}
        elif settings.answer_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def _narrations(self, answer: Answer, count: int) -> list[Narration]:
        """One narration for each clip of the batch."""
        if answer.text is None:
            return [Narration(None, self.name, problem=f"no answer: {answer.problem}")] * count
        texts, problem = _captions(answer.text)
        if problem and answer.is_cut:
            problem += "; cut off at its limit of tokens, raise narrator.max_tokens"
        wrong = f"schema: {problem}" if problem else "schema: the answer leaves this clip out, or has it twice"
        narrations = []
        for place in range(count):
            # A request's tokens are shared out over its clips so that the sum stays.
            tokens = [
                total // count + (place < total % count) for total in (answer.prompt_tokens, answer.completion_tokens)
            ]
            text = texts.get(place + 1)
            narrations.append(Narration(text, self.name, tokens[0], tokens[1], wrong if text is None else None))
        return narrations

    def _render(self, block: str, clips: list[dict[str, Any]]) -> str:
        context = self._prompt.new_context({"clips": clips})
        try:
            return "".join(self._prompt.blocks[block](context)).strip()
        except Exception as error:  # whatever the expressions of a user's prompt raise
            raise UserError(f"{self._prompt.filename}: {type(error).__name__}: {error}") from error


def _captions(text: str) -> tuple[dict[int, str], str | None]:
    """Captions by clip, and the problem of the answer as a whole."""
    # The answer follows the reasoning. Some chat templates open that in the prompt, so that only its end is here;
    # reasoning without an end is no answer, whatever drafts are in it.
    marks = list(_REASONING.finditer(text))
    closing = [mark.end() for mark in marks if mark.group(1)]
    start = closing[-1] if closing else 0
    unclosed = [mark.start() for mark in marks if mark.start() >= start]
    text = text[start : unclosed[0] if unclosed else None]
    if not text.strip():
        return {}, "nothing follows the model's reasoning"
    valid, problem = None, None
    # The last valid one: before it a model may quote the request, draft and talk in braces.
    for begin in reversed(list(_ANSWER.finditer(text))[-_MAX_CANDIDATES:]):
        try:
            answer, _ = json.JSONDecoder().raw_decode(text, begin.start())
            captions = answer.get("captions")
            # Small models write the clip's number as text.
            for item in captions if isinstance(captions, list) else ():
                number = item.get("clip") if isinstance(item, dict) else None
                if isinstance(number, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", number):
                    item["clip"] = int(number)
            jsonschema.validate(answer, SCHEMA)
            valid = answer
            break
        except (ValueError, RecursionError) as error:
            problem = problem or f"not JSON ({' '.join(str(error).split())[:80]})"
        except jsonschema.ValidationError as error:
            problem = problem or f"{error.json_path}: {error.validator} is not met"
    if valid is None:
        return {}, problem or "not JSON of the form {captions: [...]}"
    numbers = [item["clip"] for item in valid["captions"]]
    captions = {}
    for item in valid["captions"]:
        if numbers.count(item["clip"]) == 1:  # a clip with two captions is ambiguous
            # On one line, without control characters and surrogates, which no UTF-8 file can hold.
            printable = (c for c in item["caption"] if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
            captions[item["clip"]] = " ".join("".join(printable).split())
    return captions, None
