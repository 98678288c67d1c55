"""Show what the HOD pipeline detected and wrote.

    python tools/visualize_hod.py --config_file configs/hod/demo.yml --page hod.html --number 40
    python tools/visualize_hod.py --config_file my_hod.yml --output hod.csv --sheet sheet.png --clips 3,17,204
    python tools/visualize_hod.py --config_file my_hod.yml --output hod.csv --film clip.mp4 --clips 17

Give the configuration and the --metadata, --root and --output of the run, which may still be in progress. --page is one
HTML file with filters for all that --where takes, also where there is no network; --sheet is a picture; --film shows
the sampled frames of the first clip with boxes and growing tracks, at the speed of the clip. --stabilised draws the
tracks of a sheet twice, as seen in the moving picture and with the camera's motion removed, and says how far the
background moves in either. --clips counts the rows of the metadata from 1; without it --number clips are chosen at
random with --seed, of those that fit every --where:

    --where hand=left,right      the acting hand: left, right or none
    --where touches=surface      what a hand touches: object, other object, surface, ..., or nothing
    --where relation=onto        of the acting hand to the object: onto, off, ..., or none
    --where direction=up         how the acting hand moves, or any where none acts
    --where verdict=replaced     passed, retried, replaced, unchecked or failed
    --where narrator=template    who wrote the narration
    --where stage=detect         the stage at which a clip failed;  --where reason='no such file': words of the reason
    --where word=cut             a word of the narration, or its beginning: cut, cuts, cutting
    --where 'score<0.5'          mean score of the boxes; also score>0.5

Clips are looked at in random order until there are enough: a filter that few of a million clips fit takes minutes.
"""

from __future__ import annotations

import argparse
import logging
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from _common import run_tool
from PIL import Image, ImageDraw, ImageFont

from egohod import cli
from egohod.data.detections import ROLE_COLOURS, SCHEMA
from egohod.data.videos import VideoError
from egohod.errors import UserError, nearest
from egohod.evaluation.page import data_uri, jpeg, render
from egohod.hod import config
from egohod.hod.camera import background_motion
from egohod.hod.config import NARRATORS, HodConfig
from egohod.hod.draw import draw_boxes, write_film
from egohod.hod.facts import (
    AWAY,
    CLOCKWISE,
    CLOSER,
    COUNTERCLOCKWISE,
    DOWN,
    LEFT,
    RIGHT,
    SHAKING,
    SIDES,
    STILL,
    UP,
    ClipFacts,
    facts_of,
)
from egohod.hod.pipeline import (
    CHECK,
    DETECT,
    STAGES,
    TRACK,
    Pipeline,
    box_table,
    build,
    camera_of,
    open_videos,
    source_text,
)
from egohod.hod.store import Outcome, from_plain
from egohod.runtime import Progress, atomic_write, write_text

log = logging.getLogger("visualize_hod")

_FILMS = (".mp4", ".mkv", ".mov")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# Heights of pictures and of a line of text, the space between them, and moments beside the tracks in a sheet.
LARGE, SMALL, _LINE, _GAP, _MOMENTS = 240, 118, 15, 4, 4
_PAPER, _INK, _GREY, _WHITE = (250, 250, 247), (20, 20, 20), (110, 120, 130), (255, 255, 255)
# Different values of a trait that are counted for a message, where reasons may name a file each, and that it shows.
_COUNTED, _SHOWN = 1000, 12
# Time as colour from the start of a clip to its end: dark violet, teal, yellow, as in viridis, which stays in order in
# grey and for the colour-blind.
_TIMES = np.array([(68, 1, 84), (38, 130, 142), (109, 205, 89), (253, 231, 37)], dtype=np.float64)


@dataclass(frozen=True)
class ClipView:
    """A clip with everything that the stages stored of it."""

    title: str
    pictures: np.ndarray  # the sampled frames, each once, uint8 [T, H, W, 3]; none where the video cannot be read
    seconds: np.ndarray  # when each is on display, from the start of the video, float64 [T]
    boxes: Sequence[dict[str, Any]]  # rows of the detections' schema
    facts: ClipFacts | None
    source: str  # the narration before
    text: str  # the hand-object narration, or why there is none
    narrator: str
    verdict: str
    traits: Mapping[str, Sequence[str]]  # by filter, see traits_of
    note: str = ""  # the check's reasons
    raw: ClipFacts | None = None  # with --stabilised: the facts with the camera's motion left in
    background: tuple[float, float] = (np.nan, np.nan)  # how far it moves a frame, as seen and stabilised; widths


def main(arguments: Sequence[str]) -> int:
    args = _parse(arguments)
    overrides = {"source.metadata": args.metadata, "source.root": args.root, "output": args.output}
    knobs = [f"{name}={value}" for name, value in overrides.items() if value is not None]
    pipeline = build(config.load(args.config_file, [*knobs, *args.overrides]))
    views = collect(pipeline, _choose_clips(pipeline, args), args.stabilised)
    if args.no_frames:
        views = (replace(view, pictures=np.full_like(view.pictures, 255)) for view in views)
    # A page alone draws clip by clip: the frames of a thousand clips take gigabytes.
    clips = list(views) if args.sheet or args.film else []
    if args.page:
        args.page.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.page, _page(pipeline, clips or views, None if args.clips else args.seed, args.where))
    if args.sheet or args.film:
        clips = [view for view in clips if len(view.pictures)]
        if not clips:
            raise UserError("not one of the clips can be read")
    if args.sheet:
        with atomic_write(args.sheet) as temporary:
            sheet(clips).save(temporary)
    if args.film:
        with atomic_write(args.film) as temporary:
            _write_film(clips[0], temporary)
    for path in filter(None, (args.page, args.sheet, args.film)):
        log.info("wrote %s", path)
    return cli.DONE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments; creates the folders of outputs, so that errors show before the work instead of after it."""
    parser = cli.parser(__doc__ or "", "configs/hod/default.yml", HodConfig)
    add = parser.add_argument
    add("--metadata", metavar="FILE", help="narrations (source.metadata)")
    add("--root", metavar="FOLDER", help="videos (source.root)")
    add("--output", metavar="CSV", help="output of the run (output)")
    add("--page", type=Path, metavar="HTML", help="write a page")
    add("--sheet", type=Path, metavar="PNG", help="write a picture")
    add("--film", type=Path, metavar="MP4", help="write a film of the first clip")
    add("--clips", metavar="ROWS", help="these rows of the metadata, e.g. 3,17,204")
    add(
        "--where",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="random clips that fit, see above; repeatable",
    )
    add("--number", type=int, default=24, metavar="N", help="number of random clips (default: 24)")
    add("--no_frames", action="store_true", help="draw on white instead of frames, for videos that may not be shown")
    add("--stabilised", action="store_true", help="draw the tracks of a sheet with and without the camera's motion")
    add("--seed", type=int, default=0, help="of the random choice (default: 0)")
    args = parser.parse_intermixed_args(arguments)
    if args.clips and args.where:
        raise UserError("--clips names the clips: --where has no effect with it")
    if not (args.sheet or args.film or args.page):
        raise UserError("nothing to draw: give --page, --sheet or --film")
    if args.stabilised and not args.sheet:
        raise UserError("--stabilised is for a --sheet")
    for name, path, endings in (("sheet", args.sheet, _PICTURES), ("film", args.film, _FILMS), ("page", args.page, ())):
        if path is None:
            continue
        if endings and path.suffix.lower() not in endings:
            raise UserError(f"--{name} is '{path}', but must end in one of {', '.join(endings)}")
        if path.is_dir():
            raise UserError(f"--{name} is '{path}', which is a folder; it must be a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--{name}: {path.parent} cannot be made: {error.strerror or error}") from error
    return args


def _choose_clips(pipeline: Pipeline, args: argparse.Namespace) -> list[int]:
    """Indices of the clips to draw, of those that went through a stage."""
    table, conditions = pipeline.table, [Condition.parse(text) for text in args.where]
    if args.clips:
        try:
            rows = {int(each): -1 for each in args.clips.split(",")}
            # One by one: a dictionary of a million rows would take hundreds of megabytes.
            rows |= {row: index for index in range(len(table)) if (row := table.number(index)) in rows}
            if missing := [row for row, index in rows.items() if index < 0]:
                raise KeyError(missing[0])
            return list(rows.values())
        except (KeyError, ValueError) as error:
            raise UserError(f"--clips is '{args.clips}', but {error} is no row of {table.path} that is used") from error
    if args.number < 1 or args.seed < 0:
        raise UserError(f"--number must be at least 1 and --seed at least 0, not {args.number} and {args.seed}")
    chosen, begun, counts = list[int](), 0, {each.name: Counter[str]() for each in conditions}
    # Eight bytes a clip, and the results of one: memory does not grow with what is looked at.
    order = np.random.default_rng(args.seed).permutation(len(table))
    with (
        pipeline.store.results(clips=pipeline.clips) as results,
        Progress("looking for clips", len(table), seconds=5.0) as progress,
    ):
        for looked_at, index in enumerate(map(int, order), start=1):
            progress.update(looked_at, note=f"{len(chosen)} fit")
            outcomes = pipeline.stored(index, results)
            if not outcomes:
                continue
            begun += 1
            traits = traits_of(outcomes, set(counts))
            for name, values in counts.items():
                if len(values) < _COUNTED:
                    values.update(set(traits[name]))
            if all(each.fits(traits[each.name]) for each in conditions):
                chosen.append(index)
                if len(chosen) == args.number:
                    break
    if not begun:
        raise UserError(f"{pipeline.store.folder}: no clip has been through a stage with these settings")
    if not chosen:
        there = []
        for name, values in counts.items():
            most = sorted(values, key=lambda value: (-values[value], value))[:_SHOWN]
            there.append(f"{name}: " + (", ".join(f"{value} ({values[value]:,})" for value in most) or "nothing"))
        wanted = " and ".join(args.where)
        raise UserError(f"--where: none of {begun:,} clips fits {wanted}; there are {'; '.join(there)}")
    return sorted(chosen)


@dataclass(frozen=True)
class Condition:
    """One ``--where``: a trait and its values, or a limit of the score."""

    name: str
    sign: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Condition:
        """``hand=left,right``. Raises :class:`UserError`."""
        match = re.fullmatch(r"\s*(\w+)\s*([=<>])\s*(.+?)\s*", text)
        if match is None:
            raise UserError(f"--where is '{text}', but must be NAME=VALUE, such as hand=left, or score<0.5")
        name, sign, values = match[1], match[2], tuple(each.strip() for each in match[3].split(","))
        if name not in TRAITS:
            raise UserError(
                f"--where: there is no '{name}'{nearest(name, list(TRAITS))}; there are {', '.join(TRAITS)}"
            )
        if (name == "score") == (sign == "="):
            raise UserError(f"--where is '{text}', but {name} takes {'< or >' if name == 'score' else '='}")
        if name == "score" and len(values) > 1:
            raise UserError(f"--where is '{text}', but score takes one number")
        for value in values:
            if name == "word" and not re.fullmatch(r"\w+", value):
                raise UserError(f"--where is '{text}', but '{value}' is not a word; several take a --where each")
            if name == "score" and not re.fullmatch(r"\d*\.?\d+", value):
                raise UserError(f"--where is '{text}', but '{value}' is no number")
            if TRAITS[name] and value not in TRAITS[name]:
                raise UserError(f"--where is '{text}', but {name} is one of {', '.join(TRAITS[name])}")
        return cls(name, sign, values)

    def fits(self, traits: Sequence[str]) -> bool:
        """Whether a clip with these values of the trait is one of those."""
        if self.sign != "=":
            return any((float(each) < float(self.values[0])) == (self.sign == "<") for each in traits)
        if self.name == "word":
            return any(each.startswith(value.lower()) for value in self.values for each in traits)
        if self.name == "reason":
            return any(value.lower() in each.lower() for value in self.values for each in traits)
        return not set(self.values).isdisjoint(traits)


# What --where takes, and the values where they are few and fixed.
TRAITS: dict[str, tuple[str, ...]] = {
    "hand": (*SIDES, "none"),
    "touches": (),
    "relation": (),
    "direction": (LEFT, RIGHT, UP, DOWN, AWAY, CLOSER, CLOCKWISE, COUNTERCLOCKWISE, SHAKING, STILL),
    "verdict": ("passed", "retried", "replaced", "unchecked", "failed"),
    "narrator": tuple(NARRATORS),
    "stage": tuple(stage.name for stage in STAGES),
    "reason": (),
    "word": (),
    "score": (),
}


def traits_of(outcomes: Mapping[str, Outcome], names: Collection[str]) -> dict[str, Sequence[str]]:
    """The values of the traits ``names`` of a clip, by what the stages made of it; ``score`` is a number as text."""
    # Only what is asked for is parsed: a million clips may be looked at for a few.
    traits: dict[str, Sequence[str]] = dict.fromkeys(names, ())
    fault = next(((name, each.fault) for name, each in outcomes.items() if each.fault), None)
    if fault:
        traits |= {"stage": [fault[0]], "reason": [fault[1]]}
    if not {"verdict", "narrator", "word"}.isdisjoint(names):
        checked = outcomes[CHECK].parsed() if CHECK in outcomes and not fault else None
        if checked is None:
            traits["verdict"] = ["failed" if fault else "unchecked"]
        else:
            replaced = "replaced" if checked["narrator"] == "template" else "retried"
            traits |= {"verdict": [replaced if checked["refusals"] else "passed"], "narrator": [checked["narrator"]]}
            traits["word"] = re.findall(r"\w+", checked["text"].lower())
    if (
        TRACK in outcomes
        and not outcomes[TRACK].fault
        and not {"hand", "touches", "relation", "direction"}.isdisjoint(names)
    ):
        facts = from_plain(ClipFacts, outcomes[TRACK].parsed())
        hands = list(facts.hands.values())
        moving = [facts.hands[facts.acting]] if facts.acting else hands
        traits["hand"] = [facts.acting or "none"]
        traits["touches"] = sorted({hand.touches for hand in hands if hand.touches}) or ["nothing"]
        traits["relation"] = sorted({hand.relation for hand in hands if hand.relation}) or ["none"]
        traits["direction"] = sorted({each for hand in moving for each in hand.motion.directions})
    if "score" in names and DETECT in outcomes and not outcomes[DETECT].fault:
        scores = outcomes[DETECT].parsed()["boxes"].get("score")
        traits["score"] = [f"{np.mean(scores):.4f}"] if scores else []
    return {name: traits[name] for name in names}


def collect(pipeline: Pipeline, indices: Sequence[int], stabilised: bool = False) -> Iterator[ClipView]:
    """Everything that is stored of some clips; without pictures where a video cannot be read.

    With ``stabilised`` also what their tracks and their background are without the removal of the camera's motion.
    """
    if stabilised and pipeline.cfg.tracks.camera == "none":
        raise UserError("--stabilised needs the camera's motion, which tracks.camera=none does not measure")
    source = open_videos(pipeline.cfg, pipeline.table)
    with pipeline.store.results(clips=pipeline.clips) as results:
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
            checked, traits = values.get(CHECK), traits_of(outcomes, TRAITS)
            view = ClipView(
                title=f"{row.video_id} {row.start:.2f}-{row.end:.2f} s",
                pictures=pictures,
                seconds=seconds,
                boxes=[dict(zip(boxes, each, strict=True)) for each in zip(*boxes.values(), strict=True)],
                facts=from_plain(ClipFacts, values[TRACK]) if TRACK in values else None,
                source=source_text(pipeline.cfg, pipeline.table, index),
                text=checked["text"] if checked else fault or "not narrated yet",
                narrator=checked["narrator"] if checked else pipeline.cfg.narrator.kind,
                verdict=traits["verdict"][0],
                traits=traits,
                note="; ".join(checked["refusals"]) if checked else "",
            )
            if stabilised and view.facts is not None:
                detected, times = values[DETECT], np.array(values[DETECT]["seconds"])
                rows, camera = box_table(row.video_id, detected), camera_of(detected)
                about = {"video_id": row.video_id, "start": row.start, "end": row.end, "aspect": detected["aspect"]}
                view = replace(view, raw=facts_of(rows, times, params=pipeline.cfg.tracks, **about))
                if len(pictures):
                    view = replace(view, background=background_motion(pictures, times, rows, camera))
            yield view


def _page(pipeline: Pipeline, clips: Iterable[ClipView], seed: int | None, where: Sequence[str]) -> str:
    """The page with a card for each clip, as HTML."""
    cfg = pipeline.cfg
    facts = {
        "metadata": cfg.source.metadata or f"none: windows of {cfg.windows.seconds:g} s",
        "videos": cfg.source.root,
        "detector": cfg.detector.kind,
        "narrator": cfg.narrator.kind,
        "frames a clip": str(cfg.frames),
    }
    cards: list[dict[str, Any]] = []
    for view in clips:
        picture = data_uri(jpeg(card(view)), "image/jpeg") if len(view.pictures) else None
        shown = ("title", "source", "text", "narrator", "verdict", "traits", "note")
        cards.append({name: getattr(view, name) for name in shown} | {"picture": picture})
    colours = {
        name: "#" + "".join(f"{part:02x}" for part in colour)
        for name, colour in zip(("left hand", "right hand", "object"), ROLE_COLOURS, strict=True)
    }
    return render(
        "hod.html.jinja",
        cards=cards,
        clips=len(pipeline.table),
        seed=seed,
        output=cfg.output,
        facts={name: value for name, value in facts.items() if value},
        # Words have a field of their own, and reasons and scores are too many to choose from.
        choices={
            name: values
            for name in TRAITS
            if name not in ("word", "score", "reason")
            and len(values := Counter(value for each in cards for value in each["traits"][name]))
        },
        where=" and ".join(where),
        colours=colours,
    )


# --- Pictures ---


def time_colour(share: float) -> tuple[int, int, int]:
    """The colour of a moment, 0 the clip's start and 1 its end."""
    at = min(max(share, 0.0), 1.0) * (len(_TIMES) - 1)
    low = min(int(at), len(_TIMES) - 2)
    red, green, blue = (_TIMES[low] + (at - low) * (_TIMES[low + 1] - _TIMES[low])).round().astype(int).tolist()
    return red, green, blue


def frame(view: ClipView, number: int, height: int, until: int | None = None) -> Image.Image:
    """A frame with its boxes, ``height`` pixels high; with ``until`` also the tracks up to that frame."""
    # The nearest frame: moments of detections made elsewhere are between the frames.
    rows = [box for box in view.boxes if np.abs(view.seconds - box["second"]).argmin() == number]
    boxes = pa.Table.from_pylist(rows, SCHEMA).to_pandas()
    image = draw_boxes(_resized(view.pictures[number], height), boxes, is_small=True)
    if until is not None:
        _draw_tracks(image, view.facts, until)
    return image


def tracks(view: ClipView, height: int) -> Image.Image:
    """The first frame under the tracks of hands (circles left, squares right) and object (a thin line).

    Where the view has the tracks with the camera's motion too, these come first, beside it.
    """
    if view.raw is not None:
        pair = [tracks(replace(view, facts=facts, raw=None), height) for facts in (view.raw, view.facts)]
        image = Image.new("RGB", (2 * pair[0].width + _GAP, height), _PAPER)
        for number, (name, way) in enumerate(zip(("as seen", "stabilised"), view.background, strict=True)):
            place = number * (pair[0].width + _GAP)
            image.paste(pair[number], (place, 0))
            text = name if np.isnan(way) else f"{name}: background moves {way:.2%} a frame"
            ImageDraw.Draw(image).text((place + 5, 4), text, _INK, ImageFont.load_default(12))
        return image
    # The first, since positions are relative to it: the camera's motion since then is removed from them.
    image = _resized(view.pictures[0], height)
    # Paler, so that lines of any colour stand out.
    image = Image.blend(image, Image.new("RGB", image.size, _PAPER), 0.35)
    _draw_tracks(image, view.facts, len(view.pictures) - 1)
    return image


def card(view: ClipView) -> Image.Image:
    """The tracks, and two by two moments beside them."""
    large = tracks(view, 2 * SMALL)
    small = [frame(view, number, SMALL) for number in _spaced(len(view.pictures), 4)]
    image = Image.new("RGB", (large.width + 2 * small[0].width, large.height), _PAPER)
    image.paste(large, (0, 0))
    for place, picture in enumerate(small):
        image.paste(picture, (large.width + place % 2 * picture.width, place // 2 * SMALL))
    return image


def sheet(clips: Sequence[ClipView]) -> Image.Image:
    """Clips one below the other, and a legend of the colours."""
    rows = [_row(view) for view in clips]
    size = (max(row.width for row in rows), sum(row.height for row in rows) + _LINE + _GAP)
    image, top = Image.new("RGB", size, _PAPER), 0
    for row in rows:
        image.paste(row, (0, top))
        top += row.height
    pen, font, x = ImageDraw.Draw(image), ImageFont.load_default(12), _GAP
    for name, colour in zip(("left hand", "right hand", "object"), ROLE_COLOURS, strict=True):
        pen.rectangle((x, top + 3, x + 10, top + 13), outline=colour, width=2)
        pen.text((x + 15, top), name, _INK, font)
        x += 95
    pen.text((x, top), "start", _INK, font)
    for step in range(80):
        pen.rectangle((x + 34 + step, top + 3, x + 35 + step, top + 12), fill=time_colour(step / 79))
    pen.text((x + 120, top), "end   track: circles left hand, squares right hand, line object", _INK, font)
    return image


def _row(view: ClipView) -> Image.Image:
    """A clip's part of a sheet: tracks, a few moments, the narration before and the new one."""
    large = tracks(view, LARGE)
    chosen = _spaced(len(view.pictures), min(_MOMENTS, len(view.pictures)))
    small = [frame(view, number, SMALL) for number in chosen]
    for picture, number in zip(small, chosen, strict=True):
        # A bar in the colour of the moment, to find it on the tracks.
        colour = time_colour(number / max(1, len(view.pictures) - 1))
        ImageDraw.Draw(picture).rectangle((0, 0, picture.width, 4), fill=colour)
    left = large.width + 2 * _GAP
    width = left + max(420, sum(picture.width + _GAP for picture in small))
    texts = [(view.title, _GREY), (f"was: {view.source or '(nothing)'}", _GREY), (view.text, _INK)]
    texts += [(measured(view.facts), _GREY)] if view.facts is not None and view.facts.hands else []
    lines = [
        (line, colour)
        for text, colour in [*texts, (f"{view.narrator}, {view.verdict}", _GREY)]
        for line in textwrap.wrap(text, max(30, (width - left) // 6), max_lines=3, placeholder=" ...")
    ]
    image = Image.new("RGB", (width, max(LARGE, SMALL + _GAP + len(lines) * _LINE) + 2 * _GAP), _PAPER)
    image.paste(large, (_GAP, _GAP))
    for picture in small:
        image.paste(picture, (left, _GAP))
        left += picture.width + _GAP
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for number, (line, colour) in enumerate(lines):
        pen.text((large.width + 2 * _GAP, SMALL + 2 * _GAP + number * _LINE), line, colour, font)
    return image


def measured(facts: ClipFacts) -> str:
    """How far each hand moves and what the two do together, in a line: ``right 21 cm at 14 cm/s; hands apart``."""
    parts = []
    for side, hand in sorted(facts.hands.items()):
        way = "still"
        if hand.motion.is_moving and hand.motion.distance is not None and hand.motion.pace is not None:
            about = "" if hand.motion.is_metric else "about "
            way = f"{about}{100 * hand.motion.distance:.0f} cm at {100 * hand.motion.pace:.0f} cm/s"
        elif hand.motion.is_moving:
            way = "moves"
        takes = f", takes it {len(hand.regrasps) + 1} times" if hand.regrasps else ""
        parts.append(f"{side} {way}{f', {hand.grasp}' if hand.grasp else ''}{takes}")
    pair = facts.pair
    if pair is not None:
        together = [facts.hands_together, pair.moves, "both hold it" if pair.shares else None]
        together += [f"{pair.steadies} steadies" if pair.steadies else None]
        together += [f"handed to the {pair.handed_to}" if pair.handed_to else None]
        parts.append("hands " + ", ".join(filter(None, together)))
    return "; ".join(parts)


def film(view: ClipView, height: int = 480) -> Iterator[np.ndarray]:
    """The sampled frames with boxes and growing tracks, uint8 [height, W, 3]."""
    for number in range(len(view.pictures)):
        yield np.asarray(frame(view, number, height, until=number))


def _write_film(view: ClipView, path: Path) -> None:
    """The frames at the speed of the clip."""
    gap = float(np.median(np.diff(view.seconds))) if len(view.seconds) > 1 else 1.0
    write_film(film(view), 1 / max(gap, 1 / 60), path)


def _spaced(count: int, number: int) -> list[int]:
    """``number`` indices evenly spaced over ``count`` frames, first and last included."""
    return np.linspace(0, count - 1, number).round().astype(int).tolist()  # type: ignore[no-any-return]


def _resized(picture: np.ndarray, height: int) -> Image.Image:
    image = Image.fromarray(picture)
    return image.resize((max(2, round(image.width * height / image.height)), height), Image.Resampling.BICUBIC)


def _draw_tracks(image: Image.Image, facts: ClipFacts | None, until: int) -> None:
    """Paths of the object and the hands up to a frame, each leg in the colour of its time."""
    if facts is None:
        return
    # The object below: hands are where the action is.
    paths = [("", facts.object.motion.path)] if facts.object is not None else []
    paths += [(side, hand.motion.path) for side, hand in facts.hands.items()]
    pen, width = ImageDraw.Draw(image), max(2, image.height // 80)
    for side, path in paths:
        last = max(1, len(path) - 1)
        points = path[: until + 1] * (image.width - 1, image.height - 1)
        thickness = width if side else max(1, width // 2)
        legs = [
            (points[number - 1 : number + 1].reshape(-1).tolist(), time_colour(number / last))
            for number in range(1, len(points))
            if np.isfinite(points[number - 1 : number + 1]).all()  # gaps stay gaps
        ]
        # All white outlines first: otherwise each would cut the leg before it.
        for ends, _ in legs:
            pen.line(ends, fill=_WHITE, width=thickness + 2)
        for ends, colour in legs:
            pen.line(ends, fill=colour, width=thickness)
        mark = pen.ellipse if side == "left" else pen.rectangle
        for number, (x, y) in enumerate(points if side else ()):
            if np.isfinite([x, y]).all():
                mark((x - width, y - width, x + width, y + width), fill=time_colour(number / last))


if __name__ == "__main__":
    run_tool(main)
