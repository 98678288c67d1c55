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
from egohod.runtime import TORCH_BUILDS, RankInfo, torch_advice, torch_problem
from tests.ranks import Pair, pair


def test_a_gpu_that_torch_cannot_use_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "nvidia_driver", lambda: "535.104")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError) as caught:
        distributed.pick_device("auto")
    for part in ("535.104", torch.__version__, "train.device=cpu", "TORCH_INDEX=cu126"):
        assert part in str(caught.value)
    assert distributed.pick_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed.pick_device("auto").type == "cpu"


def test_a_macs_gpu_is_for_inference_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that goes without one: training on it, and what its operations return, has never been run."""
    monkeypatch.setattr(distributed, "nvidia_driver", lambda: None)
    with pytest.raises(UserError, match="a Mac's GPU is not available on"):
        distributed.pick_device("mps", inference=True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    two = RankInfo(rank=0, world_size=2)
    assert distributed.pick_device("auto").type == distributed.pick_device("auto", two, inference=True).type == "cpu"
    for choice in ("auto", "mps"):
        assert distributed.setup(choice, alone=True, inference=True).device.type == "mps"
    for info, inference, reason in ((None, False, "is for evaluation, search"), (two, True, "is for one process")):
        with pytest.raises(UserError, match=reason):
            distributed.pick_device("mps", info, inference=inference)
    assert distributed.pick_precision("auto", torch.device("mps")) == torch.float32


def test_the_driver_version_needs_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    version = tmp_path / "version"
    assert distributed.nvidia_driver(version) is None
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    assert distributed.nvidia_driver(version) == "535.104.05"


A100, V100, B200, T4, KEPLER = (8, 0), (7, 0), (10, 0), (7, 5), (3, 5)


@pytest.mark.parametrize(
    ("driver", "capability", "installed", "advice"),
    [
        ("580.65.06", A100, "cu130", ""),
        ("580.65.06", B200, "cu130", ""),
        ("570.124.06", A100, "cu130", "TORCH_INDEX=cu126"),
        ("535.104.05", T4, "cu126", ""),
        ("525.60.13", None, "cu130", "TORCH_INDEX=cu126"),
        # CUDA 13 has no code for Volta, whatever the driver; 12.6 none for Blackwell.
        ("580.65.06", V100, "cu130", "TORCH_INDEX=cu126"),
        ("570.124.06", B200, "cu130", "it needs driver 580 or later"),
        ("580.65.06", B200, "cu126", "TORCH_INDEX=cu130"),
        ("470.256.02", A100, "cu130", "it needs driver 525 or later"),
        ("580.65.06", KEPLER, "cu130", "no build of this release has code for this GPU"),
        ("580.65.06", A100, None, "TORCH_INDEX=cu130"),
        ("unknown", A100, "cu130", ""),
    ],
)
def test_driver_and_gpu_decide_which_build_of_torch_to_install(
    driver: str, capability: tuple[int, int] | None, installed: str | None, advice: str
) -> None:
    text = torch_advice(driver, capability, installed=installed)
    assert text.startswith(advice)
    assert bool(text) == bool(advice)


def test_the_default_build_is_the_pinned_torch() -> None:
    version, _, build = torch.__version__.partition("+")
    pins = (Path(__file__).parents[1] / "requirements.txt").read_text().splitlines()
    if f"torch=={version}" not in pins or not build.startswith("cu"):
        pytest.skip(
            "this environment has another version of torch, or a build without CUDA, than requirements.txt pins"
        )
    (row,) = (each for each in TORCH_BUILDS if each.name == build)
    versions = [divmod(int(arch.removeprefix("sm_")), 10) for arch in torch.cuda.get_arch_list()]
    assert row.oldest == min(versions)
    assert row.newest[0] == max(versions)[0]
    if build == TORCH_BUILDS[0].name:
        assert torch.version.cuda == f"{build[2:4]}.{build[4:]}"


def test_a_build_that_the_machine_cannot_run_is_noticed_before_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\ncase "$1" in *driver*) echo 535.104.05 ;; *) echo 8.0 ;; esac\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.14.1")
    assert torch_problem() == (
        "the cu130 build of PyTorch does not run with this machine's NVIDIA driver 535.104.05 and GPU of compute "
        "capability 8.0: TORCH_INDEX=cu126 bash exps/setup.sh installs the build for it (docs/installation.md)"
    )
    for version in ("2.14.1+cu126", "2.14.1+cpu", "2.11.0+cu128"):
        monkeypatch.setattr("importlib.metadata.version", lambda _, version=version: version)
        assert torch_problem() == ""
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.14.1")
    smi.unlink()
    assert torch_problem() == ""


@pytest.mark.parametrize(
    ("capability", "builds", "advice"),
    [
        ((8, 9), ["sm_75", "sm_80", "sm_86", "sm_90"], None),
        ((9, 0), ["sm_75", "sm_90a"], None),
        ((12, 0), ["sm_90", "compute_90"], None),
        ((12, 1), ["sm_75", "sm_120"], None),
        ((7, 0), ["sm_75", "sm_80", "sm_120"], "TORCH_INDEX=cu126"),
        ((10, 0), ["sm_50", "sm_80", "sm_90"], "TORCH_INDEX=cu130"),
        ((8, 0), ["sm_86"], "TORCH_INDEX=cu130"),
    ],
)
def test_a_gpu_without_code_in_this_torch_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], builds: list[str], advice: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: builds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA card")
    monkeypatch.setattr(distributed, "nvidia_driver", lambda: "580.65.06")
    if advice is None:
        distributed.require_kernels(torch.device("cuda", 0))
        return
    with pytest.raises(UserError, match=f"no code for NVIDIA card, of compute capability .*{builds[0]}.*{advice}"):
        distributed.require_kernels(torch.device("cuda", 0))


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
