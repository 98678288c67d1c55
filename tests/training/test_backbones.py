"""Backbones of timm in runs: exact resume, loading by folder, timm's own files, and the recipes' dry runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import egohod
import main_pretrain
from egohod.config import load_leniently
from egohod.errors import UserError
from egohod.model.checkpoints import Family, read_weights
from egohod.model.config import geometry
from tests.model.field_files import open_clip_state, write_safetensors
from tests.model.test_timm_vision import FAMILIES
from tests.support import ROOT, Command, losses, newest
from tests.training.test_resume import assert_same
from tools.convert_checkpoint import inspect

TINY = ["model.image_size=40", "model.backbone.patch_size=8", "model.backbone.embed_dim=64", "model.backbone.depth=2"]
TINY += ["model.backbone.num_heads=2"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_base_patch16_siglip_224", ["model.num_frames=5", "train.max_batch_per_process=4"]),
        (
            "eva02_base_patch16_clip_224_Slowfast",
            ["model.num_frames=8", "model.rope_time=true", "train.trainable=lora"],
        ),
        ("vit_base_patch16_dinov3", ["model.backbone.global_pool=token", "train.ema=0.9", "model.motion_stem=4"]),
    ],
)
def test_a_resumed_run_is_exact_and_its_folder_is_the_whole_model(
    name: str, settings: list[str], tiny_config: Path, tmp_path: Path
) -> None:
    command = ["--config_file", str(tiny_config), f"model.name=timm/{name}", *TINY, *settings]
    straight, broken = tmp_path / "straight", tmp_path / "run"
    assert main_pretrain.main([*command, "train.duration=3 steps", f"train.output={straight}"]) == 0
    assert main_pretrain.main([*command, "train.duration=2 steps"]) == 0
    assert main_pretrain.main([*command, "train.duration=3 steps"]) == 0
    assert losses(broken)[2:] == losses(straight)[2:]
    one, other = newest(straight), newest(broken)
    assert_same(one.weights, other.weights)
    assert_same(one.training, other.training)
    # Sizes, pooling and rotations come from the folder, not from the caller.
    model, preprocess, _ = egohod.create_model_and_transforms(f"timm/{name}", broken)
    assert (model.geometry.image_size, model.geometry.vision_width, model.geometry.vision_layers) == (40, 64, 2)
    assert model.image_stats == geometry(f"timm/{name}").image_stats
    if "train.trainable=lora" not in settings:  # whose products are added to the weights
        for key, value in model.state_dict().items():
            assert torch.equal(value, one.weights[key]), key
    video = preprocess(torch.zeros(model.num_frames, 60, 48, 3, dtype=torch.uint8).numpy())
    again = egohod.create_model_and_transforms(f"timm/{name}", straight)[0]
    with torch.no_grad():
        assert torch.equal(model.encode_video(video[None]), again.encode_video(video[None]))


def of_timm(family: str, **options: Any) -> dict[str, Tensor]:
    """A state dict as timm publishes it, with a classifier where the family has one."""
    name, arguments, side = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=side, **({"num_classes": 3} | arguments | options))
    state: dict[str, Tensor] = model.state_dict()
    return state


@pytest.mark.parametrize("kind", ["safetensors", "pth", "module.", "_orig_mod.module.", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_timms_own_files_start_a_run(family: str, kind: str, tmp_path: Path) -> None:
    state, path = of_timm(family), tmp_path / "timm.pth"
    if kind == "bfloat16":
        state = {name: value.bfloat16() for name, value in state.items()}
    if kind in ("safetensors", "bfloat16"):
        save_file(state, path := tmp_path / "model.safetensors")
    elif kind == "pth":
        torch.save(state, path)
    else:
        torch.save({"state_dict": {kind + name: value for name, value in state.items()}, "epoch": 3}, path)
    name, arguments, side = FAMILIES[family]
    model = egohod.create_model(f"timm/{name}", image_size=side, backbone=arguments)
    report = egohod.load_weights(model, path)
    assert report.family is Family.TIMM
    assert {*report.dropped} == {name for name in state if name.startswith("head.")}
    weights = {name.replace("blocks.", "transformer.resblocks.", 1): value for name, value in state.items()}
    taken = {name.removeprefix("visual.") for name in report.taken}
    assert taken == weights.keys() - report.dropped.keys()
    for name in taken:
        assert torch.equal(model.visual.state_dict()[name], weights[name].float()), name
    fresh = {name for name in report.missing if name.startswith("visual.")}
    assert fresh == {"visual.temporal_embedding", "visual.image_projection"}
    assert all(name in report.missing for name in ("textual.token_embedding.weight", "logit_scale"))
    assert "text tower and projections are random" in report.notes[-1]


def test_files_of_another_backbone_are_refused(tmp_path: Path) -> None:
    save_file(of_timm("siglip"), path := tmp_path / "model.safetensors")
    name, arguments, side = FAMILIES["plain"]
    model = egohod.create_model(f"timm/{name}", image_size=side, backbone=arguments)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"do not fit the model \(timm/vit_base_patch16_clip_224"):
        egohod.load_weights(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert read_weights(path).shape is None


def test_our_files_name_their_backbone_and_its_rotation_by_time(tmp_path: Path) -> None:
    name, arguments, side = FAMILIES["eva02"]
    knobs = {"image_size": side, "backbone": arguments}
    model = egohod.create_model(f"timm/{name}", rope_time=True, **knobs)
    record = {"model.name": f"timm/{name}", "model.rope_time": True, "model.image_size": side}
    settings = json.dumps(record | {"model.backbone": arguments})
    save_file(model.state_dict(), path := tmp_path / "own.safetensors", {"family": Family.OURS, "settings": settings})
    egohod.load_weights(model, path)
    # No shape differs.
    with pytest.raises(UserError, match=r"model\.rope_time=True, not False"):
        egohod.load_weights(egohod.create_model(f"timm/{name}", **knobs), path)
    knobs["backbone"] = arguments | {"global_pool": "avg"}
    with pytest.raises(UserError, match=r"with model\.backbone=\{.*\}, not \{.*'global_pool': 'avg'"):
        egohod.load_weights(egohod.create_model(f"timm/{name}", rope_time=True, **knobs), path)
    with pytest.raises(UserError, match=rf"do not fit the model \(DEMO.*\): they are of model\.name=timm/{name};"):
        egohod.load_weights(egohod.create_model("DEMO"), path)
    assert inspect(read_weights(path))["model"].startswith(f"model.name=timm/{name}, model.rope_time=True, ")


@pytest.mark.parametrize("config", ["siglip2_base", "eva02_base", "pe_base", "dinov3_base", "clip_base_lora"])
def test_a_dry_run_of_a_recipe_of_each_family_is_ready(
    config: str, demo_world: Path, tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backbone of few channels, whose file is timm's own."""
    path = ROOT / "configs" / "config" / f"{config}.yml"
    monkeypatch.setenv("HOD_CSV", str(demo_world / "train" / "hod.csv"))
    monkeypatch.setenv("EGO4D_ROOT", str(demo_world / "train" / "videos"))
    monkeypatch.setenv("CLIP_WEIGHTS", str(tmp_path / "model.safetensors"))
    command = ["--config_file", path, "train.global_batch_size=8", "data.workers=0"]
    if config == "clip_base_lora":
        name = "DEMO"
        write_safetensors(tmp_path / "model.safetensors", open_clip_state(geometry(name)))
        command += [f"model.name={name}"]
    else:
        cfg, _ = load_leniently(path, TINY)
        options = dict(cfg.model.geometry().backbone_options)
        name = cfg.model.name.removeprefix("timm/")
        save_file(timm.create_model(name, **options).state_dict(), tmp_path / "model.safetensors")
        command += TINY
    done = inside("main_pretrain.py", *command, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "ready to run" in done.stderr
    assert f"{name} from clip:" in done.stderr
    assert math.isfinite(float(done.stderr.split("loss ")[-1].split()[0]))
    if config == "clip_base_lora":
        whole = inside("main_pretrain.py", *command, "train.trainable=all", "--dry_run")
        low, full = (re.search(r"([\d.]+) GFLOP a clip", each.stderr) for each in (done, whole))
        assert low
        assert full
        assert float(low[1]) < 0.9 * float(full[1])
