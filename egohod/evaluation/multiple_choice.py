"""Multiple choice: which of a few texts tells this clip, or which of a few clips shows this text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from egohod.evaluation.metrics import FloatArray, multiple_choice_accuracy
from egohod.evaluation.tables import with_chance


@dataclass(frozen=True)
class Question:
    """One question: the query and its choices are rows of the clips or of the table's texts.

    ``query_is_clip``: a clip asks for its text; otherwise a text asks for its clip. ``answer`` indexes ``choices``.
    """

    kind: str
    query_is_clip: bool
    query: int
    choices: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class QuestionTable:
    """Questions over the clips of a dataset and ``texts``; metrics are called as the kinds of the questions."""

    texts: Sequence[str]
    questions: Sequence[Question]

    def evaluate(self, video: Tensor, text: Tensor) -> dict[str, float]:
        """Accuracy and chance level of each kind, in percent."""
        kinds = np.array([question.kind for question in self.questions])
        answers = np.array([question.answer for question in self.questions], dtype=np.int64)
        accuracy = multiple_choice_accuracy(_scores(self.questions, video.numpy(), text.numpy()), answers, kinds)
        guess = np.array([1 / len(question.choices) for question in self.questions])
        chance = {kind: 100 * float(guess[kinds == kind].mean()) for kind in accuracy}
        return with_chance({kind: 100 * value for kind, value in accuracy.items()}, chance)


def _scores(questions: Sequence[Question], video: FloatArray, text: FloatArray) -> FloatArray:
    """Similarity of each query to each of its choices [Q, largest number of choices], -inf behind the last."""
    scores = np.full((len(questions), max(len(question.choices) for question in questions)), -np.inf, dtype=np.float32)
    for row, question in zip(scores, questions, strict=True):
        source, target = (video, text) if question.query_is_clip else (text, video)
        row[: len(question.choices)] = target[list(question.choices)] @ source[question.query]
    return scores
