"""A second opinion on captions: whether a narration and the facts of a clip entail them, by a model.

The rules of :mod:`egohod.hod.check` compare words. A judge reads sentences: the premise is the narration before and the
facts as sentences, the hypothesis is the caption. It is either a chat server (``check.judge=endpoint``) or a
sequence-classification model for natural-language inference in a local folder (``cross_encoder``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from egohod.errors import UserError
from egohod.hod.check import Opinion, Verdict, combine, may_ask
from egohod.hod.config import CheckConfig, HodConfig, NarratorConfig
from egohod.hod.facts import ClipFacts
from egohod.hod.narrators import PROMPTS, describe
from egohod.runtime import content_hash, file_hash

log = logging.getLogger(__name__)

_LABELS = ("contradiction", "entailment", "neutral")
# Captions for the cross-encoder at a time, and tokens of each pair where the model names no limit of its own.
_BATCH, _TOKENS = 32, 512
_WEARER = re.compile(r"^#?\s*c(?: c)?\b\s*", re.IGNORECASE)


class Judge(Protocol):
    """Judges captions."""

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Opinion]]:
        """An opinion on each (premise, hypothesis), with its number, in any order.

        Raises :class:`UserError`, after those that there are, when no more can be had.
        """
        ...


def premise_of(source: str, facts: ClipFacts | None) -> str:
    """What is known of a clip, as sentences."""
    sentences = [_as_sentence(source)] if source.strip() else []
    for line in describe(facts, distances=True) if facts is not None else ():
        who, colon, what = line.partition(": ")
        if colon:
            what = what.replace("not visible, do not mention it", "is not visible").replace(";", ",")
            line = f"the {who} {what}"
        sentences.append(f"{line[:1].upper()}{line[1:]}.")
    return " ".join(sentences)


def _as_sentence(text: str) -> str:
    """A narration without its mark of the wearer, for models that know none."""
    text = _WEARER.sub("The camera wearer ", " ".join(text.split())).rstrip(" .")
    return f"{text[:1].upper()}{text[1:]}."


class Judging:
    """Rules and judge together, for :func:`egohod.hod.narrators.check_narrations`.

    A judge that fails loses no clip: the rules decide alone, a warning says so once, and the clips count as fallbacks,
    which ``--retry`` judges again.
    """

    def __init__(self, judge: Judge, name: str, mode: str) -> None:
        self._judge, self._name, self._mode = judge, name, mode
        self._problem: str | None = None

    def decide(
        self, items: Sequence[tuple[str, ClipFacts | None, str, Verdict]]
    ) -> Iterator[tuple[int, Verdict, Opinion]]:
        """(number, verdict, opinion) of each (source, facts, caption, verdict of the rules), in any order."""
        missing = set(range(len(items)))
        try:
            if self._problem is None:
                pairs = [(premise_of(source, facts), _as_sentence(caption)) for source, facts, caption, _ in items]
                for number, opinion in self._judge.judge(pairs):
                    missing.remove(number)
                    yield number, *combine(items[number][3], opinion, self._mode)
        except UserError as error:
            # Once: a server that is down would be waited for in each group of clips.
            self._problem = str(error)
            log.warning("the judge fails, the rules of the check decide alone (--retry asks it again): %s", error)
        for number in sorted(missing):
            yield number, items[number][3], Opinion(self._name, None, reason=self._problem or "no answer")

    def asks(self, verdict: Verdict) -> bool:
        """Whether the judge is asked about a caption with this verdict of the rules."""
        return may_ask(verdict, self._mode)


def make_judging(cfg: HodConfig) -> Judging | None:
    """The judge of the settings; None without one. Raises :class:`UserError` for what is missing."""
    name = judge_name(cfg)
    if cfg.check.judge == "none":
        return None
    judge = CrossEncoder(cfg.check, name) if cfg.check.judge == "cross_encoder" else ChatJudge(cfg, name)
    return Judging(judge, name, cfg.check.judge_mode)


def judge_name(cfg: HodConfig) -> str:
    """The judge in messages."""
    settings = cfg.check
    model = Path(settings.judge_folder or "").name if settings.judge == "cross_encoder" else _chat_settings(cfg).model
    return f"{settings.judge} {model}".strip()


def judge_settings(cfg: HodConfig) -> dict[str, Any]:
    """What verdicts depend on: nothing without a judge, so that its settings then change no key."""
    settings = cfg.check
    if settings.judge == "none":
        return {}
    common = {"judge": settings.judge, "mode": settings.judge_mode}
    if settings.judge == "cross_encoder":
        folder = model_folder(settings)
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("tokenizer*"))]
        return {**common, "threshold": settings.judge_threshold, "files": content_hash(*map(file_hash, files))}
    prompt = prompt_path(settings)
    text = prompt.read_text(encoding="utf-8-sig", errors="replace") if prompt.is_file() else str(prompt)
    return {**common, "model": _chat_settings(cfg).model, "prompt": text}


# --- A chat server ---

_SCHEMA = {
    "type": "object",
    "properties": {"entailed": {"type": "boolean"}, "reason": {"type": "string"}},
    "required": ["entailed", "reason"],
    "additionalProperties": False,
}


_ANSWER = re.compile(r'\{\s*"(?:entailed|reason)"\s*:')
_MAX_CANDIDATES = 8  # each costs a parse of the rest of the text: thousands of braces would take minutes
_LONGEST_REASON = 200


def prompt_path(settings: CheckConfig) -> Path:
    """The judge's prompt: ``judge_prompt``, else the project's own."""
    return Path(settings.judge_prompt or PROMPTS / "judge.jinja")


def _chat_settings(cfg: HodConfig) -> NarratorConfig:
    """The narrator's settings, with the judge's address, key and model where it has its own."""
    settings = cfg.check
    if not settings.judge_endpoint:
        return replace(cfg.narrator, model=settings.judge_model or cfg.narrator.model)
    # Another server must not get the narrator's key.
    return replace(
        cfg.narrator,
        endpoint=settings.judge_endpoint,
        api_key_env=settings.judge_api_key_env,
        model=settings.judge_model,
    )


class ChatJudge:
    """Asks an OpenAI-compatible server, one caption a request, as many at a time as the narrator's ``concurrency``."""

    def __init__(self, cfg: HodConfig, name: str) -> None:
        # Its client needs packages that the rules do without.
        from egohod.hod.narrators.llm import Endpoint, read_prompt, render_prompt, response_format, without_reasoning

        self._name, self._settings = name, _chat_settings(cfg)
        self._has_own_endpoint = bool(cfg.check.judge_endpoint)
        with self._own_settings_in_errors():
            self._endpoint = Endpoint(self._settings)
        prompt = read_prompt(prompt_path(cfg.check), ("instructions", "request"))
        self._instructions = render_prompt(prompt, "instructions", {})
        self._request = lambda clip: render_prompt(prompt, "request", {"clips": [clip]})
        self._format = response_format(self._settings.answer_format, "verdict", _SCHEMA)
        self._without_reasoning = without_reasoning

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Opinion]]:
        """See :class:`Judge`."""
        with self._own_settings_in_errors():
            for number, answer in self._endpoint.ask_all(map(self._body, pairs)):
                yield number, self._opinion(answer.text, answer.problem)

    @contextlib.contextmanager
    def _own_settings_in_errors(self) -> Iterator[None]:
        """The client names the narrator's settings."""
        try:
            yield
        except UserError as error:
            if not self._has_own_endpoint:
                raise
            own = str(error).replace("model and api_key_env", "check.judge_model and check.judge_api_key_env")
            raise UserError(own.replace("narrator.", "check.judge_")) from error

    def _body(self, pair: tuple[str, str]) -> dict[str, Any]:
        clip = {"premise": pair[0], "caption": pair[1]}
        body: dict[str, Any] = {
            "messages": [
                {"role": "system", "content": self._instructions},
                {"role": "user", "content": self._request(clip)},
            ],
            "temperature": 0.0,
            "max_tokens": self._settings.max_tokens,
            "seed": self._settings.seed,
            **self._format,
        }
        if self._settings.model:
            body["model"] = self._settings.model
        return body

    def _opinion(self, text: str | None, problem: str | None) -> Opinion:
        if text is None:
            return Opinion(self._name, None, reason=problem or "no answer")
        # The last one: before it a model may quote the request, draft and talk in braces.
        for match in reversed(list(_ANSWER.finditer(self._without_reasoning(text)))[-_MAX_CANDIDATES:]):
            try:
                value, _ = json.JSONDecoder().raw_decode(match.string, match.start())
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict) and isinstance(value.get("entailed"), bool):
                # Without a reason the verdict is as good.
                reason = value["reason"] if isinstance(value.get("reason"), str) else ""
                return Opinion(self._name, value["entailed"], reason=" ".join(reason.split())[:_LONGEST_REASON])
        return Opinion(self._name, None, reason='schema: no {"entailed": true or false, "reason": "..."} in the answer')


# --- A cross-encoder ---


def model_folder(settings: CheckConfig) -> Path:
    """The folder of the cross-encoder. Raises :class:`UserError` if it holds no model that can be used safely."""
    folder = Path(settings.judge_folder or "")
    where = f"check.judge_folder={settings.judge_folder or 'null'}"
    if not settings.judge_folder or not (folder / "config.json").is_file():
        raise UserError(f"{where}: must be a folder with config.json, as transformers' save_pretrained writes it")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{where}: has no *.safetensors; pickled weights (*.bin) may run code and are not read")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        labels = sorted(str(label).lower() for label in config.get("id2label", {}).values())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: config.json: {error}") from error
    if "auto_map" in config:
        raise UserError(f"{where}: config.json names code of its own (auto_map), which is not run")
    if labels != sorted(_LABELS):
        raise UserError(
            f"{where}: id2label of config.json names {', '.join(labels) or 'nothing'}; a model for natural-language "
            f"inference has {', '.join(_LABELS)}"
        )
    return folder


class CrossEncoder:
    """A sequence-classification model of transformers from a folder; nothing is downloaded."""

    def __init__(self, settings: CheckConfig, name: str) -> None:
        folder = model_folder(settings)
        for package in ("transformers", "torch"):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"check.judge=cross_encoder needs {package}: pip install {package}")
        self._name, self._threshold, self._folder = name, settings.judge_threshold, folder
        self._model: Any = None

    def _load(self) -> None:
        # When it is first needed: a dry run and the stages before do without.
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self._folder, **options)
            model = AutoModelForSequenceClassification.from_pretrained(self._folder, use_safetensors=True, **options)
        except Exception as error:  # whatever transformers and its tokenizers raise for damaged files
            raise UserError(f"check.judge_folder={self._folder}: {' '.join(str(error).split())[:300]}") from error
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().to(self._device)
        self._entailment = next(i for i, label in model.config.id2label.items() if label.lower() == "entailment")
        limits = [getattr(model.config, "max_position_embeddings", _TOKENS), self._tokenizer.model_max_length, _TOKENS]
        self._tokens = min(limit for limit in limits if limit > 0)

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Opinion]]:
        """See :class:`Judge`."""
        import torch

        if self._model is None:
            self._load()
        # Of similar length, so that few are padded much.
        order = sorted(range(len(pairs)), key=lambda number: sum(map(len, pairs[number])))
        for first in range(0, len(order), _BATCH):
            numbers = order[first : first + _BATCH]
            premises, hypotheses = ([pairs[number][i] for number in numbers] for i in (0, 1))
            try:
                # Of premise and caption the longer one is cut off: that is the premise, but for captions that are none.
                tokens = self._tokenizer(
                    premises,
                    hypotheses,
                    padding=True,
                    truncation="longest_first",
                    max_length=self._tokens,
                    return_tensors="pt",
                ).to(self._device)
                with torch.inference_mode():
                    # In float32, whatever the model computes in.
                    logits = self._model(**tokens).logits.float()
                shares = logits.softmax(-1)[:, self._entailment].tolist()
            except (RuntimeError, IndexError, ValueError) as error:  # memory, or a tokenizer of another model
                raise UserError(f"check.judge_folder={self._folder}: {' '.join(str(error).split())[:300]}") from error
            for number, share in zip(numbers, shares, strict=True):
                if math.isfinite(share):
                    yield number, Opinion(self._name, share >= self._threshold, share)
                else:
                    yield number, Opinion(self._name, None, reason="the probability is not a number")
