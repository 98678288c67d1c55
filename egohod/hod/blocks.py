"""What the stages found out about clips, in files that only grow.

Clips lie in blocks of a fixed number, in the order of their table; ``<folder>/<number>.jsonl`` holds a line for each
stage of each clip of a block:

    {"stage": "detect", "key": "5f0c...", "value": {...}}       or "fault": "why there is no value"

"makeshift": true marks a value that should be had better.

A key says what the value was made of: the clip, the stage's settings with the version of its code, and those of all
stages before it (:func:`key_of`). So other settings find nothing and write their own lines, and going back to the old
ones finds theirs again. A line is written with one call as soon as its clip is done; a line that a kill or a full disk
cut short is not counted and makes room for the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from egohod.errors import UserError

log = logging.getLogger(__name__)

# What a crash of the whole machine may cost; a killed process loses nothing that was written.
_SYNC_SECONDS = 2.0


class CacheError(UserError):
    """The folder of the stages cannot be written or read."""


class Found(NamedTuple):
    """What a stage made of a clip: a value, or why there is none."""

    value: Any
    fault: str | None = None
    makeshift: bool = False
    """Whether the value stands in for one that could not be had, as a failure is to be tried again when asked."""


def key_of(*parts: Any) -> str:
    """A name for anything JSON can spell, the same for equal parts."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


class Block:
    """The lines of one block, all of them in memory. Nothing is written, nor made anew, before :meth:`put`.

    Raises :class:`CacheError` if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._found: dict[tuple[str, str], Found] = {}
        self._synced = time.monotonic()
        with _clearly(path, "read"):
            content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].split(b"\n")[:-1]:
            try:
                said = json.loads(line)
                self._found[said["stage"], said["key"]] = Found(
                    said.get("value"), said.get("fault"), said.get("makeshift", False)
                )
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                log.warning("%s: a damaged line is left out, its clip is done again", path)
        self._size = whole

    def get(self, stage: str, key: str) -> Found | None:
        """What is known; None if nothing is."""
        return self._found.get((stage, key))

    def put(self, stage: str, key: str, found: Found) -> None:
        """Write what a stage found out. Raises :class:`CacheError` if it cannot be written; then nothing was."""
        said: dict[str, Any] = {"stage": stage, "key": key} | (
            {"fault": found.fault} if found.fault else {"value": found.value}
        )
        if found.makeshift:
            said["makeshift"] = True
        line = (json.dumps(said, separators=(",", ":"), allow_nan=False) + "\n").encode()
        with _clearly(self._path, "write"):
            if self._file < 0:
                self._open()
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[os.write(self._file, rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise
            self._size += len(line)
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        self._found[stage, key] = found

    def close(self) -> None:
        """Let the file go, its content safe on the disk."""
        if self._file >= 0:
            try:
                with _clearly(self._path, "write"):
                    self._sync()
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Block:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()


@contextlib.contextmanager
def _clearly(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"cannot {what} {path}: {error.strerror or error}; what is done is kept, run again to go on"
        ) from error
