"""Reading files of a local folder or of any fsspec URI, with retries and a cache on the local disk.

The text of a failed request is never shown: it may hold a signed address or a token. Messages name the address of the
file, the service's error code and the HTTP status, and nothing else.

fsspec's own parts are used where they do: file systems, connections, read-ahead. Its caches on disk know no limit of
size and do not notice a file that a power cut left half-written, and its retries differ between services (s3fs repeats,
http does not), so those two are ours.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import importlib
import io
import logging
import os
import random
import re
import tarfile
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Generic, NamedTuple, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.caching import ReadAheadCache

from egohod.errors import UserError
from egohod.runtime import UNFINISHED_PREFIX, atomic_write, content_hash

log = logging.getLogger(__name__)

# Up to this size an object is fetched whole, with one request, and decoded from memory; chunks are about 1 MB.
_WHOLE_BYTES = 64 << 20
# Read-ahead of larger objects: a decoder asks for some kB at a time, and each request costs a round trip.
_AHEAD_BYTES = 2 << 20
# Tries of a request, with pauses of 0.5, 1, 2 and 4 s between them.
_TRIES, _PAUSE = 5, 0.5
# Seconds: to connect, without a byte, and for a whole request.
_CONNECT_TIMEOUT, _SILENCE_TIMEOUT, _REQUEST_TIMEOUT = 10, 30, 120
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_LENGTH_BYTES = 8
# Stands for the size of a folder in a listing.
_IS_FOLDER = -1
SHARD_INDEX = "shards.parquet"
"""Name of the index beside tar shards; such a root ends with it."""

VideoFile = Path | io.BufferedIOBase
"""A path, or an open binary file that can seek."""
Key = TypeVar("Key")
Value = TypeVar("Value")


class VideoError(UserError):
    """A video, or a part of one, that cannot be read; the message names the file and the reason."""


class StorageError(UserError):
    """Storage that cannot be used at all (credentials, bucket, dead server): no other clip would fare better."""


@contextlib.contextmanager
def one_clip(name: str, kind: type[VideoError] = VideoError) -> Iterator[None]:
    """Turn any exception within into a ``kind`` that names the file or clip ``name``, so that it costs that clip alone.

    A :class:`UserError` passes as it is, and so do lack of memory and what stops a run: none is the clip's fault.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise  # every other clip would meet the same
    except Exception as error:  # decoders and file systems raise all kinds at odd files
        log.debug("%s", name, exc_info=True)
        text = " ".join(str(error).split())[:200]
        raise kind(f"{name}: cannot be read: {type(error).__name__}" + (f": {text}" if text else "")) from error


def open_cache(folder: str | None, gigabytes: float) -> LocalCache | None:
    """The cache of the settings ``data.cache`` and ``data.cache_gb``."""
    return LocalCache(folder, gigabytes) if folder else None


def open_root(root: str | Path, cache: LocalCache | None = None) -> Folder:
    """Open the files below ``root``: a local folder, an fsspec URI such as ``s3://bucket/prefix``, or tar shards.

    Tar shards are named by their index, ``FOLDER/shards.parquet``, which is read here; otherwise no request is made.
    ``cache`` holds copies of remote files. Raises :class:`UserError` if a local folder is missing, and
    :class:`StorageError` if the package for a URI is, or if the URI carries credentials.
    """
    folder, _, name = str(root).rpartition("/")
    if name == SHARD_INDEX:
        # The cache keeps members, not shards.
        return TarFolder(open_folder(folder or "."), cache)
    opened = open_folder(root, cache)
    if isinstance(opened, LocalFolder):
        with contextlib.suppress(FileNotFoundError):
            opened.open(SHARD_INDEX)
            raise UserError(f"{root}: a folder of tar shards; set the root to their index, {root}/{SHARD_INDEX}")
    return opened


def open_folder(root: str | Path, cache: LocalCache | None = None) -> LocalFolder | RemoteFolder:
    """As :func:`open_root`, of anything but an index of tar shards."""
    text = str(root)
    if "://" in text and not isinstance(root, Path):
        protocol, _, rest = text.partition("://")
        if protocol not in ("file", "local"):
            return RemoteFolder(text, cache)
        text = rest
    if not text or not Path(text).is_dir():
        raise UserError(f"{root or '(empty)'}: no such video folder")
    return LocalFolder(Path(text))


def _spellings(key: str) -> Iterator[str]:
    # macOS writes the accents of names as characters of their own (NFD), csv files and keyboards one with the letter.
    yield key
    if not key.isascii():
        yield from {unicodedata.normalize("NFC", key), unicodedata.normalize("NFD", key)} - {key}


def _no_such_file(name: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


class Folder:
    """Where files are read from, by keys, which are relative paths with ``/``.

    Threads of this process may open files ahead, so that several requests are in flight while a clip decodes.
    """

    is_remote: bool = False
    """Whether looking a file up costs a round trip."""
    reads_ahead: bool = False
    """Whether :meth:`request` does anything."""

    def __init__(self) -> None:
        # With the process, since a thread does not survive a fork, and its result would never come; and with the thread
        # that reads, which forgets its own alone.
        self._requested: dict[tuple[int, int, str], Future[VideoFile]] = {}

    def open(self, key: str, *, size_first: bool = False) -> VideoFile:
        """Open the file ``key``; ``size_first`` if it may be large.

        Raises :class:`FileNotFoundError`, and other folders than those of a disk :class:`VideoError` and
        :class:`StorageError`.
        """
        future = self._requested.pop((os.getpid(), threading.get_ident(), key), None)
        return self._open(key, size_first) if future is None else future.result()

    def request(self, key: str, *, size_first: bool = False) -> None:
        """Begin to open a file that :meth:`open` will soon be called for."""
        place = os.getpid(), threading.get_ident(), key
        if not self.reads_ahead or place in self._requested:
            return
        future = self._requested[place] = Future[VideoFile]()

        def run() -> None:
            try:
                future.set_result(self._open(key, size_first))
            except BaseException as error:  # raised where the file is needed
                future.set_exception(error)

        # A daemon and not an executor's thread, for which the process would wait at its end.
        threading.Thread(target=run, daemon=True).start()

    def forget_requests(self) -> None:
        """Drop the files that this thread requested and did not open; their requests finish on their own."""
        here = os.getpid(), threading.get_ident()
        for place in [place for place in list(self._requested) if place[:2] == here]:
            del self._requested[place]

    def _open(self, key: str, size_first: bool) -> VideoFile:
        raise NotImplementedError

    def state(self, key: str) -> tuple[str, ...]:
        """What changes when the content of the file ``key`` does, as far as that shows without reading it.

        Raises as :meth:`open`.
        """
        raise NotImplementedError

    def fetch(self, key: str, start: int, end: int, *, exact: bool = False) -> bytes:
        """Bytes [start, end) of a file; with ``exact`` fewer are an error, otherwise the file's end."""
        raise NotImplementedError

    def name_of(self, key: str) -> str:
        """The file's address, for messages."""
        raise NotImplementedError

    def names(self, folder: str) -> list[str]:
        """Names of the entries of ``folder``, "" for the root; none if there is no such folder."""
        raise NotImplementedError


class LocalFolder(Folder):
    """Files on a disk of this machine."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def _open(self, key: str, size_first: bool = False) -> Path:
        for spelling in _spellings(key):
            if (self._root / spelling).is_file():
                return self._root / spelling
        raise _no_such_file(self.name_of(key))

    def state(self, key: str) -> tuple[str, ...]:
        """Name, size and time of change."""
        path = self._open(key)
        status = path.stat()
        return str(path), str(status.st_size), str(status.st_mtime_ns)

    def fetch(self, key: str, start: int, end: int, *, exact: bool = False) -> bytes:
        """See :class:`Folder`."""
        path = self._open(key)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        if exact and len(data) != end - start:
            raise VideoError(f"{path}: truncated, has fewer than {end:,} bytes")
        return data

    def name_of(self, key: str) -> str:
        """See :class:`Folder`."""
        return str(self._root / key)

    def names(self, folder: str) -> list[str]:
        """See :class:`Folder`."""
        for spelling in _spellings(folder):
            if (self._root / spelling).is_dir():
                return os.listdir(self._root / spelling)
        return []


class RemoteFolder(Folder):
    """Files behind an fsspec URI.

    The connection is made at the first request, once per process: an asynchronous file system does not survive a fork.
    """

    is_remote = True
    reads_ahead = True

    def __init__(self, uri: str, cache: LocalCache | None = None) -> None:
        super().__init__()
        self._uri = uri.rstrip("/")
        self._protocol, _, rest = uri.partition("://")
        # abfs://container@account names no secret; a user or password before an "@" elsewhere may be one.
        has_user = rest.partition("/")[0].rpartition("@")[0] and self._protocol not in ("abfs", "abfss", "az")
        if "?" in rest or has_user or ":" in rest.rpartition("@")[0]:
            raise StorageError(
                f"{self._protocol}://... holds a password or a query; give credentials by the service's environment "
                "variables or files instead"
            )
        self._cache = cache
        self._sizes: LruCache[str, int] = LruCache(16384)
        # Folder -> size of every entry, None for an unknown one, _IS_FOLDER for a folder.
        self.listings: LruCache[str, dict[str, int | None]] = LruCache(16384)
        # A web server's folder is a page for people, if there is one at all.
        self._can_list = self._protocol not in ("http", "https")
        self._connecting = threading.Lock()
        # By process. Those inherited over a fork stay referenced: closing them would reach for a thread that is gone.
        self._systems: dict[int, tuple[fsspec.AbstractFileSystem, str]] = {}
        try:
            fsspec.get_filesystem_class(self._protocol)
        except ImportError:
            package = _PACKAGES.get(self._protocol, f"the fsspec package for {self._protocol}")
            raise StorageError(f"{self._uri}: {self._protocol}:// needs {package}: pip install {package}") from None
        except ValueError:
            raise StorageError(f"{self._uri}: no fsspec file system is called '{self._protocol}'") from None

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned worker makes its own connection, and lists no folder again.
        listed = {name: vars(self)[name] for name in ("_sizes", "listings", "_can_list")}
        return RemoteFolder, (self._uri, self._cache), listed

    def _open(self, key: str, size_first: bool) -> io.BufferedIOBase:
        for spelling in _spellings(key):
            with contextlib.suppress(FileNotFoundError):
                return self._open_as(spelling, size_first)
        raise _no_such_file(self.name_of(key))

    def state(self, key: str) -> tuple[str, ...]:
        """See :class:`Folder`; empty, because a listing's times differ between services."""
        for spelling in _spellings(key):
            with contextlib.suppress(FileNotFoundError):
                if self._exists(spelling):
                    return ()
        raise _no_such_file(self.name_of(key))

    def _exists(self, key: str) -> bool:
        """Whether there is a file ``key``: by listings, one for each folder, or where those are refused by a HEAD."""
        if not self.can_list():
            self._size(key)
            return True
        # From the root down: what a folder does not hold needs no request.
        listing = self._list("")
        *folders, name = key.split("/")
        for depth, folder in enumerate(folders, 1):
            if listing.get(folder) != _IS_FOLDER:
                return False
            listing = self._list("/".join(folders[:depth]))
        return listing.get(name, _IS_FOLDER) != _IS_FOLDER

    def can_list(self) -> bool:
        """Whether the root can be listed; the listing is made, once."""
        if self._can_list and self.listings.get("") is None:
            try:
                self._list("")
            except UserError as error:
                # Reading may be allowed where listing is not; what fails for another reason fails again when it reads.
                log.info("%s; files are looked up one by one", error)
                self._can_list = False
        return self._can_list

    def _open_as(self, key: str, size_first: bool) -> io.BufferedIOBase:
        name = self.name_of(key)
        data = self._cache.get(name) if self._cache else None
        if data is not None:
            return io.BytesIO(data)
        # A small file is one request: nobody asks for its size first. What fills the whole buffer may be longer.
        # Chunks are small by design; whole videos (``size_first``) are not, and would be read to the limit for nothing.
        if not size_first and self._sizes.get(key) is None:
            data = self.fetch(key, 0, _WHOLE_BYTES)
        if data is None or len(data) == _WHOLE_BYTES:
            size = self._size(key)
            if size is None:  # the server sends no size
                data = self.fetch(key, 0, _WHOLE_BYTES) if data is None else data
                if len(data) < _WHOLE_BYTES:
                    return io.BytesIO(data)
                raise VideoError(f"{name}: the server does not tell its size, which {_LARGE} need; {_CURE}")
            if size > _WHOLE_BYTES:
                return RangedFile(lambda start, end: self.fetch(key, start, end, exact=True), size)
            data = self.fetch(key, 0, size, exact=True) if size else b""
        if self._cache:
            self._cache.put(name, data)
        return io.BytesIO(data)

    def name_of(self, key: str) -> str:
        """See :class:`Folder`."""
        return f"{self._uri}/{key}"

    def names(self, folder: str) -> list[str]:
        """See :class:`Folder`."""
        return list(self._list(folder))

    def _list(self, folder: str) -> dict[str, int | None]:
        """Size by name of the entries of ``folder``, see ``listings``; empty if there is no such folder."""
        listing = self.listings.get(folder)
        if listing is None:
            listing = {}
            for spelling in _spellings(folder):
                # A folder that a listing does not have needs no request; of nothing, s3fs would make two.
                parts = spelling.split("/") if spelling else []
                above = [self.listings.get("/".join(parts[:depth])) for depth in range(len(parts))]
                if any(each is not None and each.get(parts[depth]) != _IS_FOLDER for depth, each in enumerate(above)):
                    continue
                entries = list[dict[str, Any]]()
                with contextlib.suppress(FileNotFoundError):  # no such folder is an empty list, on disks as well
                    entries = self._request(spelling, lambda system, path: system.ls(path.rstrip("/"), detail=True))
                for entry in entries:
                    size = _IS_FOLDER if entry["type"] == "directory" else entry.get("size")
                    listing.setdefault(entry["name"].rstrip("/").rpartition("/")[2], size)
            self.listings.put(folder, listing)
        return listing

    def _size(self, key: str) -> int | None:
        size = self._sizes.get(key)
        if size is None:
            # A listing that is there already has the sizes of all files of the folder.
            folder, _, name = key.rpartition("/")
            size = (self.listings.get(folder) or {}).get(name)
            size = None if size == _IS_FOLDER else size
        if size is None:
            info = self._request(key, lambda system, path: _call(system, "info", path))
            if info["type"] == "directory":
                raise _no_such_file(self.name_of(key))
            if info.get("size") is None:
                return None
            size = self._sizes.put(key, int(info["size"]))
        return size

    def fetch(self, key: str, start: int, end: int, *, exact: bool = False) -> bytes:
        """See :class:`Folder`."""

        def get(system: fsspec.AbstractFileSystem, path: str) -> bytes:
            data: bytes = _call(system, "cat_file", path, start=start, end=end)
            # Other services than S3 and http may ignore the range as well.
            if len(data) > max(end - start, _WHOLE_BYTES):
                raise _NoRangesError
            if exact and len(data) != end - start:
                raise _TruncatedError
            return data

        return self._request(key, get)

    def _request(self, key: str, send: Callable[[fsspec.AbstractFileSystem, str], Any]) -> Any:
        """The result of ``send``, tried again where that can help."""
        name = self.name_of(key)
        for attempt in range(_TRIES):
            try:
                # Connecting is part of the try: credentials and name servers fail for a while as well.
                system, prefix = self._connect()
                return send(system, f"{prefix}/{key}")
            except Exception as error:  # every file system raises its own kinds
                fault = _diagnose(error)
            if fault.code == "InvalidRange" or fault.status == 416:  # an empty object has no first byte
                return b""
            if fault.is_missing:
                raise _no_such_file(name)
            if fault.is_final:
                break
            if attempt + 1 < _TRIES:
                # Jitter: workers that were refused together should not come back together.
                time.sleep(_PAUSE * 2**attempt * random.SystemRandom().uniform(0.5, 1))
        tries = "" if fault.is_final else f" in {_TRIES} tries"
        raise fault.kind(f"{name}: {fault.reason}{tries} ({fault.label})")

    def _connect(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """This process's file system, and the root's path in it."""
        with self._connecting:
            if os.getpid() in self._systems:
                return self._systems[os.getpid()]
            system, prefix = fsspec.core.url_to_fs(self._uri, skip_instance_cache=True, **_options(self._protocol))
            system.retries = 1  # s3fs would repeat what is repeated here
            if self._protocol in ("s3", "s3a"):
                system.s3.meta.events.register("after-call.s3.GetObject", _require_range)
            self._systems[os.getpid()] = system, prefix
            return system, prefix


class TarFolder(Folder):
    """Files in tar shards below ``folder``, located by an index (:class:`ShardIndex`) that is held in memory.

    Bytes are read by their place in a shard: one range request a file on a remote folder, whatever the shard's size.
    Raises :class:`VideoError` for a shard that is missing or too short.
    """

    def __init__(self, folder: LocalFolder | RemoteFolder, cache: LocalCache | None = None) -> None:
        super().__init__()
        self._folder, self._cache, self._index = folder, cache, ShardIndex.read(folder)
        self.reads_ahead = folder.reads_ahead

    def _open(self, key: str, size_first: bool) -> io.BufferedIOBase:
        shard, offset, size = self._find(key)

        def fetch(start: int, end: int) -> bytes:
            try:
                return self._folder.fetch(shard, offset + start, offset + end, exact=True)
            except FileNotFoundError:
                raise VideoError(f"{self._folder.name_of(shard)}: no such file, though {SHARD_INDEX} has it") from None

        if size > _WHOLE_BYTES:
            return RangedFile(fetch, size)
        name = self.name_of(key)
        data = self._cache.get(name) if self._cache else None
        if data is None:
            data = fetch(0, size)
            if self._cache:
                self._cache.put(name, data)
        return io.BytesIO(data)

    def state(self, key: str) -> tuple[str, ...]:
        """Shard, offset and size."""
        return tuple(map(str, self._find(key)))

    def _find(self, key: str) -> tuple[str, int, int]:
        for spelling in _spellings(key):
            if (place := self._index.find(spelling)) is not None:
                return place
        raise _no_such_file(self.name_of(key))

    def name_of(self, key: str) -> str:
        """See :class:`Folder`."""
        return f"{self._folder.name_of(SHARD_INDEX)}/{key}"

    def names(self, folder: str) -> list[str]:
        """See :class:`Folder`."""
        return next((names for each in _spellings(folder) if (names := self._index.names(each))), [])


class ShardIndex:
    """Which tar shard holds a file, and where: a parquet file beside the shards, sorted by name.

    Columns: ``name`` (path of the file, as below an ordinary root), ``shard`` (file name), ``offset`` and ``size`` in
    bytes. Arrow columns, because forked loader processes share them: a dict of two million names would be copied.
    """

    def __init__(self, table: Any) -> None:
        """``table`` as read from a file. Raises :class:`ValueError`, or Arrow's errors, for one that is damaged."""
        types = {"name": pa.string(), "offset": pa.int64(), "size": pa.int64()}
        table.validate(full=True)
        columns = {name: table[name].cast(kind).combine_chunks() for name, kind in types.items()}
        self._names, self._shards = columns["name"], table["shard"].combine_chunks()
        self._offsets, self._sizes = columns["offset"].to_numpy(), columns["size"].to_numpy()
        if any(column.null_count for column in (*columns.values(), self._shards)):
            raise ValueError("has empty cells")
        if (self._offsets < 0).any() or (self._sizes < 0).any():
            raise ValueError("has negative offsets or sizes")
        # A shard elsewhere would be read with this process's rights.
        for shard in self._shards.unique().to_pylist():
            if not re.fullmatch(r"([\w-][\w.-]*/)*[\w-][\w.-]*\.tar", shard):
                raise ValueError(f"names the shard {shard!r}")
        if pc.all(pc.less(self._names[:-1], self._names[1:])).as_py() is False:  # None of a single name
            raise ValueError("is not sorted by name")

    @classmethod
    def read(cls, folder: LocalFolder | RemoteFolder) -> ShardIndex:
        """The index in ``folder``. Raises :class:`UserError` if it is missing or damaged."""
        name = folder.name_of(SHARD_INDEX)
        try:
            return cls(pq.read_table(folder.open(SHARD_INDEX), columns=["name", "shard", "offset", "size"]))
        except FileNotFoundError:
            cure = "tools/chunk_videos.py --tar writes it, for shards of other programs tools/prepare_data.py index"
            raise UserError(f"{name}: no such index of tar shards; {cure}") from None
        except UserError:
            raise
        except Exception as error:  # Arrow raises many kinds at damaged files
            raise UserError(f"{name}: not an index of tar shards ({' '.join(str(error).split())[:200]})") from error

    @staticmethod
    def write(folder: Path, members: Sequence[tuple[Any, ...]], with_fields: bool = False) -> None:
        """Write the index of ``members`` into ``folder``, as a whole or not at all.

        A member is (name, shard, offset, size), and ``with_fields`` also (seconds of the video, JSON of what the shard
        has about it), which :mod:`egohod.data.formats.pairs` reads.
        """
        types = {"name": pa.string(), "shard": pa.string(), "offset": pa.int64(), "size": pa.int64()}
        types |= {"seconds": pa.float64(), "fields": pa.string()} if with_fields else {}
        rows = sorted(members)  # by code points, which is the order of UTF-8 bytes and of Python's text
        columns = {name: pa.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(types.items())}
        # A dictionary: a shard has thousands of files.
        columns["shard"] = columns["shard"].dictionary_encode()
        with atomic_write(folder / SHARD_INDEX, sync=True) as temporary:
            pq.write_table(pa.table(columns), temporary)

    def find(self, name: str) -> tuple[str, int, int] | None:
        """Shard, offset and size of a file; None if there is no such file."""
        row = self._row(name)
        if row == len(self._names) or self._names[row].as_py() != name:
            return None
        return self._shards[row].as_py(), int(self._offsets[row]), int(self._sizes[row])

    def members(self) -> Iterator[tuple[str, str, int, int]]:
        """Name, shard, offset and size of every file, in the order of the names."""
        places = zip(self._shards, self._offsets.tolist(), self._sizes.tolist(), strict=True)
        for name, (shard, offset, size) in zip(self._names, places, strict=True):
            yield name.as_py(), shard.as_py(), offset, size

    def names(self, folder: str) -> list[str]:
        """Names of the entries of ``folder``, "" for the root."""
        prefix, entries = f"{folder}/" if folder else "", dict[str, None]()
        for row in range(self._row(prefix), len(self._names)):
            name = self._names[row].as_py()
            if not name.startswith(prefix):
                break
            entries[name[len(prefix) :].partition("/")[0]] = None
        return list(entries)

    def _row(self, name: str) -> int:
        return bisect.bisect_left(range(len(self._names)), name, key=lambda row: self._names[row].as_py())


@dataclass(frozen=True)
class TarMember:
    """A file in a shard on a disk, for code that takes paths and passes them to other processes."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def open(self) -> RangedFile:
        """The file, as one that can seek."""
        folder = LocalFolder(self.shard.parent)
        begin, shard = self.offset, self.shard.name
        return RangedFile(lambda start, end: folder.fetch(shard, begin + start, begin + end, exact=True), self.size)


def tar_members(folder: LocalFolder | RemoteFolder, shard: str) -> Iterator[tuple[str, int, int, Callable[[], bytes]]]:
    """Name, offset, size and a function that reads the content of every file in a plain tar, in its order.

    Only headers are read. Raises :class:`UserError` naming the shard, and the member where one is at fault: tars of
    other people may hold links, devices and paths that lead elsewhere, and may be compressed, cut off or damaged.
    """
    where, seen = folder.name_of(shard), set[str]()
    if isinstance(folder, LocalFolder):
        size, ahead = folder._open(shard).stat().st_size, 0
    else:
        # Two members are further apart than this: what is read ahead of a header is a small file's content.
        size, ahead = folder._size(shard) or 0, 1 << 16
    file = RangedFile(lambda start, end: folder.fetch(shard, start, end, exact=True), size, ahead)
    try:
        head = file.read(tarfile.BLOCKSIZE)
        if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise UserError(f"{where}: a compressed tar, of which no part can be read alone; unpack it to a plain .tar")
        file.seek(0)
        archive, last = tarfile.TarFile(fileobj=file, mode="r"), -1
        while (member := archive.next()) is not None:
            path = PurePosixPath(member.name)
            if member.issym() or member.islnk():
                raise UserError(f"{where}: member '{member.name}' is a link (to '{member.linkname}'); refused")
            if path.is_absolute() or ".." in path.parts or re.search(r"^\\|^\w:|\0", member.name):
                raise UserError(f"{where}: member '{member.name}' leads out of the folder; refused")
            if member.offset_data <= last:
                raise tarfile.ReadError("a member of negative size")
            last = member.offset_data
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise UserError(f"{where}: member '{member.name}' is no plain file; refused")
            if path.as_posix() in seen:
                raise UserError(f"{where}: member '{member.name}' is there twice; refused")
            seen.add(path.as_posix())
            yield path.as_posix(), member.offset_data, member.size, partial(_read_at, file, member)
        # The library takes a damaged header for the end, which is a block of zeros.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {archive.offset:,}")
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        raise UserError(f"{where}: not a tar, or a damaged one ({' '.join(str(error).split())[:200]})") from error


def _read_at(file: RangedFile, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)  # what was read ahead of the header costs no request
    return file.read(member.size)


class RangedFile(io.BufferedIOBase):
    """A large remote object as a seekable file that reads ahead.

    ``fetch`` returns the bytes [start, end), ``ahead`` more than a library reads. Libraries that read from it may
    swallow its errors: ``failure`` is the last one.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, ahead: int | None = None) -> None:
        self._cache = ReadAheadCache(_AHEAD_BYTES if ahead is None else ahead, fetch, size)
        self._size = size
        self._position = 0
        self.failure: Exception | None = None

    def readable(self) -> bool:
        """True."""
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to ``offset`` bytes from the start, the current position or the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, offset + base)
        return self._position

    def tell(self) -> int:
        """The current position."""
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Read ``size`` bytes, or all that are left."""
        end = self._size if size is None or size < 0 else self._position + size
        try:
            data: bytes = self._cache._fetch(self._position, end)
        except Exception as error:
            self.failure = error
            raise
        self._position += len(data)
        return data


# --------------------------------------------------------------------------------------------------
# Requests that fail
# --------------------------------------------------------------------------------------------------


class _TruncatedError(Exception):
    """Fewer bytes than the size of the object."""


class _NoRangesError(Exception):
    """The server sends all of a large file instead of the requested range."""

    status = 200  # read by _code_and_status


_LARGE = f"files above {_WHOLE_BYTES >> 20} MB"
_CURE = "copy the file to a disk, or keep it there in chunks (tools/chunk_videos.py)"


def _require_range(parsed: dict[str, Any], **_: Any) -> None:
    # All requests name a range. A server that ignores it is refused before gigabytes are read into memory.
    if parsed["ResponseMetadata"].get("HTTPStatusCode") == 200 and parsed.get("ContentLength", 0) > _WHOLE_BYTES:
        raise _NoRangesError


def _http_response() -> type:
    """aiohttp's response, except that it refuses to read a whole large file where a range was requested."""
    aiohttp = importlib.import_module("aiohttp")

    class Response(aiohttp.ClientResponse):  # type: ignore[name-defined]
        async def read(self) -> bytes:
            if self.status != 200 or "Range" not in self.request_info.headers:
                return bytes(await super().read())
            # By the stated length, or where none is stated by counting what comes.
            parts, left = list[bytes](), _WHOLE_BYTES - (self.content_length or 0)
            if left >= 0:
                left = _WHOLE_BYTES
                async for part in self.content.iter_chunked(1 << 20):
                    parts.append(part)
                    left -= len(part)
                    if left < 0:
                        break
            if left < 0:
                self.close()
                raise _NoRangesError
            return b"".join(parts)

    return Response


# Names of exceptions, so that no cloud's library has to be imported.
_NO_CONNECTION = {
    "ConnectionError", "ConnectTimeoutError", "ClientConnectionError", "HTTPClientError", "FSTimeoutError",
    "TimeoutError", "gaierror",
}  # fmt: skip
_PARTIAL_RESPONSE = {
    "_TruncatedError", "ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError",
    "ResponseParserError",
}  # fmt: skip
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError", "SSOError",
    "ProfileNotFound", "NoAuthTokenError", "DefaultCredentialsError",
}  # fmt: skip
# Codes of the services, from here on.
_BAD_CREDENTIALS = {
    "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch",
    "TokenRefreshRequired", "AuthorizationHeaderMalformed", "RequestExpired", "401",
}  # fmt: skip
_PASSING_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling"}
_PASSING_STATUS = {408, 425, 429}


class _Fault(NamedTuple):
    """The meaning of a failed request."""

    code: str  # the service's error code, '' if there is none
    status: int  # of HTTP, 0 if there is none
    label: str  # code and status, for messages
    reason: str
    kind: type[UserError]
    is_missing: bool
    is_final: bool  # another try would fare no better


def _diagnose(error: Exception) -> _Fault:
    """Classify an error by its type, its code and its status, never by its message."""
    types = {base.__name__ for base in type(error).__mro__}
    code, status = _code_and_status(error)
    label = ", ".join(part for part in (code, status and f"HTTP {status}") if part) or type(error).__name__
    is_missing = code != "NoSuchBucket" and (isinstance(error, FileNotFoundError) or status == 404)
    is_passing = code in _PASSING_CODES or status in _PASSING_STATUS or status >= 500
    # StorageError: nothing else read from here would fare better, so the run stops. VideoError costs one clip.
    kind: type[UserError] = StorageError
    is_final = True
    if isinstance(error, _NoRangesError):
        reason, kind = f"the server ignores byte ranges, which {_LARGE} need; {_CURE}", VideoError
    elif code == "NoSuchBucket":
        reason = "no such bucket"
    elif types & _NO_CREDENTIALS:
        reason = "there are no credentials"
    elif code in _BAD_CREDENTIALS or status == 401:
        reason = "the credentials have expired or are not valid"
    elif status == 403 or "PermissionError" in types:
        reason = "access denied; S3 also answers so for a missing file if listing is not allowed"
    elif types & _PARTIAL_RESPONSE:
        reason, kind, is_final = "the server sent only a part of the file", VideoError, False
    elif not status and types & _NO_CONNECTION:
        reason, is_final = "the server cannot be reached", False
    else:
        reason, kind, is_final = "the server failed" if is_passing else "cannot be read", VideoError, not is_passing
    return _Fault(code, status, label, reason, kind, is_missing, is_final)


def _code_and_status(error: BaseException) -> tuple[str, int]:
    """The service's error code and the HTTP status, '' and 0 where there are none."""
    # Libraries wrap one another's errors: the first in the chain that has a status counts.
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and "Error" in response:  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response["Error"].get("Code", "")), int(status)
        for name in ("status", "code", "status_code"):  # aiohttp, gcsfs, azure
            if isinstance(getattr(cause, name, None), int):
                return "", getattr(cause, name)
        cause = cause.__cause__
    return "", 0


def _call(system: fsspec.AbstractFileSystem, method: str, *args: Any, **named: Any) -> Any:
    """A request with a time limit where the file system can have one."""
    # Without it a connection that a firewall dropped silently would hang a loader process for ever.
    if isinstance(system, AsyncFileSystem) and not system.asynchronous:
        return sync(system.loop, getattr(system, f"_{method}"), *args, timeout=_REQUEST_TIMEOUT, **named)
    return getattr(system, method)(*args, **named)


def _options(protocol: str) -> dict[str, Any]:
    # fsspec's own configuration (files, FSSPEC_S3_... variables) adds to these or replaces them.
    if protocol in ("http", "https"):
        theirs = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
        return {"client_kwargs": {"response_class": _http_response(), **theirs}}
    if protocol not in ("s3", "s3a"):
        return {}
    ours = {
        "retries": {"total_max_attempts": 1},  # repeated here, with the same pauses for every service
        "connect_timeout": _CONNECT_TIMEOUT,
        "read_timeout": _SILENCE_TIMEOUT,
    }
    theirs = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
    return {"use_listings_cache": False, "config_kwargs": ours | theirs}


# --------------------------------------------------------------------------------------------------
# Caches
# --------------------------------------------------------------------------------------------------


class LruCache(Generic[Key, Value]):
    """A dictionary of the ``size`` entries used last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value of ``key``, None if it is not there or no longer."""
        with contextlib.suppress(KeyError):  # another thread may drop it in the meantime
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> dict[Key, Value]:
        """All of them, the one used last at the end."""
        return dict(self._entries)

    def update(self, entries: Mapping[Key, Value]) -> None:
        """Put all ``entries``."""
        for key, value in entries.items():
            self.put(key, value)

    def put(self, key: Key, value: Value) -> Value:
        """Set and return the value of ``key``."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return value


class LocalCache:
    """Whole objects in a folder of the local disk; beyond ``gigabytes`` the least recently used are removed.

    Any number of processes may share a folder: files appear by being renamed, and are named by a hash, so that no
    key leads out of it. If the disk is full, the process continues without the cache. Raises :class:`UserError` if the
    folder cannot be made.
    """

    def __init__(self, folder: str | Path, gigabytes: float) -> None:
        self._folder = Path(folder)
        self._limit = gigabytes * 1e9
        self._unmeasured = self._limit  # bytes written since the folder was last measured
        self._usable = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache={folder}: cannot be made: {error.strerror}") from error

    def get(self, name: str) -> bytes | None:
        """The object called ``name``, None if it is not here or incomplete."""
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)  # the time of the last use, by which files are removed
        except OSError:
            return None
        end = len(data) - _LENGTH_BYTES
        return data[:end] if end >= 0 and int.from_bytes(data[end:], "little") == end else None

    def put(self, name: str, data: bytes) -> None:
        """Store ``data`` under ``name``."""
        if not self._usable or len(data) > self._limit:  # one object alone would empty the cache
            return
        path = self._path(name)
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path) as temporary:
                # The length is stored behind the data: a power cut can leave a renamed file without its content.
                temporary.write_bytes(data + len(data).to_bytes(_LENGTH_BYTES, "little"))
            self._unmeasured += len(data)
            # Every process measures for itself, and seldom: listing the folder takes longer than writing a file.
            if self._unmeasured > self._limit / 100:
                self._tidy()
        except OSError as error:
            self._usable = False
            log.warning("data.cache=%s: not used any further: %s", self._folder, error.strerror)

    def _path(self, name: str) -> Path:
        digest = content_hash(name)
        return self._folder / digest[:2] / digest

    def _tidy(self) -> None:
        """Remove the least recently used files, and what killed processes left half-written."""
        entries = []
        for path in self._folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # another process tidies as well
                status = path.stat()
                if not path.name.startswith(UNFINISHED_PREFIX):
                    entries.append((status.st_mtime, status.st_size, path))
                elif status.st_mtime < time.time() - 3600:
                    path.unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._unmeasured = 0
