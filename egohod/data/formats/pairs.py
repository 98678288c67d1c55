"""Data sets whose videos have a file of annotations each, beside them: WebDataset shards and EgoDex.

webdataset  plain tars of NAME.mp4 with NAME.json and NAME.txt, as Egocentric-10K has them; read by their index,
            shards.parquet, which :func:`index_shards` writes once: tools/prepare_data.py index
egodex      TASK/0.mp4 with TASK/0.hdf5, whose attributes are the narration

A clip is a whole video. Sources: the card of builddotai/Egocentric-10K; the README of apple/ml-egodex.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from egohod.data.config import SourceConfig
from egohod.data.decoders import VIDEO_ENDINGS, choose_decoder
from egohod.data.formats.base import Format, RawClips, is_utf8, parse_json, reading, refuse_links
from egohod.data.storage import (
    SHARD_INDEX,
    LocalFolder,
    RangedFile,
    RemoteFolder,
    ShardIndex,
    VideoError,
    open_folder,
    tar_members,
)
from egohod.data.table import text_column
from egohod.errors import UserError, nearest

log = logging.getLogger(__name__)

# What programs call these in the JSON of a video; the source's columns can name others.
_NAMES = {
    "text": ("text", "caption", "narration", "description", "instruction", "txt"),
    "start_second": ("start_second",),
    "end_second": ("end_second",),
}
_LENGTHS = ("duration_sec", "duration")
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$")
# More than any description of a video; what is larger is no annotation.
_MOST_BYTES = 1 << 20
# The frame rate of EgoDex, to which its poses are aligned.
_EGODEX_FPS = 30.0


# --------------------------------------------------------------------------------------------------
# WebDataset
# --------------------------------------------------------------------------------------------------


def index_shards(root: str, output: Path, on_shard: Callable[[int, int], None] | None = None) -> tuple[int, int]:
    """Write the index of all plain tars below ``root``, a folder or a URI, into ``output``: (shards, videos).

    No video is unpacked: headers and small files are read, and of a video without a length its header. A video's name
    begins with that of its shard without ``.tar``, since names repeat from shard to shard. ``on_shard`` is called with
    the numbers of shards that are done and of all. Raises :class:`UserError` naming shard and member, also for two
    videos of one id.
    """
    folder = open_folder(root)
    rows, shards, opener = list[tuple[Any, ...]](), list(_shards(folder, root, "")), choose_decoder("auto")[1]
    places = dict[str, str]()
    for done, shard in enumerate(shards, 1):
        where = folder.name_of(shard)
        if not re.fullmatch(r"[\w./-]+", shard):
            raise UserError(f"{where}: a shard's name can only have letters, digits, '.', '-' and '_'; rename it")
        # By sample, whose files have the name up to the first dot in common.
        videos, fields = list[tuple[str, str, int, int]](), defaultdict[str, dict[str, Any]](dict)
        for name, offset, size, content in tar_members(folder, shard):
            if not is_utf8(name):
                raise UserError(f"{where}: member {name!r} is not UTF-8")
            stem, dot, ending = name.rpartition("/")[2].partition(".")
            sample = name[: len(name) - len(dot + ending)]
            if not stem:  # what macOS adds
                continue
            if name.lower().endswith(VIDEO_ENDINGS):
                videos.append((name, sample, offset, size))
            elif ending.lower() in ("json", "txt"):
                if size > _MOST_BYTES:
                    raise UserError(f"{where}: member '{name}' has {size:,} bytes, too many for an annotation")
                fields[sample] |= _fields(content(), ending.lower(), f"{where}: member '{name}'")
        for name, sample, offset, size in videos:
            about = fields.get(sample, {})
            video = f"{shard.removesuffix('.tar')}/{name.rpartition('.')[0]}"
            if other := places.get(video):
                raise UserError(f"{where}/{name} and {other} would both be '{video}'; rename one")
            places[video] = f"{where}/{name}"
            seconds = next((_number(about[key]) for key in _LENGTHS if key in about), None)
            if seconds is None or not 0 < seconds < np.inf:

                def fetch(start: int, end: int, shard: str = shard, offset: int = offset) -> bytes:
                    return folder.fetch(shard, offset + start, offset + end, exact=True)

                try:
                    with contextlib.closing(opener(RangedFile(fetch, size), f"{where}/{name}")) as decoder:
                        seconds = decoder.duration
                except VideoError as error:  # its clips will be left out, and counted
                    log.warning("%s", error)
                    seconds = np.nan
            rows.append((f"{shard.removesuffix('.tar')}/{name}", shard, offset, size, seconds, json.dumps(about)))
        if on_shard:
            on_shard(done, len(shards))
    if not rows:
        raise UserError(f"{root}: no video in its {len(shards)} tars" if shards else f"{root}: no .tar in it or below")
    ShardIndex.write(output, rows, with_fields=True)
    return len(shards), len(rows)


def _shards(folder: LocalFolder | RemoteFolder, root: str, below: str) -> Iterator[str]:
    """Paths of the tars, in order."""
    for name in sorted(folder.names(below)):
        key = f"{below}/{name}" if below else name
        if name.startswith("."):  # what programs that download leave
            continue
        if _COMPRESSED.search(name.lower()):
            raise UserError(f"{folder.name_of(key)}: a compressed tar, of which no part can be read alone; unpack it")
        if isinstance(folder, LocalFolder):
            refuse_links(Path(root), [key])
        if name.endswith(".tar"):
            yield key
        elif not (isinstance(folder, LocalFolder) and os.path.islink(folder.name_of(key))):  # it may lead in a circle
            yield from _shards(folder, root, key)


def _fields(content: bytes, ending: str, where: str) -> dict[str, Any]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    value = {"txt": text.strip()} if ending == "txt" else parse_json(text, f"{where}: not readable as JSON")
    if not isinstance(value, dict):
        raise UserError(f"{where}: no JSON object but {str(value)[:40]!r}")

    def is_text(value: Any) -> bool:
        return isinstance(value, (str, int, float))

    # Matrices and the like are no annotations of a clip.
    return {key: v for key, v in value.items() if is_text(v) or (isinstance(v, list) and all(map(is_text, v)))}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _parse_webdataset(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
    if path.is_dir():
        path = path / SHARD_INDEX
        if not path.is_file():
            raise UserError(f"{path}: no such index of tar shards; tools/prepare_data.py index {path.parent} writes it")
    with reading(path):
        if "fields" not in pq.read_schema(path).names:
            raise UserError(f"{path}: an index of chunks, which has no narrations; metadata is the file that has them")
        rows = pq.read_table(path, columns=["name", "seconds", "fields"]).to_pylist()
    if unknown := sorted(set(source.columns) - set(_NAMES)):
        raise UserError(f"{path}: the source's columns name '{unknown[0]}'{nearest(unknown[0], list(_NAMES))}")
    names = _NAMES | {ours: (name,) for ours, name in source.columns.items()}
    cells, abouts, broken, numbers = defaultdict[str, list[str]](list), list[dict[str, Any]](), list[str](), list[int]()
    for number, row in enumerate(rows, 1):
        about = parse_json(row["fields"] or "", f"{path}: row {number}")
        if not isinstance(about, dict) or not row["name"]:
            broken.append(f"row {number}: no name or no object of fields")
            continue
        text, start, end = (next((about[key] for key in each if key in about), None) for each in names.values())
        for name, cell in (("video_id", row["name"].rpartition(".")[0]), ("text", _text(text))):
            cells[name].append(cell)
        # The clip is the whole video where nothing else is stated.
        cells["start"].append(str(0.0 if start is None else start))
        cells["end"].append(str(row["seconds"] if end is None else end))
        abouts.append(about)
        numbers.append(number)
    # What all videos state can be a column, such as factory_id, by which clips are grouped.
    others = [key for key in abouts[0] if all(key in about for about in abouts)] if abouts else []
    used = {"video_id", *names, *chain(*names.values())}
    others = [key for key in others if key not in used and is_utf8(key)]
    others = others if extra is None else [key for key in others if key in (*extra, "dataset")]
    columns = {name: cells[name] for name in ("video_id", "text")}
    columns |= {key: [_text(about[key]) for about in abouts] for key in others}
    times = text_column(cells["start"]), text_column(cells["end"])
    table = pa.table({name: text_column(values) for name, values in columns.items()})
    return RawClips(table, times, np.array(numbers, dtype=np.int64), broken=tuple(broken))


def _text(value: Any) -> str:
    """A value of a JSON file as a cell; several narrations are a list."""
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if is_utf8(text) else text.encode("utf-8", "replace").decode()


# --------------------------------------------------------------------------------------------------
# EgoDex
# --------------------------------------------------------------------------------------------------


def _parse_egodex(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
    """Clips of all pairs below a folder.

    Every file is opened, which takes a millisecond: of the whole data set tools/prepare_data.py clips makes a csv once.
    """
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise UserError(f"{path}: EgoDex' annotations are HDF5 files, which need h5py: pip install h5py") from error
    files = sorted(
        os.path.relpath(os.path.join(folder, name), path)
        for folder, _, below in os.walk(path)
        for name in below
        if name.endswith((".hdf5", ".mp4")) and is_utf8(os.path.join(folder, name))
    )
    refuse_links(path, files)
    rows, ends, numbers = list[tuple[str, str, str]](), list[float](), list[int]()
    annotated = {name.removesuffix(".hdf5") for name in files if name.endswith(".hdf5")}
    videos = [name.removesuffix(".mp4") for name in files if name.endswith(".mp4")]
    broken = [f"{video}.mp4: no {video}.hdf5 beside it" for video in videos if video not in annotated]
    for number, video in enumerate(sorted(annotated), 1):
        try:
            with h5py.File(path / f"{video}.hdf5", "r") as content:
                about = {key: _attribute(content.attrs.get(key)) for key in _ATTRIBUTES}
                # Of a task that can be undone both directions are described, and one of them was recorded.
                undone = about["llm_type"] == "reversible" and about["which_llm_description"] == "2"
                text = about["llm_description2" if undone else "llm_description"] or about["description"]
                poses: Any = content
                for name in ("transforms", "camera"):
                    # A link may lead to another file.
                    if type(poses.get(name, getlink=True)) is not h5py.HardLink:
                        raise ValueError(f"{name} is a link")
                    poses = poses[name]
                seconds = poses.shape[0] / _EGODEX_FPS
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            broken.append(f"{video}.hdf5: not readable as EgoDex' annotations ({' '.join(str(error).split())[:160]})")
            continue
        rows.append((video, text, about["task"] or video.rpartition("/")[0].rpartition("/")[2]))
        ends.append(seconds)
        numbers.append(number)
    names = ("video_id", "text", "task")
    return RawClips(
        pa.table({name: text_column([row[place] for row in rows]) for place, name in enumerate(names)}),
        times=(np.zeros(len(ends)), np.array(ends, dtype=np.float64)),
        numbers=np.array(numbers, dtype=np.int64),
        unit="pair",
        broken=tuple(broken),
    )


# Some files of earlier annotations have a description of another name.
_ATTRIBUTES = ("llm_type", "llm_description", "llm_description2", "which_llm_description", "description", "task")


def _attribute(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else "" if value is None else str(value)
    return text if is_utf8(text) else ""


WEBDATASET = Format("webdataset", _parse_webdataset, columns=("shard", "offset"), folder="**/*.tar")
EGODEX = Format("egodex", _parse_egodex, folder="**/*.hdf5")
