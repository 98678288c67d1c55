"""How well a sentence tells a clip, from the classes of verbs and nouns (EPIC-KITCHENS-100 retrieval)."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egohod import pickles
from egohod.data.text_files import AnnotationError, integer_lists, integers, read_csv


def sentence_texts(ids: Sequence[str], written: Sequence[str], of_clip: Mapping[str, str]) -> list[str]:
    """The text of each row of a sentence csv: the narration of the clip that its ``narration_id`` names.

    The published files carry the text of a neighbouring row beside some ids (six of EPIC-KITCHENS-100's 3,842 test
    sentences: "wash cooker" beside the id of "cut slice"). Classes belong to the id, and every published number takes
    the text from there too. Where no clip has the id, ``written``, the row's own text, counts.
    """
    return [of_clip.get(name, text) for name, text in zip(ids, written, strict=True)]


def class_relevancy(
    verbs: tuple[np.ndarray, np.ndarray], nouns: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]
) -> NDArray[np.float32]:
    """Relevancy of M sentences to N clips, float32 [N, M] in 0..1.

    Half of it is for the same verb class, half the intersection over union of the sets of noun classes (SPEC 5, as
    the challenge defines it). ``verbs`` and ``nouns`` hold those of the clips and those of the sentences.
    """
    count = 1 + max((noun for side in nouns for each in side for noun in each), default=0)
    return graded(verbs, (indicator(nouns[0], count), indicator(nouns[1], count)))


def graded(
    verbs: tuple[np.ndarray, np.ndarray], nouns: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """The same of indicators of the noun classes, [N, K] and [M, K]."""
    clips, texts = nouns
    common = clips @ texts.T
    union = clips.sum(axis=1)[:, None] + texts.sum(axis=1) - common
    # Two empty sets have nothing in common.
    np.divide(common, np.maximum(union, 1), out=common)
    common += verbs[0][:, None] == verbs[1]
    common /= 2
    return common


def indicator(sets: Sequence[Sequence[int]], count: int) -> NDArray[np.float32]:
    """Sets of numbers below ``count`` as rows of 0 and 1, float32 [len(sets), count]."""
    matrix = np.zeros((len(sets), count), dtype=np.float32)
    for row, each in zip(matrix, sets, strict=True):
        row[list(each)] = 1
    return matrix


log = logging.getLogger(__name__)

CLIP_COLUMNS = ("narration_id", "narration", "verb_class", "all_noun_classes")


def csv_relevancy(clips: Path, sentences: Path, cache: Path | None = None) -> NDArray[np.float32]:
    """Relevancy [N, M] of the rows of an EK100-like sentence csv to those of a clip csv.

    A sentence has the classes of the clip that its narration_id names, or its own where the csv has the columns
    verb_class and noun_classes. ``cache`` is a folder that keeps the matrix under the checksum of both files.

    Raises :class:`AnnotationError` naming file, row and column.
    """
    kept = None
    if cache is not None:
        content = b"".join(hashlib.sha256(_bytes(path)).digest() for path in (clips, sentences))
        kept = cache / f"relevancy-{hashlib.sha256(content).hexdigest()[:24]}.npy"
        if kept.exists():
            try:
                return read_relevancy(kept)
            except AnnotationError as error:
                log.warning("%s; computed again", error)
    matrix = _relevancy(clips, sentences)
    if kept is not None:
        save_matrix(matrix, kept)
    return matrix


def save_matrix(matrix: NDArray[np.float32], path: Path) -> None:
    """Write a matrix as npy, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}-{os.getpid()}")
    with part.open("wb") as file:
        np.save(file, matrix)
    part.replace(path)


def read_relevancy(path: Path) -> NDArray[Any]:
    """A relevancy matrix from an npy file, or from the pickle that EPIC-KITCHENS publishes; nothing in it can run.

    Raises :class:`AnnotationError`.
    """
    try:
        if path.suffix == ".npy":
            matrix = np.load(path, allow_pickle=False)
        else:
            matrix = pickles.load(path, "a matrix", arrays=True)
    except pickle.UnpicklingError as error:
        raise AnnotationError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file can raise anything
        raise AnnotationError(f"{path}: not a readable matrix ({type(error).__name__}: {error})") from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise AnnotationError(f"{path}: holds no matrix of numbers")
    return matrix


def _relevancy(clips: Path, sentences: Path) -> NDArray[np.float32]:
    rows = read_csv(clips, CLIP_COLUMNS, unique="narration_id")
    texts = read_csv(sentences, ("narration_id", "narration"), unique="narration_id")
    verbs, nouns = integers(rows, "verb_class", clips), integer_lists(rows, "all_noun_classes", clips)
    if {"verb_class", "noun_classes"} <= set(texts.columns):
        own = integers(texts, "verb_class", sentences), integer_lists(texts, "noun_classes", sentences)
        return class_relevancy((verbs, own[0]), (nouns, own[1]))
    # The id counts, not the text beside it: see sentence_texts.
    row_of = {name: row for row, name in enumerate(rows["narration_id"])}
    strange = [name for name in texts["narration_id"] if name not in row_of]
    if strange:
        row = int(np.argmax(texts["narration_id"] == strange[0]))
        raise AnnotationError(f"{sentences}: row {row + 1}: narration_id '{strange[0]}' is not in {clips}")
    named = [row_of[name] for name in texts["narration_id"]]
    return class_relevancy((verbs, verbs[named]), (nouns, [nouns[row] for row in named]))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}") from error
