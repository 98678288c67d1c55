"""What a format's module provides, and the plain data it returns: clips, and the tasks of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from re import Pattern

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from egohod.data.config import SourceConfig
from egohod.data.table import ClipTable, RawClips
from egohod.data.text_files import NAMELESS, canonical_column, nearest, read_columns, read_header, read_lines
from egohod.data.videos import MIN_SECONDS
from egohod.errors import UserError

IntArray = NDArray[np.int64]

# --------------------------------------------------------------------------------------------------
# What a benchmark asks of its clips. The evaluation turns each of these into a task with metrics.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RetrievalData:
    """N clips against ``texts`` [M]: ``relevancy`` [N, M] in 0..1.

    ``text_of_clip`` [N] is the one text that is the clip's own; None where there is none.
    """

    texts: Sequence[str]
    text_of_clip: IntArray | None
    relevancy: NDArray[np.float32]


@dataclass(frozen=True)
class ClassificationData:
    """C classes described by prompts, and the class of every clip.

    ``texts`` P prompts; ``class_of_text`` [P] in 0..C-1, at least one prompt for each class; ``labels`` [N] true
    classes; ``parts`` maps the name of a coarser label (verb, noun) to its code for each class, [C]. ``class_names``
    [C] are for people; ``class_keys`` [C] are the values of ``key_columns`` by which annotation files identify a class.
    ``splits`` are rows of clips: metrics are those of the first split, and the mean of all.
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

    ``query_is_clip``: choose the text of a clip; otherwise choose the clip of a text. ``answer`` indexes ``choices``.
    """

    kind: str
    query_is_clip: bool
    query: int
    choices: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class QuestionData:
    """Multiple-choice questions over the clips and ``texts``; each kind of question has a metric of its name."""

    texts: Sequence[str]
    questions: Sequence[Question]


TaskData = RetrievalData | ClassificationData | MultiLabelData | QuestionData


@dataclass(frozen=True)
class BenchmarkData:
    """Clips and what is asked of them; ``notes`` are facts about the numbers that a report must not hide."""

    clips: ClipTable
    tasks: Sequence[TaskData]
    notes: list[str] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------
# What a module declares
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchmarkOptions:
    """Settings of an evaluation that change what a benchmark's files give.

    ``prompts``: narrations of which split describe a class, train or train+val. ``test_split`` is the only split of
    EGTEA to read. ``cache`` is a folder for what is costly to compute.
    """

    prompts: str = "train"
    test_split: int | None = None
    cache: Path | None = None


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

    ``parse`` returns the entries of a file with the further columns that are asked for (None: all); it raises
    :class:`UserError` for a file that is not of this format and leaves single bad entries to
    :meth:`ClipTable.checked`, which judges those of all formats alike. ``suffixes`` (and the ``first_line``, if given)
    or else ``columns`` are how ``format: auto`` recognises a file.
    """

    name: str
    parse: Callable[[Path, SourceConfig, Sequence[str] | None], RawClips]
    suffixes: tuple[str, ...] = ()
    first_line: Pattern[str] | None = None
    columns: tuple[str, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()


# --------------------------------------------------------------------------------------------------
# What several formats share
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
    chosen = _choose_columns(path, names, source.columns, columns)
    others = [name for name in names if name not in chosen.values() and name not in chosen]
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


def _choose_columns(
    path: Path, names: Sequence[str], renamed: Mapping[str, str], columns: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Our name -> the file's name of every column that a clip needs."""
    # The configuration may spell a column as the file does, or in its canonical form.
    renamed = {ours: name if name in names else canonical_column(name) for ours, name in renamed.items()}
    unknown = sorted(set(renamed) - {*columns, "dataset", "uid"})
    if unknown:
        raise UserError(f"{path}: the source's columns name '{unknown[0]}'{nearest(unknown[0], list(columns))}")
    candidates = {ours: [renamed[ours]] if ours in renamed else list(usual) for ours, usual in columns.items()}
    needed = ", ".join(" or ".join(each) for each in candidates.values())
    candidates |= {ours: [renamed[ours]] for ours in ("dataset", "uid") if ours in renamed}
    chosen = {ours: next((name for name in each if name in names), "") for ours, each in candidates.items()}
    missing = [candidates[ours][0] for ours, name in chosen.items() if not name]
    if missing:
        hints = "; ".join(f"no column '{name}'{nearest(name, names)}" for name in missing)
        raise UserError(f"{path}: {hints}. Needed are {needed}; other names go into the source's columns")
    return chosen


def labelled_clips(
    rows: Sequence[tuple[str, float, float, str, str]],
    numbers: Sequence[int],
    broken: Sequence[str],
    unit: str,
    label: str,
) -> RawClips:
    """Entries (video, start, end, class name, class), the class in a column called ``label``."""
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


def require_complete(path: Path, raw: RawClips) -> RawClips:
    """``raw``, or :class:`UserError` for its first broken entry: a benchmark has no entry to spare."""
    if raw.broken:
        raise UserError(f"{path}: {raw.broken[0]}")
    return raw


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1. Raises :class:`UserError` if there is none."""
    lines = [(number, line.strip()) for number, line in enumerate(read_lines(path), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: is empty")
    return lines


def look_for(source: SourceConfig, name: str) -> Path | None:
    """A file of a benchmark's annotation folder, or of its folder retrieval_annotations, if it is there."""
    folder = Path(source.metadata)
    return next((path for path in (folder / name, folder / "retrieval_annotations" / name) if path.is_file()), None)


def require_file(source: SourceConfig, name: str) -> Path:
    """As :func:`look_for`. Raises :class:`UserError` if it is not there."""
    path = look_for(source, name)
    if path is None:
        raise UserError(f"{source.metadata}: no {name} there, which this benchmark needs")
    return path


def backwards_note(count: int) -> list[str]:
    """A note on the clips whose end was repaired."""
    return [f"{count} clips end before they begin and were given {MIN_SECONDS:g} s"] if count else []
