"""Video containers: which ones are accepted, how FFmpeg opens them, and which of their streams is the video.

Shared by the decoders and by the chunker, so that both choose alike.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from egohod.data.storage import VideoError, VideoFile

ENDINGS = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".mts",
    ".m2ts",
    ".ts",
    ".wmv",
    ".asf",
    ".flv",
    ".3gp",
)
"""Endings of video files, in lower case; files may write them in any case."""

# Only the headers of these state the true length; elsewhere it is guessed from the bit rate or the last time stamps.
FORMATS_WITH_LENGTH = ("mov", "matroska", "avi", "asf")

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
_PACKETS = (188, 192, 204)
_SYNC, _SYNCS = 0x47, 5
# Enough for the syncs to follow from any byte of the first packet on.
_HEAD_BYTES = max(_PACKETS) * (_SYNCS + 1)
# Pictures whose proportions differ by no more than this are the same at another resolution.
_SAME_ASPECT = 0.02
_PEEK_BYTES = 1 << 20
HEAD_PACKETS = 64
"""Packets at a file's beginning that tell what its time stamps are like."""


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
    for magic, format in _MAGIC.items():
        if head.startswith(magic):
            return format
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    return "mpegts" if _is_transport_stream(head) else None


def _is_transport_stream(head: bytes) -> bool:
    # Sync bytes follow one another at a packet's distance, the first one anywhere in the first packet.
    for size in _PACKETS:
        # A recording that was cut at any byte begins within a packet.
        for begin in range(size):
            syncs = range(begin, min(len(head), begin + _SYNCS * size), size)
            # Two are enough where the first byte, or the one behind a time code, is the first of them.
            if len(syncs) >= (2 if begin in (0, 4) else _SYNCS) and all(head[at] == _SYNC for at in syncs):
                return True
    return False


def packets_of(container: Any, *streams: Any) -> Iterator[Any]:
    """The packets of ``streams``, or of all, from where a PyAV container is; the last ones are empty."""
    # Behind the last packet PyAV may trip over streams that appeared while it read, as they do in broadcasts.
    with contextlib.suppress(IndexError):
        yield from container.demux(*streams)


def videos_of(container: Any) -> list[Any]:
    """The video streams of a PyAV container that may be the video: cover pictures are streams too."""
    videos = []
    for stream in container.streams.video:
        kinds = type(stream.disposition)
        if not stream.disposition & (kinds.attached_pic | kinds.timed_thumbnails | kinds.still_image):
            videos.append(stream)
    # Some programs do not mark a cover, but their header states a stream of one picture.
    return [stream for stream in videos if stream.frames != 1] or videos


def video_stream(container: Any) -> Any:
    """The stream of a PyAV container that is the video, None if there is none.

    Of several it is the one that FFmpeg's own programs show, else the default one, else the largest.
    """
    videos, best = videos_of(container), container.streams.best("video")
    if best in videos:
        return best

    # FFmpeg's choice may be a cover, which is no candidate here.
    def rank(stream: Any) -> tuple[bool, int, int]:
        size = stream.width * stream.height if stream.codec_context else 0
        return bool(stream.disposition & type(stream.disposition).default), size, -stream.index

    return max(videos, key=rank, default=None)


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


def has_only_sound(file: VideoFile) -> bool:
    """Whether an MP4's handlers name sound but no picture; some decoders say nothing better than 'cannot open'."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return has_only_sound(opened)
    # The table of contents stands at one end of the file or the other.
    file.seek(0)
    ends = file.read(_PEEK_BYTES)
    file.seek(max(0, file.seek(0, 2) - _PEEK_BYTES))
    ends += file.read()
    return set(re.findall(rb"hdlr.{8}(vide|soun)", ends, re.DOTALL)) == {b"soun"}
