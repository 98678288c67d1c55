"""Pictures of the demo world's objects, hands and counters, drawn large with PIL and kept at the sizes in use."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from egohod.demo.motion import mix
from egohod.demo.world import RGB, XY, Kitchen

UNIT = 4  # sprites are drawn this many times larger than shown, then reduced
SPRITE = 84  # an object's square, in canvas pixels
HAND = (150, 330)  # a hand with its sleeve, in canvas pixels
MARGIN = 32  # how far the counter reaches over the canvas on every side


def shade(colour: RGB, factor: float) -> RGB:
    """The colour darkened (factor < 1) or lightened."""
    red, green, blue = (round(min(255, c * factor) if factor <= 1 else c + (255 - c) * (factor - 1)) for c in colour)
    return red, green, blue


class View(NamedTuple):
    """A sprite at one size and angle, in canvas pixels."""

    picture: Image.Image
    mask: Image.Image
    anchor: XY
    marked: Image.Image  # 255 on what the truth box encloses


@dataclass
class Sprite:
    """A picture with an anchor point; ``marked`` masks what the truth box encloses (a hand without its sleeve)."""

    image: Image.Image
    anchor: XY
    marked: Image.Image
    views: dict[tuple[int, int], View] = field(default_factory=dict)

    def at(self, scale: float, turn: float) -> View:
        """The view nearest to a scale (in steps of 1/25) and an angle (of 3 degrees), drawn once and kept."""
        key = (round(scale * 25), round(turn / 3))
        if key not in self.views:
            size = (round(self.image.width * key[0] / 25), round(self.image.height * key[0] / 25))
            image, marked = (
                i.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0) for i in (self.image, self.marked)
            )
            if key[1]:  # only objects turn, about their centre, where their anchor is
                image, marked = (i.rotate(3 * key[1], Image.Resampling.BILINEAR) for i in (image, marked))
            anchor = (self.anchor[0] * key[0] / 25, self.anchor[1] * key[0] / 25)
            marked = marked.point([255 * (v > 127) for v in range(256)])
            self.views[key] = View(image.convert("RGB"), image.getchannel("A"), anchor, marked)
        return self.views[key]


def _finish(image: Image.Image, anchor: XY, marked: Image.Image | None = None) -> Sprite:
    image = image.reduce(UNIT)
    return Sprite(image, anchor, marked.reduce(UNIT) if marked else image.getchannel("A"))


# An object is a list of strokes on a square of 100 x 100 units: shape, its numbers (corner radius first for "rect"),
# fill and edge. A colour that is a number is the object's own colour made darker or lighter by that factor.
Tone = float | RGB | None
Stroke = tuple[str, tuple[float, ...], Tone, Tone]
DARK, CREAM, STEEL, GLASS = (32, 28, 26), (238, 230, 208), (228, 233, 238), (206, 222, 226)

# fmt: off
OBJECTS: dict[str, tuple[Stroke, ...]] = {
    "cup": (("ring", (62, 34, 96, 72), None, 0.7), ("rect", (14, 14, 18, 74, 88), 1.0, 0.5),
            ("oval", (14, 8, 74, 34), 0.45, 1.4), ("rect", (0, 20, 38, 27, 74), 1.5, None)),
    "bowl": (("half", (4, -10, 96, 90), 1.0, None), ("oval", (4, 22, 96, 58), 0.5, 1.4), ("rect",
                                                                                          (0, 34, 86, 66, 94), 0.6,
                                                                                          None)),
    "plate": (("oval", (2, 10, 98, 90), 1.0, 0.5), ("oval", (22, 27, 78, 73), 1.3, 0.65)),
    "bottle": (("rect", (0, 42, 0, 58, 12), CREAM, DARK), ("rect", (0, 43, 10, 57, 36), 1.0, None),
               ("rect", (12, 30, 28, 70, 99), 1.0, 0.5), ("rect", (0, 30, 54, 70, 80), CREAM, None), ("rect",
                                                                                                      (0, 36, 36, 41,
                                                                                                       96), 1.5,
                                                                                                       None)),
    "jar": (("rect", (16, 20, 20, 80, 98), GLASS, 0.4), ("rect", (12, 26, 46, 74, 92), 1.0, None), ("oval",
                                                                                                    (24, 12, 76, 32),
                                                                                                    DARK, STEEL)),
    "box": (("rect", (0, 6, 28, 94, 92), 1.0, 0.5), ("poly", (6, 28, 18, 8, 82, 8, 94, 28), DARK, 0.5), ("rect",
                                                                                                         (0, 38, 46,
                                                                                                          62, 70),
                                                                                                          1.6, None)),
    "pot": (("rect", (5, 0, 44, 18, 58), DARK, None), ("rect", (5, 82, 44, 100, 58), DARK, None),
            ("rect", (18, 11, 26, 89, 94), 1.0, 0.5), ("oval", (11, 12, 89, 44), DARK, 1.5)),
    "sponge": (("rect", (10, 4, 22, 96, 82), 1.0, 0.6), ("rect", (0, 6, 64, 94, 80), 0.5, None),
               *(("oval",
                  (x, y, x + 7, y + 5), 0.7, None) for x, y in ((12 + i * 29 % 76,
                                                                 27 + i * 17 % 32) for i in range(18)))),
    "cloth": (("poly", (6, 14, 34, 7, 66, 15, 95, 8, 92, 46, 96, 88, 62, 93, 32, 85, 5, 92, 9, 50), CREAM, 1.0),
              *(("rect", (0, i, 12, i + 11, 88), 1.0, None) for i in (18, 42, 66)), *(("rect",
                                                                                       (0, 9, i, 92, i + 11), 0.8,
                                                                                       None) for i in (18, 42, 66))),
    "knife": (("poly", (38, 66, 38, 2, 50, 6, 62, 34, 60, 66), STEEL, (100, 106, 112)), ("rect",
                                                                                         (7, 38, 62, 61, 99), 1.0,
                                                                                         0.5),
              ("oval", (46, 72, 52, 78), STEEL, None), ("oval", (46, 86, 52, 92), STEEL, None)),
    "spoon": (("rect", (6, 43, 38, 57, 99), 1.0, 0.5), ("oval", (25, 0, 75, 50), 1.0, 0.5), ("oval",
                                                                                             (33, 8, 67, 42), 0.75,
                                                                                             None)),
    "lemon": (("poly", (0, 50, 22, 36, 22, 64), 0.85, None), ("poly", (100, 50, 78, 36, 78, 64), 0.85, None),
              ("oval", (10, 18, 90, 82), 1.0, 0.6), ("oval", (28, 28, 50, 42), 1.6, None)),
}
LIDS: dict[str, tuple[Stroke, ...]] = {
    "jar": (("rect", (7, 20, 34, 80, 62), 0.75, 0.4), *(("rect",
                                                         (0, x, 39, x + 2, 58), 1.3, None) for x in range(26, 78,
                                                                                                          8))),
    "box": (("poly", (3, 62, 15, 34, 85, 34, 97, 62), 1.3, 0.5), ("poly",
                                                                  (40, 62, 44, 34, 56, 34, 60, 62), CREAM, None)),
    "pot": (("oval", (8, 30, 92, 68), 1.35, 0.5), ("oval", (40, 24, 60, 46), DARK, None)),
}
# fmt: on


def draw_object(strokes: tuple[Stroke, ...], colour: RGB) -> Sprite:
    """An object (or lid) in one colour; the anchor is its centre."""
    unit = SPRITE * UNIT / 100
    image = Image.new("RGBA", (SPRITE * UNIT, SPRITE * UNIT))
    pen = ImageDraw.Draw(image)
    for shape, numbers, *tones in strokes:
        fill, edge = (shade(colour, tone) if isinstance(tone, float) else tone for tone in tones)
        points, thin = [n * unit for n in numbers], round(3 * unit)
        if shape == "rect":
            pen.rounded_rectangle(points[1:], points[0], fill, edge, thin)
        elif shape == "poly":
            pen.polygon(points, fill, edge, thin)
        elif shape == "half":
            pen.pieslice(points, 0, 180, fill)
        else:
            pen.ellipse(points, fill, edge, thin if shape == "oval" else 3 * thin)
    return _finish(image, (SPRITE / 2, SPRITE / 2))


# A hand is drawn as the right one of who looks, fingers up, the arm coming from the lower right, in canvas pixels
PALM: XY = (62, 74)
FINGERS: dict[str, tuple[XY, ...]] = {  # tips of thumb, index, middle, ring and little finger
    "open": ((22, 62), (36, 18), (56, 8), (76, 14), (94, 32)),
    "grip": ((26, 54), (38, 32), (54, 27), (70, 29), (84, 40)),
    "point": ((28, 64), (46, 4), (60, 46), (73, 48), (86, 54)),
}
KNUCKLES: tuple[XY, ...] = ((38, 78), (42, 58), (56, 54), (70, 56), (82, 64))
WIDTHS = (17, 16, 17, 16, 13)


def draw_hand(grip: str, hand: str, kitchen: Kitchen) -> Sprite:
    """A hand with forearm and sleeve; the anchor is where it grips (or its index finger's tip when it points)."""
    image, arm = (Image.new("RGBA", (HAND[0] * UNIT, HAND[1] * UNIT)) for _ in range(2))
    pen, sleeve = ImageDraw.Draw(image), ImageDraw.Draw(arm)

    def dot(at: XY, rx: float, ry: float, fill: RGB, on: ImageDraw.ImageDraw = pen) -> None:
        on.ellipse([UNIT * v for v in (at[0] - rx, at[1] - ry, at[0] + rx, at[1] + ry)], fill)

    def line(a: XY, b: XY, fill: RGB, width: float, on: ImageDraw.ImageDraw = pen) -> None:
        on.line([UNIT * v for v in (*a, *b)], fill, round(width * UNIT))
        dot(a, width / 2, width / 2, fill, on)
        dot(b, width / 2, width / 2, fill, on)

    skin, cloth, tips = kitchen.skin, kitchen.sleeve, FINGERS[grip]
    wrist, elbow = (72.0, 122.0), (104.0, 330.0)
    cuff = mix(wrist, elbow, 0.1)
    for colour, more in ((shade(skin, 0.62), 4), (skin, 0)):  # the outline is the same a little wider
        line(PALM, wrist, colour, 40 + more)
        line(wrist, mix(wrist, elbow, 0.1), colour, 40 + more)
        dot((PALM[0], PALM[1] + 3), 27 + more / 2, 29 + more / 2, colour)
        for tip, knuckle, width in zip(tips, KNUCKLES, WIDTHS, strict=True):
            line(knuckle, tip, colour, width + more)
    for tip, knuckle, width in list(zip(tips, KNUCKLES, WIDTHS, strict=True))[1:]:
        dot(mix(knuckle, tip, 1.06), width / 4, width / 3.5, shade(skin, 1.45))
        dot((knuckle[0], knuckle[1] + 5), 4, 1.5, shade(skin, 0.82))
    for a, b in pairwise(tips[1:]):
        line(mix(a, b, 0.5), (mix(a, b, 0.5)[0], 58), shade(skin, 0.62), 1.6)
    line(cuff, elbow, shade(cloth, 0.55), 66, sleeve)
    line(cuff, elbow, cloth, 61, sleeve)
    for s in (0.18, 0.34, 0.5, 0.66, 0.82) if kitchen.stripes else ():
        x, y = mix(cuff, elbow, s)
        line((x - 26, y + 4), (x + 26, y - 4), shade(cloth, 1.5), 5, sleeve)
    line((cuff[0] - 26, cuff[1] - 8), (cuff[0] + 26, cuff[1] - 16), shade(cloth, 0.75), 14, sleeve)
    marked = ImageChops.subtract(image.getchannel("A"), arm.getchannel("A"))
    image.alpha_composite(arm)
    anchor = tips[1] if grip == "point" else (52.0, 44.0)
    if hand == "left":
        image, marked = (i.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for i in (image, marked))
        anchor = (HAND[0] - anchor[0], anchor[1])
    return _finish(image, anchor, marked)


def shadow() -> Sprite:
    """A soft dark ellipse; the anchor is its centre."""
    alpha = Image.new("L", (SPRITE, SPRITE))
    ImageDraw.Draw(alpha).ellipse((4, 26, SPRITE - 4, SPRITE - 26), fill=110)
    alpha = alpha.filter(ImageFilter.GaussianBlur(4))
    image = Image.new("RGBA", alpha.size, (16, 12, 10, 0))
    image.putalpha(alpha)
    return Sprite(image, (SPRITE / 2, SPRITE / 2), alpha)


def draw_counter(kitchen: Kitchen, size: tuple[int, int]) -> Image.Image:
    """Wall tiles over a textured counter, ``MARGIN`` larger than the canvas on every side."""
    rng = np.random.default_rng((*kitchen.seed, 1))
    width, height = size[0] + 2 * MARGIN, size[1] + 2 * MARGIN
    edge = MARGIN + round(0.13 * size[1])

    def noise(columns: int, rows: int) -> np.ndarray:
        """Smooth noise in 0..1 with about ``columns`` x ``rows`` spots."""
        spots = Image.fromarray(rng.integers(0, 256, (rows, columns), dtype=np.uint8))
        return np.asarray(spots.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255

    light = 1 + 0.16 * (noise(4, 3) - 0.5)
    if kitchen.grain == "wood":
        planks = (np.arange(height) // 46)[:, None] * 0.37 % 1
        light *= 0.87 + 0.12 * np.sin(40 * noise(3, 14) + 6 * planks) + 0.1 * planks + 0.1 * (noise(24, 240) - 0.5)
        light[(np.arange(height) % 46) < 2] *= 0.7
    elif kitchen.grain == "speckle":
        light *= 0.86 + 0.34 * (noise(width // 3, height // 3) - 0.5) + 0.28 * noise(width // 9, height // 9)
    else:
        veins = np.abs(noise(9, 7) + 0.5 * noise(22, 17) - 0.75)
        light *= 1.03 - 0.3 * np.exp(-30 * veins) + 0.05 * (noise(80, 60) - 0.5)
    picture = light[..., None] * np.array(kitchen.counter, np.float32)
    tile, offset = 38, int(rng.integers(38))
    wall = 1 + 0.1 * (noise(width // tile, height // tile)[:edge] - 0.5)
    rows, columns = np.arange(edge)[:, None], np.arange(width)[None]
    wall = np.where(((edge - rows) % tile < 2) | ((columns + offset) % tile < 2), 0.8 * wall, wall)
    picture[:edge] = wall[..., None] * np.array(kitchen.wall, np.float32)
    picture[edge : edge + 5] *= np.array([1.15, 1.1, 0.8, 0.7, 0.85], np.float32)[:, None, None]
    side_light = np.linspace(0.86, 1.1, width, dtype=np.float32)[:: int(rng.choice([-1, 1])), None]
    return Image.fromarray(np.clip(picture * side_light, 0, 255).astype(np.uint8))
