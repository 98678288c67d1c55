"""What a model is, before anything is loaded: sizes, cost, and which weights are published under which licence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch

from egohod.config import model_config
from egohod.model.config import model_names
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


def list_models(pattern: str | Sequence[str] = "*", pretrained: bool = False) -> list[str]:
    """Names of models: this project's, and those of timm and open_clip that can be built.

    Args:
        pattern: names to list, or several, as in a shell and in any case: ``list_models("timm/*siglip*")``.
        pretrained: list timm's names with the tags of published weights, ``timm/NAME.TAG``.

    ``_Slowfast`` may be put behind every name of timm and open_clip; only this project's are listed with it.
    """
    patterns = [each.lower() for each in ([pattern] if isinstance(pattern, str) else pattern)]
    return [name for name in model_names(pretrained) if any(fnmatchcase(name.lower(), each) for each in patterns)]


def model_info(name: str, **overrides: Any) -> ModelInfo:
    """Parameters of both towers, cost of a clip, resolution, tokens, and published weights with their licences.

    Nothing is allocated, read or downloaded. Frames are those of the presets, 16 for a slow-fast model and 4 for the
    others, unless ``num_frames`` is given.

    Args:
        name: any model that ``egohod.create_model`` builds, e.g. ``CLIP_VITB16``, ``timm/NAME`` or ``open_clip/NAME``.
        overrides: knobs of the section ``model``, as of ``egohod.create_model``.

    Raises:
        UserError: unknown name, with the nearest one, or a wrong knob.
    """
    config = model_config(name, **({"num_frames": 16 if name.endswith("_Slowfast") else 4} | overrides))
    with torch.device("meta"), torch.no_grad():
        # Without gradients of weights: PyTorch's counter fails where a layer is called with a trained one (SigLIP's
        # attention pooling), although none is recorded.
        model = create_model(config).eval().requires_grad_(False)
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
    if family == "timm" and timm.models.is_model_pretrained(backbone):
        cfg = timm.get_pretrained_cfg(backbone)
        # A default of the family in timm's code, where the entry of the model does not override it.
        stated = f"pretrained_cfg of timm {timm.__version__}, perhaps its family's default"
        source = f"huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
        return (PublishedWeights(f"{cfg.architecture}.{cfg.tag}", source, cfg.license or UNKNOWN, stated),)
    if family == "open_clip":
        listed = []
        for tag in open_clip.list_pretrained_tags_by_model(backbone):
            cfg = open_clip.get_pretrained_cfg(backbone, tag)
            source = f"huggingface.co/{cfg['hf_hub'].strip('/')}" if cfg.get("hf_hub") else cfg.get("url", UNKNOWN)
            file, licence = f"{backbone}:{tag}", (UNKNOWN, "not in open_clip; see its page")
            # Some are weights of our own towers too, and were looked up for these; others are in timm's list.
            quoted = [each for entries in _PUBLISHED.values() for each in entries if each.file == f"open_clip {file}"]
            quoted += [each for each in published_weights(f"timm/{Path(source).name}") if each.source == source]
            if tag == "openai":
                licence = _OPENAI[1:]
            elif quoted:
                licence = (quoted[0].licence, quoted[0].stated)
            listed.append(PublishedWeights(file, source, *licence))
        return tuple(listed)
    return _PUBLISHED.get(name, ())


# Quoted from what their publishers wrote, read in November 2026. A repository's licence need not be that of weights
# which are downloaded from elsewhere, so each has the place where it was stated.
_OPENAI = ("github.com/openai/CLIP", "MIT", "LICENSE of the repository, which does not mention weights")
_AVION = ("github.com/zhaoyue-zephyrus/AVION", "MIT", "README of the repository, which does not mention weights")
_UPSTREAM = ("github.com/InternRobotics/EgoHOD", UNKNOWN, "none in the README of the repository")
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
