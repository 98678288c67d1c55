"""LaViLa's and AVION's pickles: a list of (video, start, end, text or [texts])."""

from __future__ import annotations

import gc
import pickle
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from egohod import pickles
from egohod.data.config import SourceConfig
from egohod.data.formats.base import Format
from egohod.data.table import RawClips
from egohod.data.text_files import flat_texts, text_column
from egohod.errors import UserError

# More text than this and that many times a file's size is no list of narrations but one text repeated without end.
_MOST_TEXT, _MOST_TEXT_PER_BYTE = 64 << 20, 32


def _parse(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
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
    texts = [entry[3] if isinstance(entry[3], str) else list(flat_texts(entry[3])) for entry in clips]
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
    if not (_is_time(start) and _is_time(end) and isinstance(video, str) and _is_utf8(video)):
        return False
    if isinstance(text, str):
        return _is_utf8(text)
    return all(isinstance(each, str) and _is_utf8(each) for each in flat_texts(text))


def _is_time(time: Any) -> bool:
    if isinstance(time, float):
        return True
    # Longer numbers would take seconds to print.
    return (isinstance(time, str) and len(time) < 40) or (isinstance(time, int) and abs(time) < 1e9)


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


PICKLE = Format("pickle", _parse, suffixes=(".pkl", ".pickle"))
