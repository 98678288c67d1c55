"""Cross-entropy of classification heads to labels that may be smoothed and mixed."""

from __future__ import annotations

import torch
from timm.data.mixup import one_hot
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor


class ClassificationLoss:
    """The sum of the heads' cross-entropies, each a mean over the clips.

    ``smoothing`` is the share of a label that all classes of its head have in equal parts (2.9 in 1512.00567).
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        self._smoothing, self._loss = smoothing, SoftTargetCrossEntropy()

    def __call__(self, mixing: Tensor | None = None, **values: Tensor) -> dict[str, Tensor]:
        """``<head>_logits`` [B, C], ``<head>_label`` int64 [B]; scalars ``loss`` and ``accuracy`` (of all heads).

        ``mixing`` [B, b] tells what share of each clip's pixels is of which clip, within chunks of b clips; None if
        none is mixed. ``accuracy`` counts a clip as the one it is made of most.
        """
        heads = [name.removesuffix("_logits") for name in values if name.endswith("_logits")]
        loss, right = torch.zeros((), device=values[f"{heads[0]}_logits"].device), None
        for head in heads:
            logits, label = values[f"{head}_logits"], values[f"{head}_label"]
            even = self._smoothing / logits.shape[1]
            target = one_hot(label, logits.shape[1], 1 - self._smoothing + even, even).to(logits)
            if mixing is not None:
                chunk = mixing.shape[1]
                target = torch.bmm(
                    mixing.detach().to(logits).view(-1, chunk, chunk), target.view(-1, chunk, logits.shape[1])
                ).flatten(0, 1)
            loss = loss + self._loss(logits, target)
            hit = logits.detach().argmax(dim=1) == target.argmax(dim=1)
            right = hit if right is None else right & hit
        assert right is not None
        return {"loss": loss, "accuracy": right.float().mean()}
