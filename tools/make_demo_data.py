"""Render the embedded demo world: a procedural first-person kitchen in train, val and test.

    python tools/make_demo_data.py                               # demo_data: 2,000 + 300 + 500 clips, 2 to 3 minutes
    python tools/make_demo_data.py --scale 0.05 --output small   # a twentieth of it
    python tools/make_demo_data.py --benchmarks                  # and the test world as EK100, EGTEA, EgoMCQ, ...
    python tools/make_demo_data.py --preview world.png           # only a contact sheet (.webp: a moving picture)

Rerun to resume after an interruption; a complete folder is left as it is, one of another version is rendered again.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from _common import log_to_stdout, run_tool, tool_parser

from egohod.demo import make_world, plan
from egohod.demo.render import preview
from egohod.demo.world import DEFAULT, FPS, SPLITS, VERSIONS, Variant
from egohod.demo.write import write_benchmarks

log = logging.getLogger("make_demo_data")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo_data"), help="folder of the world (default: demo_data)")
    add("--seed", type=int, default=0, help="random seed; the same seed makes the same bytes (default: 0)")
    add("--scale", type=float, default=1.0, help="1 is 2,000 + 300 + 500 clips (default: 1)")
    add("--objects", type=int, default=DEFAULT.objects, help="number of objects (default: all 12)")
    add("--reach", type=float, default=DEFAULT.reach, help="length of motions (default: 1)")
    spread = "position of brief events: from anywhere in a clip (1) to its centre (0); default: 1"
    add("--event_spread", type=float, default=DEFAULT.event_spread, help=spread)
    rests = "the other hand always rests: the motion alone distinguishes takes"
    add("--idle_rests", action="store_true", help=rests)
    version = "5: tidy counter and level camera; 6: clutter, rotation, zoom, blur, varying speed (default: %(default)s)"
    add("--world_version", type=int, default=DEFAULT.version, choices=list(VERSIONS), help=version)
    add("--roll", type=float, metavar="DEGREES", help="how far the head slowly turns either way (default: up to 3)")
    add("--zoom", type=float, metavar="PER_CENT", help="how far the camera slowly zooms in and out (default: up to 4)")
    add("--workers", type=int, default=None, help="rendering processes (default: one per core)")
    add("--splits", default=",".join(SPLITS), help="which of train, val and test, comma-separated (default: all)")
    add("--preview", type=Path, metavar="FILE", help="draw a few clips instead of a world: .png or .webp")
    add("--benchmarks", action="store_true", help="also write the test world in the formats of the field's benchmarks")
    add("--dry_run", action="store_true", help="print what would be written, and write nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    log_to_stdout()
    variant = Variant(
        args.objects, args.reach, args.event_spread, args.idle_rests, args.world_version, args.roll, args.zoom
    )
    splits = [split.strip() for split in args.splits.split(",") if split.strip()]
    if args.preview:
        if not args.dry_run:
            preview(args.preview, args.seed, variant)
        log.info("%s %s", "would draw" if args.dry_run else "drew", args.preview)
        return 0
    if args.dry_run:
        for split, videos in plan(args.output, args.seed, args.scale, splits, variant, replace=True).items():
            clips, frames = sum(len(video.clips) for video in videos), sum(video.frames for video in videos)
            counts = f"{len(videos)} videos, {clips} clips, {frames / FPS:.0f} s"
            log.info("would write %s: %s", args.output / split, counts)
        return 0
    began = time.monotonic()
    splits = make_world(args.output, args.seed, args.scale, args.workers, splits=splits, variant=variant, replace=True)
    # The benchmarks are read from the test world, so that they come last, also where that was there before.
    if args.benchmarks and write_benchmarks(args.output):
        log.info("%s: wrote the benchmarks of the test world", args.output)
    if splits:
        log.info("%s: wrote %s in %.0f s", args.output, ", ".join(splits), time.monotonic() - began)
    else:
        log.info("%s is complete, nothing to do", args.output)
    return 0


if __name__ == "__main__":
    run_tool(main)
