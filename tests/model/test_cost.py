"""The cost of a clip: the formula against counted operations, and memory by saved bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from egohod.config import model_config
from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.config import FastPathConfig, LoraConfig, ModelConfig
from egohod.model.cost import clip_flops, count_flops, count_step, saved_bytes
from egohod.model.dual_encoder import DualEncoder, create_model
from egohod.model.lora import add_low_rank


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


@pytest.mark.parametrize("name", ["DEMO", "DEMO_Slowfast", "timm/eva02_tiny_patch14_224"])
@pytest.mark.parametrize("trainable", ["all", "vision", "lora", "adapters", "last_blocks"])
def test_frozen_weights_are_counted_as_frozen(name: str, trainable: str, clips: Tensor, tokens: Tensor) -> None:
    small = {"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "ref_feat_shape": [5, 5]}
    options = {"image_size": 40, "backbone": small} if name.startswith("timm/") else {}
    config = model_config(name, num_frames=8, **options)
    model, lora = create_model(config), LoraConfig(rank=2) if trainable == "lora" else None
    if lora is not None:
        add_low_rank(model, lora)
    model.freeze(trainable, last_blocks=1)
    learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    counted = count_step(config, tokens.shape[1], learning=learning, lora=lora)
    step = count_flops(lambda: ContrastiveLoss()(**model(clips, tokens))["loss"].backward())
    assert counted == pytest.approx(step / len(clips), rel=0.03)
    formula = clip_flops(model.geometry, 8, tokens.shape[1], fast=config.fast).step
    if trainable == "all":
        assert counted == pytest.approx(formula, rel=0.05)
    else:  # the text tower of these sizes is a small part
        assert counted < (0.99 if trainable == "vision" else 0.9) * formula


def test_steps_without_the_slow_path_count_in_the_mean() -> None:
    costs = []
    for every in (1, 4):
        config = ModelConfig(name="DEMO_Slowfast", num_frames=8, fast=FastPathConfig(slow_every=every))
        formula = clip_flops(config.geometry(), 8, 77, fast=config.fast).step
        costs.append((count_step(config, 77), formula))
        assert costs[-1][0] == pytest.approx(formula, rel=0.05)
    assert costs[1][0] < costs[0][0]


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
