"""Symmetric InfoNCE against the original's numbers, and the pair of switches that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss

from egohod.config import Config, check
from egohod.loss.config import LOSSES, LossConfig, LossKind, build_loss
from egohod.loss.contrastive import ContrastiveLoss, SigmoidLoss
from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import create_model

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    name: case for name, case in json.loads((GOLDEN / "loss_metrics.json").read_text()).items() if name[:5] == "loss_"
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("local_loss", [True, False])
def test_loss_accuracy_and_gradients(name: str, local_loss: bool) -> None:
    case = CASES[name]
    batch, width = (int(part[1:]) for part in name.split("_")[1:3])
    generator = torch.Generator().manual_seed(case["seed"])
    video, text = (
        F.normalize(torch.randn(batch, width, generator=generator), dim=-1).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(case["logit_scale"], requires_grad=True)
    result = ContrastiveLoss(LossConfig(local_loss=local_loss))(video, text, scale)
    result["loss"].backward()
    assert result["loss"].item() == pytest.approx(case["loss"], abs=1e-5)
    assert float(result["accuracy"]) * 100 == pytest.approx(case["clip_acc"], abs=1e-4)
    assert not result["accuracy"].requires_grad
    assert float(scale.grad) == pytest.approx(case["grad_scale"], abs=1e-6)
    with np.load(GOLDEN / "loss_grads.npz") as file:
        for side, features in (("img", video), ("txt", text)):
            assert float(features.grad.norm()) == pytest.approx(case[f"grad_{side}_norm"], rel=1e-5)
            expected = torch.from_numpy(file[f"{name}_grad_{side}_row0"])
            torch.testing.assert_close(features.grad[0], expected, atol=1e-5, rtol=1e-4)


def test_the_biased_pair_is_refused() -> None:
    with pytest.raises(AssertionError, match="biased"):
        ContrastiveLoss(LossConfig(local_loss=True, gather_with_grad=False))
    ContrastiveLoss(LossConfig(local_loss=False, gather_with_grad=False))


def test_the_sigmoid_loss_is_siglips_with_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    video, text = (F.normalize(torch.randn(6, 16, generator=generator), dim=-1) for _ in range(2))
    gradients = []
    for loss_fn in (SigmoidLoss(), SigLipLoss()):
        inputs = [video.clone(), text.clone(), torch.tensor(10.0), torch.tensor(-10.0)]
        for each in inputs:
            each.requires_grad_()
        result = loss_fn(*inputs)
        loss = result["loss"] if isinstance(result, dict) else result
        loss.backward()
        gradients.append([loss.detach(), *(each.grad for each in inputs)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_the_loss_is_chosen_by_its_name() -> None:
    assert isinstance(build_loss(LossConfig()), ContrastiveLoss)
    assert isinstance(build_loss(LossConfig(name="sigmoid")), SigmoidLoss)


def test_data_and_model_follow_what_a_loss_is_registered_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new loss is one line of the registry: no rule elsewhere goes by its name."""
    kind = LossKind("contrastive.ContrastiveLoss", target="relevancy", has_bias=True)
    monkeypatch.setitem(LOSSES, "infonce", kind)
    assert "loss.name=infonce grades texts by relevancy" in dict(check(Config()))["loss.name"]
    model = create_model(ModelConfig(name="DEMO"), LossConfig(learn_temperature=True, bias=-3.0))
    assert model.logit_bias is not None
    assert not model.logit_scale.requires_grad, "the registered loss has no temperature"
