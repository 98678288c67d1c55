"""When something happens in a long clip: Ego4D's natural language queries and moments queries.

ego4d_nlq   nlq_train.json, nlq_val.json: {videos: [{video_uid, clips: [{video_start_sec, video_end_sec, annotations:
            [{language_queries: [{query, video_start_sec, video_end_sec}]}]}]}]}
ego4d_mq    moments_train.json, moments_val.json: as above, with labels: [{label, video_start_time, video_end_time,
            primary}] instead of language_queries

A clip is covered by windows, whose features are what a model is measured by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from egohod.data.config import SourceConfig
from egohod.data.formats.base import (
    Benchmark,
    BenchmarkData,
    BenchmarkOptions,
    GroundingData,
    MomentQuery,
    is_utf8,
    read_json,
    require_file,
)
from egohod.data.table import ClipTable
from egohod.errors import UserError

# Seconds of a clip: a damaged time must not ask for windows without end.
_LONGEST = 86400.0


def _read(source: SourceConfig, options: BenchmarkOptions, stem: str) -> BenchmarkData:
    """The windows of all clips, and the queries of the training and the validation part."""
    windows: list[tuple[str, float, float]] = []
    recordings: list[np.ndarray] = []
    texts: dict[str, int] = {}
    entries: list[tuple[int, str, list[tuple[float, float]], bool]] = []
    empty = short = 0
    for part in ("train", "val"):
        path = require_file(source, f"{stem}_{part}.json")
        for video, start, end, clip, where in _clips(path):
            # Windows overlap by half, and the last one ends with the clip.
            length = options.window_seconds
            count = max(1, math.ceil((end - start - length) / (length / 2)) + 1)
            firsts = [start + i * length / 2 for i in range(count)]
            rows = [(first, min(first + length, end)) for first in firsts]
            recordings.append(len(windows) + np.arange(len(rows)))
            windows += [(video, first, last) for first, last in rows]
            moments: dict[str, list[tuple[float, float]]] = {}
            for text, first, last in _moments(clip, stem, where):
                # A fault of the annotations that the official evaluation leaves in: nothing can overlap with them.
                empty, short = empty + (not text), short + bool(text and last - first < 1e-3)
                if text:
                    # Several annotators mark the same moment.
                    moments.setdefault(text, []).append((max(first, start), min(last, end)))
            for text, spans in moments.items():
                if stem == "nlq":  # each query is asked for itself, also where two are worded alike
                    entries += [(len(recordings) - 1, text, [span], part == "train") for span in spans]
                else:
                    entries.append((len(recordings) - 1, text, _merged(spans), part == "train"))
    for _, text, _, _ in entries:
        texts.setdefault(text, len(texts))
    queries = [MomentQuery(r, texts[text], tuple(spans), train) for r, text, spans, train in entries]
    if stem != "nlq":  # a class that does not occur in a clip may still be detected there
        annotated = {(query.recording, query.text) for query in queries}
        trained = {query.recording: query.train for query in queries}
        queries += [
            MomentQuery(recording, text, (), train)
            for recording, train in trained.items()
            for text in range(len(texts))
            if (recording, text) not in annotated
        ]
    for train, part in ((True, "train"), (False, "val")):
        if not any(query.train == train and query.moments for query in queries):
            raise UserError(f"{source.metadata}: {stem}_{part}.json has no annotated moment")
    notes = [f"{empty} queries without text are left out"] if empty else []
    notes += [f"{short} moments have no length and can be hit by nothing"] if short else []
    videos, starts, ends = zip(*windows, strict=True)
    ids = [f"{video}:{first:.2f}-{last:.2f}" for video, first, last in windows]
    table = ClipTable.of(Path(source.metadata), videos, starts, ends, uid=ids)
    centres = (np.array(starts) + np.array(ends)) / 2
    # Classes are called "clean_/_wipe_a_table".
    names = [text if stem == "nlq" else " ".join(text.replace("_", " ").replace("/", " or ").split()) for text in texts]
    data = GroundingData(names, recordings, centres, options.window_seconds / 2, queries, detection=stem != "nlq")
    return BenchmarkData(table, [data], notes)


def _clips(path: Path) -> Iterator[tuple[str, float, float, Any, str]]:
    """(video, start, end, clip, where it is) of every clip of a file."""
    content, where = read_json(path), f"{path}"
    try:
        for video in content["videos"]:
            for clip in video["clips"]:
                where = f"{path}: clip '{clip['clip_uid']}'"
                start, end = max(float(clip["video_start_sec"]), 0.0), float(clip["video_end_sec"])
                if not start < end < start + _LONGEST:
                    raise UserError(f"{where}: {start:g} to {end:g} s is not a range of time, or longer than a day")
                name = str(video["video_uid"])
                if not name or name.startswith(("/", "\\")) or ".." in name or "\0" in name or not is_utf8(name):
                    raise UserError(f"{where}: video_uid '{name}' leads out of the folder")
                yield name, start, end, clip, where
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: {type(error).__name__} {error}") from error


def _moments(clip: Any, stem: str, where: str) -> Iterator[tuple[str, float, float]]:
    """(query or class, start, end) of a clip, in seconds of its video."""
    try:
        for annotation in clip["annotations"]:
            if stem == "nlq":
                for query in annotation["language_queries"]:
                    # The template of some queries was never filled in.
                    yield _checked(query.get("query"), query["video_start_sec"], query["video_end_sec"])
            else:
                for label in annotation["labels"]:
                    if label["primary"]:  # as the official conversion
                        yield _checked(label["label"], label["video_start_time"], label["video_end_time"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: {type(error).__name__} {error}") from error


def _checked(text: Any, start: Any, end: Any) -> tuple[str, float, float]:
    text, first, last = str(text or "").strip(), float(start), float(end)
    if not is_utf8(text):
        raise ValueError("a text is not UTF-8")
    if not math.isfinite(first) or not math.isfinite(last):
        raise ValueError("a time is not finite")
    return text, first, last


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Moments of one class, those of several annotators that overlap by half and more once."""
    chosen: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        overlaps = (min(end, b) - max(start, a) for a, b in chosen)
        unions = (max(end, b) - min(start, a) for a, b in chosen)
        if not any(common >= 0.5 * whole for common, whole in zip(overlaps, unions, strict=True)):
            chosen.append((start, end))
    return chosen


MOMENTS = (
    Benchmark("ego4d_nlq", lambda source, options: _read(source, options, "nlq")),
    Benchmark("ego4d_mq", lambda source, options: _read(source, options, "moments")),
)
