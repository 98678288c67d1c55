"""Every knob of the narrators and of the check, with the reason for each default."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from egohod.knobs import knob

log = logging.getLogger(__name__)

_ENDPOINT = (
    *("endpoint", "model", "api_key_env", "prompt", "batch", "concurrency", "timeout_seconds", "retries"),
    *("give_up_seconds", "temperature", "max_tokens", "answer_format"),
)
_FRAMES = ("frames", "frame_size", "jpeg_quality")
_TEMPLATE = ("seed", "varied")
_USED = {"template": _TEMPLATE, "llm": (*_TEMPLATE, *_ENDPOINT), "vlm": (*_TEMPLATE, *_ENDPOINT, *_FRAMES)}


@dataclass
class NarratorSettings:
    """Who words the facts."""

    kind: str = knob(
        "template",
        "template: sentences put together here, offline; llm: a language model rewrites the narration; vlm: a "
        "vision-language model is shown the frames too, for videos without narrations",
        choices=("template", "llm", "vlm"),
    )
    seed: int = knob(0, "varies the template's wording, and is handed to the model", low=0)
    varied: bool = knob(
        True,
        "template: say the same in several ways; false keeps to one, and to what moves where, which a text tower that "
        "starts from nothing learns sooner",
    )
    endpoint: str = knob(
        "http://127.0.0.1:8000/v1", "base address of any OpenAI-compatible server (vLLM, Ollama, llama.cpp, a service)"
    )
    model: str = knob("", "what the server calls the model; empty is right for servers that have only one")
    api_key_env: str | None = knob(
        None, "environment variable that holds the key; null sends none. The key itself belongs in no file and no log"
    )
    prompt: str | None = knob(
        None, "Jinja file of the prompt; null is configs/hod/prompts/llm.jinja or vlm.jinja, by kind"
    )
    batch: int = knob(8, "clips a request; a small model mixes up many, a large one saves the prompt's tokens", low=1)
    concurrency: int = knob(4, "requests in flight at most", low=1)
    timeout_seconds: float = knob(120.0, "a request that has no whole answer by then is tried again", above=0)
    retries: int = knob(5, "further tries of a request that times out, is refused for load or breaks off", low=0)
    give_up_seconds: float = knob(
        600.0, "stop the run, which then can be resumed, when no request at all has worked for so long", above=0
    )
    temperature: float = knob(0.7, "0 makes captions alike, which teaches less; above 1 models invent", low=0, high=2)
    max_tokens: int = knob(128, "tokens of the answer a clip", low=16)
    answer_format: str = knob(
        "json_schema",
        "how the server is asked to keep to the schema: json_schema (vLLM, llama.cpp, Ollama, OpenAI), "
        "json_object_schema (llama-cpp-python), json_object for those that know no schema, none to say it in the "
        "prompt alone; the answer is held to it in any case",
        choices=("json_schema", "json_object_schema", "json_object", "none"),
    )
    frames: int = knob(4, "vlm: frames of a clip that are sent, evenly spaced", low=1)
    frame_size: int = knob(448, "vlm: longer side of a sent frame in pixels; tokens grow with its square", low=32)
    jpeg_quality: int = knob(85, "vlm: of the sent frames", low=10, high=100)


@dataclass
class CheckSettings:
    """What a caption must keep to."""

    min_words: int = knob(3, "shorter says nothing", low=1)
    max_words: int = knob(60, "the text tower reads 77 tokens; what is longer is cut off there", low=4)
    min_seen: float = knob(
        0.1, "a hand that was found in a smaller share of the frames may not be spoken of", low=0, high=1
    )
    words: bool = knob(True, "hold verbs, objects and sides to the source narration's")
    tracks: bool = knob(True, "hold hands, directions and contact to the tracks")
    language: float = knob(0.6, "least share of a caption's words that are English; 0 asks for none", low=0, high=1)
    ask_again: bool = knob(True, "a refused caption is asked for once more, with the reasons, before the template")


def used(settings: NarratorSettings) -> dict[str, Any]:
    """The knobs that the chosen narrator looks at, and which it is."""
    return {name: getattr(settings, name) for name in ("kind", *_USED[settings.kind])}


def warn_of_unused(settings: NarratorSettings) -> list[str]:
    """Say which knobs differ from their default though the chosen narrator does not look at them; their names."""
    plain, heeded = NarratorSettings(), used(settings)
    unused = [
        each.name
        for each in dataclasses.fields(settings)
        if each.name not in heeded and getattr(settings, each.name) != getattr(plain, each.name)
    ]
    for name in unused:
        log.warning("narrator.%s is ignored: narrator.kind=%s has no use for it", name, settings.kind)
    return unused
