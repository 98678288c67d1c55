"""From a clip to pictures and to the true boxes: both read the same placements."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from egohod.data.detections import EDGES, NO_CONTACT, PORTABLE_OBJECT, SCHEMA, STATIONARY_OBJECT
from egohod.demo.motion import LID_HEIGHT, REST, SIDE, grip_point, pose, sway
from egohod.demo.sprites import LIDS, MARGIN, OBJECTS, TIPS, Sprite, draw_counter, draw_hand, draw_object, shadow
from egohod.demo.world import COLOURS, FPS, OTHER_HAND, XY, Clip, Video

CANVAS = (320, 240)  # drawn at this size
SHRINK = 2  # and written at half of it, which smooths edges and halves the step of a moving sprite
PICTURE = (CANVAS[0] // SHRINK, CANVAS[1] // SHRINK)

HANDS = ("left", "right")  # in the order of the detections' sides


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
        self.objects = {noun: draw_object(OBJECTS[noun], colour) for noun, colour in colours.items()}
        self.lids = {noun: draw_object(LIDS[noun], colour) for noun, colour in colours.items() if noun in LIDS}
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
        moment = Moment(sway(clip, t), {clip.hand: touch})
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
        """The true boxes of both hands and the acted object, in the schema of detections."""
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
                    if role == clip.hand and moment.contact[role] == PORTABLE_OBJECT and clip.noun in boxes:
                        (x, y), (to_x, to_y) = _centre(box), _centre(boxes[clip.noun])
                        row |= {"offset_x": to_x - x, "offset_y": to_y - y}
                    yield row


def _centre(box: tuple[float, ...]) -> XY:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
