"""Which kernel computes the vision tower's attention: model.attention, what loads, and that it is the one used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from egohod.model import vision
from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import create_model
from egohod.model.vision import KERNELS, attention_order

CPU = torch.device("cpu")


def test_what_loads_is_named_and_the_configured_kernel_comes_first() -> None:
    """A CPU has two of the kernels, so what loads is tried for real."""
    order, line = attention_order("math", CPU, torch.float32, 32)
    assert order == [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    assert line == "attention: math is tried first; loads: math, FlashAttention 2"
    order, line = attention_order("auto", CPU, torch.float32, 32)
    assert order == [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    order, line = attention_order("cudnn", CPU, torch.float32, 32)
    assert order == [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    assert "; model.attention=cudnn does not: " in line


@pytest.mark.parametrize(
    ("capability", "installed", "first"),
    [((8, 0), True, "FlashAttention 2"), ((9, 0), True, "FlashAttention 3"), ((9, 0), False, "cudnn")],
)
def test_auto_depends_on_the_generation_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: bool, first: str
) -> None:
    """The GPU and its kernels are mocks; the choice is not."""
    activated: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(vision.importlib.util, "find_spec", lambda name: installed or None)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    monkeypatch.setattr(vision.F, "scaled_dot_product_attention", lambda query, key, value: query * 1)
    order, line = attention_order("auto", torch.device("cuda"), torch.bfloat16, 64)
    assert len(order) == 4
    assert line.startswith(f"attention: {first} is tried first")
    assert activated == (["FA3"] if first == "FlashAttention 3" else [])
    # Asked for by name, it is FlashAttention 3 where there is one, and everywhere else what PyTorch has.
    assert attention_order("cudnn", torch.device("cuda"), torch.bfloat16, 64)[0][0] is SDPBackend.CUDNN_ATTENTION


@pytest.mark.parametrize("kind", [ImportError, AttributeError])
def test_a_broken_installation_of_flash_attention_is_reported(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(vision.importlib.util, "find_spec", lambda name: True)  # type: ignore[attr-defined]

    def fail(name: str) -> None:
        raise kind("undefined symbol")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", fail)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    line = attention_order("auto", torch.device("cuda"), torch.float32, 64)[1]
    assert line.endswith("flash_attn_interface is installed but does not load: undefined symbol")


class AttentionCalls(TorchDispatchMode):
    """Notes the fused kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "flash_attention" in name:
            self.seen.append("backward" if "backward" in name else "forward")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("blocks", ["none", "all"])
def test_a_block_that_is_computed_again_uses_the_same_kernel(blocks: str) -> None:
    torch.manual_seed(0)
    model = create_model(ModelConfig(name="DEMO", num_frames=16, checkpoint_blocks=blocks))
    clips = torch.randn(1, 3, 16, 40, 40)
    results: list[Tensor] = []
    for first in ("flash", "math"):
        # One alone: a CPU tries flash first in any case.
        model.visual.set_attention([KERNELS[first]])
        model.zero_grad()
        with AttentionCalls() as calls:
            model.encode_video(clips).sum().backward()
        assert model.visual.conv1.weight.grad is not None
        results.append(model.visual.conv1.weight.grad.clone())
        # The last block is one token's; in it as in the others the kernel is that of the configuration.
        times = 8 if blocks == "all" else 4
        assert calls.seen.count("forward") == (times if first == "flash" else 0)
        assert calls.seen.count("backward") == (4 if first == "flash" else 0)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-3)
