"""Weights of any family of the field, under this project's names and into a model.

The way of a checkpoint: :func:`read_weights` opens a file and finds its state dict (:mod:`egohod.model.weight_files`),
translates the names and says whose file it is; :func:`load_weights` fits it into a model, all or nothing, and reports
what happened to every tensor.

Names come in two layouts: ``clip`` (OpenAI and open_clip; the text tower at the top level or under ``text.``) and
``dual`` (upstream EgoHOD, AVION and this project; ``visual.`` and ``textual.``). Blocks have two spellings: plain
(``attn.in_proj_weight``, ``mlp.c_fc``, ``mlp.c_proj``; OpenAI's and ours) and flash (``attn.Wqkv.weight``, ``mlp.fc1``,
``mlp.fc2``; what upstream and AVION save with flash attention).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from egohod.errors import UserError
from egohod.model.config import GEOMETRIES, IMAGE_STATS
from egohod.model.dual_encoder import Base, DualEncoder
from egohod.model.lora import merge_low_rank
from egohod.model.vision import ACTIVATIONS, Block, SlowFastTransformer
from egohod.model.weight_files import AVERAGE, Inert, StateDict, describe, errors_of, locate, open_weight_file

log = logging.getLogger(__name__)


class Family(StrEnum):
    """Whose checkpoint a file is."""

    OPENAI = "OpenAI CLIP"
    OPEN_CLIP = "open_clip"
    UPSTREAM = "upstream EgoHOD"
    AVION = "AVION"
    OURS = "EgoHOD (this project)"

    @property
    def is_clip(self) -> bool:
        """An image-text model, which trainings start from; the others are trained video models."""
        return self in (Family.OPENAI, Family.OPEN_CLIP)


class HeadClasses(NamedTuple):
    """Which classes a file's classification heads are for."""

    kind: str  # model.heads: joint or parts
    keys: tuple[tuple[str, ...], ...]  # one for each class: its values of data.labels.columns


@dataclass
class WeightFile:
    """The weights of a file under our names, with what the file says about itself."""

    source: str  # file, folder or tag
    family: Family
    container: str
    spelling: str  # how the file spells the blocks: plain or flash
    # As stored, in any floating-point type; the patch embedding as a matrix [D, 3 P P].
    tensors: dict[str, Tensor]
    # Tensors that no model needs, under the file's own names, with the reason.
    dropped: dict[str, str] = field(default_factory=dict)
    # What else the file holds, described.
    beside: dict[str, str] = field(default_factory=dict)
    # Knobs that give the weights their meaning and that no shape tells (model.activation, ...). Files of this project
    # record them; of upstream's slow-fast files the arrangement is fixed.
    settings: dict[str, Any] = field(default_factory=dict)
    # None if there are no heads, or the file does not record their classes.
    heads: HeadClasses | None = None
    # Which of several state dicts was taken.
    remarks: list[str] = field(default_factory=list)

    @property
    def shape(self) -> Shape | None:
        """What the shapes of the weights say about their model; None if they are not those of a whole one."""
        try:
            width, pixels = self.tensors["visual.conv1.weight"].shape
            places, _ = self.tensors["visual.positional_embedding"].shape
            context_length, text_width = self.tensors["textual.positional_embedding"].shape
            vocab_size, _ = self.tensors["textual.token_embedding.weight"].shape
            embed_dim = self.tensors["visual.image_projection"].shape[1]
        except (KeyError, ValueError, IndexError):
            return None
        patch, side = round((pixels / 3) ** 0.5), round((places - 1) ** 0.5)
        temporal = self.tensors.get("visual.temporal_embedding")
        stem = self.tensors.get("visual.motion_stem.spatial.0.weight")
        vision_layers, text_layers = (
            len({name.split(".")[3] for name in self.tensors if name.startswith(f"{tower}.transformer.resblocks.")})
            for tower in ("visual", "textual")
        )
        return Shape(
            image_size=side * patch,
            patch_size=patch,
            vision_width=width,
            vision_layers=vision_layers,
            text_width=text_width,
            text_layers=text_layers,
            embed_dim=embed_dim,
            context_length=context_length,
            vocab_size=vocab_size,
            num_frames=None if temporal is None else len(temporal),
            slowfast="slowfast_projection" in self.tensors or any(".adapter." in name for name in self.tensors),
            motion_stem=None if stem is None else len(stem),
        )

    @property
    def model_knobs(self) -> dict[str, Any]:
        """Recorded settings of the model as knobs of the section ``model`` (``activation``, ``fast.position``, ...)."""
        knobs = {key.removeprefix("model."): value for key, value in self.settings.items() if key.startswith("model.")}
        if shape := self.shape:
            knobs["embed_dim"] = shape.embed_dim
            knobs |= {"num_frames": shape.num_frames} if shape.num_frames else {}
            knobs |= {"motion_stem": shape.motion_stem} if shape.motion_stem else {}
        return knobs

    def without_heads(self) -> WeightFile:
        """The same without classification heads and the classes that they are for."""
        tensors = {name: value for name, value in self.tensors.items() if not name.startswith("heads.")}
        return dataclasses.replace(self, tensors=tensors, heads=None)


@dataclass(frozen=True)
class Shape:
    """What the shapes of weights under our names say about their model."""

    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    embed_dim: int
    context_length: int
    vocab_size: int
    num_frames: int | None  # rows of the temporal embedding; None for an image model
    slowfast: bool  # whether there are motion adapters or a merge of two paths
    motion_stem: int | None  # channels of its first layer; None without one

    @property
    def name(self) -> str | None:
        """The geometry of :mod:`egohod.model.config`, whatever its shared space; None if there is none."""
        fields = ("image_size", "patch_size", "vision_width", "vision_layers", "text_width", "text_layers", "slowfast")
        for geometry in GEOMETRIES.values():
            if all(getattr(geometry, field) == getattr(self, field) for field in fields):
                return geometry.name
        return None

    def __str__(self) -> str:
        return (
            f"ViT of {self.vision_layers} blocks x {self.vision_width}, {self.image_size} px in patches of "
            f"{self.patch_size}; text {self.text_layers} blocks x {self.text_width}, {self.context_length} tokens of "
            f"{self.vocab_size:,}; shared space {self.embed_dim}"
        )


# --------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------

# How names of a clip layout's text tower begin; ours carry textual. in front.
_CLIP_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
_FLASH_TO_PLAIN = ((".attn.Wqkv.", ".attn.in_proj_"), (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."))
# OpenAI stores these sizes among the weights.
_SIZES = ("input_resolution", "context_length", "vocab_size")
# Buffers that modules rebuild by themselves, and counters of training frameworks.
_CONSTANTS = ("attn_mask", "position_ids", "n_averaged", "_extra_state")
# Parts of names that wrapping modules add; they may be anywhere in a name.
_WRAPPERS = frozenset(
    {
        *("module", "_forward_module"),  # DistributedDataParallel, DeepSpeed, AveragedModel
        "_orig_mod",  # torch.compile, of the model or of any part
        *("_fsdp_wrapped_module", "_fpw_module"),  # FullyShardedDataParallel
        "_checkpoint_wrapped_module",  # activation checkpointing
    }
)
# How the names of other architectures begin, so that a user reads what the file is instead of a list of names.
_STRANGERS = (
    ("vision_model.", "the transformers library's CLIP; take the file of open_clip or OpenAI instead"),
    ("visual.trunk.", "an open_clip model with a timm tower, another architecture"),
    ("visual.blocks.", "a TimeSformer (LaViLa, EgoVLP), another architecture"),
    ("visual.layer", "a CLIP with a ResNet, another architecture"),
    ("fc_cls.", "a classifier without text tower"),
)


def without_wrappers(name: str) -> str:
    """``module.visual._orig_mod.conv1.weight`` -> ``visual.conv1.weight``."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _pick_model(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Full names -> names within the model, those outside of it with the reason, and remarks.

    Training frameworks hold the model as an attribute (Lightning's ``model.visual...``), with others beside it, such as
    its average: of several models the first that is no average is taken.
    """
    short = {name: without_wrappers(name) for name in names}
    holders = [match.group(1) for name in short.values() if (match := re.match(r"((?:[^.]+\.)*?)visual\.", name))]
    if "" in holders or not holders:
        return short, {}, []
    ranked = sorted(dict.fromkeys(holders), key=lambda holder: any(AVERAGE.search(part) for part in holder.split(".")))
    taken = ranked[0]
    # A holder may be within another: model. and model.teacher.
    nested = tuple(holder for holder in ranked[1:] if holder.startswith(taken))
    inside = {
        full: name.removeprefix(taken)
        for full, name in short.items()
        if name.startswith(taken) and not name.startswith(nested)
    }
    outside = {full: f"outside of '{taken}'" for full in short if full not in inside}
    remarks = [f"taken is the model under '{taken}', not that under '{other}'" for other in ranked[1:]]
    return inside, outside, remarks


def _require_layout(names: Sequence[str]) -> str:
    """``clip`` or ``dual``; :class:`UserError` for names of neither."""
    for start, whose in _STRANGERS:
        if any(name.startswith(start) for name in names):
            raise UserError(f"holds the weights of {whose}")
    if any(name.startswith("visual.transformer.resblocks.") for name in names):
        if any(name.startswith("textual.") for name in names):
            return "dual"
        if any(re.match(r"(text\.)?transformer\.resblocks\.", name) for name in names):
            return "clip"
    if any("flat_param" in name.rpartition(".")[2] for name in names):
        raise UserError("holds the flat parameters of FSDP; save a full state dict (StateDictType.FULL_STATE_DICT)")
    raise UserError(
        f"its names ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) are those of no known model: "
        "OpenAI CLIP, open_clip, upstream EgoHOD, AVION or this project"
    )


def _useless(names: Iterable[str]) -> dict[str, str]:
    """Tensors that no model needs, with the reason."""
    # In upstream's slow-fast files the spatial convolution is dead weight too; in ours it is a part that can be on.
    dead = (".adapter_2.", ".adapter.conv2d.") if any(".adapter_2." in name for name in names) else ()
    reasons = {}
    for name in names:
        if name in _SIZES:
            reasons[name] = "numbers, no weights"
        elif name.rpartition(".")[2] in _CONSTANTS:
            reasons[name] = "constants"
        elif any(part in name for part in dead):
            reasons[name] = "never used by upstream"
    return reasons


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------

# Where upstream's motion adapters are, and what is projected: no file records it, but its code has no other way.
_UPSTREAM_ARRANGEMENT = {"model.fast.position": "after", "model.fast.pool": "cls"}
# OpenAI's own code holds projections in half precision and norms in single.
_OPENAI_TYPES = {torch.float16, torch.float32}
# AVION's released models share a space of 256 dimensions, the default of its training script; upstream's have 512.
_AVION_EMBED_DIM = 256


def read_weights(source: str | Path, *, download: bool = False) -> WeightFile:
    """Open a weight file of any family.

    Args:
        source: a local file, the index of a sharded one or the folder with it, or an open_clip tag such as
            ``ViT-B-16:laion2b_s34b_b88k``.
        download: whether open_clip may fetch what a tag names; without it only its local cache is looked at.

    Raises:
        UserError: no such file, cut off, damaged, a pickle that asks for more than weights, or a strange model.
    """
    with errors_of(str(source)):
        return _translate(str(source), open_weight_file(locate(source, download)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of any model, names without wrappers such as ``module.``, and remarks on which was taken.

    Raises :class:`UserError` as :func:`read_weights` does.
    """
    with errors_of(str(path)):
        opened = open_weight_file(path)
        return {without_wrappers(name): value for name, value in opened.tensors.items()}, opened.remarks


def from_tensors(source: str, tensors: Mapping[str, Tensor]) -> WeightFile:
    """The same for weights that are in memory already, such as those of a checkpoint folder of this project."""
    return _translate(source, StateDict("safetensors", dict(tensors), {}, {}, []))


def _translate(source: str, opened: StateDict) -> WeightFile:
    """The weights under our names, and whose they are. Raises :class:`UserError` without the file's name."""
    names, outside, remarks = _pick_model(opened.tensors)
    layout = _require_layout([*names.values()])
    dropped = _useless([*names.values()])
    tensors: dict[str, Tensor] = {}
    spelling = "plain"
    for full, name in names.items():
        if any(flash in name for flash, _ in _FLASH_TO_PLAIN):
            spelling = "flash"
        if name in dropped:
            continue
        if layout == "clip":
            if name == "visual.proj":
                name = "visual.image_projection"
            elif name.startswith("text."):
                name = f"textual.{name.removeprefix('text.')}"
            elif name.startswith(_CLIP_TEXT):
                name = f"textual.{name}"
        for flash, plain in _FLASH_TO_PLAIN:
            name = name.replace(flash, plain)
        if name in tensors:
            raise UserError(f"holds {name} twice, in two spellings")
        value = opened.tensors[full]
        if name == "visual.conv1.weight":
            # A convolution whose stride is its kernel is a product with flattened patches: [D, 3, P, P] -> [D, 3 P P].
            value = value.flatten(1)
        elif name in ("logit_scale", "logit_bias") and value.numel() == 1:
            # Some projects save a scalar as [1].
            value = value.reshape(())
        tensors[name] = value
    # From here on it is a model like any other, whatever trained it.
    tensors, count = merge_low_rank(tensors)
    remarks += [f"{count} low-rank parts are added to their weights"] if count else []
    # The command line of a training script, which argparse holds in an object.
    args = opened.beside.get("args")
    options: Mapping[str, Any] = {}
    if isinstance(args, Inert) and args.name == "argparse.Namespace" and isinstance(args.state, Mapping):
        options = args.state
    family = _family(opened, layout, tensors, dropped, options)
    settings = json.loads(opened.metadata.get("settings", "{}"))
    if not isinstance(settings, dict):
        raise UserError("its metadata names no settings")
    if family is Family.UPSTREAM and any(".adapter." in name for name in tensors):
        settings = _UPSTREAM_ARRANGEMENT | settings
    if family is Family.AVION:
        # What its training script normalised pixels with: the option norm_style, openai unless it says timm.
        stats = "imagenet" if options.get("norm_style") == "timm" else "avion"
        settings = {"model.image_stats": stats} | settings
    return WeightFile(
        source,
        family,
        opened.container,
        spelling,
        tensors,
        dropped=dropped | outside,
        beside={name: describe(value) for name, value in opened.beside.items()},
        settings=settings,
        remarks=opened.remarks + remarks,
    )


def _family(
    opened: StateDict,
    layout: str,
    tensors: Mapping[str, Tensor],
    dropped: Mapping[str, str],
    options: Mapping[str, Any],
) -> Family:
    """Whose file it is. Where names and company leave it open, the likelier one; loading is the same."""
    # Files that this project has converted keep whose they were.
    if opened.metadata.get("family") in set(Family):
        return Family(opened.metadata["family"])
    if layout == "clip":
        half = {value.dtype for name, value in tensors.items() if name.endswith(("projection", "ln_post.weight"))}
        is_archive = opened.container == "TorchScript archive"
        return (
            Family.OPENAI if is_archive or "input_resolution" in dropped or half == _OPENAI_TYPES else Family.OPEN_CLIP
        )
    if opened.container == "safetensors" and not dropped:
        return Family.OURS
    if any("slowfast" in name or ".adapter" in name for name in tensors):
        return Family.UPSTREAM
    if "pretrain_zoo" in options:  # of AVION's script
        return Family.AVION
    projection = tensors.get("visual.image_projection")
    return Family.AVION if projection is not None and projection.shape[-1] == _AVION_EMBED_DIM else Family.UPSTREAM


def upstream_state(weights: WeightFile) -> dict[str, Tensor]:
    """The weights under upstream's names, as its released configs save them (flash spelling, matrix ``conv1``).

    Left out is what upstream has no name for: parts that shape the loss alone. Raises :class:`UserError` for a part
    that upstream's model lacks and whose features would be others without it.
    """
    if weights.shape and weights.shape.motion_stem:
        raise UserError(f"{weights.source}: has a motion stem, which upstream's model cannot have; use --to egohod")
    unnamed = "|".join(part.pattern for part in PARTS if part.only_trains)
    state = {}
    for name, value in weights.tensors.items():
        if re.fullmatch(unnamed, name):
            continue
        # Upstream's text tower has no flash attention, so its blocks keep the plain spelling.
        if name.startswith("visual."):
            for flash, plain in _FLASH_TO_PLAIN:
                name = name.replace(plain, flash)
        state[name] = value
    return state


# --------------------------------------------------------------------------------------------------
# Loading into a model
# --------------------------------------------------------------------------------------------------

# What the published recipe starts anew from CLIP: both output projections and the temperature.
PROJECTIONS = ("visual.image_projection", "textual.text_projection", "logit_scale")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Part(NamedTuple):
    """A part that not every model has. A new one, such as another stem, needs its line in :data:`PARTS`."""

    name: str
    pattern: str
    only_trains: bool = False  # it shapes the loss and no feature, so that it may come and go without adapt
    starts_at_zero: bool = False  # a fresh one changes no feature, so that it may be added without adapt


# More special ones first: a name belongs to the first part that it matches.
PARTS = (
    Part("temporal embedding", r"visual\.temporal_embedding"),
    Part("spatial branch of the motion adapters", r"visual\..*\.adapter\.conv2d\..*"),
    Part("motion adapters", r"visual\..*\.adapter\..*"),
    Part("merge of the two paths", r"slowfast_projection"),
    Part("motion stem (model.motion_stem)", r"visual\.motion_stem\..*", starts_at_zero=True),
    Part("offset of the sigmoid loss", r"logit_bias", only_trains=True),
    Part("classification heads", r"heads\..*", only_trains=True),
    Part("head of the box loss", r"visual\.box_head\..*", only_trains=True),
)


@dataclass
class WeightReport:
    """What happened to every weight of a file and of the model, under our names."""

    source: str
    family: Family
    taken: list[str] = field(default_factory=list)  # copied as they are
    resized: dict[str, str] = field(default_factory=dict)  # adapted to the model, with both shapes
    dropped: dict[str, str] = field(default_factory=dict)  # of the file and not used, with the reason
    missing: dict[str, str] = field(default_factory=dict)  # of the model, with its initial values, with the reason
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.family}): {len(self.taken)} tensors taken over"]
        if self.resized:
            lines.append("resized: " + ", ".join(f"{name} {shapes}" for name, shapes in self.resized.items()))
        for title, names in (("not taken over", self.dropped), ("newly initialised", self.missing)):
            for reason in dict.fromkeys(names.values()):
                of_reason = [name for name in names if names[name] == reason]
                lines.append(f"{title}: {_listed(of_reason, 6)} ({reason})")
        return "; ".join(lines + self.notes)


def load_weights(
    model: nn.Module, weights: WeightFile, *, adapt: bool = False, projections: str = "auto"
) -> WeightReport:
    """Put the weights of a file into ``model``; they become the model's type. All is checked before anything is copied.

    Args:
        model: any module whose parameters have this project's names.
        weights: what :func:`read_weights` returns.
        adapt: whether to resize the temporal, spatial and text position embeddings (linearly, bicubic, by cutting) to
            the model's, and to start parts that a trained model does not have, such as motion adapters, anew.
        projections: ``keep`` takes over both output projections and the temperature, ``fresh`` leaves the model's, as
            the published recipe does; ``auto`` is fresh for CLIP models and keep for trained video models.

    Raises:
        UserError: one line that names tensors, both shapes, and the knob that would help.
    """
    own, theirs = model.state_dict(), dict(weights.tensors)
    report = WeightReport(weights.source, weights.family, dropped=dict(weights.dropped), notes=list(weights.remarks))
    if starts_projections_anew(weights, projections):
        for name in PROJECTIONS:
            if theirs.pop(name, None) is not None:
                report.dropped[name] = "model.weights.projections=fresh"
            if name in own:
                report.missing[name] = "started anew"
    problems = _match_parts(own, theirs, report, adapt)
    unknown = [name for name in theirs if name not in own]
    lacking = [name for name in own if name not in theirs and name not in report.missing]
    fitted, misfits = _fit_shapes(own, theirs, report, adapt)
    broken = [name for name, value in fitted.items() if not value.isfinite().all()]
    if misfits:
        problems.insert(0, _listed(misfits, separator="; "))
    for problem, names in (
        ("it has unknown tensors", unknown),
        ("it lacks", lacking),
        ("it holds numbers that are not finite in", broken),
    ):
        if names:
            problems.append(f"{problem} {_listed(names)}")
    # Under another activation or arrangement the same weights would be another model, and no shape would tell.
    warning = ""
    for key, here in _settings_of(model).items():
        there = weights.settings.get(key, here)
        if there != here and key == "model.image_stats" and weights.family is not Family.OURS:
            # Inferred from the family alone, and training on with other statistics is legitimate.
            warning = f"{weights.family} trains with {key}={there}, here it is {here}"
        elif there != here:
            problems.append(f"they were trained with {key}={there}, not {here}")
    if problems:
        geometry = getattr(model, "geometry", None)
        kind = f"{geometry.name}, {getattr(model, 'num_frames', '?')} frames" if geometry else type(model).__name__
        raise UserError(
            f"{weights.source} ({weights.family}): these weights do not fit the model ({kind}): {'; '.join(problems)}"
        )
    if "logit_scale" in fitted:
        # A temperature of the configuration that the file overrules is easy to overlook.
        scales = own["logit_scale"], fitted["logit_scale"].to(own["logit_scale"])
        if not scales[0].isclose(scales[1], atol=1e-3):
            old, new = (f"{(-scale.float()).exp().item():.4f}" for scale in scales)
            report.notes.append(f"temperature {old} replaced by the file's {new}")
    with torch.no_grad():
        for name, value in fitted.items():
            own[name].copy_(value)
    if warning:
        report.notes.append(warning)
        log.warning("%s: %s", weights.source, warning)
    return report


def starts_projections_anew(weights: WeightFile, projections: str) -> bool:
    """Whether the model keeps its own projections and temperature. Raises :class:`UserError` for a wrong choice."""
    if projections not in ("auto", "fresh", "keep"):
        raise UserError(f"projections is '{projections}', but must be auto, fresh or keep")
    # CLIP's space is of single images; the published recipe learns one of clips from scratch.
    return projections == "fresh" or (projections == "auto" and weights.family.is_clip)


def _settings_of(model: nn.Module) -> dict[str, str]:
    """Knobs of a model that its weights depend on without any shape to tell."""
    if not isinstance(model, DualEncoder):
        return {}
    block = model.visual.transformer.resblocks[0]
    assert isinstance(block, Block)
    settings = {
        "model.activation": next(name for name, kind in ACTIVATIONS.items() if isinstance(block.mlp.gelu, kind)),
        "model.image_stats": next(name for name, stats in IMAGE_STATS.items() if stats == model.image_stats),
    }
    if isinstance(model.visual, SlowFastTransformer):
        settings |= {"model.fast.position": model.visual.position, "model.fast.pool": model.visual.pool}
        if model.visual.motion_stem is not None:
            settings["model.fast.stem_paths"] = model.visual.stem_paths
    return settings


def _match_parts(own: Mapping[str, Tensor], theirs: dict[str, Tensor], report: WeightReport, adapt: bool) -> list[str]:
    """Excuse whole parts that only the file has (they leave ``theirs``) or only the model; problems with the others.

    Half a part is not excused: it would be damage.
    """
    problems = []
    for part in PARTS:
        in_file, in_model = ([name for name in names if re.fullmatch(part.pattern, name)] for names in (theirs, own))
        to_initialise = [name for name in in_model if name not in report.missing]
        if in_file and not in_model:
            for name in in_file:
                del theirs[name]
                report.dropped[name] = f"the model has no {part.name}"
            if not (part.only_trains or adapt):
                listed = f"{part.name} ({_listed(in_file)})"
                problems.append(
                    f"it has a part that the model has not, {listed}; model.weights.adapt=true leaves it out"
                )
        elif to_initialise and not in_file:
            report.missing |= dict.fromkeys(to_initialise, f"the file has no {part.name}")
            # CLIP files never have the parts of a video model, so nobody needs to ask for their start.
            if not (part.only_trains or part.starts_at_zero or report.family.is_clip or adapt):
                problems.append(
                    f"it lacks the {part.name} ({_listed(to_initialise)}); model.weights.adapt=true starts them anew"
                )
    return problems


def _fit_shapes(
    own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], report: WeightReport, adapt: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """What is to be copied, in the model's shapes, and what does not fit, with both shapes and the cure."""
    fitted: dict[str, Tensor] = {}
    misfits = []
    for name, value in theirs.items():
        if name not in own:
            continue
        wanted = own[name]
        if value.dtype not in _FLOATS:
            misfits.append(f"{name} holds {str(value.dtype).removeprefix('torch.')}, no floating-point numbers")
            continue
        if value.shape == wanted.shape:
            fitted[name] = value
            report.taken.append(name)
            continue
        cure = ""
        if name in PROJECTIONS:
            if value.dim() == 2 and value.shape[0] == wanted.shape[0]:
                cure = (
                    f" (model.embed_dim={value.shape[1]} builds the model of the file, or "
                    "model.weights.projections=fresh starts it anew)"
                )
        elif name.startswith("heads."):
            cure = " (a head for other classes: train it on data with the same ones)"
        elif name in _RESIZED and value.dim() == 2 and value.shape[1] == wanted.shape[1] and 0 not in value.shape:
            sides = [(len(each) - 1) ** 0.5 for each in (value, wanted)]
            if name == _SPATIAL and not all(side > 0 and side == round(side) for side in sides):
                cure = " (one of them is no square of patches and CLS, so it cannot be adapted)"
            elif adapt:
                fitted[name] = _resize(name, value.float(), wanted)
                report.resized[name] = f"{list(value.shape)} -> {list(wanted.shape)}"
                continue
            else:
                cure = " (model.weights.adapt=true resizes it)"
        misfits.append(f"{name} is {list(value.shape)} there and {list(wanted.shape)} here{cure}")
    return fitted, misfits


_TEMPORAL, _SPATIAL, _TEXT = "visual.temporal_embedding", "visual.positional_embedding", "textual.positional_embedding"
_RESIZED = (_TEMPORAL, _SPATIAL, _TEXT)


def _resize(name: str, value: Tensor, wanted: Tensor) -> Tensor:
    """Position embeddings [N, D] in the length of ``wanted`` [M, D]."""
    if name == _TEMPORAL:
        # Linearly, as the model itself does for clips of another length.
        return F.interpolate(value.T[None], size=len(wanted), mode="linear", align_corners=False)[0].T
    if name == _SPATIAL:
        # [1 + S S, D] -> [1 + S' S', D], bicubic as timm does it; CLS stays.
        side = round((len(wanted) - 1) ** 0.5)
        return resample_abs_pos_embed(value[None], [side, side])[0]
    # Words have no scale: the first positions keep their meaning, further ones their initial values.
    first = value[: len(wanted)].to(wanted)
    return torch.cat((first, wanted[len(first) :]))


def _listed(names: Sequence[str], shown: int = 3, separator: str = ", ") -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{separator.join(names[:shown])}{more}"


# --------------------------------------------------------------------------------------------------
# Weights that stay in the file they came from
# --------------------------------------------------------------------------------------------------


def base_of(model: nn.Module, content: WeightFile) -> Base | None:
    """What ``model`` keeps of the file it was started from; None if it trains everything."""
    unchanged = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
        and name in content.tensors
        and content.tensors[name].shape == parameter.shape
        and bool((content.tensors[name].to(parameter) == parameter).all())
    ]
    # A fixed temperature is not worth a second file.
    if all(content.tensors[name].dim() == 0 for name in unchanged):
        return None
    # The checkpoint may be opened from another working directory.
    file = Path(content.source)
    return Base(str(file.resolve() if file.exists() else file), tuple(unchanged), checksum(content.tensors, unchanged))


def checksum(tensors: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """SHA-256 of some tensors as float32, whatever type a file holds them in."""
    digest = hashlib.sha256()
    # Sorted: files of the same weights may hold them in another order.
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
