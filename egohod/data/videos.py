"""Videos below a root: their layouts, clips that cross the borders of chunks, and sliding windows."""

from __future__ import annotations

import bisect
import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np

from egohod.data.decoders import VIDEO_ENDINGS, Decoder, Opener, choose_decoder
from egohod.data.storage import LocalCache, LruCache, RemoteFolder, StorageError, VideoError, VideoFile, open_root
from egohod.errors import UserError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# A shorter clip of a chunked video is widened to this, as upstream does (SPEC 5).
MIN_SECONDS = 1.0
RULES = ("middle", "upstream", "lavila", "avion")
"""How the published loaders turn seconds into frame numbers, see :func:`clip_indices`."""

LAYOUTS = ("chunks", "avion", "whole")
ENDINGS = tuple(spelling for ending in VIDEO_ENDINGS for spelling in (ending, ending.upper()))
# Looked for in every layout and tree; all other endings only for a video that is not there with these, since each look
# costs a request on a remote root.
_USUAL_ENDINGS = (".mp4", ".MP4")
# Rules whose loaders widen short clips of chunks; AVION's and LaViLa's widen none.
_WIDENING_RULES = ("middle", "upstream")
# A chunk's length may differ from chunk_seconds by a frame and this much without a warning ...
_EXACT_SECONDS = 0.1
# ... and by this share of it, at most so many seconds, with a warning: chunks that were cut at key frames.
_INEXACT_SHARE, _INEXACT_SECONDS = 0.1, 2.0
# The error for a missing video names at most so many of the places where it was looked for.
_MAX_NAMED = 6


# --------------------------------------------------------------------------------------------------
# From seconds to frame numbers
# --------------------------------------------------------------------------------------------------


def clip_indices(
    start: float,
    end: float,
    stop: float,
    fps: float,
    n: int,
    rng: np.random.Generator | None = None,
    rule: str = "middle",
    chunk_start: float | None = None,
) -> np.ndarray:
    """``n`` frame numbers of [start, end) seconds of a video that ends at ``stop``, ascending, int64 [n].

    ``chunk_start`` is the second at which the chunk that holds ``start`` begins, None for a whole file. First the range
    of frames [a, b), never beyond the video's last frame:

    - *middle* (this project's): a = round(start * fps), b = round(end * fps);
    - *upstream*: the same in chunks; in whole files b = a + max(int((end - start) * fps), n): at least n frames;
    - *avion*: as upstream, but a frame early where a clip ends with the last chunk it touches or later;
    - *lavila*: b = round(start * fps) and ceil(end * fps) in whole files; in chunks as upstream's whole files, with
      frames counted from the start of the chunk.

    Then one frame for each of n segments of it, see :func:`segment_indices`; for *avion* :func:`floored_midpoints`.
    Without exception numbers are rounded half to even, counted from the start of the video: rounding within a chunk
    picks another frame for 0.6 % (30 fps) to 1.8 % (25 fps) of clips whose times have milliseconds.
    """
    assert rule in RULES, rule
    whole = chunk_start is None
    if rule == "avion" and not whole:
        stop -= 1 / fps
    end = min(end, stop)
    first = round(start * fps)
    if rule == "lavila" and chunk_start is not None:
        first = round((start - chunk_start) * fps) + round(chunk_start * fps)
    if rule == "lavila" and whole:
        # Rounded up, a clip that was cut at the video's end may pass it: 749 / 29.97 * 29.97 is more than 749.
        last = min(int(np.ceil(end * fps)), round(stop * fps))
    elif rule == "middle" or (rule in ("upstream", "avion") and not whole):
        last = round(end * fps)
    else:
        last = min(first + max(int((end - start) * fps), n), round(stop * fps))
    return (floored_midpoints if rule == "avion" else segment_indices)(first, last, n, rng)


def segment_indices(start_frame: int, end_frame: int, n: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """``n`` frame numbers from ``n`` equal segments of [start_frame, end_frame), ascending, int64 [n].

    Without ``rng`` the middle of each segment: with s = (end - start - 1) / n, frame i is
    (round(s * i) + round(s * (i + 1))) // 2 + start (SPEC 5). With ``rng`` a random frame of each segment, borders
    included. An empty range counts as one frame; short ranges repeat frames.
    """
    assert n > 0
    last = max(end_frame - start_frame, 1) - 1
    edges = np.round(last / n * np.arange(n + 1)).astype(np.int64)
    middle = (edges[:-1] + edges[1:]) // 2 if rng is None else rng.integers(edges[:-1], edges[1:], endpoint=True)
    return np.clip(middle, 0, last) + start_frame


def floored_midpoints(start_frame: int, end_frame: int, n: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """``n`` frame numbers, the floored midpoints of ``n`` equal parts of [start_frame, end_frame), int64 [n].

    AVION's rule. With ``rng`` each midpoint is moved by up to half of (end - start - 1) / n to either side. An empty
    range counts as one frame.
    """
    assert n > 0
    end_frame = max(end_frame, start_frame + 1)
    edges = np.linspace(start_frame, end_frame, n + 1)
    middle = 0.5 * edges[:-1] + 0.5 * edges[1:]
    if rng is not None:
        middle += (rng.random(n) - 0.5) * (end_frame - start_frame - 1) / n
    return np.clip(np.floor(middle).astype(np.int64), start_frame, end_frame - 1)


def frame_times(indices: np.ndarray, fps: float) -> np.ndarray:
    """Seconds at which each frame is surely on display: the middle of its interval, float64 [n].

    Asking for the middle rather than the start keeps rounding of time stamps from picking the neighbour.
    """
    return (np.asarray(indices, dtype=np.float64) + 0.5) / fps


# --------------------------------------------------------------------------------------------------
# Where videos are
# --------------------------------------------------------------------------------------------------


class _Tree(NamedTuple):
    """The folders in which a data set is published."""

    ids: re.Pattern[str]  # which video ids are the data set's
    path: str  # below the root, without the ending, made of the groups of ``ids``
    layouts: tuple[str, ...] = ("whole",)


_EPIC = re.compile(r"(?:P\d\d/)?(?P<video>(?P<person>P\d\d)_\d{2,3})")
_EGO4D = re.compile(r"(?P<video>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
_EGTEA_CLIP = re.compile(r"(?:[^/]+/)?(?P<video>(?P<session>[A-Z]+\d\d-R\d\d-\w+)-\d+-\d+-F\d+-F\d+)")
_EGTEA_SESSION = re.compile(r"(?P<video>[A-Z]+\d\d-R\d\d-\w+)")
_CHARADES = re.compile(r"(?P<video>[0-9A-Z]{5}(?:EGO)?)")
_HD_EPIC = re.compile(r"(?P<video>(?P<person>P\d\d)-\d{8}-\d{6})")
# In search order. The patterns keep the list short for any one video: ids of no data set cost the root's look alone.
TREES = (
    _Tree(re.compile(r"(?P<video>.+)", re.DOTALL), "{video}", LAYOUTS),
    # In every layout, because tools/chunk_videos.py and AVION's script keep the folders of what they cut. Chunks of the
    # other data sets are below one folder, which can be the root.
    _Tree(_EPIC, "{person}/videos/{video}", LAYOUTS),
    _Tree(_EPIC, "{person}/{video}", LAYOUTS),
    _Tree(_EPIC, "EPIC-KITCHENS/{person}/videos/{video}", LAYOUTS),
    *(_Tree(_HD_EPIC, f"{folder}{{person}}/{{video}}") for folder in ("", "Videos/")),
    # The small copy first: it is faster to read, and crops are smaller still.
    *(
        _Tree(_EGO4D, f"{version}{folder}/{{video}}")
        for version in ("", "v2/", "v1/")
        for folder in ("video_540ss", "full_scale", "clips")
    ),
    *(_Tree(_EGTEA_CLIP, f"{folder}{{session}}/{{video}}") for folder in ("", "cropped_clips/")),
    *(_Tree(_EGTEA_CLIP, f"{folder}{{video}}") for folder in ("", "cropped_clips/")),
    _Tree(_EGTEA_SESSION, "videos/{video}"),
    *(_Tree(_CHARADES, f"{folder}/{{video}}") for folder in ("CharadesEgo_v1_480", "CharadesEgo_v1")),
    *(_Tree(_CHARADES, f"{folder}/{{video}}") for folder in ("Charades_v1_480", "Charades_v1")),
)


class Frames(NamedTuple):
    """Frames of a clip and when each is on display."""

    pictures: np.ndarray
    """uint8 RGB [T, H, W, 3]."""
    seconds: np.ndarray
    """float64 [T], from the start of the video: the middle of each frame's time on display."""
    numbers: np.ndarray
    """int64 [T], counted from the start of the video at the file's average rate."""


class _Location(NamedTuple):
    """Where one video is."""

    layout: str
    path: str  # below the root, without the ending
    ending: str
    seconds: float  # length of a chunk
    # (start, file name) of chunks that do not start at multiples of ``seconds``.
    listed: tuple[tuple[float, str], ...] | None = None

    @property
    def folder(self) -> str:
        """The folder of the chunks."""
        return f"{self.path}{self.ending}" if self.layout == "avion" else self.path

    def chunk(self, second: float) -> int:
        """The number of the chunk that holds a second, 0 for a whole file."""
        if self.layout == "whole":
            return 0
        if self.listed is None:
            return int(second // self.seconds)
        return max(0, bisect.bisect_right(self.listed, second, key=lambda chunk: chunk[0]) - 1)

    def start(self, number: int) -> float:
        """The second at which a chunk begins."""
        return number * self.seconds if self.listed is None else self.listed[number][0]

    def length(self, number: int) -> float:
        """Seconds from the start of a chunk to that of the next one, infinite if there is none."""
        if self.listed is None:
            return self.seconds  # and not a difference of starts, which would be rounded
        return self.listed[number + 1][0] - self.listed[number][0] if number + 1 < len(self.listed) else np.inf

    def key(self, number: int) -> str:
        """The file that holds a chunk."""
        if self.layout == "whole":
            return f"{self.path}{self.ending}"
        if self.listed is not None:
            return f"{self.folder}/{self.listed[number][1]}"
        # Our chunks are named by their number, AVION's by the second they start at.
        name = f"{number:04d}" if self.layout == "chunks" else f"{number * self.seconds:.10g}"
        return f"{self.folder}/{name}{self.ending}"


class _UnevenChunksError(Exception):
    """Chunks named by the second at which they start that do not start every chunk_seconds."""


def read_clip(
    opener: Opener,
    file: VideoFile,
    name: str,
    start: float,
    end: float,
    num_frames: int,
    rng: np.random.Generator | None = None,
    rule: str = "middle",
) -> Frames:
    """Read ``num_frames`` frames of [start, end) seconds of one file; messages call it ``name``.

    See :meth:`VideoStore.read` for the other arguments and the errors.
    """
    with contextlib.closing(opener(file, name)) as decoder:
        if start >= decoder.duration:
            raise VideoError(f"{name}: the clip begins at {start:.2f} s, the video ends at {decoder.duration:.2f} s")
        numbers = clip_indices(start, end, decoder.duration, decoder.fps, num_frames, rng, rule)
        seconds = frame_times(numbers, decoder.fps)
        return Frames(decoder.read_at(seconds), seconds, numbers)


class VideoStore:
    """The videos below ``root``, a local folder or an fsspec URI (see :func:`~egohod.data.storage.open_root`).

    Layouts: ``whole`` is ``root/<video>.mp4``; ``chunks`` is ``root/<video>/<0000>.mp4`` with the number of the chunk,
    each ``chunk_seconds`` long; ``avion`` is ``root/<video>.mp4/<0>.mp4`` with the second at which the chunk starts.
    ``auto`` takes for each video what is there. In each layout the folders in which data sets are published (``TREES``)
    are searched as well. ``cache`` keeps files of a remote root.

    Clips are widened to ``min_clip_seconds``; None widens those in chunks to a second, unless ``rule`` is that of a
    loader that does not, and leaves those in whole files as they are.

    Raises :class:`~egohod.errors.UserError` if ``root`` is no folder, and for an impossible layout.
    """

    def __init__(
        self,
        root: str | Path,
        layout: str,
        chunk_seconds: float,
        opener: Opener,
        cache: LocalCache | None = None,
        min_clip_seconds: float | None = None,
    ) -> None:
        # Checked here too, because they may come from a damaged file of features or results.
        if layout not in ("auto", *LAYOUTS) or not 0 < chunk_seconds < np.inf:
            raise UserError(
                f"{root}: no layout {layout!r} with chunks of {chunk_seconds} s; see data.train.NAME.layout"
            )
        self.root = root
        self._files = open_root(root, cache)
        self.reads_ahead = self._files.reads_ahead
        """Whether :meth:`request` fetches anything."""
        self._chunk_seconds = chunk_seconds
        self._tolerance = min(_INEXACT_SHARE * chunk_seconds, _INEXACT_SECONDS)
        self._min_clip_seconds = min_clip_seconds
        self._opener = opener
        self._layouts = layouts = LAYOUTS if layout == "auto" else (layout,)
        # The ways in which a video may be stored: tree, layout and ending.
        self._forms = [
            (tree, kind, ending)
            for tree in TREES
            for kind in layouts
            if kind in tree.layouts
            for ending in _USUAL_ENDINGS
        ]
        rare = [ending for ending in ENDINGS if ending not in _USUAL_ENDINGS]
        rare_layouts: tuple[str, ...] = ("whole", "chunks")
        if self._files.is_remote:  # fewer guesses where each one is a request
            rare, rare_layouts = [ending for ending in rare if ending.islower()], ("whole",)
        self._forms += [(TREES[0], kind, ending) for kind in rare_layouts if kind in layouts for ending in rare]
        self._locations: LruCache[str, _Location] = LruCache(65536)
        self._missing: LruCache[str, str] = LruCache(65536)  # video -> the error that names where it was looked for
        self._last_chunks: LruCache[str, int] = LruCache(65536)
        self._has_warned = False

    def read(
        self,
        video_id: str,
        start: float,
        end: float,
        num_frames: int,
        rng: np.random.Generator | None = None,
        rule: str = "middle",
    ) -> Frames:
        """Read ``num_frames`` frames of [start, end) seconds, one per equal segment.

        See :func:`~egohod.data.videos.clip_indices` for ``rng`` and ``rule``. A clip that runs beyond the video's end
        is cut there; one that begins beyond it, a file that cannot be read, or a chunk that is not ``chunk_seconds``
        long raises :class:`VideoError`. Storage that cannot be used at all raises
        :class:`~egohod.data.storage.StorageError`.
        """
        with self._checked(video_id) as video:
            place, file = self._find(video, start, self._open)
            end = self._widened(place, start, end, rule)
            if place.layout == "whole":
                return read_clip(self._opener, file, self._name(place, 0), start, end, num_frames, rng, rule)
            try:
                return self._read_chunks(place, file, start, end, num_frames, rng, rule)
            except _UnevenChunksError:
                # The same video again, with its chunks as they are named.
                place = self._locations.put(video, place._replace(listed=self._list_chunks(place)))
                file = self._open(place, place.chunk(start))
                return self._read_chunks(place, file, start, end, num_frames, rng, rule)

    def read_together(
        self, video_id: str, spans: Sequence[tuple[float, float]], num_frames: int, rule: str = "middle"
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Frames of several clips of one whole file, each decoded once: distinct pictures uint8 [P, H, W, 3], and of
        each clip the rows of its frames among them, int64 [clips, num_frames]; None for a video in chunks, or where the
        size of the pictures changes, which are brought to that of a clip's first.

        Otherwise as :meth:`read`, whose frames are the same: one clip that cannot be read raises for all.
        """
        with self._checked(video_id) as video:
            place, file = self._find(video, spans[0][0], self._open)
            if place.layout != "whole":
                return None
            with contextlib.closing(self._opener(file, self._name(place, 0))) as decoder:
                if (start := max(start for start, _ in spans)) >= decoder.duration:
                    raise VideoError(f"{self._name(place, 0)}: a clip begins at {start:.2f} s, beyond the end")
                numbers = [
                    clip_indices(start, self._widened(place, start, end, rule), decoder.duration, decoder.fps,
                                 num_frames, rule=rule)
                    for start, end in spans
                ]  # fmt: skip
                distinct, rows = np.unique(np.stack(numbers), return_inverse=True)
                pictures = decoder.read_at(frame_times(distinct, decoder.fps))
                return None if decoder.is_scaled else (pictures, rows.reshape(len(spans), num_frames))

    def locate(self, video_id: str, second: float) -> tuple[VideoFile, float]:
        """The file that holds a second of a video, and the second at which it begins. Raises as :meth:`read` does."""
        with self._checked(video_id) as video:
            place, file = self._find(video, second, self._open)
            return file, place.start(place.chunk(second)) if place.layout != "whole" else 0.0

    def end_of(self, video_id: str, start: float, end: float, rule: str = "middle") -> float:
        """The end of a clip as :meth:`read` takes it: later than ``end`` if a short clip is widened.

        Raises as :meth:`read` does.
        """
        with self._checked(video_id) as video:
            place = self._locations.get(video) or self._find(video, start, self._state)[0]
            return self._widened(place, start, end, rule)

    def states(self, video_id: str, start: float, end: float | None = None) -> list[tuple[str, ...]]:
        """The states of the files in which a clip begins and, where it is another one, ends.

        Without ``end`` of the former alone; see :meth:`~egohod.data.storage.Folder.state`. No file is opened
        unless chunks have to be measured. Raises as :meth:`read` does.
        """
        with self._checked(video_id) as video:
            place, state = self._find(video, start, self._state)
            first = place.chunk(start)
            last = first if end is None or np.isinf(end) else place.chunk(np.nextafter(end, start))
            if last > first:
                with contextlib.suppress(FileNotFoundError):  # a clip may end beyond the video
                    return [state, self._state(place, last)]
            return [state]

    def request(self, video_id: str, start: float, end: float, rule: str = "middle") -> None:
        """Begin to fetch the files of a clip that will be read soon, if they are remote."""
        if not self.reads_ahead or self._missing.get(video_id) is not None:
            return
        with contextlib.suppress(VideoError), self._checked(video_id) as video:  # reading will raise it
            # A new video is most likely stored as the last one was, so that is the only form to request.
            _, guess = next(self._candidates(video, self._layouts), (None, None))
            place = self._locations.get(video) or guess
            if not len(self._locations):  # for the first video only what reading it would try
                end = start
            if place is not None:
                first, end = place.chunk(start), self._widened(place, start, end, rule)
                last = place.chunk(float(np.nextafter(end, start))) if np.isfinite(end) else first
                for number in range(first, max(first, last) + 1):
                    self._files.request(place.key(number), size_first=place.layout == "whole")

    def forget_requests(self) -> None:
        """Drop what was requested and not read."""
        self._files.forget_requests()

    def list_root(self) -> None:
        """List the root, if it is remote, so that other processes need not."""
        if isinstance(self._files, RemoteFolder):
            self._files.can_list()

    def findings(self) -> list[dict[str, Any]]:
        """Results of looking for videos, for other processes to :meth:`learn`; none where looking is free."""
        return [each.entries() for each in self._lookups]

    def learn(self, findings: list[dict[str, Any]]) -> None:
        """Use the :meth:`findings` of another process, instead of asking the server again."""
        for lookup, entries in zip(self._lookups, findings, strict=True):
            lookup.update(entries)

    @property
    def _lookups(self) -> list[LruCache[str, Any]]:
        return [self._locations, self._missing, self._files.listings] if isinstance(self._files, RemoteFolder) else []

    def read_file(self, video_id: str, numbers: Callable[[int], np.ndarray]) -> np.ndarray:
        """Read frames of a video that is one whole file, uint8 [..., H, W, 3].

        ``numbers`` maps the count of frames to the wanted frame numbers, int64 [...]; numbers beyond it are black
        frames. Raises as :meth:`read` does.
        """
        with self._checked(video_id) as video:
            place, file = self._find(video, 0.0, self._open, ("whole",))
            with contextlib.closing(self._opener(file, self._name(place, 0))) as decoder:
                total = max(1, round(decoder.duration * decoder.fps))
                wanted = numbers(total)
                # A frame that is shown several times, as where windows overlap, is decoded once.
                distinct, row = np.unique(np.minimum(wanted, total - 1), return_inverse=True)
                pictures = decoder.read_at(frame_times(distinct, decoder.fps))[row.reshape(wanted.shape)]
                pictures[wanted >= total] = 0
                return pictures

    @contextlib.contextmanager
    def _checked(self, video_id: str) -> Iterator[str]:
        """The id as a path below the root; within, errors of the file system name the video."""
        path = PurePosixPath(video_id)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in video_id:
            raise VideoError(f"video id '{video_id}' leads out of {self.root}")
        try:
            yield str(path)
        except OSError as error:  # a name too long, a folder without permission
            raise VideoError(f"{self._files.name_of(str(path))}: cannot be read: {error.strerror or error}") from error

    def _name(self, place: _Location, number: int) -> str:
        return self._files.name_of(place.key(number))

    def _open(self, place: _Location, number: int) -> VideoFile:
        return self._files.open(place.key(number), size_first=place.layout == "whole")

    def _state(self, place: _Location, number: int) -> tuple[str, ...]:
        return self._files.state(place.key(number))

    def _widened(self, place: _Location, start: float, end: float, rule: str) -> float:
        least = self._min_clip_seconds
        if least is None:
            least = MIN_SECONDS if place.layout != "whole" and rule in _WIDENING_RULES else 0.0
        return max(end, start + least)

    # ----------------------------------------------------------------------------------------------
    # Where a video is
    # ----------------------------------------------------------------------------------------------

    def _candidates(self, video: str, layouts: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], _Location]]:
        """(form, location) of every way in which a video may be stored, in the order of looking."""
        for form in self._forms:
            tree, layout, ending = form
            if layout in layouts and (match := tree.ids.fullmatch(video)):
                yield form, _Location(layout, tree.path.format(**match.groupdict()), ending, self._chunk_seconds)

    def _find(
        self,
        video: str,
        second: float,
        look: Callable[[_Location, int], Result],
        layouts: Sequence[str] = LAYOUTS,
    ) -> tuple[_Location, Result]:
        """Where a video is, and the file that holds a second of it, as ``look`` (``_open``, ``_state``) returns it."""
        cached = self._locations.get(video)
        if cached is not None and cached.layout in layouts:
            with contextlib.suppress(FileNotFoundError):
                return cached, look(cached, cached.chunk(second))
        if (reason := self._missing.get(video)) is not None:
            raise VideoError(reason)
        candidates = list(self._candidates(video, layouts))
        for form, place in candidates:
            try:
                result = look(place, place.chunk(second))
            except FileNotFoundError:
                continue
            # On a remote root a wrong guess costs a round trip, and the next video is most likely where this one is. On
            # a disk the order stays fixed: the result must not depend on what was read before.
            if self._files.is_remote:
                # A new list: another thread may be going through this one.
                self._forms = sorted(self._forms, key=lambda other: other != form)
            return self._locations.put(video, place), result
        places = list(dict.fromkeys(place for _, place in candidates))
        uneven = self._find_uneven(places, second)
        if uneven is not None:
            return self._locations.put(video, uneven), look(uneven, uneven.chunk(second))
        # The shortest way to store a video is the one to name.
        places.sort(key=lambda place: place.layout != "whole")
        first, *others = dict.fromkeys(
            place.key(place.chunk(second)) for place in places if place.ending == _USUAL_ENDINGS[0]
        )
        more = f", ... {len(others)} in all" if len(others) > _MAX_NAMED else ""
        nor = f" (nor {', '.join(others[:_MAX_NAMED])}{more})" if others else ""
        reason = f"{self._files.name_of(first)}: no such file{nor}"
        if self._files.is_remote and layouts == LAYOUTS:  # looking again would cost all the requests again
            self._missing.put(video, reason)
        raise VideoError(reason)

    def _find_uneven(self, places: Sequence[_Location], second: float) -> _Location | None:
        """A video in chunks of which none has the expected name; None if there is no chunk at all."""
        self.list_root()  # which spares listings of folders that are not there
        for place in places:
            chunks = self._list_chunks(place) if place.layout != "whole" else ()
            if not chunks:
                continue
            near = place._replace(listed=chunks)
            # By its name the chunk that holds the second, if it is long enough; of numbered ones, any one, which has
            # the length of all.
            number = near.chunk(second) if place.layout == "avion" else 0
            file = self._open(near, number)
            with contextlib.closing(self._opener(file, self._name(near, number))) as decoder:
                duration = decoder.duration
            if place.layout == "avion" and near.start(number) <= second < near.start(number) + duration:
                return near
            if place.layout == "chunks" and duration > place.seconds + self._tolerance:
                raise self._wrong_length(place, place.chunk(near.start(number)), duration)
            # The file to name is the chunk, since the video has others.
            raise VideoError(f"{self._name(place, place.chunk(second))}: no such file")
        return None

    def _list_chunks(self, place: _Location) -> tuple[tuple[float, str], ...]:
        """(start, file name) of the chunks that a video has, in order."""
        chunks = list[tuple[float, str]]()
        for name in self._files.names(place.folder):
            stem, dot, ending = name.rpartition(".")
            # Ours are named by whole numbers; seconds may have a fraction.
            digits = stem if place.layout == "chunks" else stem.replace(".", "", 1)
            if dot + ending in ENDINGS and digits.isdecimal():
                chunks.append((int(stem) * place.seconds if place.layout == "chunks" else float(stem), name))
        return tuple(sorted(chunks))

    # ----------------------------------------------------------------------------------------------
    # Chunks
    # ----------------------------------------------------------------------------------------------

    def _read_chunks(
        self,
        place: _Location,
        file: VideoFile,
        start: float,
        end: float,
        num_frames: int,
        rng: np.random.Generator | None,
        rule: str,
    ) -> Frames:
        """A clip that begins in the chunk that is open as ``file``."""
        first = place.chunk(start)
        # A clip that ends where a chunk begins does not touch that chunk; AVION's loader opens it all the same, so that
        # it cuts no frame from the chunk before.
        touched = end if rule == "avion" and np.isfinite(end) else np.nextafter(end, start)
        last = max(first, place.chunk(touched))
        with contextlib.ExitStack() as stack:
            decoders = dict[int, Decoder]()
            for number in range(first, last + 1):
                try:
                    part = file if number == first else self._open(place, number)
                except FileNotFoundError:
                    if not self._has_later(place, number - 1):
                        break
                    if place.layout == "avion" and place.listed is None:
                        raise _UnevenChunksError from None
                    raise VideoError(f"{self._name(place, number)}: no such file") from None
                # Names are starts in a listed video: pictures are missing where a chunk ends before the next begins.
                if number > first and place.listed is not None:
                    before, expected = decoders[number - 1], place.length(number - 1)
                    if before.duration < expected - _EXACT_SECONDS - 1 / before.fps:
                        raise VideoError(
                            f"{self._name(place, number - 1)}: has {before.duration:.2f} s, but the next chunk begins "
                            f"{expected:g} s after it; is one missing?"
                        )
                decoders[number] = stack.enter_context(
                    contextlib.closing(self._opener(part, self._name(place, number)))
                )
                self._check_length(place, number, decoders[number])
            final = max(decoders)
            stop = place.start(final) + decoders[final].duration
            if start >= stop:
                folder = self._files.name_of(place.folder)
                raise VideoError(f"{folder}: the clip begins at {start:.2f} s, the video ends at {stop:.2f} s")
            fps = decoders[first].fps
            numbers = clip_indices(start, end, stop, fps, num_frames, rng, rule, chunk_start=place.start(first))
            # Frames are numbered from the start of the video; each chunk has the numbers from its own start on.
            starts = np.array([place.start(number) for number in decoders])
            first_numbers = np.array([round(second * fps) for second in starts])
            row = np.maximum(np.searchsorted(first_numbers, numbers, side="right") - 1, 0)
            seconds = frame_times(numbers - first_numbers[row], fps)
            parts = [decoders[first + i].read_at(seconds[row == i]) for i in np.unique(row).tolist()]
        if len({part.shape[1:] for part in parts}) > 1:
            folder = self._files.name_of(place.folder)
            raise VideoError(f"{folder}: chunks {first} to {final} differ in picture size")
        return Frames(np.concatenate(parts), seconds + starts[row], numbers)

    def _has_later(self, place: _Location, number: int) -> bool:
        """Whether there are chunks after ``number``."""
        try:
            chunks = place.listed or self._list_chunks(place)
        except StorageError:  # reading is allowed, listing is not
            return False
        return bool(chunks) and chunks[-1][0] > place.start(number)

    def _check_length(self, place: _Location, number: int, decoder: Decoder) -> None:
        """Compare a chunk with the length by which chunks are chosen.

        Chunks of another length than ``chunk_seconds`` would silently show another moment than the one wanted.
        """
        expected, duration = place.length(number), decoder.duration
        if place.listed is not None or abs(duration - expected) <= _EXACT_SECONDS + 1 / decoder.fps:
            return
        # The last chunk holds what was left of the video. That it is the last takes one listing of each video's folder.
        is_last = self._last_chunks.get(place.path) == number
        if duration < expected and (is_last or not self._has_later(place, number)):
            if not is_last and place.layout != "avion" and number > 0:
                # A last chunk's own length does not show chunk_seconds; the one before it must have it.
                with contextlib.suppress(FileNotFoundError):
                    file, name = self._open(place, number - 1), self._name(place, number - 1)
                    with contextlib.closing(self._opener(file, name)) as before:
                        self._check_length(place, number - 1, before)
            self._last_chunks.put(place.path, number)
            return
        if place.layout == "avion":
            raise _UnevenChunksError
        if abs(duration - expected) > self._tolerance:
            raise self._wrong_length(place, number, duration)
        if not self._has_warned:
            log.warning(
                "%s: has %.2f s instead of %g: chunks that are not cut exactly show moments that are off by as much; "
                "tools/chunk_videos.py cuts exactly",
                *(self._name(place, number), duration, expected),
            )
            self._has_warned = True

    def _wrong_length(self, place: _Location, number: int, duration: float) -> VideoError:
        fault = f"{self._name(place, number)}: has {duration:.2f} s, but chunk_seconds is {place.length(number):g}"
        if not self._has_later(place, number):
            return VideoError(f"{fault}; set chunk_seconds=the length that the videos were cut to")
        if abs(duration - round(duration)) <= _EXACT_SECONDS and round(duration):
            return VideoError(f"{fault}; set chunk_seconds={round(duration)} if all but the last have this length")
        return VideoError(f"{fault}; tools/chunk_videos.py cuts chunks of equal length")


# --------------------------------------------------------------------------------------------------
# Windows over whole folders
# --------------------------------------------------------------------------------------------------


def sliding_windows(
    root: str, window: float, stride: float, decoder: str = "auto"
) -> tuple[list[tuple[str, float, float]], list[str]]:
    """List windows of ``window`` seconds every ``stride`` seconds over every video below a local folder.

    Returns (video, start, end) of each, and why some videos have none. Raises :class:`UserError` if there is no video.
    """
    _, opener = choose_decoder(decoder)
    clips = list[tuple[str, float, float]]()
    files, faults = list_videos(root)
    for video, path in files.items():
        try:
            with contextlib.closing(opener(path, str(path))) as opened:
                clips += [(video, *span) for span in window_spans(opened.duration, window, stride)]
        except VideoError as error:
            faults.append(str(error))
    return clips, faults


def window_spans(duration: float, window: float, stride: float) -> list[tuple[float, float]]:
    """(start, end) of the windows over ``duration`` seconds; the last one may be shorter."""
    if not (0 < window < np.inf and 0 < stride < np.inf):
        raise UserError(f"--window and --stride must be seconds above 0, not {window:g} and {stride:g}")
    # A frame's rounding must not add a window of next to nothing.
    count = 1 + max(0, int(np.ceil((duration - window) / stride - 1e-3)))
    return [(k * stride, min(k * stride + window, duration)) for k in range(count)]


def list_videos(root: str) -> tuple[dict[str, Path], list[str]]:
    """Videos below a folder by id (the path without its ending), and why some files can have no id."""
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"{root}: no such video folder" + ("; a remote one needs --clips" if "://" in root else ""))
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_ENDINGS and path.is_file())
    if not paths:
        raise UserError(f"{root}: not a single video file in it or below ({', '.join(VIDEO_ENDINGS)})")
    videos, faults = dict[str, Path](), list[str]()
    for path in paths:
        if path.suffix not in ENDINGS:  # its id alone would not lead to it again
            faults.append(f"{path}: its ending is in mixed case; rename it to {path.suffix.lower()}")
            continue
        video = path.relative_to(folder).with_suffix("").as_posix()
        if video in videos:
            raise UserError(f"{path}: {videos[video].name} is there as well; rename one")
        try:
            video.encode()  # no csv, index or features file can hold another name
        except UnicodeEncodeError:
            faults.append(f"{os.fsencode(path)!r}: its name is not UTF-8; rename it")
            continue
        videos[video] = path
    return videos, faults
