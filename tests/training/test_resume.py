"""Interrupted and resumed equals never interrupted, bit for bit; real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from egohod.training.checkpoint import CheckpointStore, read
from egohod.training.step import TrainStep
from tests.support import ROOT, Command, environment, losses, newest


def assert_same(one: object, other: object, where: str = "") -> None:
    """Equal bit for bit, down to every tensor."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where  # type: ignore[arg-type]
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where  # type: ignore[attr-defined]
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")  # type: ignore[index]
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where  # type: ignore[arg-type]
        for i, pair in enumerate(zip(one, other, strict=True)):  # type: ignore[call-overload]
            assert_same(*pair, where=f"{where}[{i}]")
    else:
        assert one == other, where


def start(config: Path, *overrides: str, main: str = "main_pretrain.py", **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, main, "--config_file", str(config), *overrides],
        cwd=ROOT,
        env=environment(**more),
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Read the log until ``text`` appears."""
    output = ""
    assert process.stderr is not None
    for line in process.stderr:
        output += line
        if text in line:
            return output
    raise AssertionError(f"'{text}' never came:\n{output}")


@pytest.mark.ci
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(["data.workers=2"], id="2 workers"),
        pytest.param(["data.workers=0"], id="0 workers"),
        pytest.param(["data.workers=2", "train.max_batch_per_process=2"], id="accumulation"),
        pytest.param(["data.workers=2", "train.log_every=4 steps"], id="save within a log window"),
    ],
)
def test_five_steps_a_kill_and_seven_equal_twelve(
    tiny_config: Path, tmp_path: Path, program: Command, variant: list[str]
) -> None:
    """The world has 60 clips: seven steps an epoch, so the second part crosses an epoch's edge."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    command = ["main_pretrain.py", "--config_file", tiny_config, *variant]
    done = program(*command, f"train.output={straight}")
    assert done.returncode == 0, done.stderr

    process = start(tiny_config, *variant, f"train.output={broken}", "train.save_every=5 steps")
    wait_for(process, "saved")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert newest(broken).step == 5
    done = program(*command, f"train.output={broken}")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr

    one, other = newest(straight), newest(broken)
    assert one.step == other.step == 12
    assert_same(one.weights, other.weights)
    assert_same(one.training["optimizer"], other.training["optimizer"])
    assert losses(straight) == losses(broken)
    assert len(losses(straight)) in (12, 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.ci)])
def test_a_signal_saves_and_leaves_in_peace(tiny_config: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = start(tiny_config, "train.duration=100000 steps", "data.workers=2")
    wait_for(process, "step 2/")
    process.send_signal(number)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert number.name in output
    last = newest(tmp_path / "run")
    assert last.step == losses(tmp_path / "run")[-1][0]


@pytest.mark.parametrize("interrupted", [2, 6], ids=["first pass", "second pass"])
def test_a_signal_in_a_long_step_saves_the_step_before(
    tiny_config: Path, tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    """Four micro-batches a step, each computed twice; the signal comes within the third step."""
    command = ["main_pretrain.py", "--config_file", tiny_config, "train.max_batch_per_process=2"]
    command += ["train.duration=4 steps", "model.num_frames=2"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert inside(*command, f"train.output={straight}").returncode == 0

    forward, calls = TrainStep._forward, 0

    def interrupt(self: TrainStep, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 2 * 8 + interrupted:
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward(self, batch)

    monkeypatch.setattr(TrainStep, "_forward", interrupt)
    stopped = inside(*command, f"train.output={broken}", "train.stop_seconds=0")
    assert stopped.returncode == 0, stopped.stderr
    assert "SIGUSR1 received; step 2 of 4 is saved" in stopped.stderr
    assert calls == 2 * 8 + interrupted
    assert newest(broken).step == 2
    assert inside(*command, f"train.output={broken}").returncode == 0
    one, other = newest(straight), newest(broken)
    assert_same(one.weights, other.weights)
    assert_same(one.training["optimizer"], other.training["optimizer"])
    # Clips of the step that was given up count once.
    assert_same(one.training["ledgers"], other.training["ledgers"])
    assert losses(straight) == losses(broken)


@pytest.mark.ci
def test_a_torn_newest_checkpoint_is_passed_over(tiny_config: Path, tmp_path: Path, program: Command) -> None:
    run = tmp_path / "run"
    command = ["main_pretrain.py", "--config_file", tiny_config, "train.duration=4 steps"]
    assert program(*command, "train.save_every=2 steps").returncode == 0
    weights = run / "checkpoints" / "step-00000004" / "model.safetensors"
    # Copies: what is read is mapped from the file, and a file that shrinks under its mapping ends the process.
    good = {name: value.clone() for name, value in read(weights.parent).weights.items()}
    weights.write_bytes(weights.read_bytes()[:1000])
    done = program(*command)
    assert done.returncode == 0
    assert "step-00000004" in done.stderr
    assert "resuming" in done.stderr
    assert_same(good, newest(run).weights)


def test_two_runs_cannot_share_a_folder(tiny_config: Path, inside: Command) -> None:
    process = start(tiny_config, "train.duration=100000 steps")
    wait_for(process, "step 1/")
    process.send_signal(signal.SIGSTOP)  # its lock stays, the processor is free
    second = inside("main_pretrain.py", "--config_file", tiny_config)
    process.kill()
    process.communicate()
    assert second.returncode == 2
    assert "another run is writing here" in second.stderr


def test_resume_none_never_overwrites(tiny_config: Path, inside: Command) -> None:
    command = ["main_pretrain.py", "--config_file", tiny_config, "train.duration=1 steps"]
    assert inside(*command, "--resume", "none").returncode == 0
    again = inside(*command, "--resume", "none")
    assert again.returncode == 2
    assert "holds checkpoints of an earlier run" in again.stderr
    other = inside(*command, "model.num_frames=8")
    assert other.returncode == 2
    assert "model.num_frames=4" in other.stderr


def test_the_best_step_is_saved_wherever_it_comes(
    tiny_config: Path, demo_world: Path, tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluated every 3 steps, saved every 4, and both at the end of each part; a resumed run knows the best so far."""
    # After steps 3 and 4, 6 and 7, 9 and 12.
    scores = iter([0.2, 0.1, 0.9, 0.3, 0.5, 0.4])
    monkeypatch.setattr("egohod.evaluation.runner.Benchmark.__call__", lambda *_: {"map": next(scores)})
    command = ["main_pretrain.py", "--config_file", tiny_config, f"evaluate.demo_val={demo_world}/val"]
    command += ["evaluate.every=3 steps", "evaluate.best=val/map", "train.save_every=4 steps", "train.keep_last=1"]
    for duration, expected in ((4, [3, 4]), (7, [6, 7]), (12, [6, 12])):
        done = inside(*command, f"train.duration={duration} steps", "train.schedule=constant")
        assert done.returncode == 0, done.stderr
        assert [int(path.name[-8:]) for path in CheckpointStore(tmp_path / "run").steps()] == expected


def test_a_run_that_skips_all_steps_ends_with_an_error(tiny_config: Path, tmp_path: Path, inside: Command) -> None:
    """However short the windows of the log are."""
    command = ["main_pretrain.py", "--config_file", tiny_config, "train.duration=25 steps", "train.log_every=5 steps"]
    done = inside(*command, "train.lr=1e30", "train.warmup=0 steps", "train.schedule=constant")
    assert done.returncode == 2, done.stderr
    assert "steps all had a non-finite loss or gradient" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) < 5
    assert lines[-1]["train/loss"] is None


def test_a_checkpoint_of_an_earlier_release_is_resumed(tiny_config: Path, tmp_path: Path, inside: Command) -> None:
    """Its manifest as release 1 wrote it: other names of some keys, and no statistics of the pixels."""
    command = ["main_pretrain.py", "--config_file", tiny_config, "evaluate.every=1000 steps"]
    assert inside(*command, "train.duration=1 steps").returncode == 0
    path = newest(tmp_path / "run").path / "manifest.json"
    manifest = json.loads(path.read_text())
    old_names = {"data.train.clips": "clips in data.train", "state_dict.shapes_sha256": "shapes of the weights"}
    identity = {old_names.get(name, name): value for name, value in manifest["identity"].items()}
    assert identity.pop("model.image_stats") == "clip"
    assert set(old_names.values()) < identity.keys()
    path.write_text(json.dumps(manifest | {"identity": identity}))
    resumed = inside(*command, "train.duration=2 steps")
    assert (resumed.returncode, "resuming" in resumed.stderr) == (0, True), resumed.stderr
    # A damaged or foreign value is still refused, under the name of today.
    path.write_text(json.dumps(manifest | {"identity": identity | {"clips in data.train": 1}}))
    (newest(tmp_path / "run").path / "manifest.json").unlink()
    refused = inside(*command, "train.duration=2 steps")
    assert refused.returncode == 2
    assert "was trained with data.train.clips=1, this run has" in refused.stderr
