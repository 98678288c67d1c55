"""Clips as columns, and the reading of their frames. Nothing here needs PyTorch.

A :class:`ClipTable` holds Arrow buffers and numpy arrays only. There is no Python object per row whose reference
count a worker process could touch, so millions of rows are shared with forked workers at no cost.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from egohod.data import text_files
from egohod.data.config import SourceConfig
from egohod.data.decoders import Opener
from egohod.data.detections import EDGES, ROLES, BoxTable
from egohod.data.storage import LocalCache
from egohod.data.text_files import nearest, read_columns, read_header, seconds, text_column
from egohod.data.videos import MIN_SECONDS, Frames, VideoStore
from egohod.errors import UserError

log = logging.getLogger(__name__)

# Absolute, climbing or empty ids; a drive letter is absolute too.
_UNSAFE_ID = r"^\s*$|^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)|\x00"
# A line break, and what looks like a further row: an id, two times and their separators.
_SWALLOWED = r"[\r\n][^,\t\r\n]+[,\t]\s*[\d.:]+\s*[,\t]\s*[\d.:]+\s*[,\t]"
_SAMPLE = 65536
EXCLUDE_COLUMNS = ("video_id", "start_second", "end_second")


@dataclass(frozen=True)
class RawClips:
    """The entries of an annotation file in its order, before any is checked: what a parser of ``formats/`` returns.

    ``columns`` holds video_id, text and all further columns as strings; ``times`` start and end, as strings where a
    person may have written them, else float64 [N]; ``numbers`` int64 [N] counts the entries as ``unit`` (row, line,
    ...) of the file from 1; ``time_names`` is what the file calls start and end. ``broken`` are messages about entries
    that cannot be parsed at all. With ``class_names`` the texts are names of classes, not narrations.
    """

    columns: pa.Table
    times: tuple[pa.ChunkedArray | np.ndarray, pa.ChunkedArray | np.ndarray]
    numbers: np.ndarray
    unit: str = "row"
    time_names: tuple[str, str] = ("start_second", "end_second")
    broken: tuple[str, ...] = ()
    class_names: bool = False


@dataclass(frozen=True)
class ClipRow:
    """One clip: its place in a video, and its narrations.

    ``start`` and ``end`` are seconds; ``texts`` has one entry, or several for a list literal; ``dataset`` is empty
    when the file has no such column; ``row`` counts the file's data rows from 1, for messages.
    """

    video_id: str
    start: float
    end: float
    texts: tuple[str, ...]
    dataset: str
    row: int


@dataclass(frozen=True)
class TableReport:
    """Counts of a table: its ``rows``, those ``left_out`` by reason, and rows that were repaired."""

    rows: int
    short: int = 0
    backwards: int = 0
    negative_start: int = 0
    list_literals: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        notes = [
            (self.short, f"shorter than {MIN_SECONDS:g} s"),
            (self.backwards, f"ended before they began and were given {MIN_SECONDS:g} s"),
            (self.negative_start, "began before 0 s and were moved there"),
            (self.list_literals, "with several narrations"),
            *((count, f"left out: {why}") for why, count in self.left_out.items()),
        ]
        return ", ".join([f"{self.rows:,} clips", *(f"{count:,} {what}" for count, what in notes if count)])


class ClipTable:
    """Clips with their narrations, in the order of the file. :func:`egohod.data.formats.read_clips` reads one."""

    def __init__(
        self,
        path: Path,
        columns: pa.Table,
        start: np.ndarray,
        end: np.ndarray,
        numbers: np.ndarray | None = None,
        unit: str = "row",
        report: TableReport | None = None,
    ) -> None:
        self.path = path
        self.report = report or TableReport(len(start))
        self.start, self.end = start, end
        """Seconds, float64 [N]; an infinite end is that of the video."""
        self._unit = unit
        # Contiguous arrays: looking up a row of a chunked column costs a search. What repeats is stored once.
        self._columns = {name: _compact(columns[name]) for name in columns.column_names}
        self._rows = np.arange(1, len(start) + 1) if numbers is None else numbers

    @classmethod
    def of(
        cls,
        path: Path,
        videos: Sequence[str],
        start: Sequence[float] | np.ndarray,
        end: Sequence[float] | np.ndarray,
        unit: str = "row",
        **columns: Sequence[str],
    ) -> ClipTable:
        """A table of clips that need no checks; without a column ``text`` they have empty narrations."""
        everything = {"video_id": videos, "text": [""] * len(videos)} | columns
        arrays = {name: text_column(list(values)) for name, values in everything.items()}
        first, last = (np.asarray(each, dtype=np.float64) for each in (start, end))
        return cls(path, pa.table(arrays), first, last, unit=unit)

    @classmethod
    def checked(
        cls, path: Path, raw: RawClips, *, strict: bool, exclude: str | None = None, unique: str = ""
    ) -> ClipTable:
        """The entries that can be used; see :func:`egohod.data.formats.read_clips`.

        Entries without a readable time or narration, with an id that leads out of the video folder, and duplicates are
        left out and counted; with ``strict`` the first one raises :class:`UserError` naming file and row. ``exclude``
        is the path of an exclude list. With ``unique`` entries are duplicates if they agree in that column.
        """
        start, end = (seconds(times) for times in raw.times)
        # Annotators' padding often reaches before the video.
        negative, first = start < 0, np.maximum(start, 0.0)
        # Other short clips keep their times: whether they are widened depends on how their video is stored, which only
        # the reader of videos can see.
        backwards = end <= first
        last = np.where(backwards, first + MIN_SECONDS, end)
        short = last - first < MIN_SECONDS

        usable, left_out = _check(path, raw, start, end, strict, unique)
        if exclude:
            excluded = _excluded(Path(exclude), raw.columns["video_id"], first, last) & usable
            left_out["on the exclude list"] = int(excluded.sum())
            usable &= ~excluded
        if not usable.any():
            raise UserError(
                f"{path}: no clip with a narration"
                + "".join(f"; {count:,} left out: {why}" for why, count in left_out.items() if count)
            )
        lists = text_files.lists(raw.columns["text"])
        report = TableReport(
            rows=int(usable.sum()),
            short=int((short & usable).sum()),
            backwards=int((backwards & usable).sum()),
            negative_start=int((negative & usable).sum()),
            list_literals=int((lists & usable).sum()),
            left_out={why: count for why, count in left_out.items() if count},
        )
        columns = raw.columns if usable.all() else raw.columns.filter(pa.array(usable))
        return cls(path, columns, first[usable], last[usable], raw.numbers[usable], raw.unit, report)

    def __len__(self) -> int:
        return len(self.start)

    def row(self, index: int) -> ClipRow:
        """The clip at ``index`` (0 .. len - 1)."""
        dataset, text = self._columns.get("dataset"), self._columns["text"][index].as_py()
        return ClipRow(
            video_id=self._columns["video_id"][index].as_py(),
            start=float(self.start[index]),
            end=float(self.end[index]),
            texts=text_files.narrations_in(text) or (text.strip(),),
            dataset="" if dataset is None else dataset[index].as_py(),
            row=int(self._rows[index]),
        )

    def where(self, index: int) -> str:
        """File and place of a clip, for messages."""
        return f"{self.path}: {self._unit} {int(self._rows[index])}"

    def value(self, name: str, index: int) -> str:
        """The clip's entry in a column other than the times."""
        return str(self._columns[name][index].as_py())

    @property
    def videos(self) -> list[str]:
        """The video of each clip."""
        return [str(video) for video in self.column("video_id")]

    @property
    def ids(self) -> list[str]:
        """A name of each clip for people, see :meth:`id`."""
        return [self.id(i) for i in range(len(self))]

    def id(self, index: int) -> str:
        """A name of a clip for people: its uid, else its number from 1."""
        return self.value("uid", index) if "uid" in self._columns else str(index + 1)

    def rows_of_videos(self) -> dict[str, range]:
        """The rows of each video of a table whose clips are grouped by video, in their order."""
        names, rows = self.videos, dict[str, range]()
        borders = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
        for start, end in zip(borders, [*borders[1:], len(names)], strict=True):
            assert names[start] not in rows, "the clips of a video must be side by side"
            rows[names[start]] = range(start, end)
        return rows

    def restricted(self, mask: np.ndarray) -> ClipTable:
        """The clips where ``mask`` bool [N] is true."""
        # Arrow copies the rows; the restricted table is as compact as the whole one.
        columns = pa.table(self._columns).filter(pa.array(mask))
        return ClipTable(self.path, columns, self.start[mask], self.end[mask], self._rows[mask], self._unit)

    @property
    def column_names(self) -> list[str]:
        """What :meth:`column` takes."""
        return [*self._columns, "start_second", "end_second"]

    def column(self, name: str) -> np.ndarray:
        """A whole column: times as float64 [N] (seconds), all others as strings in an object array [N].

        Raises :class:`UserError` if there is no such column.
        """
        if name not in self.column_names:
            raise UserError(f"{self.path}: no column '{name}'{nearest(name, self.column_names)}")
        if name in ("start_second", "end_second"):
            return (self.start if name == "start_second" else self.end).copy()
        return self._columns[name].to_numpy(zero_copy_only=False)

    def datasets(self) -> list[str]:
        """The distinct values of the dataset column; one empty string without it."""
        column = self._columns.get("dataset")
        return [""] if column is None else sorted(str(name) for name in column.unique().to_pylist())

    def group_codes(self, by: Sequence[str], window_seconds: float = 60.0) -> np.ndarray:
        """One int64 code per clip; clips with equal codes agree in everything that ``by`` names.

        ``by`` names ``video``, ``window`` (the window of ``window_seconds`` of a video that the clip's middle lies
        in) or any column. Raises :class:`UserError` for an unknown name.
        """
        if not by:
            raise UserError(f"{self.path}: clips cannot be grouped by nothing; name video, window or a column")
        codes = np.zeros(len(self), dtype=np.int64)
        for name in by:
            for part in self._codes(name, window_seconds):
                # Dense codes after every part, so that the product cannot overflow.
                codes = np.unique(codes * (int(part.max()) + 1) + part, return_inverse=True)[1].astype(np.int64)
        return codes

    def _codes(self, name: str, window_seconds: float) -> list[np.ndarray]:
        if name in ("video", "window"):
            video = _codes(self._columns["video_id"])
            if name == "video":
                return [video]
            return [video, ((self.start + self.end) / 2 // window_seconds).astype(np.int64)]
        if name not in self.column_names:
            allowed = ["video", "window", *self.column_names]
            raise UserError(f"{self.path}: cannot group clips by '{name}'{nearest(name, allowed)}")
        if name in ("start_second", "end_second"):
            return [np.unique(self.column(name), return_inverse=True)[1].astype(np.int64)]
        return [_codes(self._columns[name])]


def choose_text(texts: Sequence[str], mode: str, rng: np.random.Generator) -> str:
    """One narration out of several: ``random`` draws, ``concat`` joins all, ``first`` takes the first.

    ``concat`` puts ". " between them whatever they end with, as upstream, AVION and LaViLa do.
    """
    if mode == "concat":
        return ". ".join(texts)
    if mode == "first" or len(texts) == 1:
        return texts[0]
    assert mode == "random", mode
    return texts[int(rng.integers(len(texts)))]


def _compact(column: pa.ChunkedArray) -> pa.Array:
    """One contiguous array, as a dictionary where values repeat (a video has many clips)."""
    whole = column.combine_chunks()
    # Telling by the first ones spares encoding millions of different narrations in vain.
    sample = whole.slice(0, _SAMPLE)
    return whole.dictionary_encode() if len(sample.unique()) <= len(sample) / 2 else whole


def _codes(column: pa.Array) -> np.ndarray:
    coded = column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()
    return coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _check(
    path: Path, raw: RawClips, start: np.ndarray, end: np.ndarray, strict: bool, unique: str
) -> tuple[np.ndarray, dict[str, int]]:
    """Which entries can be used, bool [N], and how many cannot, by reason."""
    videos, texts = raw.columns["video_id"], raw.columns["text"]
    # A class may be called "none", which as a narration is a missing one.
    empty = r"^\s*$"
    silent = pc.match_substring_regex(texts, empty).to_numpy() if raw.class_names else text_files.nothing(texts)

    def bad_time(which: int) -> Callable[[int], str]:
        name, times = raw.time_names[which], raw.times[which]
        return lambda i: f"{name} is '{times[i]}', not a time in seconds or HH:MM:SS"

    # (reason, mask, message of one entry); an entry counts under the first reason that applies.
    checks: list[tuple[str, np.ndarray, Callable[[int], str]]] = [
        ("no readable time", np.isnan(start), bad_time(0)),
        ("no readable time", np.isnan(end), bad_time(1)),
        ("before the video begins", (end <= 0) & (start < 0), lambda i: f"the clip ends at {end[i]:g} s"),
        (
            "unsafe or empty video id",
            pc.match_substring_regex(videos, _UNSAFE_ID).to_numpy(),
            lambda i: (
                f"video_id '{videos[i].as_py()}' is empty or leads out of the video folder; ids are relative and "
                "without '..'"
            ),
        ),
        ("no narration", silent, lambda i: "no narration"),
        (
            "several rows in one narration",
            pc.match_substring_regex(texts, _SWALLOWED).to_numpy(),
            lambda i: f"a quote that is not closed swallows the rows after it: '{texts[i].as_py()[:60]}...'",
        ),
        (
            "duplicates",
            raw.columns[unique].to_pandas().duplicated().to_numpy() if unique else _duplicates(raw, start, end),
            lambda i: (
                f"{unique} '{raw.columns[unique][i].as_py()}' occurs twice"
                if unique
                else f"video '{videos[i].as_py()}' has the same clip and narration before"
            ),
        ),
    ]
    usable, left_out = np.ones(len(start), dtype=bool), {"malformed": len(raw.broken)}
    # As errors even where they become warnings: an error's message is one line of bounded length.
    faults = [UserError(f"{path}: {text}") for text in raw.broken[:1]]
    for why, mask, message in checks:
        new = mask & usable
        left_out[why] = left_out.get(why, 0) + int(new.sum())
        if new.any():
            i = int(np.argmax(new))
            faults.append(UserError(f"{path}: {raw.unit} {raw.numbers[i]}: {message(i)}"))
        usable &= ~mask
    if faults and strict:
        raise faults[0]
    # One example of each reason; the counts are in the report.
    for fault in faults:
        log.warning("left out %s", fault)
    return usable, left_out


def _duplicates(raw: RawClips, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Which entries repeat an earlier one in video, times and text, bool [N]."""
    videos, texts = raw.columns["video_id"], raw.columns["text"]
    clips = pd.DataFrame({"video": _codes(videos.combine_chunks()), "start": start, "end": end})
    # Few clips appear twice at all: only their texts need a look.
    alike = clips.duplicated(keep=False).to_numpy()
    repeated = np.zeros(len(clips), dtype=bool)
    repeated[alike] = clips[alike].assign(text=texts.filter(pa.array(alike)).to_pandas().to_numpy()).duplicated()
    return repeated


def _excluded(path: Path, videos: pa.ChunkedArray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Which clips an exclude list names (by video and times to the millisecond), bool [N]."""
    # Times to the millisecond, as the tool writes them: floats of two readings need not be equal.
    header = read_header(path)
    if missing := [name for name in EXCLUDE_COLUMNS if name not in header.names]:
        raise UserError(f"{path}: not an exclude list with {', '.join(EXCLUDE_COLUMNS)}: no column '{missing[0]}'")
    rows = read_columns(path, header, EXCLUDE_COLUMNS)
    for number, fault in rows.faults:
        raise UserError(f"{path}: row {number}: {fault}")
    times = {name: seconds(rows.table[name]) for name in EXCLUDE_COLUMNS[1:]}
    for name, values in times.items():
        if np.isnan(values).any():
            i = int(np.argmax(np.isnan(values)))
            raise UserError(f"{path}: row {rows.numbers[i]}: {name} is '{rows.table[name][i]}', not a time in seconds")
    unwanted = pd.MultiIndex.from_arrays([rows.table["video_id"].to_pandas(), *map(_milliseconds, times.values())])
    ids = videos.to_pandas()
    clips = pd.MultiIndex.from_arrays([ids, _milliseconds(start), _milliseconds(end)])
    mask: np.ndarray = clips.isin(unwanted)
    # Lists of earlier versions hold short clips as widened.
    if len(left := unwanted.difference(clips)):
        widened = np.maximum(end, start + MIN_SECONDS)
        mask |= pd.MultiIndex.from_arrays([ids, _milliseconds(start), _milliseconds(widened)]).isin(left)
    if len(unwanted) and not mask.any():
        log.warning("%s: names no clip of this table; is it another one's?", path)
    return mask


def _milliseconds(times: np.ndarray) -> np.ndarray:
    return np.nan_to_num(times * 1000).round().astype(np.int64)


class ClipReader:
    """Reads the frames and boxes of a table's clips; ``config`` has the folders of the videos."""

    def __init__(
        self,
        table: ClipTable,
        config: SourceConfig,
        opener: Opener,
        cache: LocalCache | None = None,
        boxes: bool = False,
    ) -> None:
        self.table = table
        self.config = config
        self._with_boxes = boxes
        self._boxes = BoxTable.read(config.detections) if boxes and config.detections else None
        self._stores = {
            name: VideoStore(root, config.layout, config.chunk_seconds, opener, cache, config.min_clip_seconds)
            for name, root in _roots(table, config).items()
        }

    def store(self, row: ClipRow) -> VideoStore:
        """The folder that a clip's video is in."""
        return self._stores.get(row.dataset) or self._stores[""]

    def read(self, row: ClipRow, num_frames: int, rng: np.random.Generator | None, rule: str = "middle") -> Frames:
        """``num_frames`` frames of a clip; see :meth:`VideoStore.read`."""
        return self.store(row).read(row.video_id, row.start, row.end, num_frames, rng, rule)

    def restricted(self, mask: np.ndarray) -> ClipReader:
        """The same for the clips where ``mask`` bool [N] is true."""
        reader = copy.copy(self)
        reader.table = self.table.restricted(mask)
        return reader

    def boxes(self, row: ClipRow, seconds: np.ndarray) -> np.ndarray | None:
        """Boxes at ``seconds`` [T] of the row's video, float32 [T, 3, 4]; None if they are not requested."""
        if not self._with_boxes:
            return None
        # All samples of a batch need boxes of one shape, also those of a source without detections.
        if self._boxes is None:
            return np.full((len(seconds), len(ROLES), len(EDGES)), np.nan, dtype=np.float32)
        return self._boxes.at(row.video_id, seconds)


def _roots(table: ClipTable, config: SourceConfig) -> dict[str, str]:
    """Video folder by dataset name; the name '' stands for all others."""
    datasets = table.datasets()
    roots = {name: root for name, root in config.dataset_roots.items() if name in datasets}
    others = [name for name in datasets if name not in roots]
    if others:
        if not config.root:
            what = f"the rows of dataset '{others[0]}'" if others[0] else "its rows"
            raise UserError(f"{table.path}: {what} need a video folder; set root (or dataset_roots.NAME)")
        roots[""] = config.root
    return roots
