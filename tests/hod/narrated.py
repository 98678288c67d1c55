"""How often the generated narrations of demo clips agree with what was rendered: side, direction and contact words.

python -m tests.hod.narrated --world demo_data --split test                                   # true boxes
python -m tests.hod.narrated --split test detector.options.jitter=0.05 detector.options.drop=0.2
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from egohod.data.detections import PORTABLE_OBJECT
from egohod.demo.world import OTHER_HAND, VERBS
from egohod.hod import config
from egohod.hod.check import clauses
from egohod.hod.pipeline import Pipeline, build
from egohod.hod.store import Shard

_WAYS = re.compile(
    r"\b(?:left|right|upward|downward|away|closer|counterclockwise|clockwise|still|back (?:and )?forth)\b"
)
# The same way in other words
_SYNONYMS = {r"\bback towards the body\b": "closer", r"\bup\b": "upward", r"\bdown\b": "downward"}
_PLACES = re.compile(r"\bfrom the [\w ]+? to the [\w ]+")
_HANDS = re.compile(r"\b(?:left|right) hand")
_EXPECTED = {
    "pick up": "upward", "put down": "downward", "push": "away", "pull": "closer", "slide left": "left",
    "slide right": "right", "wipe left": "left right", "wipe right": "right left", "circle clockwise": "clockwise",
    "circle counterclockwise": "counterclockwise", "flick away": "away closer", "flick back": "closer away",
    "hold": "still", "tap once": "upward downward", "tap twice": "upward downward",
}  # fmt: skip


def narrate(world: Path, split: str, output: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """All stages run on a split of a demo world, over its true boxes and its coarse narrations."""
    folder = world / split
    knobs = [f"source.metadata={folder}/narrations.csv", f"source.root={folder}/videos", f"output={output}"]
    knobs += ["demo.folder=null", f"detector.options.path={folder}/detections.parquet", "workers=0"]
    pipeline = build(config.load("configs/hod/demo.yml", [*knobs, *overrides]))
    with pipeline.store.claim(Shard()):
        pipeline.run_all(Shard())
        pipeline.finish(Shard())
        pipeline.merge(1)
    return pipeline


def disagreements(world: Path, split: str, output: Path) -> list[tuple[str, str]]:
    """(verb, difference of the narration from the truth) of each clip; a missing narration is a difference."""
    clips = pd.read_csv(world / split / "hod.csv")
    boxes = pd.read_parquet(world / split / "detections.parquet")
    hands = dict(iter(boxes[boxes["kind"] == "hand"].groupby(["video_id", "side"])))
    written = dict(pd.read_csv(output)[["uid", "text"]].itertuples(index=False))
    actual = []
    for row in clips.itertuples():
        states = {}
        for side, name in enumerate(("left", "right")):
            rows = hands.get((row.video_id, side), boxes.iloc[:0])
            inside = (rows["second"] >= row.start_second) & (rows["second"] < row.end_second)
            states[name] = rows[inside].sort_values("second")["state"].tolist()
        wrong = _disagreement(written[row.uid], row.verb, row.hand, states) if row.uid in written else "no narration"
        actual.append((row.verb, wrong))
    return actual


def _disagreement(text: str, verb: str, hand: str, states: dict[str, list[int]]) -> str:
    parts = clauses(text)
    if parts[0].sides != (hand,):
        return f"side {parts[0].sides}"
    acting = _PLACES.sub(" ", " ".join(part.text for part in parts if part.sides == (hand,)))
    for other, word in _SYNONYMS.items():
        acting = re.sub(other, word, acting)
    ways = _WAYS.findall(_HANDS.sub(" ", acting))
    path = VERBS[verb].path
    if path == "open":
        out = "right" if (hand == "right") == (verb == "open") else "left"
        right = [way for way in ways if way in ("left", "right")] == [out]
    else:
        # Clauses end at an "and".
        legs = _EXPECTED[verb].split() if path != "shake" else ["back forth"]
        # A wipe's or a flick's way back to the middle may be described as a third leg.
        right = ways == legs or (path in ("wipe", "flick") and ways == [*legs, legs[0]])
    if path == "tap":
        right = right and ("twice" in acting) == (verb == "tap twice")
    if not right:
        return f"direction {' '.join(ways) or 'none'}{' twice' if 'twice' in acting else ''}"
    if "from the start" in acting and not any(states[hand][:3]):
        return "contact from the start"
    if "after reaching" in acting and all(states[hand][:3]):
        return "contact after reaching"
    if ("off" in acting, "onto" in acting) != (verb == "open", verb == "close"):
        return "off or onto"
    other = states[OTHER_HAND[hand]]
    idle = " ".join(part.text for part in parts if part.sides == (OTHER_HAND[hand],))
    if idle and not other:
        return "speaks of a hand that is not there"
    if idle and bool(re.search("holds|steadies", idle)) != (max(set(other), key=other.count) == PORTABLE_OBJECT):
        return f"other hand: {idle}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("demo_data"))
    parser.add_argument("--split", default="test")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "hod.csv"
        narrate(args.world, args.split, output, args.overrides)
        actual = disagreements(args.world, args.split, output)
    right = sum(not wrong for _, wrong in actual)
    print(f"{right} of {len(actual)} narrations agree: {right / len(actual):.1%}")
    for (verb, wrong), count in Counter((verb, wrong) for verb, wrong in actual if wrong).most_common(15):
        print(f"  {count} x {verb}: {wrong}")


if __name__ == "__main__":
    main()
