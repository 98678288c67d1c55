"""The ``memory`` part of ``tools/bench.py``: frames, checkpointing and batch against peak memory.

Without a GPU the peak is predicted: weights, gradients and AdamW's averages, plus what autograd keeps per clip (asked
of it on tensors without content, the same numbers on every machine). On a GPU a step of the smallest batch of each
row is run as well, and the measured peak stands beside the prediction.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from egohod.config import Config
from egohod.distributed import pick_device, pick_precision, setup
from egohod.model.config import ModelConfig
from egohod.model.egovideo import create_model
from egohod.model.zoo import GEOMETRIES
from egohod.training.config import TrainConfig
from egohod.training.memory import SHARE, Memory, predict
from egohod.training.setup import split_batch
from egohod.training.step import TrainStep

DEVICES_GB = (24, 80)
PROCESSES = (1, 4, 8)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("memory", help="batch, frames, checkpointing, accumulation -> peak memory")
    parser.add_argument("--model", default="CLIP_VITB16", choices=list(GEOMETRIES), help="geometry")
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 16], help="frames per clip (default: 4 16)")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128], help="clips at a time (8 32 128)")
    parser.add_argument("--global_batch_size", type=int, default=2048, help="clips per step (default: 2048)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Predict, measure where there is a GPU, and print."""
    device = pick_device(options.device)
    dtype = pick_precision(options.precision, device)
    rows = [row(options, device, dtype, frames, save) for frames in options.frames for save in (False, True)]
    result = {"model": options.model, "precision": options.precision, "global_batch_size": options.global_batch_size}
    print(json.dumps(result | {"rows": rows}) if options.json else text(options, rows))


def row(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype, frames: int, save: bool
) -> dict[str, Any]:
    config = ModelConfig(name=options.model, num_frames=frames, gradient_checkpointing=save)
    memory = predict(config, dtype=dtype)
    result: dict[str, Any] = {
        "frames": frames,
        "checkpointing": save,
        "mb_per_clip": memory.per_clip / 1e6,
        "peak_gb": {batch: memory.peak(batch) / 1e9 for batch in options.batches},
        "fits": {size: plan(memory, size, options.global_batch_size) for size in DEVICES_GB},
    }
    if device.type == "cuda":
        result["measured_gb"] = measure(config, options, min(options.batches)) / 1e9
    return result


def plan(memory: Memory, gigabytes: int, global_batch_size: int) -> dict[int, str]:
    """Processes -> clips at a time x passes per step; '-' where not one clip fits."""
    largest = memory.fits(gigabytes * 1e9)
    if largest < 1:
        return dict.fromkeys(PROCESSES, "-")
    return {n: "{} x {}".format(*split_batch(global_batch_size, n, largest)) for n in PROCESSES}


def measure(config: ModelConfig, options: argparse.Namespace, batch: int) -> int:
    """Peak bytes of a training step on the GPU."""
    dist = setup(options.device)
    cfg = Config(model=config, train=TrainConfig(global_batch_size=batch, precision=options.precision))
    model = create_model(config).to(dist.device)
    step = TrainStep(model, cfg, dist, total_steps=2, steps_per_epoch=2)
    size, length = model.geometry.image_size, model.geometry.context_length
    clips = {
        "video": torch.randint(256, (batch, 3, config.num_frames, size, size), dtype=torch.uint8),
        "tokens": torch.ones(batch, length, dtype=torch.long),
    }
    torch.cuda.reset_peak_memory_stats()
    for number in (1, 2):
        step(number, [clips])
    return torch.cuda.max_memory_allocated()


def text(options: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    batches = [f"{batch} clips" for batch in options.batches]
    devices = [f"{n} x {size} GB" for size in DEVICES_GB for n in PROCESSES]
    measured = ["measured"] if "measured_gb" in rows[0] else []
    head = ["frames", "checkpointing", "MB a clip", *batches, *measured, *devices]
    lines = [
        f"{options.model}, {options.precision}: peak GB by clips at a time, and how a step of "
        f"{options.global_batch_size} clips is split (clips at a time x passes, {SHARE:.0%} of the memory used)",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for each in rows:
        cells = [str(each["frames"]), "yes" if each["checkpointing"] else "no", f"{each['mb_per_clip']:.0f}"]
        cells += [f"{peak:.1f}" for peak in each["peak_gb"].values()]
        cells += [f"{each['measured_gb']:.1f}"] if measured else []
        cells += [each["fits"][size][n] for size in DEVICES_GB for n in PROCESSES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
