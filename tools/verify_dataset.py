"""Open every clip of a configuration's sources, report what cannot be read, and write exclude lists.

    python tools/verify_dataset.py --config_file configs/demo.yml
    python tools/verify_dataset.py --config_file my.yml --dry_run      # estimate the time
    python main_pretrain.py --config_file my.yml data.train.own.exclude=verified/own_exclude.csv

For each source NAME of data.train the output folder gets NAME_exclude.csv (a row for each clip that cannot be read,
with the reason), and report.json counts the reasons. Rerun to resume after an interruption. Exit code 0: every clip can
be read; 1: some cannot; 2: an error in the configuration or the tables, which the message explains.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from _common import run_tool

from egohod import cli, config
from egohod.data.formats.base import EXCLUDE_COLUMNS
from egohod.data.storage import VideoError, one_clip
from egohod.data.table import ClipReader
from egohod.errors import UserError
from egohod.evaluation.features import write_json
from egohod.runtime import Lost, Progress, Workers, atomic_write, time_left, usable_cores
from egohod.training.build import active_sources, build_dataset

log = logging.getLogger("verify_dataset")

# Clips that are read, noted and reported together: what a killed run loses at most.
BLOCK = 64
# Seconds for a block, or for one clip of a block that took longer. Long: a network drive may stall for minutes.
_PATIENCE = 600.0

Fault = tuple[int, str]
"""Number of a clip, and why it cannot be read."""


@dataclass
class Verdict:
    """The result for a source: its clips, and those that cannot be read."""

    clips: int
    faults: list[Fault] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, int]:
        """How often each kind of fault occurs, the most frequent first."""
        kinds = Counter[str]()
        for _, reason in self.faults:
            # Without the file's name, its numbers and a library's words faults of one kind are equal.
            text = re.sub(r"^.*?: ", "", reason)
            kinds[re.sub(r"\s*\(.*\)$", "", re.sub(r"\d+(\.\d+)?", "N", text))] += 1
        return dict(kinds.most_common())


class Verifier:
    """Reads ``frames`` frames of every clip of ``source``; ``folder`` holds the results and the notes to resume from.

    Raises :class:`UserError` if the folder cannot be written.
    """

    def __init__(self, name: str, source: ClipReader, folder: Path, frames: int = 4) -> None:
        self.name, self.source = name, source
        self.exclude = folder / f"{name}_exclude.csv"
        self._notes = folder / f"{name}_progress.jsonl"
        self._frames = frames
        table = source.table
        # By video and time: neighbours share files, which the system then still has in memory.
        order = np.lexsort((table.column("start_second"), table.group_codes(["video"])))
        self._blocks = [order[i : i + BLOCK] for i in range(0, len(order), BLOCK)]
        status = table.path.stat()
        # All that a result depends on: when it changes, everything is read again.
        self._identity = [repr(source.config), status.st_size, status.st_mtime_ns, len(table), frames]

    def _fault(self, index: int) -> str | None:
        """Why a clip cannot be read, None if it can."""
        row = self.source.table.row(index)
        try:
            with one_clip(row.video_id):
                # As in training, but the middle of each segment: a fault must not depend on chance.
                self.source.read(row, self._frames, None)
        except VideoError as error:
            return str(error)
        return None

    def _check(self, block: int) -> list[Fault]:
        faults = ((index, self._fault(index)) for index in self._blocks[block].tolist())
        return [(index, reason) for index, reason in faults if reason is not None]

    def estimate(self, samples: int = 3) -> float:
        """Seconds that one process needs for all clips, measured on a few blocks."""
        # Spread over the table: sources differ from folder to folder.
        chosen = np.unique(np.linspace(0, len(self._blocks) - 1, samples).astype(int)).tolist()
        begin = time.perf_counter()
        for block in chosen:
            self._check(block)
        return (time.perf_counter() - begin) / len(chosen) * len(self._blocks)

    def run(self, workers: int, progress: Progress | None = None, strict: bool = False) -> Verdict:
        """Read the clips that are not noted yet, and write the exclude list.

        Without ``workers`` this process reads, and a video that makes a decoder crash ends it; with them the crash is
        that clip's fault. With ``strict`` the first fault is raised as :class:`UserError`.
        """
        noted = self._read_notes()
        if noted:
            log.info("%s: %d of %d blocks were read before an interruption", self.name, len(noted), len(self._blocks))
        faults = [fault for block in noted.values() for fault in block]
        todo = [block for block in range(len(self._blocks)) if block not in noted]
        total = len(self.source.table)
        done = total - sum(len(self._blocks[block]) for block in todo)
        try:
            with self._notes.open("a", encoding="utf-8") as notes:
                if not noted:
                    notes.truncate(0)  # what another table or another setting left
                    notes.write(json.dumps(self._identity) + "\n")
                for block, block_faults in self._results(todo, workers):
                    notes.write(json.dumps([block, block_faults]) + "\n")
                    # A run of days is killed sooner or later; what is not in the file by then is read again.
                    notes.flush()
                    faults += block_faults
                    done += len(self._blocks[block])
                    if progress:
                        progress.update(done, total=total, note=f"{len(faults):,} unreadable")
                    if strict and block_faults:
                        index, reason = block_faults[0]
                        raise UserError(f"{self.source.table.where(index)}: {reason}")
            with atomic_write(self.exclude) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow([*EXCLUDE_COLUMNS, "row", "reason"])
                # In the table's order: workers finish in another one each time.
                for index, reason in sorted(faults):
                    row = self.source.table.row(index)
                    writer.writerow([row.video_id, f"{row.start:.3f}", f"{row.end:.3f}", row.row, reason])
            # The next run reads everything again: files may have been mended since.
            self._notes.unlink()
        except OSError as error:
            raise UserError(f"cannot write {self.exclude.parent}: {error.strerror or error}; rerun it") from error
        return Verdict(total, sorted(faults))

    def _results(self, todo: list[int], workers: int) -> Iterator[tuple[int, list[Fault]]]:
        if not workers:
            yield from ((block, self._check(block)) for block in todo)
            return
        # Workers are forked, so that they share the table's memory.
        with Workers(workers, self._check, _PATIENCE) as pool:
            for block, result in pool.unordered(todo):
                yield block, self._one_by_one(block) if isinstance(result, Lost) else result

    def _one_by_one(self, block: int) -> list[Fault]:
        """The faults of a block at which a process died or took too long: the clip to blame is among them."""
        faults = list[Fault]()
        with Workers(1, self._fault, _PATIENCE) as pool:
            for index, reason in pool.unordered(self._blocks[block].tolist()):
                if isinstance(reason, Lost):
                    reason = f"{self.source.table.row(index).video_id}: {reason.reason}"
                if reason is not None:
                    faults.append((index, reason))
        return faults

    def _read_notes(self) -> dict[int, list[Fault]]:
        # Lines of another table or other settings are of no use: the first line identifies them.
        try:
            first, *lines = self._notes.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return {}
        noted: dict[int, list[Fault]] = {}
        if first != json.dumps(self._identity):
            return noted
        for line in lines:
            # A line may be cut off where the run was killed, or damaged: its block is read again.
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                block, faults = json.loads(line)
                noted[block] = [(index, reason) for index, reason in faults]
        return noted


def main(arguments: Sequence[str]) -> int:
    parser = cli.parser(__doc__ or "", "configs/demo.yml")
    add = parser.add_argument
    add("--output", type=Path, default=Path("verified"), help="folder of the lists (default: verified)")
    add("--workers", type=int, default=usable_cores(), help="processes (default: one per core)")
    add("--frames", type=int, default=4, help="frames read of each clip (default: 4)")
    add("--strict", action="store_true", help="stop at the first clip or row that cannot be used")
    add("--dry_run", action="store_true", help="print the amount of work, write nothing")
    args = parser.parse_intermixed_args(arguments)
    if args.workers < 1 or args.frames < 1:
        raise UserError("--workers and --frames count from 1")
    # --strict counts for rows, which are read while the dataset is built, and for clips.
    cfg = config.load(args.config_file, cli.overrides(args))
    # The size does not matter: clips are read as they are in the file, and not transformed.
    sources = zip(active_sources(cfg), build_dataset(cfg, size=1).sources, strict=True)
    verifiers = [Verifier(name, source, args.output, args.frames) for name, source in sources]
    if args.dry_run:
        for verifier in verifiers:
            table = verifier.source.table
            videos = len(set(table.group_codes(["video"]).tolist()))
            seconds = verifier.estimate() / args.workers
            log.info("%s: %s clips of %s videos, about %s (%.3g hours)", verifier.name, f"{len(table):,}",
                     f"{videos:,}", time_left(seconds, 1.0), seconds / 3600)  # fmt: skip
        return cli.DONE
    args.output.mkdir(parents=True, exist_ok=True)
    report, has_faults = {}, False
    for verifier in verifiers:
        with Progress(verifier.name, len(verifier.source.table)) as progress:
            verdict = verifier.run(args.workers, progress, args.strict)
        unreadable, reasons = len(verdict.faults), verdict.reasons
        report[verifier.name] = {"clips": verdict.clips, "unreadable": unreadable, "reasons": reasons}
        has_faults |= unreadable > 0
    write_json(args.output / "report.json", report)
    # After all sources: progress lines of the next one would push the reasons out of sight.
    for verifier in verifiers:
        result = report[verifier.name]
        log.info("%s: %d clips, %d unreadable", verifier.name, result["clips"], result["unreadable"])
        for reason, count in result["reasons"].items():
            log.info("    %6d  %s", count, reason)
        if result["unreadable"]:
            log.info("    leave them out with data.train.%s.exclude=%s", verifier.name, verifier.exclude)
    return cli.BROKEN if has_faults else cli.DONE


if __name__ == "__main__":
    run_tool(main)
