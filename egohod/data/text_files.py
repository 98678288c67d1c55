"""Text files as people bring them: lines, JSON, and tables whose cells stay text.

Compression (gzip, bzip2, zstd, lz4) and encoding (UTF-8, or UTF-16 with or without a byte order mark) are recognised by
a file's first bytes, never by its name. Everything is streamed: what is held in memory is what was asked for.
"""

from __future__ import annotations

import ast
import codecs
import csv
import difflib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from egohod.errors import UserError

# A row (think of a very long narration) must fit one block of the parser.
_BLOCK_BYTES = 16 << 20
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_PARQUET = b"PAR1"
# What is no text, and its cure.
_OTHER = {
    _PARQUET: "a parquet file",
    b"PK\x03\x04": "an Excel workbook or zip archive; save its sheet as csv, or unpack it",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save its sheet as csv",
    b"\xfd7zXZ\x00": "compressed with xz; unpack it, or compress it with gzip",
    b"ARROW1": "an Arrow (feather) file; save it as parquet or csv",
    b"\x89HDF": "an HDF5 file; save its table as parquet or csv",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself with 'git lfs pull'",
    b"<!DOCTYPE html": "a web page, perhaps that of a failed download",
    b"<!doctype html": "a web page, perhaps that of a failed download",
    b"<html": "a web page, perhaps that of a failed download",
    b"SQLite format 3": "an SQLite database; export its table as csv",
    b"\x80\x02": "a pickle, which the format 'pickle' reads",
    b"\x80\x03": "a pickle, which the format 'pickle' reads",
    b"\x80\x04": "a pickle, which the format 'pickle' reads",
    b"\x80\x05": "a pickle, which the format 'pickle' reads",
}
# Longest first: UTF-32's mark begins like UTF-16's.
_MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_DELIMITERS = ",;|"
# Columns that some format or benchmark knows by name. Their case and their blanks are a matter of the program that
# wrote the file, so "Video ID" is video_id; all other names stay as they are.
_CANONICAL_COLUMNS = {
    *("video_id", "start_second", "end_second", "text", "caption", "dataset", "uid", "action", "relevancy"),
    *("video_uid", "clip_start", "clip_end", "clip_text", "tag_verb", "tag_noun", "video", "start", "end", "label"),
    *("narration_id", "start_timestamp", "stop_timestamp", "narration", "verb", "noun", "verb_class", "noun_class"),
    *("noun_classes", "all_noun_classes", "id", "actions"),
}

# A damaged header may have any number of columns, and comparing names takes time.
_COMPARED = 200
_CLOCK = r"^\s*(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+(?:\.\d*)?)\s*$"
_NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"


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


def seconds(times: pa.ChunkedArray | np.ndarray) -> np.ndarray:
    """Times written as seconds or HH:MM:SS.ss (or MM:SS) -> float64 [N]; NaN where it is neither."""
    if isinstance(times, np.ndarray):
        return np.where(np.isfinite(times), times, np.nan)
    plain = pc.match_substring_regex(times, _NUMBER)
    numbers = pc.if_else(plain, pc.utf8_trim_whitespace(times), None)
    values = pc.fill_null(pc.cast(numbers, pa.float64()), np.nan).to_numpy().copy()
    rest = ~plain.to_numpy()
    if rest.any():
        clock = pc.extract_regex(times.filter(pa.array(rest)), _CLOCK)
        h, m, s = (
            pc.fill_null(pc.cast(pc.replace_substring_regex(part, r"^$", "0"), pa.float64()), np.nan).to_numpy()
            for part in (pc.struct_field(clock, i) for i in range(3))
        )
        values[rest] = 3600 * h + 60 * m + s
    return np.where(np.isfinite(values), values, np.nan)


def text_column(values: Sequence[Any]) -> pa.ChunkedArray:
    """Any values as a column of text."""
    return pa.chunked_array([pa.array(map(str, values), pa.large_string())])


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a message that says which name was perhaps meant."""
    names = names[:_COMPARED]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else f" (there are: {', '.join(names)})"


def read_lines(path: Path) -> list[str]:
    """The lines of a text, without their ends (LF, CRLF or CR; nothing else ends a line).

    Raises :class:`UserError`.
    """
    with reading(path), _text(path, newline=None) as file:
        # Not splitlines, which also splits at U+2028, form feeds and such, that may be in the middle of a record.
        lines = file.read().split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises :class:`UserError`."""
    with reading(path), _text(path, newline=None) as file:
        return parse_json(file.read(), f"{path}: not readable as JSON")


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises :class:`UserError` that begins with ``where``."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} ({error})") from error


@contextmanager
def open_utf8(path: Path) -> Iterator[pa.NativeFile]:
    """The file's text as a stream of UTF-8 bytes without byte order mark, whatever it is stored as."""
    with _unpacked(path) as file:
        head = file.read(4)
    wide = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if wide is None and len(head) == 4 and head.count(0) == 2 and (head[0] == 0) != (head[1] == 0):
        wide = "utf-16-be" if head[0] == 0 else "utf-16-le"
    with _unpacked(path) as file:
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        yield pa.transcoding_input_stream(file, wide, "utf-8") if wide else file


def read_header(path: Path) -> Header:
    """Column names and what separates them, of text or parquet. Raises :class:`UserError`."""
    with reading(path):
        if _magic(path).startswith(_PARQUET):
            return Header(_named(path, pq.read_schema(path).names))
        with _text(path, newline="") as file:
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
            reader = csv.reader(itertools.chain([first], file), delimiter=delimiter)
            names = next(reader)
            return Header(_named(path, names), delimiter, above + reader.line_num)


def read_columns(path: Path, header: Header, names: Sequence[str]) -> Rows:
    """The columns ``names`` as text. Raises :class:`UserError`."""
    with reading(path):
        if not header.delimiter:
            # The file's names, not the ones that canonical_column made of them.
            theirs = dict(zip(header.names, pq.read_schema(path).names, strict=True))
            columns = pq.read_table(path, columns=[theirs[name] for name in names])
            table = pa.table({name: _as_text(columns[theirs[name]]) for name in names})
            return Rows(table, np.arange(1, len(table) + 1), ())
        table, skipped = _parse(path, header, names, threads=True)
        if skipped:  # only the unthreaded parser knows their numbers
            table, skipped = _parse(path, header, names, threads=False)
    numbers = np.arange(1, len(table) + len(skipped) + 1)
    numbers = numbers[~np.isin(numbers, [number for number, _ in skipped])]
    return Rows(table, numbers, tuple((number, fault) for number, fault in skipped if fault))


def _parse(path: Path, header: Header, names: Sequence[str], threads: bool) -> tuple[pa.Table, list[tuple[int, str]]]:
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
                strings_can_be_null=False,
            ),
        )
    return table, skipped


def _named(path: Path, cells: Sequence[str]) -> tuple[str, ...]:
    """Column names: without blanks around them, known ones as the formats spell them, nameless ones numbered."""
    stripped = (cell.strip() for cell in cells)
    names = [f"Unnamed: {place}" if NAMELESS.fullmatch(name) else name for place, name in enumerate(stripped)]
    forms = [canonical_column(name) for name in names]
    # Where a file has both text and TEXT, each stays what it is.
    written, often = set(names), Counter(forms)
    canonical = {
        name: form for name, form in zip(names, forms, strict=True) if form not in written and often[form] == 1
    }
    names = [canonical.get(name, name) for name in names]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UserError(f"{path}: column '{twice[0]}' appears twice")
    return tuple(names)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A parquet column as text: numbers as they are written, durations in seconds, lists as JSON, nothing as ""."""
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if pa.types.is_duration(column.type):
        column = pc.divide(pc.cast(column.cast(pa.duration("ns"), safe=False), pa.int64()), 1e9)
    if pa.types.is_nested(column.type):
        texts = ["" if value is None else json.dumps(value, ensure_ascii=False) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.large_string())])
    return pc.fill_null(pc.cast(column, pa.large_string()), "")


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(32)


@contextmanager
def _unpacked(path: Path) -> Iterator[pa.NativeFile]:
    """The file's bytes, decompressed."""
    head = _magic(path)
    strange = next(
        (what for magic, what in (_OTHER | {_PARQUET: "a parquet file"}).items() if head.startswith(magic)), None
    )
    if strange:
        raise UserError(f"{path}: no text but {strange}")
    packed = next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), None)
    with pa.OSFile(str(path)) as file:
        if packed is None:
            yield file
        else:
            with pa.CompressedInputStream(file, packed) as unpacked:
                yield unpacked


@contextmanager
def _text(path: Path, newline: str | None) -> Iterator[TextIOWrapper]:
    with open_utf8(path) as file, TextIOWrapper(file, encoding="utf-8", newline=newline) as text:
        yield text


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a file can do to its reader becomes a :class:`UserError` that names it."""
    try:
        yield
    except UserError:
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
    try:
        with open_utf8(path) as file:
            for number, line in enumerate(_byte_lines(file), 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    place = f"line {number}, byte {line[error.start]:#04x} at column {error.start + 1}"
                    return f"not UTF-8 text ({place}); save it as UTF-8"
    except UnicodeDecodeError as error:
        return f"not {error.encoding.upper()} text, as which it begins; save it as UTF-8"
    return "not UTF-8 text; save it as UTF-8"


def _byte_lines(file: pa.NativeFile) -> Iterator[bytes]:
    rest = b""
    while block := file.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


_INTEGERS = re.compile(r"\[\s*(\d{1,18}(\s*,\s*\d{1,18})*)?\s*\]")
# Sets of classes become columns of a matrix: a slip of the pen must not ask for gigabytes.
_LARGEST_CLASS = 9999


def read_csv(path: Path, columns: Sequence[str], *, unique: str | None = None) -> pd.DataFrame:
    """All columns of a csv as strings, of which ``columns`` must be there in any order; row 0 is the file's first.

    ``unique`` names a column in which no value may occur twice. Raises :class:`UserError`.
    """
    header = read_header(path)
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


def integers(table: pd.DataFrame, column: str, source: Path | Callable[[int], str]) -> np.ndarray:
    """A column of whole numbers, int64 [N]. Raises :class:`UserError` naming the row.

    ``source`` is the file that the rows are of, or tells where a row stands.
    """
    good = table[column].str.fullmatch(r"\s*-?\d{1,18}\s*").to_numpy(dtype=bool)
    if not good.all():
        row = int(np.argmin(good))
        raise UserError(f"{_place(source, row)}: {column} is '{table[column][row]}', not a whole number")
    return table[column].astype(np.int64).to_numpy()


def integer_lists(table: pd.DataFrame, column: str, source: Path | Callable[[int], str]) -> list[list[int]]:
    """A column of lists of classes such as ``[2, 14]``. Raises :class:`UserError` naming the row."""
    lists = []
    for row, cell in enumerate(table[column]):
        if not _INTEGERS.fullmatch(cell.strip()):
            raise UserError(f"{_place(source, row)}: {column} is '{cell}', not a list of whole numbers")
        lists.append([int(number) for number in re.findall(r"\d+", cell)])
        if max(lists[-1], default=0) > _LARGEST_CLASS:
            raise UserError(
                f"{_place(source, row)}: {column} is '{cell}', but classes are numbered up to {_LARGEST_CLASS:,}"
            )
    return lists


def _place(source: Path | Callable[[int], str], row: int) -> str:
    return f"{source}: row {row + 1}" if isinstance(source, Path) else source(row)


# How programs spell that there is nothing; as the whole of a narration it is none.
_NOTHING = r"(?:nan|null|none|n/?a|#n/a|<na>|nat|pd\.na)"
_PANDAS = r"<\w+Array>\s*(\[.*\])\s*Length: \d+, dtype: \S+"
_LIST = rf"(?s)^\s*(?:\[.*\]|array\(\s*\[.*\)|\(\s*['\"].*\)|{_PANDAS})\s*$"
# Lists that may hold nothing at all; only these few are taken apart while reading.
_BARE_LIST = (
    rf"(?i)^(?:[\s,\[\]()'\"]|array|<\w+Array>|Length: \d+|dtype: \S+|np\.str_|dtype\s*=\s*[^\s,]+|{_NOTHING})*$"
)
_TOKEN = re.compile(
    rf"""(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<open>(?:array|np\.str_)?\(|\[)|(?P<close>[\])])"""
    rf"""|(?P<number>[-+]?\d+(?:\.\d+)?(?=[\s,\])]))|{_NOTHING}(?=[\s,\])])|[\s,]+|dtype\s*=\s*(?:\w+|'[^']*')""",
    re.IGNORECASE | re.DOTALL,
)
# Texts and lists of one entry.
_MOST_ITEMS = 10_000


def narrations_in(cell: str) -> tuple[str, ...]:
    """The narrations of a cell, without blanks around them; empty if it says nothing."""
    cell = cell.strip()
    if cell.startswith("<") and (printed := re.fullmatch(_PANDAS, cell, re.DOTALL)):
        cell = printed[1]
    items = _items(cell) if re.match(_LIST, cell) else None
    # '[unsure] stirs [the pot]' is a narration, not a list
    texts = (cell,) if items is None else (item.strip() for item in items)
    return tuple(text for text in texts if text and not re.fullmatch(_NOTHING, text, re.IGNORECASE))


def lists(cells: pa.ChunkedArray) -> np.ndarray:
    """Which cells look like lists, bool [N]."""
    return pc.match_substring_regex(cells, _LIST).to_numpy()


def nothing(cells: pa.ChunkedArray) -> np.ndarray:
    """Which cells hold no narration, bool [N]."""
    empty = pc.match_substring_regex(cells, rf"(?i)^\s*{_NOTHING}?\s*$").to_numpy().copy()
    doubtful = np.flatnonzero(lists(cells) & pc.match_substring_regex(cells, _BARE_LIST).to_numpy())
    empty[doubtful] = [not narrations_in(cells[int(i)].as_py()) for i in doubtful]
    return empty


def flat_texts(value: Any, depth: int = 8) -> Iterator[Any]:
    """What a value from a pickle holds, lists taken apart (up to ``depth`` in each other) and None and NaN left out.

    A value with too many lists in it comes out as it is: lists that hold the same list again and again may be short in
    a file and without end here.
    """
    flat, todo = list[Any](), [(value, depth)]
    for _ in range(_MOST_ITEMS):
        if not todo:
            yield from flat
            return
        item, left = todo.pop()
        if isinstance(item, (list, tuple)) and left:
            if len(item) + len(todo) > _MOST_ITEMS:
                break
            todo += [(inner, left - 1) for inner in reversed(item)]
        elif item is not None and item == item:  # NaN differs from itself
            flat.append(item)
    yield value


def _items(cell: str) -> list[str] | None:
    """The texts and numbers in a printed list; None if it is none."""
    items, depth, at = list[str](), 0, 0
    while at < len(cell):
        token = _TOKEN.match(cell, at)
        if token is None or (at and not depth):
            return None
        depth += (token["open"] is not None) - (token["close"] is not None)
        if token["text"] or token["number"]:
            items.append(_unquoted(token["text"]) if token["text"] else token["number"])
        at = token.end()
    return None if depth else items


def _unquoted(text: str) -> str:
    """What a quoted text spells: as JSON writes it or, if it is none, as Python does."""
    if "\\" in text:
        for read in (json.loads, ast.literal_eval):
            try:
                return str(read(text))
            except (ValueError, SyntaxError):
                continue
    return text[1:-1]
