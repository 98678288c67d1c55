"""The Python face: a model with its preprocessing and tokenizer, and clips as arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from egohod.config import FastPathConfig, LossConfig, ModelConfig, UserError
from egohod.data.decoders import choose_decoder
from egohod.data.text import Tokenizer
from egohod.data.transforms import center_crop, normalise
from egohod.data.video import read_clip
from egohod.model.egovideo import DualEncoder, create_model
from egohod.model.video import ACTIVATIONS
from egohod.model.weights import load_openai, load_state
from egohod.training.checkpoint import open_checkpoint

Preprocess = Callable[[np.ndarray], Tensor]


def create_model_and_transforms(
    name: str, weights: str | Path | None = None, *, num_frames: int = 4, activation: str = "gelu"
) -> tuple[DualEncoder, Preprocess, Tokenizer]:
    """A dual encoder ready to embed, in evaluation mode on the CPU.

    Args:
        name: a geometry of :mod:`egohod.model.zoo`, e.g. ``CLIP_VITB16``.
        weights: a run or checkpoint folder of this project (which then knows ``num_frames`` and ``activation``),
            OpenAI's CLIP file, or None for random weights.
        num_frames: frames the temporal embedding has; other counts are interpolated.
        activation: ``gelu`` or ``quick_gelu`` (what OpenAI trained with).

    Returns:
        model: ``encode_video(video [B, 3, T, S, S])`` and ``encode_text(tokens [B, L])`` give unit vectors [B, E].
        preprocess: frames uint8 [T, H, W, 3] -> the middle square, normalised, float32 [3, T, S, S].
        tokenizer: list of strings -> int64 [B, L].

    Raises:
        UserError: unknown name, or weights that are missing, unreadable or of another geometry.
    """
    if num_frames < 1 or activation not in ACTIVATIONS:
        raise UserError(
            f"num_frames={num_frames}, activation={activation}: frames count from 1, activations are "
            f"{', '.join(ACTIVATIONS)}"
        )
    config = ModelConfig(name=name, num_frames=num_frames, activation=activation)
    checkpoint = open_checkpoint(Path(weights)) if weights is not None and Path(weights).is_dir() else None
    if checkpoint:
        identity = checkpoint.manifest["identity"]
        if identity.get("model.name") != name:
            raise UserError(f"{checkpoint.path}: holds a {identity.get('model.name')}, not a {name}")
        config.num_frames, config.activation = identity["model.num_frames"], identity["model.activation"]
        config.fast = FastPathConfig(**identity["model.fast"])
    model = create_model(config, LossConfig(name=identity["loss.name"] if checkpoint else "infonce"))
    if checkpoint:
        load_state(model, checkpoint.weights, str(checkpoint.path))
    elif weights is not None:
        load_openai(model, weights)
    size = model.geometry.image_size

    def preprocess(frames: np.ndarray) -> Tensor:
        return normalise(center_crop(frames, size).unsqueeze(0))[0]

    return model.eval(), preprocess, Tokenizer(model.geometry.context_length)


def load_clip(path: str | Path, start: float, end: float, frames: int, decoder: str = "auto") -> np.ndarray:
    """``frames`` pictures of [start, end) seconds of a video file, one from the middle of each equal part.

    Returns uint8 RGB [frames, H, W, 3], upright. A clip that runs beyond the video's end is cut there.

    Raises:
        UserError: an empty or negative stretch of time, or no frames.
        VideoError: no such file, not a video, damaged, or a clip that begins beyond its end.
    """
    if not 0 <= start < end or frames < 1:
        raise UserError(f"{path}: a clip needs 0 <= start < end and a frame, not {start}, {end} and {frames}")
    return read_clip(choose_decoder(decoder)[1], Path(path), str(path), start, end, frames)
