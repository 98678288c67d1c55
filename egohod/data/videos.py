"""Videos below a root: where each one is, clips that cross the borders of its chunks, windows that slide over them."""

from __future__ import annotations

import bisect
import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from egohod.data import containers
from egohod.data.decoders import Decoder, Opener, choose_decoder
from egohod.data.frames import MIN_SECONDS, clip_indices, frame_times
from egohod.data.storage import LocalCache, Recent, Source, StorageError, VideoError, open_root
from egohod.errors import UserError

__all__ = ["VideoError", "VideoStore", "read_clip"]

log = logging.getLogger(__name__)

LAYOUTS = ("chunks", "avion", "whole")
ENDINGS = tuple(each for ending in containers.ENDINGS for each in (ending, ending.upper()))
# These two are looked for in every layout and tree; all others only when a video is not found by them, since each look
# costs a request on a remote root.
_USUAL_ENDINGS = (".mp4", ".MP4")
# Rules whose loaders widen short clips of chunks; AVION's and LaViLa's widen none.
_WIDENING_RULES = ("middle", "upstream")
# A chunk's length may differ from chunk_seconds by a frame and this many seconds without a word; ...
_EXACT_SECONDS = 0.1
# ... by this share of it, and at most so many seconds, with a warning: chunks that were cut at key frames.
_INEXACT_SHARE, _INEXACT_SECONDS = 0.1, 2.0
# So many of the places where a missing video was looked for are named.
_NAMED = 6


class _Tree(NamedTuple):
    """Where a data set keeps its videos below the folder that one downloads it to."""

    ids: re.Pattern[str]
    """Which ids are the data set's."""
    path: str
    """A video's path below the root without its ending, made of the groups of ``ids``."""
    layouts: tuple[str, ...] = ("whole",)


_EPIC = re.compile(r"(?:P\d\d/)?(?P<video>(?P<person>P\d\d)_\d{2,3})")
_EGO4D = re.compile(r"(?P<video>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
_EGTEA_CLIP = re.compile(r"(?:[^/]+/)?(?P<video>(?P<session>[A-Z]+\d\d-R\d\d-\w+)-\d+-\d+-F\d+-F\d+)")
_EGTEA_SESSION = re.compile(r"(?P<video>[A-Z]+\d\d-R\d\d-\w+)")
_CHARADES = re.compile(r"(?P<video>[0-9A-Z]{5}(?:EGO)?)")
# In the order in which they are looked for. Patterns keep the list short for any one video: those of no data set here
# cost nothing more than the root itself.
TREES = (
    _Tree(re.compile(r"(?P<video>.+)", re.DOTALL), "{video}", LAYOUTS),
    # In every layout, since tools/chunk_videos.py and AVION's script keep the folders of what they cut: chunks of the
    # other data sets are below one folder, which can be the root.
    _Tree(_EPIC, "{person}/videos/{video}", LAYOUTS),
    _Tree(_EPIC, "{person}/{video}", LAYOUTS),
    _Tree(_EPIC, "EPIC-KITCHENS/{person}/videos/{video}", LAYOUTS),
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
    """Pictures of a clip and when each is on display."""

    pictures: np.ndarray
    """uint8 RGB [T, H, W, 3]."""
    seconds: np.ndarray
    """float64 [T], from the start of the video: the middle of the time that each is on display."""
    numbers: np.ndarray
    """int64 [T], counted from the start of the video at the file's average rate."""


class _Place(NamedTuple):
    """Where one video is."""

    layout: str
    path: str
    """Below the root, without the ending."""
    ending: str
    seconds: float
    """Length of a chunk."""
    listed: tuple[tuple[float, str], ...] | None = None
    """The chunks that start at other seconds than multiples of ``seconds``: their starts and file names."""

    @property
    def folder(self) -> str:
        """Where the chunks are."""
        return f"{self.path}{self.ending}" if self.layout == "avion" else self.path

    def chunk(self, second: float) -> int:
        """The number of the chunk that holds a second, 0 for a whole file."""
        if self.layout == "whole":
            return 0
        if self.listed is None:
            return int(second // self.seconds)
        return max(0, bisect.bisect_right(self.listed, second, key=lambda each: each[0]) - 1)

    def start(self, number: int) -> float:
        """The second at which a chunk begins."""
        return number * self.seconds if self.listed is None else self.listed[number][0]

    def length(self, number: int) -> float:
        """Seconds from the start of a chunk to that of the next one, infinite if there is none."""
        if self.listed is None:
            return self.seconds
        return self.listed[number + 1][0] - self.listed[number][0] if number + 1 < len(self.listed) else np.inf

    def key(self, number: int) -> str:
        """The file that holds a chunk."""
        if self.layout == "whole":
            return f"{self.path}{self.ending}"
        if self.listed is not None:
            return f"{self.folder}/{self.listed[number][1]}"
        # Chunks are called by their number, AVION's by the second they start at.
        name = f"{number:04d}" if self.layout == "chunks" else f"{number * self.seconds:.10g}"
        return f"{self.folder}/{name}{self.ending}"

    def start_of(self, name: str) -> float | None:
        """The second at which the chunk in the file ``name`` begins, None if it is no chunk."""
        stem, dot, ending = name.rpartition(".")
        if dot + ending not in ENDINGS:
            return None
        if self.layout == "chunks":
            return int(stem) * self.seconds if stem.isdecimal() else None
        return float(stem) if stem.replace(".", "", 1).isdecimal() else None


class _Form(NamedTuple):
    """One way in which videos may be kept."""

    tree: _Tree
    layout: str
    ending: str

    def place(self, video: str, chunk_seconds: float) -> _Place | None:
        """Where a video would be, None if it is of another data set."""
        found = self.tree.ids.fullmatch(video)
        return found and _Place(self.layout, self.tree.path.format(**found.groupdict()), self.ending, chunk_seconds)


class _UnevenChunksError(Exception):
    """A video whose chunks are named by the second at which they start, but do not start every chunk_seconds."""


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
    """The videos below ``root``, a local folder or an fsspec URI (see :func:`~egohod.data.storage.open_root`).

    Layouts: ``whole`` is ``root/<video>.mp4``; ``chunks`` is ``root/<video>/<0000>.mp4`` with the number of the chunk,
    each ``chunk_seconds`` long; ``avion`` is ``root/<video>.mp4/<0>.mp4`` with the second at which the chunk starts.
    ``auto`` takes for each video what is there. In each layout the folders in which data sets are published (``TREES``)
    are looked in as well. ``cache`` keeps files of a remote root.

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
        # They may come from a file of features or results, which was damaged.
        if layout not in ("auto", *LAYOUTS) or not 0 < chunk_seconds < np.inf:
            raise UserError(
                f"{root}: no layout {layout!r} with chunks of {chunk_seconds} s; see data.train.NAME.layout"
            )
        self.root = root
        self._files = open_root(root, cache)
        self._chunk_seconds = chunk_seconds
        self._min_clip_seconds = min_clip_seconds
        self._opener = opener
        layouts = LAYOUTS if layout == "auto" else (layout,)
        usual = [
            _Form(tree, each, ending)
            for tree in TREES
            for each in LAYOUTS
            if each in layouts and each in tree.layouts
            for ending in _USUAL_ENDINGS
        ]
        others = [ending for ending in ENDINGS if ending not in _USUAL_ENDINGS]
        kinds: tuple[str, ...] = ("whole", "chunks")
        if self._files.costly:
            others, kinds = [ending for ending in others if ending.islower()], ("whole",)
        rare = [_Form(TREES[0], each, ending) for each in kinds if each in layouts for ending in others]
        self._forms = usual + rare
        self._place_of: Recent[str, _Place] = Recent(65536)
        self._nowhere: Recent[str, str] = Recent(65536)
        self._last_of: Recent[str, int] = Recent(65536)
        self._warned = False

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
        is cut there; one that begins beyond it, a file that cannot be read, or a chunk that is not ``chunk_seconds``
        long raises :class:`VideoError`. Storage that cannot be used at all raises
        :class:`~egohod.data.storage.StorageError`.
        """
        video = self._checked(video_id)
        with self._naming(video):
            place, source = self._find(video, start)
            end = self._widened(place, start, end, rule)
            if place.layout == "whole":
                return read_clip(self._opener, source, self._name(place, 0), start, end, num_frames, rng, rule)
            try:
                return self._read_chunks(place, source, start, end, num_frames, rng, rule)
            except _UnevenChunksError:
                place, source = self._open_listed(video, place, start)
                return self._read_chunks(place, source, start, end, num_frames, rng, rule)

    def end_of(self, video_id: str, start: float, end: float, rule: str = "middle") -> float:
        """The end of a clip as :meth:`read` takes it: later than ``end`` if a short clip is widened.

        Raises as :meth:`read` does.
        """
        video = self._checked(video_id)
        place = self._place_of.get(video)
        with self._naming(video):
            return self._widened(place or self._find(video, start)[0], start, end, rule)

    def locate(self, video_id: str, start: float, end: float | None = None) -> list[Source]:
        """The files in which a clip begins and, where it is another one, ends; without ``end`` the former.

        Nothing is decoded unless chunks have to be measured. Raises as :meth:`read` does.
        """
        video = self._checked(video_id)
        with self._naming(video):
            place, source = self._find(video, start)
            first = place.chunk(start)
            last = first if end is None or np.isinf(end) else place.chunk(np.nextafter(end, start))
            if last > first:
                with contextlib.suppress(FileNotFoundError):  # a clip may end beyond the video
                    return [source, self._open(place, last)]
            return [source]

    def read_file(self, video_id: str, numbers: Callable[[int], np.ndarray]) -> np.ndarray:
        """Frames of a video that is one whole file, uint8 [..., H, W, 3].

        ``numbers`` gives the numbers of the frames, int64 [...], for the number of frames that there are; higher ones
        are black frames. Raises as :meth:`read` does.
        """
        video = self._checked(video_id)
        with self._naming(video):
            place, source = self._find(video, 0.0, ("whole",))
            decoder = self._opener(source, self._name(place, 0))
            try:
                total = max(1, round(decoder.duration * decoder.fps))
                wanted = numbers(total)
                # A frame that is shown several times, as where windows overlap, is decoded once.
                distinct, row = np.unique(np.minimum(wanted, total - 1), return_inverse=True)
                pictures = decoder.read_at(frame_times(distinct, decoder.fps))[row.reshape(wanted.shape)]
                pictures[wanted >= total] = 0
                return pictures
            finally:
                decoder.close()

    def _checked(self, video_id: str) -> str:
        path = PurePosixPath(video_id)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in video_id:
            raise VideoError(f"video id '{video_id}' leads out of {self.root}")
        return str(path)

    @contextlib.contextmanager
    def _naming(self, video: str) -> Iterator[None]:
        """Name the video in errors of the file system: a name too long, a folder that may not be entered."""
        try:
            yield
        except OSError as error:
            raise VideoError(f"{self._files.name_of(video)}: cannot be read: {error.strerror or error}") from error

    def _name(self, place: _Place, number: int) -> str:
        return self._files.name_of(place.key(number))

    def _open(self, place: _Place, number: int) -> Source:
        return self._files.open(place.key(number), size_first=place.layout == "whole")

    def _widened(self, place: _Place, start: float, end: float, rule: str) -> float:
        """The end of a clip that may be too short."""
        least = self._min_clip_seconds
        if least is None:
            least = MIN_SECONDS if place.layout != "whole" and rule in _WIDENING_RULES else 0.0
        return max(end, start + least)

    # ----------------------------------------------------------------------------------------------
    # Where a video is
    # ----------------------------------------------------------------------------------------------

    def _find(self, video: str, second: float, layouts: Sequence[str] = LAYOUTS) -> tuple[_Place, Source]:
        """Where a video is, and the file that holds a second of it."""
        known = self._place_of.get(video)
        if known is not None and known.layout in layouts:
            with contextlib.suppress(FileNotFoundError):
                return known, self._open(known, known.chunk(second))
        if (why := self._nowhere.get(video)) is not None:
            raise VideoError(why)
        for form, place in self._candidates(video, layouts):
            try:
                source = self._open(place, place.chunk(second))
            except FileNotFoundError:
                continue
            # Elsewhere than on a disk a wrong guess costs a round trip, and the next video is most likely where this
            # one is. On a disk the order stays fixed: what is found must not depend on what was read before.
            if self._files.costly:
                self._forms.sort(key=lambda each: each != form)
            return self._place_of.put(video, place), source
        return self._find_uneven(video, second, layouts)

    def _candidates(self, video: str, layouts: Sequence[str]) -> Iterator[tuple[_Form, _Place]]:
        for form in [form for form in self._forms if form.layout in layouts]:
            place = form.place(video, self._chunk_seconds)
            if place is not None:
                yield form, place

    def _find_uneven(self, video: str, second: float, layouts: Sequence[str]) -> tuple[_Place, Source]:
        """A video of which no file has the expected name: in chunks of another length, or not there at all."""
        places = list(dict.fromkeys(place for _, place in self._candidates(video, layouts)))
        for place in places:
            chunks = self._listed(place) if place.layout != "whole" else ()
            if not chunks:
                continue
            near = place._replace(listed=chunks)
            # By its name the chunk that holds the second, if it is long enough; of numbered ones, one that tells the
            # length of all.
            number = near.chunk(second) if place.layout == "avion" else 0
            source = self._open(near, number)
            decoder = self._opener(source, self._name(near, number))
            duration = decoder.duration
            decoder.close()
            if place.layout == "avion" and near.start(number) <= second < near.start(number) + duration:
                return self._place_of.put(video, near), source
            if place.layout == "chunks" and duration > place.seconds + _tolerance(place.seconds):
                raise self._wrong_length(place, place.chunk(near.start(number)), duration)
            # The file to name is the chunk, since the video has others.
            raise VideoError(f"{self._name(place, place.chunk(second))}: no such file")
        # The shortest way to keep a video is the one to name.
        places.sort(key=lambda place: place.layout != "whole")
        first, *others = dict.fromkeys(
            place.key(place.chunk(second)) for place in places if place.ending == _USUAL_ENDINGS[0]
        )
        more = f", ... {len(others)} in all" if len(others) > _NAMED else ""
        nor = f" (nor {', '.join(others[:_NAMED])}{more})" if others else ""
        why = f"{self._files.name_of(first)}: no such file{nor}"
        if self._files.costly and layouts == LAYOUTS:
            self._nowhere.put(video, why)
        raise VideoError(why)

    def _listed(self, place: _Place) -> tuple[tuple[float, str], ...]:
        """Starts and names of the chunks that are there, in their order."""
        names = self._files.names(place.folder)
        return tuple(sorted((start, name) for name in names if (start := place.start_of(name)) is not None))

    def _open_listed(self, video: str, place: _Place, second: float) -> tuple[_Place, Source]:
        """The same video with its chunks as they are named."""
        place = self._place_of.put(video, place._replace(listed=self._listed(place)))
        return place, self._open(place, place.chunk(second))

    # ----------------------------------------------------------------------------------------------
    # Chunks
    # ----------------------------------------------------------------------------------------------

    def _read_chunks(
        self,
        place: _Place,
        source: Source,
        start: float,
        end: float,
        num_frames: int,
        rng: np.random.Generator | None,
        rule: str,
    ) -> Frames:
        """A clip that begins in the chunk that is open as ``source``."""
        first = place.chunk(start)
        # A clip that ends where a chunk begins does not touch that chunk; AVION's loader opens it all the same, so that
        # it cuts no frame from the chunk before.
        touched = end if rule == "avion" and np.isfinite(end) else np.nextafter(end, start)
        last = max(first, place.chunk(touched))
        decoders: dict[int, Decoder] = {}
        try:
            for number in range(first, last + 1):
                try:
                    part = source if number == first else self._open(place, number)
                except FileNotFoundError:
                    if not self._has_later(place, number - 1):
                        break
                    if place.layout == "avion" and place.listed is None:
                        raise _UnevenChunksError from None
                    raise VideoError(f"{self._name(place, number)}: no such file") from None
                if number > first:
                    self._check_gap(place, number - 1, decoders[number - 1])
                decoders[number] = self._opener(part, self._name(place, number))
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
            firsts = np.array([round(each * fps) for each in starts])
            row = np.maximum(np.searchsorted(firsts, numbers, side="right") - 1, 0)
            seconds = frame_times(numbers - firsts[row], fps)
            parts = [decoders[first + i].read_at(seconds[row == i]) for i in np.unique(row).tolist()]
        finally:
            for decoder in decoders.values():
                decoder.close()
        if len({part.shape[1:] for part in parts}) > 1:
            folder = self._files.name_of(place.folder)
            raise VideoError(f"{folder}: chunks {first} to {final} differ in picture size")
        return Frames(np.concatenate(parts), seconds + starts[row], numbers)

    def _has_later(self, place: _Place, number: int) -> bool:
        """Whether there are chunks after ``number``."""
        try:
            chunks = place.listed or self._listed(place)
        except StorageError:  # reading is allowed, listing is not
            return False
        return bool(chunks) and chunks[-1][0] > place.start(number)

    def _check_length(self, place: _Place, number: int, decoder: Decoder) -> None:
        """Compare a chunk with the length on which the choice of chunks rests.

        Chunks of another length than ``chunk_seconds`` would show another moment than the one wanted, without a word.
        """
        expected, found = place.length(number), decoder.duration
        if place.listed is not None or abs(found - expected) <= _EXACT_SECONDS + 1 / decoder.fps:
            return
        # The last chunk holds what was left of the video. To know it takes a look at the folder, once for each video.
        known = self._last_of.get(place.path) == number
        if found < expected and (known or not self._has_later(place, number)):
            if not known:
                self._check_previous(place, number)
                self._last_of.put(place.path, number)
            return
        if place.layout == "avion":
            raise _UnevenChunksError
        if abs(found - expected) > _tolerance(expected):
            raise self._wrong_length(place, number, found)
        if not self._warned:
            log.warning(
                "%s: has %.2f s instead of %g: chunks that are not cut exactly show moments that are off by as much; "
                "tools/chunk_videos.py cuts exactly",
                *(self._name(place, number), found, expected),
            )
            self._warned = True

    def _check_gap(self, place: _Place, number: int, decoder: Decoder) -> None:
        """Refuse a clip that goes on where pictures are missing between chunks whose names tell their starts."""
        expected, found = place.length(number), decoder.duration
        if place.listed is not None and found < expected - _EXACT_SECONDS - 1 / decoder.fps:
            raise VideoError(
                f"{self._name(place, number)}: has {found:.2f} s, but the next chunk begins {expected:g} s after it; "
                "is one missing?"
            )

    def _check_previous(self, place: _Place, number: int) -> None:
        """Measure the chunk before the last one, whose own length tells nothing."""
        if place.layout == "avion" or number == 0:
            return
        with contextlib.suppress(FileNotFoundError):
            decoder = self._opener(self._open(place, number - 1), self._name(place, number - 1))
            try:
                self._check_length(place, number - 1, decoder)
            finally:
                decoder.close()

    def _wrong_length(self, place: _Place, number: int, found: float) -> VideoError:
        name, expected = self._name(place, number), place.length(number)
        if not self._has_later(place, number):
            cure = "the length that the videos were cut to"
        elif abs(found - round(found)) <= _EXACT_SECONDS and round(found):
            cure = f"{round(found)} if all but the last have this length"
        else:
            return VideoError(
                f"{name}: has {found:.2f} s, but chunk_seconds is {expected:g}; tools/chunk_videos.py cuts chunks of "
                "equal length"
            )
        return VideoError(f"{name}: has {found:.2f} s, but chunk_seconds is {expected:g}; set chunk_seconds={cure}")


def _tolerance(expected: float) -> float:
    """By how much a chunk may differ from its expected length."""
    return min(_INEXACT_SHARE * expected, _INEXACT_SECONDS)


def sliding(
    root: str, window: float, stride: float, decoder: str = "auto"
) -> tuple[list[tuple[str, float, float]], list[str]]:
    """Windows of ``window`` seconds every ``stride`` seconds over every video below a local folder.

    (video, start, end) of each, and why some videos have none. Raises :class:`UserError` if there is no video.
    """
    _, opener = choose_decoder(decoder)
    clips = list[tuple[str, float, float]]()
    files, faults = video_files(root)
    for video, path in files.items():
        try:
            opened = opener(path, str(path))
        except VideoError as error:
            faults.append(str(error))
            continue
        duration = opened.duration
        opened.close()
        clips += [(video, *each) for each in spans(duration, window, stride)]
    return clips, faults


def spans(duration: float, window: float, stride: float) -> list[tuple[float, float]]:
    """The windows over a video of that many seconds: (start, end)."""
    if not (window > 0 and stride > 0):
        raise UserError(f"--window and --stride must be above 0, not {window:g} and {stride:g}")
    # A frame's rounding must not add a window of next to nothing.
    count = 1 + max(0, int(np.ceil((duration - window) / stride - 1e-3)))
    return [(k * stride, min(k * stride + window, duration)) for k in range(count)]


def video_files(root: str) -> tuple[dict[str, Path], list[str]]:
    """Videos below a folder by their id, which is the path without its ending, and why some can have none."""
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"{root}: no such video folder" + ("; a remote one needs --clips" if "://" in root else ""))
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in containers.ENDINGS and path.is_file())
    if not paths:
        raise UserError(f"{root}: not a single video file in it or below ({', '.join(containers.ENDINGS)})")
    found, faults = dict[str, Path](), list[str]()
    for path in paths:
        if path.suffix not in ENDINGS:  # by its id alone it could not be found again
            faults.append(f"{path}: its ending is in mixed case; rename it to {path.suffix.lower()}")
            continue
        video = path.relative_to(folder).with_suffix("").as_posix()
        if video in found:
            raise UserError(f"{path}: {found[video].name} is there as well; rename one")
        try:
            video.encode()  # no csv, index or features file can hold another name
        except UnicodeEncodeError:
            faults.append(f"{os.fsencode(path)!r}: its name is not UTF-8; rename it")
            continue
        found[video] = path
    return found, faults
