"""Opening every clip that an annotation table speaks of, to know before a training which cannot be read."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from egohod.data.storage import VideoError, one_clip
from egohod.data.table import EXCLUDE_COLUMNS, ClipSource
from egohod.errors import UserError
from egohod.runtime import Lost, Workers

log = logging.getLogger(__name__)

# Clips that are looked at, noted and reported together.
BLOCK = 64
# Seconds for a block, or for one clip of a block that took longer
_PATIENCE = 600.0

Fault = tuple[int, str]
"""Number of a clip, and why it cannot be read."""


@dataclass
class Verdict:
    """What became of a source's clips."""

    clips: int
    faults: list[Fault] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, int]:
        """How often each kind of fault occurs, the most frequent first."""
        return dict(Counter(_kind(reason) for _, reason in self.faults).most_common())


class Verifier:
    """Reads ``frames`` frames of every clip of ``source``; notes in ``folder`` how far it is, and goes on from there.

    Raises :class:`UserError` if the folder cannot be written.
    """

    def __init__(self, name: str, source: ClipSource, folder: Path, frames: int = 4) -> None:
        self.name = name
        self.source = source
        self.exclude = folder / f"{name}_exclude.csv"
        self._notes = folder / f"{name}_progress.jsonl"
        self._frames = frames
        table = source.table
        # By video and time: neighbours share files, which the system then still has in memory.
        self._order = np.lexsort((table.column("start_second"), table.group_codes(["video"])))
        status = table.path.stat()
        # What a finding depends on; when it changes, all is looked at again.
        self._identity = [repr(source.config), status.st_size, status.st_mtime_ns, len(table), frames]

    @property
    def blocks(self) -> int:
        """Blocks of clips in all."""
        return -(-len(self._order) // BLOCK)

    def check(self, block: int) -> list[Fault]:
        """Read the clips of a block; those that cannot be read."""
        found = ((index, self._fault(index)) for index in self._clips(block))
        return [(index, reason) for index, reason in found if reason is not None]

    def _clips(self, block: int) -> list[int]:
        return self._order[block * BLOCK : (block + 1) * BLOCK].tolist()

    def _fault(self, index: int) -> str | None:
        """Why a clip cannot be read."""
        row = self.source.table.row(index)
        try:
            with one_clip(row.video_id):
                self.source.read(row, self._frames, None)
        except VideoError as error:
            return str(error)
        return None

    def estimate(self, blocks: int = 3) -> float:
        """Seconds that one process needs for all clips, measured on a few blocks."""
        chosen = np.unique(np.linspace(0, self.blocks - 1, blocks).astype(int)).tolist()
        begin = time.perf_counter()
        for block in chosen:
            self.check(block)
        return (time.perf_counter() - begin) / len(chosen) * self.blocks

    def run(self, workers: int, progress: Callable[[int, int, int], None], strict: bool = False) -> Verdict:
        """Check what is not checked yet; ``progress(clips done, clips in all, faults)`` is called after each block.

        Without ``workers`` it is this process that reads, and a video that makes a decoder crash ends it; with them the
        crash is that clip's fault. Writes the exclude list. With ``strict`` the first fault is raised as
        :class:`UserError`.
        """
        known = self._read_notes()
        if known:
            log.info("%s: %d of %d blocks are known from an interrupted run", self.name, len(known), self.blocks)
        faults = [fault for block in known.values() for fault in block]
        todo = [block for block in range(self.blocks) if block not in known]
        done = len(self._order) - sum(min(BLOCK, len(self._order) - block * BLOCK) for block in todo)
        try:
            with self._notes.open("a", encoding="utf-8") as notes:
                if not known:
                    notes.truncate(0)
                    notes.write(json.dumps(self._identity) + "\n")
                for block, found in self._results(todo, workers):
                    notes.write(json.dumps([block, found]) + "\n")
                    notes.flush()
                    faults += found
                    done += min(BLOCK, len(self._order) - block * BLOCK)
                    progress(done, len(self._order), len(faults))
                    if strict and found:
                        raise UserError(f"{self.source.table.where(found[0][0])}: {found[0][1]}")
            verdict = Verdict(len(self._order), sorted(faults))
            self._write_exclude(verdict)
            # The next run looks anew: files may have been mended since.
            self._notes.unlink()
        except OSError as error:
            raise UserError(f"cannot write {self.exclude.parent}: {error.strerror or error}; run again") from error
        return verdict

    def _results(self, todo: list[int], workers: int) -> Iterator[tuple[int, list[Fault]]]:
        if not workers:
            yield from ((block, self.check(block)) for block in todo)
            return
        # Workers are forked, so that they share the table's memory, and follow this process.
        with Workers(workers, self.check, _PATIENCE) as pool:
            for block, found in pool.unordered(todo):
                yield block, self._one_by_one(block) if isinstance(found, Lost) else found

    def _one_by_one(self, block: int) -> list[Fault]:
        """The faults of a block at which a process died or took too long: the clip to blame is among them."""
        with Workers(1, self._fault, _PATIENCE) as pool:
            found = [
                (index, f"{self.source.table.row(index).video_id}: {told.reason}" if isinstance(told, Lost) else told)
                for index, told in pool.unordered(self._clips(block))
            ]
        return [(index, reason) for index, reason in found if reason is not None]

    def _read_notes(self) -> dict[int, list[Fault]]:
        """Faults by block, of an earlier run over the same table."""
        try:
            lines = self._notes.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return {}
        if not lines or lines[0] != json.dumps(self._identity):
            return {}
        known = {}
        for line in lines[1:]:
            try:
                block, faults = json.loads(line)
                known[block] = [(index, reason) for index, reason in faults]
            except (ValueError, TypeError, RecursionError):  # cut off when the run was killed, or damaged
                continue
        return known

    def _write_exclude(self, verdict: Verdict) -> None:
        part = self.exclude.with_name(f".{self.exclude.name}-{os.getpid()}")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*EXCLUDE_COLUMNS, "row", "reason"])
            for index, reason in verdict.faults:
                row = self.source.table.row(index)
                writer.writerow([row.video_id, f"{row.start:.3f}", f"{row.end:.3f}", row.row, reason])
        part.replace(self.exclude)


def _kind(reason: str) -> str:
    """A fault without the file's name, its numbers and a library's words."""
    text = re.sub(r"^.*?: ", "", reason)
    return re.sub(r"\s*\(.*\)$", "", re.sub(r"\d+(\.\d+)?", "N", text))
