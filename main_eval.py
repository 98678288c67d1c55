"""Evaluate a checkpoint, zero-shot or with its fine-tuned heads, on a benchmark or on those of the configuration.

The demo worlds:    python main_eval.py --config_file configs/demo.yml --checkpoint runs/demo
A benchmark:        python main_eval.py --config_file configs/config/clip_base_eval.yml --benchmark ek100_mir \\
                        --checkpoint base_best.pt --metadata epic-kitchens-100 --root EK100_320p_15sec
All with data:      python main_eval.py --config_file configs/config/clip_base_eval.yml --benchmark all --checkpoint ...
Temporal controls:  python main_eval.py --checkpoint runs/demo --controls shuffle,reverse,freeze
Fine-tuned heads:   python main_eval.py --config_file configs/finetune/ek100_cls.yml --checkpoint runs/ek100_cls \\
                        --benchmark ek100_cls --heads
An outside model:   python main_eval.py --checkpoint open_clip:ViT-B-16:weights.pt --benchmark ek100_cls ...
Several processes:  torchrun --nproc_per_node=2 main_eval.py --config_file configs/demo.yml --checkpoint runs/demo

Prints the results as a table, and writes results.json, details/ and report.html to --output. Clips are decoded and
encoded once: evaluate.cache stores features for other benchmarks and to resume after an interruption.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from egohod import cli, config
from egohod.config import Config
from egohod.data.dataset import tokenizer_for
from egohod.data.labels import ClassSpace
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.evaluation.embed import FrameAverage, fingerprint
from egohod.evaluation.report import write_report
from egohod.evaluation.results import PUBLISHED, write_results
from egohod.evaluation.runner import Benchmark, benchmark, execution_of, resolve_benchmarks
from egohod.model.config import OPEN_CLIP
from egohod.model.reranker import load_reranker
from egohod.training.build import build_model
from egohod.training.checkpoint import classes_of

log = logging.getLogger("main_eval")


def main(arguments: Sequence[str]) -> int:
    parser = cli.parser(__doc__, "configs/demo.yml")
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a checkpoint or run folder, a file of upstream EgoHOD or AVION, or open_clip:NAME:FILE",
    )
    add(
        "--benchmark",
        metavar="NAME",
        help="one of evaluate.benchmarks, or all (default: those of evaluate.during and evaluate.final)",
    )
    add("--metadata", metavar="PATH", help="the benchmark's annotations (evaluate.benchmarks.NAME.metadata)")
    add("--root", metavar="FOLDER", help="the benchmark's videos (evaluate.benchmarks.NAME.root)")
    add("--controls", metavar="LIST", help="shuffle,reverse,freeze: same as evaluate.controls=[...]")
    add("--heads", action="store_true", help="evaluate the fine-tuned classification heads instead of text similarity")
    add("--allow_missing", action="store_true", help="skip clips that cannot be read; marks numbers as partial")
    add("--published", choices=list(PUBLISHED), metavar="MODEL", help=f"compare with {', '.join(PUBLISHED)}")
    add("--output", default="results", metavar="FOLDER", help="where results.json, report.html go (default: results)")
    args = parser.parse_intermixed_args(arguments)
    if args.benchmark == "demo":
        log.warning("--benchmark demo is now the default; the old name is read for one more release")
        args.benchmark = None
    # A CLIP file can be measured too: model.weights.source=clip model.weights.projections=keep.
    # Of the file: what model it holds.
    stored = cli.model_of(args.checkpoint, args.overrides)
    overrides = ["model.weights.source=checkpoint", *stored, *args.overrides]
    overrides += [f"evaluate.controls=[{args.controls}]"] if args.controls else []
    # Nothing is trained here, so no low-rank parts are added and no base file is compared.
    overrides += [f"model.weights.path={args.checkpoint}", "train.trainable=all"]
    cfg = config.load(args.config_file, overrides)
    classes = None
    if args.heads:
        if not Path(args.checkpoint).is_dir():
            raise UserError(f"--heads: {args.checkpoint} is not a run or checkpoint folder of main_finetune.py")
        # The heads are those of the checkpoint, whatever the configuration says.
        cfg.model.heads, classes = classes_of(Path(args.checkpoint))
    with cli.joined(cfg) as dist:
        if args.checkpoint.startswith("open_clip:"):
            model: Any = FrameAverage(args.checkpoint).to(dist.device)
        else:
            model = build_model(cfg, dist, classes)
        # First: an output that cannot be written should not cost an evaluation of hours.
        Path(args.output).mkdir(parents=True, exist_ok=True)
        # A path says little: the checksum names the weights in results.json and in the cache of features.
        checkpoint = {"path": args.checkpoint, "sha256": fingerprint(model)}
        benchmarks = _benchmarks(cfg, dist, model, args, checkpoint["sha256"], classes)
        # All annotations are read by now: a mistake in the last benchmark surfaces before the first is computed.
        results = [(each, each.measure(model)) for each in benchmarks]
        write_results(args.output, cfg, dist, results, checkpoint=checkpoint, published=args.published)
        if dist.is_main:  # of the files alone, as tools/report.py makes it again
            write_report(args.output, decoder=cfg.data.decoder)
    return cli.DONE


def _benchmarks(
    cfg: Config, dist: Distributed, model: Any, args: Any, weights: str, classes: ClassSpace | None
) -> list[Benchmark]:
    """What ``--benchmark`` asks for, for this model."""
    if args.benchmark:
        chosen = resolve_benchmarks(cfg, args.benchmark, args.root, args.metadata)
    elif args.root or args.metadata:
        raise UserError("--root and --metadata need --benchmark: they belong to one benchmark")
    else:
        names = dict.fromkeys([*cfg.evaluate.during, *cfg.evaluate.final])
        chosen = {name: cfg.evaluate.benchmarks[name] for name in names}
        if not chosen:
            raise UserError("nothing to evaluate: set evaluate.during or evaluate.final, or give --benchmark")
    # The same weights give other features with another activation or another path.
    architecture = {key: value for key, value in vars(cfg.model).items() if key != "weights"}
    identity = {"weights": weights, "model": str(architecture)}
    if cfg.model.text or cfg.model.name.startswith(OPEN_CLIP):
        # What the configuration of a folder says can change while its name and its weights stay.
        identity["geometry"] = str(cfg.model.geometry())
    execution = dataclasses.replace(
        execution_of(cfg, dist),
        cache=Path(cfg.evaluate.cache) if cfg.evaluate.cache else None,
        identity=identity,
        allow_missing=args.allow_missing,
    )
    # An outside model brings its own resolution and words; cfg.model does not describe it.
    if isinstance(model, FrameAverage):
        size, tokenizer = model.size, model.tokenizer
    else:
        size, tokenizer = None, tokenizer_for(cfg.model)
    options: dict[str, Any] = {"size": size, "tokenizer": tokenizer}
    options |= {"controls": cfg.evaluate.controls, "classes": classes}
    if cfg.evaluate.rerank.path and classes is None:
        options["reranker"] = load_reranker(cfg.evaluate.rerank.path)
    benchmarks = [benchmark(cfg, name, each, execution, **options) for name, each in chosen.items()]
    if cfg.evaluate.rerank.path and all(each.reranker is None for each in benchmarks):
        log.warning("evaluate.rerank does nothing: none of %s is retrieval by texts", ", ".join(chosen))
    return benchmarks


if __name__ == "__main__":
    sys.exit(cli.run(main))
