"""How often the facts of demo clips agree with what was rendered: acting hand, direction, repeats and contact.

python -m tests.hod.agreement --world demo_data --split test                            # true boxes
python -m tests.hod.agreement --world demo_data --split test --jitter 0.05 --drop 0.2   # spoiled ones
python -m tests.hod.agreement --split test --videos 25 --sway 4                         # rendered anew, swaying
python -m tests.hod.agreement --split test --videos 25 --roll 10 --zoom 15 --camera none shift affine homography
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from egohod.data import detections
from egohod.data.detections import SCHEMA
from egohod.data.videos import frame_times, segment_indices
from egohod.demo.render import Stage
from egohod.demo.world import FPS, VERBS, Variant, Video, make_video
from egohod.hod.camera import MODELS, camera_transforms
from egohod.hod.config import TracksConfig
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


def measure_moving(
    video: Video, sway: float = 1.0, cameras: Sequence[str] = (TracksConfig().camera,)
) -> Iterator[tuple[str, str, str]]:
    """(camera model, verb, disagreement) for a video that is rendered anew, swaying ``sway`` times as far."""
    clips = tuple(replace(clip, sway=(*(sway * a for a in clip.sway[:2]), *clip.sway[2:])) for clip in video.clips)
    video = replace(video, clips=clips)
    stage = Stage(video)
    pictures = np.stack(list(stage.frames()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.parquet"
        detections.write(pa.Table.from_pylist(list(stage.truth()), SCHEMA), path)
        oracle = Oracle(str(path))
        for clip, camera in itertools.product(clips, cameras):
            numbers = np.arange(clip.start, clip.start + clip.frames)
            seconds = frame_times(numbers, FPS)
            rows = oracle.detect(video.video_id, numbers, seconds, None)
            moved = None if camera == "none" else camera_transforms(pictures[numbers], seconds, rows, camera)
            start, end = clip.start / FPS, (clip.start + clip.frames) / FPS
            actual = facts_of(rows, seconds, video_id=video.video_id, start=start, end=end, camera=moved)
            yield camera, clip.verb, disagreement(actual, clip.verb, clip.hand)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("demo_data"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--frames", type=int, default=EVERY_FRAME)
    parser.add_argument("--jitter", type=float, default=0.0)
    parser.add_argument("--drop", type=float, default=0.0)
    parser.add_argument("--videos", type=int, default=5)
    parser.add_argument("--sway", type=float, help="render anew with so much of the usual sway")
    parser.add_argument("--roll", type=float, help="render anew with a head that turns so many degrees to either side")
    parser.add_argument("--zoom", type=float, help="render anew with a camera that zooms so many per cent in and out")
    parser.add_argument("--camera", nargs="+", default=[TracksConfig().camera], choices=("none", *MODELS))
    args = parser.parse_args()
    results: dict[str, list[tuple[str, str]]] = {}
    if args.sway is args.roll is args.zoom is None:
        folder = args.world / args.split
        oracle = Oracle(str(folder / "detections.parquet"), jitter=args.jitter, drop=args.drop)
        results["none"] = list(measure(pd.read_csv(folder / "hod.csv"), oracle, args.frames))
    else:
        variant, sway = Variant(roll=args.roll, zoom=args.zoom), 1.0 if args.sway is None else args.sway
        for number in range(args.videos):
            video = make_video(0, args.split, number, variant=variant)
            for camera, *result in measure_moving(video, sway, args.camera):
                results.setdefault(camera, []).append(tuple(result))
    for camera, clips in results.items():
        wrong = pd.Series([f"{verb}: {difference}" for verb, difference in clips if difference], dtype=str)
        print(
            f"camera {camera}: {len(clips) - len(wrong)} of {len(clips)} clips agree: {1 - len(wrong) / len(clips):.1%}"
        )
        if len(wrong):
            print(wrong.value_counts().head(10).to_string())


if __name__ == "__main__":
    main()
