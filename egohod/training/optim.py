"""The optimizer and the learning-rate schedule, from the configuration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler

from egohod.training.config import TrainConfig, duration_in_steps


class LearningRates(NamedTuple):
    """The rates of a run: its peak, the start of the warm-up and the end of a cosine."""

    peak: float
    start: float
    end: float


def learning_rates(cfg: TrainConfig) -> LearningRates:
    """What ``lr``, ``lr_start`` and ``lr_end`` are at this batch (see ``train.lr_reference_batch``)."""
    scale = cfg.global_batch_size / cfg.lr_reference_batch if cfg.lr_reference_batch else 1.0
    return LearningRates(cfg.lr * scale, cfg.lr_start * scale, cfg.lr_end * scale)


def build_optimizer(model: torch.nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters; no decay on tensors of one dimension or less.

    The fused implementation skips a step with a non-finite gradient on the device itself, so that nothing
    has to wait for the answer (see :mod:`egohod.training.step`).
    """
    lr = learning_rates(cfg).peak
    # timm compares whole names.
    names = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "positional_embedding"]
    no_decay = () if cfg.decay_positions else names
    if cfg.layer_decay < 1:
        groups = param_groups_layer_decay(
            model, weight_decay=cfg.weight_decay, no_weight_decay_list=no_decay, layer_decay=cfg.layer_decay
        )
    else:
        groups = param_groups_weight_decay(model, weight_decay=cfg.weight_decay, no_weight_decay_list=no_decay)
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=cfg.momentum, fused=True)
    first, second = cfg.betas
    return torch.optim.AdamW(groups, lr=lr, betas=(first, second), eps=cfg.eps, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, cfg: TrainConfig, total_steps: int, steps_per_epoch: int
) -> Scheduler:
    """Learning rate as a function of the step: linear warm-up, then constant or a cosine down to ``lr_end``.

    The peak is reached by the first step after the warm-up. LaViLa and AVION reach it one step earlier, in the last
    step of the warm-up; their cosine is the same.
    """
    warmup = duration_in_steps(
        cfg.warmup, steps_per_epoch=steps_per_epoch, global_batch_size=cfg.global_batch_size, key="train.warmup"
    )
    rates = learning_rates(cfg)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, total_steps - warmup),
        # A cosine between equal ends is a constant.
        lr_min=rates.peak if cfg.schedule == "constant" else rates.end,
        warmup_t=warmup,
        warmup_lr_init=rates.start,
        warmup_prefix=True,
        t_in_epochs=False,
    )
