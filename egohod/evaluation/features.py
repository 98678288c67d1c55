"""Features that were computed before, by content: never those of another checkpoint, clip or protocol.

    <folder>/<group>/<process and number>.npz    keys [n] and features float32 [n, D]

The group is the checksum of everything that all features of an evaluation share (weights, protocol, resolution,
precision), a key that of one clip under one order of frames, or of one text. Files are only ever added, each as a
whole, so that an interrupted evaluation and several processes leave nothing broken behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import reprlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egohod.errors import UserError
from egohod.evaluation.metrics import rank_items

log = logging.getLogger(__name__)

# So many new features are written at a time.
_FILE_ROWS = 256


class FeatureCache:
    """One group of features below ``folder``; ``shared`` is whatever tells it from other groups."""

    def __init__(self, folder: Path, shared: Mapping[str, Any]) -> None:
        self.group = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = folder / self.group
        self._waiting: dict[str, NDArray[np.float32]] = {}

    def read(self, keys: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The features that are there, by key."""
        wanted, found = set(keys), dict[str, NDArray[np.float32]]()
        for path in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as content:
                    names, features = map(str, content["keys"]), np.asarray(content["features"], np.float32)
                rows = dict(zip(names, features, strict=True))
            except Exception as error:  # a damaged file can raise anything
                log.warning("%s: not readable (%.200s), its features are computed again", path, error)
                continue
            found |= {key: row for key, row in rows.items() if key in wanted}
        return found

    def add(self, key: str, feature: NDArray[np.float32]) -> None:
        """Keep a feature; it is on the disk after the next :meth:`flush` at the latest."""
        self._waiting[key] = feature
        if len(self._waiting) >= _FILE_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is not on the disk yet. A full disk costs the cache, not the evaluation."""
        if not self._waiting:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            final = self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.npz"
            part = final.with_suffix(".part")
            with part.open("wb") as file:
                np.savez(file, keys=np.array(list(self._waiting)), features=np.stack(list(self._waiting.values())))
            part.replace(final)
        except OSError as error:
            log.warning("%s: features are not kept: %s", self.folder, error.strerror or error)
        self._waiting.clear()


def feature_key(*parts: str) -> str:
    """The key of one clip or text."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


FORMAT = 1
INDEX_FILE, CONFIG_FILE = "index.json", "config.yml"
# What features must have in common to lie in one folder.
SHARED = ("format", "weights", "protocol")
_KINDS: dict[str, type | tuple[type, ...]] = {
    "weights": str,
    "root": str,
    "layout": str,
    "chunk_seconds": (int, float),
    "videos": dict,
}


@dataclass(frozen=True)
class Features:
    """All features of an index: row i is the clip [start, end) of ``videos[i]``, of which ``texts[i]`` was said."""

    features: NDArray[np.float32]
    videos: Sequence[str]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    texts: Sequence[str]


def file_of(video: str) -> str:
    """The name of a video's features below the folder."""
    return f"{video}.npz"


def open_index(folder: Path, said: Mapping[str, Any]) -> None:
    """Write ``index.json`` for the settings ``said``, or add their videos to the one that is there.

    Raises :class:`UserError` if the folder holds features of other weights or another protocol.
    """
    there = read_index(folder) if (folder / INDEX_FILE).exists() else None
    if there is not None:
        differ = [name for name in SHARED if there.get(name) != said[name]]
        if differ:
            raise UserError(f"{folder}: holds features of another {' and '.join(differ)}; choose another --output")
        if there.get("root") != said["root"]:
            raise UserError(f"{folder}: holds features of the videos in {there.get('root')}; choose another --output")
    write_json(folder / INDEX_FILE, {**said, "videos": {**(there["videos"] if there else {}), **said["videos"]}})


def read_index(folder: Path) -> dict[str, Any]:
    """What ``index.json`` says. Raises :class:`UserError`."""
    path = folder / INDEX_FILE
    content = read_json(path, FORMAT, "tools/extract_features.py makes such folders")
    for name, kind in _KINDS.items():
        if not isinstance(content.get(name), kind):
            raise UserError(f"{path}: damaged, {name} is {reprlib.repr(content.get(name))}; extract into a new folder")
    return content


def write_video(
    folder: Path, video: str, features: NDArray[np.float32], start: Any, end: Any, texts: Sequence[str], identity: str
) -> None:
    """Write the features of one video. Raises :class:`OSError`, leaving what was there."""
    final = folder / file_of(video)
    final.parent.mkdir(parents=True, exist_ok=True)
    part = final.with_name(f".{final.name}.part")
    with part.open("wb") as file:
        np.savez(
            file, features=features, start=np.asarray(start, np.float64), end=np.asarray(end, np.float64),
            text=np.array(texts, dtype=np.str_), identity=np.array(identity),
        )  # fmt: skip
    os.replace(part, final)


def is_written(folder: Path, video: str, identity: str) -> bool:
    """Whether the features of a video are there, made of these very clips of this very file."""
    try:
        with np.load(folder / file_of(video), allow_pickle=False) as content:
            return str(content["identity"]) == identity
    except Exception:  # not there, or damaged, which can raise anything
        return False


def read_features(folder: Path) -> tuple[Features, int]:
    """All features of an index, and how many of its videos have none yet.

    Raises :class:`UserError` if there are none at all, or a file that cannot be read.
    """
    names = list(read_index(folder)["videos"])
    parts, videos, lacking = list[tuple[NDArray[np.float32], Any, Any, list[str]]](), list[str](), 0
    for video in names:
        path = folder / file_of(video)
        try:
            part = _read_video(path)
        except FileNotFoundError:
            lacking += 1
            continue
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{path}: not readable ({error}); delete it and extract again") from error
        if parts and part[0].shape[1] != parts[0][0].shape[1]:
            width = f"{part[0].shape[1]} dimensions, those of other videos {parts[0][0].shape[1]}"
            raise UserError(f"{path}: its features have {width}; delete it and extract again")
        parts.append(part)
        videos += [video] * len(part[0])
    if not parts:
        raise UserError(f"{folder}: no video of the index has features yet; run tools/extract_features.py again")
    features, start, end = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Features(features, videos, start, end, [text for part in parts for text in part[3]]), lacking


def _read_video(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], list[str]]:
    """Features [n, D], start and end [n], and texts. Raises :class:`ValueError` where they do not fit one another."""
    with np.load(path, allow_pickle=False) as content:
        features = np.asarray(content["features"], np.float32)
        start, end = (np.asarray(content[name], np.float64) for name in ("start", "end"))
        texts = [str(text) for text in content["text"]]
    if features.ndim != 2 or not (len(features),) == start.shape == end.shape == (len(texts),):
        shapes = f"{features.shape}, {start.shape}, {end.shape} and {len(texts)}"
        raise ValueError(f"features, start, end and text are of the shapes {shapes}")
    return features, start, end, texts


@dataclass(frozen=True)
class Hit:
    """A clip with its cosine similarity; an infinite ``end`` is the file's."""

    video: str
    start: float
    end: float
    similarity: float
    text: str


def search(query: NDArray[np.float32], found: Features, top: int, overlapping: bool = False) -> list[Hit]:
    """The ``top`` clips nearest to a query [D], the best first; ties go to the earlier one.

    Of clips of one video that overlap only the best is a hit, unless ``overlapping``: windows that slide see every
    moment several times. Raises :class:`UserError` for features of another width than the query's.
    """
    if found.features.shape[1:] != query.shape:
        raise UserError(f"the index has features of {found.features.shape[1]} dimensions, the query {len(query)}")
    similarity = found.features @ query
    hits: list[Hit] = []
    for row in rank_items(similarity[None])[0].tolist():
        hit = Hit(
            found.videos[row], float(found.start[row]), float(found.end[row]), float(similarity[row]), found.texts[row]
        )
        if overlapping or not any(_overlap(hit, other) for other in hits):
            hits.append(hit)
        if len(hits) == top:
            break
    return hits


def clock(second: float) -> str:
    """Seconds as H:MM:SS.s."""
    tenths = round(10 * second)
    return f"{tenths // 36000}:{tenths // 600 % 60:02d}:{tenths // 10 % 60:02d}.{tenths % 10}"


def span(hit: Hit) -> str:
    """The times of a hit for people."""
    return "whole" if np.isinf(hit.end) else f"{clock(hit.start)} - {clock(hit.end)}"


def _overlap(one: Hit, other: Hit) -> bool:
    return one.video == other.video and one.start < other.end and other.start < one.end


def write_json(path: Path, content: Any) -> None:
    """Write a file of :func:`read_json` as a whole or not at all."""
    write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # Annotations may hold half a character (a lone surrogate), which no encoding can spell.
    temporary.write_text(content, encoding="utf-8", errors="replace")
    os.replace(temporary, path)


def read_json(path: Path, version: int, cure: str) -> dict[str, Any]:
    """A file of :func:`write_json` with ``format`` ``version``.

    Raises :class:`UserError` naming the file; ``cure`` says what helps if it is not there.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; {cure}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != version:
        raise UserError(f"{path}: not of format {version}; make it again with this version")
    return content


def _plain(value: Any) -> Any:
    """``value`` with null for numbers that are none (a metric without a single query), which JSON cannot spell."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
