"""Fine-tune a pretrained video and text encoder for graded retrieval or action classes, on your own labels.

Retrieval:           python main_finetune.py --config_file configs/finetune/ek100_mir.yml model.weights.path=PATH
The demo world:      python main_finetune.py --config_file configs/finetune/demo_mir.yml model.weights.path=runs/demo
Your own clips:      CLIPS=my/clips.csv VIDEOS=my/videos python main_finetune.py --config_file configs/own.yml \\
                     --checkpoint runs/demo train.lr=1e-4 train.global_batch_size=8
Several on a node:   torchrun --nproc_per_node=4 main_finetune.py --config_file configs/finetune/ek100_mir.yml ...
Dry run:             the same with --dry_run

The training loop is that of main_pretrain.py, with the same configuration, checkpoints, --resume auto, telemetry and
exit codes. The run ends with results.json and report.html of the benchmarks in evaluate.final.
"""

from __future__ import annotations

from collections.abc import Sequence

from egohod import cli


def main(arguments: Sequence[str]) -> int:
    return cli.train_and_report(__doc__, "configs/finetune/demo_mir.yml", arguments)
