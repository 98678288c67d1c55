"""Objectives over features; no model and no data in here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from egohod.loss.config import LOSSES, LossConfig

if TYPE_CHECKING:
    from egohod.loss.contrastive import Loss


def build_loss(config: LossConfig, *, rank: int = 0, world_size: int = 1) -> Loss:
    """The loss ``config.name``, over the features of all processes, and the auxiliary box loss if it has a weight."""
    # Imported by name and only when one is built: reading a configuration imports this package, and not PyTorch.
    module, _, name = LOSSES[config.name].partition(".")
    loss: Loss = getattr(import_module(f"egohod.loss.{module}"), name)(config, rank=rank, world_size=world_size)
    if config.boxes:
        from egohod.loss.classification import WithBoxes

        return WithBoxes(loss, config.boxes)
    return loss
