"""Weights split over processes train as whole ones do: real processes over gloo, small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from egohod.config import Config
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.loss.config import LossConfig
from egohod.model.config import Geometry, ModelConfig
from egohod.model.dual_encoder import DualEncoder, EgoVideo, TextTower
from egohod.model.vision import SlowFastTransformer, VideoTransformer
from egohod.training.checkpoint import CheckpointError, CheckpointStore, read
from egohod.training.step import TrainStep
from tests.ranks import in_processes
from tests.support import Command, losses, newest

STEPS, FRAMES, CLIPS = 20, 4, 8
# Widths that four processes do not share evenly, and fewer classes of frames than processes.
TINY = Geometry("TINY", 32, 16, 36, 2, 2, 36, 2, 2, 18, vocab_size=102)


def config(**knobs: Any) -> Config:
    cfg = Config(loss=LossConfig(learn_temperature=True), model=ModelConfig(num_frames=FRAMES))
    cfg.model.fast.slow_frames, cfg.model.temporal_init = 2, "sinusoidal"
    cfg.train.global_batch_size, cfg.train.precision, cfg.train.lr, cfg.train.eps = CLIPS, "fp32", 1e-3, 1e-6
    for name, value in knobs.items():
        section, _, key = name.rpartition("__")
        part: Any = {"model": cfg.model, "fast": cfg.model.fast, "train": cfg.train}[section]
        assert hasattr(part, key), name
        setattr(part, key, value)
    return cfg


def build(cfg: Config, slowfast: bool = False) -> DualEncoder:
    """A model for which 20 steps take a second; the real vocabulary alone has six million weights."""
    torch.manual_seed(0)
    textual = TextTower(TINY, cfg.model)
    options: dict[str, Any] = {"geometry": TINY, "num_frames": FRAMES, "learn_temperature": True}
    model: DualEncoder
    if slowfast:
        visual = SlowFastTransformer(TINY, cfg.model)
        # Adapters that do nothing yet would hide what goes wrong with them.
        for block in visual.transformer.resblocks:
            nn.init.normal_(block.adapter.up_proj.weight, std=0.1)
        model = EgoVideo(visual, textual, slow=cfg.model.fast.slow_frames, **options)
    else:
        model = DualEncoder(VideoTransformer(TINY, cfg.model), textual, **options)
    model.freeze(cfg.train.trainable, cfg.train.last_blocks)
    return model


def micro_batches(step: int, here: Distributed, count: int) -> list[dict[str, Tensor]]:
    """This process's part of the clips of ``step``, the same clips for every number of processes."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, TINY.vocab_size - 1, (CLIPS, 8), generator=generator)
    tokens[:, -1] = TINY.vocab_size - 1
    shape = (CLIPS, 3, FRAMES, TINY.image_size, TINY.image_size)
    video = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    mine = (each.chunk(here.world_size)[here.rank].chunk(count) for each in (video, tokens))
    return [{"video": clips, "tokens": texts} for clips, texts in zip(*mine, strict=True)]


CASES: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "plain": (False, 1, {"train__clip_norm": 0.5, "train__layer_decay": 0.8}),
    "accumulated": (False, 2, {"model__checkpoint_blocks": "1", "train__ema": 0.9}),
    "slow-fast": (True, 2, {"model__checkpoint_blocks": "1", "fast__slow_every": 2}),
    "after its block": (True, 1, {"model__checkpoint_blocks": "all", "fast__position": "after", "fast__pool": "both"}),
    "adapters": (True, 2, {"train__trainable": "adapters", "train__optimizer": "sgd", "train__lr": 0.1}),
    "last block": (False, 1, {"train__trainable": "last_blocks", "train__last_blocks": 1}),
}
"""Both paths, micro-batches of a process, and knobs."""


def rank_main(rank: int, world_size: int, folder: Path, shardings: dict[str, int | None]) -> None:
    """All cases without sharding and with each of ``shardings``, whose results the first process writes."""
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    here = Distributed(rank, world_size, torch.device("cpu"), "gloo", control=torch_dist.new_group(backend="gloo"))
    results: dict[str, Any] = {}
    for case, (slowfast, count, knobs) in CASES.items():
        for sharding, processes in {"none": None, **shardings}.items():
            cfg = config(**knobs, train__sharding=sharding, train__shard_processes=processes)
            model = build(cfg, slowfast)
            step = TrainStep(model, cfg, here, total_steps=STEPS, steps_per_epoch=STEPS)
            lines = [step(number, micro_batches(number, here, count)) for number in range(1, STEPS + 1)]
            means = [torch.stack([each["loss"], each["grad_norm"]]) for each in lines]
            for mean in means:
                torch_dist.all_reduce(mean)
            held = sum(parameter.numel() for parameter in model.parameters())
            with step.gathered() as whole:
                evaluated = {name: value.clone() for name, value in whole.state_dict().items()}
            results[f"{case}, {sharding}"] = {
                "lines": torch.stack(means) / world_size,
                "evaluated": evaluated,
                "held": held / sum(value.numel() for value in evaluated.values()),
            }
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def check_cases(folder: Path, world_size: int, shardings: dict[str, int | None]) -> None:
    in_processes(world_size, rank_main, folder, shardings)
    results = torch.load(folder / "results.pt", weights_only=True)
    for case in CASES:
        whole = results[f"{case}, none"]
        assert whole["held"] == 1
        for sharding, processes in shardings.items():
            split = results[f"{case}, {sharding}"]
            # Scalars are not split, and a part of a short tensor is a whole row.
            assert split["held"] < 1.1 / (processes or world_size), case
            torch.testing.assert_close(
                split["lines"][:, 0], whole["lines"][:, 0], atol=1e-6, rtol=0, msg=lambda text, c=case: f"{c}: {text}"
            )
            torch.testing.assert_close(split["lines"][:, 1], whole["lines"][:, 1], atol=0, rtol=1e-4)
            for name, value in whole["evaluated"].items():
                torch.testing.assert_close(split["evaluated"][name], value, atol=1e-4, rtol=0, msg=f"{case}: {name}")


@pytest.mark.ci
def test_two_processes_that_share_weights_equal_two_that_have_all(tmp_path: Path) -> None:
    check_cases(tmp_path, 2, {"fsdp": None})


@pytest.mark.ci
def test_four_processes_that_share_weights_equal_four_that_have_all(tmp_path: Path) -> None:
    check_cases(tmp_path, 4, {"fsdp": None, "hsdp": 2})
