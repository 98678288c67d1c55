"""Which process of the run this one is, from what torchrun or Slurm say in the environment; PyTorch is not loaded.

In this order: ``RANK`` and ``WORLD_SIZE`` (torchrun, also inside a Slurm task); a step of several Slurm tasks (``srun
python main_pretrain.py ...``); else one process, which is also what a plain ``python`` is in the shell of an allocation
or of ``srun --pty bash``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from egohod.errors import UserError

# Below the ports that Linux gives to outgoing connections.
_FIRST_PORT, _PORTS = 20000, 12000


@dataclass(frozen=True)
class Place:
    """One process among those of its run; the first one listens at ``address``:``port`` for the others."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 29500
    owns_gpus: bool = False
    """The visible GPUs are this process's alone, not those of its node."""
    on_one_node: bool = False
    """All processes are known to be on this node."""


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that ``environment`` describes. Raises :class:`UserError` if it describes only half of one."""
    if number(environment, "WORLD_SIZE", 1) > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise UserError(
                    f"WORLD_SIZE={environment['WORLD_SIZE']} is set, but {name} is not: start with torchrun or srun, "
                    "or unset WORLD_SIZE"
                )
        rank, world_size = number(environment, "RANK"), number(environment, "WORLD_SIZE")
        if rank >= world_size:
            raise UserError(f"RANK={rank} in the environment, but WORLD_SIZE={world_size}: ranks count from 0")
        return Place(
            rank=rank,
            world_size=world_size,
            local_rank=number(environment, "LOCAL_RANK", 0),
            address=environment["MASTER_ADDR"],
            port=_port(environment),
            on_one_node=environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"],
        )
    # The shell of an allocation has variables of Slurm, but no step; a step's own number of tasks is what counts.
    if "WORLD_SIZE" in environment or "SLURM_STEP_ID" not in environment:
        return Place()
    if number(environment, "SLURM_STEP_NUM_TASKS", 1) == 1 or _is_in_interactive_shell(environment):
        return Place()
    job, step = number(environment, "SLURM_JOB_ID"), number(environment, "SLURM_STEP_ID")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    return Place(
        rank=number(environment, "SLURM_PROCID"),
        world_size=number(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=number(environment, "SLURM_LOCALID"),
        address=environment.get("MASTER_ADDR") or first_host(nodes),
        # Steps and jobs that run side by side on a node get different ones.
        port=_port(environment, _FIRST_PORT + (8 * job + step) % _PORTS),
        owns_gpus=_gpus_are_bound(environment),
        on_one_node=number(environment, "SLURM_STEP_NUM_NODES", 0) == 1,
    )


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: ``ego[07-09,12],gpu3`` -> ``ego07``, as ``scontrol show hostnames`` says."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def _is_in_interactive_shell(environment: Mapping[str, str]) -> bool:
    """Whether this was started from the shell of ``srun --ntasks=4 --pty bash``, whose other tasks ended at once.

    The steps that such a shell starts inherit its variables, but have no terminal; with ``srun --pty python ...`` the
    task is this process itself.
    """
    if "SLURM_PTY_PORT" not in environment or environment.get("SLURM_TASK_PID") == str(os.getpid()):
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _gpus_are_bound(environment: Mapping[str, str]) -> bool:
    """Whether Slurm shows a task its own GPUs only (``--gpus-per-task``, ``--gpu-bind``)."""
    binding = environment.get("SLURM_GPU_BIND") or environment.get("SLURM_TRES_BIND") or ""
    if "none" in binding:
        return False
    return bool(binding) or "SLURM_GPUS_PER_TASK" in environment


def number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A variable that holds a whole number; ``default`` if it is not set. Raises :class:`UserError`."""
    text = environment.get(name, "" if default is None else str(default))
    if not re.fullmatch("[0-9]{1,18}", text):
        raise UserError(f"{name}={text!r} in the environment is not a number")
    return int(text)


def _port(environment: Mapping[str, str], default: int | None = None) -> int:
    port = number(environment, "MASTER_PORT", default)
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT={port} in the environment is no port; use 1024 to 65535")
    return port
