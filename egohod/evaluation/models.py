"""What an evaluation takes for a model: a video and a text tower, heads, an open_clip baseline, temporal controls."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from egohod.data.labels import ClassSpace
from egohod.errors import UserError
from egohod.model.config import IMAGE_STATS, ImageStats
from egohod.model.dual_encoder import DualEncoder


@runtime_checkable
class VideoTextModel(Protocol):
    """Two towers into one space, whose features are L2-normalised with ``normalize=True``."""

    training: bool

    def train(self, mode: bool = True) -> Any:
        """Switch dropout and the like on or off."""

    def encode_video(self, video: Tensor, normalize: bool = ...) -> Tensor:
        """Frames [B, 3, T, H, W], normalised with :func:`image_stats_of`, to features [B, D]."""

    def encode_text(self, tokens: Tensor, normalize: bool = ...) -> Tensor:
        """Token ids [B, L] to features [B, D]."""


def image_stats_of(model: object) -> ImageStats:
    """The mean and standard deviation that a model's input is normalised with: its own, else CLIP's."""
    return getattr(model, "image_stats", IMAGE_STATS["clip"])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over a model's class and the names, types and bytes of its weights."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    # The same weights give other features with other image statistics. CLIP's are left out, so that fingerprints from
    # before there were any others stay valid.
    if (stats := image_stats_of(model)) != IMAGE_STATS["clip"]:
        digest.update(repr(stats).encode())
    # By name, as the order of a state dict is that of construction.
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # Viewed as bytes, as NumPy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ClassProbabilities(nn.Module):
    """A model with classification heads, whose feature of a clip is the probability of every class, [B, C].

    With heads for verb and noun a class has the product of both, normalised over the classes that exist.
    """

    def __init__(self, model: DualEncoder, space: ClassSpace) -> None:
        super().__init__()
        self.model, self.image_stats = model, model.image_stats
        # They follow from the class list, so they are no part of the state dict.
        for name, (_, code) in space.parts.items():
            self.register_buffer(f"{name}_of_class", torch.from_numpy(code), persistent=False)
        self.to(model.logit_scale.device)

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        """Frames normalised with ``image_stats`` [B, 3, T, H, W] -> probabilities float32 [B, C]."""
        logits = self.model.classify(video)
        if "action" in logits and len(logits) == 1:
            return logits["action"].softmax(dim=1)
        # Products of probabilities as sums of logarithms, which do not underflow.
        joint = [each.log_softmax(dim=1)[:, getattr(self, f"{name}_of_class")] for name, each in logits.items()]
        return torch.stack(joint).sum(dim=0).softmax(dim=1)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """The model's text features, which the evaluation of heads does not use."""
        return self.model.encode_text(tokens, normalize)


class FrameAverage(nn.Module):
    """A baseline: the mean of an open_clip image tower's features of the frames, blind to their order.

    ``spec`` is ``open_clip:NAME[:PRETRAINED]``, e.g. ``open_clip:ViT-B-16:/path/to/weights.pt``. The latter is a tag in
    open_clip's local cache or a file; without it the weights are random. Raises :class:`UserError` for a name or
    weights that open_clip does not have.
    """

    def __init__(self, spec: str) -> None:
        super().__init__()
        name, _, pretrained = spec.removeprefix("open_clip:").partition(":")
        try:
            self.inner = open_clip.create_model(name, pretrained=pretrained or None)
            self.tokenizer = open_clip.get_tokenizer(name)
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            raise UserError(f"open_clip:{name}: {' '.join(str(error).split())}") from error
        # Its own resolution and statistics: a baseline is measured as it was trained, not as our models are.
        config = open_clip.get_model_preprocess_cfg(self.inner)
        size = config["size"]
        self.size = int(size[0] if isinstance(size, (tuple, list)) else size)
        self.image_stats = ImageStats(tuple(config["mean"]), tuple(config["std"]))

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        """Frames normalised with ``image_stats`` [B, 3, T, H, W] -> [B, D]."""
        batch, _, frames, *_ = video.shape
        images = video.transpose(1, 2).flatten(0, 1)
        # Unit vectors first, or a frame of large norm would outvote the others.
        mean = unit(self.inner.encode_image(images), dim=-1).unflatten(0, (batch, frames)).mean(dim=1)
        return unit(mean, dim=-1) if normalize else mean

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Token ids [B, L] -> [B, D]."""
        # open_clip's text towers take the whole context; ours come trimmed.
        full = tokens.new_zeros(len(tokens), self.inner.context_length)
        full[:, : tokens.shape[1]] = tokens
        return self.inner.encode_text(full, normalize=normalize)


# --------------------------------------------------------------------------------------------------
# Temporal controls: the same clips with their time destroyed, to measure how much of a score is due to motion
# --------------------------------------------------------------------------------------------------

CONTROLS = ("shuffle", "reverse", "freeze")
# The name of the original order of frames, beside those of the temporal controls.
PLAIN = "plain"
# A clip's shuffled order is a function of this and of the clip's number.
SEED = 0


def apply_control(name: str, video: Tensor, numbers: Sequence[int]) -> Tensor:
    """``video`` [B, 3, T, H, W], uint8 or normalised, under the temporal control ``name``.

    ``shuffle`` is a random order that is never the original, a function of the clip's number alone; ``reverse`` plays
    the clip backwards; ``freeze`` repeats the middle frame, of an even number the later one. ``numbers`` [B] identify
    the clips. Raises :class:`UserError` for an unknown name, and for clips of one frame.
    """
    if name not in CONTROLS:
        raise UserError(f"no temporal control '{name}'; there are {', '.join(CONTROLS)}")
    frames = video.shape[2]
    if frames < 2:
        raise UserError(f"the temporal control '{name}' needs clips of at least two frames")
    # On the frames that are given to the model, so that a slow and a fast pathway see the same order.
    if name == "shuffle":
        order = torch.from_numpy(np.stack([shuffled_order(int(i), frames) for i in numbers])).to(video.device)
        return video.gather(2, order[:, None, :, None, None].expand_as(video))
    if name == "reverse":
        return video.flip(2)
    # Copied: a backbone may view the frames as if they were contiguous.
    return video[:, :, frames // 2 : frames // 2 + 1].expand_as(video).contiguous()


def shuffled_order(number: int, frames: int, seed: int = SEED) -> np.ndarray:
    """A permutation of ``frames`` >= 2 frames that is not the identity, int64 [frames]; a function of its arguments."""
    assert frames > 1
    # A generator of its own: neither the batch nor the process that a clip comes to changes its order.
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number))))
    while True:
        order = rng.permutation(frames)
        # Of two frames every second permutation changes nothing.
        if not np.array_equal(order, np.arange(frames)):
            return order
