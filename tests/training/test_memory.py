"""Predicted memory is what autograd keeps, and the presets fit the devices they are named after."""

from __future__ import annotations

import json
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
from egohod.errors import UserError
from egohod.model.config import ModelConfig
from egohod.model.cost import SHARE, Memory, predict, saved_bytes
from egohod.model.dual_encoder import EgoVideo, create_model
from egohod.training import build
from egohod.training.build import (
    fewest_blocks,
    largest_batch,
    micro_batches,
    split_batch,
    step_peak,
    trained_bytes,
    try_batch,
)
from egohod.training.train import MicroBatchRecord, TrainingData, memory_advice
from tests.ranks import pair
from tests.support import ROOT, Command

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


HERE = Distributed(0, 1, torch.device("cpu"), None)


def demo(**train: Any) -> Config:
    cfg = Config()
    cfg.model.name, cfg.model.num_frames = "DEMO", 2
    for name, value in {"global_batch_size": 48, "precision": "fp32", **train}.items():
        setattr(cfg.train, name, value)
    return cfg


def fails_above(largest: int, tried: list[int]) -> Any:
    """In place of a GPU that holds ``largest`` clips."""

    def attempt(model: Any, cfg: Config, dist: Distributed, clips: int, passes: int) -> int:
        tried.append(clips)
        assert clips * passes * dist.world_size == cfg.train.global_batch_size
        if clips > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore text.")
        return clips * 1_000_000_000

    return attempt


def test_a_predicted_micro_batch_that_does_not_fit_is_halved(caplog: pytest.LogCaptureFixture) -> None:
    cfg, tried = demo(), list[int]()
    model = create_model(cfg.model)
    assert try_batch(cfg, HERE, model, 40, fails_above(7, tried)) == (6, 6_000_000_000)
    # Divisors of the batch, as they would be used.
    assert tried == [24, 12, 6]
    assert "24 clips at a time do not fit: CUDA out of memory. Tried to allocate 2.00 GiB." in caplog.text
    with pytest.raises(UserError, match=r"one clip at a time does not fit .* model.checkpoint_blocks=all"):
        try_batch(cfg, HERE, model, 2, fails_above(0, tried))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_memory_that_others_than_the_allocator_lack_counts(text: str) -> None:
    cfg, data = demo(), TrainingData(None, None, 16, 4, None)  # type: ignore[arg-type]

    def attempt(model: Any, cfg: Config, dist: Distributed, clips: int, passes: int) -> int:
        if clips > 16:
            raise RuntimeError(text)
        return 0

    assert try_batch(cfg, HERE, create_model(cfg.model), 48, attempt) == (12, 0)
    with pytest.raises(UserError, match="step 7: cpu ran out of memory"), memory_advice(cfg, HERE, data, 7):
        raise RuntimeError(text)
    text = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal"):
        try_batch(cfg, HERE, create_model(cfg.model), 48, attempt)


def test_a_dry_run_says_for_which_blocks_its_memory_is(caplog: pytest.LogCaptureFixture) -> None:
    cfg = demo()
    cfg.model.weights.source = "scratch"
    with caplog.at_level("INFO"):
        for blocks in ("all", "auto"):
            cfg.model.checkpoint_blocks = blocks
            build._try_model(cfg, HERE, None, [])
    reports = [line for line in caplog.messages if line.startswith("memory")]
    assert ["with all blocks checkpointed" in line for line in reports] == [False, True]


def test_a_failure_on_another_process_counts() -> None:
    cfg, tried = demo(), list[int]()
    other = pair((0, "CUDA out of memory"))
    with pytest.raises(UserError, match="one clip"):
        try_batch(cfg, other, create_model(cfg.model), 2, fails_above(48, tried))
    assert tried == [2, 1]


@pytest.mark.parametrize("passes", [1, 3])
def test_a_trial_leaves_the_model_and_the_random_numbers_as_they_were(passes: int) -> None:
    cfg = demo(ema=0.9)
    cfg.model.patch_dropout = 0.5
    model = create_model(cfg.model)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    assert step_peak(model, cfg, HERE, 2, passes) == 0  # a CPU is not measured
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_outside_of_buckets_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes that accumulate have them twice; without accumulation they are the buckets."""
    model = create_model(demo().model)
    amounts = list[float]()

    class Fits(Memory):
        def fits(self, memory: float) -> int:
            amounts.append(memory)
            return 8

    monkeypatch.setattr(build, "predict_memory", lambda *_: Fits(0, 1, 0))
    for dist, batch, more in ((HERE, 64, False), (pair(8), 16, False), (pair(8), 64, True)):
        amounts.clear()
        assert largest_batch(demo(global_batch_size=batch), dist, model) == 8
        assert len(amounts) == 1 + more
        if more:
            assert amounts[0] - amounts[1] == pytest.approx(trained_bytes(model) / 0.8)


def test_the_micro_batch_is_remembered_for_the_same_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = demo(output=str(tmp_path), global_batch_size=64)
    model, sizes = create_model(cfg.model), iter([20, 40])
    monkeypatch.setattr(build, "largest_batch", lambda *_: next(sizes))

    def split() -> tuple[int, int]:
        return micro_batches(cfg, HERE, model, build.micro_batch_record(cfg, HERE))

    assert split() == (16, 4)
    assert json.loads((tmp_path / "micro_batch.json").read_text())["micro_batch"] == 20
    assert split() == (16, 4)  # without another prediction
    cfg.model.num_frames = 1
    assert split() == (32, 2)
    (tmp_path / "micro_batch.json").write_text("{}")
    with pytest.raises(StopIteration):
        split()
    cfg.train.max_batch_per_process = 4
    assert build.micro_batch_record(cfg, HERE) is None
    assert micro_batches(cfg, HERE, model) == (4, 16)


@pytest.mark.parametrize("chosen", [True, False])
def test_running_out_of_memory_is_one_line_that_names_the_settings(tmp_path: Path, chosen: bool) -> None:
    record = None if chosen else MicroBatchRecord(tmp_path / "micro_batch.json", {"device": "x"})
    data = TrainingData(None, None, 16, 4, record)  # type: ignore[arg-type]
    with pytest.raises(UserError) as failure, memory_advice(demo(), HERE, data, 7):
        # More than any address space has: the allocator's own error.
        torch.empty(1 << 60)
    text = str(failure.value)
    assert "\n" not in text
    assert "step 7: cpu ran out of memory with 16 clips at a time" in text
    assert "model.checkpoint_blocks=all" in text
    if record is None:
        assert "train.max_batch_per_process=8" in text
    else:
        assert "rerun the same command to resume with 8 at a time" in text
        assert record.read() == 8
    with (
        pytest.raises(UserError, match=r"evaluation after step 7: .* lower evaluate.batch_size=32"),
        memory_advice(demo(), HERE, data, 7, evaluates=True),
    ):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="another"), memory_advice(demo(), HERE, data, 7):
        raise RuntimeError("another error")


def test_a_run_that_ran_out_of_memory_continues_with_half(
    tiny_config: Path, tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from egohod.training.step import TrainStep

    command = ["main_pretrain.py", "--config_file", tiny_config, "train.max_batch_per_process=null"]
    command += ["train.duration=3 steps", "train.save_every=1 steps"]
    step = TrainStep.__call__

    def fail(self: TrainStep, number: int, *arguments: Any) -> Any:
        if number == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, number, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", fail)
    failed = inside(*command)
    assert failed.returncode == 2, failed.stderr
    assert [line for line in failed.stderr.splitlines() if line.startswith("error")] == [
        "error: step 2: cpu ran out of memory with 8 clips at a time; rerun the same command to resume with 4 at a "
        "time, or set model.checkpoint_blocks=all, or lower model.num_frames; other programs may also use the "
        "device"
    ]
    monkeypatch.setattr(TrainStep, "__call__", step)
    resumed = inside(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "global batch 8 = 1 x 4 x 2 accumulated" in resumed.stderr
