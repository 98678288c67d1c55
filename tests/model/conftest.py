"""The published geometry filled by the golden recipe, and the golden numbers."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from egohod.loss.config import LossConfig
from egohod.model.checkpoints import from_tensors, load_weights
from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import DualEncoder, create_model

GOLDEN = Path(__file__).parents[1] / "golden"


Filled = Callable[[ModelConfig], DualEncoder]
Golden = Callable[[str], dict[str, Tensor]]


def golden_value(name: str, shape: torch.Size) -> Tensor:
    """What the recipe puts into the parameter of this name."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * 0.02
    if name == "logit_scale":
        return torch.tensor(math.log(1 / 0.07))
    module = name.split(".")[-2] if "." in name else ""
    if name.endswith(".gamma"):
        return 1 + noise
    return 1 + noise if module.startswith("ln_") and name.endswith(".weight") else noise


@pytest.fixture(scope="session")
def filled() -> Filled:
    """Makes a model with the recipe's weights, in eval mode."""

    def build(config: ModelConfig) -> DualEncoder:
        model = create_model(config, LossConfig(learn_temperature=True))
        values = {name: golden_value(name, value.shape) for name, value in model.state_dict().items()}
        load_weights(model, from_tensors("golden", values))
        return model.eval()

    return build


@pytest.fixture(scope="session")
def schema() -> dict[str, Any]:
    """Recipe, names and shapes, gradient norms."""
    return json.loads((GOLDEN / "clip_schema.json").read_text())


@pytest.fixture(scope="session")
def clip_b16(filled: Filled) -> DualEncoder:
    """CLIP_VITB16, four frames, golden weights; shared by the tests, which must not change it."""
    return filled(ModelConfig(name="CLIP_VITB16", num_frames=4))


@pytest.fixture(scope="session")
def golden() -> Golden:
    """The tensors of a golden file by name."""

    def read(name: str) -> dict[str, Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return {key: torch.from_numpy(file[key]) for key in file}

    return read


@pytest.fixture
def demo_model() -> DualEncoder:
    """The demo geometry with eight frames and a temporal embedding that tells them apart."""
    torch.manual_seed(0)
    return create_model(ModelConfig(name="DEMO", num_frames=8, temporal_init="sinusoidal"))


@pytest.fixture
def clips(demo_model: DualEncoder) -> Tensor:
    """Three random clips of the demo geometry."""
    size = demo_model.geometry.image_size
    return torch.randn(3, 3, 8, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens() -> Tensor:
    """Three short texts, cut off at sixteen tokens."""
    texts = torch.randint(1, 49000, (3, 16), generator=torch.Generator().manual_seed(2))
    for text, length in zip(texts, (4, 15, 9), strict=True):
        text[length], text[length + 1 :] = 49407, 0
    return texts
