"""Choose the loss of a configuration."""

from __future__ import annotations

from egohod.loss.boxes import WithBoxes
from egohod.loss.classification import ClassificationLoss
from egohod.loss.config import LossConfig
from egohod.loss.contrastive import ContrastiveLoss, Loss, SigmoidLoss
from egohod.loss.retrieval import (
    AdaptiveMaxMarginLoss,
    MaxMarginLoss,
    SoftInfoNCELoss,
    SymmetricMultiSimilarityLoss,
)

_MARGINS = {"max_margin": 0.2, "adaptive_max_margin": 0.4, "sms": 0.6}


def build_loss(config: LossConfig, *, rank: int = 0, world_size: int = 1) -> Loss:
    """The loss of a configuration, over the features of all processes."""
    loss = _of_features(config, rank, world_size)
    return WithBoxes(loss, config.boxes) if config.boxes else loss


def _of_features(config: LossConfig, rank: int, world_size: int) -> Loss:
    if config.name == "classes":
        return ClassificationLoss(config.label_smoothing)
    margin = config.margin or _MARGINS.get(config.name, 0.0)
    if config.name == "sigmoid":
        return SigmoidLoss(rank=rank, world_size=world_size)
    if config.name == "max_margin":
        return MaxMarginLoss(margin, rank=rank, world_size=world_size)
    if config.name == "adaptive_max_margin":
        return AdaptiveMaxMarginLoss(margin, rank=rank, world_size=world_size)
    if config.name == "sms":
        return SymmetricMultiSimilarityLoss(margin, config.tau, rank=rank, world_size=world_size)
    if config.name == "soft_infonce":
        return SoftInfoNCELoss(rank=rank, world_size=world_size)
    return ContrastiveLoss(config, rank=rank, world_size=world_size)
