"""The HOD pipeline: from videos and their narrations to hand-object narrations, in four stages.

    detect    frames of a clip -> boxes of hands and objects, and the motion of the camera, in worker processes
    track     boxes -> facts: which hand moves where, what it touches
    narrate   facts and the narration before -> a hand-object narration
    check     both narrations and the facts -> the final text, or none

:func:`build` makes a :class:`Pipeline` of a configuration. :meth:`Pipeline.run` takes a shard's clips through some
stages and stores what each makes of each clip (:mod:`egohod.hod.store`); what is stored already is not computed again.
:meth:`Pipeline.finish` marks a shard as finished, and :meth:`Pipeline.merge` writes the csv of all shards.

A detector is added in :mod:`egohod.hod.detectors`, a narrator in :mod:`egohod.hod.narrators`: a module and a line in
the registry each. A further stage is a class like those below, and a place in ``STAGES`` at the end of this module. The
values of the last one have at least the fields of :class:`~egohod.hod.narrators.Checked`.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import itertools
import json
import logging
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from egohod.data.decoders import choose_decoder
from egohod.data.detections import SCHEMA
from egohod.data.formats import FORMATS, read_clips
from egohod.data.storage import open_cache
from egohod.data.table import ClipReader, ClipTable, choose_text
from egohod.data.videos import Frames, VideoError, sliding_windows
from egohod.errors import UserError
from egohod.hod.camera import camera_transforms, import_opencv
from egohod.hod.check import Opinion, sides
from egohod.hod.config import COLUMNS, FURTHER_CAPTIONS, HodConfig
from egohod.hod.detectors import Detector, check_boxes, detector_class, make_detector, typed_options
from egohod.hod.facts import ClipFacts, facts_of, without_rare
from egohod.hod.hands3d import Hands3d
from egohod.hod.judge import Judging, judge_settings, make_judging
from egohod.hod.narrators import (
    Cost,
    Narration,
    Narrator,
    Request,
    caption_settings,
    check_narrations,
    make_narrator,
    second_request,
)
from egohod.hod.narrators.template import TemplateNarrator
from egohod.hod.store import Finished, Outcome, Results, Shard, Store, from_plain, text_file, to_plain
from egohod.hod.vocabulary import load_vocabulary
from egohod.runtime import Lost, Progress, Workers, atomic_write, content_hash, file_hash, is_above_share

log = logging.getLogger(__name__)

DETECT, TRACK, NARRATE, CHECK = "detect", "track", "narrate", "check"
FAILURE_COLUMNS = ("row", "video_id", "start_second", "end_second", "uid", "stage", "reason")
# Failures that are logged one by one; the ledger has all of them.
_LOGGED_FAILURES = 20
# Clips that are taken through the stages after detect together, where no stage wants fewer.
_GROUP = 256
# Clips in a row group of exported boxes: one clip each would make the file several times larger and slower to read.
_EXPORTED_AT_A_TIME = 4096
# Part of the name of a file of clips. Raised when rows are checked by other rules, or written in another way.
_READ_VERSION = 1
# A larger share of captions from the template instead of the narrator, or without a hand, is worth a warning.
_MOST = 0.5


# --- Orchestration ---


@dataclass
class Task:
    """A clip on its way through the stages."""

    index: int  # of the clip in the table
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # what stages made of it so far
    # The narrator's input. Built by the narrate stage and used again by the check stage: both need the facts
    # decoded and, for a vision-language model, the frames.
    request: Request | None = None


class Stage(ABC):
    """One step from videos to narrations."""

    name: str
    # Part of the hash under which results are stored. Raised when the code makes something else of the same clip and
    # settings: results of the code before are then computed again.
    version = 1
    settings: Mapping[str, Any]  # all that its results depend on, apart from the clip and the stages before
    reads_text = False  # whether its results depend on the clip's narration too
    group: int | None = _GROUP  # the number of tasks that run() gets at a time; None for all, one by one

    @abstractmethod
    def __init__(self, cfg: HodConfig, source: ClipReader, before: Mapping[str, Stage]) -> None:
        """``source`` reads the clips, and has their table; ``before`` holds the stages before, by name."""

    def prepare(self) -> None:  # noqa: B027
        """Load what all clips share; :meth:`run` does it before its first task."""

    @abstractmethod
    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        """What it makes of each task, in any order, each as soon as it is done."""


class State(Enum):
    """Whether a stage has to work on a clip."""

    DUE = auto()
    STORED = auto()  # an earlier run did
    BLOCKED = auto()  # it failed at an earlier stage
    UNREADY = auto()  # it has not been through the stages before


# Of the narrate stage, for clips that have been through those before.
_HAS_FACTS = (State.DUE, State.STORED)


@dataclass
class StageCounts:
    """How far a stage is with the clips of a shard."""

    total: int
    stored: int = 0  # done by an earlier run
    done: int = 0  # done by this run, failures included
    failed: int = 0  # of those that this run has done
    failed_before: int = 0  # of those that an earlier run has done
    blocked: int = 0  # failed at an earlier stage
    unready: int = 0  # not been through the stages before

    def skip(self, state: State, outcome: Outcome | None) -> None:
        """Count a clip that the stage does not work on, by its state and what the stage made of it before."""
        assert state is not State.DUE
        self.stored += state is State.STORED
        self.blocked += state is State.BLOCKED
        self.unready += state is State.UNREADY
        self.failed_before += state is State.STORED and outcome is not None and outcome.fault is not None


class Pipeline:
    """Stages over the clips of a table. ``retry`` tries clips again that failed, or have a fallback value."""

    def __init__(self, cfg: HodConfig, table: ClipTable, stages: Sequence[Stage], *, retry: bool = False) -> None:
        self.cfg, self.table, self.stages, self.retry = cfg, table, list(stages), retry
        self.store = Store(Path(cfg.output))
        self._further = [name for name in FURTHER_CAPTIONS if name in cfg.narrator.captions]
        settings = [(stage.name, {"version": stage.version, **stage.settings}) for stage in stages]
        # In two parts, so that a merge can tell other metadata from other settings.
        others = _hash(settings, cfg.keep, cfg.dataset, cfg.seed, cfg.block)
        self.fingerprint = f"{_table_hash(cfg, table)[:24]}-{others}"
        # Of a stage's settings and those of all stages before: once for all clips.
        self._versions = [f"{stage.name}-{_hash(settings[: number + 1])}" for number, stage in enumerate(stages)]
        # Of a clip once for all stages; without a bound a million clips would take 500 MB.
        self.keys = functools.lru_cache(maxsize=65536)(self._keys)

    def _keys(self, index: int) -> dict[str, tuple[str, str]]:
        """By stage, what its result for a clip is stored under."""
        row, text = self.table.row(index), source_text(self.cfg, self.table, index)
        # Not the path of the video: folders differ by machine, and shards run on several.
        key = _hash(row.video_id, row.start, row.end, row.dataset)
        keys, reads_text = {}, False
        for stage, version in zip(self.stages, self._versions, strict=True):
            if stage.reads_text and not reads_text:
                # The clip's index too: it is the seed of the wording.
                key, reads_text = _hash(key, text, index), True
            keys[stage.name] = key, version
        return keys

    def clips(self, shard: Shard) -> range:
        """The clips of a shard, as indices of the table."""
        return shard.clips(len(self.table), self.cfg.block)

    def stored(self, index: int, results: Results) -> dict[str, Outcome]:
        """What each stage made of a clip so far, with these settings."""
        outcomes = {name: results.get(*key, index) for name, key in self.keys(index).items()}
        return {name: outcome for name, outcome in outcomes.items() if outcome is not None}

    def run(self, names: Sequence[str], shard: Shard, clips: Sequence[int] | None = None) -> dict[str, StageCounts]:
        """Take a shard's clips through the stages ``names``, which follow one another; the shard must be claimed.

        ``clips`` are some of the shard's, None: all.

        Clips pass through these stages in groups, so that the facts of a clip are decoded once for all of them.
        Raises :class:`UserError` if too many clips fail, or if none has been through the stages before.
        """
        stages = [stage for stage in self.stages if stage.name in names]
        clips = self.clips(shard) if clips is None else clips
        counts = {stage.name: StageCounts(len(clips)) for stage in stages}
        groups = [stage.group for stage in stages]
        with (
            self.store.results(shard) as results,
            Progress(", ".join(counts), len(clips), seconds=5.0) as progress,
        ):
            tasks = self._due_tasks(stages, clips, results, counts)
            if None in groups:
                # A stage that takes tasks one by one may take millions: they must not become a list.
                assert len(stages) == 1, "a stage that takes all tasks at a time runs alone"
                self._run_stage(stages[0], tasks, results, counts, progress)
            while group := list(itertools.islice(tasks, min(filter(None, groups), default=0))):
                for stage in stages:
                    self._run_stage(stage, group, results, counts, progress)
        for stage in stages:
            name, at = stage.name, counts[stage.name]
            notes = [
                (at.stored, "stored by an earlier run"),
                (at.failed, "failed"),
                (at.failed_before, "failed in an earlier run (--retry tries them again)"),
                (at.blocked, "failed at an earlier stage"),
            ]
            more = "".join(f", {n:,} {what}" for n, what in notes if n)
            log.info("%-7s done: %s clips%s", name, f"{at.done:,}", more)
            if at.unready and at.unready == at.total:
                before = ", ".join(each.name for each in self.stages[: self.stages.index(stage)])
                raise UserError(f"{name}: not one of {at.total:,} clips has been through {before}; run that first")
            if at.unready:
                log.warning("%s: %s clips have not been through the stages before; run those first", name, at.unready)
        return counts

    def run_all(self, shard: Shard) -> None:
        """Take a shard's clips through all stages: detect first, which runs in workers, then the others together."""
        self.run([self.stages[0].name], shard)
        self.run([stage.name for stage in self.stages[1:]], shard)

    def _due_tasks(
        self, stages: Sequence[Stage], clips: Sequence[int], results: Results, counts: Mapping[str, StageCounts]
    ) -> Iterator[Task]:
        """The clips for which at least one of the stages has something to do; others are counted."""
        for index in clips:
            task = Task(index, self.stored(index, results))
            # Groups are made of these alone: where few clips are due, as with --retry, requests to a model are full
            # all the same.
            states = [self._state(task, stage) for stage in stages]
            if State.DUE in states:
                yield task
            else:
                for stage, state in zip(stages, states, strict=True):
                    counts[stage.name].skip(state, task.outcomes.get(stage.name))

    def _state(self, task: Task, stage: Stage) -> State:
        outcome = task.outcomes.get(stage.name)
        if outcome is not None and not (self.retry and (outcome.fault or outcome.is_fallback)):
            return State.STORED
        before = [task.outcomes.get(each.name) for each in self.stages[: self.stages.index(stage)]]
        if any(each is not None and each.fault for each in before):
            return State.BLOCKED
        return State.UNREADY if None in before else State.DUE

    def _run_stage(
        self,
        stage: Stage,
        group: Iterable[Task],
        results: Results,
        counts: Mapping[str, StageCounts],
        progress: Progress,
    ) -> None:
        at, later = counts[stage.name], self.stages[self.stages.index(stage) + 1 :]
        pending = set[int]()

        def due() -> Iterator[Task]:
            for task in group:
                state = self._state(task, stage)
                if state is State.DUE:
                    pending.add(task.index)
                    yield task
                else:
                    at.skip(state, task.outcomes.get(stage.name))

        tasks = due()
        for task, outcome in stage.run(tasks):
            pending.remove(task.index)
            if not at.done:
                # Other settings may share the result that a retry replaces: their narrations are no longer complete.
                results.unmark(None if self.retry else self.fingerprint)
            # At once: a killed run loses the clips that it is working on, and no answer of a model that was paid for.
            # What later stages made of the result that this one replaces goes with it, in the same transaction.
            keys = self.keys(task.index)
            stale = [keys[each.name] for each in later if task.outcomes.pop(each.name, None) is not None]
            results.put(*keys[stage.name], outcome, stale)
            task.outcomes[stage.name] = outcome
            at.done += 1
            at.failed += outcome.fault is not None
            if outcome.fault is not None:
                if at.failed <= _LOGGED_FAILURES:
                    more = "; further ones are only counted" if at.failed == _LOGGED_FAILURES else ""
                    # As a UserError prints it: one line, without what no terminal shows.
                    where = self.table.where(task.index)
                    log.warning("%s failed: %s", stage.name, UserError(f"{where}: {outcome.fault}{more}"))
                # Failures of earlier runs do not count: their cause may be gone.
                if is_above_share(at.failed, at.done, self.cfg.max_bad_fraction):
                    raise UserError(
                        f"{stage.name}: {at.failed} of {at.done} clips failed, more than max_bad_fraction="
                        f"{self.cfg.max_bad_fraction:g} allows; the last: {self.table.where(task.index)}: "
                        f"{outcome.fault}"
                    )
            settled = sum(each.stored + each.done + each.blocked + each.unready for each in counts.values())
            failed = sum(each.failed for each in counts.values())
            progress.update(settled / len(counts), note=f"{failed:,} failed" if failed else "")
        # A clip without an outcome would be missing without a reason, and again after every rerun.
        pending.update(task.index for task in tasks)
        assert not pending, f"stage {stage.name} has no outcome for {self.table.where(min(pending))}"

    def write_requests(self, shard: Shard, path: Path) -> int:
        """Write the requests to the language model for captions that are due; their number. With 0 there is no file.

        Clips go through the stages before narrate first. With ``retry`` there are also requests for clips whose answer
        failed, and for those whose caption was refused: these with the reasons. Raises :class:`UserError`.
        """
        from egohod.hod.narrators.batch import FIRST, SECOND, request_line, split
        from egohod.hod.narrators.llm import ChatFormat

        narrate, run, last = self._batch_stage(), self._batch_run(), self.stages[-1]
        if path.exists():
            raise UserError(f"{path}: exists; choose another file")
        chat, clips, written, file = ChatFormat(self.cfg.narrator), self.clips(shard), 0, None
        for stage in self.stages[: self.stages.index(narrate)]:
            self.run([stage.name], shard)
        counts = {stage.name: StageCounts(len(clips)) for stage in (narrate, last)}
        with (
            self.store.results(shard) as results,
            Progress("requests", len(clips), seconds=5.0) as progress,
            ExitStack() as stack,
        ):
            tasks = self._due_tasks([narrate, last], clips, results, counts)
            while group := list(itertools.islice(tasks, narrate.group)):
                ready, failed = narrate.requests([task for task in group if self._state(task, narrate) in _HAS_FACTS])
                for task, outcome in failed:
                    # As a run would store it: without a request such a clip would wait for its answer for ever.
                    results.unmark(None if self.retry else self.fingerprint)
                    results.put(*self.keys(task.index)[NARRATE], outcome)
                    log.warning("%s failed: %s: %s", NARRATE, self.table.where(task.index), outcome.fault)
                due: dict[int, list[Request]] = {FIRST: [], SECOND: []}
                for task, request in ready:
                    if self._state(task, narrate) is State.DUE:
                        due[FIRST].append(request)
                    elif self.cfg.check.ask_again and last.name in task.outcomes:
                        narration, checked = (task.outcomes[name].parsed() for name in (NARRATE, last.name))
                        again = second_request(
                            request,
                            from_plain(Narration, narration),
                            [from_plain(Opinion, each) for each in (checked or {}).get("opinions", ())],
                            self.cfg.check,
                            chat.instructions,
                        )
                        due[SECOND] += [again] if again else []
                for attempt, requests in due.items():
                    numbers = [each.seed for each in requests]
                    for batch in split(run, attempt, numbers, self.cfg.narrator.batch):
                        own = [requests[place] for place in batch]
                        file = file or stack.enter_context(text_file(path))
                        file.write(request_line(run, attempt, [each.seed for each in own], chat.body(own)))
                        written += 1
                progress.update(group[-1].index + 1 - clips.start)
        return written

    def read_answers(self, shard: Shard, paths: Sequence[Path]) -> None:
        """Caption the clips of a shard that have answers in files, as a run with an endpoint would.

        Raises :class:`UserError` for files that cannot be used, and where clips have none, after those that have one.
        """
        from egohod.hod.narrators.batch import BatchNarrator

        narrate = self._batch_stage()
        answers = BatchNarrator(self.cfg.narrator, paths, self._batch_run(), self.clips(shard), len(self.table))
        narrate.use_answers(answers)
        # An answer that is there replaces a failure of before.
        self.retry = True
        self.run([stage.name for stage in self.stages[self.stages.index(narrate) :]], shard, answers.answered)
        waiting = []
        with self.store.results(shard) as results:
            for index in self.clips(shard):
                outcomes = self.stored(index, results)
                if NARRATE not in outcomes and not any(outcome.fault for outcome in outcomes.values()):
                    waiting.append(index)
        if waiting:
            raise UserError(
                f"{paths[0]}: {len(waiting):,} of {len(self.clips(shard)):,} clips have no answer, such as "
                f"{self.table.where(waiting[0])}; those of the others are stored, and --batch_requests writes the "
                "requests for these"
            )

    def _batch_stage(self) -> NarrateStage:
        """The narrate stage. Raises :class:`UserError` if it cannot work by files."""
        if self.cfg.narrator.kind == "template":
            raise UserError("narrator.kind is template, which sends no requests; batches need llm or vlm")
        if not self.cfg.narrator.model:
            raise UserError("narrator.model is empty, but each request of a batch names its model")
        (narrate,) = (stage for stage in self.stages if isinstance(stage, NarrateStage))
        return narrate

    def _batch_run(self) -> str:
        """The fingerprint of a batch: of the clips, and of all that its requests depend on."""
        number = [stage.name for stage in self.stages].index(NARRATE)
        return _hash(_table_hash(self.cfg, self.table), self._versions[number], self.cfg.seed)[:12]

    def try_clip(self, task: Task) -> Iterator[tuple[str, Outcome, float]]:
        """Take one clip through the stages up to a failure and store nothing: (stage, outcome, seconds)."""
        for stage in self.stages:
            began = time.perf_counter()
            ((_, task.outcomes[stage.name]),) = stage.run([task])
            yield stage.name, task.outcomes[stage.name], time.perf_counter() - began
            if task.outcomes[stage.name].fault:
                return

    def measured_cost(self, tried: Sequence[Task]) -> Cost | None:
        """What captions cost by the requests of clips that :meth:`try_clip` took one by one, and one more of several.

        None for a narrator without requests, and if none was answered.
        """
        requests = [task.request for task in tried if task.request is not None]
        (narrate,) = (stage for stage in self.stages if isinstance(stage, NarrateStage))
        usage = getattr(narrate.narrator, "usage", None) if requests else None
        if not usage:
            return None
        alone = list(usage)
        usage.clear()
        several = requests[: self.cfg.narrator.batch]
        if len(several) > 1:
            list(narrate.narrator.narrate(several))
        return Cost.measured(alone, usage[0] if usage else None, len(requests), self.cfg.narrator)

    def finish(self, shard: Shard) -> Finished:
        """Mark a shard as finished, and log what its narrations are like.

        Raises :class:`UserError` if a clip has neither a narration nor a failure.
        """
        # Read back from the store: most clips may have been done by earlier runs.
        narrator, narrations, failures, fallbacks, without_hand = self.cfg.narrator.kind, 0, 0, 0, 0
        narrators, refusals, tokens, judged = (Counter[str]() for _ in range(4))
        further = {name: Counter[str]() for name in self._further}
        for _, _, outcome in self._final(shard):
            fallbacks += outcome.is_fallback
            if outcome.fault is not None:
                failures += 1
                continue
            checked = outcome.parsed()
            narrations += 1
            again = checked["attempts"] > 1 and checked["narrator"] == narrator
            narrators[f"{checked['narrator']} on the second try" if again else checked["narrator"]] += 1
            # By kind of reason; the words at fault are in the results.
            refusals.update({reason.partition(":")[0] for reason in checked["refusals"]})
            tokens.update(prompt=checked["prompt_tokens"], completion=checked["completion_tokens"])
            without_hand += not sides(checked["text"])
            for opinion in checked["opinions"] if self.cfg.check.judge != "none" else ():
                verdict = {None: "no answer", False: "not entailed", True: "entailed"}[opinion["entailed"]]
                judged.update(["passed what the rules refuse" if opinion["overruled"] else verdict])
            for name, counter in further.items():
                counter.update(["written" if checked[name] else "none"])
                counter.update(f"refused for {reason.partition(':')[0]}" for reason in checked[f"{name}_refusals"])
        counts = Finished(narrations, failures, fallbacks)
        with self.store.results(shard) as results:
            results.mark(self.fingerprint, counts)
        # A run in which every caption was refused ends normally: only these lines show it.
        notes = []
        counters = {"by": narrators, "captions refused for": refusals, "tokens:": +tokens}
        counters |= {f"{name} captions:": counter for name, counter in further.items()}
        counters["judge:"] = judged
        for what, counter in counters.items():
            if counter:
                notes.append(f"{what} " + ", ".join(f"{name} {count:,}" for name, count in counter.most_common()))
        if narrations:
            log.info("%s narrations: %s", f"{narrations:,}", "; ".join(notes))
        replaced = narrators["template"] if narrator != "template" else 0
        if replaced > _MOST * narrations:
            log.warning(
                "the template replaced the captions of %s in %s of %s narrations: check the model and its endpoint",
                *(narrator, f"{replaced:,}", f"{narrations:,}"),
            )
        if without_hand:
            level = logging.WARNING if without_hand > _MOST * narrations else logging.INFO
            log.log(level, "%s of %s narrations name no hand", f"{without_hand:,}", f"{narrations:,}")
        return counts

    def finished(self, shard: Shard) -> Finished | None:
        """What a shard contains that was finished with these settings; None if it was not."""
        with self.store.results(shard) as results:
            return results.finished(self.fingerprint)

    def merge(self, shards: int) -> Finished:
        """Write the output and its ledger from all shards; what they contain.

        Raises :class:`UserError` if a shard is not finished with these settings, or if there is no narration at all;
        the output is then as it was.
        """
        unfinished = [
            f"{shard}{why}" for shard in Shard.all(shards) if (why := self._why_unfinished(shard)) is not None
        ]
        if unfinished:
            names = ", ".join(unfinished[:10]) + (", ..." if len(unfinished) > 10 else "")
            raise UserError(
                f"{self.store.output}: {len(unfinished)} of {shards} shards are not finished with these settings: "
                f"--shard {names}"
            )
        narrations = failures = fallbacks = 0
        first_failure = ""
        with ExitStack() as stack:
            # The output takes its place last: where it is new, so is its ledger.
            good = csv.writer(stack.enter_context(text_file(self.store.output)), lineterminator="\n")
            bad = csv.writer(stack.enter_context(text_file(self.store.failures)), lineterminator="\n")
            progress = stack.enter_context(Progress("merge", len(self.table), seconds=5.0))
            good.writerow([*COLUMNS, *self.cfg.keep, *self._further])
            bad.writerow(FAILURE_COLUMNS)
            for index, stage, outcome in itertools.chain.from_iterable(map(self._final, Shard.all(shards))):
                row = self.table.row(index)
                # To the microsecond, which tells any two frames apart; in full a third of a second has 16 digits.
                times = [f"{seconds:.6f}".rstrip("0").rstrip(".") for seconds in (row.start, row.end)]
                place = [row.video_id, *times]
                # Without a name of its own a clip is called by its place, which training reports.
                uid = ("uid" in self.table.column_names and self.table.value("uid", index)) or "_".join(place)
                if outcome.fault is None:
                    columns = [self.table.value(name, index) for name in self.cfg.keep]
                    checked = outcome.parsed()
                    cells = [*place, checked["text"], row.dataset or self.cfg.dataset, uid, *columns]
                    cells += [checked[name] or "" for name in self._further]
                    narrations += 1
                    fallbacks += outcome.is_fallback
                else:
                    reason = " ".join(outcome.fault.split())
                    cells = [str(row.row), *place, uid, stage, reason]
                    failures += 1
                    first_failure = first_failure or f"{stage}: {reason}"
                # Without line breaks: many readers take each line of a csv for a row.
                (good if outcome.fault is None else bad).writerow([re.sub(r"[\r\n]+", " ", cell) for cell in cells])
                progress.update(index + 1)
            if not narrations:
                raise UserError(
                    f"{self.store.output}: not one of {failures:,} clips has a narration; the first failure is "
                    f"'{first_failure}'; --retry tries them again"
                )
        return Finished(narrations, failures, fallbacks)

    def _why_unfinished(self, shard: Shard) -> str | None:
        """Why a shard is not finished with these settings, as a note in brackets if there is more; None if it is."""
        path = self.store.file(shard)
        if not path.exists():
            return " (no results)"
        with closing(Results(path)) as results:
            if results.finished(self.fingerprint):
                return None
            others = results.fingerprints()
        if not others:
            return ""
        metadata = self.fingerprint.partition("-")[0]
        same = any(each.partition("-")[0] == metadata for each in others)
        return " (finished with other settings)" if same else " (finished with other metadata)"

    def export_detections(self, path: Path) -> int:
        """Write the boxes of all clips that are detected to the parquet file ``path``; returns their number.

        A frame that several clips share has the boxes of the first of them in the metadata. Boxes are rounded as in the
        results: facts made of them are the same, but the camera's motion, whose masks they are, may differ by 1e-4 of
        the picture. Raises :class:`UserError` if no clip is detected, or if ``path`` exists or cannot be written.
        """
        if path.suffix != ".parquet" or path.exists():
            raise UserError(f"{path}: {'exists; choose another file' if path.exists() else 'must end in .parquet'}")
        videos, count, missing, batch = self.table.column("video_id"), 0, 0, list[pa.Table]()
        written, video = set[int](), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                self.store.results(clips=self.clips) as results,
                atomic_write(path) as temporary,
                pa.parquet.ParquetWriter(temporary, SCHEMA) as writer,
            ):
                # By video: ``written`` then holds the frames of one video, not of millions of clips.
                for index in np.argsort(videos, kind="stable").tolist():
                    if videos[index] != video:
                        written, video = set(), videos[index]
                    outcome = results.get(*self.keys(index)[DETECT], index)
                    if outcome is None or outcome.fault is not None:
                        missing += 1
                        continue
                    boxes = box_table(videos[index], outcome.parsed())
                    numbers = boxes["frame_number"].to_pylist()
                    batch.append(boxes.filter(pa.array([number not in written for number in numbers], pa.bool_())))
                    written.update(numbers)
                    count += len(batch[-1])
                    if len(batch) == _EXPORTED_AT_A_TIME:
                        writer.write_table(pa.concat_tables(batch))
                        batch.clear()
                if missing == len(videos):
                    raise UserError(f"{self.store.folder}: no clip is detected with these settings; --stage detect")
                writer.write_table(pa.concat_tables([SCHEMA.empty_table(), *batch]))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        if missing:
            log.warning("%s of %s clips are not detected, or failed", f"{missing:,}", f"{len(videos):,}")
        return count

    def _final(self, shard: Shard) -> Iterator[tuple[int, str, Outcome]]:
        """(index, stage, outcome) of each clip of a shard: of its last stage, or of the one at which it failed."""
        with self.store.results(shard) as results:
            last = self.stages[-1].name
            for index in self.clips(shard):
                keys = self.keys(index)
                # Where there is a narration, none of the stages before has failed: results that follow from one that is
                # replaced go with it.
                outcome = results.get(*keys[last])
                if outcome is not None:
                    yield index, last, outcome
                    continue
                for name, key in keys.items():
                    outcome = results.get(*key)
                    if outcome is None:
                        # A finished shard may lack one too: it is damaged, or was in a file that is gone. With its mark
                        # the next run would have nothing to do, and the gap would stay.
                        if results.finished(self.fingerprint):
                            results.unmark(self.fingerprint)
                        place = self.table.where(index)
                        part = f" (shard {shard})" if shard.count > 1 else ""
                        raise UserError(f"{place}{part}: has not been through the stage {name}; run it first")
                    if outcome.fault is not None:
                        yield index, name, outcome
                        break


def _hash(*parts: Any) -> str:
    """Of anything that JSON can spell; equal for equal parts."""
    return content_hash(json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str), length=24)


# --- From a configuration to a pipeline ---


def build(cfg: HodConfig, *, retry: bool = False, save: bool = False) -> Pipeline:
    """Read the clips and set up the stages; no video is opened but to cut it into windows.

    Nothing is written but, with ``save``, the clips of a metadata file, for the other shards (:meth:`Store.clips`).

    Raises :class:`UserError` for whatever is missing.
    """
    # Before the metadata is read, which takes minutes where it is large.
    options = typed_options(cfg.detector.kind, cfg.detector.options)
    cfg = replace(cfg, detector=replace(cfg.detector, options=options))
    store = Store(Path(cfg.output))
    if store.output.is_dir():
        raise UserError(f"output is '{cfg.output}', which is a folder; it must be a file, such as {cfg.output}/hod.csv")
    inputs = {"source.metadata": cfg.source.metadata, "source.exclude": cfg.source.exclude}
    inputs |= {f"detector.options.{name}": value for name, value in cfg.detector.options.items()}
    inputs |= {"narrator.prompt": cfg.narrator.prompt, "tracks.hands3d": cfg.tracks.hands3d}
    inputs |= {f"check.{name}": getattr(cfg.check, name) for name in ("vocabulary", "judge_prompt")}
    outputs = [store.output.resolve(), store.failures.resolve()]  # a link may lead to an input too
    for name, path in inputs.items():
        if isinstance(path, str) and path and Path(path).resolve() in outputs:
            raise UserError(f"output is '{cfg.output}', but {name} is read from {path}: it would be overwritten")
    if cfg.source.metadata:
        table = narrated_clips(cfg, save=save)
    elif cfg.narrator.kind == "vlm":
        table = cut_windows(cfg)
    else:
        raise UserError(
            "no narrations to start from: give --metadata (source.metadata), or narrator.kind=vlm to narrate windows "
            "of the videos of --root"
        )
    source, stages = open_videos(cfg, table), dict[str, Stage]()
    for cls in STAGES:
        stages[cls.name] = cls(cfg, source, stages)
    return Pipeline(cfg, table, list(stages.values()), retry=retry)


def narrated_clips(cfg: HodConfig, *, save: bool = False) -> ClipTable:
    """The clips of ``source.metadata`` with the columns of ``keep``; rows that cannot be used are counted and logged.

    With ``save`` they are written to the work folder; what is there is used in any case. Raises :class:`UserError` if
    rows that cannot be used are more than ``max_bad_fraction`` of all, or if a column is missing.
    """
    path, source = Path(cfg.source.metadata), cfg.source

    def read() -> ClipTable:
        # With what the output copies, where the metadata has it.
        return read_clips(source, extra=["uid", "dataset", *cfg.keep])

    def key() -> str:
        read_by = (source.format, dict(sorted(source.columns.items())), source.clip_rule, path.suffixes, cfg.keep)
        siblings = [path.with_name(name) for each in FORMATS.values() for name in each.siblings]
        try:
            files = [file_hash(each) for each in (path, source.exclude) if each]
            files += [file_hash(each) for each in siblings if each.is_file()]
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
        return _hash(_READ_VERSION, read_by, files)

    def read_unchanged() -> ClipTable:
        table = read()
        if key() != before:
            raise UserError(f"{path}: changed while it was read; rerun")
        return table

    # Data sets that are folders have no cheap checksum.
    if path.is_file() and (not source.exclude or Path(source.exclude).is_file()):
        before = key()
        table = Store(Path(cfg.output)).clips(before, path, read_unchanged, save=save)
    else:
        table = read()
    for name in cfg.keep:
        if name not in table.column_names:
            raise UserError(f"{table.path}: no column '{name}' to keep; there are {', '.join(table.column_names)}")
    # Rows that are left out on purpose are no damage; too many others mean that the file is not what it should be.
    bad = {why: n for why, n in table.report.left_out.items() if why not in ("duplicates", "on the exclude list")}
    rows = len(table) + sum(table.report.left_out.values())
    if is_above_share(sum(bad.values()), rows, cfg.max_bad_fraction):
        reasons = ", ".join(f"{count:,} {why}" for why, count in bad.items())
        raise UserError(
            f"{table.path}: {sum(bad.values()):,} of {rows:,} rows cannot be used ({reasons}), more than "
            f"max_bad_fraction={cfg.max_bad_fraction:g} allows"
        )
    return table


def cut_windows(cfg: HodConfig) -> ClipTable:
    """Windows over the videos below ``source.root``, without narrations. Raises :class:`UserError` if there is none."""
    root = cfg.source.root
    # Every video is opened for its length: that takes minutes where there are thousands on remote storage.
    clips, faults = sliding_windows(root, cfg.windows.seconds, cfg.windows.stride, cfg.decoder)
    for fault in faults:
        log.warning("left out: %s", fault)
    if not clips:
        raise UserError(f"{root}: not one of its {len(faults)} videos can be read")
    videos, start, end = zip(*clips, strict=True)
    log.info("%s: %s windows of %s videos", root, f"{len(clips):,}", f"{len(set(videos)):,}")
    return ClipTable.of(Path(root), videos, start, end, unit="window")


def open_videos(cfg: HodConfig, table: ClipTable) -> ClipReader:
    """What reads the clips' frames."""
    return ClipReader(table, cfg.source, choose_decoder(cfg.decoder)[1], open_cache(cfg.cache, cfg.cache_gb))


def source_text(cfg: HodConfig, table: ClipTable, index: int) -> str:
    """The clip's narration before; of several the one that ``source.list_text`` chooses."""
    # Drawn by the clip's index, so that shards and resumed runs draw the same.
    texts = table.row(index).texts
    return choose_text(texts, cfg.source.list_text, np.random.default_rng((cfg.seed, index)))


def _table_hash(cfg: HodConfig, table: ClipTable) -> str:
    """Of all that a table was read from; the same on all machines, wherever the files are."""
    source = cfg.source
    # Sorted: the same names in another order are the same table.
    columns = dict(sorted(source.columns.items()))
    digest = hashlib.sha256(repr((source.format, columns, source.clip_rule, source.list_text)).encode())
    if source.metadata:
        for path in filter(None, (source.metadata, source.exclude)):
            # Of a data set that is a folder its clips count, which are a small part of it.
            digest.update(bytes.fromhex(file_hash(path) if Path(path).is_file() else table.content_hash()))
    else:
        digest.update("\n".join(table.column("video_id").tolist()).encode("utf-8", "surrogatepass"))
        digest.update(table.column("start_second").tobytes() + table.column("end_second").tobytes())
    return digest.hexdigest()


# --- Stages ---


class DetectStage(Stage):
    """Boxes in the frames of clips, and how the camera moved between them, in ``workers`` processes.

    A clip fails if its video cannot be read, or if a worker dies at it or takes longer than ``clip_seconds``; storage
    that cannot be used at all ends the run.
    """

    name, version = DETECT, 2
    group = None  # a worker takes the next clip as soon as it is free; at the end of a group it would wait for others

    def __init__(self, cfg: HodConfig, source: ClipReader, before: Mapping[str, Stage]) -> None:
        self._cfg, self._source = cfg, source
        self._detector: Detector | None = None
        # With their types: "0.5" from the command line and 0.5 from a file are the same detector.
        self._options = typed_options(cfg.detector.kind, cfg.detector.options)
        self.settings: Mapping[str, Any] = {
            "frames": cfg.frames,
            "detector": cfg.detector.kind,
            "options": self._options,
            "camera": cfg.tracks.camera,
            # In which files a clip's frames are, and where in them; folders are left out, which differ by machine.
            "layout": cfg.source.layout,
            "chunk_seconds": cfg.source.chunk_seconds,
            "min_clip_seconds": cfg.source.min_clip_seconds,
        }

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        """See :class:`Stage`."""
        todo = iter(tasks)
        first = next(todo, None)
        if first is None:
            return  # nothing to do is no reason to load a detector
        self.prepare()
        tasks = itertools.chain([first], todo)
        if not self._cfg.workers:
            yield from ((task, self._process(task)) for task in tasks)
            return
        with Workers(self._cfg.workers, self._process, self._cfg.clip_seconds) as workers:
            for task, outcome in workers.unordered(tasks):
                yield task, Outcome(None, outcome.reason) if isinstance(outcome, Lost) else outcome

    def prepare(self) -> None:
        """Read detections from files once, before there are workers, which then share them.

        Raises :class:`UserError` if they are of other videos: all clips would keep their narrations without a warning;
        and if the camera's motion is to be measured without OpenCV.
        """
        if self._cfg.tracks.camera != "none":
            import_opencv()
        kind, table = self._cfg.detector.kind, self._source.table
        if self._detector is not None or not detector_class(kind).reads_files:
            return
        self._detector = make_detector(kind, self._options)
        # Its files are among its options that are text, whatever it calls them.
        texts = [f"detector.options.{name}={value}" for name, value in self._options.items() if isinstance(value, str)]
        place, videos = ", ".join(texts) or f"detector.kind={kind}", table.distinct("video_id")
        with_boxes = self._detector.videos()
        missing = [video for video in videos if video not in with_boxes]
        if len(missing) == len(videos):
            raise UserError(
                f"{place}: has detections of none of the {len(videos):,} videos of {table.path}, such as "
                f"'{missing[0]}'; the video_id must be the same in both"
            )
        if missing:
            log.warning(
                "%s: %s of %s videos have no detections, such as '%s'; their narrations will name no hand",
                *(place, f"{len(missing):,}", f"{len(videos):,}", missing[0]),
            )

    def _process(self, task: Task) -> Outcome:
        row = self._source.table.row(task.index)
        try:
            return Outcome(self.look(self._source.read(row, self._cfg.frames, None), row.video_id))
        except VideoError as error:
            return Outcome(None, str(error))
        except Exception as error:
            # Such as a mistake in somebody's detector: without the clip it could not be reproduced.
            error.add_note(self._source.table.where(task.index))
            raise

    def look(self, frames: Frames, video_id: str) -> dict[str, Any]:
        """Boxes in the frames of a clip."""
        # A clip of fewer frames repeats some of them.
        seconds, first = np.unique(frames.seconds, return_index=True)
        numbers, pictures = frames.numbers[first], frames.pictures[first]
        if self._detector is None:  # a model is loaded by each worker
            self._detector = make_detector(self._cfg.detector.kind, self._options)
        boxes = self._detector.detect(video_id, numbers, seconds, pictures)
        if not self._detector.reads_files:  # those were checked when their file was read
            span = f"{seconds[0]:.3f} to {seconds[-1]:.3f} s"
            boxes = check_boxes(boxes, f"detector.kind={self._cfg.detector.kind}, boxes of {video_id} at {span}")
        height, width = pictures.shape[1:3]
        model = self._cfg.tracks.camera
        camera = None if model == "none" else camera_transforms(pictures, seconds, boxes, model)
        # Without the video, which is the same in all rows; see box_table.
        columns = {name: boxes[name].to_pylist() for name in SCHEMA.names if name != "video_id"}
        return to_plain({"seconds": seconds, "aspect": width / height, "boxes": columns, "camera": camera})


def box_table(video_id: str, detected: Mapping[str, Any]) -> pa.Table:
    """The boxes of a result of the detect stage, as a table of ``SCHEMA``."""
    columns = detected["boxes"]
    return pa.table({"video_id": [video_id] * len(columns["second"]), **columns}).select(SCHEMA.names).cast(SCHEMA)


def camera_of(detected: Mapping[str, Any]) -> np.ndarray | None:
    """The camera's motion in a result of the detect stage [T, 3, 3], None where it was not measured."""
    return None if detected["camera"] is None else np.array(detected["camera"])


class TrackStage(Stage):
    """Facts from boxes."""

    name, version = TRACK, 4

    def __init__(self, cfg: HodConfig, source: ClipReader, before: Mapping[str, Stage]) -> None:
        self._params, self._table = cfg.tracks, source.table
        # The motion of the camera is measured with the boxes, from the pictures.
        self.settings = {name: value for name, value in vars(cfg.tracks).items() if name != "camera"}
        if cfg.tracks.hands3d is not None:
            try:
                self.settings["hands3d"] = file_hash(cfg.tracks.hands3d)  # another file may have the same name
            except OSError as error:
                raise UserError(f"tracks.hands3d={cfg.tracks.hands3d}: {error.strerror or error}") from error

    @functools.cached_property
    def _hands3d(self) -> Hands3d | None:
        """3-D hands, read once. Raises :class:`UserError` if they are of other videos."""
        path = self._params.hands3d
        if path is None:
            return None
        hands, videos = Hands3d(path), self._table.distinct("video_id")
        # It is read after the first clips are detected, which may take hours.
        if file_hash(path) != self.settings["hands3d"]:
            raise UserError(f"tracks.hands3d={path}: has changed since the run started; rerun")
        missing, unknown = set(videos) - hands.videos(), hands.videos() - set(videos)
        if len(missing) == len(videos):
            raise UserError(
                f"tracks.hands3d={path}: has hands of none of the {len(videos):,} videos of {self._table.path}, such "
                f"as '{min(missing)}'; the video_id must be the same in both"
            )
        for what, ids in (("videos have no 3-D hands", missing), ("videos of 3-D hands have no clips", unknown)):
            if ids:
                log.warning("tracks.hands3d=%s: %s %s, such as '%s'", path, f"{len(ids):,}", what, min(ids))
        return hands

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        """See :class:`Stage`."""
        for task in tasks:
            row, detected = self._table.row(task.index), task.outcomes[DETECT].parsed()
            seconds = np.array(detected["seconds"])
            joints, focal = self._hands3d.at(row.video_id, seconds) if self._hands3d is not None else (None, np.nan)
            facts = facts_of(
                box_table(row.video_id, detected),
                seconds,
                video_id=row.video_id,
                start=row.start,
                end=row.end,
                aspect=detected["aspect"],
                camera=camera_of(detected),
                joints=joints,
                focal=focal,
                params=self._params,
            )
            yield task, Outcome(to_plain(facts))


class NarrateStage(Stage):
    """Narrations from facts, by the narrator of the configuration."""

    name, version, reads_text = NARRATE, 9, True

    def __init__(self, cfg: HodConfig, source: ClipReader, before: Mapping[str, Stage]) -> None:
        self.cfg, self._source = cfg, source
        # Enough that no request waits for another at the end of a group; the frames of a group are in memory.
        at_once = cfg.narrator.batch * cfg.narrator.concurrency
        self.group = {"template": _GROUP, "vlm": 2 * at_once}.get(cfg.narrator.kind, 8 * at_once)
        self.settings: Mapping[str, Any] = {
            "min_seen": cfg.check.min_seen,  # rarer hands are no part of the facts that it gets
            **caption_settings(cfg.narrator),
        }

        self._reads_frames = cfg.narrator.kind == "vlm"

    @functools.cached_property
    def narrator(self) -> Narrator:
        """The narrator, made when it is first needed: the stages before need no endpoint."""
        return make_narrator(self.cfg.narrator)

    def use_answers(self, narrator: Narrator) -> None:
        """Use a narrator that has its answers already, and needs no frames."""
        self.narrator, self._reads_frames = narrator, False

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        """See :class:`Stage`."""
        ready, failed = self.requests(tasks)
        # A fallback has no text: the check stage replaces it, and --retry asks again.
        for number, answer in self.narrator.narrate([request for _, request in ready]):
            yield ready[number][0], Outcome(to_plain(answer), is_fallback=answer.problem is not None)
        yield from failed

    def requests(self, tasks: Iterable[Task]) -> tuple[list[tuple[Task, Request]], list[tuple[Task, Outcome]]]:
        """Each task's input for the narrator, and the tasks whose frames cannot be read."""
        ready, failed = [], []
        for task in tasks:
            try:
                if task.request is None:  # else the narrate stage of this run has built it
                    facts = from_plain(ClipFacts, task.outcomes[TRACK].parsed())
                    frames = None
                    if self._reads_frames:
                        row = self._source.table.row(task.index)
                        frames = self._source.read(row, self.cfg.narrator.frames, None).pictures
                    text = source_text(self.cfg, self._source.table, task.index)
                    task.request = Request(text, without_rare(facts, self.cfg.check.min_seen), task.index, frames)
                ready.append((task, task.request))
            except VideoError as error:
                failed.append((task, Outcome(None, str(error))))
        return ready, failed


class CheckStage(Stage):
    """Judges the narrations; what is refused is narrated once more, or by the template."""

    name, version, reads_text = CHECK, 6, True

    def __init__(self, cfg: HodConfig, source: ClipReader, before: Mapping[str, Stage]) -> None:
        # The narrator is shared: it answers what the check refuses, and a server that is down is noticed once.
        narrate = before[NARRATE]
        assert isinstance(narrate, NarrateStage), "the check comes after the narrator"
        self._narrate, self.group = narrate, narrate.group
        self._cfg = cfg
        # The content of files instead of their places, and of the judge what its verdicts depend on.
        files = ("vocabulary", *(name for name in vars(cfg.check) if name.startswith("judge")))
        rules = {name: value for name, value in vars(cfg.check).items() if name not in files}
        vocabulary = load_vocabulary(cfg.check.vocabulary, fresh=True).identity
        self.settings = {**rules, "vocabulary": vocabulary, **judge_settings(cfg)}

    @functools.cached_property
    def _judging(self) -> Judging | None:
        """The judge, made when it is first needed, as the narrator is."""
        return make_judging(self._cfg)

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        """See :class:`Stage`."""
        ready, failed = self._narrate.requests(tasks)
        narrations = [from_plain(Narration, task.outcomes[NARRATE].parsed()) for task, _ in ready]
        template = TemplateNarrator(self._narrate.cfg.narrator)
        settings, requests = self._narrate.cfg.check, [request for _, request in ready]
        checks = check_narrations(
            *(requests, narrations, self._narrate.narrator, settings, template),
            *(self._narrate.cfg.narrator.captions, self._judging),
        )
        for number, checked in checks:
            if checked.text is None:
                reasons = "; ".join(dict.fromkeys((*checked.refusals, *checked.verdict.reasons)))
                # No fallback: a missing clip teaches a model nothing false.
                yield ready[number][0], Outcome(None, f"no caption passes the check: {reasons}")
            else:
                value = to_plain(checked) | {"text": " ".join(checked.text.split())}
                yield ready[number][0], Outcome(value, is_fallback=checked.unanswered)
        yield from failed


STAGES: tuple[type[Stage], ...] = (
    DetectStage,
    TrackStage,
    NarrateStage,
    CheckStage,
)
"""The stages in their order; names, the --stage of the program and its dry run follow from this."""
