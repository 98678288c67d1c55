"""The residual stream in autocast's type: what it saves on a GPU, and that float32 stays as it was."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from egohod.model.config import ModelConfig
from egohod.model.cost import predict, saved_bytes
from egohod.model.dual_encoder import DualEncoder, create_model
from egohod.model.vision import LowPrecisionLayerNorm

RealAutocast = torch.autocast


class GpuAutocast(RealAutocast):
    """Autocast of a GPU on a machine without one, where PyTorch would switch it off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with (
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
            mock.patch("torch.cuda.is_available", return_value=True),
            mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        ):
            super().__init__(*args, **kwargs)


def gpu_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any) -> Tensor:
    """The kernels that a GPU would choose; without one PyTorch chooses the plain products."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    mask = attn_mask.expand(*query.shape[:2], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, True)[0]


def saved_per_clip(**config: Any) -> float:
    """Megabytes that autograd keeps of a clip and its text under bf16 on a GPU: fake tensors follow its rules."""
    saved = []
    with (
        FakeTensorMode(),
        mock.patch("torch.autocast", GpuAutocast),
        mock.patch.object(F, "scaled_dot_product_attention", gpu_attention),
        torch.device("cuda"),
    ):
        model = create_model(ModelConfig(num_frames=4, **config))
        size = model.geometry.image_size
        for clips in (2, 3):
            video, tokens = torch.empty(clips, 3, 4, size, size), torch.zeros(clips, 77, dtype=torch.long)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                saved.append(saved_bytes(partial(model, video, tokens), model))
    return (saved[1] - saved[0]) / 1e6


@pytest.mark.parametrize(("blocks", "share"), [("all", 0.56), ("none", 0.90)])
def test_half_of_the_bytes_between_blocks_on_a_gpu(blocks: str, share: float) -> None:
    """ViT-B/16: 267 MB a clip become 238, and 34.5 become 18.8 where only the tokens between blocks are kept."""
    saved = {
        residual: saved_per_clip(name="CLIP_VITB16", checkpoint_blocks=blocks, residual=residual)
        for residual in ("float32", "autocast", "auto")
    }
    assert saved["autocast"] < share * saved["float32"]
    assert saved["auto"] == saved["autocast"]
    config = ModelConfig(name="CLIP_VITB16", checkpoint_blocks=blocks)
    predicted = predict(config, dtype=torch.bfloat16).per_clip / 1e6
    assert saved["auto"] == pytest.approx(predicted, rel=0.03), "the prediction is counted on tensors of a CPU"


def test_a_layer_norm_of_a_gpu_leaves_no_float32_behind() -> None:
    for kind, expected in ((nn.LayerNorm, torch.float32), (LowPrecisionLayerNorm, torch.bfloat16)):
        with FakeTensorMode(), mock.patch("torch.autocast", GpuAutocast), torch.device("cuda"):
            norm, x = kind(64), torch.empty(2, 64, dtype=torch.bfloat16)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                assert norm(x).dtype is expected


def with_residual(model: DualEncoder, residual: str, **config: Any) -> DualEncoder:
    other = create_model(ModelConfig(name="DEMO", num_frames=8, residual=residual, **config))
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_without_autocast_nothing_changes(demo_model: DualEncoder, clips: Tensor, patch_dropout: float) -> None:
    features = []
    for residual in ("float32", "autocast"):
        torch.manual_seed(0)
        features.append(with_residual(demo_model, residual, patch_dropout=patch_dropout).encode_video(clips))
    assert torch.equal(*features)


def test_auto_is_float32_on_a_cpu_and_autocast_is_as_exact_as_its_type(demo_model: DualEncoder, clips: Tensor) -> None:
    exact, features, tokens = demo_model.encode_video(clips), {}, {}
    for residual in ("float32", "auto", "autocast"):
        model = with_residual(demo_model, residual)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens[residual] = model.visual.transformer(model.visual.embed(clips)[0]).dtype
            features[residual] = model.encode_video(clips)
        features[residual].sum().backward()
        for name, parameter in model.visual.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype is torch.float32, name
    assert tokens == {"float32": torch.float32, "auto": torch.float32, "autocast": torch.bfloat16}
    assert torch.equal(features["auto"], features["float32"])
    assert (features["autocast"] * exact).sum(dim=1).min() > 0.999
