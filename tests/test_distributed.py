"""Which device and which precision, and what is said when they cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from egohod import distributed
from egohod.errors import UserError


def test_a_gpu_that_torch_cannot_use_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "nvidia_driver", lambda: "535.104")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError) as caught:
        distributed.pick_device("auto")
    for part in ("535.104", torch.__version__, "train.device=cpu"):
        assert part in str(caught.value)
    assert distributed.pick_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed.pick_device("auto").type == "cpu"


def test_the_driver_is_found_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    version = tmp_path / "version"
    assert distributed.nvidia_driver(version) is None
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    assert distributed.nvidia_driver(version) == "535.104.05"


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for avx, amx, expected in (
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert distributed.pick_precision("auto", cpu) == expected
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert distributed.pick_precision("auto", torch.device("cuda")) == expected
    assert distributed.pick_precision("fp16", cpu) == torch.float16
