"""From a clip to pictures and to the true boxes: both read the same placements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from egohod.demo.motion import GRIP_OFFSET, LID_TOP, pose, rest_point, side, sway
from egohod.demo.sprites import LIDS, MARGIN, OBJECTS, Sprite, draw_counter, draw_hand, draw_object, shadow
from egohod.demo.world import COLOURS, FPS, XY, Clip, Video

CANVAS = (320, 240)  # drawn at this size
SHRINK = 2  # and written at half of it, which smooths edges and halves the step of a moving sprite
PICTURE = (CANVAS[0] // SHRINK, CANVAS[1] // SHRINK)

# Contact states of the EPIC-KITCHENS hand-object schema; -1 where no hand is in the picture
OUT_OF_SIGHT, NO_CONTACT, PORTABLE_OBJECT, STATIONARY_OBJECT = -1, 0, 3, 4
EDGES = ("left", "top", "right", "bottom")
Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the picture


def frame_time(frame: int) -> float:
    """The middle of a frame's display interval: a path and its reverse are then seen at the same places."""
    return (frame + 0.5) / FPS


@dataclass(frozen=True)
class Placed:
    """A sprite somewhere in the picture; ``role`` names what the truth calls it (left, right, object or nothing)."""

    sprite: Sprite
    at: XY
    scale: float = 1.0
    turn: float = 0.0
    role: str = ""


@dataclass(frozen=True)
class Moment:
    """All that is seen at one time."""

    placed: list[Placed]
    shift: XY
    contact: dict[str, int]

    def corner(self, thing: Placed) -> tuple[int, int]:
        """Canvas pixel of a sprite's top left corner."""
        x, y = (at + shift for at, shift in zip(thing.at, self.shift, strict=True))
        anchor = thing.sprite.at(thing.scale, thing.turn).anchor
        return round(x * CANVAS[0] - anchor[0]), round(y * CANVAS[0] - anchor[1])

    def box(self, role: str) -> Box | None:
        """The box of the visible part of a hand or the object; None when it is outside the picture."""
        for thing in self.placed:
            if thing.role == role:
                x, y = self.corner(thing)
                seen = (
                    thing.sprite.at(thing.scale, thing.turn)
                    .marked.crop((-x, -y, CANVAS[0] - x, CANVAS[1] - y))
                    .getbbox()
                )
                if seen and seen[2] - seen[0] >= 2 * SHRINK and seen[3] - seen[1] >= 2 * SHRINK:
                    return seen[0] / CANVAS[0], seen[1] / CANVAS[1], seen[2] / CANVAS[0], seen[3] / CANVAS[1]
        return None


class Stage:
    """A video's kitchen with its sprites; :meth:`frames` draws, :meth:`truth` only computes."""

    def __init__(self, video: Video) -> None:
        self.video = video
        kitchen = video.kitchen
        self.objects = {noun: draw_object(OBJECTS[noun], COLOURS[colour]) for noun, colour in kitchen.nouns.items()}
        self.lids = {
            noun: draw_object(LIDS[noun], COLOURS[kitchen.nouns[noun]]) for noun in kitchen.nouns if noun in LIDS
        }
        self.hands = {
            (grip, hand): draw_hand(grip, hand, kitchen)
            for grip in ("open", "grip", "point")
            for hand in ("left", "right")
        }
        self.shadow = shadow()
        self.counter: Image.Image | None = None

    def _thing(
        self, noun: str, at: XY, depth: float, turn: float, lid: XY | None, role: str = "", height: float = 0.0
    ) -> Iterator[Placed]:
        """An object with its shadow and, where it has one, its lid."""
        yield Placed(self.shadow, (at[0] + 0.3 * height, at[1] + 0.06 * depth + height), depth * 1.1)
        yield Placed(self.objects[noun], at, depth, turn, role)
        if noun in self.lids:
            if lid is not None:
                yield Placed(self.lids[noun], lid, depth)
            else:
                yield Placed(self.lids[noun], (at[0] + LID_TOP[0] * depth, at[1] + LID_TOP[1] * depth), depth, turn)

    def moment(self, clip: Clip, t: float) -> Moment:
        """What is where ``t`` seconds into the clip."""
        now, other, shift = pose(clip, t), "left" if clip.hand == "right" else "right", sway(clip, t)
        placed: list[Placed] = []
        for noun, x, y in clip.distractors:
            placed += self._thing(noun, (x, y), 0.75, 0.0, None)
        contact = {clip.hand: PORTABLE_OBJECT if now.touching else NO_CONTACT, other: OUT_OF_SIGHT}
        idle = None
        if clip.other == "rest":
            idle, contact[other] = (
                Placed(self.hands["open", other], rest_point(other), 0.9, role=other),
                STATIONARY_OBJECT,
            )
        elif clip.other != "absent":
            at = (0.5 + 0.36 * side(other), 0.52)
            placed += self._thing(clip.other, at, 0.85, 0.0, None)
            grip = (at[0] + side(other) * GRIP_OFFSET[0], at[1] + GRIP_OFFSET[1])
            idle, contact[other] = Placed(self.hands["grip", other], grip, 0.9, role=other), PORTABLE_OBJECT
        if idle:
            placed.append(idle)
        placed += self._thing(clip.noun, now.object, now.depth, now.turn, now.lid, "object", now.height)
        placed.append(Placed(self.hands[now.grip, clip.hand], now.hand, 0.5 + 0.5 * now.depth, role=clip.hand))
        return Moment(placed, shift, contact)

    def draw(self, clip: Clip, t: float) -> Image.Image:
        """The picture ``t`` seconds into the clip, at canvas size."""
        if self.counter is None:
            self.counter = draw_counter(self.video.kitchen, CANVAS)
        moment = self.moment(clip, t)
        x, y = (round(v * CANVAS[0]) for v in moment.shift)
        canvas = self.counter.crop((MARGIN - x, MARGIN - y, MARGIN - x + CANVAS[0], MARGIN - y + CANVAS[1]))
        for thing in moment.placed:
            view = thing.sprite.at(thing.scale, thing.turn)
            canvas.paste(view.picture, moment.corner(thing), view.mask)
        return canvas

    def frames(self) -> Iterator[np.ndarray]:
        """Every frame of the video, uint8 [H, W, 3]."""
        for clip in self.video.clips:
            for i in range(clip.frames):
                yield np.asarray(self.draw(clip, frame_time(i)).reduce(SHRINK))

    def truth(self) -> Iterator[dict[str, object]]:
        """A row a frame: the true boxes and contact states, NaN where nothing is seen."""
        for clip in self.video.clips:
            for i in range(clip.frames):
                moment, frame = self.moment(clip, frame_time(i)), clip.start + i
                row: dict[str, object] = {
                    "video_id": self.video.video_id,
                    "frame": frame,
                    "second": frame / FPS,
                    "noun": clip.noun,
                }
                for role in ("left", "right", "object"):
                    box = moment.box(role)
                    row |= {f"{role}_{edge}": v for edge, v in zip(EDGES, box or (float("nan"),) * 4, strict=True)}
                    if role != "object":
                        row[f"{role}_state"] = moment.contact[role] if box else OUT_OF_SIGHT
                yield row
