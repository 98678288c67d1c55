"""Losses between the clips and the narrations of all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from egohod.loss.config import LossConfig

Loss = Callable[..., dict[str, Tensor]]
"""Takes the output of the dual encoder by name; returns scalars ``loss`` and ``accuracy`` on the features' device."""


class ContrastiveLoss:
    """Every clip against all narrations and every narration against all clips, of all processes.

    ``local_loss`` with ``gather_with_grad`` is exact and cheapest: each process scores its own rows only, and
    gradients of the gathered features flow back to the process they came from. The mean of the processes'
    gradients (what DistributedDataParallel forms) is then the gradient of the joint batch.
    """

    def __init__(self, config: LossConfig | None = None, *, rank: int = 0, world_size: int = 1) -> None:
        config = config or LossConfig()
        # Refused where configurations are checked.
        assert config.gather_with_grad or not config.local_loss, "the gradient would be biased"
        # Of open_clip's class only the gathering and the labels are used: it returns no accuracy.
        self._loss = ClipLoss(
            local_loss=config.local_loss, gather_with_grad=config.gather_with_grad, rank=rank, world_size=world_size
        )

    def __call__(self, video_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> dict[str, Tensor]:
        """Features of this process [B, E], normalised -> scalar ``loss`` and ``accuracy`` on their device.

        ``accuracy`` is the share (0 to 1) of the scored clips whose own narration wins; without gradient.
        With ``local_loss`` both are of this process's rows: average them over processes to report them.
        """
        by_video, by_text = self._loss.get_logits(video_features, text_features, logit_scale)
        labels = self._loss.get_ground_truth(by_video.device, by_video.shape[0])
        loss = (F.cross_entropy(by_video, labels) + F.cross_entropy(by_text, labels)) / 2
        # On the device: reading a number back here would make every step wait.
        accuracy = (by_video.detach().argmax(dim=1) == labels).float().mean()
        return {"loss": loss, "accuracy": accuracy}


class SigmoidLoss:
    """Binary cross-entropy of every pair of clip and narration: match or not (SigLIP, 2303.15343).

    Each process scores its own clips against the narrations of all; the mean over the processes is the loss of the
    joint batch.
    """

    def __init__(self, config: LossConfig | None = None, *, rank: int = 0, world_size: int = 1) -> None:
        self._logits = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)

    def __call__(
        self, video_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
    ) -> dict[str, Tensor]:
        """As :class:`ContrastiveLoss`, with an offset that all similarities share."""
        logits, _ = self._logits.get_logits(video_features, text_features, logit_scale)
        # Numbers of the own narrations among those of all processes.
        own = self._logits.get_ground_truth(logits.device, logits.shape[0])
        # +1 for a clip with its own narration, -1 for all other pairs.
        sign = 2 * F.one_hot(own, logits.shape[1]).to(logits.dtype) - 1
        # The sum over a clip's pairs, as in SigLIP: a mean would let the many negatives drown the one positive.
        loss = -F.logsigmoid(sign * (logits + logit_bias)).sum() / logits.shape[0]
        accuracy = (logits.detach().argmax(dim=1) == own).float().mean()
        return {"loss": loss, "accuracy": accuracy}
