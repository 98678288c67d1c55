"""Features on the disk, one file a video, to search in or to feed to another model.

    <folder>/index.json      model, weights, protocol, where the videos lie, and the file of each video
    <folder>/config.yml      the configuration that makes the model again
    <folder>/<video>.npz     features float32 [n, D] of unit length, start and end float64 [n] in seconds (an infinite
                             end is the file's), text [n], identity

Each file appears as a whole or not at all; ``identity`` tells whether clips or videos changed since.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egohod.errors import UserError
from egohod.evaluation.report import read_json, write_json

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
