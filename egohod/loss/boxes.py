"""The auxiliary loss on boxes of hands and the active object."""

from __future__ import annotations

from torch import Tensor

from egohod.loss.contrastive import Loss


def box_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean distance (L1, in shares of the picture) over the annotated boxes of each clip: [B].

    ``predicted`` and ``target`` [B, T, roles, 4]; boxes without annotation are NaN in ``target``. A clip without any
    annotated box has 0.
    """
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
        self._loss, self._weight = loss, weight

    def __call__(self, box_errors: Tensor, **features: Tensor) -> dict[str, Tensor]:
        """``box_errors`` [B] of :func:`box_errors`, the rest for the other loss, whose scalars ``box_error`` joins."""
        result, error = self._loss(**features), box_errors.mean()
        return result | {"loss": result["loss"] + self._weight * error, "box_error": error.detach()}
