"""The ``step`` part of ``tools/bench.py``: one training step of the dual encoder, against the machine's matmul peak.

A step is forward, loss and backward of both towers on random clips. Its operations are counted as they happen
(PyTorch's FlopCounterMode, attention included) in the plain form: all tokens pass every block, 77 text tokens. The
fraction of peak is that nominal work per second over a large matrix product's, both in the same precision, in
alternating rounds of one run. Memory is measured in a fresh process per variant.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from egohod.distributed import pick_device, pick_precision
from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.config import ModelConfig
from egohod.model.egovideo import DualEncoder, create_model
from egohod.model.flops import count_flops, saved_bytes, step_flops
from egohod.model.zoo import GEOMETRIES

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
MATMULS_PER_ROUND = {"cpu": 4, "cuda": 50}
START_OF_TEXT, END_OF_TEXT = 49406, 49407


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("step", help="a training step: speed, share of the matmul peak, memory")
    add_options(parser, model="CLIP_VITB16", frames=4, batch_size=4)
    parser.add_argument("--compile", action="store_true", help="torch.compile both towers")
    parser.add_argument("--no_memory", action="store_true", help="leave the memory variants out")
    parser.add_argument("--memory_of", choices=("plain", "checkpointed"), help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser, *, model: str, frames: int, batch_size: int) -> None:
    """What every benchmark of a training step asks for; geometries are those of the kind of ``model``."""
    alike = [name for name, geometry in GEOMETRIES.items() if geometry.slowfast == GEOMETRIES[model].slowfast]
    add = parser.add_argument
    add("--model", default=model, choices=alike, help=f"geometry (default: {model})")
    add("--frames", type=int, default=frames, help=f"frames per clip (default: {frames})")
    add("--batch_size", type=int, default=batch_size, help=f"clips per step (default: {batch_size})")
    add("--text_length", type=int, default=77, help="text tokens computed (default: 77, no cutting)")
    add("--rounds", type=int, default=3, help="timed steps, after one to warm up (default: 3)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    add("--json", action="store_true", help="print one JSON object instead of text")


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    if options.memory_of:
        print(json.dumps(measure_memory(options)))
        return
    variants = () if options.no_memory else ("plain", "checkpointed")
    # Before this process grows: Linux hands its own peak down to its children.
    memory = {variant: memory_in_a_child(variant) for variant in variants}
    result = measure_speed(options) | {"memory": memory}
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:>24}  {value:.4g}" if isinstance(value, float) else f"{name:>24}  {value}")


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step and the share of the peak; the best round of each counts."""
    model, step, device, dtype = prepare(options, checkpointing=False)
    sizes = (model.geometry, options.frames, options.text_length)
    done = count_flops(step)  # also the warm-up
    if options.compile:
        model.compile_towers()
        step()
    steps, matmuls = [], []
    for _ in range(options.rounds):
        matmuls.append(matmul_flops_per_second(device, dtype))
        steps.append(seconds(step, device))
    best, peak = min(steps), max(matmuls)
    nominal = options.batch_size * nominal_flops(model, options)
    return {
        "model": options.model,
        "frames": options.frames,
        "batch_size": options.batch_size,
        "text_length": options.text_length,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
        "compiled": options.compile,
        "step_seconds": best,
        "clips_per_second": options.batch_size / best,
        "nominal_tflop": nominal / 1e12,
        "counted_tflop": done / 1e12,
        "counted_over_formula": done / (options.batch_size * step_flops(*sizes)),
        "matmul_peak_gflops": peak / 1e9,
        "fraction_of_peak_nominal": nominal / best / peak,
        "fraction_of_peak_counted": done / best / peak,
    }


def nominal_flops(model: DualEncoder, options: argparse.Namespace) -> int:
    """Operations per clip of a plain implementation, which takes all tokens through the last block."""
    device = torch.device("meta")
    with device:
        twin = create_model(ModelConfig(name=options.model, num_frames=options.frames))
        size = model.geometry.image_size
        video = torch.empty(2, 3, options.frames, size, size)
        tokens = torch.zeros(2, options.text_length, dtype=torch.long)

    def plain() -> None:
        pooled = twin.visual.ln_post(twin.visual.tokens(video)) @ twin.visual.image_projection
        (pooled.sum() + twin.textual(tokens).sum()).backward()

    return count_flops(plain) // 2


def prepare(
    options: argparse.Namespace, checkpointing: bool
) -> tuple[DualEncoder, Callable[[], None], torch.device, torch.dtype]:
    """The model and a function that makes one step of it on fixed random data."""
    device = pick_device(options.device)
    dtype = pick_precision(options.precision, device)
    torch.manual_seed(0)
    config = ModelConfig(name=options.model, num_frames=options.frames, gradient_checkpointing=checkpointing)
    model, loss_fn = create_model(config).to(device), ContrastiveLoss()
    size = model.geometry.image_size
    video = torch.randn(options.batch_size, 3, options.frames, size, size, device=device)
    tokens = torch.randint(1, START_OF_TEXT, (options.batch_size, options.text_length), device=device)
    tokens[:, 0], tokens[:, -1] = START_OF_TEXT, END_OF_TEXT

    def step() -> None:
        model.zero_grad()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            output = model(video, tokens)
        loss_fn(**output)["loss"].backward()

    return model, step, device, dtype


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Of a square product that is large enough to be bound by arithmetic."""
    n, repeats = MATMUL_SIZE[device.type], MATMULS_PER_ROUND[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)

    def products() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return repeats * 2 * n**3 / seconds(products, device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Time until the device has finished ``work()``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def memory_in_a_child(variant: str) -> dict[str, float]:
    """The peak of a process can only be read once, so each variant gets its own."""
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:], "--memory_of", variant]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """Peak over two steps, and what autograd keeps per clip."""
    model, step, device, dtype = prepare(options, checkpointing=options.memory_of == "checkpointed")
    step()
    step()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()
    size = model.geometry.image_size

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            video = torch.zeros(1, 3, options.frames, size, size, device=device)
            tokens = torch.ones(1, options.text_length, dtype=torch.long, device=device)
            output = model(video, tokens)
        return output["video_features"].sum() + output["text_features"].sum()

    return {"peak_gb": round(peak / 1e9, 3), "saved_per_clip_mb": round(saved_bytes(forward, model) / 1e6, 1)}


def peak_bytes() -> int:
    """The most memory that this process has held; macOS counts bytes, Linux kilobytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
