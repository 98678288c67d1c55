"""Success of a robot that sees through a model's frozen features (docs/robot.md): behaviour cloning in simulation.

python tools/robot.py --checkpoint runs/demo --output results/robot              # configs/robot/metaworld.yml
python tools/robot.py --checkpoint base_best.pt --model CLIP_VITB16 scene.image_size=224 device=cuda
python tools/robot.py --checkpoint open_clip:ViT-B-16:weights.pt                 # a baseline of single frames
python tools/robot.py --checkpoint runs/demo --dry_run                           # what it would cost

Prints the table, and writes results.json, report.html and films to --output. Rerun the same command to resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import run_tool
from omegaconf import OmegaConf

import egohod
from egohod import cli
from egohod.distributed import pick_device
from egohod.errors import UserError
from egohod.evaluation.embed import FrameAverage, fingerprint
from egohod.robot import benchmark
from egohod.robot.config import RobotConfig, load
from egohod.training.checkpoint import open_weights


def main(arguments: Sequence[str]) -> int:
    parser = cli.parser(__doc__ or "", "configs/robot/metaworld.yml", RobotConfig)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="whatever load_weights reads, or open_clip:NAME[:FILE]")
    add("--model", metavar="NAME", help="what the checkpoint holds, e.g. CLIP_VITB16; run folders name it themselves")
    add("--output", type=Path, default=Path("results/robot"), metavar="FOLDER", help="default: results/robot")
    add("--dry_run", action="store_true", help="measure a few steps, print what the run would cost, exit")
    args = parser.parse_intermixed_args(arguments)
    cfg = load(args.config_file, args.overrides)
    device = pick_device(cfg.device)
    model, random = (each.to(device).eval() for each in encoders(args.checkpoint, args.model))
    if args.dry_run:
        for part, seconds in benchmark.estimate(cfg, model, random).items():
            print(f"{part:24}{seconds / 60:8.1f} minutes")
        return cli.DONE
    args.output.mkdir(parents=True, exist_ok=True)
    checkpoint = {"path": args.checkpoint, "sha256": fingerprint(model)}
    print(benchmark.markdown(benchmark.run(cfg, model, random, checkpoint, args.output)))
    return cli.DONE


def encoders(checkpoint: str, name: str | None) -> tuple[Any, Any]:
    """The model of a checkpoint, and the same with random weights, of seed 0."""
    torch.manual_seed(0)
    if checkpoint.startswith("open_clip:"):
        return FrameAverage(checkpoint), FrameAverage(":".join(checkpoint.split(":")[:2]))
    content = open_weights(checkpoint)
    name = name or content.settings.get("model.name")
    if name is None:
        raise UserError(f"{checkpoint}: does not say which model it holds; give --model, e.g. CLIP_VITB16")
    knobs = OmegaConf.create({})
    for key, value in content.model_knobs.items():
        if key != "name":
            OmegaConf.update(knobs, key, value, force_add=True)
    random = egohod.create_model(name, **{str(key): value for key, value in OmegaConf.to_container(knobs).items()})
    # Of CLIP's own weights, too, features are what they were trained to be.
    projections = "keep" if content.family.is_clip else "auto"
    return egohod.create_model_and_transforms(name, checkpoint, projections=projections)[0], random


if __name__ == "__main__":
    run_tool(main)
