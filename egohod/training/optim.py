"""The optimizer and the learning-rate schedule, from the configuration."""

from __future__ import annotations

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler

from egohod.config import TrainConfig, duration_in_steps


def build_optimizer(model: torch.nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters; no decay on tensors of one dimension or less.

    The fused implementation skips a step with a non-finite gradient on the device itself, so that nothing
    has to wait for the answer (see :mod:`egohod.training.step`).
    """
    if cfg.layer_decay < 1:
        groups = param_groups_layer_decay(model, weight_decay=cfg.weight_decay, layer_decay=cfg.layer_decay)
    else:
        groups = param_groups_weight_decay(model, weight_decay=cfg.weight_decay)
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, fused=True)
    first, second = cfg.betas
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(first, second), eps=cfg.eps, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, cfg: TrainConfig, total_steps: int, steps_per_epoch: int
) -> Scheduler:
    """Learning rate as a function of the step: linear warm-up, then constant or a cosine down to ``lr_end``."""
    warmup = duration_in_steps(
        cfg.warmup, steps_per_epoch=steps_per_epoch, global_batch_size=cfg.global_batch_size, key="train.warmup"
    )
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, total_steps - warmup),
        # A cosine between equal ends is a constant.
        lr_min=cfg.lr if cfg.schedule == "constant" else cfg.lr_end,
        warmup_t=warmup,
        warmup_lr_init=cfg.lr_start,
        warmup_prefix=True,
        t_in_epochs=False,
    )
