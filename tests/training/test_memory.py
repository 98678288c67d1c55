"""Predicted memory is what autograd keeps, and the presets fit the devices they are named after."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from egohod.config import load
from egohod.model.config import ModelConfig
from egohod.model.cost import Memory, predict, saved_bytes
from egohod.model.dual_encoder import EgoVideo, create_model
from egohod.training.build import split_batch
from tests.support import ROOT

PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yml"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "stem"), [("DEMO", None), ("DEMO_Slowfast", None), ("DEMO_Slowfast", 32)])
def test_the_prediction_is_what_a_real_forward_pass_keeps(name: str, stem: int | None, checkpointing: bool) -> None:
    config = ModelConfig(name=name, num_frames=4, motion_stem=stem, gradient_checkpointing=checkpointing)
    memory, model = predict(config), create_model(config)
    size = model.geometry.image_size

    def saved(clips: int) -> int:
        video, tokens = torch.zeros(clips, 3, 4, size, size), torch.zeros(clips, 77, dtype=torch.long)
        return saved_bytes(lambda: model(video, tokens), model)

    assert saved(4) - saved(2) == 2 * memory.per_clip
    assert (memory.working > 0) == checkpointing
    # Weights, and gradient and two averages of those that are trained, which a constant temperature is not.
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert memory.state >= 4 * sum(parameter.numel() for parameter in model.parameters()) + 12 * trained


def test_adapters_alone_take_less() -> None:
    config = ModelConfig(name="DEMO_Slowfast", num_frames=4)
    model = create_model(config)
    assert isinstance(model, EgoVideo)
    model.freeze("adapters")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole, adapters = predict(config), predict(config, learning=names)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapters.state >= 4 * sum(p.numel() for p in model.parameters()) + 12 * learning
    assert adapters.state < whole.state / 3
    assert adapters.per_clip < whole.per_clip


def test_heads_and_what_they_do_without_are_counted() -> None:
    config, heads = ModelConfig(name="DEMO", num_frames=4, head_dropout=0.5), {"verb": 97, "noun": 300}
    memory, model = predict(config, heads=heads), create_model(config, classes=heads)
    size = model.geometry.image_size

    def saved(clips: int) -> int:
        video, tokens = torch.zeros(clips, 3, 4, size, size), torch.zeros(clips, 77, dtype=torch.long)
        return saved_bytes(lambda: model(video, tokens), model)

    assert saved(4) - saved(2) == 2 * memory.per_clip
    # The text tower is in memory, but neither trained nor computed.
    without = predict(config)
    assert memory.per_clip < without.per_clip
    whole = sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = 4 * whole + 12 * learning
    assert weights <= memory.state < weights + 0.1 * without.state
    sgd, averaged = predict(config, heads=heads, averages=1), predict(config, heads=heads, ema=True)
    assert memory.state - sgd.state == 4 * learning
    assert averaged.state - memory.state == 4 * whole
    model.freeze("heads")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert predict(config, heads=heads, learning=names).per_clip < memory.per_clip / 20


def test_peak_and_fit_agree() -> None:
    memory = Memory(state=1000, per_clip=80, working=20)
    assert memory.peak(5) == 1500
    assert memory.fits(2000) == 6  # 1,600 of them are used
    assert memory.fits(1000) < 1


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_fit_the_memory_that_they_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EGO4D_ROOT", "HOD_CSV", "CLIP_WEIGHTS"):
        monkeypatch.setenv(name, "/data")
    cfg = load(path)
    processes, gigabytes = map(int, re.fullmatch(r"(\d+)x(\d+)gb", path.stem).groups())  # type: ignore[union-attr]
    memory = predict(cfg.model, dtype=torch.bfloat16)
    assert cfg.train.max_batch_per_process is not None
    peak = memory.peak(cfg.train.max_batch_per_process) / 1e9
    assert peak < 0.9 * gigabytes
    batch, passes = split_batch(cfg.train.global_batch_size, processes, cfg.train.max_batch_per_process)
    head = path.read_text().partition("_base_")[0]
    assert (
        f"= {processes} {'process' if processes == 1 else 'processes'} x {batch} clips at a time x {passes} pass"
        in head
    )
    assert float(re.search(r"= ([\d.]+) GB", head)[1]) == pytest.approx(peak, abs=0.3)  # type: ignore[index]


def test_three_presets() -> None:
    assert [path.stem for path in PRESETS] == ["1x24gb", "4x24gb", "8x80gb"]
