"""Questions of a demo world in the words of the HOD pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from reword_demo import reworded

from egohod.demo.world import VERBS


def test_both_texts_are_narrations_of_the_pipeline(demo_world: Path) -> None:
    split = demo_world / "val"
    clips = pd.read_csv(split / "hod.csv").set_index("uid")
    questions = [json.loads(line) for line in (split / "questions.jsonl").read_text().splitlines()]
    narrations = pd.Series(
        {uid: f"{row.verb}: the {row.noun} of {row.hand} {row.video_id}" for uid, row in clips.iterrows()}
    )
    results = reworded(questions, clips, narrations)
    kinds = {question["kind"] for question in results}
    assert {"object", "across_clips"} < kinds
    for question in results:
        right = question["choices"][question["answer"]]
        if question["kind"] == "across_clips":
            assert question["query"]["text"] == narrations[right["clip"]]
            continue
        uid, wrong = question["query"]["clip"], question["choices"][1 - question["answer"]]["text"]
        row = clips.loc[uid]
        assert right["text"] == narrations[uid]
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
    narrations = pd.Series({uid: f"#C C moves the {row.noun}" for uid, row in clips.iterrows() if uid != silent})
    results = reworded(questions, clips, narrations)
    assert 0 < len(results) < len(questions)
    assert silent not in {question["query"].get("clip") for question in results}
