"""What every long job needs, once: atomic writes, progress with the time left, worker processes, locks, content hashes.

Nothing here knows of clips, models or runs, and only the standard library is imported (tqdm where a bar is drawn).
"""

from __future__ import annotations

import collections
import ctypes
import errno
import fcntl
import hashlib
import importlib.metadata
import itertools
import logging
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.resource_tracker
import os
import pickle
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from egohod.errors import UserError

log = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------------
# Files that appear as a whole or not at all
# --------------------------------------------------------------------------------------------------

# Names of unfinished files and folders begin with this, so that what killed processes left can be cleared.
UNFINISHED_PREFIX = ".tmp-"


@contextmanager
def atomic_write(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what the block makes there is renamed to ``path`` when it ends.

    Readers see the old file, or the new one, never a part. The block makes a file or a folder (a folder can only
    replace nothing or an empty one); after an exception it is removed, and ``path`` is as it was. The temporary name
    keeps the suffix, which some writers look at, and is this process's own: several may write the same file. The parent
    folder has to exist: a run folder that is lost must not come back on the disk below its mount point.

    With ``sync`` the content is on the disk before it gets its name, so that a power cut cannot leave an empty file.

        with atomic_write(folder / "features.npz") as temporary:
            np.savez(temporary, features=features)

    Raises :class:`OSError` where it cannot be written.
    """
    path = Path(path)
    # Never longer than the name itself where that is at the file system's limit of 255 bytes.
    temporary = path.with_name(f"{UNFINISHED_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{path.name[-150:]}")
    try:
        yield temporary
        if sync:
            for each in (*(temporary.rglob("*") if temporary.is_dir() else ()), temporary):
                _flush(each)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()
        raise
    if sync:
        # The file is complete by now. FUSE and CIFS cannot flush a folder, nor can one that this process may not read.
        with suppress(OSError):
            _flush(path.parent)


def write_text(path: str | Path, content: str, *, sync: bool = False) -> None:
    """Write a UTF-8 file with :func:`atomic_write`."""
    with atomic_write(path, sync=sync) as temporary:
        # Annotations may hold half a character (a lone surrogate), which no encoding can spell.
        temporary.write_text(content, encoding="utf-8", errors="replace", newline="")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --------------------------------------------------------------------------------------------------
# Content hashes
# --------------------------------------------------------------------------------------------------


def content_hash(*parts: str, length: int = 64) -> str:
    """The first ``length`` hex digits of the SHA-256 of ``parts``, which a zero byte separates."""
    # Names of files may hold bytes that are no UTF-8, as lone surrogates.
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:length]


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file, as ``sha256sum`` prints it. Raises :class:`OSError`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------
# Progress
# --------------------------------------------------------------------------------------------------


class Progress:
    """How far a long job is: a tqdm bar on a terminal, elsewhere a log line every few seconds with the time left.

        with Progress("extract", total=len(clips)) as progress:
            for number, clip in enumerate(clips):
                ...
                progress.update(number + 1, note="3 unreadable")

    Args:
        name: of the job or stage, in front of the bar or line.
        total: units of all work; :meth:`update` may correct it.
        unit: what is counted, in the plural.
        seconds: between two lines, at least.
        report: gets a finished line instead of the log.
    """

    def __init__(
        self,
        name: str,
        total: float,
        *,
        unit: str = "clips",
        seconds: float = 2.0,
        report: Callable[[str], None] = log.info,
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self._seconds, self._report = seconds, report
        # The rate counts from the first update: models load before the first clip is done, and a resumed job starts
        # with much of it done already.
        self._first: tuple[float, float] | None = None
        self._last_line = time.monotonic()
        self._bar: Any = None
        # A terminal that nobody sized (of some containers, of expect) has no columns, and a bar there is invisible.
        columns = 0
        with suppress(OSError, ValueError):
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        if columns and log.isEnabledFor(logging.INFO):
            tqdm = process_tqdm()
            line = "{desc} {percentage:3.0f}%|{bar}| {postfix}"
            self._bar = tqdm(total=total, desc=name, bar_format=line, dynamic_ncols=True, leave=False)

    def update(self, done: float, *, total: float | None = None, note: str = "") -> None:
        """Report that ``done`` units in all are finished, if it is time to; ``note`` is added to the line."""
        now = time.monotonic()
        self.total = self.total if total is None else total
        self._first = self._first or (now, done)
        if self._bar is None and now - self._last_line < self._seconds and done < self.total:
            return
        began, at_first = self._first
        rate = (done - at_first) / max(now - began, 1e-9)
        amounts = f"{done:,.0f} of {self.total:,.0f} {self.unit}"
        speed = f"{rate:,.1f} {self.unit}/s, " if rate else ""
        line = f"{amounts}, {speed}ETA {time_left(self.total - done, rate)}{f', {note}' if note else ''}"
        if self._bar is not None:
            self._bar.total, self._bar.n = self.total, done
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.update(0)  # which draws ten times a second at most
        else:
            self._last_line = now
            share = 100 * done / self.total if self.total else 100.0
            self._report(f"{self.name}: {share:.0f} %  {line}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()  # what else is printed would end up in its line


def time_left(remaining: float, rate: float) -> str:
    """``remaining`` units at ``rate`` a second as hours, minutes and seconds: ``1 day, 2:03:04``."""
    if remaining <= 0:
        return "0:00:00"
    return str(timedelta(seconds=round(remaining / rate))) if rate > 0 else "unknown"


def process_tqdm() -> Any:
    """The class tqdm, with a lock of this process alone."""
    from tqdm import tqdm

    # tqdm's own lock is shared with forked processes: one that is killed while it logs or draws (a worker that hangs,
    # or where memory runs out) never releases it, and this process would wait for it at its next line for ever.
    if not isinstance(tqdm.get_lock(), type(threading.RLock())):
        tqdm.set_lock(threading.RLock())
        # Another thread may hold it at the moment of a fork.
        os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))
    return tqdm


# The share of failures is judged as if at least so many items had been tried: a few at the start stop nothing.
_FEWEST_JUDGED = 1000


def is_above_share(bad: int, total: int, max_fraction: float) -> bool:
    """Whether ``bad`` of ``total`` items are more than ``max_fraction`` of them, or of a thousand if they are fewer."""
    return bad > max_fraction * max(total, _FEWEST_JUDGED)


# --------------------------------------------------------------------------------------------------
# Worker processes
# --------------------------------------------------------------------------------------------------

Task = TypeVar("Task")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # of prctl(2)
_POLL_SECONDS = 1.0
# The smallest buffer of a pipe that is in use (macOS: 8 KB), less what the system adds to each message.
_PIPE_BYTES = 4096

# SIGTERM: schedulers before they take a node back; SIGUSR1: Slurm's --signal; SIGINT: Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def core_numbers() -> list[int]:
    """Cores that this process may run on; a container or a scheduler often grants fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux; macOS has no such call
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """The number of :func:`core_numbers`."""
    return len(core_numbers())


def core_quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores' worth of time that this process's container may use (``docker run --cpus``), infinite without a limit.

    All its processes share it, and unlike their affinity it does not show in the number of cores.
    """
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = file.read_text().split()
        if quota != "max":
            return int(quota) / int(period)
    return math.inf


class _SpawnedProcess(multiprocessing.context.SpawnProcess):
    def start(self) -> None:
        # A new interpreter imports for seconds, and a signal that reaches all processes would end it with a traceback.
        # What is blocked here is blocked there too, until become_worker ignores it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            multiprocessing.resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # it unblocks some when it starts
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _SpawnContext(multiprocessing.context.SpawnContext):
    Process = _SpawnedProcess


def worker_context() -> multiprocessing.context.ForkContext | multiprocessing.context.SpawnContext:
    """How worker processes start, here and in loaders: forked on Linux, elsewhere spawned.

    The environment variable EGOHOD_START_METHOD (``fork`` or ``spawn``) decides otherwise. Raises :class:`UserError` if
    it has another value.
    """
    # Forked processes share tables of millions of clips, and start at once; spawned ones import everything and get a
    # copy. But libraries of macOS, Metal above all, may crash in a forked process.
    method = os.environ.get("EGOHOD_START_METHOD") or ("fork" if sys.platform == "linux" else "spawn")
    if method not in ("fork", "spawn"):
        raise UserError(f"EGOHOD_START_METHOD is '{method}', but must be fork or spawn")
    return _SpawnContext() if method == "spawn" else multiprocessing.get_context("fork")


def become_worker() -> None:
    """Ignore the signals that stop a run, and on Linux end with the parent, even if that is killed."""
    # A scheduler and Ctrl-C signal all processes at once; the main process decides what becomes of the work.
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Lost(NamedTuple):
    """Why there is no result."""

    reason: str


class Workers(Generic[Task, Result]):
    """``count`` processes that call one function on tasks, and have this process's memory as it is when they start.

    The ``function`` has to pickle for those that are spawned (:func:`worker_context`), which have a copy of what it
    refers to; forked ones share all memory. Raises :class:`UserError` where a process cannot start.

    An exception in a task is raised here as it is. A process that dies, or is at one task for longer than ``patience``
    seconds and is killed for it, is replaced, and its task's result is :class:`Lost`; the other tasks continue.
    concurrent.futures ends the whole pool instead, and has no limit for one task. Processes start with the context
    (``with Workers(...) as workers``) and end with it.

    Of ``tasks_in_flight`` tasks, 1 or 2, the second one waits in the worker's pipe, so that the worker is never idle;
    it must pickle to 4 KB or less. 1 is for long tasks, none of which should wait behind another while a worker is
    free, and for large ones: an idle worker takes any size. Results have no limit.
    """

    def __init__(
        self, count: int, function: Callable[[Task], Result], patience: float, tasks_in_flight: int = 2
    ) -> None:
        # A third task would share the pipe's buffer with the second one.
        assert tasks_in_flight in (1, 2), tasks_in_flight
        self._count, self._function, self._patience = count, function, patience
        self._tasks_in_flight = tasks_in_flight
        self._workers: list[_Worker[Task, Result]] = []

    def __enter__(self) -> Workers[Task, Result]:
        self._workers = [_Worker(self._function) for _ in range(self._count)]
        try:
            for worker in self._workers:  # when all are on their way
                worker.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    def unordered(
        self, tasks: Iterable[Task], on_poll: Callable[[], None] | None = None
    ) -> Iterator[tuple[Task, Result | Lost]]:
        """(task, result) of every task, in any order. Tasks are taken as there is room for them.

        ``on_poll`` is called about every second, also while no result comes.
        """
        todo = iter(tasks)
        # One task for each worker before a second one for any: there may be fewer tasks than room.
        for _ in range(self._tasks_in_flight):
            for worker in self._workers:
                worker.give(itertools.islice(todo, 1))
        while busy := [worker for worker in self._workers if worker.tasks]:
            # The timeout is for a worker that hangs: it never becomes readable.
            multiprocessing.connection.wait([worker.pipe for worker in busy], timeout=_POLL_SECONDS)
            if on_poll is not None:
                on_poll()
            for worker in busy:
                answer = worker.answer(self._patience)
                if answer is None:
                    continue
                task, (result,) = worker.tasks.popleft(), answer
                if isinstance(result, Lost):
                    self._workers[self._workers.index(worker)] = replacement = _Worker(self._function)
                    replacement.wait_until_ready()
                    replacement.give(worker.tasks)
                    worker = replacement
                worker.give(itertools.islice(todo, 1))
                yield task, result


class _Worker(Generic[Task, Result]):
    def __init__(self, function: Callable[[Task], Result]) -> None:
        context = worker_context()
        self.pipe, theirs = context.Pipe()
        self.tasks = collections.deque[Task]()
        self._process = context.Process(target=_work, args=(theirs, function), daemon=True)
        self._process.start()
        # Closed here, or the pipe would never end when the worker dies.
        theirs.close()
        self._task_began = time.monotonic()

    def wait_until_ready(self) -> None:
        # One that cannot import its function would be the fault of one task after the other.
        try:
            self.pipe.recv_bytes()
        except (EOFError, OSError):
            self._process.join()
            raise UserError(f"a worker process could not start (exit code {self._process.exitcode})") from None

    def give(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            content = ForkingPickler.dumps(task)
            # A worker that is sending a large result reads nothing, and while this process waits for it to read a task
            # that does not fit in the pipe, nobody reads that result.
            assert not self.tasks or len(content) <= _PIPE_BYTES, (
                f"a task of {len(content)} bytes cannot wait in a pipe"
            )
            if not self.tasks:
                self._task_began = time.monotonic()
            self.tasks.append(task)
            with suppress(OSError):  # it is dead, which is noticed when its answer is read
                self.pipe.send_bytes(content)

    def answer(self, patience: float) -> tuple[Result | Lost] | None:
        """The result of its first task, or None if it is still at it. Raises what the task raised."""
        content = None
        try:
            if self.pipe.poll():
                content = self.pipe.recv_bytes()
        # An end within a message is a plain OSError.
        except (EOFError, OSError):
            self._process.join()
            self.pipe.close()
            code = self._process.exitcode or 0
            reason = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            # The kernel's out-of-memory killer is by far the most frequent sender of SIGKILL.
            reason += "; too little memory?" if code == -signal.SIGKILL else ""
            return (Lost(f"the process that worked on it died ({reason})"),)
        if content is not None:
            # Outside of the try: a task, too, may raise EOFError or ConnectionError, and its worker is alive.
            result, error = pickle.loads(content)
            self._task_began = time.monotonic()
            if error is not None:
                raise error
            return (result,)
        if time.monotonic() - self._task_began > patience:
            self.end()
            return (Lost(f"it took longer than {patience:g} s"),)
        return None

    def end(self) -> None:
        self._process.kill()  # it holds nothing that could be lost
        self._process.join()
        self.pipe.close()


def _work(pipe: Any, function: Callable[[Any], Any]) -> None:
    """The main loop of a worker: a task comes in by the pipe, its result or error goes out."""
    # On Linux the kernel ends it with its parent. The thread below is not enough: native code that hangs may hold the
    # interpreter's lock for ever, and such a worker of a killed run would keep its locks, and refuse to resume it.
    become_worker()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        # The sentinel becomes readable when the parent dies, even by SIGKILL.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    pipe.send_bytes(b"ready")
    while True:
        task = pipe.recv()
        answer: tuple[Any, Exception | None]
        try:
            answer = function(task), None
        except Exception as error:
            try:
                pickle.loads(pickle.dumps(error))
                answer = None, error
            except Exception:  # an error that does not come through a pipe as it is
                replacement = RuntimeError(f"{type(error).__name__}: {error}")
                # Notes tell which task it was; they pass the pipe with an error, but have to be copied to another.
                for note in getattr(error, "__notes__", ()):
                    replacement.add_note(note)
                answer = None, replacement
        pipe.send(answer)


# --------------------------------------------------------------------------------------------------
# Locks
# --------------------------------------------------------------------------------------------------

_HELD_ELSEWHERE = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
# NFS without a lock daemon, Lustre mounted without -o flock, FUSE.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}
_LOCK_POLL_SECONDS = 0.05
_warned_folders = set[Path]()


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path`` within, waiting for it up to ``patience`` seconds.

    The kernel drops the lock with the last process that has the file open, however it ends, so that nothing stale is
    left; at the end of the context it is released also where a forked worker still has the file open. Where the file
    system has no locks, a warning says so and the work continues: a marker file instead would outlive a node that died,
    and refuse to resume. Raises :class:`BlockingIOError` with the file's name if another process holds it, or another
    :class:`OSError` if there can be no file.
    """
    descriptor, owner, is_held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), os.getpid(), False
    try:
        end = time.monotonic() + patience
        while not is_held:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_held = True
            except OSError as error:
                if error.errno in _HELD_ELSEWHERE:
                    if time.monotonic() >= end:
                        raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path)) from None
                    time.sleep(_LOCK_POLL_SECONDS)
                    continue
                if error.errno not in _NO_LOCKS:
                    raise
                if path.parent not in _warned_folders:
                    _warned_folders.add(path.parent)
                    log.warning(
                        "%s: this file system has no locks (%s), so two runs that write here would not notice each "
                        "other: make sure that this is the only one",
                        path.parent, error.strerror,
                    )  # fmt: skip
                break
        yield
    finally:
        # A forked worker shares the lock: it would keep it by living on, and must not release it for its parent.
        if is_held and os.getpid() == owner:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


# --------------------------------------------------------------------------------------------------
# Requests to stop
# --------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """The run was asked to stop, and nothing is lost: programs end with exit code 0.

    As KeyboardInterrupt it is no ``Exception``: code that expects damaged files must not take it for one.
    """


class StopRequest:
    """Whether this process was asked to stop: set by a signal handler (:mod:`egohod.cli`), read by whoever polls."""

    def __init__(self) -> None:
        self.reason = ""
        # By the monotonic clock: a scheduler takes the node a fixed time after its first signal.
        self.since: float | None = None
        # The signal handler raises Interrupted; false while training, which polls and saves first.
        self.at_once = True
        self.was_raised = False

    def __bool__(self) -> bool:
        return bool(self.reason)

    def request(self, reason: str) -> None:
        """Ask for a stop. The first request counts: launchers send several signals."""
        self.reason = self.reason or reason
        self.since = self.since or time.monotonic()

    def check(self) -> None:
        """Raise :class:`Interrupted` if there was a request."""
        if self.reason:
            raise Interrupted(self.reason)

    @contextmanager
    def polled(self) -> Iterator[None]:
        """Within, a request interrupts nothing: the code here polls, and leaves where nothing is lost."""
        self.at_once = False
        self.check()
        yield
        # Not after an exception: a signal must not break into the clean-up that follows it.
        self.at_once = True


# --------------------------------------------------------------------------------------------------
# Rank and world size, without PyTorch: programs need them before it is loaded
# --------------------------------------------------------------------------------------------------

# Below the ports that Linux gives to outgoing connections.
_FIRST_PORT, _PORTS = 20000, 12000


@dataclass(frozen=True)
class RankInfo:
    """One process among those of its run; the first one listens at ``address``:``port`` for the others."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 29500
    owns_gpus: bool = False
    """The visible GPUs are this process's alone, not those of its node."""


def rank_info(environment: Mapping[str, str] = os.environ) -> RankInfo:
    """Rank, world size and meeting point that torchrun or Slurm left in ``environment``.

    In this order: ``RANK`` and ``WORLD_SIZE`` (torchrun, also inside a Slurm task); a step of several Slurm tasks
    (``srun python main_pretrain.py ...``); else one process, which is also what a plain ``python`` is in the shell of
    an allocation or of ``srun --pty bash``. Raises :class:`UserError` if only half of it is set.
    """
    if int_variable(environment, "WORLD_SIZE", 1) > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise UserError(
                    f"WORLD_SIZE={environment['WORLD_SIZE']} is set, but {name} is not: start with torchrun or srun, "
                    "or unset WORLD_SIZE"
                )
        rank, world_size = int_variable(environment, "RANK"), int_variable(environment, "WORLD_SIZE")
        if rank >= world_size:
            raise UserError(f"RANK={rank} in the environment, but WORLD_SIZE={world_size}: ranks count from 0")
        # On one node its name does not matter: it may not even resolve.
        on_one_node = environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"]
        address = "127.0.0.1" if on_one_node else environment["MASTER_ADDR"]
        port = int_variable(environment, "MASTER_PORT", low=1, high=65535)
        return RankInfo(rank, world_size, int_variable(environment, "LOCAL_RANK", 0), address, port)

    # The shell of an allocation has variables of Slurm, but no step; a step's own number of tasks is what counts.
    if "WORLD_SIZE" in environment or "SLURM_STEP_ID" not in environment:
        return RankInfo()
    if int_variable(environment, "SLURM_STEP_NUM_TASKS", 1) == 1 or _is_in_interactive_shell(environment):
        return RankInfo()
    job, step = int_variable(environment, "SLURM_JOB_ID"), int_variable(environment, "SLURM_STEP_ID")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    on_one_node = int_variable(environment, "SLURM_STEP_NUM_NODES", 0) == 1
    # Slurm shows a task its own GPUs only with --gpus-per-task or --gpu-bind.
    binding = environment.get("SLURM_GPU_BIND") or environment.get("SLURM_TRES_BIND") or ""
    return RankInfo(
        rank=int_variable(environment, "SLURM_PROCID"),
        world_size=int_variable(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=int_variable(environment, "SLURM_LOCALID"),
        address=environment.get("MASTER_ADDR") or ("127.0.0.1" if on_one_node else first_host(nodes)),
        # Steps and jobs that run side by side on a node get different ones.
        port=int_variable(environment, "MASTER_PORT", _FIRST_PORT + (8 * job + step) % _PORTS, low=1, high=65535),
        owns_gpus="none" not in binding and (bool(binding) or "SLURM_GPUS_PER_TASK" in environment),
    )


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: ``ego[07-09,12],gpu3`` -> ``ego07``, as ``scontrol show hostnames`` says."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def _is_in_interactive_shell(environment: Mapping[str, str]) -> bool:
    # The shell of srun --ntasks=4 --pty bash, whose other tasks ended at once, hands the variables of its step on to
    # what it starts, and has a terminal. So has the task of srun --pty python ..., but that is this process itself.
    if "SLURM_PTY_PORT" not in environment or environment.get("SLURM_TASK_PID") == str(os.getpid()):
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def int_variable(
    environment: Mapping[str, str], name: str, default: int | None = None, *, low: int = 0, high: int = 10**18
) -> int:
    """A variable that holds a whole number from ``low`` to ``high``; ``default`` if it is not set.

    Raises :class:`UserError` naming the variable and what is allowed.
    """
    text = environment.get(name, "" if default is None else str(default))
    # Not int() alone, which also takes "1_000", " 5 " and digits of other scripts.
    if not re.fullmatch("[0-9]{1,18}", text):
        raise UserError(f"{name}={text!r} in the environment is not a number")
    if not low <= int(text) <= high:
        raise UserError(f"{name}={text} in the environment is out of range; use {low} to {high}")
    return int(text)


# --------------------------------------------------------------------------------------------------
# The NVIDIA driver and the build of PyTorch that it can run: exps/setup.sh asks before PyTorch is installed
# --------------------------------------------------------------------------------------------------


class TorchBuild(NamedTuple):
    """One of the CUDA builds in which PyTorch publishes a release, on x86-64."""

    name: str
    driver: int
    """First driver branch that runs it; later ones do too."""
    oldest: tuple[int, int]
    newest: tuple[int, int]
    """Compute capabilities of the GPUs that it has code for."""


# Builds of the torch in requirements.txt, best first; pip installs the first one if nothing else is requested.
# A driver runs every minor version of its major version of CUDA (NVIDIA's minor version compatibility). The last
# release with a cu128 build was 2.11, so that Blackwell GPUs need the driver of cu130.
TORCH_BUILDS = (
    TorchBuild("cu130", 580, (7, 5), (12, 9)),
    TorchBuild("cu126", 525, (5, 0), (9, 0)),
)


def torch_advice(driver: str, capability: tuple[int, int] | None = None, *, installed: str | None = None) -> str:
    """What to install on a machine with this driver and GPU, as part of a sentence; empty if ``installed`` will do.

    ``driver`` as :func:`nvidia_driver` gives it (empty or ``unknown``: any); ``capability``: compute capability of the
    GPU, None if unknown; ``installed``: name of the build that is installed or about to be.
    """
    branch = int(match[0]) if (match := re.match(r"\d+", driver)) else 10**6

    def has_code(build: TorchBuild) -> bool:
        return capability is None or build.oldest <= capability <= build.newest

    usable = [build.name for build in TORCH_BUILDS if branch >= build.driver and has_code(build)]
    if installed in usable:
        return ""
    if usable:
        return f"TORCH_INDEX={usable[0]} bash exps/setup.sh installs the build for it (docs/installation.md)"
    # The newest drivers know all GPUs that a build has code for.
    drivers = [build.driver for build in TORCH_BUILDS if has_code(build)]
    if not drivers:
        return "no build of this release has code for this GPU (docs/installation.md)"
    return f"it needs driver {min(drivers)} or later (docs/installation.md)"


def nvidia_driver(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of the NVIDIA driver if a device is plugged in, whatever torch thinks of it."""
    if answer := _nvidia_smi("driver_version"):
        return answer
    if not proc.is_file():
        return None
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 ..."
    words = proc.read_text(errors="replace").split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def _nvidia_smi(field: str) -> str | None:
    """A property of the first GPU; None if nvidia-smi does not give it."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    # It hangs where a GPU has fallen off the bus, and is absent in most containers.
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        return answer[0] if answer else None
    return None


def torch_problem() -> str:
    """Why the torch that is installed, or pip would install, cannot run on this machine's GPU; empty if it can."""
    driver, build = nvidia_driver(), ""
    if driver is None:  # no GPU, or a login node
        return ""
    # Wheels of PyTorch's own index have their build in the version: 2.14.1+cu126.
    with suppress(importlib.metadata.PackageNotFoundError):
        build = importlib.metadata.version("torch").partition("+")[2]
    build = build or TORCH_BUILDS[0].name
    # Drivers before 470 do not know this property.
    parts = re.fullmatch(r"(\d+)\.(\d+)", _nvidia_smi("compute_cap") or "")
    capability = (int(parts[1]), int(parts[2])) if parts else None
    # Other builds (cpu, or of another release) are not judged.
    is_listed = build in (each.name for each in TORCH_BUILDS)
    advice = torch_advice(driver, capability, installed=build) if is_listed else ""
    if not advice:
        return ""
    gpu = f" and GPU of compute capability {parts[0]}" if parts else ""
    return f"the {build} build of PyTorch does not run with this machine's NVIDIA driver {driver}{gpu}: {advice}"
