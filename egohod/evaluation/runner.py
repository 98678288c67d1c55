"""A benchmark: tables over clips, the one place where features are computed; and benchmarks as a configuration asks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from egohod.config import Config
from egohod.data.config import DataConfig, SourceConfig
from egohod.data.dataset import ClipList, EvalProtocol, EvaluationDataset, require_all
from egohod.data.formats import BENCHMARKS
from egohod.data.formats.base import (
    BenchmarkData,
    BenchmarkOptions,
)
from egohod.data.labels import ClassSpace
from egohod.data.storage import open_cache
from egohod.data.text import Tokenizer
from egohod.data.text_files import nearest
from egohod.distributed import Distributed, pick_precision
from egohod.errors import UserError
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.embed import PLAIN, Report, TokenizerLike, embed_clips, embed_texts
from egohod.evaluation.features import FeatureCache
from egohod.evaluation.metrics import Score, flat_with_controls
from egohod.evaluation.models import ClassProbabilities, VideoTextModel, image_stats_of
from egohod.evaluation.tasks import EvaluationTask, head_tasks, tasks_of
from egohod.model.config import IMAGE_STATS
from egohod.model.dual_encoder import DualEncoder
from egohod.model.zoo import geometry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Execution:
    """How features are computed: clips at a time, decoding processes, this process, autocast type.

    ``cache`` is the folder of features of earlier evaluations, ``identity`` what they depend on beside the clips and
    the protocol: above all the checksum of the weights. ``allow_missing`` leaves out clips that cannot be read;
    ``timeout`` is how many seconds to wait for a batch of clips.
    """

    batch_size: int
    workers: int
    dist: Distributed
    precision: torch.dtype = torch.float32
    cache: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    allow_missing: bool = False
    timeout: float = DataConfig.timeout


@dataclass(frozen=True)
class Measured:
    """What a benchmark found: scores by order of frames and metric, details by table, and how it came about."""

    scores: Mapping[str, Mapping[str, Score]]
    details: Sequence[Mapping[str, Any]]
    kept: Sequence[int]
    """Indices of the clips that the numbers are about."""
    report: Report

    def flat(self) -> dict[str, float]:
        """Numbers by name; those under a control are ``<control>/<metric>``, what it took away ends in ``_drop``."""
        return flat_with_controls(self.scores, PLAIN)


class Benchmark:
    """Evaluation tables over the clips of one dataset; clips and distinct texts are encoded once for all tables."""

    def __init__(
        self,
        name: str,
        dataset: EvaluationDataset,
        tables: Sequence[EvaluationTask],
        *,
        tokenizer: TokenizerLike,
        execution: Execution,
        controls: Sequence[str] = (),
        notes: Sequence[str] = (),
        classes: ClassSpace | None = None,
    ) -> None:
        self.name = name
        self.classes = classes
        self.dataset = dataset
        self.tables = tables
        self.tokenizer = tokenizer
        self.execution = execution
        self.controls = controls
        self.notes = notes

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Numbers as of :meth:`Measured.flat`, percent or ranks from 1: what the training loop calls an evaluator."""
        return self.measure(model).flat()

    def measure(self, model: nn.Module) -> Measured:
        """Scores of all tables for a :class:`VideoTextModel`. Collective over all processes of the run.

        Raises :class:`UserError` when clips cannot be read (naming all of them) or features are not finite.
        """
        if self.classes is not None:
            assert isinstance(model, DualEncoder), f"{type(model).__name__} has no heads"
            model = ClassProbabilities(model, self.classes)
        assert isinstance(model, VideoTextModel), f"{type(model).__name__} has no encode_video and encode_text"
        run, dataset, kept = self.execution, self.dataset, np.ones(len(self.dataset), dtype=bool)
        self._check_image_stats(model)
        # Looked for first: nobody wants to hear of a missing file after an hour of decoding.
        missing = run.dist.gather_objects(dataset.missing() if run.dist.is_main else None)[0]
        if not run.allow_missing:
            require_all(missing, len(dataset))
        kept[list(missing)] = False
        if not kept.any():
            require_all(missing, len(dataset))
        dataset = dataset if kept.all() else dataset.restricted(kept)
        cache = FeatureCache(run.cache, self._shared(model)) if run.cache else None
        video, report = embed_clips(
            model,
            dataset,
            batch_size=run.batch_size,
            workers=run.workers,
            timeout=run.timeout,
            dist=run.dist,
            precision=run.precision,
            controls=self.controls,
            cache=cache,
            allow_missing=run.allow_missing,
        )
        numbers = np.flatnonzero(kept)
        if report.faults:
            readable = np.setdiff1d(np.arange(len(numbers)), list(report.faults))
            kept[np.setdiff1d(numbers, numbers[readable])] = False
            video = {order: features[torch.from_numpy(readable)] for order, features in video.items()}
            if not kept.any():
                require_all(report.faults, len(self.dataset))
        report.faults = missing | {int(numbers[i]): text for i, text in report.faults.items()}
        report.clips = len(self.dataset)
        tables = self.tables if kept.all() else [table.restricted(kept) for table in self.tables]
        texts = [text for table in tables for text in table.texts]
        # Heads need no text.
        embedded = (
            torch.zeros(0, next(iter(video.values())).shape[-1])
            if not texts
            else embed_texts(
                model,
                texts,
                self.tokenizer,
                batch_size=run.batch_size,
                dist=run.dist,
                precision=run.precision,
                cache=cache,
            )
        )
        features = embedded.split([len(table.texts) for table in tables])
        scores = {order: _measure(tables, clips, features) for order, clips in video.items()}
        details = [table.details(video[PLAIN], text) for table, text in zip(tables, features, strict=True)]
        return Measured(scores, details, np.flatnonzero(kept).tolist(), report)

    def _check_image_stats(self, model: VideoTextModel) -> None:
        """Warn where a protocol reproduces numbers of weights that expect other pixels than ``model`` does."""
        protocol = self.dataset.protocol
        if protocol.image_stats is None or not self.execution.dist.is_main:
            return
        if image_stats_of(model) != IMAGE_STATS[protocol.image_stats]:
            log.warning(
                "benchmark %s: protocol %s reproduces numbers of weights with model.image_stats=%s; this model has "
                "others, which are used", self.name, protocol.name, protocol.image_stats,
            )  # fmt: skip

    def _shared(self, model: VideoTextModel) -> dict[str, Any]:
        """What all features of this benchmark depend on; class prompts and names of presets do not matter."""
        protocol = dataclasses.asdict(self.dataset.protocol)
        for name in ("name", "source", "prompts", "image_stats"):
            del protocol[name]
        return {
            "identity": dict(self.execution.identity),
            "protocol": protocol,
            "image_stats": image_stats_of(model),
            "size": self.dataset.size,
            "precision": str(self.execution.precision) + (", no TF32" if self._is_exact_on_gpu else ""),
        }

    @property
    def _is_exact_on_gpu(self) -> bool:
        """Earlier versions computed these in TF32; what they cached must not come back."""
        return self.execution.dist.device.type == "cuda" and self.execution.precision == torch.float32


def _measure(tables: Sequence[EvaluationTask], video: Tensor, texts: Sequence[Tensor]) -> dict[str, Score]:
    """Scores of all tables, of which each has its own features of texts."""
    results: dict[str, Score] = {}
    for table, text in zip(tables, texts, strict=True):
        scores = table.measure(video, text)
        if twice := results.keys() & scores.keys():
            raise UserError(f"two tables of a benchmark use the metric name '{min(twice)}'")
        results |= scores
    return results


def execution_of(cfg: Config, dist: Distributed) -> Execution:
    """How the run ``cfg`` computes features; nothing is kept."""
    return Execution(
        batch_size=cfg.evaluate.batch_size,
        workers=cfg.data.workers,
        timeout=cfg.data.timeout,
        dist=dist,
        precision=pick_precision(cfg.evaluate.precision, dist.device),
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
    protocol: EvalProtocol | None = None,
    classes: ClassSpace | None = None,
) -> Benchmark:
    """The benchmark that ``config`` describes, at the resolution (pixels) and with the tokenizer of a model.

    With ``classes`` it measures the heads of a model instead of its texts.

    Everything but the clips is read here, so mistakes surface before anything is computed. Raises :class:`UserError`.
    """
    kind = _kind(name, config)
    if protocol is None:
        key, chosen = f"evaluate.benchmarks.{name}.protocol", config.protocol
        if chosen == "auto":
            key, chosen = "evaluate.protocol", cfg.evaluate.protocol
        protocol = protocol_for(chosen, kind)
        if protocol.whole_files and not BENCHMARKS[kind].whole_files:
            raise UserError(f"{key}={chosen} is for clips that are files of their own, which {name} has not")
        if cfg.evaluate.num_frames:
            protocol = dataclasses.replace(protocol, frames=cfg.evaluate.num_frames)
    if classes is not None:
        # The maximum is for similarities: LaViLa, too, averages the views of a fine-tuned model.
        protocol = dataclasses.replace(protocol, merge="mean")
    if not config.metadata or not config.root:
        lacking = "metadata" if not config.metadata else "root"
        raise UserError(
            f"benchmark {name}: evaluate.benchmarks.{name}.{lacking} is not set; give --{lacking}, or set it in the "
            "configuration"
        )
    cache = Path(cfg.evaluate.cache) if cfg.evaluate.cache else None
    source, data = read_benchmark(kind, config, protocol.prompts, cache)
    tables = tasks_of(data)
    clips = data.clips
    dataset = EvaluationDataset(
        ClipList(
            clips.ids,
            clips.videos,
            clips.start,
            clips.end,
            source.root,
            source.layout,
            source.chunk_seconds,
            source.min_clip_seconds,
        ),
        protocol,
        size=size or geometry(cfg.model.name).image_size,
        decoder=cfg.data.decoder,
        cache=open_cache(cfg.data.cache, cfg.data.cache_gb),
    )
    return Benchmark(
        name,
        dataset,
        head_tasks(tables, classes, f"benchmark {name}") if classes else tables,
        tokenizer=tokenizer or Tokenizer(geometry(cfg.model.name).context_length),
        execution=execution,
        controls=controls,
        notes=data.notes,
        classes=classes,
    )


def read_benchmark(
    kind: str, config: BenchmarkConfig, prompts: str = "train", cache: Path | None = None
) -> tuple[SourceConfig, BenchmarkData]:
    """Where the videos of a benchmark are, and what its files say. Raises :class:`UserError`."""
    format = BENCHMARKS[kind]
    source = SourceConfig(
        metadata=config.metadata or "",
        root=config.root or "",
        columns=config.columns,
        layout="whole" if format.whole_files else config.layout,
        chunk_seconds=config.chunk_seconds,
        min_clip_seconds=config.min_clip_seconds,
    )
    return source, format.read(source, BenchmarkOptions(prompts, config.test_split, cache))


def _kind(name: str, config: BenchmarkConfig) -> str:
    """The format of a benchmark's files. Raises :class:`UserError` for one that does not exist."""
    if config.kind == "auto":
        return name if name in BENCHMARKS else "custom"
    if config.kind not in BENCHMARKS:
        near = nearest(config.kind, ["auto", *BENCHMARKS])
        raise UserError(f"evaluate.benchmarks.{name}.kind: no benchmark format '{config.kind}'{near}")
    return config.kind


def demo_evaluator(
    cfg: Config,
    dist: Distributed,
    folder: str | Path,
    name: str,
    controls: Sequence[str] = (),
    execution: Execution | None = None,
) -> Benchmark:
    """The split of a demo world in ``folder``, shown as many frames as the run ``cfg`` trains with."""
    folder = Path(folder)
    for part in ("hod.csv", "classes.csv", "questions.jsonl", "videos"):
        if not (folder / part).exists():
            raise UserError(f"{folder}: no {part} there; expected the val or test folder of a demo world")
    return benchmark(
        cfg,
        name,
        BenchmarkConfig(kind="custom", metadata=str(folder / "hod.csv"), root=str(folder / "videos"), layout="chunks"),
        execution or execution_of(cfg, dist),
        controls=controls,
        protocol=EvalProtocol(
            "demo", "this project: frames as in training, one centre crop", frames=cfg.model.num_frames
        ),
    )


def demo_evaluators(
    cfg: Config,
    dist: Distributed,
    *names: str,
    controls: Sequence[str] = (),
    execution: Execution | None = None,
) -> list[Benchmark]:
    """The worlds that ``cfg.evaluate`` names, of those in ``names`` (val, test)."""
    folders = {"val": cfg.evaluate.demo_val, "test": cfg.evaluate.demo_test}
    return [demo_evaluator(cfg, dist, folder, name, controls, execution) for name in names if (folder := folders[name])]


def named_evaluators(
    cfg: Config, dist: Distributed, *names: str, controls: Sequence[str] = (), classes: ClassSpace | None = None
) -> list[Benchmark]:
    """What the configuration names to be measured while training (``val``) and when it is done (``test``).

    The demo worlds of :func:`demo_evaluators` and the benchmarks of ``evaluate.during`` and ``evaluate.final``; with
    ``classes`` the latter measure a model's heads.
    """
    chosen = {"val": cfg.evaluate.during, "test": cfg.evaluate.final}
    made = demo_evaluators(cfg, dist, *names, controls=controls)
    for name in (each for part in names for each in chosen[part]):
        made.append(
            benchmark(
                cfg, name, cfg.evaluate.benchmarks[name], execution_of(cfg, dist), controls=controls, classes=classes
            )
        )
    return made


def asked(cfg: Config, name: str, root: str | None = None, metadata: str | None = None) -> dict[str, BenchmarkConfig]:
    """The benchmarks that ``--benchmark name`` means, with ``--root`` and ``--metadata`` put in.

    ``all`` are those of the configuration whose annotations are there. Raises :class:`UserError`.
    """
    there = dict(cfg.evaluate.benchmarks)
    if name == "own" and name not in there:
        log.warning("--benchmark own is now called custom; the old name is read for one more release")
        name = "custom"
    if name == "all":
        if root or metadata:
            raise UserError("--root and --metadata belong to one benchmark; for all of them use evaluate.benchmarks")
        found = {key: each for key, each in there.items() if each.metadata and Path(each.metadata).exists()}
        if not found:
            raise UserError("no benchmark's data is found: set metadata and root in evaluate.benchmarks")
        return found
    if name not in there and name not in BENCHMARKS:
        known = dict.fromkeys([*there, *(key for key in BENCHMARKS if key not in ("custom", "labels"))])
        raise UserError(f"--benchmark {name}: there are demo, all, {', '.join(known)}")
    config = there.get(name, BenchmarkConfig())
    return {name: dataclasses.replace(config, root=root or config.root, metadata=metadata or config.metadata)}


# AVION and LaViLa resize as torchvision's default is, bilinear, and their torchvision (0.14, 0.11) not antialiased.
_UPSTREAM: dict[str, Any] = {"resize": "bicubic", "image_stats": "clip", "prompts": "train+val"}
_LAVILA: dict[str, Any] = {"resize": "bilinear", "image_stats": "avion", "prompts": "train+val"}

PROTOCOLS = {
    each.name: each
    for each in (
        EvalProtocol("clean", "this project: 16 frames, one centre crop; class prompts from training narrations only"),
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

# EGTEA's clips are files of their own, which published code samples in another way than moments of long videos.
_ON_EGTEA = {"upstream": "upstream_egtea", "upstream_4": "upstream_egtea", "lavila": "lavila_10x3"}


def protocol_for(name: str, kind: str) -> EvalProtocol:
    """The protocol called ``name`` for a benchmark of a kind (``egtea``, ...); ``auto`` is this project's own.

    On EGTEA the name of a family means what that family does there.
    """
    if name == "auto":
        name = "whole_clip" if kind == "egtea" else "clean"
    chosen = PROTOCOLS[name]
    if kind == "egtea" and name in _ON_EGTEA:
        return replace(PROTOCOLS[_ON_EGTEA[name]], frames=chosen.frames)
    return chosen
