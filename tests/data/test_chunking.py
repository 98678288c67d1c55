"""Chunks show at any moment what the source shows, whatever the container, the codec, the timing or the rotation."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from video_files import DECODERS, encode, encode_sound, numbers, opener, picture, reference

from egohod.data.chunking import (
    ChunkSettings,
    DisplayedFrame,
    Output,
    Video,
    at_rate,
    chunk_size,
    probe,
    try_encoder,
    write_chunks,
)
from egohod.data.videos import VideoError, VideoStore, segment_indices
from egohod.errors import UserError

SMALL = ChunkSettings(seconds=1.0, short_side=64, crf=16)


def camera(
    path: Path,
    codec: str = "libx264",
    *,
    rate: Any = 10,
    frames: int = 34,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (96, 64),
    turn: int | None = None,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A file as cameras write them; the picture shows its number (see ``video_files``)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        (stream.width, stream.height), stream.pix_fmt, stream.bit_rate = size, pix_fmt, 4_000_000
        if turn is not None:
            stream.set_display_rotation(turn)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pix_fmt)))
        container.mux(stream.encode(None))
    return path


def cut(source: Path, folder: Path, settings: ChunkSettings = SMALL) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_chunks(source, folder, settings)
    return folder


def at(folder: Path, moment: float, settings: ChunkSettings = SMALL, decoder: str = "pyav") -> np.ndarray:
    """The picture that the chunks show at a moment."""
    number = int(moment // settings.seconds)
    opened = opener(decoder)(folder / settings.name(number))
    shown = opened.read_at(np.array([moment - number * settings.seconds]))[0]
    opened.close()
    return shown


VARIABLE = [int(100 * i + 60 * np.sin(i)) for i in range(34)]
FILES: dict[str, dict[str, Any]] = {
    "b-frames.mp4": {"options": {"x264-params": "keyint=250:bframes=3"}},
    "ntsc.mp4": {"rate": Fraction(30000, 1001), "frames": 64},
    "open groups.mkv": {"options": {"x264-params": "keyint=8:open-gop=1:bframes=5:b-adapt=0"}},
    "hevc 10 bit.mov": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": "log-level=none"}},
    "full range.mp4": {"pix_fmt": "yuvj420p"},
    "no chroma loss.mkv": {"pix_fmt": "yuv444p"},
    "old.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "broadcast.ts": {},
    "browser.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "still pictures.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}


@pytest.mark.parametrize("name", [*FILES, "variable.mp4"])
def test_a_moment_shows_the_same_picture_as_in_the_source(tmp_path: Path, name: str) -> None:
    if name == "variable.mp4":
        source = encode(tmp_path / name, 34, milliseconds=VARIABLE)
    else:
        source = camera(tmp_path / name, **FILES[name])
    times, pictures = reference(source)
    folder = cut(source, tmp_path / "out")
    moments = np.random.default_rng(0).uniform(0, times[-1], 24)
    # Borders too; but not within a millisecond of a change, where rounding decides.
    moments = [m for m in [*moments, 1.0, 2.0, 0.999] if m < times[-1] and np.abs(times - m).min() > 2e-3]
    assert len(moments) > 15
    for moment in moments:
        shown = pictures[np.searchsorted(times, moment, side="right") - 1]
        assert np.abs(at(folder, moment).astype(int) - shown).mean() < 5, moment


def test_a_bare_stream_has_no_times_but_a_rate(tmp_path: Path) -> None:
    source = camera(tmp_path / "v.h264", options={"bf": "0"})
    folder = cut(source, tmp_path / "out", ChunkSettings(seconds=10, short_side=64))
    times, pictures = reference(folder / "0000.mp4")
    assert numbers(pictures) == list(range(34))
    assert times == pytest.approx(np.arange(34) / 10, abs=1e-4)


def test_chunks_have_the_promised_form(tmp_path: Path) -> None:
    folder = cut(camera(tmp_path / "v.mp4", size=(200, 150), frames=34), tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["0000.mp4", "0001.mp4", "0002.mp4", "0003.mp4"]
    assert numbers(np.concatenate([reference(path)[1] for path in sorted(folder.iterdir())])) == list(range(34))
    with av.open(str(folder / "0001.mp4")) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (86, 64)
        assert stream.average_rate == 10
        assert float(stream.duration * stream.time_base) == 1.0
    settings = ChunkSettings(seconds=15, short_side=64, keyint=16)
    folder = cut(camera(tmp_path / "cuts.mp4", frames=50), tmp_path / "long", settings)
    with av.open(str(folder / "0000.mp4")) as container:
        packets = sorted((p for p in container.demux(video=0) if p.size), key=lambda p: p.pts)
        assert [i for i, packet in enumerate(packets) if packet.is_keyframe] == [0, 16, 32, 48]
        assert packets[0].pts == 0


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.6, 1.7), (1.0, 2.0), (0.1, 3.4), (2.5, 9.0)])
def test_the_loader_reads_the_same_clip_from_chunks_and_source(
    tmp_path: Path, start: float, end: float, decoder: str
) -> None:
    source = camera(tmp_path / "v.mp4", options={"x264-params": "keyint=250:bframes=3"})
    cut(source, tmp_path / "chunks" / "v")
    whole = VideoStore(tmp_path, "whole", 1.0, opener(decoder)).read("v", start, end, 8).pictures
    chunks = VideoStore(tmp_path / "chunks", "chunks", 1.0, opener(decoder)).read("v", start, end, 8).pictures
    expected = segment_indices(round(start * 10), min(34, round(end * 10)), 8).tolist()
    assert numbers(whole) == numbers(chunks) == expected
    with pytest.raises(VideoError, match=r"the clip begins at|no such file"):
        VideoStore(tmp_path / "chunks", "chunks", 1.0, opener(decoder)).read("v", 3.5, 4.5, 4)


@pytest.mark.parametrize("turn", [None, 90, 180, -90])
def test_rotation_is_baked_in(tmp_path: Path, turn: int | None) -> None:
    source = camera(tmp_path / "v.mp4", turn=turn, options={"crf": "10"})
    folder = cut(source, tmp_path / "out")
    with av.open(str(folder / "0000.mp4")) as container:
        frame = next(container.decode(video=0))
        assert frame.rotation == 0
    # set_display_rotation turns counter-clockwise, as np.rot90 does.
    upright = np.rot90(picture(12), (turn or 0) // 90)
    shown = at(folder, 1.25)
    assert shown.shape == upright.shape
    assert np.abs(shown.astype(int) - upright).mean() < 6


def test_a_mirrored_recording_is_mirrored_back(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(0, hflip=True)
        for number in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        container.mux(stream.encode(None))
    shown = at(cut(tmp_path / "v.mp4", tmp_path / "out"), 0.25)
    assert np.abs(shown.astype(int) - picture(2)[:, ::-1]).mean() < 6


@pytest.mark.parametrize(
    ("size", "aspect", "short", "expected"),
    [
        ((1920, 1080), 1, 288, (512, 288)),
        ((1080, 1920), 1, 288, (288, 512)),
        ((426, 320), 1, 256, (340, 256)),
        ((427, 241), 1, 288, (426, 240)),  # never larger, always even
        ((720, 576), Fraction(64, 45), 288, (512, 288)),
        ((1440, 1080), Fraction(4, 3), 288, (512, 288)),
        ((341, 1), 1, 288, (340, 2)),
    ],
)
def test_sizes(size: tuple[int, int], aspect: Any, short: int, expected: tuple[int, int]) -> None:
    assert chunk_size(*size, Fraction(aspect), short) == expected


def test_pixels_become_square(tmp_path: Path) -> None:
    source = camera(tmp_path / "v.mp4", size=(72, 64), aspect=Fraction(4, 3), frames=4)
    _, pictures = reference(cut(source, tmp_path / "out") / "0000.mp4")
    assert pictures.shape == (4, 64, 96, 3)
    source = camera(tmp_path / "t.mp4", size=(72, 64), aspect=Fraction(4, 3), turn=90, frames=4)
    _, pictures = reference(cut(source, tmp_path / "turned") / "0000.mp4")
    assert pictures.shape == (4, 96, 64, 3)


def test_ranges_give_the_same_bytes_as_one_go(tmp_path: Path) -> None:
    for name in ("b-frames.mp4", "ntsc.mp4", "broadcast.ts", "old.avi"):
        source = camera(tmp_path / name, **FILES[name])
        for settings in (SMALL, ChunkSettings(seconds=1.0, short_side=64, fps=7)):
            folder = tmp_path / f"{name} {settings.fps}"
            whole = cut(source, folder / "whole", settings)
            (folder / "parts").mkdir()
            for first, last in ((2, None), (0, 1), (1, 2)):
                write_chunks(source, folder / "parts", settings, first, last)
            files = {path.name: path.read_bytes() for path in whole.iterdir()}
            assert files == {path.name: path.read_bytes() for path in (folder / "parts").iterdir()}, name


def test_a_constant_rate(tmp_path: Path) -> None:
    source = encode(tmp_path / "v.mp4", 34, milliseconds=VARIABLE)
    folder = cut(source, tmp_path / "out", ChunkSettings(seconds=1.0, short_side=64, fps=5))
    times, pictures = reference(folder / "0001.mp4")
    assert times.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    shown = [max(i for i, ms in enumerate(VARIABLE) if ms - VARIABLE[0] <= 1000 + 200 * k) for k in range(5)]
    assert numbers(pictures) == shown


def test_a_rate_keeps_to_the_clock() -> None:
    # 24 frames at 24 a second, resampled to 30: as long as before, each moment's frame on display.
    frames = [DisplayedFrame(i, 10_000 * i, 10_000 * (i + 1)) for i in range(24)]
    made = list(at_rate(frames, 30))
    assert [frame.begin for frame in made] == [8000 * i for i in range(30)]
    assert [frame.picture for frame in made] == [8000 * i // 10_000 for i in range(30)]
    assert made[-1].end == 240_000
    assert list(at_rate(frames[12:], 30, 120_000)) == made[15:]


def test_names_of_the_layouts(tmp_path: Path) -> None:
    avion = ChunkSettings(seconds=2, short_side=64, layout="avion")
    source = camera(tmp_path / "v.mp4")
    final = Output(tmp_path / "out", avion, tmp_path / "in").final(Video("v 1", source))
    assert final == tmp_path / "out" / "v 1.mp4"
    folder = cut(source, final, avion)
    assert sorted(path.name for path in folder.iterdir()) == ["0.mp4", "2.mp4"]
    with pytest.raises(UserError, match="whole seconds"):
        ChunkSettings(seconds=1.5, layout="avion")


def test_hevc_and_quality(tmp_path: Path) -> None:
    source = camera(tmp_path / "v.mp4", frames=11)  # its second chunk is a single frame
    folder = cut(source, tmp_path / "hevc", ChunkSettings(seconds=1.0, short_side=64, codec="libx265"))
    assert probe(folder / "0000.mp4").codec == "hevc"
    assert numbers(reference(folder / "0001.mp4")[1]) == [10]
    sizes = []
    for number, more in enumerate(
        ({"crf": 16}, {"crf": 30}, {"crf": 30, "keyint": 2}, {"crf": 30, "fastdecode": False})
    ):
        folder = cut(source, tmp_path / str(number), ChunkSettings(seconds=2.0, short_side=64, **more))  # type: ignore[arg-type]
        sizes.append((folder / "0000.mp4").stat().st_size)
    assert sizes[0] > sizes[1]
    assert sizes[2] > sizes[1] > sizes[3]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("seconds", 0), ("short_side", 225), ("keyint", 0), ("fps", 0), ("crf", 60), ("codec", "h263"), ("layout", "tar")],
)
def test_settings_that_make_no_sense(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"--{setting} is {value}, but must be"):
        ChunkSettings(**{setting: value})


def test_a_preset_that_the_encoder_does_not_know() -> None:
    try_encoder(ChunkSettings())
    with pytest.raises(UserError, match="preset 'swift'"):
        try_encoder(ChunkSettings(preset="swift"))


def broken(folder: Path, kind: str) -> Path:
    path = folder / "v.mp4"
    if kind == "sound only":
        return encode_sound(path)
    if kind == "text":
        path.write_text("no video\n" * 100)
    elif kind == "zero bytes":
        path.touch()
    elif kind != "missing":
        content = encode(path, 60, x264="keyint=10:qp=1", faststart="begins" in kind).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("zero bytes", "zero bytes"),
        ("text", "not a video, or a truncated one"),
        ("sound only", "has no picture"),
        ("truncated, contents at the end", "not a video, or a truncated one"),
        ("truncated, begins with contents", "truncated"),
    ],
)
def test_a_file_that_is_no_video_is_named_with_the_reason(tmp_path: Path, kind: str, reason: str) -> None:
    source = broken(tmp_path, kind)
    with pytest.raises(VideoError) as caught:
        cut(source, tmp_path / "out")
    assert str(caught.value).startswith(f"{source}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_longer_sound_is_no_missing_picture(tmp_path: Path) -> None:
    for name in ("v.mp4", "v.mkv", "v.avi"):
        with av.open(str(tmp_path / name), "w") as container:
            video = container.add_stream("libx264", rate=10)
            video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
            sound = container.add_stream("aac", rate=16000, layout="mono")
            for number in range(20):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
            container.mux(video.encode(None))
            for number in range(94):  # 6 s
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, number * 1024
                container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
        folder = cut(tmp_path / name, tmp_path / f"{name} out", ChunkSettings(seconds=1.0, short_side=64))
        assert len(list(folder.iterdir())) == 2, name
        with av.open(str(folder / "0000.mp4")) as container:
            assert not container.streams.audio


def test_time_stamps_that_jump(tmp_path: Path) -> None:
    source = encode(tmp_path / "v.mp4", 4, milliseconds=[0, 100, 200, 5_000_000])
    with pytest.raises(VideoError, match=r"time stamps jump from 0\.20 to 5000\.00 s"):
        cut(source, tmp_path / "out")
    # A pause is none: the last picture stays.
    source = encode(tmp_path / "pause.mp4", 4, milliseconds=[0, 100, 200, 3_500])
    folder = cut(source, tmp_path / "pause")
    assert [numbers(reference(path)[1]) for path in sorted(folder.iterdir())] == [[0, 1, 2], [2], [2], [2, 3]]


@pytest.mark.ci
def test_real_clips(shared: Path, tmp_path: Path) -> None:
    for source in sorted((shared / "media").glob("*/*.mp4")):
        folder = cut(source, tmp_path / source.stem, ChunkSettings(seconds=1.0, short_side=2000, crf=14))
        times, pictures = reference(source)
        for moment in np.random.default_rng(0).uniform(0, min(times[-1], 6), 6):
            shown, there = at(folder, moment), pictures[np.searchsorted(times, moment, side="right") - 1]
            if np.abs(times - moment).min() > 2e-3 and shown.shape == there.shape:
                assert np.abs(shown.astype(int) - there).mean() < 5, (source.name, moment)
