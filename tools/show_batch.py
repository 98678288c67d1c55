"""Draw a batch as the model is fed it: crop, frames, caption, mirrored clips.

    python tools/show_batch.py --config_file configs/demo.yml --output batch.png
    python tools/show_batch.py --config_file my.yml --step 1000 --clips 16 data.flip=0

Left of each row stands the whole first picture with the crop in it, then the frames in the model's resolution; the
caption is the one that goes with them (left and right changed where the clip is mirrored).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from _common import run_tool, save_picture

from egohod import cli, config
from egohod.data.show import sheet
from egohod.data.storage import VideoError
from egohod.errors import UserError
from egohod.model.zoo import geometry
from egohod.training.setup import build_dataset, build_plan

log = logging.getLogger("show_batch")


def main(arguments: Sequence[str]) -> int:
    parser = cli.parser(__doc__ or "", "configs/demo.yml")
    parser.add_argument("--output", type=Path, default=Path("batch.png"), help="picture (default: batch.png)")
    parser.add_argument("--step", type=int, default=1, help="the batch of this training step (default: 1)")
    parser.add_argument("--clips", type=int, default=8, help="how many of its clips (default: 8)")
    parser.add_argument("--strict", action="store_true", help="stop at the first clip or row that cannot be used")
    parser.add_argument("--dry_run", action="store_true", help="say which clips, and draw nothing")
    args = parser.parse_intermixed_args(arguments)
    if args.step < 1 or args.clips < 1:
        raise UserError("--step and --clips count from 1")
    cfg = config.load(args.config_file, cli.overrides(args))
    dataset = build_dataset(cfg, geometry(cfg.model.name).image_size)
    keys = build_plan(cfg, dataset).keys(args.step - 1)[: args.clips].tolist()
    views = []
    for epoch, index in keys:
        if args.dry_run:
            log.info("epoch %d, %s: %s", epoch, dataset.where(index), " / ".join(dataset.row(index).texts))
            continue
        try:
            views.append((dataset.where(index), dataset.view((epoch, index))))
        except VideoError as error:
            if args.strict:
                raise UserError(f"{dataset.where(index)}: {error}") from error
            log.warning("left out, a training would put another clip in its place: %s", error)
    if args.dry_run:
        return cli.DONE
    if not views:
        raise UserError(f"not one of the {len(keys)} clips could be read")
    save_picture(sheet(views), args.output)
    log.info("drew %d clips of step %d: %s", len(views), args.step, args.output)
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
