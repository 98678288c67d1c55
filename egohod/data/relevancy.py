"""How relevant a sentence is to a clip, from the classes of verbs and nouns (EPIC-KITCHENS-100 retrieval)."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from egohod import pickles
from egohod.data.text_files import integer_lists, integers, read_csv
from egohod.errors import UserError

log = logging.getLogger(__name__)

_CLIP_COLUMNS = ("narration_id", "narration", "verb_class", "all_noun_classes")


@dataclass(frozen=True)
class GradedTexts:
    """N texts (or the narrations of clips), the verb class of each, int64 [N], and its noun classes."""

    texts: list[str]
    verbs: np.ndarray
    nouns: list[list[int]]

    @classmethod
    def of_clips(cls, texts: Sequence[str], columns: pd.DataFrame, where: Path | Callable[[int], str]) -> GradedTexts:
        """Narrations with the classes of the columns verb_class and all_noun_classes, text as in the file.

        ``where`` is the file that the rows are of, or gives the place of a row for messages. Raises :class:`UserError`.
        """
        verbs, nouns = integers(columns, "verb_class", where), integer_lists(columns, "all_noun_classes", where)
        return cls(list(texts), verbs, nouns)


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
        return GradedTexts(texts, integers(rows, "verb_class", path), integer_lists(rows, "noun_classes", path))
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
    count = 1 + max((noun for nouns in (clips.nouns, texts.nouns) for each in nouns for noun in each), default=0)
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
    content = b"".join(hashlib.sha256(_bytes(path)).digest() for path in files)
    stored = cache / f"relevancy-{hashlib.sha256(content).hexdigest()[:24]}.npy"
    if stored.exists():
        try:
            return read_relevancy(stored)
        except UserError as error:
            log.warning("%s; computed again", error)
    matrix = compute()
    save_matrix(matrix, stored)
    return matrix


def save_matrix(matrix: NDArray[np.float32], path: Path) -> None:
    """Write a matrix as npy, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named by process: two evaluations may fill one cache at the same time.
    part = path.with_name(f".{path.name}-{os.getpid()}")
    with part.open("wb") as file:
        np.save(file, matrix)
    part.replace(path)


def read_relevancy(path: Path) -> NDArray[Any]:
    """A relevancy matrix from an npy file, or from the pickle that EPIC-KITCHENS publishes; nothing in it can run.

    Raises :class:`UserError`.
    """
    try:
        if path.suffix == ".npy":
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


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
