"""The cost of a clip: the formula against counted operations, and memory by saved bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.config import ModelConfig
from egohod.model.cost import clip_flops, count_flops, saved_bytes
from egohod.model.dual_encoder import DualEncoder, create_model


@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_formula_is_within_three_percent_of_the_count(clips: Tensor, tokens: Tensor, patch_dropout: float) -> None:
    model = create_model(ModelConfig(name="DEMO", num_frames=8, patch_dropout=patch_dropout))
    sizes = (model.geometry, 8, tokens.shape[1], patch_dropout)
    forward = count_flops(lambda: model(clips, tokens))
    assert forward == pytest.approx(len(clips) * clip_flops(*sizes).forward, rel=0.03)
    step = count_flops(lambda: ContrastiveLoss()(**model(clips, tokens))["loss"].backward())
    assert step == pytest.approx(len(clips) * clip_flops(*sizes).step, rel=0.03)


def test_formula_holds_for_the_published_base_model() -> None:
    """On the meta device: operations are counted without being computed."""
    with torch.device("meta"):
        model = create_model(ModelConfig(name="CLIP_VITB16", num_frames=4))
        video, tokens = torch.empty(2, 3, 4, 224, 224), torch.zeros(2, 77, dtype=torch.long)
    step = count_flops(lambda: ContrastiveLoss()(**model(video, tokens))["loss"].backward())
    assert step == pytest.approx(2 * clip_flops(model.geometry, 4, 77).step, rel=0.03)


def test_cost_grows_with_frames_and_text(demo_model: DualEncoder) -> None:
    geometry = demo_model.geometry
    assert (
        clip_flops(geometry, 16, 16).forward
        > 2 * clip_flops(geometry, 8, 16).forward - clip_flops(geometry, 1, 16).forward
    )
    assert clip_flops(geometry, 8, 77).forward > clip_flops(geometry, 8, 16).forward
    assert clip_flops(geometry, 8, 16).step == pytest.approx(3 * clip_flops(geometry, 8, 16).forward, rel=0.1)


def test_saved_bytes_count_each_activation_once_and_no_parameter() -> None:
    linear, x = nn.Linear(8, 8), torch.randn(4, 8)
    # The product keeps its input (4 x 8), exp its output; squaring keeps exp's output again, which costs nothing.
    assert saved_bytes(lambda: linear(x).exp().square(), linear) == 2 * 4 * 8 * 4
