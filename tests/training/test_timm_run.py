"""Towers on timm's backbones as a run: the demo's configs train, resume exactly, and what they save is evaluated."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import egohod
import main_eval
import main_pretrain
from egohod.config import load
from tests.support import ROOT, losses, newest
from tests.training.test_resume import assert_same


@pytest.mark.ci
@pytest.mark.parametrize("family", ["vit", "eva"])
def test_a_timm_tower_trains_resumes_and_is_evaluated_and_loaded(
    family: str, demo_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMO_DATA", str(demo_world))
    config = ["--config_file", str(ROOT / "configs" / f"demo_timm_{family}.yml"), "data.workers=0"]
    command = [*config, "model.num_frames=4", "train.global_batch_size=8", "train.max_batch_per_process=8"]
    command += ["train.warmup=2 steps", "train.log_every=1 steps", "evaluate.during=[]", "evaluate.final=[]"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert main_pretrain.main([*command, "train.duration=4 steps", f"train.output={straight}"]) == 0
    assert main_pretrain.main([*command, "train.duration=2 steps", f"train.output={broken}"]) == 0
    before = newest(broken).weights
    assert main_pretrain.main([*command, "train.duration=4 steps", f"train.output={broken}"]) == 0
    one, other = newest(straight), newest(broken)
    assert losses(broken) == losses(straight)
    assert_same(one.weights, other.weights)
    assert_same(one.training, other.training)
    # No part of the backbone is left out of the graph.
    assert not [name for name, value in before.items() if torch.equal(value, other.weights[name])]

    # The checkpoint says which backbone it holds, also where the configuration names another model.
    evaluation = ["--config_file", str(ROOT / "configs" / "demo.yml"), "data.workers=0", "evaluate.cache=null"]
    evaluation += ["--checkpoint", str(broken), "--benchmark", "test", "--output", f"{tmp_path}/results"]
    assert main_eval.main(evaluation) == 0
    details = json.loads((tmp_path / "results" / "details" / "test.json").read_text())
    (choice,) = (table for table in details["tables"] if table["kind"] == "multiple_choice")
    model, preprocess, tokenizer = egohod.create_model_and_transforms(load(config[1]).model.name, broken)
    with (demo_world / "test" / "hod.csv").open() as file:
        clip = next(csv.DictReader(file))
    video = demo_world / "test" / "videos" / clip["video_id"] / "0000.mp4"
    pictures = egohod.load_clip(video, float(clip["start_second"]), float(clip["end_second"]), 4)
    questions = [each for each in choice["questions"] if each["query_is_clip"] and each["query"] == 0]
    texts = [choice["texts"][number] for each in questions for number in each["choices"]]
    with torch.no_grad():
        similarity = model.encode_text(tokenizer(texts)) @ model.encode_video(preprocess(pictures)[None])[0]
    # The details have four digits.
    expected = torch.tensor([value for each in questions for value in each["similarity"]])
    torch.testing.assert_close(similarity, expected, atol=1e-4, rtol=0)
