"""The auxiliary loss on boxes of hands and the active object."""

from __future__ import annotations

from torch import Tensor

from egohod.loss.contrastive import Loss


def box_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean distance (L1, in shares of the picture) over the boxes that are known, clip by clip: [B].

    ``predicted`` and ``target`` [B, T, roles, 4]; unknown boxes are NaN in ``target``. A clip without any has 0.
    """
    known = target.isfinite().all(dim=-1, keepdim=True)
    # Before the difference: a NaN would reach the gradient even through a mask.
    distance = (predicted - target.where(known, predicted.detach())).abs().flatten(1)
    return distance.sum(dim=1) / (4 * known.flatten(1).sum(dim=1)).clamp(min=1)


class WithBoxes:
    """Another loss plus ``weight`` times the mean box error of the clips (HelpingHands, 2308.07918).

    Clips weigh alike whatever their number of known boxes, so the loss of a batch is the mean over its parts, however
    processes and micro-batches share it.
    """

    def __init__(self, loss: Loss, weight: float) -> None:
        self._loss, self._weight = loss, weight

    def __call__(self, box_errors: Tensor, **features: Tensor) -> dict[str, Tensor]:
        """``box_errors`` [B] of :func:`box_errors`, the rest for the other loss, whose scalars ``box_error`` joins."""
        result, error = self._loss(**features), box_errors.mean()
        return result | {"loss": result["loss"] + self._weight * error, "box_error": error.detach()}
