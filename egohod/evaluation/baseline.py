"""An outside model to compare with: an image-text model of open_clip that sees each frame by itself."""

from __future__ import annotations

import open_clip
from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from egohod.errors import UserError
from egohod.model.config import ImageStats


class FrameAverage(nn.Module):
    """The mean of the frames' features: blind to their order by construction.

    ``name`` and ``pretrained`` are open_clip's, the latter a tag in its local cache or a file; None is random weights.
    Raises :class:`UserError` for what open_clip does not know or cannot find.
    """

    def __init__(self, name: str, pretrained: str | None = None) -> None:
        super().__init__()
        try:
            self.inner = open_clip.create_model(name, pretrained=pretrained)
            self.tokenizer = open_clip.get_tokenizer(name)
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            raise UserError(f"open_clip:{name}: {' '.join(str(error).split())}") from error
        config = open_clip.get_model_preprocess_cfg(self.inner)
        size = config["size"]
        self.size = int(size[0] if isinstance(size, (tuple, list)) else size)
        self.image_stats = ImageStats(tuple(config["mean"]), tuple(config["std"]))

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        """Frames normalised by ``image_stats`` [B, 3, T, H, W] -> [B, D]."""
        batch, _, frames, *_ = video.shape
        images = video.transpose(1, 2).flatten(0, 1)
        mean = unit(self.inner.encode_image(images), dim=-1).unflatten(0, (batch, frames)).mean(dim=1)
        return unit(mean, dim=-1) if normalize else mean

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Token ids [B, L] -> [B, D]."""
        full = tokens.new_zeros(len(tokens), self.inner.context_length)
        full[:, : tokens.shape[1]] = tokens
        return self.inner.encode_text(full, normalize=normalize)


def open_clip_baseline(text: str) -> FrameAverage:
    """The model of ``open_clip:NAME[:PRETRAINED]``, e.g. ``open_clip:ViT-B-16:/path/to/weights.pt``."""
    name, _, pretrained = text.removeprefix("open_clip:").partition(":")
    return FrameAverage(name, pretrained or None)
