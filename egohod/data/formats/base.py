"""What a format's module declares and returns, and what all formats share: checks of clips, tables, text files.

The way of an annotation file: :func:`read_header` and :func:`read_columns` give cells as text, :func:`parse_table` (or
a format's own code) makes :class:`RawClips` of them, and :func:`check_clips` the :class:`ClipTable` of those that can
be used. Compression (gzip, bzip2, zstd, lz4) and encoding (UTF-8, or UTF-16 with or without a byte order mark) are
recognised by a file's first bytes, never by its name. Everything is streamed: memory holds what was requested only.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from re import Pattern
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from egohod.data.config import SourceConfig
from egohod.data.table import ClipTable, TableReport, inspect_cells
from egohod.data.videos import MIN_SECONDS
from egohod.errors import UserError, nearest

log = logging.getLogger(__name__)

IntArray = NDArray[np.int64]

# --------------------------------------------------------------------------------------------------
# What a format's module declares
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchmarkOptions:
    """Settings of an evaluation that change what a benchmark's files give.

    ``prompts``: narrations of which split describe a class, train or train+val. ``test_split`` is the only split of
    EGTEA to read. ``cache`` is a folder for what is costly to compute. ``metric_names`` maps kinds of questions to the
    names of their metrics; a kind that is not in it is its own name. ``window_seconds`` is the length of the windows
    that cover recordings.
    """

    prompts: str = "train"
    test_split: int | None = None
    cache: Path | None = None
    metric_names: Mapping[str, str] = field(default_factory=dict)
    window_seconds: float = 2.0


@dataclass(frozen=True)
class Benchmark:
    """A benchmark by its name in ``evaluate.benchmarks.NAME.kind``; with ``whole_files`` a clip is a file of its own.

    ``read`` takes where the data is (``metadata``, ``root``, ``columns``) and raises :class:`UserError` naming file and
    row: a benchmark is read completely or not at all.
    """

    name: str
    read: Callable[[SourceConfig, BenchmarkOptions], BenchmarkData]
    whole_files: bool = False


@dataclass(frozen=True)
class Format:
    """An annotation format by its name in ``data.train.NAME.format``.

    ``parse`` returns the entries of a file with the further columns that are requested (None: all); it raises
    :class:`UserError` for a file that is not of this format and leaves single bad entries to :func:`check_clips`,
    which judges those of all formats alike. ``suffixes`` (and the ``first_line``, if given) or else ``columns`` are
    how ``format: auto`` recognises a file, and ``folder``, a glob of what is in it, a folder. ``siblings`` are names of
    files beside it that ``parse`` reads too.
    """

    name: str
    parse: Callable[[Path, SourceConfig, Sequence[str] | None], RawClips]
    suffixes: tuple[str, ...] = ()
    first_line: Pattern[str] | None = None
    columns: tuple[str, ...] = ()
    folder: str = ""
    siblings: tuple[str, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()


# --------------------------------------------------------------------------------------------------
# What it returns: clips, and the tasks of a benchmark, which the evaluation turns into metrics
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawClips:
    """The entries of an annotation file in its order, before any is checked.

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
class RetrievalData:
    """N clips against ``texts`` [M]: ``relevancy`` [N, M] in 0..1.

    ``text_of_clip`` [N] is the one text that is the clip's own; None where there is none. ``text_ids`` [M] name the
    texts in a challenge.
    """

    texts: Sequence[str]
    text_of_clip: IntArray | None
    relevancy: NDArray[np.float32]
    text_ids: Sequence[str] = ()


@dataclass(frozen=True)
class ClassificationData:
    """C classes described by prompts, and the class of every clip.

    ``texts`` P prompts; ``class_of_text`` [P] in 0..C-1, at least one prompt for each class; ``labels`` [N] true
    classes, all -1 where a challenge keeps them secret; ``parts`` maps the name of a coarser label (verb, noun) to its
    code for each class, [C]. ``class_names`` [C] are for people; ``class_keys`` [C] are the values of ``key_columns``
    by which annotation files identify a class. ``splits`` are rows of clips: metrics are those of the first split, and
    the mean of all.
    """

    name: str
    texts: Sequence[str]
    class_of_text: IntArray
    labels: IntArray
    parts: Mapping[str, IntArray] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    splits: Sequence[IntArray] = ()
    class_keys: Sequence[tuple[str, ...]] = ()
    key_columns: Sequence[str] = ()


@dataclass(frozen=True)
class MultiLabelData:
    """C classes, each described by one text, and which of them occur in every clip: ``labels`` [N, C] bool."""

    name: str
    texts: Sequence[str]
    labels: NDArray[np.bool_]


@dataclass(frozen=True)
class Question:
    """One question: the query and its choices are rows of the clips or of the texts.

    ``query_is_clip``: choose the text of a clip, or with ``of_clips`` another clip; otherwise the clip of a text.
    ``answer`` indexes ``choices``, and so do ``also``, further correct ones.
    """

    kind: str
    query_is_clip: bool
    query: int
    choices: tuple[int, ...]
    answer: int
    of_clips: bool = False
    also: tuple[int, ...] = ()

    @property
    def choices_are_clips(self) -> bool:
        """Whether ``choices`` are rows of the clips."""
        return self.of_clips or not self.query_is_clip

    @property
    def clips(self) -> tuple[int, ...]:
        """All clips that it is about."""
        return (*((self.query,) if self.query_is_clip else ()), *(self.choices if self.choices_are_clips else ()))


@dataclass(frozen=True)
class QuestionData:
    """Multiple-choice questions over the clips and ``texts``; each kind of question has a metric of its name.

    The metric is accuracy, but for kinds in ``precision`` average precision: ``pooled``, that of all choices of all
    questions in one ranking, or ``each``, the mean over the questions, weighted by their numbers of choices.
    """

    texts: Sequence[str]
    questions: Sequence[Question]
    precision: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MomentQuery:
    """A text (its row) and its ``moments`` in a recording, (start, end) in seconds of the video; none: it is absent."""

    recording: int
    text: int
    moments: tuple[tuple[float, float], ...]
    train: bool


@dataclass(frozen=True)
class GroundingData:
    """When texts happen in recordings, which are covered by windows: the clips of the benchmark.

    ``recordings`` [R] are rows of windows in order, ``centres`` [N] of the windows in seconds of their videos,
    ``stride`` the distance of two windows. With ``detection`` a text may happen several times, or not at all.
    """

    texts: Sequence[str]
    recordings: Sequence[IntArray]
    centres: NDArray[np.float64]
    stride: float
    queries: Sequence[MomentQuery]
    detection: bool = False


TaskData = RetrievalData | ClassificationData | MultiLabelData | QuestionData | GroundingData


@dataclass(frozen=True)
class BenchmarkData:
    """Clips and their tasks; ``notes`` are facts about the numbers that a report must not hide."""

    clips: ClipTable
    tasks: Sequence[TaskData]
    notes: list[str] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------
# Parsing: what several formats share
# --------------------------------------------------------------------------------------------------


def parse_table(
    path: Path, source: SourceConfig, extra: Sequence[str] | None, columns: Mapping[str, Sequence[str]]
) -> RawClips:
    """A csv, tsv or parquet table with one clip a row.

    ``columns`` maps video_id, start_second, end_second and text to the names that the format has for them, of which
    the first that exists is taken; ``source.columns`` may give others.
    """
    header = read_header(path)
    names = [name for name in header.names if not NAMELESS.fullmatch(name)]
    # The configuration may spell a column as the file does, or in its canonical form.
    renamed = {ours: name if name in names else canonical_column(name) for ours, name in source.columns.items()}
    if unknown := sorted(set(renamed) - {*columns, "dataset", "uid"}):
        raise UserError(f"{path}: the source's columns name '{unknown[0]}'{nearest(unknown[0], list(columns))}")
    candidates = {ours: [renamed[ours]] if ours in renamed else list(usual) for ours, usual in columns.items()}
    needed = ", ".join(" or ".join(each) for each in candidates.values())
    candidates |= {ours: [renamed[ours]] for ours in ("dataset", "uid") if ours in renamed}
    # Our name -> the file's name of every column that a clip needs.
    chosen = {ours: next((name for name in each if name in names), "") for ours, each in candidates.items()}
    if missing := [candidates[ours][0] for ours, name in chosen.items() if not name]:
        hints = "; ".join(f"no column '{name}'{nearest(name, names)}" for name in missing)
        raise UserError(f"{path}: {hints}. Needed are {needed}; other names go into the source's columns")
    others = [name for name in names if name not in chosen.values() and name not in chosen]
    # A table of a hundred columns is read without those that nobody needs: they may be most of the file.
    others = others if extra is None else [name for name in others if name in (*extra, "dataset")]
    rows = read_columns(path, header, [*chosen.values(), *others])
    table = rows.table.rename_columns([*chosen, *others])
    start, end = table["start_second"], table["end_second"]
    if header.delimiter == ";":
        # Semicolons separate where the comma is the decimal point.
        start, end = (pc.replace_substring(times, ",", ".", max_replacements=1) for times in (start, end))
    return RawClips(
        columns=table.drop_columns(["start_second", "end_second"]),
        times=(start, end),
        numbers=rows.numbers,
        time_names=(chosen["start_second"], chosen["end_second"]),
        broken=tuple(f"row {number}: {fault}" for number, fault in rows.faults),
    )


def labelled_clips(
    rows: Sequence[tuple[str, float, float, str, str]],
    numbers: Sequence[int],
    broken: Sequence[str],
    unit: str,
    label: str,
) -> RawClips:
    """Entries (video, start, end, class name, class), the class in a column called ``label``."""
    # A file whose entries are all broken has no row: its first fault is the message, not this.
    video, start, end, text, code = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    columns = {"video_id": video, "text": text, label: code}
    return RawClips(
        columns=pa.table({name: pa.array(list(values), pa.large_string()) for name, values in columns.items()}),
        times=(np.array(start, dtype=np.float64), np.array(end, dtype=np.float64)),
        numbers=np.array(numbers, dtype=np.int64),
        unit=unit,
        broken=tuple(broken),
        class_names=True,
    )


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1. Raises :class:`UserError` if there is none."""
    lines = [(number, line.strip()) for number, line in enumerate(read_lines(path), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: is empty")
    return lines


def look_for(source: SourceConfig, name: str) -> Path | None:
    """A file of a benchmark's annotation folder, or of its folder retrieval_annotations, if it is there."""
    # EPIC-KITCHENS' repository keeps the files of its retrieval benchmark in that subfolder.
    folder = Path(source.metadata)
    return next((path for path in (folder / name, folder / "retrieval_annotations" / name) if path.is_file()), None)


def require_file(source: SourceConfig, name: str) -> Path:
    """As :func:`look_for`. Raises :class:`UserError` if it is not there."""
    path = look_for(source, name)
    if path is None:  # mostly the wrong folder: the message names it and the file
        raise UserError(f"{source.metadata}: no {name} there, which this benchmark needs")
    return path


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise :class:`UserError` for the first file below ``folder`` that a link leads to another place.

    A data set is made by others: its links lead wherever they like. Those of a snapshot in the Hugging Face Hub's
    cache, whose files are links into the folder ``blobs`` beside it, are as they must be.
    """
    real = folder.resolve()
    allowed = [real, *(parent.parent / "blobs" for parent in real.parents if parent.name == "snapshots")]
    for name in names:
        target = (folder / name).resolve()
        if not any(target.is_relative_to(each) for each in allowed):
            raise UserError(f"{folder / name}: a link to {target}, outside of the data set; put the file itself there")


def require_complete(path: Path, raw: RawClips) -> RawClips:
    """``raw``, or :class:`UserError` for its first broken entry: a benchmark has no entry to spare."""
    if raw.broken:
        raise UserError(f"{path}: {raw.broken[0]}")
    return raw


def require_clips(path: Path, raw: RawClips, unique: str = "") -> tuple[ClipTable, list[str]]:
    """All clips of a benchmark, and the notes on those that were repaired.

    Raises :class:`UserError` naming the first entry that cannot be used; ``unique`` as in :func:`check_clips`.
    """
    table = check_clips(path, raw, strict=True, unique=unique)
    return table, backwards_note(table.report.backwards)


def backwards_note(count: int) -> list[str]:
    """A note on the clips whose end was repaired, if there are any."""
    return [f"{count} clips end before they begin and were given {MIN_SECONDS:g} s"] if count else []


# --------------------------------------------------------------------------------------------------
# Checking: from the entries of a file to the clips that can be used
# --------------------------------------------------------------------------------------------------

EXCLUDE_COLUMNS = ("video_id", "start_second", "end_second")
# Absolute, climbing or empty ids; a drive letter is absolute too.
_UNSAFE_ID = r"^\s*$|^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)|\x00"
# A line break, and what looks like a further row: an id, two times and their separators.
_SWALLOWED = r"[\r\n][^,\t\r\n]+[,\t]\s*[\d.:]+\s*[,\t]\s*[\d.:]+\s*[,\t]"


def check_clips(path: Path, raw: RawClips, *, strict: bool, exclude: str | None = None, unique: str = "") -> ClipTable:
    """The entries that can be used; see :func:`egohod.data.formats.read_clips`.

    Entries without a readable time or narration, with an id that leads out of the video folder, and duplicates are
    left out and counted; with ``strict`` the first one raises :class:`UserError` naming file and row. ``exclude`` is
    the path of an exclude list. With ``unique`` entries are duplicates if they agree in that column.
    """
    start, end = (seconds(times) for times in raw.times)
    # Annotators' padding often reaches before the video.
    negative, first = start < 0, np.maximum(start, 0.0)
    # Other short clips keep their times: whether they are widened depends on how their video is stored, which only
    # the reader of videos can see.
    backwards = end <= first
    last = np.where(backwards, first + MIN_SECONDS, end)
    videos, texts = raw.columns["video_id"], raw.columns["text"]
    silent, lists = inspect_cells(texts)
    if raw.class_names:  # a class may be called "none", which as a narration is a missing one
        silent = pc.match_substring_regex(texts, r"^\s*$").to_numpy()
    unsafe = pc.match_substring_regex(videos, _UNSAFE_ID).to_numpy()
    swallowed = pc.match_substring_regex(texts, _SWALLOWED).to_numpy()
    repeated = raw.columns[unique].to_pandas().duplicated().to_numpy() if unique else _duplicates(raw, start, end)
    # (reason, mask, message with the entry's values); an entry counts under the first reason that applies.
    checks = [
        ("no readable time", np.isnan(start), "{start_name} is '{start}', not a time in seconds or HH:MM:SS"),
        ("no readable time", np.isnan(end), "{end_name} is '{end}', not a time in seconds or HH:MM:SS"),
        ("before the video begins", (end <= 0) & negative, "the clip ends at {seconds:g} s"),
        (
            "unsafe or empty video id",
            unsafe,
            "video_id '{video}' is empty or leads out of the video folder; ids are relative and without '..'",
        ),
        ("no narration", silent, "no narration"),
        (
            "several rows in one narration",
            swallowed,
            "a quote that is not closed swallows the rows after it: '{text:.60}...'",
        ),
        (
            "duplicates",
            repeated,
            "{unique} '{value}' occurs twice" if unique else "video '{video}' has the same clip and narration before",
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
            values = {"video": videos[i].as_py(), "text": texts[i].as_py(), "seconds": end[i]}
            values |= {"start_name": raw.time_names[0], "start": raw.times[0][i]}
            values |= {"end_name": raw.time_names[1], "end": raw.times[1][i]}
            values |= {"unique": unique, "value": raw.columns[unique][i].as_py() if unique else ""}
            faults.append(UserError(f"{path}: {raw.unit} {raw.numbers[i]}: {message.format(**values)}"))
        usable &= ~mask
    if faults and strict:
        raise faults[0]
    # One example of each reason; the counts are in the report.
    for fault in faults:
        log.warning("left out %s", fault)
    if exclude:
        excluded = _excluded(Path(exclude), videos, first, last) & usable
        left_out["on the exclude list"] = int(excluded.sum())
        usable &= ~excluded
    left_out = {why: count for why, count in left_out.items() if count}
    if not usable.any():
        counts = (f"; {count:,} left out: {why}" for why, count in left_out.items())
        raise UserError(f"{path}: no clip with a narration{''.join(counts)}")
    masks = {
        "short": last - first < MIN_SECONDS,
        "backwards": backwards,
        "negative_start": negative,
        "list_literals": lists,
    }
    counts_of = {name: int((mask & usable).sum()) for name, mask in masks.items()}
    report = TableReport(rows=int(usable.sum()), left_out=left_out, **counts_of)
    columns = raw.columns if usable.all() else raw.columns.filter(pa.array(usable))
    return ClipTable(path, columns, first[usable], last[usable], raw.numbers[usable], raw.unit, report)


def _duplicates(raw: RawClips, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Which entries repeat an earlier one in video, times and text, bool [N]."""
    videos, texts = raw.columns["video_id"].combine_chunks().dictionary_encode(), raw.columns["text"]
    codes = videos.indices.to_numpy(zero_copy_only=False)
    clips = pd.DataFrame({"video": codes, "start": start, "end": end})
    # Few clips appear twice at all: only their texts need a look.
    alike = clips.duplicated(keep=False).to_numpy()
    repeated = np.zeros(len(clips), dtype=bool)
    repeated[alike] = clips[alike].assign(text=texts.filter(pa.array(alike)).to_pandas().to_numpy()).duplicated()
    return repeated


def _excluded(path: Path, videos: pa.ChunkedArray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Which clips an exclude list names (by video and times to the millisecond), bool [N]."""
    header = read_header(path)
    if missing := [name for name in EXCLUDE_COLUMNS if name not in header.names]:
        raise UserError(f"{path}: not an exclude list with {', '.join(EXCLUDE_COLUMNS)}: no column '{missing[0]}'")
    rows = read_columns(path, header, EXCLUDE_COLUMNS)
    # A row that is not understood could be the one bad clip that the list is for.
    for number, fault in rows.faults:
        raise UserError(f"{path}: row {number}: {fault}")
    times = {name: seconds(rows.table[name]) for name in EXCLUDE_COLUMNS[1:]}
    for name, values in times.items():
        if np.isnan(values).any():
            i = int(np.argmax(np.isnan(values)))
            raise UserError(f"{path}: row {rows.numbers[i]}: {name} is '{rows.table[name][i]}', not a time in seconds")

    def keys(ids: pd.Series, *times: np.ndarray) -> pd.MultiIndex:
        # To the millisecond, as the tool writes them: floats of two readings need not be equal.
        return pd.MultiIndex.from_arrays([ids, *(np.nan_to_num(t * 1000).round().astype(np.int64) for t in times)])

    unwanted, ids = keys(rows.table["video_id"].to_pandas(), *times.values()), videos.to_pandas()
    clips = keys(ids, start, end)
    mask: np.ndarray = clips.isin(unwanted)
    # Lists of earlier versions hold short clips as widened.
    if len(left := unwanted.difference(clips)):
        mask |= keys(ids, start, np.maximum(end, start + MIN_SECONDS)).isin(left)
    if len(unwanted) and not mask.any():
        log.warning("%s: names no clip of this table; is it another one's?", path)
    return mask


_CLOCK = r"^\s*(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+(?:\.\d*)?)\s*$"
_NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"


def seconds(times: pa.ChunkedArray | np.ndarray) -> np.ndarray:
    """Times written as seconds or HH:MM:SS.ss (or MM:SS) -> float64 [N]; NaN where it is neither."""
    if isinstance(times, np.ndarray):
        return np.where(np.isfinite(times), times, np.nan)
    # Arrow's cast refuses a whole column for one bad cell, so only what looks like a number is cast.
    plain = pc.match_substring_regex(times, _NUMBER)
    numbers = pc.if_else(plain, pc.utf8_trim_whitespace(times), None)
    values = pc.fill_null(pc.cast(numbers, pa.float64()), np.nan).to_numpy().copy()
    rest = ~plain.to_numpy()
    if rest.any():
        clock = pc.extract_regex(times.filter(pa.array(rest)), _CLOCK)
        h, m, s = (
            # An hour that is left out matches as empty text.
            pc.fill_null(pc.cast(pc.replace_substring_regex(part, r"^$", "0"), pa.float64()), np.nan).to_numpy()
            for part in (pc.struct_field(clock, i) for i in range(3))
        )
        values[rest] = 3600 * h + 60 * m + s
    return np.where(np.isfinite(values), values, np.nan)


# --------------------------------------------------------------------------------------------------
# Tables: csv, tsv and parquet whose cells stay text
# --------------------------------------------------------------------------------------------------

# A row (think of a very long narration) must fit one block of the parser.
_BLOCK_BYTES = 16 << 20
_DELIMITERS = ",;|"
# Columns that some format or benchmark knows by name. Their case and their blanks are a matter of the program that
# wrote the file, so "Video ID" is video_id; all other names stay as they are.
_CANONICAL_COLUMNS = {
    *("video_id", "start_second", "end_second", "text", "caption", "dataset", "uid", "action", "relevancy"),
    *("video_uid", "clip_start", "clip_end", "clip_text", "tag_verb", "tag_noun", "video", "start", "end", "label"),
    *("narration_id", "start_timestamp", "stop_timestamp", "narration", "verb", "noun", "verb_class", "noun_class"),
    *("noun_classes", "all_noun_classes", "id", "actions"),
}
# pandas writes its index as a column without a name, and calls it so when it reads that.
NAMELESS = re.compile(r"(Unnamed: \d+(\.\d+)?)?")


@dataclass(frozen=True)
class Header:
    """What a table begins with: ``names`` of its columns, each once, and how to read the rows below.

    ``delimiter`` separates cells and is empty for a parquet file; ``lines`` are those above the first row.
    """

    names: tuple[str, ...]
    delimiter: str = ""
    lines: int = 0


@dataclass(frozen=True)
class Rows:
    """Cells as text, large_string, and the number of each row in the file, int64 [N], from 1.

    ``faults`` are rows with too few or too many cells: their numbers and what is wrong.
    """

    table: pa.Table
    numbers: np.ndarray
    faults: tuple[tuple[int, str], ...]


def canonical_column(name: str) -> str:
    """A column's name as the formats spell it (``Video ID`` -> ``video_id``); one that they do not know, unchanged."""
    plain = re.sub(r"[\s.-]+", "_", name.strip()).lower()
    return plain if plain in _CANONICAL_COLUMNS else name


def read_header(path: Path) -> Header:
    """Column names and what separates them, of text or parquet. Raises :class:`UserError`."""
    with reading(path):
        if _first_bytes(path).startswith(_PARQUET):
            return Header(_column_names(path, pq.read_schema(path).names))
        with open_utf8(path) as binary, TextIOWrapper(binary, encoding="utf-8", newline="") as file:
            first, above, delimiter = "", 0, ""
            # Above the names there may be blank lines, of a spreadsheet's empty cells too, and Excel's "sep=;".
            for first in file:
                if separator := re.fullmatch(r'"?sep=(.)"?\s*', first):
                    delimiter = separator[1]
                elif first.strip(f'{_DELIMITERS}"\t\r\n '):
                    break
                above += 1
            else:
                raise UserError(f"{path}: the file is empty")
            if not delimiter:
                outside = re.sub(r'"[^"]*"', "", first)
                delimiter = "\t" if "\t" in outside else max(_DELIMITERS, key=outside.count)
            # A quoted name may hold line breaks, so the header can be longer than its first line.
            reader = csv.reader(itertools.chain([first], file), delimiter=delimiter)
            names = next(reader)
            return Header(_column_names(path, names), delimiter, above + reader.line_num)


def _column_names(path: Path, cells: Sequence[str]) -> tuple[str, ...]:
    """Column names: stripped, those of a format in its spelling, nameless ones numbered."""
    stripped = (cell.strip() for cell in cells)
    names = [f"Unnamed: {place}" if NAMELESS.fullmatch(name) else name for place, name in enumerate(stripped)]
    forms = [canonical_column(name) for name in names]
    # Where a file has both text and TEXT, each stays what it is.
    written, often = set(names), Counter(forms)
    pairs = zip(names, forms, strict=True)
    canonical = {name: form for name, form in pairs if form not in written and often[form] == 1}
    names = [canonical.get(name, name) for name in names]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UserError(f"{path}: column '{twice[0]}' appears twice")
    return tuple(names)


def read_columns(path: Path, header: Header, names: Sequence[str]) -> Rows:
    """The columns ``names`` as text. Raises :class:`UserError`."""
    with reading(path):
        if not header.delimiter:
            # The file's names, not the ones that canonical_column made of them.
            theirs = dict(zip(header.names, pq.read_schema(path).names, strict=True))
            columns = pq.read_table(path, columns=[theirs[name] for name in names])
            table = pa.table({name: _as_text(columns[theirs[name]]) for name in names})
            return Rows(table, np.arange(1, len(table) + 1), ())
        table, skipped = _read_cells(path, header, names, threads=True)
        if skipped:  # only the unthreaded parser knows their numbers
            table, skipped = _read_cells(path, header, names, threads=False)
    numbers = np.arange(1, len(table) + len(skipped) + 1)
    numbers = numbers[~np.isin(numbers, [number for number, _ in skipped])]
    return Rows(table, numbers, tuple((number, fault) for number, fault in skipped if fault))


def _read_cells(
    path: Path, header: Header, names: Sequence[str], threads: bool
) -> tuple[pa.Table, list[tuple[int, str]]]:
    """The columns, and what was left out: (number of the row, fault); a line of blanks is no fault, an empty one."""
    skipped: list[tuple[int, str]] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        fault = f"{row.actual_columns} columns instead of {row.expected_columns}" if row.text.strip() else ""
        skipped.append(((row.number or 0) - header.lines, fault))
        return "skip"

    with open_utf8(path) as file:
        table = pa_csv.read_csv(
            file,
            read_options=pa_csv.ReadOptions(
                use_threads=threads, block_size=_BLOCK_BYTES, skip_rows=header.lines, column_names=list(header.names)
            ),
            parse_options=pa_csv.ParseOptions(
                delimiter=header.delimiter, newlines_in_values=True, invalid_row_handler=skip, ignore_empty_lines=True
            ),
            # Strings throughout: a column that looks like numbers for a million rows may end in a word.
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.large_string()),
                include_columns=list(names),
                strings_can_be_null=False,  # "null" may be a class or a video
            ),
        )
    return table, skipped


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A parquet column as text: numbers as they are written, durations in seconds, lists as JSON, nothing as ""."""
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if pa.types.is_duration(column.type):
        column = pc.divide(pc.cast(column.cast(pa.duration("ns"), safe=False), pa.int64()), 1e9)
    if pa.types.is_nested(column.type):  # Arrow has no cast from lists to text
        texts = ["" if value is None else json.dumps(value, ensure_ascii=False) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.large_string())])
    return pc.fill_null(pc.cast(column, pa.large_string()), "")


def read_csv(path: Path, columns: Sequence[str], *, unique: str | None = None) -> pd.DataFrame:
    """All columns of a csv as strings, of which ``columns`` must be there in any order; row 0 is the file's first.

    ``unique`` names a column in which no value may occur twice. Raises :class:`UserError`.
    """
    header = read_header(path)
    # Before any row is read: a wrong file may be large.
    for name in columns:
        if name not in header.names:
            raise UserError(f"{path}: column '{name}' is missing{nearest(name, header.names)}")
    rows = read_columns(path, header, header.names)
    # Benchmarks have no row to spare: one that cannot be read is not left out.
    for number, fault in rows.faults:
        raise UserError(f"{path}: row {number}: {fault}")
    table = rows.table.to_pandas()
    if table.empty:
        raise UserError(f"{path}: not a single row")
    if unique is not None and (again := table[unique].duplicated()).any():
        row = int(again.argmax())
        raise UserError(f"{path}: row {row + 1}: {unique} '{table[unique][row]}' occurs twice")
    return table


# --------------------------------------------------------------------------------------------------
# Text files as people bring them
# --------------------------------------------------------------------------------------------------

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_PARQUET = b"PAR1"
_WEB_PAGE = "a web page, perhaps that of a failed download"
_PICKLE = "a pickle, which the format 'pickle' reads"
# What is no text, and its cure. The commonest are downloads that failed and pointers of Git LFS.
_OTHER = {
    _PARQUET: "a parquet file",
    b"PK\x03\x04": "an Excel workbook or zip archive; save its sheet as csv, or unpack it",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save its sheet as csv",
    b"\xfd7zXZ\x00": "compressed with xz; unpack it, or compress it with gzip",
    b"ARROW1": "an Arrow (feather) file; save it as parquet or csv",
    b"\x89HDF": "an HDF5 file; save its table as parquet or csv",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself with 'git lfs pull'",
    **dict.fromkeys((b"<!DOCTYPE html", b"<!doctype html", b"<html"), _WEB_PAGE),
    b"SQLite format 3": "an SQLite database; export its table as csv",
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), _PICKLE),  # protocols 2 to 5
}
# Longest first: UTF-32's mark begins like UTF-16's.
_MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def is_utf8(text: str) -> bool:
    """Whether a text can be written; JSON and pickles may hold halves of characters."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def read_lines(path: Path) -> list[str]:
    """The lines of a text, without their ends (LF, CRLF or CR; nothing else ends a line).

    Raises :class:`UserError`.
    """
    # Not splitlines, which also splits at U+2028, form feeds and such, that may be in the middle of a record.
    lines = _read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises :class:`UserError`."""
    return parse_json(_read_text(path), f"{path}: not readable as JSON")


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises :class:`UserError` that begins with ``where``."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # recursion: brackets nested thousands deep
        raise UserError(f"{where} ({error})") from error


def _read_text(path: Path) -> str:
    with reading(path), open_utf8(path) as file, TextIOWrapper(file, encoding="utf-8", newline=None) as text:
        return text.read()


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(32)


@contextmanager
def open_utf8(path: Path) -> Iterator[pa.NativeFile]:
    """The file's text as a stream of UTF-8 bytes without byte order mark, whatever it is stored as."""
    with _unpacked(path) as file:
        head = file.read(4)
    wide = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    # Without a mark: ASCII characters in UTF-16 have a zero in every second byte.
    if wide is None and len(head) == 4 and head.count(0) == 2 and (head[0] == 0) != (head[1] == 0):
        wide = "utf-16-be" if head[0] == 0 else "utf-16-le"
    with _unpacked(path) as file:
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        yield pa.transcoding_input_stream(file, wide, "utf-8") if wide else file


@contextmanager
def _unpacked(path: Path) -> Iterator[pa.NativeFile]:
    """The file's bytes, decompressed."""
    head = _first_bytes(path)
    if strange := next((what for magic, what in _OTHER.items() if head.startswith(magic)), None):
        raise UserError(f"{path}: no text but {strange}")
    packed = next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), None)
    with pa.OSFile(str(path)) as file:
        if packed is None:
            yield file
        else:
            with pa.CompressedInputStream(file, packed) as unpacked:
                yield unpacked


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a file can do to its reader becomes a :class:`UserError` that names it."""
    try:
        yield
    except UserError:  # a ValueError, too, and with its message already
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {_why_no_text(path)}") from error
    except csv.Error as error:
        raise UserError(f"{path}: not a csv file: {error}") from error
    except pa.ArrowException as error:
        undecodable = "UTF8" in str(error) or "UTF-8" in str(error)
        reason = _why_no_text(path) if undecodable else " ".join(str(error).split())[:300]
        raise UserError(f"{path}: {reason}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _why_no_text(path: Path) -> str:
    """Where a text stops being UTF-8: Arrow reports only that it does."""
    try:
        # Latin-1 maps bytes to characters one to one: it splits bytes into lines.
        with open_utf8(path) as file, TextIOWrapper(file, encoding="latin-1", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.encode("latin-1").decode("utf-8")
                except UnicodeDecodeError as error:
                    place = f"line {number}, byte {ord(line[error.start]):#04x} at column {error.start + 1}"
                    return f"not UTF-8 text ({place}); save it as UTF-8"
    except UnicodeDecodeError as error:
        return f"not {error.encoding.upper()} text, as which it begins; save it as UTF-8"
    return "not UTF-8 text; save it as UTF-8"
