"""Sizes of both towers by name, settings of the model, and of the weights it starts from."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from egohod.errors import UserError
from egohod.knobs import knob, part


@dataclass(frozen=True)
class Geometry:
    """Sizes of both towers."""

    name: str
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    embed_dim: int
    mlp_ratio: float = 4.0
    slowfast: bool = False
    """Two paths with motion adapters, see :class:`egohod.model.vision.SlowFastTower`."""
    context_length: int = 77
    vocab_size: int = 49408
    backbone: str = ""
    """timm's name of the vision tower (:mod:`egohod.model.timm_vision`); empty is the project's own."""
    backbone_options: tuple[tuple[str, Any], ...] = ()
    """Arguments of ``timm.create_model``: ``model.backbone``, and the resolution if it is not the backbone's own."""
    prefix_tokens: int = 1
    """Tokens in front of the patches, once per clip: CLS and registers."""
    pool: str = "token"
    """What makes one vector of all tokens, in timm's words: token (CLS), avg, max, avgmax or map (attention)."""
    projection: str = "matrix"
    """From the pooled vector to the shared space: matrix, linear (with a bias) or none (the vector itself)."""
    block_weights: float | None = None
    """Entries of the matrices of a block on average, None: four of the attention and two of the MLP."""
    memory_weights: float | None = None
    """Of these the ones that keys and values are made with, None: two of the attention's."""
    pool_weights: int = 0
    """Entries of the matrices of attention pooling."""
    rope: bool = False
    """Whether queries and keys are rotated by the place of their patch."""
    image_stats: ImageStats | None = None
    """What a timm backbone's weights expect of pixels; None leaves it to ``model.image_stats``."""

    @property
    def patches_per_frame(self) -> int:
        """Patch tokens of one frame."""
        return (self.image_size // self.patch_size) ** 2


_PLAIN = (
    Geometry("CLIP_VITB16", 224, 16, 768, 12, 12, 512, 12, 8, 512),
    Geometry("CLIP_VITL14", 224, 14, 1024, 24, 16, 768, 12, 12, 512),
    Geometry("CLIP_VITL14_336PX", 336, 14, 1024, 24, 16, 768, 12, 12, 512),
    # Small enough to learn the demo world from scratch on two CPU cores in minutes.
    Geometry("DEMO", 40, 8, 128, 4, 4, 128, 2, 4, 128),
    # For studies of many runs on the demo world: 257 tokens of 16 frames, half of DEMO's time.
    Geometry("DEMO_SMALL", 32, 8, 96, 3, 2, 96, 2, 4, 96),
)
_SLOWFAST = (replace(plain, name=f"{plain.name}_Slowfast", slowfast=True) for plain in _PLAIN)
GEOMETRIES = {geometry.name: geometry for geometry in (*_PLAIN, *_SLOWFAST)}


def geometry(name: str, image_size: int | None = None, backbone: Mapping[str, Any] | None = None) -> Geometry:
    """The geometry called ``name``.

    Args:
        name: one of :data:`GEOMETRIES`, or ``timm/NAME`` with timm's name of a plain or EVA vision transformer
            (``timm/NAME.TAG`` for the pixel statistics of certain weights); with ``_Slowfast`` behind it for two paths.
        image_size: side of the frames in pixels, if not the backbone's own.
        backbone: other arguments of ``timm.create_model``, such as ``{"depth": 4}``.

    Raises:
        UserError: an unknown name, with the nearest ones; sizes that do not fit each other.
    """
    plain = name.removesuffix("_Slowfast")
    if plain.startswith(TIMM):
        options = tuple(sorted((key, _argument(value)) for key, value in (backbone or {}).items()))
        shape = _timm_geometry(plain.removeprefix(TIMM), image_size, options)
        return replace(shape, name=name, slowfast=name != plain)
    if name not in GEOMETRIES:
        near = difflib.get_close_matches(name, GEOMETRIES, n=1)
        raise UserError(
            f"model.name is '{name}', but must be one of {', '.join(GEOMETRIES)}, or timm/NAME for a transformer of "
            f"timm{f'; did you mean {near[0]}?' if near else ''}"
        )
    if backbone or image_size not in (None, GEOMETRIES[name].image_size):
        raise UserError(
            f"model.{'backbone' if backbone else 'image_size'} is for model.name=timm/NAME; the sizes of {name} are "
            f"fixed ({GEOMETRIES[name].image_size} px)"
        )
    return GEOMETRIES[name]


# How the names of timm's backbones begin.
TIMM = "timm/"
# Text towers of CLIP for vision towers up to a width: width, blocks and heads, and the shared space. OpenAI's B and L
# (in whose stead the shared space is 512, as upstream's), open_clip's H; the first is for tiny towers of the demo.
_TEXT_FOR = ((256, (128, 2, 4, 128)), (896, (512, 12, 8, 512)), (1152, (768, 12, 12, 512)), (0, (1024, 24, 16, 1024)))
# Arguments of timm that have a setting here, or none at all.
_RESERVED = {
    "img_size": "model.image_size",
    "drop_path_rate": "model.drop_path",
    "patch_drop_rate": "model.patch_dropout",
    "pretrained": "model.weights",
    "checkpoint_path": "model.weights",
    **dict.fromkeys(("num_classes", "in_chans", "dynamic_img_size", "dynamic_img_pad", "features_only"), ""),
}


def _argument(value: Any) -> Any:
    """An argument of timm, hashable; numbers of a YAML file arrive as text, as no setting declares their type."""
    if isinstance(value, (list, tuple)):
        return tuple(_argument(each) for each in value)
    words = {"true": True, "false": False, "null": None}
    if not isinstance(value, str) or value in words:
        return words[value] if isinstance(value, str) else value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass  # a word, such as token
    return value


@lru_cache(maxsize=64)
def _timm_geometry(name: str, image_size: int | None, options: tuple[tuple[str, Any], ...]) -> Geometry:
    """The sizes of timm's model ``name``, read from the model itself, whose weights are not allocated."""
    # Only these names need it, and this module is imported by everything.
    import timm
    import torch
    from timm.layers import PatchEmbed
    from timm.models import Eva, VisionTransformer
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    label = f"model.name: timm/{name}"
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(f"{label} is no model of timm; {_nearest(architecture)}")
    if tag and not timm.models.is_model_pretrained(name):
        tags = timm.list_pretrained(f"{architecture}.*") or ["none"]
        raise UserError(f"{label}: timm has no weights '{tag}' of it; there are {', '.join(tags)}")
    for key, _ in options:
        if key in _RESERVED:
            cure = f"set {_RESERVED[key]} instead" if _RESERVED[key] else "it cannot be set"
            raise UserError(f"model.backbone.{key}: {cure}")
    if image_size is not None:
        options = (*options, ("img_size", image_size))
    try:
        # A prediction of memory asks on fake tensors, from which timm could read no numbers.
        with unset_fake_temporarily(), torch.device("meta"):
            model = timm.create_model(name, num_classes=0, **dict(options))
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        # What timm says of a wrong argument names it.
        raise UserError(f"{label} with model.backbone={dict(options)}: {str(error).splitlines()[0]}") from error
    if type(model) not in (VisionTransformer, Eva) or type(model.patch_embed) is not PatchEmbed:
        raise UserError(f"{label} is a {type(model).__name__}, no plain vision transformer; {_nearest(architecture)}")
    block, (side, other), (patch, across) = model.blocks[0], model.patch_embed.img_size, model.patch_embed.patch_size
    if (side, patch) != (other, across):
        raise UserError(
            f"{label}: frames and patches must be squares, not {side} x {other} and {patch} x {across}; set "
            "model.image_size"
        )
    if side % patch:
        near = f"{side // patch * patch} or {(side // patch + 1) * patch}"
        raise UserError(f"{label}: patches of {patch} px do not divide {side} px; set model.image_size to {near}")
    if (attention := type(block.attn).__name__ if hasattr(block, "attn") else "") not in _ATTENTIONS:
        raise UserError(f"{label}: blocks of kind {type(block).__name__} {attention} are not supported".rstrip())
    rope = getattr(model, "rope", None)
    if rope is not None and image_size is not None and getattr(rope, "periods", None) is None:
        # DINOv3's positions are shares of the picture. EVA's count patches, in units of the grid of its pretraining.
        with unset_fake_temporarily(), torch.device("meta"):
            own = timm.create_model(name, num_classes=0, **{k: v for k, v in options if k != "img_size"})
        if own.patch_embed.grid_size != model.patch_embed.grid_size and getattr(rope, "ref_feat_shape", None) is None:
            grid = " x ".join(map(str, own.patch_embed.grid_size))
            raise UserError(
                f"{label}: its RoPE counts the patches of a {grid} grid and has no positions for model.image_size="
                f"{image_size}; leave it null, or scale positions to that grid with "
                f"model.backbone.ref_feat_shape={list(own.patch_embed.grid_size)} if its RoPE is of the kind 'cat'"
            )
    width, text = model.embed_dim, next(sizes for limit, sizes in _TEXT_FOR if model.embed_dim <= limit or not limit)
    # On average: blocks of some models differ in their keys and values.
    matrices, memory = 0, 0
    for each in model.blocks:
        matrices += sum(weight.numel() for weight in each.parameters() if weight.dim() == 2)
        attn = each.attn
        memory += 2 * width * attn.head_dim * getattr(attn, "num_kv_heads", attn.num_heads)
    depth, stats, pooling = len(model.blocks), model.pretrained_cfg, model.attn_pool
    return Geometry(
        TIMM + name,
        side,
        patch,
        width,
        depth,
        block.attn.num_heads,
        *text[:3],
        text[3],
        mlp_ratio=4.0,
        backbone=name,
        backbone_options=options,
        prefix_tokens=model.num_prefix_tokens,
        pool=model.global_pool,
        block_weights=matrices / depth,
        memory_weights=memory / depth,
        pool_weights=sum(each.numel() for each in pooling.parameters() if each.dim() == 2) if pooling else 0,
        rope=rope is not None,
        image_stats=ImageStats(tuple(stats["mean"]), tuple(stats["std"])),
    )


# Attention that egohod/model/timm_vision.py can compute.
_ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")


def _nearest(architecture: str) -> str:
    """The vision transformers of timm whose names are the most like ``architecture``."""
    import timm

    names = [name for module in ("vision_transformer", "eva", "deit") for name in timm.list_models(module=module)]
    near = difflib.get_close_matches(architecture, [name for name in names if not name.startswith("test_")], n=5)
    # Whoever asks for a convolutional net sees one name of each family.
    families = ["vit_base_patch16_siglip_224", "eva02_base_patch16_clip_224", "vit_pe_core_base_patch16_224"]
    return f"the nearest vision transformers are {', '.join(near or ['vit_base_patch16_clip_224', *families])}"


class ImageStats(NamedTuple):
    """Normalisation of pixels: mean and standard deviation of R, G and B in 0..1."""

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
        "the file that a small checkpoint (train.trainable other than all) was trained from, which has all other "
        "weights; null is the path that was used then",
    )
    adapt: bool = knob(
        False,
        "resize position embeddings to this model's frames, patches and text length, and initialise parts that the "
        "file lacks (motion adapters) or has for other classes (heads); false makes each of these an error",
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
    slow_every: int = knob(
        1,
        "train the slow path, and with it the backbone, on the first of this many steps only; the others embed a clip "
        "by the fast path alone and cost less; 1, as published, is every step; evaluation always uses both paths",
        low=1,
    )
    position: str = knob(
        "before",
        "a motion adapter is before its block, whose attention then reads its output, or after it, as published",
        choices=("before", "after"),
    )
    pool: str = knob(
        "cls",
        "what the fast path projects: CLS, the mean of the patch tokens, or the mean of both; published is cls, "
        "with which, if position=after, the last adapter has no effect",
        choices=("cls", "mean", "both"),
    )
    spatial: bool = knob(False, "a 3x3 convolution over each frame before the temporal one")
    stem_paths: str = knob(
        "fast",
        "where the vectors of model.motion_stem are added: on the fast path, so that the slow one stays the plain "
        "tower, or on both; the slow path then gets those of its frames, computed once from all frames",
        choices=("fast", "both"),
    )


@dataclass
class ModelConfig:
    """The dual encoder: a space-time ViT and a causal text transformer."""

    name: str = knob(
        "CLIP_VITB16",
        f"geometry: {', '.join(GEOMETRIES)}, or timm/NAME for a vision transformer of timm; ..._Slowfast has a fast "
        "path with motion adapters. docs/backbones.md",
    )
    image_size: int | None = knob(
        None, "side of the frames in pixels, of a timm backbone; null is the one that it was trained with", low=1
    )
    backbone: dict[str, Any] = knob(
        {},
        "arguments of timm.create_model that replace those of a timm backbone, such as depth or global_pool; none, as "
        "its weights need",
    )
    rope_time: bool = knob(
        False,
        "rotate queries and keys by the time of their frame too, on all channels as EVA02-AT does; for backbones with "
        "rotary positions; false leaves time to the temporal embedding, with which a clip starts as the image model",
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
        "zeros is the published initialisation; sinusoidal lets a short run from scratch learn frame order",
        choices=("zeros", "sinusoidal"),
    )
    spatial_init: str = knob(
        "random",
        "random is CLIP's initialisation; sinusoidal lets a short run from scratch learn where things are",
        choices=("random", "sinusoidal"),
    )
    sinusoid_scale: float = knob(0.5, "amplitude of sinusoidal embeddings", above=0)
    motion_stem: int | None = knob(
        None,
        "channels of the motion stem's first layer (32 learns the demo world's motions): convolutions over frames and "
        "their differences, added to the patch tokens; zero at the start, so it may be added to trained weights; "
        "null, as published, is no stem",
        low=1,
    )
    patch_dropout: float = knob(
        0.0, "fraction of patch tokens dropped while training; saves memory at some cost in accuracy", low=0, high=0.95
    )
    patch_dropout_tubes: bool = knob(
        False, "drop the same patches in all frames, so that the motion in the others stays whole"
    )
    drop_path: float = knob(
        0.0, "stochastic depth rate of the last vision block; the rate grows linearly from 0", low=0, high=0.95
    )
    heads: str = knob(
        "none",
        "classification heads on the clip's feature in the shared space: one for all classes (joint) or one for each "
        "of data.labels.columns, such as verb and noun (parts); none for pretraining and retrieval",
        choices=("none", "joint", "parts"),
    )
    head_start: str = knob(
        "random",
        "initial weights of the heads: random, or text, the text features of each class's training narrations, with "
        "which they start at zero-shot accuracy",
        choices=("random", "text"),
    )
    head_dropout: float = knob(0.0, "dropout before the heads; AVION fine-tunes with 0.5", low=0, high=0.95)
    residual: str = knob(
        "auto",
        "type of the tokens between the vision tower's blocks under autocast: autocast's (bf16 or fp16), as open_clip "
        "and the published code, which halves their memory, or float32; auto is autocast's on GPUs and float32 on CPUs",
        choices=("auto", "autocast", "float32"),
    )
    checkpoint_blocks: str = knob(
        "none",
        "blocks that are computed again in the backward pass instead of kept: none, all (far less memory for about a "
        "third more time), the first N of the vision tower, or auto, as few of them as the device's memory needs; with "
        "any of them also those of the text tower and the motion stem",
    )
    compile: str = knob(
        "auto",
        "torch.compile the blocks of both towers for training; evaluation is not compiled; auto is true on GPUs and "
        "false on CPUs, where it gains 3-6 %",
        choices=("auto", "true", "false"),
    )
    attention: str = knob(
        "auto",
        "kernel of the vision tower's attention that a GPU tries first: flash, cudnn, efficient or math; where it does "
        "not load, or not for the type of the tokens, PyTorch's order decides; auto is FlashAttention 3 on Hopper "
        "where it is installed, else cudnn on GPUs from Hopper on and flash on earlier ones; a CPU ignores it",
        choices=("auto", "flash", "cudnn", "efficient", "math"),
    )
    weights: WeightsConfig = part(WeightsConfig)

    def geometry(self) -> Geometry:
        """Sizes of both towers with the settings that change them. Raises :class:`UserError`."""
        shape = geometry(self.name, self.image_size, self.backbone)
        return replace(shape, embed_dim=self.embed_dim) if self.embed_dim else shape

    @staticmethod
    def convert_old_keys(section: dict[str, Any], below: dict[str, Any]) -> list[tuple[str, str]]:
        """Replace ``gradient_checkpointing``, which was all blocks or none, in place."""
        truth = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
        if "compile" in section:  # it was a truth value, and all spellings of one are read
            section["compile"] = truth.get(str(section["compile"]).lower(), section["compile"])
        if "gradient_checkpointing" not in section:
            return []
        old = str(section.pop("gradient_checkpointing"))
        section.setdefault("checkpoint_blocks", {"true": "all", "false": "none"}.get(truth.get(old.lower(), ""), old))
        return [("model.gradient_checkpointing", "model.checkpoint_blocks")]


def checkpointed_blocks(text: str, depth: int) -> int:
    """How many of the first of ``depth`` blocks ``model.checkpoint_blocks`` means; all for ``auto``.

    Raises :class:`UserError` for another value.
    """
    # Until the memory of a device is known, auto is what needs least of it.
    words = {"none": 0, "all": depth, "auto": depth}
    if text not in words and not text.isdecimal():
        raise UserError(f"model.checkpoint_blocks is {text!r}, but must be auto, all, none or a number of blocks")
    return min(words[text] if text in words else int(text), depth)
