"""Reword a demo world's questions with the HOD pipeline's narrations, for the study configs/ablation_hod.yml.

    for split in val test; do SPLIT=$split python tools/generate_hod.py --config_file configs/hod/demo_words.yml; done
    python tools/reword_demo.py --world demo_motion --narrations runs/hod_demo_words --output demo_motion_words

The world says "picks up the jar", the pipeline "moves the jar upward": a model that learned from the pipeline has never
seen the world's words. Here the two texts of a question about motion are the pipeline's narrations of the clip itself
and of the clip of the same video in which the same hand does the opposite with the same object. Questions about objects
replace the object in the first of them; those across clips use it as the query.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from _common import run_tool, tool_parser

from egohod import cli
from egohod.data.formats.base import read_lines
from egohod.demo.world import VERBS
from egohod.errors import UserError

SPLITS = ("val", "test")


def reworded(questions: Sequence[dict], clips: pd.DataFrame, narrations: pd.Series) -> list[dict]:
    """``questions`` in the words of ``narrations`` (by uid); those without a narration are left out.

    ``clips`` has the columns of the world's hod.csv, with the uids as its index.
    """
    opposite = {uid: _opposite(uid, row, clips) for uid, row in clips.iterrows()}
    reworded_questions = []
    for question in questions:
        right = question["choices"][question["answer"]]
        uid = right["clip"] if question["kind"] == "across_clips" else question["query"]["clip"]
        if uid not in narrations:
            continue
        if question["kind"] == "across_clips":
            reworded_questions.append({**question, "query": {"text": narrations[uid]}})
            continue
        wrong = question["choices"][1 - question["answer"]]["text"]
        if question["kind"] == "object":
            (noun,) = set(wrong.split()) - set(right["text"].split())
            other = narrations[uid].replace(clips.loc[uid, "noun"], noun)
        elif opposite[uid] in narrations:
            other = narrations[opposite[uid]]
        else:
            continue
        choices = [{"text": other}, {"text": other}]
        choices[question["answer"]] = {"text": narrations[uid]}
        reworded_questions.append({**question, "choices": choices})
    return reworded_questions


def _opposite(uid: str, row: pd.Series, clips: pd.DataFrame) -> str | None:
    """The clip of the same video with the opposite verb, the same object and the same hand; the first, if several."""
    same = clips[(clips.video_id == row.video_id) & (clips.noun == row.noun) & (clips.hand == row.hand)]
    opposite = same.index[same.verb == VERBS[row.verb].opposite]
    return str(opposite[0]) if len(opposite) else None


def main(argv: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--world", type=Path, required=True, metavar="FOLDER", help="the demo world")
    add(
        "--narrations", type=Path, required=True, metavar="FOLDER", help="val.csv and test.csv of tools/generate_hod.py"
    )
    add("--output", type=Path, required=True, metavar="FOLDER", help="val and test with other questions, videos linked")
    args = parser.parse_args(argv)
    for split in SPLITS:
        source, target = args.world / split, args.output / split
        for path in (source / "hod.csv", args.narrations / f"{split}.csv"):
            if not path.is_file():
                raise UserError(f"{path}: not found")
        clips = pd.read_csv(source / "hod.csv").set_index("uid")
        narrations = pd.read_csv(args.narrations / f"{split}.csv").set_index("uid")["text"]
        if strange := sorted(set(narrations.index) - set(clips.index)):
            raise UserError(f"{args.narrations / split}.csv: uid '{strange[0]}' is of no clip of {source / 'hod.csv'}")
        # Some narrations name the object's colour: without this, the colour alone would give the answer away.
        narrations = pd.Series(
            {
                uid: text.replace(f"{clips.colour[uid]} {clips.noun[uid]}", clips.noun[uid])
                for uid, text in narrations.items()
            }
        )
        questions = [json.loads(line) for line in read_lines(source / "questions.jsonl")]
        questions_out = reworded(questions, clips, narrations)
        target.mkdir(parents=True, exist_ok=True)
        for name in ("hod.csv", "classes.csv", "videos"):
            (target / name).unlink(missing_ok=True)
            (target / name).symlink_to((source / name).resolve())
        (target / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions_out))
        print(f"{split}: {len(questions_out)} of {len(questions)} questions in the pipeline's words")
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
