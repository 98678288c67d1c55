"""The box head reads positions off tokens, with and without patch dropout, and its loss trains what it should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from egohod.loss.classification import box_errors
from egohod.loss.config import LossConfig
from egohod.model.config import FastPathConfig, ModelConfig
from egohod.model.cost import clip_flops, count_flops
from egohod.model.dual_encoder import DualEncoder, create_model
from egohod.model.vision import BoxHead

FRAMES = 8


def build(name: str, **options: object) -> DualEncoder:
    torch.manual_seed(0)
    return create_model(ModelConfig(name=name, num_frames=FRAMES, **options), LossConfig(boxes=1.0))  # type: ignore[arg-type]


def test_a_head_that_hears_one_patch_gives_that_patches_box() -> None:
    head = BoxHead(8, patches_per_frame=9).double()
    patches = torch.zeros(1, 2 * 9, 8, dtype=torch.double)
    patches[0, [5, 9 + 6]] = torch.linspace(-1, 1, 8, dtype=torch.double)
    with torch.no_grad():
        for linear in (head.score, head.box):
            linear.weight.zero_()
            linear.bias.zero_()
        head.score.weight[:] = 50 * head.norm(patches[0, 5])
    boxes = head(patches, None, frames=2)
    # The middle of its patch, and half of the picture wide and high, the sigmoid of zero.
    for frame, (x, y) in enumerate(((2.5 / 3, 1.5 / 3), (0.5 / 3, 2.5 / 3))):
        expected = torch.tensor([x - 0.25, y - 0.25, x + 0.25, y + 0.25])
        torch.testing.assert_close(boxes[0, frame], expected.expand(3, 4), atol=1e-5, rtol=0)


def test_patches_may_be_missing_and_come_in_any_order() -> None:
    head = BoxHead(8, patches_per_frame=4)
    patches, chosen = torch.randn(2, 8, 8), torch.stack([torch.randperm(8) for _ in range(2)])
    shuffled = patches.gather(1, chosen.unsqueeze(2).expand(-1, -1, 8))
    torch.testing.assert_close(head(shuffled, chosen, 2), head(patches, None, 2))
    few = head(shuffled[:, :5], chosen[:, :5], 2)
    assert few.shape == (2, 2, 3, 4)
    assert few.isfinite().all()


@pytest.mark.parametrize("name", ["DEMO", "DEMO_Slowfast"])
@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_models_give_boxes_beside_the_same_features(
    name: str, patch_dropout: float, clips: Tensor, tokens: Tensor
) -> None:
    model = build(name, patch_dropout=patch_dropout)
    output = model(clips, tokens)
    assert output["boxes"].shape == (len(clips), FRAMES, 3, 4)
    model.eval()
    torch.testing.assert_close(model(clips, tokens)["video_features"], model.encode_video(clips))


def test_the_box_loss_trains_the_fast_paths_adapters_and_no_block(clips: Tensor, tokens: Tensor) -> None:
    model = build("DEMO_Slowfast")
    target = torch.rand(len(clips), FRAMES, 3, 4)
    box_errors(model(clips, tokens)["boxes"], target).mean().backward()
    learning = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.abs().max()}
    assert {"visual.box_head.box.weight", "visual.conv1.weight", "visual.temporal_embedding"} <= learning
    # The adapters stand before the blocks and start as the identity: their last layer learns first.
    assert all(f"visual.transformer.resblocks.{i}.adapter.up_proj.weight" in learning for i in range(4))
    assert not any("attn" in name or "mlp" in name or "textual" in name for name in learning)


def test_unknown_boxes_count_for_nothing() -> None:
    predicted = torch.rand(3, 2, 3, 4, requires_grad=True)
    target = predicted.detach() + 0.5
    target[0, 0, 1] = torch.nan
    target[1] = torch.nan
    target[2, 1, 2, 3] = torch.nan
    errors = box_errors(predicted, target)
    torch.testing.assert_close(errors, torch.tensor([0.5, 0.0, 0.5]))
    errors.sum().backward()
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()
    assert (predicted.grad[target.isfinite().all(dim=3).logical_not()] == 0).all()


@pytest.mark.parametrize("name", ["DEMO", "DEMO_Slowfast"])
@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_the_formula_counts_the_head(name: str, patch_dropout: float, clips: Tensor, tokens: Tensor) -> None:
    model, fast = build(name, patch_dropout=patch_dropout), FastPathConfig()

    def step() -> None:
        output = model(clips, tokens)
        (output["boxes"].sum() + output["video_features"].sum() + output["text_features"].sum()).backward()

    expected = clip_flops(model.geometry, FRAMES, tokens.shape[1], patch_dropout, fast, boxes=True).step
    assert count_flops(step) == pytest.approx(len(clips) * expected, rel=0.03)


@pytest.mark.ci
def test_both_towers_with_boxes_compile_without_a_break(clips: Tensor, tokens: Tensor) -> None:
    for name in ("DEMO", "DEMO_Slowfast"):
        model = build(name)
        expected = model(clips, tokens)
        model.compile_towers(backend="eager")
        torch.testing.assert_close(model(clips, tokens)["boxes"], expected["boxes"])
