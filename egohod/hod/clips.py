"""Which clips are narrated: those of an annotation file, or windows that slide over videos without one."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from egohod.data.config import SourceConfig
from egohod.data.table import ClipTable, TableReport
from egohod.data.windows import sliding
from egohod.errors import UserError

log = logging.getLogger(__name__)

# The share of unusable rows is judged as if at least so many had been read.
_GRACE_ROWS = 1000
# What leaves a row out on purpose is no damage.
_INTENDED = ("duplicates", "on the exclude list")


def narrated(source: SourceConfig, keep: Sequence[str], max_bad_fraction: float) -> ClipTable:
    """The clips of ``source.metadata`` with the columns ``keep``; rows that cannot be used are counted and said.

    Raises :class:`UserError` if they are more than ``max_bad_fraction`` of all, or a column of ``keep`` is not there.
    """
    table = ClipTable.read(source, extra=["uid", "dataset", *keep])
    for name in keep:
        if name not in table.column_names:
            raise UserError(f"{table.path}: no column '{name}' to keep; there are {', '.join(table.column_names)}")
    left_out = {why: count for why, count in table.report.left_out.items() if why not in _INTENDED}
    bad, rows = sum(left_out.values()), len(table) + sum(table.report.left_out.values())
    if bad > max_bad_fraction * max(rows, _GRACE_ROWS):
        reasons = ", ".join(f"{count:,} {why}" for why, count in left_out.items())
        raise UserError(
            f"{table.path}: {bad:,} of {rows:,} rows cannot be used ({reasons}), more than max_bad_fraction="
            f"{max_bad_fraction:g} allows"
        )
    return table


def windows(root: str, seconds: float, stride: float, decoder: str) -> ClipTable:
    """Windows over every video below ``root``, of which nothing is said; see :func:`~egohod.data.windows.sliding`.

    Files that cannot be opened are said. Raises :class:`UserError` if there is no window.
    """
    clips, faults = sliding(root, seconds, stride, decoder)
    for fault in faults:
        log.warning("left out: %s", fault)
    if not clips:
        raise UserError(f"{root}: not one of its {len(faults)} videos can be read")
    videos, start, end = zip(*clips, strict=True)
    columns = pa.table(
        {
            name: pa.array(texts, pa.large_string())
            for name, texts in (("video_id", videos), ("text", [""] * len(clips)))
        }
    )
    numbers = np.arange(1, len(clips) + 1)
    log.info("%s: %s windows of %s videos", root, f"{len(clips):,}", f"{len(set(videos)):,}")
    return ClipTable(Path(root), columns, np.array(start), np.array(end), numbers, "window", TableReport(len(clips)))


def checksum(source: SourceConfig, table: ClipTable) -> str:
    """Of all that a table was read from: equal on all machines, wherever the files lie."""
    digest = hashlib.sha256(repr((source.format, source.columns, source.clip_rule, source.list_text)).encode())
    if source.metadata:
        for path in filter(None, (source.metadata, source.exclude)):
            with Path(path).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        digest.update("\n".join(table.column("video_id").tolist()).encode("utf-8", "surrogatepass"))
        digest.update(table.column("start_second").tobytes() + table.column("end_second").tobytes())
    return digest.hexdigest()
