"""Losses between the clips and the narrations of all processes."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from egohod.distributed import gather_with_grad
from egohod.loss.config import LossConfig

# Far above any text tower's context (77); each device keeps so many weights, 8 KB.
_MAX_TOKENS = 1024


def hash_captions(tokens: Tensor) -> Tensor:
    """Numbers that are equal for equal captions: ``tokens`` int64 [B, L], zeros after the text -> int64 [B].

    Captions are equal if their tokens are, so upper case, blanks, and words beyond the context do not count, as for the
    text tower. The number is independent of L, to which each process trims its own batch.
    """
    assert tokens.shape[1] <= _MAX_TOKENS, tokens.shape
    # A hash, because comparing the tokens of all pairs would cost as much as the similarities: with odd weights,
    # modulo 2^64, captions that differ in one token never collide, and others at most once in 2^48 pairs.
    return (tokens * _token_weights(tokens.device)[: tokens.shape[1]]).sum(dim=1)


@cache
def _token_weights(device: torch.device) -> Tensor:
    # Cached by device, because a copy to it would wait for its queue; seeded, because all processes need the same.
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (_MAX_TOKENS,), generator=generator) | 1).to(device)


def duplicates(ids: Tensor, own: Tensor, world_size: int) -> Tensor:
    """Which other items have the caption of a row's own item: bool [R, N], for N items of all processes.

    ``ids``: :func:`hash_captions` of this process's batch; ``own`` int64 [R]: the number of each row's own item.
    """
    of_all = gather_with_grad(ids, world_size)
    return (of_all[own][:, None] == of_all) & (own[:, None] != torch.arange(len(of_all), device=own.device))


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
        self._world_size = world_size

    def __call__(
        self, video_features: Tensor, text_features: Tensor, logit_scale: Tensor, caption_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Features of this process [B, E], normalised -> scalar ``loss`` and ``accuracy`` on their device.

        ``accuracy`` is the share (0 to 1) of the scored clips whose own narration wins; without gradient.
        With ``local_loss`` both are of this process's rows: average them over processes to report them.
        ``caption_ids`` int64 [B] (``loss.mask_duplicates``): pairs of different clips with the same one are left out.
        """
        by_video, by_text = self._loss.get_logits(video_features, text_features, logit_scale)
        labels = self._loss.get_ground_truth(by_video.device, by_video.shape[0])
        if caption_ids is not None:
            # The same pairs both ways. A row keeps its own item, so that no softmax is empty.
            masked = duplicates(caption_ids, labels, self._world_size)
            by_video, by_text = (each.masked_fill(masked, -torch.inf) for each in (by_video, by_text))
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
        self._world_size = world_size

    def __call__(
        self,
        video_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        caption_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As :class:`ContrastiveLoss`, with an offset that all similarities share."""
        logits, _ = self._logits.get_logits(video_features, text_features, logit_scale)
        # Numbers of the own narrations among those of all processes.
        own = self._logits.get_ground_truth(logits.device, logits.shape[0])
        # +1 for a clip with its own narration, -1 for all other pairs.
        sign = 2 * F.one_hot(own, logits.shape[1]).to(logits.dtype) - 1
        if caption_ids is not None:
            # The loss of a pair that is no match tends to 0 with its similarity, and so does its gradient. A match
            # instead of nothing would weigh a frequent caption by the square of its frequency.
            logits = logits.masked_fill(duplicates(caption_ids, own, self._world_size), -torch.inf)
        # The sum over a clip's pairs, as in SigLIP: a mean would let the many negatives drown the one positive.
        loss = -F.logsigmoid(sign * (logits + logit_bias)).sum() / logits.shape[0]
        accuracy = (logits.detach().argmax(dim=1) == own).float().mean()
        return {"loss": loss, "accuracy": accuracy}
