"""Multiple-choice benchmarks in their authors' forms: what is read, how it is scored, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from egohod.data.config import SourceConfig
from egohod.data.formats import BENCHMARKS
from egohod.data.formats.base import BenchmarkData, BenchmarkOptions, Question, QuestionData
from egohod.errors import UserError
from egohod.evaluation.cards import CARDS
from egohod.evaluation.tasks import MultipleChoiceTask


def read(kind: str, path: Path) -> tuple[BenchmarkData, QuestionData]:
    data = BENCHMARKS[kind].read(SourceConfig(metadata=str(path)), BenchmarkOptions())
    (task,) = data.tasks
    assert isinstance(task, QuestionData)
    return data, task


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def choices_of(task: QuestionData, place: int) -> list[str]:
    return [task.texts[i] for i in task.questions[place].choices]


HANDY = {
    "question": "What is the person doing with his/her hands?",
    "options": ["ties the laces", "places the shoes", "adjusts the strap", "cleans the shoes"],
    "inference": {"prompt": "Carefully watch", "output": "(C) adjusts the strap"},
    "correct_idx": [2],
}
HD_EPIC = {
    "inputs": {"video 1": {"id": "P03-20240216-205923", "start_time": "00:01:15.539", "end_time": "00:01:16.310"}},
    "question": "Which of these sentences best describe the ongoing action(s) in the video 1?",
    "choices": ["Rub my hands to remove the oil", "Rub my hands to apply the handwash", "Rub", "Shake", "Wash"],
    "correct_idx": 1,
    "others": {"actions_num": "1"},
}
HD_EPIC_WHEN = {
    "inputs": {"video 1": {"id": "P01-20240204-121042", "start_time": "00:04:23.750", "end_time": "00:10:51.250"}},
    "question": "When did the action <hit spatula> happen in the video 1?",
    "choices": [
        f"video 1 from <TIME 00:0{m}:00.870 video 1> to <TIME 00:0{m}:01.920 video 1>" for m in (8, 7, 9, 5, 4)
    ],
    "correct_idx": 2,
}
TEMPO = {
    "clip_id": "27470817-f803-45b4-b9d4-e754cb3196bc_368.4019995568589_403.56079044314106",
    "question_type": "object-specific action",
    "question": "What does the person pick up before rubbing their hands together?",
    "answer": "The oil remover spray.",
}
HOI = (
    "video_uid\tclip_start\tclip_end\tclip_text\ttag_verb\ttag_noun\tverb_neg\tnoun_neg\n"
    "v1\t1.5\t2.5\t#C C opens the jar\t[1]\t[2]\t#C C closes the jar,#C C shakes the jar,#C C closes the jar"
    "\t#C C opens the box\n"
    "v1\t3\t4\t#C C looks\t[1]\t[]\t#C C walks,#C C sits\t\n"
)
CIA = (
    "id,chiral_triplet_id,chiral_label,template\n"
    "1,a,1,Moving [something] up\n2,a,0,Moving [something] down\n3,a,0,Moving [something] down\n4,b,1,Opening it\n"
)
ASSOCIATION = {
    "0": {
        "answer": 1,
        "types": 1,
        "query": {"video_uid": "e", "start_sec": "1.0", "end_sec": "3.5", "narration_en": "cuts"},
        "choices": {str(i): {"video_uid": f"x{i}", "start_sec": 0, "end_sec": i + 1} for i in range(11)},
    }
}


def test_handyvqa_is_read_as_its_authors_publish_answers(tmp_path: Path) -> None:
    write(tmp_path / "action" / "action_0000.json", HANDY)
    several = {**HANDY, "options": ["shoe", "strap", "table"], "correct_idx": [0, 1], "video": "clips/7.mp4"}
    write(tmp_path / "objects" / "objects_0001.json", several)
    data, task = read("handyvqa", tmp_path)
    assert data.clips.videos == ["action_0000", "clips/7"]
    assert np.isinf(data.clips.end).all()
    assert [question.kind for question in task.questions] == ["action", "objects"]
    assert choices_of(task, 0) == HANDY["options"]
    assert (task.questions[1].answer, task.questions[1].also) == (0, (1,))
    # The objects of all questions are ranked together: 0.9 and 0.5 are right, 0.7 between them is not.
    text = torch.eye(len(task.texts))
    video = torch.zeros(2, len(task.texts))
    video[1, list(task.questions[1].choices)] = torch.tensor([0.9, 0.5, 0.7])
    scores = MultipleChoiceTask(**vars(task)).measure(video, text)
    assert scores["objects"].value == pytest.approx(100 * (1 + 2 / 3) / 2)
    # A list of questions, by whatever name the video has.
    entries = [{**HANDY, "question_id": "action_0003", "question_type": "Action"}, {**HANDY, "video_id": "x/9"}]
    data, task = read("handyvqa", write(tmp_path / "all.json", entries))
    assert data.clips.videos == ["action_0003", "x/9"]
    assert [question.kind for question in task.questions] == ["action", "all"]


def test_precision_pools_questions_or_averages_them() -> None:
    questions = [Question("a", True, i, (0, 1, 2), 0, also=(1,) if i else ()) for i in range(2)]
    video, text = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.4, 0.5]]), torch.eye(3)
    # One by one: the first is perfect, the second has its right ones at ranks 2 and 3.
    each = MultipleChoiceTask(["x", "y", "z"], questions, {"a": "each"}).measure(video, text)["a"]
    assert each.value == pytest.approx(100 * (1 + (1 / 2 + 2 / 3) / 2) / 2)
    pooled = MultipleChoiceTask(["x", "y", "z"], questions, {"a": "pooled"}).measure(video, text)["a"]
    # 0.9 right, 0.5 wrong, 0.4 right, 0.3 right, 0.2, 0.1 wrong.
    assert pooled.value == pytest.approx(100 * (1 + 2 / 3 + 3 / 4) / 3)
    assert each.chance is not None
    assert pooled.chance is not None
    low, high = pooled.interval()
    assert low <= pooled.value <= high


def test_egohoibench_replaces_the_verb_or_the_noun(tmp_path: Path) -> None:
    data, task = read("egohoibench", write(tmp_path / "EgoHOIBench.csv", HOI))
    assert data.clips.start.tolist() == [1.5, 3]
    assert [question.kind for question in task.questions] == ["verb", "noun", "action", "verb"]
    assert sorted(choices_of(task, 0)) == ["#C C closes the jar", "#C C opens the jar", "#C C shakes the jar"]
    assert len(task.questions[2].choices) == 4
    for place, question in enumerate(task.questions):
        own = "#C C looks" if place == 3 else "#C C opens the jar"
        assert choices_of(task, place)[question.answer] == own


def test_a_model_that_sees_nothing_is_at_chance_on_replaced_captions(tmp_path: Path) -> None:
    rows = [f"v\t{i}\t{i + 1}\t#C C opens {i} \t[]\t[]\t#C C opens {i},a {i},b {i},c {i}\td {i}" for i in range(400)]
    data, task = read("egohoibench", write(tmp_path / "EgoHOIBench.csv", "\n".join([HOI.splitlines()[0], *rows])))
    # The own caption with a space behind it is no replaced one.
    assert {len(set(question.choices)) for question in task.questions} == {2, 4, 5}
    blind = torch.ones(len(data.clips), 1), torch.ones(len(task.texts), 1)
    for name, score in MultipleChoiceTask(**vars(task)).measure(*blind).items():
        low, high = score.interval()
        assert score.chance is not None
        assert low - 2 < score.chance < high + 2, name


def test_opposite_actions_are_pairs_in_both_directions(tmp_path: Path) -> None:
    data, task = read("chirality", write(tmp_path / "cia-ssv2-validation.csv", CIA))
    assert data.notes == ["1 triplets have clips of one direction only, or one text for both, and are left out"]
    assert [question.kind for question in task.questions] == ["pairs"] * 3 + ["pairs_map_t2v"] * 2
    up, down = (task.texts.index(f"Moving [something] {way}") for way in ("up", "down"))
    assert task.questions[0].choices[task.questions[0].answer] == up
    assert task.questions[1].choices[task.questions[1].answer] == down
    back = next(question for question in task.questions[3:] if question.query == down)
    assert [back.choices[i] for i in (back.answer, *back.also)] == [1, 2]


def test_egoexolearn_associates_clips_of_both_views(tmp_path: Path) -> None:
    data, task = read("egoexolearn_association", write(tmp_path / "association_val_hard.json", ASSOCIATION))
    (question,) = task.questions
    assert (question.kind, question.of_clips) == ("ego_to_exo", True)
    videos = data.clips.videos
    # In the order of numbers: "10" comes last.
    assert [videos[i] for i in question.choices] == [f"x{i}" for i in range(11)]
    assert videos[question.query] == "e"
    measure = MultipleChoiceTask(**vars(task))
    features = torch.eye(12)
    features[question.query] = features[question.choices[1]]
    assert measure.measure(features, torch.zeros(0, 12))["ego_to_exo"].value == 100
    mask = np.ones(12, dtype=bool)
    mask[question.choices[5]] = False
    assert not measure.restricted(mask).questions


def test_hd_epic_keeps_what_a_dual_encoder_can_answer(tmp_path: Path) -> None:
    boxes = {**HD_EPIC, "question": "How often did I close <BBOX 1 2 3 4>?"}
    several = {**HD_EPIC, "inputs": {**HD_EPIC["inputs"], "video 2": {"id": "P01"}}}  # type: ignore[dict-item]
    whole = {**HD_EPIC, "inputs": {"video 1": {"id": "P01-20240202-110250"}}}
    recognised = {"q_0": HD_EPIC, "q_1": boxes, "q_2": several, "q_3": whole}
    write(tmp_path / "fine_grained_action_recognition.json", recognised)
    write(tmp_path / "fine_grained_action_localization.json", {"w_0": HD_EPIC_WHEN})
    data, task = read("hd_epic_vqa", tmp_path)
    assert data.notes == ["3 of 5 questions are left out, which no dual encoder can answer"]
    when, which = task.questions
    assert (when.kind, which.kind) == ("fine_grained_action_localization", "fine_grained_action_recognition")
    assert task.texts[when.query] == "hit spatula"
    assert data.clips.start[when.choices[2]] == pytest.approx(9 * 60 + 0.87)
    assert (data.clips.start[which.query], data.clips.end[which.query]) == pytest.approx((75.539, 76.31))


def test_egotempo_chooses_among_the_answers_of_a_type(tmp_path: Path) -> None:
    entries = [TEMPO, {**TEMPO, "answer": "A knife."}, {**TEMPO, "clip_id": "v_1_2", "answer": "A knife."}]
    data, task = read("egotempo", write(tmp_path / "egotempo_openQA.json", {"info": {}, "annotations": entries}))
    assert {question.kind for question in task.questions} == {"object_specific_action"}
    assert choices_of(task, 0) == ["The oil remover spray.", "A knife."]
    assert [question.answer for question in task.questions] == [0, 1, 1]
    assert data.clips.videos == ["27470817-f803-45b4-b9d4-e754cb3196bc", "v"]
    assert data.clips.start[0] == pytest.approx(368.402, abs=1e-3)
    assert "grade open answers" in data.notes[0]


def test_the_real_questions_of_egoexolearn_are_read(shared: Path) -> None:
    path = shared / "annotations" / "egoexolearn" / "video_mcq_head300.jsonl"
    data, task = read("egoexolearn_mcq", path)
    assert len(task.questions) == 300
    assert len(data.clips) == 29
    assert sorted({len(question.choices) for question in task.questions}) == [2, 4, 5]
    assert choices_of(task, 0)[0] == "The right hand flips the pork with chopsticks."
    assert [question.answer for question in task.questions[:3]] == [0, 2, 1]
    assert not data.clips.videos[0].endswith(".mp4")


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("handyvqa", "a/q.json", {**HANDY, "correct_idx": [4]}, "question 'q': answer is 4, but there are 4 choices"),
        ("handyvqa", "a/q.json", {**HANDY, "correct_idx": []}, "question 'q': answer is missing"),
        ("handyvqa", "a/q.json", {"options": HANDY["options"]}, "question 'q': no 'correct_idx'"),
        ("handyvqa", "a/q.json", {**HANDY, "options": ["one"]}, "at least two choices, not 1"),
        ("handyvqa", "a/q.json", {**HANDY, "options": ["one", " "], "correct_idx": [0]}, "a text is empty"),
        ("handyvqa", "a/q.json", {**HANDY, "options": [1, 2]}, "neither a list of texts nor a prompt"),
        ("handyvqa", "a/q.json", {**HANDY, "correct_idx": [True]}, "answer is True"),
        ("handyvqa", "a/q.json", {**HANDY, "video": "../x"}, "video '../x' leads out of the folder"),
        ("handyvqa", "a/q.json", {**HANDY, "question_type": "?"}, "becomes a metric's name"),
        ("handyvqa", "q.json", "[]", "no .*json there, which this benchmark needs"),
        ("egohoibench", "e.csv", HOI.replace("verb_neg", "verbs"), "row 1: no 'verb_neg'"),
        ("egohoibench", "e.csv", HOI.replace("1.5", "soon"), "clip_start is 'soon', not a time"),
        ("chirality", "cia-x.csv", CIA.replace(",template", ",words"), "no column with a text"),
        ("chirality", "cia-x.csv", CIA.replace("2,a,0", "2,a,2"), "chiral_label is '2'"),
        ("chirality", "other.csv", CIA, "no cia-.*csv there"),
        ("egoexolearn_mcq", "m.jsonl", '{"image": {}}', "line 1: no 'video'"),
        ("egoexolearn_mcq", "m.jsonl", "no", "line 1: not a question"),
        ("hd_epic_vqa", "x.json", {"q": {**HD_EPIC, "correct_idx": "?"}}, "question 'q': answer is '\\?'"),
        ("hd_epic_vqa", "x.json", {"q": {**HD_EPIC, "inputs": 3}}, "question 'q': AttributeError"),
        ("egotempo", "egotempo_openQA.json", {"info": {}}, "no 'annotations'"),
        ("egotempo", "egotempo_openQA.json", {"annotations": [{**TEMPO, "clip_id": "x"}]}, "not a video and two times"),
        ("egoexolearn_association", "association_x.json", {"0": {"query": {}}}, "question '0': KeyError"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, kind: str, name: str, content: Any, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        read(kind, tmp_path)
    assert str(path) in str(caught.value) or str(tmp_path) in str(caught.value)


def test_every_benchmark_has_a_card() -> None:
    assert set(CARDS) >= set(BENCHMARKS) - {"custom", "labels"}


def test_the_subset_of_something_something_is_a_custom_benchmark(tmp_path: Path) -> None:
    """The snippet of docs/motion_check.md, run as it is printed there."""
    page = (Path(__file__).parents[2] / "docs" / "motion_check.md").read_text()
    snippet = page.split("```python\n# something-something")[1].split("```")[0]
    template = "Moving [something] up"
    clips = [
        {"id": "1", "label": "moving cup up", "template": template, "placeholders": ["cup"]},
        {"id": "2", "label": "moving cup down", "template": "Moving [something] down", "placeholders": ["cup"]},
        {"id": "3", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]},
    ]
    write(tmp_path / "something-something-v2-validation.json", clips)
    write(tmp_path / "temporal.txt", "Moving something up\nMoving something down\n")
    exec(compile(f"# {snippet}", "docs", "exec"), {"folder": tmp_path})
    data = BENCHMARKS["custom"].read(SourceConfig(metadata=str(tmp_path / "clips.csv")), BenchmarkOptions())
    assert len(data.clips) == 2
    classes = data.tasks[1]
    assert vars(classes)["class_names"] == ["Moving something up", "Moving something down"]
    assert pd.read_csv(tmp_path / "clips.csv")["text"].tolist() == ["moving cup up", "moving cup down"]
