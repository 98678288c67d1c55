"""The way of a clip through the stages: detect -> track -> narrate -> check, each remembered, none done twice.

A stage takes clips with what the stage before it made of them, and gives what it makes of them as soon as each is
done. This module knows nothing of what stages do: it finds out what is missing, hands it over, writes down what comes
back, and puts the rows of a finished shard together.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import logging
import math
import re
import time
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from egohod.config import PROJECT
from egohod.data.config import SourceConfig
from egohod.data.decoders import choose_decoder
from egohod.data.detections import SCHEMA
from egohod.data.formats import read_clips
from egohod.data.storage import open_cache
from egohod.data.table import ClipRow, ClipSource, ClipTable, TableReport, choose_text
from egohod.data.videos import Frames, VideoError, sliding_windows
from egohod.errors import UserError
from egohod.hod import pipeline, tracking
from egohod.hod import pipeline as records
from egohod.hod.config import COLUMNS, HodConfig, used
from egohod.hod.detectors import detector_class, make_detector, typed_options
from egohod.hod.detectors.base import Detector
from egohod.hod.draw import Seen
from egohod.hod.facts import ClipFacts, FactsParams, facts_of, without_rare
from egohod.hod.language import sides
from egohod.hod.narrate import narrate_checked
from egohod.hod.narrators import make_narrator, make_template
from egohod.hod.narrators.base import Narration, Narrator, Request
from egohod.hod.store import Block, Found, Shard, Work, key_of, written
from egohod.hod.tracking import TrackParams
from egohod.runtime import Lost, Workers

log = logging.getLogger(__name__)

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


DETECT, TRACK, NARRATE, CHECK = STAGES = ("detect", "track", "narrate", "check")
# Part of what results are called by. Raise a stage's when its code makes something else of the same clip and settings:
# what older code made is then done again.
VERSIONS = {DETECT: 1, TRACK: 2, NARRATE: 8, CHECK: 5}


class Looker(Protocol):
    """Makes a value of the frames of a clip."""

    def begin(self) -> None:
        """Called once, before there are workers: what they can share is made here."""
        ...

    def __call__(self, frames: Frames, video_id: str) -> Any:
        """The value."""
        ...


class Looking:
    """The stage that reads frames: ``look`` makes a value of those of a clip, in ``workers`` processes.

    A clip whose video cannot be read is a failure, and so is one at which a process dies or takes longer than
    ``patience`` seconds; storage that cannot be used at all ends the run.
    """

    name, of_text = DETECT, False

    def __init__(
        self,
        source: ClipSource,
        frames: int,
        look: Looker,
        settings: Mapping[str, Any],
        workers: int,
        patience: float = 600.0,
    ) -> None:
        self.settings: Mapping[str, Any] = {"version": VERSIONS[DETECT], "frames": frames, **settings}
        self._source, self._frames, self._look = source, frames, look
        self._workers, self._patience = workers, patience

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Found]]:
        """See :class:`~egohod.hod.pipeline.Stage`."""
        todo = iter(tasks)
        first = next(todo, None)
        if first is None:
            return
        tasks = itertools.chain([first], todo)
        self._look.begin()
        if not self._workers:
            yield from ((task, self._one(task)) for task in tasks)
            return
        with Workers(self._workers, self._one, self._patience) as workers:
            for task, found in workers.unordered(tasks):
                yield task, Found(None, found.reason) if isinstance(found, Lost) else found

    def _one(self, task: Task) -> Found:
        row = self._source.table.row(task.index)
        try:
            return Found(self._look(self._source.read(row, self._frames, None), row.video_id))
        except VideoError as error:
            return Found(None, str(error))


class Thinking:
    """A stage that works on what is known: ``think`` gives (place, what is made of it) of each of some tasks.

    It is handed ``group`` tasks at a time.
    """

    def __init__(
        self,
        name: str,
        think: Callable[[Sequence[Task]], Iterable[tuple[int, Found]]],
        settings: Mapping[str, Any],
        of_text: bool = False,
        group: int = 256,
    ) -> None:
        self.name, self.of_text = name, of_text
        self.settings: Mapping[str, Any] = {"version": VERSIONS[name], **settings}
        self._think, self._group = think, group

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Found]]:
        """See :class:`~egohod.hod.pipeline.Stage`."""
        todo = iter(tasks)
        while some := list(itertools.islice(todo, self._group)):
            for place, found in self._think(some):
                yield some[place], found


_DIGITS = 5
Record = TypeVar("Record")


def boxes_to_plain(boxes: pa.Table) -> dict[str, list[Any]]:
    """Rows of the detections' schema -> a list for each column; the video's id, alike in all, is left out."""
    return {name: plain(boxes[name].to_pylist()) for name in SCHEMA.names if name != "video_id"}


def boxes_from_plain(columns: dict[str, list[Any]], video_id: str) -> pa.Table:
    """The inverse of :func:`boxes_to_plain`, up to rounding."""
    rows = len(columns["second"])
    return pa.table({"video_id": [video_id] * rows} | columns).select(SCHEMA.names).cast(SCHEMA)


def plain(value: Any) -> Any:
    """A dataclass of numbers, texts, arrays and such as what JSON can spell; NaN becomes null."""
    if dataclasses.is_dataclass(value):
        return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        return plain(value.item())
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    return value


def read(kind: type[Record], value: Any) -> Record:
    """The dataclass ``kind`` of what :func:`plain` made of one. null in an array is NaN."""
    return typing.cast(Record, _read(kind, value))


def _read(kind: Any, value: Any) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (part for part in parts if part is not types.NoneType)
        return None if value is None else _read(inner, value)
    if origin is dict:
        return {key: _read(parts[1], each) for key, each in value.items()}
    if origin in (tuple, list):
        return origin(_read(parts[0], each) for each in value)
    if kind is np.ndarray:
        return np.array(value, dtype=np.float64)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _read(hints[name], each) for name, each in value.items()})  # type: ignore[operator]
    return value


# A larger share of captions by the stand-in, or without a hand, is not what anybody runs this for.
_MOSTLY = 0.5


class Tally:
    """Counts checked narrations of the narrator called ``narrator``."""

    def __init__(self, narrator: str) -> None:
        self._narrator = narrator
        self._worded, self._refused = Counter[str](), Counter[str]()
        self._tokens, self._handless = [0, 0], 0

    def add(self, checked: Mapping[str, Any]) -> None:
        """Count one: a :class:`~egohod.hod.narrate.Checked` as :func:`~egohod.hod.pipeline.plain` has it."""
        again = checked["attempts"] > 1 and checked["narrator"] == self._narrator
        self._worded[f"{checked['narrator']} asked again" if again else checked["narrator"]] += 1
        self._refused.update({reason.partition(":")[0] for reason in checked["refusals"]})
        self._tokens[0] += checked["prompt_tokens"]
        self._tokens[1] += checked["completion_tokens"]
        self._handless += not sides(checked["text"])

    def say(self) -> None:
        """Log the counts, with a warning where they are mostly not as they should be."""
        narrations = self._worded.total()
        if not narrations:
            return
        parts = [f"worded by {_listed(self._worded)}"]
        if self._refused:
            parts.append(f"refused for {_listed(self._refused)}")
        if any(self._tokens):
            parts.append(f"{self._tokens[0]:,} tokens asked and {self._tokens[1]:,} answered")
        log.info("%s narrations: %s", f"{narrations:,}", "; ".join(parts))
        stood_in = self._worded["template"] if self._narrator != "template" else 0
        if stood_in > _MOSTLY * narrations:
            log.warning(
                "the template stands in for %s in %s of %s narrations: is the model good enough, and there?",
                *(self._narrator, f"{stood_in:,}", f"{narrations:,}"),
            )
        if self._handless:
            level = logging.WARNING if self._handless > _MOSTLY * narrations else logging.INFO
            log.log(level, "%s of %s narrations name no hand", f"{self._handless:,}", f"{narrations:,}")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


# The share of unusable rows is judged as if at least so many had been read.
_GRACE_ROWS = 1000
# What leaves a row out on purpose is no damage.
_INTENDED = ("duplicates", "on the exclude list")


def narrated(source: SourceConfig, keep: Sequence[str], max_bad_fraction: float) -> ClipTable:
    """The clips of ``source.metadata`` with the columns ``keep``; rows that cannot be used are counted and said.

    Raises :class:`UserError` if they are more than ``max_bad_fraction`` of all, or a column of ``keep`` is not there.
    """
    table = read_clips(source, extra=["uid", "dataset", *keep])
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
    """Windows over every video below ``root``, of which nothing is said; see
    :func:`~egohod.data.videos.sliding_windows`.

    Files that cannot be opened are said. Raises :class:`UserError` if there is no window.
    """
    clips, faults = sliding_windows(root, seconds, stride, decoder)
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


PROMPTS = PROJECT / "configs" / "hod" / "prompts"
# What changes how long a narrator takes, or whom it asks, but not what it is asked.
_ROUTE = ("endpoint", "api_key_env", "concurrency", "timeout_seconds", "retries", "give_up_seconds", "prompt")


def make_stages(cfg: HodConfig, source: ClipSource, text_of: Callable[[int], str]) -> list[Stage]:
    """Detect, track, narrate, check. ``text_of`` is what was said about a clip before."""
    narrating = _Narrating(cfg, source, text_of)
    # Enough that no request waits for another at the end of a group; frames of so many clips must fit the memory.
    at_once = cfg.narrator.batch * cfg.narrator.concurrency
    group = 256 if cfg.narrator.kind == "template" else 2 * at_once if cfg.narrator.kind == "vlm" else 8 * at_once
    detector = {
        "detector": cfg.detector.kind,
        "options": typed_options(cfg.detector.kind, cfg.detector.options),
        "camera": cfg.tracks.camera,
        # Which files a clip's frames lie in, and where in them. The folders are left out: they differ by machine.
        "layout": cfg.source.layout,
        "chunk_seconds": cfg.source.chunk_seconds,
        "min_clip_seconds": cfg.source.min_clip_seconds,
    }
    tracks = {name: value for name, value in vars(cfg.tracks).items() if name != "camera"}
    return [
        Looking(source, cfg.frames, _Look(cfg, source.table), detector, cfg.workers, cfg.clip_seconds),
        Thinking(TRACK, _Tracking(cfg, source), tracks),
        Thinking(NARRATE, narrating, narrator_settings(cfg), of_text=True, group=group),
        Thinking(CHECK, narrating.check, vars(cfg.check), of_text=True, group=group),
    ]


def narrator_settings(cfg: HodConfig) -> dict[str, Any]:
    """All that a narrator's words depend on; the text of its prompt stands for the file."""
    narrator = cfg.narrator
    kept = {name: value for name, value in used(narrator).items() if name not in _ROUTE}
    kept["min_seen"] = cfg.check.min_seen
    if narrator.kind == "template":
        return kept
    prompt = Path(narrator.prompt or PROMPTS / f"{narrator.kind}.jinja")
    # A prompt that is not there, or no text, is the narrator's complaint.
    return kept | {
        "prompt": prompt.read_text(encoding="utf-8-sig", errors="replace") if prompt.is_file() else str(prompt)
    }


class _Look:
    """Boxes of a clip's frames, and how the camera moved between them."""

    def __init__(self, cfg: HodConfig, table: ClipTable) -> None:
        self._table = table
        self._kind, self._options = cfg.detector.kind, cfg.detector.options
        self._camera = cfg.tracks.camera
        self._detector: Detector | None = None

    def begin(self) -> None:
        # Files are read once and shared by the workers; models are loaded by each.
        if detector_class(self._kind).reads_files and self._detector is None:
            self._detector = make_detector(self._kind, self._options)
            _require_detections(self._options["path"], self._detector.videos(), self._table)

    def __call__(self, frames: Frames, video_id: str) -> dict[str, Any]:
        # A clip of fewer frames shows some of them twice.
        seconds, kept = np.unique(frames.seconds, return_index=True)
        numbers, pictures = frames.numbers[kept], frames.pictures[kept]
        if self._detector is None:
            self._detector = make_detector(self._kind, self._options)
        found = self._detector.detect(video_id, numbers, seconds, pictures)
        height, width = pictures.shape[1:3]
        shifts = tracking.camera_shifts(pictures, seconds, found) if self._camera else None
        return pipeline.plain(
            {"seconds": seconds, "aspect": width / height, "boxes": pipeline.boxes_to_plain(found), "shifts": shifts}
        )


def _require_detections(path: str, videos: set[str], table: ClipTable) -> None:
    """Say how many videos have no detections: their clips would get their plain narrations back without a word."""
    wanted = pd.unique(table.column("video_id"))
    lacking = [each for each in wanted if each not in videos]
    if len(lacking) == len(wanted):
        raise UserError(
            f"{path}: has detections of none of the {len(wanted):,} videos of {table.path}, such as '{lacking[0]}'; "
            "the video_id must be the same in both"
        )
    if lacking:
        log.warning(
            "%s: %s of %s videos have no detections, such as '%s'; no hand is told of in their clips",
            *(path, f"{len(lacking):,}", f"{len(wanted):,}", lacking[0]),
        )


class _Tracking:
    """Facts from boxes."""

    def __init__(self, cfg: HodConfig, source: ClipSource) -> None:
        track = TrackParams(**{each.name: getattr(cfg.tracks, each.name) for each in dataclasses.fields(TrackParams)})
        self._params, self._table = FactsParams(track=track), source.table

    def __call__(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Found]]:
        for place, task in enumerate(tasks):
            row, seen = self._table.row(task.index), task.before[DETECT]
            facts = facts_of(
                pipeline.boxes_from_plain(seen["boxes"], row.video_id),
                np.array(seen["seconds"]),
                video_id=row.video_id,
                start=row.start,
                end=row.end,
                aspect=seen["aspect"],
                shifts=None if seen["shifts"] is None else np.array(seen["shifts"]),
                params=self._params,
            )
            yield place, Found(pipeline.plain(facts))


class _Narrating:
    """Narrations from facts, and the check of them; the narrator is made when it is first needed."""

    def __init__(self, cfg: HodConfig, source: ClipSource, text_of: Callable[[int], str]) -> None:
        self._cfg, self._source, self._text_of = cfg, source, text_of
        self._narrator: Narrator | None = None

    def __call__(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Found]]:
        requests, faults = self._requests(tasks)
        places = list(requests)
        for number, answer in self._made().narrate(list(requests.values())):
            yield places[number], Found(pipeline.plain(answer), makeshift=answer.problem is not None)
        yield from faults

    def check(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Found]]:
        """Judge what was narrated; what is refused is narrated once more, or by the template."""
        requests, faults = self._requests(tasks)
        places = list(requests)
        first = [pipeline.read(Narration, tasks[place].before[NARRATE]) for place in places]
        narrator = _Remembering(self._made(), first)
        template = make_template(self._cfg.narrator)
        for number, checked in narrate_checked(narrator, list(requests.values()), self._cfg.check, template):
            if checked.text is None:
                reasons = "; ".join(dict.fromkeys((*checked.refusals, *checked.verdict.reasons)))
                yield places[number], Found(None, f"nothing true to say: {reasons}")
            else:
                value = pipeline.plain(checked) | {"text": " ".join(checked.text.split())}
                yield places[number], Found(value, makeshift=checked.unanswered)
        yield from faults

    def _made(self) -> Narrator:
        if self._narrator is None:
            self._narrator = make_narrator(self._cfg.narrator, PROMPTS)
        return self._narrator

    def _requests(self, tasks: Sequence[Task]) -> tuple[dict[int, Request], list[tuple[int, Found]]]:
        """What to ask of each task by its place, and of which it cannot be asked."""
        requests, faults = dict[int, Request](), list[tuple[int, Found]]()
        for place, task in enumerate(tasks):
            try:
                facts = without_rare(pipeline.read(ClipFacts, task.before[TRACK]), self._cfg.check.min_seen)
                requests[place] = Request(self._text_of(task.index), facts, task.index, self._frames(task.index))
            except VideoError as error:
                faults.append((place, Found(None, str(error))))
        return requests, faults

    def _frames(self, index: int) -> np.ndarray | None:
        if self._cfg.narrator.kind != "vlm":
            return None
        return self._source.read(self._source.table.row(index), self._cfg.narrator.frames, None).pictures


class _Remembering:
    """A narrator whose first answers are known."""

    def __init__(self, narrator: Narrator, first: Sequence[Narration]) -> None:
        self.name = narrator.name
        self.instructions = getattr(narrator, "instructions", "")
        self._narrator, self._first = narrator, first

    def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
        """See :class:`~egohod.hod.narrators.base.Narrator`."""
        if any(request.complaints for request in requests):
            return self._narrator.narrate(requests)
        return enumerate(self._first)


@dataclass(frozen=True)
class Plan:
    """A pipeline with the configuration it was made of."""

    cfg: HodConfig
    source: ClipSource
    pipeline: Pipeline
    fingerprint: str
    """Of all that the output depends on."""

    @property
    def work(self) -> Work:
        """The folder of the stages."""
        return self.pipeline.work

    def finished(self, shard: Shard) -> dict[str, Any] | None:
        """What a shard that is finished with these settings holds."""
        return self.work.finished(shard, self.fingerprint)

    def finish(self, shard: Shard) -> Result:
        """See :meth:`Pipeline.finish`; says what the narrations are like."""
        tally = Tally(self.cfg.narrator.kind)

        def row(index: int, value: Any) -> Sequence[str]:
            tally.add(value)
            return self._row(index, value)

        result = self.pipeline.finish(shard, self.fingerprint, row, [*COLUMNS, *self.cfg.keep])
        tally.say()
        return result

    def merge(self, shards: int) -> dict[str, int]:
        """See :meth:`Work.merge`."""
        return self.work.merge(shards, self.fingerprint, len(self.pipeline.table), self.cfg.block)

    def seen(self, index: int) -> Seen:
        """All that is known of a clip, to be drawn; without pictures where its video cannot be read."""
        known, row = self.pipeline.known(index), self.pipeline.table.row(index)
        values = {name: found.value for name, found in known.items() if found.fault is None}
        fault = next((f"{name}: {found.fault}" for name, found in known.items() if found.fault), None)
        pictures, seconds = np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0)
        try:
            frames = self.source.read(row, self.cfg.frames, None)
            # Each once, as the detector saw them.
            seconds, kept = np.unique(frames.seconds, return_index=True)
            pictures = frames.pictures[kept]
        except VideoError as error:
            log.warning("no picture: %s", error)
        boxes = values[DETECT]["boxes"] if DETECT in values else {"second": []}
        facts = records.read(ClipFacts, values[TRACK]) if TRACK in values else None
        return Seen(
            title=f"{row.video_id} {row.start:.2f}-{row.end:.2f} s",
            pictures=pictures,
            seconds=seconds,
            boxes=[dict(zip(boxes, each, strict=True)) for each in zip(*boxes.values(), strict=True)],
            facts=facts,
            source=source_text(self.cfg, self.pipeline.table, index),
            text=values[CHECK]["text"] if CHECK in values else fault or "not narrated yet",
            narrator=values[CHECK]["narrator"] if CHECK in values else self.cfg.narrator.kind,
            verdict="failed" if fault else _verdict(values.get(CHECK)),
            sides=tuple(sorted(facts.hands)) if facts else (),
            note="; ".join(values[CHECK]["refusals"]) if CHECK in values else "",
        )

    def described(self) -> dict[str, str]:
        """What a page says about the run."""
        cfg = self.cfg
        known = {
            "metadata": cfg.source.metadata or f"none: windows of {cfg.windows.seconds:g} s",
            "videos": cfg.source.root,
            "detector": cfg.detector.kind,
            "narrator": cfg.narrator.kind,
            "frames a clip": str(cfg.frames),
        }
        return {name: value for name, value in known.items() if value}

    def _row(self, index: int, value: Any) -> Sequence[str]:
        table = self.pipeline.table
        row = table.row(index)
        cells = [row.video_id, number(row.start), number(row.end), value["text"], row.dataset or self.cfg.dataset]
        return [*cells, uid_of(table, index, row), *(table.value(name, index) for name in self.cfg.keep)]


def build(cfg: HodConfig, *, again: bool = False, tell: Callable[[Progress], None] = lambda _: None) -> Plan:
    """Read the clips, and set up the stages; nothing is written, no video opened but to find windows.

    Raises :class:`UserError` for whatever is missing.
    """
    work = Work(Path(cfg.output))
    _require_own_place(cfg, work)
    table = clips_of(cfg)
    opener = choose_decoder(cfg.decoder)[1]
    source = ClipSource(table, cfg.source, opener, open_cache(cfg.cache, cfg.cache_gb))

    def text_of(index: int) -> str:
        return source_text(cfg, table, index)

    stages = make_stages(cfg, source, text_of)
    pipeline = Pipeline(
        table, stages, work, text_of, block=cfg.block, max_bad_fraction=cfg.max_bad_fraction, again=again, tell=tell
    )
    settings = [(stage.name, stage.settings) for stage in stages]
    fingerprint = key_of(checksum(cfg.source, table), settings, cfg.keep, cfg.dataset, cfg.seed, cfg.block)
    return Plan(cfg, source, pipeline, fingerprint)


def _require_own_place(cfg: HodConfig, work: Work) -> None:
    """Raise :class:`UserError` if the output would take the place of a folder, or of a file that is read."""
    if work.output.is_dir():
        raise UserError(f"output is '{cfg.output}', which is a folder; it must be a file, such as {cfg.output}/hod.csv")
    options = {f"detector.options.{name}": value for name, value in cfg.detector.options.items()}
    read = {"source.metadata": cfg.source.metadata, "source.exclude": cfg.source.exclude, **options}
    read["narrator.prompt"] = cfg.narrator.prompt
    for name, path in read.items():
        if isinstance(path, str) and path and Path(path).resolve() in (work.output.resolve(), work.failures.resolve()):
            raise UserError(f"output is '{cfg.output}', but {name} is read from {path}: it would be overwritten")


def clips_of(cfg: HodConfig) -> ClipTable:
    """The clips that are to be narrated. Raises :class:`UserError`."""
    if cfg.source.metadata:
        return narrated(cfg.source, cfg.keep, cfg.max_bad_fraction)
    if cfg.narrator.kind != "vlm":
        raise UserError(
            "no narrations to start from: give --metadata (source.metadata), or narrator.kind=vlm to narrate windows "
            "of the videos of --root"
        )
    return windows(cfg.source.root, cfg.windows.seconds, cfg.windows.stride, cfg.decoder)


def source_text(cfg: HodConfig, table: ClipTable, index: int) -> str:
    """What was said about a clip before; of several narrations the one that ``source.list_text`` chooses."""
    texts = table.row(index).texts
    return choose_text(texts, cfg.source.list_text, np.random.default_rng((cfg.seed, index)))


def _verdict(checked: Any) -> str:
    """What became of the narrator's words."""
    if checked is None:
        return "unchecked"
    if not checked["refusals"]:
        return "passed"
    return "replaced" if checked["narrator"] == "template" else "asked again"
