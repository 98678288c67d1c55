"""Describe a checkpoint, or write its weights as safetensors under this project's or upstream's names.

    python tools/convert_checkpoint.py --inspect large_best.pt
    python tools/convert_checkpoint.py large_best.pt large_best.safetensors
    python tools/convert_checkpoint.py runs/clip_large upstream.safetensors --to upstream

INPUT is a file of OpenAI CLIP, open_clip, upstream EgoHOD, AVION or this project, a run or checkpoint folder of this
project, or an open_clip tag such as ViT-B-16:laion2b_s34b_b88k that is in open_clip's local cache. Nothing in a file is
executed, and nothing is downloaded without --download. Tensors keep their dtype.

--to egohod   this project's names (plain blocks: attn.in_proj_weight, mlp.c_fc, mlp.c_proj); upstream reads these too
              where it runs without flash attention
--to upstream the names that upstream's released configs save (vision blocks: attn.Wqkv.weight, mlp.fc1, mlp.fc2)

Exit code 2: an error in the input or the output, which the message explains. See docs/checkpoints.md.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from _common import run_tool, tool_parser
from safetensors.torch import save_file

from egohod import cli
from egohod.errors import UserError
from egohod.model.checkpoints import Family, WeightFile, upstream_state
from egohod.model.config import geometry
from egohod.runtime import atomic_write
from egohod.training.checkpoint import open_weights

log = logging.getLogger("convert_checkpoint")

# For the commands of --inspect: STEM.yml trains a geometry; STEM_eval.yml evaluates it and needs no training data.
CONFIGS = {
    "CLIP_VITB16": "configs/config/clip_base",
    "CLIP_VITL14": "configs/config/clip_large",
    "CLIP_VITL14_336PX": "configs/config/clip_large",
    "CLIP_VITB16_Slowfast": "configs/config/egovideo_base",
    "CLIP_VITL14_Slowfast": "configs/config/egovideo_large",
    "CLIP_VITL14_336PX_Slowfast": "configs/config/egovideo_large",
    "DEMO": "configs/demo",
    "DEMO_Slowfast": "configs/demo",
}


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("input", metavar="INPUT", help="file, folder or open_clip tag")
    parser.add_argument("output", metavar="OUTPUT", nargs="?", type=Path, help="safetensors file to write")
    parser.add_argument("--to", choices=("egohod", "upstream"), default="egohod", help="names (default: egohod)")
    parser.add_argument("--inspect", action="store_true", help="describe INPUT; write nothing")
    parser.add_argument("--download", action="store_true", help="let open_clip download a tag that is not cached")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    args = parser.parse_args(arguments)
    if args.inspect == (args.output is not None):
        raise UserError("give either --inspect or an OUTPUT file; see --help")
    # Before INPUT is opened, which may take minutes.
    if output := args.output:
        if output.suffix != ".safetensors":
            raise UserError(f"{output}: must end in .safetensors, such as {output.with_suffix('.safetensors').name}")
        if not output.parent.is_dir():
            raise UserError(f"{output}: the folder {output.parent} does not exist")
        if output.exists() and not args.force:
            raise UserError(f"{output}: exists; --force replaces it")
    weights = open_weights(args.input, download=args.download)
    if args.inspect:
        for name, text in inspect(weights).items():
            print(f"{name:<12} {text}")
    else:
        convert(weights, args.output, args.to)
    return cli.DONE


def inspect(weights: WeightFile) -> dict[str, str]:
    """A description of a weight file, as lines of (name, text)."""
    shape = weights.shape
    types = sorted({str(value.dtype).removeprefix("torch.") for value in weights.tensors.values()})
    count = sum(value.numel() for value in weights.tensors.values())
    lines = {
        "file": weights.source,
        "family": f"{weights.family} ({weights.container}, {weights.spelling} spelling)",
        "parameters": f"{count / 1e6:.1f} M in {len(weights.tensors)} tensors, {' and '.join(types)}",
    }
    if weights.dropped:
        reasons = {reason: list(weights.dropped.values()).count(reason) for reason in weights.dropped.values()}
        lines["unused"] = ", ".join(f"{number} tensors ({reason})" for reason, number in reasons.items())
    for text in weights.remarks:
        lines["remark"] = text
    for name, text in weights.beside.items():
        lines[f"  {name}"] = text
    if shape is None:
        kind = "not a whole dual encoder, so no config loads it"
        if weights.spelling == "timm":
            kind = "on a timm backbone: model.name=timm/NAME, or open_clip/NAME for both towers of an open_clip model"
        # Our own files record what they are of.
        knobs = [f"{key}={value}" for key, value in weights.settings.items() if key.startswith("model.")]
        lines["model"] = ", ".join(knobs) if "model.name" in weights.settings else kind
        return lines
    # A run on a model of open_clip records its name.
    lines["model"] = f"{shape.name or weights.settings.get('model.name', 'no geometry of this project')}: {shape}"
    lines["frames"] = f"{shape.num_frames}" if shape.num_frames else "an image model: no temporal embedding"
    lines["motion"] = "motion adapters (slow-fast)" if shape.slowfast else "none: a dual encoder without adapters"
    if shape.motion_stem:
        lines["motion"] = f"a motion stem{' and motion adapters (slow-fast)' if shape.slowfast else ''}"
    if shape.name is None:
        return lines
    # Commands to copy, which train from the file and evaluate it, with every knob that shapes leave open.
    knobs = [f"model.name={shape.name}"]
    if shape.num_frames:
        knobs.append(f"model.num_frames={shape.num_frames}")
    recorded = {key: value for key, value in weights.settings.items() if key not in ("model.name", "model.num_frames")}
    knobs += [f"{key}={value}" for key, value in recorded.items()]
    stem = CONFIGS.get(shape.name, "YOURS")
    if weights.family.is_clip:
        start = f"model.weights.source=clip model.weights.path={weights.source}"
        lines["train"] = f"main_pretrain.py --config_file {stem}.yml {start} {' '.join(knobs)}"
        # Training learns new projections, but zero-shot evaluation of the file itself needs its own.
        knobs += ["model.weights.source=clip", "model.weights.projections=keep"]
        if weights.family is Family.OPENAI:
            knobs.append("model.activation=quick_gelu")
    elif "model.activation" not in weights.settings:
        knobs.append("model.activation=gelu")
    if shape.embed_dim != geometry(shape.name).embed_dim:
        knobs.append(f"model.embed_dim={shape.embed_dim}")
    lines["evaluate"] = f"main_eval.py --config_file {stem}_eval.yml --checkpoint {weights.source} {' '.join(knobs)}"
    return lines


def convert(weights: WeightFile, output: Path, to: str) -> None:
    """Write ``weights`` to ``output``: an interrupted conversion leaves no half-written file under this name."""
    tensors = upstream_state(weights) if to == "upstream" else weights.tensors
    # Family and settings travel along: names alone would make an OpenAI model a trained video model of this project.
    metadata = {"format": "pt", "family": str(weights.family), "settings": json.dumps(weights.settings)}
    with atomic_write(output) as temporary:
        # safetensors refuses views, such as one row that a file repeats.
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=metadata)
    log.info("%s: %d tensors of %s, %s's names", output, len(tensors), weights.family, to)
    left_out = len(weights.tensors) - len(tensors)
    if weights.dropped or left_out:
        log.info("left out: %s", ", ".join([*weights.dropped, *([f"{left_out} of the loss"] if left_out else [])]))


if __name__ == "__main__":
    run_tool(main)
