"""LeRobot data sets, versions 2.0 to 3.0: folders of episodes of a robot or a person, one narration or more for each.

meta/info.json                              frames a second, features (the cameras are those of dtype video), file names
meta/episodes/chunk-000/file-000.parquet    an episode a row: its tasks, and where it is in each camera's file
meta/tasks.parquet, meta/subtasks.parquet   the texts of task_index and subtask_index
data/chunk-000/file-000.parquet             a frame a row: episode_index, frame_index, task_index, and the steps of an
                                            episode as subtask_index (LeRobot 0.4, 0.5) or language_persistent (0.6)
videos/KEY/chunk-000/file-000.mp4           the frames of a camera, many episodes one after the other

Version 2 has meta/episodes.jsonl, meta/tasks.jsonl and an mp4 file for each episode. A clip is an episode, or a part of
one with a task or step of its own, of one camera; its video is the mp4 file, so frames are read, and chunks are made,
as of any folder. Source: huggingface/lerobot, docs/source/lerobot-dataset-v3.mdx, dataset_subtask.mdx,
language_and_recipes.mdx and src/lerobot/datasets/dataset_metadata.py; v2.1 from the cards of published sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from egohod.data.config import SourceConfig
from egohod.data.formats.base import (
    Format,
    RawClips,
    is_utf8,
    numbered_lines,
    parse_json,
    read_json,
    reading,
    refuse_links,
)
from egohod.data.table import text_column
from egohod.errors import UserError, nearest

# A field of a path's template, with a width that zeros fill.
_FIELD = re.compile(r"\{(\w+)(?::0?(\d)d)?\}")


class _Episode(NamedTuple):
    """An episode: its ``tasks``, and (video, start, end) of each camera."""

    number: int
    tasks: list[str]
    places: list[tuple[str, float, float]]


class _Part(NamedTuple):
    """A stretch of an episode, in seconds from its first frame, and its text."""

    start: float
    end: float
    text: str


def _parse(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
    where = path / "meta" / "info.json"
    if not where.is_file():
        raise UserError(f"{path}: not a LeRobot data set: no meta/info.json")
    info = read_json(where)
    try:
        fps, features, template = float(info["fps"]), dict(info["features"]), str(info["video_path"] or "")
        cameras = [key for key, each in features.items() if each["dtype"] == "video" and not _is_depth(each)]
        match = re.match(r"v?([23])\.", str(info["codebase_version"]))
        chunk_size = int(info.get("chunks_size") or 1000)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: not that of a LeRobot data set: {type(error).__name__} {error}") from error
    if match is None or not 0 < fps < 1000 or chunk_size < 1:
        raise UserError(f"{where}: codebase_version {info['codebase_version']} at {fps:g} fps; 2.0 to 3.0 are read")
    if info.get("storage_format", "parquet") == "lance":
        raise UserError(f"{where}: stored in Lance tables; only mp4 files are read")
    if not cameras or not template:
        raise UserError(f"{where}: no feature of dtype video; pictures in parquet files are not read")
    for key in source.video_keys:
        if key not in cameras:
            raise UserError(f"{where}: no video '{key}'{nearest(key, cameras)}; there are {', '.join(cameras)}")
    if not source.video_keys and len(cameras) > 1:
        raise UserError(f"{where}: several cameras; choose video_keys of {', '.join(cameras)}")
    keys = source.video_keys or cameras
    if match[1] == "3":
        episodes, broken = _episodes_3(path, template, keys)
    else:
        episodes, broken = _episodes_2(path, template, keys, fps, chunk_size)
    if path.resolve() == Path(source.root or "/").resolve():  # the files of another root are not the set's
        refuse_links(path, sorted({f"{place[0]}.mp4" for each in episodes for place in each.places}))
    if source.subtasks:
        parts = _subtasks(path, features, fps)
    elif any(len(each.tasks) != 1 for each in episodes):  # which frames have which is in the data alone
        parts = _runs(path, "task_index", _texts(path, "task"), fps)
    else:
        parts = {each.number: [_Part(0.0, np.inf, each.tasks[0])] for each in episodes}
    rows, numbers = list[tuple[str, str, str, str]](), list[int]()
    times = list[tuple[float, float]]()
    for episode in episodes:
        if episode.number not in parts:
            broken.append(f"episode {episode.number}: data/ has no {'sub-task' if source.subtasks else 'task'} for it")
        for part in parts.get(episode.number, []):
            for key, (video, start, end) in zip(keys, episode.places, strict=True):
                # Never beyond the episode: there the next one begins.
                first, last = start + part.start, min(start + part.end, end)
                if not 0 <= first < last:
                    broken.append(f"episode {episode.number}: '{key}': {first:g} to {last:g} s is no stretch of time")
                    continue
                rows.append((video, part.text, str(episode.number), key))
                times.append((first, last))
                numbers.append(episode.number)
    names = ("video_id", "text", "episode", "camera")
    begins, ends = (np.array([pair[i] for pair in times], dtype=np.float64) for i in range(2))
    return RawClips(
        pa.table({name: text_column([row[place] for row in rows]) for place, name in enumerate(names)}),
        times=(begins, ends),
        numbers=np.array(numbers, dtype=np.int64),
        unit="episode",
        time_names=("from_timestamp", "to_timestamp"),
        broken=tuple(broken),
    )


def _is_depth(feature: dict[str, Any]) -> bool:
    infos = (feature.get("info") or {}, feature.get("video_info") or {})
    return any(each.get("is_depth_map") or each.get("video.is_depth_map") for each in infos)


# --------------------------------------------------------------------------------------------------
# Episodes
# --------------------------------------------------------------------------------------------------


def _episodes_3(path: Path, template: str, keys: Sequence[str]) -> tuple[list[_Episode], list[str]]:
    """All episodes in order, and what is wrong with others."""
    places = [f"videos/{key}/{name}" for key in keys for name in ("chunk_index", "file_index")]
    places += [f"videos/{key}/{name}" for key in keys for name in ("from_timestamp", "to_timestamp")]
    episodes, broken, names = dict[int, _Episode](), list[str](), dict[tuple[Any, ...], str]()
    for table in _tables(path, "meta/episodes", ["episode_index", "tasks", *places]):
        for row in table.to_pylist():
            index, cameras = row["episode_index"], list[tuple[str, float, float]]()
            try:
                for key in keys:
                    chunk, file, start, end = (
                        row[f"videos/{key}/{name}"]
                        for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
                    )
                    file_key = (key, int(chunk), int(file))
                    if file_key not in names:
                        values = {"video_key": key, "chunk_index": int(chunk), "file_index": int(file)}
                        names[file_key] = _fill(path, template, values)
                    cameras.append((names[file_key], float(start), float(end)))
                if int(index) in episodes:
                    raise ValueError("is there twice")
                episodes[int(index)] = _Episode(int(index), _tasks(row["tasks"]), cameras)
            except (TypeError, ValueError, OverflowError) as error:
                if isinstance(error, UserError):  # of the whole set
                    raise
                broken.append(f"episode {index}: {error}")
    return [episodes[index] for index in sorted(episodes)], broken


def _episodes_2(
    path: Path, template: str, keys: Sequence[str], fps: float, chunk_size: int
) -> tuple[list[_Episode], list[str]]:
    """As :func:`_episodes_3`; every episode is an mp4 file of its own."""
    file = _file(path, "meta/episodes.jsonl")
    episodes, broken = list[_Episode](), list[str]()
    for number, line in numbered_lines(file):
        entry = parse_json(line, f"{file}: line {number}: not readable as JSON")
        try:
            index, seconds = int(np.int64(entry["episode_index"])), int(entry["length"]) / fps
            values = {"episode_index": index, "episode_chunk": index // chunk_size}
            names = [_fill(path, template, values | {"video_key": key}) for key in keys]
            episodes.append(_Episode(index, _tasks(entry["tasks"]), [(name, 0.0, seconds) for name in names]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            broken.append(f"line {number} of episodes.jsonl: {type(error).__name__} {error}")
    return episodes, broken


def _tasks(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) and is_utf8(each) for each in value):
        raise ValueError(f"tasks are {value!r:.60}, not a list of texts")
    return value


def _fill(path: Path, template: str, values: dict[str, Any]) -> str:
    """A path of ``meta/info.json`` without its ending."""
    # Not str.format, which reads attributes of what it fills in and pads to any width.
    filled = _FIELD.sub(lambda each: str(values.get(each[1], each[0])).zfill(int(each[2] or 0)), template)
    parts = PurePosixPath(filled)
    outside = parts.is_absolute() or ".." in parts.parts or "\0" in filled or not is_utf8(filled)
    if outside or "{" in filled or parts.suffix != ".mp4":
        raise UserError(f"{path}: meta/info.json: video_path '{filled}' is no mp4 file below the data set")
    return parts.with_suffix("").as_posix()


# --------------------------------------------------------------------------------------------------
# Tasks and steps
# --------------------------------------------------------------------------------------------------


def _subtasks(path: Path, features: dict[str, Any], fps: float) -> dict[int, list[_Part]]:
    """The steps of every episode that has some."""
    if "subtask_index" in features and (path / "meta/subtasks.parquet").is_file():
        return _runs(path, "subtask_index", _texts(path, "subtask"), fps)
    if "language_persistent" not in features:
        raise UserError(f"{path}: no sub-tasks: neither meta/subtasks.parquet nor a column language_persistent")
    parts = dict[int, list[_Part]]()
    # The same list on every frame of an episode: that of its first frame is enough.
    columns = ["episode_index", "frame_index", "language_persistent"]
    for table in _tables(path, "data", columns, filters=[("frame_index", "=", 0)]):
        for row in table.to_pylist():
            try:
                steps = [each for each in row["language_persistent"] or [] if each["style"] == "subtask"]
                # Seconds are those of frames, which float32 has rounded.
                starts = sorted((round(each["timestamp"] * fps) / fps, each["content"] or "") for each in steps)
                episode = int(row["episode_index"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise UserError(f"{path}: episode {row['episode_index']}: language_persistent: {error}") from error
            # A step lasts until the next one, the last one as long as the episode.
            ends = [*(start for start, _ in starts[1:]), np.inf][: len(starts)]
            spans = zip(starts, ends, strict=True)
            steps = [_Part(start, end, text) for (start, text), end in spans if start < end]
            parts |= {episode: steps} if steps else {}
    return parts


def _runs(path: Path, column: str, texts: dict[int, str], fps: float) -> dict[int, list[_Part]]:
    """Runs of frames of an episode with one value of ``column``; those without a text (-1) are no part."""
    parts = dict[int, list[_Part]]()
    for table in _tables(path, "data", ["episode_index", "frame_index", column]):
        with reading(path):
            whole = (each.cast(pa.int64(), safe=False).fill_null(-1) for each in table.itercolumns())
            episode, frame, value = (each.to_numpy() for each in whole)
        if not len(episode):
            continue
        changes = np.flatnonzero((np.diff(episode) != 0) | (np.diff(value) != 0)) + 1
        for first, end in zip([0, *changes.tolist()], [*changes.tolist(), len(episode)], strict=True):
            if (text := texts.get(int(value[first]))) is not None:
                part = _Part(float(frame[first] / fps), float((frame[end - 1] + 1) / fps), text)
                parts.setdefault(int(episode[first]), []).append(part)
    return parts


def _texts(path: Path, kind: str) -> dict[int, str]:
    """The text of every ``task_index`` (``subtask_index``)."""
    if kind == "task" and (path / "meta/tasks.jsonl").is_file():  # version 2
        lines = numbered_lines(path / "meta/tasks.jsonl")
        rows = [parse_json(line, f"{path}: meta/tasks.jsonl: line {number}") for number, line in lines]
    else:
        file = _file(path, f"meta/{kind}s.parquet")
        with reading(file):
            # The texts are the index of a pandas table, whose column has the index's name or none.
            rows = [
                {kind: row.get(kind, row.get("__index_level_0__")), f"{kind}_index": row.get(f"{kind}_index")}
                for row in pq.read_table(file).to_pylist()
            ]
    texts = dict[int, str]()
    for row in rows:
        try:
            index, text = int(row[f"{kind}_index"]), row[kind]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: meta/{kind}s: no {kind} and {kind}_index in {row!r:.80}") from error
        if not isinstance(text, str) or not is_utf8(text):
            raise UserError(f"{path}: meta/{kind}s: the text of {kind}_index {index} is {text!r:.60}")
        texts[index] = text
    return texts


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def _file(path: Path, name: str) -> Path:
    if not (path / name).is_file():
        raise UserError(f"{path}: no {name}, which this version of LeRobot data sets has; was it downloaded?")
    refuse_links(path, [name])
    return path / name


def _tables(path: Path, folder: str, columns: Sequence[str], **named: Any) -> Iterator[pa.Table]:
    """``columns`` of every parquet file of ``folder``. Raises :class:`UserError`."""
    files = sorted((path / folder).glob("*/*.parquet"))
    if not files:
        raise UserError(f"{path}: no {folder}/chunk-000/*.parquet; was it downloaded?")
    refuse_links(path, [file.relative_to(path).as_posix() for file in files])
    for file in files:
        with reading(file):
            if missing := sorted(set(columns) - set(pq.read_schema(file).names)):
                raise UserError(f"{file}: no column '{missing[0]}'")
            yield pq.read_table(file, columns=list(columns), **named).select(list(columns))


LEROBOT = Format("lerobot", _parse, folder="meta/info.json")
