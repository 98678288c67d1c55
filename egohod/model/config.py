"""Sizes of both towers by name, settings of the model, and of the weights it starts from."""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from egohod import hub
from egohod.errors import UserError
from egohod.knobs import knob, part


@dataclass(frozen=True)
class TextOptions:
    """What a text tower has beside its sizes; the defaults are those of OpenAI's CLIP."""

    mlp_ratio: float = 4.0
    causal: bool = True
    pool: str = "argmax"
    """The token whose feature is taken: argmax (CLIP's end of text has the largest id), eos, first or last."""
    eos_id: int = 2
    """Of pool="eos"."""
    projection: str = "matrix"
    """matrix [D, E], linear (with a bias, SigLIP) or none."""
    norm_eps: float = 1e-5
    activation: str = ""
    """gelu, quick_gelu or gelu_tanh, its approximation (SigLIP 2); "" is that of ``model.activation``."""
    tokenizer: str = ""
    """Repository of a Hugging Face tokenizer, or a folder with its files; "" is CLIP's, which open_clip contains."""
    clean: str = "lower"
    """How open_clip cleans a text before it is split: lower, whitespace or canonicalize (no punctuation)."""
    strip_sep_token: bool = False
    """Whether the tokenizer's separator becomes padding (CLIPA with BERT's tokenizer)."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of both towers, and what else the name of a model decides."""

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
    """Of ``model.image_stats=auto``: what the weights expect of pixels; None is OpenAI's, as upstream's."""
    text: TextOptions = TextOptions()
    activation: str = "gelu"
    """Of ``model.activation=auto``; upstream trains OpenAI's weights with erf GELU."""
    norm_eps: float = 1e-6
    """Of the LayerNorms of our own vision tower: upstream's; OpenAI's and open_clip's ViTs have 1e-5."""
    logit_scale: float | None = None
    """log(1 / temperature) of a model that is published with both towers; None is the loss's temperature."""
    logit_bias: float | None = None
    """Initial offset of the similarities of such a model (SigLIP); None is a model without one."""

    @property
    def patches_per_frame(self) -> int:
        """Patch tokens of one frame."""
        return (self.image_size // self.patch_size) ** 2


_PLAIN = (
    Geometry("CLIP_VITB16", 224, 16, 768, 12, 12, 512, 12, 8, 512),
    Geometry("CLIP_VITL14", 224, 14, 1024, 24, 16, 768, 12, 12, 512),
    Geometry("CLIP_VITL14_336PX", 336, 14, 1024, 24, 16, 768, 12, 12, 512),
    # open_clip's ViT-g-14, 1.4 B parameters; the ratio gives an MLP of 6,144.
    Geometry("CLIP_VITG14", 224, 14, 1408, 40, 16, 1024, 24, 16, 1024, mlp_ratio=4.3637),
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
    if plain.startswith(OPEN_CLIP):
        with _open_clip_errors(f"model.name: {plain}"):
            shape = _open_clip_geometry(plain.removeprefix(OPEN_CLIP), image_size, backbone)
        return replace(shape, name=name, slowfast=name != plain)
    if plain.startswith(TIMM):
        options = tuple(sorted((key, _argument(value)) for key, value in (backbone or {}).items()))
        shape = _timm_geometry(plain.removeprefix(TIMM), image_size, options)
        return replace(shape, name=name, slowfast=name != plain)
    if name not in GEOMETRIES:
        # Also of timm and open_clip, without whose prefix names are known.
        near = difflib.get_close_matches(name, GEOMETRIES, n=1) or difflib.get_close_matches(name, model_names(), n=1)
        if TIMM + name.partition(".")[0] in near:
            # With the tag, which chooses the pixel statistics.
            near = [TIMM + name]
        raise UserError(
            f"model.name is '{name}', but must be one of {', '.join(GEOMETRIES)}, timm/NAME for a transformer of timm, "
            f"or open_clip/NAME for a model of open_clip{f'; did you mean {near[0]}?' if near else ''}"
        )
    if backbone or image_size not in (None, GEOMETRIES[name].image_size):
        raise UserError(
            f"model.{'backbone' if backbone else 'image_size'} is for model.name=timm/NAME; the sizes of {name} are "
            f"fixed ({GEOMETRIES[name].image_size} px)"
        )
    return GEOMETRIES[name]


# How the names of timm's backbones begin, and those of open_clip's models.
TIMM, OPEN_CLIP = "timm/", "open_clip/"
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
    # The blocks here attend by egohod.model.vision.attend, which drops nothing.
    **dict.fromkeys(
        ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"), "model.drop_path or model.patch_dropout"
    ),
    **dict.fromkeys(("num_classes", "in_chans", "dynamic_img_size", "dynamic_img_pad", "features_only"), ""),
}


def _argument(value: Any) -> Any:
    """An argument of timm, hashable; all values of a YAML file arrive as text, as no setting declares their type."""
    if isinstance(value, (list, tuple)):
        return tuple(_argument(each) for each in value)
    if isinstance(value, Mapping):
        raise UserError(f"model.backbone: {dict(value)} is a mapping; values must be numbers, words or lists of them")
    if not isinstance(value, str):
        return value
    # YAML's spellings, and Python's: a checkpoint's arguments are handed on as Python prints them. Any other text would
    # count as true. But "none" is a word of timm's.
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "null": None, "~": None}
    if value == "None" or value.lower() in words:
        return words.get(value.lower())
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
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2] not in _MODULES:
            # Of an argument that transformers have, and this model has not.
            raise UserError(f"{label} is no plain vision transformer; {_nearest(architecture)}") from error
        # timm's own message names a wrong argument; of an unknown activation or norm it is the name alone.
        reason = f"timm has no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise UserError(f"{label} with model.backbone={dict(options)}: {reason}") from error
    if type(model) not in (VisionTransformer, Eva) or type(model.patch_embed) is not PatchEmbed:
        raise UserError(f"{label} is a {type(model).__name__}, no plain vision transformer; {_nearest(architecture)}")
    if not len(model.blocks):
        raise UserError(f"{label}: it has no blocks; set model.backbone.depth to 1 or more")
    block, (side, other), (patch, across) = model.blocks[0], model.patch_embed.img_size, model.patch_embed.patch_size
    if (side, patch) != (other, across):
        raise UserError(
            f"{label}: frames and patches must be squares, not {side} x {other} and {patch} x {across}; set "
            "model.image_size"
        )
    if not model.global_pool:
        raise UserError(f"{label}: without pooling a clip has no feature; set model.backbone.global_pool")
    if side % patch:
        near = " or ".join(str(count * patch) for count in (side // patch, side // patch + 1) if count)
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


# timm's modules with transformers of the classes above.
_MODULES = ("vision_transformer", "eva", "deit")
# Attention that egohod/model/timm_vision.py can compute.
_ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")


# Of timm's modules with plain transformers: blocks in parallel, differential attention, a second classifier, timm's own
# tests; and pictures that are no squares or that the patches do not divide, which need a model.image_size.
_NOT_OF_TIMM = (
    *("vit_*_18x2_*", "vit_*_xp_*", "vit_pwee_*", "vit_dlittle_*", "vit_dwee_*", "vit_dpwee_*", "deit_*_distilled_*"),
    *("test_*", "*_sapiens2", "vit_so400m_patch14_siglip_384", "vit_so400m_patch14_siglip_gap_384"),
)
# Of open_clip's models: convolutional towers, windows, other blocks, CoCa, text towers of Hugging Face.
_NOT_OF_OPEN_CLIP = (
    *("RN*", "convnext*", "swin*", "vit_relpos*", "MobileCLIP-*", "MobileCLIP2-[BS]*", "ViTamin*", "*CLIPA*", "coca*"),
    *("ViT-M-16-alt", "ViT-SO400M-14-SigLIP-384", "mt5*", "nllb*", "roberta*", "xlm*"),
)


def model_names(pretrained: bool = False) -> list[str]:
    """Names that :func:`geometry` builds as they are; ``_Slowfast`` may be put behind those of timm and open_clip.

    With ``pretrained`` those of timm have tags (``timm/NAME.TAG``), and are those with published weights.
    """
    import open_clip
    import timm

    backbones = timm.list_models(module=list(_MODULES), exclude_filters=list(_NOT_OF_TIMM), pretrained=pretrained)
    models = (name for name in open_clip.list_models() if not any(map(partial(fnmatchcase, name), _NOT_OF_OPEN_CLIP)))
    return [*GEOMETRIES, *(TIMM + name for name in backbones), *(OPEN_CLIP + name for name in models)]


def _nearest(architecture: str) -> str:
    """The vision transformers of timm whose names are the most like ``architecture``."""
    names = [name.removeprefix(TIMM) for name in model_names() if name.startswith(TIMM)]
    # Below that ratio convnext_base is close to flexivit_base. Whoever asks for a convolutional net sees one name of
    # each family.
    near = difflib.get_close_matches(architecture, names, n=5, cutoff=0.75)
    families = ["vit_base_patch16_siglip_224", "eva02_base_patch16_clip_224", "vit_pe_core_base_patch16_224"]
    return f"the nearest vision transformers are {', '.join(near or ['vit_base_patch16_clip_224', *families])}"


# --------------------------------------------------------------------------------------------------
# Models of open_clip
# --------------------------------------------------------------------------------------------------

_OPEN_CLIP_FILE = "open_clip_config.json"
# What open_clip's own vision towers may have beyond their sizes that ours has not, with the value at which it is off.
_BEYOND_OURS = {
    "ls_init_value": None, "attentional_pool": False, "no_ln_pre": False, "pos_embed_type": "learnable",
    "final_ln_after_pool": False, "pool_type": "tok", "act_kwargs": None, "block_type": None, "qk_norm": False,
    "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False, "scale_attn": False,
    "scale_fc": False,
}  # fmt: skip
# The same of its text towers.
_BEYOND_TEXT = {
    "hf_model_name": None, "embed_cls": False, "ls_init_value": None, "final_ln_after_pool": False, "block_type": None,
    "tokenizer_mode": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False,
    "scale_attn_inner": False, "scale_attn": False, "scale_fc": False,
}  # fmt: skip


def _open_clip_config(name: str, label: str) -> tuple[dict[str, Any], ImageStats | None]:
    """open_clip's configuration of a model, and the pixels that its weights expect.

    ``name`` is one of open_clip's, or a folder with ``open_clip_config.json``, as on the Hugging Face Hub, or such a
    repository itself, ``hf-hub:org/name``. Raises :class:`UserError`, whose text begins with ``label``, the setting.
    """
    import open_clip
    from open_clip import pretrained

    if name.startswith(hub.PREFIX):
        # Before open_clip, which would fetch it too. With the tokenizer, which is looked for beside this file.
        folder = hub.folder_of(name, lambda names: [*({_OPEN_CLIP_FILE} & {*names}), *hub.tokenizer_files(names)])
        if folder is None or not (folder / _OPEN_CLIP_FILE).is_file():
            raise UserError(f"{label}: {name} has no {_OPEN_CLIP_FILE}, so it is no model of open_clip")
        name = str(folder)
    elif (config := open_clip.get_model_config(name)) is not None:
        tags = [pretrained.get_pretrained_cfg(name, tag) for tag in pretrained.list_pretrained_tags_by_model(name)]
        # Most weights of a name agree; others bring their own by tag or folder, which load_weights compares.
        stats = Counter((tuple(tag["mean"]), tuple(tag["std"])) for tag in tags).most_common(1)
        return config, ImageStats(*stats[0][0]) if stats else None
    path = Path(name) / _OPEN_CLIP_FILE
    if not path.is_file():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=5, cutoff=0.0)
        raise UserError(
            f"{label}: open_clip has no model '{name}' (the nearest are {', '.join(near)}), and it is no folder with "
            f"{_OPEN_CLIP_FILE}"
        )
    try:
        content = json.loads(path.read_bytes())
        config, pixels = content["model_cfg"], content.get("preprocess_cfg", {})
        if not all(isinstance(config[part], dict) for part in ("vision_cfg", "text_cfg")):
            raise TypeError
        # As on the Hub: the tokenizer of a model is beside its weights.
        if (path.parent / "tokenizer_config.json").is_file() and config["text_cfg"].get("hf_tokenizer_name"):
            config["text_cfg"]["hf_tokenizer_name"] = name
        if "mean" not in pixels:
            return config, None
        mean, std = ([float(value) for value in pixels[key]] for key in ("mean", "std"))
        return config, image_stats(stats_name(ImageStats((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: no configuration of open_clip ({error!r})") from error


def _text_of(name: str, config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Fields of :class:`Geometry` for the text tower of an open_clip configuration, and for what both towers share."""
    from open_clip.model import CLIPTextCfg

    text = CLIPTextCfg(**config["text_cfg"])
    _require_sizes(text.width, text.heads, text.layers, text.context_length, text.vocab_size, config["embed_dim"])
    beyond = [key for key, off in _BEYOND_TEXT.items() if getattr(text, key) != off]
    if text.pool_type not in ("argmax", "eos", "first", "last"):
        beyond.append(f"pool_type={text.pool_type}")
    if beyond or "multimodal_cfg" in config:
        what = "is of CoCa" if "multimodal_cfg" in config else f"has {beyond[0]}"
        raise UserError(f"{label}: the text tower of open_clip's {name} {what}, which is not supported")
    options = dict(text.tokenizer_kwargs or {})
    repository = text.hf_tokenizer_name or ""
    # Each tokenizer of open_clip has a default of its own.
    clean = options.pop("clean", "whitespace" if repository else "lower")
    if not isinstance(repository, str) or "\0" in repository or clean not in ("whitespace", "lower", "canonicalize"):
        raise ValueError(f"its tokenizer is {repository!r}, cleaned by {clean!r}")
    strip = bool(options.pop("strip_sep_token", False))
    if options:
        raise UserError(f"{label}: the tokenizer of open_clip's {name} has {min(options)}, which is not supported")
    return {
        "text_width": text.width,
        "text_layers": text.layers,
        "text_heads": text.heads,
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "embed_dim": config["embed_dim"],
        "activation": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "text": TextOptions(
            mlp_ratio=float(text.mlp_ratio),
            causal=not text.no_causal_mask,
            pool=text.pool_type,
            eos_id=text.eos_id,
            projection="none" if text.proj_type == "none" else "linear" if text.proj_bias else "matrix",
            norm_eps=float((text.norm_kwargs or {}).get("eps", 1e-5)),
            activation="gelu_tanh" if (text.act_kwargs or {}).get("approximate") == "tanh" else "",
            tokenizer=repository,
            clean=clean,
            strip_sep_token=strip,
        ),
    }


def _require_sizes(width: int, heads: int, *others: int) -> None:
    """Raise :class:`ValueError` for sizes of a file that no tower can have."""
    if not all(type(size) is int and 0 < size < 10**7 for size in (width, heads, *others)) or width % heads:
        raise ValueError(f"sizes must be whole numbers above 0, and {heads} heads share a width of {width}")


@contextmanager
def _open_clip_errors(label: str) -> Iterator[None]:
    """Turn what a damaged configuration in a folder raises into a :class:`UserError` that begins with ``label``."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{label}: its open_clip_config.json cannot be used ({error!r})") from error


def _open_clip_geometry(name: str, image_size: int | None, backbone: Mapping[str, Any] | None) -> Geometry:
    """Both towers of open_clip's model ``name``: on a timm backbone, or on our own tower where open_clip's is a ViT."""
    from open_clip.model import CLIPVisionCfg

    label = f"model.name: {OPEN_CLIP}{name}"
    config, stats = _open_clip_config(name, label)
    both = _text_of(name, config, label)
    both |= {
        "image_stats": stats,
        "logit_scale": float(config.get("init_logit_scale", math.log(1 / 0.07))),
        # A whole number in the files.
        "logit_bias": None if config.get("init_logit_bias") is None else float(config["init_logit_bias"]),
    }
    vision = CLIPVisionCfg(**config["vision_cfg"])
    if vision.timm_model_name:
        if vision.timm_proj == "mlp" or vision.timm_pool in ("abs_attn", "rot_attn"):
            raise UserError(f"{label}: its vision tower has {vision.timm_proj or vision.timm_pool}, not supported")
        # Behind a projection of open_clip's the backbone has the norms of its own pooling.
        pool = {"global_pool": vision.timm_pool} if vision.timm_proj != "linear" else {}
        options = pool | dict(backbone or {})
        shape = geometry(TIMM + vision.timm_model_name, image_size, options)
        # The backbone's name says a size, but weights may have been trained on with another one.
        side = config["vision_cfg"].get("image_size", shape.image_size)
        if image_size is None and side != shape.image_size:
            shape = geometry(TIMM + vision.timm_model_name, side, options)
        if vision.timm_pool not in ("", shape.pool):
            raise UserError(f"{label}: its backbone pools by {vision.timm_pool} instead of {shape.pool}, not supported")
        # Without a projection of its own the backbone's classifier is one.
        kinds = {"none": "none", "linear": "linear" if vision.timm_proj_bias else "matrix"}
        both["image_stats"] = stats or shape.image_stats
        return replace(shape, projection=kinds.get(vision.timm_proj or "", "linear"), **both)
    beyond = [key for key, off in _BEYOND_OURS.items() if getattr(vision, key) != off]
    if isinstance(vision.layers, (list, tuple)) or beyond:
        what = f"a vision transformer with {beyond[0]}" if beyond else "a ResNet"
        raise UserError(f"{label}: its vision tower is {what}, which is not supported")
    heads = vision.width // vision.head_width
    _require_sizes(vision.width, heads, vision.layers, vision.image_size, vision.patch_size)
    if vision.image_size % vision.patch_size:
        raise UserError(f"{label}: patches of {vision.patch_size} px do not divide {vision.image_size} px")
    if backbone or image_size not in (None, vision.image_size):
        key = "backbone" if backbone else "image_size"
        raise UserError(f"model.{key} is for timm backbones; the sizes of {name} are fixed ({vision.image_size} px)")
    return Geometry(
        OPEN_CLIP + name, vision.image_size, vision.patch_size, vision.width, vision.layers, heads,
        mlp_ratio=float(vision.mlp_ratio), norm_eps=float((vision.norm_kwargs or {}).get("eps", 1e-5)), **both,
    )  # fmt: skip


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
    # SigLIP, PE and most of timm's ViTs trained on ImageNet-21k.
    "inception": ImageStats((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def image_stats(name: str) -> ImageStats:
    """The statistics called ``name``, or written as six numbers: ``r,g,b/r,g,b``, mean first.

    Raises :class:`UserError` for anything else.
    """
    if name in IMAGE_STATS:
        return IMAGE_STATS[name]
    try:
        mean, std = (tuple(float(number) for number in half.split(",")) for half in name.split("/"))
    except ValueError:
        mean, std = (), ()
    is_valid = all(map(math.isfinite, (*mean, *std))) and all(value > 0 for value in std)
    if len(mean) != 3 or len(std) != 3 or not is_valid:
        allowed = f"auto, {', '.join(IMAGE_STATS)}"
        raise UserError(f"model.image_stats is '{name}', but must be {allowed}, or mean/deviation as r,g,b/r,g,b")
    return ImageStats(mean, std)


def stats_name(stats: ImageStats) -> str:
    """The inverse of :func:`image_stats`: what a checkpoint records."""
    # Files of other libraries round: 0.4815 is OpenAI's 0.48145466, and AVION's red mean is 0.06 away.
    for name, named in IMAGE_STATS.items():
        numbers = zip([*named.mean, *named.std], [*stats.mean, *stats.std], strict=True)
        if all(abs(ours - theirs) < 1e-3 for ours, theirs in numbers):
            return name
    # All digits of float32, so that the pixels of a model that is loaded are those of the one that was trained.
    return "/".join(",".join(f"{value:.9g}" for value in part) for part in stats)


@dataclass
class WeightsConfig:
    """Where training starts from."""

    source: str = knob(
        "scratch",
        "one explicit choice: random weights; an image model of OpenAI, open_clip, transformers or timm (clip); or a "
        "trained video model of this project, upstream EgoHOD or AVION (checkpoint). docs/checkpoints.md",
        choices=("scratch", "clip", "checkpoint"),
    )
    path: str | None = knob(
        None,
        "a file, a folder of the Hugging Face Hub or a repository (hf-hub:org/name, which is downloaded), a run or "
        "checkpoint folder, or an open_clip tag such as ViT-B-16:laion2b_s34b_b88k",
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
        "both output projections, the temperature and the sigmoid loss's offset: fresh, as the published recipe starts "
        "from CLIP, or keep; auto is fresh for clip and keep for checkpoint, and keep for open_clip/... models, whose "
        "towers belong together",
        choices=("auto", "fresh", "keep"),
    )
    download: bool = knob(
        False,
        "let open_clip download what a tag names, and Hugging Face the tokenizer of a text tower; false looks at local "
        "caches only, nothing but hf-hub:... is downloaded",
    )


@dataclass
class LoraConfig:
    """Low-rank parts of the blocks' weights, for ``train.trainable=lora``."""

    rank: int = knob(
        16,
        "rank of the product that is added to each weight; its parameters, and what it can learn, grow with it; the "
        "paper (2106.09685) uses 1 to 64",
        low=1,
    )
    alpha: float = knob(
        16.0, "the product is scaled by alpha / rank, so that another rank needs no other learning rate", above=0
    )
    layers: list[str] = knob(
        ["qkv", "proj", "mlp"],
        "layers of each block that have one: qkv (queries, keys and values), proj (the attention's output), mlp (both "
        "layers); the paper has it on queries and values, QLoRA (2305.14314) needed all layers to match full training",
        choices=("qkv", "proj", "mlp"),
    )
    towers: list[str] = knob(
        ["visual", "textual"],
        "towers whose blocks have them; with model.heads the text tower is not trained in any case",
        choices=("visual", "textual"),
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
        f"geometry: {', '.join(GEOMETRIES)}, or timm/NAME for a vision transformer of timm, open_clip/NAME for both "
        "towers of an open_clip model (or of a folder with open_clip_config.json); ..._Slowfast has a fast path with "
        "motion adapters. docs/backbones.md",
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
    text: str | None = knob(
        None,
        "text tower: a name of open_clip whose text tower and tokenizer are taken, such as ViT-B-16-SigLIP2; null is "
        "that of model.name",
    )
    tokenizer: str | None = knob(
        None,
        "folder with the files of a Hugging Face tokenizer (tokenizer.json), for a text tower that has one; null looks "
        "into the local cache of Hugging Face; CLIP's own tokenizer needs no files",
    )
    num_frames: int = knob(4, "frames per clip; the released models train on 4, slow-fast ones on 16", low=1)
    fast: FastPathConfig = part(FastPathConfig)
    embed_dim: int | None = knob(
        None, "dimensions of the shared space; null is the geometry's, AVION's released models have 256", low=1
    )
    activation: str = knob(
        "auto",
        "auto is the one of model.name: gelu for CLIP_..., as upstream and AVION checkpoints expect, although OpenAI "
        "trained CLIP with quick_gelu; that of its configuration for open_clip/...",
        choices=("auto", "gelu", "quick_gelu"),
    )
    image_stats: str = knob(
        "auto",
        "mean and standard deviation that the weights expect of pixels; they are saved with the weights. auto: those "
        "of model.name; clip: OpenAI's, as upstream trains; avion: AVION's and LaViLa's, whose red mean is 0.21 "
        "deviations lower; imagenet; inception: 0.5 and 0.5, as SigLIP; or mean/deviation as r,g,b/r,g,b",
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
        "classification heads on the clip's feature in the shared space: one for all classes (joint), one for each of "
        "data.labels.columns, such as verb and noun (parts), or these together, trained on the sum of their losses "
        "(all); none for pretraining and retrieval",
        choices=("none", "joint", "parts", "all"),
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
        if self.text:
            config, _ = _open_clip_config(self.text, "model.text")
            with _open_clip_errors(f"model.text: {self.text}"):
                fields = _text_of(self.text, config, "model.text")
            # Of another model than the vision tower, so with an activation of its own.
            activation = fields.pop("activation")
            text = replace(fields["text"], activation=fields["text"].activation or activation)
            shape = replace(shape, **fields | {"text": text})
        if self.embed_dim:
            shape = replace(shape, embed_dim=self.embed_dim)
        for tower, projection, width in (
            ("vision", shape.projection, shape.vision_width),
            ("text", shape.text.projection, shape.text_width),
        ):
            if projection == "none" and width != shape.embed_dim:
                raise UserError(
                    f"the {tower} tower of {shape.name} has no projection: its {width} dimensions are the shared "
                    f"space, which would have {shape.embed_dim} by model.embed_dim or model.text"
                )
        return shape

    def activation_of(self, shape: Geometry) -> str:
        """``model.activation``, where ``auto`` is that of ``shape``."""
        return shape.activation if self.activation == "auto" else self.activation

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
