"""One writer a folder, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from egohod import cli, locks
from egohod.data.chunk_folder import Output
from egohod.data.chunking import ChunkSettings
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.hod.store import Shard, Work
from egohod.locks import Held, locked
from tests.support import Command, environment, newest

HOLDER = """
import sys, time
from pathlib import Path
from egohod.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Held), locked(tmp_path / "lock"):
            pass
        holder.send_signal(signal.SIGKILL)
        # It is on its way out.
        with locked(tmp_path / "lock", patience=30):
            pass
    start = time.monotonic()
    with locked(tmp_path / "lock"), pytest.raises(Held), locked(tmp_path / "lock", patience=0.3):
        pass
    assert time.monotonic() - start > 0.3


# An NFS mount without its daemon, Lustre without -o flock, several FUSE.
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


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system that answers every lock with this error; returns how it reads."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_warned", set())
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
        with Work(tmp_path / "hod.csv").claim(Shard(0, 2)):
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
