"""The split that the evaluation tests run on, in every format."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from egohod.demo.benchmarks import write_benchmarks


@pytest.fixture(scope="session")
def world(demo_world: Path) -> Path:
    """The test split of the small demo world."""
    return demo_world / "test"


@pytest.fixture(scope="session")
def formats(demo_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same split with ``benchmarks/``, in a copy of its own."""
    copy = tmp_path_factory.mktemp("formats") / "world"
    shutil.copytree(demo_world, copy)
    assert write_benchmarks(copy)
    assert not write_benchmarks(copy)
    return copy / "test"
