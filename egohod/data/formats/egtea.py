"""EGTEA Gaze+: train_split1.txt, test_split1.txt, ... (2, 3): lines ``<clip> <action> <verb> <noun>``, with
action_idx.txt (``Take bowl 7``) beside them. A clip is a file of its own, ``<session>/<clip>.mp4``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from egohod.data.config import SourceConfig
from egohod.data.formats.base import (
    Benchmark,
    BenchmarkData,
    BenchmarkOptions,
    ClassificationData,
    Format,
    RawClips,
    labelled_clips,
    look_for,
    numbered_lines,
    require_complete,
    require_file,
)
from egohod.data.table import ClipTable
from egohod.errors import UserError

# Clips are named <person>-<recipe>-<part>-<first ms>-<last ms>-F<first frame>-F<last frame>.
_LINE = re.compile(r"^\s*(?P<clip>[^\s-]+-[^\s-]+-[^\s-]+-(?P<start>\d+)-(?P<end>\d+)\S*)\s+(?P<action>\d+)\b")
# Python refuses to read numbers of thousands of digits.
_NUMBER = re.compile(r"[0-9]{1,6}")


def _read_classes(path: Path) -> dict[int, str]:
    """Names of the actions by their number."""
    classes: dict[int, str] = {}
    for number, line in numbered_lines(path):
        # Names have blanks: "Cut bell_pepper 9".
        name, _, code = line.rpartition(" ")
        if not name or not _NUMBER.fullmatch(code) or int(code) in classes:
            raise UserError(f"{path}: line {number}: '{line}' is not a new class such as 'Take bowl 7'")
        classes[int(code)] = name.lower().replace("_", " ")
    return classes


def _parse_split(path: Path, classes: dict[int, str]) -> RawClips:
    """The clips of one split; their uid is the name of the clip."""
    rows: list[tuple[str, float, float, str, str]] = []
    numbers, broken = [], []
    for number, line in numbered_lines(path):
        match = _LINE.match(line)
        if not match or not _NUMBER.fullmatch(match["action"]) or int(match["action"]) not in classes:
            broken.append(f"line {number}: '{line}' is not '<clip> <action of action_idx.txt> ...'")
            continue
        # Behind the action are its verb and noun, which the benchmark does not use.
        clip, action = match["clip"], int(match["action"])
        length = (int(match["end"]) - int(match["start"])) / 1000
        # The file holds this clip alone, so it starts at 0.
        rows.append((f"{'-'.join(clip.split('-')[:3])}/{clip}", 0.0, length, classes[action], str(action)))
        numbers.append(number)
    raw = labelled_clips(rows, numbers, broken, "line", "action")
    return dataclasses.replace(raw, columns=raw.columns.append_column("class_name", raw.columns["text"]))


def _parse(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
    return _parse_split(path, _read_classes(path.with_name("action_idx.txt")))


def _read_benchmark(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """Action recognition, 106 classes: split 1, and the mean over all splits that are there."""
    index = require_file(source, "action_idx.txt")
    classes = _read_classes(index)
    # Codes become rows of a matrix of similarities, code - 1.
    if sorted(classes) != list(range(1, len(classes) + 1)):
        raise UserError(f"{index}: classes must be numbered from 1 to {len(classes)} without a gap")
    # The splits overlap: a clip is embedded once and counts in each.
    labels: dict[str, int] = {}
    splits: list[list[str]] = []
    # A fine-tuned model may be tested on one split only: the other two hold clips that it was trained on.
    for split in [options.test_split] if options.test_split else [1, 2, 3]:
        # Split 1 is what most papers report; without it there is nothing to compare.
        name, optional = f"test_split{split}.txt", options.test_split is None and split > 1
        path = look_for(source, name) if optional else require_file(source, name)
        if path is None:
            continue
        raw = require_complete(path, _parse_split(path, classes))
        splits.append(raw.columns["video_id"].to_pylist())
        actions = [int(code) - 1 for code in raw.columns["action"].to_pylist()]
        for number, video, action in zip(raw.numbers, splits[-1], actions, strict=True):
            if labels.setdefault(video, action) != action:
                raise UserError(f"{path}: line {number}: '{video.partition('/')[2]}' has two actions")
    videos = list(labels)
    row_of = {video: row for row, video in enumerate(videos)}
    texts = [classes[code] for code in sorted(classes)]
    actions_task = ClassificationData(
        "action",
        texts,
        np.arange(len(texts)),
        np.array(list(labels.values()), dtype=np.int64),
        class_names=texts,
        splits=[np.array([row_of[video] for video in split], dtype=np.int64) for split in splits],
        class_keys=[(str(code),) for code in sorted(classes)],
        key_columns=["action"],
    )
    # Published protocols sample the whole file, whose length only the decoder knows.
    ends = np.full(len(videos), np.inf)
    table = ClipTable.of(index, videos, np.zeros(len(videos)), ends, uid=[each.partition("/")[2] for each in videos])
    note = f"split {options.test_split} of 3" if options.test_split else f"{len(splits)} of 3 splits are there"
    return BenchmarkData(table, [actions_task], [] if len(splits) == 3 else [note])


EGTEA = Format(
    "egtea",
    _parse,
    suffixes=(".txt",),
    first_line=_LINE,
    siblings=("action_idx.txt",),
    benchmarks=(Benchmark("egtea", _read_benchmark, whole_files=True),),
)
