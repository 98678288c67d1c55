"""Narrators, which turn facts of a clip into a sentence: the registry.

To add one: a module in this package with a :class:`~egohod.hod.narrators.base.Narrator` that has ``from_settings``, and
one line in ``NARRATORS``. Its name is then a value of ``narrator.kind``; settings of its own go into
:class:`~egohod.hod.config.NarratorConfig`.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egohod.config import PROJECT
from egohod.hod.narrators.base import Narrator

if TYPE_CHECKING:
    from egohod.hod.config import NarratorConfig

log = logging.getLogger(__name__)

PROMPTS = PROJECT / "configs" / "hod" / "prompts"
_TEMPLATE = ("seed", "varied")
_MODEL = (
    *("model", "prompt", "batch", "temperature", "max_tokens", "answer_format"),
    # What changes whom a narrator asks, and how long that takes, but not what it is asked: no part of what results are
    # stored under, so that a run can be resumed with another server.
    *(_ROUTE := ("endpoint", "api_key_env", "concurrency", "timeout_seconds", "retries", "give_up_seconds")),
)
_FRAMES = ("frames", "frame_size", "jpeg_quality")
# Name -> where its class is, and which settings it reads (all read those of the template, which replaces captions that
# are refused). Names instead of classes: a language model needs packages that the template does without.
NARRATORS = {
    "template": ("template:TemplateNarrator", _TEMPLATE),
    "llm": ("llm:LanguageModelNarrator", (*_TEMPLATE, *_MODEL)),
    "vlm": ("llm:LanguageModelNarrator", (*_TEMPLATE, *_MODEL, *_FRAMES)),
}


def make_narrator(settings: NarratorConfig) -> Narrator:
    """The narrator ``settings.kind``, with a warning for every setting that it does not read.

    Raises :class:`UserError` for what is missing: a prompt, a key.
    """
    ignored_settings(settings)
    module, _, name = NARRATORS[settings.kind][0].partition(":")
    narrator: Narrator = getattr(importlib.import_module(f"{__name__}.{module}"), name).from_settings(settings)
    return narrator


def ignored_settings(settings: NarratorConfig) -> list[str]:
    """Warn of settings that differ from their default though the chosen narrator does not read them; their names."""
    default, read = type(settings)(), ("kind", *NARRATORS[settings.kind][1])
    names = [entry.name for entry in dataclasses.fields(settings) if entry.name not in read]
    ignored = [name for name in names if getattr(settings, name) != getattr(default, name)]
    for name in ignored:
        log.warning("narrator.%s is ignored: narrator.kind=%s does not read it", name, settings.kind)
    return ignored


def prompt_path(settings: NarratorConfig) -> Path:
    """The prompt of a language model: ``settings.prompt``, else the project's own."""
    return Path(settings.prompt or PROMPTS / f"{settings.kind}.jinja")


def caption_settings(settings: NarratorConfig) -> dict[str, Any]:
    """The settings that captions depend on, with the text of the prompt instead of its place."""
    names = ["kind", *(name for name in NARRATORS[settings.kind][1] if name not in _ROUTE)]
    values = {name: getattr(settings, name) for name in names}
    if "prompt" in values:
        path = prompt_path(settings)
        # A prompt that is missing, or no text, is reported by the narrator.
        values["prompt"] = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else str(path)
    return values
