"""Readers: one per annotation format, all ending in the same columns.

==========  ===============================================================================================
hod         table: video_id, start_second, end_second, text (or caption) and any others
ek100       EPIC-KITCHENS-100's csv: video_id, start_timestamp, stop_timestamp, narration, narration_id (uid), classes
egoclip     EgoClip's table: video_uid, clip_start, clip_end, clip_text, tag_verb, tag_noun
ego4d       Ego4D's narration.json: {video: {narration_pass_1: {narrations: [{timestamp_sec, narration_text}]}}}
pickle      LaViLa's and AVION's list of (video, start, end, text or [texts])
egtea       a split of EGTEA: <clip> <action> <verb> <noun>, with action_idx.txt beside it; a clip is a file
charades    CharadesEgo_v1_*.csv with Charades_v1_classes.txt beside it; a clip for each action of a video
labels      csv: video, start, end, label
==========  ===============================================================================================

A reader refuses a file that is not of its format. What is wrong with single entries is left to
:class:`~egohod.data.table.ClipTable`, which sees all formats alike.
"""

from __future__ import annotations

import dataclasses
import gc
import pickle
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from egohod import pickles
from egohod.data.config import SourceConfig
from egohod.data.frames import MIN_SECONDS
from egohod.data.text_files import (
    NAMELESS,
    TableError,
    flat_texts,
    known_form,
    nearest,
    open_utf8,
    read_columns,
    read_header,
    read_lines,
    reading,
    seconds,
)

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_NARRATION = ("narration_text", "timestamp_sec")


@dataclass(frozen=True)
class Annotations:
    """A file's entries in its order, before any is judged.

    ``columns`` holds video_id, text and whatever else was asked for as strings; ``times`` the start and the end as
    strings where a person may have written them, or as float64; ``numbers`` counts the entries as ``unit`` (row,
    narration, ...) of the file from 1; ``broken`` are entries that do not even have the parts of one.
    The texts of ``labelled`` clips are names of classes.
    """

    columns: pa.Table
    times: tuple[pa.ChunkedArray | np.ndarray, pa.ChunkedArray | np.ndarray]
    numbers: np.ndarray
    unit: str = "row"
    time_names: tuple[str, str] = ("start_second", "end_second")
    broken: tuple[str, ...] = ()
    labelled: bool = False


def read_annotations(path: Path, source: SourceConfig, extra: Sequence[str] | None = None) -> Annotations:
    """Read ``path`` in ``source.format``; ``extra`` names further columns to keep (None: all there are).

    Raises :class:`TableError` naming the file, and the row where one is at fault.
    """
    try:
        protocol, remote, _ = source.metadata.partition("://")
        if remote:  # not named in full: an address may be signed
            raise TableError(f"{protocol}://...: annotations are read from a local disk only; copy the file there")
        if not path.exists():
            raise TableError(f"{path}: no such annotation file")
        name = source.format if source.format != "auto" else _guess(path)
        return _READERS[name](path, source, extra)
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or error}") from error


def _guess(path: Path) -> str:
    # Of narration.json.gz the ending in front of the compression's counts.
    suffix = (path.with_suffix("") if path.suffix.lower() in (".gz", ".bz2", ".zst") else path).suffix.lower()
    if suffix == ".json":
        return "ego4d"
    if suffix in (".pkl", ".pickle"):
        return "pickle"
    if suffix == ".txt" and _SPLIT_LINE.match(next((line for line in read_lines(path) if line.strip()), "")):
        return "egtea"
    names = set(read_header(path).names)
    marks: dict[str, tuple[str, ...]] = {"egoclip": ("video_uid", "clip_text")}
    marks |= {"ek100": ("narration_id", "start_timestamp", "stop_timestamp", "narration")}
    marks |= {"charades": ("id", "actions"), "labels": ("video", "label")}
    return next((format for format, columns in marks.items() if names.issuperset(columns)), "hod")


# --------------------------------------------------------------------------------------------------
# Tables of text
# --------------------------------------------------------------------------------------------------

# Our names of a format's columns; of several names for one thing the first that is there counts.
_HOD = {"video_id": ("video_id",), "start_second": ("start_second",), "end_second": ("end_second",)} | {
    "text": ("text", "caption")
}
_EGOCLIP = {"video_id": ("video_uid",), "start_second": ("clip_start",), "end_second": ("clip_end",)} | {
    "text": ("clip_text",)
}
_EK100 = {"video_id": ("video_id",), "start_second": ("start_timestamp",), "end_second": ("stop_timestamp",)} | {
    "text": ("narration",)
}


def _read_hod(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> Annotations:
    return _read_text(path, source, extra, _HOD)


def _read_egoclip(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> Annotations:
    return _read_text(path, source, extra, _EGOCLIP)


def _read_ek100(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> Annotations:
    columns = {"uid": "narration_id"} | source.columns
    return _read_text(path, dataclasses.replace(source, columns=columns), extra, _EK100)


def _read_text(
    path: Path, source: SourceConfig, extra: Sequence[str] | None, wanted: Mapping[str, Sequence[str]]
) -> Annotations:
    header = read_header(path)
    names = [name for name in header.names if not NAMELESS.fullmatch(name)]
    here = _our_names(path, names, source.columns, wanted)
    others = [name for name in names if name not in here.values() and name not in here]
    others = others if extra is None else [name for name in others if name in (*extra, "dataset")]
    rows = read_columns(path, header, [*here.values(), *others])
    table = rows.table.rename_columns([*here, *others])
    start, end = table["start_second"], table["end_second"]
    if header.delimiter == ";":
        # Semicolons separate where the comma is the decimal point.
        start, end = (pc.replace_substring(times, ",", ".", max_replacements=1) for times in (start, end))
    return Annotations(
        columns=table.drop_columns(["start_second", "end_second"]),
        times=(start, end),
        numbers=rows.numbers,
        time_names=(here["start_second"], here["end_second"]),
        broken=tuple(f"row {number}: {fault}" for number, fault in rows.faults),
    )


def _our_names(
    path: Path, names: Sequence[str], renamed: Mapping[str, str], wanted: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Our name -> the file's name of every column that a clip needs."""
    # A column may be named as it is in the file, or as it is called below.
    renamed = {ours: name if name in names else known_form(name) for ours, name in renamed.items()}
    unknown = sorted(set(renamed) - {*wanted, "dataset", "uid"})
    if unknown:
        raise TableError(f"{path}: the source's columns name '{unknown[0]}'{nearest(unknown[0], list(wanted))}")
    here, missing = {}, []
    for ours, usual in wanted.items():
        candidates = [renamed[ours]] if ours in renamed else usual
        found = next((name for name in candidates if name in names), None)
        if found is None:
            missing.append(f"no column '{candidates[0]}'{nearest(candidates[0], names)}")
        else:
            here[ours] = found
    for ours in ("dataset", "uid"):
        if ours in renamed and renamed[ours] in names:
            here[ours] = renamed[ours]
        elif ours in renamed:
            missing.append(f"no column '{renamed[ours]}'{nearest(renamed[ours], names)}")
    if missing:
        needed = ", ".join(" or ".join([renamed[ours]] if ours in renamed else usual) for ours, usual in wanted.items())
        raise TableError(f"{path}: {'; '.join(missing)}. Needed are {needed}; other names go into the source's columns")
    return here


# --------------------------------------------------------------------------------------------------
# Ego4D narration.json
# --------------------------------------------------------------------------------------------------


def _read_ego4d(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> Annotations:
    """Moments become clips around their time stamps.

    ``egoclip`` is the rule of EgoClip (EgoVLP, 2206.01670, section 3.1): a clip is beta / alpha seconds long, beta the
    mean spacing of consecutive narrations in its video, alpha the mean of all videos' betas. ``neighbours`` takes the
    mean distance to the narrations before and after instead of beta, and the video's own beta instead of alpha.
    """
    videos, counts = list[str](), list[int]()
    texts, stamps, numbers = list[str](), list[str](), list[int]()
    broken, seen = list[str](), 0
    for video, narrations in _narration_passes(path):
        known = len(texts)
        for entry in narrations:
            seen += 1
            said, stamp = (entry.get(key) for key in _NARRATION) if isinstance(entry, dict) else (None, None)
            if isinstance(said, str) and isinstance(stamp, (int, float, str)) and not isinstance(stamp, bool):
                texts.append(said)
                stamps.append(str(stamp))
                numbers.append(seen)
            else:
                broken.append(f"narration {seen}: video '{video}': has no timestamp_sec and narration_text")
        videos.append(video)
        counts.append(len(texts) - known)
    if not stamps:
        raise TableError(f"{path}: no narrations; expected {{video: {{narration_pass_1: {{narrations: [...]}}}}}}")
    times, group = seconds(_as_text(stamps)), np.repeat(np.arange(len(videos)), counts)
    good = np.isfinite(times)
    broken += [
        f"narration {numbers[i]}: timestamp_sec is '{stamps[i]}', not a time in seconds or HH:MM:SS"
        for i in np.flatnonzero(~good)
    ]
    times, group = times[good], group[good]
    # No moment is shorter, however its video is kept: here clips are ours to choose, centred on the moment.
    length = np.maximum(_clip_lengths(times, group, source.clip_rule), MIN_SECONDS)
    columns = pa.table(
        {
            "video_id": pa.array(videos, pa.large_string()).take(pa.array(group)),
            "text": pa.array(texts, pa.large_string()).filter(pa.array(good)),
        }
    )
    return Annotations(
        columns=columns,
        times=(times - length / 2, times + length / 2),
        numbers=np.array(numbers)[good],
        unit="narration",
        time_names=("timestamp_sec", "timestamp_sec"),
        broken=tuple(broken),
    )


class _Shallow:
    """A stream of JSON that ends in an error where values are nested deeper than in any annotations.

    ijson holds the path to every open value: the memory grows with the square of the depth.
    """

    _TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)

    def __init__(self, file: Any, deepest: int = 100) -> None:
        self._file, self._deepest = file, deepest
        self._depth, self._open = 0, b""

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        block: bytes = self._file.read(size)
        brackets, begun, text = self._TEXT.sub(b"", self._open + block).partition(b'"')
        # A text goes on in the next block, perhaps with the character that a backslash stands in front of.
        self._open = begun + b"\\" * ((len(text) - len(text.rstrip(b"\\"))) % 2)
        codes = np.frombuffer(brackets.translate(None, _NO_BRACKETS), np.uint8)
        depths = self._depth + np.cumsum(np.where((codes == ord("[")) | (codes == ord("{")), 1, -1))
        if len(depths):
            self._depth = int(depths[-1])
            if depths.max() > self._deepest:
                raise ijson.JSONError(f"nested deeper than {self._deepest} levels")
        return block


def _narration_passes(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """(video, narrations) of every annotator's pass, read without holding the whole file."""
    with reading(path), open_utf8(path) as file:
        try:
            for video, content in ijson.kvitems(_Shallow(file), "", use_float=True):
                # Newer releases put the videos below one more key.
                below = content if video == "videos" and isinstance(content, dict) else {video: content}
                for name, passes in below.items():
                    for key, value in passes.items() if isinstance(passes, dict) else ():
                        found = value.get("narrations") if isinstance(value, dict) else None
                        if key.startswith("narration_pass") and isinstance(found, list):
                            yield name, found
        except ijson.JSONError as error:
            raise TableError(f"{path}: not JSON ({' '.join(str(error).split())[:200]})") from error


def _clip_lengths(times: np.ndarray, group: np.ndarray, rule: str) -> np.ndarray:
    """Seconds per narration; ``group`` numbers the pass that each belongs to, in contiguous runs."""
    order = np.lexsort((times, group))
    sorted_times, sorted_group = times[order], group[order]
    gaps = np.diff(sorted_times)
    gaps[sorted_group[1:] != sorted_group[:-1]] = np.nan
    counts = np.bincount(group)
    sums = np.bincount(sorted_group[1:], weights=np.nan_to_num(gaps), minlength=len(counts))
    with np.errstate(invalid="ignore", divide="ignore"):
        beta = sums / (counts - 1)
        known = np.isfinite(beta) & (beta > 0)
        alpha = float(beta[known].mean()) if known.any() else 1.0
        # A lone narration has no spacing: it gets the length of an average clip.
        beta[~known] = alpha
        if rule == "egoclip":
            return beta[group] / alpha
        before, after = np.concatenate([[np.nan], gaps]), np.concatenate([gaps, [np.nan]])
        around = np.where(np.isnan(before), after, np.where(np.isnan(after), before, (before + after) / 2))
        length = np.where(np.isnan(around), 1.0, around / beta[sorted_group])
    result = np.empty_like(length)
    result[order] = length
    return result


# --------------------------------------------------------------------------------------------------
# Pickles
# --------------------------------------------------------------------------------------------------


# More text than this and that many times a file's size is no list of narrations but one text repeated without end.
_MOST_TEXT, _MOST_TEXT_PER_BYTE = 64 << 20, 32


def _read_pickle(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> Annotations:
    collecting = gc.isenabled()
    # Millions of small tuples: looking for cycles among them takes most of the time.
    gc.disable()
    try:
        entries = pickles.load(path, "plain annotations")
    except pickle.UnpicklingError as error:
        raise TableError(f"{path}: {error}") from error
    finally:
        if collecting:
            gc.enable()
    if not isinstance(entries, (list, tuple)) or not entries:
        raise TableError(f"{path}: holds no list of (video, start, end, text)")
    good = [_is_clip(entry) for entry in entries]
    kept = [entry for entry, fine in zip(entries, good, strict=True) if fine]
    # Several texts are written as in the csv: one list literal.
    texts = [entry[3] if isinstance(entry[3], str) else list(flat_texts(entry[3])) for entry in kept]
    # A pickle can name one text any number of times; a column of a table holds it as often.
    length = sum(len(entry[0]) for entry in kept)
    length += sum(len(each) if isinstance(each, str) else sum(map(len, each)) for each in texts)
    if length > _MOST_TEXT + _MOST_TEXT_PER_BYTE * path.stat().st_size:
        raise TableError(f"{path}: refused: {length:,} characters of text in a file of {path.stat().st_size:,} bytes")
    columns = pa.table(
        {
            "video_id": _as_text([entry[0] for entry in kept]),
            "text": _as_text(texts),
        }
    )
    return Annotations(
        columns=columns,
        times=(_as_text([entry[1] for entry in kept]), _as_text([entry[2] for entry in kept])),
        numbers=np.flatnonzero(good) + 1,
        unit="entry",
        time_names=("start", "end"),
        broken=tuple(
            f"entry {i + 1}: {reprlib.repr(entries[i])} is no (video, start, end, text)"
            for i in np.flatnonzero(~np.array(good))
        ),
    )


def _is_clip(entry: Any) -> bool:
    """Whether an entry is (video, start, end, text or [texts])."""
    if not isinstance(entry, (list, tuple)) or len(entry) < 4:
        return False
    video, start, end, text = entry[:4]
    # Loops over so few take longer, and there are millions of entries.
    if not (_is_time(start) and _is_time(end) and isinstance(video, str) and _is_utf8(video)):
        return False
    if isinstance(text, str):
        return _is_utf8(text)
    return all(isinstance(each, str) and _is_utf8(each) for each in flat_texts(text))


def _is_time(time: Any) -> bool:
    if isinstance(time, float):
        return True
    return (isinstance(time, str) and len(time) < 40) or (isinstance(time, int) and abs(time) < 1e9)


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _as_text(values: Sequence[Any]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(map(str, values), pa.large_string())])


# --------------------------------------------------------------------------------------------------
# Labelled clips
# --------------------------------------------------------------------------------------------------

_LABELS = {"video_id": ("video",), "start_second": ("start",), "end_second": ("end",)} | {"text": ("label",)}
# EGTEA's clips are named <person>-<recipe>-<part>-<first ms>-<last ms>-F<first frame>-F<last frame>.
_SPLIT_LINE = re.compile(r"^\s*(?P<clip>[^\s-]+-[^\s-]+-[^\s-]+-(?P<start>\d+)-(?P<end>\d+)\S*)\s+(?P<action>\d+)\b")


def _read_labels(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> Annotations:
    known = {name for usual in _LABELS.values() for name in usual}
    known |= {*source.columns.values(), *map(known_form, source.columns.values())}
    strange = [name for name in read_header(path).names if name not in known and not NAMELESS.fullmatch(name)]
    if strange:
        raise TableError(
            f"{path}: unknown column '{strange[0]}'; a csv of labelled clips has video,start,end,label "
            "(the source's columns can name others)"
        )
    found = _read_text(path, source, (), _LABELS)
    for number, label in zip(found.numbers, found.columns["text"].to_pylist(), strict=True):
        # "nan" is what a missing one becomes on its way through many programs.
        if label is None or label.strip().lower() in ("", "nan"):
            raise TableError(f"{path}: {found.unit} {number}: the label is '{label or ''}', which is none")
    columns = found.columns.append_column("label", found.columns["text"])
    return dataclasses.replace(found, columns=columns, labelled=True)


def _read_egtea(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> Annotations:
    names = _egtea_classes(path.with_name("action_idx.txt"))
    rows: list[tuple[str, float, float, str, str]] = []
    numbers, broken = [], []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        match = _SPLIT_LINE.match(line)
        if not match or match["action"] not in names:
            broken.append(f"line {number}: '{line.strip()}' is not '<clip> <action of action_idx.txt> ...'")
            continue
        clip, seconds = match["clip"], (int(match["end"]) - int(match["start"])) / 1000
        # The clip is a file of its own.
        rows.append((f"{'-'.join(clip.split('-')[:3])}/{clip}", 0.0, seconds, names[match["action"]], match["action"]))
        numbers.append(number)
    found = _labelled(rows, numbers, broken, "line", "action")
    return dataclasses.replace(found, columns=found.columns.append_column("class_name", found.columns["text"]))


def _egtea_classes(path: Path) -> dict[str, str]:
    """Names of the actions by their number, as the file spells it."""
    pairs = [line.strip().rpartition(" ") for line in read_lines(path) if line.strip()]
    return {code: name.lower().replace("_", " ") for name, _, code in pairs}


def _read_charades(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> Annotations:
    lines = read_lines(path.with_name("Charades_v1_classes.txt"))
    names = {code: name for code, _, name in (line.strip().partition(" ") for line in lines if line.strip())}
    codes = {code: str(number) for number, code in enumerate(names)}
    rows: list[tuple[str, float, float, str, str]] = []
    numbers, broken = [], []
    header = read_header(path)
    for name in ("id", "actions"):
        if name not in header.names:
            raise TableError(f"{path}: no column '{name}'{nearest(name, header.names)}")
    found = read_columns(path, header, ["id", "actions"])
    broken += [f"row {number}: {fault}" for number, fault in found.faults]
    cells = (found.table[name].to_pylist() for name in ("id", "actions"))
    for video, actions, number in zip(*cells, found.numbers.tolist(), strict=True):
        for action in filter(None, (part.strip() for part in actions.split(";"))):
            code, *times = action.split()
            try:
                start, end = (float(time) for time in times)
                rows.append((video, start, end, names[code], codes[code]))
                numbers.append(number)
            except (ValueError, KeyError):
                broken.append(f"row {number}: '{action}' is not '<class> <start> <end>'")
    clips = _labelled(rows, numbers, broken, "row", "verb_class")
    # One set of classes in both roles: equal classes are relevant wholly, others not at all.
    nouns = pa.chunked_array([pa.array([f"[{code}]" for *_, code in rows], pa.large_string())])
    return dataclasses.replace(clips, columns=clips.columns.append_column("all_noun_classes", nouns))


def _labelled(
    rows: Sequence[tuple[str, float, float, str, str]], numbers: list[int], broken: list[str], unit: str, label: str
) -> Annotations:
    """Entries (video, start, end, text, class), the class in a column called ``label``."""
    video, start, end, text, code = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    columns = {"video_id": video, "text": text, label: code}
    return Annotations(
        columns=pa.table({name: pa.array(list(values), pa.large_string()) for name, values in columns.items()}),
        times=(np.array(start, dtype=np.float64), np.array(end, dtype=np.float64)),
        numbers=np.array(numbers, dtype=np.int64),
        unit=unit,
        broken=tuple(broken),
        labelled=True,
    )


_READERS: dict[str, Callable[[Path, SourceConfig, Sequence[str] | None], Annotations]] = {
    "hod": _read_hod,
    "ek100": _read_ek100,
    "egoclip": _read_egoclip,
    "ego4d": _read_ego4d,
    "pickle": _read_pickle,
    "egtea": _read_egtea,
    "charades": _read_charades,
    "labels": _read_labels,
}
