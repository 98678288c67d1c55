"""Results of the HOD pipeline on disk: one SQLite file a shard, in a folder beside the output.

    hod.csv                               the narrations, written once every shard is finished
    hod.csv.failures.csv                  clips without a narration, with the stage and the reason
    hod.csv.work/config.yml               the settings of the last run
    hod.csv.work/clips/KEY.arrow          the metadata, read and checked once for all shards
    hod.csv.work/results/3-of-64.sqlite   what each stage made of each clip of a shard
    hod.csv.work/locks/3-of-64            locked while a process works on the shard

A result is stored under its clip and a hash of what made it: the settings and code versions of its stage and of all
stages before. Other settings therefore add rows, and with earlier settings the earlier rows are used again. Every
result is a transaction: a killed process loses the clips that it was working on, nothing else. A result that is
replaced, as by --retry, takes with it those of later stages, which were made from it: their rows then have neither a
value nor a fault, which also hides rows of other shards' files, opened only for reading.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import logging
import math
import os
import re
import sqlite3
import types
import typing
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from egohod.data.table import ClipTable
from egohod.errors import UserError
from egohod.runtime import UNFINISHED_PREFIX, atomic_write, file_hash, locked, write_text

log = logging.getLogger(__name__)

# Seconds to wait for a lock: processes of a run that was killed a moment ago may not be gone yet.
_PATIENCE = 3.0
# Seconds to wait for another process that reads the metadata: tens of millions of rows take minutes.
_READING = 3600.0
# Of SQLite's cache for a file that is only read: a page looks into 64 of them, which would take 2 MB each.
_CACHE_KB = 256
# SQLite's write-ahead log needs memory that all processes on a file share, which network file systems do not offer.
# Unknown ones count as such: there every result costs two fsyncs instead of none.
_LOCAL_FILE_SYSTEMS = frozenset(["apfs", "bcachefs", "btrfs", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"])
_MOUNTS = Path("/proc/self/mounts")
# Digits of numbers in results: hundred-thousandths of the picture or of a second. Rounded before the next stage reads
# them, so that it gets the same whether the stage before ran just now or last week.
_DIGITS = 5
# Small columns first: SQLite then reads them without the pages of the value. The checksum detects damage of the disk,
# which JSON would mostly survive as other numbers.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    clip TEXT, stage TEXT, fault TEXT, is_fallback INTEGER, checksum INTEGER, value BLOB, PRIMARY KEY (clip, stage)
);
CREATE TABLE IF NOT EXISTS finished (
    fingerprint TEXT PRIMARY KEY, narrations INTEGER, failures INTEGER, fallbacks INTEGER
);
"""


class Outcome(NamedTuple):
    """What a stage made of a clip."""

    value: Any  # what JSON can hold, or that JSON as bytes when it comes from the store; None where there is a fault
    fault: str | None = None  # why there is no value
    is_fallback: bool = False  # the value replaces one that could not be had: --retry tries again, as after a fault

    def parsed(self) -> Any:
        """The value, parsed if it comes from the store."""
        # Only here: most results are only looked up, and parsing takes longer than that.
        return json.loads(self.value) if isinstance(self.value, bytes) else self.value


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``, from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``3/64``. Raises :class:`UserError`."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        shard = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if shard.index >= shard.count:
            raise UserError(f"--shard is '{text}', but must be i/n with i from 0 to n - 1: 0/64 is the first of 64")
        return shard

    @classmethod
    def of_file(cls, stem: str) -> Shard | None:
        """The shard of a file called ``3-of-64``; None for any other file."""
        match = re.fullmatch(r"(\d+)-of-(\d+)", stem)
        return cls(int(match[1]), int(match[2])) if match else None

    @classmethod
    def all(cls, count: int) -> list[Shard]:
        """All parts of a division into ``count``."""
        return [cls(index, count) for index in range(count)]

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def stem(self) -> str:
        """The name of its files."""
        return f"{self.index}-of-{self.count}"

    def clips(self, total: int, block: int) -> range:
        """Its clips of ``total``, a range of whole blocks."""
        # A range: neighbouring clips of a video stay on one machine, with its file in the cache. Whole blocks: with
        # a few clips more in the metadata most shards keep theirs.
        blocks = -(-total // block)
        start, stop = (part * blocks // self.count * block for part in (self.index, self.index + 1))
        return range(min(start, total), min(stop, total))


@dataclass(frozen=True)
class Finished:
    """What a finished shard contains."""

    narrations: int
    failures: int
    fallbacks: int


class Store:
    """The folder beside an output file. Creates nothing before :meth:`claim`."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.failures = output.with_name(output.name + ".failures.csv")
        self.folder = output.with_name(output.name + ".work")

    @contextlib.contextmanager
    def claim(self, shard: Shard) -> Iterator[None]:
        """Within, no other process works on the shard, nor on clips that it shares with another division.

        Raises :class:`UserError` if one does.
        """
        if (self.folder / "blocks").is_dir():
            log.warning(
                "%s: blocks/ and parts/ are results of an older release, which this one does not read: all clips are "
                "processed again. Both can be deleted",
                self.folder,
            )
        locks = self.folder / "locks"
        with contextlib.ExitStack() as stack:
            try:
                locks.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(locks / shard.stem, _PATIENCE))
                for path in locks.iterdir():
                    other = Shard.of_file(path.name)
                    if other and other.count != shard.count:
                        # Neighbours of this shard look there too, and hold the lock for a moment.
                        with locked(path, _PATIENCE):
                            pass
            except BlockingIOError as error:
                name = Path(error.filename).name.replace("-of-", "/")
                raise UserError(f"{self.output}: another run is writing here (shard {name}); wait for it") from error
            except OSError as error:  # the first thing that is written: a read-only folder is noticed here
                raise UserError(f"{locks}: cannot be written: {error.strerror or error}") from error
            yield

    def clips(self, key: str, path: Path, read: Callable[[], ClipTable], *, save: bool) -> ClipTable:
        """The clips of the metadata ``path`` from a mapped file, of which only rows that are used take memory.

        ``key`` names everything that they depend on. Where there is no such file, ``read`` reads the metadata; with
        ``save`` the first process makes the file of it, while others wait. Raises :class:`UserError` where it cannot.
        """
        file = self.folder / "clips" / f"{key}.arrow"
        checksum = file.with_suffix(".sha256")

        def saved() -> ClipTable | None:
            if not file.exists() or not checksum.exists():
                return None
            try:
                if checksum.read_text() == file_hash(file):
                    table = ClipTable.mapped(file, path)
                    log.info("%s, read before: %s", path, table.report)
                    return table
                reason = "its checksum is another one"
            except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
                reason = str(error)
            log.warning("%s is damaged (%s): %s is read again", file, reason, path)
            return None

        table = saved()
        if table is not None or not save:
            return table or read()
        try:
            with contextlib.ExitStack() as stack:
                for folder in (file.parent, self.folder / "locks"):
                    folder.mkdir(parents=True, exist_ok=True)
                lock = self.folder / "locks" / "clips"
                try:
                    stack.enter_context(locked(lock))
                except BlockingIOError:
                    log.info("another process reads %s; waiting for it", path)
                    stack.enter_context(locked(lock, _READING))
                table = saved()
                if table is not None:
                    return table
                table = read()
                for leftover in file.parent.glob(f"{UNFINISHED_PREFIX}*"):  # of processes that were killed here
                    leftover.unlink(missing_ok=True)
                with atomic_write(file, sync=True) as temporary:
                    table.save(temporary)
                # Last: a file without it counts as damaged.
                write_text(checksum, file_hash(file), sync=True)
                return ClipTable.mapped(file, path)
        except BlockingIOError as error:
            raise UserError(f"{path}: another process has been reading it for an hour; is it stopped?") from error
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror or error}; rerun to resume") from error

    def file(self, shard: Shard) -> Path:
        """The results of a shard."""
        return self.folder / "results" / f"{shard.stem}.sqlite"

    def results(
        self, shard: Shard | None = None, clips: Callable[[Shard], range] | None = None
    ) -> contextlib.closing[Results]:
        """Results of a shard, to read and write; without a shard those of all shards, to read.

        ``clips`` are those of a shard, so that those of all shards are looked up in the right file first.
        """
        # Results of other divisions are used too, as after a run of 64 shards that is now rerun as one. Other shards of
        # the same division have other clips, and reading their files would slow down the processes that write there.
        files = self._files()
        others = {
            path: clips(each) if clips else range(0) for path, each in files if not shard or each.count != shard.count
        }
        return contextlib.closing(Results(self.file(shard) if shard else None, others))

    def divisions(self, fingerprint: str) -> list[int]:
        """The shard counts of which at least one shard is finished with the settings of ``fingerprint``."""
        counts = set()
        for path, shard in self._files():
            with contextlib.closing(Results(path)) as results:
                if results.finished(fingerprint):
                    counts.add(shard.count)
        return sorted(counts)  # several after runs with different numbers of shards

    def _files(self) -> list[tuple[Path, Shard]]:
        paths = sorted((self.folder / "results").glob("*.sqlite"))
        return [(path, shard) for path in paths if (shard := Shard.of_file(path.stem))]


class Results:
    """Results in the file ``path``, and read-only in ``others``. A file is not touched before something is added.

    Methods raise :class:`UserError` for files that cannot be read or written.
    """

    def __init__(self, path: Path | None, others: Mapping[Path, range] | None = None) -> None:
        self._path, self._is_writable, self._clips = path, False, dict(others or {})
        self._files: list[tuple[Path, sqlite3.Connection]] = []
        for each in filter(None, (path, *self._clips)):
            with _errors_of(each, "read"):
                if each.exists():
                    connection = _connect(each, "rw" if each == path else "ro")
                    self._files.append((each, connection))
                    # A process that was killed within its first milliseconds leaves a file without tables.
                    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'finished'").fetchone():
                        self._files.pop()[1].close()

    def get(self, clip: str, stage: str, index: int | None = None) -> Outcome | None:
        """What a stage made of a clip, None if there is nothing; with the ``index`` of the clip it is sooner there."""
        query = "SELECT fault, is_fallback, checksum, value FROM results WHERE clip = ? AND stage = ?"
        files = self._files
        if index is not None and self._clips and self._path is None:
            # The others too, but later: with other metadata the clip may have been in the next shard.
            files = [each for each in files if index in self._clips[each[0]]]
            files += [each for each in self._files if index not in self._clips[each[0]]]
        for path, connection in files:
            with _errors_of(path, "read"):
                row = connection.execute(query, (clip, stage)).fetchone()
            if row is None:
                continue
            fault, is_fallback, checksum, value = row
            if fault is None and value is None:
                return None  # made from a result that was replaced; older files may have it, no later one
            if fault:
                return Outcome(None, str(fault))
            if isinstance(value, bytes) and zlib.crc32(value) == checksum:
                return Outcome(value, None, bool(is_fallback))
            log.warning("%s: a damaged result is ignored; its clip is processed again", path)
        return None

    def put(self, clip: str, stage: str, outcome: Outcome, stale: Sequence[tuple[str, str]] = ()) -> None:
        """Store what a stage made of a clip; ``stale`` are the keys of results that it makes invalid."""
        value = b"" if outcome.fault else json.dumps(outcome.value, separators=(",", ":"), allow_nan=False).encode()
        # What is no Unicode, as names of files may be, becomes what the ledger would write for it.
        fault = outcome.fault.encode("utf-8", "replace").decode() if outcome.fault else None
        row = (clip, stage, fault, outcome.is_fallback, zlib.crc32(value), value)
        rows = [row, *((*key, None, False, 0, None) for key in stale)]
        # One statement, and so one transaction: no kill leaves the one without the others.
        places = ", ".join(["(?, ?, ?, ?, ?, ?)"] * len(rows))
        self._write(f"INSERT OR REPLACE INTO results VALUES {places}", [each for row in rows for each in row])

    def finished(self, fingerprint: str) -> Finished | None:
        """What the shard contained when it was finished with these settings; None if it was not, or changed since."""
        if self._path is None or not self._files or self._files[0][0] != self._path:
            return None
        with _errors_of(self._path, "read"):
            query = "SELECT narrations, failures, fallbacks FROM finished WHERE fingerprint = ?"
            row = self._files[0][1].execute(query, (fingerprint,)).fetchone()
        return Finished(*row) if row and all(isinstance(each, int) for each in row) else None

    def fingerprints(self) -> list[str]:
        """The settings with which the shard is finished."""
        if self._path is None or not self._files or self._files[0][0] != self._path:
            return []
        with _errors_of(self._path, "read"):
            return [str(row[0]) for row in self._files[0][1].execute("SELECT fingerprint FROM finished")]

    def mark(self, fingerprint: str, finished: Finished) -> None:
        """Mark the shard as finished with these settings."""
        row = (fingerprint, finished.narrations, finished.failures, finished.fallbacks)
        self._write("INSERT OR REPLACE INTO finished VALUES (?, ?, ?, ?)", row)

    def unmark(self, fingerprint: str | None) -> None:
        """Take the mark of these settings away, with None the marks of all: results are about to change."""
        self._write("DELETE FROM finished WHERE fingerprint = coalesce(?, fingerprint)", (fingerprint,))

    def close(self) -> None:
        """Close the files."""
        for path, connection in self._files:
            if path == self._path and self._is_writable:
                # Without a log beside it the file can be copied, and read where the folder is read-only. It stays in
                # that mode while another process reads, or if the disk is full; nothing is lost by that.
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("PRAGMA busy_timeout = 0")
                    connection.execute("PRAGMA journal_mode = DELETE")
            connection.close()
        self._files = []

    def _write(self, statement: str, row: Sequence[Any]) -> None:
        assert self._path is not None, "results of several shards are only read"
        with _errors_of(self._path, "write"):
            if not self._is_writable:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                if not self._files or self._files[0][0] != self._path:
                    self._files.insert(0, (self._path, _connect(self._path, "rwc")))
                connection = self._files[0][1]
                # With the log a killed process loses nothing, and a machine that crashes what was not flushed yet; in
                # neither case is the file damaged.
                journal = "WAL" if _file_system(self._path) in _LOCAL_FILE_SYSTEMS else "TRUNCATE"
                # Not possible while another process reads. Its present mode works too, only slower.
                with contextlib.suppress(sqlite3.OperationalError):
                    connection.execute(f"PRAGMA journal_mode = {journal}")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.executescript(_SCHEMA)
                self._is_writable = True
            self._files[0][1].execute(statement, row)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open a file: ``ro``, ``rw`` or ``rwc``, which creates it."""
    vfs = ""
    if _file_system(path) not in _LOCAL_FILE_SYSTEMS:
        descriptor = os.open(path, os.O_RDONLY | (os.O_CREAT if mode == "rwc" else 0), 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            pass  # another process holds it, so locks work
        except OSError:
            # Without this option SQLite refuses to work. claim() has warned that two runs would not notice each other.
            vfs = "&vfs=unix-none"
        finally:
            os.close(descriptor)
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}{vfs}"
    # isolation_level None: every statement is a transaction of its own.
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30.0)
    # Damaged text must not raise: the checksum and the key decide.
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    if mode == "ro":
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KB}")
    return connection


def _file_system(path: Path) -> str:
    """The type of the file system that a file is or would be on, such as ext4 or nfs4."""
    try:
        mounts = [line.split(" ")[1:3] for line in _MOUNTS.read_text(errors="replace").splitlines()]
    except OSError:
        return "apfs"  # there is no such list on macOS, whose disks are mostly local
    places = [(mount, kind) for mount, kind in mounts if path.resolve().is_relative_to(mount)]
    # Of several mounts on one folder the last one is in effect.
    return max(reversed(places), key=lambda place: len(place[0]), default=("", ""))[1]


@contextlib.contextmanager
def _errors_of(path: Path, what: str) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into a :class:`UserError` with a cure."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot {what} {path}: {reason}; finished clips are kept, rerun to resume") from error
    except sqlite3.Error as error:
        raise UserError(f"{path} is damaged: {error}; delete it, and its clips are processed again") from error


@contextlib.contextmanager
def text_file(path: Path) -> Iterator[TextIO]:
    """A text file that appears as a whole or not at all. Raises :class:`UserError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(path, sync=True) as temporary,
            # Names of files that are not UTF-8 are in texts as lone surrogates, which no encoding can spell.
            temporary.open("w", encoding="utf-8", errors="replace", newline="") as file,
        ):
            yield file
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; finished clips are kept, rerun to resume"
        ) from error


# --- Results as plain values ---


def to_plain(value: Any) -> Any:
    """Dataclasses, arrays and containers as what JSON can hold: numbers rounded, NaN as None."""
    if dataclasses.is_dataclass(value):  # not dataclasses.asdict: it copies arrays before they are converted
        return {entry.name: to_plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(each) for each in value]
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f":
            return to_plain(value.tolist())
        # All numbers at once: arrays of tracks are most of what is stored.
        plain = [round(each, _DIGITS) if math.isfinite(each) else None for each in value.ravel().tolist()]
        return np.array(plain, dtype=object).reshape(value.shape).tolist()
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        return to_plain(value.item())
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None  # JSON has no NaN
    return value


# Evaluating annotations takes longer than everything else here.
_type_hints = functools.cache(typing.get_type_hints)


def from_plain(kind: Any, value: Any) -> Any:
    """A value of the type ``kind`` (a dataclass, or the type of one of its fields) of what :func:`to_plain` made of it.

    None in an array becomes NaN.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (part for part in parts if part is not types.NoneType)
        return None if value is None else from_plain(inner, value)
    if origin is dict:
        return {key: from_plain(parts[1], each) for key, each in value.items()}
    if origin in (tuple, list):
        return origin(from_plain(parts[0], each) for each in value)
    if kind is np.ndarray:
        return np.array(value, dtype=np.float64)
    if dataclasses.is_dataclass(kind):
        hints = _type_hints(typing.cast("type", kind))
        return kind(**{name: from_plain(hints[name], each) for name, each in value.items()})  # type: ignore[operator]
    return value
