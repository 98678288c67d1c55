"""Numbers of the original implementation, reproduced with weights filled by name.

Reversing the frames moves the pooled vector by 1.5e-3 only, so dense tokens are compared too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import DualEncoder, create_model

POOLED, DENSE, GRADIENT = 2e-5, 1e-4, 2e-6
Golden = Callable[[str], dict[str, Tensor]]
Filled = Callable[[ModelConfig], DualEncoder]


def video(batch: int = 1, frames: int = 4) -> Tensor:
    return torch.randn(batch, 3, frames, 224, 224, generator=torch.Generator().manual_seed(1234))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.detach(), theirs.to(ours.dtype), atol=tolerance, rtol=0)


def test_weights_follow_the_recipe(clip_b16: DualEncoder, schema: dict[str, Any]) -> None:
    state = clip_b16.state_dict()
    for name, expected in schema["recipe"]["check"].items():
        assert list(state[name].shape) == expected["shape"]
        assert_close(state[name].flatten()[:4], torch.tensor(expected["first4"]), 1e-7)
        assert float(state[name].double().sum()) == pytest.approx(expected["sum"], rel=1e-5)


@pytest.mark.parametrize(("name", "millions"), [("CLIP_VITB16", 149.6), ("CLIP_VITL14_336PX", 427.5)])
def test_names_and_shapes_are_the_published_ones(name: str, millions: float, schema: dict[str, Any]) -> None:
    with torch.device("meta"):
        state = create_model(ModelConfig(name=name, num_frames=4)).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == schema["state_dict"][name]
    assert sum(value.numel() for value in state.values()) / 1e6 == pytest.approx(millions, abs=0.05)


@torch.no_grad()
def test_vision_tower_token_by_token(clip_b16: DualEncoder, golden: Golden) -> None:
    visual, expected = clip_b16.visual, golden("vit_b16_T4")
    seen: dict[str, Tensor] = {}
    watched = {"ln_pre": visual.ln_pre, **{f"block{i}": visual.transformer.resblocks[i] for i in (0, 5, 11)}}
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
        for name, module in watched.items()
    ]
    dense = visual.transformer(visual.embed(video())[0])
    for hook in hooks:
        hook.remove()
    index = expected["token_index"]
    for name, output in seen.items():
        assert_close(output[:, index], expected[f"{name}_tokens"], DENSE)
        assert_close(output.mean(1), expected[f"{name}_mean"], DENSE)
    projected = dense @ visual.image_projection
    assert_close(projected[:, index], expected["dense_tokens"], DENSE)
    assert_close(projected.mean(1), expected["dense_mean"], DENSE)
    patches = visual.ln_post(dense)[:, 1:]
    assert_close(patches[:, index[1:] - 1], expected["return_dense_tokens"], DENSE)
    assert_close(patches.mean(1), expected["return_dense_mean"], DENSE)
    assert_close(visual(video()), expected["pooled"], POOLED)
    assert_close(clip_b16.encode_video(video()), expected["pooled_norm"], POOLED)


@torch.no_grad()
def test_other_frame_counts_and_activations(clip_b16: DualEncoder, filled: Filled, golden: Golden) -> None:
    variants = golden("vit_b16_variants")
    assert_close(clip_b16.visual(video(frames=1)), golden("vit_b16_T4_interp_to_T1")["pooled"], POOLED)
    quick = filled(ModelConfig(name="CLIP_VITB16", num_frames=4, activation="quick_gelu"))
    assert_close(quick.visual(video()), variants["quickgelu_T4"], POOLED)
    texts = golden("text_b")
    assert_close(quick.textual(texts["tokens"].long()), texts["quickgelu"], POOLED)


@torch.no_grad()
def test_one_frame_is_an_image(clip_b16: DualEncoder, golden: Golden) -> None:
    """The original has no temporal embedding at one frame; ours has one, which starts at zero."""
    start = {"temporal_embedding": torch.zeros(1, clip_b16.geometry.vision_width)}
    image = torch.func.functional_call(clip_b16.visual, start, video(frames=1))
    assert_close(image, golden("vit_b16_variants")["image_num_frames1"], POOLED)


@torch.no_grad()
def test_text_tower_with_and_without_padding(clip_b16: DualEncoder, golden: Golden) -> None:
    expected = golden("text_b")
    tokens = expected["tokens"].long()
    assert_close(clip_b16.textual(tokens), expected["embed"], POOLED)
    assert_close(clip_b16.encode_text(tokens), expected["embed_norm"], POOLED)
    assert_close(clip_b16.encode_text(tokens[:2, :10]), expected["embed_norm"][:2], POOLED)


@torch.no_grad()
def test_both_towers(clip_b16: DualEncoder, golden: Golden) -> None:
    expected, tokens = golden("clip_b16"), golden("text_b")["tokens"].long()
    output = clip_b16(video(), tokens)
    assert_close(output["video_features"], expected["image"], POOLED)
    assert_close(output["text_features"], expected["text"], POOLED)
    assert_close(output["logit_scale"], expected["logit_scale"], 1e-5)
    logits = output["logit_scale"] * output["video_features"] @ output["text_features"].T
    assert_close(logits, expected["logits_per_image"], POOLED * 15)


def test_gradients_of_a_training_step(clip_b16: DualEncoder, golden: Golden, schema: dict[str, Any]) -> None:
    expected, reference = golden("clip_b16_train_B2"), schema["clip_b16_train_B2"]
    result = ContrastiveLoss()(**clip_b16(video(batch=2), golden("text_b")["tokens"][:2].long()))
    result["loss"].backward()
    assert_close(result["loss"], expected["loss"], 1e-6)
    assert float(result["accuracy"]) * 100 == reference["acc"]
    gradients = {name: parameter.grad for name, parameter in clip_b16.named_parameters()}
    clip_b16.zero_grad()
    assert set(gradients) == set(reference["grad_norms"])
    for name, norm in reference["grad_norms"].items():
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-3), name
    for key, name in {
        "g_image_projection": "visual.image_projection",
        "g_temporal": "visual.temporal_embedding",
        "g_cls": "visual.class_embedding",
        "g_conv1": "visual.conv1.weight",
        "g_b0_inproj": "visual.transformer.resblocks.0.attn.in_proj_weight",
        "g_b11_cproj": "visual.transformer.resblocks.11.mlp.c_proj.weight",
        "g_text_proj": "textual.text_projection",
        "g_t0_inproj": "textual.transformer.resblocks.0.attn.in_proj_weight",
        "g_logit_scale": "logit_scale",
    }.items():
        corner = tuple(slice(size) for size in expected[key].shape)
        assert_close(gradients[name][corner], expected[key], GRADIENT)
