"""A picture of what the model is fed: one row a clip, its caption above."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:  # the constants are wanted where nothing needs PyTorch
    from egohod.data.dataset import View

CELL = 112
GAP, CAPTION = 4, 30
PAPER, INK, FRAME = (250, 250, 247), (20, 20, 20), (230, 60, 30)
ROLE_COLOURS = ((40, 120, 230), (240, 160, 20), (40, 180, 80))  # left hand, right hand, active object


def sheet(views: Sequence[tuple[str, View]], columns: int = 16) -> Image.Image:
    """Draw (title, view) pairs: the first whole picture with its crop, then the frames as they are fed.

    Of more than ``columns`` frames an even choice is shown.
    """
    count = min(columns, views[0][1].video.shape[1])
    wide = 4 * CELL // 3
    size = (wide + count * (CELL + GAP) + 2 * GAP, len(views) * (CELL + CAPTION + GAP) + GAP)
    image = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for row, (title, view) in enumerate(views):
        top = GAP + row * (CELL + CAPTION + GAP)
        mirrored = " [mirrored]" if view.flipped else ""
        lines = textwrap.wrap(f"{title}{mirrored}: {view.text}", max(40, size[0] // 6), max_lines=2, placeholder=" ...")
        pen.multiline_text((GAP, top), "\n".join(lines), INK, font, spacing=1)
        whole = _with_box(view)
        whole.thumbnail((wide, CELL))
        image.paste(whole, (GAP, top + CAPTION))
        for column, frame in enumerate(np.linspace(0, view.video.shape[1] - 1, count).round().astype(int)):
            fed = Image.fromarray(view.video[:, frame].permute(1, 2, 0).numpy())
            fed = fed.resize((CELL, CELL), Image.Resampling.NEAREST if fed.width < CELL else Image.Resampling.BICUBIC)
            if view.boxes is not None:
                _draw_boxes(fed, view.boxes[frame])
            image.paste(fed, (2 * GAP + wide + column * (CELL + GAP), top + CAPTION))
    return image


def _draw_boxes(picture: Image.Image, boxes: np.ndarray) -> None:
    """Left hand, right hand and active object, those that are known: shares of the picture [3, 4]."""
    for box, colour in zip(boxes, ROLE_COLOURS, strict=True):
        if np.isfinite(box).all():
            ImageDraw.Draw(picture).rectangle((box * (CELL - 1)).round().tolist(), outline=colour, width=2)


def _with_box(view: View) -> Image.Image:
    """The clip's first picture with the crop drawn in."""
    image = Image.fromarray(view.frames[0])
    if view.box is not None:
        top, left, height, width = view.box
        line = max(2, image.height // 60)
        ImageDraw.Draw(image).rectangle((left, top, left + width - 1, top + height - 1), outline=FRAME, width=line)
    return image
