"""Behaviour cloning on frozen features: windows of frames to features, policies of several seeds at once, rollouts.

The recipe is R3M's (Nair et al., 2022): batch norm of the input, two hidden layers, Adam, mean squared error.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from egohod.data.dataset import center_crop, normalise
from egohod.distributed import inference_precision, one_core
from egohod.errors import UserError
from egohod.evaluation.embed import identity_of, image_stats_of
from egohod.evaluation.features import read_feature_file, write_feature_file
from egohod.model.dual_encoder import EgoVideo
from egohod.robot.config import FeaturesConfig, PolicyConfig
from egohod.robot.simulation import Demonstration, Observation, Simulators
from egohod.runtime import content_hash

log = logging.getLogger(__name__)

# Of rollouts, beyond those of demonstrations.
_FIRST_ROLLOUT = 1_000_000
# Cells of the readout "grid" along a side.
_CELLS = 4
_NORM_MOMENTUM, _NORM_EPS = 0.1, 1e-5  # PyTorch's of batch norm


# --------------------------------------------------------------------------------------------------
# What a policy sees
# --------------------------------------------------------------------------------------------------


@dataclass
class StateInput:
    """A baseline without pictures: the full state (an upper bound), or proprioception (a lower one)."""

    name: str
    full: bool
    draws: bool = field(default=False, init=False)
    identity: str = field(default="", init=False)

    def of_demonstration(self, key: str, episode: Demonstration) -> NDArray[np.float32]:
        """The input before every action [T, D]."""
        return episode.state if self.full else episode.proprioception

    def of_rollouts(self, now: Mapping[int, Observation], began: set[int]) -> NDArray[np.float32]:
        """The input of every slot [S, D]."""
        return np.stack([each.state if self.full else each.proprioception for each in now.values()])


class VideoInput:
    """Features of the window of frames that ends now, and proprioception.

    ``model`` is anything with ``encode_video(video [B, 3, T, S, S], normalize=False)``; its frames have the side
    ``model.size`` or ``model.geometry.image_size``, else 224. With ``freeze`` the window repeats its newest frame: the
    control that shows what motion is worth. Features of demonstrations are kept below ``cache``; those of a model
    without weights serve this object alone.

    Raises :class:`UserError` for a readout that the model does not have.
    """

    draws = True

    def __init__(
        self, name: str, model: Any, config: FeaturesConfig, cache: Path, device: torch.device, freeze: bool = False
    ) -> None:
        self.name, self._model, self._config, self._device = name, model, config, device
        geometry = getattr(model, "geometry", None)
        self._size: int = getattr(model, "size", getattr(geometry, "image_size", 224))
        visual = getattr(model, "visual", None)
        if config.readout == "grid" and (isinstance(model, EgoVideo) or not hasattr(visual, "rotations")):
            raise UserError("features.readout=grid needs a vision tower of this project on one path; use embedding")
        self.identity = content_hash(identity_of(model), str(asdict(config)), str(freeze), length=32)
        self._cache = cache / "features"
        # Ages of the window's frames in actions, oldest first.
        self._ages = np.array([0 if freeze else config.stride * i for i in range(config.frames)][::-1])
        self._pasts: dict[int, deque[Tensor]] = {}

    def of_demonstration(self, key: str, episode: Demonstration) -> NDArray[np.float32]:
        """Features and proprioception before every action [T, D + P]; ``key`` identifies the drawn frames."""
        key = content_hash(self.identity, key, length=32)
        path = self._cache / key[:2] / f"{key}.npz"
        try:
            features = read_feature_file(path)[0]
        except Exception:  # missing, or damaged, which can raise anything
            frames = center_crop(episode.frames, self._size)
            steps = np.arange(len(episode.actions))[:, None]
            # Before its first frame there is nothing: that frame is repeated.
            windows = frames[:, torch.from_numpy((steps - self._ages).clip(min=0))].transpose(0, 1)
            features = np.concatenate([self._encode(part) for part in windows.split(32)])
            write_feature_file(path, features)
        return np.concatenate((features, episode.proprioception), axis=1)

    def of_rollouts(self, now: Mapping[int, Observation], began: set[int]) -> NDArray[np.float32]:
        """Features and proprioception of every slot [S, D + P]; in those that ``began`` this is the first frame."""
        newest = center_crop(np.stack([_frame(each) for each in now.values()]), self._size)
        windows = []
        for slot, frame in zip(now, newest.unbind(1), strict=True):
            if slot in began:
                self._pasts[slot] = deque(maxlen=int(self._ages.max()) + 1)
            past = self._pasts[slot]
            past.append(frame)
            windows.append(torch.stack([past[max(0, len(past) - 1 - age)] for age in self._ages.tolist()], dim=1))
        features = self._encode(torch.stack(windows))
        return np.concatenate((features, np.stack([each.proprioception for each in now.values()])), axis=1)

    @torch.inference_mode()
    def _encode(self, windows: Tensor) -> NDArray[np.float32]:
        """Frames uint8 [B, 3, T, S, S] -> [B, D]. Raises :class:`UserError` where a feature is not finite."""
        video = normalise(windows.to(self._device), image_stats_of(self._model))
        with inference_precision(self._device, torch.float32):
            if self._config.readout == "embedding":
                features = self._model.encode_video(video, normalize=False)
            else:
                tower = self._model.visual
                tokens, chosen = tower.embed(video, tower.motion(video))
                tokens = tower.transformer(tokens, None, tower.rotations(video.shape[2], chosen))
                patches = tokens[:, tower.prefix_tokens :].unflatten(1, (video.shape[2], -1))[:, -1]
                side = math.isqrt(patches.shape[1])
                grid = patches.transpose(1, 2).unflatten(2, (side, side))
                features = F.adaptive_avg_pool2d(grid, min(side, _CELLS)).flatten(1)
        if not features.isfinite().all():
            raise UserError(f"the features of '{self.name}' are not finite: its weights are damaged, or it diverged")
        return features.float().cpu().numpy()


Input = StateInput | VideoInput


def _frame(observation: Observation) -> NDArray[np.uint8]:
    assert observation.frame is not None
    return observation.frame


# --------------------------------------------------------------------------------------------------
# Policies
# --------------------------------------------------------------------------------------------------


class Policies:
    """P policies of one shape, computed together: batch norm, two hidden layers with ReLU, an action of A numbers."""

    def __init__(self, weights: Sequence[Tensor], mean: Tensor, variance: Tensor) -> None:
        self.weights, self.mean, self.variance = list(weights), mean, variance

    @staticmethod
    def fresh(seeds: int, inputs: int, actions: int, width: int, device: torch.device) -> Policies:
        """A policy for each seed, with the start that ``nn.Linear`` gives it."""
        layers: list[list[Tensor]] = []
        for seed in range(seeds):
            # Drawn policy by policy: one does not depend on how many others there are.
            generator = torch.Generator().manual_seed(seed)
            parts: list[Tensor] = [torch.ones(1, inputs), torch.zeros(1, inputs)]
            for fan_in, fan_out in ((inputs, width), (width, width), (width, actions)):
                for shape in ((fan_in, fan_out), (1, fan_out)):
                    parts.append((2 * torch.rand(shape, generator=generator) - 1) / fan_in**0.5)
            layers.append(parts)
        weights = [torch.stack(each).to(device).requires_grad_() for each in zip(*layers, strict=True)]
        mean = torch.zeros(seeds, 1, inputs, device=device)
        return Policies(weights, mean, torch.ones_like(mean))

    def __call__(self, x: Tensor, training: bool = False) -> Tensor:
        """``x`` [P or 1, B, D] -> actions [P, B, A]; ``training`` normalises by the batch and averages its moments."""
        mean, variance = self.mean, self.variance
        if training:
            mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, correction=0)
            unbiased = variance * (x.shape[1] / (x.shape[1] - 1))
            self.mean = self.mean.lerp(mean, _NORM_MOMENTUM)
            self.variance = self.variance.lerp(unbiased, _NORM_MOMENTUM)
        scale, shift, *layers = self.weights
        x = (x - mean) * (variance + _NORM_EPS).rsqrt() * scale + shift
        for weight, bias in zip(layers[::2], layers[1::2], strict=True):
            # Of the last layer too: relu is undone by taking what was in front of it.
            before = torch.baddbmm(bias, x.expand(len(weight), -1, -1), weight)
            x = before.relu()
        return before

    def copy(self) -> Policies:
        """A copy that does not change when training continues."""
        return Policies([each.detach().clone() for each in self.weights], self.mean.clone(), self.variance.clone())


@one_core()
def clone(inputs: NDArray[np.float32], actions: NDArray[np.float32], config: PolicyConfig, seeds: int) -> Policies:
    """Train a policy for each seed on demonstrated ``inputs`` [N, D] and ``actions`` [N, A].

    Returns the last ``config.checkpoints`` checkpoints of all seeds as one set of policies, checkpoint by checkpoint.
    Seeds are trained at once, as batched products: three cost little more than one. On one core, as the network is too
    small for a GPU. Raises :class:`UserError` when a loss is not finite.
    """
    x, y = torch.from_numpy(inputs).float(), torch.from_numpy(actions).float()
    policies = Policies.fresh(seeds, x.shape[1], y.shape[1], config.width, x.device)
    # One call changes all weights: a step is so small that the number of calls decides.
    optimizer = torch.optim.Adam(policies.weights, lr=config.lr, fused=True)
    shape = config.steps, config.batch_size
    draws = [torch.randint(len(x), shape, generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    batches, checkpoints = torch.stack(draws, dim=1), deque[Policies](maxlen=config.checkpoints)
    for step, rows in enumerate(batches, 1):
        # Summed over the seeds, none of which has a gradient of another's loss.
        loss = F.mse_loss(policies(x[rows], training=True), y[rows], reduction="none").mean(dim=(1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % config.checkpoint_every == 0:
            if not loss.isfinite():
                raise UserError(f"behaviour cloning diverged within {step} steps; lower policy.lr={config.lr:g}")
            checkpoints.append(policies.copy())
    stacked = [torch.cat(each) for each in zip(*(each.weights for each in checkpoints), strict=True)]
    mean, variance = (torch.cat([getattr(each, name) for each in checkpoints]) for name in ("mean", "variance"))
    return Policies(stacked, mean, variance)


# --------------------------------------------------------------------------------------------------
# Rollouts
# --------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How the rollouts of P policies from R starts ended: bool [P, R] each."""

    success: NDArray[np.bool_]
    diverged: NDArray[np.bool_]
    films: dict[int, NDArray[np.uint8]]
    """Frames [T, S, S, 3] of the last policy, by start."""


def roll_out(
    simulators: Simulators,
    policies: Policies,
    source: Input,
    *,
    starts: int,
    actions: int,
    slots: int,
    films: int = 0,
    on_episode: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Let every policy act from every start, at most ``actions`` times; an episode ends with its success.

    All simulators take a step at the same time, and a slot whose episode is over gets the next one: what is computed in
    one batch depends on ``slots`` and not on speed, so that a repeated run gives the same numbers. The first ``films``
    starts of the last policy are filmed.
    """
    count = len(policies.mean)
    # Start by start: an interrupted film shows, and successes are comparable, early.
    episodes: Iterator[tuple[int, int]] = ((policy, start) for start in range(starts) for policy in range(count))
    outcome = Outcome(np.zeros((count, starts), bool), np.zeros((count, starts), bool), {})
    active, taken, frames = dict[int, tuple[int, int]](), dict[int, int](), dict[int, list[NDArray[np.uint8]]]()
    chosen, done = dict[int, NDArray[np.float32]](), 0
    while True:
        began = set[int]()
        for slot in range(slots):
            if slot not in active and (episode := next(episodes, None)):
                active[slot], taken[slot] = episode, 0
                began.add(slot)
        if not active:
            return outcome
        work: dict[int, tuple[Any, ...]] = {}
        for slot, (_, start) in sorted(active.items()):
            order = ("reset", _FIRST_ROLLOUT + start) if slot in began else ("step", chosen[slot])
            work[slot] = (*order, source.draws)
        now: dict[int, Observation] = simulators.call(work)
        for slot, seen in list(now.items()):
            policy, start = active[slot]
            if source.draws and policy == count - 1 and start < films:
                frames.setdefault(start, []).append(_frame(seen))
            if seen.success or seen.diverged or taken[slot] == actions:
                outcome.success[policy, start], outcome.diverged[policy, start] = seen.success, seen.diverged
                if start in frames and policy == count - 1:
                    outcome.films[start] = np.stack(frames.pop(start))
                del active[slot], now[slot]
                done += 1
                on_episode(done)
        if now:
            x = torch.from_numpy(source.of_rollouts(now, began))
            with torch.inference_mode():
                # All policies on all slots: the products are small beside a drawn frame.
                answers = policies(x.unsqueeze(0)).numpy()
            chosen = {slot: answers[active[slot][0], row] for row, slot in enumerate(now)}
            for slot in now:
                taken[slot] += 1
