"""Find the clips that match a sentence, in features of tools/extract_features.py.

    python tools/search.py "cut an onion" --index features
    python tools/search.py "#C C opens the jar" --index features --top 20 --sheet out.png

Prints rank, similarity, video and times, the best first; --sheet draws a few frames of each. The text tower is that of
the checkpoint which embedded the clips. Sentences work best when written like the narrations it was trained on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from _common import run_tool, save_picture, tool_parser

from egohod import cli
from egohod.errors import UserError
from egohod.evaluation.features import read_features, read_index, search, span
from egohod.evaluation.report import contact_sheet
from egohod.serve.index import TextTower

log = logging.getLogger("search")


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("sentence", help='the query, e.g. "cut an onion"')
    add("--index", required=True, type=Path, metavar="FOLDER", help="--output of tools/extract_features.py")
    add("--top", type=int, default=10, metavar="N", help="how many clips (default: 10)")
    add("--overlapping", action="store_true", help="also show windows that overlap a better one")
    add("--sheet", type=Path, metavar="PNG", help="draw a contact sheet of the results")
    add("--videos", metavar="FOLDER", help="folder of the videos if they were moved, for --sheet")
    add("--checkpoint", metavar="PATH", help="the checkpoint if it was moved")
    add("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(arguments)
    if args.top < 1:
        raise UserError(f"--top must be at least 1, not {args.top}")
    if not args.sentence.strip():
        raise UserError("the sentence is empty")
    # Both are read before the model, which takes seconds to load: a wrong folder fails at once.
    index = read_index(args.index)
    features, missing = read_features(args.index)
    if missing:
        log.warning("%d of %d videos have no features yet", missing, len(index["videos"]))
    tower = TextTower(args.index, args.checkpoint)
    hits = search(tower.encode(args.sentence), features, args.top, args.overlapping)
    if args.json:
        # The end of a whole video is infinite in the index, which JSON cannot hold.
        print(json.dumps([dataclasses.asdict(hit) | {"end": hit.end if hit.end < 1e18 else None} for hit in hits]))
    else:
        # Names of videos are of any length, and the columns behind them should be aligned.
        width = max(len(hit.video) for hit in hits)
        for rank, hit in enumerate(hits, start=1):
            print(f"{rank:3d}  {hit.similarity:6.3f}  {hit.video:<{width}}  {span(hit):<25}  {hit.text}".rstrip())
    # Last: the answer is printed even if the videos were moved and no picture can be drawn.
    if args.sheet:
        sheet = contact_sheet(hits, index, tower.decoder, args.videos)
        save_picture(sheet, args.sheet)
        log.info("drew %s", args.sheet)
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
