"""The order of clips in batches (the sampler), and the processes or threads that load them."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import math
import multiprocessing.queues
import os
import re
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from egohod.data.config import DataConfig
from egohod.data.dataset import ClipDataset, Key, collate, collate_views
from egohod.distributed import Distributed, host_name
from egohod.errors import UserError
from egohod.runtime import (
    Interrupted,
    StopRequest,
    become_worker,
    core_numbers,
    core_quota,
    int_variable,
    worker_context,
)

log = logging.getLogger(__name__)

# Constants of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# Batches leave this much of the shared memory free: semaphores of later processes and NCCL need some of it. A container
# of Docker has 64 MB unless it is given more.
SHARED_MEMORY, _RESERVED_BYTES = "/dev/shm", 8_000_000
# More decoding processes than this feed any GPU, and each has batches in shared memory.
_MOST_WORKERS = 16
# How often a process that waits for a batch checks for a request to stop.
_POLL_SECONDS = 1.0
# How long one of several processes still waits for the clips of a step after a request to stop.
_LEAVE_SECONDS = 20.0

Collate = Callable[[Sequence[Any]], dict[str, Any]]
"""Samples to a batch."""


class BatchPlan:
    """Which clips are in which batch: a pure function of (seed, epoch, step).

    Every clip appears at most once an epoch; those that do not fill a batch are left out, other clips each epoch.
    With ``groups`` (int64 [size], see ``ClipTable.group_codes``) about ``share`` of each batch are groups of
    ``group_size`` clips with equal code, as long as there are enough; the rest is drawn from all other clips.

    Raises :class:`UserError` if there are fewer clips than a batch holds.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        groups: np.ndarray | None = None,
        share: float = 0.0,
        group_size: int = 4,
    ) -> None:
        if size < batch_size:
            raise UserError(
                f"a batch needs {batch_size} clips, but there are only {size}; lower train.global_batch_size"
            )
        self.size = size
        self.batch_size = batch_size
        self._seed = seed
        self._groups = groups
        self._group_size = group_size
        self._groups_per_batch = round(share * batch_size) // group_size if groups is not None else 0
        self._epoch = lru_cache(maxsize=2)(self._arrange)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.size // self.batch_size

    def keys(self, step: int) -> np.ndarray:
        """(epoch, clip number) of every clip of the run's batch ``step`` (from 0), int64 [batch_size, 2]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        batch = self.batch(epoch, within)
        return np.stack([np.full_like(batch, epoch), batch], axis=1)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Clip numbers of batch ``step`` (0 .. steps_per_epoch - 1) of ``epoch``, int64 [batch_size]."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(step)
        groups, rest = self._epoch(epoch)
        # Groups are spread evenly over the epoch, also where they are fewer than the batches have room for.
        first, last = (len(groups) * s // self.steps_per_epoch for s in (step, step + 1))
        grouped = groups[first:last].reshape(-1)
        begin = step * self.batch_size - first * self._group_size
        return np.concatenate([grouped, rest[begin : begin + self.batch_size - len(grouped)]])

    def _arrange(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's groups [G, group_size] and all other clips, both shuffled."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, epoch))))
        # Philox: a stream of its own for each (seed, epoch), the same on every machine.
        order = rng.permutation(self.size)
        if not self._groups_per_batch or self._groups is None:
            return np.empty((0, self._group_size), dtype=np.int64), order
        # Sorted by code after shuffling: clips of one code are neighbours, in random order among themselves.
        order = order[np.argsort(self._groups[order], kind="stable")]
        codes = self._groups[order]
        starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
        counts = np.diff(np.append(starts, self.size))
        place = np.arange(self.size) - np.repeat(starts, counts)
        # The last clips of a code that fill no group are drawn as all others.
        full = place < np.repeat(counts // self._group_size * self._group_size, counts)
        groups = rng.permutation(order[full].reshape(-1, self._group_size))
        groups = groups[: self._groups_per_batch * self.steps_per_epoch]
        others = np.ones(self.size, dtype=bool)
        others[groups] = False
        return groups, rng.permutation(np.flatnonzero(others))


class MixedPlan:
    """Batches that hold a fixed share of every source, whatever their sizes; each source has epochs of its own.

    ``plans`` order the clips of one source each and know its share of the batch; ``starts`` are the numbers of the
    sources' first clips. A run's epoch is as many steps as all clips would fill if they were drawn alike.
    """

    def __init__(self, plans: Sequence[BatchPlan], starts: Sequence[int], seed: int) -> None:
        self.plans = plans
        self.batch_size = sum(plan.batch_size for plan in plans)
        self._starts = starts
        self._seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return max(1, sum(plan.size for plan in self.plans) // self.batch_size)

    def keys(self, step: int) -> np.ndarray:
        """(epoch of its source, clip number) of every clip of batch ``step``, int64 [batch_size, 2]."""
        parts = [plan.keys(step) + np.array([0, start]) for plan, start in zip(self.plans, self._starts, strict=True)]
        # Shuffled, so that no process of a run gets the videos of one source only.
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, step))))
        return rng.permutation(np.concatenate(parts))


def shares(weights: Sequence[float], batch_size: int) -> list[int]:
    """``batch_size`` clips divided by ``weights``, in whole clips (largest remainders).

    Raises :class:`UserError` if a weight is too small for a single clip.
    """
    exact = np.array(weights) / sum(weights) * batch_size
    # Largest remainders: no source is off by a whole clip, and the sum is exact.
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: batch_size - counts.sum()]] += 1
    if (counts == 0).any():
        raise UserError(
            f"a source of weight {weights[int(np.argmin(counts))]:g} out of {sum(weights):g} gets no clip of a batch "
            f"of {batch_size}; give it more, or weight 0 to leave it out"
        )
    return counts.tolist()


def worker_count(workers: int | None, dist: Distributed) -> int:
    """The decoding processes of this process by ``data.workers``: None is its share of the cores, less one for itself.

    Collective for None: a core that several processes of the run may use is shared by them, whether torchrun leaves all
    cores to every process or Slurm gives each its own.
    """
    if workers is not None:
        return workers
    here, mine = host_name(), core_numbers()
    of_node = [cores for host, cores in dist.gather_objects((here, mine)) if host == here]
    share = sum(1 / sum(core in cores for cores in of_node) for core in mine)
    # Rounded first: three thirds of a core are one.
    share = round(min(share, core_quota() / len(of_node)), 6)
    count = min(max(1, int(share) - 1), _MOST_WORKERS)
    if dist.is_main and count not in _logged_counts:  # for training and for each set of benchmarks
        _logged_counts.add(count)
        cores = len(set().union(*of_node))
        log.info("data.workers=%d: %d cores for %d training processes of this node", count, cores, len(of_node))
    return count


_logged_counts: set[int] = set()


def train_loader(
    dataset: ClipDataset,
    plan: BatchPlan | MixedPlan,
    *,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    timeout: float = DataConfig.timeout,
    stop: StopRequest | None = None,
) -> ClipLoader:
    """Load this process's micro-batches of the steps [start_step, total_steps), ``accumulation`` per step, in order.

    Of each step's global batch, micro-batch m of process r holds the positions from (m * world_size + r) * b on, b
    clips each. Epochs follow one another without a pause; the worker processes live through all of them. Raises
    :class:`UserError` if the batch cannot be shared evenly. See :class:`ClipLoader` for ``timeout`` and ``stop``; other
    processes wait within the step that this one has no clips for, so it leaves with an error that ends them too.
    """
    if plan.batch_size % (world_size * accumulation):
        raise UserError(
            f"train.global_batch_size={plan.batch_size} cannot be shared evenly by {world_size} processes with "
            f"{accumulation} micro-batches each"
        )
    batches = _TrainBatches(plan, range(start_step, total_steps), rank, world_size, accumulation)
    if workers:
        # The second pass of cached accumulation takes nothing from the loader for most of a step: the workers continue,
        # up to a whole step, or they would be idle meanwhile and the device in the next first pass.
        prefetch = max(prefetch, -(-accumulation // workers))
    return ClipLoader(
        dataset, batches, workers=workers, prefetch=prefetch, pin_memory=pin_memory, timeout=timeout, stop=stop,
        leaves_alone=world_size == 1, clips=plan.batch_size // (world_size * accumulation), accumulation=accumulation,
    )  # fmt: skip


def eval_loader(
    dataset: Dataset[dict[str, Any]],
    indices: Sequence[int],
    batch_size: int,
    workers: int,
    prefetch: int = 2,
    collate: Collate = collate,
    timeout: float = DataConfig.timeout,
    stop: StopRequest | None = None,
    pin_memory: bool = False,
) -> ClipLoader:
    """Load the clips ``indices``, in that order, ``batch_size`` at a time (the last batch may be smaller)."""
    numbers = [int(index) for index in indices]
    batches = [numbers[first : first + batch_size] for first in range(0, len(numbers), batch_size)]
    return ClipLoader(
        dataset, batches, workers=workers, prefetch=prefetch, pin_memory=pin_memory, collate=collate, timeout=timeout,
        stop=stop, clips=batch_size,
    )  # fmt: skip


class EvalLoader:
    """Loader processes that the data sets of several benchmarks share: they start once, and end with the last of them.

    Starting them costs seconds for each benchmark where the parent is large. They start with all data sets that
    were added, and with what those remember of their folders: look for files before the first clip is read.
    """

    def __init__(self) -> None:
        self.datasets: list[ClipDataset] = []
        self.missing: dict[int, dict[int, str]] = {}
        """Clips without a file by the id of their data set, looked for before the processes start; until the last of
        :meth:`finish`."""
        self._loader: ClipLoader | None = None
        self._batches: list[list[tuple[int, int]]] = []
        self._finished: set[int] = set()

    def add(self, dataset: ClipDataset) -> None:
        """Add a data set; processes that run do not have it, and end."""
        self.datasets.append(dataset)
        self.missing.clear()
        self.close()

    def read(
        self,
        dataset: ClipDataset,
        indices: Sequence[int],
        batch_size: int,
        workers: int,
        **options: Any,
    ) -> Iterator[dict[str, Any]]:
        """Batches as of :func:`eval_loader` with ``collate_views``, of a data set that was added or a part of one.

        ``options`` (timeout, stop, pin_memory) are those of :class:`ClipLoader`; they count when processes start.
        """
        if not len(indices):
            return
        number = next(place for place, each in enumerate(self.datasets) if each is dataset.origin)
        # Changed in place, since the loader holds this list.
        self._batches[:] = [
            [(number, int(dataset.rows[index])) for index in indices[first : first + batch_size]]
            for first in range(0, len(indices), batch_size)
        ]
        try:
            if self._loader is None:
                self._loader = ClipLoader(
                    _Joined(self.datasets), self._batches, workers=workers, prefetch=2, collate=collate_views,
                    stays=True, **options,
                )  # fmt: skip
            self._loader.batch_bytes = batch_size * dataset.sample_bytes
            for batch in self._loader:
                batch["index"] = np.searchsorted(dataset.rows, batch["index"])
                batch["faults"] = {
                    int(np.searchsorted(dataset.rows, row)): text for row, text in batch["faults"].items()
                }
                yield batch
        except BaseException:  # also where the caller stops reading: more batches are on their way
            self.close()
            raise

    def finish(self, dataset: ClipDataset) -> None:
        """End the processes if ``dataset`` is the last of all data sets."""
        self._finished.add(id(dataset))
        if len(self._finished) == len(self.datasets):
            self._finished.clear()
            self.missing.clear()
            self.close()

    def close(self) -> None:
        """End the processes; the next batch starts new ones."""
        self._loader = None


class _Joined(Dataset[dict[str, Any]]):
    """Samples of several data sets by (number of the data set, index)."""

    def __init__(self, datasets: Sequence[ClipDataset]) -> None:
        self._datasets = list(datasets)
        self.decoder = self._datasets[0].decoder  # one setting for all
        self.read_ahead = max(each.read_ahead for each in self._datasets)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return self._datasets[key[0]][key[1]]

    def request(self, key: tuple[int, int]) -> None:
        """See :meth:`ClipDataset.request`."""
        self._datasets[key[0]].request(key[1])

    def forget_requests(self) -> None:
        """See :meth:`ClipDataset.forget_requests`."""
        for each in self._datasets:
            each.forget_requests()


class ClipLoader(DataLoader[dict[str, Any]]):
    """A DataLoader whose workers end with their parent and whose failures are one clear :class:`UserError`.

    A batch that does not come within ``timeout`` seconds is an error, and a request to ``stop`` ends the waiting with
    :class:`Interrupted`, or, unless the process ``leaves_alone``, with an error after 20 s: the other processes wait
    for this one within the step. Batches of ``clips`` clips go through shared memory, or through pipes where that is
    too small, of which a warning at the start says what to set. With ``stays`` the processes wait for another iteration
    at the end of one.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, Any]],
        batches: Any,
        *,
        workers: int,
        prefetch: int,
        pin_memory: bool,
        collate: Collate = collate,
        timeout: float = DataConfig.timeout,
        stop: StopRequest | None = None,
        leaves_alone: bool = True,
        clips: int = 0,
        accumulation: int = 1,
        stays: bool = False,
    ) -> None:
        # Small without pixels, as the data sets of tests are.
        self.batch_bytes = clips * getattr(dataset, "sample_bytes", 0)
        self._accumulation = accumulation
        # ``timeout`` is torch's attribute, which here is the interval of polling.
        self._patience, self._stop, self._leaves_alone, self._ready = timeout, stop, leaves_alone, prefetch
        # What the GPU decodes is read by threads: a loader process cannot use the GPU of its parent.
        self._threads = workers if getattr(dataset, "decoder", "") == "cuda" else 0
        workers = 0 if self._threads else workers
        super().__init__(
            _Guarded(dataset),
            batch_sampler=batches,  # the order is ours: torch's samplers cannot resume within an epoch
            num_workers=workers,
            collate_fn=partial(_collate_or_failure, collate=collate),
            pin_memory=pin_memory,
            worker_init_fn=start_worker,
            multiprocessing_context=worker_context() if workers else None,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=stays and workers > 0,
            # Not the user's limit: between polls a request to stop is looked for.
            timeout=_POLL_SECONDS if workers else 0,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Batches as of :func:`~egohod.data.dataset.collate`; raises :class:`UserError`."""
        if self.num_workers:
            check_shared_memory(
                self.batch_bytes, self.num_workers, self.prefetch_factor or 1, self._accumulation, self.pin_memory
            )
        try:
            if self.num_workers:
                multiprocessing.Lock()  # torch's queues need semaphores; its own failure leaves a traceback behind
            if (waiting := self._iterator) is not None:
                # Processes that stayed have to answer first, however busy the machine is.
                waiting._timeout = self._patience
            batches: Any = _Threads(self, self._threads, self._ready) if self._threads else super().__iter__()
            if waiting is not None:
                waiting._timeout = _POLL_SECONDS
        except (OSError, ImportError, RuntimeError) as error:  # RuntimeError: one that stayed has died since
            raise UserError(
                f"data.workers={self.num_workers}: no loader process can be started ({error}; {SHARED_MEMORY} is full, "
                "absent or read-only?); data.workers=0 decodes in the process itself"
            ) from error
        workers = list(getattr(batches, "_workers", ()))  # torch offers no public way to its processes
        _workers.update(workers)
        while True:
            try:
                batch = self._next(batches, workers)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not self.num_workers or isinstance(error, UserError):  # threads' errors are of this process
                    raise
                # One line, however many the library wrote.
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                if "DataLoader worker" in reason:
                    cure = "if memory ran out, lower data.workers or data.prefetch"
                    raise UserError(f"a loader process died ({reason}); {cure}") from error
                raise UserError(f"a batch was lost between a loader process and this one ({reason})") from error
            failure = batch.pop("failure", None)
            if failure is not None:
                try:
                    raise failure
                finally:
                    # An exception that its own frame holds waits for the garbage collector, which closes the queues
                    # before the workers get the message to end: 10 s of waiting.
                    del failure
            yield _received(batch)

    def _next(self, batches: Iterator[dict[str, Any]], workers: Sequence[Any]) -> dict[str, Any]:
        """The next batch; while it waits, checks for a timeout and for a request to stop once a second."""
        start = time.monotonic()
        stop_requested: float | None = None
        while True:
            try:
                return next(batches)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
            now, reason = time.monotonic(), self._stop.reason if self._stop else ""
            stop_requested = stop_requested or (now if reason else None)
            if reason and self._leaves_alone:
                _kill(workers)
                raise Interrupted(reason)
            if stop_requested and now - stop_requested > _LEAVE_SECONDS:
                _kill(workers)
                raise UserError(
                    f"{reason}, but the clips of the step to finish did not come within {_LEAVE_SECONDS:.0f} s; rerun "
                    "to resume from the last checkpoint"
                )
            if now - start > self._patience:
                _kill(workers)
                raise UserError(
                    f"no batch of clips came for {self._patience:g} s (data.timeout): a file system or server that "
                    "does not answer, or too few data.workers"
                )


class _Threads:
    """Batches of a loader in order, read ahead by threads of this process; raises as torch's own iterator does."""

    def __init__(self, loader: ClipLoader, threads: int, prefetch: int) -> None:
        self._loader, self._keys, self._limit = loader, iter(loader.batch_sampler or ()), threads * prefetch
        # A GPU's current stream belongs to a thread, and so does its current device, which begins as the first.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._pool = ThreadPoolExecutor(threads, "clips", _use_own_stream, (device,))
        self._pending = deque[Future[dict[str, Any]]]()

    def __next__(self) -> dict[str, Any]:
        while len(self._pending) < self._limit and (keys := next(self._keys, None)) is not None:
            self._pending.append(self._pool.submit(self._load, keys))
        if not self._pending:
            raise StopIteration
        if not wait([self._pending[0]], _POLL_SECONDS).done:
            raise RuntimeError("DataLoader timed out")
        return self._pending.popleft().result()

    def __del__(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, keys: Sequence[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = self._loader.collate_fn(self._loader.dataset.__getitems__(keys))  # type: ignore[attr-defined]
        # Pinned here, so that the copy costs the training thread nothing.
        return _mapped(Tensor.pin_memory, batch, Tensor) if self._loader.pin_memory else batch


def _use_own_stream(device: int | None) -> None:
    """Let this thread's work on the GPU ``device``, if there is one, run beside that of the other threads."""
    if device is not None:
        # On the default stream a decoded frame would return after all that the training step has queued by then, so
        # that each thread would decode a clip or two a step.
        torch.cuda.set_stream(torch.cuda.Stream(device))


def _kill(workers: Sequence[Any]) -> None:
    # Workers may be stuck, and torch would wait five seconds for each of them: all are killed, then all are awaited.
    for end in (lambda worker: worker.kill(), lambda worker: worker.join(1.0)):
        for worker in workers:
            with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD takes it for an accident
                end(worker)


# Of all loaders of this process that still exist.
_workers: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    # Python would send the signal that they ignore, and wait. They hold nothing that could be lost.
    for worker in _workers:
        if worker.is_alive():
            worker.kill()


@dataclass(frozen=True)
class _TrainBatches:
    """Keys (epoch, index) of one process's micro-batches."""

    plan: BatchPlan | MixedPlan
    steps: range
    rank: int
    world_size: int
    accumulation: int

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        size = self.plan.batch_size // (self.world_size * self.accumulation)
        for step in self.steps:
            # Every process draws the whole step's keys and takes its own: there is nothing to agree on.
            keys = self.plan.keys(step)
            for micro in range(self.accumulation):
                first = (micro * self.world_size + self.rank) * size
                yield [(epoch, index) for epoch, index in keys[first : first + size].tolist()]


class _Guarded(Dataset[Any]):
    """Returns an exception as a value: torch would wrap it in a traceback within a traceback.

    The files of the clips that follow in a batch are requested before a clip is decoded, so that several requests of a
    process are in flight.
    """

    def __init__(self, dataset: Dataset[dict[str, Any]]) -> None:
        self._dataset = dataset

    def __getitem__(self, key: Any) -> dict[str, Any] | UserError:
        try:
            return self._dataset[key]
        except UserError as error:
            return error
        except Exception as error:
            if get_worker_info() is None:
                raise
            return UserError(f"a loader process failed on clip {key}: {type(error).__name__}: {error}")

    def __getitems__(self, keys: Sequence[Any]) -> list[dict[str, Any] | UserError]:
        """The samples of a batch; torch calls this instead of getting them one by one."""
        # Sources of clips that are not files, as those of tests, have nothing to fetch.
        ahead = getattr(self._dataset, "read_ahead", 0)
        # Not with cuda, whose threads share the data set, nor with decord, whose pictures of open groups depend on
        # where decoding began.
        if isinstance(self._dataset, ClipDataset) and self._dataset.decoder not in ("cuda", "decord"):
            self._dataset.upcoming = keys
        samples = list[dict[str, Any] | UserError]()
        for place, key in enumerate(keys):
            # The first clip is requested with those after it, then one more for each that is decoded.
            for later in keys[place and place + ahead : place + ahead + 1] if ahead else ():
                self._dataset.request(later)  # type: ignore[attr-defined]
            samples.append(self[key])
        if ahead:
            self._dataset.forget_requests()  # type: ignore[attr-defined]
        return samples


def _collate_or_failure(samples: Sequence[Any], collate: Collate) -> dict[str, Any]:
    failure = next((sample for sample in samples if isinstance(sample, UserError)), None)
    if failure:
        return {"failure": failure}
    batch = collate(samples)
    return batch if get_worker_info() is None else _sendable(batch)


@dataclass(frozen=True)
class _Piped:
    """A tensor that goes to the main process through a pipe, as numpy's array: torch pickles tensors by reference."""

    array: np.ndarray


def check_shared_memory(
    batch_bytes: int, workers: int, prefetch: int, accumulation: int = 1, is_pinned: bool = True
) -> None:
    """Warn, before loader processes start, if their batches of ``batch_bytes`` do not fit into the shared memory.

    Of each loader ``workers`` x ``prefetch`` batches can be ready, one is being pinned, and one is computed on; those
    that are not pinned stay in this memory until the second pass of all ``accumulation`` batches of a step. The
    training processes of a node share the memory.
    """
    processes, taken = _processes_here(), 1 + (1 if is_pinned else accumulation)
    free = _free_shared_memory() - _RESERVED_BYTES
    needed = processes * (workers * prefetch + taken) * batch_bytes
    global _has_warned_of_pipes
    if needed <= free or _has_warned_of_pipes:
        return
    _has_warned_of_pipes = True  # no second warning when it happens
    fitting = int(free / processes / max(batch_bytes, 1)) - taken
    cures = [f"docker run --shm-size={math.ceil((needed + 2 * _RESERVED_BYTES) / 1e9)}g, or --ipc=host"]
    # All workers together hold the micro-batches of a step at least, see train_loader.
    fewer = next((count for count in range(workers, 0, -1) if count * -(-accumulation // count) <= fitting), 0)
    if fewer == workers:
        cures.append(f"data.prefetch={fitting // workers}")
    elif fewer:
        cures.append(f"data.prefetch=1 data.workers={fewer}")
    log.warning(
        "%s has %.2f GB free, but the loader processes of this node hold up to %.2f GB in it (%d training processes x "
        "(%d workers x %d batches ready + %d) x %.0f MB): batches without room come through pipes, which takes longer; "
        "cure: %s",
        SHARED_MEMORY, max(free, 0) / 1e9, needed / 1e9, processes, workers, prefetch, taken, batch_bytes / 1e6,
        "; or ".join(cures),
    )  # fmt: skip


def _processes_here() -> int:
    """Training processes of this node, by the variables of their launcher."""
    # "8(x2)" are eight on each of two nodes.
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int_variable(os.environ, "LOCAL_WORLD_SIZE", int(tasks[0]) if tasks else 1, low=1)


_has_warned_of_pipes = False


def _sendable(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with its tensors in shared memory, or, where that is too small, as arrays that go through a pipe.

    torch would move the tensors in a thread of the queue, where a failure loses the batch.
    """
    tensors = list[Tensor]()
    _mapped(tensors.append, batch, Tensor)
    # Measured each time: other runs on the machine share it.
    if sum(tensor.nbytes for tensor in tensors) + _RESERVED_BYTES <= _free_shared_memory():
        with contextlib.suppress(RuntimeError, OSError):  # other processes may fill it in the meantime
            for tensor in tensors:
                tensor.share_memory_()
            return batch
    piped: dict[str, Any] = _mapped(lambda tensor: _Piped(tensor.numpy()), batch, Tensor)
    return piped


def _received(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch that :func:`_sendable` got; the first one that came through a pipe warns."""
    arrays = list[_Piped]()
    _mapped(arrays.append, batch, _Piped)
    if not arrays:
        return batch
    global _has_warned_of_pipes
    if not _has_warned_of_pipes:
        _has_warned_of_pipes = True
        log.warning(
            "%s has %.1f MB free, too little for batches of %.1f MB from loader processes (and %.0f MB for others): "
            "they come through pipes, which takes longer. Containers: docker run --shm-size=8g, or --ipc=host",
            SHARED_MEMORY, _free_shared_memory() / 1e6, sum(piped.array.nbytes for piped in arrays) / 1e6,
            _RESERVED_BYTES / 1e6,
        )  # fmt: skip
    received: dict[str, Any] = _mapped(lambda piped: torch.from_numpy(piped.array), batch, _Piped)
    return received


def _mapped(function: Callable[[Any], Any], value: Any, kind: type) -> Any:
    """``value`` with ``function`` of every ``kind`` in its dicts."""
    if isinstance(value, dict):
        return {name: _mapped(function, inner, kind) for name, inner in value.items()}
    return function(value) if isinstance(value, kind) else value


def _free_shared_memory() -> float:
    """Bytes; infinite where batches do not go through :data:`SHARED_MEMORY`, as on macOS."""
    try:
        status = os.statvfs(SHARED_MEMORY)
        return status.f_bavail * status.f_frsize
    except OSError:
        return float("inf")


def _report_lost(queue: Any, error: Exception, lost: Any) -> None:
    """Send a failure in place of a batch that the thread of ``queue`` could not pickle or send."""
    reason = f"a loader process could not hand over a batch: {type(error).__name__}: {error}"
    queue.put((lost[0], {"failure": UserError(" ".join(reason.split()))}))


def start_worker(_: int) -> None:
    """Initialise a loader process: it ignores signals, ends with its parent, and keeps its memory."""
    become_worker()  # torch's own watchdog looks for the parent only between batches
    # Python's own hook prints a traceback and drops the batch, for which the main process would wait for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = _report_lost  # type: ignore[attr-defined]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            # Clips are megabytes: glibc would give them back to the system and fetch them anew, page by page, every
            # time, which costs a sixth of the decoding.
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    torch.set_num_threads(1)  # there is a process for every core
