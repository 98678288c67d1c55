"""Pictures of what the pipeline saw in a clip: boxes, sides, contact, and tracks with time as colour."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from egohod.data.detections import EDGES, LEFT, NO_CONTACT, ROLE_COLOURS
from egohod.data.videos import VideoError
from egohod.hod.facts import ClipFacts, Motion
from egohod.hod.pipeline import CHECK, DETECT, TRACK, Pipeline, from_plain, open_videos, source_text

log = logging.getLogger(__name__)

# Moments beside the tracks in a sheet, and heights in pixels.
GAP = 4
PAPER, INK = (250, 250, 247), (20, 20, 20)
MOMENTS, LARGE, SMALL, LINE = 4, 240, 118, 15
_SOFT, _HALO = (110, 120, 130), (255, 255, 255)
# Time as colour, from the start of a clip to its end: dark violet, teal, yellow.
_TIMES = np.array([(68, 1, 84), (38, 130, 142), (109, 205, 89), (253, 231, 37)], dtype=np.float64)


@dataclass(frozen=True)
class Seen:
    """A clip with all that the stages found out about it."""

    title: str
    pictures: np.ndarray
    """The sampled frames, each once, uint8 [T, H, W, 3]."""
    seconds: np.ndarray
    """When each is on display, from the start of the video, float64 [T]."""
    boxes: Sequence[dict[str, Any]]
    """Rows of the detections' schema."""
    facts: ClipFacts | None
    source: str
    """What was narrated before."""
    text: str
    """The hand-object narration, or why there is none."""
    narrator: str
    verdict: str
    sides: tuple[str, ...]
    """The hands that are seen, left first."""
    note: str = ""
    """What the check had against it."""


def collect(pipeline: Pipeline, indices: Sequence[int]) -> list[Seen]:
    """Everything that is stored of some clips, to be drawn; without pictures where a video cannot be read."""
    clips, source = [], open_videos(pipeline.cfg, pipeline.table)
    with pipeline.store.all_results() as results:
        for index in indices:
            row, outcomes = pipeline.table.row(index), pipeline.stored(index, results)
            values = {name: outcome.parsed() for name, outcome in outcomes.items() if outcome.fault is None}
            fault = next((f"{name}: {each.fault}" for name, each in outcomes.items() if each.fault), None)
            pictures, seconds = np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0)
            try:
                frames = source.read(row, pipeline.cfg.frames, None)
                # Each once, as the detector saw them.
                seconds, first = np.unique(frames.seconds, return_index=True)
                pictures = frames.pictures[first]
            except VideoError as error:
                log.warning("no picture: %s", error)
            boxes = values[DETECT]["boxes"] if DETECT in values else {"second": []}
            facts = from_plain(ClipFacts, values[TRACK]) if TRACK in values else None
            checked = values.get(CHECK)
            if fault is not None:
                verdict = "failed"
            elif checked is None:
                verdict = "unchecked"
            elif not checked["refusals"]:
                verdict = "passed"
            else:
                verdict = "replaced" if checked["narrator"] == "template" else "asked again"
            seen = Seen(
                title=f"{row.video_id} {row.start:.2f}-{row.end:.2f} s",
                pictures=pictures,
                seconds=seconds,
                boxes=[dict(zip(boxes, each, strict=True)) for each in zip(*boxes.values(), strict=True)],
                facts=facts,
                source=source_text(pipeline.cfg, pipeline.table, index),
                text=checked["text"] if checked else fault or "not narrated yet",
                narrator=checked["narrator"] if checked else pipeline.cfg.narrator.kind,
                verdict=verdict,
                sides=tuple(sorted(facts.hands)) if facts else (),
                note="; ".join(checked["refusals"]) if checked else "",
            )
            clips.append(seen)
    return clips


def time_colour(share: float) -> tuple[int, int, int]:
    """The colour of a moment, 0 the clip's start and 1 its end."""
    at = min(max(share, 0.0), 1.0) * (len(_TIMES) - 1)
    low = min(int(at), len(_TIMES) - 2)
    red, green, blue = (_TIMES[low] + (at - low) * (_TIMES[low + 1] - _TIMES[low])).round().astype(int).tolist()
    return red, green, blue


def frame(seen: Seen, number: int, height: int, until: int | None = None) -> Image.Image:
    """A frame with its boxes, ``height`` pixels high; with ``until`` also the tracks up to that frame."""
    image = _sized(seen.pictures[number], height)
    for box in seen.boxes:
        # Of detections made elsewhere the moments lie between the frames.
        if np.abs(seen.seconds - box["second"]).argmin() == number:
            _draw_box(image, box)
    if until is not None:
        _draw_tracks(image, seen.facts, until)
    return image


def tracks(seen: Seen, height: int) -> Image.Image:
    """The first frame under the tracks of hands (circles left, squares right) and object (a thin line).

    The first, since tracks are told in its place: the camera's motion since then is taken out of them.
    """
    image = _sized(seen.pictures[0], height)
    # Paler, so that lines of any colour stand out.
    image = Image.blend(image, Image.new("RGB", image.size, PAPER), 0.35)
    _draw_tracks(image, seen.facts, len(seen.pictures) - 1)
    return image


def card(seen: Seen) -> Image.Image:
    """The tracks, and two by two moments beside them."""
    large = tracks(seen, 2 * SMALL)
    chosen = np.linspace(0, len(seen.pictures) - 1, 4).round().astype(int).tolist()
    small = [frame(seen, number, SMALL) for number in chosen]
    image = Image.new("RGB", (large.width + 2 * small[0].width, large.height), PAPER)
    image.paste(large, (0, 0))
    for place, picture in enumerate(small):
        image.paste(picture, (large.width + place % 2 * picture.width, place // 2 * SMALL))
    return image


def row(seen: Seen) -> Image.Image:
    """A clip's part of a sheet: tracks, a few moments, what was said before and what is said now."""
    large = tracks(seen, LARGE)
    chosen = np.linspace(0, len(seen.pictures) - 1, min(MOMENTS, len(seen.pictures))).round().astype(int).tolist()
    small = [frame(seen, number, SMALL) for number in chosen]
    for picture, number in zip(small, chosen, strict=True):
        share = number / max(1, len(seen.pictures) - 1)
        ImageDraw.Draw(picture).rectangle((0, 0, picture.width, 4), fill=time_colour(share))
    left = large.width + 2 * GAP
    width = left + max(420, sum(picture.width + GAP for picture in small))
    said = [(seen.title, _SOFT), (f"was: {seen.source or '(nothing)'}", _SOFT), (seen.text, INK)]
    said.append((f"{seen.narrator}, {seen.verdict}", _SOFT))
    lines = [
        (line, colour)
        for text, colour in said
        for line in textwrap.wrap(text, max(30, (width - left) // 6), max_lines=3, placeholder=" ...")
    ]
    image = Image.new("RGB", (width, max(LARGE, SMALL + GAP + len(lines) * LINE) + 2 * GAP), PAPER)
    image.paste(large, (GAP, GAP))
    for picture in small:
        image.paste(picture, (left, GAP))
        left += picture.width + GAP
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for number, (line, colour) in enumerate(lines):
        pen.text((large.width + 2 * GAP, SMALL + 2 * GAP + number * LINE), line, colour, font)
    return image


def sheet(clips: Sequence[Seen]) -> Image.Image:
    """Clips one below the other, and what the colours mean."""
    rows = [row(seen) for seen in clips]
    image = Image.new("RGB", (max(each.width for each in rows), sum(each.height for each in rows) + LINE + GAP), PAPER)
    top = 0
    for each in rows:
        image.paste(each, (0, top))
        top += each.height
    _legend(image, top)
    return image


def film(seen: Seen, height: int = 480) -> Iterator[np.ndarray]:
    """The sampled frames with boxes and growing tracks, uint8 [height, W, 3] with even sides."""
    for number in range(len(seen.pictures)):
        image = frame(seen, number, height, until=number)
        yield np.asarray(image.crop((0, 0, image.width // 2 * 2, image.height // 2 * 2)))


def _sized(picture: np.ndarray, height: int) -> Image.Image:
    image = Image.fromarray(picture)
    return image.resize((max(2, round(image.width * height / image.height)), height), Image.Resampling.BICUBIC)


def _draw_box(image: Image.Image, box: dict[str, Any]) -> None:
    """Hands in the colour of their side; one that touches has a thick edge and a line to what it touches."""
    hand = box["kind"] == "hand"
    colour = ROLE_COLOURS[(0 if box["side"] == LEFT else 1) if hand else 2]
    touching = hand and (box["state"] or 0) > NO_CONTACT
    pen, scale = ImageDraw.Draw(image), np.array([image.width - 1, image.height - 1])
    edges = [float(box[edge]) for edge in EDGES]
    corners = (np.array(edges).reshape(2, 2) * scale).round()
    pen.rectangle(corners.reshape(-1).tolist(), outline=colour, width=3 if touching else 1)
    if hand:
        at = corners[0] + 3
        pen.text(at.tolist(), "L" if box["side"] == LEFT else "R", colour, ImageFont.load_default(11))
    if touching and box["offset_x"] is not None and np.isfinite(box["offset_x"]):
        centre = corners.mean(axis=0)
        target = centre + np.array([box["offset_x"], box["offset_y"]]) * scale
        pen.line([*centre.tolist(), *target.tolist()], fill=colour, width=2)


def _draw_tracks(image: Image.Image, facts: ClipFacts | None, until: int) -> None:
    if facts is None:
        return
    if facts.object is not None:
        _draw_track(image, facts.object.motion, until, "")
    for side, hand in facts.hands.items():
        _draw_track(image, hand.motion, until, side)


def _draw_track(image: Image.Image, motion: Motion, until: int, side: str) -> None:
    pen, last = ImageDraw.Draw(image), max(1, len(motion.path) - 1)
    points = motion.path[: until + 1] * (image.width - 1, image.height - 1)
    width = max(2, image.height // 80)
    thick = width if side else max(1, width // 2)
    legs = [
        (points[number - 1 : number + 1].reshape(-1).tolist(), time_colour(number / last))
        for number in range(1, len(points))
        if np.isfinite(points[number - 1 : number + 1]).all()
    ]
    for ends, _ in legs:
        pen.line(ends, fill=_HALO, width=thick + 2)
    for ends, colour in legs:
        pen.line(ends, fill=colour, width=thick)
    mark = pen.ellipse if side == "left" else pen.rectangle
    for number, (x, y) in enumerate(points if side else ()):
        if np.isfinite([x, y]).all():
            mark((x - width, y - width, x + width, y + width), fill=time_colour(number / last))


def _legend(image: Image.Image, top: int) -> None:
    pen, font, x = ImageDraw.Draw(image), ImageFont.load_default(12), GAP
    for name, colour in zip(("left hand", "right hand", "object"), ROLE_COLOURS, strict=True):
        pen.rectangle((x, top + 3, x + 10, top + 13), outline=colour, width=2)
        pen.text((x + 15, top), name, INK, font)
        x += 95
    pen.text((x, top), "start", INK, font)
    for step in range(80):
        pen.rectangle((x + 34 + step, top + 3, x + 35 + step, top + 12), fill=time_colour(step / 79))
    pen.text((x + 120, top), "end   track: circles left hand, squares right hand, line object", INK, font)
