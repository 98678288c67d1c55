"""Sharded training (FSDP2): each process holds a part of every weight, gradient and average of the optimizer.

:class:`Shards` gives a model two forms. ``module`` is what computes: its blocks gather their weights from all processes
before each pass, let them go afterwards, and reduce their gradients (``fully_shard``). The model that it was made of
keeps its names, but its parameters become this process's parts, plain tensors in the same memory. Optimizer, clipping
and moving average are element-wise, so they work on these parts as they do on whole weights; only a norm needs the
other processes. Not DTensors there: scalars cannot be sharded, and PyTorch's fused operations take no mixture.

Parts are along the first dimension, as ``Tensor.chunk`` cuts it; of a short one the last processes have nothing.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.utils import get_total_norm

from egohod.config import Config
from egohod.distributed import Distributed, host_name, pick_precision
from egohod.errors import UserError
from egohod.model.dual_encoder import RECOMPILE_LIMIT, DualEncoder
from egohod.model.vision import Block
from egohod.runtime import file_hash

try:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor
except ImportError as error:  # this module is imported by sharded runs alone
    raise UserError(f"train.sharding needs PyTorch 2.8 or later; this is {torch.__version__}") from error

log = logging.getLogger(__name__)


def mesh_shape(sharding: str, shard_processes: int | None, dist: Distributed) -> tuple[int, int]:
    """Copies of the weights in the run, and processes that share each copy. Collective.

    Args:
        sharding: ``train.sharding``, fsdp or hsdp.
        shard_processes: ``train.shard_processes``; None is the processes of one node.
        dist: this process in the run.

    Raises:
        UserError: on every process, if there is nobody to share with or the processes cannot be grouped.
    """
    world, key = dist.world_size, f"train.sharding={sharding}"
    if world == 1:
        raise UserError(
            f"{key} splits the weights over processes, but this run has one: start several with torchrun "
            "--nproc_per_node=N, or set train.sharding=none"
        )
    if sharding == "fsdp":
        return 1, world
    hosts = dist.gather_objects(host_name())
    shared = shard_processes or hosts.count(hosts[0])
    # Neighbours in the order of ranks form a group: those of a node, whose links are fast.
    if shard_processes is None and any(hosts[i : i + shared] != [hosts[i]] * shared for i in range(0, world, shared)):
        raise UserError(f"{key}: the nodes have different numbers of processes; set train.shard_processes")
    if world % shared or shared == 1:
        allowed = ", ".join(str(n) for n in range(2, world + 1) if world % n == 0)
        raise UserError(
            f"{key}: weights cannot be split over {shared} of {world} processes; set train.shard_processes to one of "
            f"{allowed}"
        )
    return world // shared, shared


class ShardedScaler(torch.amp.GradScaler):
    """A loss scaler that skips a step on all processes if a gradient is not finite on one.

    PyTorch's ShardedGradScaler does so too, but its flag has a shape that the fused optimizers refuse.
    """

    def _unscale_grads_(self, *args: Any) -> dict[torch.device, Tensor]:
        flags = super()._unscale_grads_(*args)
        for flag in flags.values():
            # Not their sum: the fused optimizers skip a step if the flag is exactly 1.
            torch_dist.all_reduce(flag, torch_dist.ReduceOp.MAX)
        return flags


class Shards:
    """A model whose weights are split over processes, see the head of this module.

    ``model`` is whole before and has this process's parts afterwards. Collective, as every method is unless it says
    otherwise. Raises :class:`UserError` as :func:`mesh_shape` does.
    """

    def __init__(self, model: DualEncoder, cfg: Config, dist: Distributed) -> None:
        copies, shared = mesh_shape(cfg.train.sharding, cfg.train.shard_processes, dist)
        if copies == 1:
            mesh = init_device_mesh(dist.device.type, (shared,), mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh(dist.device.type, (copies, shared), mesh_dim_names=("replicate", "shard"))
        self._world_size, self._control, self._group = dist.world_size, dist.control, mesh.get_group("shard")
        # Of its own: checkpoints are written by a thread, whose messages must not mix with those of the run.
        self._writers = dist.new_control(cfg.train.collective_timeout)
        for parameter in model.parameters():
            # As DistributedDataParallel does: all start from the first process's weights.
            torch_dist.broadcast(parameter.data, 0)
        # The same parameters in other modules: fully_shard replaces them there, and leaves those of ``model`` alone.
        self.module = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        self.module.is_sharded = True
        self._shard(mesh, cfg, dist)

        sharded = dict(self.module.named_parameters())
        self._parts: dict[str, tuple[nn.Parameter, DTensor]] = {}
        self._scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                shard = sharded[name]
                if isinstance(shard, DTensor):
                    self._parts[name] = parameter, shard
                    # The same memory: what the optimizer changes here is what ``module`` gathers next.
                    parameter.data = shard.to_local()
        whole = sum(shard.numel() for _, shard in self._parts.values())
        log.info(
            "train.sharding=%s: %.1f M parameters split over %d processes, %d cop%s",
            cfg.train.sharding, whole / 1e6, shared, copies, "y" if copies == 1 else "ies",
        )  # fmt: skip

    def _shard(self, mesh: DeviceMesh, cfg: Config, dist: Distributed) -> None:
        """Make each block, each adapter and the rest of ``module`` a unit that gathers its weights at once."""
        dtype = pick_precision(cfg.train.precision, dist.device)
        reduced = torch.bfloat16 if cfg.train.gradient_dtype == "bf16" else torch.float32
        # What is between blocks stays in float32 under autocast, as it does without sharding.
        exact = MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)
        # Blocks are gathered in the type they compute in: half the bytes, and autocast has nothing to copy.
        low = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, reduced, cast_forward_inputs=False)
        for block in self._blocks():
            adapter = getattr(block, "adapter", None)
            if isinstance(adapter, nn.Module):
                # Called outside of its block, so it gathers by itself.
                fully_shard(adapter, mesh=mesh, mp_policy=exact)
            # On CPUs the norms of other libraries' blocks take weights of their input's type alone.
            takes_low = isinstance(block, Block) or dist.device.type == "cuda"
            fully_shard(block, mesh=mesh, mp_policy=low if takes_low else exact)
            block.frozen_call = _FrozenCall(block)
        # Scalars are whole everywhere, and their gradients are averaged in collect_gradients.
        scalars = {parameter for parameter in self.module.parameters() if parameter.ndim == 0}
        fully_shard(self.module, mesh=mesh, mp_policy=exact, ignored_params=scalars)

    def _blocks(self) -> list[Any]:
        """The blocks of all towers; no collective."""
        lists = (part for name, part in self.module.named_modules() if name.endswith("resblocks"))
        return [block for part in lists for block in part.children()]

    def compile(self, backend: Any = "inductor") -> None:
        """As :meth:`DualEncoder.compile_towers`, each block between its gathering and its letting go."""
        torch._dynamo.config.cache_size_limit = RECOMPILE_LIMIT
        for module in self.module.modules():
            # PyTorch would take a block compiled for one call or block for any other: of sharded modules it checks
            # neither settings, such as the rate of stochastic depth, nor whether weights are constants.
            vars(module)["_is_fsdp_managed_module"] = False
        blocks, of_text = self._blocks(), set(self.module.textual.modules())
        adapters = [block.adapter for block in blocks if isinstance(getattr(block, "adapter", None), nn.Module)]
        stem = getattr(self.module.visual, "motion_stem", None)
        for module in (*blocks, *adapters, *([] if stem is None else [stem])):
            # The text length changes from batch to batch.
            compiled = torch.compile(_forward, dynamic=module in of_text, fullgraph=True, backend=backend)
            module.forward = partial(compiled, module)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Hand the gradients of ``module`` to the model's parameters, for which they are the mean of all processes."""
        for parameter, shard in self._parts.values():
            gradient: Any = shard.grad
            parameter.grad = None if gradient is None else gradient.to_local()
            # Or the next step would add to it.
            shard.grad = None
        for parameter in self._scalars:
            if parameter.grad is not None:
                torch_dist.all_reduce(parameter.grad)
                parameter.grad /= self._world_size

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients, a scalar on the device."""
        squares = get_total_norm([each.grad for each, _ in self._parts.values() if each.grad is not None]).square()
        torch_dist.all_reduce(squares, group=self._group)
        # Those of scalars are the same in every process, so they count once.
        rest = get_total_norm([each.grad for each in self._scalars if each.grad is not None]).square()
        return (squares + rest.to(squares.device)).sqrt()

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole of the parameter ``name``, or of an average of it, of which ``part`` is this process's."""
        return self.distributed(name, part).full_tensor() if name in self._parts else part

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a parameter, or of an average of it: a view of ``whole``; no collective."""
        if name not in self._parts:
            return whole
        chunks, rank = whole.chunk(self._group.size()), self._group.rank()
        return chunks[rank] if rank < len(chunks) else whole[:0]

    def distributed(self, name: str, part: Tensor | None = None) -> DTensor:
        """``part`` (None: an empty one) as what torch.distributed.checkpoint writes and reads; no collective."""
        parameter, shard = self._parts[name]
        return DTensor.from_local(
            torch.empty_like(parameter) if part is None else part, shard.device_mesh, shard.placements,
            run_check=False, shape=shard.shape, stride=shard.stride(),
        )  # fmt: skip

    def __contains__(self, name: str) -> bool:
        """Whether the parameter ``name`` is split; no collective."""
        return name in self._parts

    @contextmanager
    def gathered(self, model: DualEncoder) -> Iterator[DualEncoder]:
        """Within, the model, or a copy of it, has whole weights.

        For evaluation, where each process embeds as many clips as it has: blocks that gather would have to wait for one
        another. It takes the memory of all weights.
        """
        parts = {name: parameter.data for name, parameter in model.named_parameters()}
        try:
            self.gather(model)
            yield model
        finally:
            for name, parameter in model.named_parameters():
                parameter.data = parts[name]

    @torch.no_grad()
    def gather(self, model: DualEncoder) -> None:
        """Give the model, or a copy of it, whole weights."""
        for name, parameter in model.named_parameters():
            parameter.data = self.whole(name, parameter.data)

    def write(self, folder: Path, tensors: Mapping[str, DTensor]) -> dict[str, str]:
        """Write each process's parts to a file of its own in ``folder``; SHA-256 by name of all files.

        Called by one thread of each process. Raises :class:`UserError` on all if one of them cannot write.
        """
        try:
            # Files of safetensors: the library's own format has an index that is unpickled, which could run code.
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(dict(tensors), storage_writer=writer, process_group=self._writers)
        except dcp.api.CheckpointException as error:
            first = next(iter(error.failures.items()))
            raise UserError(f"{folder}: process {first[0]} failed: {' '.join(str(first[1][0]).split())}") from error
        problem, mine = "", dict[str, str]()
        try:
            # Each process reads back its own file, which is then still in its node's memory.
            mine = {path.name: file_hash(path) for path in folder.glob(f"shard-{torch_dist.get_rank() + 1:05d}-*")}
        except OSError as error:
            problem = f"{host_name()}: {error}"
        answers: list[Any] = [None] * self._world_size
        torch_dist.all_gather_object(answers, (problem, mine), group=self._writers)
        if problem := next((text for text, _ in answers if text), ""):
            raise UserError(problem)
        return {name: value for _, sums in answers for name, value in sums.items()}


def read_parts(folder: Path, shards: Shards | None) -> dict[str, Tensor]:
    """What :meth:`Shards.write` wrote, by name: this process's parts, or whole tensors on the host without ``shards``.

    The number of processes may be another one than when it was written. Collective with ``shards``.
    """
    reader, state = HuggingFaceStorageReader(str(folder)), dict[str, Any]()
    stored: Any
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        # exp_avg/visual.conv1.weight
        name = key.partition("/")[2]
        state[key] = shards.distributed(name) if shards else torch.empty(stored.size, dtype=stored.properties.dtype)
    group = shards._control if shards else None
    with warnings.catch_warnings():
        # Of one process, which no_dist says.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, process_group=group, no_dist=shards is None)
    return {key: value.to_local() if shards else value for key, value in state.items()}


class _FrozenCall:
    """Calls a sharded block with its weights as constants (:func:`egohod.model.vision.call_frozen`).

    Outside of the call a block has no weights that one could detach, and what one puts in their place is overwritten
    when it gathers them. So they are made constants in between: behind the hook that gathers them, before the block
    computes. What was recorded then stays so.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block, self._is_active, self._constants = block, False, list[nn.Parameter]()
        # Hooks are called in the order in which they came: fully_shard's was the first.
        block.register_forward_pre_hook(self._make_constant)

    def __call__(self, *inputs: Any) -> Tensor:
        """As the block."""
        self._is_active = True
        try:
            output: Tensor = self._block(*inputs)
            return output
        finally:
            # Also when a checkpointed block that is computed again is stopped as soon as it has what it needs.
            self._is_active = False
            for parameter in self._constants:
                parameter.requires_grad_(True)
            self._constants = []

    def _make_constant(self, block: nn.Module, _: Any) -> None:
        if self._is_active:
            named = block.named_parameters()
            # An adapter is a part of its block, but called outside of it and trained.
            self._constants = [each for name, each in named if each.requires_grad and not name.startswith("adapter.")]
            for parameter in self._constants:
                parameter.requires_grad_(False)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a module computes, without the hooks around it, which communicate."""
    return type(module).forward(module, *args, **kwargs)
