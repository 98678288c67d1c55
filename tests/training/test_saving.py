"""When checkpoints are written, in the background, by the clock; and what memory a resumed run takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from egohod.config import load
from egohod.errors import UserError
from egohod.training import checkpoint
from egohod.training.checkpoint import CheckpointError, CheckpointStore, read
from egohod.training.step import TrainStep
from egohod.training.train import Schedule
from tests.ranks import Ranks
from tests.support import ROOT, Command, environment, losses, newest
from tests.training.test_resume import assert_same


def steps(run: Path) -> list[int]:
    return [int(path.name[-8:]) for path in CheckpointStore(run).steps()]


# --------------------------------------------------------------------------------------------------
# In the background
# --------------------------------------------------------------------------------------------------


def test_training_continues_while_a_checkpoint_of_its_step_is_written(
    tiny_config: Path, tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is written only after two more steps, and has the bits of one that training waited for."""
    command = ["main_pretrain.py", "--config_file", tiny_config, "train.save_every=3 steps", "train.ema=0.9"]
    command += ["train.log_every=4 steps"]
    assert inside(*command, f"train.output={tmp_path / 'straight'}").returncode == 0

    done, writing, late = [0], list[int](), list[int]()
    train_step, save = TrainStep.__call__, CheckpointStore.save

    def counted(self: TrainStep, step: int, *arguments: Any) -> Any:
        result = train_step(self, step, *arguments)
        done[0] = step
        return result

    def slow(self: CheckpointStore, step: int, *state: Any, **more: Any) -> Path:
        writing.append(step)
        assert len(writing) == 1, "two at a time"
        while done[0] < min(step + 2, 12):
            time.sleep(0.01)
        late.append(done[0] - step)
        path = save(self, step, *state, **more)
        writing.clear()
        return path

    monkeypatch.setattr(TrainStep, "__call__", counted)
    monkeypatch.setattr(CheckpointStore, "save", slow)
    result = inside(*command, f"train.output={tmp_path / 'run'}", "train.async_save=true")
    assert result.returncode == 0, result.stderr
    assert late[-1] == 0, "the last one is waited for"
    assert min(late[:-1]) >= 2
    assert steps(tmp_path / "run") == [3, 6, 9, 12]
    for step in (3, 6, 9, 12):
        one, other = (read(tmp_path / run / "checkpoints" / f"step-{step:08d}") for run in ("straight", "run"))
        assert_same(one.weights, other.weights)
        assert_same(one.training, other.training)
    assert losses(tmp_path / "straight") == losses(tmp_path / "run")


def test_a_failure_in_the_background_is_reported_at_the_next_step(
    tiny_config: Path, tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, failed = CheckpointStore.save, threading.Event()

    def refuse(self: CheckpointStore, step: int, *state: Any, **more: Any) -> Path:
        if step == 2:
            failed.set()
            raise CheckpointError("step 2: not saved: the disk is full")
        return save(self, step, *state, **more)

    def step_after_failure(self: TrainStep, step: int, *arguments: Any) -> Any:
        if step == 3:
            failed.wait()
            time.sleep(0.1)
        return train_step(self, step, *arguments)

    train_step = TrainStep.__call__
    monkeypatch.setattr(CheckpointStore, "save", refuse)
    monkeypatch.setattr(TrainStep, "__call__", step_after_failure)
    command = ["main_pretrain.py", "--config_file", tiny_config, "train.duration=5 steps", "train.save_every=2 steps"]
    result = inside(*command, "train.async_save=true")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the disk is full; training continues") == 1
    assert result.stderr.index("the disk is full; training continues") < result.stderr.index("step 3/5")
    assert steps(tmp_path / "run") == [4, 5]


def stop_in(name: str) -> None:
    """Let the second checkpoint stop for ever in a function of egohod.training.checkpoint."""
    inner, calls = getattr(checkpoint, name), list[int]()

    def stop(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        # Each checkpoint has two checksums, and one of the others.
        if len(calls) > (3 if name == "file_hash" else 1) and threading.current_thread() is not threading.main_thread():
            os.write(2, f"stopped in {name}\n".encode())
            time.sleep(10_000)
        return inner(*arguments, **more)

    setattr(checkpoint, name, stop)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("function", "last"),
    [
        pytest.param("write_safetensors", 3, id="weights"),
        pytest.param("file_hash", 3, id="checksums"),
        pytest.param("write_text", 6, id="name"),
    ],
)
def test_killed_while_a_checkpoint_is_written_in_the_background(
    tiny_config: Path, tmp_path: Path, function: str, last: int
) -> None:
    """SIGKILL a step after step 6, whose checkpoint is not finished: the run equals one that was never killed."""
    straight, broken = tmp_path / "straight", tmp_path / "run"
    command = ["--config_file", tiny_config, "train.save_every=3 steps", "train.async_save=true"]
    command += ["train.duration=8 steps"]

    def run(*more: str, prepare: Callable[[], None] | None = None) -> Ranks:
        # One process, with one thread, on whose number sums depend.
        return Ranks(1, "main_pretrain.py", [*command, *more], tmp_path / "logs", prepare)

    assert run(f"train.output={straight}").wait() == [0]
    killed = run(prepare=partial(stop_in, function))
    killed.wait_for("step 7/8")
    killed.wait_for(f"stopped in {function}")
    killed.send(signal.SIGKILL, 0)
    assert killed.wait() == [-signal.SIGKILL]
    assert newest(broken).step == last
    # Nothing half-written has the name of a checkpoint.
    assert steps(broken) == list(range(3, last + 1, 3))
    assert bool(list((broken / "checkpoints").glob(".tmp-*step-*"))) == (last == 3)
    again = run()
    assert again.wait() == [0], again.log()
    assert f"at step {last} of 8" in again.log()
    one, other = newest(straight), newest(broken)
    assert one.step == other.step == 8
    assert_same(one.weights, other.weights)
    assert_same(one.training, other.training)
    assert losses(straight) == losses(broken)
    assert not list((broken / "checkpoints").glob(".tmp-*"))


# --------------------------------------------------------------------------------------------------
# By the clock
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "expected"), [("0.0001 seconds", [1, 2, 3]), ("10 minutes", [3]), ("1.5 hours", [3]), ("2 steps", [2, 3])]
)
def test_saved_by_the_clock(
    tiny_config: Path, tmp_path: Path, inside: Command, every: str, expected: list[int]
) -> None:
    command = ["main_pretrain.py", "--config_file", tiny_config, "train.duration=3 steps", f"train.save_every={every}"]
    assert inside(*command).returncode == 0
    assert steps(tmp_path / "run") == expected


def test_a_time_beyond_all_clocks_is_never(tiny_config: Path) -> None:
    cfg = load(tiny_config, [f"train.save_every={'9' * 400} hours"])
    assert Schedule.of(cfg, steps_per_epoch=1).save_seconds == float("inf")


@pytest.mark.parametrize("every", ["0 minutes", "ten minutes", "10 min", "10"])
def test_what_no_clock_measures_is_an_error(tiny_config: Path, every: str) -> None:
    with pytest.raises(UserError, match=r"train\.save_every"):
        load(tiny_config, [f"train.save_every={every}"])
    # Only checkpoints go by the clock.
    with pytest.raises(UserError, match=r"train\.log_every"):
        load(tiny_config, ["train.log_every=10 minutes"])


@pytest.mark.ci
def test_the_clock_of_the_first_process_decides_for_all(tiny_config: Path, tmp_path: Path) -> None:
    """Saving is collective: if processes went by clocks of their own, the first difference would hang the run."""
    settings = ["train.save_every=0.15 seconds", "train.keep_last=20", "model.patch_dropout=0", "train.async_save=true"]
    run = Ranks(2, "main_pretrain.py", ["--config_file", tiny_config, *settings], tmp_path / "logs")
    assert run.wait() == [0, 0], run.log(0) + run.log(1)
    assert steps(tmp_path / "run")[-1] == 12
    assert all(read(path).step for path in CheckpointStore(tmp_path / "run").steps())


# --------------------------------------------------------------------------------------------------
# Memory of a resumed run
# --------------------------------------------------------------------------------------------------

# A model whose projections are large, so that a checkpoint is many times the memory that libraries come and go with.
RESUMED = """
import gc, re, sys, threading, time
from pathlib import Path
import torch
from egohod.config import Config
from egohod.distributed import setup
from egohod.model.dual_encoder import create_model
from egohod.training.train import RunState
from types import SimpleNamespace

def megabytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

clips = type("", (list,), {"sources": []})()
data = SimpleNamespace(plan=SimpleNamespace(steps_per_epoch=10), classes=None, dataset=clips)
cfg = Config()
cfg.model.name, cfg.model.embed_dim, cfg.train.output, cfg.train.ema = "DEMO", 16384, sys.argv[1], 0.9
state = RunState(cfg, setup("cpu"), create_model(cfg.model, cfg.loss), data, 100)
if sys.argv[2] == "save":
    for parameter in state.train_step._inner.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.train_step._optimizer.step()
    state.save(5, required=True)
    sys.exit()
gc.collect()
before, peak, rss = megabytes("RssAnon"), 0.0, megabytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the highest VmHWM so far is forgotten
def watch():
    global peak
    while True:
        peak = max(peak, megabytes("RssAnon"))
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
assert state.resume() == 5
time.sleep(0.05)
moments = sum(value.nbytes for each in state.train_step._optimizer.state.values() for value in each.values()) / 2**20
files = sum(path.stat().st_size for path in Path(sys.argv[1]).rglob("*") if path.is_file()) / 2**20
mapped = sum(sys.argv[1] in line for line in open("/proc/self/maps"))
print(files, moments, peak - before, megabytes("RssAnon") - before, megabytes("VmHWM") - rss, mapped)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory by /proc/self/status, which only Linux has")
def test_a_resumed_run_holds_no_memory_of_its_checkpoint(tmp_path: Path) -> None:
    """Of its own it takes what the optimizer needs; the files are mapped while they are copied from, and no longer."""
    (tmp_path / "run").mkdir()
    for action in ("save", "resume"):
        done = subprocess.run(
            [sys.executable, "-c", RESUMED, str(tmp_path / "run"), action],
            cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    files, moments, peak, after, highest, mapped = map(float, done.stdout.split())
    # Weights, their average and two moments. Read into memory, the peak was twice the files.
    assert files > 90
    assert moments == pytest.approx(files / 2, rel=0.05)
    assert mapped == 0
    assert peak < moments + 20
    assert after < moments + 10
    assert highest < files + moments + 20
