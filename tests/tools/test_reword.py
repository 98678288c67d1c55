"""Questions of a demo world in the words of the HOD pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from reword_demo import reworded

from egohod.demo.world import VERBS


def test_both_texts_are_what_the_pipeline_says_of_a_clip(demo_world: Path) -> None:
    split = demo_world / "val"
    clips = pd.read_csv(split / "hod.csv").set_index("uid")
    questions = [json.loads(line) for line in (split / "questions.jsonl").read_text().splitlines()]
    said = pd.Series({uid: f"{row.verb}: the {row.noun} of {row.hand} {row.video_id}" for uid, row in clips.iterrows()})
    asked = reworded(questions, clips, said)
    kinds = {question["kind"] for question in asked}
    assert {"object", "across_clips"} < kinds
    for question in asked:
        right = question["choices"][question["answer"]]
        if question["kind"] == "across_clips":
            assert question["query"]["text"] == said[right["clip"]]
            continue
        uid, wrong = question["query"]["clip"], question["choices"][1 - question["answer"]]["text"]
        row = clips.loc[uid]
        assert right["text"] == said[uid]
        if question["kind"] == "object":
            assert wrong != right["text"]
            assert wrong.split(":")[0] == row.verb
        else:
            opposite = VERBS[row.verb].opposite
            assert wrong == f"{opposite}: the {row.noun} of {row.hand} {row.video_id}"


def test_a_question_whose_clips_have_no_narration_is_left_out(demo_world: Path) -> None:
    split = demo_world / "val"
    clips = pd.read_csv(split / "hod.csv").set_index("uid")
    questions = [json.loads(line) for line in (split / "questions.jsonl").read_text().splitlines()]
    silent = clips.index[0]
    said = pd.Series({uid: f"#C C moves the {row.noun}" for uid, row in clips.iterrows() if uid != silent})
    asked = reworded(questions, clips, said)
    assert 0 < len(asked) < len(questions)
    assert silent not in {question["query"].get("clip") for question in asked}
