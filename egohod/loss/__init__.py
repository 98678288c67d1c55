"""Objectives over features; no model and no data in here."""

from __future__ import annotations

from egohod.config import LossConfig
from egohod.loss.boxes import WithBoxes
from egohod.loss.contrastive import ContrastiveLoss, Loss, SigmoidLoss

__all__ = ["Loss", "build_loss"]


def build_loss(config: LossConfig, *, rank: int = 0, world_size: int = 1) -> Loss:
    """The loss of a configuration, over the features of all processes."""
    contrast: Loss = (
        SigmoidLoss(rank=rank, world_size=world_size)
        if config.name == "sigmoid"
        else ContrastiveLoss(config, rank=rank, world_size=world_size)
    )
    return WithBoxes(contrast, config.boxes) if config.boxes else contrast
