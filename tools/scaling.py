"""Predict throughput on 8, 64 and 512 GPUs from measurements on one core: the tables of docs/scaling.md.

    python tools/scaling.py                               the tables for an A100 80 GB
    python tools/scaling.py --peak 989 --utilisation 0.3  another GPU (bf16 TFLOP/s), another share of its peak

Nothing is measured here; each constant in the code states whether it was measured or assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from _common import markdown_table, run_tool, tool_parser

from egohod import cli
from egohod.config import PROJECT, load_leniently
from egohod.model.cost import clip_flops, predict
from egohod.model.dual_encoder import create_model
from egohod.training.build import fewest_blocks

# Measured: CPU seconds of one core to read and decode a clip of 2 s, by frames (docs/benchmarks.md, decoding): the
# original 426x320 with a key frame every 15, and chunks of tools/chunk_videos.py at short side 256.
ORIGINAL, CHUNKED = {4: 0.031, 16: 0.043}, {4: 0.009, 16: 0.017}
# Measured: CPU seconds to crop one stream of frames in uint8 (docs/benchmarks.md, from file to batch, less decoding).
CROP = {4: 0.001, 16: 0.003}
# Measured: bytes of a 15 s chunk of 426x320 H.264, the most that a clip within one chunk fetches.
CHUNK_BYTES = 1.3e6
# Assumed: network bandwidth of a node (8 GPUs), bytes a second (200 Gbit/s).
LINK, NODE_GPUS = 25e9, 8
# Assumed: bytes of memory of a GPU, which decide how many blocks are checkpointed.
MEMORY = 80e9
GPUS = (8, 64, 512)


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
    clips_per_second: float  # of one GPU
    cores_original: float
    cores_chunked: float
    storage: float  # of all GPUs, a second
    gathered: float  # received by each GPU a step: the others' features forward, their gradients backward
    reduced: float  # sent and received by each GPU a step: gradients of the weights, ring all-reduce in float32
    compute_seconds: float
    network_seconds: float
    hours: float


@dataclass(frozen=True)
class Cost:
    """Machine-independent cost of a recipe: operations of a clip, trainable parameters, and sizes of its features."""

    work: float
    forward: float
    trained: int
    batch: int
    frames: int
    width: int


@lru_cache
def cost(recipe: Recipe) -> Cost:
    """Cost of a recipe by its configuration; no data is read, so that its paths need not be set."""
    cfg, _ = load_leniently(PROJECT / recipe.config)
    towers = cfg.model.geometry()
    sizes = towers, cfg.model.num_frames, towers.context_length, cfg.model.patch_dropout, cfg.model.fast
    flops = clip_flops(*sizes, motion_stem=cfg.model.motion_stem)
    # The weights of the largest model are gigabytes; on the meta device only their shapes exist.
    with torch.device("meta"):
        model = create_model(cfg.model, cfg.loss)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Cost(flops.step, flops.forward, trained, cfg.train.global_batch_size, cfg.model.num_frames, towers.embed_dim)


@lru_cache
def clips_that_fit(recipe: Recipe, blocks: int) -> int:
    """Clips at a time on a GPU with so many blocks checkpointed, as training predicts it."""
    cfg, _ = load_leniently(PROJECT / recipe.config)
    return predict(cfg.model, dtype=torch.bfloat16, loss=cfg.loss, blocks=blocks, on_gpu=True).fits(MEMORY)


def forward_passes(recipe: Recipe, gpus: int) -> float:
    """Forward passes that a step repeats to save memory: of checkpointed blocks, and of all where it accumulates."""
    cfg, _ = load_leniently(PROJECT / recipe.config)
    assert cfg.model.checkpoint_blocks == "auto"
    blocks, clips = fewest_blocks(cfg, gpus, partial(clips_that_fit, recipe))
    return blocks / cfg.model.geometry().vision_layers + (clips * gpus < cfg.train.global_batch_size)


def plan(recipe: Recipe, gpus: int, peak: float, utilisation: float) -> Plan:
    """The arithmetic of docs/scaling.md. ``peak`` in operations a second; ``utilisation``: the fraction reached."""
    each = cost(recipe)
    batch, frames, others = each.batch, each.frames, (gpus - 1) / gpus
    repeated = forward_passes(recipe, gpus) if batch >= gpus else 0.0
    speed = peak * utilisation / (each.work + repeated * each.forward)
    compute = batch / gpus / speed
    gathered = 2 * 2 * batch * each.width * 4 * others
    reduced = 2 * each.trained * 4 * others
    # Within a node links are ten times as fast: only what crosses between nodes counts, and in a ring all crosses once.
    network = (gathered + reduced) / LINK if gpus > NODE_GPUS else 0.0
    # The network works while the GPUs compute the next gradients: the slower of both decides.
    rate = batch / max(compute, network)
    return Plan(
        gpus=gpus,
        per_gpu=batch / gpus,
        clips_per_second=speed,
        cores_original=rate / gpus * (ORIGINAL[frames] + CROP[frames]),
        cores_chunked=rate / gpus * (CHUNKED[frames] + CROP[frames]),
        storage=rate * CHUNK_BYTES,
        gathered=gathered,
        reduced=reduced,
        compute_seconds=compute,
        network_seconds=network,
        hours=recipe.epochs * recipe.clips / rate / 3600,
    )


def table(recipe: Recipe, peak: float, utilisation: float) -> str:
    """The plans of one recipe by number of GPUs, in Markdown."""
    head = [
        *("GPUs", "clips a step and GPU", "clips/s and GPU, computing", "decode cores a GPU, original / chunked"),
        *("storage", "features gathered", "gradients reduced", "computing / network a step", "hours"),
    ]
    rows = []
    for gpus in GPUS:
        each = plan(recipe, gpus, peak, utilisation)
        cells = [f"{each.per_gpu:g}", f"{each.clips_per_second:.0f}"]
        cells += [f"{each.cores_original:.1f} / {each.cores_chunked:.1f}", f"{each.storage / 1e9:.2f} GB/s"]
        cells += [f"{each.gathered / 1e6:.1f} MB", f"{each.reduced / 1e9:.2f} GB"]
        cells += [f"{each.compute_seconds * 1000:.0f} / {each.network_seconds * 1000:.0f} ms", f"{each.hours:.1f}"]
        if each.per_gpu < 1:
            cells = ["the batch has fewer clips than there are GPUs", *[""] * 7]
        rows.append([str(gpus), *cells])
    return "\n".join(markdown_table(head, rows))


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("--peak", type=float, default=312.0, help="bf16 TFLOP/s of the GPU (default: 312, A100)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="fraction that a step reaches (default: 0.4)")
    args = parser.parse_args(arguments)
    for recipe in RECIPES:
        print(f"{recipe.name} (`{recipe.config}`)\n\n{table(recipe, args.peak * 1e12, args.utilisation)}\n")
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
