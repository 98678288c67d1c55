"""Weights of any family of the field, under this project's names and into a model.

The way of a checkpoint: :func:`read_weights` opens a file and finds its state dict (:mod:`egohod.model.weight_files`),
translates the names and says whose file it is; :func:`load_weights` fits it into a model, all or nothing, and reports
what happened to every tensor.

Names come in four layouts: ``dual`` (upstream EgoHOD, AVION and this project; ``visual.`` and ``textual.``), ``clip``
(OpenAI and open_clip; the text tower at the top level or under ``text.``, a timm backbone under ``visual.trunk.``),
``transformers`` (``vision_model.`` and ``text_model.``) and ``timm`` (a backbone alone). CLIP's blocks have two
spellings: plain (``attn.in_proj_weight``, ``mlp.c_fc``, ``mlp.c_proj``; OpenAI's and ours) and flash
(``attn.Wqkv.weight``, ``mlp.fc1``, ``mlp.fc2``; what upstream and AVION save with flash attention). The blocks of a
timm backbone have timm's names in every layout.
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

from egohod import hub
from egohod.errors import UserError
from egohod.model.config import GEOMETRIES, OPEN_CLIP, TIMM, ImageStats, image_stats, stats_name
from egohod.model.config import geometry as geometry_of
from egohod.model.dual_encoder import Base, DualEncoder
from egohod.model.lora import merge_low_rank
from egohod.model.vision import SlowFastTower
from egohod.model.weight_files import (
    ABOUT,
    AVERAGE,
    INDEX,
    WEIGHT_NAMES,
    Inert,
    StateDict,
    describe,
    errors_of,
    locate,
    open_weight_file,
)

log = logging.getLogger(__name__)

_TEMPORAL, _SPATIAL, _TEXT = "visual.temporal_embedding", "visual.positional_embedding", "textual.positional_embedding"
# Has as many rows as model.motion_stem says.
_STEM = "visual.motion_stem.spatial.0.weight"


class Family(StrEnum):
    """Whose checkpoint a file is."""

    OPENAI = "OpenAI CLIP"
    OPEN_CLIP = "open_clip"
    TRANSFORMERS = "transformers"
    TIMM = "timm"
    UPSTREAM = "upstream EgoHOD"
    AVION = "AVION"
    OURS = "EgoHOD (this project)"

    @property
    def is_clip(self) -> bool:
        """A model of images, which trainings start from; the others are trained video models."""
        return self in (Family.OPENAI, Family.OPEN_CLIP, Family.TRANSFORMERS, Family.TIMM)


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
    spelling: str  # how the file spells the blocks: plain, flash or timm
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
            num_frames=self.rows(_TEMPORAL),
            slowfast=self.slowfast,
            motion_stem=self.rows(_STEM),
        )

    @property
    def slowfast(self) -> bool:
        """Whether there are motion adapters or a merge of two paths."""
        return "slowfast_projection" in self.tensors or any(".adapter." in name for name in self.tensors)

    def rows(self, name: str) -> int | None:
        """Rows of a tensor, such as the frames of the temporal embedding; None without it."""
        return len(self.tensors[name]) if name in self.tensors else None

    @property
    def model_knobs(self) -> dict[str, Any]:
        """Recorded settings of the model as knobs of the section ``model`` (``activation``, ``fast.position``, ...)."""
        knobs = {key.removeprefix("model."): value for key, value in self.settings.items() if key.startswith("model.")}
        projection = self.tensors.get("visual.image_projection")
        read = {
            "embed_dim": None if projection is None or projection.dim() != 2 else projection.shape[1],
            "num_frames": self.rows(_TEMPORAL),
            "motion_stem": self.rows(_STEM),
        }
        return knobs | {name: value for name, value in read.items() if value}

    @property
    def model_name(self) -> str | None:
        """The ``model.name`` of the weights, if they are of a model whose name they or their shapes tell."""
        if name := self.settings.get("model.name"):
            return str(name)
        beside = Path(self.source) / "open_clip_config.json"
        if self.family is Family.OPEN_CLIP and (self.source.startswith(hub.PREFIX) or beside.is_file()):
            # Says more than shapes do.
            return f"{OPEN_CLIP}{self.source}"
        return self.shape.name if self.shape else None

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
    ("video_model.", "EgoVLP's TimeSformer, another architecture"),
    ("visual.blocks.", "a TimeSformer (LaViLa, EgoVLP), another architecture"),
    ("visual.layer", "a CLIP with a ResNet, another architecture"),
    ("visual.trunk.stage", "an open_clip model with a convolutional tower, another architecture"),
    ("text.transformer.embeddings.", "an open_clip model with a text tower of Hugging Face, which is not supported"),
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
    tower = re.compile(r"((?:[^.]+\.)*?)(visual|vision_model)\.")
    holders = [match.group(1) for name in short.values() if (match := tower.match(name))]
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
    """``dual``, ``clip``, ``transformers`` or ``timm``; :class:`UserError` for names of none."""
    for start, whose in _STRANGERS:
        if any(name.startswith(start) for name in names):
            raise UserError(f"holds the weights of {whose}")
    if any(re.search(r"\.(temporal_attn|timeattn)\.", name) for name in names):
        raise UserError("holds the weights of a TimeSformer, another architecture")
    # The first part of every name, and the first two.
    first, second = ({".".join(name.split(".")[:count]) for name in names} for count in (1, 2))
    blocks = "visual.transformer" in second
    # Without a text tower: a timm backbone that tools/convert_checkpoint.py has renamed.
    if blocks and ("textual" in first or "visual.patch_embed" in second):
        return "dual"
    if (blocks or "visual.trunk" in second) and {"transformer.resblocks", "text.transformer"} & second:
        return "clip"
    if {"vision_model.encoder", "text_model.encoder"} <= second:
        return "transformers"
    if "blocks.0" in second and "patch_embed" in first:
        return "timm"
    if any("flat_param" in name.rpartition(".")[2] for name in names):
        raise UserError("holds the flat parameters of FSDP; save a full state dict (StateDictType.FULL_STATE_DICT)")
    raise UserError(
        f"its names ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) are those of no known model: "
        "OpenAI CLIP, open_clip, transformers (CLIP and SigLIP), timm, upstream EgoHOD, AVION or this project"
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


# Names of the transformers library's models, and of the same parts in open_clip's; weights and biases follow them.
_TRANSFORMERS = {
    "text_model.embeddings.token_embedding": "text.token_embedding",
    "text_model.final_layer_norm": "text.ln_final",
    "text_model.head": "text.text_projection",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # sic
    "vision_model.post_layernorm": "visual.ln_post",
}
_TRANSFORMERS_TENSORS = {
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_projection.weight": "text.text_projection",
    "visual_projection.weight": "visual.proj",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
}
# SigLIP's vision tower is timm's in open_clip, with attention pooling.
_TRANSFORMERS_SIGLIP = {
    "vision_model.embeddings.patch_embedding": "visual.trunk.patch_embed.proj",
    "vision_model.post_layernorm": "visual.trunk.norm",
    "vision_model.head.attention.out_proj": "visual.trunk.attn_pool.proj",
    "vision_model.head.layernorm": "visual.trunk.attn_pool.norm",
    "vision_model.head.mlp.fc1": "visual.trunk.attn_pool.mlp.fc1",
    "vision_model.head.mlp.fc2": "visual.trunk.attn_pool.mlp.fc2",
}
# Parts of a block: of transformers, of open_clip and of timm.
_BLOCK_PARTS = (
    ("self_attn.out_proj", "attn.out_proj", "attn.proj"),
    ("layer_norm1", "ln_1", "norm1"),
    ("layer_norm2", "ln_2", "norm2"),
    ("mlp.fc1", "mlp.c_fc", "mlp.fc1"),
    ("mlp.fc2", "mlp.c_proj", "mlp.fc2"),
)


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the transformers library's ``CLIPModel`` or ``SiglipModel`` under the names of open_clip's models.

    Names that neither has are left as they are. Raises :class:`UserError` for SigLIP 2 of variable resolution.
    """
    is_siglip = "vision_model.head.probe" in state
    patches = state.get("vision_model.embeddings.patch_embedding.weight")
    if patches is not None and patches.dim() != 4:
        raise UserError("holds a SigLIP 2 model of variable resolution (NaFlex), another architecture")
    names = _TRANSFORMERS | (_TRANSFORMERS_SIGLIP if is_siglip else {})
    blocks = {"text_model": "text.transformer.resblocks", "vision_model": "visual.transformer.resblocks"}
    if is_siglip:
        blocks["vision_model"] = "visual.trunk.blocks"
    result: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}  # of query, key and value, by the name of the three together
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if block := re.fullmatch(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            tower, number, part, kind = block.groups()
            is_timm = blocks[tower].startswith("visual.trunk")
            if third := re.fullmatch(r"self_attn\.([qkv])_proj", part):
                together = f"attn.qkv.{kind}" if is_timm else f"attn.in_proj_{kind}"
                thirds.setdefault(f"{blocks[tower]}.{number}.{together}", {})[third[1]] = value
                continue
            part = next((each[1 + is_timm] for each in _BLOCK_PARTS if each[0] == part), part)
            result[f"{blocks[tower]}.{number}.{part}.{kind}"] = value
        elif name in ("vision_model.head.attention.in_proj_weight", "vision_model.head.attention.in_proj_bias"):
            width, kind = len(value) // 3, name.rpartition("_")[2]
            result[f"visual.trunk.attn_pool.q.{kind}"] = value[:width]
            result[f"visual.trunk.attn_pool.kv.{kind}"] = value[width:]
        elif name == "vision_model.head.probe":
            result["visual.trunk.attn_pool.latent"] = value
        elif is_siglip and name == "vision_model.embeddings.position_embedding.weight":
            result["visual.trunk.pos_embed"] = value.unsqueeze(0)
        elif stem in names:
            result[f"{names[stem]}.{kind}"] = value
        else:
            # A linear layer without bias there, a matrix here.
            value = value.T if name in ("text_projection.weight", "visual_projection.weight") else value
            result[_TRANSFORMERS_TENSORS.get(name, name)] = value
    for name, each in thirds.items():
        if lacking := [letter for letter in "qkv" if letter not in each]:
            raise UserError(f"lacks the {lacking[0]}_proj of {name}")
        result[name] = torch.cat([each[letter] for letter in "qkv"])
    return result


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------

# Where upstream's motion adapters are, and what is projected: no file records it, but its code has no other way.
_UPSTREAM_ARRANGEMENT = {"model.fast.position": "after", "model.fast.pool": "cls"}
# OpenAI's own code holds projections in half precision and norms in single.
_OPENAI_TYPES = {torch.float16, torch.float32}
# AVION's released models share a space of 256 dimensions, the default of its training script; upstream's have 512.
_AVION_EMBED_DIM = 256
# What the weights of other projects come with, beside them or by their family.
PUBLISHED_SETTINGS = ("model.activation", "model.image_stats")


def read_weights(source: str | Path, *, download: bool = False) -> WeightFile:
    """Open a weight file of any family.

    Args:
        source: a local file, the index of a sharded one or the folder with it, a repository ``hf-hub:org/name``, or an
            open_clip tag such as ``ViT-B-16:laion2b_s34b_b88k``.
        download: whether open_clip may fetch what a tag names; without it only its local cache is looked at.

    Raises:
        UserError: no such file, cut off, damaged, a pickle that asks for more than weights, or a strange model.
    """
    with errors_of(str(source)):
        path = locate(source, download)
        return _translate(str(source), open_weight_file(path), _published_settings(str(source), path))


def _published_settings(source: str, path: Path) -> dict[str, str]:
    """What the tag ``source``, or the files beside the weights ``path``, say of their pixels and their activation.

    These are open_clip_config.json (open_clip), preprocessor_config.json and config.json (transformers, timm).
    """
    pixels: Mapping[str, Any] = {}
    activation: Any = None
    is_repository = source.startswith(hub.PREFIX)
    if path != Path(source) and not is_repository:
        from open_clip import pretrained

        # What was located in the cache for a tag.
        pixels = pretrained.get_pretrained_cfg(*source.split(":"))
        activation = "quick_gelu" if pixels.get("quick_gelu") else None
    # Of a file under another name nothing tells that they belong together.
    elif is_repository or path.is_dir() or path.name in WEIGHT_NAMES or path.name.endswith(INDEX):
        folder = path if path.is_dir() else path.parent
        for name in ABOUT:
            if not (folder / name).is_file():
                continue
            with errors_of(name):
                content = json.loads((folder / name).read_bytes())
                about = content.get("preprocess_cfg") or content.get("pretrained_cfg") or content
                mean, std = (about.get(key, about.get(f"image_{key}")) for key in ("mean", "std"))
                if mean and not pixels:
                    pixels = {"mean": mean, "std": std}
                if "model_cfg" in content:
                    activation = "quick_gelu" if content["model_cfg"].get("quick_gelu") else "gelu"
                # SigLIP's approximation of GELU is a part of model.name.
                activation = activation or content.get("text_config", {}).get("hidden_act")
    settings = {"model.activation": activation} if activation in ("gelu", "quick_gelu") else {}
    if pixels:
        mean, std = (tuple(float(value) for value in pixels[part]) for part in ("mean", "std"))
        settings["model.image_stats"] = stats_name(ImageStats(mean, std))  # type: ignore[arg-type]
        # Raises for a deviation of zero and for numbers that are not finite.
        image_stats(settings["model.image_stats"])
    return settings


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


def _translate(source: str, opened: StateDict, published: Mapping[str, str] | None = None) -> WeightFile:
    """The weights under our names, and whose they are. Raises :class:`UserError` without the file's name.

    ``published`` are settings of the model that are beside the weights.
    """
    names, outside, remarks = _pick_model(opened.tensors)
    layout = _require_layout([*names.values()])
    dropped = _useless([*names.values()])
    tensors: dict[str, Tensor] = {}
    state = {name: opened.tensors[full] for full, name in names.items() if name not in dropped}
    if layout == "transformers":
        state = _from_transformers(state)
    elif layout == "timm":
        classifier = [name for name in state if re.match(r"(head|fc|head_dist)\.", name)]
        dropped |= dict.fromkeys(classifier, "timm's classifier")
        state = {f"visual.trunk.{name}": value for name, value in state.items() if name not in dropped}
    # timm's MLPs have the names of the flash spelling.
    is_timm = any(name.startswith(("visual.trunk.", "visual.patch_embed.")) for name in state)
    is_flash = not is_timm and any(flash in name for name in state for flash, _ in _FLASH_TO_PLAIN)
    for name, value in state.items():
        if name == "visual.proj":
            name = "visual.image_projection"
        elif name in ("visual.trunk.head.weight", "visual.head.proj.weight"):
            # A linear layer there, a matrix here.
            name, value = "visual.image_projection", value.T
        elif name in ("visual.trunk.head.bias", "visual.head.proj.bias"):
            name = "visual.image_projection_bias"
        elif name.startswith("visual.trunk."):
            name = name.replace("trunk.blocks.", "transformer.resblocks.").replace("trunk.", "", 1)
        elif layout != "dual" and name.startswith("text."):
            name = f"textual.{name.removeprefix('text.')}"
        elif layout != "dual" and name.startswith(_CLIP_TEXT):
            name = f"textual.{name}"
        if is_flash:
            for flash, plain in _FLASH_TO_PLAIN:
                name = name.replace(flash, plain)
        if name in tensors:
            raise UserError(f"holds {name} twice, in two spellings")
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
    settings = {**(published or {}), **settings}
    if family is Family.UPSTREAM and any(".adapter." in name for name in tensors):
        settings = _UPSTREAM_ARRANGEMENT | settings
    if family is Family.AVION:
        # What its training script normalised pixels with: the option norm_style, openai unless it says timm.
        name = "imagenet" if options.get("norm_style") == "timm" else "avion"
        settings = {"model.image_stats": name} | settings
    return WeightFile(
        source,
        family,
        opened.container,
        "timm" if is_timm else "flash" if is_flash else "plain",
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
    if layout in ("timm", "transformers"):
        return Family(layout)
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
    if weights.rows(_STEM) or weights.spelling == "timm":
        part = "motion stem" if weights.rows(_STEM) else "timm backbone"
        raise UserError(f"{weights.source}: has a {part}, which upstream's model cannot have; use --to egohod")
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

# How the names begin of what the published recipe starts anew from CLIP: both output projections and the temperature,
# and the sigmoid loss's offset, which was learned with that temperature.
PROJECTIONS = ("visual.image_projection", "textual.text_projection", "logit_scale", "logit_bias")
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
    geometry = getattr(model, "geometry", None)
    if starts_projections_anew(weights, projections, geometry.name if geometry else ""):
        for part in PROJECTIONS:
            for name in [name for name in theirs if name.startswith(part)]:
                del theirs[name]
                report.dropped[name] = "model.weights.projections=fresh"
            report.missing |= {name: "started anew" for name in own if name.startswith(part)}
    if weights.family is Family.TIMM:
        # A backbone alone: no text tower, and no shared space.
        of_pairs = ("textual.", *PROJECTIONS)
        report.missing |= {name: "the file is a vision backbone" for name in own if name.startswith(of_pairs)}
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
            of_text = all(name.startswith("textual.") for name in names) and "not finite" not in problem
            cure = " (its text tower is another one, which model.text or model.name chooses)" if of_text else ""
            problems.append(f"{problem} {_listed(names)}{cure}")
    # Under another activation or arrangement the same weights would be another model, and no shape would tell.
    warnings = []
    if weights.family is Family.TIMM and geometry:
        warnings.append("a vision backbone alone: text tower and projections are random until they are trained")
    for key, here in _settings_of(model).items():
        # Our files record it where it is on.
        default = False if key == "model.rope_time" and weights.family is Family.OURS else here
        there = weights.settings.get(key, default)
        if there != here and key in PUBLISHED_SETTINGS and weights.family is not Family.OURS:
            # Training on with others is legitimate: the published recipe does so, with OpenAI's weights and erf GELU.
            warnings.append(f"{weights.family} trains with {key}={there}, here it is {here}")
        elif there != here:
            problems.append(f"they were trained with {key}={there}, not {here}")
    recorded = weights.settings.get("model.name", "") if weights.family is Family.OURS else ""
    plain = recorded.removesuffix("_Slowfast")
    if geometry and plain.startswith(TIMM) and plain == geometry.name.removesuffix("_Slowfast"):
        # Heads, pooling and rotations of a backbone have no shapes either; how its weights started does not matter.
        shape = geometry_of(recorded, weights.settings.get("model.image_size"), weights.settings.get("model.backbone"))
        here, there = (
            {key: value for key, value in each.backbone_options if key not in ("img_size", "weight_init")}
            for each in (geometry, shape)
        )
        if here != there:
            problems.append(f"they were trained with model.backbone={there}, not {here}")
    if problems:
        if geometry and (name := weights.settings.get("model.name", geometry.name)) != geometry.name:
            # Before all tensors that do not fit, as it is mostly the reason.
            problems.insert(0, f"they are of model.name={name}")
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
    for warning in warnings:
        report.notes.append(warning)
        log.warning("%s: %s", weights.source, warning)
    return report


def starts_projections_anew(weights: WeightFile, projections: str, name: str) -> bool:
    """Whether the model ``name`` keeps its own projections and temperature.

    Raises :class:`UserError` for a wrong choice.
    """
    if projections not in ("auto", "fresh", "keep"):
        raise UserError(f"projections is '{projections}', but must be auto, fresh or keep")
    # CLIP's space is of single images; the published recipe learns one of clips from scratch.
    # A model of open_clip is taken as a whole: some (SigLIP) have no projection of images that could be learned anew.
    is_start = weights.family.is_clip and not name.startswith(OPEN_CLIP)
    return projections == "fresh" or (projections == "auto" and is_start)


def _settings_of(model: nn.Module) -> dict[str, Any]:
    """Knobs of a model that its weights depend on without any shape to tell."""
    if not isinstance(model, DualEncoder):
        return {}
    settings: dict[str, Any] = {
        "model.activation": model.activation,
        "model.image_stats": stats_name(model.image_stats),
        "model.rope_time": getattr(model.visual, "rope_time", False),
    }
    if isinstance(model.visual, SlowFastTower):
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
        elif name == "textual.token_embedding.weight":
            cure = " (it is of another text tower, which model.text or model.name chooses)"
        elif name == _BACKBONE and value.dim() == 3 and value.shape[2] == wanted.shape[2]:
            # CLS and registers are in front of a square of patches, if the backbone places them at all.
            squares, places = {side**2: side for side in range(1, 200)}, [value.shape[1], wanted.shape[1]]
            prefix = next((count for count in range(8) if all(each - count in squares for each in places)), None)
            if prefix is not None and adapt:
                side = squares[places[1] - prefix]
                fitted[name] = resample_abs_pos_embed(value.float(), [side, side], num_prefix_tokens=prefix)
                report.resized[name] = f"{list(value.shape)} -> {list(wanted.shape)}"
                continue
            cure = "" if prefix is None else " (model.weights.adapt=true resizes it)"
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


_RESIZED = (_TEMPORAL, _SPATIAL, _TEXT)
# Of a timm backbone, [1, prefix + S S, D].
_BACKBONE = "visual.pos_embed"


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
