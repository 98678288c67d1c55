"""Annotation csvs of benchmarks, checked cell by cell. What stands in them is data: nothing is ever evaluated."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from egohod.data.annotations import nearest
from egohod.data.text_files import AnnotationError, read_columns, read_header

_INTEGERS = re.compile(r"\[\s*(\d{1,18}(\s*,\s*\d{1,18})*)?\s*\]")
# Sets of classes become columns of a matrix: a slip of the pen must not ask for gigabytes.
_LARGEST_CLASS = 9999


def read_csv(path: Path, columns: Sequence[str], *, unique: str | None = None) -> pd.DataFrame:
    """All columns of a csv as strings, of which ``columns`` must be there in any order; row 0 is the file's first.

    ``unique`` names a column in which no value may occur twice. Raises :class:`AnnotationError`.
    """
    header = read_header(path)
    for name in columns:
        if name not in header.names:
            raise AnnotationError(f"{path}: column '{name}' is missing{nearest(name, header.names)}")
    rows = read_columns(path, header, header.names)
    # Benchmarks have no row to spare: one that cannot be read is not left out.
    for number, fault in rows.faults:
        raise AnnotationError(f"{path}: row {number}: {fault}")
    table = rows.table.to_pandas()
    if table.empty:
        raise AnnotationError(f"{path}: not a single row")
    if unique is not None and (again := table[unique].duplicated()).any():
        row = int(again.argmax())
        raise AnnotationError(f"{path}: row {row + 1}: {unique} '{table[unique][row]}' occurs twice")
    return table


def integers(table: pd.DataFrame, column: str, source: Path | Callable[[int], str]) -> np.ndarray:
    """A column of whole numbers, int64 [N]. Raises :class:`AnnotationError` naming the row.

    ``source`` is the file that the rows are of, or tells where a row stands.
    """
    good = table[column].str.fullmatch(r"\s*-?\d{1,18}\s*").to_numpy(dtype=bool)
    if not good.all():
        row = int(np.argmin(good))
        raise AnnotationError(f"{_place(source, row)}: {column} is '{table[column][row]}', not a whole number")
    return table[column].astype(np.int64).to_numpy()


def integer_lists(table: pd.DataFrame, column: str, source: Path | Callable[[int], str]) -> list[list[int]]:
    """A column of lists of classes such as ``[2, 14]``. Raises :class:`AnnotationError` naming the row."""
    lists = []
    for row, cell in enumerate(table[column]):
        if not _INTEGERS.fullmatch(cell.strip()):
            raise AnnotationError(f"{_place(source, row)}: {column} is '{cell}', not a list of whole numbers")
        lists.append([int(number) for number in re.findall(r"\d+", cell)])
        if max(lists[-1], default=0) > _LARGEST_CLASS:
            raise AnnotationError(
                f"{_place(source, row)}: {column} is '{cell}', but classes are numbered up to {_LARGEST_CLASS:,}"
            )
    return lists


def _place(source: Path | Callable[[int], str], row: int) -> str:
    return f"{source}: row {row + 1}" if isinstance(source, Path) else source(row)
