"""Classification heads in the evaluation: the same tables, whose clips' features are probabilities of the classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from egohod.data.labels import ClassSpace
from egohod.errors import UserError
from egohod.evaluation.classification import ClassificationTable
from egohod.evaluation.tables import EvaluationTable
from egohod.model.egovideo import DualEncoder


class ClassProbabilities(nn.Module):
    """A model with heads as an evaluation sees it: the feature of a clip is the probability of every class, [B, C].

    One head gives it directly; of heads for verb and noun a class has the product, scaled to sum 1 over the classes
    that there are. Features of several views are averaged, which averages their probabilities.
    """

    def __init__(self, model: DualEncoder, space: ClassSpace) -> None:
        super().__init__()
        self.model, self.image_stats = model, model.image_stats
        for name, (_, code) in space.parts.items():
            self.register_buffer(f"{name}_of_class", torch.from_numpy(code), persistent=False)
        self.to(model.logit_scale.device)

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        """Frames normalised by ``image_stats`` [B, 3, T, H, W] -> probabilities float32 [B, C]."""
        logits = self.model.classify(video)
        if "action" in logits and len(logits) == 1:
            return logits["action"].softmax(dim=1)
        joint = [each.log_softmax(dim=1)[:, getattr(self, f"{name}_of_class")] for name, each in logits.items()]
        return torch.stack(joint).sum(dim=0).softmax(dim=1)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """The model's texts, which no table of heads asks for."""
        return self.model.encode_text(tokens, normalize)


@dataclass(frozen=True)
class HeadTable(ClassificationTable):
    """A classification whose clips come with probabilities; parts (verb, noun) are marginals of the classes."""

    def _logits(self, video: Tensor, text: Tensor) -> Tensor:
        return video

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.double()


def head_tables(tables: Sequence[EvaluationTable], space: ClassSpace, where: str) -> list[EvaluationTable]:
    """The classifications among a benchmark's ``tables``, for heads of the classes ``space``.

    Raises :class:`UserError` if there is none, if other columns tell its classes, or if a clip's class is not among
    those of the heads.
    """
    made: list[EvaluationTable] = []
    for table in tables:
        if not isinstance(table, ClassificationTable) or not table.class_keys:
            continue
        _require_columns(table.key_columns, space.columns, where)
        number = {c: space.number(table.class_keys[c], where) for c in np.unique(table.labels).tolist()}
        labels = np.array([number[c] for c in table.labels.tolist()], dtype=np.int64)
        parts = {name: code for name, (_, code) in space.parts.items()} if len(space.columns) > 1 else {}
        changed = {"texts": (), "class_of_text": np.arange(0), "labels": labels, "parts": parts}
        fields = {each.name: getattr(table, each.name) for each in dataclasses.fields(table)}
        made.append(HeadTable(**{**fields, **changed, "class_names": space.names, "class_keys": space.keys}))
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
