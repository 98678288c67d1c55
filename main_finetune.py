"""Fine-tune a pretrained video and text encoder for graded retrieval or action classes, on anyone's labels.

Retrieval:           python main_finetune.py --config_file configs/finetune/ek100_mir.yml model.weights.path=PATH
The demo world:      python main_finetune.py --config_file configs/finetune/demo_mir.yml model.weights.path=runs/demo
Several on a node:   torchrun --nproc_per_node=4 main_finetune.py --config_file configs/finetune/ek100_mir.yml ...
Look before leaping: the same with --dry_run

It is the loop of main_pretrain.py: the same configuration, checkpoints, resume (--resume auto), telemetry, exit codes.
Ends with results.json and report.html of the benchmarks in evaluate.final.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from egohod import cli, config
from egohod.evaluation.benchmarks import named_evaluators
from egohod.evaluation.feature_cache import fingerprint
from egohod.evaluation.report import report
from egohod.evaluation.result_page import write_report
from egohod.training.dry_run import dry_run
from egohod.training.loop import train
from egohod.training.setup import build_classes, build_data, build_model, describe, trainable_table

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    args = cli.training_parser(__doc__, "configs/finetune/demo_mir.yml").parse_intermixed_args(arguments)
    overrides = cli.training_overrides(args)
    if args.dry_run:
        return dry_run(args.config_file, overrides, named_evaluators)
    cfg = config.load(args.config_file, overrides)
    with cli.joined(cfg, stops_cleanly=True) as dist, cli.claimed_run(cfg.train.output, dist):
        classes = build_classes(cfg) if cfg.model.heads != "none" else None
        model = build_model(cfg, dist, classes)
        log.info("what learns\n%s", trainable_table(model))
        data = build_data(cfg, dist, model)
        describe(cfg, dist, model, data)
        val = named_evaluators(cfg, dist, "val", classes=classes)
        test = named_evaluators(cfg, dist, "test", controls=cfg.evaluate.controls, classes=classes)
        scores = train(cfg, dist, model, data, val)
        # Opened once, when all is done.
        if test:
            found = [(each, each.measure(model)) for each in test]
            checkpoint = {"path": cfg.train.output, "sha256": fingerprint(model)}
            report(cfg.train.output, cfg, dist, found, checkpoint=checkpoint, also=scores)
            if dist.is_main:
                write_report(cfg.train.output, decoder=cfg.data.decoder)
    return cli.DONE


if __name__ == "__main__":
    sys.exit(cli.run(main))
