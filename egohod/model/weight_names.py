"""The names that projects give the same weights, and what the shapes say about the model.

Two layouts: ``clip`` (OpenAI and open_clip; the text tower at the top level or under ``text.``) and ``dual`` (upstream
EgoHOD, AVION and this project; ``visual.`` and ``textual.``). Two spellings of a block: plain
(``attn.in_proj_weight``, ``mlp.c_fc``, ``mlp.c_proj``; OpenAI's and ours) and flash (``attn.Wqkv.weight``, ``mlp.fc1``,
``mlp.fc2``; what upstream and AVION save with flash attention).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from egohod.errors import UserError
from egohod.model import zoo


class WeightsError(UserError):
    """Weights that cannot be used: unreadable, hostile or of another geometry."""


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


NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI stores among the weights."""

_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
"""How names of a clip layout's text tower begin; ours carry ``textual.`` in front."""

_FLASH_TO_PLAIN = ((".attn.Wqkv.", ".attn.in_proj_"), (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."))

_STRANGERS = (
    ("vision_model.", "the transformers library's CLIP; take the file of open_clip or OpenAI instead"),
    ("visual.trunk.", "an open_clip model with a timm tower, another architecture"),
    ("visual.blocks.", "a TimeSformer (LaViLa, EgoVLP), another architecture"),
    ("visual.layer", "a CLIP with a ResNet, another architecture"),
    ("fc_cls.", "a classifier without text tower"),
)


_WRAPPERS = frozenset(
    {
        *("module", "_forward_module"),  # DistributedDataParallel, DeepSpeed, AveragedModel
        "_orig_mod",  # torch.compile, of the model or of any part
        *("_fsdp_wrapped_module", "_fpw_module"),  # FullyShardedDataParallel
        "_checkpoint_wrapped_module",  # activation checkpointing
    }
)
"""Parts of names that modules add which stand around others; they may be anywhere in a name."""

_AVERAGES = re.compile(r"(^|_)(ema|swa|avg|averaged?|teacher|momentum|target)(_|$)")


def without_wrappers(name: str) -> str:
    """``module.visual._orig_mod.conv1.weight`` -> ``visual.conv1.weight``."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_average(name: str) -> bool:
    """Whether a name such as ``model_ema`` is that of a running average of weights."""
    return bool(_AVERAGES.search(name.lower()))


def model_names(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Names as they are -> names in the model, those that are not of it with the reason, and remarks.

    Training frameworks hold the model as an attribute (Lightning's ``model.visual...``), with others beside it, such as
    its average: of several models the first that is no average is taken.
    """
    short = {name: without_wrappers(name) for name in names}
    holders = [match.group(1) for name in short.values() if (match := re.match(r"((?:[^.]+\.)*?)visual\.", name))]
    if "" in holders or not holders:
        return short, {}, []
    ranked = sorted(dict.fromkeys(holders), key=lambda each: any(is_average(part) for part in each.split(".")))
    taken = ranked[0]
    others = tuple(each for each in ranked[1:] if each.startswith(taken))
    inside = {
        full: name.removeprefix(taken)
        for full, name in short.items()
        if name.startswith(taken) and not name.startswith(others)
    }
    outside = {full: f"outside of '{taken}'" for full in short if full not in inside}
    remarks = [f"taken is the model under '{taken}', not that under '{other}'" for other in ranked[1:]]
    return inside, outside, remarks


def layout(names: Iterable[str]) -> str:
    """``clip`` or ``dual``. Raises :class:`WeightsError` for names of neither, without the file's name in front."""
    names = list(names)
    for start, whose in _STRANGERS:
        if any(name.startswith(start) for name in names):
            raise WeightsError(f"holds the weights of {whose}")
    has_vision = any(name.startswith("visual.transformer.resblocks.") for name in names)
    if has_vision and any(name.startswith("textual.") for name in names):
        return "dual"
    if has_vision and any(re.match(r"(text\.)?transformer\.resblocks\.", name) for name in names):
        return "clip"
    if any("flat_param" in name.rpartition(".")[2] for name in names):
        raise WeightsError("holds the flat parameters of FSDP; save a full state dict (StateDictType.FULL_STATE_DICT)")
    raise WeightsError(
        f"its names ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) are those of no known model: "
        "OpenAI CLIP, open_clip, upstream EgoHOD, AVION or this project"
    )


def useless(names: Iterable[str]) -> dict[str, str]:
    """Tensors that no model needs, with the reason."""
    names = list(names)
    # In upstream's slow-fast files the spatial convolution is dead weight too; in ours it is a part that can be on.
    upstream = any(".adapter_2." in name for name in names)
    reasons = {}
    for name in names:
        if name in NUMBERS:
            reasons[name] = "numbers, no weights"
        elif name.rpartition(".")[2] in ("attn_mask", "position_ids", "n_averaged", "_extra_state"):
            reasons[name] = "constants"
        elif ".adapter_2." in name or (upstream and ".adapter.conv2d." in name):
            reasons[name] = "never used by upstream"
    return reasons


def ours(name: str, layout: str) -> str:
    """The name of a weight in this project."""
    if layout == "clip":
        if name == "visual.proj":
            name = "visual.image_projection"
        elif name.startswith("text."):
            name = f"textual.{name.removeprefix('text.')}"
        elif name.startswith(_TEXT):
            name = f"textual.{name}"
    for flash, plain in _FLASH_TO_PLAIN:
        name = name.replace(flash, plain)
    return name


def upstreams(name: str) -> str:
    """Our name -> upstream's, as its released configs save it: vision blocks in the flash spelling."""
    if name.startswith("visual."):
        for flash, plain in _FLASH_TO_PLAIN:
            name = name.replace(plain, flash)
    return name


def spelling(names: Iterable[str]) -> str:
    """``flash`` or ``plain``."""
    return "flash" if any(flash in name for name in names for flash, _ in _FLASH_TO_PLAIN) else "plain"


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
    num_frames: int | None
    """Rows of the temporal embedding; None for an image model."""
    slowfast: bool
    """Whether there are motion adapters or a merge of two paths."""

    @property
    def name(self) -> str | None:
        """The geometry of :mod:`egohod.model.zoo`, whatever its shared space; None if there is none."""
        fields = ("image_size", "patch_size", "vision_width", "vision_layers", "text_width", "text_layers")
        for geometry in zoo.GEOMETRIES.values():
            same = all(getattr(geometry, field) == getattr(self, field) for field in fields)
            if same and self.slowfast == geometry.slowfast:
                return geometry.name
        return None

    def __str__(self) -> str:
        return (
            f"ViT of {self.vision_layers} blocks x {self.vision_width}, {self.image_size} px in patches of "
            f"{self.patch_size}; text {self.text_layers} blocks x {self.text_width}, {self.context_length} tokens of "
            f"{self.vocab_size:,}; shared space {self.embed_dim}"
        )


def shape_of(tensors: Mapping[str, Tensor]) -> Shape | None:
    """The shape of a model, from weights under our names; None if they are not those of a whole model."""
    try:
        width, pixels = tensors["visual.conv1.weight"].shape
        places, _ = tensors["visual.positional_embedding"].shape
        context_length, text_width = tensors["textual.positional_embedding"].shape
        vocab_size, _ = tensors["textual.token_embedding.weight"].shape
        embed_dim = tensors["visual.image_projection"].shape[1]
    except (KeyError, ValueError, IndexError):
        return None
    patch, side = round((pixels / 3) ** 0.5), round((places - 1) ** 0.5)
    temporal = tensors.get("visual.temporal_embedding")
    return Shape(
        image_size=side * patch,
        patch_size=patch,
        vision_width=width,
        vision_layers=_blocks(tensors, "visual"),
        text_width=text_width,
        text_layers=_blocks(tensors, "textual"),
        embed_dim=embed_dim,
        context_length=context_length,
        vocab_size=vocab_size,
        num_frames=None if temporal is None else len(temporal),
        slowfast="slowfast_projection" in tensors or any(".adapter." in name for name in tensors),
    )


def _blocks(names: Iterable[str], tower: str) -> int:
    return len({name.split(".")[3] for name in names if name.startswith(f"{tower}.transformer.resblocks.")})
