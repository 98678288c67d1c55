"""Annotation csvs of benchmarks, checked cell by cell. What stands in them is data: nothing is ever evaluated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from egohod.config import UserError
from egohod.data.annotations import nearest

_INTEGERS = re.compile(r"\[\s*(\d+(\s*,\s*\d+)*)?\s*\]")


class AnnotationError(UserError):
    """Annotations that do not make a benchmark; the message names file, row and column."""


def read_csv(path: Path, columns: Sequence[str], *, unique: str | None = None) -> pd.DataFrame:
    """All columns of a csv as strings, of which ``columns`` must be there in any order; row 0 is the file's first.

    ``unique`` names a column in which no value may occur twice. Raises :class:`AnnotationError`.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise AnnotationError(f"{path}: cannot be read: {reason}") from error
    table.columns = [str(name).strip() for name in table.columns]
    for name in columns:
        if name not in table.columns:
            raise AnnotationError(f"{path}: column '{name}' is missing{nearest(name, list(table.columns))}")
    if table.empty:
        raise AnnotationError(f"{path}: not a single row")
    if unique is not None and (again := table[unique].duplicated()).any():
        row = int(again.argmax())
        raise AnnotationError(f"{path}: row {row + 1}: {unique} '{table[unique][row]}' occurs twice")
    return table


def integers(table: pd.DataFrame, column: str, path: Path) -> np.ndarray:
    """A column of whole numbers, int64 [N]. Raises :class:`AnnotationError` naming the row."""
    good = table[column].str.fullmatch(r"\s*-?\d+\s*").to_numpy(dtype=bool)
    if not good.all():
        row = int(np.argmin(good))
        raise AnnotationError(f"{path}: row {row + 1}: {column} is '{table[column][row]}', not a whole number")
    return table[column].astype(np.int64).to_numpy()


def integer_lists(table: pd.DataFrame, column: str, path: Path) -> list[list[int]]:
    """A column of lists such as ``[2, 14]``. Raises :class:`AnnotationError` naming the row."""
    lists = []
    for row, cell in enumerate(table[column]):
        if not _INTEGERS.fullmatch(cell.strip()):
            raise AnnotationError(f"{path}: row {row + 1}: {column} is '{cell}', not a list of whole numbers")
        lists.append([int(number) for number in re.findall(r"\d+", cell)])
    return lists
