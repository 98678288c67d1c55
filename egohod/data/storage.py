"""Where bytes come from: a local folder, or any fsspec URI, with retries and a cache on the local disk.

Nothing that a library says about a failed request is ever shown: it may hold a signed address or a token. Messages
name the address of the file, the service's error code and the HTTP status, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import io
import logging
import os
import random
import tempfile
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.caching import ReadAheadCache

from egohod.errors import UserError

log = logging.getLogger(__name__)

# Up to this size an object is fetched whole, with one request, and decoded from memory; chunks are about 1 MB.
_WHOLE_BYTES = 64 << 20
# Of a larger one, this much is read ahead.
_AHEAD_BYTES = 2 << 20
# A request is tried so often, with pauses of 0.5, 1, 2 and 4 s between.
_TRIES, _PAUSE = 5, 0.5
# Seconds: to connect, without a byte, and for a whole request.
_CONNECT_TIMEOUT, _SILENCE_TIMEOUT, _REQUEST_TIMEOUT = 10, 30, 120
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_LENGTH_BYTES = 8

Source = Path | io.BufferedIOBase
Key = TypeVar("Key")
Value = TypeVar("Value")


class VideoError(UserError):
    """A video, or a part of one, that cannot be read; the message names the file and the reason."""


class StorageError(UserError):
    """Storage that cannot be used at all (credentials, bucket, dead server): no other clip would fare better."""


@contextlib.contextmanager
def one_clip(name: str, kind: type[VideoError] = VideoError) -> Iterator[None]:
    """Within, whatever is raised because of the file or clip ``name`` is a ``kind``, so that it costs that clip alone.

    Libraries raise all kinds at odd files. A :class:`UserError` is passed on, as are too little memory and what stops
    a run, none of which is the clip's fault.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        log.debug("%s", name, exc_info=True)
        text = " ".join(str(error).split())[:200]
        raise kind(f"{name}: cannot be read: {type(error).__name__}" + (f": {text}" if text else "")) from error


class Files(Protocol):
    """Files below one root."""

    costly: bool
    """Whether a look costs a round trip."""

    def open(self, key: str, *, size_first: bool = False) -> Source:
        """The file ``key`` (a relative path with ``/``), to read from.

        ``size_first`` says that the file may be large. Raises :class:`FileNotFoundError`, :class:`VideoError` and
        :class:`StorageError`.
        """
        ...

    def name_of(self, key: str) -> str:
        """How messages call the file."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of what lies in ``folder``; none if there is no such folder."""
        ...


def open_cache(folder: str | None, gigabytes: float) -> LocalCache | None:
    """The cache of the settings ``data.cache`` and ``data.cache_gb``."""
    return LocalCache(folder, gigabytes) if folder else None


def open_root(root: str | Path, cache: LocalCache | None = None) -> Files:
    """The files below ``root``, a local folder or an fsspec URI such as ``s3://bucket/prefix``.

    ``cache`` keeps what comes from elsewhere. No request is made here. Raises :class:`UserError` if a local folder
    is missing, and :class:`StorageError` if the package for a URI is, or if the URI carries credentials.
    """
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
    """A file's name, and the same with its accents in the other form of Unicode.

    macOS writes the accents of names as characters of their own (NFD), csv files and keyboards one with the letter.
    """
    yield key
    if not key.isascii():
        yield from {unicodedata.normalize("NFC", key), unicodedata.normalize("NFD", key)} - {key}


class LocalFolder:
    """Files on a disk of this machine, see :class:`Files`."""

    costly = False

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, key: str, *, size_first: bool = False) -> Path:
        """See :class:`Files`."""
        for each in _spellings(key):
            if (self._root / each).is_file():
                return self._root / each
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._root / key))

    def name_of(self, key: str) -> str:
        """See :class:`Files`."""
        return str(self._root / key)

    def names(self, folder: str) -> list[str]:
        """See :class:`Files`."""
        for each in _spellings(folder):
            if (self._root / each).is_dir():
                return os.listdir(self._root / each)
        return []


class RemoteFolder:
    """Files behind an fsspec URI, see :class:`Files`.

    The connection is made at the first request, once per process: an asynchronous file system does not survive a
    fork.
    """

    costly = True

    def __init__(self, uri: str, cache: LocalCache | None = None) -> None:
        self._uri = uri.rstrip("/")
        self._protocol, _, rest = uri.partition("://")
        # abfs://container@account names no secret; a user or password before an "@" elsewhere may be one.
        named = rest.partition("/")[0].rpartition("@")[0] and self._protocol not in ("abfs", "abfss", "az")
        if "?" in rest or named or ":" in rest.rpartition("@")[0]:
            raise StorageError(
                f"{self._protocol}://... holds a password or a query; give credentials by the service's environment "
                "variables or files instead"
            )
        self._cache = cache
        self._sizes: Recent[str, int] = Recent(16384)
        self._listings: Recent[str, list[str]] = Recent(4096)
        # By process: those inherited over a fork are kept, since closing them would reach for a thread that is gone.
        self._systems: dict[int, tuple[fsspec.AbstractFileSystem, str]] = {}
        try:
            fsspec.get_filesystem_class(self._protocol)
        except ImportError:
            package = _PACKAGES.get(self._protocol, f"the fsspec package for {self._protocol}")
            raise StorageError(f"{self._uri}: {self._protocol}:// needs {package}: pip install {package}") from None
        except ValueError:
            raise StorageError(f"{self._uri}: no fsspec file system is called '{self._protocol}'") from None

    def open(self, key: str, *, size_first: bool = False) -> io.BufferedIOBase:
        """See :class:`Files`."""
        for each in _spellings(key):
            with contextlib.suppress(FileNotFoundError):
                return self._open(each, size_first)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.name_of(key))

    def _open(self, key: str, size_first: bool) -> io.BufferedIOBase:
        name = self.name_of(key)
        data = self._cache.get(name) if self._cache else None
        if data is None:
            # Small files need no question about their size.
            if not size_first and key not in self._sizes:
                data = self._fetch(key, 0, _WHOLE_BYTES)
            if data is None or len(data) == _WHOLE_BYTES:
                size = self._size(key)
                if size is None:  # the server does not say
                    data = self._fetch(key, 0, _WHOLE_BYTES) if data is None else data
                    if len(data) < _WHOLE_BYTES:
                        return io.BytesIO(data)
                    raise VideoError(f"{name}: the server does not tell its size, which {_LARGE} need; {_CURE}")
                if size > _WHOLE_BYTES:
                    return RangedFile(lambda start, end: self._fetch(key, start, end, exact=True), size)
                data = self._fetch(key, 0, size, exact=True) if size else b""
            if self._cache:
                self._cache.put(name, data)
        return io.BytesIO(data)

    def name_of(self, key: str) -> str:
        """See :class:`Files`."""
        return f"{self._uri}/{key}"

    def names(self, folder: str) -> list[str]:
        """See :class:`Files`."""
        known = self._listings.get(folder)
        if known is None:
            found = list[str]()
            for each in _spellings(folder):
                with contextlib.suppress(FileNotFoundError):
                    found = found or self._request(each, lambda system, path: system.ls(path, detail=False))
            known = self._listings.put(folder, [path.rstrip("/").rpartition("/")[2] for path in found])
        return known

    def _size(self, key: str) -> int | None:
        size = self._sizes.get(key)
        if size is None:
            info = self._request(key, lambda system, path: _call(system, "info", path))
            if info["type"] == "directory":
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.name_of(key))
            if info.get("size") is None:
                return None
            size = self._sizes.put(key, int(info["size"]))
        return size

    def _fetch(self, key: str, start: int, end: int, *, exact: bool = False) -> bytes:
        """Bytes [start, end) of an object; with ``exact`` fewer are an error, otherwise the object's end."""

        def get(system: fsspec.AbstractFileSystem, path: str) -> bytes:
            data: bytes = _call(system, "cat_file", path, start=start, end=end)
            if len(data) > max(end - start, _WHOLE_BYTES):
                raise _NoRangesError
            if exact and len(data) != end - start:
                raise _TruncatedError
            return data

        return self._request(key, get)

    def _request(self, key: str, ask: Callable[[fsspec.AbstractFileSystem, str], Any]) -> Any:
        """What ``ask`` returns, tried again where that can help."""
        name = self.name_of(key)
        for attempt in range(_TRIES):
            try:
                system, prefix = self._system()
                return ask(system, f"{prefix}/{key}")
            except Exception as error:  # every file system raises its own kinds
                fault = _Fault(error)
            if fault.is_empty_object:
                return b""
            if fault.is_missing:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            if fault.is_final:
                break
            if attempt + 1 < _TRIES:
                # Workers that were refused together should not come back together.
                time.sleep(_PAUSE * 2**attempt * random.SystemRandom().uniform(0.5, 1))
        tries = "" if fault.is_final else f" in {_TRIES} tries"
        raise (StorageError if fault.is_hopeless else VideoError)(f"{name}: {fault.what}{tries} ({fault.code})")

    def _system(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """This process's file system, and the root's path in it."""
        known = self._systems.get(os.getpid())
        if known is None:
            known = fsspec.core.url_to_fs(self._uri, skip_instance_cache=True, **_options(self._protocol))
            known[0].retries = 1  # s3fs would repeat what is repeated here
            if self._protocol in ("s3", "s3a"):
                known[0].s3.meta.events.register("after-call.s3.GetObject", _require_range)
            self._systems[os.getpid()] = known
        return known


class RangedFile(io.BufferedIOBase):
    """A large remote object as a seekable file that reads ahead.

    ``fetch`` returns the bytes [start, end). Libraries that read from it may swallow its errors: ``failure`` is the
    last one.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._cache = ReadAheadCache(_AHEAD_BYTES, fetch, size)
        self._size = size
        self._at = 0
        self.failure: Exception | None = None

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to ``offset`` bytes from the start, the current place or the end."""
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        """The current place."""
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """The next ``size`` bytes, or all that are left."""
        end = self._size if size is None or size < 0 else self._at + size
        try:
            data: bytes = self._cache._fetch(self._at, end)
        except Exception as error:
            self.failure = error
            raise
        self._at += len(data)
        return data


# --------------------------------------------------------------------------------------------------
# Requests that fail
# --------------------------------------------------------------------------------------------------


class _TruncatedError(Exception):
    """Fewer bytes came than were promised."""


class _NoRangesError(Exception):
    """A part of a large file was asked for, and the server sends all of it."""

    status = 200


_LARGE = f"files above {_WHOLE_BYTES >> 20} MB"
_CURE = "copy the file to a disk, or keep it there in chunks (tools/chunk_videos.py)"


def _require_range(parsed: dict[str, Any], **_: Any) -> None:
    """Refuse an answer of S3 with a whole large object, before its content is read; all requests ask for a range."""
    if parsed["ResponseMetadata"].get("HTTPStatusCode") == 200 and parsed.get("ContentLength", 0) > _WHOLE_BYTES:
        raise _NoRangesError


def _http_response() -> type:
    """aiohttp's response, except that it refuses to read a whole large file where a range was asked for."""
    aiohttp = importlib.import_module("aiohttp")

    class Response(aiohttp.ClientResponse):  # type: ignore[name-defined]
        async def read(self) -> bytes:
            if self.status != 200 or "Range" not in self.request_info.headers:
                return bytes(await super().read())
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
    "ConnectionError",  # Python's and botocore's
    "ConnectTimeoutError",
    "ClientConnectionError",
    "HTTPClientError",
    "FSTimeoutError",
    "TimeoutError",
    "gaierror",
}
_HALF_AN_ANSWER = {
    "_TruncatedError",
    "ClientPayloadError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseStreamingError",
    "ResponseParserError",
}
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "SSOError",
    "ProfileNotFound",
    "NoAuthTokenError",
    "DefaultCredentialsError",
}
_BAD_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "AuthorizationHeaderMalformed",
    "RequestExpired",
    "401",
}
_PASSING_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling"}
_PASSING_STATUS = {408, 425, 429}


class _Fault:
    """What a failed request means, told from its type, its error code and its status, never from its message."""

    def __init__(self, error: Exception) -> None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        code, status = _code_and_status(error)
        self.code = ", ".join(part for part in (code, status and f"HTTP {status}") if part) or type(error).__name__
        passing = code in _PASSING_CODES or status in _PASSING_STATUS or status >= 500
        self.is_empty_object = code == "InvalidRange" or status == 416
        self.is_missing = isinstance(error, FileNotFoundError) and code != "NoSuchBucket"
        self.is_missing |= status == 404 and code != "NoSuchBucket"
        # Nothing else read from here would fare better.
        self.is_hopeless = True
        self.is_final = True
        if isinstance(error, _NoRangesError):
            self.is_hopeless = False
            self.what = f"the server ignores byte ranges, which {_LARGE} need; {_CURE}"
        elif code == "NoSuchBucket":
            self.what = "no such bucket"
        elif kinds & _NO_CREDENTIALS:
            self.what = "no credentials were found"
        elif code in _BAD_CREDENTIALS or status == 401:
            self.what = "the credentials have expired or are not valid"
        elif status == 403 or "PermissionError" in kinds:
            self.what = "access denied; S3 also says so of a missing file where listing is not allowed"
        elif not status and kinds & _NO_CONNECTION and not kinds & _HALF_AN_ANSWER:
            self.what, self.is_final = "the server cannot be reached", False
        else:
            self.is_hopeless = False
            self.is_final = not (passing or kinds & _HALF_AN_ANSWER)
            if kinds & _HALF_AN_ANSWER:
                self.what = "the server sent only a part of the file"
            else:
                self.what = "the server failed" if passing else "cannot be read"


def _code_and_status(error: BaseException) -> tuple[str, int]:
    """The service's error code and the HTTP status, '' and 0 where there are none."""
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
    if isinstance(system, AsyncFileSystem) and not system.asynchronous:
        return sync(system.loop, getattr(system, f"_{method}"), *args, timeout=_REQUEST_TIMEOUT, **named)
    return getattr(system, method)(*args, **named)


def _options(protocol: str) -> dict[str, Any]:
    """Settings that fsspec's own configuration (files, FSSPEC_S3_... variables) may add to or replace."""
    if protocol in ("http", "https"):
        theirs = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
        return {"client_kwargs": {"response_class": _http_response(), **theirs}}
    if protocol not in ("s3", "s3a"):
        return {}
    ours = {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": _CONNECT_TIMEOUT,
        "read_timeout": _SILENCE_TIMEOUT,
    }
    theirs = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
    return {"use_listings_cache": False, "config_kwargs": ours | theirs}


# --------------------------------------------------------------------------------------------------
# Memories
# --------------------------------------------------------------------------------------------------


class Recent(Generic[Key, Value]):
    """A memory of the ``size`` entries used last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Value | None:
        """What was put there, if it is still known."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Key, value: Value) -> Value:
        """Remember ``value`` and return it."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return value


class LocalCache:
    """Whole objects in a folder of the local disk, those used longest ago removed beyond ``gigabytes``.

    Any number of processes may share a folder: files appear by being renamed, and are named by a hash, so that no
    key leads out of it. Each process measures the folder anew when it has written 1 % of the limit. Where the disk
    is full the process goes on without the cache. Raises :class:`UserError` if the folder cannot be made.
    """

    def __init__(self, folder: str | Path, gigabytes: float) -> None:
        self._folder = Path(folder)
        self._limit = gigabytes * 1e9
        self._unmeasured = self._limit
        self._usable = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache={folder}: cannot be made: {error.strerror}") from error

    def get(self, name: str) -> bytes | None:
        """The object called ``name``, if it is here and complete."""
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        # The length stands at the end: a power cut can leave a renamed file without its content.
        end = len(data) - _LENGTH_BYTES
        return data[:end] if end >= 0 and int.from_bytes(data[end:], "little") == end else None

    def put(self, name: str, data: bytes) -> None:
        """Keep ``data`` under ``name``."""
        if not self._usable or len(data) > self._limit:
            return
        path, temporary = self._path(name), None
        try:
            path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix="part-", delete=False) as file:
                temporary = file.name
                file.write(data)
                file.write(len(data).to_bytes(_LENGTH_BYTES, "little"))
            os.replace(temporary, path)
            self._unmeasured += len(data)
            if self._unmeasured > self._limit / 100:
                self._tidy()
        except OSError as error:
            self._usable = False
            log.warning("data.cache=%s: not used any further: %s", self._folder, error.strerror)
            if temporary:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        return self._folder / digest[:2] / digest

    def _tidy(self) -> None:
        """Remove what was used longest ago, and what killed processes left half-written."""
        found = []
        for path in self._folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # another process tidies as well
                about = path.stat()
                if not path.name.startswith("part-"):
                    found.append((about.st_mtime, about.st_size, path))
                elif about.st_mtime < time.time() - 3600:
                    path.unlink()
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._unmeasured = 0
