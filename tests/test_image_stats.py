"""The statistics of the pixels belong to the weights: saved with them, read from them, checked against the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.test_step import batch, build, config

import egohod
import main_eval
import main_pretrain
from egohod import cli
from egohod.data.dataset import center_crop, normalise
from egohod.errors import UserError
from egohod.evaluation.embed import fingerprint
from egohod.model.config import IMAGE_STATS, ImageStats, image_stats
from egohod.model.dual_encoder import DualEncoder
from tests.model.field_files import OPEN_CLIP_FAMILIES, OWN_VIT, TEXT, write_open_clip
from tests.support import ShortRun, newest, write_tiny_config


@pytest.fixture(scope="module")
def avion_run(demo_world: Path, tmp_path_factory: pytest.TempPathFactory) -> ShortRun:
    """One step of training with AVION's statistics."""
    folder = tmp_path_factory.mktemp("avion")
    command = ["--config_file", str(write_tiny_config(folder, demo_world)), "train.duration=1 steps"]
    command += ["model.image_stats=avion"]
    assert main_pretrain.main(command) == 0
    return ShortRun(folder / "run", command)


@pytest.mark.parametrize("text", ["nan,0,0/1,1,1", "0,0,0/1,inf,1", "0,0,0/1,0,1", "0,0/1,1"])
def test_statistics_that_would_make_pixels_useless_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"model\.image_stats is"):
        image_stats(text)


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
    assert cli.model_of(str(hub)) == ["model.activation=gelu", "model.image_stats=inception"]
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


def record_videos(monkeypatch: pytest.MonkeyPatch, method: str) -> list[torch.Tensor]:
    """What dual encoders get as video from now on, call by call."""
    original, videos = getattr(DualEncoder, method), []

    def call(self: DualEncoder, video: torch.Tensor, *more: Any, **options: Any) -> Any:
        videos.append(video.clone())
        return original(self, video, *more, **options)

    monkeypatch.setattr(DualEncoder, method, call)
    return videos


def test_no_property_of_a_model_of_open_clip_comes_from_a_default(
    demo_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Odd values of all of them, on two paths, as training, evaluation and Python interface use them."""
    config = {"embed_dim": 40, "vision_cfg": OWN_VIT | {"image_size": 48}, "text_cfg": TEXT}
    config |= {"quick_gelu": True, "init_logit_scale": 1.5, "init_logit_bias": -3.0}
    stats = ImageStats((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    monkeypatch.setitem(OPEN_CLIP_FAMILIES, "odd", (config, stats._asdict()))
    hub, name, run = tmp_path / "hub", f"open_clip/{tmp_path}/hub_Slowfast", tmp_path / "run"
    theirs = write_open_clip(hub, "odd")
    trained, evaluated = (record_videos(monkeypatch, method) for method in ("forward", "encode_video"))
    command = ["--config_file", str(write_tiny_config(tmp_path, demo_world)), "train.duration=1 steps"]
    command += ["train.lr=1e-9", "train.lr_end=0"]
    command += [f"model.name={name}", "model.num_frames=8", "model.weights.source=clip", f"model.weights.path={hub}"]
    assert main_pretrain.main([*command, "loss.name=sigmoid", "loss.learn_temperature=true"]) == 0
    assert all(video.shape[1:] == (3, 8, 48, 48) for video in trained)
    # Normalised by other statistics these would be no whole numbers.
    mean, std = (torch.tensor(each).view(3, 1, 1, 1) for each in stats)
    pixels = (trained[0] * std + mean) * 255
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)
    checkpoint = newest(run)
    for scalar in ("logit_scale", "logit_bias"):
        torch.testing.assert_close(checkpoint.weights[scalar], getattr(theirs, scalar).detach())
    identity = {key: checkpoint.manifest["identity"][f"model.{key}"] for key in ("activation", "image_stats")}
    assert identity == {"activation": "quick_gelu", "image_stats": "0.1,0.2,0.3/0.4,0.5,0.6"}

    clips = demo_world / "val"
    (tmp_path / "eval.yml").write_text(
        f"""
data: {{workers: 0}}
evaluate:
  benchmarks:
    val: {{kind: custom, metadata: {clips}/hod.csv, root: {clips}/videos, layout: chunks, protocol: as_trained}}
  final: [val]
"""
    )
    command = ["--config_file", f"{tmp_path}/eval.yml", "--output", f"{tmp_path}/results"]
    # The run says which model it is; of the folder itself, evaluated zero-shot, the name does.
    hubs = [str(hub), f"model.name=open_clip/{hub}", "model.weights.source=clip", "model.num_frames=8"]
    for checkpoint_of, loaded in (([str(run)], (name, run)), (hubs, (f"open_clip/{hub}", hub))):
        evaluated.clear()
        assert main_eval.main([*command, "--checkpoint", *checkpoint_of]) == 0
        model, preprocess, _ = egohod.create_model_and_transforms(*loaded, num_frames=8)
        row = (clips / "hod.csv").read_text().splitlines()[1].split(",")
        frames = egohod.load_clip(clips / "videos" / row[0] / "0000.mp4", float(row[1]), float(row[2]), 8)
        expected = normalise(center_crop(frames, 48)[None], stats)[0]
        assert torch.equal(preprocess(frames), expected)
        assert any(torch.equal(video, expected) for batch in evaluated for video in batch)
        assert (model.activation, model.image_stats) == ("quick_gelu", stats)
        assert type(model.textual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
        torch.testing.assert_close(model.logit_scale, theirs.logit_scale)
        torch.testing.assert_close(model.logit_bias, theirs.logit_bias)


def test_another_activation_than_the_folders_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_open_clip(tmp_path, "CLIP, quick GELU")
    assert "model.activation=quick_gelu" in cli.model_of(str(tmp_path))
    other = egohod.create_model(f"open_clip/{tmp_path}", activation="gelu")
    report = egohod.load_weights(other, tmp_path)
    assert report.notes[-1] == "open_clip trains with model.activation=quick_gelu, here it is gelu"
    assert report.notes[-1] in caplog.text
