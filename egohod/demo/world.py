"""What happens in the demo world: kitchens, objects, verbs, takes, narrations, and how hands and objects move.

Lengths and positions are in picture widths (x from 0 to 1, y from 0 at the top to 0.75), times in seconds.
Everything is a pure function of (seed, split, video number).
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

SPLITS = {"train": 2000, "val": 300, "test": 500}  # clips at scale 1
FPS = 12
CLIPS_PER_VIDEO = 20
CLIP_FRAMES = (29, 32)  # four uniform frames of a clip are at least 7 frames apart,
EVENT_SECONDS = 7 / FPS  # at typical speed: at most one of them sees a brief event; sixteen see it three to five times
ACTION_SHARE = 0.48  # of a clip that changes a state: how long the motion itself takes, without reach and withdrawal

RGB = tuple[int, ...]
XY = tuple[float, float]
Take = tuple[str, str, str]  # verb, noun, hand

OTHER_HAND = {"left": "right", "right": "left"}
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
# Each path (kind, coarse wording, objects) with its verbs (wording, from where to where); the second one runs backwards
_TABLE = """
lift | state_changing | uses {o} | cup bowl plate bottle jar box sponge cloth knife spoon lemon
    pick up | picks up {o} | from the counter into the air
    put down | puts down {o} | from the air onto the counter
open | state_changing | uses the lid of {o} | jar box pot
    open | opens {o} | lid moved from the top to the side
    close | closes {o} | lid moved from the side to the top
push | state_changing | shifts {o} | cup bowl plate bottle jar box pot
    push | pushes {o} away | from near to far
    pull | pulls {o} closer | from far to near
slide | state_changing | slides {o} | cup bowl plate bottle jar box pot sponge
    slide left | slides {o} to the left | from the right side to the left side
    slide right | slides {o} to the right | from the left side to the right side
wipe | transient | wipes the counter with {o} | sponge cloth knife spoon plate
    wipe left | wipes {o} to the left | first left, then right and back to the middle
    wipe right | wipes {o} to the right | first right, then left and back to the middle
circle | transient | turns {o} | cup bowl bottle spoon sponge cloth lemon
    circle clockwise | circles {o} clockwise | in one quick round over the left side first
    circle counterclockwise | circles {o} counterclockwise | in one quick round over the right side first
tap | transient | taps {o} | cup bowl plate bottle jar box pot lemon
    tap once | taps {o} once | with one slow touch
    tap twice | taps {o} twice | with two quick touches
flick | transient | flicks {o} | sponge cloth knife spoon lemon box
    flick away | flicks {o} away | first far, then near and back to the middle
    flick back | flicks {o} back | first near, then far and back to the middle
hold | none | holds {o} | cup plate bottle jar knife lemon
    hold | holds {o} still | in the middle
shake | none | shakes {o} | bottle jar box cloth spoon
    shake | shakes {o} | quickly from side to side
"""
VAGUE = ("moves {o}", "touches {o}", "handles {o}", "moves {o} with the hand", "works with {o}")


@dataclass(frozen=True)
class Verb:
    """A verb, which differs from its opposite in the motion alone: a backwards verb runs the same path in reverse."""

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


def _verbs() -> Iterator[Verb]:
    for rows in re.split(r"\n(?! )", _TABLE.strip()):
        (path, kind, coarse, nouns), *verbs = ([cell.strip() for cell in row.split("|")] for row in rows.splitlines())
        for i, (name, wording, detail) in enumerate(verbs):
            opposite = verbs[1 - i][0] if len(verbs) == 2 else None
            brief, objects = kind == "transient", tuple(nouns.split())
            yield Verb(name, opposite, path, i == 1, kind, brief, wording, detail, coarse, objects)


VERBS = {verb.name: verb for verb in _verbs()}
FEW = ("jar", "box", "sponge", "spoon")  # with these alone every verb still has something to act on


@dataclass(frozen=True)
class Realism:
    """What a version of the world adds to a tidy counter under a level camera; the defaults add nothing."""

    clutter: int = 0
    """At most so many objects in a row at the back, beside the up to two distractors."""
    patches: int = 0
    """At most so many cloths, boards and stains on a kitchen's counter."""
    roll: float = 0.0
    """Bound on the camera's rotation (degrees). Up to 10, left and up in the scene are left and up in the picture."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Bounds on the camera's zoom."""
    speed: tuple[float, float] = (1.0, 1.0)
    """Bounds on the speed of motions; a brief event lasts ``EVENT_SECONDS / speed``."""
    exposure: float = 0.0
    """Seconds of motion blur."""


MEAN_SHARE = 0.7  # of the bounds on roll and zoom: how far the mean of a clip may be from their middle
VERSION = 6  # the default
# Older versions stay renderable, byte for byte, so that their results can be reproduced. A change of pictures or texts
# needs a new version.
VERSIONS = {
    5: Realism(),
    # An exposure of half a frame is that of an action camera indoors.
    6: Realism(clutter=3, patches=6, roll=10.0, zoom=(0.9, 1.15), speed=(0.7, 1.4), exposure=0.5 / FPS),
}


@dataclass(frozen=True)
class Variant:
    """What may differ between demo worlds of one seed; the default is the world that the README reports."""

    objects: int = len(NOUNS)
    """How many of the objects there are, at least four."""
    reach: float = 1.0
    """How far motions go, relative to the default."""
    event_spread: float = 1.0
    """Where brief events may be: from anywhere in the clip (1) to between the middle two of four frames (0)."""
    idle_rests: bool = False
    """Whether the other hand always rests in sight, so that no word about it distinguishes takes."""
    version: int = VERSION
    """Which of ``VERSIONS``. Takes, captions and questions are the same in all of them."""
    roll: float | None = None
    """How far the head slowly turns to either side of a clip's mean (degrees); None is the version's, at most 3."""
    zoom: float | None = None
    """How far the camera slowly zooms around a clip's mean (per cent); None is the version's, at most 4."""

    @property
    def realism(self) -> Realism:
        """What its version adds, with the bounds that ``roll`` and ``zoom`` give the camera."""
        realism = VERSIONS[self.version]
        if self.roll is not None:
            realism = replace(realism, roll=MEAN_SHARE * realism.roll + self.roll)
        if self.zoom is not None:
            middle, half = (realism.zoom[0] + realism.zoom[1]) / 2, (realism.zoom[1] - realism.zoom[0]) / 2
            reach = MEAN_SHARE * half + self.zoom / 100
            realism = replace(realism, zoom=(middle - reach, middle + reach))
        return realism

    @property
    def nouns(self) -> list[str]:
        """The objects there are, in the order of ``NOUNS``."""
        ranked = [*FEW, *(noun for noun in NOUNS if noun not in FEW)]
        return [noun for noun in NOUNS if noun in ranked[: self.objects]]

    @property
    def actions(self) -> list[tuple[str, str]]:
        """All (verb, noun) classes."""
        return [(verb.name, noun) for verb in VERBS.values() for noun in verb.nouns if noun in self.nouns]


DEFAULT = Variant()


class Patch(NamedTuple):
    """A flat thing on the counter, a rectangle or an ellipse, plain or with stripes."""

    centre: XY
    size: XY  # half of its length and of its width
    turn: float  # degrees
    round: bool
    stripes: float  # width of a stripe, 0 for none
    colour: RGB


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
    patches: tuple[Patch, ...] = ()


@dataclass(frozen=True)
class Clip:
    """One narrated action, with all parameters of its frames."""

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
    speed: float = 1.0  # of the motion, 1 is typical
    lens: tuple[float, ...] = ()  # roll (degrees) and zoom: means, amplitudes, frequencies (Hz) and phases; () for none

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return self.frames / FPS

    @property
    def event_seconds(self) -> float:
        """Length of a brief event."""
        return EVENT_SECONDS / self.speed


@dataclass(frozen=True)
class Video:
    """Clips back to back in one kitchen."""

    video_id: str
    kitchen: Kitchen
    clips: tuple[Clip, ...]
    realism: Realism = VERSIONS[5]

    @property
    def frames(self) -> int:
        """Length of the video."""
        return sum(clip.frames for clip in self.clips)


def _kitchen(
    rng: np.random.Generator,
    extra: np.random.Generator,
    seed: tuple[int, ...],
    name: str,
    nouns: list[str],
    patches: int,
) -> Kitchen:
    def hue(rng: np.random.Generator = rng) -> float:
        # From the split's own arcs: of every six sixtieths of the circle train has four, val and test one each. A model
        # cannot learn the test kitchens' colours from train.
        slot = int(rng.integers(4)) if seed[1] == 0 else 3 + seed[1]
        return (int(rng.integers(10)) * 6 + slot + rng.uniform(0.1, 0.9)) / 60

    def rgb(hue: float, saturation: float, value: float) -> RGB:
        return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue % 1.0, saturation, value))

    # Muted colours: a patch must not be taken for an object.
    flat = tuple(
        Patch(
            centre=(extra.uniform(-0.05, 1.05), extra.uniform(0.14, 0.75)),
            size=(extra.uniform(0.06, 0.24), extra.uniform(0.03, 0.12)),
            turn=extra.uniform(0, 180),
            round=extra.random() < 0.4,
            stripes=extra.uniform(0.015, 0.04) if extra.random() < 0.5 else 0.0,
            colour=rgb(hue(extra), extra.uniform(0.05, 0.4), extra.uniform(0.3, 0.85)),
        )
        for _ in range(extra.integers(patches // 2, patches + 1) if patches else 0)
    )
    # The order of the draws is the world: a draw more or less changes every kitchen that follows.
    sleeve, skin = hue(), 0.03 + 0.06 * hue()
    counter = rng.choice([0.02, 0.52]) + 0.13 * hue()  # woods and warm stones, or slates
    nouns = rng.permutation(nouns).tolist()
    return Kitchen(
        name=name,
        seed=seed,
        counter=rgb(counter, rng.uniform(0.08, 0.4), rng.choice((0.34, 0.66)) + rng.uniform(0, 0.15)),
        wall=rgb(0.07 + 0.5 * hue(), rng.uniform(0.04, 0.3), rng.uniform(0.6, 0.9)),
        grain=str(rng.choice(["wood", "speckle", "marble"])),
        skin=rgb(skin, rng.uniform(0.36, 0.6), rng.uniform(0.5, 0.95)),
        sleeve=rgb(sleeve, rng.uniform(0.45, 0.8), rng.uniform(0.35, 0.75)),
        stripes=rng.random() < 0.4,
        nouns={noun: str(rng.choice(NOUNS[noun].split())) for noun in nouns},
        patches=flat,
    )


def _schedule(rng: np.random.Generator, number: int, variant: Variant) -> list[Take]:
    """A video's takes: pairs of opposite verbs with the same object and hand, and two takes without a pair."""
    # Both directions of a motion in one kitchen, so that nothing but the motion differs between them.
    takes: list[Take] = []
    pairs, odd = (CLIPS_PER_VIDEO - 2) // 2, number % 2
    for kind, count in (("state_changing", (pairs + odd) // 2), ("transient", (pairs + 1 - odd) // 2), ("none", 2)):
        options = [(v, n) for v, n in variant.actions if VERBS[v].kind == kind and not VERBS[v].backwards]
        for i in rng.choice(len(options), count, replace=len(options) < count):
            verb, noun = VERBS[options[i][0]], options[i][1]
            hand = str(rng.choice(["left", "right"]))
            takes += [(name, noun, hand) for name in (verb.name, verb.opposite) if name]
    return [takes[i] for i in rng.permutation(len(takes))]


def phrase(verb: str, noun: str, hand: str | None = None) -> str:
    """The canonical wording: ``#C C wipes the sponge to the left with the right hand``."""
    text = "#C C " + VERBS[verb].phrase.format(o=f"the {noun}")
    return f"{text} with the {hand} hand" if hand else text


def _narrations(rng: np.random.Generator, take: Take, colour: str, other: str) -> tuple[str, str]:
    """(coarse narration, hand-object narration) of a take."""
    verb, noun, hand = take
    shown = f"{colour} {noun}" if rng.random() < 0.4 else noun
    text, acts, detail = phrase(verb, shown, hand), phrase(verb, shown).removeprefix("#C C "), VERBS[verb].detail
    rests = {"rest": "rests on the counter", "absent": "stays out of sight"}.get(other, f"holds the {other} still")
    idle = f"the {OTHER_HAND[hand]} hand {rests}"
    hod = (
        text,
        f"{text}, {detail}",
        f"{text} while {idle}",
        f"{text}, {detail}, while {idle}",
        f"#C C uses the {hand} hand and {acts}, {detail}; {idle}",
    )[rng.integers(5)]
    # Half of the coarse narrations name no motion at all.
    wording = str(rng.choice(VAGUE)) if rng.random() < 0.5 else VERBS[verb].coarse
    shown = f"{colour} {noun}" if rng.random() < 0.3 else noun
    return "#C C " + wording.format(o=f"the {shown}"), hod


def event_range(frames: int, spread: float = 1.0, length: float = EVENT_SECONDS) -> tuple[float, float]:
    """Earliest and latest start of a brief event: wholly between the first and the last of four uniform frames.

    The two frames between then see every phase of it equally often, unless its ``length`` in seconds is more than the
    typical one. If one could see its beginning alone, a hand to the left would mean that the event goes left.
    """
    step = (frames - 1) / 4
    first, last = round(step) // 2, (round(3 * step) + frames - 1) // 2
    earliest, latest = (first + 0.5) / FPS, (last + 0.5) / FPS - length
    second, third = ((round(i * step) + round((i + 1) * step)) // 2 for i in (1, 2))
    between = ((second + third) / 2 + 0.5) / FPS - length / 2
    return between + spread * (earliest - between), between + spread * (latest - between)


def _clip(rng: np.random.Generator, kitchen: Kitchen, uid: str, start: int, take: Take, variant: Variant) -> Clip:
    verb, noun, hand = take
    frames = int(rng.integers(CLIP_FRAMES[0], CLIP_FRAMES[1] + 1))
    spare = rng.permutation([name for name in kitchen.nouns if name != noun]).tolist()
    other = str(rng.choice(["rest", "absent", spare.pop()], p=[0.5, 0.3, 0.2]))
    other = "rest" if variant.idle_rests else other
    places = [(0.14, 0.86)[i] for i in rng.permutation(2)[: rng.integers(3)]]
    distractors = tuple((spare.pop(), x + rng.uniform(-0.03, 0.03), rng.uniform(0.16, 0.2)) for x in places)
    if VERBS[verb].brief:
        begin, end = rng.uniform(*event_range(frames, variant.event_spread)), 0.0
    else:
        begin, end = rng.uniform(0.2, 0.32, 2).tolist()
    narration, hod = _narrations(rng, take, kitchen.nouns[noun], other)
    centre = 0.5 + (0.03 if hand == "right" else -0.03) + rng.uniform(-0.05, 0.05)
    tilt, size = rng.uniform(-10, 10), variant.reach * rng.uniform(0.9, 1.1)
    sway = rng.uniform((0.004, 0.004, 0.15, 0.15, 0, 0), (MOST_SWAY, MOST_SWAY, 0.45, 0.45, 6.28, 6.28)).tolist()
    return Clip(
        uid, start, frames, *take, other, distractors, centre, tilt, begin, end, size, tuple(sway), narration, hod
    )


def _add_realism(rng: np.random.Generator, clip: Clip, kitchen: Kitchen, variant: Variant) -> Clip:
    """The clip with another speed and moment of its motion, clutter and a camera that turns and zooms."""
    realism, spread = VERSIONS[variant.version], variant.event_spread
    verb, (slowest, fastest) = VERBS[clip.verb], realism.speed
    if verb.path == "tap":
        fastest = 1.0  # sixteen frames of a clip are too few to count faster touches
    if verb.brief:
        slowest = 1 - spread * (1 - slowest)  # without spread an event must fit between two of four frames
    speed, begin, end = rng.uniform(slowest, fastest), clip.begin, clip.end
    if verb.brief:
        begin = rng.uniform(*event_range(clip.frames, spread, EVENT_SECONDS / speed))
    elif verb.kind == "state_changing":
        # Symmetric, as a backwards verb exchanges begin and end: neither reveals the direction. At least 0.15 of the
        # clip on either side, in which the hand is away and the state is visible.
        begin = rng.uniform(0.15, 0.85 - ACTION_SHARE / speed)
        end = 1 - ACTION_SHARE / speed - begin
    placed = (clip.noun, clip.other, *(noun for noun, *_ in clip.distractors))
    spare = rng.permutation([noun for noun in kitchen.nouns if noun not in placed])[: rng.integers(realism.clutter + 1)]
    # Between the places of the distractors.
    places = rng.permutation((0.32, 0.5, 0.68)) + rng.uniform(-0.03, 0.03, 3)
    clutter = tuple((str(noun), float(x), rng.uniform(0.13, 0.17)) for noun, x in zip(spare, places, strict=False))
    # The mean takes up to MEAN_SHARE of the range, the slow oscillation around it the rest.
    (low, high), roll = realism.zoom, realism.roll
    middle, half = (low + high) / 2, (high - low) / 2
    lens = rng.uniform(
        (-MEAN_SHARE * roll, middle - MEAN_SHARE * half, 0, 0, 0.15, 0.15, 0, 0),
        (MEAN_SHARE * roll, middle + MEAN_SHARE * half, 0.3 * roll, 0.3 * half, 0.45, 0.45, 6.28, 6.28),
    )
    # After the draws, whose number is then the same in every variant.
    if variant.roll is not None:
        lens[2] = variant.roll
    if variant.zoom is not None:
        lens[3] = variant.zoom / 100
    return replace(
        clip, speed=speed, begin=begin, end=end, distractors=clutter + clip.distractors, lens=tuple(lens.tolist())
    )


def make_video(seed: int, split: str, number: int, clips: int = CLIPS_PER_VIDEO, variant: Variant = DEFAULT) -> Video:
    """Video ``number`` of a split with its first ``clips`` takes; a pure function of its arguments."""
    # A stream of its own for each video: a larger world begins with the videos of a smaller one.
    key = (seed, list(SPLITS).index(split), number)
    rng = np.random.default_rng(key)
    name = f"{split}_{number:04d}"
    # A second stream for what versions add: kitchens, takes and captions stay the same.
    realism, extra = variant.realism, np.random.default_rng((*key, 3))
    kitchen = _kitchen(rng, extra, key, f"kitchen_{name}", variant.nouns, realism.patches)
    takes = list[Clip]()
    for i, take in enumerate(_schedule(rng, number, variant)[:clips]):
        start = takes[-1].start + takes[-1].frames if takes else 0
        clip = _clip(rng, kitchen, f"demo_{name}_{i:02d}", start, take, variant)
        takes.append(clip if realism == Realism() else _add_realism(extra, clip, kitchen, variant))
    return Video(f"demo_{name}", kitchen, tuple(takes), realism)


def make_split(seed: int, split: str, scale: float, variant: Variant = DEFAULT) -> list[Video]:
    """All videos of a split; at scale 1 they hold ``SPLITS[split]`` clips."""
    clips = max(2, round(SPLITS[split] * scale))
    starts = enumerate(range(0, clips, CLIPS_PER_VIDEO))
    return [make_video(seed, split, n, min(CLIPS_PER_VIDEO, clips - start), variant) for n, start in starts]


SIDE = {"left": -1, "right": 1}
REST: dict[str, XY] = {"left": (0.2, 0.68), "right": (0.8, 0.68)}  # where an idle hand rests
LID_HEIGHT = 0.075  # from a body's centre to its closed lid
MOST_SWAY = 0.012  # how far the head moves the picture to a side
REACH = 0.2  # share of a clip in which the hand reaches an object or leaves it


class Pose(NamedTuple):
    """Where the acting hand and its object are at one moment."""

    hand: XY
    touching: bool
    grip: str
    object: XY
    depth: float = 1.0  # size relative to the resting object
    turn: float = 0.0  # degrees
    lid: XY | None = None  # only while a lid is off
    height: float = 0.0  # above the counter, in widths


def mix(a: XY, b: XY, s: float) -> XY:
    """The point that far from a to b."""
    return a[0] + (b[0] - a[0]) * s, a[1] + (b[1] - a[1]) * s


def grip_point(hand: str, at: XY, depth: float = 1.0) -> XY:
    """Where a hand takes hold of an object at ``at``."""
    return at[0] + SIDE[hand] * 0.05 * depth, at[1] + 0.095 * depth


def sway(clip: Clip, t: float) -> XY:
    """Offset of the whole picture by the moving head."""
    ax, ay, fx, fy, px, py = clip.sway
    return ax * math.sin(2 * math.pi * fx * t + px), ay * math.sin(2 * math.pi * fy * t + py)


def lens(clip: Clip, t: float) -> tuple[float, float]:
    """Roll (radians, clockwise in the picture) and zoom of the camera around the middle of the picture."""
    if not clip.lens:
        return 0.0, 1.0
    means, amplitudes, rates, phases = (clip.lens[i : i + 2] for i in (0, 2, 4, 6))
    roll, zoom = (means[i] + amplitudes[i] * math.sin(2 * math.pi * rates[i] * t + phases[i]) for i in (0, 1))
    return math.radians(roll), zoom


def pose(clip: Clip, t: float) -> Pose:
    """The acting hand and its object ``t`` seconds into the clip.

    The second verb of a pair is the first one's path run backwards (``tap twice`` instead passes through the same
    positions for the same time, in two humps), so a single frame holds no hint of which of the two it is.
    """
    verb = VERBS[clip.verb]
    if verb.kind == "state_changing":
        u = t / clip.seconds
        return _state_changing(clip, verb.path, 1 - u if verb.backwards else u)
    p = min(max((t - clip.begin) / clip.event_seconds, 0.0), 1.0) if verb.brief else t * clip.speed
    if verb.path == "tap":
        # One hump for "tap once", two of half the length for "tap twice"; the object stays where it is.
        s = abs(math.sin(math.pi * p * (2 if verb.backwards else 1)))
        x, y, sign = clip.centre, 0.27, SIDE[clip.hand]
        touch = (x + 0.02 * sign, y + 0.06)
        hand = mix((touch[0] + 0.04 * sign, touch[1] + 0.28 * clip.size), touch, s)
        return Pose(hand, s > 0.9, "point", (x, y), turn=clip.tilt)
    return _carry(clip, verb.path, 1 - p if verb.backwards else p)


def _smooth(x: float) -> float:
    x = min(max(x, 0.0), 1.0)
    return x * x * (3 - 2 * x)


def _state_changing(clip: Clip, path: str, u: float) -> Pose:
    # Reach, act, withdraw: ``u`` runs from 0 to 1. After a lift the object stays in the hand, so nothing withdraws.
    s = _smooth((u - clip.begin) / (1 - clip.begin - clip.end))
    near = _smooth((u - clip.begin + REACH) / REACH)
    if path != "lift":
        near *= 1 - _smooth((u - 1 + clip.end) / REACH)
    c, sign, depth, turn, lid, height = clip.centre, SIDE[clip.hand], 1.0, clip.tilt, None, 0.0
    if path == "lift":
        at = mix((c, 0.5), (c + 0.06 * sign, 0.5 - 0.27 * clip.size), s)
        depth, height = 1 + 0.35 * s, 0.2 * s
    elif path == "push":
        at = mix((c, 0.38 + 0.15 * clip.size), (c, 0.38 - 0.15 * clip.size), s)
        depth = 1.12 - 0.32 * s
    elif path == "slide":
        at = mix((c + 0.2 * clip.size, 0.4), (c - 0.2 * clip.size, 0.4), s)
    else:
        at, turn = (c - 0.1 * sign, 0.38), 0.0
        x, y = mix((at[0], at[1] - LID_HEIGHT), (at[0] + 0.3 * sign, 0.46), s)
        lid = (x, y - 0.1 * math.sin(math.pi * s))
    # A hand on a lid covers it as little as a hand on an object does.
    hand = mix(REST[clip.hand], grip_point(clip.hand, lid or at, depth), near)
    return Pose(hand, near > 0.98, "grip" if near > 0.5 else "open", at, depth, turn, lid, height)


def _carry(clip: Clip, path: str, p: float) -> Pose:
    # The object stays in the hand and makes one loop: ``p`` runs from 0 to 1 (a shake: in seconds).
    wave, x, y, depth, turn = math.sin(2 * math.pi * p), clip.centre, 0.4, 1.0, clip.tilt
    if path == "wipe":
        x -= 0.2 * clip.size * wave
    elif path == "flick":
        y -= 0.16 * clip.size * wave
        depth -= 0.15 * wave
    elif path == "circle":  # from the bottom of the circle over its left side: clockwise
        x -= 0.15 * clip.size * wave
        y += 0.12 - 0.15 * clip.size * (1 - math.cos(2 * math.pi * p))
    elif path == "shake":
        shake = math.sin(2 * math.pi * 2.4 * p)
        x, turn = x + 0.07 * shake, turn + 18 * shake
    return Pose(grip_point(clip.hand, (x, y), depth), True, "grip", (x, y), depth, turn, height=0.02)
