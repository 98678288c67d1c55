"""Layouts, chunk borders, ends of videos, and files that are no videos."""

import logging
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video_files import DECODERS, DISTINCT, encode, encode_sound, numbers, opener, remux

from egohod.data.config import SourceConfig
from egohod.data.formats import read_clips
from egohod.data.storage import LocalFolder
from egohod.data.table import ClipReader
from egohod.data.videos import VideoError, VideoStore, floored_midpoints, segment_indices
from egohod.errors import UserError


def store(
    root: Path, layout: str = "auto", decoder: str = "pyav", chunk: float = 2.0, least: float | None = 0.0
) -> VideoStore:
    return VideoStore(root, layout, chunk, opener(decoder), min_clip_seconds=least)


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


@pytest.mark.parametrize("video", ["whole", "cut", "avion"])
@pytest.mark.parametrize(("rule", "whole", "chunks"), [("middle", 3, 10), ("upstream", 6, 10), ("lavila", 3, 6)])
def test_only_chunks_widen_a_short_clip(videos: Path, video: str, rule: str, whole: int, chunks: int) -> None:
    """0.3 s at 10 fps are 3 frames; a second 10; some loaders show at least as many frames as requested."""
    read = store(videos, least=None).read(video, 1.0, 1.3, 6, rule=rule)
    assert read.numbers.tolist() == segment_indices(10, 10 + (whole if video == "whole" else chunks), 6).tolist()
    assert numbers(read.pictures) == read.numbers.tolist()


def test_avions_rule_widens_nothing(videos: Path) -> None:
    for video, frames in (("whole", 6), ("cut", 3), ("avion", 3)):
        read = store(videos, least=None).read(video, 1.0, 1.3, 6, rule="avion")
        assert read.numbers.tolist() == floored_midpoints(10, 10 + frames, 6).tolist()


@pytest.mark.parametrize("video", ["whole", "cut", "avion"])
def test_the_shortest_clip_can_be_chosen(videos: Path, video: str) -> None:
    for least, shown in ((0.0, 3), (0.5, 5), (2.5, 25)):
        read = store(videos, least=least).read(video, 1.0, 1.3, 6)
        assert numbers(read.pictures) == segment_indices(10, 10 + shown, 6).tolist()


def test_training_and_fine_tuning_read_clips_by_the_settings_of_their_source(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "P01/videos").mkdir(parents=True)
    shutil.copy(videos / "whole.mp4", tmp_path / "P01/videos/P01_101.MP4")
    shutil.copytree(videos / "cut", tmp_path / "cut")
    (tmp_path / "clips.csv").write_text("video_id,start_second,end_second,text\nP01_101,1,1.3,a\ncut,1,1.3,b\n")
    for least, whole, chunks in ((None, 3, 10), (0.0, 3, 3), (2.0, 20, 20)):
        config = SourceConfig(
            metadata=str(tmp_path / "clips.csv"), root=str(tmp_path), chunk_seconds=2.0, min_clip_seconds=least
        )
        source = ClipReader(read_clips(config), config, opener("pyav"))
        for row, frames in ((0, whole), (1, chunks)):
            shown = source.read(source.table.row(row), 6, None).pictures
            assert numbers(shown) == segment_indices(10, 10 + frames, 6).tolist()


EGTEA = "OP01-R01-PastaSalad-1002316-1004005-F024051-F024101"
EGO4D = "000786a7-3f9d-4fe6-bfb3-045b368f7d44"
TREES = {
    "P01/videos/P01_101.MP4": "P01_101",
    "EPIC-KITCHENS/P01/videos/P01_01.MP4": "P01_01",
    "P22/P22_107.MP4": "P22_107",
    "P01/videos/P01_102.MP4": "P01/P01_102",
    "P02/P02_09.MP4/0.MP4": "P02_09",
    "P02/P02_10.mp4/0.mp4": "P02_10",
    "P01/videos/P01_103/0000.mp4": "P01_103",
    "P02/P02_11/0000.mp4": "P02_11",
    "EPIC-KITCHENS/P01/videos/P01_02.mp4/0.mp4": "P01_02",
    "full_scale/" + EGO4D + ".mp4": EGO4D,
    "v2/full_scale/" + EGO4D + ".mp4": EGO4D,
    "v1/clips/" + EGO4D + ".mp4": EGO4D,
    "video_540ss/" + EGO4D + ".mp4": EGO4D,
    "OP01-R01-PastaSalad/" + EGTEA + ".mp4": EGTEA,
    "cropped_clips/OP01-R01-PastaSalad/" + EGTEA + ".mp4": "OP01-R01-PastaSalad/" + EGTEA,
    EGTEA + ".mp4": "OP01-R01-PastaSalad/" + EGTEA,
    "videos/OP01-R01-PastaSalad.mp4": "OP01-R01-PastaSalad",
    "Charades_v1_480/001YG.mp4": "001YG",
    "CharadesEgo_v1_480/005BUEGO.mp4": "005BUEGO",
}


@pytest.mark.parametrize("path", TREES)
def test_the_layouts_of_published_datasets_are_detected(videos: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(videos / "cut" / "0000.mp4", tmp_path / path)
    layout = {"0000.mp4": "chunks", "0.mp4": "avion", "0.MP4": "avion"}.get(path.rpartition("/")[2], "whole")
    for requested in ("auto", layout):
        reader = store(tmp_path, requested)
        assert numbers(reader.read(TREES[path], 0.5, 1.5, 4).pictures) == segment_indices(5, 15, 4).tolist()
        assert [each[0] for each in reader.states(TREES[path], 0.5, 1.5)] == [str(tmp_path / path)]
        if layout == "whole":
            shown = reader.read_file(TREES[path], lambda total: np.arange(0, total, 5)[None])
            assert numbers(shown[0]) == [0, 5, 10, 15]
    with pytest.raises(VideoError, match="no such file"):
        store(tmp_path, "whole" if layout == "chunks" else "chunks").read(TREES[path], 0.5, 1.5, 4)


def test_a_video_that_is_nowhere_is_named_where_it_was_expected_first(tmp_path: Path) -> None:
    with pytest.raises(VideoError) as caught:
        store(tmp_path).read("P01_101", 20, 22, 4)
    assert str(caught.value) == (
        f"{tmp_path}/P01_101.mp4: no such file (nor P01/videos/P01_101.mp4, P01/P01_101.mp4, "
        "EPIC-KITCHENS/P01/videos/P01_101.mp4, P01_101/0010.mp4, P01_101.mp4/20.mp4, P01/videos/P01_101/0010.mp4, "
        "... 11 in all)"
    )
    with pytest.raises(VideoError, match=r"own\.mp4: no such file$"):
        store(tmp_path, "whole").read("own", 20, 22, 4)


def test_a_video_is_looked_for_once(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "EPIC-KITCHENS/P01/videos").mkdir(parents=True)
    shutil.copy(videos / "whole.mp4", tmp_path / "EPIC-KITCHENS/P01/videos/P01_01.MP4")
    shutil.copy(videos / "whole.mp4", tmp_path / "own.mp4")
    looked: list[str] = []
    inner = LocalFolder.open
    monkeypatch.setattr(
        LocalFolder, "open", lambda self, key, **more: (looked.append(key), inner(self, key, **more))[1]
    )
    reader = store(tmp_path)
    for video, most in (("own", 6), ("P01_01", 24)):
        looked.clear()
        reader.read(video, 0, 1, 4)
        assert len(looked) <= most
        looked.clear()
        reader.read(video, 2, 3, 4)
        assert len(looked) == 1


@pytest.mark.parametrize("path", ["v.mkv", "v.MOV", "v/0000.mkv"])
def test_other_containers_are_tried_last(videos: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / path).parent.mkdir(exist_ok=True)
    shutil.copy(videos / "cut" / "0000.mp4", tmp_path / path)
    assert numbers(store(tmp_path).read("v", 0.5, 1.5, 4).pictures) == segment_indices(5, 15, 4).tolist()


def cut(folder: Path, lengths: list[int], name: str = "{number:04d}.mp4") -> None:
    """A video of frames that count on, in chunks of so many frames, 10 a second."""
    first = 0
    for number, length in enumerate(lengths):
        encode(folder / name.format(number=number, second=f"{first / 10:g}"), length, first=first)
        first += length


def test_the_folder_of_a_short_last_chunk_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos of one short chunk would list theirs for every clip."""
    cut(tmp_path / "v", [20, 20, 15])
    cut(tmp_path / "short", [15])
    listed: list[str] = []
    inner = LocalFolder.names
    monkeypatch.setattr(LocalFolder, "names", lambda self, folder: (listed.append(folder), inner(self, folder))[1])
    reader = store(tmp_path)
    for _ in range(3):
        reader.read("v", 4.2, 5.2, 4)
        reader.read("short", 0.2, 1.2, 4)
    assert sorted(listed) == ["short", "v"]


def test_avion_opens_the_chunk_that_begins_where_a_clip_ends(tmp_path: Path) -> None:
    """Its loader takes a frame from the end of the last chunk it opens: none from a clip that ends at its start."""
    cut(tmp_path / "v", [20, 20])
    for start, end, last in ((0.5, 2.0, 20), (0.5, 1.9, 19), (2.5, 4.0, 39), (0.5, 2.5, 25)):
        read = store(tmp_path).read("v", start, end, 6, rule="avion")
        assert read.numbers.tolist() == floored_midpoints(round(start * 10), last, 6).tolist()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("second", [0.5, 2.5, 4.5, 6.5])
def test_longer_chunks_than_expected_are_refused_with_the_cure(tmp_path: Path, decoder: str, second: float) -> None:
    """Second 2.5 is in the chunk 0000, but the chunk 0001 would show second 6.5, and 4.5 the last one's 8.5."""
    cut(tmp_path / "v", [40, 40, 15])
    expected = r"v/000[01]\.mp4: has 4\.00 s, but chunk_seconds is 2; set chunk_seconds=4 if all but the last have"
    reader = store(tmp_path, decoder=decoder)
    for _ in range(2):
        with pytest.raises(VideoError, match=expected):
            reader.read("v", second, second + 1.0, 4)
    read = store(tmp_path, decoder=decoder, chunk=4.0).read("v", second, second + 1.0, 4)
    assert read.numbers.tolist() == segment_indices(round(10 * second), round(10 * second) + 10, 4).tolist()
    assert numbers(read.pictures) == (read.numbers % DISTINCT).tolist()


def test_a_single_long_chunk_does_not_tell_the_length_of_all(tmp_path: Path) -> None:
    cut(tmp_path / "v", [35])
    for second in (0.5, 2.5):
        with pytest.raises(
            VideoError, match=r"0000\.mp4: has 3\.50 s, but chunk_seconds is 2; set chunk_seconds=the length"
        ):
            store(tmp_path).read("v", second, second + 0.5, 4)


def test_shorter_chunks_than_expected_are_refused_unless_they_are_the_last(tmp_path: Path) -> None:
    cut(tmp_path / "v", [20, 10, 20, 12])
    with pytest.raises(VideoError, match=r"0001\.mp4: has 1\.00 s, but chunk_seconds is 2; set chunk_seconds=1 if all"):
        store(tmp_path).read("v", 2.1, 2.9, 4)
    with pytest.raises(VideoError, match=r"0001\.mp4: has 1\.00 s"):
        store(tmp_path).read("v", 1.5, 2.5, 4)


def test_chunks_named_by_their_start_tell_their_own_length(tmp_path: Path) -> None:
    """LaViLa's 5 minutes where 15 s are expected, 15 s where 5 minutes are, and any cut between."""
    for lengths in ([15, 15, 15, 10], [20, 20, 15], [15, 25, 5, 10]):
        folder = tmp_path / "-".join(map(str, lengths))
        cut(folder / "v.mp4", lengths, "{second}.mp4")
        for chunk in (1.0, 2.0, 4.0, 15.0):
            reader = store(folder, chunk=chunk)
            for start, end in ((0.2, 0.9), (1.7, 2.5), (2.5, 3.5), (3.5, 4.5), (1.2, 4.9), (4.6, 5.4), (0.5, 5.4)):
                read = reader.read("v", start, end, 5)
                expected = segment_indices(round(start * 10), round(end * 10), 5).tolist()
                assert numbers(read.pictures) == read.numbers.tolist() == expected


def test_a_lost_chunk_is_named_though_names_tell_the_lengths(tmp_path: Path) -> None:
    cut(tmp_path / "v.mp4", [20, 20, 20], "{second}.mp4")
    (tmp_path / "v.mp4" / "2.mp4").unlink()
    with pytest.raises(VideoError, match=r"v\.mp4/2\.mp4: no such file"):
        store(tmp_path).read("v", 2.5, 3.5, 4)
    for chunk, (start, end) in ((2.0, (1.5, 4.5)), (15.0, (0.5, 4.5)), (15.0, (2.5, 4.5))):
        with pytest.raises(VideoError, match=r"0\.mp4: has 2\.00 s, but the next chunk begins 4 s after it"):
            store(tmp_path, chunk=chunk).read("v", start, end, 4)
    for start in (0.5, 4.5):
        shown = store(tmp_path, chunk=15.0).read("v", start, start + 1, 4).pictures
        assert numbers(shown) == segment_indices(round(10 * start), round(10 * start) + 10, 4).tolist()


def test_chunks_cut_at_key_frames_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for video in ("a", "b"):
        cut(tmp_path / video, [154, 148, 30])
    reader = store(tmp_path, chunk=15.0)
    with caplog.at_level(logging.WARNING):
        for video in ("a", "b"):
            reader.read(video, 3.0, 4.0, 4)
            reader.read(video, 20.0, 21.0, 4)
    assert caplog.text.count("not cut exactly") == 1
    assert "a/0000.mp4: has 15.40 s instead of 15" in caplog.text


@pytest.mark.parametrize("name", ["v.mkv", "v.MOV", "deep/v.avi", "v/0000.mkv"])
def test_videos_in_other_containers(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    encode(tmp_path / "v.mp4", 20, codec="mpeg4")
    remux(tmp_path / "v.mp4", path)
    (tmp_path / "v.mp4").unlink()
    video = "deep/v" if "deep" in name else "v"
    assert numbers(store(tmp_path).read(video, 0.5, 1.5, 5).pictures) == segment_indices(5, 15, 5).tolist()


@pytest.mark.parametrize(("csv", "disk"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("layout", ["whole", "chunks", "avion"])
def test_accents_in_the_other_form_of_unicode(tmp_path: Path, csv: str, disk: str, layout: str) -> None:
    """macOS takes letters and accents apart in the names that it writes."""
    video = "k\u00fcche/caf\u00e9 \u3042"
    name = unicodedata.normalize(disk, video)  # type: ignore[arg-type]
    keys = {"whole": f"{name}.mp4", "chunks": f"{name}/0000.mp4", "avion": f"{name}.mp4/0.mp4"}
    encode(tmp_path / keys[layout], 20)
    requested = unicodedata.normalize(csv, video)  # type: ignore[arg-type]
    assert numbers(store(tmp_path).read(requested, 0.5, 1.5, 1).pictures) == [9]
    # Chunk 3 is missing, which only a listing shows.
    if layout != "whole":
        with pytest.raises(VideoError, match=r"no such file"):
            store(tmp_path).read(requested, 6.5, 7, 1)
    with pytest.raises(VideoError, match=r"no such file"):
        store(tmp_path).read("K\u00fcche/caf\u00e9", 0, 1, 1)


@pytest.mark.parametrize(
    ("layout", "seconds"), [(["c", None], 15.0), ("chunk", 15.0), ("whole", 0.0), ("auto", np.nan)]
)
def test_an_impossible_layout_is_refused(tmp_path: Path, layout: Any, seconds: float) -> None:
    with pytest.raises(UserError, match=r"no layout .* with chunks of"):
        VideoStore(tmp_path, layout, seconds, opener("pyav"))
