"""Real video files whose frames show their number."""

from __future__ import annotations

import platform
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from egohod.data.decoders import Opener, choose_decoder
from egohod.errors import UserError

DECODERS = ("pyav", "torchcodec", "decord")
FPS = 10
RATE = 16000
WIDTH, HEIGHT = 96, 64
# Bars repeat after so many frames.
DISTINCT = 55


def brightness(number: int) -> int:
    """Grey of the bar of frame ``number``; any two of 55 frames differ by more than the codec's error."""
    return 18 + 4 * (number * 17 % DISTINCT)


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A texture that slides with the frame number, under a bar whose brightness is the number."""
    y, x = np.mgrid[0:height, 0:width]
    wave = 90 + 60 * np.sin((x + 3 * number) / 5) * np.cos((y - 2 * number) / 7)
    frame = np.stack([wave, np.roll(wave, number, 1), 255 - wave], -1)
    frame[: height // 2] = brightness(number)
    return frame.clip(0, 255).astype(np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    """Which frame (modulo 55) each of ``frames`` [n, H, W, 3] is, by its bar."""
    bars = frames[:, 4 : frames.shape[1] // 2 - 4, 8:-8].astype(float).mean((1, 2, 3))
    levels = np.array([brightness(i) for i in range(DISTINCT)])
    return [int(np.abs(levels - bar).argmin()) for bar in bars]


def encode(
    path: Path,
    frames: int = 40,
    *,
    first: int = 0,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    x264: str = "keyint=10",
    milliseconds: list[int] | None = None,
    faststart: bool = False,
    sound: float = 0.0,
) -> Path:
    """Write the frames ``first`` .. ``first + frames - 1``, evenly or at the given times; ``sound`` in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "libx264": {"preset": "veryfast", "threads": "1", "x264-params": x264},
        "libx265": {"preset": "ultrafast", "x265-params": f"{x264}:log-level=none:pools=none:frame-threads=1"},
        "libsvtav1": {"preset": "12", "crf": "30", "g": "2"},  # as LeRobot encodes
    }.get(codec, {"bf": "2"})
    base = Fraction(1, FPS) if milliseconds is None else Fraction(1, 1000)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=FPS, options=settings)
        stream.width, stream.height = size
        stream.pix_fmt, stream.bit_rate = pixels, 0 if codec == "libsvtav1" else 2_000_000
        if milliseconds is not None:
            stream.codec_context.time_base = base
        audio = container.add_stream("aac", rate=RATE, layout="mono") if sound else None
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(first + i, *size), format="rgb24")
            frame.pts, frame.time_base = (i if milliseconds is None else milliseconds[i]), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio:
            silence(container, audio, sound)
    return path


def silence(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    """Write silence."""
    for i in range(round(seconds * RATE / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, i * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def encode_sound(path: Path) -> Path:
    """A second of silence in an MP4 without pictures."""
    with av.open(str(path), "w", format="mp4") as container:
        silence(container, container.add_stream("aac", rate=RATE, layout="mono"), 1.0)
    return path


def encode_sizes(path: Path, sizes: list[tuple[int, int]], format: str = "mp4") -> Path:
    """One H.264 stream of 20 frames in each size, as a call over a bad line records it."""
    with av.open(str(path), "w", format=format) as container:
        stream, number = container.add_stream("libx264", rate=10), 0
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuv420p"
        stream.codec_context.open()
        for size in sizes:
            encoder = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt = *size, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, 10), Fraction(10)
            # Without a common header, each part brings its own sizes.
            encoder.options = {"x264-params": "keyint=10:bframes=0:repeat-headers=1:annexb=1"}
            frames = [av.VideoFrame.from_ndarray(picture(number + i, *size), format="rgb24") for i in range(20)]
            packets = []
            for i, frame in enumerate(frames):
                frame.pts, frame.time_base = number + i, Fraction(1, 10)
                packets += encoder.encode(frame.reformat(format="yuv420p"))
            for packet in [*packets, *encoder.encode(None)]:
                packet.stream = stream
                container.mux(packet)
            number += 20
    return path


def remux(source: Path, path: Path, **metadata: str) -> Path:
    """The same pictures in the container that the ending of ``path`` names."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        new.metadata.update(metadata)
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    return path


def turn(path: Path, degrees: int) -> Path:
    """Mark the file's pictures as rotated clockwise, as a camera held upright does."""
    content = bytearray(path.read_bytes())
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    # The matrix of the track header box, version 0: 40 bytes behind its name, 16.16 (the last column 2.30) fixed point.
    matrix = struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = matrix
    path.write_bytes(content)
    return path


def skip_start(path: Path, frames: int) -> Path:
    """Have the file's edit list leave out the first ``frames``, as a lossless cut does."""
    content = bytearray(path.read_bytes())
    ticks = struct.unpack_from(">I", content, content.index(b"mdhd") + 4 + 12)[0] // FPS * frames
    at = content.index(b"elst") + 4 + 8
    duration, media_time = struct.unpack_from(">Ii", content, at)
    struct.pack_into(">Ii", content, at, duration - frames * 1000 // FPS, media_time + ticks)
    path.write_bytes(content)
    return path


def reference(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every frame of a file, decoded from the first to the last: times from the first frame on, pictures."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        times = np.array([pts for pts, _ in frames]) * float(stream.time_base)
    return times - times[0], np.stack([picture for _, picture in frames])


def opener(name: str) -> Opener:
    """The decoder; torchcodec may be absent, since it needs FFmpeg's libraries, and decord where it has no wheel."""
    try:
        return choose_decoder(name)[1]
    except UserError as error:
        if name == "pyav" or (name == "decord" and (sys.platform, platform.machine()) == ("linux", "x86_64")):
            raise
        pytest.skip(str(error))
