"""Co-training of both paths as a run: it trains, resumes, and can train the adapters alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import main_pretrain
from tests.support import losses, newest

SLOWFAST = ["model.name=DEMO_Slowfast", "model.num_frames=8", "model.patch_dropout=0"]


def test_a_run_trains_every_adapter_and_resumes(tiny_config: Path, tmp_path: Path) -> None:
    command = ["--config_file", str(tiny_config), *SLOWFAST]
    assert main_pretrain.main([*command, "train.duration=4 steps", f"train.output={tmp_path}/straight"]) == 0
    assert main_pretrain.main([*command, "train.duration=2 steps"]) == 0
    before = newest(tmp_path / "run").weights
    assert main_pretrain.main([*command, "train.duration=4 steps"]) == 0
    assert losses(tmp_path / "run")[2:] == losses(tmp_path / "straight")[2:]
    after = newest(tmp_path / "run").weights
    adapters = [name for name in after if ".adapter." in name]
    assert len(adapters) == 4 * 9
    assert all(not torch.equal(before[name], after[name]) for name in adapters)


def test_adapters_alone(tiny_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = ["--config_file", str(tiny_config), *SLOWFAST, "train.duration=1 steps", "train.trainable=adapters"]
    caplog.set_level(logging.INFO)
    assert main_pretrain.main(command) == 0
    assert " of 7.7 M parameters learn" in caplog.text
    first = newest(tmp_path / "run").weights
    assert main_pretrain.main([*command, "train.duration=3 steps"]) == 0
    second = newest(tmp_path / "run").weights
    learned = {name for name in first if not torch.equal(first[name], second[name])}
    kinds = (".adapter.", "temporal_embedding", "_projection")
    assert learned
    assert all(any(kind in name for kind in kinds) for name in learned), learned
    with pytest.raises(ValueError, match=r"trainable=adapters needs a \.\.\._Slowfast model; model.name is DEMO"):
        main_pretrain.main([*command, "model.name=DEMO"])
