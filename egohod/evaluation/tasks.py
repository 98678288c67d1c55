"""What a benchmark is made of: rows that point at clips and texts, and a way to score their features."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from egohod.data.formats.base import (
    BenchmarkData,
    ClassificationData,
    MultiLabelData,
    Question,
    QuestionData,
    RetrievalData,
)
from egohod.data.labels import ClassSpace
from egohod.errors import UserError
from egohod.evaluation.metrics import (
    RESAMPLES,
    FloatArray,
    IntArray,
    Score,
    expected_average_precision,
    expected_graded_scores,
    expected_recall,
    first_relevant_rank,
    flat,
    graded_per_query,
    label_ranks,
    mean_class_accuracy,
    median,
    multilabel_average_precision,
    multiple_choice_right,
    percent,
    rank_items,
)


class EvaluationTask(ABC):
    """One evaluation over the clips of a dataset: retrieval, classification, multiple choice or several labels."""

    texts: Sequence[str]
    """The texts to embed, in the order in which ``measure`` takes their features."""

    @abstractmethod
    def measure(self, video: Tensor, text: Tensor) -> dict[str, Score]:
        """Metrics from features of all clips and of ``texts`` [M, D], L2-normalised float32 on the CPU.

        ``video`` is [N, D], or [N, V, D] where the best of V views counts, see :func:`similarity`.
        """

    @abstractmethod
    def details(self, video: Tensor, text: Tensor) -> Mapping[str, Any]:
        """What the numbers are made of, clip by clip, in plain values that JSON can hold."""

    @abstractmethod
    def restricted(self, kept: NDArray[Any]) -> EvaluationTask:
        """The same over the clips where ``kept`` [N] is true, renumbered."""

    def evaluate(self, video: Tensor, text: Tensor) -> dict[str, float]:
        """Percent, except ranks, which count from 1; ``<metric>_chance`` is what guessing reaches."""
        return flat(self.measure(video, text))


def similarity(video: Tensor, text: Tensor) -> Tensor:
    """Similarity of clips [N, D] or their views [N, V, D] to texts [M, D]: [N, M], of views the largest."""
    if video.dim() == 2:
        return video @ text.T
    # View by view: all at once would hold V matrices.
    best = video[:, 0] @ text.T
    for view in range(1, video.shape[1]):
        torch.maximum(best, video[:, view] @ text.T, out=best)
    return best


log = logging.getLogger(__name__)

RECALL_AT = (1, 5)
_SHOWN = 5


@dataclass(frozen=True)
class RetrievalTask(RetrievalData, EvaluationTask):
    """Every clip searches all distinct texts, and every text all clips; relevancy 1 counts as a hit in mAP."""

    def measure(self, video: Tensor, text: Tensor) -> dict[str, Score]:
        """mAP and nDCG by relevancy; recall@k (percent) and median rank (from 1) of a clip's own text and back."""
        sim = similarity(video, text).numpy()
        v2t, t2v = graded_per_query(sim, self.relevancy), graded_per_query(sim.T, self.relevancy.T)
        scores = {}
        for name, here, there in zip(("map", "ndcg"), v2t, t2v, strict=True):
            if np.isnan(here).any() or np.isnan(there).any():
                counts = int(np.isnan(here).sum()), int(np.isnan(there).sum())
                log.warning("%s leaves out %d clips and %d texts to which nothing is relevant", name, *counts)
            for ending, parts in (("", (here, there)), ("_v2t", (here,)), ("_t2v", (there,))):
                scores[name + ending] = percent(parts, self._chance[name + ending])
        if self.text_of_clip is not None:
            own = self.text_of_clip[:, None] == np.arange(len(self.texts))
            for direction, each, relevant in (("v2t", sim, own), ("t2v", sim.T, own.T)):
                scores |= _ranks(first_relevant_rank(each, relevant), relevant, direction)
        return scores

    def details(self, video: Tensor, text: Tensor) -> Mapping[str, Any]:
        """The best texts of each clip with their similarity and relevancy, and its average precision."""
        sim = similarity(video, text).numpy()
        precision, _ = graded_per_query(sim, self.relevancy)
        best = np.concatenate([rank_items(rows)[:, :_SHOWN] for rows in np.array_split(sim, len(sim) // 1000 + 1)])
        rows = np.arange(len(sim))[:, None]
        return {
            "kind": "retrieval",
            "texts": list(self.texts),
            "average_precision": [None if np.isnan(value) else round(float(value), 4) for value in precision],
            "best_texts": best.tolist(),
            "similarity": sim[rows, best].round(4).tolist(),
            "relevancy": self.relevancy[rows, best].round(4).tolist(),
            "most_relevant_text": self.relevancy.argmax(axis=1).tolist(),
        }

    def restricted(self, kept: NDArray[Any]) -> RetrievalTask:
        """See :class:`EvaluationTask`; all texts stay."""
        own = None if self.text_of_clip is None else self.text_of_clip[kept]
        return dataclasses.replace(self, text_of_clip=own, relevancy=self.relevancy[kept])

    @cached_property
    def _chance(self) -> dict[str, float]:
        expected = expected_graded_scores(self.relevancy)
        return {
            name + ending: 100 * value
            for name, metric in (("map", expected.mean_average_precision), ("ndcg", expected.ndcg))
            for ending, value in (("", metric.mean), ("_v2t", metric.v2t), ("_t2v", metric.t2v))
        }


def _ranks(ranks: IntArray, relevant: NDArray[Any], direction: str) -> dict[str, Score]:
    by_chance = expected_recall(relevant.sum(axis=1), relevant.shape[1])
    scores = {
        f"recall_{k}_{direction}": percent([ranks[ranks > 0] <= k], 100 * float(by_chance[min(k, len(by_chance)) - 1]))
        for k in RECALL_AT
    }
    return scores | {f"median_rank_{direction}": median(ranks, float(np.searchsorted(by_chance, 0.5) + 1))}


# Classes are marginalised as probabilities at the temperature that the released models are trained with.
TEMPERATURE = 0.07
_SHOWN_CLASSES = 5


@dataclass(frozen=True)
class ClassificationTask(ClassificationData, EvaluationTask):
    """Each clip takes the class whose prompts are nearest; the probability of a part is the sum over its classes.

    Metrics are called ``<name>_top1`` and so on; ``<metric>_splits`` is the mean of all splits.
    """

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
            [rank_items(rows)[:, :_SHOWN_CLASSES] for rows in np.array_split(logits, len(logits) // 1000 + 1)]
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

    def restricted(self, kept: NDArray[Any]) -> ClassificationTask:
        """See :class:`EvaluationTask`; all classes stay."""
        number = np.cumsum(kept) - 1
        splits = [number[rows[kept[rows]]] for rows in self.splits]
        return dataclasses.replace(self, labels=self.labels[kept], splits=splits)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.double().div(TEMPERATURE).softmax(dim=1)

    def _logits(self, video: Tensor, text: Tensor) -> Tensor:
        return similarity(video, class_features(text, self.class_of_text))


@dataclass(frozen=True)
class MultiLabelTask(MultiLabelData, EvaluationTask):
    """Which of several classes occur in every clip (Charades)."""

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
            "best_classes": rank_items(scores)[:, :_SHOWN_CLASSES].tolist(),
            "per_class": [
                {"class": int(c), "clips": int(self.labels[:, c].sum()), "average_precision": round(100 * value, 2)}
                for c, value in enumerate(precision.tolist())
                if value == value
            ],
        }

    def restricted(self, kept: NDArray[Any]) -> MultiLabelTask:
        """See :class:`EvaluationTask`."""
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


@dataclass(frozen=True)
class MultipleChoiceTask(QuestionData, EvaluationTask):
    """Questions over the clips of a dataset; metrics are called as the kinds of the questions."""

    def measure(self, video: Tensor, text: Tensor) -> dict[str, Score]:
        """Accuracy and chance level of each kind, in percent."""
        kinds = np.array([question.kind for question in self.questions])
        answers = np.array([question.answer for question in self.questions], dtype=np.int64)
        right = multiple_choice_right(_scores(self.questions, video.numpy(), text.numpy()), answers)
        guess = np.array([1 / len(question.choices) for question in self.questions])
        return {
            str(kind): percent([right[kinds == kind]], 100 * float(guess[kinds == kind].mean()))
            for kind in np.unique(kinds)
        }

    def details(self, video: Tensor, text: Tensor) -> Mapping[str, Any]:
        """Each question with the choice that was taken and the similarity to all choices."""
        scores = _scores(self.questions, video.numpy(), text.numpy())
        return {
            "kind": "multiple_choice",
            "texts": list(self.texts),
            "questions": [
                dataclasses.asdict(question)
                | {
                    "taken": int(row.argmax()),
                    "similarity": [round(float(value), 4) for value in row[: len(question.choices)]],
                }
                for question, row in zip(self.questions, scores, strict=True)
            ],
        }

    def restricted(self, kept: NDArray[Any]) -> MultipleChoiceTask:
        """See :class:`EvaluationTask`; a question that needs a clip that is not kept is left out."""
        number = np.cumsum(kept) - 1

        def renumbered(question: Question) -> Question | None:
            clips = [question.query] if question.query_is_clip else list(question.choices)
            if not kept[clips].all():
                return None
            new = tuple(int(number[clip]) for clip in clips)
            return dataclasses.replace(question, **({"query": new[0]} if question.query_is_clip else {"choices": new}))

        return dataclasses.replace(self, questions=[q for each in self.questions if (q := renumbered(each))])


def _scores(questions: Sequence[Question], video: FloatArray, text: FloatArray) -> FloatArray:
    """Similarity of each query to each of its choices [Q, largest number of choices], -inf behind the last.

    ``video`` [N, D] or [N, V, D], of whose views the most similar counts; ``text`` [M, D].
    """
    widest = max((len(question.choices) for question in questions), default=1)
    scores = np.full((len(questions), widest), -np.inf, dtype=np.float32)
    for row, question in zip(scores, questions, strict=True):
        if question.query_is_clip:
            found = text[list(question.choices)] @ video[question.query].T
        else:
            found = video[list(question.choices)] @ text[question.query]
        row[: len(question.choices)] = found if found.ndim == 1 else found.max(axis=1)
    return scores


WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)
NEIGHBOURS = (1, 5, 10, 20)
# Cosines are sharpened by this before they vote (as DINO's k-NN probe, 2104.14294).
KNN_TEMPERATURE = 0.07
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
        told.append(votes.scatter_add_(1, labels[nearest], (similarity / KNN_TEMPERATURE).exp()).argmax(dim=1))
    return torch.cat(told)


def _split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips to learn from and clips to choose by."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, round(_HELD_OUT * count))
    return order[held:], order[:held]


@dataclass(frozen=True)
class HeadTask(ClassificationTask):
    """A classification whose clips come with probabilities; parts (verb, noun) are marginals of the classes."""

    def _logits(self, video: Tensor, text: Tensor) -> Tensor:
        return video

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.double()


def head_tasks(tables: Sequence[EvaluationTask], space: ClassSpace, where: str) -> list[EvaluationTask]:
    """The classifications among a benchmark's ``tables``, for heads of the classes ``space``.

    Raises :class:`UserError` if there is none, if other columns tell its classes, or if a clip's class is not among
    those of the heads.
    """
    made: list[EvaluationTask] = []
    for table in tables:
        if not isinstance(table, ClassificationTask) or not table.class_keys:
            continue
        _require_columns(table.key_columns, space.columns, where)
        number = {c: space.number(table.class_keys[c], where) for c in np.unique(table.labels).tolist()}
        labels = np.array([number[c] for c in table.labels.tolist()], dtype=np.int64)
        parts = {name: code for name, (_, code) in space.parts.items()} if len(space.columns) > 1 else {}
        changed = {"texts": (), "class_of_text": np.arange(0), "labels": labels, "parts": parts}
        fields = {each.name: getattr(table, each.name) for each in dataclasses.fields(table)}
        made.append(HeadTask(**{**fields, **changed, "class_names": space.names, "class_keys": space.keys}))
    if not made:
        raise UserError(f"{where}: no classification that heads could be measured on")
    return made


def _require_columns(told: Sequence[str], learned: Sequence[str], where: str) -> None:
    """Raise :class:`UserError` if classes of several columns are told by others, or in another order.

    A single column has a name of its own in every dataset.
    """
    first, second = ([name.removesuffix("_class") for name in each] for each in (told, learned))
    if len(first) != len(second) or (len(first) > 1 and first != second):
        raise UserError(
            f"{where}: its classes are told by {' and '.join(told)}, those of the heads by {' and '.join(learned)}; "
            f"train with data.labels.columns=[{','.join(told)}]"
        )


def tasks_of(data: BenchmarkData) -> list[EvaluationTask]:
    """The tasks that the files of a benchmark describe, one class for each kind of data."""
    classes: dict[type, type[Any]] = {
        RetrievalData: RetrievalTask,
        ClassificationData: ClassificationTask,
        MultiLabelData: MultiLabelTask,
        QuestionData: MultipleChoiceTask,
    }
    return [classes[type(task)](**vars(task)) for task in data.tasks]
