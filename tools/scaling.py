"""From figures measured on one core to 8, 64 and 512 GPUs: the tables of docs/scaling.md.

    python tools/scaling.py                               the tables for an A100 80 GB
    python tools/scaling.py --peak 989 --utilisation 0.3  another GPU (bf16 TFLOP/s), another share of its peak

Nothing is measured here; each constant has its source beside it, measured or assumed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache

import torch
from _common import tool_parser

from egohod import cli
from egohod.config import PROJECT, load_leniently
from egohod.model.cost import forward_flops, step_flops
from egohod.model.dual_encoder import create_model
from egohod.model.zoo import geometry

# Measured: CPU seconds of one core to read and decode a clip of 2 s, by frames (docs/benchmarks.md, decoding): the
# original 426x320 with a key frame every 15, and chunks of tools/chunk_videos.py at short side 256.
ORIGINAL, CHUNKED = {4: 0.031, 16: 0.043}, {4: 0.009, 16: 0.017}
# Measured: CPU seconds to crop one stream of frames in uint8 (docs/benchmarks.md, from file to batch, less decoding).
CROP = {4: 0.001, 16: 0.003}
# Measured: bytes of a 15 s chunk of 426x320 H.264, the most that a clip within one chunk fetches.
CHUNK_BYTES = 1.3e6
# Assumed: network bandwidth of a node (8 GPUs), bytes a second (200 Gbit/s).
LINK = 25e9


@dataclass(frozen=True)
class Recipe:
    """A training recipe as published, or ours where none is."""

    name: str
    config: str
    clips: float
    epochs: float


# Clips: as many as Ego4D's narrations; with HowTo100M in proportion to the sizes of the released tables (1.95 GB to
# 0.85 GB). The stage of EgoVideo is unpublished, its epochs are this project's configuration.
RECIPES = (
    Recipe("ViT-B/16, 4 frames", "configs/config/clip_base.yml", 4.0e6, 15),
    Recipe("ViT-L/14 336 px, 4 frames", "configs/config/clip_large.yml", 9.2e6, 15),
    Recipe("EgoVideo ViT-B/16, 4 + 16 frames", "configs/config/egovideo_base.yml", 4.0e6, 5),
)


@dataclass(frozen=True)
class Plan:
    """Resources of a recipe on a number of GPUs; times in seconds, sizes in bytes."""

    gpus: int
    per_gpu: float
    clips_per_second: float
    """Of one GPU."""
    cores_original: float
    cores_chunked: float
    storage: float
    """Of all GPUs, a second."""
    gathered: float
    """Received by each GPU a step: the others' features forward, their gradients backward."""
    reduced: float
    """Sent and received by each GPU a step: the gradients of the weights, ring all-reduce in float32."""
    compute_seconds: float
    network_seconds: float
    hours: float


@dataclass(frozen=True)
class Cost:
    """Machine-independent cost of a recipe: operations of a clip, trainable parameters, and sizes of its features."""

    work: float
    trained: int
    batch: int
    frames: int
    width: int


@lru_cache
def cost(recipe: Recipe) -> Cost:
    """Cost of a recipe by its configuration; no data is read, so that its paths need not be set."""
    cfg, _ = load_leniently(PROJECT / recipe.config)
    towers = geometry(cfg.model.name)
    sizes = towers, cfg.model.num_frames, towers.context_length, cfg.model.patch_dropout, cfg.model.fast
    work = float(step_flops(*sizes))
    if cfg.model.gradient_checkpointing:  # blocks are computed again in the backward pass
        work += forward_flops(*sizes)
    with torch.device("meta"):
        model = create_model(cfg.model, cfg.loss)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Cost(work, trained, cfg.train.global_batch_size, cfg.model.num_frames, towers.embed_dim)


def plan(recipe: Recipe, gpus: int, peak: float, utilisation: float) -> Plan:
    """The arithmetic of docs/scaling.md. ``peak`` in operations a second; ``utilisation``: the fraction reached."""
    each = cost(recipe)
    batch, frames, others = each.batch, each.frames, (gpus - 1) / gpus
    speed = peak * utilisation / each.work
    compute = batch / gpus / speed
    gathered = 2 * 2 * batch * each.width * 4 * others
    reduced = 2 * each.trained * 4 * others
    # Within a node links are ten times as fast: only what crosses between nodes counts, and in a ring all crosses once.
    network = (gathered + reduced) / LINK if gpus > 8 else 0.0
    step = max(compute, network)
    return Plan(
        gpus,
        batch / gpus,
        speed,
        batch / step / gpus * (ORIGINAL[frames] + CROP[frames]),
        batch / step / gpus * (CHUNKED[frames] + CROP[frames]),
        batch / step * CHUNK_BYTES,
        gathered,
        reduced,
        compute,
        network,
        recipe.epochs * recipe.clips / (batch / step) / 3600,
    )


def table(recipe: Recipe, peak: float, utilisation: float) -> str:
    """The plans of one recipe on 8, 64 and 512 GPUs, in Markdown."""
    lines = [
        "| GPUs | clips a step and GPU | clips/s and GPU, computing | decode cores a GPU, original / chunked "
        "| storage | features gathered | gradients reduced | computing / network a step | hours |",
        "|" + "---|" * 9,
    ]
    for gpus in (8, 64, 512):
        each = plan(recipe, gpus, peak, utilisation)
        if each.per_gpu < 1:
            lines.append(f"| {gpus} | the batch has fewer clips than there are GPUs |" + " |" * 7)
            continue
        lines.append(
            f"| {each.gpus} | {each.per_gpu:g} | {each.clips_per_second:.0f} | {each.cores_original:.1f} / "
            f"{each.cores_chunked:.1f} | {each.storage / 1e9:.2f} GB/s | {each.gathered / 1e6:.1f} MB | "
            f"{each.reduced / 1e9:.2f} GB | {each.compute_seconds * 1000:.0f} / {each.network_seconds * 1000:.0f} ms | "
            f"{each.hours:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("--peak", type=float, default=312.0, help="bf16 TFLOP/s of the GPU (default: 312, A100)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="fraction that a step reaches (default: 0.4)")
    args = parser.parse_args()
    for recipe in RECIPES:
        print(f"{recipe.name} (`{recipe.config}`)\n\n{table(recipe, args.peak * 1e12, args.utilisation)}\n")
    return cli.DONE


if __name__ == "__main__":
    sys.exit(cli.while_read(main))
