"""Real video files whose frames tell their number."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from egohod.config import UserError
from egohod.data.decoders import Opener, choose_decoder

DECODERS = ("pyav", "torchcodec", "decord")
FPS = 10
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
    known = np.array([brightness(i) for i in range(DISTINCT)])
    return [int(np.abs(known - bar).argmin()) for bar in bars]


def encode(
    path: Path,
    frames: int = 40,
    *,
    first: int = 0,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    codec: str = "libx264",
    x264: str = "keyint=10",
    milliseconds: list[int] | None = None,
    faststart: bool = False,
) -> Path:
    """Write the frames ``first`` .. ``first + frames - 1``, evenly or at the given times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"preset": "veryfast", "threads": "1", "x264-params": x264} if codec == "libx264" else {"bf": "2"}
    base = Fraction(1, FPS) if milliseconds is None else Fraction(1, 1000)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=FPS, options=settings)
        stream.width, stream.height = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        if milliseconds is not None:
            stream.codec_context.time_base = base
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(first + i, *size), format="rgb24")
            frame.pts, frame.time_base = (i if milliseconds is None else milliseconds[i]), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def encode_sound(path: Path) -> Path:
    """A second of silence in an MP4 without pictures."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, i * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
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
    """The decoder; only torchcodec may be absent, since it needs FFmpeg's libraries from outside Python."""
    try:
        return choose_decoder(name)[1]
    except UserError as error:
        if name != "torchcodec":
            raise
        pytest.skip(str(error))
