"""From a clip to pictures and to the true boxes: both read the same placements."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

from egohod.demo.motion import LID_HEIGHT, REST, SIDE, grip_point, pose, sway
from egohod.demo.sprites import LIDS, MARGIN, OBJECTS, TIPS, Sprite, draw_counter, draw_hand, draw_object, shadow
from egohod.demo.world import COLOURS, FPS, OTHER_HAND, XY, Clip, Video

CANVAS = (320, 240)  # drawn at this size
SHRINK = 2  # and written at half of it, which smooths edges and halves the step of a moving sprite
PICTURE = (CANVAS[0] // SHRINK, CANVAS[1] // SHRINK)

# Contact states of the EPIC-KITCHENS hand-object schema; -1 where no hand is in the picture
OUT_OF_SIGHT, NO_CONTACT, PORTABLE_OBJECT, STATIONARY_OBJECT = -1, 0, 3, 4
EDGES = ("left", "top", "right", "bottom")


def frame_time(frame: int) -> float:
    """The middle of a frame's display interval: a path and its reverse are then seen at the same places."""
    return (frame + 0.5) / FPS


class Moment:
    """All that is seen at one time, the farthest first, and what the hands touch."""

    def __init__(self, shift: XY, contact: dict[str, int]) -> None:
        self.shift, self.contact = shift, contact
        self.placed: list[tuple[Sprite, tuple[int, int], str]] = []  # view, its top left canvas pixel, role

    def put(self, sprite: Sprite, at: XY, scale: float = 1.0, turn: float = 0.0, role: str = "") -> None:
        """Place a sprite in front; ``role`` is the hand or the object whose box it gives, if any."""
        view = sprite.at(scale, turn)
        x, y = (round((at[i] + self.shift[i]) * CANVAS[0] - view.anchor[i]) for i in (0, 1))
        self.placed.append((view, (x, y), role))

    def box(self, role: str) -> tuple[float, ...] | None:
        """The visible part of a hand or an object: left, top, right, bottom as shares of the picture, if any."""
        for view, (x, y), found in self.placed:
            seen = view.marked.crop((-x, -y, CANVAS[0] - x, CANVAS[1] - y)).getbbox() if found == role else None
            if seen and min(seen[2] - seen[0], seen[3] - seen[1]) >= 2 * SHRINK:
                return tuple(edge / CANVAS[i % 2] for i, edge in enumerate(seen))
        return None


class Stage:
    """A video's kitchen with its sprites; :meth:`frames` draws, :meth:`truth` only computes."""

    def __init__(self, video: Video) -> None:
        self.video, kitchen = video, video.kitchen
        colours = {noun: COLOURS[colour] for noun, colour in kitchen.nouns.items()}
        self.objects = {noun: draw_object(strokes, colours[noun]) for noun, strokes in OBJECTS.items()}
        self.lids = {noun: draw_object(strokes, colours[noun]) for noun, strokes in LIDS.items()}
        self.hands = {(grip, hand): draw_hand(grip, hand, kitchen) for grip in TIPS for hand in SIDE}
        self.shadow, self.counter = shadow(), draw_counter(kitchen, CANVAS)

    def _put(
        self, to: Moment, noun: str, at: XY, depth: float, turn: float = 0.0, lid: XY | None = None, height: float = 0.0
    ) -> None:
        """Place an object with its shadow and, where it has one, its lid."""
        to.put(self.shadow, (at[0] + 0.3 * height, at[1] + 0.06 * depth + height), depth * 1.1)
        to.put(self.objects[noun], at, depth, turn, noun)
        if noun in self.lids:
            to.put(self.lids[noun], lid or (at[0], at[1] - LID_HEIGHT * depth), depth, turn)

    def moment(self, clip: Clip, t: float) -> Moment:
        """What is where ``t`` seconds into the clip."""
        now, other = pose(clip, t), OTHER_HAND[clip.hand]
        touch = PORTABLE_OBJECT if now.touching else NO_CONTACT
        moment = Moment(sway(clip, t), {clip.hand: touch, other: OUT_OF_SIGHT})
        for noun, x, y in clip.distractors:
            self._put(moment, noun, (x, y), 0.75)
        if clip.other == "rest":
            moment.put(self.hands["open", other], REST[other], 0.9, role=other)
            moment.contact[other] = STATIONARY_OBJECT
        elif clip.other != "absent":
            at = (0.5 + 0.36 * SIDE[other], 0.52)
            self._put(moment, clip.other, at, 0.85)
            moment.put(self.hands["grip", other], grip_point(other, at), 0.9, role=other)
            moment.contact[other] = PORTABLE_OBJECT
        self._put(moment, clip.noun, now.object, now.depth, now.turn, now.lid, now.height)
        moment.put(self.hands[now.grip, clip.hand], now.hand, 0.5 + 0.5 * now.depth, role=clip.hand)
        return moment

    def draw(self, clip: Clip, t: float) -> Image.Image:
        """The picture ``t`` seconds into the clip, at canvas size."""
        moment = self.moment(clip, t)
        x, y = (MARGIN - round(v * CANVAS[0]) for v in moment.shift)
        canvas = self.counter.crop((x, y, x + CANVAS[0], y + CANVAS[1]))
        for view, corner, _ in moment.placed:
            canvas.paste(view.image, corner, view.image)
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
                row = {"video_id": self.video.video_id, "frame": frame, "second": frame / FPS, "noun": clip.noun}
                for name, role in (("left", "left"), ("right", "right"), ("object", clip.noun)):
                    box = moment.box(role)
                    row |= {f"{name}_{edge}": v for edge, v in zip(EDGES, box or (math.nan,) * 4, strict=True)}
                    if role in moment.contact:
                        row[f"{name}_state"] = moment.contact[role] if box else OUT_OF_SIGHT
                yield row
