"""Atomic writes, progress, content hashes, and locks, also on file systems without any."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from egohod import cli, runtime
from egohod.data.chunking import ChunkSettings, Output
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.hod.store import Shard, Store
from egohod.runtime import (
    STOP_SIGNALS,
    UNFINISHED_PREFIX,
    Lost,
    Progress,
    Workers,
    atomic_write,
    content_hash,
    file_hash,
    locked,
    process_tqdm,
    usable_cores,
    worker_context,
    write_text,
)
from tests.support import Command, environment, newest

HOLDER = """
import sys, time
from pathlib import Path
from egohod.runtime import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
            pass
        holder.send_signal(signal.SIGKILL)
        # It is on its way out.
        with locked(tmp_path / "lock", patience=30):
            pass
    start = time.monotonic()
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError), locked(tmp_path / "lock", patience=0.3):
        pass
    assert time.monotonic() - start > 0.3


def test_a_lock_is_released_while_a_forked_worker_lives(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path / "lock"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_worker_that_is_killed_while_it_logs_does_not_stop_the_log() -> None:
    """tqdm is imported by many libraries, and its own lock is one of all forked processes."""
    process_tqdm()
    handler = cli._AroundBars()
    record = logging.LogRecord("egohod", logging.INFO, "", 0, "a line", (), None)
    handler.emit(record)
    worker = os.fork()
    if worker == 0:
        process_tqdm().get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(worker, 0)[1] == signal.SIGKILL
    lines = threading.Thread(target=handler.emit, args=(record,), daemon=True)
    lines.start()
    lines.join(30)
    assert not lines.is_alive()


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system that answers every lock with this error; returns how it reads."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(runtime, "_warned_folders", set())
    return os.strerror(request.param)


def test_a_file_system_without_locks_costs_a_warning(
    without_locks: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, alone: Distributed
) -> None:
    # What a soft lock of another machine would have left behind.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("4711\nanother-host\n")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with cli.claimed_run(str(tmp_path / "run"), alone):
                pass
        with Store(tmp_path / "hod.csv").claim(Shard(0, 2)):
            pass
        with Output(tmp_path / "chunks", ChunkSettings(), tmp_path / "recordings").claim():
            pass
    warnings = [record.getMessage() for record in caplog.records if "has no locks" in record.getMessage()]
    assert len(warnings) == 3
    assert warnings[0].startswith(f"{tmp_path}/run: this file system has no locks ({without_locks})")


def test_a_run_resumes_without_locks(without_locks: str, tiny_config: Path, tmp_path: Path, inside: Command) -> None:
    for steps in (1, 2):
        done = inside("main_pretrain.py", "--config_file", tiny_config, f"train.duration={steps} steps")
        assert done.returncode == 0, done.stderr
        assert newest(tmp_path / "run").step == steps
    assert "resuming" in done.stderr


def test_other_errors_of_a_lock_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Distributed) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match="cannot be used as run folder: Input/output error"),
        cli.claimed_run(str(tmp_path), alone),
    ):
        pass


@pytest.fixture
def alone() -> Distributed:
    import torch

    return Distributed(0, 1, torch.device("cpu"), None)


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_a_file_appears_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "numbers.npz"
    with atomic_write(path, sync=True) as temporary:
        assert temporary.suffix == ".npz"
        temporary.write_text("one")
        assert not path.exists()
    with suppress(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "one"
    write_text(path, "lone half \ud83d\r\n")
    assert path.read_bytes() == b"lone half ?\r\n"
    with suppress(ZeroDivisionError), atomic_write(tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir(parents=True)
        raise ZeroDivisionError
    assert [each.name for each in tmp_path.iterdir()] == ["numbers.npz"]
    with atomic_write(tmp_path / "folder", sync=True) as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "file").write_text("x")
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "x"
    with atomic_write(tmp_path / ("n" * 250)) as temporary:
        temporary.touch()
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "lost" / "file", "x")
    assert not list(tmp_path.glob(f"{UNFINISHED_PREFIX}*"))


@pytest.mark.parametrize("failing", ["open", "fsync"])
def test_a_folder_that_cannot_be_flushed_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """FUSE and CIFS refuse fsync of a folder; a folder without permission to read cannot be opened."""
    inner = getattr(os, failing)

    def refuse(target: object, *arguments: int) -> object:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
        if os.path.isdir(path):  # type: ignore[arg-type]
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return inner(target, *arguments)

    monkeypatch.setattr(os, failing, refuse)
    write_text(tmp_path / "file", "whole", sync=True)
    assert (tmp_path / "file").read_text() == "whole"


class Cut(ConnectionError):
    """Of a server, not of the pipe to a worker."""


def fails(task: int) -> int:
    raise {0: EOFError("ran out of input"), 1: ConnectionResetError("reset by peer"), 2: Cut("no route")}[task]


@pytest.mark.parametrize(("task", "kind"), [(0, EOFError), (1, ConnectionResetError), (2, Cut)])
def test_an_error_that_a_broken_pipe_raises_too_comes_from_the_task(task: int, kind: type[Exception]) -> None:
    """A truncated pickle or npz raises EOFError; the worker is alive, and must not be waited for."""
    with Workers(1, fails, 10.0) as workers, pytest.raises(kind):
        list(workers.unordered([task]))


def cut_short(task: int) -> int:
    """Die in the middle of sending a result: the pipe ends within a message."""
    if task == 1:
        # Its pipe to the parent is among its sockets.
        for each in range(3, 256):
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{each}").startswith("socket:"):
                    os.write(each, struct.pack("!i", 1000) + b"part")
        os._exit(3)
    return task


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_worker_that_dies_while_it_sends_is_lost(start_method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGOHOD_START_METHOD", start_method)
    with Workers(1, cut_short, 10.0, tasks_in_flight=1) as workers:
        results = dict(workers.unordered([0, 1, 2]))
    assert (results[0], results[2]) == (0, 2)
    assert isinstance(results[1], Lost)
    assert "exit code 3" in results[1].reason


def large(task: bytes) -> bytes:
    return task * 2


def test_large_tasks_and_results_do_not_wait_for_each_other() -> None:
    content = bytes(4_000_000)
    with Workers(2, large, 30.0, tasks_in_flight=1) as workers:
        assert [len(result) for _, result in workers.unordered([content] * 5)] == [8_000_000] * 5
    # A second task that would not fit in the pipe could never be sent to a worker that sends a large result.
    with Workers(1, large, 30.0) as workers, pytest.raises(AssertionError, match="cannot wait in a pipe"):
        list(workers.unordered([content] * 2))
    with Workers(1, large, 30.0) as workers:
        assert len(list(workers.unordered([content, b"small"]))) == 2


def signalled(task: int) -> int:
    for each in STOP_SIGNALS:
        os.kill(os.getpid(), each)
    return task


def test_signals_to_all_processes_do_not_end_workers() -> None:
    with Workers(2, signalled, 10.0) as workers:
        assert sorted(workers.unordered(range(4))) == [(task, task) for task in range(4)]


def test_a_signal_does_not_end_a_worker_that_is_still_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGOHOD_START_METHOD", "spawn")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    worker = runtime._Worker(abs)
    assert worker._process.pid is not None
    for each in STOP_SIGNALS:
        os.kill(worker._process.pid, each)
    worker.wait_until_ready()
    worker.end()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


class Unreadable:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (7,)


def test_workers_that_cannot_start_are_no_fault_of_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGOHOD_START_METHOD", "spawn")
    with pytest.raises(UserError, match=r"could not start \(exit code 7\)"), Workers(1, Unreadable(), 10.0):  # type: ignore[arg-type]
        pass


def test_workers_are_forked_on_linux_and_spawned_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EGOHOD_START_METHOD", raising=False)
    for system, method in (("linux", "fork"), ("darwin", "spawn")):
        monkeypatch.setattr(sys, "platform", system)
        assert worker_context().get_start_method() == method
    monkeypatch.setenv("EGOHOD_START_METHOD", "forkserver")
    with pytest.raises(UserError, match="EGOHOD_START_METHOD is 'forkserver', but must be fork or spawn"):
        worker_context()


def test_hashes_do_not_change() -> None:
    """They are the names of cached features and HOD work folders."""
    assert content_hash("clip", "v1") == hashlib.sha256(b"clip\0v1").hexdigest()
    assert content_hash("\udcff", length=24) == hashlib.sha256(b"\xed\xb3\xbf").hexdigest()[:24]
    assert file_hash(__file__) == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def test_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 3.5, 11.0, 13.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    lines: list[str] = []
    with Progress("extract", 1000, report=lines.append) as progress:
        progress.update(200)  # done before
        progress.update(202)
        progress.update(300)
        progress.update(600, note="3 unreadable")
        progress.update(1000)
    assert lines == [
        "extract: 20 %  202 of 1,000 clips, 1.0 clips/s, ETA 0:13:18",
        "extract: 60 %  600 of 1,000 clips, 40.0 clips/s, ETA 0:00:10, 3 unreadable",
        "extract: 100 %  1,000 of 1,000 clips, 66.7 clips/s, ETA 0:00:00",
    ]


def test_progress_is_a_bar_on_a_terminal() -> None:
    code = (
        "import logging, time; from egohod.runtime import Progress; logging.basicConfig(level='INFO')\n"
        "with Progress('extract', 4) as progress:\n"
        "    for done in range(5): progress.update(done, note='all well'); time.sleep(0.15)"
    )
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
        os.execve(sys.executable, [sys.executable, "-c", code], environment())
    output = b""
    with suppress(OSError):  # how a terminal ends on Linux
        while part := os.read(terminal, 1000):
            output += part
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0, output
    assert b"100%|" in output
    assert b"4 of 4 clips" in output
    assert b"all well" in output
    assert b"INFO" not in output
