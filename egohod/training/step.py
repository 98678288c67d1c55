"""One optimisation step: a global batch in, updated weights and device-side scalars out. No I/O, no waiting.

:meth:`TrainStep.__call__` is the whole step; :func:`forward_backward` within it accumulates a contrastive batch over
micro-batches, the first pass of which computes while the later ones are still loaded. Nothing here reads a number back
from the device, so a GPU always has work queued; the loop reads the means of many steps at once when it logs. Shapes: B
clips, C channels, T frames, H x W pixels, L text tokens, E embedding.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.autograd import profiler
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from egohod.config import Config
from egohod.data.dataset import normalise
from egohod.distributed import Distributed, pick_precision
from egohod.loss.classification import box_errors
from egohod.loss.config import Loss, build_loss
from egohod.loss.contrastive import hash_captions
from egohod.loss.opposites import weight_share
from egohod.model.dual_encoder import DualEncoder, EgoVideo, compiles
from egohod.runtime import Interrupted
from egohod.training.config import TrainConfig, duration_in_steps

if TYPE_CHECKING:
    from egohod.training.sharding import Shards

# In the store of the processes: one of them was asked to stop. How often the others look.
_STOP_KEY, _LOOK_SECONDS = "egohod/stop", 1.0
# Beginnings of parts that the stopwatch holds before it adds them up.
_MOST_MARKS = 4096

Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)
Features = Mapping[str, Tensor]


class MicroBatches(Protocol[Batch_co]):
    """The micro-batches of one step, a list or anything that loads each of them when the step asks for it."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch_co]: ...


class TrainStep:
    """Model, loss, optimizer, schedule and loss scaler of a run; calling it is one step.

    With ``train.sharding`` the parameters of ``model`` are this process's parts while it trains; see :meth:`gathered`.
    """

    def __init__(self, model: DualEncoder, cfg: Config, dist: Distributed, *, total_steps: int, steps_per_epoch: int):
        self._inner, self._cfg, self._loss_config, self._device = model, cfg.train, cfg.loss, dist.device
        self._dtype = pick_precision(cfg.train.precision, dist.device)
        self._seed = (cfg.train.seed, dist.rank)
        self._loss = build_loss(cfg.loss, rank=dist.rank, world_size=dist.world_size)
        self._has_opposites, self._total_steps = cfg.loss.has_opposites, total_steps
        self._max_log_scale = math.log(cfg.loss.max_logit_scale)
        self._slow_every = cfg.model.fast.slow_every
        self.shards: Shards | None = None
        """How the weights are split over the processes; None if they are not."""
        scaler: type[torch.amp.GradScaler] = torch.amp.GradScaler
        if cfg.train.sharding != "none":
            # Imported here: most runs do without.
            from egohod.training.sharding import ShardedScaler, Shards

            self.shards, scaler = Shards(model, cfg, dist), ShardedScaler
        # What computes; without sharding it is the model itself.
        self._runs: DualEncoder = self.shards.module if self.shards else model
        self._optimizer = build_optimizer(model, cfg.train)
        # Here and not where the model is built: evaluation is not compiled (egohod.evaluation.embed).
        if compiles(cfg.model.compile, dist.device):
            (self.shards.compile if self.shards else model.compile_towers)()
        self._schedule = build_schedule(self._optimizer, cfg.train, total_steps, steps_per_epoch)
        # Scaling only matters in fp16; the scaler is used in every precision because it also skips steps with
        # non-finite gradients without a wait for the device (the optimizer is fused).
        self._is_fp16 = self._dtype == torch.float16
        self._scaler = scaler(dist.device.type, init_scale=2.0**16 if self._is_fp16 else 1.0)
        self._mixer = ClipMixer(cfg.train) if cfg.train.mixup or cfg.train.cutmix else None
        self._ema = ModelEmaV3(model, decay=cfg.train.ema, use_warmup=True) if cfg.train.ema else None
        self.stopwatch = Stopwatch(dist.device)
        self._to_device = DeviceCopies(dist.device)
        # Weights that a checkpoint leaves in the file the run started from.
        # A run that trains adapters alone would otherwise write gigabytes that never change.
        self._base_names = frozenset(model.base.names if model.base else ())
        self._is_main = dist.is_main
        # Names of the trained parameters in the optimizer's order, by which its state is numbered.
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._names = [names[each] for group in self._optimizer.param_groups for each in group["params"]]
        self._is_first = True
        self._model: nn.Module = self._runs
        if dist.world_size > 1 and self.shards is None:
            ids = [dist.device.index] if dist.device.type == "cuda" else None
            # Buffers are constants: causal masks, rotations, scales of low-rank parts. Views of buckets save a copy of
            # all gradients.
            parallel = DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )
            if cfg.train.gradient_dtype == "bf16":
                # Only what is sent is rounded: micro-batches and AdamW's averages still add up in float32.
                parallel.register_comm_hook(None, bf16_compress_hook)
            self._model = parallel

    def __call__(
        self, step: int, micro_batches: MicroBatches[dict[str, Any]], deadline: StopDeadline | None = None
    ) -> dict[str, Tensor]:
        """Update the weights with one global batch.

        Args:
            step: counts from 1.
            micro_batches: each with ``video`` uint8 [B, C, T, H, W], ``tokens`` int64 [B, L] and, for the box loss,
                ``boxes`` [B, T, 3, 4], ``labels`` by name for losses that need classes and, for captions that
                are false of their clips, ``negatives`` int64 [B, K, L] and ``has_negative`` bool [B, K].
            deadline: may end a step of several micro-batches early, with
                :class:`~egohod.runtime.Interrupted`; weights and all else are then as after the step before.

        Returns:
            Scalars on the device: the loss's (loss, accuracy, box_error, opposite_accuracy, ...),
            grad_norm, logit_scale, and skipped (1 where loss or gradient was not finite).
        """
        # Dropout and the like depend on (seed, rank, step) alone, so that a resumed run draws the same numbers.
        seed = int(np.random.SeedSequence((*self._seed, step)).generate_state(1)[0])
        torch.manual_seed(seed)
        if self._is_first and isinstance(self._model, DistributedDataParallel):
            # A warm-up backward pass. DDP rebuilds its buckets after the first one, and with more than two processes
            # another order of buckets rounds differently: without this the first step of a resumed run would add up
            # in another order than the same step of a run that was never interrupted.
            micro_batches = list(micro_batches)
            forward_backward(
                self._forward, self._model, micro_batches, self._loss, self._scaler.scale, deadline=deadline
            )
            torch.manual_seed(seed)
        self._is_first = False
        # The schedule counts from 0. It is a function of the step alone, so a checkpoint holds no state of it.
        self._schedule.step_update(step - 1)
        self._optimizer.zero_grad(set_to_none=True)

        def loss(**features: Tensor) -> dict[str, Tensor]:
            if not self._has_opposites:
                return self._loss(**features)
            return self._loss(**features, weight_share=weight_share(self._loss_config, step, self._total_steps))

        # A function of the step, as the schedule is. The first step has both paths, so that the warm-up above, which
        # always has both, and AdamW's averages know all parameters from the start.
        paths: AbstractContextManager[None] = nullcontext()
        if isinstance(self._runs, EgoVideo) and (step - 1) % self._slow_every > 0:
            paths = self._runs.without_slow_path()
        with paths:
            scalars = forward_backward(
                self._forward, self._model, micro_batches, loss, self._scaler.scale,
                enter=self.stopwatch.enter, deadline=deadline,
            )  # fmt: skip
        self.stopwatch.enter("optimizer")
        if self.shards:
            self.shards.collect_gradients()
        # Unscaled first: the norm, and its clipping, are of the true gradient.
        self._scaler.unscale_(self._optimizer)
        parameters = list(self._inner.parameters())
        # Also where nothing is clipped: it is logged, and says whether the step is skipped.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = self.shards.gradient_norm() if self.shards else get_total_norm(gradients)
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
        self.stopwatch.enter("")
        return scalars | {
            "grad_norm": norm,
            "logit_scale": self._inner.logit_scale.detach().exp(),
            # A loss that is not finite has no finite gradient, so the norm is enough.
            "skipped": 1.0 - torch.isfinite(norm).float(),
        }

    def _forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A micro-batch's inputs to the loss, by name; called twice for each where batches are accumulated."""
        # Copied as bytes, a quarter of what float32 would be, while the device still computes what came before.
        video = self._to_device(batch["video"])
        tokens = batch["tokens"].to(self._device, non_blocking=True)
        captions = hash_captions(tokens) if self._loss_config.mask_duplicates else None
        count = len(tokens)
        if "negatives" in batch:
            tokens = torch.cat((tokens, batch["negatives"].to(self._device, non_blocking=True).flatten(0, 1)))
        video, mixing = normalise(video, self._inner.image_stats), None
        if self._mixer is not None:
            video, mixing = self._mixer(video)
        # The loss is outside of autocast: similarities and softmax need float32.
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            output: dict[str, Tensor] = self._model(video, tokens)
        output |= {name: value.to(self._device, non_blocking=True) for name, value in batch.get("labels", {}).items()}
        if "negatives" in batch:
            texts = output["text_features"]
            output["text_features"], output["negative_features"] = (
                texts[:count],
                texts[count:].unflatten(0, (count, -1)),
            )
            output["has_negative"] = batch["has_negative"].to(self._device, non_blocking=True)
        if captions is not None:
            output["caption_ids"] = captions
        if mixing is not None:
            output["mixing"] = mixing
        if "boxes" in output:
            # Reduced to one number a clip here, which is far smaller to keep than the boxes of all frames.
            target = batch["boxes"].to(self._device, non_blocking=True)
            output["box_errors"] = box_errors(output.pop("boxes"), target)
        return output

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        group = self._optimizer.param_groups[0]
        # With layer decay each group holds its own share of the rate.
        return float(group["lr"] / group.get("lr_scale", 1.0))

    @property
    def ema_or_model(self) -> DualEncoder:
        """The model to evaluate: the moving average of the weights if there is one. To be called within gathered()."""
        return self._inner if self._ema is None else self._ema.module

    def gathered(self) -> AbstractContextManager[DualEncoder]:
        """Within, :attr:`ema_or_model` has whole weights, on every process; collective where they are split."""
        return self.shards.gathered(self.ema_or_model) if self.shards else nullcontext(self.ema_or_model)

    def load_ema_weights(self) -> None:
        """Leave the model with the weights to evaluate, whole: those of the moving average if there is one."""
        if self._ema is not None:
            self._inner.load_state_dict(self._ema.module.state_dict())
        if self.shards:
            self.shards.gather(self._inner)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights (without those of a base file), and all else that the next step depends on.

        The tensors are those of the model and the optimizer, on their device: the next step changes them. With
        sharding it is collective: the weights are whole, on the host and on the first process alone, and ``parts`` of
        the second value has this process's parts of all else, for :meth:`egohod.training.sharding.Shards.write`.
        """

        def without_base(model: nn.Module) -> dict[str, Tensor]:
            named = model.state_dict().items()
            return {name: value.detach() for name, value in named if name not in self._base_names}

        training: dict[str, Any] = {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}
        weights = without_base(self.ema_or_model)
        if self._ema is not None:
            # The average is what the checkpoint is for; training continues with the weights themselves.
            training["weights"] = without_base(self._inner)
        if self.shards is None:
            return weights, training
        parts: dict[str, Any] = {}
        for number, values in training["optimizer"]["state"].items():
            # Of AdamW's state the number of steps is whole everywhere.
            name = self._names[number]
            split = [key for key, value in values.items() if name in self.shards and value.ndim]
            parts |= {f"{key}/{name}": self.shards.distributed(name, values[key]) for key in split}
            training["optimizer"]["state"][number] = {key: values[key] for key in values if key not in split}
        for name in [name for name in training.get("weights", ()) if name in self.shards]:
            parts[f"weights/{name}"] = self.shards.distributed(name, training["weights"].pop(name))
        # One at a time, so that the device never holds more than one whole.
        whole = ((name, self.shards.whole(name, value)) for name, value in weights.items())
        return {name: value.cpu() for name, value in whole if self._is_main}, training | {"parts": parts}

    def load_state_dict(self, weights: dict[str, Tensor], training: dict[str, Any], parts: Path | None = None) -> None:
        """Continue from what :meth:`state_dict` returned, of which copies are made.

        ``parts`` is the folder of a sharded run's parts. Whether this run is sharded, and over how many processes, does
        not matter.
        """
        weights, training = dict(weights), dict(training)
        raw = dict(training["weights"]) if "weights" in training else weights
        state = {number: dict(values) for number, values in training["optimizer"]["state"].items()}
        if self.shards:
            cut = self.shards.cut
            weights, raw = ({name: cut(name, value) for name, value in each.items()} for each in (weights, raw))
            for number, values in state.items():
                state[number] = {
                    key: cut(self._names[number], value) if value.ndim else value for key, value in values.items()
                }
        if parts is not None:
            from egohod.training.sharding import read_parts

            numbers = {name: number for number, name in enumerate(self._names)}
            for key, value in read_parts(parts, self.shards).items():
                kind, _, name = key.partition("/")
                (raw if kind == "weights" else state[numbers[name]])[name if kind == "weights" else kind] = value
        base = {name: value for name, value in self._inner.state_dict().items() if name in self._base_names}
        self._inner.load_state_dict(base | raw)
        if self._ema is not None:
            self._ema.module.load_state_dict(base | weights)
        configured = [dict(group, params=None) for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(training["optimizer"] | {"state": state})
        for state in self._optimizer.state.values():
            for name, value in state.items():
                # On the CPU it is still the checkpoint's tensor, which would hold the whole file in memory.
                if isinstance(value, Tensor) and value.device.type == "cpu":
                    state[name] = value.clone()
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
    micro_batches: MicroBatches[Batch],
    loss_fn: Loss,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    *,
    enter: Callable[[str], None] = lambda part: None,
    deadline: StopDeadline | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of the loss over all micro-batches (of all processes) to the parameters.

    Plain gradient accumulation would contrast each micro-batch only with itself. Here the features are cached
    (GradCache, 2101.06983), with the exact gradient: (1) all micro-batches are embedded without gradient, each as soon
    as it is loaded, (2) the loss over all features gives the gradient of each feature, (3) every micro-batch is
    embedded again, with gradient, and its features' gradient is passed on to the weights. One micro-batch is a plain
    forward and backward pass; several cost one more forward pass each. Dropout and the like repeat exactly, because
    each chunk's random state is kept.

    Args:
        forward: micro-batch -> values of each clip (``video_features`` [b, E], ``text_features`` [b, E], ``box_errors``
            [b], classes of which the loss takes no gradient) and scalars that all chunks share (``logit_scale``,
            ``logit_bias``); enters autocast itself if wanted, so that the loss stays in float32.
        model: what ``forward`` calls.
        micro_batches: chunks of this process's batch, anything ``forward`` takes; iterated over once, and held until
            the second pass has used them.
        loss_fn: takes what ``forward`` gives by name, e.g. :class:`egohod.loss.contrastive.ContrastiveLoss`.
        scale: applied to the loss before its backward pass, e.g. ``GradScaler.scale``.
        enter: called with the name of each part when it begins: data, features (until the first collective), loss,
            forward (the second time) and backward.
        deadline: looked at between micro-batches, where there are several.

    Returns:
        What ``loss_fn`` gives (``loss`` not scaled), detached scalars on the device.
    """
    count = len(micro_batches)
    assert count, "a step needs at least one micro-batch"
    enter("data")
    if count == 1:
        batch = next(iter(micro_batches))
        enter("features")
        output = forward(batch)
        enter("loss")
        scalars = loss_fn(**output)
        enter("backward")
        scale(scalars["loss"]).backward()
        return {name: value.detach() for name, value in scalars.items()}

    # A sharded model gathers its weights in every pass: nobody leaves, or is ahead, alone.
    in_step = isinstance(model, FSDPModule)
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    batches, outputs, random_states = deque[Batch](), [], []
    with torch.no_grad():
        for batch in micro_batches:
            enter("features")
            # Of the generators a forward pass may draw from; they live on the host, the device is not waited for.
            random_states.append((torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None))
            outputs.append(forward(batch))
            batches.append(batch)
            # A process that wants to give the step up votes at once; the others vote below.
            if deadline is not None and (in_step or deadline.is_due()):
                deadline.agree()
            # While this one is computed, the workers load the next: nothing waits for the whole batch.
            enter("data")
    # Before the first collective, which all processes have to enter or none.
    if deadline is not None:
        deadline.agree()

    enter("loss")
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

    for i in range(count):
        is_last = i == count - 1
        # The processes exchange gradients once, in the last backward pass, in front of which all vote.
        if deadline is not None and (is_last or in_step or deadline.is_due()):
            deadline.agree()
        enter("forward")
        # Not held any longer: the loader fills up with the next step's micro-batches meanwhile.
        batch = batches.popleft()
        cpu_state, gpu_state = random_states[i]
        torch.set_rng_state(cpu_state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, device)
        if isinstance(model, FSDPModule):
            # Gradients are reduced with each micro-batch: whole ones would take the memory that sharding saves. Between
            # copies of the weights (hsdp), whose links are slow, they are added up once.
            model.set_requires_all_reduce(is_last)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext():
            output = forward(batch)
            # The gradient of feature . constant is that constant: this sum has the loss's gradient by the weights.
            surrogate = torch.stack([(output[name] * parts[i]).sum() for name, parts in of_clips.items()]).sum()
            if is_last:
                # Shared by all chunks: the gradient is already whole and counts once.
                for name, gradient in of_scalars.items():
                    surrogate = surrogate + output[name] * gradient
            enter("backward")
            surrogate.backward()
    return {name: value.detach() for name, value in scalars.items()}


class StopDeadline:
    """Gives up a step that is not done ``seconds`` after a request to stop, on all processes or on none.

    Schedulers give a notice (Slurm's ``--signal`` 120 s here), and a step of many micro-batches may take longer. Its
    weights change at its end only, so what was computed of it is all that is lost.
    """

    def __init__(self, dist: Distributed, seconds: float) -> None:
        self._dist, self._seconds = dist, seconds
        self._since: float | None = None
        self._next_look = 0.0

    def is_due(self) -> bool:
        """Whether the time is over; no collective, and rarely more than a look at the clock."""
        now, stop, store = time.monotonic(), self._dist.stop, self._dist.store
        if self._since is None and stop:
            self._since = stop.since
            if store is not None:
                store.set(_STOP_KEY, "1")
        elif self._since is None and store is not None and now >= self._next_look:
            # A signal may reach one process alone. The others would finish the step that it gives up.
            self._next_look = now + _LOOK_SECONDS
            self._since = now if store.check([_STOP_KEY]) else None
        return self._since is not None and now - self._since >= self._seconds

    def agree(self) -> None:
        """Raise :class:`Interrupted` on all processes if the time is over on one of them; collective."""
        if self._dist.sum(int(self.is_due()))[0]:
            raise Interrupted(self._dist.stop.reason or "another process was asked to stop")


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
    # Of both towers; timm compares whole names. Of its backbones it never decays the tokens and learned rotations.
    exempt = (
        "cls_token",
        "reg_token",
        "freqs",
        *(() if cfg.decay_positions else ("positional_embedding", "pos_embed")),
    )
    no_decay = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] in exempt]
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


class DeviceCopies:
    """Copies batches to a GPU on a stream of its own, so that the next one arrives while the last one is computed.

    On the stream that computes, a copy would wait for all that is queued there, although copying occupies no
    multiprocessor. The host runs ahead of the GPU, up to the next line of the log, so copies are held back until the
    batch before the last one has been computed: two are on the GPU, never more. Nothing here makes the host wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # The last two copies, oldest first, each with an event after all that was queued before the next call.
        self._copies: list[tuple[Tensor, Any]] = []

    def __call__(self, batch: Tensor) -> Tensor:
        """``batch`` on the device; to be read by what is queued before the next call, and not later."""
        if self._stream is None:
            return batch.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        if self._copies:
            last, _ = self._copies.pop()
            # The last copy has been read when the stream that computes gets here.
            self._copies.append((last, computing.record_event()))
        with torch.cuda.stream(self._stream):
            if len(self._copies) == 2:
                # Its memory, which belongs to this stream, is free for the next copy, which waits until it was read.
                self._stream.wait_event(self._copies.pop(0)[1])
            copy = batch.to(self._device, non_blocking=True)
            arrived = self._stream.record_event()
        computing.wait_event(arrived)
        self._copies.append((copy, None))
        return copy


class Stopwatch:
    """Seconds of each part of the steps on a device, which is not waited for until they are read.

    On a GPU they are the times between events of its stream. So ``data`` is how long the device was idle, waiting for
    clips: what the host waits while work is still queued costs nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._sums: dict[str, float] = {}
        self._label: Any = None

    def enter(self, part: str) -> None:
        """End the part that is measured, and begin ``part``; an empty name measures nothing."""
        if not self._on_gpu:
            now: Any = time.perf_counter()
        else:
            # The device notes the time when it gets here, long after this line has run.
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((part, now))
        # Events are a resource of the driver, and days may pass between two lines of the log. So far back the device
        # is done with them, and nothing waits.
        if len(self._marks) > 2 * _MOST_MARKS and (not self._on_gpu or self._marks[_MOST_MARKS][1].query()):
            self._add(_MOST_MARKS)
        # The parts by name in a trace of torch.profiler.
        if self._label is not None:
            self._label.__exit__(None, None, None)
            self._label = None
        if part and profiler._is_profiler_enabled:
            self._label = profiler.record_function(part).__enter__()

    def seconds(self) -> dict[str, float]:
        """Sums by part since the last call; waits for the device."""
        if self._on_gpu and self._marks:
            # Events of one stream complete in order: the last one stands for all.
            self._marks[-1][1].synchronize()
        self._add(len(self._marks) - 1)
        sums, self._marks, self._sums = self._sums, [], {}
        # Between steps.
        sums.pop("", None)
        return sums

    def _add(self, count: int) -> None:
        """Add the first ``count`` parts to the sums, and forget their marks."""
        for (part, begin), (_, end) in pairwise(self._marks[: count + 1]):
            passed = begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
            self._sums[part] = self._sums.get(part, 0.0) + float(passed)
        del self._marks[: max(count, 0)]
