"""Draw a batch as the model's input: crop, frames, caption, mirrored clips.

    python tools/show_batch.py --config_file configs/demo.yml --output batch.png
    python tools/show_batch.py --config_file my.yml --step 1000 --clips 16 data.flip=0

Each row shows the whole first frame with the crop marked, then the frames at the model's resolution, and their caption
(with left and right exchanged if the clip is mirrored).
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _common import run_tool, save_picture
from PIL import Image, ImageDraw, ImageFont

from egohod import cli, config
from egohod.data.dataset import View
from egohod.data.detections import ROLE_COLOURS
from egohod.data.storage import VideoError
from egohod.errors import UserError
from egohod.training.build import build_dataset, build_plan

log = logging.getLogger("show_batch")

# Pixels: half of the usual input, so that sixteen frames fit a screen.
CELL = 112
GAP, CAPTION = 4, 30
PAPER, INK, FRAME = (250, 250, 247), (20, 20, 20), (230, 60, 30)


def sheet(views: Sequence[tuple[str, View]], columns: int = 16) -> Image.Image:
    """Draw (title, view) pairs: the first whole picture with its crop, then the model's input frames.

    Of more than ``columns`` frames an even choice is shown.
    """
    count = min(columns, views[0][1].video.shape[1])
    wide = 4 * CELL // 3
    # Left the whole picture, at most 4:3; then the frames.
    size = (wide + count * (CELL + GAP) + 2 * GAP, len(views) * (CELL + CAPTION + GAP) + GAP)
    image = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for row, (title, view) in enumerate(views):
        top = GAP + row * (CELL + CAPTION + GAP)
        mirrored = " [mirrored]" if view.flipped else ""
        # About six pixels a letter.
        lines = textwrap.wrap(f"{title}{mirrored}: {view.text}", max(40, size[0] // 6), max_lines=2, placeholder=" ...")
        pen.multiline_text((GAP, top), "\n".join(lines), INK, font, spacing=1)
        whole = Image.fromarray(view.frames[0])
        if view.box is not None:
            y, x, height, width = view.box
            line = max(2, whole.height // 60)
            ImageDraw.Draw(whole).rectangle((x, y, x + width - 1, y + height - 1), outline=FRAME, width=line)
        # After the box is drawn, whose line is as wide as the picture is high by 60.
        whole.thumbnail((wide, CELL))
        image.paste(whole, (GAP, top + CAPTION))
        for column, frame in enumerate(np.linspace(0, view.video.shape[1] - 1, count).round().astype(int)):
            picture = Image.fromarray(view.video[:, frame].permute(1, 2, 0).numpy())
            # Small inputs are shown pixel by pixel, as the model gets them.
            resampling = Image.Resampling.NEAREST if picture.width < CELL else Image.Resampling.BICUBIC
            picture = picture.resize((CELL, CELL), resampling)
            # Boxes are fractions of the crop, NaN where a hand or an object is not in the frame.
            for box, colour in zip(view.boxes[frame] if view.boxes is not None else (), ROLE_COLOURS, strict=False):
                if np.isfinite(box).all():
                    edges = (box * (CELL - 1)).round().tolist()
                    ImageDraw.Draw(picture).rectangle(edges, outline=colour, width=2)
            image.paste(picture, (2 * GAP + wide + column * (CELL + GAP), top + CAPTION))
    return image


def main(arguments: Sequence[str]) -> int:
    parser = cli.parser(__doc__ or "", "configs/demo.yml")
    parser.add_argument("--output", type=Path, default=Path("batch.png"), help="picture (default: batch.png)")
    parser.add_argument("--step", type=int, default=1, help="the batch of this training step (default: 1)")
    parser.add_argument("--clips", type=int, default=8, help="how many of its clips (default: 8)")
    parser.add_argument("--strict", action="store_true", help="stop at the first clip or row that cannot be used")
    parser.add_argument("--dry_run", action="store_true", help="print which clips, and draw nothing")
    args = parser.parse_intermixed_args(arguments)
    if args.step < 1 or args.clips < 1:
        raise UserError("--step and --clips count from 1")
    cfg = config.load(args.config_file, cli.overrides(args))
    dataset = build_dataset(cfg, cfg.model.geometry().image_size)
    # The plan of training itself: the same clips, crops and flips as in that step of a run.
    keys = build_plan(cfg, dataset).keys(args.step - 1)[: args.clips].tolist()
    views = []
    for epoch, index in keys:
        if args.dry_run:
            log.info("epoch %d, %s: %s", epoch, dataset.where(index), " / ".join(dataset.row(index).texts))
            continue
        try:
            views.append((dataset.where(index), dataset.view((epoch, index))))
        # As in training, which draws another clip in its place; here the gap is worth a line.
        except VideoError as error:
            if args.strict:
                raise UserError(f"{dataset.where(index)}: {error}") from error
            log.warning("left out, training replaces it by another clip: %s", error)
    if args.dry_run:
        return cli.DONE
    if not views:
        raise UserError(f"not one of the {len(keys)} clips could be read")
    save_picture(sheet(views), args.output)
    log.info("drew %d clips of step %d: %s", len(views), args.step, args.output)
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
