"""The published geometry filled by the golden recipe, and the golden numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benches.golden import golden_model, golden_schema, golden_tensors
from torch import Tensor

from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import DualEncoder, create_model

Filled = Callable[[ModelConfig], DualEncoder]
Golden = Callable[[str], dict[str, Tensor]]


@pytest.fixture(scope="session")
def filled() -> Filled:
    """Makes a model with the recipe's weights, in eval mode."""
    return golden_model


@pytest.fixture(scope="session")
def schema() -> dict[str, Any]:
    """Recipe, names and shapes, gradient norms."""
    return golden_schema()


@pytest.fixture(scope="session")
def clip_b16(filled: Filled) -> DualEncoder:
    """CLIP_VITB16, four frames, golden weights; shared by the tests, which must not change it."""
    return filled(ModelConfig(name="CLIP_VITB16", num_frames=4))


@pytest.fixture(scope="session")
def golden() -> Golden:
    """The tensors of a golden file by name."""
    return golden_tensors


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
