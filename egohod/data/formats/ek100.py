"""EPIC-KITCHENS-100: EPIC_100_*.csv, and its benchmarks of retrieval (MIR) and zero-shot action recognition (CLS).

A row is a clip: narration_id, video_id, start_timestamp, stop_timestamp, narration, verb_class, noun_class, ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from egohod.data.config import SourceConfig
from egohod.data.formats.base import (
    Benchmark,
    BenchmarkData,
    BenchmarkOptions,
    ClassificationData,
    Format,
    RetrievalData,
    backwards_note,
    look_for,
    parse_table,
    require_complete,
    require_file,
)
from egohod.data.relevancy import GradedTexts, cached_matrix, class_relevancy, read_sentences
from egohod.data.table import ClipTable, RawClips
from egohod.data.text_files import integers, nearest, read_csv
from egohod.errors import UserError

_COLUMNS = {
    "video_id": ["video_id"],
    "start_second": ["start_timestamp"],
    "end_second": ["stop_timestamp"],
    "text": ["narration"],
}


def _parse(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
    # Relevancy labels find the clip of a sentence by this id.
    columns = {"uid": "narration_id"} | source.columns
    return parse_table(path, dataclasses.replace(source, columns=columns), extra, _COLUMNS)


def _parse_complete(path: Path, *needed: str) -> tuple[RawClips, pd.DataFrame]:
    """All rows of a csv, also as a table of text: uid, text (the narration) and the columns ``needed``."""
    raw = require_complete(path, _parse(path, SourceConfig(), None))
    for name in needed:
        if name not in raw.columns.column_names:
            raise UserError(f"{path}: no column '{name}'{nearest(name, raw.columns.column_names)}")
    return raw, raw.columns.to_pandas()


def _clips(path: Path, raw: RawClips) -> tuple[ClipTable, list[str]]:
    # Each row has an id of its own: two that agree in all else are two clips of the benchmark.
    table = ClipTable.checked(path, raw, strict=True, unique="uid")
    return table, backwards_note(table.report.backwards)


def _read_mir(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """Multi-instance retrieval: every clip against every sentence, graded."""
    path = require_file(source, "EPIC_100_retrieval_test.csv")
    sentences_path = require_file(source, "EPIC_100_retrieval_test_sentence.csv")
    raw, rows = _parse_complete(path, "verb_class", "all_noun_classes")
    table, notes = _clips(path, raw)
    clips = GradedTexts.of_clips(rows["text"].tolist(), rows, path)
    sentences = read_sentences(sentences_path, clips, list(rows["uid"]), path)
    relevancy = cached_matrix(options.cache, (path, sentences_path), lambda: class_relevancy(clips, sentences))
    return BenchmarkData(table, [RetrievalData(sentences.texts, None, relevancy)], notes)


def _read_cls(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """Zero-shot action recognition over the verb-noun pairs of train and validation.

    A class is described by its distinct narrations, from train or from both (``options.prompts``), and by its name
    where there is none. The pairs of actions.csv (verb, noun, action) count too; it can replace EPIC_100_train.csv.
    """
    path = require_file(source, "EPIC_100_validation.csv")
    raw, rows = _parse_complete(path, "verb_class", "noun_class")
    table, notes = _clips(path, raw)
    described = [(rows, path)] if options.prompts == "train+val" else []
    names: dict[tuple[int, int], str] = {}
    train, actions_csv = look_for(source, "EPIC_100_train.csv"), look_for(source, "actions.csv")
    if train is not None:
        training = _parse_complete(train, "verb_class", "noun_class")[1]
        described.append((training, train))
        _name_classes(training, train, names)
    elif actions_csv is None:
        raise UserError(
            f"{source.metadata}: neither EPIC_100_train.csv nor actions.csv there, one of which must list the classes"
        )
    else:
        notes.append("EPIC_100_train.csv is not there: classes are those of actions.csv")
    if actions_csv is not None:
        actions = read_csv(actions_csv, ("verb", "noun", "action"))
        pairs = zip(integers(actions, "verb", actions_csv), integers(actions, "noun", actions_csv), strict=True)
        names |= {(int(v), int(n)): name for (v, n), name in zip(pairs, actions["action"], strict=True)}
    _name_classes(rows, path, names)
    # Sorted, so that the numbers of classes depend neither on the files' order nor on which of them are there.
    pairs_in_order = sorted(names)
    code = {pair: number for number, pair in enumerate(pairs_in_order)}
    # A dict keeps the order of the files, on which the order of the prompts' features depends.
    prompts: dict[tuple[int, str], None] = {}
    for frame, where in described:
        for pair, narration in zip(_pairs(frame, where), frame["text"], strict=True):
            prompts[code[pair], narration.strip()] = None
    labels = np.array([code[pair] for pair in _pairs(rows, path)], dtype=np.int64)
    silent = sorted(set(range(len(code))) - {number for number, _ in prompts})
    if silent:
        notes.append(
            f"{len(silent)} of {len(code)} classes have no narration and are described by their names; "
            f"{len(set(silent) & set(labels.tolist()))} of them occur, in {int(np.isin(labels, silent).sum())} clips"
        )
    prompts |= {(number, names[pairs_in_order[number]]): None for number in silent}
    verbs, nouns = (np.unique(part, return_inverse=True)[1] for part in zip(*pairs_in_order, strict=True))
    classes = ClassificationData(
        "action",
        [text for _, text in prompts],
        np.array([number for number, _ in prompts], dtype=np.int64),
        labels,
        {"verb": verbs, "noun": nouns},
        [names[pair] for pair in pairs_in_order],
        class_keys=[(str(verb), str(noun)) for verb, noun in pairs_in_order],
        key_columns=["verb_class", "noun_class"],
    )
    return BenchmarkData(table, [classes], notes)


def _pairs(rows: pd.DataFrame, path: Path) -> list[tuple[int, int]]:
    columns = integers(rows, "verb_class", path).tolist(), integers(rows, "noun_class", path).tolist()
    return list(zip(*columns, strict=True))


def _name_classes(rows: pd.DataFrame, path: Path, names: dict[tuple[int, int], str]) -> None:
    """Name the pairs that have no name yet ``verb noun``, as the first row that has them spells it."""
    words = zip(rows["verb"], rows["noun"], strict=True) if {"verb", "noun"} <= set(rows.columns) else None
    spelled = [f"{verb} {noun}" for verb, noun in words] if words else rows["text"].tolist()
    for pair, name in zip(_pairs(rows, path), spelled, strict=True):
        # "turn-on", "tap:hot": spelled as a person would, for the text tower.
        names.setdefault(pair, name.replace("-", " ").replace(":", " "))


EK100 = Format(
    "ek100",
    _parse,
    columns=("narration_id", "start_timestamp", "stop_timestamp", "narration"),
    benchmarks=(Benchmark("ek100_mir", _read_mir), Benchmark("ek100_cls", _read_cls)),
)
