"""``--dry_run``: build everything, open three clips, take one step, and list what is missing."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from egohod.config import Config, load_leniently
from egohod.data.dataset import collate
from egohod.data.labels import ClassSpace
from egohod.distributed import Distributed, pick_precision, setup
from egohod.errors import UserError
from egohod.model.cost import step_flops
from egohod.model.dual_encoder import DualEncoder, create_model
from egohod.training.build import (
    active_sources,
    build_classes,
    build_dataset,
    build_model,
    build_plan,
    micro_batches,
    predict_memory,
    trainable,
)
from egohod.training.config import TrainConfig
from egohod.training.step import TrainStep, learning_rates
from egohod.training.train import Schedule

log = logging.getLogger(__name__)

CLIPS_TO_OPEN = 3


def dry_run(path: str, overrides: Sequence[str], evaluators: Callable[..., Sequence[Any]]) -> int:
    """Report on a configuration; returns 0 if a run would start, 2 if something is missing.

    Continues past what is missing, so that one dry run names every problem. ``evaluators(cfg, dist, name,
    classes=...)`` builds the benchmarks of a set ("val", "test"), for heads of these classes if there are any; three
    clips of each are opened, none is evaluated.
    """
    cfg, problems = load_leniently(path, overrides)
    dist = setup(cfg.train.device)
    _print("config", f"{path}{' ' + ' '.join(overrides) if overrides else ''}")
    _print(
        "device", f"{dist}, precision {str(pick_precision(cfg.train.precision, dist.device)).removeprefix('torch.')}"
    )
    classes = None
    try:
        classes = build_classes(cfg)
    except UserError as error:
        problems.append(str(error))
    model = _report_model(cfg, dist, classes, problems)
    _report_lr(cfg.train)
    _report_data(cfg, dist, model, problems)
    _report_evaluation(cfg, dist, evaluators, classes, problems)
    _report_outputs(cfg)
    # A missing file is a problem of several parts.
    problems = list(dict.fromkeys(problems))
    for text in problems:
        print(f"error: {text}", file=sys.stderr)
    _print("verdict", f"{len(problems)} problem(s), see above" if problems else "ready to run")
    return 2 if problems else 0


def _print(name: str, text: str) -> None:
    log.info("%-10s %s", name, text)


def _report_model(cfg: Config, dist: Distributed, classes: ClassSpace | None, problems: list[str]) -> DualEncoder:
    start = cfg.model.weights.source
    if cfg.model.heads != "none" and classes is None:
        # The classes are missing, which is reported already; whether the weights fit shows without heads too.
        cfg = copy.deepcopy(cfg)
        cfg.model.heads, cfg.model.head_start, cfg.train.trainable = "none", "random", "all"
        start += ", without the heads of unknown classes"
    try:
        model = build_model(cfg, dist, classes)
    except UserError as error:
        problems.append(str(error))
        model = create_model(cfg.model, cfg.loss).to(dist.device)
        start = f"random, because {cfg.model.weights.path} cannot be used"
    geometry = model.geometry
    count = {
        name: sum(p.numel() for p in tower.parameters())
        for name, tower in (("vision", model.visual), ("text", model.textual), ("heads", model.heads))
        if tower is not None
    }
    _print(
        "model",
        f"{cfg.model.name} from {start}: {sum(count.values()) / 1e6:.1f} M parameters "
        f"({', '.join(f'{part} {number / 1e6:.1f} M' for part, number in count.items())})",
    )
    _print("training", trainable(model))
    tokens = 1 + cfg.model.num_frames * geometry.patches_per_frame
    _print(
        "tokens",
        f"{tokens} a clip: {cfg.model.num_frames} frames of {geometry.patches_per_frame} patches "
        f"({geometry.image_size} px in steps of {geometry.patch_size}), one CLS",
    )
    # With heads the text tower computes nothing.
    text_tokens = geometry.context_length if model.heads is None else 0
    sizes = geometry, cfg.model.num_frames, text_tokens, cfg.model.patch_dropout
    flops = step_flops(*sizes, cfg.model.fast, boxes=cfg.loss.boxes > 0)
    _print(
        "compute",
        f"{flops / 1e9:.1f} GFLOP a clip for forward and backward, with {text_tokens} text tokens",
    )
    memory = predict_memory(cfg, dist, model)
    _print(
        "memory",
        f"{memory.per_clip / 1e6:.0f} MB a clip kept for the backward pass, "
        f"{memory.state / 1e9:.1f} GB for weights, gradients and averages",
    )
    return model


def _report_lr(cfg: TrainConfig) -> None:
    rates = learning_rates(cfg)
    text = f"{cfg.optimizer}, {rates.peak:g}"
    if not cfg.warmup.lstrip().startswith("0 "):
        text += f" after a warm-up of {cfg.warmup} from {rates.start:g}"
    if cfg.schedule == "cosine":
        text += f", then a cosine down to {rates.end:g}"
    if cfg.lr_reference_batch:
        text += f" (train.lr={cfg.lr:g} is for {cfg.lr_reference_batch} clips, a step has {cfg.global_batch_size})"
    _print("lr", text)


def _report_data(cfg: Config, dist: Distributed, model: DualEncoder, problems: list[str]) -> None:
    try:
        dataset = build_dataset(cfg, model.geometry.image_size)
    except UserError as error:
        problems.append(str(error))
        problems += [
            f"{source.root}: no such folder of videos"
            for source in active_sources(cfg).values()
            if "://" not in source.root and not Path(source.root).is_dir()
        ]
        return
    for source in dataset.sources:
        _print("data", f"{source.table.path}: {source.table.report}, decoder {dataset.decoder}")
    clips = []
    for first, end in pairwise(dataset.starts.tolist()):
        for index in torch.linspace(first, end - 1, CLIPS_TO_OPEN).long().tolist():
            clip = dataset[(0, index)]
            if clip["fault"]:
                problems.append(clip["fault"])
            else:
                clips.append(clip)
                texts = " / ".join(dataset.row(index).texts)
                _print("clip", f"{dataset.where(index)}: video {list(clip['video'].shape)}, '{texts[:90]}'")
    try:
        plan = build_plan(cfg, dataset)
        micro_batch, accumulation = micro_batches(cfg, dist, model)
        schedule = Schedule.of(cfg, plan.steps_per_epoch)
    except UserError as error:
        problems.append(str(error))
        return
    _print(
        "batch",
        f"{cfg.train.global_batch_size} clips = {dist.world_size} process(es) x {micro_batch} x {accumulation}",
    )
    _print(
        "length",
        f"{plan.steps_per_epoch} steps an epoch, {schedule.total} in all; "
        f"evaluation every {schedule.evaluate}, checkpoint every {schedule.save}",
    )
    # Without its classes the model has no heads to try.
    if clips and (cfg.model.heads == "none" or model.heads is not None):
        step = TrainStep(model, cfg, dist, total_steps=schedule.total, steps_per_epoch=plan.steps_per_epoch)
        loss = step(1, [collate(clips[:2])])["loss"].item()
        _print("one step", f"forward, backward and update on {len(clips[:2])} clip(s): loss {loss:.4f}")


def _report_evaluation(
    cfg: Config,
    dist: Distributed,
    evaluators: Callable[..., Sequence[Any]],
    classes: ClassSpace | None,
    problems: list[str],
) -> None:
    for name in ("val", "test"):
        try:
            for each in evaluators(cfg, dist, name, classes=classes):
                rows = torch.linspace(0, len(each.dataset) - 1, CLIPS_TO_OPEN).long().tolist()
                problems += [fault for row in rows if (fault := each.dataset[row]["fault"])]
                _print("evaluate", f"{name}: {len(each.dataset):,} clips, {CLIPS_TO_OPEN} opened")
        except UserError as error:
            problems.append(str(error))


def _report_outputs(cfg: Config) -> None:
    run = Path(cfg.train.output)
    _print(
        "writes",
        f"{run}/: checkpoints/, metrics.jsonl, tensorboard/, config.yml, environment.json, results.json, report.html",
    )
    if (run / "checkpoints").is_dir():
        _print("resume", f"{run}/checkpoints exists; train.resume={cfg.train.resume}")
