"""From the name of a benchmark to its numbers, in the order of this module.

``resolve_benchmarks`` and ``named_evaluators`` choose, ``benchmark`` reads all annotations, and ``Benchmark.measure``
computes features (embed.py) and scores (tasks.py). Then results.py writes the numbers, and report.py the page.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from egohod.config import Config
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, EvalProtocol, require_all, tokenizer_for
from egohod.data.formats import BENCHMARKS
from egohod.data.formats.base import (
    BenchmarkData,
    BenchmarkOptions,
    ClassificationData,
    GroundingData,
    MultiLabelData,
    QuestionData,
    RetrievalData,
)
from egohod.data.labels import ClassSpace
from egohod.data.loader import EvalLoader, worker_count
from egohod.data.storage import open_cache
from egohod.data.table import swap_sides
from egohod.distributed import Distributed, pick_precision
from egohod.errors import UserError, nearest
from egohod.evaluation.adapters import StoredFeatures
from egohod.evaluation.cards import CARDS
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.embed import (
    MIRRORED,
    PLAIN,
    ClassProbabilities,
    EmbedReport,
    Execution,
    TokenizerLike,
    VideoTextModel,
    WithTokens,
    embed_clips,
    embed_texts,
    fingerprint,
    gather_or_raise,
    image_stats_of,
    rerank,
)
from egohod.evaluation.features import FeatureCache
from egohod.evaluation.grounding import GroundingTask
from egohod.evaluation.metrics import CHANCE, DROP, Score
from egohod.evaluation.tasks import (
    ClassificationTask,
    EvaluationTask,
    Features,
    Members,
    MultiLabelTask,
    MultipleChoiceTask,
    RetrievalTask,
    head_tasks,
    similarity,
)
from egohod.model.config import IMAGE_STATS
from egohod.model.dual_encoder import DualEncoder
from egohod.model.reranker import Reranker

log = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------------
# Protocols: which frames a model sees, how they are resized, and which prompts stand for a class. A published number is
# reproduced by the protocol of its family and no other: docs/evaluation.md has the table.
# --------------------------------------------------------------------------------------------------

# Upstream EgoHOD's programs, with OpenCLIP's resizing and statistics.
_UPSTREAM: dict[str, Any] = {"resize": "bicubic", "image_stats": "clip", "prompts": "train+val"}
# AVION and LaViLa resize with torchvision's default, bilinear, which is not antialiased in their versions (0.14, 0.11).
_LAVILA: dict[str, Any] = {"resize": "bilinear", "image_stats": "avion", "prompts": "train+val"}

PROTOCOLS = {
    each.name: each
    for each in (
        EvalProtocol("as_trained", "this project: frames as in training, one centre crop"),
        EvalProtocol("clean", "this project: 16 frames, one centre crop; class prompts from training narrations only"),
        EvalProtocol("squash", "this project: as clean, the whole picture as a square (SigLIP, PE)", resize="squash"),
        EvalProtocol("whole_clip", "this project on EGTEA: as clean, floored midpoints", sampling="midpoints"),
        EvalProtocol("upstream", "upstream EgoHOD", sampling="upstream", **_UPSTREAM),
        EvalProtocol(
            "upstream_4", "upstream EgoHOD's base config: 4 frames", frames=4, sampling="upstream", **_UPSTREAM
        ),
        EvalProtocol("upstream_egtea", "upstream EgoHOD on EGTEA", sampling="midpoints", **_UPSTREAM),
        EvalProtocol("avion", "AVION", sampling="avion", **_LAVILA),
        EvalProtocol("lavila", "LaViLa", sampling="lavila", **_LAVILA),
        EvalProtocol(
            "lavila_10x3", "LaViLa on EGTEA: 10 clips of 16 frames 2 apart x 3 crops",
            sampling="windows", windows=10, stride=2, crops=3, merge="max", **_LAVILA,
        ),
    )
}  # fmt: skip

# EGTEA's clips are files of their own, which published code samples differently from moments of long videos.
_ON_EGTEA = {"upstream": "upstream_egtea", "upstream_4": "upstream_egtea", "lavila": "lavila_10x3"}


def protocol_for(name: str, kind: str) -> EvalProtocol:
    """The protocol called ``name`` for benchmarks of a kind (``egtea``, ...); ``auto`` is this project's own."""
    if name == "auto":
        name = "whole_clip" if kind == "egtea" else "clean"
    chosen = PROTOCOLS[name]
    # The name of a project means what that project does on this benchmark.
    if kind == "egtea" and name in _ON_EGTEA:
        return dataclasses.replace(PROTOCOLS[_ON_EGTEA[name]], frames=chosen.frames)
    return chosen


# --------------------------------------------------------------------------------------------------
# From the configuration to benchmarks
# --------------------------------------------------------------------------------------------------


def resolve_benchmarks(
    cfg: Config, name: str, root: str | None = None, metadata: str | None = None
) -> dict[str, BenchmarkConfig]:
    """The benchmarks of ``--benchmark name``, with ``--root`` and ``--metadata`` filled in.

    Several names are separated by commas. ``all`` are those of the configuration whose annotations exist; the others
    are logged. Raises :class:`UserError`, also where one of ``evaluate.during`` or ``evaluate.final`` is among the
    others.
    """
    configured = dict(cfg.evaluate.benchmarks)
    if name == "own" and name not in configured:
        log.warning("--benchmark own is now called custom; the old name is read for one more release")
        name = "custom"
    if (root or metadata) and (name == "all" or "," in name):
        raise UserError("--root and --metadata belong to one benchmark; for several use evaluate.benchmarks")
    if "," in name:
        several = [resolve_benchmarks(cfg, part.strip()) for part in name.split(",")]
        return {key: each for benchmarks in several for key, each in benchmarks.items()}
    if name == "all":
        # Nobody has all data sets, and the configuration names all. Those of its two lists are required.
        existing = {key: each for key, each in configured.items() if each.metadata and Path(each.metadata).exists()}
        listed, problems = {*cfg.evaluate.during, *cfg.evaluate.final}, []
        for key, each in configured.items():
            if key in existing:
                continue
            reason = (
                f"{each.metadata} does not exist" if each.metadata else f"evaluate.benchmarks.{key}.metadata is not set"
            )
            if key in listed:
                problems.append(
                    f"benchmark {key} of evaluate.during or evaluate.final: {reason}; correct it, or the list"
                )
            else:
                log.info("benchmark %s is left out: %s", key, reason)
        if problems:
            raise UserError(*problems)
        if not existing:
            raise UserError("no benchmark's data is found: set metadata and root in evaluate.benchmarks")
        return existing
    built = [card.name for card in CARDS.values() if card.builder]
    if name not in configured and name not in BENCHMARKS and name not in built:
        # Without the two general formats: they are the kind of a benchmark that has a name of its own.
        names = dict.fromkeys([*configured, *(key for key in BENCHMARKS if key not in ("custom", "labels")), *built])
        raise UserError(f"--benchmark {name}: no such benchmark; choose all, {', '.join(names)}")
    config = configured.get(name, BenchmarkConfig())
    return {name: dataclasses.replace(config, root=root or config.root, metadata=metadata or config.metadata)}


def named_evaluators(
    cfg: Config, dist: Distributed, part: str, controls: Sequence[str] = (), classes: ClassSpace | None = None
) -> list[Benchmark]:
    """The benchmarks of a part: ``val``, measured while training, or ``test``, measured once at its end.

    They are those of ``evaluate.during`` and ``evaluate.final``; with ``classes`` they measure a model's heads. Raises
    :class:`UserError` as :func:`benchmark`, and for a benchmark that is not about clips.
    """
    if cfg.evaluate.rerank.path:
        log.warning("evaluate.rerank does nothing here: a reranker belongs to one checkpoint, see main_eval.py")
    key = {"val": "during", "test": "final"}[part]
    names, execution = getattr(cfg.evaluate, key), execution_of(cfg, dist)
    for name in names:
        # It trains policies for minutes to hours, which belongs behind a run and not into it.
        if _builder(name, cfg.evaluate.benchmarks[name]):
            raise UserError(
                f"evaluate.{key}: {name} is simulated, which a training run does not do; measure the checkpoint by "
                f"egohod eval --checkpoint {cfg.train.output} --benchmark {name}, or by tools/robot.py (docs/robot.md)"
            )
    options: dict[str, Any] = {"controls": controls, "classes": classes}
    return [benchmark(cfg, name, cfg.evaluate.benchmarks[name], execution, **options) for name in names]


def execution_of(cfg: Config, dist: Distributed, loader: EvalLoader | None = None) -> Execution:
    """How the run ``cfg`` computes features, without a cache; with the decoding processes of ``loader`` or its own."""
    return Execution(
        batch_size=cfg.evaluate.batch_size,
        workers=worker_count(cfg.data.workers, dist),
        timeout=cfg.data.timeout,
        # Page-locked memory, from which copies to the GPU overlap with computing.
        pin_memory=cfg.data.pin_memory and dist.device.type == "cuda",
        dist=dist,
        precision=pick_precision(cfg.evaluate.precision, dist.device),
        loader=loader or EvalLoader(),
    )


def measured(cfg: Config, name: str, config: BenchmarkConfig, execution: Execution, **options: Any) -> Measured:
    """The benchmark ``name``: of clips by :func:`benchmark`, else by the function that its card names.

    Parameters and errors as of :func:`benchmark`.
    """
    build: Any = benchmark
    if builder := _builder(name, config):
        _refuse_averages(cfg, name)
        # Imported now, as what it needs may be an optional extra.
        module, _, function = builder.partition(":")
        build = getattr(importlib.import_module(module), function)
    return build(cfg, name, config, execution, **options)


def _builder(name: str, config: BenchmarkConfig) -> str:
    """The function that makes a benchmark that is not about clips; empty for one of clips."""
    card = CARDS.get(name if config.kind == "auto" else config.kind)
    return card.builder if card is not None else ""


def _refuse_averages(cfg: Config, name: str) -> None:
    """Raises :class:`UserError` where similarities shall be averaged, for a benchmark that has none."""
    for key in ("ensemble", "flip"):
        if getattr(cfg.evaluate, key):
            raise UserError(
                f"benchmark {name}: evaluate.{key} averages similarities, but this benchmark trains on the features "
                f"of one model; evaluate it without evaluate.{key}, or name the others by --benchmark"
            )


def benchmark(
    cfg: Config,
    name: str,
    config: BenchmarkConfig,
    execution: Execution,
    *,
    size: int | None = None,
    tokenizer: TokenizerLike | None = None,
    controls: Sequence[str] = (),
    classes: ClassSpace | None = None,
    need_videos: bool = True,
    reranker: Reranker | None = None,
) -> Benchmark:
    """Build the benchmark that ``config`` describes, at the resolution (pixels) and with the tokenizer of a model.

    With ``classes`` it measures a model's heads instead of its texts, with ``reranker`` retrieval in two stages
    (``evaluate.rerank``), and without ``need_videos`` features that are stored already. All annotations are read here,
    so that mistakes surface before anything is computed. Raises :class:`UserError`.
    """
    kind = config.kind
    if kind == "auto":
        kind = name if name in BENCHMARKS else "custom"
    elif kind not in BENCHMARKS:
        near = nearest(kind, ["auto", *BENCHMARKS])
        raise UserError(f"evaluate.benchmarks.{name}.kind: no benchmark format '{kind}'{near}")
    key, chosen = f"evaluate.benchmarks.{name}.protocol", config.protocol
    if chosen == "auto":
        key, chosen = "evaluate.protocol", cfg.evaluate.protocol
    protocol = protocol_for(chosen, kind)
    if protocol.whole_files and not BENCHMARKS[kind].whole_files:
        raise UserError(f"{key}={chosen} is for clips that are files of their own, which {name} does not have")
    # An explicit number of frames wins over the protocol's, which is the one that reproduces a published result.
    trained = cfg.model.num_frames if chosen == "as_trained" else protocol.frames
    protocol = dataclasses.replace(protocol, frames=cfg.evaluate.num_frames or trained)
    if classes is not None:
        # The maximum is for similarities: LaViLa, too, averages the views of a fine-tuned model.
        protocol = dataclasses.replace(protocol, merge="mean")
    if not config.metadata or (need_videos and not config.root):
        unset = "metadata" if not config.metadata else "root"
        raise UserError(
            f"benchmark {name}: evaluate.benchmarks.{name}.{unset} is not set; give --{unset}, or set it in the "
            "configuration"
        )
    # Parsed relevancies and the like are cached beside the features.
    cache = Path(cfg.evaluate.cache) if cfg.evaluate.cache else None
    source, data = read_benchmark(kind, config, protocol.prompts, cache)
    # No file is opened where features are stored.
    source.root = source.root or "."
    tasks = tasks_of(data)
    if classes is not None:
        tasks = head_tasks(tasks, classes, f"benchmark {name}")
    if any(isinstance(task, GroundingTask) for task in tasks):
        _refuse_averages(cfg, name)
    temperature = cfg.evaluate.dual_softmax
    tasks = [
        dataclasses.replace(task, temperature=temperature) if isinstance(task, RetrievalTask) else task
        for task in tasks
    ]
    metrics = [metric for task in tasks for metric in {*task.metric_names}]
    if twice := {metric for metric in metrics if metrics.count(metric) > 1}:
        raise UserError(
            f"benchmark {name}: two of its tasks have a metric called '{min(twice)}'; rename kinds of questions "
            f"by evaluate.benchmarks.{name}.metric_names"
        )
    dataset = ClipDataset(
        [(data.clips, source)],
        protocol=protocol,
        size=size or cfg.model.geometry().image_size,
        decoder=cfg.data.decoder,
        cache=open_cache(cfg.data.cache, cfg.data.cache_gb),
        frame_cache=cfg.data.frame_cache,
        read_ahead=cfg.data.read_ahead,
    )
    if execution.loader is not None and need_videos:
        execution.loader.add(dataset)
    return Benchmark(
        name,
        dataset,
        tasks,
        tokenizer=tokenizer or tokenizer_for(cfg.model),
        execution=execution,
        controls=controls,
        notes=data.notes,
        classes=classes,
        flip=cfg.evaluate.flip,
        combine="raw" if classes else cfg.evaluate.combine,
        reranker=reranker if any(isinstance(task, RetrievalTask) for task in tasks) else None,
        top_k=cfg.evaluate.rerank.top_k,
    )


def read_benchmark(
    kind: str, config: BenchmarkConfig, prompts: str = "train", cache: Path | None = None
) -> tuple[SourceConfig, BenchmarkData]:
    """Where the videos of a benchmark are, and the content of its annotation files. Raises :class:`UserError`."""
    format = BENCHMARKS[kind]
    # A benchmark's videos are a source like those of training: one reader for both.
    source = SourceConfig(
        metadata=config.metadata or "",
        root=config.root or "",
        columns=config.columns,
        layout="whole" if format.whole_files else config.layout,
        chunk_seconds=config.chunk_seconds,
        min_clip_seconds=config.min_clip_seconds,
    )
    return source, format.read(
        source, BenchmarkOptions(prompts, config.test_split, cache, config.metric_names, config.window_seconds)
    )


def tasks_of(data: BenchmarkData) -> list[EvaluationTask]:
    """The tasks that the files of a benchmark describe, one class for each kind of data."""
    classes: dict[type, type[Any]] = {
        RetrievalData: RetrievalTask,
        ClassificationData: ClassificationTask,
        MultiLabelData: MultiLabelTask,
        QuestionData: MultipleChoiceTask,
        GroundingData: GroundingTask,
    }
    return [classes[type(task)](**vars(task)) for task in data.tasks]


# --------------------------------------------------------------------------------------------------
# From a benchmark to its numbers
# --------------------------------------------------------------------------------------------------


def missing_clips(dataset: ClipDataset, dist: Distributed) -> dict[int, str]:
    """Clips whose file is not there, as of :meth:`ClipDataset.missing`, looked for by all processes together.

    On remote roots a folder is listed at most once, by one process, and no file is read. Collective. Raises
    :class:`UserError` on every process where one cannot use its storage.
    """

    def share(value: Any, fault: str | None) -> list[Any]:
        gathered = gather_or_raise(dist, (value, [store.findings() for store in dataset.stores]), fault)
        for rank, (_, findings) in enumerate(gathered):
            for store, others in zip(dataset.stores, findings, strict=True):
                if rank != dist.rank:
                    store.learn(others)
        return [each for each, _ in gathered]

    faults, fault = dict[int, str](), None
    if dist.world_size > 1:  # every process would list the root for itself
        for store in dataset.stores if dist.is_main else ():
            store.list_root()
        share(None, None)
    try:
        faults = dataset.missing(dist.rank, dist.world_size)
    except UserError as error:  # raised on all processes, which would wait for this one
        fault = str(error)
    for others in share(faults, fault):
        faults |= others
    return dict(sorted(faults.items()))


@dataclass(frozen=True)
class Reranking:
    """What the second stage of retrieval cost, and the scores without it."""

    top_k: int
    gflop_per_query: float
    seconds: float
    trained: str
    """How its head was trained."""
    first_stage: Mapping[str, Score]


@dataclass(frozen=True)
class BenchmarkResult:
    """Scores by order of frames and metric, details by task, and how the features were computed."""

    scores: Mapping[str, Mapping[str, Score]]
    details: Sequence[Mapping[str, Any]]
    rows: Sequence[int]
    """Indices of the clips that the numbers are about."""
    report: EmbedReport
    features: Sequence[tuple[Features, Features]] = ()
    """Of clips in their own order of frames and of texts, for each task."""
    reranking: Reranking | None = None
    """The second stage, if there was one; ``scores`` are then behind it."""

    def flat(self) -> dict[str, float]:
        """Values by name, each followed by its chance level if it has one.

        Then, under every temporal control, ``<control>/<metric>`` and its loss ``<control>/<metric>_drop``.
        """
        numbers: dict[str, float] = {}
        for name, score in self.scores[PLAIN].items():
            numbers[name] = score.value
            if score.chance is not None:
                numbers[name + CHANCE] = score.chance
        for control in [order for order in self.scores if order != PLAIN]:
            # Chance levels do not depend on the order of frames and are not repeated.
            for name, score in self.scores[control].items():
                numbers[f"{control}/{name}"] = score.value
                if not score.is_rank:  # of ranks less is better: a drop would read the wrong way
                    numbers[f"{control}/{name}{DROP}"] = self.scores[PLAIN][name].value - score.value
        return numbers


@dataclass(frozen=True)
class Embedded:
    """What a model makes of a benchmark: features of the clips ``rows`` that could be read, and of all tasks' texts."""

    rows: NDArray[np.int64]
    video: Mapping[str, Tensor]
    """By order of frames, in the order of ``rows``; with :data:`MIRRORED` behind the name of mirrored clips."""
    texts: Mapping[str, Tensor]
    """Under the same names: of the texts, and of the texts with left and right exchanged."""
    report: EmbedReport
    tokens: Mapping[str, Tensor]
    """By order of frames: those of a clip that a reranker reads, in a row."""


class Measured(Protocol):
    """What main_eval.py, results.py and report.py need of a benchmark: :class:`Benchmark`, or one of another kind.

    One that is not about clips of a dataset, such as a simulation, is a class with these members; the card of its name
    (cards.py) names the function that builds it, whose parameters are those of :func:`benchmark`.
    """

    name: str

    def measure(self, model: Any) -> BenchmarkResult:
        """Scores of a model. Collective over all processes of the run."""

    def about(self) -> dict[str, Any]:
        """For ``results.json``.

        ``protocol``: name, source, frames, size, windows and crops (1 of each); ``heads``: whether they are used;
        ``scoring``: in a few words each, what makes the scores other than a single pass of one model's; ``notes``:
        facts that a report states beside the numbers; ``timing``: what the speed depends on.
        """

    def clips_of(self, rows: Sequence[int]) -> dict[str, Any]:
        """The evaluated clips for ``details/<name>.json``: lists id, video, start, end; and their root."""


@dataclass(eq=False)
class Benchmark:
    """Tasks over the clips of one dataset; clips and distinct texts are encoded once for all tasks."""

    name: str
    dataset: ClipDataset
    tasks: Sequence[EvaluationTask]
    tokenizer: TokenizerLike
    execution: Execution
    controls: Sequence[str] = ()
    notes: Sequence[str] = ()
    """Facts about the numbers that a report must not hide."""
    classes: ClassSpace | None = None
    """Those of a model's classification heads, which are then measured instead of its texts."""
    flip: bool = False
    """Whether similarities of mirrored clips are averaged in."""
    combine: str = "raw"
    members: Sequence[tuple[Benchmark, nn.Module]] = ()
    """Further models of an ensemble, each with this benchmark as that model needs it; ``combine`` is as of
    :class:`~egohod.evaluation.tasks.Members`."""
    reranker: Reranker | None = None
    """Orders the first ``top_k`` candidates of retrieval anew."""
    top_k: int = 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Numbers as of :meth:`BenchmarkResult.flat`, percent or ranks from 1: what a training loop calls."""
        return self.measure(model).flat()

    def about(self) -> dict[str, Any]:
        """See :class:`Measured`."""
        lengths, scoring = self.dataset.length_note(), self._scoring()
        precision = str(self.execution.precision).removeprefix("torch.")
        return {
            "protocol": dataclasses.asdict(self.dataset.protocol) | {"size": self.dataset.size},
            "heads": self.classes is not None,
            "scoring": list(scoring),
            "notes": [*self.notes, *scoring.values(), *([lengths] if lengths else [])],
            "timing": {"decoder": self.dataset.decoder, "precision": precision},
        }

    def _scoring(self) -> dict[str, str]:
        """What makes the scores other than a single pass of one model's: in a few words, and as a note."""
        result = {}
        if self.members:
            count, how = len(self.members) + 1, {"raw": "", "standardised": "standardised "}[self.combine]
            what = "class probabilities" if self.classes else f"{how}similarities"
            result[f"ensemble of {count}"] = f"ENSEMBLE: the mean of the {what} of {count} models, which results name"
        if self.flip:
            result["flip"] = "FLIP: averaged with mirrored clips, for which texts have left and right exchanged"
        temperatures = {task.temperature for task in self.tasks if isinstance(task, RetrievalTask)} - {None}
        if temperatures:
            result["dual softmax"] = (
                f"DUAL SOFTMAX (temperature {temperatures.pop():g}): retrieval scores know all clips and texts of the "
                "test set at once; not comparable with numbers without it"
            )
        return result

    def clips_of(self, rows: Sequence[int]) -> dict[str, Any]:
        """The clips ``rows``, in ``details/<name>.json``, and where their videos are."""
        clips, config = self.dataset.clips, self.dataset.config
        ids, videos = clips.ids, clips.videos  # once: each is a column that is made from a packed table
        return {
            "root": config.root,
            "layout": config.layout,
            "chunk_seconds": config.chunk_seconds,
            "min_clip_seconds": config.min_clip_seconds,
            "id": [ids[i] for i in rows],
            "video": [videos[i] for i in rows],
            "start": [float(clips.start[i]) for i in rows],
            # JSON has no infinity, the end of a clip that is a whole file.
            "end": [None if clips.end[i] == np.inf else float(clips.end[i]) for i in rows],
        }

    def measure(self, model: nn.Module) -> BenchmarkResult:
        """Scores of all tasks for a :class:`VideoTextModel`. Collective over all processes of the run.

        Raises :class:`UserError` when clips cannot be read (naming all of them) or features are not finite.
        """
        every = [self.embed(model), *(each.embed(member) for each, member in self.members)]
        report, total = every[0].report, len(self.dataset)
        for each in every[1:]:
            report.faults |= each.report.faults
            report.from_cache = min(report.from_cache, each.report.from_cache)
            report.seconds, report.waiting = report.seconds + each.report.seconds, report.waiting + each.report.waiting
        # A clip counts if every member could read it.
        mask = np.isin(np.arange(total), list(report.faults), invert=True)
        if not mask.any():
            require_all(report.faults, total)
        tasks = self.tasks if mask.all() else [task.restricted(mask) for task in self.tasks]
        counts = [len(task.texts) for task in tasks]

        def features_of(each: Embedded, name: str) -> tuple[Tensor, Sequence[Tensor]]:
            clips = each.video[name][torch.from_numpy(mask[each.rows])]
            return clips, each.texts[MIRRORED if name.endswith(MIRRORED) else PLAIN].split(counts)

        scores: dict[str, dict[str, Score]] = {}
        details, features = list[Mapping[str, Any]](), list[tuple[Features, Features]]()
        reranking: Reranking | None = None
        for order in (PLAIN, *self.controls):
            names = (order, order + MIRRORED) if self.flip else (order,)
            models = [[features_of(each, name) for name in names] for each in every]
            scores[order] = {}
            for number, task in enumerate(tasks):
                pairs = [[(clips, texts[number]) for clips, texts in passes] for passes in models]
                video, text = (
                    _joined([_joined([pair[side] for pair in passes], "raw") for passes in pairs], self.combine)
                    for side in (0, 1)
                )
                if order == PLAIN:
                    features.append((video, text))
                if self.reranker is not None and isinstance(task, RetrievalTask):
                    stage = self._rerank(model, task, every[0].tokens[order], video, text)
                    scores[order] |= stage[0]
                    if order == PLAIN:
                        details.append(stage[1])
                        reranking = stage[2]
                    continue
                scores[order] |= task.measure(video, text)
                if order == PLAIN:
                    details.append(task.details(video, text))
        return BenchmarkResult(scores, details, np.flatnonzero(mask).tolist(), report, features, reranking)

    def _rerank(
        self, model: nn.Module, task: RetrievalTask, tokens: Tensor, video: Features, text: Features
    ) -> tuple[dict[str, Score], Mapping[str, Any], Reranking]:
        """Scores, details and cost of retrieval in two stages."""
        assert self.reranker is not None
        assert isinstance(model, DualEncoder)  # others have no tokens
        assert isinstance(video, Tensor), "the configuration refuses several models or passes"
        assert isinstance(text, Tensor), "the configuration refuses several models or passes"
        start, sim = time.perf_counter(), similarity(video, text)
        by_clip, by_text, flops = rerank(
            model, self.reranker, tokens, task.texts, self.tokenizer, sim, self.top_k, self.execution
        )
        seconds, trained = time.perf_counter() - start, self.reranker.shape.trained
        stage = Reranking(self.top_k, flops / 1e9, seconds, trained, task.measure(video, text))
        return task.measure_ranking(by_clip, by_text), task.details_of_ranking(sim.numpy(), by_clip), stage

    def embed(self, model: nn.Module) -> Embedded:
        """The features of one model. Collective. Raises as :meth:`measure`."""
        if self.classes is not None:
            assert isinstance(model, DualEncoder), f"{type(model).__name__} has no heads"
            model = ClassProbabilities(model, self.classes)
        if self.reranker is not None:
            model = self._with_tokens(model, self.reranker)
        assert isinstance(model, VideoTextModel), f"{type(model).__name__} has no encode_video and encode_text"
        self._check_image_stats(model)
        try:
            return self._embed(model, self._missing(model))
        finally:
            loader = self.execution.loader
            if loader is not None and self.dataset in loader.datasets:  # stored features have none
                loader.finish(self.dataset)

    def _with_tokens(self, model: nn.Module, head: Reranker) -> WithTokens:
        """Raises :class:`UserError` if the reranker cannot be used with this model or protocol."""
        protocol, shape = self.dataset.protocol, head.shape
        if not isinstance(model, DualEncoder) or fingerprint(model) != shape.encoder:
            raise UserError(
                f"evaluate.rerank.path: was trained on the tokens of other weights ({shape.encoder[:12]}); train one "
                "for this checkpoint with tools/train_reranker.py"
            )
        if protocol.views > 1 or protocol.frames != shape.frames:
            raise UserError(
                f"benchmark {self.name}: protocol {protocol.name} shows {protocol.views} views of {protocol.frames} "
                f"frames, but the reranker reads one of {shape.frames}; set evaluate.num_frames or another protocol"
            )
        return WithTokens(model, head)

    def _missing(self, model: VideoTextModel) -> dict[int, str]:
        """Clips whose file is not there, as of :func:`missing_clips`."""
        execution, loader = self.execution, self.execution.loader
        if isinstance(model, StoredFeatures):
            return {}
        if loader is None or self.dataset not in loader.datasets:  # a caller may have put another one here
            return missing_clips(self.dataset, execution.dist)
        # All benchmarks are checked before anything is decoded: a missing file should not come up after an hour, and
        # the loader processes, which start once, inherit where the videos are.
        if not loader.missing:
            for dataset in loader.datasets:
                loader.missing[id(dataset)] = missing_clips(dataset, execution.dist)
        if not execution.allow_missing:
            for dataset in loader.datasets:
                require_all(loader.missing[id(dataset)], len(dataset))
        return loader.missing[id(self.dataset)]

    def _embed(self, model: VideoTextModel, missing: dict[int, str]) -> Embedded:
        execution, total = self.execution, len(self.dataset)
        rows = np.setdiff1d(np.arange(total), list(missing))
        if not execution.allow_missing or not len(rows):
            require_all(missing, total)
        dataset = self.dataset if len(rows) == total else self.dataset.restricted(np.isin(np.arange(total), rows))
        cache = FeatureCache(execution.cache, self._dependencies(model)) if execution.cache else None
        if isinstance(model, StoredFeatures) and (self.controls or self.flip):
            model.encode_video(torch.empty(0))  # raises
        # Texts first: a model without a text tower should not cost the clips. All tasks at once: texts that they share
        # are encoded once.
        texts = [text for task in self.tasks for text in task.texts]
        swapped = [swap_sides(text) for text in texts] if self.flip else []
        embedded = embed_texts(model, texts + swapped, self.tokenizer, execution, cache=cache) if texts else None
        # Missing files are known already; what comes up while decoding is numbered among the remaining clips.
        video, report = embed_clips(model, dataset, execution, controls=self.controls, flip=self.flip, cache=cache)
        if report.faults:
            readable = np.setdiff1d(np.arange(len(rows)), list(report.faults))
            report.faults = {int(rows[i]): text for i, text in report.faults.items()}
            rows = rows[readable]
            if not len(rows):
                require_all(report.faults, total)
            video = {order: features[torch.from_numpy(readable)] for order, features in video.items()}
        report.faults, report.clips = missing | report.faults, total
        if isinstance(model, ClassProbabilities):  # heads need no texts
            place = model.mirrored.cpu()
            video = {name: each[:, place] if name.endswith(MIRRORED) else each for name, each in video.items()}
        if embedded is None:
            embedded = torch.zeros(0, video[PLAIN].shape[-1])
        width = embedded.shape[1]
        if self.reranker is None and width != video[PLAIN].shape[-1]:  # a reranker's tokens follow the features
            raise UserError(
                f"benchmark {self.name}: features of clips have {video[PLAIN].shape[-1]} dimensions and those of texts "
                f"{width}, which cannot be compared"
            )
        by_name, tokens = {PLAIN: embedded[: len(texts)], MIRRORED: embedded[len(texts) :]}, dict[str, Tensor]()
        if self.reranker is not None:
            tokens = {order: clips[:, width:] for order, clips in video.items()}
            video = {order: clips[:, :width].contiguous() for order, clips in video.items()}
        return Embedded(rows, video, by_name, report, tokens)

    def _check_image_stats(self, model: VideoTextModel) -> None:
        """Warn where a protocol reproduces numbers of weights that expect other image statistics than ``model``."""
        protocol = self.dataset.protocol
        if protocol.image_stats is None or not self.execution.dist.is_main:
            return
        if image_stats_of(model) != IMAGE_STATS[protocol.image_stats]:
            log.warning(
                "benchmark %s: protocol %s reproduces numbers of weights with model.image_stats=%s; this model has "
                "others, which are used", self.name, protocol.name, protocol.image_stats,
            )  # fmt: skip

    def _dependencies(self, model: VideoTextModel) -> dict[str, Any]:
        """What all features of this benchmark depend on, which is the group of the cache."""
        protocol = dataclasses.asdict(self.dataset.protocol)
        # Neither names nor class prompts change a feature, and the image statistics in use are the model's.
        for name in ("name", "source", "prompts", "image_stats"):
            del protocol[name]
        dist, precision = self.execution.dist, self.execution.precision
        # Earlier versions computed these in TF32; what they cached must not come back.
        exact = ", no TF32" if dist.device.type == "cuda" and precision == torch.float32 else ""
        return {
            "identity": dict(self.execution.identity),
            "protocol": protocol,
            "image_stats": image_stats_of(model),
            "size": self.dataset.size,
            "precision": str(precision) + exact,
            # Clips' features are then followed by tokens.
            **({"tokens": self.reranker.shape.grid} if self.reranker is not None else {}),
        }


def _joined(features: Sequence[Features], combine: str) -> Features:
    # One alone stays what it is: its similarities are not averaged with anything.
    return features[0] if len(features) == 1 else Members(features, combine)
