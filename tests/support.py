"""What several tests share: where things are, child processes, reading a run folder."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from egohod.training.checkpoint import Checkpoint, CheckpointStore

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**more: str) -> dict[str, str]:
    """The environment of a child process: this project importable, one thread, no GPU, no foreign ranks."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def newest(run: Path) -> Checkpoint:
    checkpoint = CheckpointStore(run).newest()
    assert checkpoint is not None
    return checkpoint


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(each["step"], each["train/loss"], each["train/grad_norm"]) for each in lines if "train/loss" in each]
