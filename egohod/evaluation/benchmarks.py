"""Benchmarks from Python: the same readers, tasks, controls and report as ``main_eval.py``, for any model."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from egohod.config import Config
from egohod.data.formats import BENCHMARKS
from egohod.data.formats.base import BenchmarkData
from egohod.distributed import Distributed
from egohod.errors import UserError, nearest
from egohod.evaluation.adapters import SentenceModel, StoredFeatures
from egohod.evaluation.cards import CARDS, BenchmarkCard
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.embed import CONTROLS, OUTSIDE, TokenizerLike, fingerprint, outside_model
from egohod.evaluation.report import write_report
from egohod.evaluation.results import RESULTS_FILE, contents, markdown, write_results
from egohod.evaluation.runner import (
    PROTOCOLS,
    BenchmarkResult,
    Measured,
    execution_of,
    measured,
    read_benchmark,
)
from egohod.runtime import write_text


@dataclass(frozen=True)
class Results:
    """What an evaluation measured. ``first + second`` has the benchmarks of both, for one page of one model."""

    cfg: Config
    dist: Distributed
    evaluated: Sequence[tuple[Measured, BenchmarkResult]]
    checkpoint: dict[str, Any]

    def __add__(self, other: Results) -> Results:
        return dataclasses.replace(self, evaluated=[*self.evaluated, *other.evaluated])

    @cached_property
    def contents(self) -> dict[str, Any]:
        """What ``results.json`` has: every number with interval, chance level, controls and protocol."""
        return contents(self.cfg, self.dist, self.evaluated, checkpoint=self.checkpoint)

    @property
    def metrics(self) -> dict[str, float]:
        """Every number by ``BENCHMARK/METRIC`` or, under a control, ``BENCHMARK/CONTROL/METRIC``; percent or rank."""
        return dict(self.contents["metrics"])

    def to_json(self, path: str | Path | None = None) -> str:
        """``results.json`` as text, also written to ``path`` if one is given."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder, page=False)
            text = (Path(folder) / RESULTS_FILE).read_text(encoding="utf-8")
        return _written(text, path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """A table with a row for each benchmark, for a README; also written to ``path`` if one is given."""
        return _written(markdown(json.loads(self.to_json())), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """The report page, one file without references; also written to ``path`` if one is given."""
        with tempfile.TemporaryDirectory() as folder:
            return _written(self.save(folder).read_text(encoding="utf-8"), path)

    def save(self, folder: str | Path, *, page: bool = True) -> Path:
        """Write what ``main_eval.py --output`` writes: results.json, results.md, details/ and report.html.

        Returns the path of the page. Raises :class:`OSError` where a file cannot be written.
        """
        write_results(folder, self.cfg, self.dist, self.evaluated, checkpoint=self.checkpoint)
        return write_report(folder, decoder=self.cfg.data.decoder) if page else Path(folder)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text(Path(path), text)
    return text


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark whose annotations are read; :func:`load_benchmark` makes it."""

    name: str
    config: BenchmarkConfig
    data: BenchmarkData | None
    """Clips and tasks as the annotations give them; None for a benchmark that has no clips, such as a simulation."""

    @property
    def card(self) -> BenchmarkCard | None:
        """Task, size, chance level, licence, source and published numbers; None for a benchmark of your own."""
        return CARDS.get(self.name)

    @cached_property
    def clips(self) -> pd.DataFrame:
        """The clips: ``id``, ``video`` (below the root), ``start`` and ``end`` (seconds; inf: of the file)."""
        table = None if self.data is None else self.data.clips
        columns = ([], [], [], []) if table is None else (table.ids, table.videos, table.start, table.end)
        return pd.DataFrame(dict(zip(("id", "video", "start", "end"), columns, strict=True)))

    @cached_property
    def texts(self) -> list[str]:
        """All texts that are compared with clips, each once."""
        tasks = () if self.data is None else self.data.tasks
        return list(dict.fromkeys(text for task in tasks for text in task.texts))

    def evaluate(
        self,
        model: Any,
        controls: Sequence[str] = (),
        *,
        tokenizer: TokenizerLike | None = None,
        batch_size: int = 32,
        num_frames: int | None = None,
        allow_missing: bool = False,
        cache: str | Path | None = None,
        workers: int | None = None,
        dist: Distributed | None = None,
    ) -> Results:
        """Measure a model.

        Args:
            model: an object as :class:`~egohod.evaluation.adapters.SentenceModel` describes, with ``encode_video``
                (frames in 0..1 [B, T, H, W, 3]) and ``encode_text`` (a list of strings); or a name:
                ``open_clip:NAME[:WEIGHTS]``, ``transformers:FOLDER``, ``features:FOLDER``; or, with ``tokenizer``, a
                model of this project, or one alike
                (:class:`~egohod.evaluation.embed.VideoTextModel`). It is evaluated on the device that it is on.
            controls: ``shuffle``, ``reverse``, ``freeze``: the same clips with their time destroyed.
            tokenizer: what makes tokens of texts, as ``egohod.create_model_and_transforms`` returns it.
            batch_size: clips encoded at a time.
            num_frames: frames of each clip; None is the protocol's number.
            allow_missing: leave out clips that cannot be read; marks numbers as partial.
            cache: folder of features by weights, clip and protocol; None keeps none. Of modules only.
            workers: decoding processes; None chooses by the cores, 0 decodes in this one.
            dist: this process's place among several, for programs that have joined them.

        Raises:
            UserError: unknown controls, a model without what the benchmark needs, clips that cannot be read (all of
                them are named), or features of the wrong shape or not finite.
        """
        for name in controls:
            if name not in CONTROLS:
                raise UserError(f"no temporal control '{name}'{nearest(name, CONTROLS)}")
        spec = model if isinstance(model, (str, Path)) else None
        if spec is not None:
            if not str(spec).startswith(OUTSIDE):
                raise UserError(
                    f"{spec}: not {', '.join(f'{each}...' for each in OUTSIDE)} nor a model; load a checkpoint with "
                    "egohod.create_model_and_transforms, and give its model and tokenizer"
                )
            model = outside_model(str(spec))
        elif tokenizer is None and not isinstance(model, (SentenceModel, StoredFeatures)):
            model = SentenceModel(model)
        cfg = Config()
        cfg.evaluate.batch_size, cfg.evaluate.num_frames, cfg.evaluate.cache = batch_size, num_frames, None
        cfg.evaluate.benchmarks = {self.name: self.config}
        if workers is not None:
            cfg.data.workers = workers
        cfg.model.name = str(spec or type(getattr(model, "inner", model)).__name__)
        if dist is None:
            device = next((each.device for each in model.parameters()), torch.device("cpu"))
            dist = Distributed(0, 1, device, None)
        weights = fingerprint(model)
        # What has no weights has nothing by which another model's features could be told apart.
        cached = cache is not None and any(True for _ in model.state_dict())
        execution = dataclasses.replace(
            execution_of(cfg, dist),
            cache=Path(cache) if cache is not None and cached else None,
            identity={"weights": weights, "model": cfg.model.name},
            allow_missing=allow_missing,
        )
        bench = measured(
            cfg,
            self.name,
            self.config,
            execution,
            size=_size(model),
            tokenizer=tokenizer or model.tokenizer,
            controls=list(controls),
            need_videos=not isinstance(model, StoredFeatures),
        )
        return Results(cfg, dist, [(bench, bench.measure(model))], {"path": cfg.model.name, "sha256": weights})


def _size(model: nn.Module) -> int:
    """The side of the frames that a model expects, in pixels."""
    geometry = getattr(model, "geometry", None)
    return int(geometry.image_size if geometry is not None else getattr(model, "size", 224))


def load_benchmark(
    name: str,
    metadata: str | Path | None = None,
    root: str | Path | None = None,
    protocol: str = "auto",
    **settings: Any,
) -> LoadedBenchmark:
    """Read the annotations of a benchmark.

    Args:
        name: one of :func:`~egohod.evaluation.cards.list_benchmarks`, or any other name for a csv of your own.
        metadata: its annotations, docs/evaluation.md; of your own, the csv of the clips.
        root: its videos, a folder or an fsspec URI; stored features need none.
        protocol: which frames a model sees, and how: ``auto``, ``upstream``, ``avion``, ``lavila``, ...
        settings: further knobs of ``evaluate.benchmarks.NAME``, such as ``layout="chunks"``.

    Raises:
        UserError: an unknown name, protocol or setting, or annotations that are missing or damaged, with file and row.
    """
    known = {each.name for each in dataclasses.fields(BenchmarkConfig)}
    for key in settings:
        if key not in known:
            raise UserError(f"load_benchmark: no setting '{key}'{nearest(key, sorted(known))}")
    if protocol not in ("auto", *PROTOCOLS):
        raise UserError(f"load_benchmark: no protocol '{protocol}'{nearest(protocol, ['auto', *PROTOCOLS])}")
    places = (None if place is None else str(place) for place in (metadata, root))
    config = BenchmarkConfig(protocol=protocol)
    vars(config).update(zip(("metadata", "root"), places, strict=True), **settings)
    if (card := CARDS.get(name)) is not None and card.builder:
        return LoadedBenchmark(name, config, None)
    if config.metadata is None:
        raise UserError(f"load_benchmark('{name}'): metadata is missing, where its annotations are")
    kind = config.kind if config.kind != "auto" else name if name in BENCHMARKS else "custom"
    if kind not in BENCHMARKS:
        raise UserError(f"load_benchmark: no benchmark format '{kind}'{nearest(kind, list(BENCHMARKS))}")
    _, data = read_benchmark(kind, config)
    return LoadedBenchmark(name, config, data)
