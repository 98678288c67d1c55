"""Reword a demo world's questions with the HOD pipeline's narrations, for the study configs/ablation_hod.yml.

    for split in val test; do SPLIT=$split python tools/generate_hod.py --config_file configs/hod/demo_words.yml; done
    python tools/reword_demo.py --world demo_motion --narrations runs/hod_demo_words --output demo_motion_words

The world's captions have "picks up the jar" where the pipeline has "moves the jar upward": a model trained on the
pipeline's has never seen the world's words. Here the two texts of a question about motion are the pipeline's
narrations of the clip itself and of the clip of the same video in which the same hand does the opposite with the same
object. Questions about objects replace the object in the first of them; those across clips use it as the query.
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


def reworded(questions: Sequence[dict], clips: pd.DataFrame, narrations: pd.Series) -> list[dict]:
    """``questions`` in the words of ``narrations`` (by uid); those without a narration are left out.

    ``clips`` has the columns of the world's hod.csv, with the uids as its index.
    """
    results = []
    for question in questions:
        right = question["choices"][question["answer"]]
        across = question["kind"] == "across_clips"
        uid = right["clip"] if across else question["query"]["clip"]
        # The pipeline's check stage rejects some clips: their questions are left out, for all models alike.
        if uid not in narrations:
            continue
        if across:
            results.append({**question, "query": {"text": narrations[uid]}})
            continue
        if question["kind"] == "object":
            wrong = question["choices"][1 - question["answer"]]["text"]
            # The two texts of the world differ in the object alone.
            (noun,) = set(wrong.split()) - set(right["text"].split())
            other = narrations[uid].replace(clips.loc[uid, "noun"], noun)
        else:
            row = clips.loc[uid]
            same = clips[(clips.video_id == row.video_id) & (clips.noun == row.noun) & (clips.hand == row.hand)]
            # The first, if several: their narrations differ by chance only.
            opposite = same.index[same.verb == VERBS[row.verb].opposite]
            if not len(opposite) or opposite[0] not in narrations:
                continue
            other = narrations[opposite[0]]
        # The right answer keeps its place, which the world has drawn at random.
        choices = [{"text": other}, {"text": other}]
        choices[question["answer"]] = {"text": narrations[uid]}
        results.append({**question, "choices": choices})
    return results


def main(argv: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    narrated = "val.csv and test.csv of tools/generate_hod.py"
    add("--world", type=Path, required=True, metavar="FOLDER", help="the demo world")
    add("--narrations", type=Path, required=True, metavar="FOLDER", help=narrated)
    add("--output", type=Path, required=True, metavar="FOLDER", help="val and test with other questions, videos linked")
    args = parser.parse_args(argv)
    for split in ("val", "test"):
        source, target, generated = args.world / split, args.output / split, args.narrations / f"{split}.csv"
        for path in (source / "hod.csv", generated):
            if not path.is_file():
                raise UserError(f"{path}: no such file")
        clips = pd.read_csv(source / "hod.csv").set_index("uid")
        texts = pd.read_csv(generated).set_index("uid")["text"]
        if strange := sorted(set(texts.index) - set(clips.index)):
            raise UserError(f"{generated}: uid '{strange[0]}' is of no clip of {source / 'hod.csv'}")
        # Some narrations name the object's colour: without this, the colour alone would give the answer away.
        colour, noun = clips.colour, clips.noun
        plain = {uid: text.replace(f"{colour[uid]} {noun[uid]}", noun[uid]) for uid, text in texts.items()}
        questions = [json.loads(line) for line in read_lines(source / "questions.jsonl")]
        results = reworded(questions, clips, pd.Series(plain))
        target.mkdir(parents=True, exist_ok=True)
        # Links: the videos are those of the world, and much larger than all else.
        for name in ("hod.csv", "classes.csv", "videos"):
            (target / name).unlink(missing_ok=True)
            (target / name).symlink_to((source / name).resolve())
        (target / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in results))
        print(f"{split}: {len(results)} of {len(questions)} questions in the pipeline's words")
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
