"""How well the check's track half separates true from falsified words, on tracks of demo clips.

python -m tests.hod.track_check --world demo_data --split test                            # true boxes
python -m tests.hod.track_check --world demo_data --split test --jitter 0.05 --drop 0.2   # spoiled ones

A caption is the world's own, of what was rendered. Falsified are its way (the verb of the same path run backwards, or
the other count of taps), its hand (left for right), and its contact (the idle hand as holding the thing). Only
the tracks are checked: the source narration is not compared.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from egohod.data.videos import frame_times, segment_indices
from egohod.demo.world import FPS, OTHER_HAND, VERBS, phrase
from egohod.hod.check import check
from egohod.hod.config import CheckConfig
from egohod.hod.detectors.files import Oracle
from egohod.hod.facts import ClipFacts, facts_of

_ONLY_TRACKS = CheckConfig(words=False)


def captions(verb: str, noun: str, hand: str) -> Iterator[tuple[str, str]]:
    """(kind, caption), the true one first."""
    own = VERBS[verb]
    # A lid's motion is no direction of a hand: these words do not distinguish opening from closing.
    true = f"{phrase(verb, noun, hand)}, {own.detail}"
    yield "true", true
    if own.opposite is not None and verb not in ("open", "close"):
        yield "way", f"{phrase(own.opposite, noun, hand)}, {VERBS[own.opposite].detail}"
    yield "hand", true.replace(f"{hand} hand", f"{OTHER_HAND[hand]} hand") + f", while the {hand} hand rests"
    yield "contact", f"{true}, while the {OTHER_HAND[hand]} hand lets go of the {noun}"


def measure(world: Path, split: str, frames: int, jitter: float, drop: float) -> dict[str, list[bool]]:
    """Whether each caption passes, by kind."""
    folder = world / split
    oracle = Oracle(str(folder / "detections.parquet"), jitter=jitter, drop=drop)
    passed = defaultdict[str, list[bool]](list)
    for row in pd.read_csv(folder / "hod.csv").itertuples():
        numbers = segment_indices(round(row.start_second * FPS), round(row.end_second * FPS), frames)
        seconds = frame_times(numbers, FPS)
        boxes = oracle.detect(row.video_id, numbers, seconds, None)
        facts: ClipFacts = facts_of(boxes, seconds, video_id=row.video_id, start=row.start_second, end=row.end_second)
        for kind, text in captions(row.verb, row.noun, row.hand):
            passed[kind].append(check(text, "", facts, _ONLY_TRACKS).passed)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("demo_data"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--jitter", type=float, default=0.0)
    parser.add_argument("--drop", type=float, default=0.0)
    args = parser.parse_args()
    for kind, each in measure(args.world, args.split, args.frames, args.jitter, args.drop).items():
        share = sum(each) / len(each)
        print(f"{kind}: {share:.1%} pass" if kind == "true" else f"{kind}: {1 - share:.1%} refused", f"({len(each)})")


if __name__ == "__main__":
    main()
