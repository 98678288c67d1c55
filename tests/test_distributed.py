"""Device and precision, the errors when they cannot be had, and nodes that run different code or settings."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import egohod
from egohod import config, distributed
from egohod.distributed import Distributed, require_agreement, source_hash
from egohod.errors import UserError
from tests.ranks import Pair, pair


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


def test_the_driver_version_needs_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def reported_by(cfg: config.Config) -> tuple[str, dict[str, object]]:
    """What the other process reports when it runs ``cfg``."""
    reports: list[tuple[str, dict[str, object]]] = []

    class Listener(Pair):
        def gather_objects(self, value: object) -> list[object]:
            reports.append(value)  # type: ignore[arg-type]
            return [value]

    require_agreement(cfg, Listener(0, 1, torch.device("cpu"), None))
    return "node-b", reports[0][1]


def test_a_knob_that_differs_is_named_with_the_nodes(tiny_config: Path) -> None:
    mine, other = config.load(tiny_config), config.load(tiny_config, ["train.lr=2e-3"])
    require_agreement(mine, pair(reported_by(mine)))
    with pytest.raises(UserError) as caught:
        require_agreement(mine, pair(reported_by(other)))
    text = str(caught.value)
    assert "disagree on train.lr: 0.001 on " in text
    assert "0.002 on node-b (rank 1)" in text
    assert text.count("disagree") == 1


def test_videos_may_have_another_root_on_each_node(tiny_config: Path) -> None:
    mine, other = config.load(tiny_config), config.load(tiny_config, ["data.train.demo.root=/local/b"])
    require_agreement(mine, pair(reported_by(other)))


def test_code_that_differs_is_noticed(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = config.load(tiny_config)
    other = reported_by(mine)
    monkeypatch.setattr(distributed, "source_hash", lambda: "0123456789ab")
    with pytest.raises(UserError, match=r"disagree on the code of egohod: 0123456789ab on .* on node-b"):
        require_agreement(mine, pair(other))


def test_the_hash_of_the_code_follows_every_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "one.py").write_text("x = 1\n")
    assert source_hash(tmp_path / "a") == source_hash(tmp_path / "b")
    (tmp_path / "b" / "part" / "one.py").write_text("x = 2\n")
    assert source_hash(tmp_path / "a") != source_hash(tmp_path / "b")
    assert source_hash() == source_hash(Path(egohod.__file__).parent)


def test_the_first_process_leaves_after_the_others_have_asked_for_its_message() -> None:
    """Its store goes with it: a slower process would print the same mistake again."""
    store = torch.distributed.HashStore()
    first, second = (Distributed(rank, 2, torch.device("cpu"), "gloo", store=store) for rank in range(2))
    assert first.is_first_with("a mistake")
    answers: list[bool] = []
    slow = threading.Timer(0.3, lambda: answers.append(second.is_first_with("a mistake")))
    slow.start()
    first.wait_for_others_with("a mistake", seconds=60)
    assert answers == [False]
    slow.join()
    # A mistake of the first process alone: nobody asks, and it leaves all the same.
    assert first.is_first_with("its own mistake")
    first.wait_for_others_with("its own mistake", seconds=0.1)
