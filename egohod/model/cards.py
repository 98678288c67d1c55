"""What a model is, before anything is loaded: sizes, cost, and which weights are published under which licence."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, NamedTuple

import open_clip
import timm
import torch

from egohod.config import model_config
from egohod.model.config import GEOMETRIES
from egohod.model.cost import count_flops
from egohod.model.dual_encoder import EgoVideo, create_model

UNKNOWN = "unknown"


class PublishedWeights(NamedTuple):
    """A weight file that somebody published, and what its publisher says of its licence."""

    file: str
    source: str
    licence: str
    """As stated there, else ``unknown``; no substitute for reading it."""
    stated: str
    """Where the licence is stated."""


@dataclass(frozen=True)
class ModelInfo:
    """Sizes and cost of a model."""

    name: str
    vision_parameters: int
    text_parameters: int
    parameters: int
    """All, with the merge of two paths and the temperature."""
    frames: int
    resolution: int
    """Side of a frame in pixels."""
    patch_size: int
    tokens: int
    """Of a clip in the vision tower, those of both paths together."""
    embed_dim: int
    gflops: float
    """Billions of operations (2 per multiply-add) of the vision tower for one clip, forward."""
    text_gflops: float
    """Of the text tower for one text of the whole context length."""
    weights: tuple[PublishedWeights, ...]


def list_models(pattern: str = "*") -> list[str]:
    """Names of models that match ``pattern``, as in a shell: ``list_models("*_Slowfast")``."""
    return fnmatch.filter(GEOMETRIES, pattern)


def model_info(name: str, **overrides: Any) -> ModelInfo:
    """Parameters of both towers, cost of a clip, resolution, tokens, and published weights with their licences.

    Nothing is allocated, read or downloaded. Frames are those of the presets, 16 for a slow-fast model and 4 for the
    others, unless ``num_frames`` is given.

    Args:
        name: any model that ``egohod.create_model`` builds, e.g. ``CLIP_VITB16``.
        overrides: knobs of the section ``model``, as of ``egohod.create_model``.

    Raises:
        UserError: unknown name, with the nearest one, or a wrong knob.
    """
    config = model_config(name, **({"num_frames": 16 if name.endswith("_Slowfast") else 4} | overrides))
    with torch.device("meta"), torch.no_grad():
        model = create_model(config).eval()
        shape = model.geometry
        video = torch.empty(1, 3, config.num_frames, shape.image_size, shape.image_size)
        texts = torch.zeros(1, shape.context_length, dtype=torch.long)
        # Counted and not by formula: the same for every tower.
        gflops = count_flops(lambda: model.encode_video(video)) / 1e9
        text_gflops = count_flops(lambda: model.encode_text(texts)) / 1e9
        paths = [video, video[:, :, : model.slow]] if isinstance(model, EgoVideo) else [video]
        tokens = sum(model.visual.embed(frames)[0].shape[1] for frames in paths)

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    return ModelInfo(
        name=name,
        vision_parameters=count(model.visual),
        text_parameters=count(model.textual),
        parameters=count(model),
        frames=config.num_frames,
        resolution=shape.image_size,
        patch_size=shape.patch_size,
        tokens=tokens,
        embed_dim=shape.embed_dim,
        gflops=gflops,
        text_gflops=text_gflops,
        weights=published_weights(name),
    )


def published_weights(name: str) -> tuple[PublishedWeights, ...]:
    """The published weight files for the model ``name`` that are recorded here; nobody published any of two paths.

    Of ``timm/NAME`` and ``open_clip/NAME`` those that the installed libraries list.
    """
    family, _, backbone = name.removesuffix("_Slowfast").rpartition("/")
    if family == "timm" and timm.is_model(backbone.partition(".")[0]):
        cfg = timm.get_pretrained_cfg(backbone)
        if cfg is None or not (cfg.hf_hub_id or cfg.url):
            return ()
        # A default of the family in timm's code, where the entry of the model does not override it.
        stated = f"pretrained_cfg of timm {timm.__version__}, perhaps its family's default; see the model's page"
        source = f"huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
        return (PublishedWeights(f"{cfg.architecture}.{cfg.tag}", source, cfg.license or UNKNOWN, stated),)
    if family == "open_clip":
        listed = []
        for tag in open_clip.list_pretrained_tags_by_model(backbone):
            cfg = open_clip.get_pretrained_cfg(backbone, tag)
            source = f"huggingface.co/{cfg['hf_hub'].strip('/')}" if cfg.get("hf_hub") else cfg.get("url", UNKNOWN)
            listed.append(
                PublishedWeights(f"{backbone}:{tag}", source, UNKNOWN, "open_clip records none; see its page")
            )
        return tuple(listed)
    return _PUBLISHED.get(name, ())


# Quoted from what their publishers wrote, read in November 2026. A repository's licence need not be that of weights
# which are downloaded from elsewhere, so each has the place where it was stated.
_OPENAI = ("github.com/openai/CLIP", "MIT", "LICENSE of the repository, which does not mention weights")
_AVION = ("github.com/zhaoyue-zephyrus/AVION", "MIT", "README of the repository, which does not mention weights")
_UPSTREAM = ("github.com/OpenRobotLab/EgoHOD", UNKNOWN, "none in the README of the repository")
_PUBLISHED = {
    "CLIP_VITB16": (
        PublishedWeights("OpenAI ViT-B-16.pt", *_OPENAI),
        PublishedWeights(
            "open_clip ViT-B-16:laion2b_s34b_b88k",
            "huggingface.co/laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
            "MIT",
            "model card",
        ),
        PublishedWeights("AVION ViT-B", *_AVION),
    ),
    "CLIP_VITL14": (
        PublishedWeights("OpenAI ViT-L-14.pt", *_OPENAI),
        PublishedWeights(
            "open_clip ViT-L-14:laion2b_s32b_b82k",
            "huggingface.co/laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
            "MIT",
            "model card",
        ),
        PublishedWeights("AVION ViT-L", *_AVION),
    ),
    "CLIP_VITL14_336PX": (
        PublishedWeights("OpenAI ViT-L-14-336px.pt", *_OPENAI),
        PublishedWeights("EgoHOD large_best.pt", *_UPSTREAM),
    ),
}
