"""How well a sentence tells a clip, from the classes of verbs and nouns (EPIC-KITCHENS-100 retrieval)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


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
