"""Joins the processes of a run: device, backend and how they meet are decided here and nowhere else.

Rank and world size come from :mod:`egohod.place`, which programs ask before they load PyTorch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from egohod.errors import UserError
from egohod.place import Place, find_place, number
from egohod.stopping import StopRequest

# How long the first process waits for the others to start, and they for it. A node that loads PyTorch from a busy
# shared disk takes minutes.
MEETING_SECONDS = 600
# After so long the others are more likely absent than late.
_NOTICE_SECONDS = 15.0
_LOOKUP_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distributed:
    """One process and its place in the run."""

    rank: int
    world_size: int
    device: torch.device
    backend: str | None
    # Decisions between processes travel over gloo, so that asking never waits for the GPU.
    control: Any = None
    stop: StopRequest = field(default_factory=StopRequest, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def gather_objects(self, value: Any) -> list[Any]:
        """``value`` of every process, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on at least one process; every process gets the same answer."""
        if self.world_size == 1:
            return flag
        answer = torch.tensor([int(flag)])
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self.control)
        return bool(answer.item())

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def __str__(self) -> str:
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"cpu ({torch.get_num_threads()} threads)"
        )
        return f"{name}, {self.world_size} process{'es over ' + str(self.backend) if self.world_size > 1 else ''}"


def setup(device: str = "auto", *, alone: bool = False) -> Distributed:
    """Join the run that torchrun or Slurm describes in the environment, or be its only process.

    ``device`` is ``auto``, ``cpu`` or ``cuda``. NCCL joins GPUs, gloo CPUs. A program that knows no other processes is
    ``alone`` whatever the environment says. Raises :class:`UserError` when a GPU was asked for, or is plugged in, but
    torch cannot use it, and when the processes do not meet within ``EGOHOD_MEETING_SECONDS`` (ten minutes).
    """
    place = Place() if alone else find_place()
    chosen = pick_device(device, place)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if place.world_size == 1:
        return Distributed(0, 1, chosen, None)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=_meet(place),
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(minutes=30),
    )
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=60))
    return Distributed(place.rank, place.world_size, chosen, backend, control)


def _meet(place: Place) -> dist.Store:
    """The store through which the processes find each other; returns when all are there."""
    seconds = number(os.environ, "EGOHOD_MEETING_SECONDS", MEETING_SECONDS)
    place = dataclasses.replace(place, address=_reachable(place, seconds))
    where = f"{place.address}:{place.port}"
    # Where torchrun reads them; Slurm sets neither.
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.address, str(place.port)
    missed = (
        f"process {place.rank} of {place.world_size} did not meet the others at {where} within {seconds} s "
        "(MASTER_ADDR, MASTER_PORT, EGOHOD_MEETING_SECONDS)"
    )
    # At a port where a stranger listens and says nothing, torch waits for ever.
    watch = threading.Timer(seconds + 5, _give_up, [missed])
    notice = threading.Timer(
        _NOTICE_SECONDS,
        log.warning,
        [
            "process %d of %d waits for the others at %s, for %d s at most; if it is meant to be alone, as in the "
            "shell of a Slurm step: env -u SLURM_STEP_ID -u WORLD_SIZE ...",
            place.rank, place.world_size, where, seconds,
        ],
    )  # fmt: skip
    for timer in (watch, notice):
        timer.daemon = True
        timer.start()
    try:
        store, _, _ = next(
            rendezvous("env://", place.rank, place.world_size, timeout=datetime.timedelta(seconds=seconds))
        )
        return _own_store(store, place, seconds) if _is_kept_by_torchrun() else store
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"port {place.port} of {place.address} is taken; set MASTER_PORT to a free one") from error
        raise UserError(f"{missed}: {str(error).splitlines()[0]}") from error
    finally:
        watch.cancel()
        notice.cancel()


def _reachable(place: Place, seconds: float) -> str:
    """The address of the first process; on a node whose own name means nothing, that of the loopback if all are here.

    torch would look the name up again and again until the time to meet is over.
    """
    end = time.monotonic() + min(seconds, _LOOKUP_SECONDS)
    while True:
        try:
            socket.getaddrinfo(place.address, place.port)
            return place.address
        except OSError as error:
            if place.on_one_node:
                log.info("%s does not resolve to an address; all processes are here: 127.0.0.1", place.address)
                return "127.0.0.1"
            # A name server may be busy for a moment.
            if time.monotonic() > end:
                raise UserError(
                    f"{place.address}, the node of the first process, does not resolve to an address on {host_name()} "
                    f"({error.strerror or error}); set MASTER_ADDR to its address, or name it in /etc/hosts"
                ) from error
        time.sleep(1.0)


def _is_kept_by_torchrun() -> bool:
    """Whether the store outlives the processes, with all that they wrote into it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _own_store(kept: dist.Store, place: Place, seconds: float) -> dist.Store:
    """A store of these processes alone, which the first one serves and announces in the ``kept`` one.

    After a restart torchrun's still holds the addresses of processes that are dead, and gloo waits for these. Here
    what is announced by a dead process is noticed, since nobody answers at its port, and looked up again.
    """
    timeout = datetime.timedelta(seconds=seconds)
    if place.rank == 0:
        own = dist.TCPStore(place.address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        kept.set("egohod/port", str(own.port))
        return own
    end = time.monotonic() + seconds
    while True:
        try:
            own = dist.TCPStore(place.address, int(kept.get("egohod/port")), timeout=datetime.timedelta(seconds=2))
        except dist.DistError:
            if time.monotonic() > end:
                raise
            continue
        own.set_timeout(timeout)
        return own


def _give_up(message: str) -> None:
    """End the process although its main thread does not return from torch."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(2)


def gather_with_grad(value: Tensor, world_size: int) -> Tensor:
    """``value`` [B, ...] of all processes, in rank order: [world_size * B, ...].

    Gradients of the answer flow back to the process that each part came from, summed over the processes.
    """
    if world_size == 1:
        return value
    if not value.is_floating_point():
        parts = [torch.empty_like(value) for _ in range(world_size)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)
    return torch.cat(dist_nn.all_gather(value.contiguous()))


def pick_device(device: str, place: Place | None = None) -> torch.device:
    """The device of the process at ``place`` (default: the only one).

    A machine whose GPU torch cannot reach is an error, not a reason to train on the CPU for a week
    unnoticed; ``device="cpu"`` or an empty ``CUDA_VISIBLE_DEVICES`` says that it is meant.
    """
    if device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        place, visible = place or Place(), torch.cuda.device_count()
        if place.owns_gpus:
            return torch.device("cuda", place.local_rank % visible)
        if place.local_rank >= visible:
            raise UserError(f"process {place.local_rank} of this node has no GPU: only {visible} visible")
        return torch.device("cuda", place.local_rank)
    driver = nvidia_driver()
    if driver and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise UserError(
            f"an NVIDIA device is present (driver {driver}) but torch {torch.__version__} (built for CUDA "
            f"{torch.version.cuda or 'none: a CPU build'}) cannot use it{_asked_slurm()}; install a matching torch or "
            "driver, or set train.device=cpu"
        )
    if device == "cuda":
        raise UserError(
            f"train.device=cuda, but no NVIDIA device was found on {host_name()}{_asked_slurm()}; use train.device=auto"
        )
    return torch.device("cpu")


def host_name() -> str:
    """What people call the node of this process."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _asked_slurm() -> str:
    """A job that asked for no GPU sees none, whatever its node has."""
    job = os.environ.get("SLURM_JOB_ID")
    return f": Slurm job {job} may have asked for none (--gpus-per-node)" if job else ""


def nvidia_driver(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of the NVIDIA driver if a device is plugged in, whatever torch thinks of it."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout.split()
        return answer[0] if answer else None
    except (OSError, subprocess.SubprocessError):
        pass
    if proc.is_file():
        words = proc.read_text(errors="replace").split()
        return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
    return None


@contextlib.contextmanager
def inference_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to ``dtype`` within; ``torch.float32`` is float32 throughout, without TF32.

    Training lets matrix products of float32 run in TF32 on a GPU (:func:`setup`), and cuDNN does so with convolutions
    (those of motion adapters) unless it is forbidden. Both settings are as before afterwards.
    """
    if dtype != torch.float32:
        with torch.autocast(device.type, dtype):
            yield
        return
    products = torch.get_float32_matmul_precision()
    # Since torch 2.9 convolutions have a setting of their own, and allow_tf32 is deprecated.
    cudnn: Any = torch.backends.cudnn
    owner, name, exact = (
        (cudnn.conv, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
    )
    convolutions = getattr(owner, name)
    torch.set_float32_matmul_precision("highest")
    setattr(owner, name, exact)
    try:
        yield
    finally:
        setattr(owner, name, convolutions)
        torch.set_float32_matmul_precision(products)


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The autocast type; ``torch.float32`` means no autocast.

    ``auto`` is bf16 where the hardware multiplies it natively: a CPU without AVX512-BF16 or AMX emulates it
    a hundred times slower than fp32.
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if capable else torch.float32
