"""Sizes of both towers by name, settings of the model, and of the weights it starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """Two paths with motion adapters, see :class:`egohod.model.vision.SlowFastTransformer`."""
    context_length: int = 77
    vocab_size: int = 49408
    text_mlp_ratio: float = 4.0

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


def geometry(name: str) -> Geometry:
    """The geometry called ``name``; :class:`UserError` lists the names there are."""
    if name not in GEOMETRIES:
        raise UserError(f"model.name: no geometry '{name}'; there are {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]


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
        "geometry, see egohod/model/config.py; ..._Slowfast has a fast path with motion adapters",
        choices=tuple(GEOMETRIES),
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
