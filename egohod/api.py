"""The Python interface: models and their cards, preprocessing and tokenizer, clips as arrays, and benchmarks."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from egohod import hub
from egohod.config import Config, model_config
from egohod.data.config import SourceConfig
from egohod.data.dataset import (
    ClipDataset,
    EvalProtocol,
    Tokenizer,
    UnreadableError,
    center_crop,
    normalise,
    tokenizer_for,
)
from egohod.data.decoders import VIDEO_ENDINGS, choose_decoder
from egohod.data.formats import BENCHMARKS
from egohod.data.formats.base import BenchmarkData
from egohod.data.table import ClipTable
from egohod.data.videos import ENDINGS, read_clip
from egohod.distributed import Distributed, pick_device
from egohod.errors import UserError, nearest
from egohod.evaluation.adapters import SentenceModel, StoredFeatures
from egohod.evaluation.cards import CARDS, BenchmarkCard
from egohod.evaluation.cards import list_benchmarks as list_benchmarks
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.embed import (
    CONTROLS,
    OUTSIDE,
    PLAIN,
    TokenizerLike,
    VideoTextModel,
    embed_clips,
    embed_texts,
    fingerprint,
    identity_of,
    outside_model,
)
from egohod.evaluation.report import write_report
from egohod.evaluation.results import RESULTS_FILE, contents, markdown, write_results
from egohod.evaluation.runner import (
    PROTOCOLS,
    BenchmarkResult,
    Measured,
    execution_of,
    measured,
    protocol_for,
    read_benchmark,
)
from egohod.loss.config import LossConfig
from egohod.model import checkpoints as weights_of_files
from egohod.model import dual_encoder
from egohod.model.cards import list_models as list_models
from egohod.model.cards import model_info as model_info
from egohod.model.checkpoints import WeightReport
from egohod.model.config import GEOMETRIES
from egohod.model.dual_encoder import DualEncoder
from egohod.runtime import write_text
from egohod.training.checkpoint import open_weights

Preprocess = Callable[[np.ndarray], Tensor]


def create_model(name: str, **overrides: Any) -> DualEncoder:
    """A model with fresh weights from torch's global generator, in training mode on the CPU.

    Args:
        name: a geometry of :mod:`egohod.model.config`, e.g. ``CLIP_VITB16``, ``timm/NAME`` or ``open_clip/NAME``.
        overrides: knobs of the section ``model``, e.g. ``num_frames=16, activation="quick_gelu"``.

    Raises:
        UserError: unknown name or knob, or a value out of range.
    """
    return dual_encoder.create_model(model_config(name, **overrides))


def load_weights(
    model: nn.Module, path: str | Path, *, adapt: bool = False, projections: str = "auto", download: bool = False
) -> WeightReport:
    """Put weights of any family into ``model``: strictly, all or nothing (docs/checkpoints.md).

    Args:
        model: what :func:`create_model` returns.
        path: a file of OpenAI CLIP, open_clip, timm, transformers, upstream EgoHOD, AVION or this project, a folder of
            the Hugging Face Hub or a repository of it (``hf-hub:org/name@revision``, docs/hub.md), a run or checkpoint
            folder of this project, or an open_clip tag such as ``ViT-B-16:laion2b_s34b_b88k``.
        adapt: resize position embeddings, and start parts anew that the file does not have; else these are errors.
        projections: ``fresh`` keeps the model's output projections and temperature, ``keep`` takes the file's; ``auto``
            is fresh for CLIP models, as published, and keep for trained video models.
        download: let open_clip fetch what a tag names; otherwise nothing but ``hf-hub:...`` is downloaded.

    Returns:
        Every key: taken, resized, dropped, missing.

    Raises:
        UserError: missing, cut-off or hostile files, and weights that do not fit; the model is untouched then.
    """
    content = open_weights(path, download=download)
    return weights_of_files.load_weights(model, content, adapt=adapt, projections=projections)


def create_model_and_transforms(
    name: str,
    weights: str | Path | None = None,
    *,
    adapt: bool = False,
    projections: str = "auto",
    download: bool = False,
    **overrides: Any,
) -> tuple[DualEncoder, Preprocess, Tokenizer]:
    """A dual encoder ready to embed, in evaluation mode on the CPU.

    Args:
        name: as of :func:`create_model`; or weights alone, such as ``hf-hub:org/name`` or a run folder, that say what
            model they are of. Their projections are kept then.
        weights: whatever :func:`load_weights` reads, or None for random weights. Frame count and shared space are the
            file's unless given; a folder of this project also holds activation and image statistics.
        adapt: see :func:`load_weights`.
        projections: see there.
        download: see there.
        overrides: see :func:`create_model`. Any number of frames can be embedded whatever ``num_frames`` is: the
            temporal embedding is interpolated.

    Returns:
        model: ``encode_video(video [B, 3, T, S, S])`` and ``encode_text(tokens [B, L])`` give unit vectors [B, E].
        preprocess: frames uint8 [T, H, W, 3] -> the middle square, normalised as the model expects, float32
            [3, T, S, S].
        tokenizer: list of strings -> int64 [B, L].

    Raises:
        UserError: unknown name, or weights that are missing, unreadable or of another geometry.
    """
    content = None
    # A folder may be called like a model.
    if name.startswith(hub.PREFIX) or (weights is None and name not in GEOMETRIES and Path(name).exists()):
        if weights is not None:
            raise UserError(f"{name}: names weights, and {weights} does too; give one of them")
        content, weights = open_weights(name, download=download), name
        name = content.model_name or ""
        if not name:
            raise UserError(f"{weights}: does not say which model it holds; give a name and these weights")
        projections = "keep" if projections == "auto" else projections
    if weights is None:
        config = model_config(name, **overrides)
        model = dual_encoder.create_model(config)
    else:
        content = content or open_weights(weights, download=download)
        # Only folders of this project name their geometry; of others the shapes tell when the weights are loaded.
        if (geometry_of_file := content.settings.get("model.name", name)) != name:
            raise UserError(f"{content.source}: holds a {geometry_of_file}, not a {name}")
        # Dotted keys of the section "model", such as fast.position, which OmegaConf nests.
        settings = OmegaConf.create({})
        for key, value in content.model_knobs.items():
            if key != "name":
                OmegaConf.update(settings, key, value, force_add=True)
        # New projections are of the geometry's size, whatever the file's were.
        if weights_of_files.starts_projections_anew(content, projections, name):
            settings.pop("embed_dim", None)
        # What the caller asks for counts more than what the file says of itself.
        config = model_config(name, **OmegaConf.to_container(OmegaConf.merge(settings, overrides)))  # type: ignore[arg-type]
        # Where the file records its loss, that decides whether the model has a temperature and a bias.
        loss = content.settings.get("loss.name")
        model = dual_encoder.create_model(config, LossConfig(name=loss) if loss else None)
        weights_of_files.load_weights(model, content, adapt=adapt, projections=projections)
    size = model.geometry.image_size
    # Where the tokenizer of a Hugging Face folder is, and whether one may be fetched.
    config.weights.path, config.weights.download = None if weights is None else str(weights), download

    # The same crop and statistics as in evaluation (egohod/evaluation), so that features are the same.
    def preprocess(frames: np.ndarray) -> Tensor:
        return normalise(center_crop(frames, size).unsqueeze(0), model.image_stats)[0]

    # Evaluation mode: dropout and stochastic depth would make features random.
    return model.eval(), preprocess, tokenizer_for(config)


def load_clip(path: str | Path, start: float, end: float, frames: int, decoder: str = "auto") -> np.ndarray:
    """``frames`` pictures of [start, end) seconds of a video file, one from the middle of each equal part.

    Returns uint8 RGB [frames, H, W, 3], upright. A clip that runs beyond the video's end is cut there.

    Raises:
        UserError: an empty or negative stretch of time, or no frames.
        VideoError: no such file, not a video, damaged, or a clip that begins beyond its end.
    """
    if not 0 <= start < end or frames < 1:
        raise UserError(f"{path}: a clip needs 0 <= start < end and a frame, not {start}, {end} and {frames}")
    return read_clip(choose_decoder(decoder)[1], Path(path), str(path), start, end, frames).pictures


def embed(
    paths: Sequence[str | Path | tuple[str | Path, float, float]],
    sentences: Sequence[str] | None = None,
    *,
    model: str | Path | tuple[DualEncoder, Preprocess, Tokenizer],
    frames: int | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: str | None = None,
    allow_missing: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Features of clips and sentences, decoded and encoded in batches: ``clips @ sentences.T`` are their cosines.

    Args:
        paths: video files, or (file, start, end) in seconds for a part of one. Files may be of fsspec (``s3://...``).
        sentences: texts to embed too.
        model: what :func:`create_model_and_transforms` returns, or weights that say what model they are of, such as
            ``hf-hub:org/name`` or a run folder; never the name of a model, whose weights would be random.
        frames: of each clip, None for the model's number.
        batch_size: clips encoded at a time.
        workers: decoding processes; None chooses by the cores, 0 decodes in this one.
        device: ``cpu``, ``cuda`` or ``mps``; None is where ``model`` is, or a GPU if it is a name and there is one.
        allow_missing: give rows of NaN for clips that cannot be read.

    Returns:
        Two arrays float32 of unit vectors, [len(paths), D] and [len(sentences), D], in the order of the arguments.

    Raises:
        UserError: clips that cannot be read, all of which are named; weights as of :func:`create_model_and_transforms`;
            a single path or sentence instead of a list.
    """
    if isinstance(paths, (str, Path)) or isinstance(sentences, str):
        raise UserError("embed: paths and sentences are lists, even of one")
    if device not in (None, "cpu", "cuda", "mps") or (frames is not None and frames < 1):
        raise UserError(f"embed: device={device}, frames={frames}: device is cpu, cuda or mps, frames at least 1")
    if isinstance(model, tuple):
        loaded = model
    elif str(model).startswith(hub.PREFIX):
        loaded = create_model_and_transforms(str(model))
    elif Path(model).exists():
        # As a path, since a folder may be called like a model.
        loaded = create_model_and_transforms(os.path.abspath(model))
    else:
        raise UserError(f"embed: model={model}: no such weights; give a run folder, a file or {hub.PREFIX}org/name")
    encoder, tokenizer = loaded[0], loaded[2]
    place = (
        encoder.logit_scale.device
        if loaded is model and device is None
        else pick_device(device or "auto", inference=True)
    )
    encoder.to(place)
    cfg = Config()
    cfg.evaluate.batch_size, cfg.data.workers = batch_size, workers
    # All that cannot be read is reported together below, in words for callers of a function.
    run = dataclasses.replace(execution_of(cfg, Distributed(0, 1, place, None)), allow_missing=True)
    faults: dict[int, str] = {}
    # A folder of videos is one source of a dataset, whose clips come source by source.
    rows_of: dict[str, list[tuple[int, str, float, float]]] = {}
    for row, each in enumerate(paths):
        path, start, end = (each, 0.0, math.inf) if isinstance(each, (str, Path)) else each
        # An address may be signed, or hold a password.
        shown = f"paths[{row}]" if "://" in str(path) else path
        folder, slash, file = str(path).rpartition("/")
        stem, ending = os.path.splitext(file)
        # A dataset knows videos without their endings, and takes the first that there is.
        local = [] if "://" in folder else [other for other in ENDINGS if Path(folder or slash, stem + other).is_file()]
        if not 0 <= start < end:  # false for NaN, too
            faults[row] = f"{shown}: a clip needs 0 <= start < end, not {start} and {end}"
        elif ending not in ENDINGS:
            faults[row] = f"{shown}: not a video by its ending, which must be one of {', '.join(VIDEO_ENDINGS)}"
        elif "://" not in folder and ending not in local:
            faults[row] = f"{path}: no such file"
        elif "://" not in folder and ending != local[0]:
            faults[row] = f"{path}: {stem}{local[0]} is there as well; rename one"
        else:
            rows_of.setdefault(folder or slash or ".", []).append((row, stem, start, end))
    clips = np.full((len(paths), encoder.geometry.embed_dim), np.nan, np.float32)
    if rows_of and (allow_missing or not faults):
        sources = []
        for folder, members in rows_of.items():
            _, stems, starts, ends = zip(*members, strict=True)
            table = ClipTable.of(Path(folder), stems, starts, ends, uid=stems)
            # Short clips are not widened: who asks for half a second gets half a second.
            sources.append((table, SourceConfig(root=folder, layout="whole", min_clip_seconds=0.0)))
        protocol = EvalProtocol("features", "this project: one centre crop", frames=frames or encoder.num_frames)
        dataset = ClipDataset(sources, protocol=protocol, size=encoder.geometry.image_size)
        order = [row for members in rows_of.values() for row, *_ in members]
        try:
            features, report = embed_clips(encoder, dataset, run)
            clips[order], unread = features[PLAIN].numpy(), report.faults
        except UnreadableError as error:  # not a single one can be read
            unread = dict(error.faults)
        faults |= {order[index]: text for index, text in unread.items()}
    if faults and not allow_missing:
        lines = dict.fromkeys(faults[row] for row in sorted(faults))
        raise UserError(
            *lines, f"{len(faults)} of {len(paths)} clips cannot be read; allow_missing=True leaves them NaN"
        )
    texts = np.zeros((0, clips.shape[1]), np.float32)
    if sentences:
        texts = embed_texts(encoder, list(sentences), tokenizer, run).numpy()
    return clips, texts


# --------------------------------------------------------------------------------------------------
# Benchmarks: the readers, tasks, controls and report of main_eval.py, for any model
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """What an evaluation measured. ``first + second`` has the benchmarks of both, for one page of one model.

    Raises :class:`UserError` for results of two models, or of the same benchmark.
    """

    cfg: Config
    dist: Distributed
    evaluated: Sequence[tuple[Measured, BenchmarkResult]]
    checkpoint: dict[str, Any]

    def __add__(self, other: Results) -> Results:
        # The page has one checkpoint, and a benchmark once.
        if self.checkpoint != other.checkpoint:
            models = [f"{each['path']} ({each['sha256'][:12]})" for each in (self.checkpoint, other.checkpoint)]
            raise UserError(f"results of {' and '.join(models)} cannot be joined: a page is of one model")
        if twice := {bench.name for bench, _ in self.evaluated} & {bench.name for bench, _ in other.evaluated}:
            raise UserError(
                f"both results have the benchmark {min(twice)}; load one of them by another name, with kind="
            )
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
            cache: folder of features by weights, clip and protocol; None keeps none. Of modules only, which are
                known by their weights and ``repr``: with other settings beside these, take another folder.
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
        elif isinstance(model, DualEncoder) and tokenizer is None:
            raise UserError(
                f"{type(model).__name__} reads tokens: give tokenizer=, the last that "
                "egohod.create_model_and_transforms returns"
            )
        elif tokenizer is None and not isinstance(model, (SentenceModel, StoredFeatures)):
            model = SentenceModel(model)
        elif not isinstance(model, nn.Module) or not isinstance(model, VideoTextModel):
            raise UserError(
                f"{type(model).__name__}: a model that is given with its tokenizer must be a torch.nn.Module with "
                "encode_video and encode_text"
            )
        cfg = Config()
        cfg.evaluate.batch_size, cfg.evaluate.num_frames, cfg.evaluate.cache = batch_size, num_frames, None
        if isinstance(model, StoredFeatures):
            cfg.evaluate.num_frames = model.frames
        cfg.evaluate.benchmarks = {self.name: self.config}
        if workers is not None:
            cfg.data.workers = workers
        cfg.model.name = str(spec or type(getattr(model, "inner", model)).__name__)
        if dist is None:
            device = next((each.device for each in model.parameters()), torch.device("cpu"))
            dist = Distributed(0, 1, device, None)
        weights = fingerprint(model)
        # What has no weights has nothing by which another model's features could be told apart.
        cached = cache is not None and bool(model.state_dict())
        execution = dataclasses.replace(
            execution_of(cfg, dist),
            cache=Path(cache) if cache is not None and cached else None,
            identity={"weights": identity_of(model), "model": cfg.model.name},
            allow_missing=allow_missing,
        )
        bench = measured(
            cfg,
            self.name,
            self.config,
            execution,
            size=model.geometry.image_size if hasattr(model, "geometry") else getattr(model, "size", 224),
            tokenizer=tokenizer or model.tokenizer,
            controls=list(controls),
            need_videos=not isinstance(model, StoredFeatures),
        )
        return Results(cfg, dist, [(bench, bench.measure(model))], {"path": cfg.model.name, "sha256": weights})


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
    allowed = {each.name for each in dataclasses.fields(BenchmarkConfig)}
    for key in settings:
        if key not in allowed:
            raise UserError(f"load_benchmark: no setting '{key}'{nearest(key, sorted(allowed))}")
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
    # The prompts of classes are the protocol's.
    _, data = read_benchmark(kind, config, protocol_for(protocol, kind).prompts)
    return LoadedBenchmark(name, config, data)
