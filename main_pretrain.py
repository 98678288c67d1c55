"""Train a video and a text encoder on narrated clips.

One process:         python main_pretrain.py --config_file configs/demo.yml
Several on a node:   torchrun --nproc_per_node=8 main_pretrain.py --config_file configs/config/clip_base.yml
Look before leaping: python main_pretrain.py --config_file configs/config/clip_base.yml --dry_run
Change a knob:       python main_pretrain.py --config_file configs/demo.yml train.lr=1e-4 train.output=runs/mine

The same command goes on where a run was interrupted (--resume auto). Exit code 0: done or stopped by a signal after
saving; 2: something in the configuration or the data that the message names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from egohod import cli, config
from egohod.evaluation.benchmarks import named_evaluators
from egohod.evaluation.feature_cache import fingerprint
from egohod.evaluation.report import report
from egohod.training.dry_run import dry_run
from egohod.training.loop import train
from egohod.training.setup import build_data, build_model, describe


def main(arguments: Sequence[str]) -> int:
    args = cli.training_parser(__doc__, "configs/demo.yml").parse_intermixed_args(arguments)
    overrides = cli.training_overrides(args)
    if args.dry_run:
        return dry_run(args.config_file, overrides, named_evaluators)
    cfg = config.load(args.config_file, overrides)
    with cli.joined(cfg, stops_cleanly=True) as dist, cli.claimed_run(cfg.train.output, dist):
        model = build_model(cfg, dist)
        data = build_data(cfg, dist, model)
        describe(cfg, dist, model, data)
        val = named_evaluators(cfg, dist, "val")
        test = named_evaluators(cfg, dist, "test", controls=cfg.evaluate.controls)
        scores = train(cfg, dist, model, data, val)
        # The test worlds are opened once, when all is done.
        if test:
            found = [(each, each.measure(model)) for each in test]
            checkpoint = {"path": cfg.train.output, "sha256": fingerprint(model)}
            report(cfg.train.output, cfg, dist, found, checkpoint=checkpoint, also=scores)
    return cli.DONE


if __name__ == "__main__":
    sys.exit(cli.run(main))
