"""What happens in the demo world: kitchens, objects, verbs, takes and narrations.

Lengths and positions are in picture widths (x from 0 to 1, y from 0 at the top to 0.75), times in seconds.
Everything is a pure function of (seed, split, video number).
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np

SPLITS = {"train": 2000, "val": 300, "test": 500}  # clips at scale 1
FPS = 12
CLIPS_PER_VIDEO = 20
CLIP_FRAMES = (29, 32)  # four uniform frames of a clip lie at least 7 frames apart,
EVENT_SECONDS = 7 / FPS  # so at most one of them sees a brief event; sixteen see it three or four times

RGB = tuple[int, int, int]
XY = tuple[float, float]

COLOURS: dict[str, RGB] = {
    "red": (200, 40, 36), "blue": (40, 84, 190), "green": (52, 148, 66), "yellow": (238, 200, 48),
    "white": (238, 236, 228), "orange": (238, 128, 30), "purple": (128, 62, 158), "pink": (236, 128, 160),
    "brown": (150, 96, 52), "black": (58, 56, 64), "silver": (196, 202, 210), "teal": (24, 146, 146),
}  # fmt: skip
NOUNS = {  # the colours each object comes in
    "cup": "red blue white", "bowl": "green orange blue", "plate": "white teal pink", "bottle": "green purple brown",
    "jar": "orange purple red", "box": "brown blue teal", "pot": "black red silver", "sponge": "yellow pink green",
    "cloth": "red blue green", "knife": "black red teal", "spoon": "brown silver orange", "lemon": "yellow green",
}  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """A verb, told apart from its opposite by motion alone: a backwards verb runs the same path the other way."""

    name: str
    opposite: str | None
    path: str
    backwards: bool
    kind: str  # state_changing, transient or none
    brief: bool  # an event of EVENT_SECONDS, everything ends where it began
    phrase: str  # canonical wording, {o} is the object
    detail: str  # from where to where
    coarse: str  # as coarse as a plain narration gets without being vague
    nouns: tuple[str, ...]


# path: kind, objects, coarse wording, then name, wording and detail of each verb
# fmt: off
_TABLE: dict[str, tuple[str, str, str, tuple[tuple[str, str, str], ...]]] = {
    "lift": ("state_changing", "cup bowl plate bottle jar box sponge cloth knife spoon lemon", "uses {o}",
             (("pick up", "picks up {o}", "from the counter into the air"),
              ("put down", "puts down {o}", "from the air onto the counter"))),
    "open": ("state_changing", "jar box pot", "uses the lid of {o}",
             (("open", "opens {o}", "lid moved from the top to the side"),
              ("close", "closes {o}", "lid moved from the side to the top"))),
    "push": ("state_changing", "cup bowl plate bottle jar box pot", "shifts {o}",
             (("push", "pushes {o} away", "from near to far"), ("pull", "pulls {o} closer", "from far to near"))),
    "slide": ("state_changing", "cup bowl plate bottle jar box pot sponge", "slides {o}",
              (("slide left", "slides {o} to the left", "from the right side to the left side"),
               ("slide right", "slides {o} to the right", "from the left side to the right side"))),
    "wipe": ("transient", "sponge cloth knife spoon plate", "wipes the counter with {o}",
             (("wipe left", "wipes {o} to the left", "first left, then right and back to the middle"),
              ("wipe right", "wipes {o} to the right", "first right, then left and back to the middle"))),
    "circle": ("transient", "cup bowl bottle spoon sponge cloth lemon", "turns {o}",
               (("circle clockwise", "circles {o} clockwise", "in one quick round over the left side first"),
                ("circle counter-clockwise", "circles {o} counter-clockwise",
                 "in one quick round over the right side first"))),
    "tap": ("transient", "cup bowl plate bottle jar box pot lemon", "taps {o}",
            (("tap once", "taps {o} once", "with one slow touch"),
             ("tap twice", "taps {o} twice", "with two quick touches"))),
    "flick": ("transient", "sponge cloth knife spoon lemon box", "flicks {o}",
              (("flick away", "flicks {o} away", "first far, then near and back to the middle"),
               ("flick back", "flicks {o} back", "first near, then far and back to the middle"))),
    "hold": ("none", "cup plate bottle jar knife lemon", "holds {o}",
             (("hold", "holds {o} still", "in the middle"),)),
    "shake": ("none", "bottle jar box cloth spoon", "shakes {o}",
              (("shake", "shakes {o}", "quickly from side to side"),)),
}
# fmt: on
VERBS: dict[str, Verb] = {}
for _path, (_kind, _nouns, _coarse, _verbs) in _TABLE.items():
    for _i, (_name, _phrase, _detail) in enumerate(_verbs):
        _opposite = _verbs[1 - _i][0] if len(_verbs) == 2 else None
        _told = (_phrase, _detail, _coarse, tuple(_nouns.split()))
        VERBS[_name] = Verb(_name, _opposite, _path, _i == 1, _kind, _kind == "transient", *_told)
ACTIONS = [(verb.name, noun) for verb in VERBS.values() for noun in verb.nouns]
VAGUE = ("moves {o}", "touches {o}", "handles {o}", "moves {o} with the hand", "works with {o}")


@dataclass(frozen=True)
class Kitchen:
    """The looks of one video; splits draw their hues from different arcs, so no two splits share one."""

    name: str
    seed: tuple[int, ...]
    counter: RGB
    wall: RGB
    grain: str
    skin: RGB
    sleeve: RGB
    stripes: bool
    nouns: dict[str, str]  # object -> colour word


@dataclass(frozen=True)
class Clip:
    """One narrated action, with all that its frames follow from."""

    uid: str
    start: int  # first frame in the video
    frames: int
    verb: str
    noun: str
    hand: str
    other: str  # what the other hand does: rest, absent, or the object it holds
    distractors: tuple[tuple[str, float, float], ...]
    centre: float
    tilt: float  # degrees
    begin: float  # share of the clip before the motion, or start of the event in seconds
    end: float  # share of the clip after the motion
    size: float  # of the motion, 1 is typical
    sway: tuple[float, ...]  # amplitudes, frequencies (Hz) and phases of the camera
    narration: str
    hod: str

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return self.frames / FPS


@dataclass(frozen=True)
class Video:
    """Clips back to back in one kitchen."""

    video_id: str
    kitchen: Kitchen
    clips: tuple[Clip, ...]

    @property
    def frames(self) -> int:
        """Length of the video."""
        return sum(clip.frames for clip in self.clips)


def _hue(rng: np.random.Generator, split: int) -> float:
    """A hue from the split's own arcs: of every six sixtieths of the circle train has four, val and test one each."""
    slot = int(rng.integers(4)) if split == 0 else 3 + split
    return (int(rng.integers(10)) * 6 + slot + float(rng.uniform(0.1, 0.9))) / 60


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _kitchen(rng: np.random.Generator, seed: tuple[int, ...], name: str) -> Kitchen:
    split = seed[1]
    sleeve, skin_hue = _hue(rng, split), 0.03 + 0.06 * _hue(rng, split)
    # Woods and warm stones, or slates: narrower than the circle, and still another hue for every split
    hue = float(rng.choice([0.02, 0.52])) + 0.13 * _hue(rng, split)
    nouns = [str(noun) for noun in rng.permutation(list(NOUNS))]
    return Kitchen(
        name=name,
        seed=seed,
        counter=_rgb(hue, float(rng.uniform(0.08, 0.4)), float(rng.choice((0.34, 0.66)) + rng.uniform(0, 0.15))),
        wall=_rgb(0.07 + 0.5 * _hue(rng, split), float(rng.uniform(0.04, 0.3)), float(rng.uniform(0.6, 0.9))),
        grain=str(rng.choice(["wood", "speckle", "marble"])),
        skin=_rgb(skin_hue, float(rng.uniform(0.36, 0.6)), float(rng.uniform(0.5, 0.95))),
        sleeve=_rgb(sleeve, float(rng.uniform(0.45, 0.8)), float(rng.uniform(0.35, 0.75))),
        stripes=bool(rng.random() < 0.4),
        nouns={noun: str(rng.choice(NOUNS[noun].split())) for noun in nouns},
    )


def _schedule(rng: np.random.Generator, nouns: list[str], number: int) -> list[tuple[str, str, str]]:
    """(verb, noun, hand) of a video's takes: pairs with the same object and hand, and two takes without a pair."""
    takes: list[tuple[str, str, str]] = []
    many = (CLIPS_PER_VIDEO - 2) // 2
    counts = {"state_changing": (many + number % 2) // 2, "transient": (many + 1 - number % 2) // 2, "none": 2}
    for kind, count in counts.items():
        forward = [verb for verb in VERBS.values() if verb.kind == kind and not verb.backwards]
        options = [(verb, noun) for verb in forward for noun in verb.nouns if noun in nouns]
        for i in rng.choice(len(options), count, replace=len(options) < count):
            verb, noun = options[int(i)]
            hand = str(rng.choice(["left", "right"]))
            takes += [(name, noun, hand) for name in (verb.name, verb.opposite) if name]
    return [takes[int(i)] for i in rng.permutation(len(takes))]


def phrase(verb: str, noun: str, hand: str | None = None, colour: str | None = None) -> str:
    """The canonical wording: ``#C C wipes the sponge to the left with the right hand``."""
    text = "#C C " + VERBS[verb].phrase.format(o=f"the {colour} {noun}" if colour else f"the {noun}")
    return f"{text} with the {hand} hand" if hand else text


def _narrations(rng: np.random.Generator, take: tuple[str, str, str], colour: str, other: str) -> tuple[str, str]:
    """(coarse narration, hand-object narration) of a take."""
    verb, noun, hand = take
    shown = colour if rng.random() < 0.4 else None
    idle = "left" if hand == "right" else "right"
    rests = {"rest": "rests on the counter", "absent": "stays out of sight"}.get(other, f"holds the {other} still")
    text, detail = phrase(verb, noun, hand, shown), VERBS[verb].detail
    acts = phrase(verb, noun, colour=shown).removeprefix("#C C ")
    hod = (
        text,
        f"{text}, {detail}",
        f"{text} while the {idle} hand {rests}",
        f"{text}, {detail}, while the {idle} hand {rests}",
        f"#C C uses the {hand} hand and {acts}, {detail}; the {idle} hand {rests}",
    )[rng.integers(5)]
    wording = str(rng.choice(VAGUE)) if rng.random() < 0.5 else VERBS[verb].coarse
    return "#C C " + wording.format(o=f"the {colour} {noun}" if rng.random() < 0.3 else f"the {noun}"), hod


def event_range(frames: int) -> tuple[float, float]:
    """Earliest and latest start of a brief event: wholly between the first and the last of four uniform frames.

    The two frames between then see every phase of it equally often. If one could see its beginning alone, a hand to
    the left would mean that the event goes left.
    """
    step = (frames - 1) / 4
    first, last = round(step) // 2, (round(3 * step) + frames - 1) // 2
    return (first + 0.5) / FPS, (last + 0.5) / FPS - EVENT_SECONDS


def _clip(rng: np.random.Generator, kitchen: Kitchen, uid: str, start: int, take: tuple[str, str, str]) -> Clip:
    verb, noun, hand = take
    frames = int(rng.integers(CLIP_FRAMES[0], CLIP_FRAMES[1] + 1))
    spare = [str(name) for name in rng.permutation([name for name in kitchen.nouns if name != noun])]
    other = str(rng.choice(["rest", "absent", spare.pop()], p=[0.5, 0.3, 0.2]))
    slots = rng.permutation(2)[: int(rng.integers(3))]
    distractors = tuple(
        (spare.pop(), float((0.14, 0.86)[i] + rng.uniform(-0.03, 0.03)), float(rng.uniform(0.16, 0.2))) for i in slots
    )
    if VERBS[verb].brief:
        begin, end = float(rng.uniform(*event_range(frames))), 0.0
    else:
        begin, end = map(float, rng.uniform(0.2, 0.32, 2))
    narration, hod = _narrations(rng, take, kitchen.nouns[noun], other)
    return Clip(
        uid, start, frames, verb, noun, hand, other, distractors,
        centre=float(0.5 + (0.03 if hand == "right" else -0.03) + rng.uniform(-0.05, 0.05)),
        tilt=float(rng.uniform(-10, 10)), begin=begin, end=end, size=float(rng.uniform(0.9, 1.1)),
        sway=tuple(map(float, rng.uniform((0.004, 0.004, 0.15, 0.15, 0, 0), (0.012, 0.012, 0.45, 0.45, 6.28, 6.28)))),
        narration=narration, hod=hod,
    )  # fmt: skip


def make_video(seed: int, split: str, number: int, clips: int = CLIPS_PER_VIDEO) -> Video:
    """Video ``number`` of a split with its first ``clips`` takes; a pure function of its arguments."""
    key = (seed, list(SPLITS).index(split), number)
    rng = np.random.default_rng(key)
    video_id = f"demo_{split}_{number:04d}"
    kitchen = _kitchen(rng, key, f"kitchen_{split}_{number:04d}")
    done: list[Clip] = []
    start = 0
    for i, take in enumerate(_schedule(rng, list(kitchen.nouns), number)[:clips]):
        done.append(_clip(rng, kitchen, f"{video_id}_{i:02d}", start, take))
        start += done[-1].frames
    return Video(video_id, kitchen, tuple(done))


def make_split(seed: int, split: str, scale: float) -> list[Video]:
    """All videos of a split; at scale 1 they hold ``SPLITS[split]`` clips."""
    clips = max(2, round(SPLITS[split] * scale))
    return [
        make_video(seed, split, n, min(CLIPS_PER_VIDEO, clips - n * CLIPS_PER_VIDEO))
        for n in range(math.ceil(clips / CLIPS_PER_VIDEO))
    ]
