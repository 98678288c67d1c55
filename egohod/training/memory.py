"""What a training step takes of a device's memory, predicted without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from egohod.loss.config import LossConfig
from egohod.model.config import ModelConfig
from egohod.model.egovideo import create_model
from egohod.model.flops import saved_bytes
from egohod.model.video import Block

# What batches may take of a device: the rest is for copies of weights, fragmentation and the next batch.
SHARE = 0.8


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    state: int
    """Weights, and of those that learn gradients and the optimizer's averages, in float32; and what else does not
    depend on the batch."""
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


def predict(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    loss: LossConfig | None = None,
    heads: Mapping[str, int] | None = None,
    learning: Container[str] | None = None,
    averages: int = 2,
    ema: bool = False,
) -> Memory:
    """Memory of training the model of ``config`` with classification ``heads`` under autocast to ``dtype``.

    Of its parameters, ``learning`` are trained (None: all that the model trains by itself), with ``averages`` of the
    optimizer for each (AdamW's two), and ``ema`` says whether there is a moving average of all.

    Autograd is asked what it keeps, on tensors without content; nothing is allocated and no device is touched.
    """
    with FakeTensorMode():
        model = create_model(config, loss, heads)
        if learning is not None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in learning)
        geometry = model.geometry
        frame, length = (geometry.image_size, geometry.image_size), 1 + config.num_frames * geometry.patches_per_frame

        def saved(run: Callable[[], Any]) -> int:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                return saved_bytes(run, model)

        def whole(clips: int) -> int:
            video = torch.empty(clips, 3, config.num_frames, *frame)
            tokens = torch.zeros(clips, geometry.context_length, dtype=torch.long)
            return saved(lambda: model(video, tokens))

        def block(clips: int) -> int:
            x, first = torch.empty(clips, length, geometry.vision_width), model.visual.transformer.resblocks[0]
            x.requires_grad_()
            assert isinstance(first, Block)
            adapter = first.adapter
            return saved(lambda: first(x if adapter is None else adapter(x, config.num_frames)))

        # Of the difference nothing is shared, such as autocast's copies of the weights; one clip alone spares copies.
        two, three = whole(2), whole(3)
        working = block(3) - block(2) if config.gradient_checkpointing else 0
    held, trained = (2 if ema else 1), 1 + averages
    copies = (
        (held + trained if parameter.requires_grad else held, parameter.numel()) for parameter in model.parameters()
    )
    state = 4 * sum(count * size for count, size in copies)
    return Memory(state + 3 * two - 2 * three, three - two, working)
