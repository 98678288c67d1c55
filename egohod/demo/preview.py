"""A contact sheet of the demo world: one row a clip, its hand-object narration above."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from egohod.demo.render import PICTURE, SHRINK, Stage
from egohod.demo.world import EVENT_SECONDS, VERBS, Clip, make_video
from egohod.demo.write import DemoError

COLUMNS = 6
SHOWN = ("pick up", "slide left", "open", "push", "wipe left", "circle clockwise", "tap twice", "flick away")
CAPTION = 16  # pixels above a row
COLOURS = 256  # of the palette, which keeps the file small


def _times(clip: Clip) -> list[float]:
    """Evenly spread moments; over the event where the clip has a brief one, since it is what there is to see."""
    begin, length = (clip.begin, EVENT_SECONDS) if VERBS[clip.verb].brief else (0.0, clip.seconds)
    return [begin + (i + 0.5) / COLUMNS * length for i in range(COLUMNS)]


def preview(out_png: Path, seed: int = 0) -> None:
    """Draw ``out_png``: a clip of each of eight verbs, every one from another kitchen of the training split.

    Raises:
        DemoError: the file cannot be written.
    """
    font = ImageFont.load_default(11)
    sheet = Image.new("RGB", (COLUMNS * PICTURE[0], len(SHOWN) * (PICTURE[1] + CAPTION)), (250, 250, 247))
    pen = ImageDraw.Draw(sheet)
    number = 0
    for row, verb in enumerate(SHOWN):
        video = make_video(seed, "train", number)
        while not any(clip.verb == verb for clip in video.clips):
            number += 1
            video = make_video(seed, "train", number)
        number += 1
        hand = ("right", "left")[row % 2]
        clip = max(
            (clip for clip in video.clips if clip.verb == verb), key=lambda clip: (clip.hand == hand, len(clip.hod))
        )
        top = row * (PICTURE[1] + CAPTION)
        pen.text((4, top + 1), clip.hod, (20, 20, 20), font)
        stage = Stage(video)
        for column, t in enumerate(_times(clip)):
            sheet.paste(stage.draw(clip, t).reduce(SHRINK), (column * PICTURE[0], top + CAPTION))
    try:
        out_png.parent.mkdir(parents=True, exist_ok=True)
        sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(out_png, optimize=True)
    except (OSError, ValueError) as error:  # ValueError: an ending that names no picture format
        raise DemoError(f"cannot write {out_png}: {error}") from error
