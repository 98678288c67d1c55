"""Layouts, chunk borders, ends of videos, and files that are no videos."""

import os
from pathlib import Path

import numpy as np
import pytest
from video_files import DECODERS, encode, encode_sound, numbers, opener

from egohod.config import UserError
from egohod.data.frames import segment_indices
from egohod.data.video import VideoError, VideoStore


def store(root: Path, layout: str = "auto", decoder: str = "pyav", chunk: float = 2.0) -> VideoStore:
    return VideoStore(root, layout, chunk, opener(decoder))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole``: 4 s in one file. ``cut``: the same frames in chunks of 2 s, and 1.5 s more. ``avion``: as AVION's."""
    root = tmp_path_factory.mktemp("videos")
    encode(root / "whole.mp4", 40)
    for chunk, count in enumerate((20, 20, 15)):
        path = encode(root / "cut" / f"{chunk:04d}.mp4", count, first=20 * chunk)
        (root / "avion.mp4").mkdir(exist_ok=True)
        (root / "avion.mp4" / f"{2 * chunk}.mp4").write_bytes(path.read_bytes())
    (root / "P02_03.MP4").mkdir()
    (root / "P02_03.MP4" / "0.MP4").write_bytes((root / "cut" / "0000.mp4").read_bytes())
    (root / "upper").mkdir()
    (root / "upper" / "0000.MP4").write_bytes((root / "cut" / "0000.mp4").read_bytes())
    (root / "P01").mkdir()
    (root / "P01" / "P01_01.MP4").write_bytes((root / "whole.mp4").read_bytes())
    return root


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("video", ["whole", "cut", "avion"])
@pytest.mark.parametrize(("start", "end"), [(0, 1), (0.5, 1.9), (1.2, 2.6), (2.0, 4.0), (1.9, 2.1), (0.1, 4.0)])
def test_the_sampled_frames(videos: Path, video: str, start: float, end: float, decoder: str) -> None:
    expected = segment_indices(round(start * 10), round(end * 10), 8).tolist()
    assert numbers(store(videos, decoder=decoder).read(video, start, end, 8).pictures) == expected


@pytest.mark.parametrize(
    ("video", "layout"), [("cut", "auto"), ("cut", "chunks"), ("avion", "auto"), ("avion", "avion")]
)
def test_a_clip_over_three_chunks(videos: Path, video: str, layout: str) -> None:
    assert numbers(store(videos, layout).read(video, 1.5, 5.0, 12).pictures) == segment_indices(15, 50, 12).tolist()


def test_chunks_that_start_between_seconds(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").mkdir()
    for number, start in enumerate(("0", "1.5", "3")):
        encode(tmp_path / "v.mp4" / f"{start}.mp4", 15, first=15 * number)
    reader = store(tmp_path, chunk=1.5)
    assert numbers(reader.read("v", 1.0, 4.0, 6).pictures) == segment_indices(10, 40, 6).tolist()
    assert numbers(reader.read("v", 4.0, 9.0, 2).pictures) == segment_indices(40, 45, 2).tolist()


def test_frames_of_a_chunk_are_numbered_from_the_start_of_the_video(tmp_path: Path) -> None:
    """1.75 s is frame 17.5 of the video, rounded to 18 as upstream does, but frame 2.5 of its chunk, the 17th."""
    encode(tmp_path / "whole.mp4", 45)
    for number in range(3):
        encode(tmp_path / "cut" / f"{number:04d}.mp4", 15, first=15 * number)
    for start, end in ((1.75, 2.65), (1.85, 2.95), (1.75, 4.0), (3.15, 3.95)):
        expected = segment_indices(round(start * 10), round(end * 10), 6).tolist()
        for video in ("cut", "whole"):
            read = store(tmp_path, chunk=1.5).read(video, start, end, 6)
            assert numbers(read.pictures) == read.numbers.tolist() == expected
            assert read.seconds == pytest.approx((np.array(expected) + 0.5) / 10)


def test_jittered_frames_come_from_the_generator(videos: Path) -> None:
    expected = segment_indices(5, 35, 4, np.random.default_rng(7)).tolist()
    assert numbers(store(videos).read("cut", 0.5, 3.5, 4, np.random.default_rng(7)).pictures) == expected


def test_endings_and_folders_in_ids(videos: Path) -> None:
    assert numbers(store(videos).read("upper", 0, 1, 1).pictures) == [4]
    assert numbers(store(videos).read("P02_03", 0, 1, 1).pictures) == [4]
    assert numbers(store(videos).read("P01/P01_01", 3, 4, 1).pictures) == [34]


def test_a_given_layout_is_believed(videos: Path) -> None:
    with pytest.raises(VideoError, match=r"cut\.mp4: no such file"):
        store(videos, "whole").read("cut", 0, 1, 1)
    with pytest.raises(VideoError, match=r"whole/0000\.mp4: no such file"):
        store(videos, "chunks").read("whole", 0, 1, 1)
    with pytest.raises(VideoError, match=r"cut\.mp4/0\.mp4: no such file"):
        store(videos, "avion").read("cut", 0, 1, 1)


@pytest.mark.parametrize(("video", "last"), [("whole", 39), ("cut", 54), ("avion", 54)])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_clip_beyond_the_end_is_cut_there(videos: Path, video: str, last: int, decoder: str) -> None:
    start = (last - 3) / 10
    expected = segment_indices(last - 3, last + 1, 4).tolist()
    assert numbers(store(videos, decoder=decoder).read(video, start, start + 30, 4).pictures) == expected


@pytest.mark.parametrize(("video", "start"), [("whole", 4.0), ("whole", 99.0), ("cut", 5.6), ("avion", 5.6)])
def test_a_clip_wholly_beyond_the_end(videos: Path, video: str, start: float) -> None:
    with pytest.raises(VideoError, match="the clip begins at"):
        store(videos).read(video, start, start + 1, 4)


def test_a_chunk_beyond_the_last_and_a_gap(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"0040\.mp4: no such file"):
        store(videos).read("cut", 80, 81, 4)
    with pytest.raises(VideoError, match=r"avion\.mp4/80\.mp4: no such file"):
        store(videos).read("avion", 80, 81, 4)
    for chunk in (0, 2):
        encode(tmp_path / "gap" / f"{chunk:04d}.mp4", 20)
    with pytest.raises(VideoError, match=r"0001\.mp4: no such file"):
        store(tmp_path).read("gap", 1, 3, 4)


def test_chunks_of_different_sizes(tmp_path: Path) -> None:
    encode(tmp_path / "v" / "0000.mp4", 20)
    encode(tmp_path / "v" / "0001.mp4", 20, size=(64, 64))
    with pytest.raises(VideoError, match="differ in picture size"):
        store(tmp_path).read("v", 1, 3, 4)


def test_a_missing_root(tmp_path: Path) -> None:
    for root in (tmp_path / "none", Path("")):
        with pytest.raises(UserError, match="no such video folder"):
            VideoStore(root if root.name else "", "auto", 15, opener("pyav"))


@pytest.mark.parametrize("video", ["../outside", "/etc/passwd", "a/../../outside", "", ".."])
def test_nothing_outside_the_root_is_opened(tmp_path: Path, video: str) -> None:
    encode(tmp_path / "outside.mp4", 10)
    (tmp_path / "root").mkdir()
    with pytest.raises(VideoError, match="leads out of"):
        store(tmp_path / "root").read(video, 0, 1, 1)


def broken(folder: Path, kind: str) -> None:
    path = folder / "v.mp4"
    if kind == "truncated":
        path.write_bytes(encode(path, 40).read_bytes()[:-2000])
    elif kind == "truncated faststart":
        content = encode(path, 40, x264="keyint=10:qp=1", faststart=True).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "zero bytes":
        path.touch()
    elif kind == "audio only":
        encode_sound(path)
    elif kind == "text":
        path.write_text("this is not a video\n" * 100)
    elif kind == "picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif kind == "folder":
        path.mkdir()


FAULTS = {
    "missing": "no such file",
    "truncated": "truncated or damaged video",
    "truncated faststart": "truncated",
    "zero bytes": "zero bytes",
    "audio only": "has no picture, only sound",
    "text": "not a video",
    "picture": "not a video",
    "folder": "no such file",
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_file_that_is_no_video_is_named_with_the_reason(tmp_path: Path, kind: str, decoder: str) -> None:
    broken(tmp_path, kind)
    with pytest.raises(VideoError) as caught:
        store(tmp_path, decoder=decoder).read("v", 3.2, 3.9, 4)
    assert str(caught.value).startswith(str(tmp_path / "v.mp4") + ": ")
    assert FAULTS[kind] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    encode(tmp_path / "v.mp4", 10).chmod(0)
    with pytest.raises(VideoError, match=r"v\.mp4"):
        store(tmp_path).read("v", 0, 1, 1)


@pytest.mark.parametrize("decoder", DECODERS)
def test_no_file_is_left_open(videos: Path, tmp_path: Path, decoder: str) -> None:
    reader = store(videos, decoder=decoder)
    reader.read("cut", 1, 3, 4)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        reader.read("cut", 1, 3, 4)
        with pytest.raises(VideoError):
            reader.read("whole", 50, 51, 4)
    assert len(os.listdir("/proc/self/fd")) <= before
