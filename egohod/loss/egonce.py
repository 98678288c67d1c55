"""Contrastive losses with further positives by verbs and nouns, and with captions that have another verb.

Legend: B clips of this process, N those of all processes, K replaced captions of a clip, E the shared space. Each
process scores its own B rows, clips against all captions and captions against all clips; the mean over the processes,
which DistributedDataParallel forms, is loss and gradient of the joint batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from egohod.distributed import gather_with_grad
from egohod.loss.config import LOSSES, LossConfig
from egohod.loss.contrastive import duplicates


def share_tags(own: Tensor, others: Tensor) -> Tensor:
    """Whether items have a tag in common: int64 [B, W] and [N, W], 0 where there is none -> bool [B, N]."""
    shared = torch.zeros(len(own), len(others), dtype=torch.bool, device=own.device)
    # Tag by tag: all pairs of tags at once would take a gigabyte for 4,096 clips.
    for tag in own.unbind(dim=1):
        shared |= ((tag[:, None, None] == others) & (tag != 0)[:, None, None]).any(dim=2)
    return shared


class EgoNCE:
    """``egonce`` (EgoVLP, 2206.01670) and ``egonce_pp`` (EgoNCE++, 2405.17719): log-sums over several positives.

    A row costs -log(sum over its positives of exp(s x) / sum over all of exp(s x)), x the cosine and s the logit scale;
    both directions weigh half (in the authors' code each weighs 1). ``egonce``: positives are the own item and all that
    share a verb and a noun, both ways. ``egonce_pp``: a clip's only positive is its own caption, and its negatives
    include K captions of its own with another verb; a caption's positives are all clips that share a noun, so that
    clips of one object stay together and verbs are learned from the captions.

    EgoVLP's negatives of the same video and minute are a matter of batches, not of the loss: docs/pretraining.md.
    """

    def __init__(self, config: LossConfig, *, rank: int = 0, world_size: int = 1) -> None:
        self._rank, self._world_size = rank, world_size
        self._replaces = LOSSES[config.name].has_replacements

    def __call__(
        self,
        video_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        verb_tags: Tensor,
        noun_tags: Tensor,
        negative_features: Tensor | None = None,
        has_negative: Tensor | None = None,
        caption_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Features [B, E] and ``negative_features`` [B, K, E], normalised -> scalars ``loss`` and ``accuracy``.

        ``*_tags`` int64 [B, W]: numbers of a caption's verbs and nouns, 0 for none. ``has_negative`` bool [B, K].
        ``accuracy`` is the share (0 to 1) of clips for which a positive wins among the captions of the batch; with
        replaced captions ``replaced_accuracy`` is that of clips whose own caption beats all of them.
        ``caption_ids`` int64 [B] (``loss.mask_duplicates``): items with the own caption are no negatives.
        """
        B, size = len(video_features), self._world_size
        own = torch.arange(B, device=video_features.device) + self._rank * B
        is_own = own[:, None] == torch.arange(B * size, device=own.device)
        nouns = share_tags(noun_tags, gather_with_grad(noun_tags, size))
        if self._replaces:
            positives = (is_own, is_own | nouns)
        else:
            both = is_own | (nouns & share_tags(verb_tags, gather_with_grad(verb_tags, size)))
            positives = (both, both)
        masked = None if caption_ids is None else duplicates(caption_ids, own, size)
        losses, logits = [], []
        for queries, items, positive in (
            (video_features, text_features, positives[0]),
            (text_features, video_features, positives[1]),
        ):
            each = logit_scale * queries @ gather_with_grad(items, size).T
            if masked is not None:
                each = each.masked_fill(masked & ~positive, -torch.inf)
            logits.append(each)
            losses.append(-each.masked_fill(~positive, -torch.inf).logsumexp(dim=1))
        result = {"accuracy": positives[0].gather(1, logits[0].detach().argmax(dim=1, keepdim=True)).float().mean()}
        if self._replaces:
            assert negative_features is not None
            assert has_negative is not None
            # Those of a clip are false of it alone: no other clip has them among its negatives.
            replaced = logit_scale * torch.einsum("be,bke->bk", video_features, negative_features)
            replaced = replaced.masked_fill(~has_negative, -torch.inf)
            beats = logits[0].detach().gather(1, own[:, None])[:, 0] > replaced.detach().amax(dim=1)
            # Of the clips that have any, whose number differs between processes.
            counted = has_negative.any(dim=1).float()
            total = gather_with_grad(counted, size).sum().clamp(min=1)
            result["replaced_accuracy"] = (beats * counted).sum() * size / total
            logits[0] = torch.cat((logits[0], replaced), dim=1)
        by_video, by_text = (loss + each.logsumexp(dim=1) for loss, each in zip(losses, logits, strict=True))
        return result | {"loss": (by_video.mean() + by_text.mean()) / 2}
