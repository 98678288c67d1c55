"""Clips as columns.

A :class:`ClipTable` holds Arrow buffers and numpy arrays only. There is no Python object per row whose reference
count a worker process could touch, so millions of rows are shared with forked workers at no cost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from egohod.data import text_files
from egohod.data.annotations import Annotations, read_annotations
from egohod.data.config import SourceConfig
from egohod.data.decoders import Opener
from egohod.data.detections import EDGES, ROLES, BoxTable
from egohod.data.frames import MIN_SECONDS
from egohod.data.storage import LocalCache
from egohod.data.text_files import TableError, nearest, read_columns, read_header, seconds
from egohod.data.videos import Frames, VideoStore
from egohod.errors import UserError

log = logging.getLogger(__name__)

# Absolute, climbing or empty ids; a drive letter is absolute too.
_UNSAFE_ID = r"^\s*$|^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)|\x00"
# A line break, and what looks like a further row: an id, two times and their separators.
_SWALLOWED = r"[\r\n][^,\t\r\n]+[,\t]\s*[\d.:]+\s*[,\t]\s*[\d.:]+\s*[,\t]"
_SAMPLE = 65536
EXCLUDE_COLUMNS = ("video_id", "start_second", "end_second")


@dataclass(frozen=True)
class ClipRow:
    """One clip: where it is and what is said about it.

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
    """What reading found: ``rows`` are kept, ``left_out`` counts the others by reason, the rest was mended."""

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
    """Clips with their narrations, in the order of the file."""

    def __init__(
        self,
        path: Path,
        columns: pa.Table,
        start: np.ndarray,
        end: np.ndarray,
        numbers: np.ndarray,
        unit: str,
        report: TableReport,
    ) -> None:
        self.path = path
        self.report = report
        self._unit = unit
        # Contiguous arrays: looking up a row of a chunked column costs a search. What repeats is stored once.
        self._columns = {name: _compact(columns[name]) for name in columns.column_names}
        self._rows = numbers
        self._start = start
        self._end = end

    @classmethod
    def read(
        cls, source: SourceConfig | str | Path, *, strict: bool = False, extra: Sequence[str] | None = None
    ) -> ClipTable:
        """Read an annotation file (a path stands for one with default settings).

        Entries that cannot be used (no readable time, no narration, an id that leads out of the video folder, a
        duplicate) are left out and counted; with ``strict`` the first one is an error. ``extra`` names further columns
        to keep; None keeps all of them.

        Raises :class:`TableError` naming the file and, where one is at fault, the row.
        """
        source = source if isinstance(source, SourceConfig) else SourceConfig(metadata=str(source))
        path = Path(source.metadata)
        found = read_annotations(path, source, extra)
        start, end = (seconds(times) for times in found.times)
        negative, first = start < 0, np.maximum(start, 0.0)
        # Other short clips keep their times: whether they are widened depends on how their video is kept, which only
        # the reader of videos knows.
        backwards = end <= first
        last = np.where(backwards, first + MIN_SECONDS, end)
        short = last - first < MIN_SECONDS

        kept, left_out = _judge(path, found, start, end, strict)
        if source.exclude:
            excluded = _excluded(Path(source.exclude), found.columns["video_id"], first, last) & kept
            left_out["on the exclude list"] = int(excluded.sum())
            kept &= ~excluded
        if not kept.any():
            raise TableError(
                f"{path}: no clip with a narration"
                + "".join(f"; {count:,} left out: {why}" for why, count in left_out.items() if count)
            )
        lists = text_files.lists(found.columns["text"])
        report = TableReport(
            rows=int(kept.sum()),
            short=int((short & kept).sum()),
            backwards=int((backwards & kept).sum()),
            negative_start=int((negative & kept).sum()),
            list_literals=int((lists & kept).sum()),
            left_out={why: count for why, count in left_out.items() if count},
        )
        columns = found.columns if kept.all() else found.columns.filter(pa.array(kept))
        table = cls(path, columns, first[kept], last[kept], found.numbers[kept], found.unit, report)
        del found, columns
        # What was needed only while reading goes back to the system.
        pa.default_memory_pool().release_unused()
        log.info("%s: %s", path, report)
        return table

    def __len__(self) -> int:
        return len(self._start)

    def row(self, index: int) -> ClipRow:
        """The clip at ``index`` (0 .. len - 1)."""
        dataset, text = self._columns.get("dataset"), self._columns["text"][index].as_py()
        return ClipRow(
            video_id=self._columns["video_id"][index].as_py(),
            start=float(self._start[index]),
            end=float(self._end[index]),
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
    def column_names(self) -> list[str]:
        """What :meth:`column` takes."""
        return [*self._columns, "start_second", "end_second"]

    def column(self, name: str) -> np.ndarray:
        """A whole column: times as float64 [N] (seconds), all others as strings in an object array [N].

        Raises :class:`TableError` if there is no such column.
        """
        if name not in self.column_names:
            raise TableError(f"{self.path}: no column '{name}'{nearest(name, self.column_names)}")
        if name in ("start_second", "end_second"):
            return (self._start if name == "start_second" else self._end).copy()
        return self._columns[name].to_numpy(zero_copy_only=False)

    def datasets(self) -> list[str]:
        """The distinct values of the dataset column; one empty string without it."""
        column = self._columns.get("dataset")
        return [""] if column is None else sorted(str(name) for name in column.unique().to_pylist())

    def group_codes(self, by: Sequence[str], window_seconds: float = 60.0) -> np.ndarray:
        """One int64 code per clip; clips with equal codes agree in everything that ``by`` names.

        ``by`` names ``video``, ``window`` (the window of ``window_seconds`` of a video that the clip's middle lies
        in) or any column. Raises :class:`TableError` for an unknown name.
        """
        if not by:
            raise TableError(f"{self.path}: clips cannot be grouped by nothing; name video, window or a column")
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
            return [video, ((self._start + self._end) / 2 // window_seconds).astype(np.int64)]
        if name not in self.column_names:
            allowed = ["video", "window", *self.column_names]
            raise TableError(f"{self.path}: cannot group clips by '{name}'{nearest(name, allowed)}")
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


def _judge(
    path: Path, found: Annotations, start: np.ndarray, end: np.ndarray, strict: bool
) -> tuple[np.ndarray, dict[str, int]]:
    """Which entries can be used, bool [N], and how many cannot, by reason."""
    videos, texts = found.columns["video_id"], found.columns["text"]

    # A class may be called "none", a narration is none then.
    silent = pc.match_substring_regex(texts, r"^\s*$").to_numpy() if found.labelled else text_files.nothing(texts)

    def time(which: int) -> Callable[[int], str]:
        name, times = found.time_names[which], found.times[which]
        return lambda i: f"{name} is '{times[i]}', not a time in seconds or HH:MM:SS"

    complaints: list[tuple[str, np.ndarray, Callable[[int], str]]] = [
        ("no readable time", np.isnan(start), time(0)),
        ("no readable time", np.isnan(end), time(1)),
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
            _duplicates(videos, texts, start, end),
            lambda i: f"video '{videos[i].as_py()}' has the same clip and narration before",
        ),
    ]
    kept, left_out = np.ones(len(start), dtype=bool), {"malformed": len(found.broken)}
    # As errors even where they become warnings: an error's message is one line of bounded length.
    faults = [TableError(f"{path}: {text}") for text in found.broken[:1]]
    for why, mask, what in complaints:
        fresh = mask & kept
        left_out[why] = left_out.get(why, 0) + int(fresh.sum())
        if fresh.any():
            i = int(np.argmax(fresh))
            faults.append(TableError(f"{path}: {found.unit} {found.numbers[i]}: {what(i)}"))
        kept &= ~mask
    if faults and strict:
        raise faults[0]
    for fault in faults:
        log.warning("left out %s", fault)
    return kept, left_out


def _duplicates(videos: pa.ChunkedArray, texts: pa.ChunkedArray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Which entries repeat an earlier one in video, times and text, bool [N]."""
    clips = pd.DataFrame({"video": _codes(videos.combine_chunks()), "start": start, "end": end})
    # Few clips appear twice at all: only their texts need a look.
    alike = clips.duplicated(keep=False).to_numpy()
    repeated = np.zeros(len(clips), dtype=bool)
    repeated[alike] = clips[alike].assign(text=texts.filter(pa.array(alike)).to_pandas().to_numpy()).duplicated()
    return repeated


def _excluded(path: Path, videos: pa.ChunkedArray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Which clips an exclude list names (by video and times to the millisecond), bool [N]."""
    header = read_header(path)
    if missing := [name for name in EXCLUDE_COLUMNS if name not in header.names]:
        raise TableError(f"{path}: not an exclude list with {', '.join(EXCLUDE_COLUMNS)}: no column '{missing[0]}'")
    rows = read_columns(path, header, EXCLUDE_COLUMNS)
    for number, fault in rows.faults:
        raise TableError(f"{path}: row {number}: {fault}")
    times = {name: seconds(rows.table[name]) for name in EXCLUDE_COLUMNS[1:]}
    for name, values in times.items():
        if np.isnan(values).any():
            i = int(np.argmax(np.isnan(values)))
            raise TableError(f"{path}: row {rows.numbers[i]}: {name} is '{rows.table[name][i]}', not a time in seconds")
    unwanted = pd.MultiIndex.from_arrays([rows.table["video_id"].to_pandas(), *map(_milliseconds, times.values())])
    ids = videos.to_pandas()
    clips = pd.MultiIndex.from_arrays([ids, _milliseconds(start), _milliseconds(end)])
    found = clips.isin(unwanted)
    # Lists of earlier versions hold short clips as widened.
    if len(left := unwanted.difference(clips)):
        widened = np.maximum(end, start + MIN_SECONDS)
        found |= pd.MultiIndex.from_arrays([ids, _milliseconds(start), _milliseconds(widened)]).isin(left)
    if len(unwanted) and not found.any():
        log.warning("%s: names no clip of this table; is it another one's?", path)
    return found


def _milliseconds(times: np.ndarray) -> np.ndarray:
    return np.nan_to_num(times * 1000).round().astype(np.int64)


class ClipSource:
    """One annotation table with the folders its videos lie in."""

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
        self.list_text = config.list_text
        self._with_boxes = boxes
        self._boxes = BoxTable.read(config.detections) if boxes and config.detections else None
        self._stores = {
            name: VideoStore(root, config.layout, config.chunk_seconds, opener, cache, config.min_clip_seconds)
            for name, root in _roots(table, config).items()
        }

    def read(self, row: ClipRow, num_frames: int, rng: np.random.Generator | None) -> Frames:
        """``num_frames`` frames of a clip; see :meth:`VideoStore.read`."""
        store = self._stores.get(row.dataset) or self._stores[""]
        return store.read(row.video_id, row.start, row.end, num_frames, rng)

    def boxes(self, row: ClipRow, seconds: np.ndarray) -> np.ndarray | None:
        """Boxes at ``seconds`` [T] of the row's video, float32 [T, 3, 4]; None if none were asked for."""
        if not self._with_boxes:
            return None
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
