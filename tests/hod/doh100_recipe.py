"""Weights and pictures of the goldens of the 100DOH detector, from numbers alone.

The goldens were made by the original's code with these weights, since the published ones may not be stored here.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden"
PICTURES = {"a": (240, 320, 1), "b": (256, 456, 2)}
"""Height, width and seed."""

# He's standard deviation times this, by how a name ends; and what is added to 0.02 times noise.
_GAINS = {
    "RCNN_base.0.weight": 1 / 64,
    "conv3.weight": 0.3,
    "downsample.0.weight": 0.7,
    "RPN_cls_score.weight": 0.4,
    "RPN_bbox_pred.weight": 0.1,
    "RCNN_cls_score.weight": 4.0,
    "RCNN_bbox_pred.weight": 0.3,
    "hand_contact_state_layer.3.weight": 2.0,
}
_BIASES = {
    "RCNN_cls_score.bias": [2.9, 4.2, -8.9],
    "extension_layer.hand_contact_state_layer.3.bias": [-2.6, 0.45, 2.5, -0.45, -1.3],
    "extension_layer.hand_dydx_layer.bias": [-0.95, 0.07, -0.87],
    "extension_layer.hand_lr_layer.bias": [-1.6],
}


def shapes() -> dict[str, list[int]]:
    """Every name of a checkpoint's state dict with its shape."""
    return json.loads((GOLDEN / "doh100_schema.json").read_text())  # type: ignore[no-any-return]


def noise(name: str, shape: tuple[int, ...] | list[int]) -> np.ndarray:
    """Standard normal numbers that follow from a name."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))


def weight(name: str, shape: list[int]) -> torch.Tensor:
    """The weight of that name."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    n = noise(name, shape)
    if name.endswith("running_var"):
        n = 1 + 0.1 * np.abs(n)
    elif name.endswith("running_mean"):
        n = 0.1 * n
    elif name.endswith(".bias"):
        n = 0.02 * n + np.asarray(_BIASES.get(name, 0.0))
    elif len(shape) == 1:
        n = 1 + 0.02 * n
    else:
        gain = next((gain for end, gain in _GAINS.items() if name.endswith(end)), 1.0)
        n = float(np.sqrt(2 / np.prod(shape[1:]))) * gain * n
    return torch.from_numpy(np.asarray(n).astype(np.float32))


def picture(name: str) -> np.ndarray:
    """The picture of that name, uint8 RGB [H, W, 3]: ramps, squares and noise under two ellipses and two boxes."""
    height, width, seed = PICTURES[name]
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    planes = []
    for c in range(3):
        ramp = (x * (90 + 30 * c)) // width + (y * (110 - 30 * c)) // height + 30
        mixed = (x * 73856093) ^ (y * 19349663) ^ ((c + 1) * 83492791) ^ (seed * 2654435761)
        planes.append(ramp + ((x // 20 + y // 20) % 2) * 40 + (mixed >> 7 & 15))
    bgr = np.stack(planes, axis=-1)
    for cx, cy, rx, ry, colour in (
        (width * 3 // 10, height * 6 // 10, width // 9, height // 6, (110, 140, 200)),
        (width * 7 // 10 - 5 * seed, height * 55 // 100, width // 11, height // 5, (100, 130, 190)),
    ):
        inside = (x - cx) ** 2 * ry * ry + (y - cy) ** 2 * rx * rx <= rx * rx * ry * ry
        bgr[inside] = np.array(colour) + ((x * 3 + y * 5) % 23)[inside][:, None]
    for left, top, right, bottom, colour in (
        (width * 4 // 10, height * 5 // 10 + 3 * seed, width * 55 // 100, height * 8 // 10, (200, 60, 20)),
        (width * 75 // 100, height * 2 // 10, width * 9 // 10, height * 45 // 100, (30, 180, 60)),
    ):
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        bgr[inside] = np.array(colour) + (((x // 4 + y // 6) % 2) * 30)[inside][:, None]
    return np.ascontiguousarray(np.clip(bgr, 0, 255).astype(np.uint8)[..., ::-1])
