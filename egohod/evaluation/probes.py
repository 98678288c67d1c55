"""Probes of frozen features: a linear classifier and the nearest neighbours.

N training clips, M to be told, D dimensions, C classes. What a probe chooses, it chooses on a tenth of the N clips.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)
NEIGHBOURS = (1, 5, 10, 20)
# Cosines are sharpened by this before they vote (as DINO's k-NN probe, 2104.14294).
TEMPERATURE = 0.07
_HELD_OUT = 0.1
_ITERATIONS = 60


@dataclass(frozen=True)
class Probed:
    """The class of each clip, int64 [M], and what was chosen for it."""

    classes: Tensor
    chosen: str


def linear_probe(features: Tensor, labels: Tensor, asked: Tensor, count: int, *, seed: int = 0) -> Probed:
    """Multinomial logistic regression by L-BFGS on standardised features [N, D]; ``asked`` [M, D]."""
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    features, asked = (features - mean) / scale, (asked - mean) / scale
    kept, held = _split(len(features), seed)
    rights = [
        float((_Linear(features[kept], labels[kept], count, decay)(features[held]) == labels[held]).float().mean())
        for decay in WEIGHT_DECAYS
    ]
    best = WEIGHT_DECAYS[rights.index(max(rights))]
    return Probed(_Linear(features, labels, count, best)(asked), f"weight decay {best:g}")


class _Linear:
    """A trained linear classifier; calling it tells classes."""

    def __init__(self, features: Tensor, labels: Tensor, count: int, decay: float) -> None:
        self._weight = torch.zeros(count, features.shape[1], requires_grad=True)
        self._bias = torch.zeros(count, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self._weight, self._bias], max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(features, self._weight, self._bias), labels)
            loss = loss + decay / 2 * self._weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def __call__(self, asked: Tensor) -> Tensor:
        """Classes of ``asked`` [M, D]."""
        with torch.no_grad():
            return F.linear(asked, self._weight, self._bias).argmax(dim=1)


def knn_probe(features: Tensor, labels: Tensor, asked: Tensor, count: int, *, seed: int = 0) -> Probed:
    """The class that the most alike training clips vote for, by cosine."""
    features, asked = F.normalize(features, dim=1), F.normalize(asked, dim=1)
    kept, held = _split(len(features), seed)
    rights = [
        float((_vote(features[kept], labels[kept], features[held], count, k) == labels[held]).float().mean())
        for k in NEIGHBOURS
    ]
    best = NEIGHBOURS[rights.index(max(rights))]
    return Probed(_vote(features, labels, asked, count, best), f"{best} neighbours")


def _vote(features: Tensor, labels: Tensor, asked: Tensor, count: int, k: int) -> Tensor:
    told = []
    for some in asked.split(1000):
        similarity, nearest = (some @ features.T).topk(min(k, len(features)), dim=1)
        votes = torch.zeros(len(some), count)
        told.append(votes.scatter_add_(1, labels[nearest], (similarity / TEMPERATURE).exp()).argmax(dim=1))
    return torch.cat(told)


def _split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips to learn from and clips to choose by."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, round(_HELD_OUT * count))
    return order[held:], order[:held]
