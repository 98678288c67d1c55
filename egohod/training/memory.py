"""What a training step takes of a device's memory, predicted without computing anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from egohod.config import LossConfig, ModelConfig
from egohod.model.egovideo import create_model
from egohod.model.flops import saved_bytes

# What batches may take of a device: the rest is for copies of weights, fragmentation and the next batch.
SHARE = 0.8


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    state: int
    """Weights, gradients and AdamW's two averages in float32, and what else does not depend on the batch."""
    per_clip: int
    """Kept for the backward pass of one clip with its text."""
    working: int
    """Needed besides per clip while a checkpointed block is computed again."""

    def peak(self, micro_batch: int) -> int:
        """Most memory in use with ``micro_batch`` clips at a time."""
        return self.state + micro_batch * (self.per_clip + self.working)

    def fits(self, memory: float) -> int:
        """Clips at a time that a device of ``memory`` bytes holds, with some room to spare."""
        return int((memory * SHARE - self.state) // (self.per_clip + self.working))


def predict(config: ModelConfig, *, dtype: torch.dtype = torch.float32, loss: LossConfig | None = None) -> Memory:
    """Memory of training the model of ``config`` under autocast to ``dtype``.

    Autograd is asked what it keeps, on tensors without content; nothing is allocated and no device is touched.
    """
    with FakeTensorMode():
        model = create_model(config, loss)
        geometry = model.geometry
        frame, length = (geometry.image_size, geometry.image_size), 1 + config.num_frames * geometry.patches_per_frame

        def saved(module: nn.Module, *inputs: Tensor) -> int:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                return saved_bytes(lambda: module(*inputs))

        def whole(clips: int) -> int:
            video = torch.empty(clips, 3, config.num_frames, *frame)
            return saved(model, video, torch.zeros(clips, geometry.context_length, dtype=torch.long))

        def block(clips: int) -> int:
            x = torch.empty(clips, length, geometry.vision_width).requires_grad_()
            return saved(model.visual.transformer.resblocks[0], x)

        # Two clips less one: what is kept only once are autocast's copies of the weights.
        one, two = whole(1), whole(2)
        working = block(2) - block(1) if config.gradient_checkpointing else 0
    state = 16 * sum(parameter.numel() for parameter in model.parameters())
    return Memory(state + 2 * one - two, two - one, working)
