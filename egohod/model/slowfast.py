"""EgoVideo: the vision tower on two paths, trained together (EgoHOD, section 3.3).

The slow path is the plain tower on few frames; it trains the backbone. The fast path runs many frames through the
same weights, frozen, with a motion adapter at each block; it trains the adapters, the patch and temporal embedding and
the projections. Frozen means that weights receive no gradient from this path; activations do, so every adapter learns.

Shape legend: B clips, T fast frames, T / lambda slow ones, P patches a frame, D width, E shared embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from egohod.errors import UserError
from egohod.model.adapter import MotionAdapter
from egohod.model.video import VideoTransformer, detached

POSITIONS = ("before", "after")
POOLS = ("cls", "mean", "both")


class SlowFastTransformer(VideoTransformer):
    """A vision tower with an adapter at each block; calling it is the slow path, :meth:`fast` the fast one.

    ``position`` is where an adapter stands: ``before`` its block, whose attention then reads what it writes, or
    ``after`` it, as published. ``pool`` is what the fast path projects: ``cls``, the ``mean`` of the patch tokens, or
    the mean of ``both``. Published are ``after`` and ``cls``, which leave the last adapter without effect.
    """

    def __init__(self, *, position: str, pool: str, spatial: bool, **options: Any) -> None:
        super().__init__(**options)
        assert position in POSITIONS, position
        assert pool in POOLS, pool
        self.position, self.pool = position, pool
        for block in self.transformer.resblocks:
            block.adapter = MotionAdapter(self.class_embedding.shape[0], spatial)
        if (position, pool) == ("after", "cls"):
            # What the last adapter writes is never read: it must not wait for gradients.
            self.transformer.resblocks[-1].adapter.requires_grad_(False)

    def fast(self, video: Tensor) -> Tensor:
        """``video`` [B, 3, T, H, W], normalised -> [B, E], not normalised."""
        x, _ = self._tokens(video, whole=False)
        return self._pooled(x)

    def fast_with_boxes(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`fast`, and the boxes of all frames from the same tokens: [B, E] and [B, T, 3, 4]."""
        assert self.box_head is not None, "the tower was built without boxes"
        x, chosen = self._tokens(video, whole=True)
        boxes: Tensor = self.box_head(x[:, 1:], chosen, video.shape[2])
        return self._pooled(x), boxes

    def fast_tokens(self, video: Tensor) -> Tensor:
        """All tokens behind the fast path's last block, CLS first, then frame by frame: [B, 1 + T * P, D]."""
        return self._tokens(video, whole=True)[0]

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "mean":
            x = x[:, 1:].mean(dim=1)
        else:
            x = (x[:, 0] + x[:, 1:].mean(dim=1)) / 2
        return _frozen(self.ln_post, x) @ self.image_projection

    def _tokens(self, video: Tensor, whole: bool) -> tuple[Tensor, Tensor | None]:
        """Tokens behind the last block and which patches they are; without ``whole`` only those that are pooled."""
        frames = video.shape[2]
        x, chosen = self.embed(video, frozen=True)
        blocks = self.transformer.resblocks
        for i, block in enumerate(blocks):
            # Where only CLS is read in the end, only CLS needs the last block.
            last = i == len(blocks) - 1 and self.pool == "cls" and self.position == "before" and not whole
            keep = 1 if last else None
            if self.transformer.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._adapted, block, x, frames, keep, use_reentrant=False)
            else:
                x = self._adapted(block, x, frames, keep)
        return x, chosen

    def _adapted(self, block: nn.Module, x: Tensor, frames: int, keep: int | None) -> Tensor:
        adapter = block.adapter
        assert isinstance(adapter, MotionAdapter)
        if self.position == "before":
            return _frozen(block, adapter(x, frames), keep)
        return adapter(_frozen(block, x, keep), frames)


def _frozen(module: nn.Module, *inputs: Any) -> Tensor:
    return functional_call(module, detached(module), inputs)


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
