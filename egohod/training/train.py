"""The training loop, from the first step or from a checkpoint to the final table."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from egohod.config import Config
from egohod.data.dataset import FaultLedger
from egohod.data.loader import train_loader
from egohod.distributed import Distributed, host_name
from egohod.errors import UserError
from egohod.model.dual_encoder import DualEncoder
from egohod.runtime import Interrupted
from egohod.training.build import TrainingData
from egohod.training.checkpoint import IMPLIED, Checkpoint, CheckpointError, CheckpointStore, read
from egohod.training.config import TrainConfig, duration_in_steps
from egohod.training.step import TrainStep
from egohod.training.telemetry import Clock, MetricWindow, Share, Telemetry, memory_gb

log = logging.getLogger(__name__)

# A loss scaler skips a few steps while it finds its scale; this many in a row are no such thing.
FEWEST_SKIPPED = 10


class Evaluator(Protocol):
    """Anything that turns a model into numbers; names are prefixed with ``name/``."""

    name: str

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Metrics by name, collective over all processes; leaves the model and the random state as they were.

        Raises :class:`~egohod.runtime.Interrupted` on all of them if the run is asked to stop meanwhile.
        """
        ...


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

        def steps(text: str, key: str) -> int:
            return duration_in_steps(
                text, steps_per_epoch=steps_per_epoch, global_batch_size=cfg.train.global_batch_size, key=key
            )

        total, warmup = steps(cfg.train.duration, "train.duration"), steps(cfg.train.warmup, "train.warmup")
        if warmup > total:
            log.warning("train.warmup=%s is longer than the run: train.lr is never reached", cfg.train.warmup)
        return cls(
            total=total,
            log=steps(cfg.train.log_every, "train.log_every"),
            save=steps(cfg.train.save_every, "train.save_every"),
            evaluate=steps(cfg.evaluate.every, "evaluate.every"),
        )


def train(
    cfg: Config, dist: Distributed, model: DualEncoder, data: TrainingData, evaluators: Sequence[Evaluator]
) -> dict[str, float]:
    """Train ``model`` on ``data`` to the end; returns the metrics of the last evaluation.

    A request to stop (``dist.stop``) ends the loop after the step in work, or the evaluation after the batch in work,
    with a checkpoint and :class:`Interrupted`; an evaluation that it cut short is the first thing that a resumed run
    does. Raises :class:`UserError` when too many clips are unreadable or when no step of a whole logging window was
    finite.
    """
    run = Path(cfg.train.output)
    schedule = Schedule.of(cfg, data.plan.steps_per_epoch)
    train_step = TrainStep(model, cfg, dist, total_steps=schedule.total, steps_per_epoch=data.plan.steps_per_epoch)
    best = cfg.evaluate.best or ""  # the check of the configuration requires it where something is measured
    store = CheckpointStore(run, keep_last=cfg.train.keep_last, keep_best=cfg.train.keep_best, best=best)
    ledger, window, clock = FaultLedger(cfg.data.max_bad_fraction), MetricWindow(), Clock()

    start, scores, evaluated = 0, dict[str, float](), 0
    checkpoint = _resume_from(cfg, model, data, store)
    _require_same(checkpoint, store.folder, dist)
    if checkpoint:
        start = evaluated = checkpoint.step
        scores = checkpoint.manifest["metrics"]
        if start > schedule.total:
            raise UserError(
                f"{checkpoint.path} lies beyond train.duration={cfg.train.duration} ({schedule.total} steps)"
            )
        if dist.is_main:
            store.set_aside_after(start)
        train_step.load_state_dict(checkpoint.weights, checkpoint.training)
        window.load_state_dict(_window_of(checkpoint.training["window"], dist), dist.device)
        ledger.load_state_dict(_ledger_of(checkpoint.training["ledgers"], dist))
        log.info("resuming %s at step %d of %d", checkpoint.path, start, schedule.total)

    def save(step: int, must_succeed: bool) -> None:
        """Write a checkpoint; training goes on without one that is not the last."""
        windows, ledgers = zip(*dist.gather_objects((window.state_dict(), ledger.state_dict())), strict=True)
        if dist.is_main:
            weights, training = train_step.state_dict()
            # A score belongs to the weights it was measured on.
            known = scores if evaluated == step else {}
            training |= {"window": list(windows), "ledgers": list(ledgers)}
            try:
                log.info(
                    "saved %s",
                    store.save(
                        step, weights, training, metrics=known, identity=identity(cfg, model, data), base=model.base
                    ),
                )
            except CheckpointError as error:
                if must_succeed:
                    raise
                log.error("%s; training goes on", error)

    def is_due(step: int) -> bool:
        """Whether the model of ``step`` is to be evaluated."""
        return bool(evaluators) and step > 0 and (step == schedule.total or step % schedule.evaluate == 0)

    def evaluate_now(step: int) -> None:
        nonlocal scores, evaluated
        log.info("evaluating the model of step %d", step)
        scores, evaluated = evaluate(train_step.averaged, evaluators), step
        telemetry.write(step, scores)

    owed = is_due(start) and not scores
    telemetry = Telemetry(run, cfg, dist, total_steps=schedule.total, start_step=start, evaluates_first=owed)
    with dist.stop.polled():
        if owed:
            evaluate_now(start)
            # One from elsewhere stays as it is.
            if dist.is_main and checkpoint and checkpoint.path.parent == store.folder:
                store.rate(start, scores)
            if best not in scores:
                raise _no_such_metric(best, scores)
        batches = _micro_batches(cfg, dist, data, start, schedule.total)
        for step in range(start + 1, schedule.total + 1):
            try:
                with clock.waiting():
                    micro_batches = list(islice(batches, data.accumulation))
            except Interrupted as request:  # while it waited for clips
                if step - 1 == start:
                    raise
                save(step - 1, must_succeed=True)
                telemetry.close()
                raise Interrupted(f"{request}; step {step - 1} of {schedule.total} is saved") from None
            for batch in micro_batches:
                ledger.update(batch)
            window.add(train_step(step, micro_batches))
            clock.step()
            last, stopping = step == schedule.total, dist.any(bool(dist.stop))
            if last or step % schedule.log == 0:
                means = window.means()
                lap = clock.lap(train_step.forward_seconds())
                share = Share(host_name(), lap, memory_gb(dist.device), ledger.bad)
                told, shares = zip(*dist.gather_objects((means, share)), strict=True)
                telemetry.training(step, _finite(_average(told)) | {"lr": train_step.lr}, shares)
            if is_due(step) and not stopping:
                with clock.paused():
                    try:
                        evaluate_now(step)
                    except Interrupted:
                        stopping = True
            # A metric that does not exist would silently keep no best checkpoint. No step is lost over its name.
            misnamed = evaluated == step and best not in scores
            ending = last or stopping or misnamed
            if ending or step % schedule.save == 0:
                with clock.paused():
                    save(step, must_succeed=ending)
            if misnamed:
                raise _no_such_metric(best, scores)
            if stopping:
                # Nobody leaves in peace before the first process has saved.
                dist.gather_objects(None)
                telemetry.close()
                reason = dist.stop.reason or "another process was asked to stop"
                raise Interrupted(f"{reason}; step {step} of {schedule.total} is saved")
    telemetry.close()
    train_step.settle()
    return scores


def evaluate(model: nn.Module, evaluators: Sequence[Evaluator]) -> dict[str, float]:
    """All evaluators' numbers, each under ``<evaluator>/<metric>``."""
    return {f"{each.name}/{name}": value for each in evaluators for name, value in each(model).items()}


def identity(cfg: Config, model: DualEncoder, data: TrainingData) -> dict[str, Any]:
    """What a checkpoint and the run that resumes it must agree on for the trajectory to be the same."""
    # What pretraining does not have is left out, so that its older checkpoints still agree.
    more: dict[str, Any] = {}
    if cfg.data.labels.target != "narration":
        more["data.labels.target"] = cfg.data.labels.target
    if cfg.train.ema:
        more["train.ema"] = cfg.train.ema
    for name in ("trainable", "last_blocks", "optimizer", "layer_decay", "decay_positions"):
        if getattr(cfg.train, name) != getattr(TrainConfig(), name):
            more[f"train.{name}"] = getattr(cfg.train, name)
    if model.base:
        more["checksum of the weights that are not trained"] = model.base.sha256
    if (classes := data.classes) is not None:
        more |= {"heads": cfg.model.heads, "data.labels.columns": list(classes.columns)}
        more |= {"classes": [list(key) for key in classes.keys], "names of the classes": list(classes.names)}
    shapes = repr([(name, tuple(value.shape)) for name, value in model.state_dict().items()])
    return {
        "model.name": cfg.model.name,
        "model.fast": dict(vars(cfg.model.fast)),
        "loss.name": cfg.loss.name,
        "loss.boxes": cfg.loss.boxes,
        "loss.learn_temperature": cfg.loss.learn_temperature,
        "clips in data.train": len(data.dataset),
        "model.num_frames": cfg.model.num_frames,
        "model.activation": cfg.model.activation,
        "model.image_stats": cfg.model.image_stats,
        "train.seed": cfg.train.seed,
        "train.global_batch_size": cfg.train.global_batch_size,
        "data.train": {name: [source.metadata, source.weight] for name, source in cfg.data.train.items()},
        "shapes of the weights": hashlib.sha256(shapes.encode()).hexdigest()[:12],
        **more,
    }


def _resume_from(cfg: Config, model: DualEncoder, data: TrainingData, store: CheckpointStore) -> Checkpoint | None:
    """The checkpoint that ``train.resume`` asks for, checked to belong to this run."""
    if cfg.train.resume == "none":
        if store.steps():
            raise UserError(
                f"{store.folder} holds checkpoints of an earlier run; go on with --resume auto, "
                "or choose another train.output, or delete that folder"
            )
        return None
    checkpoint = store.newest() if cfg.train.resume == "auto" else read(Path(cfg.train.resume))
    if checkpoint is None:
        if store.steps():
            raise UserError(
                f"{store.folder}: no checkpoint is readable; --resume none in another train.output starts anew"
            )
        return None
    if not checkpoint.training.keys() >= {"optimizer", "scaler", "window", "ledgers"}:
        raise UserError(f"{checkpoint.path}: training.pt is not the training state of this project")
    there = IMPLIED | checkpoint.manifest["identity"]
    here = identity(cfg, model, data)
    for key in {**here, **there}:
        if there.get(key) != here.get(key):
            was, now = (each.get(key, "its default") for each in (there, here))
            raise UserError(
                f"{checkpoint.path}: was trained with {key}={was}, this run says {now}; "
                "use the same value, or another train.output"
            )
    return checkpoint


def _require_same(checkpoint: Checkpoint | None, folder: Path, dist: Distributed) -> None:
    """Raise the same :class:`UserError` on every process unless all go on from the same checkpoint."""
    mine = (checkpoint.step, checkpoint.manifest["sha256"]) if checkpoint else (0, {})
    told = dist.gather_objects((host_name(), mine))
    if any(theirs != told[0][1] for _, theirs in told):
        seen = "; ".join(f"rank {rank} on {host}: step {step}" for rank, (host, (step, _)) in enumerate(told))
        raise UserError(f"{folder}: the processes do not see the same checkpoint ({seen}); is it a shared folder?")


def _micro_batches(
    cfg: Config, dist: Distributed, data: TrainingData, start: int, total: int
) -> Iterator[dict[str, Any]]:
    """This process's micro-batches from step ``start`` on, ``data.accumulation`` per step."""
    if start >= total:
        return iter(())
    return iter(
        train_loader(
            data.dataset,
            data.plan,
            start_step=start,
            total_steps=total,
            rank=dist.rank,
            world_size=dist.world_size,
            accumulation=data.accumulation,
            workers=cfg.data.workers,
            prefetch=cfg.data.prefetch,
            timeout=cfg.data.timeout,
            stop=dist.stop,
            pin_memory=cfg.data.pin_memory and dist.device.type == "cuda",
        )
    )


def _window_of(windows: Any, dist: Distributed) -> dict[str, Any]:
    """This process's part of an unfinished logging window; other processes than those that saved share its mean."""
    # Earlier checkpoints hold that of the first process alone.
    windows = windows if isinstance(windows, list) else [windows]
    if len(windows) == dist.world_size:
        return dict(windows[dist.rank])
    names = windows[0]["sums"]
    return {
        "sums": {name: torch.stack([each["sums"][name] for each in windows]).mean(dim=0) for name in names},
        "count": windows[0]["count"],
    }


def _ledger_of(ledgers: list[dict[str, Any]], dist: Distributed) -> dict[str, Any]:
    """This process's count of clips; if others saved, the first one takes over what all of them had counted."""
    if len(ledgers) == dist.world_size:
        return ledgers[dist.rank]
    counted = ledgers if dist.is_main else []
    return {
        "seen": sum(each["seen"] for each in counted),
        "bad": sum(each["bad"] for each in counted),
        "logged": sorted({fault for each in ledgers for fault in each["logged"]}),
    }


def _average(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the processes: with a local loss each one scores its own rows only."""
    return {name: sum(each[name] for each in metrics) / len(metrics) for name in metrics[0]}


def _no_such_metric(name: str, scores: dict[str, float]) -> UserError:
    near = difflib.get_close_matches(name, scores, n=1, cutoff=0.3)
    return UserError(f"evaluate.best={name}: no such metric" + (f"; did you mean {near[0]}?" if near else ""))


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """``metrics``, unless the window had at least ``FEWEST_SKIPPED`` steps and not one was finite."""
    if metrics["skipped"] >= max(metrics["steps"], FEWEST_SKIPPED):
        raise UserError(
            f"the last {metrics['steps']:.0f} steps all had a non-finite loss or gradient and were skipped; "
            "the weights are those of the last good step: lower train.lr, clip gradients (train.clip_norm=1), "
            "or look at the data"
        )
    return metrics
