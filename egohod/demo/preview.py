"""A contact sheet of the demo world: one row a clip, its hand-object narration above."""

from __future__ import annotations

import itertools
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from egohod.demo.render import PICTURE, SHRINK, Stage
from egohod.demo.world import EVENT_SECONDS, VERBS, make_video
from egohod.demo.write import DemoError

COLUMNS = 6
SHOWN = ("pick up", "slide left", "open", "push", "wipe left", "circle clockwise", "tap twice", "flick away")
CAPTION = 16  # pixels above a row
COLOURS = 256  # of the palette, which keeps the file small


def preview(out_png: Path, seed: int = 0) -> None:
    """Draw ``out_png``: a clip of each of eight verbs, every one from another kitchen of the training split.

    Raises:
        DemoError: the file cannot be written.
    """
    (width, height), font = PICTURE, ImageFont.load_default(11)
    sheet = Image.new("RGB", (COLUMNS * width, len(SHOWN) * (height + CAPTION)), (250, 250, 247))
    pen = ImageDraw.Draw(sheet)
    videos = (make_video(seed, "train", number) for number in itertools.count())
    for row, verb in enumerate(SHOWN):
        video = next(video for video in videos if any(clip.verb == verb for clip in video.clips))
        stage, hand, top = Stage(video), ("right", "left")[row % 2], row * (height + CAPTION)
        takes = [clip for clip in video.clips if clip.verb == verb]
        clip = max(takes, key=lambda clip: (clip.hand == hand, len(clip.hod)))
        pen.text((4, top + 1), clip.hod, (20, 20, 20), font)
        # Evenly spread moments; of a brief event only, since it is what there is to see
        begin, length = (clip.begin, EVENT_SECONDS) if VERBS[verb].brief else (0.0, clip.seconds)
        for column in range(COLUMNS):
            picture = stage.draw(clip, begin + (column + 0.5) / COLUMNS * length).reduce(SHRINK)
            sheet.paste(picture, (column * width, top + CAPTION))
    try:
        out_png.parent.mkdir(parents=True, exist_ok=True)
        sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(out_png, optimize=True)
    except (OSError, ValueError) as error:  # ValueError: an ending that names no picture format
        raise DemoError(f"cannot write {out_png}: {error}") from error
