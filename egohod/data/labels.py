"""Training targets other than a clip's own narration: relevant texts, and classes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from egohod.data.formats.base import read_csv
from egohod.data.formats.ek100 import GradedTexts, graded, indicator, read_sentences
from egohod.data.table import ClipTable, swap_sides
from egohod.errors import UserError

log = logging.getLogger(__name__)

# What relevancy is made of; EPIC-KITCHENS-100's names.
RELEVANCY_COLUMNS = ("verb_class", "all_noun_classes", "uid")
# The column with the names of classes, in a file whose classes are numbers.
NAME_COLUMN = "class_name"
# Rows of the relevancy matrix that are held at a time while checking: the whole would take gigabytes.
_CHECKED_AT_ONCE = 256
# Classes that a warning names.
_NAMED = 5


# --------------------------------------------------------------------------------------------------
# Relevant texts
# --------------------------------------------------------------------------------------------------


class RelevantTexts:
    """Draws a text for a clip among all whose relevancy is above ``threshold``, each alike (EPIC-KITCHENS-100 MIR).

    The texts are those that the rows of ``sentences`` (narration_id, narration and, or else by the clip of that id,
    verb_class and noun_classes) name, see :func:`~egohod.data.formats.ek100.read_sentences`, or the distinct
    narrations of the clips. ``noun_classes`` K is how many noun classes they have.

    Raises :class:`UserError` naming the file and the row: no such column, no number, or a clip without a relevant text.
    """

    def __init__(self, table: ClipTable, threshold: float, sentences: str | None = None) -> None:
        for name in RELEVANCY_COLUMNS[:2]:
            if name not in table.column_names:
                raise UserError(
                    f"{table.path}: data.labels.target=relevancy needs the column '{name}', as EPIC_100_train.csv has"
                )
        narrations = [table.row(i).texts[0] for i in range(len(table))]
        columns = pd.DataFrame({name: table.column(name).astype(str) for name in RELEVANCY_COLUMNS[:2]})
        clips = GradedTexts.of_clips(narrations, columns, table.where)
        if sentences:
            ids = table.ids if "uid" in table.column_names else None
            texts = read_sentences(Path(sentences), clips, ids, table.path)
        else:
            # Clips with one narration may differ in their classes; the text is graded as the first of them.
            distinct, first = (each.tolist() for each in np.unique(narrations, return_index=True))
            texts = GradedTexts(distinct, clips.verbs[first], [clips.nouns[i] for i in first])
        self.texts = texts.texts
        self.noun_classes = max(clips.noun_count, texts.noun_count)
        self._verbs, self._text_verbs = clips.verbs, texts.verbs
        # Ragged, and not a list of lists: there is no object per row for a worker to touch.
        self._nouns = np.array([noun for each in clips.nouns for noun in each], dtype=np.int64)
        self._starts = np.cumsum([0, *(len(each) for each in clips.nouns)])
        self._text_nouns = indicator(texts.nouns, self.noun_classes)
        self._threshold = threshold
        self._check(table, clips)

    def _check(self, table: ClipTable, clips: GradedTexts) -> None:
        """Every clip must have a relevant text; of clips with equal classes one is checked."""
        # Now, not when the clip is drawn: that may be hours into a run.
        kinds: dict[tuple[int, ...], int] = {}
        for i, (verb, nouns) in enumerate(zip(clips.verbs.tolist(), clips.nouns, strict=True)):
            kinds.setdefault((verb, *sorted(nouns)), i)
        rows = list(kinds.values())
        for at in range(0, len(rows), _CHECKED_AT_ONCE):
            some = rows[at : at + _CHECKED_AT_ONCE]
            lonely = np.flatnonzero(~(self.relevancy(some) > self._threshold).any(axis=1))
            if len(lonely):
                row = some[int(lonely[0])]
                raise UserError(
                    f"{table.where(row)}: no text is relevant to it (above data.labels.threshold={self._threshold:g}); "
                    "leave the clip out, or lower the threshold"
                )

    def draw(self, index: int, rng: np.random.Generator) -> tuple[str, dict[str, Tensor]]:
        """A relevant text of clip ``index``; ``clip_verbs``, ``text_verbs`` int64 [], their nouns float32 [K]."""
        # Computed for this clip alone: the matrix of all training clips would have 67,000 x 38,000 entries.
        relevant = np.flatnonzero(self.relevancy([index])[0] > self._threshold)
        text = int(relevant[rng.integers(len(relevant))])
        nouns = self._nouns[self._starts[index] : self._starts[index + 1]].tolist()
        values = {
            "clip_verbs": torch.tensor(int(self._verbs[index])),
            "clip_nouns": torch.from_numpy(indicator([nouns], self.noun_classes)[0]),
            "text_verbs": torch.tensor(int(self._text_verbs[text])),
            # A copy: rows of one array would share its memory with whoever changes a batch in place.
            "text_nouns": torch.from_numpy(self._text_nouns[text].copy()),
        }
        return self.texts[text], values

    def relevancy(self, rows: Sequence[int]) -> np.ndarray:
        """Of all texts to some clips, float32 [len(rows), texts]."""
        sets = [self._nouns[self._starts[i] : self._starts[i + 1]].tolist() for i in rows]
        clip_nouns = indicator(sets, self.noun_classes)
        return graded((self._verbs[list(rows)], self._text_verbs), (clip_nouns, self._text_nouns))

    def widened(self, noun_classes: int) -> RelevantTexts:
        """Make room for ``noun_classes`` classes: clips of several tables in one batch need equal shapes."""
        self._text_nouns = np.pad(self._text_nouns, ((0, 0), (0, noun_classes - self.noun_classes)))
        self.noun_classes = noun_classes
        return self

    def warn_of_sides(self, flip: float) -> None:
        """Warn of texts that are of other classes when mirrored: a mirrored clip keeps the classes that grade it."""
        verbs, nouns = self._text_verbs, self._text_nouns
        row_of = {text: row for row, text in enumerate(self.texts)}
        wrong = []
        for row, text in enumerate(self.texts):
            other = row_of.get(swap_sides(text), row)
            if verbs[other] != verbs[row] or (other != row and (nouns[other] != nouns[row]).any()):
                wrong.append(text)
        _warn_of_sides(wrong, "texts", len(self.texts), flip)


def _warn_of_sides(sided: Sequence[str], what: str, count: int, flip: float) -> None:
    if sided:
        log.warning(
            "%d of %d %s tell left from right (%s%s), but data.flip=%g mirrors clips and keeps their class; "
            "set data.flip=0",
            len(sided), count, what, ", ".join(f"'{name}'" for name in sided[:_NAMED]),
            ", ..." if len(sided) > _NAMED else "", flip,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Classes
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassSpace:
    """C classes, each a combination of values of ``columns``: ``keys[c]`` are the values of class c, as text.

    ``names`` [C] are for people; a head for all classes has its outputs in this order.
    """

    columns: tuple[str, ...]
    keys: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]

    @cached_property
    def parts(self) -> dict[str, tuple[list[str], np.ndarray]]:
        """By column without ``_class``: its values in order, and which of them each class has, int64 [C]."""
        result = {}
        for place, column in enumerate(self.columns):
            values = sorted({key[place] for key in self.keys}, key=_order)
            code = {value: number for number, value in enumerate(values)}
            result[column.removesuffix("_class")] = values, np.array([code[key[place]] for key in self.keys])
        return result

    def heads(self, kind: str) -> dict[str, int]:
        """Outputs of each head: one for all classes (``joint``), one for each column (``parts``), or both (``all``).

        Raises :class:`UserError` for a column by whose name no head can be called.
        """
        for name in self.parts:
            # Heads are attributes of a ModuleDict: a dot would be a path, and "items" or "keys" its own methods.
            if "." in name or (kind != "joint" and hasattr(torch.nn.ModuleDict, name)):
                raise UserError(f"data.labels.columns: no head can be called '{name}'; give that column another name")
        parts = {name: len(values) for name, (values, _) in self.parts.items()}
        return parts if kind == "parts" else {"action": len(self.keys)} | (parts if kind == "all" else {})

    def number(self, key: Sequence[str], where: str) -> int:
        """The class of some values. Raises :class:`UserError` naming ``where`` if there is none."""
        number = self._numbers.get(tuple(key))
        if number is None:
            text = ":".join(key)
            raise UserError(f"{where}: class '{text}' has no training clip and is in no file of data.labels.classes")
        return number

    @cached_property
    def _numbers(self) -> dict[tuple[str, ...], int]:
        return {key: number for number, key in enumerate(self.keys)}


def class_space(
    tables: Sequence[ClipTable], columns: Sequence[str], further: Sequence[str] = (), warn: bool = True
) -> ClassSpace:
    """The classes of the training clips, and of ``further`` files with the same columns (``_class`` may be missing).

    Raises :class:`UserError` for a missing column and where there is only one class; with ``warn``, warns of classes
    without a clip and of gaps in their numbers.
    """
    plain = [name.removesuffix("_class") for name in columns]

    def name_of(words: Iterable[object]) -> str:
        name = " ".join(str(each).strip() for each in words)
        # EPIC-KITCHENS spells "turn-on"; a label of the user's stays as it is.
        return name.replace("-", " ") if all(column.endswith("_class") for column in columns) else name

    # Values -> name; the first row that has a class names it.
    trained: dict[tuple[str, ...], str] = {}
    for table in tables:
        if missing := [name for name in columns if name not in table.column_names]:
            have = ", ".join(table.column_names)
            raise UserError(f"{table.path}: no column '{missing[0]}' for data.labels.columns; there are {have}")
        values = [_values(table, name) for name in columns]
        spelled = [table.column(name) for name in plain] if set(plain) <= set(table.column_names) else values
        if NAME_COLUMN in table.column_names:
            spelled = [table.column(NAME_COLUMN)]
        for key, words in zip(zip(*values, strict=True), zip(*spelled, strict=True), strict=True):
            trained.setdefault(key, name_of(words))
    named: dict[tuple[str, ...], str] = dict(trained)
    for path in further:
        rows = read_csv(Path(path), ())
        here = [name if name in rows.columns else name.removesuffix("_class") for name in columns]
        if missing := [name for name in here if name not in rows.columns]:
            raise UserError(f"{path}: no column '{missing[0]}' for data.labels.columns")
        spelling = next(([name] for name in (NAME_COLUMN, "action") if name in rows.columns), plain)
        spelling = spelling if all(name in rows.columns for name in spelling) else here
        for row in range(len(rows)):
            parts = tuple(str(rows[name][row]).strip() for name in here)
            if "" in parts:
                raise UserError(f"{path}: row {row + 1}: {here[parts.index('')]} is empty, but is part of a class")
            named.setdefault(parts, name_of(rows[name][row] for name in spelling))
    if len(named) < 2:
        only = next(iter(named.values()))
        raise UserError(f"{tables[0].path}: all clips are of one class, '{only}'; there is nothing to learn")
    # Sorted: the number of a class must not depend on the order of the rows.
    keys = sorted(named, key=lambda key: [_order(value) for value in key])
    if warn:
        if untrained := [named[key] for key in keys if key not in trained]:
            log.warning("%d of %d classes have no training clip, such as '%s'", len(untrained), len(keys), untrained[0])
        for place, column in enumerate(columns):
            _warn_of_gaps(column, {key[place] for key in keys})
    return ClassSpace(tuple(columns), tuple(keys), tuple(named[key] for key in keys))


def _order(value: str) -> tuple[int, int, str]:
    """Numbers as numbers, before words."""
    # Python refuses to read numbers of thousands of digits, and no class needs more than 18.
    return (0, int(value), "") if value.isdecimal() and len(value) <= 18 else (1, 0, value)


def _warn_of_gaps(column: str, values: set[str]) -> None:
    """Warn where all values are numbers and some between them are missing: perhaps rows of the file are."""
    ordered = sorted(map(_order, values))
    ids = [number for words, number, _ in ordered if not words]
    # Counted, not listed: one typing error makes a gap of millions.
    if len(ids) == len(ordered) and (gaps := ids[-1] - ids[0] + 1 - len(ids)):
        first = next(one + 1 for one, other in pairwise(ids) if other > one + 1)
        log.warning(
            "%s: the ids run from %d to %d, but %d of them never occur, such as %d; classes are numbered anew",
            column, ids[0], ids[-1], gaps, first,
        )  # fmt: skip


def warn_of_sides(space: ClassSpace, flip: float) -> None:
    """Warn of classes that name a left or a right: a mirrored clip keeps its class, which is then a wrong one."""
    # "turn_left" is a word of its own to the rules for narrations.
    sided = [name for name in space.names if swap_sides(words := name.replace("_", " ")) != words]
    _warn_of_sides(sided, "classes", len(space.names), flip)


class ClassLabels:
    """The class of every clip of a table."""

    def __init__(self, table: ClipTable, space: ClassSpace, heads: str) -> None:
        classes = class_numbers(table, space)
        parts = {name: code[classes] for name, (_, code) in space.parts.items()}
        self.space = space
        self._labels = {name: classes if name == "action" else parts[name] for name in space.heads(heads)}
        self._classes = classes

    def draw(self, index: int, rng: np.random.Generator) -> tuple[str, dict[str, Tensor]]:
        """The name of the class of clip ``index``, and ``<head>_label`` int64 [] of each head."""
        labels = {f"{name}_label": torch.tensor(int(label[index])) for name, label in self._labels.items()}
        return self.space.names[self._classes[index]], labels


def class_numbers(table: ClipTable, space: ClassSpace) -> np.ndarray:
    """The class of every clip, int64 [N]. Raises :class:`UserError` naming a row whose class ``space`` lacks."""
    keys = zip(*(_values(table, name) for name in space.columns), strict=True)
    return np.array([space.number(key, table.where(i)) for i, key in enumerate(keys)], dtype=np.int64)


def _values(table: ClipTable, column: str) -> list[str]:
    """The cells of a column of labels, without blanks around them. Raises :class:`UserError` naming an empty row."""
    values = [str(value).strip() if value is not None else "" for value in table.column(column)]
    if "" in values:
        raise UserError(f"{table.where(values.index(''))}: {column} is empty, but is part of the class of the clip")
    return values
