"""Opposite captions as part of a run: they separate the text tower, resume exactly, and are refused where none is."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch

import main_pretrain
from egohod.errors import UserError
from tests.support import losses, newest

TERMS = ["loss.opposites=1", "loss.separation=2"]


def test_a_run_separates_opposites_and_resumes_exactly(
    tiny_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ["--config_file", str(tiny_config), *TERMS, "loss.opposites_schedule=linear", "data.flip=0.5"]
    command += ["loss.opposites_hold=0.2", "train.max_batch_per_process=4", "train.save_every=8 steps"]
    caplog.set_level(logging.INFO)
    assert main_pretrain.main([*command, f"train.output={tmp_path}/straight"]) == 0
    # All verbs of the demo but two have an opposite.
    assert "train/hod.csv: 90 % of the captions have an opposite" in caplog.text
    middle = tmp_path / "straight" / "checkpoints" / "step-00000008"
    assert main_pretrain.main([*command, "--resume", str(middle)]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")[8:]
    for name, weight in newest(tmp_path / "straight").weights.items():
        assert torch.equal(weight, newest(tmp_path / "run").weights[name]), name
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    cosines = [line["train/opposite_cosine"] for line in lines if "train/opposite_cosine" in line]
    assert cosines[0] > 0.8
    assert cosines[-1] < cosines[0] - 0.01
    assert all(0 <= line["train/opposite_accuracy"] <= 1 for line in lines if "train/opposite_accuracy" in line)
    # A checkpoint of other weights, of another schedule of them or of other opposites is another run.
    for other, was in (
        ("loss.opposites=0.5", "loss.opposites=1"),
        ("loss.separation_margin=0.5", "loss.separation_margin=its default"),
        ("loss.opposites_schedule=cosine", "loss.opposites_schedule=linear"),
        ("loss.opposites_hold=0.3", "loss.opposites_hold=0.2"),
        ("loss.opposites_end=0.1", "loss.opposites_end=its default"),
        ("data.train.demo.opposite_column=verb", "data.train.demo.opposite_column=its default"),
    ):
        with pytest.raises(UserError, match=re.escape(was)):
            main_pretrain.main([*command, other, "--resume", str(middle)])


def test_captions_without_opposites_and_missing_columns_are_refused(tiny_config: Path, demo_world: Path) -> None:
    command = ["--config_file", str(tiny_config), *TERMS]
    # Coarse narrations name no direction.
    coarse = demo_world / "train" / "narrations.csv"
    with pytest.raises(UserError, match=r"narrations\.csv: no caption has an opposite"):
        main_pretrain.main([*command, f"data.train.demo.metadata={coarse}"])
    with pytest.raises(UserError, match=r"hod\.csv: no column 'reversed' for opposite_column; there are video_id"):
        main_pretrain.main([*command, "data.train.demo.opposite_column=reversed"])
    # The captions themselves are no opposites.
    with pytest.raises(UserError, match=r"hod\.csv: no caption has an opposite"):
        main_pretrain.main([*command, "data.train.demo.opposite_column=text"])


def test_a_column_without_a_weight_is_reported(tiny_config: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = ["--config_file", str(tiny_config), "data.train.demo.opposite_column=action", "train.duration=1 steps"]
    assert main_pretrain.main(command) == 0
    assert "data.train.demo.opposite_column does nothing while loss.opposites is 0" in caplog.text


def test_a_run_with_replacements_resumes_exactly(
    tiny_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ["--config_file", str(tiny_config), "loss.name=egonce_pp", "loss.replacements=3", "data.flip=0.5"]
    command += ["data.train.demo.tag_columns=[verb,noun]", "train.max_batch_per_process=4", "train.save_every=8 steps"]
    caplog.set_level(logging.INFO)
    assert main_pretrain.main([*command, f"train.output={tmp_path}/straight"]) == 0
    for what in ("a verb and a noun", "a replacement of the verb"):
        assert f"train/hod.csv: 100 % of the captions have {what}" in caplog.text
    middle = tmp_path / "straight" / "checkpoints" / "step-00000008"
    assert main_pretrain.main([*command, "--resume", str(middle)]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")[8:]
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["train/replaced_accuracy"] <= 1 for line in lines if "train/replaced_accuracy" in line)
    assert "train/replaced_accuracy" in lines[-1]
    for other, was in (
        ("loss.replacements=2", "loss.replacements=3"),
        ("data.train.demo.tag_columns=[]", "data.train.demo.tag_columns=['verb', 'noun']"),
    ):
        with pytest.raises(UserError, match=re.escape(was)):
            main_pretrain.main([*command, other, "--resume", str(middle)])


def test_tags_that_are_missing_are_refused_and_unused_ones_reported(
    tiny_config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ["--config_file", str(tiny_config), "train.duration=1 steps", "data.train.demo.tag_columns=[verb,tool]"]
    with pytest.raises(UserError, match=r"hod\.csv: no column 'tool' for tag_columns; there are video_id"):
        main_pretrain.main([*command, "loss.name=egonce"])
    assert main_pretrain.main([*command, "data.train.demo.tag_columns=[verb,noun]"]) == 0
    assert "data.train.demo.tag_columns does nothing with loss.name=infonce" in caplog.text
