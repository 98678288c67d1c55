"""A run of which one process dies, hangs, fails or gets a stop signal, with and without torchrun's agent; and runs on
different numbers of processes, which are the same. Real processes, real signals."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import Ranks, Torchrun
from tests.support import Command, losses, newest

pytestmark = pytest.mark.ci
ENDLESS = "train.duration=100000 steps"


@pytest.fixture
def ranks(tiny_config: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """``ranks(2, knob=value, ...)`` starts a training on two processes into the folder ``run``."""

    def start(world_size: int, *knobs: str, run: str = "run") -> Ranks:
        # Saying how many clips fit the memory spares the run to find out.
        small = ["model.num_frames=2", "model.patch_dropout=0", "train.global_batch_size=4"]
        small += ["train.max_batch_per_process=8"]
        settings = ["--config_file", tiny_config, *small, f"train.output={tmp_path / run}", *knobs]
        return Ranks(world_size, "main_pretrain.py", settings, tmp_path / f"{run}_logs")

    return start


@pytest.fixture
def torchrun(tiny_config: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """``torchrun(knob=value, ...)`` starts the same training on two processes under torchrun's agent."""
    runs = []

    def start(*knobs: str) -> Torchrun:
        small = ["model.num_frames=2", "model.patch_dropout=0", "train.global_batch_size=4"]
        settings = ["--config_file", tiny_config, *small, f"train.output={tmp_path / 'run'}", *knobs]
        runs.append(Torchrun(2, ["main_pretrain.py", *settings], tmp_path / "torchrun.log"))
        return runs[-1]

    yield start
    for run in runs:
        run.agent.terminate()
        run.agent.wait()


def evaluating(demo_world: Path) -> list[str]:
    return [f"evaluate.demo_val={demo_world}/val", "evaluate.every=2 steps", "evaluate.batch_size=1"]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_run_with_its_name(torchrun, killed: int) -> None:  # type: ignore[no-untyped-def]
    run = torchrun(ENDLESS)
    run.wait_for("step 2/")
    run.send(signal.SIGKILL, killed)
    assert run.wait(60) == 1
    # torchrun's table; the first failure is the cause.
    cause = run.log().partition("Root Cause (first observed failure)")[2]
    assert re.search(rf"rank\s+: {killed} .*\n\s+exitcode\s+: -9 ", cause), run.log()
    assert run.log().count("Traceback") <= 1, "the agent's own"


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_others_without_a_launcher(ranks, killed: int) -> None:  # type: ignore[no-untyped-def]
    """As under a plain srun."""
    run = ranks(2, ENDLESS)
    run.wait_for("step 2/")
    run.send(signal.SIGKILL, killed)
    start = time.monotonic()
    codes, log = run.wait(), run.log(1 - killed)
    assert time.monotonic() - start < 60
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1
    assert "error: another process of this run died" in log
    assert "Traceback" not in log


def test_each_rank_logs_its_own_error_at_once(ranks) -> None:  # type: ignore[no-untyped-def]
    """The first one that leaves, five seconds later, makes a launcher end the others."""
    run = ranks(3, ENDLESS, "train.global_batch_size=6")
    run.wait_for("step 2/")
    run.send(signal.SIGKILL, 1)
    for rank in (0, 2):
        # Not on its way out: wait_for fails when the process is gone.
        run.wait_for("this process stops after", rank)
    assert "error:" not in run.log(0) + run.log(2)
    assert run.wait() == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        (line,) = (line for line in run.log(rank).splitlines() if "this process stops after" in line)
        assert re.search(rf"\[rank {rank}\] E this process stops after \w+Error: .*gloo", line)
        assert "error: another process of this run died" in run.log(rank)
        assert "Traceback" not in run.log(rank)


def test_processes_that_meet_but_cannot_exchange_data_name_the_interface(torchrun, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_if")
    run = torchrun()
    assert run.wait(300) == 1
    # The agent may end the other process before it has logged.
    assert re.search(r"E \S+ cannot exchange data: RuntimeError: .*no_such_if", run.log())
    assert "must name the network interface that reaches the other nodes (this node has lo 127" in run.log()
    assert run.log().count("Traceback") <= 1, "the agent's own"


def test_a_rank_that_hangs_ends_the_run(torchrun) -> None:  # type: ignore[no-untyped-def]
    run = torchrun(ENDLESS, "train.collective_timeout=15")
    run.wait_for("step 2/")
    run.send(signal.SIGSTOP, 1)
    # The timeout, and the 30 s after which torchrun kills what does not follow SIGTERM.
    assert run.wait(90) == 1
    assert "did not come within train.collective_timeout=15 s" in run.log()


def test_what_one_rank_cannot_do_ends_all_with_one_line(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "run").write_text("no folder")
    run = ranks(2)
    assert run.wait() == [2, 1]
    assert f"error: {tmp_path / 'run'}: cannot be used as run folder" in run.log(0)
    assert "error: another process of this run died" in run.log(1)
    assert "Traceback" not in run.log(0) + run.log(1)


def test_a_batch_that_processes_cannot_share_is_one_error(ranks) -> None:  # type: ignore[no-untyped-def]
    run = ranks(2, "train.global_batch_size=5")
    assert run.wait() == [2, 2]
    log = run.log(0) + run.log(1)
    assert log.count("train.global_batch_size=5 cannot be shared evenly by 2 processes") == 1
    assert log.count("error:") == 1


def test_a_lost_run_folder_ends_all(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = ranks(2, "train.duration=12 steps", "train.save_every=3 steps")
    run.wait_for("saved")
    shutil.move(tmp_path / "run", tmp_path / "gone")
    assert run.wait() == [2, 1]
    assert "training continues" in run.log(0)
    assert f"error: {tmp_path / 'run' / 'checkpoints' / 'step-00000012'}: not saved" in run.log(0)
    # In the first process TensorBoard's own thread complains at length.
    assert "Traceback" not in run.log(1)
    assert not (tmp_path / "run").exists()


def test_a_signal_during_set_up_ends_all_in_peace(ranks) -> None:  # type: ignore[no-untyped-def]
    run = ranks(2, ENDLESS)
    run.wait_for("hod.csv")
    # As launchers do it: to all, one a little later than the other.
    run.send(signal.SIGTERM, 1)
    time.sleep(0.5)
    run.send(signal.SIGTERM, 0)
    assert run.wait() == [0, 0]
    assert "SIGTERM received" in run.log(0)
    assert "Traceback" not in run.log(0) + run.log(1)


def test_a_signal_to_one_rank_within_a_step_of_many_micro_batches(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Given up by both at once, whichever of them is further; the step before is saved, and the run continues."""
    settings = ["train.global_batch_size=16", "train.max_batch_per_process=1"]
    assert ranks(2, *settings, "train.duration=6 steps", run="straight").wait() == [0, 0]
    run = ranks(2, *settings, "train.duration=6 steps", "train.stop_seconds=0")
    run.wait_for("step 2/")
    run.send(signal.SIGTERM, 1)
    assert run.wait() == [0, 0], run.log(0) + run.log(1)
    assert re.search(r"step [2-5] of 6 is saved", run.log(0)), run.log(0)
    assert "Traceback" not in run.log(0) + run.log(1)
    again = ranks(2, *settings, "train.duration=6 steps")
    assert again.wait() == [0, 0]
    assert "resuming" in again.log(0)
    assert losses(tmp_path / "straight") == losses(tmp_path / "run")


def test_a_signal_during_an_evaluation_costs_nothing(ranks, demo_world: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    settings = [*evaluating(demo_world), "train.duration=4 steps"]
    assert ranks(2, *settings, run="straight").wait() == [0, 0]
    run = ranks(2, *settings)
    run.wait_for("evaluating the model of step 2")
    run.send(signal.SIGTERM, 1)
    assert run.wait() == [0, 0]
    assert "step 2 of 4 is saved" in run.log(0)
    assert newest(tmp_path / "run").manifest["metrics"] == {}
    again = ranks(2, *settings)
    assert again.wait() == [0, 0]
    assert again.log(0).index("evaluating the model of step 2") < again.log(0).index("step 3/4")
    runs = [metrics(tmp_path / name) for name in ("straight", "run")]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 6
    weights = newest(tmp_path / "run").weights
    for name, weight in newest(tmp_path / "straight").weights.items():
        assert torch.equal(weight, weights[name]), name


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl about the model."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "train/loss", "train/grad_norm")
    return [{name: line[name] for name in line if name in names or name.startswith("val/")} for line in lines]


def test_a_signal_to_one_process_while_the_first_one_writes_the_report_changes_nothing(
    ranks, demo_world: Path, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    run = ranks(2, *evaluating(demo_world), f"evaluate.demo_test={demo_world}/test")
    run.wait_for("for a README")
    run.send(signal.SIGTERM, 1)
    assert run.wait() == [0, 0], run.log(0) + run.log(1)
    assert (tmp_path / "run" / "report.html").is_file()


def test_torchrun_goes_on_from_the_last_checkpoint(tiny_config: Path, tmp_path: Path, program: Command) -> None:
    """The second rank kills itself once, in the fifth step; the agent starts all ranks again."""
    saboteur = tmp_path / "sabotage.py"
    saboteur.write_text(
        "import os, pathlib, signal, sys\n"
        "sys.path.insert(0, os.getcwd())\n"
        "import main_pretrain\n"
        "from egohod import cli\n"
        "from egohod.training.step import TrainStep\n"
        "inner, mark = TrainStep.__call__, pathlib.Path(sys.argv.pop(1))\n"
        "def step(self, number, *arguments):\n"
        "    if number == 5 and os.environ['RANK'] == '1' and not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return inner(self, number, *arguments)\n"
        "TrainStep.__call__ = step\n"
        "sys.exit(cli.run(main_pretrain.main))\n"
    )
    knobs = ["model.num_frames=2", "train.global_batch_size=4", "train.duration=7 steps", "train.save_every=3 steps"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=2", saboteur]
    for name in ("straight", "killed"):
        mark = tmp_path / "mark"
        if name == "straight":
            mark.touch()
        else:
            mark.unlink()
        done = program(*launcher, mark, "--config_file", tiny_config, *knobs, f"train.output={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert "exitcode: -9" in done.stderr
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")
    weights = newest(tmp_path / "killed").weights
    for name, weight in newest(tmp_path / "straight").weights.items():
        assert torch.equal(weight, weights[name]), name


def test_the_number_of_processes_does_not_change_the_losses(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """One, two and four; and one that is started again with two, then with one."""
    knobs = ["train.duration=20 steps", "train.lr=1e-4", "train.lr_end=0", "train.save_every=7 steps"]
    for world_size in (1, 2, 4):
        assert ranks(world_size, *knobs, run=str(world_size)).wait() == [0] * world_size
    for world_size, step in ((1, 7), (2, 14)):
        run = ranks(world_size, *knobs, run="changing")
        run.wait_for(f"step-{step:08d}")
        run.send(signal.SIGKILL, *range(world_size))
        run.wait()
        # Saves may have followed before the kill came.
        assert newest(tmp_path / "changing").step >= step
    last = ranks(1, *knobs, run="changing")
    assert last.wait() == [0]
    assert "resuming" in last.log()
    one = losses(tmp_path / "1")
    assert len(one) == 20
    for name in ("2", "4", "changing"):
        for (step, loss, _), (_, other, _) in zip(one, losses(tmp_path / name), strict=True):
            assert loss == pytest.approx(other, abs=1e-4), (name, step)


def test_the_slowest_rank_is_named(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = ranks(2, "train.duration=4 steps", "train.log_every=2 steps")
    assert run.wait() == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        low, middle, high = (line[f"train/compute_seconds_{name}"] for name in ("min", "median", "max"))
        assert 0 < low <= middle <= high
        assert line["train/slowest_rank"] in (0, 1)
        assert line["train/clips_lost"] == 0
