"""Towers on timm's backbones: timm's own image features, our CLIP tower's, both paths, cost, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from benches.training import give_weights
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from egohod.config import load, model_config
from egohod.errors import UserError
from egohod.loss.config import LossConfig
from egohod.loss.contrastive import ContrastiveLoss
from egohod.model import timm_vision
from egohod.model.config import FastPathConfig, Geometry, ModelConfig, geometry
from egohod.model.cost import clip_flops, count_flops, predict, saved_bytes
from egohod.model.dual_encoder import DualEncoder, EgoVideo, create_model
from egohod.model.timm_vision import TimmSlowFast, TimmTransformer
from egohod.model.vision import KERNELS, SlowFastTransformer, VideoTransformer
from egohod.training.config import TrainConfig
from egohod.training.step import build_optimizer

SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 4}
SIDE, FRAMES = 32, 4
# A name of each family, with the arguments that make it small and its side in pixels.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("vit_base_patch16_clip_224", SMALL, SIDE),
    "siglip": ("vit_base_patch16_siglip_224", SMALL, SIDE),  # MAP pooling, no CLS
    "dinov2": ("vit_base_patch14_reg4_dinov2", {**SMALL, "patch_size": 16, "init_values": 0.1}, SIDE),  # registers
    "eva02": ("eva02_base_patch16_clip_224", SMALL, SIDE),  # RoPE, gated MLP, norms within
    "dinov3": ("vit_base_patch16_dinov3", {**SMALL, "init_values": 0.1}, SIDE),  # RoPE, registers, mean
    "pe": ("vit_pe_core_base_patch16_224", {**SMALL, "attn_pool_num_heads": 4}, SIDE),  # RoPE, CLS, MAP pooling
}
# Rarer ones: norms behind attention and MLP, learned rotations of each block and head, keys shared by heads.
OTHERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "post_norm": ("vit_base_patch16_rpn_224", {**SMALL, "init_values": 0.1}, SIDE),
    "eva_post_norm": ("eva02_enormous_patch14_clip_224", {**SMALL, "patch_size": 16, "mlp_ratio": 4.0}, SIDE),
    "mixed": ("vit_small_patch16_rope_mixed_224", {**SMALL, "patch_size": 112}, 224),
    "sapiens": ("vit_base_patch16_sapiens2", {**SMALL, "num_kv_heads": [2, 4], "rope_rescale_coords": None}, SIDE),
}
ALL = FAMILIES | OTHERS
families = pytest.mark.parametrize("family", FAMILIES)


def config(family: str, slowfast: bool = False, **options: Any) -> ModelConfig:
    name, arguments, side = ALL[family]
    options = {"num_frames": FRAMES, "image_size": side, "backbone": arguments, "temporal_init": "sinusoidal"} | options
    fast = FastPathConfig(slow_frames=2, pool=options.pop("pool", "cls"), position=options.pop("position", "before"))
    return ModelConfig(name=f"timm/{name}{'_Slowfast' if slowfast else ''}", fast=fast, **options)


def build(family: str, slowfast: bool = False, boxes: float = 0.0, **options: Any) -> DualEncoder:
    torch.manual_seed(0)
    model = create_model(config(family, slowfast, **options), LossConfig(boxes=boxes))
    with torch.no_grad():  # zeros and ones would hide a part that is left out
        for name, parameter in model.visual.named_parameters():
            if "temporal" not in name and ".adapter." not in name:
                # Attention that is not uniform.
                parameter.mul_(8 if re.search(r"qkv\.weight|[qk]_proj\.weight", name) else 1)
                parameter.add_(0.2 * torch.randn_like(parameter) * (parameter.dim() < 2 or parameter.shape[0] == 1))
        for block in model.visual.transformer.resblocks if slowfast else ():
            nn.init.normal_(block.adapter.up_proj.weight, std=0.05)
    return model


def clips(frames: int = FRAMES, number: int = 2, side: int = SIDE) -> Tensor:
    return torch.randn(number, 3, frames, side, side, generator=torch.Generator().manual_seed(1))


def texts(number: int = 2) -> Tensor:
    tokens = torch.randint(1, 49000, (number, 8), generator=torch.Generator().manual_seed(2))
    tokens[:, -1] = 49407
    return tokens


def gradients(model: DualEncoder, video: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    ContrastiveLoss()(**model(video, texts(len(video))))["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def image_model(model: DualEncoder, family: str) -> nn.Module:
    """timm's own model with the weights of a tower."""
    name, arguments, side = ALL[family]
    image = timm.create_model(name, num_classes=0, img_size=side, **arguments).eval()
    own = ("temporal_embedding", "image_projection")
    state = {
        name.replace("transformer.resblocks.", "blocks."): value
        for name, value in model.visual.state_dict().items()
        if name not in own and ".adapter." not in name
    }
    image.load_state_dict(state)  # strictly: every weight of timm's is in the tower, and no other
    return image


# --------------------------------------------------------------------------------------------------
# What it computes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_one_frame_has_the_features_of_timms_image_model(family: str) -> None:
    model = build(family, temporal_init="zeros").eval()
    assert isinstance(model.visual, TimmTransformer)
    video = clips(frames=1, side=model.geometry.image_size)
    with torch.no_grad():
        expected = image_model(model, family)(video[:, :, 0]) @ model.visual.image_projection
        torch.testing.assert_close(model.visual(video), expected, atol=2e-5, rtol=0)
        # Of the fast path too, whose weights are constants; its fresh adapters change nothing.
        torch.manual_seed(0)
        two = create_model(config(family, slowfast=True, temporal_init="zeros")).eval()
        two.visual.load_state_dict(model.visual.state_dict(), strict=False)
        torch.testing.assert_close(two.visual.fast(video), expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(two.visual(video), expected, atol=2e-5, rtol=0)


@families
def test_frames_attend_to_each_other_and_time_tells_them_apart(family: str) -> None:
    video = clips()
    with torch.no_grad():
        for temporal, differs in (("zeros", False), ("sinusoidal", True)):
            model = build(family, temporal_init=temporal).eval()
            order = (model.visual(video) - model.visual(video.flip(2))).abs().max()
            assert (order > 1e-3) == differs, "only the temporal embedding has an order"
        changed = video.clone()
        changed[:, :, 3] = 0
        frames = [
            model.visual.transformer(*_inputs(model, each))[:, model.visual.prefix_tokens :]
            for each in (video, changed)
        ]
        first = frames[0].shape[1] // FRAMES
        assert (frames[0] - frames[1])[:, :first].abs().max() > 1e-4, "the first frame sees the last one"


def _inputs(model: DualEncoder, video: Tensor) -> tuple[Any, ...]:
    x, chosen = model.visual.embed(video)
    return x, None, model.visual.rotations(video.shape[2], chosen)


@pytest.mark.parametrize("family", ["eva02", "dinov3", "pe"])
def test_rotation_by_time_tells_frames_apart_on_all_channels(family: str) -> None:
    with torch.no_grad():
        model = build(family, temporal_init="zeros", rope_time=True).eval()
        video = clips()
        assert (model.visual(video) - model.visual(video.flip(2))).abs().max() > 1e-4
        tower = model.visual
        times, P, d = tower.rotations(FRAMES, None)[0], 4, 16
        assert times.shape == (FRAMES * P, 2 * d)
        # An angle is that of the place plus that of the time, which is the number of the frame.
        angle = torch.atan2(*times.chunk(2, dim=1)).view(FRAMES, P, d)
        rates = 10000.0 ** (-torch.arange(0, d, 2) / d)
        rates = rates.repeat(2) if family == "dinov3" else rates.repeat_interleave(2)
        turned = (angle[2] - angle[1] - rates).remainder(2 * torch.pi)
        assert torch.minimum(turned, 2 * torch.pi - turned).max() < 1e-4
        # Other frame counts cover the same clip: each of two frames is between two of four.
        two = torch.atan2(*tower.rotations(2, None)[0].chunk(2, dim=1)).view(2, P, d)
        turned = (two[1] - two[0] - 2 * rates).remainder(2 * torch.pi)
        assert torch.minimum(turned, 2 * torch.pi - turned).max() < 1e-4
        tower.rope_time = False
        places = tower.rotations(1, None)[0]
        torch.testing.assert_close(tower.rotations(FRAMES, None)[0], places.repeat(FRAMES, 1))
        torch.testing.assert_close(times[:P], places, atol=1e-6, rtol=0)


def _pair(slowfast: bool) -> tuple[VideoTransformer, TimmTransformer]:
    """Our tower and timm's CLIP ViT, of the same small size and with the same weights."""
    options: dict[str, Any] = {"num_frames": FRAMES, "temporal_init": "sinusoidal"}
    fast = FastPathConfig(slow_frames=2)
    shape = Geometry("small", SIDE, 16, 64, 2, 4, 64, 1, 2, 48, slowfast=slowfast)
    torch.manual_seed(0)
    ours = (SlowFastTransformer if slowfast else VideoTransformer)(shape, ModelConfig(fast=fast, **options))
    cfg = config("plain", slowfast)
    theirs = (TimmSlowFast if slowfast else TimmTransformer)(replace(cfg.geometry(), embed_dim=48), cfg)
    give_weights(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("slowfast", [False, True])
def test_timms_clip_is_our_clip_on_the_same_weights(slowfast: bool) -> None:
    ours, theirs = _pair(slowfast)
    video, tensors = clips(), []
    for tower in (ours, theirs):
        output = tower.fast(video) if isinstance(tower, (SlowFastTransformer, TimmSlowFast)) else tower(video)
        output.square().sum().backward()
        tensors.append((output, tower.temporal_embedding.grad, tower.image_projection.grad))
    for one, other in zip(*tensors, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "mixed"])
@pytest.mark.parametrize(("position", "pool", "blocks"), [("before", "cls", "none"), ("after", "both", "all")])
def test_every_adapter_learns_and_the_backbone_from_the_slow_path_alone(
    family: str, position: str, pool: str, blocks: str
) -> None:
    model = build(family, slowfast=True, position=position, pool=pool, checkpoint_blocks=blocks)
    assert isinstance(model, EgoVideo)
    video = clips(side=model.geometry.image_size)
    whole = gradients(model, video)
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or name in whole, f"{name}: DDP would wait for it"
        if ".adapter." in name:
            assert whole[name].abs().max() > 0, name
    backbone = {id(each) for each in model.visual.backbone()}
    # The fast path's output as a constant: what is left of a gradient is the slow path's.
    fast = model.visual.fast
    model.visual.fast = lambda *inputs: fast(*inputs).detach()  # type: ignore[method-assign]
    slow = gradients(model, video)
    names = [name for name, parameter in model.named_parameters() if id(parameter) in backbone]
    assert any(".attn." in name for name in names)
    for name in names:
        torch.testing.assert_close(whole[name], slow[name], atol=1e-6, rtol=1e-4, msg=name)
    assert (whole["visual.patch_embed.proj.weight"] - slow["visual.patch_embed.proj.weight"]).abs().max() > 0


@families
def test_dropped_patches_take_their_rotations_along(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All patches in another order are the same clip: each must have its own place and rotation."""
    model = build(family, patch_dropout=0.5, rope_time=config(family).geometry().rope)
    with torch.no_grad():
        model.eval()
        expected = model.visual(clips())
        order = torch.stack([torch.randperm(FRAMES * 4) for _ in range(2)])
        monkeypatch.setattr(model.visual, "_chosen", lambda *sizes: order)
        model.train()
        torch.testing.assert_close(model.visual(clips()), expected, atol=1e-5, rtol=0)
    monkeypatch.undo()
    learned = gradients(model, clips())
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or name in learned, f"{name}: DDP would wait for it"


@families
def test_boxes_are_read_from_the_patches_alone(family: str) -> None:
    model = build(family, boxes=1.0)
    features, boxes = model.visual.forward_with_boxes(clips())
    assert boxes.shape == (2, FRAMES, 3, 4)
    torch.testing.assert_close(features, model.visual(clips()), atol=1e-5, rtol=0)
    boxes.sum().backward()
    assert model.visual.transformer.resblocks[0].mlp.fc2.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("family", "slowfast"), [("siglip", False), ("dinov2", True), ("eva02", True), ("pe", False)])
def test_blocks_are_recomputed_exactly(family: str, slowfast: bool) -> None:
    results = []
    for blocks in ("none", "1"):
        results.append(gradients(build(family, slowfast, checkpoint_blocks=blocks, motion_stem=8), clips()))
    for name, value in results[0].items():
        # Rounding is that of the largest terms of the sums.
        atol = 1e-6 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(results[1][name], value, atol=atol, rtol=1e-4, msg=name)


@families
def test_tokens_between_blocks_have_the_type_of_autocast(family: str) -> None:
    model = build(family, residual="autocast")
    seen: list[torch.dtype] = []
    for block in model.visual.transformer.resblocks:
        block.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(clips(), texts())
    assert seen == [torch.bfloat16] * 2


@families
def test_blocks_compile_without_a_break_and_share_their_graphs(family: str) -> None:
    torch._dynamo.reset()
    plain = build(family, slowfast=True).eval()
    model, counter = build(family, slowfast=True).eval(), CompileCounterWithBackend("eager")
    model.compile_towers(backend=counter)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model.encode_video(clips()), plain.encode_video(clips()), atol=1e-5, rtol=0)
    # Two paths; where CLS is pooled the last block is another variant.
    assert counter.frame_count == (4 if config(family).geometry().pool == "token" else 2)
    torch._dynamo.reset()


@families
def test_the_kernels_of_attention_are_those_set(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    attend = timm_vision.attend
    monkeypatch.setattr(timm_vision, "attend", lambda *inputs: (used.append(inputs[3]), attend(*inputs))[1])
    model = build(family)
    model.visual.set_attention([KERNELS["math"]])
    model.visual(clips())
    assert used == [[KERNELS["math"]]] * 2


@pytest.mark.parametrize("slowfast", [False, True])
@families
def test_a_motion_stem_starts_without_effect_and_learns(family: str, slowfast: bool) -> None:
    models = []
    for channels in (None, 8):
        torch.manual_seed(0)
        models.append(create_model(config(family, slowfast, motion_stem=channels)))
    plain, stem = models
    with torch.no_grad():
        assert torch.equal(plain.eval().encode_video(clips()), stem.eval().encode_video(clips()))
    learned = {name for name, each in gradients(stem.train(), clips()).items() if each.any()}
    assert [name for name in learned if name.startswith("visual.motion_stem.")]


@families
def test_layers_and_parts_are_recognised_by_name(family: str) -> None:
    model = build(family, boxes=1.0)
    pattern = model.group_matcher()
    layers = timm.models.group_parameters(
        model.visual, {key: value.replace(r"visual\.", "") for key, value in pattern.items()}
    )
    assert set(layers) >= {0, 1, 2}
    stem = list(layers[0])
    assert "temporal_embedding" in stem
    assert "patch_embed.proj.weight" in stem
    optimizer = build_optimizer(model, TrainConfig(layer_decay=0.5, decay_positions=False))
    decayed = {id(each) for group in optimizer.param_groups if group["weight_decay"] for each in group["params"]}
    for name, parameter in model.visual.named_parameters():
        is_matrix = parameter.dim() > 1 and not name.endswith(("pos_embed", "cls_token", "reg_token"))
        assert (id(parameter) in decayed) == is_matrix, name
    model.freeze("last_blocks", 1)
    trained = {name for name, parameter in model.visual.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in trained if ".resblocks." in name} == {"1"}
    # The head of the box loss starts at random: frozen, it would teach the blocks nothing.
    assert {"image_projection", "box_head.norm.weight"} <= trained
    assert not any(name.startswith(("patch_embed", "pos_embed", "cls_token", "temporal")) for name in trained)


# --------------------------------------------------------------------------------------------------
# Cost
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slowfast", [False, True])
@families
def test_formula_is_within_three_percent_of_the_count(family: str, slowfast: bool) -> None:
    """With as many tokens as published, but few channels."""
    name, arguments, _ = ALL[family]
    fast = FastPathConfig(slow_frames=2)
    cfg = ModelConfig(
        name=f"timm/{name}{'_Slowfast' if slowfast else ''}",
        num_frames=4,
        image_size=224,
        backbone={**arguments, "embed_dim": 256},
        fast=fast,
    )
    model = create_model(cfg)
    video, tokens = clips(side=224), torch.zeros(2, 77, dtype=torch.long)
    formula = clip_flops(model.geometry, 4, 77, fast=fast)
    forward = count_flops(lambda: model(video, tokens))
    assert forward == pytest.approx(2 * formula.forward, rel=0.03)
    step = count_flops(lambda: ContrastiveLoss()(**model(video, tokens))["loss"].backward())
    assert step == pytest.approx(2 * formula.step, rel=0.03)


@pytest.mark.parametrize(("family", "slowfast"), [("siglip", False), ("pe", False), ("plain", True), ("dinov3", True)])
def test_the_prediction_of_memory_is_what_a_forward_pass_keeps(family: str, slowfast: bool) -> None:
    cfg = config(family, slowfast)
    memory, model = predict(cfg), build(family, slowfast)

    def saved(number: int) -> int:
        tokens = torch.zeros(number, 77, dtype=torch.long)
        return saved_bytes(lambda: model(clips(number=number), tokens), model)

    assert saved(4) - saved(2) == 2 * memory.per_clip
    assert predict(cfg, blocks=2).working > 0


# --------------------------------------------------------------------------------------------------
# Names and sizes
# --------------------------------------------------------------------------------------------------


def test_a_name_is_resolved_without_weights(tmp_path: Path) -> None:
    shape = geometry("timm/vit_so400m_patch14_siglip_378.v2_webli")
    assert (shape.image_size, shape.patch_size, shape.vision_width, shape.vision_layers) == (378, 14, 1152, 27)
    assert (shape.pool, shape.prefix_tokens, shape.rope) == ("map", 0, False)
    assert shape.image_stats is not None
    assert shape.image_stats.mean == (0.5, 0.5, 0.5)
    two = geometry("timm/vit_base_patch16_dinov3_Slowfast", image_size=320)
    assert two.slowfast
    assert (two.image_size, two.prefix_tokens, two.rope) == (320, 5, True)
    assert geometry("timm/vit_large_patch14_clip_224").text_width == 768
    # A file's numbers are numbers.
    path = tmp_path / "run.yml"
    path.write_text(
        "model: {name: timm/eva02_tiny_patch14_224, backbone: {depth: 3, init_values: 1e-4}, image_size: 56}"
    )
    cfg = load(path, ["model.backbone.ref_feat_shape=[4,4]", "model.backbone.swiglu_mlp=false"])
    options = {"depth": 3, "init_values": 1e-4, "ref_feat_shape": (4, 4), "swiglu_mlp": False, "img_size": 56}
    assert dict(cfg.model.geometry().backbone_options) == options


@pytest.mark.parametrize("text", ["false", "False", "off", "no"])
def test_a_truth_value_in_text_is_read_however_it_is_spelled(text: str) -> None:
    """A configuration file brings text, of which any that is not empty would count as true."""
    no_bias, default = (
        create_model(model_config("timm/vit_tiny_patch16_224", backbone={"depth": "1", "init_values": "None"} | bias))
        for bias in ({"qkv_bias": text}, {})
    )
    names = ["visual.transformer.resblocks.0.attn.qkv.bias" in dict(m.named_parameters()) for m in (no_bias, default)]
    assert names == [False, True]
    # "None" is what Python prints, and how a checkpoint's arguments get to an evaluation.
    assert not any("ls1" in name for name, _ in default.named_parameters())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm/vit_base_patch16_cilp_224", {}, ["no model of timm", "vit_base_patch16_clip_224"]),
        ("timm/resnet50", {}, ["ResNet", "no plain vision transformer", "vit_base_patch16_siglip_224"]),
        ("timm/convnext_base", {"image_size": 224}, ["transformers are vit_base_patch16_clip_224"]),
        ("vit_base_patch16_siglip_224.v2_webli", {}, ["did you mean timm/vit_base_patch16_siglip_224.v2_webli?"]),
        ("timm/deit_base_distilled_patch16_224", {}, ["no plain vision transformer"]),
        ("timm/vit_base_patch16_siglip_224.v9", {}, ["no weights 'v9'", "v2_webli"]),
        ("timm/vit_so400m_patch14_siglip_384", {}, ["patches of 14 px do not divide 384 px", "378 or 392"]),
        ("timm/vit_base_patch16_clip_224", {"image_size": 230}, ["do not divide 230 px", "224 or 240"]),
        ("timm/vit_base_patch16_clip_224", {"backbone": {"dpeth": 2}}, ["model.backbone", "dpeth"]),
        ("timm/vit_base_patch16_clip_224", {"backbone": {"img_size": 224}}, ["set model.image_size instead"]),
        ("timm/vit_base_patch16_clip_224", {"backbone": {"depth": 0}}, ["no blocks", "model.backbone.depth"]),
        ("timm/vit_base_patch16_clip_224", {"backbone": {"act_layer": "gleu"}}, ["act_layer", "timm has no 'gleu'"]),
        ("timm/vit_base_patch16_clip_224", {"backbone": {"num_heads": 0}}, ["'num_heads': 0"]),
        ("timm/vit_base_patch16_clip_224", {"backbone": {"pretrained_cfg": {"a": 1}}}, ["model.backbone", "mapping"]),
        ("timm/vit_base_patch16_clip_224", {"image_size": 1}, ["set model.image_size to 16"]),
        ("timm/vit_small_patch16_dinov3", {"spatial_init": "sinusoidal"}, ["model.spatial_init", "learned positions"]),
        # Attention of this project would ignore it.
        ("timm/eva02_tiny_patch14_224", {"backbone": {"attn_drop_rate": 0.1}}, ["attn_drop_rate", "model.drop_path"]),
        ("timm/vit_base_patch16_clip_224", {"backbone": {"global_pool": ""}}, ["set model.backbone.global_pool"]),
        ("timm/vit_small_patch16_rope_mixed_224", {"image_size": 256}, ["RoPE", "14 x 14 grid", "image_size=256"]),
        ("timm/vit_base_patch16_clip_224", {"rope_time": True}, ["model.rope_time", "rotary"]),
        ("CLIP_VITB16", {"image_size": 336}, ["model.image_size is for model.name=timm/NAME"]),
        ("CLIP_VITB16", {"backbone": {"depth": 2}}, ["model.backbone is for model.name=timm/NAME"]),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_cure(name: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        create_model(model_config(name, **options))
    for word in words:
        assert word in str(caught.value)
