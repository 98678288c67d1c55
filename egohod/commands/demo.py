"""The embedded demo world from start to end: render narrated clips, train, evaluate in kitchens that are new to it.

    egohod demo                    about ten minutes on two CPU cores, 4.9 GB of disk for decoded frames until its end
    egohod demo --short            the same steps in about two minutes (too short for meaningful numbers)
    egohod demo train.seed=1       any setting of egohod pretrain, for both stages of the training

No data or weights are downloaded. The world is in demo_data (variable DEMO_DATA), the trained model in runs/demo, and
its first stage in runs/demo_start; for --short demo_data_short and runs/demo_short. Rerun to resume after an
interruption; a finished run prints its table again.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from egohod.commands import pretrain
from egohod.config import PROJECT
from egohod.errors import DONE

log = logging.getLogger(__name__)

SHORT = ["train.duration=20 steps", "train.warmup=5 steps", "train.save_every=10 steps", "evaluate.every=10 steps"]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a tenth of the world, 20 steps for each stage")
    parser.add_argument("--scale", type=float, help="size of the world: 1 is 2,000 + 300 + 500 clips (short: 0.1)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, e.g. train.lr=1e-4")
    args = parser.parse_intermixed_args(arguments)
    name, scale, overrides = ("demo_short", 0.1, SHORT) if args.short else ("demo", 1.0, [])
    # A folder among the settings is that of the second stage: both in one would be one run.
    given = [text.partition("=")[2] for text in args.overrides if text.startswith("train.output=")]
    folder = given[-1] if given else f"runs/{name}"
    world = os.environ.setdefault("DEMO_DATA", "demo_data_short" if args.short else "demo_data")
    # Two loader processes share the cores with the model: waiting threads must not spin (a third faster on two cores).
    # Before anything imports PyTorch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from egohod.demo import make_world

    if written := make_world(Path(world), scale=args.scale or scale, replace=True):
        log.info("%s: wrote %s", world, ", ".join(written))
    # Decoding is half of a step of so small a model. The decoded frames take 4.9 GB, so they are removed at the end.
    overrides = [f"data.frame_cache={folder}_frames", *overrides, *args.overrides]
    # First what is done with which object, then, from those weights, in which order it happens. The test world is
    # evaluated by the second stage, once.
    first = ["train.duration=450 steps", "evaluate.every=450 steps", "evaluate.final=[]", *overrides]
    os.environ["DEMO_START"] = f"{folder}_start"
    for config, stage, output in (("demo", first, f"{folder}_start"), ("demo_order", overrides, folder)):
        # A stage that a signal stops does not return: the next one must not begin with the weights of half a run.
        pretrain.main(["--config_file", f"{PROJECT}/configs/{config}.yml", *stage, f"train.output={output}"])
    shutil.rmtree(f"{folder}_frames", ignore_errors=True)
    return DONE
