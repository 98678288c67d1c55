"""The training loop: from the first step, or from a checkpoint, to the last.

:func:`train` is a run from top to bottom. :class:`RunState` is what a checkpoint holds, so what has to be in it for a
resumed run to equal one that was never interrupted, bit for bit. What is evaluated is handed in.
"""

from __future__ import annotations

import difflib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from egohod.config import Config
from egohod.data.dataset import ClipDataset, FaultLedger
from egohod.data.labels import ClassLabels, ClassSpace
from egohod.data.loader import BatchPlan, MixedPlan, train_loader, worker_count
from egohod.distributed import Distributed, host_name, is_out_of_memory
from egohod.errors import UserError
from egohod.model.dual_encoder import DualEncoder
from egohod.runtime import Interrupted, write_text
from egohod.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    copy_to_host,
    identity,
    read,
    require_identity,
)
from egohod.training.config import clock_seconds, duration_in_steps
from egohod.training.step import StopDeadline, TrainStep
from egohod.training.telemetry import (
    Clock,
    MetricWindow,
    Share,
    StepProfiler,
    Telemetry,
    memory_gb,
    snapshot_on_out_of_memory,
    throughput,
)

log = logging.getLogger(__name__)

# A loss scaler skips a few steps while it finds its scale; this many in a row have another cause.
FEWEST_SKIPPED = 10


@dataclass(frozen=True)
class MicroBatchRecord:
    """The micro-batch that was tried on this device, in a file beside the run, so that a resumed run uses the same."""

    path: Path
    # What it depends on: another device or model has to be tried again.
    setting: dict[str, Any]

    def read(self) -> int | None:
        """The number of clips, None if there is no record or one of another setting."""
        # A damaged file is no record.
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return int(content["micro_batch"]) if content["setting"] == self.setting else None
        return None

    def write(self, micro_batch: int, **measured: float) -> None:
        """Replace the record; ``measured`` is for people to read. A failure costs only another trial."""
        content = {"micro_batch": micro_batch, "setting": self.setting, **measured}
        try:
            write_text(self.path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            log.warning("%s: not written: %s", self.path, error.strerror or error)


@dataclass(frozen=True)
class TrainingData:
    """Clips, their order, and how many forward passes make one step."""

    dataset: ClipDataset
    plan: BatchPlan | MixedPlan
    micro_batch: int
    accumulation: int
    # None where the user chose the micro-batch.
    record: MicroBatchRecord | None = None

    @property
    def classes(self) -> ClassSpace | None:
        """The classes that the clips are labelled with, the same for all sources; None without class labels."""
        first = self.dataset.labels[0] if self.dataset.labels else None
        return first.space if isinstance(first, ClassLabels) else None


@dataclass
class Schedule:
    """The run's durations in steps."""

    total: int
    log: int
    save: int  # 0 where it is by the clock
    evaluate: int
    save_seconds: float = float("inf")

    @classmethod
    def of(cls, cfg: Config, steps_per_epoch: int) -> Schedule:
        """Resolve the durations of ``cfg``."""
        steps = partial(
            duration_in_steps, steps_per_epoch=steps_per_epoch, global_batch_size=cfg.train.global_batch_size
        )
        total = steps(cfg.train.duration, key="train.duration")
        if steps(cfg.train.warmup, key="train.warmup") > total:
            log.warning("train.warmup=%s is longer than the run: train.lr is never reached", cfg.train.warmup)
        every_log = steps(cfg.train.log_every, key="train.log_every")
        every_evaluation = steps(cfg.evaluate.every, key="evaluate.every")
        if seconds := clock_seconds(cfg.train.save_every):
            return cls(total, every_log, 0, every_evaluation, seconds)
        return cls(total, every_log, steps(cfg.train.save_every, key="train.save_every"), every_evaluation)

    def evaluates(self, step: int) -> bool:
        """Whether the model is evaluated after ``step``: at intervals, and at the end."""
        return step > 0 and (step == self.total or step % self.evaluate == 0)


class Evaluator(Protocol):
    """Anything that turns a model into numbers; names are prefixed with ``name/``."""

    name: str

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Metrics by name, collective over all processes; leaves the model and the random state as they were.

        Raises :class:`~egohod.runtime.Interrupted` on all of them if the run is asked to stop meanwhile.
        """
        ...


def train(
    cfg: Config, dist: Distributed, model: DualEncoder, data: TrainingData, evaluators: Sequence[Evaluator]
) -> dict[str, float]:
    """Train ``model`` on ``data`` to the end; returns the metrics of the last evaluation.

    A request to stop (``dist.stop``) ends the loop after the current step, or the evaluation after the current batch,
    with a checkpoint and :class:`Interrupted`; an evaluation that it cut short is the first thing that a resumed run
    does. A step of several micro-batches that takes longer than ``train.stop_seconds`` more is given up between two of
    them, and the step before it is saved. Raises :class:`UserError` when too many clips are unreadable, when memory
    runs out, or when ``FEWEST_SKIPPED`` or more steps up to a line of the log were not finite.
    """
    schedule = Schedule.of(cfg, data.plan.steps_per_epoch)
    state = RunState(cfg, dist, model, data, schedule.total)
    start = state.resume()
    # A run that was stopped during an evaluation left a checkpoint without metrics.
    evaluates_first = bool(evaluators) and schedule.evaluates(start) and not state.scores.values
    # Lines of steps after the checkpoint are written again, so they are dropped from metrics.jsonl here.
    files = Telemetry(
        Path(cfg.train.output), cfg, dist, total_steps=schedule.total, start_step=start, evaluates_first=evaluates_first
    )
    clock, deadline = Clock(), StopDeadline(dist, cfg.train.stop_seconds)
    snapshot_on_out_of_memory(cfg, dist)
    profiler = StepProfiler(cfg, dist, start)
    with files as telemetry, state.saving(), dist.stop.polled(), profiler:
        if evaluates_first:
            with memory_advice(cfg, dist, data, start, evaluates=True):
                telemetry.write(start, state.evaluate(start, evaluators))
            state.add_scores(start)
            state.require_best_metric()

        batches = _micro_batches(cfg, dist, data, start, schedule.total)
        for step in range(start + 1, schedule.total + 1):
            # Batches that the loader's workers decode ahead; the step takes each micro-batch when it needs it. Its
            # numbers stay on the device until they are logged: to read one would wait for the GPU.
            arriving = ArrivingBatches(batches, data.accumulation)
            try:
                with memory_advice(cfg, dist, data, step), profiler.around(step):
                    state.window.add(state.train_step(step, arriving, deadline))
            except Interrupted as request:  # asked to stop while waiting for clips, or in a step that takes too long
                if step - 1 == start:
                    raise
                state.save(step - 1, required=True)
                # Nobody leaves before the first process has saved: a launcher ends all when one has left.
                dist.gather_objects(None)
                raise Interrupted(f"{request}; step {step - 1} of {schedule.total} is saved") from None
            for batch in arriving.read:
                # Not earlier: a step that was given up reads its clips again when it is resumed.
                state.faults.update(batch)
            clock.step(arriving.text_tokens)

            # One collective for all. Every process stops at the same step, or the others would wait in the next one's
            # collectives for ever; so with saving, for which the first one's clock counts; and the share of bad clips
            # is that of all, however many processes there are.
            by_clock = dist.is_main and time.monotonic() - state.saved_at >= schedule.save_seconds
            counts = int(bool(dist.stop)), int(by_clock), state.faults.seen, state.faults.bad
            requests, saves, seen, bad = dist.sum(*counts)
            saves = saves or (schedule.save > 0 and step % schedule.save == 0)
            state.faults.check_share(seen, bad, dist)
            state.report_save(wait=False)
            is_last, stopping = step == schedule.total, requests > 0
            if is_last or step % schedule.log == 0:
                _log_window(telemetry, step, state, clock, cfg, dist)
            if evaluators and schedule.evaluates(step) and not stopping:
                with clock.paused("evaluation"), memory_advice(cfg, dist, data, step, evaluates=True):
                    try:
                        telemetry.write(step, state.evaluate(step, evaluators))
                    except Interrupted:
                        stopping = True

            # A metric that does not exist would silently keep no best checkpoint. The step is saved before it ends.
            is_evaluated = state.scores.step == step
            lacks_best_metric = is_evaluated and state.best not in state.scores.values
            ends = is_last or stopping or lacks_best_metric
            # The best step is saved wherever it comes: train.save_every need not be a multiple of evaluate.every.
            if ends or saves or (is_evaluated and state.is_among_best()):
                with clock.paused("save"):
                    state.save(step, required=ends)
            if lacks_best_metric:
                state.require_best_metric()
            if stopping:
                # Nobody leaves before the first process has saved: a launcher ends all when one has left.
                dist.gather_objects(None)
                reason = dist.stop.reason or "another process was asked to stop"
                raise Interrupted(f"{reason}; step {step} of {schedule.total} is saved")
    state.train_step.load_ema_weights()
    return state.scores.values


class ArrivingBatches:
    """The micro-batches of one step, each taken from the loader when the step asks for it; iterated over once."""

    def __init__(self, batches: Iterator[dict[str, Any]], count: int) -> None:
        self._batches, self._count = batches, count
        # Only what the counts of clips need of each batch, so that its clips can be freed once the step has used them.
        self.read: list[dict[str, Any]] = []
        self.text_tokens = 0
        """Text tokens so far, padding within micro-batches included."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self._count):
            # The loader draws random numbers too, at its start and perhaps without workers. Those of a step must not
            # depend on it: dropout would differ in the first step of a resumed run.
            state = torch.get_rng_state()
            batch = next(self._batches)
            torch.set_rng_state(state)
            self.read.append({name: batch[name] for name in ("index", "faults")})
            self.text_tokens += batch["tokens"].numel()
            yield batch


@contextmanager
def memory_advice(
    cfg: Config, dist: Distributed, data: TrainingData, step: int, evaluates: bool = False
) -> Iterator[None]:
    """Within, running out of memory is a :class:`UserError` of one line that names the settings to change."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if evaluates:
            raise UserError(
                f"evaluation after step {step}: {dist.device} ran out of memory; lower evaluate.batch_size="
                f"{cfg.evaluate.batch_size}"
            ) from error
        size, less = data.micro_batch, data.micro_batch // 2
        if data.record is not None and less:
            # Both the prediction and the trial were wrong; a rerun must not end the same way.
            data.record.write(less)
            advice = f"rerun the same command to resume with {less} at a time, or set "
        else:
            advice = f"set train.max_batch_per_process={less}, " if less else "set "
        raise UserError(
            f"step {step}: {dist.device} ran out of memory with {size} clips at a time; {advice}"
            "model.checkpoint_blocks=all, or lower model.num_frames; other programs may also use the device"
        ) from error


@dataclass(frozen=True)
class Scores:
    """Metrics by name, and the step whose weights they were measured on."""

    step: int = 0
    values: dict[str, float] = field(default_factory=dict)


class RunState:
    """All that a checkpoint holds: weights, optimizer, the open logging window, counts of clips, the last metrics."""

    def __init__(self, cfg: Config, dist: Distributed, model: DualEncoder, data: TrainingData, total_steps: int):
        self._cfg, self._dist, self._model, self._total_steps = cfg, dist, model, total_steps
        names = [name for name, source in cfg.data.train.items() if source.weight != 0]
        content = {name: each.table.content_hash()[:12] for name, each in zip(names, data.dataset.sources, strict=True)}
        self._identity = identity(cfg, model, len(data.dataset), data.classes, content)
        # The check of the configuration requires it where something is evaluated.
        self.best = cfg.evaluate.best or ""
        keep = cfg.train.keep_last, cfg.train.keep_best
        self.store = CheckpointStore(Path(cfg.train.output), keep_last=keep[0], keep_best=keep[1], best=self.best)
        steps_per_epoch = data.plan.steps_per_epoch
        self.train_step = TrainStep(model, cfg, dist, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        self.faults, self.window = FaultLedger(cfg.data.max_bad_fraction), MetricWindow()
        self.scores = Scores()
        self._resumed: Path | None = None
        # With train.async_save: the thread that writes, its checkpoint, and the memory that this one is copied to.
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[Any] | None = None
        self._host_copy: dict[tuple[Any, ...], torch.Tensor] = {}
        self.saved_at = time.monotonic()

    def resume(self) -> int:
        """Load the checkpoint of ``train.resume``, if there is one; the step it was saved at, else 0.

        Its tensors are mapped from the files and copied to where they are used, so that it takes no memory afterwards.
        Raises :class:`UserError` if it is of another run, damaged, beyond the end, or not the same on all processes.
        """
        store = self.store
        if self._cfg.train.resume == "none":
            if store.steps():
                raise UserError(
                    f"{store.folder} holds checkpoints of an earlier run; continue it with --resume auto, "
                    "or choose another train.output, or delete that folder"
                )
            return 0
        checkpoint = _open_on_all(store, self._cfg.train.resume, self._dist)
        if checkpoint is None:
            return 0
        if not checkpoint.training.keys() >= {"optimizer", "scaler", "window", "ledgers"}:
            raise UserError(f"{checkpoint.path}: training.pt is not the training state of this project")
        require_identity(checkpoint, self._identity)
        if checkpoint.step > self._total_steps:
            raise UserError(
                f"{checkpoint.path} is of step {checkpoint.step}, beyond train.duration={self._cfg.train.duration} "
                f"({self._total_steps} steps)"
            )
        if self._dist.is_main:
            store.set_aside_after(checkpoint.step)
        self.train_step.load_state_dict(checkpoint.weights, checkpoint.training, checkpoint.parts)
        window, faults = _state_of_rank(checkpoint.training, self._dist)
        self.window.load_state_dict(window, self._dist.device)
        self.faults.load_state_dict(faults)
        self.scores = Scores(checkpoint.step, checkpoint.manifest["metrics"])
        self._resumed = checkpoint.path
        log.info("resuming %s at step %d of %d", checkpoint.path, checkpoint.step, self._total_steps)
        return checkpoint.step

    def save(self, step: int, *, required: bool) -> None:
        """Write a checkpoint, collective over the processes. Unless it is ``required``, a failure is only logged.

        With ``train.async_save`` one that is not required is only copied here and written meanwhile. The first process
        writes; with ``train.sharding`` each writes its own parts of what only a resumed run needs.
        """
        self.saved_at = time.monotonic()
        # Each process counts its own clips and, with a local loss, scores its own rows.
        windows, ledgers = zip(
            *self._dist.gather_objects((self.window.state_dict(), self.faults.state_dict())), strict=True
        )
        shards = self.train_step.shards
        if not self._dist.is_main and not shards:
            return
        # Never two at a time: the copy is reused, and disks are no faster for two.
        self.report_save(wait=True)
        weights, training = self.train_step.state_dict()
        parts = training.pop("parts", {})
        training |= {"window": list(windows), "ledgers": list(ledgers)}
        in_background = self._cfg.train.async_save and not required
        if in_background:
            # The weights of a sharded model are new copies on the host already.
            training, copies = copy_to_host((training, {} if shards else weights), self._host_copy)
            weights = weights if shards else copies
        # Also where this waits for the writer: its thread has another current GPU, whose stream
        # torch.distributed.checkpoint would wait for instead of the one that copies.
        parts = {name: value.to("cpu", copy=in_background) for name, value in parts.items()}
        # A score belongs to the weights it was measured on.
        metrics = self.scores.values if self.scores.step == step else {}
        save = partial(
            self.store.save, step, weights, training, metrics=metrics, identity=self._identity, base=self._model.base
        )
        if shards is None:
            self._pending = self._writer.submit(save)
        else:
            # The others write into a folder that the first process makes; what keeps it from that ends the save of all.
            problem = ""
            if self._dist.is_main:
                try:
                    self.store.prepare()
                except OSError as error:
                    problem = f"{self.store.path(step)}: not saved: {error.strerror or error}"
            problem = self._dist.gather_objects(problem)[0]
            if problem and required:
                raise CheckpointError(problem)
            if problem:
                log.error("%s; training continues", problem)
                return
            write = partial(shards.write, self.store.parts(step), parts)
            self._pending = self._writer.submit(partial(save, write_parts=write) if self._dist.is_main else write)
        if not in_background:
            self.report_save(wait=True, required=required)

    def report_save(self, *, wait: bool, required: bool = False) -> None:
        """Log what became of the checkpoint that is being written, if it is done; ``wait`` until it is.

        Raises :class:`CheckpointError` if it failed and was ``required``.
        """
        if self._pending is None or not (wait or self._pending.done()):
            return
        pending, self._pending = self._pending, None
        try:
            result = pending.result()
            if self._dist.is_main:
                log.info("saved %s", result)
        except UserError as error:
            if required:
                raise
            # A full disk may be emptied before the next one; hours of training are worth more than this checkpoint.
            log.error("%s; training continues", error)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around all saves: at the end, also after an error, nothing is being written any more."""
        try:
            yield
        finally:
            # The lock of the run folder is released next.
            self.report_save(wait=True)
            self._writer.shutdown()

    def evaluate(self, step: int, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        """All evaluators' numbers, each under ``<evaluator>/<metric>``."""
        # Its loader processes are forked, and a lock that another thread holds at that moment stays locked in them; and
        # which checkpoints there are decides whether this step is among the best.
        self.report_save(wait=True)
        log.info("evaluating the model of step %d", step)
        with self.train_step.gathered() as model:
            values = {f"{each.name}/{name}": value for each in evaluators for name, value in each(model).items()}
        self.scores = Scores(step, values)
        return values

    def add_scores(self, step: int) -> None:
        """Write the scores into the checkpoint of ``step`` that this run was resumed from."""
        # A checkpoint of another folder stays as it is.
        if self._dist.is_main and self._resumed is not None and self._resumed.parent == self.store.folder:
            self.store.rate(step, self.scores.values)

    def is_among_best(self) -> bool:
        """Whether a checkpoint with these scores is one that ``train.keep_best`` keeps; collective."""
        value = self.scores.values.get(self.best, float("nan"))
        # One process decides for all: only its disk is sure to hold the checkpoints.
        return self._dist.sum(int(self._dist.is_main and self.store.would_keep(value)))[0] > 0

    def require_best_metric(self) -> None:
        """Raise :class:`UserError` unless ``evaluate.best`` is among the scores."""
        if self.best not in self.scores.values:
            nearest = difflib.get_close_matches(self.best, self.scores.values, n=1, cutoff=0.3)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise UserError(f"evaluate.best={self.best}: no such metric{hint}")


def _open_on_all(store: CheckpointStore, resume: str, dist: Distributed) -> Checkpoint | None:
    """The checkpoint to resume, ``resume`` as in ``train.resume``, on every process; None if there is none.

    One process of each node reads it and checks its checksums; the others map the same files, whose content is then in
    the node's page cache. Collective; raises the same :class:`UserError` on every process if the checkpoint cannot be
    read or is not the same on all nodes.
    """
    checkpoint, problem = None, ""
    if dist.local_rank == 0:
        try:
            checkpoint = store.newest() if resume == "auto" else read(Path(resume))
            if checkpoint is None and store.steps():
                problem = (
                    f"{store.folder}: no checkpoint is readable; --resume none in another train.output starts anew"
                )
        except UserError as error:
            # Raised by all, or the others would wait for this one.
            problem = str(error)
    # The checksums too: two runs on disks of their own would both have a step 500.
    mine = (checkpoint.step, checkpoint.manifest["sha256"]) if checkpoint else (0, {})
    reported = dist.gather_objects((host_name(), problem, mine if dist.local_rank == 0 else None))
    if problems := dict.fromkeys(text for _, text, _ in reported if text):
        raise UserError(*problems)
    step, sums = reported[0][2]
    if any(other not in (None, (step, sums)) for _, _, other in reported):
        seen = "; ".join(
            f"rank {rank} on {host}: step {each[0]}" for rank, (host, _, each) in enumerate(reported) if each
        )
        raise UserError(
            f"{store.folder}: the processes do not see the same checkpoint ({seen}); is it a shared folder?"
        )
    if checkpoint is None and step > 0:
        checkpoint = read(store.path(step) if resume == "auto" else Path(resume), verify=False)
    return checkpoint


def _state_of_rank(training: dict[str, Any], dist: Distributed) -> tuple[dict[str, Any], dict[str, Any]]:
    """This process's part of an unfinished logging window, and its counts of clips, from ``training`` of a checkpoint.

    A run may be resumed with another number of processes: then all take the mean of the windows, and the first process
    takes over all counts.
    """
    # Earlier checkpoints hold the window of the first process alone.
    windows = training["window"] if isinstance(training["window"], list) else [training["window"]]
    ledgers = training["ledgers"]
    if len(windows) == dist.world_size:
        window = dict(windows[dist.rank])
    else:
        sums = {name: torch.stack([each["sums"][name] for each in windows]).mean(dim=0) for name in windows[0]["sums"]}
        # The numbers of steps are those of every process.
        window = windows[0] | {"sums": sums}
    if len(ledgers) == dist.world_size:
        return window, ledgers[dist.rank]
    counted = ledgers if dist.is_main else []
    faults = {name: sum(each[name] for each in counted) for name in ("seen", "bad")}
    # All of them, so that no fault is logged twice.
    return window, {**faults, "logged": sorted({fault for each in ledgers for fault in each["logged"]})}


def _micro_batches(
    cfg: Config, dist: Distributed, data: TrainingData, start: int, total: int
) -> Iterator[dict[str, Any]]:
    """This process's micro-batches from step ``start`` on, ``data.accumulation`` per step."""
    # A finished run that is started again needs no loader workers.
    if start >= total:
        return iter(())
    return iter(
        train_loader(
            data.dataset, data.plan, start_step=start, total_steps=total,
            rank=dist.rank, world_size=dist.world_size, accumulation=data.accumulation,
            workers=worker_count(cfg.data.workers, dist), prefetch=cfg.data.prefetch,
            timeout=cfg.data.timeout, stop=dist.stop,
            # Page-locked memory, from which the GPU copies while it computes (DeviceCopies).
            pin_memory=cfg.data.pin_memory and dist.device.type == "cuda",
        )
    )  # fmt: skip


def _log_window(telemetry: Telemetry, step: int, state: RunState, clock: Clock, cfg: Config, dist: Distributed) -> None:
    """Log the steps since the last time, of all processes."""
    means = state.window.means()
    # The device has been waited for, so that the lap is over when its steps are.
    lap = clock.lap()
    parts = state.train_step.stopwatch.seconds() | lap.paused
    share = Share(host_name(), lap.steps, lap.seconds, parts, memory_gb(dist.device), state.faults.bad)
    of_ranks, shares = zip(*dist.gather_objects((means, share)), strict=True)
    # With a local loss each process scores its own rows only.
    average = {name: sum(each[name] for each in of_ranks) / len(of_ranks) for name in means}
    require_finite(average)
    clips = lap.steps * cfg.train.global_batch_size
    # The mean of this process's texts; those of the others are padded to much the same length.
    length = lap.text_tokens * dist.world_size / max(clips, 1)
    speed = throughput(cfg, state.train_step.ema_or_model, dist, clips / lap.seconds, length)
    telemetry.training(step, average | {"lr": state.train_step.lr} | speed, shares)


def require_finite(means: dict[str, float]) -> None:
    """Raise :class:`UserError` if the last ``FEWEST_SKIPPED`` steps or more were skipped, in however many windows."""
    if means["consecutive_skips"] >= FEWEST_SKIPPED:
        raise UserError(
            f"the last {means['consecutive_skips']:.0f} steps all had a non-finite loss or gradient and were skipped; "
            "the weights are those of the last good step: lower train.lr, clip gradients (train.clip_norm=1), "
            "or look at the data"
        )
