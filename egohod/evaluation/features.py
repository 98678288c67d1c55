"""Features on disk, in one format for two uses: the cache of evaluations, and an index of your own videos.

A file is an ``.npz`` with ``features`` float32 [n, D] and, as arrays of the same length, what each row is:

    cache   <folder>/<group>/<process>-<random>.npz   keys: of one clip under one order of frames, or of one text
    index   <folder>/<video>.npz                      start and end (seconds; an infinite end is the file's), text;
                                                      and identity, one value: of the clips and of the video file
            <folder>/index.json                       model, weights, protocol, root of the videos, file of each video
            <folder>/config.yml                       the configuration that builds the model again

The cache is addressed by content: a group is the hash of everything that all its features depend on (weights, protocol,
resolution, precision), so features of another checkpoint, clip or protocol are never returned. Every file appears as a
whole or not at all: an interrupted run and several processes leave nothing broken behind.
"""

from __future__ import annotations

import json
import logging
import math
import os
import reprlib
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egohod.errors import UserError
from egohod.evaluation.metrics import rank_items
from egohod.runtime import UNFINISHED_PREFIX, atomic_write, content_hash, write_text

log = logging.getLogger(__name__)

# Features in a file of the cache. Small, as an interruption loses at most this many.
_CACHE_FILE_ROWS = 256

INDEX_FORMAT = 1
INDEX_FILE, CONFIG_FILE = "index.json", "config.yml"
# Settings that all features of a folder, and of folders that are compared, have in common.
INDEX_SHARED = ("format", "weights", "protocol")
_INDEX_TYPES: dict[str, type | tuple[type, ...]] = {
    "weights": str,
    "root": str,
    "layout": str,
    "chunk_seconds": (int, float),
    "videos": dict,
}


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def write_feature_file(path: Path, features: NDArray[np.float32], **columns: Any) -> None:
    """Write ``features`` [n, D] and ``columns`` as a whole or not at all. Raises :class:`OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Through an open file: given a name, NumPy would add .npz to one that does not end in it. Not compressed: features
    # are noise to zip, which would only make reading slower.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, features=features, **columns)


def read_feature_file(path: Path, *columns: str) -> tuple[NDArray[np.float32], list[NDArray[Any]]]:
    """Features float32 [n, D] (in a cache also [n, V, D], of V views) and the named columns [n] of a file.

    Raises :class:`OSError`, :class:`ValueError` where lengths differ, and anything else for a damaged file.
    """
    # Without pickle, which could run any code: an index may come from someone else.
    with np.load(path, allow_pickle=False) as content:
        features = np.asarray(content["features"], np.float32)
        values = [content[name] for name in columns]
    if features.ndim < 2 or any(each.shape != (len(features),) for each in values):
        shapes = ", ".join(str(each.shape) for each in (features, *values))
        raise ValueError(f"features, {', '.join(columns)} have the shapes {shapes}")
    return features, values


def write_json(path: Path, content: Any) -> None:
    """Write a file for :func:`read_json` as a whole or not at all, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def read_json(path: Path, version: int, hint: str) -> dict[str, Any]:
    """A file of :func:`write_json` whose ``format`` is ``version``.

    Raises :class:`UserError` naming the file; ``hint`` says how to get one if it does not exist.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; {hint}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != version:
        raise UserError(f"{path}: not of format {version}; make it again with this version")
    return content


def _finite(value: Any) -> Any:
    # JSON has no NaN, which is the value of a metric without a single query: it becomes null.
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------------------------------
# The cache of evaluations
# --------------------------------------------------------------------------------------------------


class FeatureCache:
    """One group of cached features below ``folder``; ``shared`` is everything that all of them depend on."""

    def __init__(self, folder: Path, shared: Mapping[str, Any]) -> None:
        self.group = content_hash(json.dumps(shared, sort_keys=True), length=32)
        self.folder = folder / self.group
        self._pending: dict[str, NDArray[np.float32]] = {}

    def read(self, keys: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The features that are cached, by key."""
        requested, cached = set(keys), dict[str, NDArray[np.float32]]()  # a set: a group may have millions of keys
        # In order of their names: of a key that two processes wrote, later evaluations read the same feature.
        for path in sorted(self.folder.glob("*.npz")):
            if path.name.startswith(UNFINISHED_PREFIX):  # another process is writing it
                continue
            try:
                features, (names,) = read_feature_file(path, "keys")
            except Exception as error:  # a damaged file can raise anything
                log.warning("%s: not readable (%.200s); its features are computed again", path, error)
                continue
            cached |= {key: row for key, row in zip(map(str, names), features, strict=True) if key in requested}
        return cached

    def add(self, key: str, feature: NDArray[np.float32]) -> None:
        """Add a feature; it is on disk after the next :meth:`flush` at the latest."""
        self._pending[key] = feature
        if len(self._pending) >= _CACHE_FILE_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet. A full disk costs the cache, not the evaluation."""
        if not self._pending:
            return
        # Process ids repeat on the machines of a cluster.
        path = self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.npz"
        try:
            write_feature_file(path, np.stack(list(self._pending.values())), keys=np.array(list(self._pending)))
        except OSError as error:
            log.warning("%s: features are not cached: %s", self.folder, error.strerror or error)
        self._pending.clear()


def feature_key(*parts: str) -> str:
    """The key of one clip or text."""
    return content_hash(*parts, length=40)  # as released: another length would make all caches worthless


# --------------------------------------------------------------------------------------------------
# An index of videos
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """All features of an index: row i is the clip [start, end) of ``videos[i]`` with the narration ``texts[i]``."""

    features: NDArray[np.float32]
    videos: Sequence[str]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    texts: Sequence[str]

    @cached_property
    def rows_of(self) -> dict[str, range]:
        """The rows of each video, which follow one another."""
        starts = [row for row, video in enumerate(self.videos) if row == 0 or video != self.videos[row - 1]]
        ends = [*starts[1:], len(self.videos)]
        return {self.videos[first]: range(first, end) for first, end in zip(starts, ends, strict=True)}


def file_of(video: str) -> str:
    """The name of a video's features below the folder."""
    return f"{video}.npz"


def open_index(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``index.json``, or add the videos of ``settings`` to one of the same settings.

    Raises :class:`UserError` if the folder has features of other weights, of another protocol or of other videos.
    """
    previous = read_index(folder) if (folder / INDEX_FILE).exists() else None
    if previous is not None:
        # Features of other weights are in another space: a search over both would rank noise.
        differ = [name for name in INDEX_SHARED if previous.get(name) != settings[name]]
        if differ:
            raise UserError(f"{folder}: holds features of another {' and '.join(differ)}; choose another --output")
        # Names of videos are relative to their root, so one name could be two videos.
        if (root := previous.get("root")) != settings["root"]:
            raise UserError(f"{folder}: holds features of the videos in {root}; choose another --output")
    videos = {**(previous["videos"] if previous else {}), **settings["videos"]}
    write_json(folder / INDEX_FILE, {**settings, "videos": videos})


def read_index(folder: Path) -> dict[str, Any]:
    """The content of ``index.json``. Raises :class:`UserError`."""
    path = folder / INDEX_FILE
    content = read_json(path, INDEX_FORMAT, "tools/extract_features.py makes such folders")
    for name, expected in _INDEX_TYPES.items():
        if not isinstance(content.get(name), expected):
            raise UserError(f"{path}: damaged, {name} is {reprlib.repr(content.get(name))}; extract into a new folder")
    return content


def write_video(
    folder: Path, video: str, features: NDArray[np.float32], start: Any, end: Any, texts: Sequence[str], identity: str
) -> None:
    """Write the features of one video. Raises :class:`OSError`, leaving an older file as it was."""
    write_feature_file(
        folder / file_of(video),
        features,
        start=np.asarray(start, np.float64),
        end=np.asarray(end, np.float64),
        text=np.array(texts, dtype=np.str_),
        identity=np.array(identity),
    )


def is_written(folder: Path, video: str, identity: str) -> bool:
    """Whether a video's features are on disk and of these very clips of this very file."""
    try:
        with np.load(folder / file_of(video), allow_pickle=False) as content:
            return str(content["identity"]) == identity
    except Exception:  # missing, or damaged, which can raise anything
        return False


def read_features(folder: Path) -> tuple[Features, int]:
    """All features of an index, and how many of its videos have none yet.

    Raises :class:`UserError` if there are none at all, or naming a file that cannot be read.
    """
    parts, videos, index = list[tuple[NDArray[Any], ...]](), list[str](), read_index(folder)["videos"]
    for video, part in feature_files(folder, index):
        parts.append(part)
        videos += [video] * len(part[0])
    features, start, end = (np.concatenate([part[i] for part in parts]) for i in range(3))
    texts = [str(text) for part in parts for text in part[3]]
    return Features(features, videos, start, end, texts), len(index) - len(parts)


def feature_files(folder: Path, videos: Iterable[str]) -> Iterator[tuple[str, tuple[NDArray[Any], ...]]]:
    """Each video of an index that has features, with these, float32 [n, D], start, end and text [n], one at a time.

    Raises as :func:`read_features` does.
    """
    # A video without a file is no error: an index can be searched while it grows.
    width = 0
    for video in videos:
        path = folder / file_of(video)
        try:
            features, (start, end, texts) = read_feature_file(path, "start", "end", "text")
            part = features, start.astype(np.float64), end.astype(np.float64), texts.astype(np.str_)
        except FileNotFoundError:
            continue
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{path}: not readable ({error}); delete it and extract again") from error
        if width and features.shape[1] != width:
            widths = f"{features.shape[1]} dimensions, those of other videos {width}"
            raise UserError(f"{path}: its features have {widths}; delete it and extract again")
        width = features.shape[1]
        yield video, part
    if not width:
        raise UserError(f"{folder}: no video of the index has features yet; run tools/extract_features.py again")


# --------------------------------------------------------------------------------------------------
# Search
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hit:
    """A clip with its cosine similarity; an infinite ``end`` is the file's."""

    video: str
    start: float
    end: float
    similarity: float
    text: str


def search(query: NDArray[np.float32], index: Features, top: int, overlapping: bool = False) -> list[Hit]:
    """The ``top`` clips most similar to a query [D], best first; of equal ones the earlier.

    Of clips of one video that overlap only the best is a hit, unless ``overlapping``: sliding windows see every moment
    several times. Raises :class:`UserError` for a query of another width than the features.
    """
    # Equal widths do not prove equal models: tools/search.py compares the checksum of the weights, too.
    if index.features.shape[1:] != query.shape:
        raise UserError(f"the index has features of {index.features.shape[1]} dimensions, the query {len(query)}")
    similarity = index.features @ query  # of unit vectors, so it is their cosine
    return [
        Hit(index.videos[row], float(index.start[row]), float(index.end[row]), float(similarity[row]), index.texts[row])
        for row in best_rows(similarity, index, top, overlapping)
    ]


def best_rows(
    similarity: NDArray[np.float32],
    index: Features,
    top: int,
    overlapping: bool = False,
    allowed: NDArray[np.bool_] | None = None,
) -> list[int]:
    """The rows of :func:`search` for the similarity of each row [N], of those that are ``allowed`` [N]."""
    free = np.ones(len(similarity), bool) if allowed is None else allowed.copy()
    rows = list[int]()
    for row in rank_items(similarity[None])[0].tolist():
        if not free[row]:
            continue
        rows.append(row)
        if len(rows) == top:
            break
        if not overlapping:
            # Clips come best first, so whatever overlaps a hit is worse than it.
            same = index.rows_of[index.videos[row]]
            start, end = index.start[same.start : same.stop], index.end[same.start : same.stop]
            free[same.start : same.stop] &= (start >= index.end[row]) | (end <= index.start[row])
    return rows


def span(hit: Hit) -> str:
    """The times of a hit for people, H:MM:SS.s each."""
    if np.isinf(hit.end):
        return "whole"
    times = []
    for second in (hit.start, hit.end):
        tenths = round(10 * second)  # rounded first, or 59.97 would become 60.0 seconds
        times.append(f"{tenths // 36000}:{tenths // 600 % 60:02d}:{tenths // 10 % 60:02d}.{tenths % 10}")
    return " - ".join(times)
