"""Cut camera files into chunks of equal length that are cheap to read clips from.

Chunk k holds the frames on display in [k * seconds, (k + 1) * seconds), counted from the first frame, each at its own
time. A frame on display when a chunk begins opens that chunk, so a moment shows the same picture in the chunks as in
the source whatever the frame rate. Rotation is applied, pixels are made square, sound is left out.

A folder of camera files becomes a folder of chunks, over several processes:

    out/<video id>/<0000>.mp4            a video's folder appears under its name only when it is complete
    out/.chunk_videos/settings.json      how the chunks were made; other settings are refused
    out/.chunk_videos/done.jsonl         a line for each video: its source's size, what was made of it
    out/.chunk_videos/parts/             videos in progress, removed at the end

With ``tar`` the chunks are members of a few large files instead, for storage that is slow at millions of small ones:

    out/shard-00000.tar, ...             chunks of complete videos, under the same names
    out/shards.parquet                   where each chunk is (egohod.data.storage.ShardIndex): the root to train from
    out/.chunk_videos/done.jsonl         beside the above, the place of every chunk, from which a run resumes

A video id is the file's path below the input folder without its ending. Long videos are cut in several ranges at once,
so that one of them keeps all processes busy.
"""

from __future__ import annotations

import contextlib
import fnmatch
import heapq
import importlib
import io
import json
import logging
import math
import os
import shutil
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from egohod.data.decoders import (
    FORMATS_WITH_LENGTH,
    HEAD_PACKETS,
    MISSING_SECONDS,
    VIDEO_ENDINGS,
    container_format,
    error_text,
    in_coding_order,
    packets_of,
    plain,
    size_change,
    stated_seconds,
    video_stream,
)
from egohod.data.formats.base import read_lines
from egohod.data.storage import SHARD_INDEX, ShardIndex, TarMember, VideoError, one_clip, open_folder
from egohod.errors import UserError
from egohod.runtime import Lost, Progress, Workers, locked, worker_context, write_text

log = logging.getLogger(__name__)

# Times are integers in this unit, of which a frame of every common rate, 30000/1001 too, lasts a whole number.
TICKS = 240_000
# A frame this close to a chunk's border is moved onto it: some containers round times to milliseconds.
_SNAP = TICKS // 1000
# A pause between frames beyond this, or a step back beyond a second, is damage and not a recording.
_LONGEST_FRAME = 600 * TICKS
_LARGEST_STEP_BACK = TICKS
# What else FFmpeg may take a file for that is no container of ``decoders``: bare streams and old containers, none of
# which leads to other files as playlists do.
_OTHER_FORMATS = "h264,hevc,m4v,mpegvideo,vc1,obu,ivf,ogg,mxf,dv,rm,nut,gxf"
# Recordings of Aria glasses, which only this module reads.
VRS_ENDING = ".vrs"
LAYOUTS = ("chunks", "avion")
CODECS = ("libx264", "libx265")
_RGB, _UNSPECIFIED = 0, 2  # matrix coefficients, ITU-T H.273

_OWN_FOLDER = ".chunk_videos"
# Work is handed out in ranges of about this length: short enough to share out, long enough that seeking is free.
_RANGE_SECONDS = 300.0
_SAMPLES, _SAMPLE_SECONDS = 6, 4.0
# A shard that has reached this size gets no further video.
_SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class ChunkSettings:
    """How chunks are cut, encoded and stored. Raises :class:`UserError` for values out of range.

    ``fps`` None keeps the source's timing; ``fastdecode`` leaves out what costs time at decoding (CABAC, deblocking,
    weighted prediction); ``tar`` packs the chunks into shards. The reasons for the defaults are in docs/data.md.
    """

    seconds: float = 15.0
    short_side: int = 288
    keyint: int = 16
    fps: float | None = None
    crf: float = 23.0
    preset: str = "veryfast"
    codec: str = "libx264"
    fastdecode: bool = True
    layout: str = "chunks"
    tar: bool = False

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("seconds", 0.5 <= self.seconds <= 3600, "from 0.5 to 3600"),
            ("short_side", 16 <= self.short_side <= 8192 and self.short_side % 2 == 0, "even, from 16 to 8192"),
            ("keyint", 1 <= self.keyint <= 10_000, "from 1 to 10000"),
            ("fps", self.fps is None or 0.1 <= self.fps <= 240, "from 0.1 to 240"),
            ("crf", 0 <= self.crf <= 51, "from 0 to 51"),
            ("codec", self.codec in CODECS, " or ".join(CODECS)),
            ("layout", self.layout in LAYOUTS, " or ".join(LAYOUTS)),
        ):
            if not good:
                raise UserError(f"--{name} is {getattr(self, name)}, but must be {rule}")
        if self.layout == "avion" and self.seconds != int(self.seconds):
            raise UserError(f"--seconds is {self.seconds:g}, but the avion layout names chunks by whole seconds")

    def name(self, number: int) -> str:
        """File name of chunk ``number``."""
        return f"{number:04d}.mp4" if self.layout == "chunks" else f"{round(number * self.seconds)}.mp4"

    def encoder_options(self) -> dict[str, str]:
        """FFmpeg's options: closed groups of pictures, and B-frames that no other frame refers to.

        A decoder that knows the wanted frames then leaves two of three out; measured in docs/data.md.
        """
        private = {"scenecut": "0", "open-gop": "0", "ref": "1", "b-adapt": "0"}
        if self.codec == "libx264":
            # force-cfr: the stream states the frame rate, not our unit of time; FFmpeg before 6 derives lengths from
            # it. cpu-independent: the same bytes on every machine; x264's AVX-512 code differs even from run to run.
            private |= {"b-pyramid": "none", "force-cfr": "1", "cpu-independent": "1"}
        else:
            private |= {"b-pyramid": "0", "log-level": "none"}
        return ({"tune": "fastdecode"} if self.fastdecode else {}) | {
            "preset": self.preset,
            "crf": f"{self.crf:g}",
            "g": str(self.keyint),
            "bf": "2",
            "threads": "1",  # there is a process for every core already
            self.codec.removeprefix("lib") + "-params": ":".join(f"{k}={v}" for k, v in private.items()),
        }


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """The header of a video file; ``seconds`` is 0 if it states no length. Sizes are as stored."""

    seconds: float
    bytes: int
    codec: str
    width: int
    height: int
    fps: float


class DisplayedFrame(NamedTuple):
    """A picture and its time on display, in ticks from the first frame."""

    picture: Any
    begin: int
    end: int


class VideoReader:
    """An open camera file, decoded sequentially; ``first`` is its first picture, and ``aspect`` its pixels' width by
    height, once :meth:`frames` yielded one.

    Raises :class:`VideoError`, naming the file and the reason, for one that is no video.
    """

    def __init__(self, path: Path | TarMember) -> None:
        self._path = path
        self._file = path if isinstance(path, Path) else path.open()
        self.first: Any = None
        self._open()
        self._coding_order = False
        # Only these two may lack times of display; the file is opened again to begin at its first packet.
        if self._format in ("avi", "asf"):
            head = (p.pts for p in packets_of(self._container, self._stream) if p.pts is not None)
            self._coding_order = in_coding_order(self._stream, self._format, list(islice(head, HEAD_PACKETS)))
            self._container.close()
            self._open()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _open(self) -> None:
        format = container_format(self._file, str(self._path))
        # Bare streams have no magic; a list of formats keeps FFmpeg from taking the file for a playlist.
        options = {} if format else {"format_whitelist": _OTHER_FORMATS}
        try:
            # Cameras write titles and makers in all kinds of encodings.
            self._container = av.open(plain(self._file), format=format, metadata_errors="replace", options=options)
        except (av.InvalidDataError, av.ArgumentError) as error:  # the latter for a format that is not taken
            raise VideoError(f"{self._path}: not a video, or a truncated one ({error_text(error)})") from error
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{self._path}: cannot be opened: {error_text(error)}") from error
        self._format = format or self._container.format.name
        self._stream, _ = video_stream(self._container)
        if self._stream is None or not self._stream.codec_context or not self._stream.width:
            self._container.close()
            raise VideoError(f"{self._path}: has no picture")
        # One thread: there is a process for every core already.
        self._stream.codec_context.thread_count = 1
        # Exact rational arithmetic: floats would move frames across borders in long files.
        self._tick = self._stream.time_base * TICKS
        self.rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 30)
        self._other_end = 0.0

    def probe(self) -> Probe:
        """Read the header."""
        stream = self._stream
        return Probe(
            seconds=stated_seconds(stream, self._format) or (self._container.duration or 0) / av.time_base,
            bytes=_bytes_of(self._path),
            codec=stream.codec_context.name,
            width=stream.width,
            height=stream.height,
            fps=float(self.rate),
        )

    def frames(self, start: int = 0) -> Iterator[DisplayedFrame]:
        """Decode the frames on display from ``start`` (ticks) on. Raises :class:`VideoError` for a damaged file."""
        try:
            yield from self._frames(start)
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{self._path}: truncated or damaged, cannot be decoded: {error_text(error)}") from error

    def _frames(self, start: int) -> Iterator[DisplayedFrame]:
        pictures = self._pictures(packets_of(self._container))
        first = next(pictures, None)
        if first is None:
            raise VideoError(f"{self._path}: truncated or damaged, holds no picture")
        # Width by height of a stored pixel; a file that does not state it has square ones.
        self.first, self.aspect = first, Fraction(self._stream.sample_aspect_ratio or 1)
        origin = self._origin(first, start)
        later = self._from_key_frame(origin, start) if start else None
        if later is not None:
            pictures = later
        elif start:  # no seek leads there: decode from the beginning
            self._container.close()
            self._open()
            pictures = self._pictures(packets_of(self._container))
        else:
            pictures = chain([first], pictures)

        def length(picture: Any) -> int:  # on display, of a picture without a successor
            return max(1, round((picture.duration or 0) * self._tick) or round(TICKS / self.rate))

        # Each picture is on display until the next one's time, so it is yielded one picture late.
        held, begin = None, 0
        for picture in pictures:
            if picture.pts is not None:
                time = round((picture.pts - origin) * self._tick) if picture.pts != first.pts else 0
            else:  # a bare stream
                time = begin + length(held) if held is not None else 0
            if held is not None:
                if time - begin > _LONGEST_FRAME or begin - time > _LARGEST_STEP_BACK:
                    jump = f"from {begin / TICKS:.2f} to {time / TICKS:.2f} s"
                    raise VideoError(f"{self._path}: damaged, its time stamps jump {jump}")
                if time <= begin:
                    continue  # never on display: two frames of one time, or a small step back
                if time > start:
                    yield DisplayedFrame(held, begin, time)
            held, begin = picture, time
        end = begin + length(held) if held is not None else 0
        # The header of some formats states a length; a copy that broke off ends before it.
        if self._format in FORMATS_WITH_LENGTH:
            reached, stated = max(end, 0) / TICKS, stated_seconds(self._stream, self._format)
            if stated is None:
                # Only the whole file's length is known, and sound may be longer.
                stated, reached = (self._container.duration or 0) / av.time_base, max(reached, self._other_end)
            if reached < stated - MISSING_SECONDS:
                raise VideoError(f"{self._path}: truncated, the pictures end at {reached:.2f} s of {stated:.2f} s")
        if end > start:
            yield DisplayedFrame(held, begin, end)

    def _pictures(self, packets: Iterable[Any]) -> Iterator[Any]:
        """Decoded frames in the order of display."""
        codec, start = self._stream.codec_context, (self._container.start_time or 0) / av.time_base
        self._before, waiting = list[Any](), list[int]()
        began = False
        for packet in chain(packets, [None]):
            if packet is not None:
                if packet.pts is not None:
                    # Of all streams: while sound continues, the pictures were not cut off.
                    self._other_end = max(self._other_end, float(packet.pts * packet.time_base) - start)
                if packet.stream_index != self._stream.index:
                    continue
                if not began:
                    self._before.append(packet)
                if self._coding_order and packet.dts is not None:
                    heapq.heappush(waiting, packet.dts)
            for picture in codec.decode(packet):
                began = True
                if waiting:  # pictures leave the decoder as they are shown, whatever the order of their time stamps
                    picture.pts = heapq.heappop(waiting)
                yield picture

    def _origin(self, first: Any, start: int) -> int:
        """The time stamp of second 0, for a file whose first decoded picture is ``first``."""
        shown = [packet.pts for packet in self._before if packet.pts is not None]
        if not shown or first.pts is None or self._before[0].is_keyframe or first.pts <= min(shown):
            return first.pts or 0
        # Times are those of the file, so the pictures that were lost before the first key frame keep their place.
        if not start:
            seconds = (first.pts - min(shown)) * float(self._stream.time_base)
            log.warning("%s: begins between key frames; the first picture is at %.2f s", self._path, seconds)
        return min(shown)

    def _from_key_frame(self, origin: int, start: int) -> Iterator[Any] | None:
        """Frames from a key frame on that is shown no later than ``start``; None if no seek leads to one."""
        if self._coding_order:  # after a seek time stamps may be missing
            return None
        wanted, back = origin + math.floor(start / self._tick), 0
        second = math.ceil(1 / self._stream.time_base)
        while wanted - back > origin:
            try:
                self._container.seek(wanted - back, stream=self._stream, backward=True)
                packets = packets_of(self._container)
                # Not every container's seek leads to a key frame.
                pictures = (packet for packet in packets if packet.stream_index == self._stream.index)
                head = next((p for p in pictures if p.is_keyframe or p.pts is None), None)
            except av.FFmpegError:
                return None
            if head is not None and head.pts is None:
                return None
            # A seek goes by decoding times and may lead to a later key frame, or to none.
            if head is not None and head.is_keyframe and head.pts <= wanted:
                return self._pictures(chain([head], packets))
            back = 2 * back or second
        return None


def _bytes_of(path: Path | TarMember) -> int:
    return path.stat().st_size if isinstance(path, Path) else path.size


class VrsReader:
    """The colour camera of a recording of Aria glasses, in the way of :class:`VideoReader`.

    Second 0 is its first picture. Raises :class:`VideoError` for another file, and :class:`UserError` without
    projectaria_tools.
    """

    def __init__(self, path: Path) -> None:
        try:
            library = importlib.import_module("projectaria_tools.core.data_provider")
            device = importlib.import_module("projectaria_tools.core.calibration").DeviceVersion
            domain = importlib.import_module("projectaria_tools.core.sensor_data").TimeDomain.DEVICE_TIME
        except ImportError as error:
            cure = "pip install projectaria_tools"
            raise UserError(f"{path}: recordings of Aria glasses need projectaria_tools: {cure}") from error
        self._path, self._provider = path, library.create_vrs_data_provider(str(path))
        if self._provider is None:  # of which it logs the reason
            raise VideoError(f"{path}: not a recording of Aria glasses, or a damaged one")
        self._stream = self._provider.get_stream_id_from_label("camera-rgb")
        # Of newer glasses the library names streams that are not in the file, too.
        if self._stream is None or self._stream not in self._provider.get_all_streams():
            raise VideoError(f"{path}: has no pictures of camera-rgb")
        stamps = self._provider.get_timestamps_ns(self._stream, domain)
        times, self._numbers = np.unique(np.asarray(stamps, dtype=np.int64), return_index=True)
        if not len(times):
            raise VideoError(f"{path}: has no pictures of camera-rgb")
        rate = float(self._provider.get_nominal_rate_hz(self._stream))
        rate = rate if 0.1 <= rate <= 1000 else 1e9 / float(np.median(np.diff(times))) if len(times) > 1 else 10.0
        self.rate, self.aspect = Fraction(rate).limit_denominator(1000), Fraction(1)
        self._begins = np.append(np.round((times - times[0]) * (TICKS / 1e9)).astype(np.int64), 0)
        self._begins[-1] = self._begins[-2] + max(1, round(TICKS / self.rate))  # the end of the last picture
        if (jump := int(np.diff(self._begins).max())) > _LONGEST_FRAME:
            raise VideoError(f"{path}: damaged, its time stamps jump by {jump / TICKS:.2f} s")
        # The sensor of the first glasses is mounted on its side; a recording without a calibration does not state its
        # version, and the library takes it for theirs.
        self._turns = 0 if self._provider.get_device_version() == device.Gen2 else -1
        self.first = self._picture(0)

    def __enter__(self) -> VrsReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # the library closes the file with its last reference

    def _picture(self, place: int) -> Any:
        data, _ = self._provider.get_image_data_by_index(self._stream, int(self._numbers[place]))
        pixels = np.ascontiguousarray(np.rot90(data.to_numpy_array(), self._turns))
        return av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.ndim == 3 else "gray")

    def probe(self) -> Probe:
        """See :class:`VideoReader`."""
        seconds, size = self._begins[-1] / TICKS, self._path.stat().st_size
        return Probe(float(seconds), size, "vrs", self.first.width, self.first.height, float(self.rate))

    def frames(self, start: int = 0) -> Iterator[DisplayedFrame]:
        """See :class:`VideoReader`."""
        for place in range(max(0, int(np.searchsorted(self._begins, start, side="right")) - 1), len(self._numbers)):
            yield DisplayedFrame(self._picture(place), int(self._begins[place]), int(self._begins[place + 1]))


def open_reader(path: Path | TarMember) -> VideoReader | VrsReader:
    """Open a camera file. Raises :class:`VideoError`."""
    if isinstance(path, Path) and path.suffix.lower() == VRS_ENDING:
        return VrsReader(path)
    return VideoReader(path)


def probe(path: Path | TarMember) -> Probe:
    """Read a file's header. Raises :class:`VideoError` for a file that is no video."""
    with one_clip(str(path)), open_reader(path) as reader:
        return reader.probe()


def at_rate(frames: Iterable[DisplayedFrame], fps: float, start: int = 0) -> Iterator[DisplayedFrame]:
    """Resample to the constant rate ``fps``: at each moment the frame on display, repeated or left out as needed.

    ``start`` (ticks) is where ``frames`` begin; moments are multiples of 1 / fps of the whole video whatever it is.
    """
    step = TICKS / _fraction(fps)
    number = start // step  # moments are counted from the start of the video, so that ranges fit together
    held: DisplayedFrame | None = None
    end = 0
    for picture, _, end in frames:
        while (begin := round(number * step)) < end - _SNAP:
            number += 1
            if held is not None:
                yield held
            held = DisplayedFrame(picture, begin, round(number * step))
    if held is not None:
        yield held._replace(end=max(held.begin + 1, min(held.end, end)))


def _fraction(fps: float) -> Fraction:
    # 29.97 means 30000/1001: otherwise frames would drift by a second in ten hours.
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    return ntsc if abs(fps - ntsc) < 0.005 and fps != round(fps) else Fraction(fps).limit_denominator(1000)


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


def chunk_size(width: int, height: int, aspect: Fraction, short_side: int) -> tuple[int, int]:
    """Width and height of the chunks of an upright picture whose pixels are ``aspect`` times as wide as high.

    Even numbers; the short side becomes ``short_side``, or stays if it is shorter.
    """
    # Square pixels make one side longer; making the other one shorter instead would lose detail.
    square = (width * aspect, Fraction(height)) if aspect >= 1 else (Fraction(width), height / aspect)
    scale = min(Fraction(1), short_side / min(square))
    sides = [max(2, min(2 * round(side * scale / 2), 2 * math.floor(side / 2))) for side in square]
    return sides[0], sides[1]


class _Scaler:
    """Converts frames to upright ones of the chunks' size, 8 bit 4:2:0, limited range; set up by the first frame."""

    def __init__(self, first: Any, aspect: Fraction, short_side: int) -> None:
        # How stored pixels become upright, by the display matrix (ISO 14496-12, 8.3.2) rounded to quarter turns.
        # PyAV's ``rotation`` knows no mirrored pictures, which front cameras record.
        matrix = first.side_data.get("DISPLAYMATRIX")
        a, b, _, c, d = (1, 0, 0, 0, 1) if matrix is None else np.frombuffer(bytes(matrix), "<i4")[:5].tolist()
        self._transpose = abs(b) + abs(c) > abs(a) + abs(d)
        self._mirror_x, self._mirror_y = (c < 0, b < 0) if self._transpose else (a < 0, d < 0)
        self.source_size = first.width, first.height
        width, height = self.source_size[::-1] if self._transpose else self.source_size
        self.size = chunk_size(width, height, 1 / aspect if self._transpose else aspect, short_side)
        self._reformatter = VideoReformatter()

    def __call__(self, picture: Any) -> Any:
        width, height = self.size[::-1] if self._transpose else self.size
        # Bicubic: as sharp as the crops that follow it in the loader, and swscale widens it when it makes smaller, so
        # it does not alias. Area would blur; Lanczos costs half as much again and rings.
        filtering: dict[str, Any] = {"interpolation": "BICUBIC", "dst_color_range": "MPEG", "threads": 1}
        small = self._reformatter.reformat(picture, width=width, height=height, format="yuv420p", **filtering)
        if not (self._transpose or self._mirror_x or self._mirror_y):
            return small
        # Turned after scaling, when there are fewer pixels, plane by plane (the chroma planes have half the sides).
        pixels = small.to_ndarray()
        chroma = pixels[height:].reshape(2, height // 2, width // 2)
        turned = []
        for plane in (pixels[:height], *chroma):
            plane = plane.T if self._transpose else plane
            plane = plane[:, ::-1] if self._mirror_x else plane
            turned.append((plane[::-1] if self._mirror_y else plane).reshape(-1))
        rows = np.concatenate(turned).reshape(self.size[1] * 3 // 2, self.size[0])
        return av.VideoFrame.from_ndarray(rows, format="yuv420p")


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


class _Encoder:
    """One chunk, encoded in memory: the file is written in one go, and an error of the disk is an OSError."""

    def __init__(self, size: tuple[int, int], rate: Fraction, colours: tuple[int, int, int], settings: ChunkSettings):
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4")
        self._stream = self._container.add_stream(settings.codec, rate=rate, options=settings.encoder_options())
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"
        codec = self._stream.codec_context
        codec.time_base = Fraction(1, TICKS)
        # Players take unmarked HD video for another matrix than unmarked SD video: the source's marks are passed on.
        codec.color_primaries, codec.color_trc, codec.colorspace = colours
        codec.color_range = 1  # MPEG: 16 to 235
        if settings.codec == "libx265":
            codec.codec_tag = "hvc1"  # the tag that all players take
        self._lengths: dict[int, int] = {}
        self._pictures = 0

    def add(self, picture: Any, begin: int = 0, length: int = 0) -> None:
        """Append a picture, on display from ``begin`` for ``length`` ticks of the chunk; None ends the chunk."""
        if picture is not None:
            picture.pts, picture.time_base, picture.duration = begin, Fraction(1, TICKS), length
            picture.pict_type = 0  # key frames where they are due, not where the source had some
            self._lengths[begin] = length
            self._pictures += 1
        for packet in self._stream.encode(picture):
            # The encoder knows the average rate only; each frame's own time on display is put back here.
            packet.duration = self._lengths.pop(packet.pts)
            if self._pictures == 1:
                packet.dts = packet.pts  # x265 forgets it
            self._container.mux(packet)

    def save(self, path: Path | None) -> int:
        """Finish the file and write it to ``path``, if any; returns its bytes. Raises :class:`UserError`."""
        self.add(None)
        self._container.close()
        content = self._buffer.getvalue()
        try:
            if path is not None:
                path.write_bytes(content)
        except OSError as error:
            reason = f"{error.strerror or error}; complete videos are kept, rerun to resume after fixing this"
            raise UserError(f"cannot write {path}: {reason}") from error
        return len(content)


def try_encoder(settings: ChunkSettings) -> None:
    """Encode one black picture. Raises :class:`UserError` if the encoder refuses the settings."""
    try:
        encoder = _Encoder((64, 64), Fraction(30), (_UNSPECIFIED,) * 3, settings)
        encoder.add(av.VideoFrame(64, 64, "yuv420p"), 0, TICKS // 30)
        encoder.save(None)
    except (av.FFmpegError, ValueError) as error:
        refused = f"{settings.codec} cannot be used with preset '{settings.preset}' and these settings"
        raise UserError(f"{refused}: {error_text(error)}") from error


class Written(NamedTuple):
    """Seconds of video, chunks and bytes that were written."""

    seconds: float
    chunks: int
    bytes: int


def write_chunks(
    path: Path | TarMember,
    folder: Path,
    settings: ChunkSettings,
    first: int = 0,
    last: int | None = None,
    on_frame: Callable[[float], None] | None = None,
) -> Written:
    """Write chunks ``first`` up to, not including, ``last`` (None: to the end) of the file at ``path`` to ``folder``.

    The same bytes result whether a video is cut as a whole or in several ranges. ``on_frame`` is called with the
    seconds of each frame that is encoded.

    Raises:
        VideoError: the source is damaged; files written so far are left to the caller.
        UserError: a chunk cannot be written.
    """
    length = round(settings.seconds * TICKS)  # of a chunk
    begin, stop = first * length, math.inf if last is None else last * length
    done, chunks, size, number = 0, 0, 0, first
    scaler, encoder = None, None
    with one_clip(str(path)), open_reader(path) as reader:
        rate = _fraction(settings.fps) if settings.fps else reader.rate
        if settings.fps is None:
            frames = reader.frames(begin)
        else:
            # From the last moment of that rate at or before the range: its frame may be on display as the range begins.
            step = TICKS / rate
            begin = round(begin // step * step)
            frames = at_rate(reader.frames(begin), settings.fps, begin)
        for picture, *span in frames:
            if scaler is None:
                # Of the whole file, so that ranges of a file that changes its resolution fit together.
                scaler = _Scaler(reader.first, reader.aspect, settings.short_side)
                matrix = _UNSPECIFIED if picture.colorspace == _RGB else int(picture.colorspace)
                colours = (int(picture.color_primaries), int(picture.color_trc), matrix)
            borders = [round(time / length) * length for time in span]
            begin, end = (at if abs(time - at) <= _SNAP else time for time, at in zip(span, borders, strict=True))
            begin = max(begin, first * length)
            if begin >= stop:
                break
            change = size_change(scaler.source_size, (picture.width, picture.height))
            if change:
                raise VideoError(f"{path}: {change} at {begin / TICKS:.2f} s")
            small = scaler(picture) if end > begin else None
            end = int(min(end, stop))
            # A frame that is on display across a border ends one chunk and opens the next.
            while begin < end:
                if encoder is None or begin // length != number:
                    if encoder is not None:
                        size += encoder.save(folder / settings.name(number))
                        chunks += 1
                    number = begin // length
                    encoder = _Encoder(scaler.size, rate, colours, settings)
                until = min(end, (number + 1) * length)
                encoder.add(small, begin - number * length, until - begin)
                done += until - begin
                if on_frame:
                    on_frame((until - begin) / TICKS)
                begin = until
        if encoder is None or (last is not None and done < stop - first * length):
            raise VideoError(f"{path}: truncated, its pictures end at {first * settings.seconds + done / TICKS:.2f} s")
        size += encoder.save(folder / settings.name(number))
    return Written(done / TICKS, chunks + 1, size)


# --------------------------------------------------------------------------------------------------
# Input folder
# --------------------------------------------------------------------------------------------------


class Video(NamedTuple):
    """A camera file and the id of its chunks."""

    video_id: str
    path: Path | TarMember


def find_videos(
    root: Path, pattern: str | None = None, names: Path | None = None, follow_links: bool = False
) -> list[Video]:
    """List the videos below ``root``, in order of their ids; hidden files are left out.

    Of tar shards on a disk ``root`` is their index (:class:`~egohod.data.storage.ShardIndex`).
    ``pattern`` (shell style, for the path below ``root``) replaces the usual video endings; ``names``, a text file with
    a path below ``root`` on each line, replaces the search. Links that lead out of ``root`` are left out with a
    warning unless ``follow_links``.

    Raises :class:`UserError` for a folder or list that cannot be read, and for ids that would collide.
    """
    if root.name == SHARD_INDEX:
        if names is not None:
            raise UserError(f"{names}: a list of files is for folders; choose videos of shards by a pattern")
        videos = []
        for name, shard, offset, size in ShardIndex.read(open_folder(root.parent)).members():
            path = PurePosixPath(name)
            # Chunks are written below the id, and the index may be of other people's making.
            if path.is_absolute() or ".." in path.parts or "\0" in name:
                raise UserError(f"{root}: '{name}' leads out of the folder")
            if pattern is None or fnmatch.fnmatchcase(name, pattern):
                member = TarMember(root.parent / shard, name, offset, size)
                videos.append(Video(path.with_suffix("").as_posix(), member))
        if not videos:
            raise UserError(f"{root}: no videos" + (f" that match '{pattern}'" if pattern else ""))
        _check_ids(videos)
        return sorted(videos)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    paths = _listed(root, names) if names is not None else list(_walk(root, follow_links))
    if pattern is not None:
        paths = [path for path in paths if fnmatch.fnmatchcase(path.as_posix(), pattern)]
    elif names is None:
        paths = [path for path in paths if path.suffix.lower() in (*VIDEO_ENDINGS, VRS_ENDING)]
    if not follow_links:
        real = root.resolve()
        outside = [path for path in paths if not (root / path).resolve().is_relative_to(real)]
        if outside:
            log.warning(
                "%d links lead out of %s and are left out (--follow_links), e.g. %s", len(outside), root, outside[0]
            )
        paths = sorted(set(paths) - set(outside))
    if not paths:
        raise UserError(f"{root}: no videos" + (f" that match '{pattern}'" if pattern else ""))
    videos = [Video(path.with_suffix("").as_posix(), root / path) for path in paths]
    _check_ids(videos)
    return sorted(videos)


def _walk(root: Path, follow_links: bool) -> Iterator[Path]:
    seen = {os.path.realpath(root)}

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    # Not Path.rglob, which passes over folders that it may not enter.
    for folder, folders, files in os.walk(root, followlinks=follow_links, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if follow_links:  # a link may lead in a circle
            fresh = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
            folders[:] = [name for name in folders if fresh[name] not in seen]
            seen.update(fresh.values())
        yield from (Path(folder, name).relative_to(root) for name in files if not name.startswith("."))


def _listed(root: Path, names: Path) -> list[Path]:
    paths = set()
    for number, line in enumerate(read_lines(names), 1):
        if not line.strip():
            continue
        path = Path(os.path.normpath(line))
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{names}: line {number}: '{line}' is not a path below {root}")
        if not os.path.isfile(root / path):  # unlike Path's, no error for a name that is too long
            raise UserError(f"{names}: line {number}: {root / path}: no such file")
        paths.add(path)
    return sorted(paths)


def _check_ids(videos: Sequence[Video]) -> None:
    by_id: dict[str, Path | TarMember] = {}
    for video_id, path in videos:
        try:
            video_id.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{os.fsencode(str(path))!r}: its name is not UTF-8, rename it") from error
        if video_id in by_id:
            raise UserError(f"{by_id[video_id]} and {path} would both become '{video_id}'; rename one")
        if PurePosixPath(video_id).parts[0] == _OWN_FOLDER:
            raise UserError(f"{path}: '{_OWN_FOLDER}' is this program's own; rename it")
        by_id[video_id] = path
    # a/b.mp4 beside a.mp4: the chunks of the former would be below the folder of the latter's.
    for video_id, path in videos:
        for parent in PurePosixPath(video_id).parents:
            if other := by_id.get(parent.as_posix()):
                raise UserError(f"{other}: its chunks would be in one folder with those of {path}; rename one")


# --------------------------------------------------------------------------------------------------
# Output folder
# --------------------------------------------------------------------------------------------------


class Output:
    """The folder of chunks. Nothing is written outside :meth:`claim`.

    Raises :class:`UserError` if the folder was made with other settings, holds anything else, or is below ``root``.
    """

    def __init__(self, folder: Path, settings: ChunkSettings, root: Path) -> None:
        self.folder, self.settings = folder, settings
        self._own = folder / _OWN_FOLDER
        # With tar: the place of each chunk of a complete video, and the bytes of a shard that are complete videos.
        self._members = dict[str, list[tuple[str, str, int, int]]]()
        self._shards = dict[str, int]()
        if folder.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{folder}: is in the input folder {root}; choose another output folder")
        try:
            self._source_bytes = self._read()
        except OSError as error:
            raise UserError(f"{folder}: cannot be read: {error.strerror or error}") from error

    def _read(self) -> dict[str, int]:
        """Bytes of the source of each video that is done."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder}: not a folder")
        file = self._own / "settings.json"
        if not file.exists():
            # An own folder without settings is what is left of a run that was killed as it began.
            if self.folder.exists() and any(path.name != _OWN_FOLDER for path in self.folder.iterdir()):
                raise UserError(f"{self.folder}: not empty and not made by chunk_videos; choose another output folder")
            return {}
        try:
            made = {"tar": False} | json.loads(file.read_bytes())  # which earlier releases did not have
            other = [f"{k} {made[k]} (requested: {v})" for k, v in asdict(self.settings).items() if made[k] != v]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file}: damaged ({error}); choose another output folder") from error
        if other:
            raise UserError(f"{self.folder}: holds chunks with {', '.join(other)}; choose another output folder")
        sizes: dict[str, int] = {}
        done = self._own / "done.jsonl"
        for line in done.read_bytes().split(b"\n") if done.exists() else ():
            # A line may be cut short by a full disk, or damaged.
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                if self.settings.tar:
                    shard, end = self.folder / entry["shard"], int(entry["end"])
                    # A power cut may keep the line and lose what it is about.
                    if not shard.is_file() or shard.stat().st_size < end:
                        continue
                    members = [(str(name), shard.name, int(at), int(size)) for name, at, size in entry["members"]]
                    self._members[entry["video_id"]] = members
                    self._shards[shard.name] = max(end, self._shards.get(shard.name, 0))
                sizes[entry["video_id"]] = int(entry["source_bytes"])
        return sizes

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Lock the folder for this process. Half-made videos, of now or earlier, are removed at both ends."""
        with contextlib.ExitStack() as held:
            try:
                self._own.mkdir(parents=True, exist_ok=True)
                try:
                    held.enter_context(locked(self._own / "lock"))
                except BlockingIOError as error:
                    raise UserError(f"{self.folder}: another process is writing here") from error
                held.callback(shutil.rmtree, self._own / "parts", ignore_errors=True)
                shutil.rmtree(self._own / "parts", ignore_errors=True)
                write_text(self._own / "settings.json", json.dumps(asdict(self.settings), indent=1) + "\n")
                if self.settings.tar:

                    def write_index() -> None:
                        ShardIndex.write(self.folder, list(chain(*self._members.values())))

                    if (self.folder / SHARD_INDEX).exists():
                        # Of a chunk whose line a power cut took, the place is overwritten from now on.
                        write_index()
                    # Also after an interruption: what is complete can be trained on.
                    held.callback(write_index)
                yield
            except BrokenPipeError:  # of the program's output, there is no other pipe
                raise
            except OSError as error:
                reason = f"{error.strerror or error}; complete videos are kept, rerun to resume"
                raise UserError(f"cannot write {self.folder}: {reason}") from error

    def is_done(self, video: Video) -> bool:
        """Whether a video's chunks are there. Raises :class:`UserError` if they are those of another file."""
        if not (video.video_id in self._members if self.settings.tar else self.final(video).is_dir()):
            return False
        # By size alone: to hash terabytes would take hours.
        source_bytes = self._source_bytes.get(video.video_id)
        if source_bytes is not None and source_bytes != _bytes_of(video.path):
            raise UserError(
                f"{self.final(video)}: made of another file than {video.path} ({source_bytes:,} bytes); "
                "remove the chunks or rename the file"
            )
        return True

    def part(self, video: Video) -> Path:
        """The folder in which a video's chunks are written."""
        return self._own / "parts" / video.video_id

    def final(self, video: Video) -> Path:
        """The folder of a complete video's chunks; AVION's has the name of the file."""
        return self.folder / (video.video_id if self.settings.layout == "chunks" else f"{video.video_id}.mp4")

    def finish(self, video: Video, source: Probe, written: Written) -> None:
        """Move a complete video to its name, or into a shard."""
        line = {"video_id": video.video_id, "source_bytes": source.bytes, **written._asdict()}
        if self.settings.tar:
            # The line is what counts as done: what a killed run left behind the last one is overwritten.
            line |= self._append(video)
        else:
            final = self.final(video)
            final.parent.mkdir(parents=True, exist_ok=True)
            # The folder under its name is what counts as done; the line adds the size of the source.
            self.part(video).rename(final)
        with (self._own / "done.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _append(self, video: Video) -> dict[str, Any]:
        """Append a complete video's chunks to the last shard; their places, for ``done.jsonl``."""
        shard = max(self._shards, default="shard-00000.tar")
        if self._shards.get(shard, 0) >= _SHARD_BYTES:
            shard = f"shard-{int(shard.removeprefix('shard-').removesuffix('.tar')) + 1:05d}.tar"
        folder, members = self.final(video).relative_to(self.folder).as_posix(), list[tuple[str, str, int, int]]()
        descriptor = os.open(self.folder / shard, os.O_RDWR | os.O_CREAT, 0o666)
        with open(descriptor, "r+b") as file:
            file.truncate(self._shards.get(shard, 0))
            file.seek(0, os.SEEK_END)
            archive = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)
            for chunk in sorted(self.part(video).iterdir()):
                # No owner and no time: equal chunks are equal shards.
                member = tarfile.TarInfo(f"{folder}/{chunk.name}")
                member.size = chunk.stat().st_size
                with chunk.open("rb") as content:
                    archive.addfile(member, content)
                # Counted from the end of the data, which fills whole blocks: a header's length depends on the name.
                blocks = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                members.append((member.name, shard, archive.offset - blocks, member.size))
            end = archive.offset
            # Where an archive ends; the next video overwrites it, so that a shard is valid at any time.
            file.write(bytes(2 * tarfile.BLOCKSIZE))
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(self.part(video), ignore_errors=True)
        self._members[video.video_id], self._shards[shard] = members, end
        return {"shard": shard, "end": end, "members": [(name, at, size) for name, _, at, size in members]}


# --------------------------------------------------------------------------------------------------
# Work over several processes
# --------------------------------------------------------------------------------------------------


def _run(
    function: Callable[[Any], Any], tasks: Iterable[Any], workers: int, on_wait: Callable[[], None] | None = None
) -> Iterator[tuple[Any, Any]]:
    """(task, result) in any order; the result of a file that cannot be read is the reason, a str."""
    # Leaving the context kills the processes; what they leave half-made is removed by Output.claim.
    with Workers(workers, partial(_guarded, function), math.inf, tasks_in_flight=1) as pool:
        for task, result in pool.unordered(tasks, on_wait):
            if isinstance(result, Lost):
                raise UserError(f"{result.reason}; rerun to resume")
            yield task, result


# Functions of the module and not within others, which a spawned worker could not import.


def _guarded(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except VideoError as error:
        return str(error)


def _probe(video: Video) -> Probe:
    return probe(video.path)


def probe_videos(
    videos: Sequence[Video], workers: int, progress: Progress | None = None
) -> tuple[dict[Video, Probe], dict[Video, str]]:
    """Read the header of every file: headers, and the reasons why some cannot be read; ``progress`` counts files."""
    probes, faults = dict[Video, Probe](), dict[Video, str]()
    for video, result in _run(_probe, videos, workers):
        if isinstance(result, str):
            faults[video] = result
        else:
            probes[video] = result
        if progress:
            progress.update(len(probes) + len(faults))
    # In the order of the videos, not of the answers, so that videos are cut in the same order every time.
    return {video: probes[video] for video in videos if video in probes}, faults


@dataclass
class Summary:
    """Videos written, their length and size, and why others could not be."""

    videos: int = 0
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    faults: dict[Video, str] = field(default_factory=dict)


def write_videos(
    probes: dict[Video, Probe],
    output: Output,
    workers: int,
    strict: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Write the chunks of all videos into a claimed ``output``; ``progress`` counts seconds of video.

    A video that is damaged is left out and named in the summary, or with ``strict`` raised as :class:`VideoError`.
    Raises :class:`UserError` if the output cannot be written.
    """
    summary = Summary()
    total = sum(header.seconds for header in probes.values())
    seconds_done = worker_context().Value("d", 0.0)
    ranges = {video: split(header.seconds, output.settings) for video, header in probes.items()}
    open_ranges = {video: len(parts) for video, parts in ranges.items()}
    written: dict[Video, list[Written]] = defaultdict(list)

    def tasks() -> Iterator[tuple[Video, Path, int, int | None]]:
        for video, parts in ranges.items():
            output.part(video).mkdir(parents=True)
            for first, last in parts:
                if video in summary.faults:  # its other ranges are not worth their time
                    open_ranges[video] -= 1
                else:
                    yield video, output.part(video), first, last
            if not open_ranges[video]:
                shutil.rmtree(output.part(video), ignore_errors=True)

    def report() -> None:
        if progress:
            ready = summary.videos + len(summary.faults)
            # Complete is when the last video has its name, not when its last frame is encoded.
            done = total if ready == len(probes) else min(float(seconds_done.value), total - 1e-3)
            progress.update(done, total=total, note=f"{ready} of {len(probes)} videos")

    write = partial(_write, output.settings, seconds_done)
    for (video, *_), result in _run(write, tasks(), workers, report):
        open_ranges[video] -= 1
        if not isinstance(result, str):
            written[video].append(result)
        elif strict:
            raise VideoError(result)
        elif video not in summary.faults:
            log.warning("left out: %s", result)
            summary.faults[video] = result
        if open_ranges[video]:
            continue
        parts = written.pop(video, [])
        if video in summary.faults:
            shutil.rmtree(output.part(video), ignore_errors=True)
            continue
        whole = Written(*map(sum, zip(*parts, strict=True)))
        output.finish(video, probes[video], whole)
        summary.videos += 1
        summary.seconds += whole.seconds
        summary.bytes_in += probes[video].bytes
        summary.bytes_out += whole.bytes
        report()
    return summary


def _write(settings: ChunkSettings, seconds_done: Any, task: tuple[Video, Path, int, int | None]) -> Written:
    def count(seconds: float) -> None:
        with seconds_done.get_lock():
            seconds_done.value += seconds

    video, folder, first, last = task
    return write_chunks(video.path, folder, settings, first, last, count)


def split(seconds: float, settings: ChunkSettings) -> list[tuple[int, int | None]]:
    """Ranges of chunks (first, behind the last) in which a video is cut; the last one is open.

    The length in a header may be wrong by a little: the open range begins well before it.
    """
    chunks = max(1, round(_RANGE_SECONDS / settings.seconds))
    whole = max(1, int(seconds / settings.seconds) // chunks)
    edges = [number * chunks for number in range(whole)]
    return list(zip(edges, [*edges[1:], None], strict=True))


class Estimate(NamedTuple):
    """Cost of a run: hours with the given workers, bytes, and why some files could not be sampled."""

    hours: float
    bytes: float
    faults: list[str]


def estimate(probes: dict[Video, Probe], settings: ChunkSettings, workers: int) -> Estimate:
    """Chunk a few seconds of the most common kinds of file, and scale up. Writes only to a temporary folder."""
    kinds: dict[tuple[str, int, int, float], list[Video]] = defaultdict(list)
    for video, header in probes.items():
        kinds[header.codec, header.width, header.height, round(header.fps)].append(video)
    lengths = {kind: sum(probes[video].seconds for video in videos) for kind, videos in kinds.items()}
    pixels = {kind: kind[1] * kind[2] * kind[3] for kind in kinds}  # per second
    common = sorted(kinds, key=lambda kind: -lengths[kind])[:_SAMPLES]

    middle = {kinds[kind][len(kinds[kind]) // 2]: kind for kind in common}
    samples = [(video, probes[video].seconds) for video in middle]
    results = {middle[video]: result for (video, _), result in _run(partial(_sample, settings), samples, workers)}
    measured = {kind: result for kind, result in results.items() if not isinstance(result, str)}
    faults = [result for result in results.values() if isinstance(result, str)]
    if not measured:
        return Estimate(0.0, 0.0, faults)
    # Kinds that were not sampled: time by their pixels, bytes by their length.
    seconds = sum(lengths[kind] for kind in measured) or 1.0
    per_pixel = sum(cost / pixels[kind] * lengths[kind] for kind, (cost, _) in measured.items()) / seconds
    per_second = sum(size * lengths[kind] for kind, (_, size) in measured.items()) / seconds
    spent = size = 0.0
    for kind, length in lengths.items():
        cost, weight = measured.get(kind, (per_pixel * pixels[kind], per_second))
        spent, size = spent + cost * length, size + weight * length
    return Estimate(spent / workers / 3600, size, faults)


def _sample(settings: ChunkSettings, task: tuple[Video, float]) -> tuple[float, float]:
    """Chunk a few seconds from the middle of a file: (time spent, bytes written), each per second of video."""
    (video, seconds), settings = task, replace(settings, seconds=_SAMPLE_SECONDS)
    first = int(seconds / 2 // _SAMPLE_SECONDS)
    last = None if 0 < seconds < 2 * _SAMPLE_SECONDS else first + 1
    frames = list[tuple[float, float]]()  # (time of the clock, seconds of video)
    with tempfile.TemporaryDirectory() as folder:
        written = write_chunks(
            video.path, Path(folder), settings, first, last, lambda length: frames.append((time.perf_counter(), length))
        )
    # From the first frame on: seeking to the sample is no part of the work.
    spent = (frames[-1][0] - frames[0][0]) / max(sum(length for _, length in frames[1:]), 1e-3)
    return spent, written.bytes / written.seconds
