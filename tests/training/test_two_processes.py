"""Real processes over gloo train as one process on the joint batch does, and go on from a checkpoint exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.field_files import write_open_clip
from tests.ranks import finish
from tests.support import losses, newest


@pytest.mark.ci
@pytest.mark.parametrize(
    ("objective", "variant"),
    [
        pytest.param([], [], id="plain"),
        pytest.param([], ["train.max_batch_per_process=2"], id="accumulated"),
        pytest.param(["loss.opposites=1", "loss.separation=1"], ["train.max_batch_per_process=2"], id="opposites"),
        pytest.param(
            ["loss.name=egonce_pp", "loss.replacements=3", "loss.opposites=1"],
            ["train.max_batch_per_process=2"],
            id="replacements",
        ),
        pytest.param(
            ["model.name=DEMO_Slowfast", "model.fast.slow_every=2"],
            ["train.max_batch_per_process=2"],
            id="slow-every-2",
        ),
    ],
)
def test_two_processes_equal_one(tiny_config: Path, tmp_path: Path, objective: list[str], variant: list[str]) -> None:
    settings = ["--config_file", tiny_config, "model.patch_dropout=0", "loss.learn_temperature=true", *objective]
    one, two = tmp_path / "one", tmp_path / "two"
    finish(1, "main_pretrain.py", [*settings, f"train.output={one}"], tmp_path / "logs")
    log = finish(2, "main_pretrain.py", [*settings, *variant, f"train.output={two}"], tmp_path / "logs")
    assert "2 processes over gloo" in log
    for (step, loss, norm), (_, other_loss, other_norm) in zip(losses(one), losses(two), strict=True):
        # The same arithmetic in another order; AdamW's division by small averages widens it as steps go by.
        assert loss == pytest.approx(other_loss, abs=1e-5 if step == 1 else 2e-3), step
        assert norm == pytest.approx(other_norm, rel=1e-5 if step == 1 else 2e-2), step
    assert len(losses(two)) == 12
    for name, weight in newest(one).weights.items():
        torch.testing.assert_close(weight, newest(two).weights[name], atol=5e-3, rtol=0, msg=name)


@pytest.mark.ci
@pytest.mark.parametrize("model", [[], ["model.name=DEMO_Slowfast", "model.fast.slow_every=2"]], ids=["plain", "skips"])
def test_four_processes_go_on_exactly(tiny_config: Path, tmp_path: Path, model: list[str]) -> None:
    """Sums over more than two processes depend on the layout of what is summed, also in the first step of a start."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    # The first step that is resumed, the sixth, is one without the slow path.
    settings = ["--config_file", tiny_config, "train.save_every=5 steps", *model]
    finish(4, "main_pretrain.py", [*settings, f"train.output={straight}"], tmp_path / "logs")
    settings += ["--resume", straight / "checkpoints" / "step-00000005"]
    finish(4, "main_pretrain.py", [*settings, f"train.output={resumed}"], tmp_path / "logs")
    assert [step for step, _, _ in losses(resumed)] == list(range(6, 13))
    assert losses(resumed) == losses(straight)[5:]
    for name, weight in newest(straight).weights.items():
        assert torch.equal(weight, newest(resumed).weights[name]), name


@pytest.mark.ci
@pytest.mark.parametrize("paths", ["", "_Slowfast"], ids=["one-path", "two-paths"])
def test_a_model_of_open_clip_goes_on_exactly(tiny_config: Path, tmp_path: Path, paths: str) -> None:
    """Both towers from a folder of the Hub, on two processes."""
    hub, straight, resumed = tmp_path / "hub", tmp_path / "straight", tmp_path / "resumed"
    write_open_clip(hub, "CLIP, quick GELU")
    settings = ["--config_file", tiny_config, f"model.name=open_clip/{hub}{paths}", "train.save_every=2 steps"]
    settings += ["train.duration=4 steps", "model.weights.source=clip", f"model.weights.path={hub}"]
    settings += ["loss.name=sigmoid"]
    finish(2, "main_pretrain.py", [*settings, f"train.output={straight}"], tmp_path / "logs")
    settings += ["--resume", straight / "checkpoints" / "step-00000002"]
    finish(2, "main_pretrain.py", [*settings, f"train.output={resumed}"], tmp_path / "logs")
    assert losses(resumed) == losses(straight)[2:]
    for name, weight in newest(straight).weights.items():
        assert torch.equal(weight, newest(resumed).weights[name]), name
