"""The processes of a run: started as srun starts them (rank in the environment, nobody watches) or by torchrun, or one
process beside an imitation of another."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from egohod.distributed import Distributed
from tests.support import ROOT, environment

# Forked from a server that has imported everything: importing costs more than such small runs compute.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["egohod.commands.eval", "egohod.training.train"])
_SECONDS = 1800


class Ranks:
    """``world_size`` processes of a main program in the project's folder; rank r logs to ``log(r)``.

    ``prepare`` is called in each process before the program, to change what is imported.
    """

    def __init__(
        self,
        world_size: int,
        program: str,
        arguments: Sequence[object],
        folder: Path,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._logs = [folder / f"rank_{rank}.log" for rank in range(world_size)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(ROOT)
        self.processes = []
        for rank, log in enumerate(self._logs):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
            variables = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            words = [str(each) for each in arguments]
            log.unlink(missing_ok=True)
            self.processes.append(_SERVER.Process(target=_be_rank, args=(program, words, variables, log, prepare)))
            self.processes[-1].start()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before

    def log(self, rank: int = 0) -> str:
        """What a rank has written so far."""
        return self._logs[rank].read_text() if self._logs[rank].exists() else ""

    def wait_for(self, text: str, rank: int = 0) -> None:
        """Until a rank has written ``text``."""
        while text not in self.log(rank):
            assert self.processes[rank].is_alive(), f"'{text}' never came:\n{self.log(rank)}"
            time.sleep(0.01)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """A signal to some ranks."""
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid or 0, number)

    def wait(self) -> list[int]:
        """Exit codes, in rank order; of a rank that a signal killed, the signal's number below zero."""
        for process in self.processes:
            process.join(_SECONDS)
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.send(signal.SIGKILL, *hanging)
        assert not hanging, f"ranks {hanging} hang:\n" + "\n".join(self.log(rank) for rank in hanging)
        return [process.exitcode for process in self.processes]


def finish(world_size: int, program: str, arguments: Sequence[object], folder: Path) -> str:
    """Run :class:`Ranks` to their end; what the first has written."""
    ranks = Ranks(world_size, program, arguments, folder)
    codes = ranks.wait()
    assert codes == [0] * world_size, "\n".join(map(ranks.log, range(world_size)))
    return ranks.log()


def _be_rank(
    program: str, arguments: list[str], variables: dict[str, str], log: Path, prepare: Callable[[], None] | None
) -> None:
    from egohod import cli

    os.environ.update(variables, CUDA_VISIBLE_DEVICES="")
    os.chdir(ROOT)
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    main = importlib.import_module(program.removesuffix(".py")).main
    if prepare is not None:
        prepare()
    sys.exit(cli.run(main, arguments))


def in_processes(world_size: int, function: Callable[..., None], *arguments: object) -> None:
    """Run ``function(rank, world_size, *arguments)`` in as many processes, until all are done."""
    processes = [_SERVER.Process(target=function, args=(rank, world_size, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_SECONDS)
    assert [process.exitcode for process in processes] == [0] * world_size


class Torchrun:
    """The same under torchrun's agent, which logs to one file and ends the other processes when one fails."""

    def __init__(self, world_size: int, program: Sequence[object], log: Path, *options: str) -> None:
        self._log = log
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]
        command = [*launcher, f"--nproc_per_node={world_size}", *options, *map(str, program)]
        with log.open("wb") as file:
            self.agent = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)

    def log(self) -> str:
        """What agent and processes have written so far."""
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        """Until somebody has written ``text``."""
        while text not in self.log():
            assert self.agent.poll() is None, f"'{text}' never came:\n{self.log()}"
            time.sleep(0.01)

    def send(self, number: signal.Signals, rank: int) -> None:
        """A signal to one rank."""
        for child in Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split():
            if re.search(rf"\0RANK={rank}\0", Path(f"/proc/{child}/environ").read_text()):
                os.kill(int(child), number)
                return
        raise AssertionError(f"no rank {rank}")

    def wait(self, seconds: float = _SECONDS) -> int:
        """The agent's exit code."""
        try:
            return self.agent.wait(seconds)
        except subprocess.TimeoutExpired:
            self.agent.kill()
            raise AssertionError(f"still running after {seconds:g} s:\n{self.log()}") from None


class Pair(Distributed):
    """This process and another one, which sends ``other``; collectives of two real processes are in test_ranks.py."""

    other: object = None

    def gather_objects(self, value: object) -> list[object]:
        return [value, self.other]


def pair(other: object) -> Pair:
    """Rank 0 of a run of two, whose other process sends ``other``."""
    dist = Pair(0, 2, torch.device("cpu"), "gloo")
    # Distributed is frozen.
    object.__setattr__(dist, "other", other)
    return dist
