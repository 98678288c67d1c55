"""Folders in which one process at a time writes, also where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

_HELD_ELSEWHERE = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
# NFS without a lock daemon, Lustre mounted without -o flock, FUSE.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}
_POLL_SECONDS = 0.05
_warned = set[Path]()


class Held(Exception):
    """Another process holds the lock ``path``."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path`` within, waiting for it up to ``patience`` seconds.

    The kernel drops the lock with the last process that has the file open, however it ends, so that nothing stale is
    left; at the end of the context it is released also where a forked worker still has the file open. Where the file
    system has no locks, a warning says so and the work goes on: a marker file instead would outlive a node that died,
    and refuse to resume. Raises :class:`Held`, or :class:`OSError` if there can be no file.
    """
    descriptor, owner, held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), os.getpid(), False
    try:
        end = time.monotonic() + patience
        while not _try(descriptor, path):
            if time.monotonic() >= end:
                raise Held(path)
            time.sleep(_POLL_SECONDS)
        held = True
        yield
    finally:
        # A forked worker shares the lock: it would keep it by living on, and must not release it for its parent.
        if held and os.getpid() == owner:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _try(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        if path.parent not in _warned:
            _warned.add(path.parent)
            log.warning(
                "%s: this file system has no locks (%s), so two runs that write here would not notice each other: make "
                "sure that this is the only one",
                path.parent, error.strerror,
            )  # fmt: skip
    return True
