"""A csv of labelled clips: video, start, end, label."""

from __future__ import annotations

import dataclasses
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
    backwards_note,
    parse_table,
)
from egohod.data.table import ClipTable, RawClips
from egohod.data.text_files import NAMELESS, canonical_column, read_header
from egohod.errors import UserError

_COLUMNS = {"video_id": ["video"], "start_second": ["start"], "end_second": ["end"], "text": ["label"]}


def _parse(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
    allowed = {name for usual in _COLUMNS.values() for name in usual}
    allowed |= {*source.columns.values(), *map(canonical_column, source.columns.values())}
    # Refused rather than ignored: a further column is often the start of a csv of another format.
    strange = [name for name in read_header(path).names if name not in allowed and not NAMELESS.fullmatch(name)]
    if strange:
        raise UserError(
            f"{path}: unknown column '{strange[0]}'; a csv of labelled clips has video,start,end,label "
            "(the source's columns can name others)"
        )
    # A wrong class is worse than a missing clip, so one bad label refuses the file.
    raw = parse_table(path, source, (), _COLUMNS)
    for number, label in zip(raw.numbers, raw.columns["text"].to_pylist(), strict=True):
        # "nan" is what a missing one becomes on its way through many programs.
        if label is None or label.strip().lower() in ("", "nan"):
            raise UserError(f"{path}: {raw.unit} {number}: the label is '{label or ''}', which is none")
    columns = raw.columns.append_column("label", raw.columns["text"])
    return dataclasses.replace(raw, columns=columns, class_names=True)


def _read_benchmark(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """Classification; the prompt of each class is its name."""
    path = Path(source.metadata)
    table = ClipTable.checked(path, _parse(path, source, None), strict=True)
    names, labels = np.unique([str(label).strip() for label in table.column("label")], return_inverse=True)
    texts = names.tolist()
    classes = ClassificationData(
        "action",
        texts,
        np.arange(len(texts)),
        labels,
        class_names=texts,
        class_keys=[(name,) for name in texts],
        key_columns=["label"],
    )
    return BenchmarkData(table, [classes], backwards_note(table.report.backwards))


LABELS = Format("labels", _parse, columns=("video", "label"), benchmarks=(Benchmark("labels", _read_benchmark),))
