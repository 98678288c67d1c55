"""One optimisation step: batches in, updated weights and device-side scalars out. No I/O, no waiting.

Nothing here reads a number back from the device, so a GPU always has work queued; the loop reads the means of many
steps at once when it logs. Shapes: B clips, C channels, T frames, H x W pixels, L text tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from egohod.config import Config
from egohod.data.transforms import normalise
from egohod.distributed import Distributed, pick_precision
from egohod.loss.boxes import box_errors
from egohod.loss.contrastive import Loss
from egohod.loss.factory import build_loss
from egohod.model.dual_encoder import DualEncoder
from egohod.training.config import TrainConfig, duration_in_steps

Batch = TypeVar("Batch")
Features = Mapping[str, Tensor]


def _unscaled(loss: Tensor) -> Tensor:
    return loss


def cached_step(
    forward: Callable[[Batch], Features],
    model: nn.Module,
    micro_batches: Sequence[Batch],
    loss_fn: Loss,
    scale: Callable[[Tensor], Tensor] = _unscaled,
) -> dict[str, Tensor]:
    """Add the gradient of the loss over all micro-batches (of all processes) to the parameters.

    Args:
        forward: micro-batch -> values of each clip (``video_features`` [b, E], ``text_features`` [b, E], ``box_errors``
            [b], classes of which the loss takes no gradient) and scalars that all chunks share (``logit_scale``,
            ``logit_bias``); enters autocast itself if wanted, so that the loss stays in float32.
        model: what ``forward`` calls; under DistributedDataParallel gradients are averaged over the processes
            once, in the last backward pass.
        micro_batches: chunks of this process's batch, anything ``forward`` takes.
        loss_fn: takes what ``forward`` gives by name, e.g. :class:`egohod.loss.contrastive.ContrastiveLoss`.
        scale: applied to the loss before its backward pass, e.g. ``GradScaler.scale``.

    Returns:
        What ``loss_fn`` gives (``loss`` not scaled), detached scalars on the device.

    One micro-batch is a plain forward and backward pass. Several cost one more forward pass each; dropout and
    the like repeat exactly, because each chunk's random state is kept.
    """
    assert micro_batches, "a step needs at least one micro-batch"
    if len(micro_batches) == 1:
        result = loss_fn(**forward(micro_batches[0]))
        scale(result["loss"]).backward()
        return {name: value.detach() for name, value in result.items()}

    outputs, states = [], []
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in micro_batches:
            states.append(_random_state(device))
            outputs.append(forward(batch))
    sizes = [next(len(value) for value in output.values() if value.ndim) for output in outputs]
    # Features are joined; scalars are the same in every chunk.
    joint = {
        name: (torch.cat([output[name] for output in outputs]) if value.ndim else value).detach()
        for name, value in outputs[0].items()
    }
    for value in joint.values():
        value.requires_grad_(value.is_floating_point())
    result = loss_fn(**joint)
    scale(result["loss"]).backward()
    pulls = {name: value.grad.split(sizes) for name, value in joint.items() if value.ndim and value.grad is not None}
    shared = {name: value.grad for name, value in joint.items() if not value.ndim and value.grad is not None}

    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        _set_random_state(device, states[i])
        with nullcontext() if last else _without_sync(model):
            output = forward(batch)
            surrogate = torch.stack([(output[name] * pull[i]).sum() for name, pull in pulls.items()]).sum()
            if last:
                # Shared by all chunks: the gradient is already whole and counts once.
                for name, gradient in shared.items():
                    surrogate = surrogate + output[name] * gradient
            surrogate.backward()
    return {name: value.detach() for name, value in result.items()}


def _without_sync(model: nn.Module) -> AbstractContextManager[None]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _random_state(device: torch.device) -> list[Tensor]:
    """States of the generators a forward pass may draw from; read on the host, the device is not waited for."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(device: torch.device, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


class ClipMixer:
    """Mixup (1710.09412) or cutmix (1905.04899) of a batch of clips, timm's; a cut is the same box in all frames."""

    def __init__(self, cfg: TrainConfig) -> None:
        self._alphas = {"mixup_alpha": cfg.mixup, "cutmix_alpha": cfg.cutmix}

    def __call__(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """``video`` float [B, C, T, H, W], changed in place, and whose share of pixels is whose: float32 [B, B].

        What is drawn follows from torch's generator, so that a step that is repeated mixes alike. The number of clips
        is even (:func:`egohod.training.build.micro_batches`).
        """
        # timm draws from numpy's global generator.
        before = np.random.get_state()  # noqa: NPY002
        np.random.seed(int(torch.randint(2**31, ()).item()))  # noqa: NPY002
        try:
            # Each clip is a class of its own, so timm's mixed targets tell the shares for any number of heads.
            mix = Mixup(**self._alphas, label_smoothing=0.0, num_classes=len(video))
            # Time into channels: timm's cut is along the third and fourth dimension, which must be H and W.
            _, shares = mix(video.flatten(1, 2), torch.arange(len(video), device=video.device))
        finally:
            np.random.set_state(before)  # noqa: NPY002
        return video, shares


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


class Stopwatch:
    """Seconds between starts and stops on a device, which is not waited for until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begin: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Begin to measure."""
        self._begin = self._now()

    def stop(self) -> None:
        """End what was begun, if anything was."""
        if self._begin is not None:
            self._spans.append((self._begin, self._now()))
            self._begin = None

    def seconds(self) -> float:
        """The sum since the last call."""
        spans, self._spans = self._spans, []
        if self._cuda and spans:
            spans[-1][1].synchronize()
            return float(sum(begin.elapsed_time(end) for begin, end in spans)) / 1000
        return float(sum(end - begin for begin, end in spans))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class TrainStep:
    """Owns model, loss, optimizer and schedule of a run."""

    def __init__(self, model: DualEncoder, cfg: Config, dist: Distributed, *, total_steps: int, steps_per_epoch: int):
        self._inner, self._cfg, self._device = model, cfg.train, dist.device
        self._dtype = pick_precision(cfg.train.precision, dist.device)
        self._seed = (cfg.train.seed, dist.rank)
        self._loss = build_loss(cfg.loss, rank=dist.rank, world_size=dist.world_size)
        self._max_log_scale = math.log(cfg.loss.max_logit_scale)
        self._optimizer = build_optimizer(model, cfg.train)
        self._schedule = build_schedule(self._optimizer, cfg.train, total_steps, steps_per_epoch)
        # Scaling only matters in fp16; the scaler is used in every precision because it also skips steps with
        # non-finite gradients without asking the device (the optimizer is fused).
        self._scaler = torch.amp.GradScaler(dist.device.type, init_scale=2.0**16 if self._is_fp16 else 1.0)
        self._mixer = ClipMixer(cfg.train) if cfg.train.mixup or cfg.train.cutmix else None
        self._average = ModelEmaV3(model, decay=cfg.train.ema, use_warmup=True) if cfg.train.ema else None
        self._stopwatch = Stopwatch(dist.device)
        self._base_names = frozenset(model.base.names if model.base else ())
        self._is_first = True
        self._model: nn.Module = model
        if dist.world_size > 1:
            ids = [dist.device.index] if dist.device.type == "cuda" else None
            # The only buffer is the constant causal mask.
            self._model = DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        group = self._optimizer.param_groups[0]
        return float(group["lr"] / group.get("lr_scale", 1.0))

    @property
    def averaged(self) -> DualEncoder:
        """The model to evaluate: the moving average of the weights if there is one."""
        return self._inner if self._average is None else self._average.module

    @property
    def _is_fp16(self) -> bool:
        return self._dtype == torch.float16

    def settle(self) -> None:
        """Leave the model with the weights that are to be evaluated."""
        if self._average is not None:
            self._inner.load_state_dict(self._average.module.state_dict())

    def __call__(self, step: int, micro_batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Update the weights with one global batch.

        ``step`` counts from 1; each micro-batch holds ``video`` uint8 [B, C, T, H, W], ``tokens`` int64 [B, L] and,
        for the box loss, ``boxes`` [B, T, 3, 4], and ``labels`` by name for losses that know classes. Returns scalars:
        what the loss tells (loss, accuracy, box_error), grad_norm, logit_scale, and skipped (1 where loss or gradient
        was not finite).
        """
        # Dropout and the like depend on (seed, rank, step) alone, so that a resumed run draws the same.
        seed = int(np.random.SeedSequence((*self._seed, step)).generate_state(1)[0])
        torch.manual_seed(seed)
        if self._is_first and isinstance(self._model, DistributedDataParallel):
            # After its first backward pass it lays its buckets out anew, and sums over more than two processes round
            # differently: once in vain, so that the first step of a resumed run adds up as if it were not the first.
            cached_step(self._forward, self._model, micro_batches, self._loss, self._scaler.scale)
            torch.manual_seed(seed)
        self._is_first = False
        self._schedule.step_update(step - 1)
        self._optimizer.zero_grad(set_to_none=True)
        self._stopwatch.start()
        result = cached_step(self._forward, self._model, micro_batches, self._timed_loss, self._scaler.scale)
        self._scaler.unscale_(self._optimizer)
        parameters = list(self._inner.parameters())
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self._cfg.clip_norm:
            clip_grads_with_norm_(parameters, self._cfg.clip_norm, norm)
        self._scaler.step(self._optimizer)
        self._scaler.update(None if self._is_fp16 else 1.0)
        if self._inner.logit_scale.requires_grad:
            with torch.no_grad():
                self._inner.logit_scale.clamp_(0, self._max_log_scale)
        if self._average is not None:
            self._average.update(self._inner, step=step)
        return result | {
            "grad_norm": norm,
            "logit_scale": self._inner.logit_scale.detach().exp(),
            "skipped": 1.0 - torch.isfinite(norm).float(),
        }

    def forward_seconds(self) -> float:
        """How long forward passes took since the last call, until losses met the other processes' features.

        Asks the device: for the steps that read numbers from it anyway.
        """
        return self._stopwatch.seconds()

    def _timed_loss(self, **features: Tensor) -> dict[str, Tensor]:
        # The first collective of a step is the loss's: until here no process waits for another.
        self._stopwatch.stop()
        return self._loss(**features)

    def _forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        video = batch["video"].to(self._device, non_blocking=True)
        tokens = batch["tokens"].to(self._device, non_blocking=True)
        video, mixing = normalise(video, self._inner.image_stats), None
        if self._mixer is not None:
            video, mixing = self._mixer(video)
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            output: dict[str, Tensor] = self._model(video, tokens)
        output |= {name: value.to(self._device, non_blocking=True) for name, value in batch.get("labels", {}).items()}
        output |= {} if mixing is None else {"mixing": mixing}
        if "boxes" in output:
            target = batch["boxes"].to(self._device, non_blocking=True)
            output["box_errors"] = box_errors(output.pop("boxes"), target)
        return output

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights (a base's left out), and everything else that the next step depends on (waits for the device)."""
        training: dict[str, Any] = {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}
        if self._average is not None:
            # The average is what the checkpoint is for; training goes on with the weights themselves.
            training["weights"] = self._trained(self._inner)
        return self._trained(self.averaged), training

    def load_state_dict(self, weights: dict[str, Tensor], training: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        kept = {name: value for name, value in self._inner.state_dict().items() if name in self._base_names}
        self._inner.load_state_dict(kept | training.get("weights", weights))
        if self._average is not None:
            self._average.module.load_state_dict(kept | weights)
        wanted = [dict(group, params=None) for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(training["optimizer"])
        for group, mine in zip(self._optimizer.param_groups, wanted, strict=True):
            # Knobs follow the configuration, averages the checkpoint.
            group.update({name: value for name, value in mine.items() if name != "params"})
        self._scaler.load_state_dict(training["scaler"])

    def _trained(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            name: value.detach().cpu() for name, value in model.state_dict().items() if name not in self._base_names
        }
