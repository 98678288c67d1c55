"""Zero-shot classification: each clip takes the class whose prompts lie nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from egohod.config import UserError
from egohod.evaluation.metrics import IntArray, mean_class_accuracy, topk_accuracy
from egohod.evaluation.tables import with_chance

# Classes are marginalised as probabilities at the temperature that the released models are trained with.
TEMPERATURE = 0.07


@dataclass(frozen=True)
class ClassificationTable:
    """C classes described by prompts, and the class of every clip.

    ``texts`` P prompts; ``class_of_text`` [P] in 0..C-1, at least one prompt for each class; ``labels`` [N] true
    classes; ``parts`` maps the name of a coarser label (verb, noun) to its code for each class, [C]: a part's
    probability is the sum over its classes. Metrics are called ``<name>_top1`` and so on.
    """

    name: str
    texts: Sequence[str]
    class_of_text: IntArray
    labels: IntArray
    parts: Mapping[str, IntArray] = field(default_factory=dict)

    def evaluate(self, video: Tensor, text: Tensor) -> dict[str, float]:
        """Top-1, top-5 and mean class accuracy of the classes and top-1 of their parts, in percent."""
        logits = video @ class_features(text, self.class_of_text).T
        scores, classes = logits.numpy(), logits.shape[1]
        metrics = {
            f"{self.name}_top1": topk_accuracy(scores, self.labels),
            f"{self.name}_top5": topk_accuracy(scores, self.labels, k=5),
            f"{self.name}_mean_class": mean_class_accuracy(scores.argmax(axis=1), self.labels),
        }
        chance = dict(zip(metrics, (1 / classes, min(1, 5 / classes), 1 / classes), strict=True))
        probability = (logits.double() / TEMPERATURE).softmax(dim=1).numpy()
        for part, code in self.parts.items():
            count = int(code.max()) + 1
            metrics[f"{part}_top1"] = topk_accuracy(probability @ np.eye(count)[code], code[self.labels])
            chance[f"{part}_top1"] = 1 / count
        return with_chance({k: 100 * v for k, v in metrics.items()}, {k: 100 * v for k, v in chance.items()})


def class_features(text: Tensor, class_of_text: IntArray) -> Tensor:
    """One L2-normalised feature per class [C, D]: the mean over its prompts' normalised features [P, D].

    Raises :class:`UserError` naming a class without a prompt.
    """
    codes = torch.from_numpy(np.asarray(class_of_text))
    counts = torch.bincount(codes)
    if (counts == 0).any():
        raise UserError(f"class {int((counts == 0).nonzero()[0, 0])} has no prompt")
    mean = torch.zeros(len(counts), text.shape[1]).index_add_(0, codes, text) / counts[:, None]
    return torch.nn.functional.normalize(mean, dim=-1)
