"""How often the facts of demo clips agree with what was rendered: acting hand, direction, repeats and contact.

python -m tests.hod.agreement --world demo_data --split test                            # true boxes
python -m tests.hod.agreement --world demo_data --split test --jitter 0.05 --drop 0.2   # spoiled ones
python -m tests.hod.agreement --split test --videos 5 --sway 4 [--leave_camera]         # rendered anew, swaying
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from egohod.data import detections
from egohod.data.detections import SCHEMA
from egohod.data.videos import frame_times, segment_indices
from egohod.demo.render import Stage
from egohod.demo.world import FPS, VERBS, Video, make_video
from egohod.hod import facts
from egohod.hod.detectors import Detector
from egohod.hod.detectors.files import Oracle
from egohod.hod.facts import ClipFacts, facts_of

EVERY_FRAME = 32
EXPECTED = {
    "pick up": ("up",), "put down": ("down",), "push": ("away",), "pull": ("closer",), "slide left": ("left",),
    "slide right": ("right",), "wipe left": ("left", "right"), "wipe right": ("right", "left"),
    "circle clockwise": ("clockwise",), "circle counterclockwise": ("counterclockwise",),
    "flick away": ("away", "closer"), "flick back": ("closer", "away"), "hold": ("still",),
    "shake": ("back and forth",), "tap once": ("up", "down"), "tap twice": ("up", "down"),
}  # fmt: skip


def disagreement(actual: ClipFacts, verb: str, hand: str) -> str:
    """How the facts of a clip differ from the truth; empty if they do not."""
    if actual.acting != hand:
        return f"acting hand {actual.acting}"
    acting = actual.hands[hand]
    legs, times = acting.motion.directions, acting.motion.repeats
    if acting.contact is None:
        return "no contact"
    if acting.relation != {"open": "off", "close": "onto"}.get(verb):
        return f"relation {acting.relation}"
    if verb in ("open", "close"):
        # The lid goes aside to the hand's own side, over an arc.
        out = (hand == "right") == (verb == "open")
        right = [word for word in legs if word in ("left", "right")] == ["right" if out else "left"]
    elif VERBS[verb].path in ("wipe", "flick"):
        # The way back to the middle may be described as a third leg.
        right = legs[:2] == EXPECTED[verb] and legs[2:] in ((), legs[:1]) and times == 1
    else:
        right = legs == EXPECTED[verb] and (VERBS[verb].path != "tap" or times == (2 if verb == "tap twice" else 1))
    return "" if right else f"{legs} x {times}"


def measure(clips: pd.DataFrame, detector: Detector, frames: int = EVERY_FRAME) -> Iterator[tuple[str, str]]:
    """(verb, disagreement) of each clip of a hod.csv."""
    for row in clips.itertuples():
        numbers = segment_indices(round(row.start_second * FPS), round(row.end_second * FPS), frames)
        seconds = frame_times(numbers, FPS)
        boxes = detector.detect(row.video_id, numbers, seconds, None)
        yield (
            row.verb,
            disagreement(
                facts_of(boxes, seconds, video_id=row.video_id, start=row.start_second, end=row.end_second),
                row.verb,
                row.hand,
            ),
        )


def measure_swaying(video: Video, sway: float, compensate: bool = True) -> Iterator[tuple[str, str]]:
    """The same for a video that is rendered anew, its camera swaying ``sway`` times as far."""
    clips = tuple(replace(clip, sway=(*(sway * a for a in clip.sway[:2]), *clip.sway[2:])) for clip in video.clips)
    video = replace(video, clips=clips)
    stage = Stage(video)
    pictures = np.stack(list(stage.frames()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.parquet"
        detections.write(pa.Table.from_pylist(list(stage.truth()), SCHEMA), path)
        oracle = Oracle(str(path))
    for clip in clips:
        numbers = np.arange(clip.start, clip.start + clip.frames)
        seconds = frame_times(numbers, FPS)
        rows = oracle.detect(video.video_id, numbers, seconds, None)
        moved = facts.camera_shifts(pictures[numbers], seconds, rows) if compensate else None
        start, end = clip.start / FPS, (clip.start + clip.frames) / FPS
        actual = facts_of(rows, seconds, video_id=video.video_id, start=start, end=end, shifts=moved)
        yield clip.verb, disagreement(actual, clip.verb, clip.hand)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("demo_data"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--frames", type=int, default=EVERY_FRAME)
    parser.add_argument("--jitter", type=float, default=0.0)
    parser.add_argument("--drop", type=float, default=0.0)
    parser.add_argument("--videos", type=int, default=5)
    parser.add_argument("--sway", type=float, help="render anew with so much of the usual sway")
    parser.add_argument("--leave_camera", action="store_true")
    args = parser.parse_args()
    if args.sway is None:
        folder = args.world / args.split
        oracle = Oracle(str(folder / "detections.parquet"), jitter=args.jitter, drop=args.drop)
        results = list(measure(pd.read_csv(folder / "hod.csv"), oracle, args.frames))
    else:
        videos = [make_video(0, args.split, number) for number in range(args.videos)]
        results = [each for v in videos for each in measure_swaying(v, args.sway, not args.leave_camera)]
    wrong = pd.Series([f"{verb}: {difference}" for verb, difference in results if difference], dtype=str)
    print(f"{len(results) - len(wrong)} of {len(results)} clips agree: {1 - len(wrong) / len(results):.1%}")
    print(wrong.value_counts().head(10).to_string())


if __name__ == "__main__":
    main()
