"""Sprites of objects, hands and counters; from a clip to pictures and to the true boxes, which share the placements."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from egohod.data.detections import EDGES, NO_CONTACT, PORTABLE_OBJECT, SCHEMA, STATIONARY_OBJECT
from egohod.demo.world import (
    COLOURS,
    DEFAULT,
    FPS,
    LID_HEIGHT,
    MOST_SWAY,
    OTHER_HAND,
    REST,
    RGB,
    SIDE,
    VERBS,
    XY,
    Clip,
    Kitchen,
    Pose,
    Realism,
    Variant,
    Video,
    grip_point,
    lens,
    make_video,
    mix,
    pose,
    sway,
)
from egohod.errors import UserError

UNIT = 4  # sprites are drawn this many times larger than shown, then reduced
SPRITE = 84  # an object's square, in canvas pixels
HAND = (150, 330)  # a hand with its sleeve, in canvas pixels
MARGIN = 32  # how far the counter reaches over the canvas on every side
LENS_MARGIN = 48  # the same at least where the camera turns and zooms: enough for 10 degrees and 0.9

# Strokes on a square of 100 x 100 units: shape, numbers (of a rect the corner radius first), fill and, if any, edge. A
# colour that is a number is the object's own colour made darker or lighter by that factor.
PAINTS: dict[str, RGB | None] = {
    "-": None, "dark": (32, 28, 26), "cream": (238, 230, 208), "glass": (206, 222, 226),
    "steel": (228, 233, 238), "iron": (100, 106, 112),
}  # fmt: skip
OBJECTS = {
    "cup": "ring 62,34,96,72 - .7; rect 14,14,18,74,88 1 .5; oval 14,8,74,34 .45 1.4; rect 0,20,38,27,74 1.5",
    "bowl": "half 4,-10,96,90 1; oval 4,22,96,58 .5 1.4; rect 0,34,86,66,94 .6",
    "plate": "oval 2,10,98,90 1 .5; oval 22,27,78,73 1.3 .65",
    "bottle": "rect 0,42,0,58,12 cream dark; rect 0,43,10,57,36 1; rect 12,30,28,70,99 1 .5;"
    "rect 0,30,54,70,80 cream; rect 0,36,36,41,96 1.5",
    "jar": "rect 16,20,20,80,98 glass .4; rect 12,26,46,74,92 1; oval 24,12,76,32 dark steel",
    "box": "rect 0,6,28,94,92 1 .5; poly 6,28,18,8,82,8,94,28 dark .5; rect 0,38,46,62,70 1.6",
    "pot": "rect 5,0,44,18,58 dark; rect 5,82,44,100,58 dark; rect 18,11,26,89,94 1 .5; oval 11,12,89,44 dark 1.5",
    "sponge": "rect 10,4,22,96,82 1 .6; rect 0,6,64,94,80 .5"
    + "".join(
        f"; oval {x},{y},{x + 7},{y + 5} .7" for x, y in [(12 + 29 * i % 76, 27 + 17 * i % 32) for i in range(18)]
    ),
    "cloth": "poly 6,14,34,7,66,15,95,8,92,46,96,88,62,93,32,85,5,92,9,50 cream 1"
    + "".join(f"; rect 0,{i},12,{i + 11},88 1" for i in (18, 42, 66))
    + "".join(f"; rect 0,9,{i},92,{i + 11} .8" for i in (18, 42, 66)),
    "knife": "poly 38,66,38,2,50,6,62,34,60,66 steel iron; rect 7,38,62,61,99 1 .5;"
    "oval 46,72,52,78 steel; oval 46,86,52,92 steel",
    "spoon": "rect 6,43,38,57,99 1 .5; oval 25,0,75,50 1 .5; oval 33,8,67,42 .75",
    "lemon": "poly 0,50,22,36,22,64 .85; poly 100,50,78,36,78,64 .85; oval 10,18,90,82 1 .6; oval 28,28,50,42 1.6",
}
LIDS = {
    "jar": "rect 7,20,34,80,62 .75 .4" + "".join(f"; rect 0,{x},39,{x + 2},58 1.3" for x in range(26, 78, 8)),
    "box": "poly 3,62,15,34,85,34,97,62 1.3 .5; poly 40,62,44,34,56,34,60,62 cream",
    "pot": "oval 8,30,92,68 1.35 .5; oval 40,24,60,46 dark",
}


def shade(colour: RGB, factor: float) -> RGB:
    """The colour darkened (factor < 1) or lightened."""
    return tuple(round(min(255, c * factor) if factor <= 1 else c + (255 - c) * (factor - 1)) for c in colour)


@dataclass(eq=False)  # compared by identity: comparing pixels takes as long as drawing them
class Sprite:
    """A picture with an anchor point; ``marked`` masks what the truth box encloses (a hand without its sleeve)."""

    image: Image.Image
    marked: Image.Image
    anchor: XY
    views: dict[tuple[int, int], Sprite] = field(default_factory=dict)

    def at(self, scale: float, turn: float) -> Sprite:
        """The view nearest to a scale (in steps of 1/25) and an angle (of 3 degrees), drawn once and cached."""
        size, angle = round(scale * 25), round(turn / 3)
        if (size, angle) not in self.views:
            pixels = (round(self.image.width * size / 25), round(self.image.height * size / 25))
            both = [i.resize(pixels, Image.Resampling.BILINEAR, reducing_gap=2.0) for i in (self.image, self.marked)]
            if angle:  # only objects turn, about their centre, which is their anchor
                both = [i.rotate(3 * angle, Image.Resampling.BILINEAR) for i in both]
            marked = both[1].point([255 * (v > 127) for v in range(256)])
            self.views[size, angle] = Sprite(both[0], marked, (self.anchor[0] * size / 25, self.anchor[1] * size / 25))
        return self.views[size, angle]


def draw_object(strokes: str, colour: RGB) -> Sprite:
    """An object (or lid) in one colour; the anchor is its centre."""
    unit = SPRITE * UNIT / 100
    thin = round(3 * unit)
    # PIL draws without antialiasing: everything is drawn UNIT times larger and reduced.
    image = Image.new("RGBA", (SPRITE * UNIT, SPRITE * UNIT))
    pen = ImageDraw.Draw(image)
    for stroke in strokes.split(";"):
        shape, numbers, *tones = stroke.split()
        points = [float(n) * unit for n in numbers.split(",")]
        fill, edge = (PAINTS[tone] if tone in PAINTS else shade(colour, float(tone)) for tone in (*tones, "-")[:2])
        if shape == "rect":
            pen.rounded_rectangle(points[1:], points[0], fill, edge, thin)
        elif shape == "poly":
            pen.polygon(points, fill, edge, thin)
        elif shape == "half":
            pen.pieslice(points, 0, 180, fill)
        else:
            pen.ellipse(points, fill, edge, thin if shape == "oval" else 3 * thin)
    return Sprite(image.reduce(UNIT), image.getchannel("A").reduce(UNIT), (SPRITE / 2, SPRITE / 2))


# A hand is drawn as the viewer's right one, fingers up, the arm coming from the lower right, in canvas pixels.
PALM, WRIST, ELBOW = (62.0, 74.0), (72.0, 122.0), (104.0, 330.0)
TIPS: dict[str, tuple[XY, ...]] = {  # of thumb, index, middle, ring and little finger
    "open": ((22, 62), (36, 18), (56, 8), (76, 14), (94, 32)),
    "grip": ((26, 54), (38, 32), (54, 27), (70, 29), (84, 40)),
    "point": ((28, 64), (46, 4), (60, 46), (73, 48), (86, 54)),
}
KNUCKLES: tuple[XY, ...] = ((38, 78), (42, 58), (56, 54), (70, 56), (82, 64))
WIDTHS = (17, 16, 17, 16, 13)


def _dot(pen: ImageDraw.ImageDraw, at: XY, rx: float, ry: float, fill: RGB) -> None:
    pen.ellipse([UNIT * v for v in (at[0] - rx, at[1] - ry, at[0] + rx, at[1] + ry)], fill)


def _line(pen: ImageDraw.ImageDraw, a: XY, b: XY, width: float, fill: RGB) -> None:
    pen.line([UNIT * v for v in (*a, *b)], fill, round(width * UNIT))
    for end in (a, b):
        _dot(pen, end, width / 2, width / 2, fill)


def draw_hand(grip: str, hand: str, kitchen: Kitchen) -> Sprite:
    """A hand with forearm and sleeve; the anchor is where it grips (or its index finger's tip when it points)."""
    image, arm = (Image.new("RGBA", (HAND[0] * UNIT, HAND[1] * UNIT)) for _ in range(2))
    pen, skin, tips = ImageDraw.Draw(image), kitchen.skin, TIPS[grip]
    fingers, cuff = list(zip(tips, KNUCKLES, WIDTHS, strict=True)), mix(WRIST, ELBOW, 0.1)
    for colour, more in ((shade(skin, 0.62), 4), (skin, 0)):  # the outline is the same a little wider
        _line(pen, PALM, WRIST, 40 + more, colour)
        _line(pen, WRIST, cuff, 40 + more, colour)
        _dot(pen, (PALM[0], PALM[1] + 3), 27 + more / 2, 29 + more / 2, colour)
        for tip, knuckle, width in fingers:
            _line(pen, knuckle, tip, width + more, colour)
    for tip, knuckle, width in fingers[1:]:  # nails and knuckles
        _dot(pen, mix(knuckle, tip, 1.06), width / 4, width / 3.5, shade(skin, 1.45))
        _dot(pen, (knuckle[0], knuckle[1] + 5), 4, 1.5, shade(skin, 0.82))
    for a, b in pairwise(tips[1:]):
        gap = mix(a, b, 0.5)
        _line(pen, gap, (gap[0], 58), 1.6, shade(skin, 0.62))
    pen, cloth = ImageDraw.Draw(arm), kitchen.sleeve
    _line(pen, cuff, ELBOW, 66, shade(cloth, 0.55))
    _line(pen, cuff, ELBOW, 61, cloth)
    for s in (0.18, 0.34, 0.5, 0.66, 0.82) if kitchen.stripes else ():
        x, y = mix(cuff, ELBOW, s)
        _line(pen, (x - 26, y + 4), (x + 26, y - 4), 5, shade(cloth, 1.5))
    _line(pen, (cuff[0] - 26, cuff[1] - 8), (cuff[0] + 26, cuff[1] - 16), 14, shade(cloth, 0.75))
    marked = ImageChops.subtract(image.getchannel("A"), arm.getchannel("A"))
    image.alpha_composite(arm)
    anchor = tips[1] if grip == "point" else (52.0, 44.0)
    if hand == "left":
        image, marked = (i.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for i in (image, marked))
        anchor = (HAND[0] - anchor[0], anchor[1])
    return Sprite(image.reduce(UNIT), marked.reduce(UNIT), anchor)


def draw_counter(kitchen: Kitchen, size: tuple[int, int], margin: int) -> Image.Image:
    """Wall tiles over a textured counter, ``margin`` larger than the canvas on every side."""
    rng = np.random.default_rng((*kitchen.seed, 1))  # not the stream that drew the takes
    width, height = size[0] + 2 * margin, size[1] + 2 * margin
    edge = margin + round(0.13 * size[1])

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
    y, x = ((axis + 0.5 - margin) / size[0] for axis in np.ogrid[:height, :width])
    for patch in kitchen.patches:
        turn = math.radians(patch.turn)
        along, across = (
            (x - patch.centre[0]) * math.cos(angle) + (y - patch.centre[1]) * math.sin(angle)
            for angle in (turn, turn + math.pi / 2)
        )
        u, v = np.abs(along) / patch.size[0], np.abs(across) / patch.size[1]
        inside = u * u + v * v < 1 if patch.round else np.maximum(u, v) < 1
        striped = (along[inside] // patch.stripes) % 2 if patch.stripes else 0
        # A patch keeps half of the counter's grain: it is a cloth, a board or a stain.
        grain = (0.5 + 0.5 * light[inside]) * (1 - 0.25 * striped)
        picture[inside] = grain[:, None] * np.array(patch.colour, np.float32)
    tile, offset = 38, int(rng.integers(38))
    wall = 1 + 0.1 * (noise(width // tile, height // tile)[:edge] - 0.5)
    rows, columns = np.arange(edge)[:, None], np.arange(width)[None]
    wall = np.where(((edge - rows) % tile < 2) | ((columns + offset) % tile < 2), 0.8 * wall, wall)
    picture[:edge] = wall[..., None] * np.array(kitchen.wall, np.float32)
    picture[edge : edge + 5] *= np.array([1.15, 1.1, 0.8, 0.7, 0.85], np.float32)[:, None, None]
    side_light = np.linspace(0.86, 1.1, width, dtype=np.float32)[:: int(rng.choice([-1, 1])), None]
    return Image.fromarray(np.clip(picture * side_light, 0, 255).astype(np.uint8))


CANVAS = (320, 240)  # drawn at this size
SHRINK = 2  # and written at half of it, which smooths edges and halves the step of a moving sprite
PICTURE = (CANVAS[0] // SHRINK, CANVAS[1] // SHRINK)

HANDS = ("left", "right")  # in the order of the detections' sides


def frame_time(frame: int) -> float:
    """The middle of a frame's time on display: a path and its reverse are then seen at the same positions."""
    return (frame + 0.5) / FPS


Placed = tuple[Sprite, tuple[int, int], str]  # view, its top left canvas pixel, role
BLUR_STEP = 5  # canvas pixels between the pictures that make a blur
BLUR_MOST = 5  # pictures


class Lens(NamedTuple):
    """The map from a pixel (x, y) of the picture, at canvas size, to the scene: (ax + by + c, dx + ey + f)."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def shifted(self, x: int, y: int) -> Lens:
        """The same map with the scene's pixel (x, y) as origin."""
        return self._replace(c=self.c - x, f=self.f - y)

    def apply(self, scene: Image.Image, size: tuple[int, int] = CANVAS) -> Image.Image:
        """Warp the scene to the picture."""
        # Nearest and then a reduction take 0.12 ms, a bilinear warp of the reduced scene 0.33 ms.
        return scene.transform(size, Image.Transform.AFFINE, self, Image.Resampling.NEAREST)

    def bounds(self, scene: Image.Image) -> tuple[int, int, int, int] | None:
        """What ``apply(scene).getbbox()`` gives, in a quarter of the time: warps only the part that shows the scene."""
        square = self.a * self.a + self.b * self.b
        corners = [(x - self.c, y - self.f) for x in (0, scene.width) for y in (0, scene.height)]
        columns = [(self.a * x + self.d * y) / square for x, y in corners]
        rows = [(self.b * x + self.e * y) / square for x, y in corners]
        left, top = max(math.floor(min(columns)), 0), max(math.floor(min(rows)), 0)
        right, bottom = min(math.ceil(max(columns)), CANVAS[0]), min(math.ceil(max(rows)), CANVAS[1])
        if left >= right or top >= bottom:
            return None
        part = self._replace(c=self.c + self.a * left + self.b * top, f=self.f + self.d * left + self.e * top)
        seen = part.apply(scene, (right - left, bottom - top)).getbbox()
        return seen and (seen[0] + left, seen[1] + top, seen[2] + left, seen[3] + top)


@dataclass
class Moment:
    """The visible sprites at one time, the farthest first, and what the hands touch."""

    shift: XY  # of every sprite, by the moving head
    contact: dict[str, int]
    lens: Lens | None = None
    placed: list[Placed] = field(default_factory=list)

    def put(self, sprite: Sprite, at: XY, scale: float = 1.0, turn: float = 0.0, role: str = "") -> None:
        """Place a sprite in front; ``role`` is the hand or the object whose box it gives, if any."""
        view = sprite.at(scale, turn)
        x = round((at[0] + self.shift[0]) * CANVAS[0] - view.anchor[0])
        y = round((at[1] + self.shift[1]) * CANVAS[0] - view.anchor[1])
        self.placed.append((view, (x, y), role))

    def box(self, role: str) -> tuple[float, ...] | None:
        """The visible part of a hand or an object: left, top, right, bottom as shares of the picture, if any."""
        for view, (x, y), placed_role in self.placed:
            if placed_role != role:
                continue
            if self.lens:
                seen = self.lens.shifted(x, y).bounds(view.marked)
            else:
                seen = view.marked.crop((-x, -y, CANVAS[0] - x, CANVAS[1] - y)).getbbox()
            # Less than two pixels of the written picture is nothing that a detector could see.
            if seen and min(seen[2] - seen[0], seen[3] - seen[1]) >= 2 * SHRINK:
                return tuple(edge / CANVAS[i % 2] for i, edge in enumerate(seen))
        return None


def _paste(canvas: Image.Image, placed: Sequence[Placed], origin: tuple[int, int] = (0, 0)) -> Image.Image:
    """Paste sprites on ``canvas``, whose top left pixel is ``origin``; returns it."""
    for view, (x, y), _ in placed:
        canvas.paste(view.image, (x - origin[0], y - origin[1]), view.image)
    return canvas


def _seen_beyond(realism: Realism) -> int:
    """How many canvas pixels beyond the canvas a camera within its bounds sees, with the usual sway."""
    angle, ways = math.radians(realism.roll), []
    for side, other in (CANVAS, CANVAS[::-1]):
        half = (side * math.cos(angle) + other * math.sin(angle)) / 2 + MOST_SWAY * CANVAS[0]
        ways.append(half / realism.zoom[0] - side / 2)
    return math.ceil(max(ways))


class Stage:
    """A video's kitchen with its sprites; :meth:`frames` draws, :meth:`truth` only computes."""

    def __init__(self, video: Video) -> None:
        self.video, kitchen = video, video.kitchen
        # Drawn once a video: drawing at four times the size is slow.
        colours = {noun: COLOURS[colour] for noun, colour in kitchen.nouns.items()}
        self.objects = {noun: draw_object(OBJECTS[noun], colour) for noun, colour in colours.items()}
        self.lids = {noun: draw_object(LIDS[noun], colour) for noun, colour in colours.items() if noun in LIDS}
        self.hands = {(grip, hand): draw_hand(grip, hand, kitchen) for grip in TIPS for hand in SIDE}
        self.margin = max(LENS_MARGIN, _seen_beyond(video.realism)) if video.clips[0].lens else MARGIN
        self.counter = draw_counter(kitchen, CANVAS, self.margin)
        # Under a lens, draw what does not move once a clip, and hand and object only when they move.
        self._scenery: tuple[Clip, Moment, Image.Image] | None = None
        self._drawn: tuple[Clip | None, list[list[Placed]], Image.Image] = (None, [], self.counter)
        # The shadow of any object: a soft dark ellipse.
        alpha = Image.new("L", (SPRITE, SPRITE))
        ImageDraw.Draw(alpha).ellipse((4, 26, SPRITE - 4, SPRITE - 26), fill=110)
        alpha = alpha.filter(ImageFilter.GaussianBlur(4))
        image = Image.new("RGBA", alpha.size, (16, 12, 10, 0))
        image.putalpha(alpha)
        self.shadow = Sprite(image, alpha, (SPRITE / 2, SPRITE / 2))

    def _put(
        self, to: Moment, noun: str, at: XY, depth: float, turn: float = 0.0, lid: XY | None = None, height: float = 0.0
    ) -> None:
        """Place an object with its shadow and, where it has one, its lid."""
        to.put(self.shadow, (at[0] + 0.3 * height, at[1] + 0.06 * depth + height), depth * 1.1)
        to.put(self.objects[noun], at, depth, turn, noun)
        if noun in self.lids:
            to.put(self.lids[noun], lid or (at[0], at[1] - LID_HEIGHT * depth), depth, turn)

    def _put_scenery(self, to: Moment, clip: Clip) -> None:
        """Place what does not move: the distractors, and the other hand."""
        other = OTHER_HAND[clip.hand]
        for noun, x, y in clip.distractors:
            self._put(to, noun, (x, y), 0.75)
        if clip.other == "rest":
            to.put(self.hands["open", other], REST[other], 0.9, role=other)
            to.contact[other] = STATIONARY_OBJECT
        elif clip.other != "absent":
            at = (0.5 + 0.36 * SIDE[other], 0.52)
            self._put(to, clip.other, at, 0.85)
            to.put(self.hands["grip", other], grip_point(other, at), 0.9, role=other)
            to.contact[other] = PORTABLE_OBJECT

    def _put_action(self, to: Moment, clip: Clip, now: Pose) -> Moment:
        """Place the acting hand and its object, and note what it touches."""
        self._put(to, clip.noun, now.object, now.depth, now.turn, now.lid, now.height)
        # The acting hand last: it is in front of everything.
        to.put(self.hands[now.grip, clip.hand], now.hand, 0.5 + 0.5 * now.depth, role=clip.hand)
        to.contact[clip.hand] = PORTABLE_OBJECT if now.touching else NO_CONTACT
        return to

    def _scenery_of(self, clip: Clip) -> tuple[Moment, Image.Image]:
        """What does not move in a clip under a lens, and its picture on the counter, with margins."""
        if self._scenery is None or self._scenery[0] is not clip:
            scenery = Moment((0.0, 0.0), {})
            self._put_scenery(scenery, clip)
            self._scenery = clip, scenery, _paste(self.counter.copy(), scenery.placed, (-self.margin, -self.margin))
        return self._scenery[1:]

    def moment(self, clip: Clip, t: float) -> Moment:
        """Place all sprites ``t`` seconds into the clip."""
        if clip.lens:
            # Sprites stay on the canvas; the whole picture rotates, zooms and moves. Pillow takes the inverse map.
            (roll, zoom), shift = lens(clip, t), sway(clip, t)
            cos, sin = math.cos(roll) / zoom, math.sin(roll) / zoom
            middle = CANVAS[0] / 2, CANVAS[1] / 2
            x, y = middle[0] + shift[0] * CANVAS[0], middle[1] + shift[1] * CANVAS[0]
            back = Lens(cos, sin, middle[0] - cos * x - sin * y, -sin, cos, middle[1] + sin * x - cos * y)
            scenery, _ = self._scenery_of(clip)
            moment = Moment((0.0, 0.0), dict(scenery.contact), back, list(scenery.placed))
        else:
            moment = Moment(sway(clip, t), {})
            self._put_scenery(moment, clip)
        return self._put_action(moment, clip, pose(clip, t))

    def draw(self, clip: Clip, t: float) -> Image.Image:
        """Draw the picture ``t`` seconds into the clip, at the size of ``PICTURE``."""
        moment = self.moment(clip, t)
        if moment.lens is None:
            x, y = (self.margin - round(v * CANVAS[0]) for v in moment.shift)
            canvas = self.counter.crop((x, y, x + CANVAS[0], y + CANVAS[1]))
            return _paste(canvas, moment.placed).reduce(SHRINK)
        # Blur is the mean of pictures at times symmetric about t, so that a motion and its reverse look the same. Only
        # the hand and its object differ between them: the camera is too slow to blur.
        exposure = self.video.realism.exposure
        if clip.verb == "tap twice":
            # Twice as fast as tapping once, which a single frame would show. Exposed for half as long, it blurs alike.
            exposure /= 2
        hands = [pose(clip, t + side * exposure / 2).hand for side in (-1, 0, 1)]
        way = sum(math.dist(a, b) for a, b in pairwise(hands)) * CANVAS[0]
        count = min(1 + round(way / BLUR_STEP), BLUR_MOST)
        still, scenery = self._scenery_of(clip)
        layers = [moment.placed[len(still.placed) :]]
        if count > 1:
            times = [t + ((number + 0.5) / count - 0.5) * exposure for number in range(count)]
            layers = [self._put_action(Moment((0.0, 0.0), {}), clip, pose(clip, time)).placed for time in times]
        if (clip, layers) != self._drawn[:2]:  # otherwise only the camera moves
            # Draw only the region that sprites cover, and copy it into the scenery.
            placed = [(*corner, *view.image.size) for view, corner, _ in itertools.chain(*layers)]
            corners, sizes = np.split(np.array(placed), 2, axis=1)
            left, top = np.maximum(corners.min(0), -self.margin).tolist()
            right, bottom = ((corners + sizes).max(0) + self.margin).tolist()
            place = left + self.margin, top + self.margin
            part = scenery.crop((*place, min(right, scenery.width), min(bottom, scenery.height)))
            mean = _paste(part.copy(), layers[0], (left, top))
            for number, layer in enumerate(layers[1:], start=2):
                mean = Image.blend(mean, _paste(part.copy(), layer, (left, top)), 1 / number)
            canvas = scenery.copy()
            canvas.paste(mean, place)
            self._drawn = clip, layers, canvas
        return moment.lens.shifted(-self.margin, -self.margin).apply(self._drawn[2]).reduce(SHRINK)

    def frames(self) -> Iterator[np.ndarray]:
        """Render every frame of the video, uint8 [H, W, 3]."""
        for clip in self.video.clips:
            for i in range(clip.frames):
                yield np.asarray(self.draw(clip, frame_time(i)))

    def truth(self) -> Iterator[dict[str, object]]:
        """Compute the true boxes of both hands and the acted object, in the schema of detections."""
        for clip in self.video.clips:
            for i in range(clip.frames):
                moment, frame = self.moment(clip, frame_time(i)), clip.start + i
                boxes = {role: box for role in (*SIDE, clip.noun) if (box := moment.box(role))}
                for role, box in boxes.items():
                    row = dict.fromkeys(SCHEMA.names) | {"video_id": self.video.video_id, "frame_number": frame}
                    row |= {"second": frame_time(frame), "kind": "object", "side": -1, "state": -1, "score": 1.0}
                    row |= dict(zip(EDGES, box, strict=True))
                    if role in moment.contact:
                        row |= {"kind": "hand", "side": HANDS.index(role), "state": moment.contact[role]}
                    # As detectors predict it: from the hand's centre to that of the object it touches.
                    if role == clip.hand and moment.contact[role] == PORTABLE_OBJECT and clip.noun in boxes:
                        to = boxes[clip.noun]
                        for i, axis in enumerate("xy"):
                            row[f"offset_{axis}"] = (to[i] + to[i + 2]) / 2 - (box[i] + box[i + 2]) / 2
                    yield row


# --------------------------------------------------------------------------------------------------
# Pictures of the world
# --------------------------------------------------------------------------------------------------

SHOWN = ("pick up", "slide left", "open", "push", "wipe left", "circle clockwise", "tap twice", "flick away")
PAPER, INK = (250, 250, 247), (20, 20, 20)
COLUMNS = 6  # of the sheet: moments of a clip
CAPTION = 16  # pixels above a row of the sheet
PALETTE = 256  # colours of the sheet, which keeps the file small
MOMENTS, MOMENT_MS = 16, 160  # of the moving picture


def preview(path: Path, seed: int = 0, variant: Variant = DEFAULT) -> None:
    """Draw a clip of each of eight verbs, every one from another kitchen of the training split.

    A ``.webp`` is a moving picture; any other format is a sheet with one row per clip.

    Raises :class:`UserError` if the file cannot be written.
    """
    clips = []
    videos = (make_video(seed, "train", number, variant=variant) for number in itertools.count())
    for row, verb in enumerate(SHOWN):
        video = next(video for video in videos if any(clip.verb == verb for clip in video.clips))
        hand = ("right", "left")[row % 2]
        takes = [clip for clip in video.clips if clip.verb == verb]
        clips.append((Stage(video), max(takes, key=lambda clip: (clip.hand == hand, len(clip.hod)))))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".webp":
            first, *others = _moving_pictures(clips)
            first.save(path, save_all=True, append_images=others, duration=MOMENT_MS, loop=0, quality=70, method=6)
        else:
            _sheet(clips).quantize(PALETTE, dither=Image.Dither.NONE).save(path, optimize=True)
    except (OSError, ValueError) as error:  # ValueError: an ending that names no picture format
        raise UserError(f"cannot write {path}: {error}") from error


def _sheet(clips: Sequence[tuple[Stage, Clip]]) -> Image.Image:
    """One row per clip, its narration above."""
    (width, height), font = PICTURE, ImageFont.load_default(11)
    sheet = Image.new("RGB", (COLUMNS * width, len(clips) * (height + CAPTION)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, (stage, clip) in enumerate(clips):
        top = row * (height + CAPTION)
        pen.text((4, top + 1), clip.hod, INK, font)
        for column, picture in enumerate(_moments(stage, clip, COLUMNS)):
            sheet.paste(picture, (column * width, top + CAPTION))
    return sheet


def _moving_pictures(clips: Sequence[tuple[Stage, Clip]]) -> list[Image.Image]:
    """Two rows of clips that play side by side, each below two lines of its narration."""
    (width, height), font = PICTURE, ImageFont.load_default(10)
    columns, caption = (len(clips) + 1) // 2, 28
    pictures = [Image.new("RGB", (columns * width, 2 * (height + caption)), PAPER) for _ in range(MOMENTS)]
    for number, (stage, clip) in enumerate(clips):
        left, top = number % columns * width, number // columns * (height + caption)
        lines = textwrap.wrap(clip.hod.removeprefix("#C C "), 28, max_lines=2, placeholder=" ...")
        # A little before and after a brief event, so that one sees that it is over.
        for picture, frame in zip(pictures, _moments(stage, clip, MOMENTS, margin=0.3), strict=True):
            ImageDraw.Draw(picture).multiline_text((left + 3, top + 1), "\n".join(lines), INK, font, spacing=1)
            picture.paste(frame, (left, top + caption))
    return pictures


def _moments(stage: Stage, clip: Clip, count: int, margin: float = 0.0) -> Iterator[Image.Image]:
    """Evenly spread pictures of a clip; of a brief event with ``margin`` seconds around it alone."""
    begin, length = 0.0, clip.seconds
    if VERBS[clip.verb].brief:  # nothing else moves in its clip
        begin, length = max(0.0, clip.begin - margin), clip.event_seconds + 2 * margin
    for number in range(count):
        yield stage.draw(clip, begin + (number + 0.5) / count * length)
