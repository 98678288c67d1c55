"""One optimisation step: a global batch in, updated weights and device-side scalars out. No I/O, no waiting.

:meth:`TrainStep.__call__` is the whole step; :func:`forward_backward` within it accumulates a contrastive batch over
micro-batches. Nothing here reads a number back from the device, so a GPU always has work queued; the loop reads the
means of many steps at once when it logs. Shapes: B clips, C channels, T frames, H x W pixels, L text tokens, E
embedding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

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
from egohod.data.dataset import normalise
from egohod.distributed import Distributed, pick_precision
from egohod.loss.classification import box_errors
from egohod.loss.config import build_loss
from egohod.loss.contrastive import Loss
from egohod.loss.opposites import weight_share
from egohod.model.dual_encoder import DualEncoder, EgoVideo, compiles
from egohod.training.config import TrainConfig, duration_in_steps

Batch = TypeVar("Batch")
Features = Mapping[str, Tensor]


class TrainStep:
    """Model, loss, optimizer, schedule and loss scaler of a run; calling it is one step."""

    def __init__(self, model: DualEncoder, cfg: Config, dist: Distributed, *, total_steps: int, steps_per_epoch: int):
        self._inner, self._cfg, self._loss_config, self._device = model, cfg.train, cfg.loss, dist.device
        self._dtype = pick_precision(cfg.train.precision, dist.device)
        self._seed = (cfg.train.seed, dist.rank)
        self._loss = build_loss(cfg.loss, rank=dist.rank, world_size=dist.world_size)
        self._has_opposites, self._total_steps = cfg.loss.has_opposites, total_steps
        self._max_log_scale = math.log(cfg.loss.max_logit_scale)
        self._slow_every = cfg.model.fast.slow_every
        self._optimizer = build_optimizer(model, cfg.train)
        # Here and not where the model is built: evaluation is not compiled (egohod.evaluation.embed).
        if compiles(cfg.model.compile, dist.device):
            model.compile_towers()
        self._schedule = build_schedule(self._optimizer, cfg.train, total_steps, steps_per_epoch)
        # Scaling only matters in fp16; the scaler is used in every precision because it also skips steps with
        # non-finite gradients without a wait for the device (the optimizer is fused).
        self._is_fp16 = self._dtype == torch.float16
        self._scaler = torch.amp.GradScaler(dist.device.type, init_scale=2.0**16 if self._is_fp16 else 1.0)
        self._mixer = ClipMixer(cfg.train) if cfg.train.mixup or cfg.train.cutmix else None
        self._ema = ModelEmaV3(model, decay=cfg.train.ema, use_warmup=True) if cfg.train.ema else None
        self._stopwatch = Stopwatch(dist.device)
        # Weights that a checkpoint leaves in the file the run started from.
        # A run that trains adapters alone would otherwise write gigabytes that never change.
        self._base_names = frozenset(model.base.names if model.base else ())
        self._is_first = True
        self._model: nn.Module = model
        if dist.world_size > 1:
            ids = [dist.device.index] if dist.device.type == "cuda" else None
            # The only buffer is the constant causal mask. Views of buckets save a copy of all gradients.
            self._model = DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )

    def __call__(self, step: int, micro_batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Update the weights with one global batch.

        Args:
            step: counts from 1.
            micro_batches: each with ``video`` uint8 [B, C, T, H, W], ``tokens`` int64 [B, L] and, for the box loss,
                ``boxes`` [B, T, 3, 4], ``labels`` by name for losses that need classes and, for opposite captions,
                ``opposites`` int64 [B, L] and ``has_opposite`` bool [B].

        Returns:
            Scalars on the device: the loss's (loss, accuracy, box_error, opposite_accuracy, opposite_cosine),
            grad_norm, logit_scale, and skipped (1 where loss or gradient was not finite).
        """
        # Dropout and the like depend on (seed, rank, step) alone, so that a resumed run draws the same numbers.
        seed = int(np.random.SeedSequence((*self._seed, step)).generate_state(1)[0])
        torch.manual_seed(seed)
        if self._is_first and isinstance(self._model, DistributedDataParallel):
            # A warm-up backward pass. DDP rebuilds its buckets after the first one, and with more than two processes
            # another order of buckets rounds differently: without this the first step of a resumed run would add up
            # in another order than the same step of a run that was never interrupted.
            forward_backward(self._forward, self._model, micro_batches, self._loss, self._scaler.scale)
            torch.manual_seed(seed)
        self._is_first = False
        # The schedule counts from 0. It is a function of the step alone, so a checkpoint holds no state of it.
        self._schedule.step_update(step - 1)
        self._optimizer.zero_grad(set_to_none=True)

        def loss(**features: Tensor) -> dict[str, Tensor]:
            # The first collective of a step is the loss's: until here no process waits for another.
            self._stopwatch.stop()
            if not self._has_opposites:
                return self._loss(**features)
            return self._loss(**features, weight_share=weight_share(self._loss_config, step, self._total_steps))

        # A function of the step, as the schedule is. The first step has both paths, so that the warm-up above, which
        # always has both, and AdamW's averages know all parameters from the start.
        paths: AbstractContextManager[None] = nullcontext()
        if isinstance(self._inner, EgoVideo) and (step - 1) % self._slow_every > 0:
            paths = self._inner.without_slow_path()
        self._stopwatch.start()
        with paths:
            scalars = forward_backward(self._forward, self._model, micro_batches, loss, self._scaler.scale)
        # Unscaled first: the norm, and its clipping, are of the true gradient.
        self._scaler.unscale_(self._optimizer)
        parameters = list(self._inner.parameters())
        # Also where nothing is clipped: it is logged, and says whether the step is skipped.
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self._cfg.clip_norm:
            clip_grads_with_norm_(parameters, self._cfg.clip_norm, norm)
        self._scaler.step(self._optimizer)
        # Outside of fp16 the scale is set back to 1: a skipped step must not halve it.
        self._scaler.update(None if self._is_fp16 else 1.0)
        if self._inner.logit_scale.requires_grad:
            # As CLIP: a temperature near zero makes the softmax one-hot and training unstable.
            with torch.no_grad():
                self._inner.logit_scale.clamp_(0, self._max_log_scale)
        if self._ema is not None:
            self._ema.update(self._inner, step=step)
        return scalars | {
            "grad_norm": norm,
            "logit_scale": self._inner.logit_scale.detach().exp(),
            # A loss that is not finite has no finite gradient, so the norm is enough.
            "skipped": 1.0 - torch.isfinite(norm).float(),
        }

    def _forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A micro-batch's inputs to the loss, by name; called twice for each where batches are accumulated."""
        # Copied as bytes, a quarter of what float32 would be, while the device still computes the step before.
        video = batch["video"].to(self._device, non_blocking=True)
        tokens = batch["tokens"].to(self._device, non_blocking=True)
        if "opposites" in batch:
            tokens = torch.cat((tokens, batch["opposites"].to(self._device, non_blocking=True)))
        video, mixing = normalise(video, self._inner.image_stats), None
        if self._mixer is not None:
            video, mixing = self._mixer(video)
        # The loss is outside of autocast: similarities and softmax need float32.
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            output: dict[str, Tensor] = self._model(video, tokens)
        output |= {name: value.to(self._device, non_blocking=True) for name, value in batch.get("labels", {}).items()}
        if "opposites" in batch:
            output["text_features"], output["opposite_features"] = output["text_features"].chunk(2)
            output["has_opposite"] = batch["has_opposite"].to(self._device, non_blocking=True)
        if mixing is not None:
            output["mixing"] = mixing
        if "boxes" in output:
            # Reduced to one number a clip here, which is far smaller to keep than the boxes of all frames.
            target = batch["boxes"].to(self._device, non_blocking=True)
            output["box_errors"] = box_errors(output.pop("boxes"), target)
        return output

    def forward_seconds(self) -> float:
        """How long forward passes took since the last call, until losses met the other processes' features.

        Waits for the device: for the steps that read numbers from it anyway.
        """
        return self._stopwatch.seconds()

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        group = self._optimizer.param_groups[0]
        # With layer decay each group holds its own share of the rate.
        return float(group["lr"] / group.get("lr_scale", 1.0))

    @property
    def ema_or_model(self) -> DualEncoder:
        """The model to evaluate: the moving average of the weights if there is one."""
        return self._inner if self._ema is None else self._ema.module

    def load_ema_weights(self) -> None:
        """Leave the model with the weights to evaluate, those of the moving average if there is one."""
        if self._ema is not None:
            self._inner.load_state_dict(self._ema.module.state_dict())

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights (without those of a base file), and all else that the next step depends on (waits for the device)."""

        def without_base(model: nn.Module) -> dict[str, Tensor]:
            named = model.state_dict().items()
            return {name: value.detach().cpu() for name, value in named if name not in self._base_names}

        training: dict[str, Any] = {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}
        if self._ema is not None:
            # The average is what the checkpoint is for; training continues with the weights themselves.
            training["weights"] = without_base(self._inner)
        return without_base(self.ema_or_model), training

    def load_state_dict(self, weights: dict[str, Tensor], training: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        base = {name: value for name, value in self._inner.state_dict().items() if name in self._base_names}
        self._inner.load_state_dict(base | training.get("weights", weights))
        if self._ema is not None:
            self._ema.module.load_state_dict(base | weights)
        configured = [dict(group, params=None) for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(training["optimizer"])
        for group, settings in zip(self._optimizer.param_groups, configured, strict=True):
            # Learning rate and the like follow the configuration, AdamW's moments the checkpoint.
            group.update({name: value for name, value in settings.items() if name != "params"})
        self._scaler.load_state_dict(training["scaler"])


# --------------------------------------------------------------------------------------------------
# Forward and backward over micro-batches
# --------------------------------------------------------------------------------------------------


def forward_backward(
    forward: Callable[[Batch], Features],
    model: nn.Module,
    micro_batches: Sequence[Batch],
    loss_fn: Loss,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> dict[str, Tensor]:
    """Add the gradient of the loss over all micro-batches (of all processes) to the parameters.

    Plain gradient accumulation would contrast each micro-batch only with itself. Here the features are cached
    (GradCache, 2101.06983), with the exact gradient: (1) all micro-batches are embedded without gradient, (2) the loss
    over all features gives the gradient of each feature, (3) every micro-batch is embedded again, with gradient, and
    its features' gradient is passed on to the weights. One micro-batch is a plain forward and backward pass; several
    cost one more forward pass each. Dropout and the like repeat exactly, because each chunk's random state is kept.

    Args:
        forward: micro-batch -> values of each clip (``video_features`` [b, E], ``text_features`` [b, E], ``box_errors``
            [b], classes of which the loss takes no gradient) and scalars that all chunks share (``logit_scale``,
            ``logit_bias``); enters autocast itself if wanted, so that the loss stays in float32.
        model: what ``forward`` calls.
        micro_batches: chunks of this process's batch, anything ``forward`` takes.
        loss_fn: takes what ``forward`` gives by name, e.g. :class:`egohod.loss.contrastive.ContrastiveLoss`.
        scale: applied to the loss before its backward pass, e.g. ``GradScaler.scale``.

    Returns:
        What ``loss_fn`` gives (``loss`` not scaled), detached scalars on the device.
    """
    assert micro_batches, "a step needs at least one micro-batch"
    if len(micro_batches) == 1:
        scalars = loss_fn(**forward(micro_batches[0]))
        scale(scalars["loss"]).backward()
        return {name: value.detach() for name, value in scalars.items()}

    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    outputs, random_states = [], []
    with torch.no_grad():
        for batch in micro_batches:
            # Of the generators a forward pass may draw from; they live on the host, the device is not waited for.
            random_states.append((torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None))
            outputs.append(forward(batch))

    sizes = [next(len(value) for value in output.values() if value.ndim) for output in outputs]
    # Features are joined; scalars are the same in every chunk.
    joint = {
        name: (torch.cat([output[name] for output in outputs]) if value.ndim else value).detach()
        for name, value in outputs[0].items()
    }
    for value in joint.values():
        # Labels are integers, of which there is no gradient.
        value.requires_grad_(value.is_floating_point())
    scalars = loss_fn(**joint)
    scale(scalars["loss"]).backward()
    gradients = {name: value.grad for name, value in joint.items() if value.grad is not None}
    of_clips = {name: gradient.split(sizes) for name, gradient in gradients.items() if gradient.ndim}
    of_scalars = {name: gradient for name, gradient in gradients.items() if not gradient.ndim}

    for i, batch in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        cpu_state, gpu_state = random_states[i]
        torch.set_rng_state(cpu_state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, device)
        # The processes exchange gradients once, in the last backward pass.
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext():
            output = forward(batch)
            # The gradient of feature . constant is that constant: this sum has the loss's gradient by the weights.
            surrogate = torch.stack([(output[name] * parts[i]).sum() for name, parts in of_clips.items()]).sum()
            if is_last:
                # Shared by all chunks: the gradient is already whole and counts once.
                for name, gradient in of_scalars.items():
                    surrogate = surrogate + output[name] * gradient
            surrogate.backward()
    return {name: value.detach() for name, value in scalars.items()}


class ClipMixer:
    """Mixup (1710.09412) or cutmix (1905.04899) of a batch of clips, timm's; a cut is the same box in all frames."""

    def __init__(self, cfg: TrainConfig) -> None:
        self._alphas = {"mixup_alpha": cfg.mixup, "cutmix_alpha": cfg.cutmix}

    def __call__(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mix ``video`` float [B, C, T, H, W] in place; also give each clip's share of each other: float32 [B, B].

        Random numbers follow from torch's generator, so that a step that is repeated mixes alike. B is even
        (:func:`egohod.training.build.micro_batches`).
        """
        # timm draws from numpy's global generator.
        before = np.random.get_state()  # noqa: NPY002
        np.random.seed(int(torch.randint(2**31, ()).item()))  # noqa: NPY002
        try:
            # Each clip is a class of its own, so timm's mixed targets are the shares, for any number of heads.
            mix = Mixup(**self._alphas, label_smoothing=0.0, num_classes=len(video))
            # Time into channels: timm's cut is along the third and fourth dimension, which must be H and W.
            _, shares = mix(video.flatten(1, 2), torch.arange(len(video), device=video.device))
        finally:
            np.random.set_state(before)  # noqa: NPY002
        return video, shares


# --------------------------------------------------------------------------------------------------
# Optimizer and schedule
# --------------------------------------------------------------------------------------------------


def learning_rates(cfg: TrainConfig) -> tuple[float, float, float]:
    """``lr``, ``lr_start`` and ``lr_end``, scaled to this batch size (see ``train.lr_reference_batch``)."""
    # Linear scaling (Goyal et al., 1706.02677).
    scale = cfg.global_batch_size / cfg.lr_reference_batch if cfg.lr_reference_batch else 1.0
    return cfg.lr * scale, cfg.lr_start * scale, cfg.lr_end * scale


def build_optimizer(model: torch.nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters; no decay on tensors of one dimension or less.

    The fused implementation skips a step with a non-finite gradient on the device itself, so that nothing
    has to wait for the answer.
    """
    lr, _, _ = learning_rates(cfg)
    # Of both towers; timm compares whole names.
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
    return torch.optim.AdamW(groups, lr=lr, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, fused=True)


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
    peak, start, end = learning_rates(cfg)
    return CosineLRScheduler(
        optimizer,
        # timm divides by it, and a run may be all warm-up. Of one step it warns that the cosine has no effect, but that
        # step has the peak rate, as the first of two.
        t_initial=max(2, total_steps - warmup),
        # A cosine between equal ends is a constant.
        lr_min=peak if cfg.schedule == "constant" else end,
        warmup_t=warmup,
        warmup_lr_init=start,
        warmup_prefix=True,
        t_in_epochs=False,
    )


class Stopwatch:
    """Seconds between starts and stops on a device, which is not waited for until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begin: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Begin to measure."""
        self._begin = self._now()

    def stop(self) -> None:
        """End what was begun."""
        self._spans.append((self._begin, self._now()))

    def seconds(self) -> float:
        """The sum since the last call."""
        spans, self._spans = self._spans, []
        if self._on_gpu and spans:
            # Events of one stream complete in order: the last one stands for all.
            spans[-1][1].synchronize()
            return float(sum(begin.elapsed_time(end) for begin, end in spans)) / 1000
        return float(sum(end - begin for begin, end in spans))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        # The device notes the time when it gets here, long after this line has run.
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
