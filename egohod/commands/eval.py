"""Evaluate a checkpoint, zero-shot or with its fine-tuned heads, on a benchmark or on those of the configuration.

The demo worlds:    python main_eval.py --config_file configs/demo.yml --checkpoint runs/demo
A benchmark:        python main_eval.py --config_file configs/config/clip_base_eval.yml --benchmark ek100_mir \\
                        --checkpoint base_best.pt --metadata epic-kitchens-100 --root EK100_320p_15sec
All with data:      python main_eval.py --config_file configs/config/clip_base_eval.yml --benchmark all --checkpoint ...
Temporal controls:  python main_eval.py --checkpoint runs/demo --controls shuffle,reverse,freeze
Fine-tuned heads:   python main_eval.py --config_file configs/finetune/ek100_cls.yml --checkpoint runs/ek100_cls \\
                        --benchmark ek100_cls --heads
Ensemble:           python main_eval.py --checkpoint runs/a --benchmark ek100_mir evaluate.ensemble=[runs/b,runs/c] ...
Challenge files:    python main_eval.py --checkpoint runs/a --benchmark ek100_mir evaluate.submission=submission \\
                        evaluate.supervision=[2,3,3] ...
An outside model:   python main_eval.py --checkpoint open_clip:ViT-B-16:weights.pt --benchmark ek100_cls ...
                    (transformers:FOLDER is a CLIP-like model of transformers, features:FOLDER stored features)
Several processes:  torchrun --nproc_per_node=2 main_eval.py --config_file configs/demo.yml --checkpoint runs/demo

Prints the results as a table, and writes results.json, details/ and report.html to --output. Clips are decoded and
encoded once: evaluate.cache stores features for other benchmarks and to resume after an interruption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from egohod import cli, config
from egohod.config import Config
from egohod.data.dataset import tokenizer_for
from egohod.data.labels import ClassSpace
from egohod.data.loader import EvalLoader
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.evaluation.adapters import StoredFeatures
from egohod.evaluation.cards import PUBLISHED
from egohod.evaluation.embed import OUTSIDE, fingerprint, outside_model
from egohod.evaluation.report import write_report
from egohod.evaluation.results import write_results
from egohod.evaluation.runner import Benchmark, Measured, execution_of, measured, resolve_benchmarks
from egohod.evaluation.submission import challenge_task, write_submission
from egohod.model.config import OPEN_CLIP
from egohod.model.reranker import load_reranker
from egohod.training.build import build_model
from egohod.training.checkpoint import classes_of

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    parser = cli.parser(__doc__, "configs/demo.yml")
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a checkpoint or run folder, a file of upstream EgoHOD or AVION, hf-hub:ORG/NAME; open_clip:NAME:FILE, "
        "transformers:FOLDER or features:FOLDER",
    )
    add(
        "--benchmark",
        metavar="NAME",
        help="names of evaluate.benchmarks, comma-separated, or all (default: those of evaluate.during and "
        "evaluate.final)",
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
    cfg, classes = _configuration(args, args.checkpoint)
    members = [(cfg, classes), *(_configuration(args, path) for path in cfg.evaluate.ensemble)]
    for path, (other, others) in zip(cfg.evaluate.ensemble, members[1:], strict=True):
        if others != classes or other.model.heads != cfg.model.heads:
            raise UserError(f"evaluate.ensemble: {path} has heads of another kind or classes than {args.checkpoint}")
    with cli.joined(cfg, inference=True) as dist:
        # First: an output that cannot be written should not cost an evaluation of hours.
        Path(args.output).mkdir(parents=True, exist_ok=True)
        models, described, benchmarks = list[Any](), list[dict[str, str]](), list[list[Measured]]()
        loader = EvalLoader()  # one set of decoding processes for all
        for path, (each, _) in zip([args.checkpoint, *cfg.evaluate.ensemble], members, strict=True):
            if path.startswith(OUTSIDE):
                models.append(outside_model(path).to(dist.device))
            else:
                models.append(build_model(each, dist, classes))
            # A path says little: the checksum names the weights in results.json and in the cache of features.
            name = path if path.startswith(OUTSIDE) else each.model.name
            described.append({"path": path, "sha256": fingerprint(models[-1]), "model": name})
            benchmarks.append(_benchmarks(each, dist, models[-1], args, described[-1]["sha256"], classes, loader))
        own = benchmarks[0]
        for model, made in zip(models[1:], benchmarks[1:], strict=True):
            for bench, member in zip(own, made, strict=True):
                if isinstance(bench, Benchmark) and isinstance(member, Benchmark):  # others refuse an ensemble
                    bench.members = [*bench.members, (member, model)]
                    member.tasks = bench.tasks  # of the same files, so one copy of a large matrix is enough
        if cfg.evaluate.submission and all(challenge_task(bench) is None for bench in own):
            raise UserError("evaluate.submission: only benchmarks of EK100 have a challenge, and none is evaluated")
        # All annotations are read by now: a mistake in the last benchmark surfaces before the first is computed.
        results = [(bench, bench.measure(models[0])) for bench in own]
        checkpoint: dict[str, Any] = {"path": args.checkpoint, "sha256": described[0]["sha256"]}
        if len(described) > 1:
            together = "".join(each["sha256"] for each in described)
            checkpoint |= {"sha256": hashlib.sha256(together.encode()).hexdigest(), "members": described}
        write_results(args.output, cfg, dist, results, checkpoint=checkpoint, published=args.published)
        if dist.is_main:
            for bench, result in results:
                if cfg.evaluate.submission and isinstance(bench, Benchmark) and challenge_task(bench) is not None:
                    written = write_submission(cfg.evaluate.submission, bench, result, cfg.evaluate.supervision)
                    log.info("wrote and checked %s", written)
            write_report(args.output, decoder=cfg.data.decoder)  # of the files alone, as tools/report.py makes it again
    return cli.DONE


def _configuration(args: Any, checkpoint: str) -> tuple[Config, ClassSpace | None]:
    """The configuration for a checkpoint, and with ``--heads`` the classes of its heads."""
    # A CLIP file can be measured too: model.weights.source=clip model.weights.projections=keep.
    # Of the file: what model it holds.
    stored = cli.model_of(checkpoint, args.overrides)
    overrides = ["model.weights.source=checkpoint", *stored, *args.overrides]
    overrides += [f"evaluate.controls=[{args.controls}]"] if args.controls else []
    # Nothing is trained here, so no low-rank parts are added and no base file is compared.
    overrides += [f"model.weights.path={checkpoint}", "train.trainable=all"]
    cfg = config.load(args.config_file, overrides)
    if not args.heads:
        return cfg, None
    if not Path(checkpoint).is_dir():
        raise UserError(f"--heads: {checkpoint} is not a run or checkpoint folder of main_finetune.py")
    # The heads are those of the checkpoint, whatever the configuration says.
    cfg.model.heads, classes = classes_of(Path(checkpoint))
    return cfg, classes


def _benchmarks(
    cfg: Config,
    dist: Distributed,
    model: Any,
    args: Any,
    weights: str,
    classes: ClassSpace | None,
    loader: EvalLoader,
) -> list[Measured]:
    """What ``--benchmark`` asks for, for this model; all members of an ensemble have the same ``loader``."""
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
    if stored := isinstance(model, StoredFeatures):
        cfg.evaluate.num_frames = model.frames
    execution = dataclasses.replace(
        execution_of(cfg, dist, loader),
        cache=Path(cfg.evaluate.cache) if cfg.evaluate.cache and not stored else None,
        identity=identity,
        allow_missing=args.allow_missing,
    )
    # An outside model brings its own resolution and words; cfg.model does not describe it.
    if str(cfg.model.weights.path).startswith(OUTSIDE):
        size, tokenizer = model.size, model.tokenizer
    else:
        size, tokenizer = None, tokenizer_for(cfg.model)
    options: dict[str, Any] = {"size": size, "tokenizer": tokenizer}
    options |= {"controls": cfg.evaluate.controls, "classes": classes, "need_videos": not stored}
    if cfg.evaluate.rerank.path and classes is None:
        options["reranker"] = load_reranker(cfg.evaluate.rerank.path)
    benchmarks = [measured(cfg, name, each, execution, **options) for name, each in chosen.items()]
    if cfg.evaluate.rerank.path and not any(isinstance(each, Benchmark) and each.reranker for each in benchmarks):
        log.warning("evaluate.rerank does nothing: none of %s is retrieval by texts", ", ".join(chosen))
    return benchmarks
