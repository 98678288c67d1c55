"""Every decoder gives the frame that is on display, bit for bit the same as decoding the whole file."""

import errno
import os
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from video_files import (
    DECODERS,
    encode,
    encode_sizes,
    encode_sound,
    opener,
    picture,
    reference,
    remux,
    skip_start,
    turn,
)

from egohod.data import decoders
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, Tokenizer, collate, collate_views
from egohod.data.decoders import CachingOpener, Opener, ReusingOpener, choose_decoder
from egohod.data.formats import read_clips
from egohod.data.loader import eval_loader
from egohod.data.storage import VideoError, VideoFile
from egohod.data.videos import frame_times, segment_indices
from egohod.errors import UserError
from egohod.runtime import UNFINISHED_PREFIX

# Streams that need different care: what may be left out, and where decoding may begin.
STREAMS: dict[str, dict[str, Any]] = {
    "default": {},
    "no b-frames": {"x264": "keyint=12:bframes=0"},
    "b-pyramid": {"x264": "keyint=30:bframes=7:b-adapt=0:b-pyramid=normal:ref=4"},
    "one group": {"x264": "keyint=250:bframes=3"},
    "only key frames": {"x264": "keyint=1"},
    "fastdecode": {"x264": "keyint=8:cabac=0:deblock=0:weightp=0"},
    "odd size": {"size": (102, 70)},
    "open groups": {"x264": "keyint=8:open-gop=1:bframes=5:b-adapt=0:b-pyramid=normal"},
    "mpeg-4 part 2": {"codec": "mpeg4"},
    # The last frame's length is not stored, so that a file's end is where its last frame begins.
    "variable rate": {"milliseconds": [int(100 * i + 60 * np.sin(i)) for i in range(40)]},
    "hevc": {"codec": "libx265", "x264": "keyint=10:bframes=3:open-gop=0"},
    "hevc, open groups": {"codec": "libx265", "x264": "keyint=8:open-gop=1:bframes=4"},
    "odd size, 4:4:4": {"size": (101, 71), "pixels": "yuv444p"},
    "sound is longer": {"sound": 7.0},
    "begins late": {"milliseconds": [1500 + 100 * i for i in range(40)]},
    "begins late, with sound": {"milliseconds": [1500 + 100 * i for i in range(40)], "sound": 7.0},
    "edit list": {"x264": "keyint=10:bframes=2", "skip": 3},
    "edit list, at a key frame": {"skip": 10},
}
# What the other libraries get wrong, which is one more reason to prefer PyAV.
NOT_EXACT = {
    "decord": (
        # loses its place when it seeks
        "open groups",
        "hevc, open groups",
        "mpeg-4 part 2",
        "odd size, 4:2:0",
        "variable rate",
        # shows what the list leaves out
        "edit list",
    ),
    # cannot reach the last frame
    "torchcodec": ("open groups", "variable rate", "begins late", "begins late, with sound"),
}
# Where swscale differs between the FFmpegs that the libraries carry: the same frames, other last bits of colour.
CLOSE: dict[str, dict[str, Any]] = {
    "h.264, 10 bits": {"pixels": "yuv420p10le"},
    "hevc, 10 bits": {"codec": "libx265", "pixels": "yuv420p10le", "x264": "keyint=10:bframes=3:open-gop=0"},
    "odd size, 4:2:0": {"size": (101, 71), "codec": "mpeg4"},
}
# Of 255, at any point, and on average: docs/data.md states them.
LARGEST, AVERAGE = 40, 2.0


def write(path: Path, settings: dict[str, Any]) -> Path:
    """The file of an entry of STREAMS."""
    encode(path, **{name: value for name, value in settings.items() if name != "skip"})
    return skip_start(path, settings["skip"]) if "skip" in settings else path


def check(path: Path, open_video: Opener) -> None:
    """Single frames, dense and sparse sets, in any order, with repeats, in one open decoder."""
    times, pictures = reference(path)
    opened = open_video(path)
    rng = np.random.default_rng(0)
    requested = [rng.uniform(0, times[-1], n) for n in (1, 1, 1, 1, 4, 4, 16)]
    requested += [np.array([times[-1] + 50, -1.0]), times[:8] + 1e-4, np.array([0.5, 0.5, 0.5])]
    for seconds in requested:
        shown = np.maximum(np.searchsorted(times, seconds + 1e-6, side="right") - 1, 0)
        got = opened.read_at(seconds)
        assert got.dtype == np.uint8
        assert np.array_equal(got, pictures[shown]), f"frames {shown.tolist()} differ"
    opened.close()


@pytest.mark.parametrize(
    ("stream", "decoder"), [(s, d) for s in STREAMS for d in DECODERS if s not in NOT_EXACT.get(d, ())]
)
def test_frames_are_identical_to_decoding_everything(tmp_path: Path, stream: str, decoder: str) -> None:
    check(write(tmp_path / "v.mp4", STREAMS[stream]), opener(decoder))


@pytest.mark.parametrize("stream", STREAMS)
def test_cached_frames_are_identical_to_decoding_everything(tmp_path: Path, stream: str) -> None:
    path, cache = write(tmp_path / "v.mp4", STREAMS[stream]), CachingOpener(tmp_path / "cache", opener("pyav"))
    decoded, cached = opener("pyav")(path), cache(path)
    assert (cached.fps, cached.duration) == (decoded.fps, decoded.duration)
    check(path, cache)
    # Times as the sampling rules ask for them, at the very time stamps and between them.
    seconds = np.random.default_rng(1).uniform(-0.1, decoded.duration + 0.1, 50)
    seconds = np.concatenate([seconds, frame_times(np.arange(20), decoded.fps)])
    assert np.array_equal(cached.read_at(seconds), decoded.read_at(seconds))


def test_the_frame_cache_follows_changes_and_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, folder = encode(tmp_path / "v.mp4", 20), tmp_path / "cache"
    opened, first = list[str](), np.array([0.0])

    def count(file: VideoFile, name: str = "") -> decoders.Decoder:
        opened.append(name)
        return opener("pyav")(file, name)

    whole = list[Path]()
    read_all = decoders.PyavDecoder.read_all
    monkeypatch.setattr(decoders.PyavDecoder, "read_all", lambda self: (whole.append(self._file), read_all(self))[1])
    cache = CachingOpener(folder, count)
    before = cache(path).read_at(first)
    assert np.array_equal(cache(path).read_at(first), before)
    assert len(whole) == 1
    # A file of the same name that changed, then entries that lost their content or a file.
    encode_sizes(path, [(64, 48)])
    assert cache(path).read_at(first).shape != before.shape
    for name, content in (("frames.npy", b""), ("times.npz", b"no zip"), ("frames.npy", None), ("times.npz", None)):
        for entry in folder.rglob(name):
            entry.unlink()
            if content is not None:
                entry.write_bytes(content)
        for _ in range(2):
            assert np.array_equal(cache(path).read_at(first), opener("pyav")(path).read_at(first))
    assert len(whole) == 6, "a damaged entry is replaced, once"
    assert not opened
    # A remote file, and a video that is too large, are decoded for every clip.
    assert np.array_equal(cache(BytesIO(path.read_bytes())).read_at(first), opener("pyav")(path).read_at(first))
    monkeypatch.setattr(decoders, "MAX_CACHED_BYTES", 1000)
    long = encode(tmp_path / "long.mp4", 20)
    for _ in range(2):
        assert np.array_equal(cache(long).read_at(first), opener("pyav")(long).read_at(first))
    monkeypatch.setattr(decoders, "MAX_CACHED_BYTES", 1 << 28)
    assert (len(opened), len(whole)) == (3, 6)
    # So is one with a damaged picture, of which everything is decoded once only.
    cut = encode(tmp_path / "cut.mp4", 300)
    content = bytearray(cut.read_bytes())
    half, end = len(content) // 2, content.index(b"moov") - 200
    content[half:end] = bytes(end - half)
    cut.write_bytes(content)
    for _ in range(2):
        assert np.array_equal(cache(cut).read_at(first), opener("pyav")(cut).read_at(first))
    assert (len(opened), len(whole)) == (5, 7)
    assert not caplog.text
    with pytest.raises(VideoError, match="no such file"):
        cache(tmp_path / "gone.mp4")


def test_a_frame_cache_on_a_full_disk_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    videos, first, tries = [encode(tmp_path / f"{i}.mp4", 20) for i in range(3)], np.array([0.0]), list[int]()

    def full(*_: Any) -> None:
        tries.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = CachingOpener(tmp_path / "cache", opener("pyav"))
    cache(videos[0])
    monkeypatch.setattr(np, "save", full)
    for video in videos * 2:
        assert np.array_equal(cache(video).read_at(first), opener("pyav")(video).read_at(first))
    assert len(tries) == 1
    assert caplog.text.count("No space left on device") == 1
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1
    assert not list((tmp_path / "cache").rglob(f"{UNFINISHED_PREFIX}*"))


def test_processes_share_a_frame_cache(tmp_path: Path) -> None:
    """They decode the same video at the same time; whoever comes second keeps the first one's frames."""
    path, start = encode(tmp_path / "v.mp4", 200), time.monotonic() + 3
    code = (
        "import sys, time, hashlib; import numpy as np; from pathlib import Path\n"
        "from egohod.data.decoders import CachingOpener, choose_decoder\n"
        "cache = CachingOpener(sys.argv[2], choose_decoder('pyav')[1])\n"
        "time.sleep(max(0, float(sys.argv[3]) - time.monotonic()))\n"
        "print(type(cache(Path(sys.argv[1]))).__name__, cache(Path(sys.argv[1])).read_at(np.array([0, 3.0])).sum())"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache"), str(start)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "abc"]
    outputs = {process.communicate(timeout=60) for process in processes}
    expected = opener("pyav")(path).read_at(np.array([0, 3.0])).sum()
    assert outputs == {(f"_CachedDecoder {expected}\n", "")}
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1


@pytest.mark.parametrize(
    ("stream", "decoder"), [(s, d) for s in CLOSE for d in DECODERS if s not in NOT_EXACT.get(d, ())]
)
def test_frames_are_the_same_in_time_and_nearly_so_in_colour(tmp_path: Path, stream: str, decoder: str) -> None:
    path = write(tmp_path / "v.mp4", CLOSE[stream])
    times, pictures = reference(path)
    wanted = [0, 7, 12, 13, 31, 39]
    frames = opener(decoder)(path).read_at(times[wanted] + 0.05).astype(int)
    distance = np.abs(frames[:, None] - pictures[None].astype(int))
    assert distance.mean((2, 3, 4)).argmin(1).tolist() == wanted
    own = distance[range(len(wanted)), wanted]
    assert own.max() <= LARGEST
    assert own.mean() <= AVERAGE


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_pictures_are_upright(tmp_path: Path, degrees: int, decoder: str) -> None:
    path = encode(tmp_path / "v.mp4", 20)
    _, pictures = reference(path)
    frames = opener(decoder)(turn(path, degrees)).read_at(np.array([0.35, 1.25]))
    assert np.array_equal(frames, np.rot90(pictures[[3, 12]], -degrees // 90, (1, 2)))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_file_in_memory(tmp_path: Path, decoder: str) -> None:
    path = encode(tmp_path / "v.mp4", 30)
    times, pictures = reference(path)
    stream = BytesIO(path.read_bytes())
    stream.seek(100)  # any position
    opened = opener(decoder)(stream, "s3://bucket/v.mp4")
    assert np.array_equal(opened.read_at(times[[25, 3, 4]] + 0.05), pictures[[25, 3, 4]])
    opened.close()
    for content, fault in (
        (b"", "the file has zero bytes"),
        (bytes(500), "not a video"),
        (path.read_bytes()[:3000], "truncated or damaged video"),
        (encode_sound(tmp_path / "sound.mp4").read_bytes(), "has no picture, only sound"),
    ):
        with pytest.raises(VideoError, match=rf"^s3://bucket/v\.mp4: {fault}"):
            opener(decoder)(BytesIO(content), "s3://bucket/v.mp4")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("format", ["PNG", "GIF", "JPEG", "WEBP", "TIFF", "BMP", "AVIF", "playlist", "concat"])
def test_pictures_and_playlists_are_no_videos(tmp_path: Path, format: str, decoder: str) -> None:
    """FFmpeg would take them; a playlist would even lead it to other files."""
    path = tmp_path / "v.mp4"
    other = encode(tmp_path / "other.mp4", 20)
    if format == "playlist":
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{other}\n#EXT-X-ENDLIST\n")
    elif format == "concat":
        path.write_text(f"ffconcat version 1.0\nfile {other.name}\n")
    else:
        pictures = [Image.fromarray(picture(number)) for number in range(20)]
        more = {"save_all": True, "append_images": pictures[1:]} if format in ("GIF", "WEBP") else {}
        pictures[0].save(path, format=format, **more)
    with pytest.raises(
        VideoError, match=r"v\.mp4: not a video, or in a container that only tools/chunk_videos\.py reads$"
    ):
        opener(decoder)(path)


@pytest.mark.parametrize("decoder", DECODERS)
def test_rate_and_duration(tmp_path: Path, decoder: str) -> None:
    opened = opener(decoder)(encode(tmp_path / "v.mp4", 25))
    assert opened.fps == pytest.approx(10)
    assert opened.duration == pytest.approx(2.5)
    # Neither longer sound nor a late first picture makes the pictures last longer.
    for name in ("sound is longer", "begins late, with sound"):
        assert opener(decoder)(write(tmp_path / "v.mp4", STREAMS[name])).duration == pytest.approx(4, abs=0.11)


@pytest.mark.parametrize("decoder", DECODERS)
def test_real_clips(shared: Path, decoder: str) -> None:
    for path in sorted((shared / "media").glob("*/*.mp4")):
        times, pictures = reference(path)
        opened = opener(decoder)(path)
        rng = np.random.default_rng(0)
        seconds = frame_times(segment_indices(0, len(times), 16, rng), opened.fps)
        shown = np.maximum(np.searchsorted(times, seconds + 1e-6, side="right") - 1, 0)
        assert np.array_equal(opened.read_at(seconds), pictures[shown]), path.name


def test_the_fast_decoder_leaves_out_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opener("pyav")(encode(tmp_path / "v.mp4", 40, x264="keyint=10:bframes=3:b-adapt=0:b-pyramid=none"))
    groups = []
    inner = decoders._needed_groups
    monkeypatch.setattr(decoders, "_needed_groups", lambda *a: groups.append(inner(*a)) or groups[-1])
    opened.read_at(np.array([0.05, 2.55]))
    # Two of the four groups hold a wanted frame, and neither is needed by the next.
    assert [(group[0].pts, whole) for group, whole in groups[0]] == [
        (groups[0][0][0][0].pts, False),
        (groups[0][1][0][0].pts, False),
    ]
    assert len(groups[0]) == 2


def test_auto_takes_the_first_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"av"}
    monkeypatch.setattr(decoders, "_cannot_import", lambda module: "No module" if module in missing else None)
    assert choose_decoder("auto")[0] == "torchcodec"
    missing.add("torchcodec")
    assert choose_decoder("auto")[0] == "decord"
    missing.add("decord")
    with pytest.raises(UserError, match=r"pip install av.*apt-get install ffmpeg.*pip install decord, which has"):
        choose_decoder("auto")


def test_the_error_of_a_missing_decoder_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_cannot_import", lambda module: "libavutil.so.56: no such file")
    with pytest.raises(UserError, match=r"torchcodec does not load .libavutil.*apt-get install ffmpeg"):
        choose_decoder("torchcodec")


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """``data.decoder=cuda`` on the CPU: the same library and the same path, with another device."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(decoders, "_gpu", lambda: "cpu")


def test_the_gpus_decoder_is_refused_where_it_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    opener("torchcodec")  # without it that is the reason; skips
    with pytest.raises(
        UserError, match=r"data\.decoder=cuda: cuda does not load \(torch has no NVIDIA GPU here\); cure"
    ):
        choose_decoder("cuda")
    assert choose_decoder("auto")[0] == "pyav"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(decoders, "_gpu", lambda: "cuda:0")
    with pytest.raises(UserError, match=r"cuda does not load \(torchcodec cannot use it: .*video part"):
        choose_decoder("cuda")  # there is none


@pytest.mark.usefixtures("no_gpu_needed")
def test_the_gpus_decoder_shows_the_same_frames_in_training_and_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opener("torchcodec")  # skips where it does not load
    encode(tmp_path / "v.mp4", 40)
    (tmp_path / "clips.csv").write_text(
        "video_id,start_second,end_second,text\n" + "".join(f"v,{i / 4},{i / 4 + 1.5},text\n" for i in range(8))
    )
    table, source = read_clips(tmp_path / "clips.csv"), SourceConfig(root=str(tmp_path))
    for train in (False, True):
        batches = {}
        for decoder in ("cuda", "torchcodec"):
            clips = ClipDataset(
                [(table, source)], size=32, num_frames=4, tokenizer=Tokenizer(), train=train, decoder=decoder
            )
            loader = eval_loader(clips, range(8), 4, 2, collate=collate if train else collate_views)
            assert (loader.num_workers, clips.decoder) == ({"cuda": 0, "torchcodec": 2}[decoder], decoder)
            batches[decoder] = [batch["video"] for batch in loader]
        assert all(torch.equal(*pair) for pair in zip(*batches.values(), strict=True))

    class Fallback(decoders.CudaDecoder):
        """Of a video that NVDEC does not take."""

        def __init__(self, file: VideoFile, name: str = "") -> None:
            monkeypatch.setattr("torchcodec.decoders.VideoDecoder.cpu_fallback", "Video not supported")
            super().__init__(file, name)

    for _ in range(2):
        Fallback(tmp_path / "v.mp4")
    assert caplog.text.count("Video not supported; such files are decoded on the CPU; this is logged once") == 1
    decoders._LOGGED.discard("cuda")


def test_a_machine_without_decord(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on Macs and on Arm, for which it has no wheels."""
    monkeypatch.setitem(sys.modules, "decord", None)
    decoders._cannot_import.cache_clear()
    try:
        with pytest.raises(UserError, match=r"decord does not load .*; cure: pip install decord, which has wheels for"):
            choose_decoder("decord")
        assert choose_decoder("auto")[0] == "pyav"
        fail(monkeypatch, NotImplementedError("this profile"))
        monkeypatch.setattr(decoders.TorchcodecDecoder, "read_at", lambda *_: 1 / 0)
        with pytest.raises(VideoError, match="this profile"):
            choose_decoder("auto")[1](encode(tmp_path / "v.mp4", 20)).read_at(np.zeros(1))
    finally:
        decoders._cannot_import.cache_clear()


def test_torchcodec_without_ffmpeg_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be imported all the same, and would fail on every clip."""
    torchcodec = pytest.importorskip("torchcodec")
    monkeypatch.setattr(torchcodec, "ffmpeg_major_version", None)
    decoders._cannot_import.cache_clear()
    try:
        with pytest.raises(UserError, match=r"torchcodec does not load .FFmpeg is not there.*apt-get install"):
            choose_decoder("torchcodec")
    finally:
        decoders._cannot_import.cache_clear()


def test_an_unknown_decoder() -> None:
    with pytest.raises(UserError, match="must be auto, pyav, torchcodec, cuda, decord"):
        choose_decoder("gstreamer")


@pytest.mark.parametrize("name", DECODERS)
def test_a_file_that_stays_open_gives_the_same_frames(tmp_path: Path, name: str) -> None:
    plain, opened = opener(name), list[Path]()

    def counting(source: Any, called: str = "") -> Any:
        opened.append(source)
        return plain(source, called)

    reusing = ReusingOpener(counting)
    paths = [encode(tmp_path / f"{i}.mp4", x264="keyint=12:bframes=2") for i in range(2)]
    for path, start in ((paths[0], 0.5), (paths[0], 2.0), (paths[0], 0.1), (paths[1], 1.0), (paths[0], 2.0)):
        seconds = start + np.arange(4) / 10
        fresh, decoder = plain(path), reusing(path)
        assert (decoder.fps, decoder.duration) == (fresh.fps, fresh.duration)
        np.testing.assert_array_equal(decoder.read_at(seconds), fresh.read_at(seconds))
        fresh.close()
        decoder.close()
    assert opened == [paths[0], paths[1], paths[0]]


def test_what_changed_failed_or_is_in_use_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reusing, path = ReusingOpener(opener("pyav")), encode(tmp_path / "a.mp4")
    seconds = np.zeros(1)
    first, second = reusing(path), reusing(path)
    assert first is not second
    np.testing.assert_array_equal(first.read_at(seconds), second.read_at(seconds))
    first.close()
    second.close()
    third = reusing(path)
    assert third is second
    with pytest.raises(VideoError, match=r"a\.mp4: cannot be read: TypeError"):
        third.read_at(None)  # type: ignore[arg-type]
    third.close()
    fourth = reusing(path)
    assert fourth is not third
    fourth.close()
    monkeypatch.setattr(decoders.os, "getpid", lambda: -1)  # a forked process
    fifth = reusing(path)
    assert fifth is not fourth
    fifth.close()
    encode(path, frames=7)
    sixth = reusing(path)
    assert sixth.duration < fifth.duration
    sixth.close()
    path.unlink()
    with pytest.raises(VideoError, match="no such file"):
        reusing(path)


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Have PyAV raise ``error`` whatever it decodes."""

    def raising(*_: object) -> None:
        raise error

    monkeypatch.setattr(decoders.PyavDecoder, "_decode", raising)


def test_where_a_decoder_fails_the_next_is_tried_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opener("decord")
    fail(monkeypatch, NotImplementedError("this profile"))
    monkeypatch.setattr(decoders, "_LOGGED", set())
    monkeypatch.setattr(decoders, "_cannot_import", lambda module: "not here" if module == "torchcodec" else None)
    paths = [encode(tmp_path / f"{name}.mp4", 20) for name in "ab"]
    name, auto = choose_decoder("auto")
    assert name == "pyav"
    for path in paths:
        opened = auto(path)
        for seconds in ([0.05, 1.25], [0.75]):
            assert np.array_equal(opened.read_at(np.array(seconds)), reference(path)[1][[int(10 * s) for s in seconds]])
        opened.close()
    (message,) = caplog.messages
    assert message.startswith(f"{paths[0]}: cannot be read: NotImplementedError: this profile; decord reads it")
    # Where none can, the first one's reason counts, and a decoder chosen by name has no substitute.
    monkeypatch.setattr(decoders.DecordDecoder, "read_at", lambda *_: 1 / 0)
    for choice in ("auto", "pyav"):
        with pytest.raises(VideoError, match=r"a\.mp4: cannot be read: NotImplementedError: this profile$"):
            choose_decoder(choice)[1](paths[0]).read_at(np.zeros(1))


def test_damaged_files_are_not_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library would leave pictures out, or show others, without a word."""
    invalid = av.InvalidDataError(1, "Invalid data found when processing input")
    fail(monkeypatch, invalid)
    path = encode(tmp_path / "v.mp4", 20)
    with pytest.raises(VideoError, match=r"v\.mp4: cannot be decoded: Invalid data"):
        choose_decoder("auto")[1](path).read_at(np.zeros(1))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": (2, 64)},
        {"size": (64, 2)},
        {"size": (1, 33), "codec": "png", "pixels": "rgb24"},
        {"codec": "png", "pixels": "rgb48be"},
        {"codec": "png", "pixels": "rgba"},
        {"codec": "png", "pixels": "gray"},
        {"codec": "libx264", "pixels": "gray"},
    ],
    ids=str,
)
def test_odd_pictures(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = encode(tmp_path / "v.mp4", 8, **settings)
    _, pictures = reference(path)
    assert np.array_equal(opener("pyav")(path).read_at(np.array([0.05, 0.35])), pictures[[0, 3]])


def test_titles_in_other_encodings(tmp_path: Path) -> None:
    path = remux(encode(tmp_path / "v.mp4", 20), tmp_path / "v.mkv", title="caf-")
    path.write_bytes(path.read_bytes().replace(b"caf-", b"caf\xe9"))
    assert opener("pyav")(path).read_at(np.array([1.25])).shape == (1, 64, 96, 3)
