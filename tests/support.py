"""What several tests share: where things are, child processes, reading a run folder."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from egohod.training.checkpoint import Checkpoint, CheckpointStore

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**more: str) -> dict[str, str]:
    """The environment of a child process: this project importable, one thread, no GPU, no foreign ranks."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def write_tiny_config(folder: Path, world: Path) -> Path:
    """See the fixture ``tiny_config``. The same arithmetic on every machine, whatever it computes fast.

    How many clips fit the memory is not worked out, which takes longer than a few steps do.
    """
    path = folder / "tiny.yml"
    path.write_text(
        f"""
model: {{name: DEMO, num_frames: 4, patch_dropout: 0.25}}
data:
  train: {{demo: {{metadata: {world}/train/hod.csv, root: {world}/train/videos}}}}
  workers: 0
  flip: 0.0
  hard_negatives: {{share: 0.5, group_by: [video, noun, hand], group_size: 2}}
train:
  output: {folder}/run
  duration: 12 steps
  global_batch_size: 8
  max_batch_per_process: 64
  precision: fp32
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


@dataclass(frozen=True)
class ShortRun:
    """See the fixture ``short_run``."""

    folder: Path
    command: list[str]


def newest(run: Path) -> Checkpoint:
    checkpoint = CheckpointStore(run).newest()
    assert checkpoint is not None
    return checkpoint


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(each["step"], each["train/loss"], each["train/grad_norm"]) for each in lines if "train/loss" in each]
