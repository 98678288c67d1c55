"""One optimisation step: batches in, updated weights and device-side scalars out. No I/O, no waiting.

Nothing here reads a number back from the device, so a GPU always has work queued; the loop reads the means of many
steps at once when it logs. Shapes: B clips, C channels, T frames, H x W pixels, L text tokens.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from egohod.config import Config
from egohod.data.transforms import normalise
from egohod.distributed import Distributed, pick_precision
from egohod.loss.boxes import box_errors
from egohod.loss.factory import build_loss
from egohod.loss.large_batch import cached_step
from egohod.model.egovideo import DualEncoder
from egohod.training.mixing import ClipMixer
from egohod.training.optim import build_optimizer, build_schedule


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
