"""Annotation files as columns.

A :class:`ClipTable` holds Arrow buffers and numpy arrays only. There is no Python object per row whose reference
count a worker process could touch, so a million rows are shared with forked workers at no cost.
"""

from __future__ import annotations

import ast
import csv
import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from egohod.config import UserError

log = logging.getLogger(__name__)

# A shorter clip, or one that ends before it starts, is widened to this (SPEC 5, as upstream does).
MIN_SECONDS = 1.0
TEXT_COLUMNS = ("text", "caption")
# A row (think of a very long narration) must fit one block of the parser.
_BLOCK_BYTES = 16 << 20
# Absolute, climbing or empty ids; a drive letter is absolute too.
_UNSAFE_ID = r"^\s*$|^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)|\x00"
_EMPTY_TEXT = r"""^\s*$|^\s*\[[\s,'"]*\]\s*$"""
_LIST_TEXT = r"(?s)^\s*\[.*\]\s*$"


class TableError(UserError):
    """An annotation file that cannot be used."""


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
    """What reading found: ``rows`` are kept, ``empty`` were dropped, the others were mended or are worth knowing."""

    rows: int
    widened: int
    negative_start: int
    empty: int
    list_literals: int

    def __str__(self) -> str:
        notes = [
            (self.widened, f"widened to {MIN_SECONDS:g} s"),
            (self.negative_start, "began before 0 s and were moved there"),
            (self.empty, "without a narration left out"),
            (self.list_literals, "with a list of narrations"),
        ]
        return ", ".join([f"{self.rows:,} clips", *(f"{count:,} {what}" for count, what in notes if count)])


class ClipTable:
    """Clips with their narrations, in the order of the file."""

    def __init__(self, path: Path, columns: pa.Table, start: np.ndarray, end: np.ndarray, report: TableReport) -> None:
        self.path = path
        self.report = report
        self._columns = columns
        self._text_name = next(name for name in TEXT_COLUMNS if name in columns.column_names)
        # Contiguous arrays: looking up a row of a chunked column costs a search.
        self._video = columns["video_id"].combine_chunks()
        self._text = columns[self._text_name].combine_chunks()
        self._dataset = columns["dataset"].combine_chunks() if "dataset" in columns.column_names else None
        self._rows = columns["#row"].to_numpy()
        self._start = start
        self._end = end

    @classmethod
    def read(cls, path: str | Path) -> ClipTable:
        """Read ``video_id,start_second,end_second,text|caption[,dataset,uid,...]``; more columns are kept as strings.

        Both the hand-object and the plain narration csv have this form (SPEC 4). Raises :class:`TableError` for
        a file that cannot be read, a missing column, a time that is not a number, or a video id that leads out of
        the video folder; each names the row.
        """
        path = Path(path)
        columns = _read_csv(path)
        start, end = (_seconds(path, columns, name) for name in ("start_second", "end_second"))
        _refuse_unsafe_ids(path, columns)

        negative = start < 0
        start = np.maximum(start, 0.0)
        short = end - start < MIN_SECONDS
        end = np.where(short, start + MIN_SECONDS, end)

        name = next(name for name in TEXT_COLUMNS if name in columns.column_names)
        empty = pc.match_substring_regex(columns[name], _EMPTY_TEXT).to_numpy()
        lists = pc.match_substring_regex(columns[name], _LIST_TEXT).to_numpy()
        columns = columns.append_column("#row", pa.array(np.arange(1, len(start) + 1)))
        if empty.any():
            columns = columns.filter(pa.array(~empty))
        kept = ~empty
        report = TableReport(
            rows=int(kept.sum()),
            widened=int((short & kept).sum()),
            negative_start=int((negative & kept).sum()),
            empty=int(empty.sum()),
            list_literals=int((lists & kept).sum()),
        )
        if not report.rows:
            raise TableError(f"{path}: no clip with a narration ({report.empty} rows without)")
        table = cls(path, columns, start[kept], end[kept], report)
        log.info("%s: %s", path, report)
        return table

    def __len__(self) -> int:
        return len(self._start)

    def row(self, index: int) -> ClipRow:
        """The clip at ``index`` (0 .. len - 1)."""
        return ClipRow(
            video_id=self._video[index].as_py(),
            start=float(self._start[index]),
            end=float(self._end[index]),
            texts=_texts(self._text[index].as_py()),
            dataset="" if self._dataset is None else self._dataset[index].as_py(),
            row=int(self._rows[index]),
        )

    @property
    def column_names(self) -> list[str]:
        """The file's columns."""
        return [name for name in self._columns.column_names if name != "#row"]

    def column(self, name: str) -> np.ndarray:
        """A whole column: times as float64 [N] (seconds, widened), all others as strings in an object array [N].

        Raises :class:`TableError` if there is no such column.
        """
        if name not in self.column_names:
            raise TableError(f"{self.path}: no column '{name}'{_nearest(name, self.column_names)}")
        if name in ("start_second", "end_second"):
            return (self._start if name == "start_second" else self._end).copy()
        return self._columns[name].to_numpy()

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
            video = _dictionary_codes(self._video)
            if name == "video":
                return [video]
            window = ((self._start + self._end) / 2 // window_seconds).astype(np.int64)
            return [video, window]
        if name not in self.column_names:
            allowed = ["video", "window", *self.column_names]
            raise TableError(f"{self.path}: cannot group clips by '{name}'{_nearest(name, allowed)}")
        if name in ("start_second", "end_second"):
            return [np.unique(self.column(name), return_inverse=True)[1].astype(np.int64)]
        return [_dictionary_codes(self._columns[name].combine_chunks())]


def _dictionary_codes(column: pa.Array) -> np.ndarray:
    return column.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _texts(text: str) -> tuple[str, ...]:
    """The narrations in a cell: a list literal has several, anything else is one."""
    stripped = text.strip()
    if stripped.startswith("[") and stripped.endswith("]"):
        try:
            items = ast.literal_eval(stripped)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            items = None  # '[unsure] stirs [the pot]' is a narration, not a list
        if isinstance(items, list):
            texts = tuple(str(item).strip() for item in items if str(item).strip())
            if texts:
                return texts
    return (stripped,)


def _read_csv(path: Path) -> pa.Table:
    """All columns as strings; their names checked."""
    names = _header(path)
    _check_names(path, names)
    try:
        return _parse(path, names, threads=True)
    except pa.ArrowInvalid as error:
        raise TableError(f"{path}: {_why_unreadable(path, names, error)}") from error
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parse(path: Path, names: Sequence[str], threads: bool) -> pa.Table:
    return pa_csv.read_csv(
        path,
        read_options=pa_csv.ReadOptions(use_threads=threads, block_size=_BLOCK_BYTES),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        # Strings throughout: a column that looks like numbers for a million rows may end in a word.
        convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.large_string())),
    )


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file), [])
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: not UTF-8 text ({_first_bad_line(path)}); save it as UTF-8") from error
    except FileNotFoundError as error:
        raise TableError(f"{path}: no such annotation file") from error
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or error}") from error
    except csv.Error as error:
        raise TableError(f"{path}: not a csv file: {error}") from error
    if not names:
        raise TableError(f"{path}: the file is empty")
    return names


def _check_names(path: Path, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TableError(f"{path}: column '{twice[0]}' appears twice")
    missing = [name for name in ("video_id", "start_second", "end_second") if name not in names]
    if not any(name in names for name in TEXT_COLUMNS):
        missing.append(TEXT_COLUMNS[0])
    if missing:
        wrong = "; ".join(f"no column '{name}'{_nearest(name, names)}" for name in missing)
        raise TableError(f"{path}: {wrong}. Needed are video_id, start_second, end_second and text (or caption)")


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else f" (there are: {', '.join(names)})"


def _why_unreadable(path: Path, names: Sequence[str], error: pa.ArrowInvalid) -> str:
    """Which row is at fault: only the unthreaded parser can tell, and for bad bytes nothing but looking."""
    if "UTF8" in str(error) or "UTF-8" in str(error):
        return f"not UTF-8 text ({_first_bad_line(path)}); save it as UTF-8"
    try:
        _parse(path, names, threads=False)
    except pa.ArrowInvalid as precise:
        error = precise
    return " ".join(str(error).split())[:300]


def _first_bad_line(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}, byte {line[error.start]:#04x} at column {error.start + 1}"
    return "somewhere"


def _seconds(path: Path, columns: pa.Table, name: str) -> np.ndarray:
    """A column of times as float64; the first that is no finite number is named."""
    try:
        values = pc.cast(pc.utf8_trim_whitespace(columns[name]), pa.float64()).to_numpy()
        bad = ~np.isfinite(values)
    except pa.ArrowInvalid:
        values = np.empty(0)
        bad = np.array([not _is_number(text) for text in columns[name].to_pylist()])
    if bad.any():
        row = int(np.argmax(bad))
        raise TableError(f"{path}: row {row + 1}: {name} is '{columns[name][row].as_py()}', not a time in seconds")
    return values


def _is_number(text: Any) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except (TypeError, ValueError):
        return False


def _refuse_unsafe_ids(path: Path, columns: pa.Table) -> None:
    bad = pc.match_substring_regex(columns["video_id"], _UNSAFE_ID).to_numpy()
    if bad.any():
        row = int(np.argmax(bad))
        raise TableError(
            f"{path}: row {row + 1}: video_id '{columns['video_id'][row].as_py()}' is empty or leads out of the video "
            "folder; ids are relative and without '..'"
        )
