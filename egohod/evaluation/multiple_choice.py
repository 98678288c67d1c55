"""Multiple choice: which of a few texts tells this clip, or which of a few clips shows this text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from egohod.evaluation.metrics import FloatArray, multiple_choice_right
from egohod.evaluation.scores import Score, percent
from egohod.evaluation.tables import EvaluationTable


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
class QuestionTable(EvaluationTable):
    """Questions over the clips of a dataset and ``texts``; metrics are called as the kinds of the questions."""

    texts: Sequence[str]
    questions: Sequence[Question]

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

    def restricted(self, kept: NDArray[Any]) -> QuestionTable:
        """See :class:`EvaluationTable`; a question that needs a clip that is not kept is left out."""
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
