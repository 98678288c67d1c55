"""tools/submit.py without a Slurm: what it would submit, its mistakes, and a preempted job on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT, Command, environment
from tests.training.test_resume import assert_same, losses, newest


def test_the_sbatch_file_has_the_requested_resources(tiny_config: Path, inside: Command) -> None:
    options = "--nodes 2 --gpus 8 --cpus 12 --mem 200 --partition big --account us --time 4h --signal_before 90"
    done = inside("submit.py", tiny_config, "train.lr=1e-4", *options.split(), "--dry_run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for flag in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12", "mem=200GB", "time=240"):
        assert f"#SBATCH --{flag}" in lines
    for flag in ("partition=big", "account=us", "signal=USR2@90", "requeue"):
        assert f"#SBATCH --{flag}" in lines
    assert "--kill-on-bad-exit=1 --cpus-per-task=12" in done.stdout
    assert "train.lr=1e-4" in lines[-1]
    assert not (tiny_config.parent / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "cores"),
    [
        (["--gpus", "8"], 9),  # automatic workers
        (["--gpus", "8", "data.workers=12"], 13),
        (["data.workers=0"], 4),
        (["--gpus", "8", "data.workers=12", "--cpus", "6"], 6),
    ],
)
def test_a_job_gets_the_cores_that_its_loader_wants(
    tiny_config: Path, inside: Command, arguments: list[str], cores: int
) -> None:
    done = inside("submit.py", tiny_config, "data.workers=auto", *arguments, "--dry_run")
    assert f"#SBATCH --cpus-per-task={cores}" in done.stdout.splitlines(), done.stdout + done.stderr
    assert f"--cpus-per-task={cores}" in done.stdout.partition("srun")[2]


def test_mistakes_show_before_anything_is_submitted(
    tiny_config: Path, tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for arguments, message in (
        ([tiny_config, "train.learning=1"], "train.learning"),
        ([tiny_config, "--time", "soon"], "--time soon: write 90m, 4h or 2d"),
        ([tiny_config], "no Slurm here"),
        ([tiny_config, "--cluster", "local", "--nodes", "2"], "--cluster local is one node"),
        ([], "which configuration?"),
        (["--status", tmp_path], "nothing was submitted"),
    ):
        done = inside("submit.py", *arguments)
        assert done.returncode == 2, arguments
        assert message in done.stderr


@pytest.mark.ci
def test_a_preempted_job_resumes_to_the_same_end(tiny_config: Path, tmp_path: Path, program: Command) -> None:
    """What a cluster does: submitit's signal to the first task, which then requeues the job."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    settings = ["tools/submit.py", tiny_config, "train.duration=30 steps", "--cluster", "local", "--processes", "2"]
    done = program(*settings, f"train.output={straight}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FINISHED  step 30/30" in done.stdout

    # By the command egohod, in which the tool is no main program.
    command = [sys.executable, "-m", "egohod", "submit", *map(str, settings[1:]), f"train.output={broken}"]
    submitter = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    assert submitter.stdout is not None
    job = submitter.stdout.readline().split()[1].rstrip(";")
    log = broken / "submitted" / f"{job}_0_log.err"
    while not log.exists() or "step 3/30" not in log.read_text():
        assert submitter.poll() is None
        time.sleep(0.1)
    os.kill(_first_task(int(job)), signal.SIGUSR2)
    output, _ = submitter.communicate()
    assert submitter.returncode == 0, output
    assert "Caught signal SIGUSR2" in log.read_text()
    assert "resuming" in log.read_text()
    one, other = newest(straight), newest(broken)
    assert one.step == other.step == 30
    assert_same(one.weights, other.weights)
    assert_same(one.training["optimizer"], other.training["optimizer"])
    assert losses(straight) == losses(broken)
    assert json.loads((broken / "environment.json").read_text())["processes"] == 2


def _first_task(job: int) -> int:
    tasks = psutil.Process(job).children()
    (first,) = (each.pid for each in tasks if each.environ()["SUBMITIT_LOCAL_GLOBALID"] == "0")
    return first
