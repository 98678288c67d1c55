"""A folder of camera files to a folder of chunks, over several processes.

    out/<video id>/<0000>.mp4            a video's folder appears under its name only when it is complete
    out/.chunk_videos/settings.json      how the chunks were made; other settings are refused
    out/.chunk_videos/done.jsonl         a line for each video: its source's size, what was made of it
    out/.chunk_videos/parts/             videos at work, removed at the end

A video id is the file's path below the input folder without its ending. Long videos are cut in several ranges at once,
so that one of them keeps all processes busy.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from egohod.data.chunking import ChunkError, ChunkSettings, Probe, Written, probe, write_chunks
from egohod.data.containers import ENDINGS
from egohod.data.text_files import read_lines
from egohod.data.video import VideoError
from egohod.runtime import follow_parent, locked

log = logging.getLogger(__name__)

_OWN_FOLDER = ".chunk_videos"
# Work is handed out in ranges of about this length: short enough to share out, long enough that seeking is free.
_RANGE_SECONDS = 300.0
_TELL_EVERY = 2.0
_SAMPLES, _SAMPLE_SECONDS = 6, 4.0


# --------------------------------------------------------------------------------------------------
# What there is
# --------------------------------------------------------------------------------------------------


class Video(NamedTuple):
    """A camera file and the id of its chunks."""

    video_id: str
    path: Path


def find_videos(
    root: Path, pattern: str | None = None, names: Path | None = None, follow_links: bool = False
) -> list[Video]:
    """The videos below ``root``, in order of their ids; hidden files are left out.

    ``pattern`` (shell style, for the path below ``root``) takes the place of the usual video endings, ``names``, a text
    file with a path below ``root`` on each line, that of looking. Links that lead out of ``root`` are left out, and
    said, unless ``follow_links``.

    Raises :class:`ChunkError` for a folder or list that cannot be read, and for ids that would be in each other's way.
    """
    if not root.is_dir():
        raise ChunkError(f"{root}: no such folder")
    paths = _listed(root, names) if names is not None else list(_walk(root, follow_links))
    if pattern is not None:
        paths = [path for path in paths if fnmatch.fnmatchcase(path.as_posix(), pattern)]
    elif names is None:
        paths = [path for path in paths if path.suffix.lower() in ENDINGS]
    if not follow_links:
        real = root.resolve()
        outside = [path for path in paths if not (root / path).resolve().is_relative_to(real)]
        if outside:
            log.warning(
                "%d links lead out of %s and are left out (--follow_links), e.g. %s", len(outside), root, outside[0]
            )
        paths = sorted(set(paths) - set(outside))
    if not paths:
        raise ChunkError(f"{root}: no videos" + (f" that match '{pattern}'" if pattern else ""))
    videos = [Video(path.with_suffix("").as_posix(), root / path) for path in paths]
    _check_ids(videos)
    return sorted(videos)


def _walk(root: Path, follow_links: bool) -> Iterator[Path]:
    seen = {os.path.realpath(root)}

    def refuse(error: OSError) -> None:
        raise ChunkError(f"{error.filename}: cannot be read: {error.strerror}")

    for folder, folders, files in os.walk(root, followlinks=follow_links, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if follow_links:  # a link may lead in a circle
            fresh = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
            folders[:] = [name for name in folders if fresh[name] not in seen]
            seen.update(fresh.values())
        for name in files:
            if not name.startswith("."):
                yield Path(folder, name).relative_to(root)


def _listed(root: Path, names: Path) -> list[Path]:
    paths = []
    for number, line in enumerate(read_lines(names), 1):
        if not line.strip():
            continue
        path = Path(os.path.normpath(line))
        if path.is_absolute() or ".." in path.parts:
            raise ChunkError(f"{names}: line {number}: '{line}' is not a path below {root}")
        if not os.path.isfile(root / path):  # unlike Path's, no error for a name that is too long
            raise ChunkError(f"{names}: line {number}: {root / path}: no such file")
        paths.append(path)
    return sorted(set(paths))


def _check_ids(videos: Sequence[Video]) -> None:
    by_id: dict[str, Path] = {}
    for video_id, path in videos:
        try:
            video_id.encode()
        except UnicodeEncodeError as error:
            raise ChunkError(f"{os.fsencode(path)!r}: its name is not UTF-8, rename it") from error
        if video_id in by_id:
            raise ChunkError(f"{by_id[video_id]} and {path} would both become '{video_id}'; rename one")
        if PurePosixPath(video_id).parts[0] == _OWN_FOLDER:
            raise ChunkError(f"{path}: '{_OWN_FOLDER}' is this program's own; rename it")
        by_id[video_id] = path
    for video_id, path in videos:
        for parent in PurePosixPath(video_id).parents:
            other = by_id.get(parent.as_posix())
            if other:
                raise ChunkError(f"{other}: its chunks would lie in one folder with those of {path}; rename one")


# --------------------------------------------------------------------------------------------------
# Where it goes
# --------------------------------------------------------------------------------------------------


class Output:
    """The folder of chunks. Nothing is written before :meth:`claim`.

    Raises :class:`ChunkError` if the folder was made with other settings, holds anything else, or lies below ``root``.
    """

    def __init__(self, folder: Path, settings: ChunkSettings, root: Path) -> None:
        self.folder = folder
        self._settings = settings
        self._own = folder / _OWN_FOLDER
        if folder.resolve().is_relative_to(root.resolve()):
            raise ChunkError(f"{folder}: lies in the input folder {root}; choose another output folder")
        try:
            self._made = self._read()
        except OSError as error:
            raise ChunkError(f"{folder}: cannot be read: {error.strerror or error}") from error

    def is_done(self, video: Video) -> bool:
        """Whether the chunks of a video are there; an error if they are those of another file."""
        if not self._final(video).is_dir():
            return False
        made_of = self._made.get(video.video_id)
        if made_of is not None and made_of != video.path.stat().st_size:
            raise ChunkError(
                f"{self._final(video)}: made of another file than {video.path} ({made_of:,} bytes); "
                "remove the chunks or rename the file"
            )
        return True

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Within, this process alone writes here. Half-made videos, of now or earlier, are removed at both ends."""
        with contextlib.ExitStack() as held:
            try:
                self._own.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self._own / "lock"))
            except BlockingIOError as error:
                raise ChunkError(f"{self.folder}: another process is writing here") from error
            except OSError as error:
                raise _cannot_write(self.folder, error) from error
            held.callback(self._clear)
            try:
                self._clear()
                part = self._own / "settings.json.part"
                part.write_text(json.dumps(asdict(self._settings), indent=1) + "\n", encoding="utf-8")
                part.replace(self._own / "settings.json")
                yield
            except BrokenPipeError:  # of the program's output, there is no other pipe
                raise
            except OSError as error:
                raise _cannot_write(self.folder, error) from error

    def part(self, video: Video) -> Path:
        """Where a video's chunks are written."""
        return self._own / "parts" / video.video_id

    def begin(self, video: Video) -> None:
        """Make room for a video."""
        self.part(video).mkdir(parents=True)

    def finish(self, video: Video, source: Probe, written: Written) -> None:
        """Show a complete video under its name."""
        final = self._final(video)
        final.parent.mkdir(parents=True, exist_ok=True)
        self.part(video).rename(final)
        line = {"video_id": video.video_id, "source_bytes": source.bytes, **written._asdict()}
        with (self._own / "done.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def drop(self, video: Video) -> None:
        """Remove what there is of a video that cannot be made."""
        shutil.rmtree(self.part(video), ignore_errors=True)

    def _final(self, video: Video) -> Path:
        return self.folder / self._settings.folder(video.video_id)

    def _clear(self) -> None:
        shutil.rmtree(self._own / "parts", ignore_errors=True)

    def _read(self) -> dict[str, int]:
        """Bytes of the source of each video that is done."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ChunkError(f"{self.folder}: not a folder")
        file = self._own / "settings.json"
        if not file.exists():
            # An own folder without settings is what is left of a run that was killed as it began.
            if self.folder.exists() and any(path.name != _OWN_FOLDER for path in self.folder.iterdir()):
                raise ChunkError(f"{self.folder}: not empty and not made by chunk_videos; choose another output folder")
            return {}
        try:
            made = json.loads(file.read_bytes())
            other = [f"{k} {made[k]} (asked: {v})" for k, v in asdict(self._settings).items() if made[k] != v]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ChunkError(f"{file}: damaged ({error}); choose another output folder") from error
        if other:
            raise ChunkError(f"{self.folder}: holds chunks with {', '.join(other)}; choose another output folder")
        return self._sizes()

    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        file = self._own / "done.jsonl"
        for line in file.read_bytes().split(b"\n") if file.exists() else ():
            # A line may be cut short by a full disk, or damaged.
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                sizes[entry["video_id"]] = int(entry["source_bytes"])
        return sizes


def _cannot_write(folder: Path, error: OSError) -> ChunkError:
    return ChunkError(f"cannot write {folder}: {error.strerror or error}; what is done is kept, run again to go on")


# --------------------------------------------------------------------------------------------------
# Work
# --------------------------------------------------------------------------------------------------

_stop: Any = None
_seconds_done: Any = None


class _Stopped(BaseException):
    """The main process wants no more. It is no ``Exception``, so that it is not taken for what a file raises."""


def _begin_worker(stop: Any, seconds_done: Any) -> None:
    global _stop, _seconds_done
    _stop, _seconds_done = stop, seconds_done
    follow_parent()


def _tell(seconds: float) -> None:
    if _stop.is_set():
        raise _Stopped
    with _seconds_done.get_lock():
        _seconds_done.value += seconds


def _probe(path: Path) -> Probe | str:
    if _stop.is_set():
        raise _Stopped
    try:
        return probe(path)
    except VideoError as error:
        return str(error)


def _write(path: Path, folder: Path, settings: ChunkSettings, first: int, last: int | None) -> Written | str:
    try:
        return write_chunks(path, folder, settings, first, last, _tell)
    except VideoError as error:
        return str(error)


def _sample(path: Path, settings: ChunkSettings, seconds: float) -> tuple[float, float] | str:
    """Chunk a few seconds from the middle of a file: time spent and bytes made, each per second of video."""
    settings = replace(settings, seconds=_SAMPLE_SECONDS)
    first = int(seconds / 2 // _SAMPLE_SECONDS)
    last = None if 0 < seconds < 2 * _SAMPLE_SECONDS else first + 1
    times: list[float] = []
    lengths: list[float] = []

    def note(length: float) -> None:
        _tell(0)
        times.append(time.perf_counter())
        lengths.append(length)

    try:
        with tempfile.TemporaryDirectory() as folder:
            written = write_chunks(path, Path(folder), settings, first, last, note)
    except VideoError as error:
        return str(error)
    # From the first frame on: seeking to the sample is no part of the work.
    spent = (times[-1] - times[0]) / max(sum(lengths[1:]), 1e-3)
    return spent, written.bytes / written.seconds


class Workers:
    """Processes that probe and write. Leaving the context stops them within a frame, whatever they do."""

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.number = number
        self._stop, self._seconds = context.Event(), context.Value("d", 0.0)
        self._pool = ProcessPoolExecutor(number, context, _begin_worker, (self._stop, self._seconds))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    @property
    def seconds(self) -> float:
        """Seconds of video done so far by all."""
        return float(self._seconds.value)

    def run(
        self, function: Callable[..., Any], tasks: Iterator[tuple[Any, ...]], wake: Callable[[], None]
    ) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """``function(*task[1:])`` of each task as (task, result), as they are done; ``wake`` is called now and then.

        Tasks are taken from the iterator only when there is room for them.
        """
        running: dict[Future[Any], tuple[Any, ...]] = {}
        try:
            while True:
                while len(running) < 2 * self.number and (task := next(tasks, None)) is not None:
                    running[self._pool.submit(function, *task[1:])] = task
                if not running:
                    return
                done = wait(running, _TELL_EVERY, FIRST_COMPLETED).done
                # What failed last: the others' work is then not lost with it.
                for future in sorted(done, key=lambda each: each.exception() is not None):
                    yield running.pop(future), future.result()
                wake()
        except BrokenProcessPool as error:
            raise ChunkError("a working process was killed (too little memory?); run again to go on") from error

    def probe(
        self, videos: Sequence[Video], wake: Callable[[int], None]
    ) -> tuple[dict[Video, Probe], dict[Video, str]]:
        """What each file is, and why some are none; ``wake`` hears how many are done."""
        good: dict[Video, Probe] = {}
        bad: dict[Video, str] = {}
        tasks = ((video, video.path) for video in videos)
        for (video, _), result in self.run(_probe, tasks, lambda: wake(len(good) + len(bad))):
            if isinstance(result, str):
                bad[video] = result
            else:
                good[video] = result
        # In the order of the videos, not in that of the answers: what is made first is then the same every time.
        return {video: good[video] for video in videos if video in good}, bad


@dataclass
class Summary:
    """What a run did: videos made, their length and size, and why others could not be."""

    videos: int = 0
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    faults: dict[Video, str] = field(default_factory=dict)


class Interim(NamedTuple):
    """How far a run is."""

    seconds: float
    total_seconds: float
    videos: int
    total_videos: int


def write_videos(
    probes: dict[Video, Probe],
    output: Output,
    settings: ChunkSettings,
    workers: Workers,
    strict: bool = False,
    progress: Callable[[Interim], None] | None = None,
) -> Summary:
    """Write the chunks of all videos into a claimed ``output``.

    A video that is damaged is left out and named in the summary, or with ``strict`` raised as :class:`VideoError`.
    Raises :class:`ChunkError` if the output cannot be written.
    """
    summary = Summary()
    total = sum(each.seconds for each in probes.values())
    ranges = {video: split(each.seconds, settings) for video, each in probes.items()}
    written: dict[Video, list[Written]] = defaultdict(list)
    open_ranges = {video: len(parts) for video, parts in ranges.items()}

    def tasks() -> Iterator[tuple[Any, ...]]:
        for video, parts in ranges.items():
            output.begin(video)
            for first, last in parts:
                if video in summary.faults:  # its other ranges are not worth their time
                    open_ranges[video] -= 1
                else:
                    yield video, video.path, output.part(video), settings, first, last
            if not open_ranges[video]:
                output.drop(video)

    def wake() -> None:
        if progress:
            ready = summary.videos + len(summary.faults)
            progress(Interim(min(workers.seconds, total), total, ready, len(probes)))

    for (video, *_), result in workers.run(_write, tasks(), wake):
        open_ranges[video] -= 1
        if isinstance(result, str):
            if strict:
                raise VideoError(result)
            if video not in summary.faults:
                log.warning("left out: %s", result)
                summary.faults[video] = result
        else:
            written[video].append(result)
        if open_ranges[video]:
            continue
        parts = written.pop(video, [])
        if video in summary.faults:
            output.drop(video)
            continue
        made = Written(sum(p.seconds for p in parts), sum(p.chunks for p in parts), sum(p.bytes for p in parts))
        output.finish(video, probes[video], made)
        summary.videos += 1
        summary.seconds += made.seconds
        summary.bytes_in += probes[video].bytes
        summary.bytes_out += made.bytes
    return summary


def split(seconds: float, settings: ChunkSettings) -> list[tuple[int, int | None]]:
    """Ranges of chunks, first and behind the last, that a video is made in; the last one is open.

    The length a header states may be wrong by a little: the open range begins well before it.
    """
    each = max(1, round(_RANGE_SECONDS / settings.seconds))
    whole = max(1, int(seconds / settings.seconds) // each)
    edges = [number * each for number in range(whole)]
    return list(zip(edges, [*edges[1:], None], strict=True))


class Estimate(NamedTuple):
    """What a run would take: hours with the given workers, bytes, and files that could not be sampled."""

    hours: float
    bytes: float
    faults: list[str]


def estimate(probes: dict[Video, Probe], settings: ChunkSettings, workers: Workers) -> Estimate:
    """Chunk a few seconds of the most common kinds of file, and scale up. Writes only to a temporary folder."""
    kinds: dict[tuple[str, int, int, float], list[Video]] = defaultdict(list)
    for video, each in probes.items():
        kinds[each.codec, each.width, each.height, round(each.fps)].append(video)
    lengths = {kind: sum(probes[video].seconds for video in videos) for kind, videos in kinds.items()}
    common = sorted(kinds, key=lambda kind: -lengths[kind])[:_SAMPLES]
    tasks = ((kind, video.path, settings, probes[video].seconds) for kind in common for video in [_middle(kinds[kind])])
    results = {task[0]: result for task, result in workers.run(_sample, tasks, lambda: None)}
    measured = {kind: result for kind, result in results.items() if not isinstance(result, str)}
    faults = [result for result in results.values() if isinstance(result, str)]
    if not measured:
        return Estimate(0.0, 0.0, faults)

    def pixels(kind: tuple[str, int, int, float]) -> float:
        return kind[1] * kind[2] * kind[3]

    # Kinds that were not sampled: time by their pixels, bytes by their length.
    seconds = sum(lengths[kind] for kind in measured) or 1.0
    per_pixel = sum(cost / pixels(kind) * lengths[kind] for kind, (cost, _) in measured.items()) / seconds
    per_second = sum(size * lengths[kind] for kind, (_, size) in measured.items()) / seconds
    spent = size = 0.0
    for kind, length in lengths.items():
        cost, weight = measured.get(kind, (per_pixel * pixels(kind), per_second))
        spent, size = spent + cost * length, size + weight * length
    return Estimate(spent / workers.number / 3600, size, faults)


def _middle(videos: Sequence[Video]) -> Video:
    return videos[len(videos) // 2]
