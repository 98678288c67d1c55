"""Build the loss of a configuration from the registry in :mod:`egohod.loss.config`."""

from __future__ import annotations

from importlib import import_module

from egohod.loss.boxes import WithBoxes
from egohod.loss.config import LOSSES, LossConfig
from egohod.loss.contrastive import Loss


def build_loss(config: LossConfig, *, rank: int = 0, world_size: int = 1) -> Loss:
    """The loss ``config.name``, over the features of all processes, and the auxiliary box loss if it has a weight."""
    module, _, name = LOSSES[config.name].partition(".")
    loss: Loss = getattr(import_module(f"egohod.loss.{module}"), name)(config, rank=rank, world_size=world_size)
    return WithBoxes(loss, config.boxes) if config.boxes else loss
