"""The vision tower: frame order, dropout, memory, absence of host synchronisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.config import ModelConfig
from egohod.model.cost import saved_bytes
from egohod.model.dual_encoder import DualEncoder, create_model
from egohod.model.vision import sinusoids


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def variant(model: DualEncoder, **config: object) -> DualEncoder:
    """The same weights in a model configured otherwise."""
    other = create_model(ModelConfig(name="DEMO", num_frames=8, **config))  # type: ignore[arg-type]
    other.load_state_dict(model.state_dict())
    return other


def test_pooling_computes_the_same_from_fewer_tokens(demo_model: DualEncoder, clips: Tensor) -> None:
    visual = demo_model.visual
    visual(clips).square().sum().backward()
    short = gradients(visual)
    visual.zero_grad()
    cls = visual.transformer(visual.embed(clips)[0])[:, 0]
    (visual.ln_post(cls) @ visual.image_projection).square().sum().backward()
    assert short.keys() == gradients(visual).keys()
    for name, gradient in gradients(visual).items():
        torch.testing.assert_close(short[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


@torch.no_grad()
def test_frame_order_is_seen_through_the_temporal_embedding_only(demo_model: DualEncoder, clips: Tensor) -> None:
    visual = demo_model.visual
    assert (visual(clips) - visual(clips.flip(2))).abs().max() > 1e-2
    visual.temporal_embedding.zero_()
    torch.testing.assert_close(visual(clips), visual(clips.flip(2)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_temporal_embedding_is_interpolated_linearly(demo_model: DualEncoder) -> None:
    visual = demo_model.visual
    spatial, own = visual.positional_embedding[1:], visual.temporal_embedding
    halved = visual.positions(4).view(4, -1, own.shape[1]) - spatial
    torch.testing.assert_close(halved[:, 0], (own[0::2] + own[1::2]) / 2, atol=1e-6, rtol=0)
    doubled = visual.positions(16).view(16, -1, own.shape[1]) - spatial
    torch.testing.assert_close(doubled[1, 0], 0.75 * own[0] + 0.25 * own[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(doubled[0, 0], own[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_one_tower_takes_any_frame_count(demo_model: DualEncoder, clips: Tensor) -> None:
    for frames in (1, 3, 8):
        assert demo_model.encode_video(clips[:, :, :frames]).shape == (3, demo_model.geometry.embed_dim)


def test_temporal_start() -> None:
    zeros = create_model(ModelConfig(name="DEMO", num_frames=16)).visual.temporal_embedding
    waves = create_model(ModelConfig(name="DEMO", num_frames=16, temporal_init="sinusoidal", sinusoid_scale=0.3))
    assert zeros.abs().max() == 0
    assert 0.25 < waves.visual.temporal_embedding.abs().max() <= 0.3
    distances = torch.cdist(sinusoids(16, 128), sinusoids(16, 128)) + 100 * torch.eye(16)
    assert distances.min() > 1, "two frames look alike"


def test_spatial_start_tells_every_patch_from_every_other() -> None:
    plain = create_model(ModelConfig(name="DEMO")).visual.positional_embedding[1:]
    waves = create_model(ModelConfig(name="DEMO", spatial_init="sinusoidal", sinusoid_scale=0.5)).visual
    placed = waves.positional_embedding[1:]
    assert plain.std() < 0.2
    assert 0.4 < placed.abs().max() <= 0.5
    side = waves.image_size // waves.patch_size
    grid = placed.view(side, side, -1)
    half = grid.shape[-1] // 2
    torch.testing.assert_close(grid[0, :, :half], grid[0, :1, :half].expand(side, -1))
    torch.testing.assert_close(grid[:, 0, half:], grid[:1, 0, half:].expand(side, -1))
    assert (torch.cdist(placed, placed) + 100 * torch.eye(side * side)).min() > 0.5


@torch.no_grad()
def test_patch_dropout_keeps_cls_and_a_share_of_the_patches_while_training(
    demo_model: DualEncoder, clips: Tensor
) -> None:
    visual = variant(demo_model, patch_dropout=0.75).visual
    whole = visual.eval().embed(clips)[0]
    part = visual.train().embed(clips)[0]
    assert part.shape[1] - 1 == (whole.shape[1] - 1) // 4
    torch.testing.assert_close(part[:, 0], whole[:, 0])
    for some, every in zip(part, whole, strict=True):
        distances, source = torch.cdist(some, every, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        assert distances.max() < 1e-5, "a token that is no patch of the clip"
        assert len(source.unique()) == len(some), "a patch came twice"
    assert not torch.equal(part, visual.embed(clips)[0]), "every step draws anew"


@torch.no_grad()
def test_drop_path_only_while_training(demo_model: DualEncoder, clips: Tensor) -> None:
    visual = variant(demo_model, drop_path=0.9).visual
    expected = demo_model.visual(clips)
    torch.testing.assert_close(visual.eval()(clips), expected)
    assert (visual.train()(clips) - expected).abs().max() > 1e-3


def test_gradient_checkpointing_saves_memory_and_changes_nothing(
    demo_model: DualEncoder, clips: Tensor, tokens: Tensor
) -> None:
    plain, thrifty = (
        variant(demo_model, checkpoint_blocks="all" if flag else "none", drop_path=0.3) for flag in (False, True)
    )
    results = []
    for model in (plain, thrifty):
        torch.manual_seed(5)
        ContrastiveLoss()(**model(clips, tokens))["loss"].backward()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert saved_bytes(lambda: thrifty.visual(clips), thrifty) < saved_bytes(lambda: plain.visual(clips), plain) / 3
    assert saved_bytes(lambda: thrifty.textual(tokens), thrifty) < saved_bytes(lambda: plain.textual(tokens), plain) / 3


def test_step_never_waits_for_the_device(clips: Tensor, tokens: Tensor) -> None:
    """Fake tensors have no values: reading one back from the device, as a synchronisation would, raises."""
    config = ModelConfig(name="DEMO", num_frames=8, patch_dropout=0.5, drop_path=0.2)
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        model = create_model(config)
        result = ContrastiveLoss()(**model(fake.from_tensor(clips), fake.from_tensor(tokens)))
        result["loss"].backward()
        with pytest.raises(Exception, match=r"item|data-dependent|_local_scalar_dense"):
            float(result["loss"].detach())


@torch.no_grad()
def test_features_are_float32_under_autocast(demo_model: DualEncoder, clips: Tensor, tokens: Tensor) -> None:
    exact = demo_model(clips, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = demo_model(clips, tokens)
    for name in ("video_features", "text_features"):
        assert rough[name].dtype == torch.float32
        assert not torch.equal(rough[name], exact[name])
        assert (rough[name] * exact[name]).sum(1).min() > 0.99


def test_frames_of_another_size_are_refused(demo_model: DualEncoder, clips: Tensor) -> None:
    with pytest.raises(AssertionError, match="px frames"):
        demo_model.encode_video(clips[..., demo_model.geometry.patch_size :])
