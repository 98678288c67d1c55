"""The statistics of the pixels belong to the weights: saved with them, read from them, checked against the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training.test_step import batch, build, config

import egohod
import main_pretrain
from egohod import cli
from egohod.data.dataset import center_crop, normalise
from egohod.errors import UserError
from egohod.evaluation.embed import fingerprint
from egohod.model.config import IMAGE_STATS
from tests.model.field_files import write_open_clip
from tests.support import ShortRun, newest, write_tiny_config


@pytest.fixture(scope="module")
def avion_run(demo_world: Path, tmp_path_factory: pytest.TempPathFactory) -> ShortRun:
    """One step of training with AVION's statistics."""
    folder = tmp_path_factory.mktemp("avion")
    command = ["--config_file", str(write_tiny_config(folder, demo_world)), "train.duration=1 steps"]
    command += ["model.image_stats=avion"]
    assert main_pretrain.main(command) == 0
    return ShortRun(folder / "run", command)


def test_a_training_step_normalises_as_the_model_expects() -> None:
    seen = {}
    for stats in ("clip", "avion"):
        cfg = config()
        cfg.model.image_stats = stats
        model, step = build(cfg)
        model.register_forward_pre_hook(lambda _, args, stats=stats: seen.update({stats: args[0].clone()}))
        step(1, [batch()])
        assert torch.equal(seen[stats], normalise(batch()["video"], IMAGE_STATS[stats]))
    difference = (seen["avion"] - seen["clip"]).mean(dim=(0, 2, 3, 4))
    torch.testing.assert_close(difference, torch.tensor([0.2108, 0.0, 0.0]), atol=1e-3, rtol=0)


def test_a_run_remembers_its_statistics(avion_run: ShortRun, demo_world: Path) -> None:
    assert newest(avion_run.folder).manifest["identity"]["model.image_stats"] == "avion"
    assert "model.image_stats=avion" in cli.model_of(str(avion_run.folder))
    model, preprocess, _ = egohod.create_model_and_transforms("DEMO", avion_run.folder)
    assert model.image_stats == IMAGE_STATS["avion"]
    video = next((demo_world / "train" / "videos").glob("*/0000.mp4"))
    frames = egohod.load_clip(video, 1.0, 3.0, 4)
    expected = normalise(center_crop(frames, 40)[None], IMAGE_STATS["avion"])[0]
    assert torch.equal(preprocess(frames), expected)
    assert not torch.equal(preprocess(frames), normalise(center_crop(frames, 40)[None])[0])


def test_weights_do_not_go_into_a_model_that_sees_other_pixels(avion_run: ShortRun) -> None:
    model = egohod.create_model("DEMO", num_frames=4)
    with pytest.raises(UserError, match=r"they were trained with model\.image_stats=avion, not clip"):
        egohod.load_weights(model, avion_run.folder)
    with pytest.raises(UserError, match=r"model\.image_stats"):
        main_pretrain.main([*avion_run.command, "train.duration=2 steps", "model.image_stats=clip"])


def test_checkpoints_from_before_have_clips_statistics(short_run: ShortRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run.folder, run)
    path = next(run.glob("checkpoints/step-*")) / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["identity"].pop("model.image_stats") == "clip"
    path.write_text(json.dumps(manifest))
    assert "model.image_stats=clip" in cli.model_of(str(run))
    other = egohod.create_model("DEMO", num_frames=5, activation="quick_gelu", image_stats="imagenet")
    with pytest.raises(UserError, match=r"they were trained with model\.image_stats=clip, not imagenet"):
        egohod.load_weights(other, run)
    assert main_pretrain.main([*short_run.command, f"train.output={run}", "train.duration=2 steps"]) == 0
    assert newest(run).step == 2


def test_the_fingerprint_tells_statistics_apart() -> None:
    torch.manual_seed(0)
    model = egohod.create_model("DEMO")
    before = fingerprint(model)
    model.image_stats = IMAGE_STATS["avion"]
    assert fingerprint(model) != before


def test_what_a_model_of_open_clip_expects_travels_with_it(demo_world: Path, tmp_path: Path) -> None:
    """Pixels, resolution, context and activation: nobody sets them, and none is a default of this project."""
    hub = tmp_path / "hub"
    write_open_clip(hub, "PE")
    command = ["--config_file", str(write_tiny_config(tmp_path, demo_world)), "train.duration=1 steps"]
    command += [f"model.name=open_clip/{hub}", "model.weights.source=clip", f"model.weights.path={hub}"]
    assert main_pretrain.main(command) == 0
    run = tmp_path / "run"
    identity = newest(run).manifest["identity"]
    assert (identity["model.image_stats"], identity["model.activation"]) == ("inception", "gelu")
    assert {f"model.name=open_clip/{hub}", "model.image_stats=inception"} <= {*cli.model_of(str(run))}
    assert cli.model_of(str(hub)) == ["model.image_stats=inception"]
    model, preprocess, tokenizer = egohod.create_model_and_transforms(f"open_clip/{hub}", run)
    assert model.image_stats == IMAGE_STATS["inception"]
    assert tokenizer(["cuts an onion"]).shape == (1, 24)
    frames = np.full((4, 50, 60, 3), 255, np.uint8)
    torch.testing.assert_close(preprocess(frames), torch.ones(3, 4, 32, 32))
    # Trained on with other pixels, a file of the Hub warns, a checkpoint of this project refuses.
    other = egohod.create_model(f"open_clip/{hub}", num_frames=4, image_stats="imagenet")
    assert "open_clip trains with model.image_stats=inception, here it is imagenet" in str(
        egohod.load_weights(other, hub)
    )
    with pytest.raises(UserError, match=r"they were trained with model\.image_stats=inception, not imagenet"):
        egohod.load_weights(other, run)
