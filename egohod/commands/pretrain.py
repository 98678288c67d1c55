"""Train a video and a text encoder on narrated clips.

One process:         python main_pretrain.py --config_file configs/demo.yml
Several on a node:   torchrun --nproc_per_node=8 main_pretrain.py --config_file configs/config/clip_base.yml
Dry run:             python main_pretrain.py --config_file configs/config/clip_base.yml --dry_run
Change a knob:       python main_pretrain.py --config_file configs/demo.yml train.lr=1e-4 train.output=runs/mine

Rerun the same command to resume an interrupted run (--resume auto). The run ends with results.json and report.html
if evaluate.final names benchmarks. Exit code 0: done, or stopped by a signal after saving; 2: an error in the
configuration or the data, which the message explains; 1: anything else.
"""

from __future__ import annotations

from collections.abc import Sequence

from egohod import cli


def main(arguments: Sequence[str]) -> int:
    return cli.train_and_report(__doc__, "configs/demo.yml", arguments)
