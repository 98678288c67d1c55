"""The golden numbers of ``tests/golden`` and the weights they were computed with, for tests and ``gpu_check``.

Numbers and activations were recorded from the original implementation in float32 on a CPU. Its weights are not stored:
each is filled from a generator that its name seeds (``recipe`` in clip_schema.json).
"""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import numpy as np
import torch
from _common import ROOT
from torch import Tensor

from egohod.errors import UserError
from egohod.loss.config import LossConfig
from egohod.model.checkpoints import from_tensors, load_weights
from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import DualEncoder, create_model

GOLDEN = ROOT / "tests" / "golden"
# The seed of the clips that went in.
SEED = 1234


def golden_model(config: ModelConfig) -> DualEncoder:
    """A model with the recipe's weights, in eval mode, on the CPU."""
    model = create_model(config, LossConfig(learn_temperature=True))
    values = {name: golden_value(name, value.shape) for name, value in model.state_dict().items()}
    load_weights(model, from_tensors("golden", values))
    return model.eval()


def golden_value(name: str, shape: torch.Size) -> Tensor:
    """What the recipe puts into the parameter of this name."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * 0.02
    if name == "logit_scale":
        return torch.tensor(math.log(1 / 0.07))
    module = name.split(".")[-2] if "." in name else ""
    if name.endswith(".gamma"):
        return 1 + noise
    return 1 + noise if module.startswith("ln_") and name.endswith(".weight") else noise


def golden_video(batch: int = 1, frames: int = 4) -> Tensor:
    """The clips that went in, float32 [batch, 3, frames, 224, 224]."""
    # Drawn on the CPU: another device's generator gives other numbers.
    return torch.randn(batch, 3, frames, 224, 224, generator=torch.Generator().manual_seed(SEED))


def golden_tensors(name: str) -> dict[str, Tensor]:
    """The tensors of a golden file by name."""
    if not GOLDEN.is_dir():
        raise UserError("a wheel has no recorded values to compare with (tests/golden): run gpu_check in a checkout")
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def golden_schema() -> dict[str, Any]:
    """Recipe, names and shapes, gradient norms."""
    return json.loads((GOLDEN / "clip_schema.json").read_text(encoding="utf-8"))
