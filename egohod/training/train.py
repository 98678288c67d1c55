"""The training loop: from the first step, or from a checkpoint, to the last.

:func:`train` is a run from top to bottom. :class:`RunState` is what a checkpoint holds, so what has to be in it for a
resumed run to equal one that was never interrupted, bit for bit. What is evaluated is handed in.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from egohod.config import Config
from egohod.data.dataset import ClipDataset, FaultLedger
from egohod.data.labels import ClassLabels, ClassSpace
from egohod.data.loader import BatchPlan, MixedPlan, train_loader, worker_count
from egohod.distributed import Distributed, host_name
from egohod.errors import UserError
from egohod.model.dual_encoder import DualEncoder
from egohod.runtime import Interrupted
from egohod.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore, identity, read, require_identity
from egohod.training.config import duration_in_steps
from egohod.training.step import TrainStep
from egohod.training.telemetry import Clock, MetricWindow, Share, Telemetry, memory_gb

log = logging.getLogger(__name__)

# A loss scaler skips a few steps while it finds its scale; this many in a row have another cause.
FEWEST_SKIPPED = 10


@dataclass(frozen=True)
class TrainingData:
    """Clips, their order, and how many forward passes make one step."""

    dataset: ClipDataset
    plan: BatchPlan | MixedPlan
    micro_batch: int
    accumulation: int

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
    save: int
    evaluate: int

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
        every_save = steps(cfg.train.save_every, key="train.save_every")
        return cls(total, every_log, every_save, steps(cfg.evaluate.every, key="evaluate.every"))

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
    does. Raises :class:`UserError` when too many clips are unreadable or when ``FEWEST_SKIPPED`` or more steps up to a
    line of the log were not finite.
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
    clock = Clock()
    with files as telemetry, dist.stop.polled():
        if evaluates_first:
            telemetry.write(start, state.evaluate(start, evaluators))
            state.add_scores(start)
            state.require_best_metric()

        batches = _micro_batches(cfg, dist, data, start, schedule.total)
        for step in range(start + 1, schedule.total + 1):
            # A batch, which the loader's workers have decoded ahead.
            try:
                with clock.waiting():
                    micro_batches = list(islice(batches, data.accumulation))
            except Interrupted as request:  # asked to stop while waiting for clips
                if step - 1 > start:
                    state.save(step - 1, required=True)
                    raise Interrupted(f"{request}; step {step - 1} of {schedule.total} is saved") from None
                raise
            for batch in micro_batches:
                state.faults.update(batch)

            # The step. Its numbers stay on the device until they are logged: to read one would wait for the GPU.
            state.window.add(state.train_step(step, micro_batches))
            clock.step()

            # One collective for both. Every process stops at the same step, or the others would wait in the next one's
            # collectives for ever; and the share of bad clips is that of all, however many processes there are.
            requests, seen, bad = dist.sum(int(bool(dist.stop)), state.faults.seen, state.faults.bad)
            state.faults.check_share(seen, bad, dist)
            is_last, stopping = step == schedule.total, requests > 0
            if is_last or step % schedule.log == 0:
                _log_window(telemetry, step, state, clock, dist)
            if evaluators and schedule.evaluates(step) and not stopping:
                with clock.paused():
                    try:
                        telemetry.write(step, state.evaluate(step, evaluators))
                    except Interrupted:
                        stopping = True

            # A metric that does not exist would silently keep no best checkpoint. The step is saved before it ends.
            is_evaluated = state.scores.step == step
            lacks_best_metric = is_evaluated and state.best not in state.scores.values
            ends = is_last or stopping or lacks_best_metric
            # The best step is saved wherever it comes: train.save_every need not be a multiple of evaluate.every.
            if ends or step % schedule.save == 0 or (is_evaluated and state.is_among_best()):
                with clock.paused():
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


@dataclass(frozen=True)
class Scores:
    """Metrics by name, and the step whose weights they were measured on."""

    step: int = 0
    values: dict[str, float] = field(default_factory=dict)


class RunState:
    """All that a checkpoint holds: weights, optimizer, the open logging window, counts of clips, the last metrics."""

    def __init__(self, cfg: Config, dist: Distributed, model: DualEncoder, data: TrainingData, total_steps: int):
        self._cfg, self._dist, self._model, self._total_steps = cfg, dist, model, total_steps
        self._identity = identity(cfg, model, len(data.dataset), data.classes)
        # The check of the configuration requires it where something is evaluated.
        self.best = cfg.evaluate.best or ""
        keep = cfg.train.keep_last, cfg.train.keep_best
        self.store = CheckpointStore(Path(cfg.train.output), keep_last=keep[0], keep_best=keep[1], best=self.best)
        steps_per_epoch = data.plan.steps_per_epoch
        self.train_step = TrainStep(model, cfg, dist, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        self.faults, self.window = FaultLedger(cfg.data.max_bad_fraction), MetricWindow()
        self.scores = Scores()
        self._resumed: Path | None = None

    def resume(self) -> int:
        """Load the checkpoint of ``train.resume``, if there is one; the step it was saved at, else 0.

        Raises :class:`UserError` if it is of another run, damaged, beyond the end, or not the same on all processes.
        """
        resume, store = self._cfg.train.resume, self.store
        if resume == "none":
            if store.steps():
                raise UserError(
                    f"{store.folder} holds checkpoints of an earlier run; continue it with --resume auto, "
                    "or choose another train.output, or delete that folder"
                )
            checkpoint = None
        else:
            checkpoint = store.newest() if resume == "auto" else read(Path(resume))
            if checkpoint is None and store.steps():
                raise UserError(
                    f"{store.folder}: no checkpoint is readable; --resume none in another train.output starts anew"
                )
        if checkpoint is not None:
            if not checkpoint.training.keys() >= {"optimizer", "scaler", "window", "ledgers"}:
                raise UserError(f"{checkpoint.path}: training.pt is not the training state of this project")
            require_identity(checkpoint, self._identity)
        _require_same(checkpoint, store.folder, self._dist)
        if checkpoint is None:
            return 0
        if checkpoint.step > self._total_steps:
            raise UserError(
                f"{checkpoint.path} is of step {checkpoint.step}, beyond train.duration={self._cfg.train.duration} "
                f"({self._total_steps} steps)"
            )
        if self._dist.is_main:
            store.set_aside_after(checkpoint.step)
        self.train_step.load_state_dict(checkpoint.weights, checkpoint.training)
        window, faults = _state_of_rank(checkpoint.training, self._dist)
        self.window.load_state_dict(window, self._dist.device)
        self.faults.load_state_dict(faults)
        self.scores = Scores(checkpoint.step, checkpoint.manifest["metrics"])
        self._resumed = checkpoint.path
        log.info("resuming %s at step %d of %d", checkpoint.path, checkpoint.step, self._total_steps)
        return checkpoint.step

    def save(self, step: int, *, required: bool) -> None:
        """Write a checkpoint, collective over the processes. Unless it is ``required``, a failure is only logged."""
        # Each process counts its own clips and, with a local loss, scores its own rows.
        windows, ledgers = zip(
            *self._dist.gather_objects((self.window.state_dict(), self.faults.state_dict())), strict=True
        )
        if not self._dist.is_main:
            return
        weights, training = self.train_step.state_dict()
        training |= {"window": list(windows), "ledgers": list(ledgers)}
        # A score belongs to the weights it was measured on.
        metrics = self.scores.values if self.scores.step == step else {}
        try:
            path = self.store.save(
                step, weights, training, metrics=metrics, identity=self._identity, base=self._model.base
            )
            log.info("saved %s", path)
        except CheckpointError as error:
            if required:
                raise
            # A full disk may be emptied before the next one; hours of training are worth more than this checkpoint.
            log.error("%s; training continues", error)

    def evaluate(self, step: int, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        """All evaluators' numbers, each under ``<evaluator>/<metric>``."""
        log.info("evaluating the model of step %d", step)
        model = self.train_step.ema_or_model
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


def _require_same(checkpoint: Checkpoint | None, folder: Path, dist: Distributed) -> None:
    """Raise the same :class:`UserError` on every process unless all resume the same checkpoint."""
    # The checksums too: two runs on disks of their own would both have a step 500.
    mine = (checkpoint.step, checkpoint.manifest["sha256"]) if checkpoint else (0, {})
    reported = dist.gather_objects((host_name(), mine))
    if any(other != reported[0][1] for _, other in reported):
        seen = "; ".join(f"rank {rank} on {host}: step {step}" for rank, (host, (step, _)) in enumerate(reported))
        raise UserError(f"{folder}: the processes do not see the same checkpoint ({seen}); is it a shared folder?")


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
            # Page-locked memory, from which copies to the GPU overlap with computing.
            pin_memory=cfg.data.pin_memory and dist.device.type == "cuda",
        )
    )  # fmt: skip


def _log_window(telemetry: Telemetry, step: int, state: RunState, clock: Clock, dist: Distributed) -> None:
    """Log the steps since the last time, of all processes."""
    means = state.window.means()
    # The device has been waited for, so that the lap is over when its steps are.
    steps, seconds, waited = clock.lap()
    forward = state.train_step.forward_seconds()
    share = Share(host_name(), steps, seconds, waited, forward, memory_gb(dist.device), state.faults.bad)
    of_ranks, shares = zip(*dist.gather_objects((means, share)), strict=True)
    # With a local loss each process scores its own rows only.
    average = {name: sum(each[name] for each in of_ranks) / len(of_ranks) for name in means}
    require_finite(average)
    telemetry.training(step, average | {"lr": state.train_step.lr}, shares)


def require_finite(means: dict[str, float]) -> None:
    """Raise :class:`UserError` if the last ``FEWEST_SKIPPED`` steps or more were skipped, in however many windows."""
    if means["consecutive_skips"] >= FEWEST_SKIPPED:
        raise UserError(
            f"the last {means['consecutive_skips']:.0f} steps all had a non-finite loss or gradient and were skipped; "
            "the weights are those of the last good step: lower train.lr, clip gradients (train.clip_norm=1), "
            "or look at the data"
        )
