"""A small run of the HOD pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hod.runs import command, head


@pytest.fixture
def few(demo_world: Path, tmp_path: Path) -> list[str]:
    """Arguments for the first ten clips of the demo world, small and quick."""
    return command(demo_world, tmp_path, head(demo_world, 10))
