"""Ego4D: narration.json, EgoClip's table of clips made of it, LaViLa's pickles, and the EgoMCQ benchmark.

ego4d       narration.json: {video: {narration_pass_1: {narrations: [{timestamp_sec, narration_text}]}}}
egoclip     a table with video_uid, clip_start, clip_end, clip_text, tag_verb, tag_noun
pickle      LaViLa's and AVION's list of (video, start, end, text or [texts])
egomcq      egomcq.json: {question: {query: {clip_text}, choices: {"0": {video_uid, clip_start, clip_end}}, ...}}
"""

from __future__ import annotations

import gc
import pickle
import re
import reprlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ijson
import numpy as np
import pyarrow as pa

from egohod import pickles
from egohod.data.config import SourceConfig
from egohod.data.formats.base import (
    Benchmark,
    BenchmarkData,
    BenchmarkOptions,
    Format,
    RawClips,
    is_utf8,
    open_utf8,
    parse_table,
    reading,
    require_file,
    seconds,
)
from egohod.data.formats.questions import clip_choices
from egohod.data.table import text_column
from egohod.data.videos import MIN_SECONDS
from egohod.errors import UserError

_EGOCLIP_COLUMNS = {
    "video_id": ["video_uid"],
    "start_second": ["clip_start"],
    "end_second": ["clip_end"],
    "text": ["clip_text"],
}
# EgoVLP's names of its two types of questions.
_EGOMCQ_KINDS = {1: "inter", 2: "intra"}
# More text than this and that many times a file's size is no list of narrations but one text repeated without end.
_MOST_TEXT, _MOST_TEXT_PER_BYTE = 64 << 20, 32
# Texts and lists of one entry of a pickle.
_MOST_ITEMS = 10_000


# --------------------------------------------------------------------------------------------------
# narration.json
# --------------------------------------------------------------------------------------------------


def _parse_narrations(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
    """Clips around the time stamps of narrations.

    ``clip_rule=egoclip`` is the rule of EgoClip (EgoVLP, 2206.01670, section 3.1): a clip is beta / alpha seconds long,
    beta the mean spacing of consecutive narrations in its video, alpha the mean of all videos' betas. ``neighbours``
    takes the mean distance to the narrations before and after instead of beta, and the video's own beta instead of
    alpha.
    """
    videos, counts = list[str](), list[int]()
    texts, stamps, numbers = list[str](), list[str](), list[int]()
    broken, count = list[str](), 0
    for video, narrations in _narration_passes(path):
        first = len(texts)
        for entry in narrations:
            count += 1
            pair = (entry.get(key) for key in ("narration_text", "timestamp_sec")) if isinstance(entry, dict) else ()
            text, stamp = tuple(pair) or (None, None)
            # bool is an int to Python, but no time stamp.
            if isinstance(text, str) and isinstance(stamp, (int, float, str)) and not isinstance(stamp, bool):
                texts.append(text)
                stamps.append(str(stamp))
                numbers.append(count)
            else:
                broken.append(f"narration {count}: video '{video}': has no timestamp_sec and narration_text")
        videos.append(video)
        counts.append(len(texts) - first)
    if not stamps:
        raise UserError(f"{path}: no narrations; expected {{video: {{narration_pass_1: {{narrations: [...]}}}}}}")
    times, group = seconds(text_column(stamps)), np.repeat(np.arange(len(videos)), counts)
    good = np.isfinite(times)
    broken += [
        f"narration {numbers[i]}: timestamp_sec is '{stamps[i]}', not a time in seconds or HH:MM:SS"
        for i in np.flatnonzero(~good)
    ]
    times, group = times[good], group[good]
    # Never shorter than a second, whether in chunks or whole files: here we choose the clips, centred on the moment.
    length = np.maximum(_clip_lengths(times, group, source.clip_rule), MIN_SECONDS)
    columns = pa.table(
        {
            "video_id": pa.array(videos, pa.large_string()).take(pa.array(group)),
            "text": pa.array(texts, pa.large_string()).filter(pa.array(good)),
        }
    )
    return RawClips(
        columns=columns,
        times=(times - length / 2, times + length / 2),
        numbers=np.array(numbers)[good],
        unit="narration",
        time_names=("timestamp_sec", "timestamp_sec"),
        broken=tuple(broken),
    )


def _narration_passes(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """(video, narrations) of every annotator's pass, read without holding the whole file."""
    with reading(path), open_utf8(path) as file:
        try:
            for video, content in ijson.kvitems(_Shallow(file), "", use_float=True):
                # Newer releases put the videos below one more key.
                below = content if video == "videos" and isinstance(content, dict) else {video: content}
                for name, passes in below.items():
                    for key, value in passes.items() if isinstance(passes, dict) else ():
                        narrations = value.get("narrations") if isinstance(value, dict) else None
                        if key.startswith("narration_pass") and isinstance(narrations, list):
                            yield name, narrations
        except ijson.JSONError as error:
            raise UserError(f"{path}: not JSON ({' '.join(str(error).split())[:200]})") from error


class _Shallow:
    """A stream of JSON that ends in an error where values are nested deeper than in any annotations.

    ijson holds the path to every open value: the memory grows with the square of the depth.
    """

    _ESCAPE = re.compile(rb"\\.", re.DOTALL)
    _NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

    def __init__(self, file: Any, deepest: int = 100) -> None:
        self._file, self._deepest = file, deepest
        self._depth, self._in_text, self._backslash = 0, False, b""

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        block: bytes = self._file.read(size)
        # Without escapes every quote begins or ends a text, which may continue in the next block. A pattern for a whole
        # text takes time that grows with the square of its length where the block cuts it.
        content = self._ESCAPE.sub(b"", self._backslash + block)
        self._backslash = b"\\" if content.endswith(b"\\") else b""
        parts = content.split(b'"')
        brackets = b"".join(parts[self._in_text :: 2])
        self._in_text ^= len(parts) % 2 == 0
        codes = np.frombuffer(brackets.translate(None, self._NO_BRACKETS), np.uint8)
        depths = self._depth + np.cumsum(np.where((codes == ord("[")) | (codes == ord("{")), 1, -1))
        if len(depths):
            self._depth = int(depths[-1])
            if depths.max() > self._deepest:
                raise ijson.JSONError(f"nested deeper than {self._deepest} levels")
        return block


def _clip_lengths(times: np.ndarray, group: np.ndarray, rule: str) -> np.ndarray:
    """Seconds per narration; ``group`` numbers the pass that each belongs to, in contiguous runs."""
    # Annotators do not always work forwards: spacing is that of the sorted times.
    order = np.lexsort((times, group))
    sorted_times, sorted_group = times[order], group[order]
    gaps = np.diff(sorted_times)
    gaps[sorted_group[1:] != sorted_group[:-1]] = np.nan
    counts = np.bincount(group)
    sums = np.bincount(sorted_group[1:], weights=np.nan_to_num(gaps), minlength=len(counts))
    with np.errstate(invalid="ignore", divide="ignore"):
        beta = sums / (counts - 1)
        spaced = np.isfinite(beta) & (beta > 0)
        alpha = float(beta[spaced].mean()) if spaced.any() else 1.0
        # A lone narration has no spacing: it gets the length of an average clip.
        beta[~spaced] = alpha
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


def _parse_pickle(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
    collecting = gc.isenabled()
    # Millions of small tuples: looking for cycles among them takes most of the time.
    gc.disable()
    try:
        entries = pickles.load(path, "plain annotations")
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {error}") from error
    finally:
        if collecting:
            gc.enable()
    if not isinstance(entries, (list, tuple)) or not entries:
        raise UserError(f"{path}: holds no list of (video, start, end, text)")
    mask = [_is_clip(entry) for entry in entries]
    clips = [entry for entry, good in zip(entries, mask, strict=True) if good]
    # Several texts are written as in the csv: one list literal.
    texts = [entry[3] if isinstance(entry[3], str) else list(_flat_texts(entry[3])) for entry in clips]
    # A pickle can name one text any number of times; a column of a table holds it as often.
    length = sum(len(entry[0]) for entry in clips)
    length += sum(len(each) if isinstance(each, str) else sum(map(len, each)) for each in texts)
    if length > _MOST_TEXT + _MOST_TEXT_PER_BYTE * path.stat().st_size:
        raise UserError(f"{path}: refused: {length:,} characters of text in a file of {path.stat().st_size:,} bytes")
    return RawClips(
        columns=pa.table({"video_id": text_column([entry[0] for entry in clips]), "text": text_column(texts)}),
        times=(text_column([entry[1] for entry in clips]), text_column([entry[2] for entry in clips])),
        numbers=np.flatnonzero(mask) + 1,
        unit="entry",
        time_names=("start", "end"),
        broken=tuple(
            f"entry {i + 1}: {reprlib.repr(entries[i])} is no (video, start, end, text)"
            for i in np.flatnonzero(~np.array(mask))
        ),
    )


def _is_clip(entry: Any) -> bool:
    """Whether an entry is (video, start, end, text or [texts])."""
    if not isinstance(entry, (list, tuple)) or len(entry) < 4:
        return False
    video, start, end, text = entry[:4]
    # Written out: loops over so few take longer, and there are millions of entries.
    if not (_is_time(start) and _is_time(end) and isinstance(video, str) and is_utf8(video)):
        return False
    if isinstance(text, str):
        return is_utf8(text)
    return all(isinstance(each, str) and is_utf8(each) for each in _flat_texts(text))


def _is_time(time: Any) -> bool:
    if isinstance(time, float):
        return True
    # Longer numbers would take seconds to print.
    return (isinstance(time, str) and len(time) < 40) or (isinstance(time, int) and abs(time) < 1e9)


def _flat_texts(value: Any, depth: int = 8) -> Iterator[Any]:
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


# --------------------------------------------------------------------------------------------------
# EgoMCQ
# --------------------------------------------------------------------------------------------------


def _read_egomcq(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """EgoMCQ: which of five clips does a narration describe; inter-video and intra-video questions apart."""
    return clip_choices(require_file(source, "egomcq.json"), ("clip_start", "clip_end"), _EGOMCQ_KINDS, "clip_text")


EGO4D = Format("ego4d", _parse_narrations, suffixes=(".json",), benchmarks=(Benchmark("egomcq", _read_egomcq),))
EGOCLIP = Format("egoclip", partial(parse_table, columns=_EGOCLIP_COLUMNS), columns=("video_uid", "clip_text"))
PICKLE = Format("pickle", _parse_pickle, suffixes=(".pkl", ".pickle"))
