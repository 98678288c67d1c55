"""Clips from a real S3 server and other remote roots: layouts, requests, forked workers."""

import logging
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from servers import FaultyS3, moto_server, point_to
from video_files import DECODERS, encode, numbers, opener

from egohod.config import Config
from egohod.data import storage
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, Tokenizer, collate_views
from egohod.data.formats import read_clips
from egohod.data.loader import eval_loader
from egohod.data.storage import LocalCache, StorageError
from egohod.data.videos import VideoError, VideoStore, segment_indices
from egohod.distributed import Distributed
from egohod.evaluation.runner import missing_clips
from egohod.training.build import build_dataset

ROOT = "s3://videos/some/prefix"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 5.5 s in every layout."""
    root = tmp_path_factory.mktemp("videos")
    for chunk, count in enumerate((20, 20, 15)):
        path = encode(root / "cut" / f"{chunk:04d}.mp4", count, first=20 * chunk)
        (root / "avion.mp4").mkdir(exist_ok=True)
        (root / "avion.mp4" / f"{2 * chunk}.mp4").write_bytes(path.read_bytes())
    encode(root / "P01" / "whole.MP4", 55)
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """A moto server with the folder in its bucket ``videos``."""
    with moto_server() as address, pytest.MonkeyPatch.context() as patch:
        point_to(patch, address)
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("videos")
        for path in folder.rglob("*.[mM]*4"):
            if path.is_file():
                system.pipe_file(f"videos/some/prefix/{path.relative_to(folder)}", path.read_bytes())
        yield address


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_PAUSE", 0.001)
    point_to(monkeypatch, server)


def store(root: str = ROOT, layout: str = "auto", decoder: str = "pyav", cache: LocalCache | None = None) -> VideoStore:
    return VideoStore(root, layout, 2.0, opener(decoder), cache)


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("large", [False, True])
def test_clips_are_those_of_the_disk(folder: Path, decoder: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:  # read in parts instead of whole
        monkeypatch.setattr(storage, "_WHOLE_BYTES", 2000)
        monkeypatch.setattr(storage, "_AHEAD_BYTES", 3000)
    remote = store(decoder=decoder)
    for video in ("cut", "avion", "P01/whole"):
        for start, end in ((0.3, 1.4), (1.2, 4.8), (5.0, 9.0)):
            frames = remote.read(video, start, end, 6).pictures
            last = min(round(end * 10), 55)
            assert numbers(frames) == segment_indices(round(start * 10), last, 6).tolist()
            assert np.array_equal(frames, store(str(folder), decoder=decoder).read(video, start, end, 6).pictures)


@pytest.mark.usefixtures("s3")
def test_what_is_missing() -> None:
    for video, start, text in (
        ("none", 0, r"^s3://videos/some/prefix/none\.mp4: no such file \(nor none/0000\.mp4, none\.mp4/0\.mp4\)$"),
        ("cut", 80, r"^s3://videos/some/prefix/cut/0040\.mp4: no such file$"),
        ("avion", 80, r"^s3://videos/some/prefix/avion\.mp4/80\.mp4: no such file$"),
        ("cut", 5.6, "the clip begins at"),
        ("P01/whole", 5.6, "the clip begins at"),
    ):
        with pytest.raises(VideoError, match=text):
            store().read(video, start, start + 1, 4)
    for layout in ("auto", "whole", "chunks"):
        with pytest.raises(StorageError, match=r"s3://nowhere/cut.*: no such bucket"):
            store("s3://nowhere", layout).read("cut", 0, 1, 4)


def dataset(tmp_path: Path, cache: LocalCache | None = None) -> ClipDataset:
    rows = [f"{video},{start},{start + 1.5},text {start}" for video in ("cut", "avion") for start in range(4)]
    (tmp_path / "clips.csv").write_text("video_id,start_second,end_second,text\n" + "\n".join(rows) + "\n")
    return ClipDataset(
        [(read_clips(tmp_path / "clips.csv"), SourceConfig(root=ROOT, chunk_seconds=2.0))],
        size=32,
        num_frames=4,
        tokenizer=Tokenizer(),
        cache=cache,
    )


@pytest.mark.usefixtures("s3")
def test_forked_workers_have_connections_of_their_own(tmp_path: Path) -> None:
    clips = dataset(tmp_path, LocalCache(tmp_path / "cache", 1))
    # The parent has a connection and its thread already; the workers must not use them.
    before = [clips[index]["video"] for index in range(8)]
    for cached in (True, False):
        clips = clips if cached else dataset(tmp_path)
        if not cached:
            clips[0]
        batches = list(eval_loader(clips, range(8), 2, 2, collate=collate_views))
        after = [video for batch in batches for video in batch["video"]]
        assert all((one == other).all() for one, other in zip(before, after, strict=True))
    assert len(list((tmp_path / "cache").glob("*/*"))) == 6


def test_a_refused_root_ends_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not with eleven clips in a row; and also when it happens in a worker."""
    caplog.set_level(logging.INFO)
    server = FaultyS3()
    try:
        point_to(monkeypatch, server.address)
        server.script = [(400, "ExpiredToken")] * 100
        with pytest.raises(StorageError, match=r"^s3://videos/.*the credentials have expired or are not valid"):
            list(eval_loader(dataset(tmp_path), range(8), 2, 1, collate=collate_views))
        clips = dataset(tmp_path)
        clips.train = True
        with pytest.raises(StorageError, match="the credentials have expired"):
            clips[0, 0]
    finally:
        server.close()


@pytest.fixture
def counting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    server = FaultyS3()
    for name in ("one", "two"):
        for path in (folder / "avion.mp4").iterdir():
            server.objects[f"/videos/{name}.mp4/{path.name}"] = path.read_bytes()
    point_to(monkeypatch, server.address)
    yield server
    server.close()


def test_auto_costs_nothing_once_it_knows(counting: FaultyS3) -> None:
    reader = store("s3://videos")
    reader.read("one", 0, 1, 4)
    assert len(counting.requests) == 3  # no chunk called 0000.mp4 nor 0000.MP4
    assert all(request.startswith("GET /videos/one") for request in counting.requests)
    counting.requests.clear()
    reader.read("one", 2, 3, 4)
    reader.read("two", 0, 1, 4)  # laid out as the last one
    assert len(counting.requests) == 2
    reader.read("two", 1, 3, 4)
    assert len(counting.requests) == 4


def test_a_dataset_is_located_once_and_a_missing_one_is_searched_once(counting: FaultyS3, folder: Path) -> None:
    whole = (folder / "P01" / "whole.MP4").read_bytes()
    counting.objects |= {f"/videos/EPIC-KITCHENS/P01/videos/P01_0{number}.MP4": whole for number in range(3)}
    reader = store("s3://videos")
    for number, most in enumerate((34, 2, 2)):
        counting.requests.clear()
        assert numbers(reader.read(f"P01_0{number}", 1, 2, 4).pictures) == segment_indices(10, 20, 4).tolist()
        assert len(counting.requests) <= most  # two for each: the size of a whole file is requested first
    for most in (80, 0):
        counting.requests.clear()
        with pytest.raises(VideoError, match=r"P02_07\.mp4: no such file \(nor P02/videos/P02_07\.mp4, "):
            reader.read("P02_07", 1, 2, 4)
        assert len(counting.requests) <= most


def test_the_cache_spares_requests(counting: FaultyS3, tmp_path: Path) -> None:
    for _ in range(3):
        store("s3://videos", "avion", cache=LocalCache(tmp_path, 1)).read("one", 0.5, 2.5, 4)
    assert len(counting.requests) == 2


def test_the_cache_of_the_settings_is_used(counting: FaultyS3, tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("video_id,start_second,end_second,text\none,0,1,a\none,2,3,b\none,4,5,c\n")
    config = Config()
    source = SourceConfig(metadata=str(tmp_path / "clips.csv"), root="s3://videos", chunk_seconds=2)
    config.data.train = {"bucket": source}
    config.data.cache = str(tmp_path / "cache")
    for gigabytes, retained in ((1.0, 3), (1e-7, 0)):
        config.data.cache_gb = gigabytes
        clips = build_dataset(config, 32)
        for index in range(3):
            clips[0, index]
        assert len(list((tmp_path / "cache").glob("*/*"))) == retained
        for path in (tmp_path / "cache").glob("*/*"):
            path.unlink()


def test_server_errors_in_the_middle_of_a_large_file(counting: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_PAUSE", 0.001)
    monkeypatch.setattr(storage, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(storage, "_AHEAD_BYTES", 1000)
    for decoder in DECODERS:
        reader = store("s3://videos", "avion", decoder)
        reader.read("one", 0, 2, 4)  # from here on the size is cached
        counting.requests.clear()
        expected = reader.read("one", 0, 2, 4).pictures
        needed = len(counting.requests)
        counting.script = [(503, "SlowDown"), "half", "ok", "drop"]
        assert np.array_equal(reader.read("one", 0, 2, 4).pictures, expected)
        # Whenever it happens: the storage's error, not a decoder's.
        for position in range(needed):
            counting.script = ["ok"] * position + [(400, "ExpiredToken")] * 50
            with pytest.raises(StorageError, match=r"s3://videos/one\.mp4/0\.mp4: the credentials have expired"):
                reader.read("one", 0, 2, 4)
        counting.script = []


def test_any_other_file_system(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    try:
        for path in (folder / "cut").iterdir():
            memory.pipe_file(f"/box/v/{path.name}", path.read_bytes())
        memory.pipe_file("/box/empty.mp4", b"")
        reader = store("memory://box")
        assert numbers(reader.read("v", 1, 3, 4).pictures) == segment_indices(10, 30, 4).tolist()
        with pytest.raises(VideoError, match=r"memory://box/empty\.mp4: the file has zero bytes"):
            reader.read("empty", 0, 1, 4)
        with pytest.raises(VideoError, match="leads out of memory://box"):
            reader.read("../secret", 0, 1, 4)
    finally:
        memory.rm("/box", recursive=True)


@pytest.mark.parametrize("faststart", [True, False])
def test_parts_of_a_large_file_over_http(tmp_path: Path, faststart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table of contents may be at either end."""
    monkeypatch.setattr(storage, "_WHOLE_BYTES", 2000)
    monkeypatch.setattr(storage, "_AHEAD_BYTES", 3000)
    path = encode(tmp_path / "v.mp4", 60, faststart=faststart, x264="keyint=10:qp=8")
    server = FaultyS3()
    server.objects["/some/v.mp4"] = path.read_bytes()
    try:
        for decoder in ("pyav", "torchcodec"):
            frames = store(f"{server.address}/some", "whole", decoder).read("v", 1.0, 5.0, 8)
            assert numbers(frames.pictures) == segment_indices(10, 50, 8).tolist()
        # A server without ranges: the reason reaches the clip, whichever library read.
        server.ranges = False
        for decoder in ("pyav", "torchcodec", "decord"):
            with pytest.raises(VideoError, match=r"some/v\.mp4: the server ignores byte ranges"):
                store(f"{server.address}/some", "whole", decoder).read("v", 1.0, 5.0, 8)
    finally:
        server.close()


class TwoRanks:
    """Two processes of a run as threads of this one: each gathers what both give."""

    def __init__(self) -> None:
        self.barrier, self.values = threading.Barrier(2), [None, None]

    def rank(self, number: int) -> Distributed:
        outer = self

        class Rank(Distributed):
            def gather_objects(self, value: Any) -> list[Any]:
                outer.values[self.rank] = pickle.dumps(value)
                outer.barrier.wait(60)
                values = [pickle.loads(each) for each in outer.values]
                outer.barrier.wait(60)
                return values

        return Rank(number, 2, torch.device("cpu"), None)


@pytest.mark.parametrize("layout", ["auto", "chunks", "avion", "whole"])
def test_an_evaluation_lists_a_folder_once_and_gets_a_clip_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """By two processes, which find a missing video, hash the clips for the cache of features, and read them."""
    server, chunk = FaultyS3(), (folder / "avion.mp4" / "0.mp4").read_bytes()
    point_to(monkeypatch, server.address)
    kind = "chunks" if layout == "auto" else layout
    for video in range(4):
        for second in (0, 2):
            number = second // 2
            key = {"chunks": f"v{video}/{number:04d}.mp4", "avion": f"v{video}.mp4/{second}.mp4"}.get(kind)
            server.objects[f"/videos/{key or f'v{video}_{number}.mp4'}"] = chunk
    if kind == "whole":
        rows = [f"v{video}_{number},0,1.5,text" for video in range(4) for number in range(2)]
    else:  # clips within the two chunks of a video
        rows = [f"v{video},{start},{start + 1.5},text" for video in range(4) for start in (0.2, 2.2)]
    (tmp_path / "clips.csv").write_text("video_id,start_second,end_second,text\n" + "\n".join([*rows, "v9,0,1,text"]))
    source = SourceConfig(root="s3://videos", chunk_seconds=2.0, layout=layout)
    ranks, results, folders = TwoRanks(), [{}, {}], {}

    def evaluate(rank: int) -> None:
        clips = ClipDataset([(read_clips(tmp_path / "clips.csv"), source)], size=32, num_frames=2, decoder="pyav")
        missing = missing_clips(clips, ranks.rank(rank))
        assert list(missing) == [8]
        assert "v9" in missing[8]
        results[rank] = {"identities": clips.identities}
        assert all(request.split()[0] == "GET" and "list-type=2" in request for request in server.requests)
        ranks.barrier.wait(60)
        for index in range(rank, 8, 2):
            sample = clips[index]
            assert sample["fault"] is None, sample["fault"]

    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(evaluate, range(2)))
        folders = server.listed
        gets = [request for request in server.requests if "list-type=2" not in request]
    finally:
        server.close()
    assert results[0] == results[1]
    assert len(set(folders)) == len(folders) == (1 if kind == "whole" else 5)
    assert len(set(gets)) == len(gets) == 8
    assert all(request.startswith("GET") for request in gets)


def test_where_listing_is_refused_files_are_looked_up_one_by_one(counting: FaultyS3, folder: Path) -> None:
    reader = store("s3://videos", "avion")
    counting.script = [(403, "AccessDenied")]
    assert reader.states("one", 0.0) == [()]
    assert [request.split()[0] for request in counting.requests] == ["GET", "HEAD"]


def test_several_requests_of_a_worker_are_in_flight(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers when four requests have come; the clips and the requests are the same."""
    server = FaultyS3()
    point_to(monkeypatch, server.address)
    for video in range(12):
        for path in (folder / "avion.mp4").iterdir():
            server.objects[f"/videos/v{video}.mp4/{path.name}"] = path.read_bytes()
    rows = [f"v{video},1,3,text" for video in range(12)]  # each across two chunks
    (tmp_path / "clips.csv").write_text("video_id,start_second,end_second,text\n" + "\n".join([*rows, "v99,1,3,text"]))
    source = SourceConfig(root="s3://videos", chunk_seconds=2.0, layout="avion")
    batches, requests, in_flight = {}, {}, {}
    try:
        for ahead in (0, 2, 4):
            clips = ClipDataset(
                [(read_clips(tmp_path / "clips.csv"), source)], size=32, num_frames=2, decoder="pyav", read_ahead=ahead
            )
            clips[0]  # connect
            server.requests.clear()
            server.most_in_flight, server.gate = 0, ahead
            server.opened.clear()
            batches[ahead] = next(iter(eval_loader(clips, range(13), 13, 0, collate=collate_views)))
            requests[ahead], in_flight[ahead] = sorted(server.requests), server.most_in_flight
            assert "v99" in batches[ahead]["faults"][12]
    finally:
        server.close()
    for ahead in (2, 4):
        assert torch.equal(batches[0]["video"], batches[ahead]["video"])
        # Of a missing video both chunks are requested.
        same, expected = ([each for each in requests[way] if "v99" not in each] for way in (ahead, 0))
        assert same == expected
    assert in_flight[2] >= 2
    assert in_flight[4] >= 4
