"""Every knob of EgoHOD: one dataclass per part, a reason beside each default.

A run is described by one YAML file, read by :func:`load`:

* ``_base_: other.yml`` (or a list) merges other files first, relative to the file that names them;
* ``${a.b}`` refers to another key and ``${oc.env:EGO4D_ROOT}`` to an environment variable;
* ``a.b=c`` on the command line overrides both.

A value is what its knob declares, never what YAML guesses: ``2024_01_01``, ``0123``, ``12:30:45``, ``on`` and ``1e3``
are text where the knob is text, in files and on the command line alike. Only ``null``, ``~`` and nothing at all are
the absent value; quoted (``'null'``) they are words too.

Whatever is wrong (unknown key, wrong type, value out of range, missing file) ends in one
:class:`ConfigError` that names the file, the key, what is allowed and the nearest right name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Schema = typing.TypeVar("Schema")

PROJECT = Path(__file__).resolve().parents[1]
"""The checkout, whose configs/ hold the programs' defaults."""


# A message stays readable whatever it quotes: what is longer is cut, words first (a path is rarely so long).
_LONGEST_WORD, _LONGEST_LINE = 250, 1000


class UserError(ValueError):
    """Something the user can mend. Commands print it as one line and exit with code 2.

    Each argument is one line of the message: several are several problems. Messages quote files, which may hold
    anything, so what no terminal shows (line breaks, escape codes, halves of characters) is spelled out and what is too
    long is cut here, at the one place that all messages pass.
    """

    def __str__(self) -> str:
        return "\n".join(_message_line(str(line)) for line in self.args)


class ConfigError(UserError):
    """A configuration that cannot be used."""


def knob(
    default: Any,
    why: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its reason and its range.

    ``choices`` lists the allowed values; ``low``/``high`` are inclusive bounds, ``above`` an exclusive one.
    """
    metadata = {"why": why, "choices": choices, "low": low, "high": high, "above": above}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def part(cls: type) -> Any:
    """A nested section."""
    return field(default_factory=cls)


# --------------------------------------------------------------------------------------------------
# The schema
# --------------------------------------------------------------------------------------------------


class ImageStats(NamedTuple):
    """What pixels are normalised with: mean and standard deviation of R, G and B in 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_STATS = {
    "clip": ImageStats((0.48145466, 0.4578275, 0.40821073), _CLIP_STD),
    # LaViLa's code, and AVION's after it, has 108.3272985 of 255 for red where OpenAI's 0.48145466 is 122.77.
    "avion": ImageStats((108.3272985 / 255, 0.4578275, 0.40821073), _CLIP_STD),
    "imagenet": ImageStats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass
class WeightsConfig:
    """Where training starts from."""

    source: str = knob(
        "scratch",
        "one explicit choice: random weights; an image-text model of OpenAI or open_clip (clip); or a trained video "
        "model of this project, upstream EgoHOD or AVION (checkpoint). docs/checkpoints.md",
        choices=("scratch", "clip", "checkpoint"),
    )
    path: str | None = knob(
        None, "a file, a run or checkpoint folder, or an open_clip tag such as ViT-B-16:laion2b_s34b_b88k"
    )
    base: str | None = knob(
        None,
        "where the file lies that a small checkpoint (train.trainable other than all) was started from; null is where "
        "it lay then",
    )
    adapt: bool = knob(
        False,
        "resize position embeddings to this model's frames, patches and text length, and start parts anew that the "
        "file does not have (motion adapters) or has for other classes (heads); false makes each of these an error",
    )
    projections: str = knob(
        "auto",
        "both output projections and the temperature: fresh, as the published recipe starts from CLIP, or keep; auto "
        "is fresh for clip and keep for checkpoint",
        choices=("auto", "fresh", "keep"),
    )
    download: bool = knob(
        False, "let open_clip download what a tag names; false looks at its local cache only, nothing is downloaded"
    )


@dataclass
class FastPathConfig:
    """The two paths of a ..._Slowfast model; other models have one and ignore this."""

    slow_frames: int = knob(4, "frames of the slow path, taken evenly from model.num_frames", low=1)
    position: str = knob(
        "before",
        "where a motion adapter stands: before its block, whose attention then reads it, or after, as published",
        choices=("before", "after"),
    )
    pool: str = knob(
        "cls",
        "what the fast path projects: CLS, the mean of the patch tokens, or the mean of both; published is cls, "
        "which with position=after leaves the last adapter without effect",
        choices=("cls", "mean", "both"),
    )
    spatial: bool = knob(False, "a 3x3 convolution over each frame in front of the temporal one")


@dataclass
class ModelConfig:
    """The dual encoder: a space-time ViT and a causal text transformer."""

    name: str = knob(
        "CLIP_VITB16",
        "geometry, see egohod/model/zoo.py; ..._Slowfast has a fast path with motion adapters",
        choices=(
            *("CLIP_VITB16", "CLIP_VITL14", "CLIP_VITL14_336PX", "DEMO", "DEMO_SMALL"),
            *("CLIP_VITB16_Slowfast", "CLIP_VITL14_Slowfast", "CLIP_VITL14_336PX_Slowfast"),
            *("DEMO_Slowfast", "DEMO_SMALL_Slowfast"),
        ),
    )
    num_frames: int = knob(4, "frames per clip; the released models train on 4, slow-fast ones on 16", low=1)
    fast: FastPathConfig = part(FastPathConfig)
    embed_dim: int | None = knob(
        None, "dimensions of the shared space; null is the geometry's, AVION's released models have 256", low=1
    )
    activation: str = knob(
        "gelu",
        "upstream and AVION checkpoints expect erf GELU, although OpenAI trained CLIP with quick_gelu",
        choices=("gelu", "quick_gelu"),
    )
    image_stats: str = knob(
        "clip",
        "mean and standard deviation that the weights expect of pixels; they are saved with the weights. clip: "
        "OpenAI's, as upstream trains; avion: AVION's and LaViLa's, whose red mean is 0.21 deviations lower; imagenet",
        choices=tuple(IMAGE_STATS),
    )
    temporal_init: str = knob(
        "zeros",
        "zeros is the published start; sinusoidal lets a short training from scratch learn frame order",
        choices=("zeros", "sinusoidal"),
    )
    spatial_init: str = knob(
        "random",
        "random is CLIP's start; sinusoidal lets a short training from scratch learn where things are",
        choices=("random", "sinusoidal"),
    )
    sinusoid_scale: float = knob(0.5, "amplitude of sinusoidal embeddings", above=0)
    patch_dropout: float = knob(
        0.0, "share of patch tokens left out while training; saves memory at some accuracy", low=0, high=0.95
    )
    patch_dropout_tubes: bool = knob(
        False, "leave out the same places in all frames, so that the motion in the others stays whole"
    )
    drop_path: float = knob(0.0, "stochastic depth of the last vision block, growing linearly from 0", low=0, high=0.95)
    heads: str = knob(
        "none",
        "classification heads on the clip's feature in the shared space: one for all classes (joint) or one for each "
        "of data.labels.columns, such as verb and noun (parts); none for pretraining and retrieval",
        choices=("none", "joint", "parts"),
    )
    head_start: str = knob(
        "random",
        "the heads' first weights: random, or text, the features of each class's training narrations, with which they "
        "begin as good as zero-shot",
        choices=("random", "text"),
    )
    head_dropout: float = knob(0.0, "dropout in front of the heads; AVION fine-tunes with 0.5", low=0, high=0.95)
    gradient_checkpointing: bool = knob(
        False, "recompute blocks in the backward pass: far less memory for about a third more time"
    )
    compile: bool = knob(False, "torch.compile both towers; pays off on GPUs, 3-6 % on CPUs")
    weights: WeightsConfig = part(WeightsConfig)


@dataclass
class HardNegativesConfig:
    """Batches in which some clips differ only in the motion."""

    share: float = knob(
        0.0, "share of each batch filled with groups of alike clips; 0 is the plain sampler", low=0, high=1
    )
    group_by: list[str] = knob(
        ["video"],
        "what alike clips have in common: video (the same scene), window (the same time window of a video) "
        "or any column of the annotation file",
    )
    group_size: int = knob(4, "alike clips that are put in a batch together", low=2)
    window_seconds: float = knob(60.0, "length of a time window", above=0)


@dataclass
class SourceConfig:
    """One annotation file and the videos it speaks of; NAME is yours to choose."""

    metadata: str = knob("", "annotation file")
    format: str = knob(
        "auto",
        "hod: csv with video_id,start_second,end_second,text (or caption); egoclip: EgoClip's table; ego4d: "
        "narration.json; pickle: list of (video, start, end, text) as LaViLa and AVION release; ek100, egtea, "
        "charades: these benchmarks' files; labels: csv with video,start,end,label; auto looks at the file",
        choices=("auto", "hod", "egoclip", "ego4d", "pickle", "ek100", "egtea", "charades", "labels"),
    )
    columns: dict[str, str] = knob(
        {}, "what this file calls the columns of its format, e.g. {video_id: vid, text: sentence}"
    )
    clip_rule: str = knob(
        "egoclip",
        "ego4d: how long a narrated moment lasts. egoclip: mean spacing of the video's narrations over that of all "
        "videos, as published; neighbours: spacing to the neighbours over the video's mean",
        choices=("egoclip", "neighbours"),
    )
    exclude: str | None = knob(None, "csv of clips to leave out, as tools/verify_dataset.py writes it")
    weight: float | None = knob(
        None,
        "share of every batch relative to the other sources' weights, set for all or none; 0 leaves the source out; "
        "null: all clips are drawn alike",
        low=0,
    )
    root: str = knob("", "folder of the videos, or an fsspec URI such as s3://bucket/prefix")
    dataset_roots: dict[str, str] = knob(
        {}, "folders for rows whose dataset column says so, e.g. {ego4d: /data/ego4d}; all others use root"
    )
    layout: str = knob(
        "auto",
        "chunks is root/<video>/<0000>.mp4, avion is root/<video>.mp4/<start second>.mp4, whole is root/<video>.mp4; "
        "auto looks at what is there",
        choices=("auto", "chunks", "avion", "whole"),
    )
    chunk_seconds: float = knob(15.0, "length of a chunk; upstream's Ego4D and HowTo100M chunks have 15 s", above=0)
    min_clip_seconds: float | None = knob(
        None,
        "a shorter clip is widened to this; null: to 1 in chunks, as upstream does, and not at all in whole files; 0: "
        "never",
        low=0,
    )
    detections: str | None = knob(
        None,
        "hands and objects in these videos for loss.boxes: a parquet file, or a folder of them, in the schema of "
        "egohod/data/detections.py (EPIC-KITCHENS' one)",
    )
    list_text: str = knob(
        "random",
        "what to do with several narrations of one clip: draw one, join all with '. ' as upstream does, or take the "
        "first",
        choices=("random", "concat", "first"),
    )


@dataclass
class LabelsConfig:
    """What training clips are matched with: their own narration, a relevant text, or a class."""

    target: str = knob(
        "narration",
        "narration: what is said of the clip itself (pretraining); relevancy: a text drawn among all that are relevant "
        "by the classes of verb and nouns; class: the classes of model.heads",
        choices=("narration", "relevancy", "class"),
    )
    threshold: float = knob(
        0.1, "relevancy: a text above it may be drawn for a clip (EPIC-KITCHENS MIR)", low=0, high=1
    )
    sentences: str | None = knob(
        None,
        "relevancy: csv of the texts to draw from (EPIC_100_retrieval_train_sentence.csv); null takes the distinct "
        "narrations of the clips",
    )
    columns: list[str] = knob(
        ["label"], "class: the columns whose values together are a clip's class, such as verb_class and noun_class"
    )
    classes: list[str] = knob(
        [], "class: further annotation files that name classes, such as EPIC_100_validation.csv and actions.csv"
    )


@dataclass
class DataConfig:
    """From an annotation row to a batch of uint8 clips."""

    train: dict[str, SourceConfig] = knob({}, "sources of clips by name")
    labels: LabelsConfig = part(LabelsConfig)
    strict: bool = knob(False, "stop at the first unusable annotation row; false leaves it out and counts it")
    decoder: str = knob(
        "auto",
        "auto takes the fastest that loads (pyav, then torchcodec, then decord) and says which",
        choices=("auto", "torchcodec", "pyav", "decord"),
    )
    cache: str | None = knob(
        None, "folder on a local disk that keeps files of remote roots (those up to 64 MB); null keeps none"
    )
    cache_gb: float = knob(50.0, "size of data.cache in GB (1e9 bytes); what was used longest ago goes first", above=0)
    workers: int = knob(8, "decoding processes per training process; 0 decodes in the training process", low=0)
    prefetch: int = knob(2, "batches each worker holds ready", low=1)
    timeout: float = knob(
        900.0,
        "seconds without a batch from the workers after which a run ends, as on a file system that hangs; longer than "
        "a batch ever takes to decode",
        above=0,
    )
    pin_memory: bool = knob(
        True, "page-locked batches, so that the copy to a GPU overlaps with computing; ignored on CPU"
    )
    crop_scale_min: float = knob(
        0.5, "smallest share of the picture a training crop keeps (upstream: 0.5)", above=0, high=1
    )
    flip: float = knob(
        0.5, "probability of a horizontal flip; left and right change places in the caption too", low=0, high=1
    )
    max_bad_fraction: float = knob(
        0.01, "stop when more than this share of the clips asked for could not be read", low=0, high=1
    )
    hard_negatives: HardNegativesConfig = part(HardNegativesConfig)


# Losses that need to know how relevant each text is to each clip.
MARGIN_LOSSES = ("max_margin", "adaptive_max_margin", "sms")
RELEVANCY_LOSSES = (*MARGIN_LOSSES, "soft_infonce")


@dataclass
class LossConfig:
    """Clips against narrations, over all processes."""

    name: str = knob(
        "infonce",
        "infonce: symmetric cross-entropy over the batch, the published recipe; sigmoid: every pair judged by itself "
        "(SigLIP), less sensitive to the batch size. For data.labels.target=relevancy: max_margin (AVION), "
        "adaptive_max_margin (EgoVLP), sms (best known on EK100-MIR), soft_infonce; docs/finetuning.md. "
        "For data.labels.target=class: classes, cross-entropy of the heads",
        choices=("infonce", "sigmoid", *RELEVANCY_LOSSES, "classes"),
    )
    margin: float | None = knob(
        None,
        "of the three losses with a margin, in cosines; null is what their sources use: 0.2 for max_margin, 0.4 for "
        "adaptive_max_margin, 0.6 for sms",
        above=0,
    )
    tau: float = knob(0.1, "sms: by how much two equally relevant items may differ, in cosines; its source's", low=0)
    label_smoothing: float = knob(
        0.0,
        "classes: share of a label that all classes have in equal parts; AVION fine-tunes with 0.1",
        low=0,
        high=0.9,
    )
    local_loss: bool = knob(
        True, "infonce: each process computes its own rows only: exact and cheapest together with gather_with_grad"
    )
    gather_with_grad: bool = knob(
        True, "gradients flow to the features of other processes; False with local_loss is biased and refused"
    )
    temperature: float = knob(0.07, "start (and, if not learned, the fixed value) of the softmax temperature", above=0)
    learn_temperature: bool = knob(False, "upstream keeps 0.07; the margin losses and heads have no temperature")
    bias: float = knob(-10.0, "sigmoid: start of the learned offset of all similarities, SigLIP's")
    max_logit_scale: float = knob(100.0, "a learned 1/temperature is clamped here, as in CLIP", above=0)
    boxes: float = knob(
        0.0,
        "weight of an auxiliary loss: boxes of hands and active object in every frame, read off the patch tokens (the "
        "fast path's, if there is one); needs data.train.NAME.detections; 0 leaves it out, as published",
        low=0,
    )


@dataclass
class TrainConfig:
    """The run and its optimisation."""

    output: str = knob("runs/pretrain", "run folder: checkpoints, metrics.jsonl, TensorBoard, environment.json")
    duration: str = knob("15 epochs", "length of the run in steps, epochs or samples")
    global_batch_size: int = knob(2048, "clips per optimisation step over all processes (upstream: 128 x 16)", low=1)
    max_batch_per_process: int | None = knob(
        None,
        "clips a process holds at a time; the rest is accumulated, the loss unchanged; null takes what fits the memory",
        low=1,
    )
    trainable: str = knob(
        "all",
        "what learns: adapters is the motion adapters, the temporal embedding and the projections of a slow-fast "
        "model; last_blocks the last train.last_blocks blocks of the vision tower and what follows; vision all but the "
        "text tower; heads the classification heads alone",
        choices=("all", "adapters", "last_blocks", "vision", "heads"),
    )
    last_blocks: int = knob(4, "for train.trainable=last_blocks", low=1)
    optimizer: str = knob("adamw", "adamw; sgd as AVION fine-tunes for classes", choices=("adamw", "sgd"))
    momentum: float = knob(0.9, "SGD's", low=0, high=0.999)
    layer_decay: float = knob(
        1.0,
        "each block of the vision tower learns at this share of the rate of the one after it; 1: all alike",
        above=0,
        high=1,
    )
    mixup: float = knob(0.0, "classes: mixup's alpha; AVION fine-tunes with 0.8; 0 mixes no clips", low=0)
    cutmix: float = knob(
        0.0, "classes: cutmix's alpha; AVION fine-tunes with 1.0; with mixup, one of both by turns", low=0
    )
    ema: float = knob(
        0.0,
        "moving average of the weights, by its decay per step, to which it rises in the first steps (timm's warm-up); "
        "it is what is evaluated and saved; 0 keeps none",
        low=0,
        high=0.99999,
    )
    lr: float = knob(4e-5, "upstream's base recipe at a global batch of 2,048", above=0)
    lr_reference_batch: int | None = knob(
        None,
        "clips a step that lr, lr_start and lr_end are meant for: they are multiplied by global_batch_size over this, "
        "as AVION does for classes (128); null takes them as they are",
        low=1,
    )
    betas: list[float] = knob([0.9, 0.999], "AdamW's averages")
    eps: float = knob(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = knob(
        0.01, "upstream's; none on biases, norms and other tensors of one dimension or less", low=0
    )
    decay_positions: bool = knob(
        True,
        "weight decay on the positional embeddings of both towers, as upstream pretrains; false, as AVION fine-tunes, "
        "leaves them out (the temporal embedding is decayed by both)",
    )
    schedule: str = knob(
        "constant", "upstream trains at a constant rate; cosine falls to lr_end", choices=("constant", "cosine")
    )
    warmup: str = knob("0 steps", "linear warm-up from lr_start, in steps, epochs or samples")
    lr_start: float = knob(1e-6, "rate at the start of the warm-up", low=0)
    lr_end: float = knob(1e-5, "rate at the end of the cosine", low=0)
    clip_norm: float | None = knob(None, "largest gradient norm; upstream does not clip", above=0)
    device: str = knob(
        "auto", "auto is the GPU if there is one; cpu never looks for one", choices=("auto", "cpu", "cuda")
    )
    precision: str = knob(
        "auto",
        "auto is bf16 where the hardware computes it fast, fp32 elsewhere; fp16 uses a loss scaler; fp32 multiplies in "
        "TF32 on GPUs that have it",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    seed: int = knob(0, "everything random follows from it", low=0, high=2**63 - 1)
    resume: str = knob(
        "auto",
        "auto goes on from the run folder's newest good checkpoint, none starts anew, else the path of a checkpoint",
    )
    peer_timeout: float = knob(
        120.0,
        "seconds after which a process that says nothing counts as dead and ends the run; longer than the file system "
        "ever stands still. A process that is killed is noticed at once",
        low=1,
    )
    log_every: str = knob("10 steps", "how often metrics are written; between, nothing waits for the device")
    save_every: str = knob("1 epochs", "how often a checkpoint is written")
    keep_last: int = knob(2, "newest checkpoints kept", low=1)
    keep_best: int = knob(1, "best checkpoints kept, by evaluate.best", low=0)


PROTOCOL_NAMES = (
    *("clean", "whole_clip", "upstream", "upstream_4", "upstream_egtea"),
    *("avion", "lavila", "lavila_10x3"),
)


@dataclass
class BenchmarkConfig:
    """A benchmark of main_eval.py and where its data lies; NAME is one of the known ones or yours to choose."""

    kind: str = knob(
        "auto",
        "how the annotations are read, docs/evaluation.md; auto is what NAME says, and own for any other name",
        choices=("auto", "own", "labels", "ek100_mir", "ek100_cls", "egtea", "egomcq", "charades_ego"),
    )
    metadata: str | None = knob(None, "folder of the benchmark's annotation files; for own, the csv of its clips")
    root: str | None = knob(None, "folder of its videos, or an fsspec URI")
    columns: dict[str, str] = knob({}, "labels: as data.train.NAME.columns")
    layout: str = knob("auto", "as data.train.NAME.layout", choices=("auto", "chunks", "avion", "whole"))
    chunk_seconds: float = knob(15.0, "length of a chunk", above=0)
    min_clip_seconds: float | None = knob(
        None,
        "a shorter clip is widened to this; null is what the protocol's source does: upstream's and ours widen to 1 in "
        "chunks, no other, and no one in whole files; 0: never",
        low=0,
    )
    test_split: int | None = knob(
        None,
        "egtea: the only split to test, as a model fine-tuned on its training part needs; null is all",
        low=1,
        high=3,
    )
    protocol: str = knob(
        "auto",
        "frames, resizing, views and class prompts by name, docs/evaluation.md; auto is evaluate.protocol",
        choices=("auto", *PROTOCOL_NAMES),
    )


@dataclass
class EvaluateConfig:
    """Held-out evaluation during and after training."""

    every: str = knob("1 epochs", "how often the val set is evaluated while training")
    demo_val: str | None = knob(None, "folder of the demo world used for tuning and for choosing the best checkpoint")
    demo_test: str | None = knob(
        None, "folder of the demo world that is opened once, at the end, for the reported table"
    )
    batch_size: int = knob(32, "clips encoded at a time", low=1)
    best: str = knob("val/choice_across_clips", "metric that keep_best ranks by (higher is better)")
    benchmarks: dict[str, BenchmarkConfig] = knob({}, "what main_eval.py --benchmark can be asked for")
    protocol: str = knob(
        "auto",
        "of the benchmarks that name none: upstream, avion or lavila reproduces that project's numbers; auto is this "
        "project's own, whole_clip for egtea and clean for others",
        choices=("auto", *PROTOCOL_NAMES),
    )
    during: list[str] = knob([], "benchmarks of evaluate.benchmarks that are measured while training, as demo_val is")
    final: list[str] = knob([], "benchmarks that are measured once, when training is done, as demo_test is")
    num_frames: int | None = knob(None, "frames a benchmark shows of each clip; null is the protocol's number", low=1)
    precision: str = knob(
        "fp32",
        "autocast type of features, as train.precision; fp32 makes numbers independent of batches and processes, and "
        "here never multiplies in TF32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    cache: str | None = knob(
        "features", "folder in which main_eval.py keeps features, by checkpoint, clip and protocol; null keeps none"
    )
    controls: list[str] = knob(
        [],
        "temporal controls of the final evaluation, each the same clips with their time destroyed: shuffle puts the "
        "frames of a clip in a fixed random order, reverse plays them backwards, freeze repeats the middle one",
        choices=("shuffle", "reverse", "freeze"),
    )


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = part(ModelConfig)
    data: DataConfig = part(DataConfig)
    loss: LossConfig = part(LossConfig)
    train: TrainConfig = part(TrainConfig)
    evaluate: EvaluateConfig = part(EvaluateConfig)


# --------------------------------------------------------------------------------------------------
# Durations
# --------------------------------------------------------------------------------------------------

_ENVIRONMENT = re.compile(r"\$\{oc\.env:(\w+)\}")
_DURATION = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(step|epoch|sample)s?\s*$", re.IGNORECASE)


def duration_in_steps(text: str, *, steps_per_epoch: int, global_batch_size: int, key: str = "duration") -> int:
    """Number of optimisation steps in ``"500 steps"``, ``"1.5 epochs"`` or ``"4e6 samples"``.

    Anything above zero counts as at least one step. Raises :class:`ConfigError` naming ``key``.
    """
    match = _DURATION.match(text)
    if not match:
        raise ConfigError(f"{key}: '{text}' is not a duration; write e.g. '500 steps', '1.5 epochs' or '4e6 samples'")
    amount, unit = float(match.group(1)), match.group(2).lower()
    if not math.isfinite(amount):
        raise ConfigError(f"{key}: '{text}' is too long")
    steps = amount * {"step": 1.0, "epoch": float(steps_per_epoch), "sample": 1.0 / global_batch_size}[unit]
    return max(1, round(steps)) if steps > 0 else 0


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def knobs(
    tree: Any = None, schema: type = Config, prefix: str = ""
) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """All leaf fields under ``schema`` as (dotted name, field, type), in order.

    Sections that a user names himself (``data.train.NAME``) are those of ``tree``, a nested dict; without one they
    appear once, as NAME.
    """
    hints = typing.get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        name, kind = f"{prefix}{entry.name}", hints[entry.name]
        inner = None if tree is None else tree[entry.name]
        if section := _section(kind):
            yield from knobs(inner, section, f"{name}.")
        elif named := _named_sections(kind):
            for key in ["NAME"] if inner is None else inner:
                yield from knobs(None if inner is None else inner[key], named, f"{name}.{key}.")
        else:
            yield name, entry, kind


def _section(kind: Any) -> type | None:
    """The dataclass of a section."""
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _named_sections(kind: Any) -> type | None:
    """The dataclass of sections whose names the user chooses."""
    return _section(get_args(kind)[1]) if get_origin(kind) is dict else None


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with its bases, apply ``a.b=c`` overrides and check everything.

    Raises :class:`ConfigError` with one line per problem: file (or override), key, what is allowed.
    """
    return load_as(Config, path, overrides, check)


def load_as(
    schema: type[Schema],
    path: str | Path,
    overrides: Sequence[str],
    check: Callable[[Schema], list[tuple[str, str]]],
) -> Schema:
    """As :func:`load`, for a dataclass of :func:`knob` fields other than :class:`Config`.

    ``check`` says what is wrong with values, as :func:`check` does.
    """
    config, problems = _load(schema, path, overrides, check)
    if problems:
        raise ConfigError(*problems)
    return config


def load_leniently(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """As :func:`load`, but environment variables that are not set are returned as a list of problems.

    For the dry run, which reports everything that is missing at once; the variable stays in its value as
    ``$NAME``. Raises :class:`ConfigError` for anything that is wrong rather than missing.
    """
    return _load(Config, path, overrides, check)


def _load(
    schema: type[Schema],
    path: str | Path,
    overrides: Sequence[str],
    check: Callable[[Schema], list[tuple[str, str]]],
) -> tuple[Schema, list[str]]:
    tree, origins = OmegaConf.structured(schema), {}
    for origin, layer in [*_layers(Path(path), ()), *(_override(text, schema) for text in overrides)]:
        tree = _merge(tree, layer, origin, schema)
        origins.update(dict.fromkeys(_leaves(layer), origin))
    problems = []
    raw = OmegaConf.to_container(tree)
    for name, _, _ in knobs(raw, schema):
        for key, text in _texts(name, _raw(raw, name)):
            for variable in _ENVIRONMENT.findall(text):
                if variable not in os.environ:
                    text = text.replace(f"${{oc.env:{variable}}}", f"${variable}")
                    try:
                        OmegaConf.update(tree, key, text)
                    except OmegaConfBaseException:  # a number or a switch: no text can stand in for it
                        raise ConfigError(
                            f"{origins.get(name, path)}: {key} needs the environment variable {variable}, not set"
                        ) from None
                    problems.append(
                        f"{origins.get(name, path)}: {key} needs the environment variable {variable}, "
                        f"which is not set; export {variable}=/your/path"
                    )
    config = _resolve(tree, str(path), schema)
    wrong = [f"{origins.get(name, path)}: {text}" for name, text in check(config)]
    if wrong:
        raise ConfigError(*problems, *wrong)
    return config, problems


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The model section from Python, checked like a file. Raises :class:`ConfigError`."""
    origin = "create_model"
    layer = {"model": {"name": name, **overrides}}
    config = _resolve(_merge(OmegaConf.structured(Config), layer, origin, Config), origin, Config)
    wrong = [f"{origin}: {text}" for _, text in check(config)]
    if wrong:
        raise ConfigError(*wrong)
    return config.model


def check(config: Config) -> list[tuple[str, str]]:
    """Everything that is out of range or contradicts itself, as (key, what is wrong with it)."""
    problems = out_of_range(config)
    tree = dataclasses.asdict(config)
    if config.loss.local_loss and not config.loss.gather_with_grad:
        problems.append(
            (
                "loss.gather_with_grad",
                "loss.local_loss=true needs loss.gather_with_grad=true: without it the gradient is biased "
                "(cosine 0.92 to the true one on two processes)",
            )
        )
    if config.model.fast.spatial and config.model.patch_dropout > 0:
        problems.append(
            ("model.fast.spatial", "model.fast.spatial=true looks at whole frames, so it needs model.patch_dropout=0")
        )
    for name in ("train.duration", "train.log_every", "train.save_every", "evaluate.every", "train.warmup"):
        text = _raw(tree, name)
        try:
            steps = duration_in_steps(text, steps_per_epoch=1, global_batch_size=1, key=name)
            if steps == 0 and name != "train.warmup":
                problems.append((name, f"{name} is '{text}', but must be longer than nothing"))
        except ConfigError as error:
            problems.append((name, str(error)))
    if config.evaluate.controls and config.model.num_frames < 2:
        problems.append(
            ("evaluate.controls", "evaluate.controls destroy the order of frames, but model.num_frames is 1")
        )
    if len(config.train.betas) != 2 or not all(0 <= beta < 1 for beta in config.train.betas):
        problems.append(
            ("train.betas", f"train.betas is {list(config.train.betas)}, but must be two numbers in [0, 1)")
        )
    if config.train.schedule == "cosine" and config.train.lr_end > config.train.lr:
        problems.append(
            (
                "train.lr_end",
                f"train.lr_end is {config.train.lr_end}, but a cosine falls: at most train.lr={config.train.lr}",
            )
        )
    if (config.loss.name in RELEVANCY_LOSSES) != (config.data.labels.target == "relevancy"):
        problems.append(
            (
                "loss.name",
                f"loss.name={config.loss.name} grades texts by relevancy, so it needs data.labels.target=relevancy"
                if config.loss.name in RELEVANCY_LOSSES
                else f"loss.name={config.loss.name} knows no relevancy; with data.labels.target=relevancy there are "
                + ", ".join(RELEVANCY_LOSSES),
            )
        )
    heads = config.model.heads != "none"
    classes = (heads, config.data.labels.target == "class", config.loss.name == "classes")
    if any(classes) and not all(classes):
        problems.append(
            ("model.heads", "model.heads=joint or parts, data.labels.target=class and loss.name=classes go together")
        )
    columns = [name.removesuffix("_class") for name in config.data.labels.columns]
    if not columns or len(set(columns)) < len(columns):
        what = "names a column twice" if columns else "is empty, but a class is told by at least one column"
        problems.append(("data.labels.columns", f"data.labels.columns={config.data.labels.columns} {what}"))
    elif len(columns) > 1 and "action" in columns:
        problems.append(
            (
                "data.labels.columns",
                "data.labels.columns: what all columns tell together is called action, so none of several can be; "
                "give that column another name",
            )
        )
    for knob_name in ("mixup", "cutmix"):
        if getattr(config.train, knob_name) and config.loss.name != "classes":
            problems.append((f"train.{knob_name}", f"train.{knob_name} mixes labels, so it needs loss.name=classes"))
    if heads and config.model.head_start == "text" and config.model.weights.source == "scratch":
        problems.append(
            ("model.head_start", "model.head_start=text needs a text tower that was trained; set model.weights")
        )
    if heads and config.loss.boxes:
        problems.append(("loss.boxes", "loss.boxes does not go with model.heads: a model with heads tells no boxes"))
    if config.train.trainable == "heads" and not heads:
        problems.append(("train.trainable", "train.trainable=heads needs heads to train; set model.heads"))
    for name in (*config.evaluate.during, *config.evaluate.final):
        if name not in config.evaluate.benchmarks:
            key = "evaluate.during" if name in config.evaluate.during else "evaluate.final"
            known = ", ".join(config.evaluate.benchmarks) or "none"
            problems.append((key, f"{key} names the benchmark '{name}', but evaluate.benchmarks has {known}"))
    measured = [*config.evaluate.during, *(["val"] if config.evaluate.demo_val else [])]
    if measured and config.evaluate.best.partition("/")[0] not in measured:
        problems.append(
            (
                "evaluate.best",
                f"evaluate.best={config.evaluate.best}: while training {' and '.join(measured)} is measured; set "
                f"evaluate.best={measured[0]}/METRIC",
            )
        )
    weighted = [source.weight is not None for source in config.data.train.values()]
    if any(weighted) and not all(weighted):
        name = f"data.train.{list(config.data.train)[weighted.index(False)]}.weight"
        problems.append((name, f"{name} is not set, but other sources have a weight; set it for all or for none"))
    if config.loss.boxes and config.data.train and not any(each.detections for each in config.data.train.values()):
        name = f"data.train.{next(iter(config.data.train))}.detections"
        problems.append((name, f"loss.boxes={config.loss.boxes} needs boxes to learn from; set {name}"))
    if config.model.weights.source != "scratch" and not config.model.weights.path:
        problems.append(
            ("model.weights.path", f"model.weights.source={config.model.weights.source} needs model.weights.path")
        )
    return problems


def out_of_range(config: Any) -> list[tuple[str, str]]:
    """Every knob of a dataclass of knobs whose value is not allowed, as (key, what is wrong with it)."""
    problems: list[tuple[str, str]] = []
    tree = dataclasses.asdict(config)
    for name, entry, _ in knobs(tree, type(config)):
        value = _raw(tree, name)
        wrong = None if value is None else _out_of_range(value, entry.metadata)
        if wrong:
            problems.append((name, f"{name} is {value!r}, but {wrong}"))
    return problems


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML; reading it back gives the same run."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def help_text(schema: type = Config) -> str:
    """Every knob with type, default, range and reason, one paragraph per section."""
    lines, section = [], None
    for name, entry, kind in knobs(None, schema):
        head = name.rpartition(".")[0]
        if head != section:
            section = head
            lines.append(f"\n{head or 'on top'}: {_section_doc(head, schema)}")
        factory = entry.default_factory
        default = entry.default if factory is dataclasses.MISSING else factory()
        allowed = _allowed(entry.metadata)
        lines.append(f"  {name}={_show(default)}  ({_type_name(kind)}{'; ' + allowed if allowed else ''})")
        lines.append(f"      {entry.metadata['why']}")
    return "\n".join(lines).lstrip("\n")


def _layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The file and its bases, the deepest base first."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: _base_ leads back to the file itself")
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.y*ml")], n=1, cutoff=0.5)
        if (PROJECT / path).is_file():
            near = [str(PROJECT / path)]
        raise ConfigError(f"{path}: no such config file" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        # Bytes, not text: PyYAML then recognises byte order marks and UTF-16.
        loaded = _parse_yaml(path.read_bytes())
    except Exception as error:  # PyYAML raises many kinds; each is the file's fault
        raise ConfigError(f"{path}: not readable as YAML: {_one_line(error)}") from error
    loaded = {} if loaded is None else loaded
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: a config must be a mapping of sections, such as 'train: ...'")
    bases = loaded.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: _base_ must be the name of a config file, or a list of names")
    below: list[tuple[str, dict[str, Any]]] = []
    for base in bases:
        below += _layers(path.parent / base, (*seen, path.resolve()))
    return [*below, (str(path), loaded)]


def _leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        yield f"{prefix}{key}"


def _raw(tree: Any, name: str) -> Any:
    """The value of a dotted key in a nested dict."""
    for key in name.split("."):
        tree = tree[key]
    return tree


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The strings in a knob's value, with their keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(f"{name}.{key}", inner)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _texts(f"{name}[{place}]", inner)
    elif isinstance(value, str):
        yield name, value


# No configuration is so large or so deep; aliases that hold themselves or each other are without end.
_MOST_VALUES, _DEEPEST = 100_000, 50


class _TextLoader(yaml.SafeLoader):
    """YAML without guesses: scalars stay as written, but for a plain null, and keys are text that occurs once."""

    # Of PyYAML's guesses only two are put back below: null, and the merge key "<<".
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's, of the class

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse keys that are no text or occur twice; here, because merge keys may repeat some later."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key.value}'", key.start_mark)
            seen.add(key.value)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[typing.Hashable, Any]:
        """As the base class, but a key is what is written: even null and quoted numbers are names."""
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def _construct_text(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    assert isinstance(node, yaml.ScalarNode)
    return node.value


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_TextLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])
for _tag in ("bool", "int", "float", "timestamp", "merge"):  # written out, as in "!!int 5", or "<<" that is no key
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_text)


def _parse_yaml(content: str | bytes) -> Any:
    """Nested dicts and lists of text and None. Raises yaml.YAMLError, or ValueError for what is without end."""
    tree = yaml.load(content, _TextLoader)
    values, levels = _size(tree, {})
    if values > _MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
    if levels > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    return tree


def _size(tree: Any, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """How many values and levels a tree has once its aliases are written out, infinitely many if one is within itself.

    ``known`` are the sizes by id: what a few lines of aliases of aliases stand for cannot be counted one by one.
    """
    if not isinstance(tree, (dict, list)):
        return 1, 0
    if id(tree) not in known:
        known[id(tree)] = math.inf, math.inf
        inside = [_size(each, known) for each in (tree.values() if isinstance(tree, dict) else tree)]
        known[id(tree)] = 1 + sum(values for values, _ in inside), 1 + max((levels for _, levels in inside), default=0)
    return known[id(tree)]


def _override(text: str, schema: type) -> tuple[str, dict[str, Any]]:
    name, equals, written = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", name) or name.count(".") > _DEEPEST:
        raise ConfigError(f"'{text}': overrides are written section.key=value, e.g. train.seed=1")
    keys = name.split(".")
    try:
        value = _text_value(written.strip()) if _is_text(_kind(schema, keys)) else _parse_yaml(written)
    except Exception as error:
        raise ConfigError(f"override '{text}': {_one_line(error)}") from error
    tree = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        tree = {key: tree}
    return f"override '{text}'", tree


def _text_value(written: str) -> str | None:
    """A text knob's value as the command line spells it: all of it, unless it is null or in quotes."""
    if written in ("null", "~"):
        return None
    if len(written) > 1 and written[0] == written[-1] and written[0] in "'\"":
        value = _parse_yaml(written)
        assert isinstance(value, str)
        return value
    return written


def _kind(schema: Any, keys: Sequence[str]) -> Any:
    """The declared type of a dotted key; None where the schema has no such key."""
    for key in keys:
        if section := _section(schema):
            schema = typing.get_type_hints(section).get(key)
        else:
            schema = get_args(schema)[1] if get_origin(schema) is dict else None
    return schema


def _is_text(kind: Any) -> bool:
    return kind is str or set(get_args(kind)) == {str, type(None)}


def _merge(tree: DictConfig, layer: dict[str, Any], origin: str, schema: type) -> DictConfig:
    unknown = _unknown(layer, schema, schema)
    if unknown:
        raise ConfigError(*(f"{origin}: {text}" for text in unknown))
    try:
        return typing.cast(DictConfig, OmegaConf.merge(tree, OmegaConf.create(layer)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {_explain(error, schema)}") from error


# It is a part of keys, which dots separate, and of file names.
_CHOSEN_NAME = re.compile(r"[\w -]+")


def _unknown(tree: Any, schema: type, whole: type, prefix: str = "") -> list[str]:
    """Keys that no section has; omegaconf would say so too, but without the nearest right name."""
    hints, problems = typing.get_type_hints(schema), []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            problems.append(f"unknown key '{name}'{_suggest(key, schema, whole, prefix)}")
            continue
        section, named = _section(hints[key]), _named_sections(hints[key])
        if section:
            problems += _unknown_in(value, section, whole, name)
        elif named and not isinstance(value, dict):
            problems.append(f"'{name}' holds sections with names of your choice, not a value")
        elif named:
            for chosen, inner in value.items():
                if not _CHOSEN_NAME.fullmatch(str(chosen)):
                    problems.append(f"'{name}' has the name '{chosen}'; use letters, digits, spaces, '-' and '_'")
                    continue
                problems += _unknown_in(inner, named, whole, f"{name}.{chosen}")
        else:
            problems += _misshapen(name, value, hints[key])
    return problems


def _misshapen(name: str, value: Any, kind: Any) -> Iterator[str]:
    """Sections and lists where a knob has none; omegaconf lets some of them pass, to fail elsewhere."""
    if isinstance(value, (dict, list)) and get_origin(kind) is not type(value):
        shapes = {list: "a list, such as [a, b]", dict: "a mapping, such as {a: b}"}
        shape = shapes.get(get_origin(kind), "one value")
        yield f"'{name}' is {shape}, not a {type(value).__name__}"
    elif isinstance(value, (dict, list)) and get_args(kind)[-1] is not Any:
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in inside:
            yield from _misshapen(
                f"{name}.{key}" if isinstance(value, dict) else f"{name}[{key}]", inner, get_args(kind)[-1]
            )


def _unknown_in(tree: Any, section: type, whole: type, name: str) -> list[str]:
    if isinstance(tree, dict):
        return _unknown(tree, section, whole, f"{name}.")
    keys = ", ".join(entry.name for entry in dataclasses.fields(section))
    return [f"'{name}' is a section with the keys {keys}, not a value"]


def _suggest(key: Any, schema: type, whole: type, prefix: str) -> str:
    """The nearest sibling, else the nearest knob anywhere."""
    siblings = [entry.name for entry in dataclasses.fields(schema)]
    everywhere = {full.rpartition(".")[2]: full for full, _, _ in knobs(None, whole)}
    exact = everywhere.get(str(key))
    near = difflib.get_close_matches(str(key), siblings, n=1, cutoff=0.75)
    far = difflib.get_close_matches(str(key), everywhere, n=1, cutoff=0.6)
    # A neighbour is the likelier slip, but 'train.lrr' may look like a knob of another section.
    best = prefix + near[0] if near else exact or (everywhere[far[0]] if far else None)
    return f"; did you mean '{best}'?" if best else f"; allowed here: {', '.join(siblings)}"


def _resolve(tree: DictConfig, origin: str, schema: type[Schema]) -> Schema:
    try:
        config = typing.cast(Schema, OmegaConf.to_object(tree))
        # Lists and mappings of values are not checked before.
        OmegaConf.structured(config)
        return config
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {_explain(error, schema)}") from error


def _explain(error: OmegaConfBaseException, schema: type) -> str:
    name = getattr(error, "full_key", None) or ""
    entry = next(
        ((e, k) for n, e, k in knobs(None, schema) if re.fullmatch(re.escape(n).replace("NAME", r"[^.]+"), name)), None
    )
    text = _one_line(error)
    if entry:
        allowed = _allowed(entry[0].metadata)
        if entry[1] is str and "None" in text:
            allowed = "null is no text; write 'null' in quotes for the word"
        text += f" (key {name}: {_type_name(entry[1])}{', ' + allowed if allowed else ''})"
    elif name:
        text += f" (key {name})"
    return text


def _out_of_range(value: Any, rule: Any) -> str | None:
    if isinstance(value, (list, ListConfig)):
        return next((wrong for each in value if (wrong := _out_of_range(each, rule))), None)
    if rule["choices"] is not None and value not in rule["choices"]:
        near = difflib.get_close_matches(str(value), [str(c) for c in rule["choices"]], n=1)
        return f"must be one of {', '.join(map(str, rule['choices']))}" + (f"; did you mean {near[0]}?" if near else "")
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    bad = (
        (rule["low"] is not None and value < rule["low"])
        or (rule["high"] is not None and value > rule["high"])
        or (rule["above"] is not None and value <= rule["above"])
    )
    return f"must be {_allowed(rule)}" if bad else None


def _allowed(rule: Any) -> str:
    if not rule:  # a field that is no knob
        return ""
    if rule["choices"] is not None:
        return "one of " + ", ".join(map(str, rule["choices"]))
    parts = []
    if rule["above"] is not None:
        parts.append(f"above {rule['above']}")
    if rule["low"] is not None:
        parts.append(f"at least {rule['low']}")
    if rule["high"] is not None:
        parts.append(f"at most {rule['high']}")
    return " and ".join(parts)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is not None and type(None) in get_args(kind):
        return " | ".join("null" if part is type(None) else _type_name(part) for part in get_args(kind))
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _section_doc(name: str, schema: Any) -> str:
    for key in filter(None, name.split(".")):
        schema = _named_sections(schema) or typing.get_type_hints(schema)[key]
    return (schema.__doc__ or "").strip().splitlines()[0]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


def _message_line(text: str) -> str:
    """``text`` as one printable line of bounded length."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: 100 * _LONGEST_LINE])
    shown = " ".join(_cut(word, _LONGEST_WORD) for word in shown.split(" "))
    return _cut(shown, _LONGEST_LINE)


def _cut(text: str, longest: int) -> str:
    """Both ends: a message begins with the file and ends with the cure."""
    tail = longest // 3
    return text if len(text) <= longest else f"{text[: longest - tail - 5]} ... {text[-tail:]}"
