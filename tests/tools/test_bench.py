"""tools/bench.py step: every family of backbones by its settings, and two models in turns."""

from __future__ import annotations

import json
from typing import Any

import bench
import pytest
from benches import training

from egohod.errors import UserError

# With as many tokens of a frame as published, but few channels and blocks.
SMALL = ["model.backbone.depth=2", "model.backbone.embed_dim=256", "model.backbone.num_heads=4"]
FAMILIES = {
    "timm/vit_base_patch16_clip_224": SMALL,
    "timm/vit_base_patch16_siglip_224.v2_webli": SMALL,
    "timm/eva02_base_patch16_clip_224": SMALL,
    "timm/vit_pe_core_base_patch16_224": SMALL,
    "timm/vit_base_patch16_dinov3": [*SMALL, "model.image_size=224"],
}
# The tower of the geometry DEMO.
AS_DEMO = [
    *("model.image_size=40", "model.backbone.patch_size=8", "model.backbone.embed_dim=128"),
    *("model.backbone.depth=4", "model.backbone.num_heads=4"),
]


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.MATMUL_SIZE, "cpu", 64)


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    command = [
        "step",
        "--json",
        "--no_memory",
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--batch_size",
        "2",
        "--frames",
        "2",
    ]
    bench.main([*command, *arguments])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_counted_operations_are_those_of_the_formula(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(capsys, "--model", name, *FAMILIES[name])
    assert result["counted_over_formula"] == pytest.approx(1, abs=0.03)
    # Where CLS is pooled, the last of two blocks is mostly left out.
    assert 0.9 < result["nominal_tflop"] / result["counted_tflop"] < 1.8
    assert result["clips_per_second"] > 0


def test_two_models_take_turns_and_have_the_same_features_on_the_same_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--model", "timm/vit_base_patch16_clip_224", *AS_DEMO, "--against"]
    result = measured(capsys, *command, "DEMO")
    assert result["features_difference"] < 2e-5
    assert result["step_over_against"] == pytest.approx(result["step_seconds"] / result["against_step_seconds"])
    assert result["step_cpu_over_against"] > 0
    assert measured(capsys, *command, "DEMO_SMALL")["features_difference"] is None
    monkeypatch.setattr(training, "give_weights", lambda *towers: None)
    assert measured(capsys, *command, "DEMO")["features_difference"] > 1e-2, "each with its own"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lr=1"], r"train\.lr=1: overrides are of the form model\.KEY=VALUE"),
        (["--model", "timm/vit_base_patch16_cilp_224"], r"vit_base_patch16_clip_224"),
        (["--model", "DEMO_Slowfast"], "has two paths"),
        (["--model", "DEMO", "model.image_size=48"], "are fixed"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=message):
        measured(capsys, *arguments)
