"""Co-training of both paths as a run: it trains, resumes, in two stages, in two processes, and the adapters alone."""

from __future__ import annotations

import csv
import json
import logging
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import main_eval
import main_pretrain
from egohod.config import load
from egohod.errors import UserError
from egohod.model.config import FastPathConfig, ModelConfig
from egohod.model.dual_encoder import EgoVideo, create_model
from egohod.training.build import build_dataset
from egohod.training.checkpoint import read
from tests.support import ROOT, losses, newest

SLOWFAST = ["model.name=DEMO_Slowfast", "model.num_frames=8", "model.patch_dropout=0"]


def test_a_run_trains_every_adapter_and_resumes(tiny_config: Path, tmp_path: Path) -> None:
    command = ["--config_file", str(tiny_config), *SLOWFAST]
    assert main_pretrain.main([*command, "train.duration=3 steps", f"train.output={tmp_path}/straight"]) == 0
    assert main_pretrain.main([*command, "train.duration=2 steps"]) == 0
    before = newest(tmp_path / "run").weights
    assert main_pretrain.main([*command, "train.duration=3 steps"]) == 0
    assert losses(tmp_path / "run")[2:] == losses(tmp_path / "straight")[2:]
    after = newest(tmp_path / "run").weights
    adapters = [name for name in after if ".adapter." in name]
    assert len(adapters) == 4 * 9
    assert all(not torch.equal(before[name], after[name]) for name in adapters)


def test_the_slow_path_is_trained_on_every_nth_step_and_resumes(tiny_config: Path, tmp_path: Path) -> None:
    command = ["--config_file", str(tiny_config), *SLOWFAST, "model.fast.slow_every=3", "train.save_every=1 steps"]
    command += ["train.keep_last=5"]
    assert main_pretrain.main([*command, "train.duration=5 steps", f"train.output={tmp_path}/straight"]) == 0
    weights = [read(tmp_path / "straight" / "checkpoints" / f"step-{step:08d}").weights for step in range(1, 6)]
    backbone = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    changes = {
        name: [not torch.equal(before[name], after[name]) for before, after in pairwise(weights)]
        for name in (backbone, backbone.replace("mlp.c_fc", "adapter.down_proj"), "visual.conv1.weight")
    }
    # Steps 1 and 4 train it: neither momentum nor decay moves it in between.
    assert changes.pop(backbone) == [False, False, True, False]
    assert all(all(each) for each in changes.values()), changes
    for start in (2, 3):
        middle = tmp_path / "straight" / "checkpoints" / f"step-{start:08d}"
        resumed = tmp_path / f"resumed{start}"
        assert (
            main_pretrain.main([*command, "train.duration=5 steps", f"train.output={resumed}", "--resume", str(middle)])
            == 0
        )
        assert losses(resumed) == losses(tmp_path / "straight")[start:]
        for name, weight in newest(resumed).weights.items():
            assert torch.equal(weight, weights[-1][name]), name
    with pytest.raises(UserError, match=r"model\.fast\.slow_every=3, this run has its default"):
        main_pretrain.main([*command, "model.fast.slow_every=1", "--resume", str(middle)])


def test_adapters_alone(tiny_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = ["--config_file", str(tiny_config), *SLOWFAST, "train.duration=1 steps", "train.trainable=adapters"]
    caplog.set_level(logging.INFO)
    assert main_pretrain.main(command) == 0
    assert " of 7.7 M parameters are trainable" in caplog.text
    first = newest(tmp_path / "run").weights
    assert main_pretrain.main([*command, "train.duration=3 steps"]) == 0
    second = newest(tmp_path / "run").weights
    learned = {name for name in first if not torch.equal(first[name], second[name])}
    kinds = (".adapter.", "temporal_embedding", "_projection")
    assert learned
    assert all(any(kind in name for kind in kinds) for name in learned), learned
    with pytest.raises(ValueError, match=r"trainable=adapters needs a \.\.\._Slowfast model; model.name is DEMO"):
        main_pretrain.main([*command, "model.name=DEMO"])


def test_two_stages(tiny_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Co-training starts from a dual encoder's run, and reports what it took and what starts anew."""
    command = ["--config_file", str(tiny_config), "train.duration=1 steps", "model.patch_dropout=0"]
    assert main_pretrain.main(command) == 0
    start = ["model.weights.source=checkpoint", f"model.weights.path={tmp_path}/run", f"train.output={tmp_path}/two"]
    with pytest.raises(UserError, match=r"it lacks the motion adapters .*; model\.weights\.adapt=true starts them"):
        main_pretrain.main([*command, *SLOWFAST, *start])
    assert not list((tmp_path / "two").glob("checkpoints/*")), "nothing of a run that did not start"
    caplog.set_level(logging.INFO)
    assert main_pretrain.main([*command, *SLOWFAST, *start, "model.weights.adapt=true"]) == 0
    assert "resized: visual.temporal_embedding [4, 128] -> [8, 128]" in caplog.text
    assert "(the file has no motion adapters)" in caplog.text
    assert "slowfast_projection (the file has no merge of the two paths)" in caplog.text
    first, second = (newest(tmp_path / name).weights for name in ("run", "two"))
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert (first[name] - second[name]).abs().max() < 2e-3, "one step away from where the first stage ended"
    again = [*command, *SLOWFAST, *start[:1], f"model.weights.path={tmp_path}/two", f"train.output={tmp_path}/three"]
    for knob in ("model.activation=quick_gelu", "model.fast.position=after", "model.fast.pool=both"):
        key, _, here = knob.partition("=")
        with pytest.raises(UserError, match=rf"they were trained with {key}=\w+, not {here}"):
            main_pretrain.main([*again, knob])


def test_the_demo_config_trains_and_ends_with_the_table(
    demo_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMO_DATA", str(demo_world))
    small = ["train.duration=2 steps", "train.global_batch_size=8", "train.warmup=1 steps", "data.workers=0"]
    config = str(ROOT / "configs" / "demo_egovideo.yml")
    assert main_pretrain.main(["--config_file", config, *small, f"train.output={tmp_path}/run"]) == 0
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    shown = {"motion_state_changing", "motion_transient", "choice_across_clips"}
    assert {f"test/{control}{name}" for name in shown for control in ("", "shuffle/", "freeze/")} <= metrics.keys()


def test_a_clip_shorter_than_the_fast_frames_shows_some_twice(
    demo_world: Path, tiny_config: Path, tmp_path: Path
) -> None:
    with (demo_world / "train" / "hod.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["end_second"] = str(float(row["start_second"]) + 0.2)
    with (tmp_path / "short.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    overrides = [*SLOWFAST, f"data.train.demo.metadata={tmp_path}/short.csv", "train.duration=1 steps"]
    video = build_dataset(load(tiny_config, overrides), 40)[(0, 0)]["video"]
    assert video.shape[1] == 8
    assert len(video.transpose(0, 1).flatten(1).unique(dim=0)) < 8
    assert main_pretrain.main(["--config_file", str(tiny_config), *overrides]) == 0


CASES = {
    **{"before cls": False, "after both": False, "after cls": False, "before mean": True},
    **{"before cls fast": True, "after both both": False},
}
"""Arrangement, with paths of a motion stem if it has one, and whether only the adapters and the stem learn."""


def slowfast(case: str) -> EgoVideo:
    position, pool, *stem = case.split()
    torch.manual_seed(0)
    fast = FastPathConfig(slow_frames=2, position=position, pool=pool, stem_paths=stem[0] if stem else "fast")
    # Recomputing blocks under DistributedDataParallel is part of what is tested.
    config = ModelConfig(
        name="DEMO_Slowfast",
        num_frames=4,
        fast=fast,
        motion_stem=8 if stem else None,
        checkpoint_blocks="all" if pool == "both" else "none",
    )
    model = create_model(config)
    assert isinstance(model, EgoVideo)
    for block in model.visual.transformer.resblocks:
        torch.nn.init.normal_(block.adapter.up_proj.weight, std=0.02)
    if model.visual.motion_stem is not None:
        torch.nn.init.normal_(model.visual.motion_stem.project.weight, std=0.1)
    if CASES[case]:
        model.freeze("adapters")
    return model


def share(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.tensor([[49406, 320 + rank, 49407]])
    return torch.randn(1, 3, 4, 40, 40, generator=generator), tokens


def loss(output: dict[str, Tensor]) -> Tensor:
    return (output["video_features"] * output["text_features"]).sum(dim=1).mean()


def in_two_processes(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for case in CASES:
        model = slowfast(case)
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        for _ in range(2):  # a parameter that never gets a gradient is noticed in the second step
            parallel.zero_grad()
            loss(parallel(*share(rank))).backward()
        torch.save(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, folder / f"{case}{rank}"
        )
    dist.destroy_process_group()


@pytest.mark.ci
def test_two_processes_give_the_mean_gradient_and_no_parameter_is_unused(tmp_path: Path) -> None:
    mp.spawn(in_two_processes, (tmp_path,), nprocs=2)
    for case in CASES:
        model = slowfast(case)
        sum(loss(model(*share(rank))) / 2 for rank in (0, 1)).backward()  # type: ignore[union-attr]
        for rank in (0, 1):
            gradients = torch.load(tmp_path / f"{case}{rank}", weights_only=True)
            assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
            for name, gradient in gradients.items():
                expected = model.get_parameter(name).grad
                torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4, msg=f"{case}: {name}")


def test_boxes_are_learned_as_part_of_a_run_and_go_without_notice(
    tiny_config: Path, demo_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detections = f"data.train.demo.detections={demo_world}/train/detections.parquet"
    command = ["--config_file", str(tiny_config), *SLOWFAST, detections]
    assert main_pretrain.main([*command, "loss.boxes=5", "train.duration=12 steps"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    errors = [line["train/box_error"] for line in lines if "train/box_error" in line]
    assert sum(errors[-3:]) < 0.8 * sum(errors[:3])
    # The head only trains: a model without one takes the rest over.
    weights = ["model.weights.source=checkpoint", f"model.weights.path={tmp_path}/run"]
    caplog.set_level(logging.INFO)
    assert main_pretrain.main([*command, *weights, "train.duration=1 steps", f"train.output={tmp_path}/after"]) == 0
    assert "the model has no head of the box loss" in caplog.text
    assert "data.train.demo.detections does nothing while loss.boxes is 0" in caplog.text
    # And so does an evaluation, whose configuration has no boxes to learn from.
    evaluation = [
        "--config_file",
        str(tiny_config),
        "--checkpoint",
        f"{tmp_path}/run",
        "--output",
        f"{tmp_path}/results",
    ]
    assert main_eval.main([*evaluation, f"evaluate.demo_test={demo_world}/test", "evaluate.cache=null"]) == 0
