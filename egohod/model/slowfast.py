"""EgoVideo: the vision tower on two paths, trained together (EgoHOD, section 3.3).

The slow path is the plain tower on few frames; it trains the backbone. The fast path runs many frames through the
same weights, frozen, with a motion adapter at each block; it trains the adapters, the patch and temporal embedding and
the projections. Frozen means that weights receive no gradient from this path; activations do, so every adapter learns.

Shape legend: B clips, T fast frames, T / lambda slow ones, P patches a frame, D width, E shared embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from egohod.errors import UserError
from egohod.model.config import ModelConfig
from egohod.model.vision import VideoTransformer, call_frozen
from egohod.model.zoo import Geometry

# Frames that the temporal convolution sees at once.
KERNEL = 3


class MotionAdapter(nn.Module):
    """Bottleneck with a depth-wise convolution over time at each location (EgoHOD, section 3.3).

    ``x + gamma * up(h + pointwise(depthwise(h)))`` with ``h = gelu(down(x))``, on patch tokens only; CLS passes
    untouched. ``up`` starts at zero, so a fresh adapter changes nothing. ``spatial`` adds a 3 x 3 convolution over
    each frame before the temporal one, which upstream has in commented form.
    """

    def __init__(self, width: int, spatial: bool = False) -> None:
        super().__init__()
        hidden = width // 2
        self.gamma = nn.Parameter(torch.ones(1))
        self.down_proj = nn.Linear(width, hidden)
        self.dwconv = nn.Conv1d(hidden, hidden, KERNEL, padding=KERNEL // 2, groups=hidden)
        self.conv = nn.Conv1d(hidden, hidden, 1)
        self.conv2d = nn.Conv2d(hidden, hidden, 3, padding=1) if spatial else None
        self.up_proj = nn.Linear(hidden, width)
        # Upstream says truncated normal, whose default bounds lie a hundred standard deviations away.
        nn.init.normal_(self.down_proj.weight, std=0.02)
        # He's scheme for the convolutions: 2 / inputs that one output reads.
        nn.init.normal_(self.dwconv.weight, std=(2 / KERNEL) ** 0.5)
        nn.init.normal_(self.conv.weight, std=(2 / hidden) ** 0.5)
        if self.conv2d is not None:
            nn.init.normal_(self.conv2d.weight, std=(2 / (9 * hidden)) ** 0.5)
        nn.init.zeros_(self.up_proj.weight)
        for layer in (self.down_proj, self.dwconv, self.conv, self.up_proj, self.conv2d):
            if layer is not None and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """``x`` [B, 1 + frames * P, D], CLS first, then frame by frame with P patches each -> the same shape."""
        B, N, _ = x.shape
        P = (N - 1) // frames
        assert frames * P == N - 1, f"{N - 1} patch tokens are no {frames} frames"
        cls, patches = x[:, :1], x[:, 1:]
        h = F.gelu(self.down_proj(patches)).view(B, frames, P, -1)
        spatial = h
        if self.conv2d is not None:
            side = round(P**0.5)
            assert side * side == P, "the spatial branch needs whole frames, so no patch dropout"
            grid = h.reshape(B * frames, side, side, -1).permute(0, 3, 1, 2)
            spatial = self.conv2d(grid).permute(0, 2, 3, 1).reshape(h.shape)
        # The depth-wise convolution over time as shifted products: the channels need not be moved to where Conv1d wants
        # them, and products follow autocast's type, which the parameters do not.
        assert self.dwconv.bias is not None
        weight = self.dwconv.weight.squeeze(1).T.to(h.dtype)
        padded = F.pad(spatial, (0, 0, 0, 0, KERNEL // 2, KERNEL // 2))
        mixed = self.dwconv.bias.to(h.dtype) + padded[:, :frames] * weight[0]
        for shift in range(1, KERNEL):
            mixed = mixed + padded[:, shift : shift + frames] * weight[shift]
        # A point-wise convolution is a product with a matrix.
        mixed = F.linear(mixed, self.conv.weight.squeeze(2), self.conv.bias)
        # Scaling the few weights instead of all tokens spares keeping the tokens for gamma's gradient.
        up = F.linear((h + mixed).flatten(1, 2), self.gamma * self.up_proj.weight, self.gamma * self.up_proj.bias)
        return torch.cat((cls, patches + up), dim=1)


class SlowFastTransformer(VideoTransformer):
    """A vision tower with an adapter at each block; calling it is the slow path, :meth:`fast` the fast one.

    ``config.fast.position`` is where an adapter is: ``before`` its block, whose attention then reads what it writes, or
    ``after`` it, as published. ``config.fast.pool`` is what the fast path projects: ``cls``, the ``mean`` of the patch
    tokens, or the mean of ``both``. Published are ``after`` and ``cls``, which leave the last adapter without effect.
    """

    COMPILED = (*VideoTransformer.COMPILED, "fast", "fast_with_boxes")

    def __init__(self, shape: Geometry, config: ModelConfig, boxes: bool = False) -> None:
        super().__init__(shape, config, boxes)
        self.position, self.pool = config.fast.position, config.fast.pool
        for block in self.transformer.resblocks:
            block.adapter = MotionAdapter(shape.vision_width, config.fast.spatial)
        if (self.position, self.pool) == ("after", "cls"):
            # What the last adapter writes is never read: DistributedDataParallel must not wait for its gradients.
            self.transformer.resblocks[-1].adapter.requires_grad_(False)

    def fast(self, video: Tensor) -> Tensor:
        """``video`` [B, 3, T, H, W], normalised -> [B, E], not normalised."""
        # Where only CLS is read in the end, only CLS needs the last block; an adapter after it reads all tokens.
        x, _ = self._tokens(video, whole=self.pool != "cls" or self.position != "before")
        return self._pooled(x)

    def fast_with_boxes(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`fast`, and the boxes of all frames from the same tokens: [B, E] and [B, T, 3, 4]."""
        assert self.box_head is not None, "the tower was built without boxes"
        x, chosen = self._tokens(video, whole=True)
        boxes: Tensor = self.box_head(x[:, 1:], chosen, video.shape[2])
        return self._pooled(x), boxes

    def _pooled(self, x: Tensor) -> Tensor:
        # CLS passes the adapters untouched; the mean of the patches sees directly what they have written.
        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "mean":
            x = x[:, 1:].mean(dim=1)
        else:
            x = (x[:, 0] + x[:, 1:].mean(dim=1)) / 2
        # The norm belongs to the backbone, the projection is trained by both paths.
        return call_frozen(self.ln_post, x) @ self.image_projection

    def _tokens(self, video: Tensor, whole: bool) -> tuple[Tensor, Tensor | None]:
        """Tokens behind the last block and which patches they are; unless ``whole``, of these CLS alone."""
        frames = video.shape[2]
        x, chosen = self.embed(video, frozen=True)
        blocks = self.transformer.resblocks
        for i, block in enumerate(blocks):
            keep = 1 if i == len(blocks) - 1 and not whole else None
            if self.transformer.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._adapted, block, x, frames, keep, use_reentrant=False)
            else:
                x = self._adapted(block, x, frames, keep)
        return x, chosen

    def _adapted(self, block: nn.Module, x: Tensor, frames: int, keep: int | None) -> Tensor:
        adapter = block.adapter
        assert isinstance(adapter, MotionAdapter)
        if self.position == "before":
            return call_frozen(block, adapter(x, frames), keep)
        return adapter(call_frozen(block, x, keep), frames)


def slow_frames(fast: int, slow: int) -> slice:
    """Which of ``fast`` frames the slow path sees: the middle one of each of ``slow`` equal parts.

    Raises :class:`UserError` if the parts are not equal.
    """
    if fast % slow:
        raise UserError(
            f"{fast} frames (model.num_frames, or those of a clip) are no multiple of model.fast.slow_frames={slow}; "
            "the slow path takes one of each so many"
        )
    step = fast // slow
    return slice(step // 2, None, step)
