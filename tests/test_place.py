"""Rank, world size and meeting point, read from what launchers leave in the environment; what is said if they fail."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest
import torch

from egohod import cli, distributed
from egohod.config import UserError
from egohod.place import Place, find_place, first_host, usable_cores
from egohod.stopping import Interrupted
from tests.support import Command

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29400"}
# As Slurm 22.05 sets them: in the shell of a job, and in a task of one of its steps.
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
JOB |= {"SLURM_JOB_NODELIST": "ego[01-02]", "SLURM_TASKS_PER_NODE": "2(x2)"}
STEP = JOB | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "ego[01-02]"}
STEP |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
ALONE = Place()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({}, ALONE, id="nothing"),
        pytest.param(TORCHRUN, Place(3, 4, 1, "node1", 29400), id="torchrun"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "1"}, ALONE, id="one process of torchrun"),
        pytest.param(JOB, ALONE, id="the shell of sbatch"),
        pytest.param(STEP, Place(3, 4, 1, "ego01", 20057), id="srun"),
        pytest.param(STEP | {"SLURM_STEP_NUM_TASKS": "1"}, ALONE, id="a step of one task in a job of four"),
        pytest.param(
            STEP | {"SLURM_STEP_NODELIST": "ego02"}, Place(3, 4, 1, "ego02", 20057), id="a step on the second node"
        ),
        pytest.param(
            STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}, Place(3, 4, 1, "10.0.0.1", 7), id="said by the user"
        ),
        pytest.param(STEP | TORCHRUN, Place(3, 4, 1, "node1", 29400), id="torchrun in a task"),
        pytest.param(STEP | {"RANK": "0", "WORLD_SIZE": "1"}, ALONE, id="one process of torchrun in a task"),
        pytest.param(
            STEP | {"SLURM_GPUS_PER_TASK": "1"}, Place(3, 4, 1, "ego01", 20057, owns_gpus=True), id="a GPU per task"
        ),
        pytest.param(
            STEP | {"SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "none"},
            Place(3, 4, 1, "ego01", 20057),
            id="a GPU per task, all visible",
        ),
    ],
)
def test_places(environment: dict[str, str], expected: Place) -> None:
    assert find_place(environment) == expected


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is not"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT is not"),
        (TORCHRUN | {"RANK": "first"}, "RANK='first'"),
    ],
)
def test_half_a_place_is_refused(environment: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        find_place(environment)


def test_ports_of_steps_that_run_side_by_side_differ() -> None:
    steps = [(job, step) for job in ("7", "8") for step in ("0", "1", "7")]
    ports = {find_place(STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).port for job, step in steps}
    assert len(ports) == len(steps)
    # Linux hands out ports from 32768 on.
    assert 1024 < find_place(STEP | {"SLURM_JOB_ID": "99999999"}).port < 32768


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("ego[07-09,12],gpu3", "ego07"), ("a,b", "a"), ("rack[1-2]n[03-04]", "rack1n03"), ("x-1-[3,5]", "x-1-3")],
)
def test_the_first_host_is_the_one_that_scontrol_names(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.pick_device("auto", Place(5, 8, 1)) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="process 3 of this node has no GPU: only 2 visible"):
        distributed.pick_device("auto", Place(3, 4, 3))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed.pick_device("auto", Place(3, 4, 3, owns_gpus=True)) == torch.device("cuda", 0)


def test_a_job_without_gpus_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "ego1")
    monkeypatch.setattr(distributed, "nvidia_driver", lambda: None)
    with pytest.raises(UserError, match=r"on ego1: Slurm job 7 may have asked for none \(--gpus-per-node\)"):
        distributed.pick_device("cuda")
    monkeypatch.setattr(distributed, "nvidia_driver", lambda: "535.104")
    with pytest.raises(UserError, match="Slurm job 7 may have asked for none"):
        distributed.pick_device("auto")


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second to meet, in an environment that is as before afterwards."""
    monkeypatch.setenv("EGOHOD_MEETING_SECONDS", "1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


@pytest.mark.usefixtures("meeting")
def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of 127\.0\.0\.1 is taken; set MASTER_PORT"):
            distributed._meet(Place(0, 2, 0, "127.0.0.1", port))


@pytest.mark.usefixtures("meeting")
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet_say_where(rank: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"process {rank} of 2 did not meet the others at 127\.0\.0\.1:{port}"):
        distributed._meet(Place(rank, 2, rank, "127.0.0.1", port))


def test_a_stranger_at_the_port_holds_nobody_up(program: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
        ranks |= {"MASTER_PORT": str(stranger.getsockname()[1]), "EGOHOD_MEETING_SECONDS": "1"}
        done = program("-c", "from egohod.distributed import setup; setup()", **ranks)
    assert done.returncode == 2
    assert "process 1 of 2 did not meet the others" in done.stderr


def test_an_error_carries_the_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(_: object) -> int:
        raise UserError("data is gone")

    monkeypatch.setattr(cli, "SPEAK_AFTER_SECONDS", 0)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert cli.run(fails, []) == cli.USER_ERROR
    assert capsys.readouterr().err == "[rank 3] error: data is gone\n"
    assert logging.getLogger().level == logging.WARNING
    monkeypatch.setenv("RANK", "0")
    assert cli.run(fails, []) == cli.USER_ERROR
    assert capsys.readouterr().err == "error: data is gone\n"
    monkeypatch.setenv("RANK", "x")
    assert cli.run(fails, []) == cli.USER_ERROR
    assert "RANK='x'" in capsys.readouterr().err


def test_a_program_that_was_stopped_tells_its_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "unfinished"
    monkeypatch.setenv(cli.UNFINISHED, str(file))
    assert cli.run(lambda _: cli.DONE, []) == 0
    assert not file.exists()

    def stopped(_: object) -> int:
        raise Interrupted("SIGTERM received")

    assert cli.run(stopped, []) == 0
    assert file.exists()


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1
