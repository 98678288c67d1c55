"""Shared fixtures: one small demo world, the real data of ``../shared``, and runs of the main programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from egohod.demo import make_world
from tests.support import ROOT, SHARED, Command, environment

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def demo_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo world of some 60 training, 9 validation and 15 test clips."""
    folder = tmp_path_factory.mktemp("demo") / "world"
    make_world(folder, seed=0, scale=0.03, workers=1)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real annotations and clips, which are not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("needs the real data in ../shared")
    return SHARED


@pytest.fixture
def program() -> Command:
    """Run ``python <program> <arguments>`` in the project and return what it said."""

    def run(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=environment(**more),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


@pytest.fixture
def tiny_config(demo_world: Path, tmp_path: Path) -> Path:
    """A configuration that trains the demo model on the small world for twelve steps of eight clips."""
    path = tmp_path / "tiny.yml"
    path.write_text(
        f"""
model: {{name: DEMO, num_frames: 4, patch_dropout: 0.25}}
data:
  train: {{demo: {{metadata: {demo_world}/train/hod.csv, root: {demo_world}/train/videos}}}}
  workers: 0
  flip: 0.0
  hard_negatives: {{share: 0.5, group_by: [video, noun, hand], group_size: 2}}
train:
  output: {tmp_path}/run
  duration: 12 steps
  global_batch_size: 8
  lr: 1e-3
  warmup: 3 steps
  schedule: cosine
  log_every: 1 steps
  save_every: 1000 steps
  keep_last: 10
evaluate: {{every: 1000 steps}}
"""
    )
    return path
