"""Zero-shot classification: each clip takes the class whose prompts lie nearest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from egohod.errors import UserError
from egohod.evaluation.metrics import (
    IntArray,
    expected_average_precision,
    label_ranks,
    mean_class_accuracy,
    multilabel_average_precision,
    rank_items,
)
from egohod.evaluation.scores import RESAMPLES, Score, percent
from egohod.evaluation.tables import EvaluationTable, similarity

# Classes are marginalised as probabilities at the temperature that the released models are trained with.
TEMPERATURE = 0.07
_SHOWN = 5


@dataclass(frozen=True)
class ClassificationTable(EvaluationTable):
    """C classes described by prompts, and the class of every clip.

    ``texts`` P prompts; ``class_of_text`` [P] in 0..C-1, at least one prompt for each class; ``labels`` [N] true
    classes; ``parts`` maps the name of a coarser label (verb, noun) to its code for each class, [C]: a part's
    probability is the sum over its classes. Metrics are called ``<name>_top1`` and so on. ``class_names`` [C] are for
    people, ``class_keys`` [C] what tells them apart in annotation files, in ``key_columns``. ``splits`` are rows of
    clips: with them, metrics are those of the first split, and ``<metric>_splits`` is the mean of all.
    """

    name: str
    texts: Sequence[str]
    class_of_text: IntArray
    labels: IntArray
    parts: Mapping[str, IntArray] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    splits: Sequence[IntArray] = ()
    class_keys: Sequence[tuple[str, ...]] = ()
    key_columns: Sequence[str] = ()

    def measure(self, video: Tensor, text: Tensor) -> dict[str, Score]:
        """Top-1, top-5 and mean class accuracy of the classes and top-1 of their parts, in percent."""
        logits = self._logits(video, text)
        ranks, classes = label_ranks(logits.numpy(), self.labels), logits.shape[1]
        splits = self.splits or [np.arange(len(ranks))]
        first = splits[0]
        scores = {
            f"{self.name}_top1": percent([ranks[first] <= 1], 100 / classes),
            f"{self.name}_top5": percent([ranks[first] <= 5], 100 * min(1, 5 / classes)),
            f"{self.name}_mean_class": self._mean_class(ranks, splits[:1], 100 / classes),
        }
        if len(splits) > 1:
            scores[f"{self.name}_top1_splits"] = percent([ranks[rows] <= 1 for rows in splits], 100 / classes)
            scores[f"{self.name}_mean_class_splits"] = self._mean_class(ranks, splits, 100 / classes)
        for part, code in self.parts.items():
            count = int(code.max()) + 1
            right = np.concatenate(
                [
                    label_ranks(self._probabilities(rows).numpy() @ np.eye(count)[code], labels) <= 1
                    for rows, labels in zip(
                        logits[first].split(1000), _pieces(code[self.labels[first]], 1000), strict=True
                    )
                ]
            )
            scores[f"{part}_top1"] = percent([right], 100 / count)
        return scores

    def _mean_class(self, ranks: IntArray, splits: Sequence[IntArray], chance: float) -> Score:
        """Accuracy within each class that occurs in a split, averaged over these classes and then over the splits.

        Whole splits are resampled, not the clips of each class: of a class with one clip nothing could vary.
        """
        told = np.where(ranks <= 1, self.labels, -1)

        def value(samples: Sequence[IntArray]) -> float:
            return 100 * float(np.mean([mean_class_accuracy(told[rows], self.labels[rows]) for rows in samples]))

        def draw(rng: np.random.Generator) -> NDArray[np.float64]:
            return np.array([value([rng.choice(rows, len(rows)) for rows in splits]) for _ in range(RESAMPLES)])

        return Score(value(splits), chance, draw)

    def details(self, video: Tensor, text: Tensor) -> Mapping[str, Any]:
        """The best classes of each clip; per class: clips and accuracy; confusions as [true, predicted, clips]."""
        logits = self._logits(video, text).numpy()
        best = np.concatenate(
            [rank_items(rows)[:, :_SHOWN] for rows in np.array_split(logits, len(logits) // 1000 + 1)]
        )
        right = best[:, 0] == self.labels
        clips = np.bincount(self.labels, minlength=logits.shape[1])
        correct = np.bincount(self.labels, weights=right, minlength=logits.shape[1])
        pairs, counts = np.unique(np.stack([self.labels, best[:, 0]], axis=1), axis=0, return_counts=True)
        names = list(self.class_names) or [
            self.texts[int(np.argmax(self.class_of_text == c))] for c in range(len(clips))
        ]
        return {
            "kind": "classification",
            "classes": names,
            "labels": self.labels.tolist(),
            "best_classes": best.tolist(),
            "similarity": logits[np.arange(len(best))[:, None], best].round(4).tolist(),
            "per_class": [
                {"class": int(c), "clips": int(clips[c]), "accuracy": round(100 * correct[c] / clips[c], 2)}
                for c in np.flatnonzero(clips)
            ],
            "confusion": [[int(true), int(told), int(n)] for (true, told), n in zip(pairs, counts, strict=True)],
        }

    def restricted(self, kept: NDArray[Any]) -> ClassificationTable:
        """See :class:`EvaluationTable`; all classes stay."""
        number = np.cumsum(kept) - 1
        splits = [number[rows[kept[rows]]] for rows in self.splits]
        return dataclasses.replace(self, labels=self.labels[kept], splits=splits)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.double().div(TEMPERATURE).softmax(dim=1)

    def _logits(self, video: Tensor, text: Tensor) -> Tensor:
        return similarity(video, class_features(text, self.class_of_text))


@dataclass(frozen=True)
class MultiLabelTable(EvaluationTable):
    """C classes, each told by one text, and which of them occur in every clip: ``labels`` [N, C] bool (Charades)."""

    name: str
    texts: Sequence[str]
    labels: NDArray[np.bool_]

    def measure(self, video: Tensor, text: Tensor) -> dict[str, Score]:
        """Mean over the classes of the average precision over the clips, in percent; resampled by clips."""
        scores = similarity(video, text).numpy()

        def value(rows: IntArray) -> float:
            precision = multilabel_average_precision(scores[rows], self.labels[rows])
            return 100 * float(np.nanmean(precision)) if not np.isnan(precision).all() else float("nan")

        def draw(rng: np.random.Generator) -> NDArray[np.float64]:
            return np.array([value(rng.integers(0, len(scores), len(scores))) for _ in range(RESAMPLES)])

        told = self.labels[self.labels.any(axis=1)]
        chance = 100 * float(np.nanmean(expected_average_precision(told))) if told.size else None
        return {self.name: Score(value(np.arange(len(scores))), chance, draw)}

    def details(self, video: Tensor, text: Tensor) -> Mapping[str, Any]:
        """The best classes of each clip, and the average precision of each class."""
        scores = similarity(video, text).numpy()
        precision = multilabel_average_precision(scores, self.labels)
        return {
            "kind": "multilabel",
            "classes": list(self.texts),
            "labels": [np.flatnonzero(row).tolist() for row in self.labels],
            "best_classes": rank_items(scores)[:, :_SHOWN].tolist(),
            "per_class": [
                {"class": int(c), "clips": int(self.labels[:, c].sum()), "average_precision": round(100 * value, 2)}
                for c, value in enumerate(precision.tolist())
                if value == value
            ],
        }

    def restricted(self, kept: NDArray[Any]) -> MultiLabelTable:
        """See :class:`EvaluationTable`."""
        return dataclasses.replace(self, labels=self.labels[kept])


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


def _pieces(values: IntArray, size: int) -> list[IntArray]:
    return [values[start : start + size] for start in range(0, len(values), size)]
