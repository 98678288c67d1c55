"""Requests that fail, the local cache, and roots that cannot be used."""

import errno
import logging
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from servers import SECRET, SIGNATURE, TOKEN, FaultyS3, point_to

from egohod.data import storage
from egohod.data.storage import LocalCache, LruCache, RangedFile, StorageError, VideoError, open_cache, open_root
from egohod.errors import UserError

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    monkeypatch.setattr(storage, "_PAUSE", 0.001)
    server = FaultyS3()
    server.objects["/bucket/v/0000.mp4"] = CONTENT
    point_to(monkeypatch, server.address)
    yield server
    server.close()


def fetch(root: str = "s3://bucket", key: str = "v/0000.mp4", *, size_first: bool = False) -> bytes:
    source = open_root(root).open(key, size_first=size_first)
    assert not isinstance(source, Path)
    return source.read()


def test_a_small_object_is_one_request(s3: FaultyS3) -> None:
    assert fetch() == CONTENT
    assert s3.requests == [f"GET /bucket/v/0000.mp4 bytes=0-{(64 << 20) - 1}"]


def test_a_size_is_requested_once(s3: FaultyS3) -> None:
    root = open_root("s3://bucket")
    for _ in range(3):
        root.open("v/0000.mp4", size_first=True)
    assert [request.split()[0] for request in s3.requests] == ["HEAD", "GET", "GET", "GET"]


@pytest.mark.parametrize("size_first", [False, True])
def test_a_large_object_is_read_in_parts(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch, size_first: bool) -> None:
    monkeypatch.setattr(storage, "_WHOLE_BYTES", 4000)
    monkeypatch.setattr(storage, "_AHEAD_BYTES", 1000)
    root = open_root("s3://bucket")
    root.open("v/0000.mp4", size_first=size_first)
    s3.requests.clear()
    source = root.open("v/0000.mp4", size_first=size_first)
    assert isinstance(source, RangedFile)
    assert s3.requests == []
    s3.script = [(503, "SlowDown"), "half"]
    source.seek(5000)
    assert source.read(100) + source.read(900) == CONTENT[5000:6000]
    assert len(s3.requests) == 3
    assert source.seek(-10, os.SEEK_END) == len(CONTENT) - 10
    assert source.read() == CONTENT[-10:]
    assert source.seek(-5, os.SEEK_CUR) == len(CONTENT) - 5
    assert source.read(100) == CONTENT[-5:]
    assert source.read(1) == b""
    assert source.failure is None
    s3.script = [(403, "AccessDenied")]
    source.seek(0)
    with pytest.raises(StorageError):
        source.read(1)
    assert isinstance(source.failure, StorageError)


PASSING: dict[str, tuple[int, str] | str] = {
    "503": (503, "SlowDown"),
    "500": (500, "InternalError"),
    "502 of a proxy": (502, "BadGateway"),
    "half": "half",
    "drop": "drop",
}


@pytest.mark.parametrize("size_first", [False, True])
@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(s3: FaultyS3, fault: str, size_first: bool) -> None:
    s3.script = [PASSING[fault]] * 2
    if size_first and fault == "half":
        s3.script.insert(0, "ok")  # a HEAD has no body to be cut
    assert fetch(size_first=size_first) == CONTENT
    assert len(s3.requests) == 3 + size_first


def test_a_server_that_keeps_failing_costs_one_clip(s3: FaultyS3) -> None:
    s3.script = [(503, "SlowDown")] * 5
    text = r"^s3://bucket/v/0000\.mp4: the server failed in 5 tries \(SlowDown, HTTP 503\)$"
    with pytest.raises(VideoError, match=text):
        fetch()
    s3.script = ["half"] * 5
    with pytest.raises(VideoError, match="only a part of the file in 5 tries"):
        fetch()
    assert len(s3.requests) == 10


FINAL: dict[str, tuple[tuple[int, str], str]] = {
    "denied": ((403, "AccessDenied"), "access denied"),
    "expired": ((400, "ExpiredToken"), "credentials have expired or are not valid (ExpiredToken, HTTP 400)"),
    "unknown key": ((403, "InvalidAccessKeyId"), "credentials have expired or are not valid"),
    "wrong secret": ((403, "SignatureDoesNotMatch"), "credentials have expired or are not valid"),
    "no bucket": ((404, "NoSuchBucket"), "no such bucket"),
}


@pytest.mark.parametrize("fault", FINAL)
def test_what_stays_wrong_ends_at_once_and_shows_no_secret(
    s3: FaultyS3, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "egohod")
    answer, text = FINAL[fault]
    s3.script = [answer]
    with pytest.raises(StorageError) as caught:
        fetch()
    assert str(caught.value).startswith("s3://bucket/v/0000.mp4: ")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(s3.requests) == 1
    logged = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert not [secret for secret in (SECRET, TOKEN, SIGNATURE, "AKIA") if secret in logged]


def test_a_missing_key(s3: FaultyS3) -> None:
    with pytest.raises(FileNotFoundError):
        fetch(key="v/0001.mp4")
    assert len(s3.requests) == 1
    with pytest.raises(FileNotFoundError):
        fetch(key="v/0001.mp4", size_first=True)


def test_an_answer_that_cannot_be_parsed_is_not_retried(s3: FaultyS3) -> None:
    s3.script = [(409, "SomethingNew")]
    with pytest.raises(VideoError, match=r"cannot be read \(SomethingNew, HTTP 409\)"):
        fetch()
    assert len(s3.requests) == 1


def test_missing_credentials(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match=r"there are no credentials \(NoCredentialsError\)"):
        fetch()
    assert s3.requests == []


def test_a_server_that_is_gone(s3: FaultyS3) -> None:
    root = open_root("s3://bucket")
    root.open("v/0000.mp4")
    s3.close()
    with pytest.raises(StorageError, match=r"s3://bucket/v/0000\.mp4: the server cannot be reached in 5 tries"):
        root.open("v/0000.mp4")


def test_a_server_that_never_answers(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_SILENCE_TIMEOUT", 0.2)
    monkeypatch.setattr(storage, "_TRIES", 2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageError, match="the server cannot be reached in 2 tries"):
            fetch()


def test_a_body_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on a whole request holds for every asynchronous file system."""
    monkeypatch.setattr(storage, "_REQUEST_TIMEOUT", 0.3)
    monkeypatch.setattr(storage, "_TRIES", 2)
    monkeypatch.setattr(storage, "_PAUSE", 0.001)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(StorageError, match="the server cannot be reached in 2 tries"):
            fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/videos")


def test_roots_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="no fsspec file system is called 's4'"):
        open_root("s4://bucket")
    for uri in (f"s3://key:{SECRET}@bucket/x", f"https://host/videos?{SIGNATURE}"):
        with pytest.raises(StorageError, match="holds a password or a query") as caught:
            open_root(uri)
        assert not [secret for secret in (SECRET, SIGNATURE) if secret in str(caught.value)]

    def missing(_: str) -> None:
        raise ImportError("Install s3fs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(StorageError, match=r"s3://bucket: s3:// needs s3fs: pip install s3fs"):
        open_root("s3://bucket")


def test_a_file_uri_is_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"x")
    assert open_root(f"file://{tmp_path}").open("v.mp4") == tmp_path / "v.mp4"
    with pytest.raises(UserError, match="no such video folder"):
        open_root(f"file://{tmp_path}/none")


# --------------------------------------------------------------------------------------------------
# The cache
# --------------------------------------------------------------------------------------------------


def test_fetched_files_stay_in_the_cache(s3: FaultyS3, tmp_path: Path) -> None:
    cache = open_cache(str(tmp_path / "cache"), 1.0)
    for key in ("v/0000.mp4", "v/0000.mp4"):
        assert open_root("s3://bucket", cache).open(key).read() == CONTENT  # type: ignore[union-attr]
    assert len(s3.requests) == 1
    s3.objects["/bucket/a/b/v/0000.mp4"] = b"another"
    assert open_root("s3://bucket/a/b", cache).open("v/0000.mp4").read() == b"another"  # type: ignore[union-attr]
    assert open_cache(None, 1.0) is None


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*"))


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 10_100 / 1e9)
    for number in range(10):
        cache.put(str(number), bytes([number]) * 1000)
        os.utime(cache._path(str(number)), (number, number))
    assert cache.get("0") == bytes(1000)
    cache.put("10", bytes(1000))
    assert [number for number in range(11) if cache.get(str(number)) is None] == [1]
    assert held(tmp_path) <= 10_100
    cache.put("too large", bytes(20_000))
    assert cache.get("too large") is None


def test_names_lead_nowhere_else(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path / "cache", 1)
    for name in ("../../outside", "/etc/passwd", "a\0b", "\udcff", ""):
        cache.put(name, name.encode("utf-8", "surrogatepass"))
        assert cache.get(name) == name.encode("utf-8", "surrogatepass")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert len(list((tmp_path / "cache").glob("??/" + "?" * 64))) == 5


def test_an_incomplete_file_is_not_believed(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 1)
    cache.put("a", b"content")
    path = cache._path("a")
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[1:], bytes(len(whole))):
        path.write_bytes(damaged)
        assert cache.get("a") is None


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 1)
    cache.put("a", b"content")
    old, new = (cache._path("a").with_name(f".tmp-{age}") for age in ("old", "new"))
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    LocalCache(tmp_path, 1).put("b", b"content")
    assert not old.exists()
    assert new.exists()
    assert cache.get("a") == b"content"


def test_a_full_disk_only_ends_the_caching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = LocalCache(tmp_path, 1)

    def full(path: Path, _: bytes) -> None:
        """A write that fails as on a full disk."""
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(3):
        cache.put("a", bytes(100_000))
    logged = [record.getMessage() for record in caplog.records]
    assert logged == [f"data.cache={tmp_path}: not used any further: No space left on device"]
    assert list(tmp_path.glob("*/*")) == []
    assert cache.get("a") is None


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache=.*file/cache: cannot be made: Not a directory"):
        LocalCache(tmp_path / "file" / "cache", 1)


def use(folder: Path, seed: int) -> None:
    cache = LocalCache(folder, 20_000 / 1e9)
    for turn in range(300):
        name = str((turn * 7 + seed) % 40)
        content = name.encode() * 500
        assert cache.get(name) in (None, content)
        cache.put(name, content)


def test_processes_share_a_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    users = [context.Process(target=use, args=(tmp_path, seed)) for seed in range(3)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert [user.exitcode for user in users] == [0, 0, 0]
    assert 0 < held(tmp_path) <= 23_000
    assert not list(tmp_path.glob("*/.tmp-*"))


def test_the_oldest_is_forgotten() -> None:
    recent: LruCache[int, str] = LruCache(2)
    recent.put(1, "a")
    recent.put(2, "b")
    assert recent.get(1) == "a"
    recent.put(3, "c")
    assert [recent.get(number) for number in (1, 2, 3)] == ["a", None, "c"]


@pytest.fixture
def plain(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> FaultyS3:
    """A server without byte ranges, and a file of 32 MB where 1 MB is large."""
    monkeypatch.setattr(storage, "_WHOLE_BYTES", 1 << 20)
    s3.ranges = False
    s3.objects["/bucket/long.mp4"] = bytes(32 << 20)
    return s3


@pytest.mark.parametrize("protocol", ["s3", "http"])
@pytest.mark.parametrize("size_first", [False, True])
def test_a_server_without_byte_ranges(plain: FaultyS3, protocol: str, size_first: bool) -> None:
    root = "s3://bucket" if protocol == "s3" else f"{plain.address}/bucket"
    # Small files need none.
    assert fetch(root, size_first=size_first) == CONTENT
    plain.sent = 0
    with pytest.raises(
        VideoError, match=r"long\.mp4: the server ignores byte ranges, which files above 64 MB need; copy .*HTTP 200"
    ) as caught:
        fetch(root, "long.mp4", size_first=size_first)
    assert not isinstance(caught.value, StorageError)
    assert [request.split()[0] for request in plain.requests].count("GET") == 2
    assert plain.sent < 16 << 20, "the file must not be downloaded"


def test_a_server_that_does_not_tell_sizes(plain: FaultyS3) -> None:
    plain.sizes = False
    root = f"{plain.address}/bucket"
    for size_first in (False, True):
        assert fetch(root, size_first=size_first) == CONTENT
        with pytest.raises(VideoError, match=r"long\.mp4: the server ignores byte ranges, which files above"):
            fetch(root, "long.mp4", size_first=size_first)
    plain.ranges = True
    with pytest.raises(VideoError, match=r"long\.mp4: the server does not tell its size, which files above 64 MB need"):
        fetch(root, "long.mp4")
    assert plain.sent < 64 << 20
