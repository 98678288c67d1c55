"""Look at what the HOD pipeline saw and said.

    python tools/visualize_hod.py --config_file configs/hod/demo.yml --page hod.html --number 40
    python tools/visualize_hod.py --config_file my_hod.yml --output hod.csv --sheet sheet.png --clips 3,17,204
    python tools/visualize_hod.py --config_file my_hod.yml --output hod.csv --film clip.mp4 --clips 17

Give the configuration and the --metadata, --root and --output of the run; it may still be going on. --page is one file
with filters by hand, verdict, narrator and words; --sheet a picture; --film the sampled frames of the first clip with
boxes and growing tracks, as long as the clip. --clips counts the rows of the metadata from 1; without it --number clips
are drawn at random by --seed.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from _common import run_tool

from egohod import cli
from egohod.data.detections import ROLE_COLOURS
from egohod.errors import UserError
from egohod.evaluation.features import write_text
from egohod.evaluation.html_report import data_uri, jpeg, render
from egohod.hod import config, draw
from egohod.hod.config import HodConfig
from egohod.hod.pipeline import Pipeline, build

log = logging.getLogger("visualize_hod")

_FILMS = (".mp4", ".mkv", ".mov")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def main(arguments: Sequence[str]) -> int:
    args = _parse(arguments)
    if not (args.sheet or args.film or args.page):
        raise UserError("nothing to draw: give --page, --sheet or --film")
    _require_places(args)
    named = {"source.metadata": args.metadata, "source.root": args.root, "output": args.output}
    knobs = [f"{name}={value}" for name, value in named.items() if value is not None]
    cfg = config.load(args.config_file, [*knobs, *args.overrides])
    pipeline = build(cfg)
    clips = draw.collect(pipeline, _chosen(pipeline, args))
    if args.no_frames:
        clips = [replace(seen, pictures=np.full_like(seen.pictures, 255)) for seen in clips]
    if args.page:
        write_text(args.page, _page(pipeline, clips, None if args.clips else args.seed))
    if args.sheet or args.film:
        clips = [seen for seen in clips if len(seen.pictures)]
        if not clips:
            raise UserError("not one of the clips can be read")
    if args.sheet:
        draw.sheet(clips).save(args.sheet)
    if args.film:
        _film(clips[0], args.film)
    for path in filter(None, (args.page, args.sheet, args.film)):
        log.info("wrote %s", path)
    return cli.DONE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser(__doc__ or "", "configs/hod/default.yml", HodConfig)
    add = parser.add_argument
    add("--metadata", metavar="FILE", help="narrations (source.metadata)")
    add("--root", metavar="FOLDER", help="videos (source.root)")
    add("--output", metavar="CSV", help="output of the run (output)")
    add("--page", type=Path, metavar="HTML", help="write a page")
    add("--sheet", type=Path, metavar="PNG", help="write a picture")
    add("--film", type=Path, metavar="MP4", help="write a film of the first clip")
    add("--clips", metavar="ROWS", help="these rows of the metadata, e.g. 3,17,204")
    add("--number", type=int, default=24, metavar="N", help="so many clips at random (default: 24)")
    add("--no_frames", action="store_true", help="draw on white paper, where the pictures may not be shown")
    add("--seed", type=int, default=0, help="which ones (default: 0)")
    return parser.parse_intermixed_args(arguments)


def _require_places(args: argparse.Namespace) -> None:
    """Make the folders, and find out now what would else be said after all the work."""
    for name, path, endings in (
        ("sheet", args.sheet, _PICTURES),
        ("film", args.film, _FILMS),
        ("page", args.page, None),
    ):
        if path is None:
            continue
        if endings is not None and path.suffix.lower() not in endings:
            raise UserError(f"--{name} is '{path}', but must end in one of {', '.join(endings)}")
        if path.is_dir():
            raise UserError(f"--{name} is '{path}', which is a folder; it must be a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--{name}: {path.parent} cannot be made: {error.strerror or error}") from error


def _chosen(pipeline: Pipeline, args: argparse.Namespace) -> list[int]:
    """Clips by their place in the table, those that went through the detection."""
    table = pipeline.table
    if args.clips:
        rows = {table.row(index).row: index for index in range(len(table))}
        try:
            return [rows[int(each)] for each in args.clips.split(",")]
        except (KeyError, ValueError) as error:
            raise UserError(f"--clips is '{args.clips}', but {error} is no row of {table.path} that is used") from error
    if args.number < 1 or args.seed < 0:
        raise UserError(f"--number must be at least 1 and --seed at least 0, not {args.number} and {args.seed}")
    order = np.random.default_rng(args.seed).permutation(len(table)).tolist()
    with pipeline.store.all_results() as results:
        begun = (index for index in order if pipeline.stored(index, results))
        chosen = [index for index, _ in zip(begun, range(args.number), strict=False)]
    if not chosen:
        raise UserError(f"{pipeline.store.folder}: no clip has been through a stage with these settings")
    return sorted(chosen)


def _page(pipeline: Pipeline, clips: Sequence[draw.Seen], seed: int | None) -> str:
    cfg = pipeline.cfg
    facts = {
        "metadata": cfg.source.metadata or f"none: windows of {cfg.windows.seconds:g} s",
        "videos": cfg.source.root,
        "detector": cfg.detector.kind,
        "narrator": cfg.narrator.kind,
        "frames a clip": str(cfg.frames),
    }
    cards: list[dict[str, Any]] = []
    for seen in clips:
        picture = data_uri(jpeg(draw.card(seen)), "image/jpeg") if len(seen.pictures) else None
        cards.append(
            {name: getattr(seen, name) for name in ("title", "source", "text", "narrator", "verdict", "sides", "note")}
            | {"picture": picture}
        )
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
        sides=sorted({side for seen in clips for side in seen.sides}),
        verdicts=sorted({seen.verdict for seen in clips}),
        narrators=sorted({seen.narrator for seen in clips}),
        colours=colours,
    )


def _film(seen: draw.Seen, path: Path) -> None:
    """The frames in the clip's own time."""
    gap = float(np.median(np.diff(seen.seconds))) if len(seen.seconds) > 1 else 1.0
    rate = Fraction(1 / max(gap, 1 / 60)).limit_denominator(1000)
    frames = draw.film(seen)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "threads": "1"})
        stream.pix_fmt = "yuv420p"
        for number, picture in enumerate(frames):
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    run_tool(main)
