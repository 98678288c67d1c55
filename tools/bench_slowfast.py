"""The ``slowfast`` part of ``tools/bench.py``: a co-training step beside the same step with all weights trained.

In the twin step the blocks' weights learn from the fast path as well, which is the same computation forward and a
weight gradient more for every frozen product backward. Operations and bytes kept for the backward pass are counted
on tensors without content, so they are the same on every machine; seconds are the best of alternating rounds, by the
clock and, without a GPU, of processor time, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from egohod.distributed import pick_device, pick_precision
from egohod.loss.contrastive import ContrastiveLoss
from egohod.model import slowfast
from egohod.model.config import ModelConfig
from egohod.model.egovideo import DualEncoder, create_model
from egohod.model.flops import count_flops, saved_bytes
from egohod.model.video import VideoTransformer
from tools.bench_step import add_options, prepare, seconds


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("slowfast", help="a co-training step against one with all weights trained")
    add_options(parser, model="CLIP_VITB16_Slowfast", frames=16, batch_size=2)
    parser.add_argument("--no_time", action="store_true", help="only count")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Count, measure and print."""
    device = pick_device(options.device)
    dtype = pick_precision(options.precision, device)
    result: dict[str, Any] = {
        "model": options.model,
        "frames": options.frames,
        "batch_size": options.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
    }
    config = ModelConfig(name=options.model, num_frames=options.frames)
    pairs = count(config, options.batch_size, options.text_length, dtype)
    if not options.no_time:
        pairs |= measure(options)
    for name, (ours, all_trained) in pairs.items():
        result |= {name: ours, f"{name}_all_trained": all_trained, f"{name}_ratio": ours / all_trained}
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:>28}  {value:.4g}" if isinstance(value, float) else f"{name:>28}  {value}")


@contextmanager
def all_trained(model: DualEncoder) -> Iterator[None]:
    """Until left, the fast path trains the blocks' weights too: the same outputs, all gradients."""
    tower = model.visual

    def embed(video: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor | None]:
        return VideoTransformer.embed(tower, video)

    # Nothing is put in place of a module's weights: it uses its own.
    with mock.patch.object(slowfast, "detached", return_value={}), mock.patch.object(tower, "embed", embed):
        yield


def count(config: ModelConfig, batch_size: int, text_length: int, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """TFLOP of a step, and GB that autograd keeps for its backward pass: (co-training, all trained)."""
    found = []
    with FakeTensorMode():
        model = create_model(config)
        size = model.geometry.image_size
        video = torch.empty(batch_size, 3, config.num_frames, size, size)
        tokens = torch.zeros(batch_size, text_length, dtype=torch.long)

        def forward() -> dict[str, Tensor]:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                return model(video, tokens)

        def step() -> None:
            ContrastiveLoss()(**forward())["loss"].backward()

        for variant in (nullcontext(), all_trained(model)):
            with variant:
                found.append((count_flops(step) / 1e12, saved_bytes(forward, model) / 1e9))
    (flops, saved), (all_flops, all_saved) = found
    return {"tflop": (flops, all_flops), "saved_gb": (saved, all_saved)}


def measure(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Seconds of a step, by the clock and of the processor: (co-training, all trained)."""
    model, step, device, _ = prepare(options, checkpointing=False)
    for block in model.visual.transformer.resblocks:
        # From its start at zero an adapter is the same work, but let no kernel find that out.
        torch.nn.init.normal_(block.adapter.up_proj.weight, std=0.02)
    clock: tuple[list[float], list[float]] = ([], [])
    processor: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.rounds + 1):
        for which, variant in enumerate((nullcontext(), all_trained(model))):
            with variant:
                began = time.process_time()
                clock[which].append(seconds(step, device))
                processor[which].append(time.process_time() - began)
    # The first round is the warm-up.
    found = {"step_seconds": (min(clock[0][1:]), min(clock[1][1:]))}
    if device.type == "cpu":
        found["step_cpu_seconds"] = (min(processor[0][1:]), min(processor[1][1:]))
    return found
