"""Evaluate a checkpoint on the held-out sets that its configuration names.

After a training:   python main_eval.py --config_file configs/demo.yml --checkpoint runs/demo
One checkpoint:     python main_eval.py --config_file configs/demo.yml --checkpoint runs/demo/checkpoints/step-00000700
Does time matter?   python main_eval.py --checkpoint runs/demo evaluate.controls=[shuffle,reverse,freeze]
Several processes:  torchrun --nproc_per_node=2 main_eval.py --config_file configs/demo.yml --checkpoint runs/demo

Prints the table and writes results.json to --output (default: the current folder's results/).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from egohod import cli, config
from egohod.distributed import setup
from egohod.evaluation.benchmarks import demo_evaluators
from egohod.evaluation.report import report
from egohod.training.loop import evaluate
from egohod.training.setup import build_model


def main(arguments: Sequence[str]) -> int:
    parser = cli.parser(__doc__, "configs/demo.yml")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a checkpoint folder, a run folder (its newest), or a file of upstream EgoHOD or AVION",
    )
    parser.add_argument(
        "--output", default="results", metavar="FOLDER", help="where results.json goes (default: results)"
    )
    args = parser.parse_intermixed_args(arguments)
    # A CLIP file can be measured too: model.weights.source=clip model.weights.projections=keep.
    weights = ["model.weights.source=checkpoint", *args.overrides, f"model.weights.path={args.checkpoint}"]
    cfg = config.load(args.config_file, weights)
    dist = setup(cfg.train.device)
    try:
        model = build_model(cfg, dist)
        Path(args.output).mkdir(parents=True, exist_ok=True)
        evaluators = demo_evaluators(cfg, dist, "val", "test", controls=cfg.evaluate.controls)
        if not evaluators:
            raise config.UserError("nothing to evaluate: set evaluate.demo_val or evaluate.demo_test")
        report(args.output, dist, evaluate(model, evaluators))
    finally:
        dist.close()
    return cli.DONE


if __name__ == "__main__":
    sys.exit(cli.run(main))
