"""Rank, world size and meeting point, read from what launchers leave in the environment; errors where they fail."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from egohod import cli, distributed
from egohod.errors import UserError
from egohod.runtime import Interrupted, RankInfo, first_host, rank_info
from tests.support import ROOT, environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29400"}
# As Slurm 22.05 sets them: in the shell of a job, and in a task of one of its steps.
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
JOB |= {"SLURM_JOB_NODELIST": "ego[01-02]", "SLURM_TASKS_PER_NODE": "2(x2)"}
STEP = JOB | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "ego[01-02]"}
STEP |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
ALONE = RankInfo()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({}, ALONE, id="nothing"),
        pytest.param(TORCHRUN, RankInfo(3, 4, 1, "node1", 29400), id="torchrun"),
        pytest.param(TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, RankInfo(3, 4, 1, "127.0.0.1", 29400), id="one node"),
        pytest.param(
            STEP | {"SLURM_STEP_NUM_NODES": "1"},
            RankInfo(3, 4, 1, "127.0.0.1", 20057),
            id="srun on one node",
        ),
        pytest.param({"RANK": "0", "WORLD_SIZE": "1"}, ALONE, id="one process of torchrun"),
        pytest.param(JOB, ALONE, id="the shell of sbatch"),
        pytest.param(STEP, RankInfo(3, 4, 1, "ego01", 20057), id="srun"),
        pytest.param(STEP | {"SLURM_STEP_NUM_TASKS": "1"}, ALONE, id="a step of one task in a job of four"),
        pytest.param(
            STEP | {"SLURM_STEP_NODELIST": "ego02"}, RankInfo(3, 4, 1, "ego02", 20057), id="a step on the second node"
        ),
        pytest.param(
            STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"},
            RankInfo(3, 4, 1, "10.0.0.1", 7),
            id="set by the user",
        ),
        pytest.param(STEP | TORCHRUN, RankInfo(3, 4, 1, "node1", 29400), id="torchrun in a task"),
        pytest.param(STEP | {"RANK": "0", "WORLD_SIZE": "1"}, ALONE, id="one process of torchrun in a task"),
        pytest.param(
            STEP | {"SLURM_GPUS_PER_TASK": "1"}, RankInfo(3, 4, 1, "ego01", 20057, owns_gpus=True), id="a GPU per task"
        ),
        pytest.param(
            STEP | {"SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "none"},
            RankInfo(3, 4, 1, "ego01", 20057),
            id="a GPU per task, all visible",
        ),
    ],
)
def test_places(environment: dict[str, str], expected: RankInfo) -> None:
    assert rank_info(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is not"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT is not"),
        (TORCHRUN | {"RANK": "first"}, "RANK='first'"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4 in the environment, but WORLD_SIZE=4"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 in the environment is out of range; use 1 to 65535"),
    ],
)
def test_half_a_place_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rank_info(environment)


def test_a_time_to_meet_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TORCHRUN | {"EGOHOD_MEETING_SECONDS": "10min"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="EGOHOD_MEETING_SECONDS='10min' in the environment is not a number"):
        distributed.setup("cpu")


# As Slurm 22.05 sets them in the shell of srun --ntasks=4 --pty bash; srun in that shell hands SLURM_PTY_PORT on.
SHELL = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_PTY_PORT": "34875"}
WHERE = "from egohod.runtime import rank_info; print('world', rank_info().world_size, flush=True)"


def place_of(environment: dict[str, str], task: str, terminal: bool) -> str:
    """What a process finds that a shell, or ``task``, of a step started; the terminal is a real one."""
    variables = dict(os.environ) | environment | {"PYTHONPATH": str(ROOT), "SLURM_TASK_PID": task}
    variables.pop("WORLD_SIZE", None)
    # The process itself is the task where it should be.
    code = WHERE if task else f"import os; os.environ['SLURM_TASK_PID'] = str(os.getpid()); {WHERE}"
    command = [sys.executable, "-c", code]
    if not terminal:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, check=True, start_new_session=True, timeout=60
        )
        return done.stdout.strip()
    child, end = pty.fork()
    if child == 0:
        os.execve(sys.executable, command, variables)
    output = b""
    with contextlib.suppress(OSError):  # how a terminal ends on Linux
        while part := os.read(end, 1000):
            output += part
    os.close(end)
    assert os.waitpid(child, 0)[1] == 0, output
    return output.decode().strip()


@pytest.mark.parametrize(
    ("environment", "task", "terminal", "expected"),
    [
        pytest.param(SHELL, "4711", True, "world 1", id="in the shell of srun --pty"),
        pytest.param(SHELL, "4711", False, "world 4", id="srun in that shell"),
        pytest.param(SHELL, "", True, "world 4", id="srun --pty python"),
        pytest.param(STEP, "4711", True, "world 4", id="no shell"),
    ],
)
def test_a_shell_of_a_step_is_one_process(
    environment: dict[str, str], task: str, terminal: bool, expected: str
) -> None:
    assert place_of(environment, task, terminal) == expected


def test_programs_for_one_process_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert distributed.setup("cpu", alone=True).world_size == 1
    for program in ("tools/predict.py", "egohod/serve/index.py"):  # the latter opens the model of search, too
        assert "setup(cfg.train.device, alone=True, inference=True)" in (ROOT / program).read_text()


def test_ports_of_steps_that_run_side_by_side_differ() -> None:
    steps = [(job, step) for job in ("7", "8") for step in ("0", "1", "7")]
    ports = {rank_info(STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).port for job, step in steps}
    assert len(ports) == len(steps)
    # Linux hands out ports from 32768 on.
    assert 1024 < rank_info(STEP | {"SLURM_JOB_ID": "99999999"}).port < 32768


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("ego[07-09,12],gpu3", "ego07"), ("a,b", "a"), ("rack[1-2]n[03-04]", "rack1n03"), ("x-1-[3,5]", "x-1-3")],
)
def test_the_first_host_is_the_one_that_scontrol_names(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.pick_device("auto", RankInfo(5, 8, 1)) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="process 3 of this node has no GPU: only 2 visible"):
        distributed.pick_device("auto", RankInfo(3, 4, 3))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed.pick_device("auto", RankInfo(3, 4, 3, owns_gpus=True)) == torch.device("cuda", 0)


def test_a_job_without_gpus_gets_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
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
            distributed._meet(RankInfo(0, 2, 0, "127.0.0.1", port))


@pytest.mark.usefixtures("meeting")
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet_name_the_address(rank: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"process {rank} of 2 did not meet the others at 127\.0\.0\.1:{port}"):
        distributed._meet(RankInfo(rank, 2, rank, "127.0.0.1", port))


@pytest.mark.usefixtures("meeting")
def test_processes_on_other_nodes_that_do_not_meet_name_the_interfaces() -> None:
    # Of the networks that are reserved for documentation: it resolves, and nobody answers.
    with pytest.raises(UserError, match="did not meet") as caught:
        distributed._meet(RankInfo(1, 2, 0, "203.0.113.1", 29400))
    for part in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "lo 127.0.0.1", "EGOHOD_MEETING_SECONDS"):
        assert part in str(caught.value)


NCCL_ERROR = (
    "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error, NCCL version 2.30.7\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
    "Last error:\n"
    "socketStartConnect: Connect to 10.0.0.3<45631> failed : Connection refused\n"
)


def test_a_failed_connection_of_nccl_names_its_variables(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.distributed.DistBackendError(NCCL_ERROR)

    # NCCL cannot run here; its place in the set-up is what is tested.
    monkeypatch.setattr(distributed, "rank_info", lambda: RankInfo(1, 2, 0, "127.0.0.1", 29400))
    monkeypatch.setattr(distributed, "_meet", lambda _: None)
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", fails)
    with pytest.raises(UserError, match=r"met at 127\.0\.0\.1:29400.*NCCL_SOCKET_IFNAME.*docs/launching\.md"):
        distributed.setup("cpu")
    assert "Last error: | socketStartConnect: Connect to 10.0.0.3<45631> failed" in caplog.text


def test_after_an_error_nobody_waits_for_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[object] = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", ended.append)
    for backend in ("nccl", "gloo"):
        dist = distributed.Distributed(0, 2, torch.device("cpu"), backend, control="control")
        dist.close()
        dist.close(after_error=True)
    assert ended == [None, "control", None, None]


@pytest.mark.usefixtures("meeting")
def test_a_name_that_does_not_resolve_is_reported_at_once(caplog: pytest.LogCaptureFixture) -> None:
    nowhere = RankInfo(0, 2, 0, "nowhere.invalid", 29400)
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"nowhere\.invalid, the node of the first process, does not resolve .*MASTER_ADDR"
    ):
        distributed._meet(nowhere)
    assert time.monotonic() - start < 30


@pytest.mark.ci
def test_the_scripts_start_processes_on_a_node_without_a_name_in_dns(tmp_path: Path) -> None:
    """torchrun alone waits for ten minutes there."""
    unshared = ["unshare", "-ru", "sh", "-c", 'hostname no-such-node && exec "$@"', "sh"]
    if sys.platform != "linux" or subprocess.run([*unshared, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a namespace for the name of the node")
    (tmp_path / "program.py").write_text(
        "import os\nfrom egohod.distributed import setup\ndist = setup('cpu')\n"
        # One write for each line: print() writes the line and its end apart, and the other process comes in between.
        "os.write(1, f'{dist.gather_objects(dist.rank)}\\n'.encode())\n"
        "dist.close()\n"  # gloo's threads abort a process that ends without it
    )
    # All of the script but what installs the project.
    script = f"PYTHON={sys.executable}; source <(grep -v setup.sh exps/launch.sh); launch {tmp_path}/program.py"
    done = subprocess.run(
        [*unshared, "bash", "-euc", script],
        cwd=ROOT,
        env=environment(PROCESSES="2"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[0, 1]", "[0, 1]"]


def test_an_error_carries_the_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(_: object) -> int:
        raise UserError("data is gone")

    monkeypatch.setattr(cli, "REPORT_AFTER_SECONDS", 0)
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
