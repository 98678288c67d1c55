"""Opposite captions as negatives of their own clips, and their separation in the text tower.

The order of frames is all that distinguishes a clip from its reverse, and nothing in a batch of other clips asks for
it: other objects and other scenes suffice to win. Two terms do. The caption with its motion run backwards
(:mod:`egohod.data.opposites`) must fit its clip less than the caption itself; and since a text tower gives both almost
the same feature, in which case no gradient of the video can tell them apart, their features must differ.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from egohod.distributed import gather_with_grad
from egohod.loss.config import Loss, LossConfig


def weight_share(config: LossConfig, step: int, total_steps: int) -> float:
    """Share of ``loss.opposites`` and ``loss.separation`` that counts in ``step`` (from 1): 1, then falling to the end.

    A function of the step alone, so that a resumed run has the same weights.
    """
    share = (step - 1) / max(1, total_steps - 1)
    if config.opposites_schedule == "constant" or share <= config.opposites_hold:
        return 1.0
    fallen = min(1.0, (share - config.opposites_hold) / (1 - config.opposites_hold))
    if config.opposites_schedule == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return 1 - fallen * (1 - config.opposites_end)


class WithOpposites:
    """Another loss plus what clips and captions pay for opposite captions.

    With v a clip's feature, t that of its caption and o that of the opposite, all of unit length:
    ``opposites`` x softplus(s (v.o - v.t)) + ``separation`` x relu(t.o - ``separation_margin``), each a mean over the
    clips of all processes that have an opposite, as the contrastive losses are means over the joint batch.

    s is the model's logit scale, so the opposite weighs as the only other caption of a softmax; losses without a
    temperature take it at 1 / ``loss.temperature``. The sigmoid loss's bias would cancel in the difference.
    """

    def __init__(self, loss: Loss, config: LossConfig, *, world_size: int = 1) -> None:
        self._loss, self._config, self._world_size = loss, config, world_size

    def __call__(
        self, negative_features: Tensor, has_negative: Tensor, weight_share: float = 1.0, **features: Tensor
    ) -> dict[str, Tensor]:
        """``negative_features`` [B, K, E], normalised, anything where ``has_negative`` bool [B, K] is false.

        The first of K is the opposite. ``weight_share``: of :func:`weight_share`. The rest, also the further negatives,
        is for the other loss, and its scalars are joined by
        ``opposite_accuracy``, the share (0 to 1) of clips that fit their caption better than its opposite, and
        ``opposite_cosine``, the mean cosine of captions and opposites.
        """
        opposite_features, has_opposite = negative_features[:, 0], has_negative[:, 0]
        if negative_features.shape[1] > 1:
            features |= {"negative_features": negative_features[:, 1:], "has_negative": has_negative[:, 1:]}
        result, config = self._loss(**features), self._config
        video, text = features["video_features"], features["text_features"]
        # Processes may have different numbers of opposites. Their losses are averaged later, so each divides its sum by
        # its equal share of the number of all.
        count = gather_with_grad(has_opposite.int(), self._world_size).sum().clamp(min=1)
        weight = has_opposite.to(video.dtype) * self._world_size / count
        lead = (video * (text - opposite_features)).sum(dim=1)
        cosine = (text * opposite_features).sum(dim=1)
        ranking = (weight * F.softplus(-features["logit_scale"] * lead)).sum()
        separation = (weight * F.relu(cosine - config.separation_margin)).sum()
        added = config.opposites * ranking + config.separation * separation
        return result | {
            "loss": result["loss"] + weight_share * added,
            "opposite_accuracy": (weight * (lead.detach() > 0)).sum(),
            "opposite_cosine": (weight * cosine.detach()).sum(),
        }
