"""tools/gpu_check.py: every part without a GPU, what a part that dies leaves behind, and what the rows are made of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import psutil
import pytest
import torch
from benches import gpu, training
from benches.gpu import Check
from gpu_check import DONE_STATUS, PARTS, run_process

from egohod.distributed import Distributed
from egohod.errors import BROKEN, DONE, UserError
from egohod.model.config import ModelConfig
from egohod.model.cost import count_flops
from tests.support import ROOT, environment

TINY = Check(Distributed(0, 1, torch.device("cpu"), None), tiny=True)
MINUTES = 8


@pytest.mark.ci
def test_every_part_runs_on_a_cpu_and_a_second_call_runs_none(tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        # Long limits: sixteen processes that each import everything, on a machine that may be busy.
        options = ["--device", "cpu", "--tiny", "--time_factor", "30", "--out", str(tmp_path)]
        command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), *options]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=3600, check=False)

    done = run()
    assert done.returncode == DONE, done.stdout[-5000:] + done.stderr
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert list(parts) == list(PARTS)
    for name, outcome in parts.items():
        assert outcome["status"] == DONE_STATUS, (name, outcome)
        assert any("left out" not in row for row in outcome["rows"]), name
    assert {row["precision"] for row in parts["parity"]["rows"]} == {"fp32", "bf16"}
    assert all(row["equal bit for bit"] for row in parts["resume"]["rows"] if "left out" not in row)
    assert {row["operation"] for row in parts["collectives"]["rows"]} == {"all-reduce", "all-gather"}
    assert [row["processes"] for row in parts["steps"]["rows"] if row["recipe"] == "clip_large"] == [16]
    page = (tmp_path / "gpu_check.md").read_text()
    assert all(f"## {name} (" in page for name in PARTS)
    again = run()
    assert again.returncode == DONE
    assert again.stdout.count("finished before") == len(PARTS)


def test_without_a_gpu_there_is_nothing_to_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "pick_device", lambda device: torch.device("cpu"))
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == DONE
    assert "There is no GPU on this machine" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--device cpu goes with --tiny"):
        gpu_check.main(["--device", "cpu", "--out", str(tmp_path / "out")])


def test_the_limits_of_all_parts_are_eight_minutes() -> None:
    assert sum(part.limit for part in PARTS.values()) <= 60 * MINUTES
    assert all(part.run.__doc__ for part in PARTS.values()), "the first line is the text above its table"


# A shell starts at once, however busy the machine is; $2 is the file behind --rows.
WRITE = "echo '{\"item\": 1}' >> $2; "


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("", DONE_STATUS),
        ("kill -9 $$", "ended by SIGKILL"),
        ("echo 'CUDA error: an illegal memory access' >&2; exit 1", "ended with exit code 1"),
        ("printf '{\"it' >> $2; sleep 60", "stopped after 2 s"),
    ],
)
def test_a_part_that_dies_keeps_its_rows_and_says_how_it_ended(code: str, status: str) -> None:
    outcome = run_process(["sh", "-c", WRITE + code, "sh"], limit=2 if "stopped" in status else 60)
    assert outcome["status"] == status
    assert outcome["rows"] == [{"item": 1}]
    assert gpu_check.has_failed(outcome) == (status != DONE_STATUS)
    text = "\n".join(gpu_check.part_lines("machine", outcome))
    assert "| item |\n|---|\n| 1 |" in text
    assert ("illegal memory access" in text) == ("exit code" in status)


@pytest.mark.parametrize(
    "code",
    ["sleep 600 & echo $! > {}; wait", "trap 'kill $!' TERM; setsid sleep 600 & echo $! > {}; wait"],
    ids=["of its session", "of another session, as torchrun's"],
)
def test_processes_that_a_part_started_end_with_it(code: str, tmp_path: Path) -> None:
    run_process(["sh", "-c", code.format(tmp_path / "pid"), "sh"], limit=2)
    pid, end = int((tmp_path / "pid").read_text()), time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "it is still running"
        time.sleep(0.1)


def test_a_signal_ends_the_part_too(tmp_path: Path) -> None:
    path, before = tmp_path / "pid", signal.getsignal(signal.SIGTERM)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt):
        run_process(["sh", "-c", f"echo $$ > {path}; sleep 600", "sh"], limit=60)
    assert not psutil.pid_exists(int(path.read_text()))
    assert signal.getsignal(signal.SIGTERM) == before


def test_finished_parts_are_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def run(command: list[str], limit: float) -> dict[str, Any]:
        started.append(command[command.index("--part") + 1])
        failed = {"failed": "out of memory"} if started[-1] == "peer" else {}
        status = "stopped after 15 s" if started[-1] == "waits" else DONE_STATUS
        return {"status": status, "seconds": 1.0, "rows": [{"item": 1.5} | failed], "log": ["the last line"]}

    monkeypatch.setattr(gpu_check, "run_process", run)
    command = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", "machine", "waits", "peer"]
    assert gpu_check.main(command) == BROKEN
    assert "waits, peer failed" in capsys.readouterr().out
    assert started == ["machine", "waits", "peer"]
    gpu_check.main(command)
    assert started[3:] == ["waits"], "one that did not finish runs again, one with a failed row is finished"
    gpu_check.main([*command[:-2], "--fresh"])
    assert started[4:] == ["machine"], "of a finished part only what --only names is run again"
    page = (tmp_path / "gpu_check.md").read_text()
    assert "**This part stopped after 15 s; its rows above are complete.**" in page
    assert "| item | failed |\n|---|---|\n| 1.5 | out of memory |" in page


def test_results_of_other_hardware_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "run_process", lambda *_: {"status": DONE_STATUS, "seconds": 1.0, "rows": []})
    path = tmp_path / "gpu_check.json"
    command = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", "machine"]
    other = {"device": "NVIDIA A100", "count": 1, "torch": torch.__version__, "tiny": False, "parts": {"peer": {}}}
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"NVIDIA A100.*choose another --out, or start anew with --fresh"):
        gpu_check.main(command)
    assert gpu_check.main([*command, "--fresh"]) == DONE
    assert list(json.loads(path.read_text())["parts"]) == ["machine"]
    path.write_text("[]")
    with pytest.raises(UserError, match="is not a result of this tool"):
        gpu_check.main(command)


# --------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------


def test_a_row_that_fails_does_not_end_its_part() -> None:
    def no_memory() -> gpu.Row:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    assert gpu.attempt({"recipe": "a"}, no_memory) == {"recipe": "a", "failed": "out of memory"}
    failed = gpu.attempt({"recipe": "a"}, lambda: {"seconds": 1 / 0})
    assert failed == {"recipe": "a", "failed": "ZeroDivisionError: division by zero"}


def test_every_recipe_is_measured_once_with_the_processes_of_its_command() -> None:
    names = [name for group in gpu.computations(TINY) for name in group.split(", ")]
    assert len(names) == len(set(names))
    expected = {"clip_base", "clip_large", "egovideo_base", "egovideo_large_joint", "presets/1x24gb"}
    assert expected | {"finetune/ek100_mir", "finetune/ek100_cls", "finetune/egtea"} <= set(names)
    assert not any("eval" in name or "demo" in name or "default" in name for name in names)
    # One process takes 64 of 2,048 clips at a time, as does each of four.
    assert any({"presets/1x24gb", "presets/4x24gb"} <= set(group.split(", ")) for group in gpu.computations(TINY))
    for name, processes in (("clip_base", 8), ("clip_large", 16), ("finetune/ek100_mir", 4), ("finetune/custom", 1)):
        folder = "" if "/" in name else "config/"
        assert gpu.processes_of(ROOT / "configs" / f"{folder}{name}.yml") == processes


def test_waits_and_busy_time_are_those_of_the_step() -> None:
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name: str, start: float, end: float, device: Any = cpu, annotation: bool = False) -> SimpleNamespace:
        times = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=times, device_type=device, is_user_annotation=annotation)

    events = [
        event("training step", 100, 2000, cuda, annotation=True),  # the same region on the device's time line
        event("training step", 0, 1000, annotation=True),
        event("cudaLaunchKernel", 10, 11),
        event("cudaStreamSynchronize", 50, 90),
        event("cudaDeviceSynchronize", 1100, 2000),  # behind the step, by the profiler
        event("gemm", 100, 900, cuda),
        event("gemm", 1000, 1100, cuda),
    ]
    row = gpu.waits_in(events, on_gpu=True)
    assert row["waits"] == 1
    assert row["calls"] == "1 x cudaStreamSynchronize"
    assert row["kernels"] == 2
    assert row["step ms"] == 1.0
    assert row["device busy"] == pytest.approx(0.9)


def test_an_output_beyond_its_limit_fails() -> None:
    expected = torch.ones(1, 4)
    row = gpu._difference(TINY, "fp32", lambda: expected + 1e-6, expected, absolute=2e-5)
    assert "failed" not in row
    assert row["largest difference"] == pytest.approx(1e-6, rel=0.1)
    assert gpu._difference(TINY, "fp32", lambda: expected + 1e-4, expected, absolute=2e-5)["failed"]
    # Relative in half precision: these numbers are large.
    assert "failed" not in gpu._difference(TINY, "bf16", lambda: 100.5 * expected, 100 * expected, absolute=2e-5)
    assert gpu._difference(TINY, "bf16", lambda: 110 * expected, 100 * expected, absolute=2e-5)["failed"]


def test_rows_that_compile_come_after_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part may end within one of them: what was not compiled must have been measured by then."""
    monkeypatch.setattr(gpu, "_against_peer", lambda *_: {"speed ratio": 1.0})
    rows = list(gpu.peer(replace(TINY, tiny=False)))
    assert [row["compiled"] for row in rows] == [False, False, False, True, True]


def test_the_peer_computes_the_same_as_a_plain_step_of_ours() -> None:
    cfg = gpu.recipe_config(gpu.BASE, TINY, "train.precision=fp32")
    model = gpu.build(cfg, TINY)
    batch = gpu.random_batch(cfg, model, 2, TINY)
    step = gpu.plain_step(model.geometry, cfg.model.num_frames, batch, cfg, TINY, is_compiled=False)
    first = step()
    options = SimpleNamespace(frames=cfg.model.num_frames, text_length=model.geometry.context_length)
    # Ours takes fewer operations: only CLS passes the last block.
    plain = ModelConfig(name="DEMO", num_frames=cfg.model.num_frames)
    nominal = 2 * training._nominal_flops(plain, options)  # type: ignore[arg-type]
    assert count_flops(step) == pytest.approx(nominal, rel=0.03)
    for _ in range(5):
        last = step()
    assert last < first, "it trains"
