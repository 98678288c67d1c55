"""Features on the disk, one file a video, to search in or to feed to another model.

    <folder>/index.json      model, weights, protocol, where the videos lie, and the file of each video
    <folder>/config.yml      the configuration that makes the model again
    <folder>/<video>.npz     features float32 [n, D] of unit length, start and end float64 [n] in seconds (an infinite
                             end is the file's), text [n], identity

Each file appears as a whole or not at all; ``identity`` tells whether clips or videos changed since.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egohod.config import UserError
from egohod.evaluation.report import read_json, write_json

FORMAT = 1
INDEX_FILE, CONFIG_FILE = "index.json", "config.yml"
# What features must have in common to lie in one folder.
SHARED = ("format", "weights", "protocol")


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
        if there["root"] != said["root"]:
            raise UserError(f"{folder}: holds features of the videos in {there['root']}; choose another --output")
    write_json(folder / INDEX_FILE, {**said, "videos": {**(there["videos"] if there else {}), **said["videos"]}})


def read_index(folder: Path) -> dict[str, Any]:
    """What ``index.json`` says. Raises :class:`UserError`."""
    path = folder / INDEX_FILE
    content = read_json(path, FORMAT, "tools/extract_features.py makes such folders")
    if not isinstance(content.get("videos"), dict):
        raise UserError(f"{path}: names no videos")
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
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False


def read_features(folder: Path) -> tuple[Features, int]:
    """All features of an index, and how many of its videos have none yet.

    Raises :class:`UserError` if there are none at all, or a file that cannot be read.
    """
    names = list(read_index(folder)["videos"])
    parts, lacking = [], 0
    for video in names:
        path = folder / file_of(video)
        try:
            with np.load(path, allow_pickle=False) as content:
                parts.append((video, *(content[name] for name in ("features", "start", "end", "text"))))
        except FileNotFoundError:
            lacking += 1
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not readable ({error}); delete it and extract again") from error
    if not parts:
        raise UserError(f"{folder}: no video of the index has features yet; run tools/extract_features.py again")
    videos = [video for video, features, *_ in parts for _ in range(len(features))]
    stacked = [np.concatenate([part[i] for part in parts]) for i in range(1, 5)]
    return Features(stacked[0], videos, stacked[1], stacked[2], stacked[3].tolist()), lacking
