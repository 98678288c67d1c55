"""Video files: their containers, and four decoders behind one protocol: seconds in, upright RGB frames out.

Times are seconds from a file's first frame. A frame is on display from its own time stamp until the next frame's;
reading at a time gives the frame on display, so variable frame rates need no special case. Which containers are
accepted, and which of a file's streams is the video, is decided here for the decoders and the chunker alike.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import importlib
import io
import itertools
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from egohod.data.storage import VideoError, VideoFile, one_clip
from egohod.errors import UserError
from egohod.runtime import atomic_write, content_hash

log = logging.getLogger(__name__)

VIDEO_ENDINGS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts", ".wmv", ".asf", ".flv",
    ".3gp",
)  # fmt: skip
"""Endings of video files, in lower case; files may write them in any case."""
MISSING_SECONDS = 1.0
"""A file whose pictures end this much before its header says was cut off."""
MAX_CACHED_BYTES = 1 << 28
"""Decoded size up to which :class:`CachingOpener` keeps a video: a minute at 224 x 224."""
HEAD_PACKETS = 64
"""Packets at a file's beginning that show what its time stamps are like."""
# Only the headers of these state the true length; elsewhere it is guessed from the bit rate or the last time stamps.
FORMATS_WITH_LENGTH = ("mov", "matroska", "avi", "asf")
# Containers that hold times of display, and lead by a table to key frames.
_INDEXED = ("mov", "matroska")
# Containers in which torchcodec and decord find the requested pictures.
_SOUGHT_BY_ALL = ("mov", "matroska", "flv")
# H.264 and HEVC let a picture be decoded at most so many pictures before it is shown.
_REORDER = 17

# How the containers begin that are handed to FFmpeg, which would take still pictures and playlists as well.
_MP4_BOXES = (b"ftyp", b"styp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_STILL_BRANDS = (b"avif", b"heic", b"heix", b"mif1")
_MAGIC = {
    b"\x1aE\xdf\xa3": "matroska",
    b"\0\0\1\xba": "mpeg",
    b"FLV\x01": "flv",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c": "asf",
}
# Bytes from packet to packet of a transport stream: plain, with a time code (m2ts), with error correction.
_PACKET_BYTES = (188, 192, 204)
_SYNC, _SYNCS = 0x47, 5
# Enough for the syncs to follow from any byte of the first packet on.
_HEAD_BYTES = max(_PACKET_BYTES) * (_SYNCS + 1)
# Pictures whose proportions differ by no more than this are the same at another resolution.
_SAME_ASPECT = 0.02
_PEEK_BYTES = 1 << 20


# --------------------------------------------------------------------------------------------------
# Containers
# --------------------------------------------------------------------------------------------------


def plain(file: VideoFile) -> Any:
    """``file`` for the libraries: an absolute path as text, or a file at its beginning.

    FFmpeg reads a relative ``2024-01-01T12:00:00.mp4`` or ``concat:a`` as a URL, and ``-i.mp4`` looks like an option.
    """
    if isinstance(file, Path):
        return os.path.abspath(file)
    file.seek(0)
    return file


def container_format(file: VideoFile, name: str) -> str | None:
    """FFmpeg's name of the format of a video file, by its first bytes; None if it is no container of videos.

    Opening with this format keeps FFmpeg from taking the file for a playlist, which would lead it to other files.
    Raises :class:`VideoError`, calling the file ``name``, for a file that is missing, empty or cannot be opened.
    """
    try:
        if isinstance(file, Path):
            if not file.is_file():
                raise VideoError(f"{name}: {'is a folder, not a video' if file.is_dir() else 'no such file'}")
            with file.open("rb") as opened:
                head = opened.read(_HEAD_BYTES)
        else:
            head = plain(file).read(_HEAD_BYTES)
    except OSError as error:
        raise VideoError(f"{name}: cannot be opened: {error.strerror}") from error
    if not head:
        raise VideoError(f"{name}: the file has zero bytes")
    if head[4:8] in _MP4_BOXES and head[8:12] not in _STILL_BRANDS:
        return "mov"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    for magic, format in _MAGIC.items():
        if head.startswith(magic):
            return format
    # A transport stream has no magic, but sync bytes at a packet's distance. The first one may be anywhere in the
    # first packet: a recording that was cut at any byte begins within one.
    for size in _PACKET_BYTES:
        for begin in range(size):
            syncs = range(begin, min(len(head), begin + _SYNCS * size), size)
            # Two are enough where the first byte, or the one behind a time code, is the first of them.
            if len(syncs) >= (2 if begin in (0, 4) else _SYNCS) and all(head[at] == _SYNC for at in syncs):
                return "mpegts"
    return None


def packets_of(container: Any, *streams: Any) -> Iterator[Any]:
    """The packets of ``streams``, or of all, from where a PyAV container is; without the empty ones that end it."""
    # Behind the last packet PyAV may trip over streams that appeared while it read, as they do in broadcasts.
    with contextlib.suppress(IndexError):
        yield from (packet for packet in container.demux(*streams) if packet.size)


def video_stream(container: Any) -> tuple[Any, bool]:
    """The stream of a PyAV container that is the video, None if there is none, and whether it is the only candidate.

    Of several it is the one that FFmpeg's own programs show, else the default one, else the largest.
    """
    videos = []
    for stream in container.streams.video:
        kinds = type(stream.disposition)  # cover pictures are streams too
        if not stream.disposition & (kinds.attached_pic | kinds.timed_thumbnails | kinds.still_image):
            videos.append(stream)
    # Some programs do not mark a cover, but their header states a stream of one picture.
    videos = [stream for stream in videos if stream.frames != 1] or videos
    best = container.streams.best("video")
    if best in videos:
        return best, len(videos) == 1

    def rank(stream: Any) -> tuple[bool, int, int]:
        size = stream.width * stream.height if stream.codec_context else 0
        return bool(stream.disposition & type(stream.disposition).default), size, -stream.index

    # FFmpeg's choice is a cover, so that a library left to itself would take it as well: never alone.
    return max(videos, key=rank, default=None), False


def stated_seconds(stream: Any, format: str) -> float | None:
    """Length of the pictures by the header, None if it does not state one; sound may be longer."""
    if format == "matroska":
        # Not the stream's own field, which Matroska lacks: a tag that most programs write.
        match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
        if not match:
            return None
        end = sum(float(part) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))
        return end - float((stream.start_time or 0) * stream.time_base)  # the tag counts from the file's zero
    if format == "asf" or stream.duration is None:  # asf has one length for all streams
        return None
    return float(stream.duration * stream.time_base)


def in_coding_order(stream: Any, format: str, times: Sequence[int]) -> bool:
    """Whether the times of display of a stream's first packets, ``times``, are those of decoding.

    AVI has no times of display, and ASF files get those of decoding from many programs. With B-frames the two differ,
    and the pictures must be numbered as they leave the decoder.
    """
    return format in ("avi", "asf") and bool(stream.codec_context.has_b_frames) and list(times) == sorted(times)


def size_change(first: tuple[int, int], other: tuple[int, int]) -> str:
    """How (width, height) changes within a file where that is more than another resolution of the same picture.

    Empty where ``other`` can be scaled to ``first``. A stretched picture is not what was recorded.
    """
    if abs(other[0] * first[1] / (other[1] * first[0]) - 1) <= _SAME_ASPECT:
        return ""
    return "the picture size changes from {}x{} to {}x{}".format(*first, *other)


def error_text(error: BaseException) -> str:
    """A library's error as one short line, without the C++ file and line that torchcodec and decord put first."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return re.sub(r"^.*\.(cpp|cc):\d+[,:]\s*", "", " ".join(text.split()))[:200]


# --------------------------------------------------------------------------------------------------
# The protocol
# --------------------------------------------------------------------------------------------------


class DecoderError(VideoError):
    """A failure of the library at a file that it does not call damaged: another decoder may read it."""


class Decoder(Protocol):
    """An open video file."""

    fps: float
    """Average frames per second."""
    duration: float
    """Seconds from the first frame to the end of the last."""
    is_scaled: bool = False
    """Whether pictures were brought to the size of the first ones that were read with them."""

    def read_at(self, seconds: np.ndarray) -> np.ndarray:
        """Frames on display at ``seconds`` float64 [n], clamped to the file's ends -> uint8 RGB [n, H, W, 3], upright.

        Raises :class:`VideoError` if they cannot be decoded.
        """

    def close(self) -> None:
        """Close the file."""


Opener = Callable[..., Decoder]
"""``opener(file, name="")`` opens a path or a seekable binary file; messages call it ``name`` (default: the path).

Raises :class:`VideoError`.
"""


# --------------------------------------------------------------------------------------------------
# PyAV
# --------------------------------------------------------------------------------------------------


class _Packet(NamedTuple):
    """A compressed picture with its time of display in ticks, None where the container has none."""

    pts: int | None
    is_key: bool
    data: Any


class PyavDecoder(Decoder):
    """PyAV: FFmpeg from a wheel. Decodes only what the wanted frames need, which makes it the fastest here.

    Packets are read first and decoded second, so that the wanted time stamps are fixed before any frame is decoded.
    FFmpeg can then leave out frames that no other frame refers to (most B-frames), the rest of a group of pictures
    after its last wanted frame, and whole groups without one. The frames that remain are the same, bit for bit.
    """

    def __init__(self, file: VideoFile, name: str = "") -> None:
        self._av = importlib.import_module("av")
        self._file, self._name = file, name or str(file)
        self._format = _require_video(file, self._name)
        try:
            # Cameras write titles and makers in all kinds of encodings.
            self._container = self._av.open(plain(file), format=self._format, metadata_errors="replace")
        except (self._av.FFmpegError, OSError) as error:
            raise _failure(file, self._name, error, opening=True) from error
        self._stream, _ = video_stream(self._container)
        if self._stream is None or self._stream.codec_context is None:
            sound, cover = bool(self._container.streams.audio), bool(self._container.streams.video)
            self._container.close()
            if self._stream is not None:
                raise DecoderError(f"{self._name}: PyAV's FFmpeg has no decoder for its codec")
            only = " and ".join(["sound"] * sound + ["a cover picture"] * cover)
            raise VideoError(f"{self._name}: has no picture" + (f", only {only}" if only else ""))
        self._codec = self._stream.codec_context
        # One thread: the loader's processes share the cores already.
        self._codec.thread_count = 1
        self._reformatter = importlib.import_module("av.video.reformatter").VideoReformatter()
        # Time stamps of the first frame shown and of the first packet; they differ where decoding runs ahead.
        self._start = self._first = self._stream.start_time or 0
        self._tick = float(self._stream.time_base)
        self._coding_order = False
        rate = self._stream.average_rate or self._stream.guessed_rate
        try:
            length = stated_seconds(self._stream, self._format)
            if length is not None and self._format in _INDEXED:
                self.duration = length
            else:
                rate = self._measure(rate)
        except (self._av.FFmpegError, OSError) as error:
            self.close()
            raise _failure(file, self._name, error, opening=True) from error
        if not rate or not self._codec.width:
            self.close()
            raise VideoError(f"{self._name}: not a video or damaged: no frame rate or picture size")
        self.fps = float(rate)

    def read_at(self, seconds: np.ndarray) -> np.ndarray:
        """See :class:`Decoder`."""
        # The small step up keeps a time that equals a time stamp from falling before it by rounding.
        ticks = np.floor(np.maximum(seconds, 0) / self._tick + 1e-3).astype(np.int64) + self._start
        try:
            packets = self._packets(int(ticks.min()), int(ticks.max()))
            shown = np.sort([packet.pts for packet in packets if packet.pts is not None])
            wanted = shown[np.maximum(np.searchsorted(shown, ticks, side="right") - 1, 0)].tolist()
            decode = self._decode_in_order if self._coding_order else self._decode
            frames = decode(packets, set(wanted))
        except (self._av.FFmpegError, OSError) as error:
            raise _failure(self._file, self._name, error) from error
        missing = [pts for pts in wanted if pts not in frames]
        if missing:
            # Shown before the key frame that decoding begins with, and there is no earlier one.
            if packets[0].pts is not None and missing[0] < packets[0].pts:
                raise VideoError(_NO_KEY_FRAME.format(self._name, (packets[0].pts - self._start) * self._tick))
            raise VideoError(f"{self._name}: damaged, no picture at {(missing[0] - self._start) * self._tick:.2f} s")
        pictures = [frames[pts] for pts in wanted]
        height, width = pictures[0].shape[:2]
        for row, (pts, picture) in enumerate(zip(wanted, pictures, strict=True)):
            if picture.shape == pictures[0].shape:
                continue
            # A recorder changed its resolution. Other proportions would be a stretched picture: not what was recorded.
            change = size_change((width, height), (picture.shape[1], picture.shape[0]))
            if change:
                raise VideoError(f"{self._name}: {change} at {(pts - self._start) * self._tick:.2f} s")
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            scaled = self._reformatter.reformat(frame, width=width, height=height, interpolation="BICUBIC", threads=1)
            pictures[row], self.is_scaled = scaled.to_ndarray(), True
        return np.stack(pictures)

    @property
    def frame_bytes(self) -> int:
        """Bytes of a decoded frame."""
        return int(self._codec.width * self._codec.height * 3)

    def read_all(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Every frame, uint8 [N, H, W, 3], its time from the first one's in ticks, int64 [N], and a tick's seconds.

        Raises :class:`VideoError` if one of them cannot be decoded.
        """
        try:
            packets = self._packets(self._start, np.iinfo(np.int64).max // 2)
        except (self._av.FFmpegError, OSError) as error:
            raise _failure(self._file, self._name, error) from error
        ticks = np.unique([packet.pts for packet in packets if packet.pts is not None]) - self._start
        ticks = ticks[ticks >= 0]
        return self.read_at(ticks * self._tick), ticks, self._tick

    def close(self) -> None:
        """See :class:`Decoder`."""
        self._container.close()

    def _measure(self, rate: Fraction | None) -> Fraction | float | None:
        """Measure where the pictures begin and end if the header does not state it; returns the frame rate."""
        packets = itertools.islice(packets_of(self._container, self._stream), HEAD_PACKETS)
        head = [packet for packet in packets if packet.pts is not None]
        if not head:
            raise VideoError(f"{self._name}: truncated or damaged, holds no pictures")
        times = [packet.pts for packet in head]
        shown = sorted(times)
        self._coding_order = in_coding_order(self._stream, self._format, times)
        # What is shown before a first key frame refers to pictures that were cut off, and players leave it out.
        self._start = times[0] if head[0].is_keyframe else shown[0]
        # Most containers are sought in by times of decoding, of which the first is before the first picture is shown.
        self._first = self._start if head[0].dts is None else min(self._start, head[0].dts)
        if self._coding_order:
            self._start = self._first
        if not rate and shown[-1] > shown[0]:
            rate = (len(shown) - 1) / ((shown[-1] - shown[0]) * self._tick)
        length, zero = (self._container.duration or 0) / 1e6, (self._container.start_time or 0) / 1e6
        end, other_end = self._ends(self._start + round(length / self._tick), float(1 / rate) if rate else 0.0)
        self.duration = max(0.0, end - self._start * self._tick)
        if self._format in FORMATS_WITH_LENGTH:
            # Where only the whole file has a length, sound may be longer than the pictures.
            stated, reached = stated_seconds(self._stream, self._format), self.duration
            if stated is None:
                stated, reached = length, max(end, other_end) - zero
            if reached < stated - MISSING_SECONDS:
                self.duration = stated
        return rate

    def _ends(self, target: int, frame_seconds: float) -> tuple[float, float]:
        """Where the pictures and all streams end, in seconds of their clock; packets are read from ``target`` on."""
        step = max(1, round(1 / self._tick))
        while True:
            begin = max(self._start, target - step)
            self._seek(begin)
            end, other_end, pictures = float("-inf"), float("-inf"), 0
            for packet in packets_of(self._container):
                is_picture = packet.stream_index == self._stream.index
                pts = packet.dts if is_picture and self._coding_order else packet.pts
                if pts is None or packet.stream.type not in ("video", "audio"):
                    continue
                stop = float((pts + (packet.duration or 0)) * packet.time_base)
                other_end = max(other_end, stop)
                if is_picture:
                    pictures += 1
                    end = max(end, stop + (0 if packet.duration else frame_seconds))
            # The last one to be shown may be decoded a few before the last one.
            if pictures >= _REORDER or begin <= self._start:
                return end, other_end
            step *= 2

    def _seek(self, target: int) -> None:
        # At the start to the very first packet: its time of decoding is before the first time of display.
        target = self._first if target <= self._start else target
        self._container.seek(target, stream=self._stream, backward=True)

    def _packets(self, first: int, last: int) -> list[_Packet]:
        """The packets, in the order of decoding, of all frames shown from ``first`` to ``last``."""
        target, step = first, max(1, round(1 / self._tick))
        if self._coding_order:
            last += round(_REORDER / self.fps / self._tick)
        while True:
            at_start = target <= self._start
            self._seek(target)
            packets, headless, complete = list[_Packet](), list[_Packet](), False
            pts: int | None = None
            for data in packets_of(self._container, self._stream):
                if not self._coding_order:
                    pts = data.pts
                elif data.dts is not None:
                    pts = data.dts
                elif pts is not None:  # after a seek some packets lack both times; they follow one frame later
                    pts += round(1 / self.fps / self._tick)
                # Decoding times ascend and are never after the time of display: nothing further can be shown in time.
                if data.dts is not None and data.dts > last and pts is not None and (packets or not at_start):
                    complete = True
                    break
                # Decoding begins at a key frame, which not every container's seek leads to.
                group = packets if packets or data.is_keyframe else headless
                group.append(_Packet(pts, data.is_keyframe, data))
                if group is packets and not at_start and (packets[0].pts is None or packets[0].pts > first):
                    break
            # It must be shown no later than the first wanted one. The seek goes by decoding times and may lead to a
            # later one, or to none.
            if packets and (at_start or (packets[0].pts is not None and packets[0].pts <= first)):
                if not complete:
                    # The header states a length; a copy that broke off has fewer packets.
                    final = next((packet for packet in reversed(packets) if packet.pts is not None), None)
                    ticks = final.pts + (final.data.duration or 0) - self._start if final is not None else 0
                    end, length = ticks * self._tick, self.duration
                    if end < length - MISSING_SECONDS:
                        raise VideoError(f"{self._name}: truncated, the pictures end at {end:.2f} s of {length:.2f} s")
                if headless and packets[0].pts is not None and first < packets[0].pts:
                    raise VideoError(_NO_KEY_FRAME.format(self._name, (packets[0].pts - self._start) * self._tick))
                return packets
            if at_start:
                # No key frame is marked: the decoder finds them itself.
                if not any(packet.pts is not None for packet in headless):
                    second = (first - self._start) * self._tick
                    raise VideoError(f"{self._name}: truncated, no pictures at {second:.2f} s")
                return headless
            earliest = min((packet.pts for packet in packets[:1] if packet.pts is not None), default=target)
            # Twice as far each time: an unlucky container costs a few seeks, not one a second.
            target, step = max(self._start, min(target, earliest) - step), 2 * step

    def _decode(self, packets: Sequence[_Packet], wanted: set[int]) -> dict[int, np.ndarray]:
        """The frames with the time stamps ``wanted``, as RGB."""
        frames: dict[int, np.ndarray] = {}
        codec, skipping = self._codec, None
        codec.flush_buffers()  # of an earlier call, which may have failed halfway
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
                # Later packets of the group are needed by no wanted frame: those that are still to come out of the
                # decoder have been fed already.
                if not left and not whole:
                    break
            if not whole:
                # Empties the decoder and makes it ready for a new start, as after a seek.
                frames |= {frame.pts: self._rgb(frame) for frame in codec.decode(None) if frame.pts in wanted}
                codec.flush_buffers()
        return frames

    def _decode_in_order(self, packets: Sequence[_Packet], wanted: set[int]) -> dict[int, np.ndarray]:
        """The same where time stamps follow the order of decoding.

        Pictures leave the decoder in the order of display, so each takes the smallest time stamp not taken yet.
        """
        frames: dict[int, np.ndarray] = {}
        waiting: list[int] = []
        self._codec.flush_buffers()
        for packet in [*packets, None]:
            # Pictures shown before the first key frame do not leave the decoder.
            if packet is not None and packet.pts is not None and packet.pts >= (packets[0].pts or 0):
                heapq.heappush(waiting, packet.pts)
            for frame in self._codec.decode(packet and packet.data):
                pts = heapq.heappop(waiting) if waiting else None
                if pts in wanted:
                    frames[pts] = self._rgb(frame)
        self._codec.flush_buffers()
        return frames

    def _rgb(self, frame: Any) -> np.ndarray:
        """A view of the converted picture [H, W, 3], upright; it keeps the picture alive."""
        # Without a copy: a picture of 1080p is 6 MB, and only a crop of it is used.
        plane = self._reformatter.reformat(frame, format="rgb24", threads=1).planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        picture = rows[:, : plane.width * 3].reshape(plane.height, plane.width, 3)
        # The other libraries turn a picture by the file's display matrix themselves.
        quarters = round(frame.rotation / 90)
        return np.rot90(picture, quarters) if quarters else picture


_NO_KEY_FRAME = "{}: begins between key frames; the first picture is at {:.2f} s"


def _needed_groups(packets: Sequence[_Packet], wanted: set[int]) -> list[tuple[Sequence[_Packet], bool]]:
    """Groups of pictures (key frame first) that wanted frames need, each with whether it is decoded to its end.

    A group is needed to its end where the next one has wanted frames that are shown before its key frame: in open
    groups of pictures those refer back.
    """
    starts = [0, *(i for i, packet in enumerate(packets) if packet.is_key and i)]
    groups = [packets[a:b] for a, b in zip(starts, [*starts[1:], len(packets)], strict=True)]
    needed: list[tuple[Sequence[_Packet], bool]] = []
    whole = False
    for group in reversed(groups):
        if whole or any(packet.pts in wanted for packet in group):
            needed.append((group, whole))
            key = group[0].pts
            whole = any(packet.pts in wanted and key is not None and packet.pts < key for packet in group)
    return needed[::-1]


# --------------------------------------------------------------------------------------------------
# The other libraries
# --------------------------------------------------------------------------------------------------


class TorchcodecDecoder(Decoder):
    """torchcodec: needs FFmpeg's shared libraries on the machine."""

    _device = "cpu"

    def __init__(self, file: VideoFile, name: str = "") -> None:
        decoders = importlib.import_module("torchcodec.decoders")
        self._file, self._name = file, name or str(file)
        index = _stream_index(file, self._name, "torchcodec")
        try:
            self._decoder = decoders.VideoDecoder(
                plain(file), stream_index=index, dimension_order="NHWC", num_ffmpeg_threads=1, device=self._device
            )
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise _failure(file, self._name, error, opening=True) from error
        meta = self._decoder.metadata
        if not meta.average_fps or not len(self._decoder):
            raise VideoError(f"{self._name}: not a video or damaged: no frame rate or no pictures")
        self.fps = float(meta.average_fps)
        # Its clock starts anywhere; ours at the first frame.
        self._begin, self._end = float(meta.begin_stream_seconds), float(meta.end_stream_seconds)
        self.duration = self._end - self._begin
        header = meta.duration_seconds_from_header
        if header is not None and self.duration < header - MISSING_SECONDS:
            raise VideoError(f"{self._name}: truncated, the pictures end at {self.duration:.2f} s of {header:.2f} s")

    def read_at(self, seconds: np.ndarray) -> np.ndarray:
        """See :class:`Decoder`."""
        # torchcodec refuses times outside of [begin, end), where the last frame is still wanted.
        times = np.clip(seconds + self._begin, self._begin, np.nextafter(self._end, 0))
        try:
            return self._decoder.get_frames_played_at(times.tolist()).data.cpu().numpy()
        except (RuntimeError, IndexError, ValueError) as error:
            raise _failure(self._file, self._name, error) from error

    def close(self) -> None:
        """See :class:`Decoder`."""
        del self._decoder


class CudaDecoder(TorchcodecDecoder):
    """NVDEC, the video decoder of an NVIDIA GPU, through torchcodec.

    The pictures come back to the CPU, where crops and resizing are the same as with other decoders. Colours differ from
    theirs in the last bits: NVDEC's pictures are converted by other code than FFmpeg's.
    """

    def __init__(self, file: VideoFile, name: str = "") -> None:
        # The GPU of this process: each thread has a current device of its own, which begins as the first.
        self._device = _gpu()
        super().__init__(file, name)
        # What NVDEC does not take, such as 4:4:4 or very small pictures, torchcodec decodes on the CPU.
        if (fallback := getattr(self._decoder, "cpu_fallback", None)) and "cuda" not in _LOGGED:
            _LOGGED.add("cuda")
            log.warning("%s: %s; such files are decoded on the CPU; this is logged once", self._name, fallback)


@functools.cache
def _gpu() -> str:
    """This process's GPU, as torch names it; first called in its main thread, by :func:`choose_decoder`."""
    return f"cuda:{importlib.import_module('torch').cuda.current_device()}"


def _why_no_nvdec() -> str | None:
    """Why videos cannot be decoded by the GPU, None if they can: a small one is."""
    if (reason := _cannot_import("torchcodec")) is not None:
        return f"torchcodec does not load ({reason})"
    if not importlib.import_module("torch").cuda.is_available():
        return "torch has no NVIDIA GPU here"
    if _cannot_import("av") is not None:  # nothing to try it with
        return None
    av, video = importlib.import_module("av"), io.BytesIO()
    with av.open(video, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        # Large enough for every generation of NVDEC.
        stream.width, stream.height, stream.pix_fmt = 256, 256, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((256, 256, 3), 128, np.uint8), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    try:
        decoders = importlib.import_module("torchcodec.decoders")
        decoder = decoders.VideoDecoder(video.getvalue(), device=_gpu())
        decoder[0]
    except Exception as error:  # a wheel without CUDA, a container without the driver's video library
        return f"torchcodec cannot use it: {error_text(error)}"
    fallback = getattr(decoder, "cpu_fallback", None)
    return str(fallback) if fallback else None


class DecordDecoder(Decoder):
    """decord: what this field used first; supported for machines that have it."""

    def __init__(self, file: VideoFile, name: str = "") -> None:
        decord = importlib.import_module("decord")
        self._file, self._name, self._error = file, name or str(file), decord.DECORDError
        if (index := _stream_index(file, self._name, "decord")) is not None:
            raise DecoderError(
                f"{self._name}: holds several videos, and decord cannot select stream {index}; set data.decoder=pyav"
            )
        try:
            self._reader = decord.VideoReader(plain(file), num_threads=1)
            self.fps = float(self._reader.get_avg_fps())
            self._starts = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0].astype(np.float64)
        except (self._error, RuntimeError, IndexError, OSError) as error:
            raise _failure(file, self._name, error, opening=True) from error
        if not len(self._starts):
            raise VideoError(f"{self._name}: holds no pictures")
        self._starts -= self._starts[0]  # times count from the first frame
        self.duration = float(self._starts[-1]) + 1 / self.fps

    def read_at(self, seconds: np.ndarray) -> np.ndarray:
        """See :class:`Decoder`."""
        # decord's time stamps are float32: a millisecond up keeps a frame's own time from falling before it.
        places = np.maximum(np.searchsorted(self._starts, seconds + 1e-3, side="right") - 1, 0)
        try:
            return self._reader.get_batch(places.tolist()).asnumpy()
        except (self._error, RuntimeError, IndexError) as error:
            raise _failure(self._file, self._name, error) from error

    def close(self) -> None:
        """See :class:`Decoder`."""
        del self._reader


def _require_video(file: VideoFile, name: str) -> str:
    format = container_format(file, name)
    if format is None:
        raise VideoError(f"{name}: not a video, or in a container that only tools/chunk_videos.py reads")
    return format


def _stream_index(file: VideoFile, name: str, library: str) -> int | None:
    """The index of the video's stream for ``library``, None where there is only one, so that all choose alike.

    Raises :class:`DecoderError` for containers in which torchcodec and decord return other pictures than the requested
    ones after most seeks, without an error; and :class:`VideoError` for a table of more pictures than the file has
    bytes: decord makes room for them all, and ends the whole process where it cannot.
    """
    format = _require_video(file, name)
    if format not in _SOUGHT_BY_ALL:
        raise DecoderError(
            f"{name}: {library} shows wrong pictures of {format} files; set data.decoder=pyav, or make chunks of them"
        )
    if _cannot_import("av") is not None:
        return None
    av = importlib.import_module("av")
    try:
        with av.open(plain(file), format=format, metadata_errors="replace") as container:
            stream, alone = video_stream(container)
            if stream is not None and stream.frames > container.size:
                raise VideoError(f"{name}: damaged, a table of {stream.frames:,} pictures in {container.size:,} bytes")
            return None if stream is None or alone else int(stream.index)
    except (av.FFmpegError, OSError):  # the library itself will report the error
        return None


def _failure(file: VideoFile, name: str, error: Exception, opening: bool = False) -> Exception:
    """The error to raise for what a library raised."""
    # The error of the file itself is more precise than a library's.
    if (failure := getattr(file, "failure", None)) is not None:
        return failure
    # What FFmpeg calls damaged is final: another library might show it with pictures missing.
    kind = VideoError if type(error).__name__ == "InvalidDataError" else DecoderError
    if not opening:
        return kind(f"{name}: cannot be decoded: {error_text(error)}")
    # Some libraries report only 'cannot open' for an MP4 whose handlers name sound but no picture. Its table
    # of contents is at one end of the file or the other.
    with file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file) as opened:
        opened.seek(0)
        ends = opened.read(_PEEK_BYTES)
        opened.seek(max(0, opened.seek(0, 2) - _PEEK_BYTES))
        ends += opened.read()
    if set(re.findall(rb"hdlr.{8}(vide|soun)", ends, re.DOTALL)) == {b"soun"}:
        return VideoError(f"{name}: has no picture, only sound")
    return kind(f"{name}: truncated or damaged video ({error_text(error)})")


# --------------------------------------------------------------------------------------------------
# Choosing and reusing
# --------------------------------------------------------------------------------------------------

# Fastest first, see docs/benchmarks.md: how it opens a file, the module it needs, and what installs that.
_DECODERS: dict[str, tuple[Opener, str, str]] = {
    "pyav": (PyavDecoder, "av", "pip install av"),
    "torchcodec": (
        TorchcodecDecoder,
        "torchcodec",
        "pip install torchcodec, and FFmpeg's shared libraries: apt-get install ffmpeg",
    ),
    "cuda": (
        CudaDecoder,
        "torchcodec",
        "a torchcodec of torch's CUDA version, and a driver with its video part (in containers "
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video); data.decoder=auto decodes on the CPU",
    ),
    "decord": (DecordDecoder, "decord", "pip install decord, which has wheels for Linux and Windows on x86-64 alone"),
}
# ``cuda`` is used where it is named: it takes memory and time of the GPU that trains.
_AUTO = ("pyav", "torchcodec", "decord")
# Fallback decoders that this process has warned of: once each, not once per clip.
_LOGGED: set[str] = set()


def choose_decoder(name: str = "auto") -> tuple[str, Opener]:
    """Choose the decoder called ``name``, or for ``auto`` the fastest that loads: (name, function that opens a file).

    With ``auto`` a file that the library fails at is read by the next one. Whatever a library raises becomes a
    :class:`VideoError`. Raises :class:`UserError` with the command that installs what is missing.
    """
    missing = []
    candidates = list(_AUTO) if name == "auto" else [name]
    for place, candidate in enumerate(candidates):
        if candidate not in _DECODERS:
            raise UserError(f"data.decoder is '{name}', but must be auto, {', '.join(_DECODERS)}")
        _, module, cure = _DECODERS[candidate]
        why = _why_no_nvdec() if candidate == "cuda" else _cannot_import(module)
        if why is None:
            return candidate, functools.partial(_FallbackDecoder, candidates[place:])
        missing.append(f"{candidate} does not load ({why}); cure: {cure}")
    raise UserError("data.decoder=" + name + ": " + "; ".join(missing))


@functools.cache
def _cannot_import(module: str) -> str | None:
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a library that fails to load raises many kinds
        return error_text(error)
    # torchcodec can be imported without FFmpeg, for the sake of its still pictures; it then knows no version.
    return "FFmpeg is not there" if getattr(loaded, "ffmpeg_major_version", 0) is None else None


class _FallbackDecoder(Decoder):
    """A video opened by the first of ``candidates`` that can read it; all that goes wrong is a :class:`VideoError`.

    Only a :class:`DecoderError` leads to the next candidate: what one library calls damaged another would show with
    pictures missing.
    """

    def __init__(self, candidates: Sequence[str], file: VideoFile, name: str = "") -> None:
        self._candidates, self._file, self._name = list(candidates), file, name or str(file)
        self._decoder: Decoder | None = None
        self.fps, self.duration = self._try(lambda decoder: (decoder.fps, decoder.duration))

    def read_at(self, seconds: np.ndarray) -> np.ndarray:
        frames: np.ndarray = self._try(lambda decoder: decoder.read_at(seconds))
        self.is_scaled = self._decoder is not None and self._decoder.is_scaled
        return frames

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()

    def _try(self, use: Callable[[Decoder], Any]) -> Any:
        # Where a library fails, the next candidate opens the file again and does the same.
        first: DecoderError | None = None
        while True:
            candidate = self._candidates[0]
            try:
                with one_clip(self._name, DecoderError):
                    if self._decoder is None:
                        self._decoder = _DECODERS[candidate][0](self._file, self._name)
                    result = use(self._decoder)
            except DecoderError as error:
                first = first or error
                self._candidates = [other for other in self._candidates[1:] if not _cannot_import(_DECODERS[other][1])]
                if not self._candidates:
                    # Report the failure of the best library, which is also the one to try again.
                    self._candidates = [candidate]
                    raise first from None
                self.close()
                self._decoder = None
                continue
            if first is not None and candidate not in _LOGGED:
                _LOGGED.add(candidate)
                log.warning("%s; %s reads it, as it will others like it without a further word", first, candidate)
            return result


class ReusingOpener:
    """Opens local videos through ``opener`` and keeps the last one open: the next clip is often in the same file.

    Opening costs as much as decoding ten small pictures, and more for a long video with its long table of contents.
    A file that changed, and one that could not be read, is opened anew.
    """

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self.idle: _ReusedDecoder | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ReusingOpener, (self._opener,)  # an open file stays in its process

    def __call__(self, file: VideoFile, name: str = "") -> Decoder:
        """See :data:`Opener`."""
        if not isinstance(file, Path):
            return self._opener(file, name)
        try:
            status = file.stat()
            version = (status.st_mtime_ns, status.st_size)
        except OSError:  # its opener will report that it is missing
            version = (0, 0)
        # The process too: two processes that share an open file would move each other's position in it.
        state = (os.getpid(), file, *version)
        last, self.idle = self.idle, None
        if last is not None and last.state == state:
            return last
        if last is not None:
            last.decoder.close()
        return _ReusedDecoder(self, state, self._opener(file, name))


class _ReusedDecoder(Decoder):
    """A decoder that :meth:`close` gives back to its opener, unless it failed."""

    def __init__(self, owner: ReusingOpener, state: tuple[Any, ...], decoder: Decoder) -> None:
        self._owner, self.state, self.decoder = owner, state, decoder
        self.fps, self.duration = decoder.fps, decoder.duration
        self._failed = False

    def read_at(self, seconds: np.ndarray) -> np.ndarray:
        # A decoder in an unknown state is never used again, whatever it raised.
        self._failed = True
        frames = self.decoder.read_at(seconds)
        self._failed, self.is_scaled = False, self.decoder.is_scaled
        return frames

    def close(self) -> None:
        replaced = self if self._failed else self._owner.idle
        if replaced is not None:
            replaced.decoder.close()
        if not self._failed:
            self._owner.idle = self


class CachingOpener:
    """Decodes each local video once, into plain frames in ``folder``, and reads the frames of all clips from there.

    For small videos that are read for many epochs: a frame takes height x width x 3 bytes. The frames are PyAV's, bit
    for bit. Remote files, videos of more than :data:`MAX_CACHED_BYTES` and whatever cannot be decoded as a whole are
    left to ``opener``. A video is identified by path, size and time of change: a changed one is decoded anew.
    """

    def __init__(self, folder: str | Path, opener: Opener) -> None:
        self._folder, self._opener = Path(folder), opener
        # Videos that cannot be cached: finding that out decodes all of a video, which must not happen for every clip.
        self._left_out = set[str]()
        self._is_writable = True

    def __call__(self, file: VideoFile, name: str = "") -> Decoder:
        """See :data:`Opener`."""
        if not isinstance(file, Path) or not file.is_file():
            return self._opener(file, name)
        status = file.stat()
        key = content_hash(os.path.abspath(file), str(status.st_size), str(status.st_mtime_ns), length=32)
        folder = self._folder / key[:2] / key
        with contextlib.suppress(*_UNUSABLE):
            return _CachedDecoder(folder)
        if self._is_writable and key not in self._left_out:
            self._decode(file, name, folder)
            # From the cache the first time, too: other libraries than PyAV differ from it in a few files.
            with contextlib.suppress(*_UNUSABLE):
                return _CachedDecoder(folder)
            self._left_out.add(key)
        return self._opener(file, name)

    def _decode(self, file: Path, name: str, folder: Path) -> None:
        """Write the frames of a video into ``folder``, unless it is too large, damaged, or there is no space."""
        # A disk that ran full leaves files without content, and a folder can only take the place of none.
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with one_clip(name or str(file)), contextlib.closing(PyavDecoder(file, name)) as whole:
                if whole.duration * whole.fps * whole.frame_bytes > MAX_CACHED_BYTES:
                    return
                frames, ticks, tick = whole.read_all()
        except VideoError as error:
            # Clips elsewhere in the video may be whole; those that are not are reported as without a cache.
            log.debug("data.frame_cache: %s", error)
            return
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder) as temporary:
                temporary.mkdir()
                np.save(temporary / "frames.npy", frames)
                np.savez(temporary / "times.npz", ticks=ticks, tick=tick, fps=whole.fps, duration=whole.duration)
        except OSError as error:
            if folder.is_dir():
                return  # another process was faster
            self._is_writable = False
            if str(self._folder) not in _LOGGED:
                _LOGGED.add(str(self._folder))
                message = "data.frame_cache=%s: cannot be written (%s); videos that it lacks are decoded for every clip"
                log.warning(message, self._folder, error_text(error))


# What opening a damaged entry of the cache raises, or none.
_UNUSABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)


class _CachedDecoder(Decoder):
    """The frames that a :class:`CachingOpener` left in ``folder``; only those that are read come from the disk."""

    def __init__(self, folder: Path) -> None:
        self._frames = np.load(folder / "frames.npy", mmap_mode="r")
        with np.load(folder / "times.npz") as times:
            self._ticks, self._tick = times["ticks"], float(times["tick"])
            self.fps, self.duration = float(times["fps"]), float(times["duration"])
        if len(self._ticks) != len(self._frames):
            raise ValueError("not as many times as frames")

    def read_at(self, seconds: np.ndarray) -> np.ndarray:
        # The same rounding as in PyavDecoder.read_at.
        ticks = np.floor(np.maximum(seconds, 0) / self._tick + 1e-3)
        frames: np.ndarray = self._frames[np.maximum(np.searchsorted(self._ticks, ticks, side="right") - 1, 0)]
        return frames

    def close(self) -> None:
        pass  # the file is closed with the last reference to it
