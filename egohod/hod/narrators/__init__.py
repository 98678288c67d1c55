"""Narrators: facts of a clip in, a sentence out. The registry; what a narrator is: ``base.py``."""

from __future__ import annotations

from pathlib import Path

from egohod.hod.config import NarratorSettings, warn_of_unused
from egohod.hod.narrators.base import Narrator
from egohod.hod.narrators.template import TemplateNarrator


def make_narrator(settings: NarratorSettings, prompts: Path) -> Narrator:
    """The narrator ``settings.kind``; ``prompts`` is the folder of the prompts ``<kind>.jinja`` that are the default.

    Warns of settings that it ignores. Raises :class:`UserError` for settings that it cannot be used with.
    """
    warn_of_unused(settings)
    if settings.kind == "template":
        return make_template(settings)
    # Here: the template needs no HTTP, prompts or schemas.
    from egohod.hod.narrators.llm import LanguageModelNarrator

    return LanguageModelNarrator(settings, Path(settings.prompt or prompts / f"{settings.kind}.jinja"))


def make_template(settings: NarratorSettings) -> TemplateNarrator:
    """The template narrator; it also replaces the captions of others that are refused."""
    return TemplateNarrator(settings.seed, settings.varied)
