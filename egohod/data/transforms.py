"""Crop and flip in the loader, normalise on the device.

Clips stay uint8 until they are on the device: a quarter of the bytes to move, and the integer resize is several
times faster than the float one.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from egohod.model.config import IMAGE_STATS, ImageStats

RESIZES = {"bicubic_antialias": ("bicubic", True), "bicubic": ("bicubic", False), "bilinear": ("bilinear", False)}
"""Interpolation, and whether it is antialiased, see :func:`spatial_crops`."""
# Aspect ratios of a training crop, torchvision's and upstream's default.
ASPECT_RATIO = (3 / 4, 4 / 3)


Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def random_box(height: int, width: int, scale_min: float, rng: np.random.Generator) -> Box:
    """A box with at least ``scale_min`` of the picture's area and a random aspect ratio, as RandomResizedCrop draws."""
    low, high = np.log(ASPECT_RATIO)
    # As torchvision's, but from numpy's generator: all randomness of a sample is a function of (seed, epoch, index).
    for _ in range(10):
        area = height * width * rng.uniform(scale_min, 1.0)
        ratio = np.exp(rng.uniform(low, high))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # A very long or tall picture: the largest box of an allowed ratio in its middle.
    ratio = min(max(width / height, ASPECT_RATIO[0]), ASPECT_RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def crop(frames: np.ndarray, box: Box, size: int) -> Tensor:
    """Cut one box out of all frames and resize it: ``frames`` uint8 [T, H, W, 3] -> uint8 [3, T, size, size]."""
    top, left, height, width = box
    return _resize(frames[:, top : top + height, left : left + width], size, size)


def center_crop(frames: np.ndarray, size: int) -> Tensor:
    """Resize the short side to ``size`` and cut out the middle square.

    ``frames`` uint8 [T, H, W, 3] -> uint8 [3, T, size, size].
    """
    return spatial_crops(frames, size, 1)[0]


def spatial_crops(frames: np.ndarray, size: int, count: int, resize: str = "bicubic_antialias") -> Tensor:
    """Resize the short side to ``size``; cut ``count`` squares spread evenly along the long side, or the middle one.

    ``frames`` uint8 [T, H, W, 3] -> [count, 3, T, size, size], uint8 for *bicubic_antialias*. *bicubic* and *bilinear*
    are what torchvision before 0.17 made of float32 frames: no antialiasing, and float32 that is neither rounded nor
    kept within 0..255.
    """
    height, width = frames.shape[1:3]
    short = min(height, width)
    height, width = (int(size * side / short) for side in (height, width))
    shares = [0.5] if count == 1 else np.linspace(0, 1, count).tolist()
    # Half a pixel is rounded to even as torchvision's centre crop does, of several crops up, as LaViLa does.
    whole = round if count == 1 else math.ceil
    places = [(whole((height - size) * share), whole((width - size) * share)) for share in shares]
    # Resized once, then cut: crops overlap.
    resized = _resize(frames, height, width, resize)
    return torch.stack([resized[..., top : top + size, left : left + size] for top, left in places])


def flip(video: Tensor) -> Tensor:
    """Mirror left and right: [..., W] -> [..., W]. The caption must be mirrored too, see ``sides.swap_sides``."""
    return video.flip(-1)


def crop_boxes(boxes: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """Clip boxes of a ``height`` x ``width`` picture to the crop ``box``.

    ``boxes`` float32 [..., 4]: left, top, right, bottom as shares of the picture, NaN where there is none. The result
    is in shares of the crop, NaN also where nothing is left.
    """
    top, left, rows, columns = box
    corner, size = np.array([left, top] * 2), np.array([columns, rows] * 2)
    clipped = ((boxes * np.array([width, height] * 2) - corner) / size).clip(0, 1)
    is_empty = (clipped[..., 2:] <= clipped[..., :2]).any(axis=-1)
    return np.where(is_empty[..., None], np.nan, clipped).astype(np.float32)


def flip_boxes(boxes: np.ndarray) -> np.ndarray:
    """Mirror boxes [T, 3, 4] of left hand, right hand and object; the hands swap their rows too."""
    mirrored = boxes[:, [1, 0, 2]]
    return np.stack((1 - mirrored[..., 2], mirrored[..., 1], 1 - mirrored[..., 0], mirrored[..., 3]), axis=-1)


def normalise(video: Tensor, stats: ImageStats = IMAGE_STATS["clip"]) -> Tensor:
    """Normalise pixels 0..255 [B, 3, T, H, W], uint8 or float32 in any memory order -> contiguous float32.

    ``stats`` are the mean and deviation that a model's weights expect, its ``image_stats``. The result is on the same
    device.
    """
    scale, shift = _statistics(video.device, stats)
    pixels = video.to(torch.float32, memory_format=torch.contiguous_format).contiguous()
    # In place where there is a copy: a second buffer of this size costs more on a CPU than the arithmetic.
    return torch.addcmul(shift, pixels, scale, out=None if pixels is video else pixels)


@cache
def _statistics(device: torch.device, stats: ImageStats) -> tuple[Tensor, Tensor]:
    # Factor and offset per channel [3, 1, 1, 1]; cached by device, because a copy to it would wait for its queue.
    mean, std = torch.tensor(stats.mean, dtype=torch.float64), torch.tensor(stats.std, dtype=torch.float64)
    # One multiply-add per pixel instead of a division, a subtraction and a division; exact in float64 first.
    scale, shift = 1 / (255 * std), -mean / std
    return tuple(each.to(torch.float32).view(3, 1, 1, 1).to(device) for each in (scale, shift))  # type: ignore[return-value]


def _resize(frames: np.ndarray, height: int, width: int, resize: str = "bicubic_antialias") -> Tensor:
    """uint8 [T, H, W, 3] -> [3, T, height, width]; see :func:`spatial_crops` for ``resize``."""
    mode, antialias = RESIZES[resize]
    # A channels-last view: torchvision's integer kernel works on it as it is, nothing is copied first.
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    video = F.resize(
        video if antialias else video.float(), [height, width], InterpolationMode(mode), antialias=antialias
    )
    return video.transpose(0, 1)
