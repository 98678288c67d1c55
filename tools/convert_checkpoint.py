"""Describe a checkpoint, write its weights as safetensors, export its towers, or publish it on the Hugging Face Hub.

    python tools/convert_checkpoint.py --inspect large_best.pt
    python tools/convert_checkpoint.py large_best.pt large_best.safetensors
    python tools/convert_checkpoint.py runs/clip_large upstream.safetensors --to upstream
    python tools/convert_checkpoint.py runs/clip_large folder --export onnx
    python tools/convert_checkpoint.py runs/clip_large --push org/name --licence apache-2.0

INPUT is a file of OpenAI CLIP, open_clip, upstream EgoHOD, AVION or this project, a run or checkpoint folder of this
project, a repository hf-hub:org/name, or an open_clip tag such as ViT-B-16:laion2b_s34b_b88k that is in open_clip's
local cache. Nothing in a file is executed, and nothing is downloaded without --download, except hf-hub:... names.
Tensors keep their dtype.

--to egohod   this project's names (plain blocks: attn.in_proj_weight, mlp.c_fc, mlp.c_proj); upstream reads these too
              where it runs without flash attention
--to upstream the names that upstream's released configs save (vision blocks: attn.Wqkv.weight, mlp.fc1, mlp.fc2)

--export torch, onnx   both towers as video.pt2 and text.pt2, or video.onnx and text.onnx, in the folder OUTPUT, to run
                       without egohod (docs/export.md)
--export hub           what --push uploads, in the folder OUTPUT (docs/hub.md)

Exit code 2: an error in the input or the output, which the message explains. See docs/checkpoints.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from _common import run_tool, tool_parser

from egohod import cli
from egohod.errors import UserError
from egohod.model.checkpoints import Family, WeightFile
from egohod.model.config import geometry
from egohod.publish import export, push_to_hub, save_weights, write_folder
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
    add = parser.add_argument
    add("input", metavar="INPUT", help="file, folder, hf-hub:org/name or open_clip tag")
    add(
        "output", metavar="OUTPUT", nargs="?", type=Path, help="safetensors file, or with --export the folder, to write"
    )
    add("--to", choices=("egohod", "upstream"), default="egohod", help="names (default: egohod)")
    add("--inspect", action="store_true", help="describe INPUT; write nothing")
    add("--export", choices=("torch", "onnx", "hub"), help="write a folder of this kind")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of --export torch and onnx")
    add("--model", metavar="NAME", help="with --export: the model, where INPUT does not say")
    add("--push", metavar="ORG/NAME", help="publish INPUT on the Hugging Face Hub")
    add("--private", action="store_true", help="with --push: a new repository is private")
    add("--results", metavar="PATH", help="with --push and --export hub: results.json of INPUT (default: the run's)")
    add("--licence", default="other", help="with --push and --export hub: such as apache-2.0 (default: other)")
    add("--download", action="store_true", help="let open_clip download a tag that is not cached")
    add("--force", action="store_true", help="replace OUTPUT if it exists")
    args = parser.parse_args(arguments)
    if sum((args.inspect, args.output is not None, args.push is not None)) != 1:
        raise UserError("give either --inspect or an OUTPUT, or --push; see --help")
    is_published, is_exported = args.push or args.export == "hub", args.export in ("torch", "onnx")
    misplaced = {
        "--export": args.export and args.output is None,
        "--dtype or --model": (args.dtype != "float32" or args.model) and not is_exported,
        "--private": args.private and not args.push,
        "--results or --licence": (args.results or args.licence != "other") and not is_published,
        "--download, --force or --to": (args.download or args.force or args.to != "egohod")
        and (is_published or is_exported),
    }
    if ignored := [option for option, is_misplaced in misplaced.items() if is_misplaced]:
        raise UserError(f"{ignored[0]} has no effect with the other options; see --help")
    about = {"results": args.results, "licence": args.licence}
    if args.push:
        print(push_to_hub(args.input, args.push, private=args.private, **about))
        return cli.DONE
    if args.export == "hub":
        print(write_folder(args.input, args.output, **about))
        return cli.DONE
    if args.export:
        differences = export(args.input, args.output, args.export, dtype=args.dtype, name=args.model)
        for tower, value in differences.items():
            print(f"{args.output}/{tower}: differs from the model in float32 by {value:.2g} at most")
        return cli.DONE
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
        return cli.DONE
    unnamed = save_weights(weights, args.output, args.to)
    log.info(
        "%s: %d tensors of %s, %s's names", args.output, len(weights.tensors) - len(unnamed), weights.family, args.to
    )
    if weights.dropped or unnamed:
        log.info("left out: %s", ", ".join([*weights.dropped, *([f"{len(unnamed)} of the loss"] if unnamed else [])]))
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


if __name__ == "__main__":
    run_tool(main)
