"""Annotation formats: each dataset's files are parsed by one module, for training, evaluation and the HOD pipeline.

To add a dataset, write one module here, add its :class:`Format` to ``FORMATS`` below, and a valid file of it to
``tests/fuzz_targets.py``, which the tests then damage. The names of the format and of its benchmark become values of
``data.train.NAME.format`` and ``evaluate.benchmarks.NAME.kind``. A complete example::

    # egohod/data/formats/mydata.py
    import numpy as np

    from egohod.data.formats.base import (
        Benchmark, BenchmarkData, Format, RetrievalData, parse_table, require_clips, require_file
    )

    COLUMNS = {"video_id": ["clip"], "start_second": ["from"], "end_second": ["to"], "text": ["sentence"]}

    def parse(path, source, extra):                     # clips for training, fine-tuning and HOD
        return parse_table(path, source, extra, COLUMNS)

    def read_benchmark(source, options):                # optional: clips and tasks for evaluation
        path = require_file(source, "test.csv")
        clips, notes = require_clips(path, parse(path, source, None))
        texts, own = np.unique(clips.column("text"), return_inverse=True)
        relevancy = (own[:, None] == np.arange(len(texts))).astype(np.float32)
        return BenchmarkData(clips, [RetrievalData(texts.tolist(), own, relevancy)], notes)

    MYDATA = Format("mydata", parse, columns=("clip", "sentence"), benchmarks=(Benchmark("mydata", read_benchmark),))

    # egohod/data/formats/__init__.py: import MYDATA and add it to FORMATS

    # tests/fuzz_targets.py, in the list of targets
    Target("clips_mydata", _files(mydata__csv="clip,from,to,sentence\\nv,0,1,cuts\\n"), _clips("mydata.csv"))

``base.py`` has the types, what formats share, and the reading of text, csv and parquet.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from egohod.data.config import SourceConfig
from egohod.data.formats.base import Benchmark as Benchmark
from egohod.data.formats.base import Format as Format
from egohod.data.formats.base import RawClips, check_clips, read_header, read_lines
from egohod.data.formats.charades import CHARADES
from egohod.data.formats.custom import HOD, LABELS
from egohod.data.formats.ego4d import EGO4D, EGOCLIP, PICKLE
from egohod.data.formats.egtea import EGTEA
from egohod.data.formats.ek100 import EK100
from egohod.data.formats.lerobot import LEROBOT
from egohod.data.formats.moments import MOMENTS
from egohod.data.formats.pairs import EGODEX, WEBDATASET
from egohod.data.formats.questions import QUESTIONS
from egohod.data.table import ClipTable
from egohod.errors import UserError, nearest

log = logging.getLogger(__name__)

# In the order in which ``format: auto`` tries them; a table that is of none of them is read as ``hod``.
FORMATS = {
    each.name: each
    for each in (EGOCLIP, EK100, EGO4D, PICKLE, EGTEA, CHARADES, LABELS, LEROBOT, WEBDATASET, EGODEX, HOD)
}
BENCHMARKS: dict[str, Benchmark] = {
    each.name: each
    for each in (*(each for format in FORMATS.values() for each in format.benchmarks), *QUESTIONS, *MOMENTS)
}


def read_clips(
    source: SourceConfig | str | Path, *, strict: bool = False, extra: Sequence[str] | None = None
) -> ClipTable:
    """Read an annotation file (a path is read with default settings).

    Entries that cannot be used (no readable time, no narration, an id that leads out of the video folder, a duplicate)
    are left out and counted; with ``strict`` the first one is an error. ``extra`` names further columns to keep; None
    keeps all of them.

    Raises :class:`UserError` naming the file and, where one is at fault, the row.
    """
    source = source if isinstance(source, SourceConfig) else SourceConfig(metadata=str(source))
    path = Path(source.metadata)
    # Parsing is the format's, judging the same for all.
    raw = read_raw(source, extra)
    table = check_clips(path, raw, strict=strict, exclude=source.exclude)
    # Memory that only reading needed goes back to the system: the entries of a big file take gigabytes.
    del raw
    pa.default_memory_pool().release_unused()
    log.info("%s: %s", path, table.report)
    return table


def read_raw(source: SourceConfig, extra: Sequence[str] | None = None) -> RawClips:
    """The entries of ``source.metadata`` before any is checked. Raises :class:`UserError` naming the file."""
    path = Path(source.metadata)
    try:
        protocol, remote, _ = source.metadata.partition("://")
        if remote:  # the address is not printed in full: it may be signed
            raise UserError(f"{protocol}://...: annotations are read from a local disk only; copy the file there")
        if not path.exists():
            raise UserError(f"{path}: no such annotation file")
        name = recognise(path) if source.format == "auto" else source.format
        if name not in FORMATS:
            raise UserError(f"{path}: no annotation format '{name}'{nearest(name, ['auto', *FORMATS])}")
        return FORMATS[name].parse(path, source, extra)
    except OSError as error:  # no permission, a folder, a disk that is gone
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def recognise(path: Path) -> str:
    """The name of the format that a file, or a folder, looks like."""
    if path.is_dir():
        for format in FORMATS.values():
            if format.folder and next(path.glob(format.folder), None) is not None:
                return format.name
        kinds = ", ".join(f"{each.name} ({each.folder})" for each in FORMATS.values() if each.folder)
        raise UserError(f"{path}: a folder of none of these data sets: {kinds}")
    # Of narration.json.gz the ending in front of the compression's counts.
    suffix = (path.with_suffix("") if path.suffix.lower() in (".gz", ".bz2", ".zst") else path).suffix.lower()
    for format in FORMATS.values():
        if suffix in format.suffixes:
            # A .txt may be EGTEA's list of clips or another table; its first line decides.
            first = next((line for line in read_lines(path) if line.strip()), "") if format.first_line else ""
            if format.first_line is None or format.first_line.match(first):
                return format.name
    # By column names: extensions are no evidence, a csv may be called .txt or have none.
    names = set(read_header(path).names)
    return next((each.name for each in FORMATS.values() if each.columns and names.issuperset(each.columns)), HOD.name)
