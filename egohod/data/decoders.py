"""Three decoders behind one protocol: seconds in, upright RGB frames out.

Times are seconds from a file's first frame. A frame is on display from its own time stamp until the next frame's;
reading at a time gives the frame on display, so variable frame rates need no special case.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from egohod.config import UserError
from egohod.data.files import Source, VideoError

# A file whose pictures end this much before its header says was cut off.
_MISSING_SECONDS = 1.0
_PEEK_BYTES = 1 << 20
# How the containers begin that are let through to FFmpeg, which would take still pictures and playlists as well.
_MP4_BOXES = (b"ftyp", b"styp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_STILL_BRANDS = (b"avif", b"heic", b"heix", b"mif1")
_MATROSKA, _PROGRAM_STREAM, _TRANSPORT_STREAM = b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"G"
_TRANSPORT_PACKET = 188


class Decoder(Protocol):
    """An open video file."""

    fps: float
    """Average frames per second."""
    duration: float
    """Seconds from the first frame to the end of the last."""

    def read_at(self, seconds: np.ndarray) -> np.ndarray:
        """Frames on display at ``seconds`` float64 [n], clamped to the file's ends -> uint8 RGB [n, H, W, 3], upright.

        Raises :class:`VideoError` if they cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Let the file go."""
        ...


class Opener(Protocol):
    """Opens a video."""

    def __call__(self, source: Source, name: str = "") -> Decoder:
        """The video in ``source``, a path or a seekable binary file; messages call it ``name`` (default: the path).

        Raises :class:`VideoError`.
        """
        ...


class PyavDecoder:
    """PyAV: FFmpeg from a wheel. Decodes only what the wanted frames need, which makes it the fastest here.

    Packets are read first and decoded second. So it is known which frames are wanted before any is decoded, and
    FFmpeg can leave out frames that no other frame refers to (most B-frames), the rest of a group of pictures after
    its last wanted frame, and whole groups without one. The frames that remain are the same, bit for bit.
    """

    def __init__(self, source: Source, name: str = "") -> None:
        self._av = importlib.import_module("av")
        self._source, self._name = source, name or str(source)
        _require_video(source, self._name)
        try:
            self._container = self._av.open(_plain(source))
        except (self._av.FFmpegError, OSError) as error:
            raise _not_opened(source, self._name, error) from error
        if not self._container.streams.video:
            sound = bool(self._container.streams.audio)
            self._container.close()
            raise VideoError(f"{self._name}: has no picture, only sound" if sound else f"{self._name}: has no picture")
        self._stream = self._container.streams.video[0]
        self._codec = self._stream.codec_context
        # One thread: the loader's processes share the cores already.
        self._codec.thread_count = 1
        self._reformatter = importlib.import_module("av.video.reformatter").VideoReformatter()
        self._start = self._stream.start_time or 0
        self._tick = float(self._stream.time_base)
        rate = self._stream.average_rate or self._stream.guessed_rate
        length = self._stream.duration
        if not rate or not self._codec.width:
            self.close()
            raise VideoError(f"{self._name}: not a video or damaged: no frame rate or picture size")
        self.fps = float(rate)
        if length is not None:
            self.duration = length * self._tick
        else:
            self.duration = (self._container.duration or 0) / 1e6

    def read_at(self, seconds: np.ndarray) -> np.ndarray:
        """See :class:`Decoder`."""
        # The small step up keeps a time that equals a time stamp from falling before it by rounding.
        ticks = np.floor(np.maximum(seconds, 0) / self._tick + 1e-3).astype(np.int64) + self._start
        try:
            packets = self._packets(int(ticks.min()), int(ticks.max()))
            shown = np.sort([packet.pts for packet in packets])
            wanted = shown[np.maximum(np.searchsorted(shown, ticks, side="right") - 1, 0)].tolist()
            frames = self._decode(packets, set(wanted))
        except (self._av.FFmpegError, OSError) as error:
            raise _not_decoded(self._source, self._name, error) from error
        missing = [pts for pts in wanted if pts not in frames]
        if missing:
            raise VideoError(f"{self._name}: damaged, no picture at {(missing[0] - self._start) * self._tick:.2f} s")
        return np.stack([frames[pts] for pts in wanted])

    def close(self) -> None:
        """See :class:`Decoder`."""
        self._container.close()

    def _packets(self, first: int, last: int) -> list[_Packet]:
        """The packets, in the order of decoding, that hold all frames shown from ``first`` to ``last``."""
        target = first
        while True:
            self._container.seek(target, stream=self._stream, backward=True)
            packets, complete = [], False
            for data in self._container.demux(self._stream):
                pts, dts = data.pts, data.dts
                if pts is None or not data.size:
                    continue
                # Decoding times ascend and are never after the time of display: nothing further can be shown in time.
                if dts is not None and dts > last:
                    complete = True
                    break
                packets.append(_Packet(pts, data.is_keyframe, data))
            if not packets:
                raise VideoError(f"{self._name}: truncated, no pictures at {(first - self._start) * self._tick:.2f} s")
            if not complete:
                self._check_end(packets[-1].data)
            # Decoding must begin at a key frame shown no later than the first wanted one. The seek goes by decoding
            # times and may lead to a later one.
            if packets[0].pts <= first or target <= self._start:
                return packets
            target = max(self._start, min(target, packets[0].pts) - round(1 / self._tick))

    def _check_end(self, last: Any) -> None:
        """Compare the last packet there is with what the header promises."""
        end = (last.pts + (last.duration or 0) - self._start) * self._tick
        if end < self.duration - _MISSING_SECONDS:
            raise VideoError(f"{self._name}: truncated, the pictures end at {end:.2f} s of {self.duration:.2f} s")

    def _decode(self, packets: Sequence[_Packet], wanted: set[int]) -> dict[int, np.ndarray]:
        """The frames with the time stamps ``wanted``, as RGB."""
        frames: dict[int, np.ndarray] = {}
        codec, skipping = self._codec, None
        codec.flush_buffers()
        for group, whole in _needed_groups(packets, wanted):
            left = sum(packet.pts in wanted for packet in group)
            for packet in group:
                hit = packet.pts in wanted
                if skipping is not (not hit):
                    skipping = not hit
                    codec.skip_frame = "NONREF" if skipping else "DEFAULT"
                for frame in codec.decode(packet.data):
                    if frame.pts in wanted:
                        frames[frame.pts] = self._rgb(frame)
                left -= hit
                if not left and not whole:
                    break
            if not whole:
                # Empties the decoder and makes it ready for a new start, as after a seek.
                frames |= {frame.pts: self._rgb(frame) for frame in codec.decode(None) if frame.pts in wanted}
                codec.flush_buffers()
        return frames

    def _rgb(self, frame: Any) -> np.ndarray:
        """A view of the converted picture [H, W, 3], upright; it keeps the picture alive."""
        plane = self._reformatter.reformat(frame, format="rgb24", threads=1).planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        picture = rows[:, : plane.width * 3].reshape(plane.height, plane.width, 3)
        # The other libraries turn a picture by the file's display matrix themselves.
        quarters = round(frame.rotation / 90)
        return np.rot90(picture, quarters) if quarters else picture


class _Packet(NamedTuple):
    """A compressed picture with its time of display in ticks."""

    pts: int
    is_key: bool
    data: Any


def _needed_groups(packets: Sequence[_Packet], wanted: set[int]) -> list[tuple[Sequence[_Packet], bool]]:
    """Groups of pictures (key frame first) that hold a wanted frame, or lead into one that needs them.

    The flag says that a group must be decoded to its end: the next group has wanted frames that are shown before
    its key frame, and those refer back (open groups of pictures).
    """
    starts = [0, *(i for i, packet in enumerate(packets) if packet.is_key and i)]
    groups = [packets[a:b] for a, b in zip(starts, [*starts[1:], len(packets)], strict=True)]
    needed: list[tuple[Sequence[_Packet], bool]] = []
    whole = False
    for group in reversed(groups):
        if whole or any(packet.pts in wanted for packet in group):
            needed.append((group, whole))
            whole = any(packet.pts in wanted and packet.pts < group[0].pts for packet in group)
    return needed[::-1]


class TorchcodecDecoder:
    """torchcodec: needs FFmpeg's shared libraries on the machine."""

    def __init__(self, source: Source, name: str = "") -> None:
        decoders = importlib.import_module("torchcodec.decoders")
        self._source, self._name = source, name or str(source)
        _require_video(source, self._name)
        try:
            self._decoder = decoders.VideoDecoder(_plain(source), dimension_order="NHWC", num_ffmpeg_threads=1)
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise _not_opened(source, self._name, error) from error
        meta = self._decoder.metadata
        if not meta.average_fps or not len(self._decoder):
            raise VideoError(f"{self._name}: not a video or damaged: no frame rate or no pictures")
        self.fps = float(meta.average_fps)
        self._begin = float(meta.begin_stream_seconds)
        self._end = float(meta.end_stream_seconds)
        self.duration = self._end - self._begin
        header = meta.duration_seconds_from_header
        if header is not None and self.duration < header - _MISSING_SECONDS:
            raise VideoError(f"{self._name}: truncated, the pictures end at {self.duration:.2f} s of {header:.2f} s")

    def read_at(self, seconds: np.ndarray) -> np.ndarray:
        """See :class:`Decoder`."""
        times = np.clip(seconds + self._begin, self._begin, np.nextafter(self._end, 0))
        try:
            return self._decoder.get_frames_played_at(times.tolist()).data.numpy()
        except (RuntimeError, IndexError, ValueError) as error:
            raise _not_decoded(self._source, self._name, error) from error

    def close(self) -> None:
        """See :class:`Decoder`."""
        del self._decoder


class DecordDecoder:
    """decord: what this field used first; kept for machines that have it."""

    def __init__(self, source: Source, name: str = "") -> None:
        decord = importlib.import_module("decord")
        self._source, self._name = source, name or str(source)
        _require_video(source, self._name)
        self._error = decord.DECORDError
        try:
            self._reader = decord.VideoReader(_plain(source), num_threads=1)
            self.fps = float(self._reader.get_avg_fps())
            self._starts = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0].astype(np.float64)
        except (self._error, RuntimeError, IndexError, OSError) as error:
            raise _not_opened(source, self._name, error) from error
        if not len(self._starts):
            raise VideoError(f"{self._name}: holds no pictures")
        self._starts -= self._starts[0]
        self.duration = float(self._starts[-1]) + 1 / self.fps

    def read_at(self, seconds: np.ndarray) -> np.ndarray:
        """See :class:`Decoder`."""
        # decord's time stamps are float32: a millisecond up keeps a frame's own time from falling before it.
        places = np.maximum(np.searchsorted(self._starts, seconds + 1e-3, side="right") - 1, 0)
        try:
            return self._reader.get_batch(places.tolist()).asnumpy()
        except (self._error, RuntimeError, IndexError) as error:
            raise _not_decoded(self._source, self._name, error) from error

    def close(self) -> None:
        """See :class:`Decoder`."""
        del self._reader


class KeptOpen:
    """Opens local videos through ``opener`` and keeps the last one open: the next clip often lies in the same file.

    Opening costs as much as decoding ten small pictures, and more for a long video with its long table of contents.
    A file that changed, and one that could not be read, is opened anew.
    """

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._kept: _Kept | None = None

    def __call__(self, source: Source, name: str = "") -> Decoder:
        """See :class:`Opener`."""
        if not isinstance(source, Path):
            return self._opener(source, name)
        # Two processes that share an open file would move each other's place in it.
        state = (os.getpid(), source, *_changed(source))
        kept, self._kept = self._kept, None
        if kept is not None and kept.state == state:
            return kept
        if kept is not None:
            kept.decoder.close()
        return _Kept(self, state, self._opener(source, name))

    def take_back(self, kept: _Kept) -> None:
        """Keep this one for the next call instead of the one that was kept."""
        if self._kept is not None:
            self._kept.decoder.close()
        self._kept = kept


class _Kept:
    """A decoder that goes back to its keeper when it is closed, unless it failed."""

    def __init__(self, keeper: KeptOpen, state: tuple[Any, ...], decoder: Decoder) -> None:
        self.keeper, self.state, self.decoder = keeper, state, decoder
        self.fps, self.duration = decoder.fps, decoder.duration
        self._failed = False

    def read_at(self, seconds: np.ndarray) -> np.ndarray:
        """See :class:`Decoder`."""
        self._failed = True
        frames = self.decoder.read_at(seconds)
        self._failed = False
        return frames

    def close(self) -> None:
        """See :class:`Decoder`."""
        if self._failed:
            self.decoder.close()
        else:
            self.keeper.take_back(self)


def _changed(path: Path) -> tuple[int, int]:
    """What changes when a file does; zeros for one that is not there, which its opener will say."""
    try:
        state = path.stat()
    except OSError:
        return 0, 0
    return state.st_mtime_ns, state.st_size


# Fastest first, see docs/benchmarks.md.
_DECODERS: dict[str, tuple[Opener, str, str]] = {
    "pyav": (PyavDecoder, "av", "pip install av"),
    "torchcodec": (
        TorchcodecDecoder,
        "torchcodec",
        "pip install torchcodec, and FFmpeg's shared libraries: apt-get install ffmpeg",
    ),
    "decord": (DecordDecoder, "decord", "pip install decord"),
}


def choose_decoder(name: str = "auto") -> tuple[str, Opener]:
    """The decoder called ``name``, or for ``auto`` the fastest that loads, as (name, function that opens a file).

    Raises :class:`UserError` with the command that installs what is missing.
    """
    missing = []
    for candidate in _DECODERS if name == "auto" else [name]:
        if candidate not in _DECODERS:
            raise UserError(f"data.decoder is '{name}', but must be auto, {', '.join(_DECODERS)}")
        opener, module, cure = _DECODERS[candidate]
        why = _cannot_import(module)
        if why is None:
            return candidate, opener
        missing.append(f"{candidate} does not load ({why}); cure: {cure}")
    raise UserError("data.decoder=" + name + ": " + "; ".join(missing))


@functools.cache
def _cannot_import(module: str) -> str | None:
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a library that fails to load raises many kinds
        return _one_line(error)
    # torchcodec can be imported without FFmpeg, for the sake of its still pictures; it then knows no version.
    return "FFmpeg is not there" if getattr(loaded, "ffmpeg_major_version", 0) is None else None


def _plain(source: Source) -> Any:
    """What the libraries take: a path as text, or a file from its beginning."""
    if isinstance(source, Path):
        return str(source)
    source.seek(0)
    return source


def _require_video(source: Source, name: str) -> None:
    """Raise :class:`VideoError` unless ``source`` begins like a video file."""
    try:
        if isinstance(source, Path):
            if not source.is_file():
                raise VideoError(f"{name}: {'is a folder, not a video' if source.is_dir() else 'no such file'}")
            with source.open("rb") as file:
                head = file.read(_TRANSPORT_PACKET + 1)
        else:
            head = _plain(source).read(_TRANSPORT_PACKET + 1)
    except OSError as error:
        raise VideoError(f"{name}: cannot be opened: {error.strerror}") from error
    if not head:
        raise VideoError(f"{name}: the file has zero bytes")
    known = (
        (head[4:8] in _MP4_BOXES and head[8:12] not in _STILL_BRANDS)
        or head.startswith((_MATROSKA, _PROGRAM_STREAM))
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or (head[:1] == _TRANSPORT_STREAM and head[_TRANSPORT_PACKET:] == _TRANSPORT_STREAM)
    )
    if not known:
        raise VideoError(f"{name}: not a video")


def _not_opened(source: Source, name: str, error: Exception) -> Exception:
    # What went wrong with reading says more than what a library makes of it.
    if getattr(source, "failure", None):
        return source.failure  # type: ignore[union-attr]
    if _has_only_sound(source):
        return VideoError(f"{name}: has no picture, only sound")
    return VideoError(f"{name}: truncated or damaged video ({_one_line(error)})")


def _not_decoded(source: Source, name: str, error: Exception) -> Exception:
    return getattr(source, "failure", None) or VideoError(f"{name}: cannot be decoded: {_one_line(error)}")


def _has_only_sound(source: Source) -> bool:
    """Whether an MP4's handlers name sound but no picture; some decoders say nothing better than 'cannot open'."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return _has_only_sound(file)
    # The table of contents stands at one end of the file or the other.
    source.seek(0)
    ends = source.read(_PEEK_BYTES)
    source.seek(max(0, source.seek(0, 2) - _PEEK_BYTES))
    ends += source.read()
    return set(re.findall(rb"hdlr.{8}(vide|soun)", ends, re.DOTALL)) == {b"soun"}


def _one_line(error: BaseException) -> str:
    """What a library has to say, without the places in its source."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return re.sub(r"^.*\.(cpp|cc):\d+[,:]\s*", "", " ".join(text.split()))[:200]
