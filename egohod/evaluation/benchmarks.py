"""Benchmarks: thin readers that turn annotation files into evaluation tables.

``Benchmark`` is the one place where features are computed; a reader only opens files and fills tables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from egohod.config import Config, SourceConfig, UserError
from egohod.data.clips import ClipDataset
from egohod.data.table import ClipTable
from egohod.data.text import Tokenizer
from egohod.distributed import Distributed, pick_precision
from egohod.evaluation.classification import ClassificationTable
from egohod.evaluation.embed import PLAIN, VideoTextModel, embed_clips, embed_texts
from egohod.evaluation.multiple_choice import Question, QuestionTable
from egohod.evaluation.retrieval import RetrievalTable
from egohod.evaluation.tables import EvaluationTable, with_controls
from egohod.model.zoo import geometry

# What the kinds of questions of the demo world are called in results.
DEMO_KINDS = {
    "across_clips": "choice_across_clips",
    "state_changing": "motion_state_changing",
    "transient": "motion_transient",
}
DEMO_CHUNK_SECONDS = 15.0


class BenchmarkError(UserError):
    """Annotations that do not make a benchmark."""


@dataclass(frozen=True)
class Execution:
    """How features are computed: clips at a time, decoding processes, this process, autocast type."""

    batch_size: int
    workers: int
    dist: Distributed
    precision: torch.dtype = torch.float32


class Benchmark:
    """Evaluation tables over the clips of one dataset; clips and distinct texts are encoded once for all tables."""

    def __init__(
        self,
        name: str,
        dataset: ClipDataset,
        tables: Sequence[EvaluationTable],
        *,
        tokenizer: Tokenizer,
        execution: Execution,
        controls: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.dataset = dataset
        self.tables = tables
        self.tokenizer = tokenizer
        self.execution = execution
        self.controls = controls

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Metrics of all tables for a :class:`VideoTextModel`: in percent, ranks counted from 1.

        Those under a temporal control are called ``<control>/<metric>``, and what it took away
        ``<control>/<metric>_drop``.
        Collective over all processes of the run; what the training loop calls an evaluator.
        Raises :class:`UserError` when a clip cannot be read or features are not finite.
        """
        assert isinstance(model, VideoTextModel), f"{type(model).__name__} has no encode_video and encode_text"
        run = self.execution
        video = embed_clips(
            model,
            self.dataset,
            batch_size=run.batch_size,
            workers=run.workers,
            dist=run.dist,
            precision=run.precision,
            controls=self.controls,
        )
        texts = [text for table in self.tables for text in table.texts]
        features = embed_texts(
            model, texts, self.tokenizer, batch_size=run.batch_size, dist=run.dist, precision=run.precision
        )
        by_table = features.split([len(table.texts) for table in self.tables])
        results = {name: self._evaluate(clips, by_table) for name, clips in video.items()}
        return with_controls(results.pop(PLAIN), results)

    def _evaluate(self, video: Tensor, texts: Sequence[Tensor]) -> dict[str, float]:
        """Metrics of all tables, of which each has its own features of texts."""
        results: dict[str, float] = {}
        for table, text in zip(self.tables, texts, strict=True):
            scores = table.evaluate(video, text)
            assert not results.keys() & scores.keys(), "two tables of a benchmark use one metric name"
            results |= scores
        return results


class DemoBenchmark(Benchmark):
    """A world of the demo: retrieval, zero-shot verb-noun, 5-way choice across clips, and motion pairs.

    ``folder`` is one split (``hod.csv``, ``classes.csv``, ``questions.jsonl``, ``videos/``); ``size`` in pixels and
    ``num_frames`` are those of the model. Everything but the clips is read here, so mistakes surface before training.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        *,
        size: int,
        num_frames: int,
        tokenizer: Tokenizer,
        decoder: str,
        execution: Execution,
        controls: Sequence[str] = (),
    ) -> None:
        folder = Path(folder)
        for part in ("hod.csv", "classes.csv", "questions.jsonl", "videos"):
            if not (folder / part).exists():
                raise BenchmarkError(f"{folder}: no {part} there; expected the val or test folder of a demo world")
        source = SourceConfig(
            metadata=str(folder / "hod.csv"),
            root=str(folder / "videos"),
            layout="chunks",
            chunk_seconds=DEMO_CHUNK_SECONDS,
            list_text="first",
        )
        clips = ClipTable.read(source, strict=True)
        dataset = ClipDataset(
            [(clips, source)],
            size=size,
            num_frames=num_frames,
            tokenizer=tokenizer,
            decoder=decoder,
        )
        uids = [str(uid) for uid in clips.column("uid")]
        tables: list[EvaluationTable] = [
            demo_retrieval(clips),
            demo_classification(clips, folder / "classes.csv"),
            read_questions(folder / "questions.jsonl", uids),
        ]
        super().__init__(name, dataset, tables, tokenizer=tokenizer, execution=execution, controls=controls)


def demo_evaluator(
    cfg: Config, dist: Distributed, folder: str | Path, name: str, controls: Sequence[str] = ()
) -> DemoBenchmark:
    """The demo world in ``folder``, evaluated as the run ``cfg`` describes the model, the decoder and the batches."""
    return DemoBenchmark(
        folder,
        name,
        size=geometry(cfg.model.name).image_size,
        num_frames=cfg.model.num_frames,
        tokenizer=Tokenizer(),
        decoder=cfg.data.decoder,
        execution=Execution(
            batch_size=cfg.evaluate.batch_size,
            workers=cfg.data.workers,
            dist=dist,
            precision=pick_precision(cfg.train.precision, dist.device),
        ),
        controls=controls,
    )


def demo_evaluators(cfg: Config, dist: Distributed, *names: str, controls: Sequence[str] = ()) -> list[DemoBenchmark]:
    """The worlds that ``cfg.evaluate`` names, of those in ``names`` (val, test)."""
    folders = {"val": cfg.evaluate.demo_val, "test": cfg.evaluate.demo_test}
    return [demo_evaluator(cfg, dist, folder, name, controls) for name in names if (folder := folders[name])]


def demo_retrieval(clips: ClipTable) -> RetrievalTable:
    """Clips against distinct hand-object narrations; relevant (1) is every narration of the same action."""
    texts, text_of_clip = np.unique([clips.row(i).texts[0] for i in range(len(clips))], return_inverse=True)
    _, action = np.unique(clips.column("action").astype(str), return_inverse=True)
    # Narrations name hands and places too, so each belongs to one action; the first clip that has it tells which.
    first = np.unique(text_of_clip, return_index=True)[1]
    relevancy = (action[:, None] == action[first]).astype(np.float32)
    return RetrievalTable(texts.tolist(), text_of_clip, relevancy)


def demo_classification(clips: ClipTable, path: Path) -> ClassificationTable:
    """All verb-noun classes of the world generator, one prompt each, marginalised to verbs and nouns.

    Raises :class:`BenchmarkError` naming the file when a column is missing or a clip has an unlisted action.
    """
    classes = pd.read_csv(path, dtype=str)
    missing = {"action", "verb", "noun", "text"} - set(classes.columns)
    if missing:
        raise BenchmarkError(f"{path}: column '{min(missing)}' is missing; it has {', '.join(classes.columns)}")
    code = {action: number for number, action in enumerate(classes["action"])}
    actions = clips.column("action").astype(str)
    unlisted = [action for action in actions if action not in code]
    if unlisted:
        raise BenchmarkError(f"{path}: no class '{unlisted[0]}', but a clip of hod.csv has this action")
    parts = {part: np.unique(classes[part], return_inverse=True)[1] for part in ("verb", "noun")}
    labels = np.array([code[action] for action in actions], dtype=np.int64)
    return ClassificationTable("verb_noun", classes["text"].tolist(), np.arange(len(classes)), labels, parts)


def read_questions(path: Path, uids: Sequence[str]) -> QuestionTable:
    """Multiple-choice questions of a demo world, one JSON object a line; clips are named by their uid.

    Raises :class:`BenchmarkError` naming file, line and field.
    """
    rows = {uid: row for row, uid in enumerate(uids)}
    texts: dict[str, int] = {}

    def place(item: Any, where: str) -> tuple[bool, int]:
        """Whether it is a clip, and its row among the clips or the texts."""
        if not isinstance(item, dict) or set(item) not in ({"clip"}, {"text"}):
            raise BenchmarkError(f'{where} must be {{"clip": uid}} or {{"text": "..."}}, not {json.dumps(item)}')
        if "text" in item:
            return False, texts.setdefault(str(item["text"]), len(texts))
        if str(item["clip"]) not in rows:
            raise BenchmarkError(f"{where} is clip '{item['clip']}', which hod.csv does not have")
        return True, rows[str(item["clip"])]

    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}: line {number}"
        try:
            entry = json.loads(line)
            kind, query, choices, answer = (entry[key] for key in ("kind", "query", "choices", "answer"))
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(f"{where}: not a question with kind, query, choices and answer ({error})") from error
        if kind not in DEMO_KINDS:
            raise BenchmarkError(f"{where}: kind is '{kind}', but must be one of {', '.join(DEMO_KINDS)}")
        if not isinstance(choices, list) or len(choices) < 2:
            raise BenchmarkError(f"{where}: choices must be a list of at least two")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise BenchmarkError(f"{where}: answer is {answer!r}, but there are {len(choices)} choices, counted from 0")
        query_is_clip, row = place(query, f"{where}: query")
        placed = [place(choice, f"{where}: choice {i}") for i, choice in enumerate(choices)]
        if any(is_clip == query_is_clip for is_clip, _ in placed):
            raise BenchmarkError(f"{where}: a clip asks for texts and a text for clips, never for its own kind")
        questions.append(Question(DEMO_KINDS[kind], query_is_clip, row, tuple(row for _, row in placed), answer))
    if not questions:
        raise BenchmarkError(f"{path}: not a single question")
    return QuestionTable(list(texts), questions)
