"""The slow-fast model: published numbers, and gradients that reach what they should and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benches import training as step_benches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from egohod.errors import UserError
from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.config import GEOMETRIES, FastPathConfig, ModelConfig, geometry
from egohod.model.cost import clip_flops, count_flops
from egohod.model.dual_encoder import DualEncoder, EgoVideo, create_model
from egohod.model.vision import MotionAdapter, slow_frames

Golden = Callable[[str], dict[str, Tensor]]
Filled = Callable[[ModelConfig], DualEncoder]
POOLED, DENSE = 2e-5, 1e-4
PLACES = [("before", "cls"), ("before", "both"), ("after", "mean"), ("after", "both")]
"""Arrangements in which every adapter counts."""


def build(position: str = "before", pool: str = "cls", frames: int = 8, **options: Any) -> EgoVideo:
    torch.manual_seed(0)
    fast = FastPathConfig(slow_frames=4, position=position, pool=pool, spatial=options.pop("spatial", False))
    model = create_model(
        ModelConfig(name="DEMO_Slowfast", num_frames=frames, temporal_init="sinusoidal", fast=fast, **options)
    )
    assert isinstance(model, EgoVideo)
    return model


def wake(model: EgoVideo) -> EgoVideo:
    """Adapters that do something."""
    for block in model.visual.transformer.resblocks:
        torch.nn.init.normal_(block.adapter.up_proj.weight, std=0.02)
    return model


def clips(frames: int = 8) -> Tensor:
    return torch.randn(3, 3, frames, 40, 40, generator=torch.Generator().manual_seed(1))


def backward(model: EgoVideo, tokens: Tensor, frames: int = 8) -> dict[str, Tensor]:
    ContrastiveLoss()(**model(clips(frames), tokens))["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_fresh_adapter_changes_nothing_and_a_woken_one_does() -> None:
    adapter, x = MotionAdapter(32), torch.randn(2, 1 + 4 * 9, 32)
    assert torch.equal(adapter(x, 4), x)
    torch.nn.init.normal_(adapter.up_proj.weight)
    y = adapter(x, 4)
    assert torch.equal(y[:, 0], x[:, 0]), "CLS passes untouched"
    assert (y[:, 1:] - x[:, 1:]).abs().min() > 0


def test_an_adapter_computes_what_its_layers_do() -> None:
    """Its convolutions over time, written as shifted products, are PyTorch's: at each location by itself."""
    adapter, x = MotionAdapter(16), torch.randn(2, 1 + 5 * 7, 16)
    torch.nn.init.normal_(adapter.up_proj.weight)
    torch.nn.init.constant_(adapter.gamma, 0.7)
    hidden = F.gelu(adapter.down_proj(x[:, 1:])).view(2, 5, 7, 8)
    over_time = adapter.conv(adapter.dwconv(hidden.permute(0, 2, 3, 1).reshape(14, 8, 5)))
    mixed = over_time.view(2, 7, 8, 5).permute(0, 3, 1, 2)
    expected = x[:, 1:] + adapter.gamma * adapter.up_proj((hidden + mixed).flatten(1, 2))
    torch.testing.assert_close(adapter(x, 5)[:, 1:], expected, atol=1e-5, rtol=1e-5)


def test_adapter_sizes_are_the_published_ones() -> None:
    for width, layers, millions in ((768, 12, 8.88), (1024, 24, 31.56)):
        count = layers * sum(p.numel() for p in MotionAdapter(width).parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_a_fresh_model_is_the_mean_of_the_plain_tower_on_both_paths() -> None:
    model, video = build().eval(), clips()
    with torch.no_grad():
        slow, fast = (model.visual(each) for each in (video[:, :, [1, 3, 5, 7]], video))
        expected = F.normalize((slow + fast) / 2, dim=-1)
        torch.testing.assert_close(model.encode_video(video), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("position", "pool"), PLACES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapter_parameter_of_every_block_learns(
    position: str, pool: str, checkpointing: bool, tokens: Tensor
) -> None:
    model = wake(build(position, pool, checkpoint_blocks="all" if checkpointing else "none"))
    gradients = backward(model, tokens)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            assert gradients[name].abs().max() > 0, name
        assert not parameter.requires_grad or name in gradients, f"{name}: DDP would wait for it"


def test_at_the_identity_start_only_up_projections_differ_from_zero(tokens: Tensor) -> None:
    gradients = backward(build(), tokens)
    for name, gradient in gradients.items():
        if ".adapter." in name:
            assert (gradient.abs().max() > 0) == ("up_proj" in name), name


def test_the_base_geometry_learns_too() -> None:
    """All twelve blocks at their published width, on an eighth of the patches of four frames."""
    torch.manual_seed(0)
    fast = FastPathConfig(slow_frames=2)
    model = create_model(ModelConfig(name="CLIP_VITB16_Slowfast", num_frames=4, fast=fast, patch_dropout=0.875))
    assert isinstance(model, EgoVideo)
    adapters = {name: p for name, p in model.named_parameters() if ".adapter." in name}
    assert len(adapters) == 12 * 9
    for awake in (False, True):
        if awake:
            wake(model).zero_grad()
        (model.encode_video(torch.randn(1, 3, 4, 224, 224)) * torch.randn(1, 512)).sum().backward()
        for name, parameter in adapters.items():
            assert parameter.grad is not None, name
            assert (parameter.grad.abs().max() > 0) == (awake or "up_proj" in name), name


def test_the_large_geometry_at_336_px_trains_on_sixteen_frames() -> None:
    """Shapes and which parameters get a gradient, without computing anything."""
    with torch.device("meta"):
        model = create_model(ModelConfig(name="CLIP_VITL14_336PX_Slowfast", num_frames=16))
        output = model(torch.empty(2, 3, 16, 336, 336), torch.zeros(2, 77, dtype=torch.long))
        assert output["video_features"].shape == (2, 512)
        ContrastiveLoss()(**output)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize(("position", "pool"), [("before", "cls"), ("after", "cls")])
def test_every_adapter_learns_under_autocast(position: str, pool: str, tokens: Tensor) -> None:
    exact = backward(wake(build(position, pool)), tokens)
    model = wake(build(position, pool))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(clips(), tokens)
    assert output["video_features"].dtype is torch.float32
    ContrastiveLoss()(**output)["loss"].backward()
    rough = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert rough.keys() == exact.keys()
    for name in (each for each in exact if ".adapter." in each):
        cosine = F.cosine_similarity(rough[name].flatten(), exact[name].flatten(), dim=0)
        assert cosine > 0.9, name


def test_the_published_arrangement_has_one_dead_adapter_which_is_frozen(tokens: Tensor) -> None:
    model = wake(build("after", "cls"))
    gradients = backward(model, tokens)
    last = f"resblocks.{len(model.visual.transformer.resblocks) - 1}.adapter."
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            assert parameter.requires_grad == (last not in name)
            assert (name in gradients) == (last not in name)


@pytest.mark.parametrize(("position", "pool"), PLACES)
def test_the_backbone_learns_from_the_slow_path_only(position: str, pool: str, tokens: Tensor) -> None:
    """Compared with the gradient of the same loss through the slow path alone."""
    whole = backward(wake(build(position, pool)), tokens)
    model = wake(build(position, pool))
    video = clips()
    with torch.no_grad():
        fast = model.visual.fast(video)
    slow = model.visual(video[:, :, slow_frames(8, 4)])
    features = F.normalize(torch.cat((slow, fast), dim=1) @ model.slowfast_projection, dim=-1)
    ContrastiveLoss()(features, model.encode_text(tokens), model.logit_scale.exp())["loss"].backward()
    shared = ("conv1.", "temporal_embedding", "image_projection", ".adapter.")
    for name, parameter in model.visual.named_parameters():
        if not any(part in name for part in shared):
            assert parameter.grad is not None
            torch.testing.assert_close(whole[f"visual.{name}"], parameter.grad, atol=1e-7, rtol=1e-4, msg=name)
        elif parameter.grad is not None:
            assert not torch.allclose(whole[f"visual.{name}"], parameter.grad, atol=1e-9), name


def test_without_the_fast_branch_gradients_are_the_plain_models(tokens: Tensor) -> None:
    plain = create_model(ModelConfig(name="DEMO", num_frames=8, temporal_init="sinusoidal"))
    model = wake(build())
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in plain.state_dict()})
    with torch.no_grad():  # the slow half alone reaches the shared space
        model.slowfast_projection[:128] = torch.eye(128)
        model.slowfast_projection[128:] = 0
    gradients = backward(model, tokens)
    ContrastiveLoss()(**plain(clips()[:, :, slow_frames(8, 4)], tokens))["loss"].backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-7, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("position", "pool"), PLACES)
def test_without_the_slow_path_all_but_the_backbone_learns(position: str, pool: str, tokens: Tensor) -> None:
    """Compared with the gradient of the same loss through the fast path alone."""
    model = wake(build(position, pool))
    with model.without_slow_path():
        ContrastiveLoss()(**model(clips(), tokens))["loss"].backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "DDP would wait for it"
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    alone = wake(build(position, pool))
    features = F.normalize(alone.visual.fast(clips()) @ alone.slowfast_projection[128:], dim=-1)
    ContrastiveLoss()(features, alone.encode_text(tokens), alone.logit_scale.exp())["loss"].backward()
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-7, rtol=1e-4, msg=name)
    backbone = {id(parameter) for parameter in model.visual.backbone()}
    left = {name for name, p in model.visual.named_parameters() if id(p) in backbone}
    assert left == {name for name, p in model.visual.named_parameters() if p.requires_grad and p.grad is None}
    # Evaluation has both paths.
    model.eval()
    with torch.no_grad(), model.without_slow_path():
        within = model.encode_video(clips())
    assert torch.equal(within, model.encode_video(clips()))


@pytest.mark.parametrize("stem_paths", [None, "both"])
def test_flops_of_steps_without_the_slow_path_are_counted(stem_paths: str | None, tokens: Tensor) -> None:
    stem = {} if stem_paths is None else {"motion_stem": 16}
    model, video, texts = wake(build(**stem)), clips()[:2], tokens[:2]
    model.visual.stem_paths = stem_paths or "fast"

    def step() -> None:
        ContrastiveLoss()(**model(video, texts))["loss"].backward()

    both = count_flops(step) / 2
    with model.without_slow_path():
        fast_alone = count_flops(step) / 2
    for every in (1, 4):
        fast = FastPathConfig(slow_every=every, stem_paths=stem_paths or "fast")
        flops = clip_flops(model.geometry, 8, texts.shape[1], fast=fast, **stem)
        assert flops.step == pytest.approx((both + (every - 1) * fast_alone) / every, rel=0.03)
        assert (
            flops.forward == clip_flops(model.geometry, 8, texts.shape[1], fast=replace(fast, slow_every=1), **stem)[0]
        )


class Products(TorchDispatchMode):
    """Shapes of the results of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(result.shape))
        return result


def test_frozen_blocks_cost_no_weight_gradient() -> None:
    model = wake(build())
    features = model.visual.fast(clips())
    with Products() as products:
        features.sum().backward()
    width = model.geometry.vision_width
    weights = {(3 * width, width), (4 * width, width), (width, 4 * width), (2 * width, width)}
    assert not weights & set(products.shapes)
    assert (width, width // 2) in products.shapes, "the adapters' own are computed"
    with Products() as products:
        model.visual(clips()).sum().backward()
    assert weights - {(2 * width, width)} <= set(products.shapes), "else the first assertion could not fail"


@pytest.mark.parametrize(("position", "pool"), PLACES)
def test_flops_are_counted_as_they_happen(position: str, pool: str, tokens: Tensor) -> None:
    model = wake(build(position, pool))
    fast = FastPathConfig(position=position, pool=pool)
    video, texts = clips()[:2], tokens[:2]
    counted = count_flops(lambda: ContrastiveLoss()(**model(video, texts))["loss"].backward()) / 2
    assert counted == pytest.approx(clip_flops(model.geometry, 8, texts.shape[1], fast=fast).step, rel=0.03)


@pytest.mark.ci
def test_a_step_costs_less_than_one_with_all_weights_trained() -> None:
    """The published base geometry, two clips of sixteen frames, under autocast; counted, not computed."""
    config = ModelConfig(name="CLIP_VITB16_Slowfast", num_frames=16)
    pairs = step_benches.count_slowfast(config, batch_size=2, text_length=77, dtype=torch.bfloat16)
    ours, all_trained = pairs["tflop"]
    assert 0.83 < ours / all_trained < 0.86
    ours, all_trained = pairs["saved_gb"]
    assert ours / all_trained < 0.85


def test_the_step_it_is_compared_with_trains_the_blocks_on_both_paths(tokens: Tensor) -> None:
    """And computes the same forward; else the comparison above would mean nothing."""
    model = wake(build())
    ours, fast = backward(model, tokens), model.visual.fast(clips())
    model.zero_grad()
    with step_benches.all_trained(model):
        torch.testing.assert_close(model.visual.fast(clips()), fast, atol=1e-6, rtol=0)
        everything = backward(model, tokens)
    block = "visual.transformer.resblocks.0."
    for name in (f"{block}mlp.c_fc.weight", "visual.ln_pre.weight", "visual.class_embedding"):
        assert not torch.allclose(everything[name], ours[name], rtol=0.01), name
    assert torch.allclose(everything[f"{block}adapter.gamma"], ours[f"{block}adapter.gamma"], rtol=1e-3)


def test_any_grid_any_frames_and_patch_dropout(tokens: Tensor) -> None:
    model = wake(build(frames=12, patch_dropout=0.5, spatial=False))
    assert len(backward(model, tokens, frames=12)) > 0
    model = wake(build(frames=4, spatial=True))
    assert backward(model, tokens, frames=4)["visual.transformer.resblocks.0.adapter.conv2d.weight"].abs().max() > 0
    model.eval()
    with torch.no_grad():
        assert model.encode_video(clips(16)).shape == (3, 128)


def test_frames_that_do_not_divide_are_named() -> None:
    message = r"10 frames \(model.num_frames, or those of a clip\) are no multiple of model.fast.slow_frames=4"
    with pytest.raises(UserError, match=message):
        build(frames=10)
    with pytest.raises(UserError, match=message):
        build().encode_video(clips(10))
    with pytest.raises(UserError, match=r"2 frames .* are no multiple of model.fast.slow_frames=4"):
        build().encode_video(clips(2))
    assert list(range(16))[slow_frames(16, 4)] == [2, 6, 10, 14]
    assert list(range(4))[slow_frames(4, 4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("position", "pool", "checkpointing"),
    [
        ("before", "cls", True),
        pytest.param("before", "cls", False, marks=pytest.mark.ci),
        pytest.param("after", "both", False, marks=pytest.mark.ci),
    ],
)
def test_both_paths_compile_without_a_break(
    position: str, pool: str, checkpointing: bool, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    shallow = replace(geometry("DEMO_Slowfast"), vision_layers=2)  # compiling takes time by the block
    monkeypatch.setitem(GEOMETRIES, "DEMO_Slowfast", shallow)
    expected = backward(wake(build(position, pool)), tokens)
    model = wake(build(position, pool, checkpoint_blocks="all" if checkpointing else "none"))
    model.compile_towers(backend="aot_eager")  # every graph is whole, or this raises
    gradients = backward(model, tokens)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights() -> None:
    """Which the moving average of the weights is."""
    model = build("before", "cls")
    model.compile_towers(backend="eager")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    tower = copied.visual
    assert tower._adapted.__self__ is tower  # type: ignore[operator, union-attr]
    assert "_adapted" in vars(model.visual), "the model itself stays compiled"
    for mine, theirs in zip(model.visual.transformer.resblocks, tower.transformer.resblocks, strict=True):
        assert mine._compiled_call_impl is not None
        assert theirs._compiled_call_impl is None


@pytest.fixture(scope="module")
def published(filled: Filled) -> EgoVideo:
    """The published arrangement with the recipe's weights."""
    return _published(filled, 16, "gelu")


def _published(filled: Filled, frames: int, activation: str) -> EgoVideo:
    fast = FastPathConfig(position="after", pool="cls")
    model = filled(ModelConfig(name="CLIP_VITB16_Slowfast", num_frames=frames, activation=activation, fast=fast))
    assert isinstance(model, EgoVideo)
    return model


def video(frames: int) -> Tensor:
    return torch.randn(1, 3, frames, 224, 224, generator=torch.Generator().manual_seed(1234))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), atol=tolerance, rtol=0)


@torch.no_grad()
def test_published_adapter(published: EgoVideo, golden: Golden) -> None:
    expected, adapter = golden("adapter_b16"), published.visual.transformer.resblocks[0].adapter
    ours = adapter(torch.randn(1, 3137, 768, generator=torch.Generator().manual_seed(1234)), 16)
    assert_close(ours[:, expected["token_index"].long()], expected["out_tokens"], POOLED)
    assert_close(ours.mean(1), expected["out_mean"], POOLED)


@pytest.fixture(scope="module")
def fast_tokens(published: EgoVideo) -> Tensor:
    """What the fast path leaves behind the last block; in this arrangement it is pooled from all tokens."""
    with torch.no_grad():
        return published.visual._tokens(video(16), None, whole=True)[0]


def pooled(published: EgoVideo, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The fast path's feature of these tokens, which need not be computed again."""
    monkeypatch.setattr(published.visual, "_tokens", lambda *_, whole: (tokens, None))
    return published.visual.fast(video(16))


@torch.no_grad()
def test_published_fast_path(
    published: EgoVideo, golden: Golden, fast_tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, tower, tokens = golden("slowfast_b16_T16_in16"), published.visual, fast_tokens
    assert_close(pooled(published, tokens, monkeypatch), expected["pooled"], POOLED)
    projected = tokens @ tower.image_projection
    index = expected["token_index"].long()
    assert_close(projected[:, index], expected["dense_tokens"], DENSE)
    assert_close(projected.mean(1), expected["dense_mean"], DENSE)
    patches = tower.ln_post(tokens)[:, 1:]
    assert_close(patches[:, index[1:] - 1], expected["return_dense_tokens"], DENSE)
    assert_close(patches.mean(1), expected["return_dense_mean"], DENSE)


@torch.no_grad()
def test_published_slow_path_and_merge(
    published: EgoVideo, golden: Golden, fast_tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, whole = published.visual, golden("clip_slowfast_b16")
    slow = tower(video(4))
    assert_close(slow, golden("slowfast_b16_T16_in4")["pooled"], POOLED)
    # Upstream samples the slow frames apart; ours are taken from the fast ones.
    merged = torch.cat((slow, pooled(published, fast_tokens, monkeypatch)), dim=1) @ published.slowfast_projection
    assert_close(F.normalize(merged, dim=-1), whole["image"], POOLED)
    assert_close(published.encode_text(golden("text_b")["tokens"].long()), whole["text"], POOLED)


@pytest.mark.ci
@torch.no_grad()
@pytest.mark.parametrize(("name", "frames", "activation"), [("T4params", 4, "gelu"), ("quickgelu", 16, "quick_gelu")])
def test_published_variants(filled: Filled, golden: Golden, name: str, frames: int, activation: str) -> None:
    tower, expected = _published(filled, frames, activation).visual, golden(f"slowfast_b16_{name}")
    assert_close(tower.fast(video(16)), expected["pooled_in16"], POOLED)
    assert_close(tower(video(4)), expected["pooled_in4"], POOLED)
