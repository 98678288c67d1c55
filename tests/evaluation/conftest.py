"""The split that the evaluation tests run on."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def world(demo_world: Path) -> Path:
    """The test split of the small demo world."""
    return demo_world / "test"
