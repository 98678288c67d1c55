"""EPIC-KITCHENS-100: EPIC_100_*.csv, and its benchmarks of retrieval (MIR) and zero-shot action recognition (CLS).

A row is a clip: narration_id, video_id, start_timestamp, stop_timestamp, narration, verb_class, noun_class, ...
How relevant a sentence is to a clip follows from the classes of verbs and nouns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from egohod import pickles
from egohod.data.config import SourceConfig
from egohod.data.formats.base import (
    Benchmark,
    BenchmarkData,
    BenchmarkOptions,
    ClassificationData,
    Format,
    RawClips,
    RetrievalData,
    look_for,
    parse_table,
    read_csv,
    require_clips,
    require_complete,
    require_file,
)
from egohod.errors import UserError, nearest
from egohod.runtime import atomic_write

log = logging.getLogger(__name__)

_COLUMNS = {
    "video_id": ["video_id"],
    "start_second": ["start_timestamp"],
    "end_second": ["stop_timestamp"],
    "text": ["narration"],
}
# What grading needs of a clip; users' own retrieval files have the same columns.
_CLIP_COLUMNS = ("narration_id", "narration", "verb_class", "all_noun_classes")
_INTEGERS = re.compile(r"\[\s*(\d{1,18}(\s*,\s*\d{1,18})*)?\s*\]")
# Sets of classes become columns of a matrix: a typing error must not allocate gigabytes.
_LARGEST_CLASS = 9999

Place = Path | Callable[[int], str]
"""The file that rows are of, or what gives the place of a row for messages."""


def _parse(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
    # Relevancy labels find the clip of a sentence by this id.
    columns = {"uid": "narration_id"} | source.columns
    return parse_table(path, dataclasses.replace(source, columns=columns), extra, _COLUMNS)


def _parse_complete(path: Path, *needed: str) -> tuple[RawClips, pd.DataFrame]:
    """All rows of a csv, also as a table of text: uid, text (the narration) and the columns ``needed``."""
    # The benchmark's files have the published names; a source's columns are for training files.
    raw = require_complete(path, _parse(path, SourceConfig(), None))
    for name in needed:
        if name not in raw.columns.column_names:
            raise UserError(f"{path}: no column '{name}'{nearest(name, raw.columns.column_names)}")
    return raw, raw.columns.to_pandas()


# --------------------------------------------------------------------------------------------------
# Benchmarks
# --------------------------------------------------------------------------------------------------


def _read_mir(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """Multi-instance retrieval: every clip against every sentence, graded."""
    path = require_file(source, "EPIC_100_retrieval_test.csv")
    sentences_path = require_file(source, "EPIC_100_retrieval_test_sentence.csv")
    raw, rows = _parse_complete(path, "verb_class", "all_noun_classes")
    # Each row has an id of its own: two that agree in all else are two clips of the benchmark.
    table, notes = require_clips(path, raw, unique="uid")
    clips = GradedTexts.of_clips(rows["text"].tolist(), rows, path)
    sentences = read_sentences(sentences_path, clips, list(rows["uid"]), path)
    relevancy = cached_matrix(options.cache, (path, sentences_path), lambda: class_relevancy(clips, sentences))
    ids = read_csv(sentences_path, ("narration_id",))["narration_id"].tolist()
    return BenchmarkData(table, [RetrievalData(sentences.texts, None, relevancy, ids)], notes)


def _read_cls(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """Zero-shot action recognition over the verb-noun pairs of train and validation.

    A class is described by its distinct narrations, from train or from both (``options.prompts``), and by its name
    where there is none. The pairs of actions.csv (verb, noun, action) count too; it can replace EPIC_100_train.csv.
    """
    path = require_file(source, "EPIC_100_validation.csv")
    raw, rows = _parse_complete(path, "verb_class", "noun_class")
    table, notes = require_clips(path, raw, unique="uid")
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
        # Its names replace those of the training rows, and it may list pairs that no row has.
        actions = read_csv(actions_csv, ("verb", "noun", "action"))
        pairs = zip(_integers(actions, "verb", actions_csv), _integers(actions, "noun", actions_csv), strict=True)
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
    # Dense codes of the verbs and nouns that occur, in the order of their class numbers.
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


def _read_cls_test(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """The clips of the challenge's test split, with the classes of :func:`_read_cls` and without labels."""
    classes = _read_cls(source, options).tasks[0]
    assert isinstance(classes, ClassificationData)
    path = require_file(source, "EPIC_100_test_timestamps.csv")
    # It has no narrations, and every clip needs a text, which nothing reads here.
    columns = {"uid": "narration_id", "text": "participant_id"}
    raw = require_complete(path, parse_table(path, SourceConfig(columns=columns), (), _COLUMNS))
    table, notes = require_clips(path, raw, unique="uid")
    notes.append("labels are not public, so there is no number; evaluate.submission writes what the challenge scores")
    return BenchmarkData(table, [dataclasses.replace(classes, labels=np.full(len(table), -1))], notes)


def _pairs(rows: pd.DataFrame, path: Path) -> list[tuple[int, int]]:
    columns = _integers(rows, "verb_class", path).tolist(), _integers(rows, "noun_class", path).tolist()
    return list(zip(*columns, strict=True))


def _name_classes(rows: pd.DataFrame, path: Path, names: dict[tuple[int, int], str]) -> None:
    """Name the pairs that have no name yet ``verb noun``, as the first row that has them spells it."""
    words = zip(rows["verb"], rows["noun"], strict=True) if {"verb", "noun"} <= set(rows.columns) else None
    spelled = [f"{verb} {noun}" for verb, noun in words] if words else rows["text"].tolist()
    for pair, name in zip(_pairs(rows, path), spelled, strict=True):
        # "turn-on", "tap:hot": spelled as a person would, for the text tower.
        names.setdefault(pair, name.replace("-", " ").replace(":", " "))


# --------------------------------------------------------------------------------------------------
# Relevancy
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradedTexts:
    """N texts (or the narrations of clips), the verb class of each, int64 [N], and its noun classes."""

    texts: list[str]
    verbs: np.ndarray
    nouns: list[list[int]]

    @classmethod
    def of_clips(cls, texts: Sequence[str], columns: pd.DataFrame, where: Place) -> GradedTexts:
        """Narrations with the classes of the columns verb_class and all_noun_classes, text as in the file.

        Raises :class:`UserError` naming the row.
        """
        verbs, nouns = _integers(columns, "verb_class", where), _integer_lists(columns, "all_noun_classes", where)
        return cls(list(texts), verbs, nouns)

    @property
    def noun_count(self) -> int:
        """One more than the largest noun class."""
        return 1 + max((noun for each in self.nouns for noun in each), default=0)


def _integers(table: pd.DataFrame, column: str, where: Place) -> np.ndarray:
    """A column of whole numbers, int64 [N]. Raises :class:`UserError` naming the row."""
    # 18 digits fit an int64; Python refuses to read numbers of thousands.
    good = table[column].str.fullmatch(r"\s*-?\d{1,18}\s*").to_numpy(dtype=bool)
    if not good.all():
        row = int(np.argmin(good))
        raise UserError(f"{_place(where, row)}: {column} is '{table[column][row]}', not a whole number")
    return table[column].astype(np.int64).to_numpy()


def _integer_lists(table: pd.DataFrame, column: str, where: Place) -> list[list[int]]:
    """A column of lists of classes such as ``[2, 14]``. Raises :class:`UserError` naming the row."""
    lists = []
    for row, cell in enumerate(table[column]):
        if not _INTEGERS.fullmatch(cell.strip()):
            raise UserError(f"{_place(where, row)}: {column} is '{cell}', not a list of whole numbers")
        lists.append([int(number) for number in re.findall(r"\d+", cell)])
        if max(lists[-1], default=0) > _LARGEST_CLASS:
            allowed = f"classes are numbered up to {_LARGEST_CLASS:,}"
            raise UserError(f"{_place(where, row)}: {column} is '{cell}', but {allowed}")
    return lists


def _place(where: Place, row: int) -> str:
    return f"{where}: row {row + 1}" if isinstance(where, Path) else where(row)


def read_sentences(path: Path, clips: GradedTexts, ids: Sequence[str] | None, clips_path: Path) -> GradedTexts:
    """The texts of a sentence csv (narration_id, narration and perhaps verb_class, noun_classes).

    Text and classes of a sentence are those of the clip that its ``narration_id`` names, of ``ids`` [N]; its own
    classes count where the csv has them. The published files have the text of a neighbouring row beside some ids (six
    of EPIC-KITCHENS-100's 3,842 test sentences: "wash cooker" beside the id of "cut slice"). Classes belong to the id,
    and every published number takes the text from there too. Where no clip has the id, the row's own text counts.

    Raises :class:`UserError` naming file, row and column.
    """
    rows = read_csv(path, ("narration_id", "narration"), unique="narration_id")
    row_of = {name: row for row, name in enumerate(ids or ())}
    # -1: no clip has this id
    places = [row_of.get(name, -1) for name in rows["narration_id"]]
    texts = [clips.texts[place] if place >= 0 else text for place, text in zip(places, rows["narration"], strict=True)]
    if {"verb_class", "noun_classes"} <= set(rows.columns):
        return GradedTexts(texts, _integers(rows, "verb_class", path), _integer_lists(rows, "noun_classes", path))
    if -1 in places:
        row = places.index(-1)
        name = rows["narration_id"][row]
        raise UserError(f"{path}: row {row + 1}: narration_id '{name}' is not in {clips_path}")
    return GradedTexts(texts, clips.verbs[places], [clips.nouns[place] for place in places])


def class_relevancy(clips: GradedTexts, texts: GradedTexts) -> NDArray[np.float32]:
    """Relevancy of M sentences to N clips, float32 [N, M] in 0..1.

    Half of it is for the same verb class, half the intersection over union of the sets of noun classes (SPEC 5, as
    the challenge defines it).
    """
    count = max(clips.noun_count, texts.noun_count)
    return graded((clips.verbs, texts.verbs), (indicator(clips.nouns, count), indicator(texts.nouns, count)))


def graded(
    verbs: tuple[np.ndarray, np.ndarray], nouns: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """The same from indicators of the noun classes, [N, K] and [M, K], and verb classes, [N] and [M]."""
    clips, texts = nouns
    # Sizes of intersections by a product of 0/1 matrices: small integers, so exact in float32, which BLAS multiplies.
    common = clips @ texts.T
    union = clips.sum(axis=1)[:, None] + texts.sum(axis=1) - common
    # Two empty sets have nothing in common. In place: at full size each matrix takes 150 MB.
    np.divide(common, np.maximum(union, 1), out=common)
    common += verbs[0][:, None] == verbs[1]
    common /= 2
    return common


def indicator(sets: Sequence[Sequence[int]], count: int) -> NDArray[np.float32]:
    """Sets of numbers below ``count`` as rows of 0 and 1, float32 [len(sets), count]."""
    # float32 for the matrix product: BLAS has none of integers.
    matrix = np.zeros((len(sets), count), dtype=np.float32)
    for row, each in zip(matrix, sets, strict=True):
        row[list(each)] = 1
    return matrix


def csv_relevancy(clips: Path, sentences: Path) -> NDArray[np.float32]:
    """Relevancy [N, M] of the rows of an EK100-like sentence csv to those of a clip csv.

    Raises :class:`UserError` naming file, row and column.
    """
    rows = read_csv(clips, _CLIP_COLUMNS, unique="narration_id")
    graded_clips = GradedTexts.of_clips(rows["narration"].tolist(), rows, clips)
    return class_relevancy(graded_clips, read_sentences(sentences, graded_clips, list(rows["narration_id"]), clips))


def cached_matrix(
    cache: Path | None, files: Sequence[Path], compute: Callable[[], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """``compute()``, stored in the folder ``cache`` under the checksum of the files that it depends on."""
    if cache is None:
        return compute()
    # By content: the same files in another place, or with new times of change, need no new matrix.
    content = hashlib.sha256()
    for path in files:
        try:
            content.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    stored = cache / f"relevancy-{content.hexdigest()[:24]}.npy"
    if stored.exists():
        try:
            return read_relevancy(stored)
        except UserError as error:  # a damaged cache costs time, not the run
            log.warning("%s; computed again", error)
    matrix = compute()
    save_matrix(matrix, stored)
    return matrix


def save_matrix(matrix: NDArray[np.float32], path: Path) -> None:
    """Write a matrix as npy, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Through a file: np.save would add .npy to a name without it.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, matrix)


def read_relevancy(path: Path) -> NDArray[Any]:
    """A relevancy matrix from an npy file, or from the pickle that EPIC-KITCHENS publishes; nothing in it can run.

    Raises :class:`UserError`.
    """
    try:
        if path.suffix == ".npy":
            # An npy file may hold objects, whose pickles run code.
            matrix = np.load(path, allow_pickle=False)
        else:
            matrix = pickles.load(path, "a matrix", arrays=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path}: not a readable matrix ({type(error).__name__}: {error})") from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise UserError(f"{path}: holds no matrix of numbers")
    return matrix


EK100 = Format(
    "ek100",
    _parse,
    columns=("narration_id", "start_timestamp", "stop_timestamp", "narration"),
    benchmarks=(
        Benchmark("ek100_mir", _read_mir),
        Benchmark("ek100_cls", _read_cls),
        Benchmark("ek100_cls_test", _read_cls_test),
    ),
)
