"""Contrastive batches larger than memory, with the exact gradient (cached features, GradCache, 2101.06983).

Plain gradient accumulation would contrast each micro-batch only with itself. Here all micro-batches are
embedded without gradient first, the loss over all features gives the gradient of each feature, and every
micro-batch is then embedded again, with gradient, and pulled along its features' gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from egohod.loss.contrastive import Loss

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
