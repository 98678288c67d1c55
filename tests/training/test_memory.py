"""Predicted memory is what autograd keeps, and the presets fit the devices they are named after."""

from __future__ import annotations

import re
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from egohod.config import Config, load
from egohod.distributed import Distributed
from egohod.model.config import ModelConfig
from egohod.model.cost import SHARE, Memory, predict, saved_bytes
from egohod.model.dual_encoder import EgoVideo, create_model
from egohod.training import build
from egohod.training.build import fewest_blocks, split_batch
from tests.support import ROOT

PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yml"))


@pytest.mark.parametrize("blocks", ["none", "2", "all"])
@pytest.mark.parametrize(("name", "stem"), [("DEMO", None), ("DEMO_Slowfast", None), ("DEMO_Slowfast", 32)])
def test_the_prediction_is_what_a_real_forward_pass_keeps(name: str, stem: int | None, blocks: str) -> None:
    config = ModelConfig(name=name, num_frames=4, motion_stem=stem, checkpoint_blocks=blocks)
    memory, model = predict(config), create_model(config)
    size = model.geometry.image_size

    def saved(clips: int) -> int:
        video, tokens = torch.zeros(clips, 3, 4, size, size), torch.zeros(clips, 77, dtype=torch.long)
        return saved_bytes(lambda: model(video, tokens), model)

    assert saved(4) - saved(2) == 2 * memory.per_clip
    # With two of four blocks what the others kept is free again before a block is computed a second time.
    assert (memory.working > 0) == (blocks == "all")
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
    predicted = partial(predict, cfg.model, dtype=torch.bfloat16)
    blocks = 0
    if cfg.model.checkpoint_blocks == "auto":
        blocks, _ = fewest_blocks(cfg, processes, lambda number: predicted(blocks=number).fits(gigabytes * 1e9))
    memory = predicted(blocks=blocks)
    assert cfg.train.max_batch_per_process is not None
    peak = memory.peak(cfg.train.max_batch_per_process) / 1e9
    assert peak < 0.9 * gigabytes
    batch, passes = split_batch(cfg.train.global_batch_size, processes, cfg.train.max_batch_per_process)
    head = path.read_text().partition("_base_")[0]
    assert (
        f"= {processes} {'process' if processes == 1 else 'processes'} x {batch} clips at a time x {passes} pass"
        in head
    )
    checkpointed = re.search(r"with (\d+) of 12 blocks checkpointed", head)
    assert blocks == int(checkpointed[1] if checkpointed else 0)
    assert float(re.search(r"= ([\d.]+) GB", head)[1]) == pytest.approx(peak, abs=0.3)  # type: ignore[index]


@pytest.mark.parametrize(
    ("world_size", "largest", "expected"),
    [
        (8, None, (0, 16)),  # a share of 16 fits as it is
        (2, None, (16, 64)),  # one pass, with as many blocks as it needs
        (1, None, (0, 4)),  # it takes several passes in any case: as large as keeps a GPU busy
        (1, 32, (7, 32)),
        (1, 128, (24, 128)),  # nothing is enough
    ],
)
def test_auto_checkpoints_as_few_blocks_as_the_memory_needs(
    world_size: int, largest: int | None, expected: tuple[int, int]
) -> None:
    cfg = Config()
    cfg.model.name, cfg.train.global_batch_size, cfg.train.max_batch_per_process = "CLIP_VITL14_336PX", 128, largest

    def fits(blocks: int) -> int:
        return 25 + blocks + (24 if blocks >= 16 else 0)

    assert fewest_blocks(cfg, world_size, fits) == expected


def test_auto_is_resolved_by_the_memory_of_the_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cfg = Config(model=ModelConfig(name="DEMO", num_frames=8, checkpoint_blocks="auto"))
    cfg.train.global_batch_size, cfg.train.precision = 64, "fp32"
    model, memory = create_model(cfg.model), [predict(cfg.model, blocks=blocks, on_gpu=False) for blocks in range(5)]
    assert model.visual.transformer.checkpoint_blocks == 4, "until the memory is known"
    dist = Distributed(0, 1, torch.device("cpu"), None)
    for blocks in (0, 2):
        # Enough for the batch with so many blocks checkpointed, not with one less.
        enough = memory[blocks].peak(64) / SHARE + 1
        monkeypatch.setattr(build, "device_memory", lambda _, size=enough: size)
        assert build.micro_batches(cfg, dist, model) == (64, 1)
        assert model.visual.transformer.checkpoint_blocks == blocks
        assert model.textual.transformer.grad_checkpointing == (blocks > 0)
        assert f"model.checkpoint_blocks=auto: {blocks} of 4 blocks are checkpointed, for 64 clips" in caplog.text


class LiveBytes(TorchDispatchMode):
    """Sums the storages that are alive, and keeps the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.seen: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            storage = value.untyped_storage() if isinstance(value, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.live)
        return result


def test_a_block_that_is_computed_again_needs_no_memory_beyond_what_the_later_ones_kept() -> None:
    """Why the first blocks are checkpointed and not the last."""
    most = {}
    for blocks in ("2", "all"):
        torch.manual_seed(0)
        model = create_model(ModelConfig(name="DEMO", num_frames=16, checkpoint_blocks=blocks))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        size = model.geometry.image_size
        video = torch.randn(8, 3, 16, size, size)
        saved = saved_bytes(partial(model.encode_video, video), model)
        with LiveBytes() as live:
            model.encode_video(video).sum().backward()
        most[blocks] = live.most / saved
    assert most["2"] < 1.25
    assert most["all"] > 2


def test_three_presets() -> None:
    assert [path.stem for path in PRESETS] == ["1x24gb", "4x24gb", "8x80gb"]
