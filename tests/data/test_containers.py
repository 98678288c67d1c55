"""Containers as cameras, browsers and editors write them: every frame, the length, and which stream is the video."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import DECODERS, encode, encode_sizes, numbers, opener, picture

from egohod.data.chunking import ChunkSettings, probe, write_chunks
from egohod.data.decoders import CachingOpener, choose_decoder
from egohod.data.storage import VideoError

FRAMES, RATE = 50, 25
B_FRAMES = {"x264-params": "keyint=20:bframes=3:b-adapt=0", "preset": "veryfast"}
OPEN_GROUPS = {"x264-params": "keyint=12:bframes=3:b-adapt=0:open-gop=1"}
HEVC = {"x265-params": "keyint=20:bframes=3:log-level=none:pools=none:frame-threads=1", "preset": "ultrafast"}
# Name of the file, codec, options of the encoder and of the muxer.
FILES: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "broadcast.ts": ("libx264", B_FRAMES, {}),
    "open groups.ts": ("libx264", OPEN_GROUPS, {}),
    "mpeg-4.ts": ("mpeg4", {"bf": "2", "g": "20"}, {}),
    "hevc.ts": ("libx265", HEVC, {}),
    "camcorder.m2ts": ("libx264", OPEN_GROUPS, {"mpegts_m2ts_mode": "1"}),
    "dvd.mpg": ("mpeg2video", {"bf": "2", "g": "12"}, {}),
    "stream.flv": ("libx264", B_FRAMES, {}),
    "old.flv": ("flv", {"g": "20"}, {}),
    "windows.wmv": ("wmv2", {"g": "20"}, {}),
    "mpeg-4.wmv": ("mpeg4", {"bf": "2", "g": "20"}, {}),
    "times of decoding.asf": ("libx264", B_FRAMES, {}),
    "old.avi": ("mpeg4", {"bf": "2", "g": "20"}, {}),
    "times of decoding.avi": ("libx264", B_FRAMES, {}),
    "screen.mkv": ("libx264", B_FRAMES, {}),
    "browser.webm": ("libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}, {}),
    "recorded in a browser.webm": ("libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}, {"live": "1"}),
    "camera.mov": ("libx264", B_FRAMES, {}),
    "phone.3gp": ("mpeg4", {"bf": "2", "g": "20"}, {}),
}


def write(
    path: Path, codec: str, options: dict[str, str], muxer: dict[str, str], frames: int = FRAMES, sound: float = 3.0
) -> Path:
    """Frames that show their number, and sound that is longer."""
    formats = {".mpg": "mpeg", ".m2ts": "mpegts", ".wmv": "asf"}
    with av.open(str(path), "w", format=formats.get(path.suffix), options=muxer) as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 2_000_000
        names = {".webm": "libopus", ".mpg": "mp2", ".wmv": "wmav2", ".asf": "wmav2"}
        rate = 48000 if path.suffix in (".webm", ".mpg") else 44100
        audio = container.add_stream(names.get(path.suffix, "aac"), rate=rate, layout="mono") if sound else None
        if audio:
            audio.bit_rate = 64_000
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio:
            tone(container, audio, rate, sound)
    return path


def tone(container: av.container.OutputContainer, stream: av.AudioStream, rate: int, seconds: float) -> None:
    size = stream.codec_context.frame_size or 1024
    resampler = av.AudioResampler(stream.codec_context.format, "mono", rate, size)
    for start in range(0, round(seconds * rate), size):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, size), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        for part in resampler.resample(frame):
            container.mux(stream.encode(part))
    container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("containers")
    for name, (codec, options, muxer) in FILES.items():
        write(folder / name, codec, options, muxer)
    return folder


def in_order(path: Path) -> np.ndarray:
    """Every frame, decoded from the first to the last."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        *((name, decoder) for name in FILES for decoder in ("pyav", "cached")),
        *((name, other) for name in ("screen.mkv", "browser.webm", "stream.flv") for other in DECODERS[1:]),
    ],
)
def test_any_frame_of_any_container(files: Path, tmp_path: Path, name: str, decoder: str) -> None:
    pictures = in_order(files / name)
    assert numbers(pictures) == list(range(FRAMES))
    if decoder == "cached":
        cache = CachingOpener(tmp_path, opener("pyav"))
        cache(files / name).close()
        assert list(tmp_path.rglob("frames.npy"))
        opened = cache(files / name)
    else:
        opened = opener(decoder)(files / name)
    assert opened.fps == pytest.approx(RATE, rel=1e-3)
    assert opened.duration == pytest.approx(FRAMES / RATE, abs=0.011)  # of the pictures, not of the sound
    for number in np.random.default_rng(0).permutation(FRAMES).tolist():
        assert np.array_equal(opened.read_at(np.array([(number + 0.5) / RATE]))[0], pictures[number]), number
    spread = np.array([1, 7, 20, 33, 48])
    assert np.array_equal(opened.read_at((spread + 0.5) / RATE), pictures[spread])
    opened.close()


@pytest.mark.parametrize("name", FILES)
def test_chunks_of_any_container(files: Path, tmp_path: Path, name: str) -> None:
    settings = ChunkSettings(seconds=0.8, short_side=64, crf=10)
    write_chunks(files / name, tmp_path, settings)
    shown = [numbers(in_order(path)) for path in sorted(tmp_path.iterdir())]
    assert shown == [list(range(20)), list(range(20, 40)), list(range(40, 50))]
    # A range of chunks, reached by a seek, is the same.
    part = tmp_path / "part"
    part.mkdir()
    write_chunks(files / name, part, settings, 2)
    assert (part / "0002.mp4").read_bytes() == (tmp_path / "0002.mp4").read_bytes()


@pytest.mark.parametrize("ending", ["avi", "mkv", "ts", "mp4"])
def test_a_picture_every_ten_seconds(tmp_path: Path, ending: str) -> None:
    """A time lapse, whose unit of time may be longer than a second."""
    path = tmp_path / f"v.{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(1, 10), options={"g": "5", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 4_000_000
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    opened = opener("pyav")(path)
    for order in ([11], [3], [0, 7], [6, 2, 9]):
        assert numbers(opened.read_at(10.0 * np.array(order) + 5)) == order


def test_other_libraries_refuse_what_they_show_wrong(files: Path) -> None:
    """Both lose their place when they seek in these."""
    for decoder in ("torchcodec", "decord"):
        with pytest.raises(VideoError, match=rf"broadcast\.ts: {decoder} shows wrong .* data\.decoder=pyav"):
            opener(decoder)(files / "broadcast.ts")


def test_a_recording_that_was_cut_between_key_frames(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From frame 7 on, somewhere within a packet; the first key frame is frame 20."""
    whole = write(tmp_path / "whole.ts", "libx264", B_FRAMES, {}, sound=0)
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        position = next(packet.pos for packet in packets if packet.pts - packets[0].pts > 7 * 3600)
    path = tmp_path / "cut.ts"
    path.write_bytes(whole.read_bytes()[position + 50 :])
    opened = opener("pyav")(path)
    first = FRAMES / RATE - opened.duration  # seconds of the whole recording
    lost = 20 / RATE - first
    assert 0.2 < lost < 0.7
    for second in (0.0, lost - 0.03):
        with pytest.raises(
            VideoError, match=rf"cut\.ts: begins between key frames; the first picture is at {lost:.2f} s"
        ):
            opened.read_at(np.array([second]))
    seconds = np.arange(20, FRAMES) / RATE + 0.02 - first
    assert numbers(opened.read_at(seconds)) == list(range(20, FRAMES))
    # Chunks keep the file's clock, so a csv means the same in both.
    with caplog.at_level(logging.WARNING):
        write_chunks(path, tmp_path, ChunkSettings(seconds=10.0, short_side=64))
    assert f"begins between key frames; the first picture is at {lost:.2f} s" in caplog.text
    chunk = opener("pyav")(tmp_path / "0000.mp4")
    assert numbers(chunk.read_at(np.array([0.01, *seconds]))) == [20, *range(20, FRAMES)]


def two_streams(path: Path, cover: bool) -> Path:
    """A video of the real size as the second stream; the first one is a cover picture, or a smaller video."""
    with av.open(str(path), "w") as container:
        first = container.add_stream("mjpeg" if cover else "libx264", rate=10)
        first.width, first.height, first.pix_fmt = (48, 48, "yuvj420p") if cover else (48, 32, "yuv420p")
        second = container.add_stream("libx264", rate=10)
        second.width, second.height, second.pix_fmt = 96, 64, "yuv420p"
        if not cover:
            first.disposition, second.disposition = av.stream.Disposition(0), av.stream.Disposition.default
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            for stream in (first, second):
                if stream is second or number == 0 or not cover:
                    container.mux(stream.encode(frame.reformat(stream.width, stream.height, stream.pix_fmt)))
        for stream in (first, second):
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("cover", [True, False])
@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_the_video_is_the_same_stream_for_all(tmp_path: Path, ending: str, cover: bool) -> None:
    """And never a cover picture, which is a stream of one picture that cannot be sought in."""
    path = two_streams(tmp_path / f"v.{ending}", cover)
    for decoder in ("pyav", "torchcodec"):
        with_second = opener(decoder)(path)
        frames = with_second.read_at(np.array([0.05, 1.25]))
        assert frames.shape == (2, 64, 96, 3)
        assert numbers(frames) == [0, 12]
    with pytest.raises(VideoError, match=r"several videos, and decord cannot select stream 1; set data"):
        opener("decord")(path)
    assert (probe(path).width, probe(path).height) == (96, 64)
    assert choose_decoder("auto")[1](path).read_at(np.zeros(1)).shape == (1, 64, 96, 3)


NAMES = [
    "2024-01-01T12:00:00.mp4",
    "concat:a|b.mp4",
    "file:a.mp4",
    "http://a.mp4",
    "-i.mp4",
    "100%03d #1?.mp4",
    "two\nlines.mp4",
    "https:\\a.mkv.mp4",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """FFmpeg takes the text before a colon for a protocol, unless a path is absolute."""
    path = encode(tmp_path / "v.mp4", 20)
    monkeypatch.chdir(tmp_path)
    target = Path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    for decoder in DECODERS:
        assert numbers(opener(decoder)(target).read_at(np.array([1.25]))) == [12]
    Path("out").mkdir()
    write_chunks(target, Path("out"), ChunkSettings(short_side=64))
    assert len(in_order(Path("out/0000.mp4").resolve())) == 20
    # Nor does a chunk's name lead elsewhere.
    with pytest.raises(VideoError, match="no such file"):
        opener("pyav")(Path("concat:2024-01-01T12:00:00.mp4"))


@pytest.mark.parametrize("format", ["mp4", "mpegts", "matroska"])
def test_another_resolution_is_scaled_to_the_first(tmp_path: Path, format: str) -> None:
    path = encode_sizes(tmp_path / "v", [(96, 64), (192, 128)], format)
    frames = opener("pyav")(path).read_at(np.array([0.55, 1.95, 2.05, 3.55]))
    assert frames.shape == (4, 64, 96, 3)
    assert numbers(frames) == [5, 19, 20, 35]
    write_chunks(path, tmp_path, ChunkSettings(short_side=64))
    assert numbers(in_order(tmp_path / "0000.mp4")) == list(range(40))


@pytest.mark.parametrize("format", ["mp4", "mpegts", "matroska"])
def test_other_proportions_cost_the_clip_with_the_reason(tmp_path: Path, format: str) -> None:
    path = encode_sizes(tmp_path / "v", [(96, 64), (64, 96)], format)
    opened = opener("pyav")(path)
    with pytest.raises(VideoError, match=r"/v: the picture size changes from 96x64 to 64x96 at 2\.00 s"):
        opened.read_at(np.array([1.05, 2.05]))
    # Before and after, the file is good.
    assert opened.read_at(np.array([0.55, 1.05])).shape == (2, 64, 96, 3)
    assert opened.read_at(np.array([2.55, 3.05])).shape == (2, 96, 64, 3)
    with pytest.raises(VideoError, match=r"/v: the picture size changes from 96x64 to 64x96 at 2\.00 s"):
        write_chunks(path, tmp_path, ChunkSettings(short_side=64))


@pytest.mark.parametrize("name", ["torchcodec", "decord"])
def test_a_table_of_more_pictures_than_bytes_is_damage(tmp_path: Path, name: str) -> None:
    """decord would end the process making room for them."""
    path = encode(tmp_path / "v.mp4", 20)
    content = bytearray(path.read_bytes())
    at = content.index(b"stts") + 12  # how many pictures have the first duration
    content[at : at + 4] = (2**31 - 1).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"v\.mp4: damaged, a table of 2,147,483,647 pictures in "):
        opener(name)(path)
