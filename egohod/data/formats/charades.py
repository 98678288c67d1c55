"""Charades-Ego: CharadesEgo_v1_*.csv (id, actions, ...) with Charades_v1_classes.txt beside it.

In training each action of a video is a clip; the benchmark asks which of the 157 classes occur in a whole video.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from egohod.data.config import SourceConfig
from egohod.data.formats.base import (
    Benchmark,
    BenchmarkData,
    BenchmarkOptions,
    Format,
    MultiLabelData,
    RawClips,
    labelled_clips,
    numbered_lines,
    read_columns,
    read_header,
    require_file,
)
from egohod.data.table import ClipTable
from egohod.errors import UserError, nearest

_CLASSES = "Charades_v1_classes.txt"


# Training wants the actions, the benchmark the videos, also those without any.
@dataclasses.dataclass(frozen=True)
class _Video:
    row: int
    id: str
    actions: list[tuple[str, float, float]]
    """(code, start, end) of each."""


def _parse_file(path: Path, classes: Path) -> tuple[list[_Video], dict[str, str], list[str]]:
    """Videos with their actions, names of the classes by code, and messages about what cannot be parsed."""
    names = {code: name for _, line in numbered_lines(classes) for code, _, name in [line.partition(" ")]}
    header = read_header(path)
    for name in ("id", "actions"):
        if name not in header.names:
            raise UserError(f"{path}: no column '{name}'{nearest(name, header.names)}")
    rows = read_columns(path, header, ["id", "actions"])
    broken = [f"row {number}: {fault}" for number, fault in rows.faults]
    # Messages, not errors: training leaves bad rows out and counts them, the benchmark refuses them.
    videos = []
    cells = (rows.table[name].to_pylist() for name in ("id", "actions"))
    for video, cell, number in zip(*cells, rows.numbers.tolist(), strict=True):
        videos.append(_Video(number, video, []))
        for action in filter(None, (part.strip() for part in cell.split(";"))):
            # "c092 11.90 21.20"
            code, *times = action.split()
            if code not in names:
                broken.append(f"row {number}: actions names class '{code}', not in {classes.name}")
                continue
            try:
                start, end = (float(time) for time in times)
                videos[-1].actions.append((code, start, end))
            except ValueError:
                broken.append(f"row {number}: '{action}' is not '<class> <start> <end>'")
    return videos, names, broken


def _parse(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
    videos, names, broken = _parse_file(path, path.with_name(_CLASSES))
    # Numbered in the order of the file, not by the digits of the code: a subset of the classes is dense, too.
    number_of = {code: str(number) for number, code in enumerate(names)}
    rows = [
        (video.id, start, end, names[code], number_of[code]) for video in videos for code, start, end in video.actions
    ]
    raw = labelled_clips(rows, [video.row for video in videos for _ in video.actions], broken, "row", "verb_class")
    # One set of classes in both roles: equal classes are relevant wholly, others not at all.
    nouns = pa.chunked_array([pa.array([f"[{code}]" for *_, code in rows], pa.large_string())])
    return dataclasses.replace(raw, columns=raw.columns.append_column("all_noun_classes", nouns))


def _read_benchmark(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """Which of 157 classes occur in a video, by mAP; frames of the whole video."""
    classes, path = require_file(source, _CLASSES), require_file(source, "CharadesEgo_v1_test_only1st.csv")
    # The first-person videos of the test split, as in the published protocols.
    videos, names, broken = _parse_file(path, classes)
    if broken or not videos:
        raise UserError(f"{path}: {broken[0] if broken else 'not a single row'}")
    ids = [video.id for video in videos]
    if len(set(ids)) < len(ids):  # it would count twice in the mean
        again = next(video for i, video in enumerate(videos) if video.id in ids[:i])
        raise UserError(f"{path}: row {again.row}: id '{again.id}' occurs twice")
    column_of = {code: column for column, code in enumerate(names)}
    labels = np.zeros((len(videos), len(names)), dtype=bool)
    for row, video in enumerate(videos):
        labels[row, [column_of[code] for code, *_ in video.actions]] = True
    # The benchmark's clips are whole videos; their length is left to the decoder.
    table = ClipTable.of(path, ids, np.zeros(len(ids)), np.full(len(ids), np.inf), uid=ids)
    return BenchmarkData(table, [MultiLabelData("map", list(names.values()), labels)])


CHARADES = Format(
    "charades",
    _parse,
    columns=("id", "actions"),
    siblings=(_CLASSES,),
    benchmarks=(Benchmark("charades_ego", _read_benchmark, whole_files=True),),
)
