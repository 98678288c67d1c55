"""Videos below a root: where each one lies, and clips that cross the borders of its chunks."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from egohod.data.decoders import Decoder, Opener
from egohod.data.files import LocalCache, Recent, Source, VideoError, open_root
from egohod.data.frames import clip_indices, frame_times

__all__ = ["VideoError", "VideoStore", "read_clip"]

LAYOUTS = ("chunks", "avion", "whole")
ENDINGS = (".mp4", ".MP4")


class Frames(NamedTuple):
    """Pictures of a clip and when each is on display."""

    pictures: np.ndarray
    """uint8 RGB [T, H, W, 3]."""
    seconds: np.ndarray
    """float64 [T], from the start of the video: the middle of the time that each is on display."""
    numbers: np.ndarray
    """int64 [T], counted from the start of the video at the file's average rate."""


class _Place(NamedTuple):
    """How a video's files are called."""

    layout: str
    ending: str

    def folder(self, video: str) -> str:
        """Where the chunks of a video lie."""
        return f"{video}{self.ending}" if self.layout == "avion" else video

    def key(self, video: str, number: int, seconds: float) -> str:
        """The file that holds chunk ``number`` of a video, each ``seconds`` long."""
        if self.layout == "whole":
            return f"{video}{self.ending}"
        # Chunks are called by their number, AVION's by the second they start at.
        name = f"{number:04d}" if self.layout == "chunks" else f"{number * seconds:.10g}"
        return f"{self.folder(video)}/{name}{self.ending}"

    def number(self, name: str, seconds: float) -> int:
        """The number of the chunk in the file ``name``, -1 if it is none."""
        stem, dot, ending = name.rpartition(".")
        if dot + ending not in ENDINGS:
            return -1
        if self.layout == "chunks":
            return int(stem) if stem.isdecimal() else -1
        return round(float(stem) / seconds) if stem.replace(".", "", 1).isdecimal() else -1


def read_clip(
    opener: Opener,
    source: Source,
    name: str,
    start: float,
    end: float,
    num_frames: int,
    rng: np.random.Generator | None = None,
    rule: str = "middle",
) -> Frames:
    """``num_frames`` frames of [start, end) seconds of one file.

    ``name`` is what messages call the file; see :meth:`VideoStore.read`.
    """
    decoder = opener(source, name)
    try:
        if start >= decoder.duration:
            raise VideoError(f"{name}: the clip begins at {start:.2f} s, the video ends at {decoder.duration:.2f} s")
        numbers = clip_indices(start, end, decoder.duration, decoder.fps, num_frames, rng, rule)
        seconds = frame_times(numbers, decoder.fps)
        return Frames(decoder.read_at(seconds), seconds, numbers)
    finally:
        decoder.close()


class VideoStore:
    """The videos below ``root``, a local folder or an fsspec URI (see :func:`~egohod.data.files.open_root`).

    Layouts: ``whole`` is ``root/<video>.mp4``; ``chunks`` is ``root/<video>/<0000>.mp4`` with the number of the chunk;
    ``avion`` is ``root/<video>.mp4/<0>.mp4`` with the second at which the chunk starts; chunks are ``chunk_seconds``
    long. ``auto`` takes for each video what is there. ``cache`` keeps files of a remote root. Raises
    :class:`~egohod.config.UserError` if ``root`` is no folder.
    """

    def __init__(
        self, root: str | Path, layout: str, chunk_seconds: float, opener: Opener, cache: LocalCache | None = None
    ) -> None:
        assert layout in ("auto", *LAYOUTS), layout
        self.root = root
        self._files = open_root(root, cache)
        self._chunk_seconds = chunk_seconds
        self._opener = opener
        layouts = LAYOUTS if layout == "auto" else (layout,)
        self._places = [_Place(name, ending) for name in layouts for ending in ENDINGS]
        self._place_of: Recent[str, _Place] = Recent(65536)

    def read(
        self,
        video_id: str,
        start: float,
        end: float,
        num_frames: int,
        rng: np.random.Generator | None = None,
        rule: str = "middle",
    ) -> Frames:
        """``num_frames`` frames of [start, end) seconds, one per equal segment.

        See :func:`~egohod.data.frames.clip_indices` for ``rng`` and ``rule``. A clip that runs beyond the video's end
        is cut there; one that begins beyond it, or a file that cannot be read, raises :class:`VideoError`. Storage
        that cannot be used at all raises :class:`~egohod.data.files.StorageError`.
        """
        video = self._checked(video_id)
        first = int(start // self._chunk_seconds)
        try:
            place, source = self._find(video, first)
            if place.layout == "whole":
                name = self._name(place, video, 0)
                return read_clip(self._opener, source, name, start, end, num_frames, rng, rule)
            return self._read_chunks(place, video, first, source, start, end, num_frames, rng, rule)
        except OSError as error:  # a name too long for the file system, a folder that may not be entered
            raise VideoError(f"{self._files.name_of(video)}: cannot be read: {error.strerror or error}") from error

    def _checked(self, video_id: str) -> str:
        path = PurePosixPath(video_id)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in video_id:
            raise VideoError(f"video id '{video_id}' leads out of {self.root}")
        return str(path)

    def _name(self, place: _Place, video: str, number: int) -> str:
        return self._files.name_of(place.key(video, number, self._chunk_seconds))

    def _open(self, place: _Place, video: str, number: int) -> Source:
        key = place.key(video, number, self._chunk_seconds)
        return self._files.open(key, size_first=place.layout == "whole")

    def _find(self, video: str, number: int) -> tuple[_Place, Source]:
        """Where the video lies, and its chunk ``number``."""
        known = self._place_of.get(video)
        for place in self._places if known is None else [known, *(each for each in self._places if each != known)]:
            try:
                source = self._open(place, video, number)
            except FileNotFoundError:
                continue
            # On a disk the order stays fixed; elsewhere a wrong guess costs a round trip, and the next video most
            # likely lies as this one does.
            if self._files.costly:
                self._place_of.put(video, place)
                self._places.sort(key=lambda each: each != place)
            return place, source
        chunked = [place for place in self._places if place.layout != "whole"]
        # The file to name: the chunk, if the video has others.
        whole = [place for place in self._places if place.layout == "whole"]
        likely = [place for place in chunked if self._last(place, video) >= 0] + whole + chunked
        raise VideoError(f"{self._name(likely[0], video, number)}: no such file")

    def _last(self, place: _Place, video: str) -> int:
        """The number of the last chunk there is, -1 if there is none."""
        names = self._files.names(place.folder(video))
        return max((place.number(name, self._chunk_seconds) for name in names), default=-1)

    def _read_chunks(
        self,
        place: _Place,
        video: str,
        first: int,
        source: Source,
        start: float,
        end: float,
        num_frames: int,
        rng: np.random.Generator | None,
        rule: str,
    ) -> Frames:
        """A clip that begins in chunk ``first``, which is open as ``source``."""
        length = self._chunk_seconds
        # A clip that ends where a chunk begins does not touch that chunk.
        last = max(first, int(np.ceil(end / length)) - 1)
        decoders: dict[int, Decoder] = {}
        try:
            for number in range(first, last + 1):
                try:
                    part = source if number == first else self._open(place, video, number)
                except FileNotFoundError:
                    if number > self._last(place, video):
                        break
                    raise VideoError(f"{self._name(place, video, number)}: no such file") from None
                decoders[number] = self._opener(part, self._name(place, video, number))
            final = max(decoders)
            stop = final * length + decoders[final].duration
            if start >= stop:
                folder = self._files.name_of(place.folder(video))
                raise VideoError(f"{folder}: the clip begins at {start:.2f} s, the video ends at {stop:.2f} s")
            fps = decoders[first].fps
            numbers = clip_indices(start, end, stop, fps, num_frames, rng, rule, chunk_start=first * length)
            # Frames are numbered from the start of the video; each chunk has the numbers from its own start on.
            firsts = np.array([round(number * length * fps) for number in decoders])
            chunk_of = np.maximum(np.searchsorted(firsts, numbers, side="right") - 1, 0)
            seconds = frame_times(numbers - firsts[chunk_of], fps)
            parts = [decoders[first + i].read_at(seconds[chunk_of == i]) for i in np.unique(chunk_of).tolist()]
        finally:
            for decoder in decoders.values():
                decoder.close()
        if len({part.shape[1:] for part in parts}) > 1:
            folder = self._files.name_of(place.folder(video))
            raise VideoError(f"{folder}: chunks {first} to {final} differ in picture size")
        return Frames(np.concatenate(parts), seconds + (first + chunk_of) * length, numbers)
