"""Tasks: what a benchmark measures on its clips, scored from features. And probes of frozen features.

Every task has the texts to embed and the same three methods: ``measure`` turns features into scores, ``details`` into
what the report shows clip by clip, and ``restricted`` gives the task over a part of the clips.

N clips, M texts, D dimensions, C classes.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from egohod.data.formats.base import ClassificationData, MultiLabelData, QuestionData, RetrievalData
from egohod.data.labels import ClassSpace
from egohod.errors import UserError
from egohod.evaluation.metrics import (
    RESAMPLES,
    FloatArray,
    IntArray,
    Score,
    expected_graded_per_query,
    expected_recall,
    first_relevant_rank,
    graded_per_query,
    label_ranks,
    mean_class_accuracy,
    median,
    multilabel_average_precision,
    multiple_choice_right,
    percent,
    rank_items,
)

log = logging.getLogger(__name__)

RECALL_AT = (1, 5)
# Class probabilities are summed over verbs and nouns at the temperature that the released models are trained with: of a
# softmax at another one a sum may name another verb.
TEMPERATURE = 0.07
# Best answers of a clip that the report shows.
_SHOWN = 5
# Clips of which all class probabilities are in memory at a time: of EK100's 4,000 classes they are 32 MB.
_ROWS = 1000


@dataclass(frozen=True)
class Members:
    """The clips (or the texts) as each member of an ensemble embeds them, whose similarities are averaged.

    A member may be an ensemble itself, such as a model on clips and on mirrored clips. ``combine``: as they are
    (``raw``), or each with the mean and deviation over all pairs that members have on average (``standardised``).
    """

    features: Sequence[Features]
    combine: str = "raw"


Features = Tensor | Members


def over_members(compute: Callable[[Tensor, Tensor], Tensor], video: Features, text: Features) -> Tensor:
    """``compute(video, text)`` of one model, or its average over all members; -inf marks what does not exist."""
    if not isinstance(video, Members):
        assert not isinstance(text, Members)
        return compute(video, text)
    assert isinstance(text, Members)
    total, centre, spread = torch.zeros(()), 0.0, 0.0
    for clips, texts in zip(video.features, text.features, strict=True):
        scores = over_members(compute, clips, texts)
        if video.combine == "standardised":
            # Models spread their cosines differently: unscaled, the one with the widest spread would decide.
            pairs = scores[scores.isfinite()]
            mean, deviation = float(pairs.mean()), max(float(pairs.std(correction=0)), 1e-12)
            scores, centre, spread = (scores - mean) / deviation, centre + mean, spread + deviation
        # One matrix and the sum in memory, however many members there are.
        total = total + scores
    average = total / len(video.features)
    if video.combine == "raw":
        return average
    # Back to the scale of one model, which softmaxes with a fixed temperature need.
    return (average * spread + centre) / len(video.features)


class EvaluationTask(ABC):
    """One evaluation over the clips of a dataset."""

    texts: Sequence[str]
    """The texts to embed, in the order in which ``measure`` takes their features."""

    @abstractmethod
    def measure(self, video: Features, text: Features) -> dict[str, Score]:
        """Metrics from features of all clips and of ``texts`` [M, D], L2-normalised float32 on the CPU.

        ``video`` is [N, D], or [N, V, D] where the best of V views counts, see :func:`similarity`. Several models'
        features are :class:`Members` on both sides.
        """

    @property
    @abstractmethod
    def metric_names(self) -> list[str]:
        """What ``measure`` calls its metrics."""

    @abstractmethod
    def details(self, video: Features, text: Features) -> Mapping[str, Any]:
        """Answers clip by clip, in plain values for JSON."""

    @abstractmethod
    def restricted(self, mask: NDArray[Any]) -> EvaluationTask:
        """The same over the clips where the mask ``mask`` [N] is true, renumbered."""


def similarity(video: Tensor, text: Tensor) -> Tensor:
    """Similarity of clips [N, D] or their views [N, V, D] to texts [M, D]: [N, M], the largest of the views."""
    if video.dim() == 2:
        return video @ text.T
    # View by view and in place: all at once would need the memory of V matrices.
    best = video[:, 0] @ text.T
    for view in range(1, video.shape[1]):
        torch.maximum(best, video[:, view] @ text.T, out=best)
    return best


def dual_softmax(scores: Tensor, temperature: float) -> Tensor:
    """The logarithm of a softmax over each row times one over each column of ``scores`` [N, M] (2104.00680).

    A text that is similar to every clip, and a clip that is to every text, loses what it has in common with all.
    """
    scaled = scores / temperature
    return 2 * scaled - scaled.logsumexp(dim=1, keepdim=True) - scaled.logsumexp(dim=0, keepdim=True)


def _best(scores: FloatArray) -> IntArray:
    """The highest columns of each row [N, 5]."""
    # In parts: a ranking of all columns of a large benchmark is eight bytes for every similarity.
    return np.concatenate([rank_items(rows)[:, :_SHOWN] for rows in np.array_split(scores, len(scores) // _ROWS + 1)])


@dataclass(frozen=True)
class RetrievalTask(RetrievalData, EvaluationTask):
    """Every clip against all distinct texts, and every text against all clips; relevancy 1 counts as a hit in mAP."""

    temperature: float | None = None
    """That of a :func:`dual_softmax` of each member's similarities; None is none."""

    def scores(self, video: Features, text: Features) -> Tensor:
        """What clips and texts are ranked by, [N, M]."""

        def compute(clips: Tensor, texts: Tensor) -> Tensor:
            plain = similarity(clips, texts)
            return plain if self.temperature is None else dual_softmax(plain, self.temperature)

        return over_members(compute, video, text)

    def measure(self, video: Features, text: Features) -> dict[str, Score]:
        """mAP and nDCG by relevancy; recall@k (percent) and median rank (from 1) of a clip's own text and back."""
        sim = self.scores(video, text).numpy()
        return self.measure_ranking(sim, sim.T)

    def measure_ranking(self, by_clip: FloatArray, by_text: FloatArray) -> dict[str, Score]:
        """As :meth:`measure`, of scores of texts by clip [N, M] and of clips by text [M, N]."""
        graded = zip(
            graded_per_query(by_clip, self.relevancy), graded_per_query(by_text, self.relevancy.T), strict=True
        )
        scores = {}
        for name, values, expected in zip(("map", "ndcg"), graded, self._expected, strict=True):
            # Where clips are left out, a text may have no relevant clip left, and then no average precision.
            clips, texts = (int(np.isnan(each).sum()) for each in values)
            if clips or texts:
                log.warning("%s leaves out %d clips and %d texts to which nothing is relevant", name, clips, texts)
            # The mean of both directions counts each of them half, however many more clips than texts there are.
            for suffix, parts in (("", (0, 1)), ("_v2t", (0,)), ("_t2v", (1,))):
                chance = percent([expected[i] for i in parts], None).value
                scores[name + suffix] = percent([values[i] for i in parts], chance)
        if self.text_of_clip is None:
            return scores
        # Several clips may have the same narration: each of them is then a hit of its text.
        own = self.text_of_clip[:, None] == np.arange(len(self.texts))
        for direction, each, relevant in (("v2t", by_clip, own), ("t2v", by_text, own.T)):
            ranks, by_k = first_relevant_rank(each, relevant), expected_recall(relevant.sum(axis=1), each.shape[1])
            for k in RECALL_AT:
                # A gallery of fewer than k items has no further rank.
                chance = 100 * float(by_k[min(k, len(by_k)) - 1])
                scores[f"recall_{k}_{direction}"] = percent([ranks[ranks > 0] <= k], chance)
            # The median of chance is the first rank by which half of the queries have a hit.
            scores[f"median_rank_{direction}"] = median(ranks, float(np.searchsorted(by_k, 0.5) + 1))
        return scores

    @property
    def metric_names(self) -> list[str]:
        """See :class:`EvaluationTask`."""
        graded = [name + suffix for name in ("map", "ndcg") for suffix in ("", "_v2t", "_t2v")]
        ranked = [*(f"recall_{k}" for k in RECALL_AT), "median_rank"] if self.text_of_clip is not None else []
        return graded + [f"{name}_{direction}" for name in ranked for direction in ("v2t", "t2v")]

    def details(self, video: Features, text: Features) -> Mapping[str, Any]:
        """The best texts of each clip with their similarity and relevancy, and its average precision."""
        sim = self.scores(video, text).numpy()
        return self.details_of_ranking(sim, sim)

    def details_of_ranking(self, sim: FloatArray, by_clip: FloatArray) -> Mapping[str, Any]:
        """As :meth:`details`, of texts by the scores ``by_clip`` [N, M]."""
        precision, _ = graded_per_query(by_clip, self.relevancy)
        best, rows = _best(by_clip), np.arange(len(sim))[:, None]
        return {
            "kind": "retrieval",
            "texts": list(self.texts),
            "average_precision": [None if np.isnan(value) else round(float(value), 4) for value in precision],
            "best_texts": best.tolist(),
            "similarity": sim[rows, best].round(4).tolist(),
            "relevancy": self.relevancy[rows, best].round(4).tolist(),
            "most_relevant_text": self.relevancy.argmax(axis=1).tolist(),
        }

    def restricted(self, mask: NDArray[Any]) -> RetrievalTask:
        """See :class:`EvaluationTask`; all texts stay."""
        own = None if self.text_of_clip is None else self.text_of_clip[mask]
        return dataclasses.replace(self, text_of_clip=own, relevancy=self.relevancy[mask])

    @cached_property
    def _expected(self) -> list[tuple[FloatArray, FloatArray]]:
        # Cached, as it does not depend on features: every temporal control has the same.
        of_clips, of_texts = (expected_graded_per_query(each) for each in (self.relevancy, self.relevancy.T))
        return list(zip(of_clips, of_texts, strict=True))


@dataclass(frozen=True)
class ClassificationTask(ClassificationData, EvaluationTask):
    """Classification of clips: zero-shot, each clip gets the class whose prompts are most similar, or by heads.

    The probability of a part (verb, noun) is the sum over its classes. Metrics are called ``<name>_top1`` and so on;
    with splits they are those of the first one, and ``<metric>_splits`` is the mean of all.
    """

    by_heads: bool = False
    """The clips' features are the probabilities of the classes, as a model's heads give them; there are no texts. Those
    of the parts may follow, in the order of ``parts``, from heads of their own."""

    def measure(self, video: Features, text: Features) -> dict[str, Score]:
        """Top-1, top-5 and mean class accuracy of the classes and top-1 of their parts, in percent."""
        if not self.is_labelled:
            return {}
        logits = self.scores(video, text)
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
        for part, probabilities in self.part_scores(video, text).items():
            labels = self.parts[part][self.labels[first]]
            correct = label_ranks(probabilities[first], labels) <= 1
            scores[f"{part}_top1"] = percent([correct], 100 / probabilities.shape[1])
        return scores

    def scores(self, video: Features, text: Features) -> Tensor:
        """Similarities to the classes, or their probabilities by heads, [N, C]."""
        if self.by_heads:
            return over_members(lambda clips, _: clips, video, text)[:, : len(self.class_keys) or None]
        return over_members(lambda v, t: similarity(v, class_features(t, self.class_of_text)), video, text)

    def part_scores(self, video: Features, text: Features) -> dict[str, FloatArray]:
        """Probabilities of each part's values, float64 [N, values]: by heads of their own, else sums over classes."""
        logits, result, place = self.scores(video, text), dict[str, FloatArray](), len(self.class_keys)
        heads = over_members(lambda clips, _: clips, video, text) if self.by_heads else logits
        for part, code in self.parts.items():
            one_hot = np.eye(int(code.max()) + 1)[code]
            if self.by_heads and heads.shape[1] > logits.shape[1]:
                result[part] = heads[:, place : place + one_hot.shape[1]].double().numpy()
                place += one_hot.shape[1]
                continue
            sums = []
            for rows in logits.split(_ROWS):
                # In float64, as sums over a thousand classes of nearly equal parts decide.
                probabilities = rows.double() if self.by_heads else rows.double().div(TEMPERATURE).softmax(dim=1)
                sums.append(probabilities.numpy() @ one_hot)
            result[part] = np.concatenate(sums)
        return result

    @property
    def is_labelled(self) -> bool:
        """Whether the clips' classes are public; else there is nothing to measure."""
        return not len(self.labels) or int(self.labels.min()) >= 0

    @property
    def metric_names(self) -> list[str]:
        """See :class:`EvaluationTask`."""
        if not self.is_labelled:
            return []
        names = ["top1", "top5", "mean_class", *(["top1_splits", "mean_class_splits"] if len(self.splits) > 1 else [])]
        return [f"{self.name}_{name}" for name in names] + [f"{part}_top1" for part in self.parts]

    def _mean_class(self, ranks: IntArray, splits: Sequence[IntArray], chance: float) -> Score:
        """Accuracy within each class that occurs in a split, averaged over these classes and then over the splits."""
        # A wrong prediction counts the same whatever it is: -1 is no class.
        predictions = np.where(ranks <= 1, self.labels, -1)

        def value(samples: Sequence[IntArray]) -> float:
            return 100 * float(np.mean([mean_class_accuracy(predictions[rows], self.labels[rows]) for rows in samples]))

        # Whole splits are resampled, not the clips of each class: of a class with one clip nothing could vary.
        return Score(
            value(splits),
            chance,
            lambda rng: np.array([value([rng.choice(rows, len(rows)) for rows in splits]) for _ in range(RESAMPLES)]),
        )

    def details(self, video: Features, text: Features) -> Mapping[str, Any]:
        """The best classes of each clip; per class: clips and accuracy; confusions as [true, predicted, clips]."""
        logits = self.scores(video, text).numpy()
        best = _best(logits)
        if not self.is_labelled:
            return {"kind": "unlabelled", "best_classes": best.tolist()}
        clips = np.bincount(self.labels, minlength=logits.shape[1])
        correct = np.bincount(self.labels, weights=best[:, 0] == self.labels, minlength=logits.shape[1])
        pairs, counts = np.unique(np.stack([self.labels, best[:, 0]], axis=1), axis=0, return_counts=True)
        # A benchmark whose classes have no names calls each by its first prompt.
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
            # Only the cells with a clip: of thousands of classes nearly all pairs are empty.
            "confusion": np.column_stack([pairs, counts]).tolist(),
        }

    def restricted(self, mask: NDArray[Any]) -> ClassificationTask:
        """See :class:`EvaluationTask`; all classes stay."""
        number = np.cumsum(mask) - 1
        splits = [number[rows[mask[rows]]] for rows in self.splits]
        return dataclasses.replace(self, labels=self.labels[mask], splits=splits)


def class_features(text: Tensor, class_of_text: IntArray) -> Tensor:
    """One L2-normalised feature per class [C, D]: the mean over its prompts' normalised features [P, D].

    Raises :class:`UserError` naming a class without a prompt.
    """
    codes = torch.from_numpy(np.asarray(class_of_text))
    counts = torch.bincount(codes)
    if (counts == 0).any():
        raise UserError(f"class {int((counts == 0).nonzero()[0, 0])} has no prompt")
    mean = torch.zeros(len(counts), text.shape[1]).index_add_(0, codes, text) / counts[:, None]
    # Again to unit length: a class with prompts far apart has a short mean and would lose to all others.
    return F.normalize(mean, dim=-1)


def head_tasks(tasks: Sequence[EvaluationTask], space: ClassSpace, where: str) -> list[EvaluationTask]:
    """The classifications among a benchmark's ``tasks``, for heads with the classes of ``space``.

    Raises :class:`UserError` if there is none, if other columns identify its classes, or if a clip's class is not among
    those of the heads.
    """
    result: list[EvaluationTask] = []
    for task in tasks:
        if not isinstance(task, ClassificationTask) or not task.class_keys:
            continue
        ours, theirs = ([name.removesuffix("_class") for name in each] for each in (task.key_columns, space.columns))
        # A single column has a name of its own in every dataset; of several the order counts, too.
        if len(ours) != len(theirs) or (len(ours) > 1 and ours != theirs):
            raise UserError(
                f"{where}: its classes are identified by {' and '.join(task.key_columns)}, those of the heads by "
                f"{' and '.join(space.columns)}; train with data.labels.columns=[{','.join(task.key_columns)}]"
            )
        # Only of classes that occur: a benchmark may list classes for which the training part has no clip.
        occurring = [c for c in np.unique(task.labels).tolist() if c >= 0]
        number = {c: space.number(task.class_keys[c], where) for c in occurring} | {-1: -1}
        parts = {name: code for name, (_, code) in space.parts.items()} if len(space.columns) > 1 else {}
        task = dataclasses.replace(
            task,
            by_heads=True,
            texts=(),
            class_of_text=np.arange(0),
            labels=np.array([number[c] for c in task.labels.tolist()], dtype=np.int64),
            parts=parts,
            class_names=space.names,
            class_keys=space.keys,
        )
        result.append(task)
    if not result:
        raise UserError(f"{where}: no classification that heads could be measured on")
    return result


@dataclass(frozen=True)
class MultiLabelTask(MultiLabelData, EvaluationTask):
    """Which of several classes occur in every clip (Charades); each class is described by one text."""

    def measure(self, video: Features, text: Features) -> dict[str, Score]:
        """Mean over the classes of the average precision over the clips, in percent; resampled by clips."""
        scores = over_members(similarity, video, text).numpy()

        def value(rows: IntArray) -> float:
            precision = multilabel_average_precision(scores[rows], self.labels[rows])
            # A resampling may have no clip of any class.
            return 100 * float(np.nanmean(precision)) if not np.isnan(precision).all() else float("nan")

        # Clips without any class rank last in the metric, so they do not take part in its chance level.
        labelled = self.labels[self.labels.any(axis=1)]
        expected = expected_graded_per_query(labelled.T.astype(np.float64))[0] if labelled.size else None
        return {
            self.name: Score(
                value(np.arange(len(scores))),
                None if expected is None else 100 * float(np.nanmean(expected)),
                lambda rng: np.array([value(rng.integers(0, len(scores), len(scores))) for _ in range(RESAMPLES)]),
            )
        }

    @property
    def metric_names(self) -> list[str]:
        """See :class:`EvaluationTask`."""
        return [self.name]

    def details(self, video: Features, text: Features) -> Mapping[str, Any]:
        """The best classes of each clip, and the average precision of each class."""
        scores = over_members(similarity, video, text).numpy()
        precision = multilabel_average_precision(scores, self.labels)
        return {
            "kind": "multilabel",
            "classes": list(self.texts),
            "labels": [np.flatnonzero(row).tolist() for row in self.labels],
            "best_classes": _best(scores).tolist(),
            "per_class": [
                {"class": int(c), "clips": int(self.labels[:, c].sum()), "average_precision": round(100 * value, 2)}
                for c, value in enumerate(precision.tolist())
                if value == value  # NaN: a class without a clip
            ],
        }

    def restricted(self, mask: NDArray[Any]) -> MultiLabelTask:
        """See :class:`EvaluationTask`."""
        return dataclasses.replace(self, labels=self.labels[mask])


@dataclass(frozen=True)
class MultipleChoiceTask(QuestionData, EvaluationTask):
    """Which of a few texts describes a clip, or which of a few clips shows a text; one metric a kind of question."""

    def measure(self, video: Features, text: Features) -> dict[str, Score]:
        """Accuracy and chance level of each kind, in percent."""
        kinds = np.array([question.kind for question in self.questions])
        answers = np.array([question.answer for question in self.questions], dtype=np.int64)
        scores = self._scores(video, text)
        right = multiple_choice_right(scores, answers)
        # Questions of one kind may have different numbers of choices.
        guess = np.array([1 / len(question.choices) for question in self.questions])
        result = {}
        for kind in map(str, np.unique(kinds)):
            rows = np.flatnonzero(kinds == kind)
            if kind in self.precision:
                result[kind] = self._average_precision(scores, rows, pooled=self.precision[kind] == "pooled")
            else:
                result[kind] = percent([right[rows]], 100 * float(guess[rows].mean()))
        return result

    def _average_precision(self, scores: FloatArray, rows: IntArray, pooled: bool) -> Score:
        """Of the questions ``rows``, whose choices are ranked together or question by question."""
        ranked, labels = [], []
        for row in rows:
            question = self.questions[row]
            ranked.append(scores[row, : len(question.choices)])
            labels.append(np.isin(np.arange(len(question.choices)), (question.answer, *question.also)))
        if not pooled:
            pairs = list(zip(ranked, labels, strict=True))
            values = np.array([graded_per_query(s[None], r[None].astype(float))[0][0] for s, r in pairs])
            chance = np.array([expected_graded_per_query(r[None].astype(float))[0][0] for r in labels])
            weights = np.array([len(r) for r in labels])

            def mean(i: IntArray) -> float:
                return 100 * float(np.average(values[i], weights=weights[i]))

            expected = 100 * float(np.average(chance, weights=weights))
        else:

            def mean(i: IntArray) -> float:
                together, right = (np.concatenate([each[k] for k in i]) for each in (ranked, labels))
                return 100 * float(graded_per_query(together[None], right[None].astype(float))[0][0])

            expected = 100 * float(expected_graded_per_query(np.concatenate(labels)[None].astype(float))[0][0])
        every = np.arange(len(rows))
        return Score(
            mean(every),
            expected,
            lambda rng: np.array([mean(rng.integers(0, len(rows), len(rows))) for _ in range(RESAMPLES)]),
        )

    @property
    def metric_names(self) -> list[str]:
        """See :class:`EvaluationTask`."""
        return list(dict.fromkeys(question.kind for question in self.questions))

    def details(self, video: Features, text: Features) -> Mapping[str, Any]:
        """Each question with the choice that was taken and the similarity to all choices."""
        questions = []
        for question, row in zip(self.questions, self._scores(video, text), strict=True):
            scores = [round(float(value), 4) for value in row[: len(question.choices)]]
            questions.append(dataclasses.asdict(question) | {"taken": int(row.argmax()), "similarity": scores})
        return {"kind": "multiple_choice", "texts": list(self.texts), "questions": questions}

    def restricted(self, mask: NDArray[Any]) -> MultipleChoiceTask:
        """See :class:`EvaluationTask`; a question about a clip that is left out goes, too."""
        number, questions = np.cumsum(mask) - 1, []
        for question in self.questions:
            if mask[list(question.clips)].all():
                changed: dict[str, Any] = {}
                if question.query_is_clip:
                    changed["query"] = int(number[question.query])
                if question.choices_are_clips:
                    changed["choices"] = tuple(int(number[clip]) for clip in question.choices)
                questions.append(dataclasses.replace(question, **changed))
        return dataclasses.replace(self, questions=questions)

    def _scores(self, video: Features, text: Features) -> FloatArray:
        """Similarity of each query to its choices [Q, largest number of choices], -inf behind the last.

        Clips are [N, D] or [N, V, D], of whose views the most similar counts; texts [M, D].
        """
        return over_members(lambda clips, texts: torch.from_numpy(self._compare(clips, texts)), video, text).numpy()

    def _compare(self, clips: Tensor, texts: Tensor) -> FloatArray:
        video, text = clips.numpy(), texts.numpy()
        widest = max((len(question.choices) for question in self.questions), default=1)
        scores = np.full((len(self.questions), widest), -np.inf, dtype=np.float32)
        # Question by question: of all pairs of clips and texts only these few are needed.
        for row, question in zip(scores, self.questions, strict=True):
            chosen = (video if question.choices_are_clips else text)[list(question.choices)]
            products = chosen @ (video if question.query_is_clip else text)[question.query].T
            # Of several views the most similar counts.
            row[: len(question.choices)] = products.reshape(len(chosen), -1).max(axis=1)
        return scores


# --------------------------------------------------------------------------------------------------
# Probes of frozen features. What a probe chooses, it chooses on a tenth of the training clips.
# --------------------------------------------------------------------------------------------------

WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)
NEIGHBOURS = (1, 5, 10, 20)
# Of the cosines that neighbours vote with, as in DINO's k-NN probe (2104.14294).
KNN_TEMPERATURE = 0.07
_VALIDATION_SHARE = 0.1
_ITERATIONS = 60


@dataclass(frozen=True)
class ProbeResult:
    """The predicted class of each test clip, int64 [M], and the setting that was chosen."""

    classes: Tensor
    chosen: str


def linear_probe(features: Tensor, labels: Tensor, test: Tensor, count: int, *, seed: int = 0) -> ProbeResult:
    """Multinomial logistic regression by L-BFGS on standardised features.

    ``features`` [N, D] with ``labels`` [N] in 0..``count``-1 are trained on, the classes of ``test`` [M, D] predicted.
    """
    # By the training clips alone; a dimension that is constant there would divide by zero.
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    features, test = (features - mean) / scale, (test - mean) / scale
    classes, best = _predict_tuned(_logistic_regression, WEIGHT_DECAYS, features, labels, test, count, seed)
    return ProbeResult(classes, f"weight decay {best:g}")


def _logistic_regression(features: Tensor, labels: Tensor, test: Tensor, count: int, decay: float) -> Tensor:
    weight = torch.zeros(count, features.shape[1], requires_grad=True)
    bias = torch.zeros(count, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels)
        loss = loss + decay / 2 * weight.square().sum()  # not on the bias, which holds the classes' frequencies
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return F.linear(test, weight, bias).argmax(dim=1)


def knn_probe(features: Tensor, labels: Tensor, test: Tensor, count: int, *, seed: int = 0) -> ProbeResult:
    """The class that the most similar training clips vote for, by cosine; arguments as of :func:`linear_probe`."""
    features, test = F.normalize(features, dim=1), F.normalize(test, dim=1)
    classes, best = _predict_tuned(_vote, NEIGHBOURS, features, labels, test, count, seed)
    return ProbeResult(classes, f"{best} neighbours")


def _vote(features: Tensor, labels: Tensor, test: Tensor, count: int, k: int) -> Tensor:
    classes = []
    for rows in test.split(_ROWS):  # in parts: a row has a cosine for every training clip
        cosines, nearest = (rows @ features.T).topk(min(k, len(features)), dim=1)
        votes = torch.zeros(len(rows), count)
        classes.append(votes.scatter_add_(1, labels[nearest], (cosines / KNN_TEMPERATURE).exp()).argmax(dim=1))
    return torch.cat(classes)


def _predict_tuned(
    predict: Callable[[Tensor, Tensor, Tensor, int, Any], Tensor],
    settings: Sequence[Any],
    features: Tensor,
    labels: Tensor,
    test: Tensor,
    count: int,
    seed: int,
) -> tuple[Tensor, Any]:
    """Classes of ``test`` by the setting that is most accurate on held-out training clips; of equal ones the first."""
    # A generator of its own: the same split whatever else draws random numbers.
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    held_out = max(1, round(_VALIDATION_SHARE * len(features)))
    train, validation = order[held_out:], order[:held_out]
    accuracies = []
    for setting in settings:
        classes = predict(features[train], labels[train], features[validation], count, setting)
        accuracies.append(float((classes == labels[validation]).float().mean()))
    best = settings[accuracies.index(max(accuracies))]
    # Once more on all of them: the held-out tenth is worth having, too.
    return predict(features, labels, test, count, best), best
