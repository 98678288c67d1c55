"""Join the processes of a run: device, backend, precision, and what all processes must agree on.

Rank and world size come from :func:`egohod.runtime.rank_info`, which programs ask before they load PyTorch. The
processes watch each other by no means of their own: torchrun and ``srun --kill-on-bad-exit=1`` end a run of which one
process died, and the process group's timeout ends one that hangs (tests/training/test_ranks.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import logging
import os
import platform
import socket
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
from egohod.runtime import (
    RankInfo,
    StopRequest,
    content_hash,
    int_variable,
    nvidia_driver,
    rank_info,
    torch_advice,
)

# How long the first process waits for the others to start, and they for it. A node that loads PyTorch from a busy
# shared disk takes minutes.
MEETING_SECONDS = 600
_LOOKUP_SECONDS = 10.0
_OUT_OF_MEMORY = ("out of memory", "_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
_INTERFACE_HINT = (
    "on all nodes GLOO_SOCKET_IFNAME and, for GPUs, NCCL_SOCKET_IFNAME must name the network interface that reaches "
    "the other nodes"
)

log = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------------
# The processes of a run
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distributed:
    """One process and its place in the run."""

    rank: int
    world_size: int
    device: torch.device
    backend: str | None
    # Decisions between processes travel over gloo, so that asking never waits for the GPU.
    control: Any = None
    store: Any = field(default=None, compare=False)
    stop: StopRequest = field(default_factory=StopRequest, compare=False)
    # Among the processes of this node: one of them reads what all need.
    local_rank: int = 0
    _more_controls: list[Any] = field(default_factory=list, init=False, compare=False)

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

    def sum(self, *counts: int) -> list[int]:
        """Each of ``counts`` summed over all processes; every process gets the same sums."""
        if self.world_size == 1:
            return list(counts)
        # On the CPU, over gloo: the sums are there at once, whatever the GPU still has to do.
        sums = torch.tensor(counts)
        dist.all_reduce(sums, group=self.control)
        return sums.tolist()

    def new_control(self, timeout: float) -> Any:
        """Another group over gloo, for a thread whose messages must not mix with those of ``control``; collective."""
        self._more_controls.append(dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout)))
        return self._more_controls[-1]

    def is_first_with(self, message: str) -> bool:
        """Whether no other process has asked this for the same message: a mistake of all is printed once.

        Not collective: it is asked on the way out, when others may be gone, and the answer is then true.
        """
        return self._count(message, 1) <= 1

    def wait_for_others_with(self, message: str, seconds: float) -> None:
        """Wait until every process has asked :meth:`is_first_with` for ``message``, at most ``seconds``.

        The first process may hold the store in which they ask: it must not leave before the others have.
        """
        end = time.monotonic() + seconds
        while 0 < self._count(message, 0) < self.world_size and time.monotonic() < end:
            time.sleep(0.05)

    def _count(self, message: str, more: int) -> int:
        """How many processes have this message, with ``more``; 0 if the store is gone."""
        if self.world_size > 1:
            with contextlib.suppress(RuntimeError):
                return int(self.store.add(f"egohod/message/{content_hash(message)}", more))
        return 0

    def close(self, *, after_error: bool = False) -> None:
        """Leave the process groups; ``after_error`` without waiting for the other processes."""
        if self.world_size > 1:
            # NCCL may wait here for collectives that the others never join, and no launcher would notice the error
            # before the timeout. Its group ends with the process; gloo's threads abort a process that leaves them.
            only_gloo = after_error and self.backend == "nccl"
            for group in (self.control, *self._more_controls) if only_gloo else (None,):
                dist.destroy_process_group(group)

    def __str__(self) -> str:
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"cpu ({torch.get_num_threads()} threads)"
        return f"{name}, {self.world_size} process{f'es over {self.backend}' if self.world_size > 1 else ''}"


def setup(
    device: str = "auto",
    *,
    alone: bool = False,
    inference: bool = False,
    timeout: float = 1800.0,
    deterministic: bool = False,
) -> Distributed:
    """Join the run that torchrun or Slurm describes in the environment, or be its only process.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``. NCCL joins GPUs, gloo CPUs.
        alone: this program is one process, whatever the environment says.
        inference: nothing is trained, so that a Mac's GPU may be used.
        timeout: seconds that a process waits for the others in a collective operation before that raises.
        deterministic: see :func:`use_deterministic_algorithms`.

    Raises:
        UserError: a GPU was asked for, or is plugged in, but torch cannot use it; or the processes do not meet within
            ``EGOHOD_MEETING_SECONDS`` (ten minutes), or meet but cannot exchange data.
    """
    info = RankInfo() if alone else rank_info()
    if deterministic:
        # Before CUDA is initialised, which reads the environment once.
        use_deterministic_algorithms()
    chosen = pick_device(device, info, inference=inference)
    if chosen.type == "cuda":
        # Before anything else touches CUDA, or every process would open a context on the first GPU.
        torch.cuda.set_device(chosen)
        require_kernels(chosen)
        # What is left of float32 in training (embeddings, losses) may use TF32; evaluation switches it off.
        torch.set_float32_matmul_precision("high")
    if info.world_size == 1:
        return Distributed(0, 1, chosen, None)
    backend, limit = "nccl" if chosen.type == "cuda" else "gloo", datetime.timedelta(seconds=timeout)
    store = _meet(info)
    try:
        dist.init_process_group(backend, store=store, rank=info.rank, world_size=info.world_size, timeout=limit)
        control = dist.new_group(backend="gloo", timeout=limit)
        # NCCL connects in its first collective: a network that it cannot use is an error now, not in the first step.
        dist.all_reduce(torch.zeros(1, device=chosen))
    except RuntimeError as error:
        # Logged by every process, since the cause may be one node's alone; the cure is the same for all.
        log.error("%s cannot exchange data: %s", host_name(), first_lines(error))
        raise UserError(
            f"the processes met at {info.address}:{info.port}, but cannot exchange data over {backend}: "
            f"{first_lines(error, 1)}; {_INTERFACE_HINT} (this node has {_interfaces()}; docs/launching.md)"
        ) from error
    return Distributed(info.rank, info.world_size, chosen, backend, control, store, local_rank=info.local_rank)


def _meet(info: RankInfo) -> dist.Store:
    """The store through which the processes find each other; returns when all are there."""
    seconds = int_variable(os.environ, "EGOHOD_MEETING_SECONDS", MEETING_SECONDS)
    where = f"{info.address}:{info.port}"
    end = time.monotonic() + min(seconds, _LOOKUP_SECONDS)
    while True:
        try:
            socket.getaddrinfo(info.address, info.port)
            break
        except OSError as error:
            # torch would look the name up again and again until the time to meet is over. A name server may be busy
            # for a moment, so it is not the first failure that counts.
            if time.monotonic() > end:
                raise UserError(
                    f"{info.address}, the node of the first process, does not resolve to an address on {host_name()} "
                    f"({error.strerror or error}); set MASTER_ADDR to its address, or name it in /etc/hosts"
                ) from error
            time.sleep(1.0)
    # Where torch reads them; Slurm sets neither.
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = info.address, str(info.port)
    log.info(
        "%d processes meet at %s within %d s; to run a single process in the shell of a Slurm step: "
        "env -u SLURM_STEP_ID -u WORLD_SIZE ...",
        info.world_size, where, seconds,
    )  # fmt: skip
    try:
        limit = datetime.timedelta(seconds=seconds)
        store, _, _ = next(rendezvous("env://", info.rank, info.world_size, timeout=limit))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"port {info.port} of {info.address} is taken; set MASTER_PORT to a free one") from error
        # On one node no interface can be the wrong one.
        is_local = info.address in ("127.0.0.1", "localhost")
        hint = "" if is_local else f"; {_INTERFACE_HINT}, and MASTER_ADDR an address on it (here: {_interfaces()})"
        raise UserError(
            f"process {info.rank} of {info.world_size} did not meet the others at {where} within {seconds} s "
            f"(MASTER_ADDR, MASTER_PORT, EGOHOD_MEETING_SECONDS): {first_lines(error, 1)}{hint}"
        ) from error
    # torchrun's own store outlives the processes that it restarts, with the addresses of the dead ones in it, to which
    # gloo would connect. exps/launch.sh sets TORCH_DISABLE_SHARE_RDZV_TCP_STORE; this is for a plain torchrun.
    return dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _interfaces() -> str:
    """Network interfaces of this node that are up, with their addresses: ``eth0 10.0.0.3, ib0 10.1.0.3``."""
    import psutil

    is_up = {name: state.isup for name, state in psutil.net_if_stats().items()}
    interfaces = [
        f"{name} {address.address}"
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and is_up.get(name)
    ]
    return ", ".join(interfaces) or "no interface with an IPv4 address"


def first_lines(error: BaseException, count: int = 4) -> str:
    """The type and the first ``count`` lines of an error as one line of a log: NCCL's cause is in the last of four."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:count]
    return f"{type(error).__name__}: {' | '.join(lines)}"[:1000]


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective operation failed because another process is gone or did not come in time."""
    # gloo raises plain RuntimeErrors, whose text is all there is to tell them by.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed because the memory of a GPU, or of the CPU's allocator, ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # What takes memory beside PyTorch's allocator raises RuntimeErrors of other kinds: CUDA itself, NCCL ("Cuda failure
    # 2 'out of memory'"), cuBLAS for its workspace, cuDNN. So does the CPU's allocator.
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _OUT_OF_MEMORY)


def gather_with_grad(value: Tensor, world_size: int) -> Tensor:
    """``value`` [B, ...] of all processes, in rank order: [world_size * B, ...].

    Gradients of the answer flow back to the process that each part came from, summed over the processes.
    """
    if world_size == 1:
        return value
    if not value.is_floating_point():
        # Labels and indices: no gradient to route back, so the plain operation will do.
        parts = [torch.empty_like(value) for _ in range(world_size)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)
    # Not dist.all_gather, whose outputs have no gradient.
    return torch.cat(dist_nn.all_gather(value.contiguous()))


def require_agreement(cfg: Any, dist: Distributed) -> None:
    """Raise the same :class:`UserError` on every process unless all run the same code with the same settings.

    ``cfg`` is a dataclass of settings. The message names the nodes and what differs. Collective.
    """
    mine = {"the code of egohod": source_hash(), "Python": platform.python_version(), "torch": torch.__version__}
    mine |= _flatten(dataclasses.asdict(cfg))
    everyone = dist.gather_objects((host_name(), mine))
    problems = []
    for name in dict.fromkeys(name for _, values in everyone for name in values):
        hosts: dict[str, list[str]] = {}
        for rank, (host, values) in enumerate(everyone):
            hosts.setdefault(str(values.get(name, "absent")), []).append(f"{host} (rank {rank})")
        # Where files are may differ from node to node.
        if len(hosts) > 1 and not name.endswith((".root", ".cache")):
            parts = []
            for value, ranks in hosts.items():
                more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
                parts.append(f"{value} on {', '.join(ranks[:3])}{more}")
            problems.append(f"the processes of this run disagree on {name}: {'; '.join(parts)}")
    if problems:
        raise UserError(*problems)


def source_hash(package: Path = Path(__file__).parent) -> str:
    """A fingerprint of the package's files, for code that is not in a git checkout too."""
    content = hashlib.sha256()
    # Sorted, and relative to the package: the same on every node, wherever it is installed.
    for path in sorted(package.rglob("*.py")):
        content.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return content.hexdigest()[:12]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted name."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, inner in tree.items()
        for name, value in _flatten(inner, f"{prefix}.{key}".lstrip(".")).items()
    }


# --------------------------------------------------------------------------------------------------
# Device and precision
# --------------------------------------------------------------------------------------------------


def pick_device(device: str, info: RankInfo | None = None, *, inference: bool = False) -> torch.device:
    """The device of the process ``info`` (default: the only one).

    A Mac's GPU (``mps``) is for ``inference`` alone, by a single process. A machine whose GPU torch cannot reach is an
    error, not a reason to train on the CPU for a week unnoticed; ``device="cpu"`` or an empty ``CUDA_VISIBLE_DEVICES``
    says that it is meant.
    """
    if device == "cpu":
        return torch.device("cpu")
    is_single = info is None or info.world_size == 1
    if device == "mps" and not (inference and is_single and torch.backends.mps.is_available()):
        why = "is for evaluation, search and predictions" if not inference else "is for one process"
        why = why if torch.backends.mps.is_available() else f"is not available on {host_name()}"
        raise UserError(f"train.device=mps: a Mac's GPU {why}; use train.device=auto")
    if device == "mps" or (device == "auto" and inference and is_single and torch.backends.mps.is_available()):
        return torch.device("mps")
    if torch.cuda.is_available():
        info, visible = info or RankInfo(), torch.cuda.device_count()
        if info.owns_gpus:  # --gpus-per-task: this process sees its own GPU only, as number 0
            return torch.device("cuda", info.local_rank % visible)
        if info.local_rank >= visible:
            raise UserError(f"process {info.local_rank} of this node has no GPU: only {visible} visible")
        return torch.device("cuda", info.local_rank)
    driver, job = nvidia_driver(), os.environ.get("SLURM_JOB_ID")
    # A job that asked for no GPU sees none, whatever its node has.
    hint = f": Slurm job {job} may have asked for none (--gpus-per-node)" if job else ""
    if driver and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise UserError(
            f"an NVIDIA device is present (driver {driver}) but torch {torch.__version__} (built for CUDA "
            f"{torch.version.cuda or 'none: a CPU build'}) cannot use it{hint}; install a matching torch or driver "
            f"({torch_advice(driver)}), or set train.device=cpu"
        )
    if device == "cuda":
        raise UserError(
            f"train.device=cuda, but no NVIDIA device was found on {host_name()}{hint}; use train.device=auto"
        )
    return torch.device("cpu")


def require_kernels(device: torch.device) -> None:
    """Raise :class:`UserError` if this build of torch has no code for the GPU ``device``.

    torch only warns, and the first operation on the GPU fails with "no kernel image is available".
    """
    capability, builds = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    for build in builds:  # sm_75, sm_90a, compute_120
        major, minor = divmod(int("".join(filter(str.isdigit, build)) or 0), 10)
        # Machine code runs on GPUs of its generation from its own version up; PTX is compiled for all later ones.
        is_later = (major, minor) <= capability
        if is_later and (major == capability[0] or build.startswith("compute_")):
            return
    if builds and torch.version.hip is None:
        raise UserError(
            f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(device)}, of compute capability "
            f"{'.'.join(map(str, capability))}, only for {', '.join(builds)}; "
            f"{torch_advice(nvidia_driver() or '', capability)}"
        )


def host_name() -> str:
    """What people call the node of this process."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def use_deterministic_algorithms() -> None:
    """Compute the same bits from the same input every time, for the rest of this process.

    For the same GPU, driver, versions and number of processes. What has no such algorithm on a GPU raises an error that
    names the operation. Call it before CUDA is initialised.
    """
    # The two workspaces with which cuBLAS is deterministic (its manual, "Results reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Sums within NVSwitch are in no fixed order; trees and rings of the same processes are.
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
    # Affects cuDNN, attention's backward pass, embeddings, gather, and the kernels that torch.compile chooses.
    torch.use_deterministic_algorithms(True)
    # cuDNN would try its algorithms and take the one that was fastest this time.
    torch.backends.cudnn.benchmark = False
    # For finding reads of uninitialised memory, which is filled at some cost; nothing here reads any.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """PyTorch on one core within: for networks so small that waiting for other cores, which may be busy, costs more.

    Their results then do not depend on the number of cores or processes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    # Products and convolutions have settings of their own, global to the process: put back as they were.
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
    if device.type == "mps":
        return torch.float32  # whether its bf16 is fast and good enough has not been measured
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if capable else torch.float32
