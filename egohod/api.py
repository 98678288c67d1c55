"""The Python interface: models and their cards, preprocessing and tokenizer, and clips as arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from torch import Tensor, nn

from egohod.config import model_config
from egohod.data.dataset import Tokenizer, center_crop, normalise, tokenizer_for
from egohod.data.decoders import choose_decoder
from egohod.data.videos import read_clip
from egohod.errors import UserError
from egohod.evaluation.benchmarks import load_benchmark as load_benchmark
from egohod.evaluation.cards import list_benchmarks as list_benchmarks
from egohod.loss.config import LossConfig
from egohod.model import checkpoints as weights_of_files
from egohod.model import dual_encoder
from egohod.model.cards import list_models as list_models
from egohod.model.cards import model_info as model_info
from egohod.model.checkpoints import WeightReport
from egohod.model.dual_encoder import DualEncoder
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
            the Hugging Face Hub, a run or checkpoint folder of this project, or an open_clip tag such as
            ``ViT-B-16:laion2b_s34b_b88k``.
        adapt: resize position embeddings, and start parts anew that the file does not have; else these are errors.
        projections: ``fresh`` keeps the model's output projections and temperature, ``keep`` takes the file's; ``auto``
            is fresh for CLIP models, as published, and keep for trained video models.
        download: let open_clip fetch what a tag names; otherwise nothing is downloaded.

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
        name: as of :func:`create_model`.
        weights: whatever :func:`load_weights` reads, or None for random weights. Frame count and shared space are the
            file's unless given; a folder of this project also holds activation and image statistics.
        adapt, projections, download: see :func:`load_weights`.
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
    if weights is None:
        config = model_config(name, **overrides)
        model = dual_encoder.create_model(config)
    else:
        content = open_weights(weights, download=download)
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
