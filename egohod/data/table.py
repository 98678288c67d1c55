"""Clips as columns, their narrations, and the reading of their frames. Nothing here needs PyTorch.

A :class:`ClipTable` holds Arrow buffers and numpy arrays only. There is no Python object per row whose reference
count a worker process could touch, so millions of rows are shared with forked workers at no cost.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from egohod.data.config import SourceConfig
from egohod.data.decoders import Opener
from egohod.data.detections import EDGES, ROLES, BoxTable
from egohod.data.opposites import opposite
from egohod.data.replacements import Verbs, verb_and_nouns
from egohod.data.storage import LocalCache
from egohod.data.videos import MIN_SECONDS, Frames, VideoStore
from egohod.errors import UserError, nearest

# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------

# Values of a column that decide whether it is stored as a dictionary.
_SAMPLE = 65536


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
        clips = "1 clip" if self.rows == 1 else f"{self.rows:,} clips"
        return ", ".join([clips, *(f"{count:,} {what}" for count, what in notes if count)])


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
        self._rows = np.arange(1, len(start) + 1) if numbers is None else numbers
        self._columns: dict[str, pa.Array] = {}
        self._file: Path | None = None  # that the columns are mapped from
        for name in columns.column_names:
            # Contiguous arrays: looking up a row of a chunked column costs a search.
            whole = columns[name].combine_chunks()
            # As a dictionary where values repeat (a video has many clips). Judged by the first ones: that spares
            # encoding millions of different narrations without saving anything.
            sample = whole.slice(0, _SAMPLE)
            repeats = len(sample.unique()) <= len(sample) / 2
            self._columns[name] = whole.dictionary_encode() if repeats else whole

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

    def save(self, file: Path) -> None:
        """Write everything but the path to an Arrow file, for :meth:`mapped`. Raises :class:`OSError`."""
        report = json.dumps(dataclasses.asdict(self.report)).encode()
        columns = {f"column {name}": column for name, column in self._columns.items()}
        numbers = {"start": self.start, "end": self.end, "rows": self._rows}
        arrays = columns | {name: pa.array(values) for name, values in numbers.items()}
        table = pa.table(arrays).replace_schema_metadata({b"report": report, b"unit": self._unit.encode()})
        with file.open("wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            # One batch: a column in several would have to be copied into one when it is read.
            writer.write_table(table, max_chunksize=max(1, len(table)))

    @classmethod
    def mapped(cls, file: Path, path: Path) -> ClipTable:
        """The table of ``path`` from what :meth:`save` wrote; rows that nobody looks at take no memory.

        Raises :class:`OSError` or :class:`pyarrow.ArrowException` for a file that is none.
        """
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        metadata = table.schema.metadata
        start, end, rows = (table[name].chunk(0).to_numpy() for name in ("start", "end", "rows"))
        report = TableReport(**json.loads(metadata[b"report"]))
        mapped = cls(path, pa.table({}), start, end, rows, metadata[b"unit"].decode(), report)
        # As they are: nothing is copied, and no value is looked at.
        names = [name for name in table.column_names if name.startswith("column ")]
        mapped._columns = {name.removeprefix("column "): table[name].chunk(0) for name in names}
        mapped._file = file
        return mapped

    def __reduce__(self) -> str | tuple[Any, ...]:
        # A worker process that is spawned maps the file itself: a pickle would be a copy of it in each.
        return super().__reduce__() if self._file is None else (ClipTable.mapped, (self._file, self.path))

    def __len__(self) -> int:
        return len(self.start)

    def row(self, index: int) -> ClipRow:
        """The clip at ``index`` (0 .. len - 1)."""
        dataset, text = self._columns.get("dataset"), self._columns["text"][index].as_py()
        return ClipRow(
            video_id=self._columns["video_id"][index].as_py(),
            start=float(self.start[index]),
            end=float(self.end[index]),
            # A class may be called "none", which as a narration is a missing one.
            texts=narrations_in(text) or (text.strip(),),
            dataset="" if dataset is None else dataset[index].as_py(),
            row=int(self._rows[index]),
        )

    def number(self, index: int) -> int:
        """The number of a clip's row in the file, from 1."""
        return int(self._rows[index])

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
        if name in ("start_second", "end_second"):  # a copy: the table itself does not change
            return (self.start if name == "start_second" else self.end).copy()
        return self._columns[name].to_numpy(zero_copy_only=False)

    def distinct(self, name: str) -> list[str]:
        """The distinct values of a column of text, in the order of their first clips."""
        # By Arrow: a million strings of Python would be made for a few thousand videos.
        return [str(value) for value in self._columns[name].unique().to_pylist()]

    def datasets(self) -> list[str]:
        """The distinct values of the dataset column; one empty string without it."""
        return sorted(self.distinct("dataset")) if "dataset" in self._columns else [""]

    def content_hash(self) -> str:
        """SHA-256 of the clips in their order: videos, times, narrations and datasets.

        The same wherever the file is, and whatever else it holds.
        """
        digest = hashlib.sha256(self.start.tobytes() + self.end.tobytes())
        for name in ("video_id", "text", "dataset"):
            if name not in self._columns:
                continue
            digest.update(name.encode())
            # In slices: decoded from its dictionary, a column of millions of rows would take a gigabyte.
            for first in range(0, len(self), _SAMPLE):
                part = pa.table({name: self._columns[name].slice(first, _SAMPLE)})[name]
                part = pc.fill_null(pc.cast(part, pa.large_string()), "").combine_chunks()
                _, offsets, text = part.buffers()
                # Lengths too, or "ab", "c" would be "a", "bc".
                borders = np.frombuffer(offsets, dtype=np.int64)[part.offset : part.offset + len(part) + 1]
                digest.update(np.diff(borders).tobytes())
                digest.update(memoryview(text)[borders[0] : borders[-1]] if text is not None else b"")
        return digest.hexdigest()

    def group_codes(self, by: Sequence[str], window_seconds: float = 60.0) -> np.ndarray:
        """One int64 code per clip; clips with equal codes agree in everything that ``by`` names.

        ``by`` names ``video``, ``window`` (the window of ``window_seconds`` of a video that the clip's middle lies
        in) or any column. Raises :class:`UserError` for an unknown name.
        """
        if not by:
            raise UserError(f"{self.path}: clips cannot be grouped by nothing; name video, window or a column")
        parts = list[np.ndarray]()
        for name in by:
            if name in ("start_second", "end_second"):  # the only columns that hold numbers
                parts.append(np.unique(self.column(name), return_inverse=True)[1].astype(np.int64))
                continue
            column = self._columns.get("video_id" if name in ("video", "window") else name)
            if column is None:
                allowed = ["video", "window", *self.column_names]
                raise UserError(f"{self.path}: cannot group clips by '{name}'{nearest(name, allowed)}")
            # The dictionary's indices are codes already: no string is compared.
            coded = column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()
            parts.append(coded.indices.to_numpy(zero_copy_only=False).astype(np.int64))
            if name == "window":
                parts.append(((self.start + self.end) / 2 // window_seconds).astype(np.int64))
        codes = np.zeros(len(self), dtype=np.int64)
        for part in parts:
            # Dense codes after every part, so that the product cannot overflow.
            codes = np.unique(codes * (int(part.max()) + 1) + part, return_inverse=True)[1].astype(np.int64)
        return codes


def text_column(values: Sequence[Any]) -> pa.ChunkedArray:
    """Any values as a column of text."""
    # large_string: offsets of 32 bits end at 2 GB of narrations.
    return pa.chunked_array([pa.array(map(str, values), pa.large_string())])


# --------------------------------------------------------------------------------------------------
# Narrations: what a cell holds, which of several is taken, and how it reads in the mirror
# --------------------------------------------------------------------------------------------------

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


def narrations_in(cell: str) -> tuple[str, ...]:
    """The narrations of a cell, without blanks around them; empty if it has no narration."""
    cell = cell.strip()
    if cell.startswith("<") and (printed := re.fullmatch(_PANDAS, cell, re.DOTALL)):
        cell = printed[1]
    items = _list_items(cell) if re.match(_LIST, cell) else None
    # '[unsure] stirs [the pot]' is a narration, not a list
    texts = (cell,) if items is None else (item.strip() for item in items)
    return tuple(text for text in texts if text and not re.fullmatch(_NOTHING, text, re.IGNORECASE))


def _list_items(cell: str) -> list[str] | None:
    """The texts and numbers in a printed list (Python's, JSON's, numpy's or pandas'); None if it is none."""
    # Tokens, not ast.literal_eval: it knows neither array(...) nor nan, and recurses into what a file nests.
    items, depth, at = list[str](), 0, 0
    while at < len(cell):
        token = _TOKEN.match(cell, at)
        if token is None or (at and not depth):
            return None
        depth += (token["open"] is not None) - (token["close"] is not None)
        if text := token["text"]:
            items.append(_unquoted(text) if "\\" in text else text[1:-1])
        elif token["number"]:
            items.append(token["number"])
        at = token.end()
    return None if depth else items


def _unquoted(text: str) -> str:
    """What a quoted text with backslashes spells: as JSON writes it or, if it is none, as Python does."""
    for read in (json.loads, ast.literal_eval):
        try:
            return str(read(text))
        except (ValueError, SyntaxError):
            continue
    return text[1:-1]


def inspect_cells(cells: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Which cells hold no narration, and which look like lists, bool [N] each."""
    # By Arrow's regular expressions: taking millions of cells apart in Python takes minutes.
    empty = pc.match_substring_regex(cells, rf"(?i)^\s*{_NOTHING}?\s*$").to_numpy().copy()
    lists = pc.match_substring_regex(cells, _LIST).to_numpy()
    doubtful = np.flatnonzero(lists & pc.match_substring_regex(cells, _BARE_LIST).to_numpy())
    empty[doubtful] = [not narrations_in(cells[int(i)].as_py()) for i in doubtful]
    return empty, lists


def choose_text(texts: Sequence[str], mode: str, rng: np.random.Generator) -> str:
    """One narration out of several: ``random`` draws, ``concat`` joins all, ``first`` takes the first.

    ``concat`` puts ". " between them whatever they end with, as upstream, AVION and LaViLa do.
    """
    if mode == "concat":
        return ". ".join(texts)
    if mode == "first" or len(texts) == 1:  # a draw here would change the crop of every clip with one narration
        return texts[0]
    assert mode == "random", mode
    return texts[int(rng.integers(len(texts)))]


_SIDE = re.compile(
    r"\b(?:(?P<side>left|right)(?P<tail>(?:most|wards?|side|[- ]?hand(?:s|ed)?)\b)?"
    r"|(?P<turn>(?:(?:counter|anti)[- ]?)?clock[- ]?wise))\b",
    re.IGNORECASE,
)


def _words(text: str) -> frozenset[str]:
    # A line of words is easier to read and to extend than a list of quoted ones.
    return frozenset(text.split())


# What comes as a left and a right one
_PAIRED = _words(
    "hand hands arm arms forearm forearms leg legs foot feet side sides finger fingers thumb thumbs index palm "
    "palms wrist wrists elbow elbows knee knees eye eyes ear ears shoulder shoulders fist fists hip toe shoe "
    "shoes glove gloves sleeve sleeves corner edge end half pocket burner lane tap knob"
)
_BEFORE_A_SIDE = _words(
    "the his her my your their its our bottom top upper lower front rear far near middle center centre extreme "
    "towards toward slightly sharply"
)
# "left or right", "left to right", "first left, then right"
_LINKS = _words("and or to then from")
# "turns left in the corridor"
_TURNING = re.compile(
    r"(?:turn|look|lean|move|step|go|walk|swing|tilt|face|slide|bend|shift|rotate|swipe|wipe|drag|steer|veer|sway)"
    r"(?:s|es|d|ed|ing)?"
)
# The verb of leaving: "left the room", "she left", "what was left"
_OBJECTS = _words("the a an his her their my your its our it them him some this that these those all everything")
_LEAVING = _words(
    "c he she they who which that what what's someone somebody person man woman lady boy girl then is are was "
    "were be been being has have had having just all not"
)
# "oil left in the pan", "no water left", "right after that", "right there", "left to dry"
_ADVERBS = _words(
    "over overs away now after before behind off out back up alone running unattended unused empty open "
    "uncovered there here in on at by for inside under above below beside near around through along across onto "
    "into underneath until next again aside as within where when enough to"
)
_REMAINING = _words(
    "one two three four five six seven eight nine ten "
    "no any some little much many more few only nothing anything everything bit amount lot rest"
)
# "the right amount"
_FITTING = _words(
    "balance amount size temperature time way thickness consistency order moment fit quantity proportion "
    "proportions degree length shape texture method tool tools place position angle angles setting ratio dose "
    "volume"
)


def swap_sides(text: str) -> str:
    """Mirror a narration: words, possessives, compounds ("leftmost", "right-hand side") and rotations; case stays.

    Mirrored twice it is the same again; only a rotation that is not spelled "counterclockwise" or "clockwise" comes
    back in that spelling.
    """

    def mirrored(match: re.Match[str]) -> str:
        word = match.group()
        if not _is_side(text, match):
            return word
        if match["side"]:
            other = ("right" if match["side"].lower() == "left" else "left") + (match["tail"] or "")
        else:
            other = "counterclockwise" if match["turn"].lower() == "clockwise" else "clockwise"
        if word.isupper():
            return other.upper()
        return other[0].upper() + other[1:] if word[0].isupper() else other

    return _SIDE.sub(mirrored, text)


def _is_side(text: str, match: re.Match[str]) -> bool:
    """Whether a "left" or "right" is one, by its neighbours; the first rule that fits decides."""
    # Six words before and one clause after: what decides is never further away.
    before = re.findall(r"[\w'#]+|[.,;:!?]", text[: match.start()].lower())[-6:]
    clause = re.split(r"[.,;:!?()\"]", text[match.end() : match.end() + 60].lower(), maxsplit=1)[0]
    after, second, third, *_ = [*re.findall(r"[\w']+", clause), "", "", ""]
    last = before[-1] if before else ""
    sides = {"left", "right"}
    if match["turn"] or match["tail"] or after in _PAIRED:
        return True
    if (after in _LINKS and (second in sides or third in sides)) or (last in _LINKS and sides & set(before[-4:])):
        return True
    if after in ("over", "overs"):
        return False
    if last in ("from", "to") and not after:
        return True
    if last in _BEFORE_A_SIDE:
        return after not in _FITTING
    if _TURNING.fullmatch(last):
        return after not in _OBJECTS | {"away", "now", "after", "before", "at", "back"}
    # People of Ego4D are called by single letters: "#O the man X left".
    if last in _LEAVING or len(last.strip("#")) == 1 or after in _ADVERBS | _OBJECTS | _FITTING:
        return False
    return bool(after) or not _REMAINING & set(before)


# --------------------------------------------------------------------------------------------------
# Frames and boxes
# --------------------------------------------------------------------------------------------------


class ClipReader:
    """Reads the frames and boxes of a table's clips; ``config`` has the folders of the videos.

    Raises :class:`UserError` for rows without a video folder.
    """

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
        # Folder by dataset name; the name "" is for all others.
        datasets = table.datasets()
        roots = {name: root for name, root in config.dataset_roots.items() if name in datasets}
        if others := [name for name in datasets if name not in roots]:
            if not config.root:
                what = f"the rows of dataset '{others[0]}'" if others[0] else "its rows"
                raise UserError(f"{table.path}: {what} need a video folder; set root (or dataset_roots.NAME)")
            roots[""] = config.root
        self.stores = {
            name: VideoStore(root, config.layout, config.chunk_seconds, opener, cache, config.min_clip_seconds)
            for name, root in roots.items()
        }

    def store(self, row: ClipRow) -> VideoStore:
        """The folder that a clip's video is in."""
        # Rows of a dataset without a folder of its own, and all rows without a dataset, are below root.
        return self.stores.get(row.dataset) or self.stores[""]

    def read(self, row: ClipRow, num_frames: int, rng: np.random.Generator | None, rule: str = "middle") -> Frames:
        """``num_frames`` frames of a clip; see :meth:`VideoStore.read`."""
        return self.store(row).read(row.video_id, row.start, row.end, num_frames, rng, rule)

    def opposite(self, index: int, text: str) -> str | None:
        """``text`` of clip ``index`` with its motion backwards, by ``config.opposite_column`` or by rule, if any."""
        column = self.config.opposite_column
        if not column:
            return opposite(text)
        texts, given = self.table.row(index).texts, narrations_in(self.table.value(column, index))
        # Of several narrations each has its own; a list with a gap does not say which one lacks it.
        if len(given) != len(texts):
            return None
        reverse = ". ".join(given) if self.config.list_text == "concat" else given[texts.index(text)]
        # A copy of the caption, by which a list can have none for one of its narrations, would train nothing.
        return None if reverse == text else reverse

    def replacements(self, index: int, text: str, count: int, verbs: Verbs, rng: np.random.Generator) -> list[str]:
        """``text`` of clip ``index`` with other verbs: up to ``count`` that ``rng`` draws, of the column or by rule."""
        column = self.config.replacement_column
        if not column or len(self.table.row(index).texts) > 1:
            return verbs.replace(text, count, rng)
        written = [each for each in narrations_in(self.table.value(column, index)) if each]
        return [written[i] for i in rng.permutation(len(written))[:count].tolist()]

    def tags(self, index: int, text: str) -> list[list[str]]:
        """The verbs and the nouns of clip ``index``, by ``config.tag_columns`` or of the words of ``text``."""
        if not self.config.tag_columns:
            return [*verb_and_nouns(text)]
        cells = (str(self.table.value(column, index)) for column in self.config.tag_columns)
        parts = ([part.strip(" '\"") for part in cell.strip("[] ").split(",")] for cell in cells)
        return [[part for part in each if part] for each in parts]

    def restricted(self, mask: np.ndarray) -> ClipReader:
        """The same for the clips where ``mask`` bool [N] is true."""
        # Shallow: the opened folders and what they remember of the videos are shared.
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
