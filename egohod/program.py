"""What the programs that train do: build, train, and when all is done evaluate and report."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from egohod import cli, config
from egohod.evaluation.html_report import write_report
from egohod.evaluation.models import fingerprint
from egohod.evaluation.results import report
from egohod.evaluation.runner import named_evaluators
from egohod.training.dry_run import dry_run
from egohod.training.loop import train
from egohod.training.setup import build_classes, build_data, build_model, describe, trainable_table

log = logging.getLogger(__name__)


def train_and_report(description: str, default_config: str, arguments: Sequence[str]) -> int:
    """The whole of a program that trains, from its command line to results.json and report.html; the exit code."""
    args = cli.training_parser(description, default_config).parse_intermixed_args(arguments)
    overrides = cli.training_overrides(args)
    if args.dry_run:
        return dry_run(args.config_file, overrides, named_evaluators)
    cfg = config.load(args.config_file, overrides)
    with cli.joined(cfg, stops_cleanly=True) as dist, cli.claimed_run(cfg.train.output, dist):
        classes = build_classes(cfg)
        model = build_model(cfg, dist, classes)
        log.info("what learns\n%s", trainable_table(model))
        data = build_data(cfg, dist, model)
        describe(cfg, dist, model, data)
        val = named_evaluators(cfg, dist, "val", classes=classes)
        test = named_evaluators(cfg, dist, "test", controls=cfg.evaluate.controls, classes=classes)
        scores = train(cfg, dist, model, data, val)
        # What is held out to the end is opened once, when all is done.
        if test:
            found = [(each, each.measure(model)) for each in test]
            checkpoint = {"path": cfg.train.output, "sha256": fingerprint(model)}
            report(cfg.train.output, cfg, dist, found, checkpoint=checkpoint, also=scores)
            if dist.is_main:
                write_report(cfg.train.output, decoder=cfg.data.decoder)
    return cli.DONE
