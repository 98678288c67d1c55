"""Losses for multi-instance retrieval: a text belongs to many clips, and to some only in part.

Legend: B clips of this process with the text drawn for each, N those of all processes, E the shared space, K noun
classes. Each process scores its own B rows, clips against all texts and texts against all clips; the mean over the
processes, which DistributedDataParallel forms, is loss and gradient of the joint batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from egohod.distributed import gather_with_grad
from egohod.loss.config import LOSSES, LossConfig
from egohod.loss.contrastive import duplicates

# Relevancies are sums of halves and small fractions: two that differ at all differ by more than this.
EQUAL = 1e-3


def relevancy(verbs: tuple[Tensor, Tensor], nouns: tuple[Tensor, Tensor]) -> Tensor:
    """Relevancy of M items to B others by the classes of both, float [B, M] in 0..1.

    As :func:`egohod.data.formats.ek100.class_relevancy`, on the device: ``verbs`` int64 [B] and [M], ``nouns`` [B, K]
    and [M, K], 1 for each class of an item.
    """
    # Verbs are equal or not, nouns overlap: intersection over union of their classes.
    (own, other), common = nouns, nouns[0] @ nouns[1].T
    union = own.sum(dim=1)[:, None] + other.sum(dim=1) - common
    return ((verbs[0][:, None] == verbs[1]).to(common.dtype) + common / union.clamp(min=1)) / 2


class RetrievalLoss:
    """``config.name`` decides what a pair of query and item costs; the rest is shared: see :meth:`_loss_of_rows`."""

    def __init__(self, config: LossConfig, *, rank: int = 0, world_size: int = 1) -> None:
        self._rank, self._world_size = rank, world_size
        self.name, self.tau = config.name, config.tau
        self.margin = config.margin or LOSSES[config.name].margin

    def __call__(
        self,
        video_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        clip_verbs: Tensor,
        clip_nouns: Tensor,
        text_verbs: Tensor,
        text_nouns: Tensor,
        caption_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Features [B, E], normalised, and the classes of clips and texts -> scalars ``loss`` and ``accuracy``.

        ``*_verbs`` int64 [B], ``*_nouns`` [B, K]. ``accuracy`` is the share (0 to 1) of the clips whose own text wins.
        ``caption_ids`` int64 [B] (``loss.mask_duplicates``): items with the text of the query's own are no negatives.
        """
        clips, texts = (clip_verbs, clip_nouns), (text_verbs, text_nouns)
        own = torch.arange(len(video_features), device=video_features.device) + self._rank * len(video_features)
        masked = None if caption_ids is None else duplicates(caption_ids, own, self._world_size)
        losses, by_video = [], None
        for queries, items, query_classes, item_classes in (
            (video_features, text_features, clips, texts),
            (text_features, video_features, texts, clips),
        ):
            similarity = queries @ gather_with_grad(items, self._world_size).T
            by_video = similarity.detach() if by_video is None else by_video
            verbs, nouns = (gather_with_grad(each, self._world_size) for each in item_classes)
            # Cached accumulation makes leaves of all floats, so nouns would get a gradient.
            graded = relevancy((query_classes[0], verbs), (query_classes[1].detach(), nouns.detach()))
            losses.append(self._loss_of_rows(similarity, graded, own, logit_scale, masked))
        assert by_video is not None
        by_video = by_video if masked is None else by_video.masked_fill(masked, -torch.inf)
        accuracy = (by_video.argmax(dim=1) == own).float().mean()
        return {"loss": (losses[0] + losses[1]) / 2, "accuracy": accuracy}

    def _loss_of_rows(
        self, similarity: Tensor, graded: Tensor, own: Tensor, logit_scale: Tensor, masked: Tensor | None
    ) -> Tensor:
        """The mean loss of B queries: cosines and relevancies of all items [B, N], the number of each one's own [B].

        ``masked`` bool [B, N]: pairs that cost nothing.
        """
        if self.name == "soft_infonce":
            # Cross-entropy to the relevancies of all items, each row scaled to sum 1 (soft targets, 2303.17561). A
            # query without a single relevant item has a target of zeros, which weighs nothing.
            target = graded / graded.sum(dim=1, keepdim=True).clamp(min=EQUAL)
            return F.cross_entropy(logit_scale * similarity, target)
        # The others are over pairs of the query's own item and every other one. The own item may itself be relevant in
        # part only, and another item more so.
        lead = similarity.gather(1, own[:, None]) - similarity
        relevancy_of_own = graded.gather(1, own[:, None])
        if self.name == "max_margin":
            # The own item must be more similar than any other by the margin (Miech et al., 1804.02516), as Wray et al.
            # (1908.03477) and AVION's fine-tuning use it: a clip's text is drawn anew among the relevant ones.
            losses = F.relu(self.margin - lead)
        elif self.name == "adaptive_max_margin":
            # The margin is scaled by the relevancy of the drawn text (EgoVLP's MIR report, 2207.01334).
            losses = F.relu(self.margin * relevancy_of_own - lead)
        else:
            # SMS (2406.12256): the lead follows the difference of relevancies, both ways. A more relevant item must
            # lead by the margin times the difference, a less relevant one must trail by it, and items that are equally
            # relevant may differ by tau.
            assert self.name == "sms", self.name
            difference = relevancy_of_own - graded
            lacking = self.margin * difference - lead
            uneven = F.relu(torch.where(difference > 0, lacking, -lacking))
            losses = torch.where(difference.abs() < EQUAL, F.relu(lead.abs() - self.tau), uneven)
        # An item has no pair with itself; multiplied instead of selected, which would wait for the device.
        others = torch.arange(similarity.shape[1], device=own.device) != own[:, None]
        if masked is not None:
            others = others & ~masked
        # Divided by all pairs, masked or not: a pair has the same weight in every batch and every process.
        return (losses * others).sum() / max(1, len(own) * (similarity.shape[1] - 1))
