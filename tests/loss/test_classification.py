"""The loss of classification heads: finite differences, and shares of a batch against the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from egohod.loss.classification import ClassificationLoss
from egohod.loss.config import LossConfig


def batch(chunk: int) -> dict[str, Tensor]:
    """Eight clips with two heads in float64, mixed within chunks."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(8, generator=generator, dtype=torch.float64)[:, None, None]
    own = torch.eye(chunk, dtype=torch.float64).repeat(8 // chunk, 1)
    return {
        "verb_logits": torch.randn(8, 3, generator=generator, dtype=torch.float64),
        "noun_logits": torch.randn(8, 5, generator=generator, dtype=torch.float64),
        "verb_label": torch.randint(3, (8,), generator=generator),
        "noun_label": torch.randint(5, (8,), generator=generator),
        "mixing": shares[:, 0] * own + (1 - shares[:, 0]) * own.flip(1),
    }


@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_are_finite_differences(mixed: bool) -> None:
    values, loss = batch(4), ClassificationLoss(LossConfig(label_smoothing=0.1))
    mixing = values.pop("mixing") if mixed else None

    def of(verb: Tensor, noun: Tensor) -> Tensor:
        return loss(mixing, **values | {"verb_logits": verb, "noun_logits": noun})["loss"]

    values.pop("mixing", None)
    free = [values[name].requires_grad_() for name in ("verb_logits", "noun_logits")]
    assert torch.autograd.gradcheck(of, free, atol=1e-7)


def test_the_mean_over_processes_is_that_of_the_joint_batch() -> None:
    values, loss = batch(4), ClassificationLoss(LossConfig(label_smoothing=0.1))
    shares = [loss(**{name: value.chunk(2)[rank] for name, value in values.items()}) for rank in (0, 1)]
    for name, whole in loss(**values).items():
        torch.testing.assert_close((shares[0][name] + shares[1][name]) / 2, whole, msg=name)
