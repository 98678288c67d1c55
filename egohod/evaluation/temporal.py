"""Temporal controls: the same clips with their time destroyed, so that what a score owes to motion can be told.

A control acts on the frames that a model is given, before it chooses any of them: a slow and a fast path see the same
destroyed time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from egohod.errors import UserError

# The shuffled order of a clip follows from this and from the clip's number.
SEED = 0


def shuffle(video: Tensor, numbers: Sequence[int]) -> Tensor:
    """Frames in an order that depends on the clip's number alone, never their own."""
    frames = video.shape[2]
    order = torch.from_numpy(np.stack([shuffled_order(int(i), frames) for i in numbers])).to(video.device)
    return video.gather(2, order[:, None, :, None, None].expand_as(video))


def reverse(video: Tensor, numbers: Sequence[int]) -> Tensor:
    """The last frame first."""
    return video.flip(2)


def freeze(video: Tensor, numbers: Sequence[int]) -> Tensor:
    """The middle frame (of an even number the later one), over and over."""
    middle = video.shape[2] // 2
    return video[:, :, middle : middle + 1].expand_as(video).contiguous()


CONTROLS: Mapping[str, Callable[[Tensor, Sequence[int]], Tensor]] = {
    "shuffle": shuffle,
    "reverse": reverse,
    "freeze": freeze,
}


def apply_control(name: str, video: Tensor, numbers: Sequence[int]) -> Tensor:
    """``video`` [B, 3, T, H, W], uint8 or normalised, with the time of each clip destroyed as ``name`` says.

    ``numbers`` [B] tell the clips apart. Raises :class:`UserError` for an unknown name, and for clips of
    one frame, which have no time that could be destroyed.
    """
    if name not in CONTROLS:
        raise UserError(f"no temporal control '{name}'; there are {', '.join(CONTROLS)}")
    if video.shape[2] < 2:
        raise UserError(f"the temporal control '{name}' needs clips of at least two frames")
    return CONTROLS[name](video, numbers)


def shuffled_order(number: int, frames: int, seed: int = SEED) -> np.ndarray:
    """A permutation of ``frames`` >= 2 frames that is not the identity, int64 [frames]; a function of its arguments."""
    assert frames > 1
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number))))
    own = np.arange(frames)
    while True:
        order = rng.permutation(frames)
        if not np.array_equal(order, own):
            return order
