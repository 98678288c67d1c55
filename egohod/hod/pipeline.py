"""The way of a clip through the stages: detect -> track -> narrate -> check, each remembered, none done twice.

A stage takes clips with what the stage before it made of them, and gives what it makes of them as soon as each is
done. This module knows nothing of what stages do: it finds out what is missing, hands it over, writes down what comes
back, and puts the rows of a finished shard together.
"""

from __future__ import annotations

import csv
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from egohod.data.table import ClipRow, ClipTable
from egohod.errors import UserError
from egohod.hod.blocks import Block, Found, key_of
from egohod.hod.shards import Shard, Work, written

log = logging.getLogger(__name__)

COLUMNS = ("video_id", "start_second", "end_second", "text", "dataset", "uid")
FAILURE_COLUMNS = ("row", "video_id", "start_second", "end_second", "uid", "stage", "reason")
# The share of failures is judged as if at least so many clips had been tried: a few at the start stop nothing.
_GRACE_CLIPS = 1000
# Failures said in the log, one by one; all of them are in the ledger.
_SAID = 20


@dataclass(frozen=True)
class Task:
    """A clip that a stage is to work on."""

    index: int
    """Of the clip in the table."""
    key: str
    before: Mapping[str, Any]
    """What each of the stages before made of it."""


class Stage(Protocol):
    """One of the stages."""

    @property
    def name(self) -> str:
        """How it is called."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that its results depend on, apart from the clip and the stages before."""
        ...

    @property
    def of_text(self) -> bool:
        """Whether its results depend on the clip's narration too."""
        ...

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Found]]:
        """What is made of each task, in any order, each as soon as it is done.

        Tasks are taken only as they can be worked on: they may be more than fit the memory.
        """
        ...


@dataclass
class Progress:
    """How far a stage is."""

    stage: str
    total: int
    """Clips of the shard."""
    known: int = 0
    """Done by an earlier run."""
    done: int = 0
    """Done by this one, failures included."""
    failed: int = 0
    """Of those done by this run."""
    failed_before: int = 0
    """Of those done by an earlier one."""
    lacking: int = 0
    """Nothing to work on: an earlier stage has failed."""
    unready: int = 0
    """Nothing to work on yet: an earlier stage was not run."""


@dataclass(frozen=True)
class Result:
    """What a finished shard holds."""

    narrations: int
    failures: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Failures by stage."""


class Pipeline:
    """The stages over the clips of a table, in blocks of ``block`` clips, within a claimed ``work`` folder.

    ``text_of`` is what was said about a clip before. ``max_bad_fraction`` is the largest tolerated share of clips at
    which a stage fails. ``again`` tries those anew that failed in an earlier run, or
    have a makeshift value.
    """

    def __init__(
        self,
        table: ClipTable,
        stages: Sequence[Stage],
        work: Work,
        text_of: Callable[[int], str],
        *,
        block: int = 256,
        max_bad_fraction: float = 0.05,
        again: bool = False,
        tell: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.table = table
        self.stages = list(stages)
        self._settings = {stage.name: key_of(stage.settings) for stage in stages}
        self.work = work
        self._text_of = text_of
        self._block = block
        self._max_bad_fraction = max_bad_fraction
        self._again = again
        self._tell = tell

    def indices(self, block: int) -> range:
        """The clips of a block."""
        return range(block * self._block, min((block + 1) * self._block, len(self.table)))

    def clips(self, shard: Shard) -> range:
        """The clips of a shard."""
        blocks = shard.blocks(len(self.table), self._block)
        return range(min(blocks.start * self._block, len(self.table)), min(blocks.stop * self._block, len(self.table)))

    def keys(self, index: int) -> dict[str, str]:
        """The key of each stage for a clip."""
        row, keys, before = self.table.row(index), dict[str, str](), ""
        for stage in self.stages:
            # The clip's number too: it varies the wording.
            text = (self._text_of(index), index) if stage.of_text else ()
            before = key_of(
                before, row.video_id, row.start, row.end, row.dataset, stage.name, self._settings[stage.name], text
            )
            keys[stage.name] = before
        return keys

    def known(self, index: int) -> dict[str, Found]:
        """All that the stages found out about a clip so far."""
        with Block(self.work.block(index // self._block)) as block:
            found = {name: block.get(name, key) for name, key in self.keys(index).items()}
        return {name: each for name, each in found.items() if each is not None}

    def begun(self, number: int) -> set[int]:
        """The clips of a block that a stage has been through."""
        with Block(self.work.block(number)) as block:
            return {
                index
                for index in self.indices(number)
                if any(block.get(name, key) for name, key in self.keys(index).items())
            }

    def count_known(self, shard: Shard) -> dict[str, int]:
        """Clips of a shard that each stage has been through."""
        counts = dict.fromkeys(self._settings, 0)
        for number in shard.blocks(len(self.table), self._block):
            with Block(self.work.block(number)) as block:
                for index in self.indices(number):
                    for name, key in self.keys(index).items():
                        counts[name] += block.get(name, key) is not None
        return counts

    def try_out(self, index: int) -> Iterator[tuple[str, Found, float]]:
        """Take one clip through the stages up to a failure, and write nothing: (stage, what came out, seconds)."""
        before: dict[str, Any] = {}
        for stage in self.stages:
            began = time.perf_counter()
            ((_, found),) = stage.run([Task(index, "", before)])
            yield stage.name, found, time.perf_counter() - began
            if found.fault:
                return
            before = before | {stage.name: found.value}

    def run(self, name: str, shard: Shard) -> Progress:
        """Run one stage over a shard.

        Raises :class:`UserError` if too many clips fail, or if the stages before were not run on any of them.
        """
        number = [stage.name for stage in self.stages].index(name)
        stage, before = self.stages[number], [each.name for each in self.stages[:number]]
        at, due = Progress(name, len(self.clips(shard))), _Due(self, shard, stage, before)
        self._tell(at)
        with ExitStack() as stack:
            stack.callback(due.close)
            for task, found in stage.run(due.tasks(at, self._again)):
                due.put(task, found)
                at.done += 1
                if found.fault:
                    at.failed += 1
                    self._complain(at, task, found.fault)
                self._tell(at)
        self._tell(at)
        if at.unready and at.unready == at.total:
            raise UserError(
                f"{name}: not one of {at.total:,} clips has been through {', '.join(before)}; run that first"
            )
        return at

    def _complain(self, at: Progress, task: Task, fault: str) -> None:
        if at.failed <= _SAID:
            more = "; further ones are only counted" if at.failed == _SAID else ""
            log.warning("%s failed: %s: %s%s", at.stage, self.table.where(task.index), fault, more)
        # Those of earlier runs do not count: what they died of may be mended.
        if at.failed > self._max_bad_fraction * max(at.done, _GRACE_CLIPS):
            raise UserError(
                f"{at.stage}: {at.failed} of {at.done} clips failed, more than max_bad_fraction="
                f"{self._max_bad_fraction:g} allows; the last: {self.table.where(task.index)}: {fault}"
            )

    def finish(
        self, shard: Shard, fingerprint: str, row: Callable[[int, Any], Sequence[str]], header: Sequence[str]
    ) -> Result:
        """Write a shard's rows and its ledger. ``row`` makes a row of a clip's index and its last value.

        Raises :class:`UserError` if a clip has neither a value nor a failure, so that a stage must be run first.
        """
        narrations, makeshift, reasons = 0, 0, dict[str, int]()
        rows, ledger = self.work.part(shard, ".csv"), self.work.part(shard, ".failures.csv")
        with written(rows) as good, written(ledger) as bad:
            told, failed = (csv.writer(file, lineterminator="\n") for file in (good, bad))
            told.writerow(header)
            failed.writerow(FAILURE_COLUMNS)
            for number in shard.blocks(len(self.table), self._block):
                with Block(self.work.block(number)) as block:
                    for index in self.indices(number):
                        stage, found = self._outcome(index, block)
                        if found.fault is None:
                            told.writerow(map(_flat, row(index, found.value)))
                            narrations += 1
                            makeshift += found.makeshift
                        else:
                            failed.writerow(map(_flat, [*_place(self.table, index), stage, _line(found.fault)]))
                            reasons[stage] = reasons.get(stage, 0) + 1
        failures = sum(reasons.values())
        counts = {"narrations": narrations, "failures": failures, "makeshift": makeshift, "by_stage": reasons}
        self.work.finish(shard, {"fingerprint": fingerprint} | counts)
        return Result(narrations, failures, reasons)

    def _outcome(self, index: int, block: Block) -> tuple[str, Found]:
        """The last stage's value of a clip, or the first failure on the way."""
        found: Found | None = None
        for name, key in self.keys(index).items():
            found = block.get(name, key)
            if found is None:
                raise UserError(f"{self.table.where(index)}: has not been through the stage {name}; run it first")
            if found.fault:
                break
        assert found is not None
        return name, found


class _Due:
    """What a stage still has to do on a shard, and where that goes. A block is open only while clips of it are due."""

    def __init__(self, pipeline: Pipeline, shard: Shard, stage: Stage, before: Sequence[str]) -> None:
        self._pipeline, self._shard, self._stage, self._before = pipeline, shard, stage, before
        self._blocks: dict[int, Block] = {}
        self._waiting: dict[int, int] = {}

    def tasks(self, at: Progress, again: bool) -> Iterator[Task]:
        pipeline = self._pipeline
        for number in self._shard.blocks(len(pipeline.table), pipeline._block):
            block = Block(pipeline.work.block(number))
            self._blocks[number], self._waiting[number] = block, 1
            for index in pipeline.indices(number):
                keys = pipeline.keys(index)
                key = keys[self._stage.name]
                found = block.get(self._stage.name, key)
                if found is not None and not (again and (found.fault or found.makeshift)):
                    at.known += 1
                    at.failed_before += found.fault is not None
                    continue
                before = {name: each for name in self._before if (each := block.get(name, keys[name]))}
                if any(each.fault for each in before.values()):
                    at.lacking += 1
                    continue
                if len(before) < len(self._before):
                    at.unready += 1
                    continue
                self._waiting[number] += 1
                yield Task(index, key, {name: each.value for name, each in before.items()})
            self._less(number)

    def put(self, task: Task, found: Found) -> None:
        number = task.index // self._pipeline._block
        self._blocks[number].put(self._stage.name, task.key, found)
        self._less(number)

    def close(self) -> None:
        for block in self._blocks.values():
            block.close()

    def _less(self, number: int) -> None:
        self._waiting[number] -= 1
        if not self._waiting[number]:
            self._blocks.pop(number).close()


def _place(table: ClipTable, index: int) -> list[str]:
    row = table.row(index)
    return [str(row.row), row.video_id, number(row.start), number(row.end), uid_of(table, index, row)]


def uid_of(table: ClipTable, index: int, row: ClipRow) -> str:
    """The clip's name: the table's own, else one made of its place."""
    if "uid" in table.column_names and (uid := table.value("uid", index)):
        return uid
    return f"{row.video_id}_{number(row.start)}_{number(row.end)}"


def number(seconds: float) -> str:
    """Seconds as they are written to a table: to the microsecond."""
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def _flat(cell: str) -> str:
    """Without line breaks: each row is a line, which readers of tables split at and a merge counts."""
    return re.sub(r"[\r\n]+", " ", cell)


def _line(text: str) -> str:
    return " ".join(text.split())
