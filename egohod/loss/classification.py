"""Losses of single clips, each against its own annotation: classes of heads, and boxes of hands and object."""

from __future__ import annotations

import torch
from timm.data.mixup import one_hot
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from egohod.loss.config import Loss, LossConfig


class ClassificationLoss:
    """The sum of the heads' cross-entropies, each a mean over the clips.

    ``label_smoothing`` is the share of a label that all classes of its head have in equal parts (1512.00567).
    """

    def __init__(self, config: LossConfig | None = None, *, rank: int = 0, world_size: int = 1) -> None:
        # Each clip is judged by itself, so other processes do not matter.
        self._smoothing = (config or LossConfig()).label_smoothing
        self._loss = SoftTargetCrossEntropy()

    def __call__(self, mixing: Tensor | None = None, **values: Tensor) -> dict[str, Tensor]:
        """``<head>_logits`` [B, C], ``<head>_label`` int64 [B]; scalars ``loss`` and ``accuracy``.

        ``mixing`` [B, b] is the share of each clip's pixels by the clip they are of, within chunks of b clips; None
        if none is mixed. ``accuracy`` counts a clip as the one that most of its pixels are of, and
        is that of the head ``action``, or of all heads together where there is none.
        """
        heads = [name.removesuffix("_logits") for name in values if name.endswith("_logits")]
        loss, correct = torch.zeros((), device=values[f"{heads[0]}_logits"].device), None
        for head in heads:
            logits, label = values[f"{head}_logits"], values[f"{head}_label"]
            # timm's one_hot takes the value of other classes and of the right one.
            even = self._smoothing / logits.shape[1]
            target = one_hot(label, logits.shape[1], 1 - self._smoothing + even, even).to(logits)
            if mixing is not None:
                # Clips are mixed within a micro-batch, while the loss sees several joined.
                chunk = mixing.shape[1]
                target = torch.bmm(
                    mixing.detach().to(logits).view(-1, chunk, chunk), target.view(-1, chunk, logits.shape[1])
                ).flatten(0, 1)
            loss = loss + self._loss(logits, target)
            is_correct = logits.detach().argmax(dim=1) == target.argmax(dim=1)
            # Without a head of its own an action counts when verb and noun are right.
            if "action" not in heads or head == "action":
                correct = is_correct if correct is None else correct & is_correct
        assert correct is not None
        return {"loss": loss, "accuracy": correct.float().mean()}


def box_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean distance (L1, in shares of the picture) over the annotated boxes of each clip: [B].

    ``predicted`` and ``target`` [B, T, roles, 4]; boxes without annotation are NaN in ``target``. A clip without any
    annotated box has 0.
    """
    # A box is annotated as a whole or not at all.
    mask = target.isfinite().all(dim=-1, keepdim=True)
    # Before the difference: a NaN would reach the gradient even through a mask.
    distance = (predicted - target.where(mask, predicted.detach())).abs().flatten(1)
    return distance.sum(dim=1) / (4 * mask.flatten(1).sum(dim=1)).clamp(min=1)


class WithBoxes:
    """Another loss plus ``weight`` times the mean box error of the clips (HelpingHands, 2308.07918).

    Clips weigh alike however many of their boxes are annotated, so the loss of a batch is the mean over its parts,
    however processes and micro-batches share it.
    """

    def __init__(self, loss: Loss, weight: float) -> None:
        # It is given errors of clips instead of boxes: these can be cached and joined like features.
        self._loss, self._weight = loss, weight

    def __call__(self, box_errors: Tensor, **features: Tensor) -> dict[str, Tensor]:
        """``box_errors`` [B] of :func:`box_errors`, the rest for the other loss, whose scalars ``box_error`` joins."""
        result, error = self._loss(**features), box_errors.mean()
        return result | {"loss": result["loss"] + self._weight * error, "box_error": error.detach()}
