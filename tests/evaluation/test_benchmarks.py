"""The demo benchmark from rendered video to the result table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_cases import FRAMES, Oracle, benchmark, small_model, world_split

from egohod.config import Config
from egohod.data.formats import read_clips
from egohod.data.formats.custom import KIND_METRICS, read_questions
from egohod.data.text import Tokenizer
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.evaluation.results import table
from egohod.evaluation.runner import named_evaluators

HEADLINES = {"map", "recall_1_v2t", "recall_5_v2t", "median_rank_v2t", "verb_noun_top1", "verb_top1", "noun_top1"}


def test_oracle_reaches_everything(world: Path) -> None:
    bench = benchmark(world)
    results = bench(Oracle(bench.dataset, read_clips(world / "hod.csv"), Tokenizer()))
    assert {*HEADLINES, *KIND_METRICS.values()} <= results.keys()
    for key, value in results.items():
        if not key.endswith("_chance"):
            assert value == (1 if "rank" in key else pytest.approx(100)), key
    chances = [results[f"{kind}_chance"] for kind in KIND_METRICS.values()]
    assert chances == pytest.approx([20, 50, 50, 50])
    assert results["verb_noun_top1_chance"] < 2


def test_untrained_model_is_far_from_it_and_every_number_has_a_chance_level(world: Path) -> None:
    results = benchmark(world, workers=2)(small_model())
    metrics = {key for key in results if not key.endswith("_chance")}
    assert {f"{key}_chance" for key in metrics - {"verb_noun_mean_class"}} <= results.keys()
    assert results["map"] < 50
    assert results["verb_noun_top1"] < 30
    assert results["choice_across_clips"] < 60
    assert all(f"{results[key]:.1f}" in table(results) for key in metrics)


def test_controls_are_reported_beside_the_plain_numbers(world: Path) -> None:
    cfg = Config()
    cfg.model.name, cfg.model.num_frames, cfg.data.workers = "DEMO", FRAMES, 0
    cfg.evaluate.benchmarks["test"], cfg.evaluate.final = world_split(world), ["test"]
    alone = Distributed(0, 1, torch.device("cpu"), None)
    (bench,) = named_evaluators(cfg, alone, "test", controls=["reverse", "freeze"])
    (plain,) = named_evaluators(cfg, alone, "test")
    model, results = small_model(), bench(small_model())
    assert {key: value for key, value in results.items() if "/" not in key} == plain(model)
    for control in ("reverse", "freeze"):
        for key in ("map", "verb_noun_top1", "motion_transient"):
            drop = results[key] - results[f"{control}/{key}"]
            assert results[f"{control}/{key}_drop"] == pytest.approx(drop)
    assert not any(key.startswith("shuffle/") for key in results)


def test_evaluator_follows_the_configuration(world: Path) -> None:
    cfg = Config()
    cfg.model.name, cfg.model.num_frames, cfg.evaluate.batch_size, cfg.data.workers = "DEMO", 2, 5, 0
    cfg.data.decoder, cfg.evaluate.precision = "pyav", "bf16"
    cfg.evaluate.benchmarks["val"], cfg.evaluate.during = world_split(world), ["val"]
    (made,) = named_evaluators(cfg, Distributed(0, 1, torch.device("cpu"), None), "val")
    assert made.name == "val"
    assert made.dataset[0]["video"].shape == (1, 3, 2, made.dataset.size, made.dataset.size)
    assert made.execution.batch_size == 5
    assert made.execution.precision == torch.bfloat16


def test_the_benchmarks_that_a_configuration_names_are_measured(demo_world: Path) -> None:
    cfg, alone = Config(), Distributed(0, 1, torch.device("cpu"), None)
    cfg.model.name = "DEMO"
    cfg.evaluate.benchmarks = {name: world_split(demo_world / name) for name in ("val", "test")}
    assert named_evaluators(cfg, alone, "val", "test") == []
    cfg.evaluate.final = ["test"]
    assert [each.name for each in named_evaluators(cfg, alone, "val", "test")] == ["test"]
    cfg.evaluate.during = ["val"]
    assert [each.name for each in named_evaluators(cfg, alone, "val", "test")] == ["val", "test"]
    assert [each.name for each in named_evaluators(cfg, alone, "val")] == ["val"]


@pytest.mark.parametrize("part", ["hod.csv", "videos"])
def test_a_folder_without_clips_or_videos_is_refused(world: Path, tmp_path: Path, part: str) -> None:
    for entry in world.iterdir():
        if entry.name != part:
            (tmp_path / entry.name).symlink_to(entry)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / part))):
        benchmark(tmp_path)


def test_classes_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    for entry in world.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    classes = tmp_path / "classes.csv"
    text = classes.read_text()
    classes.unlink()
    classes.write_text(text.replace("action,verb", "actor,verb", 1))
    with pytest.raises(UserError, match=r"classes\.csv: column 'action' is missing"):
        benchmark(tmp_path)
    classes.write_text(text.splitlines()[0] + "\nfly cup,fly,cup,#C C flies the cup\n")
    with pytest.raises(UserError, match=r"classes\.csv: no class '.+', but a clip has"):
        benchmark(tmp_path)


GOOD: dict[str, Any] = {
    "kind": "transient",
    "query": {"clip": "u1"},
    "choices": [{"text": "a"}, {"text": "b"}],
    "answer": 1,
}


def test_questions_are_read_with_shared_texts(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    other = {"kind": "across_clips", "query": {"text": "b"}, "choices": [{"clip": "u0"}, {"clip": "u1"}], "answer": 0}
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(other) + "\n")
    table = read_questions(path, ["u0", "u1"])
    assert table.texts == ["a", "b"]
    first, second = table.questions
    assert (first.kind, first.query_is_clip, first.query, first.choices, first.answer) == (
        "motion_transient",
        True,
        1,
        (0, 1),
        1,
    )
    assert (second.query_is_clip, second.query, second.choices) == (False, 1, (0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "very quick"}, 'kind is "very quick", but becomes a metric'),
        ({"query": {"clip": "u7"}}, "query is clip 'u7', which is not among the clips"),
        ({"query": "u1"}, 'query must be {"clip": uid} or'),
        ({"choices": [{"text": "a"}]}, "choices must be a list of at least two"),
        ({"choices": [{"text": "a"}, {"clip": "u0"}]}, "the choices of a clip must be texts"),
        ({"answer": 2}, "answer is 2, but there are 2 choices"),
        ({"answer": -1}, "answer is -1"),
        ({"answer": "1"}, "answer is '1'"),
    ],
)
def test_a_bad_question_is_refused_with_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(UserError) as error:
        read_questions(path, ["u0", "u1"])
    assert f"{path}: line 2: {message}" in str(error.value)


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "transient"}', "3"])
def test_a_line_that_is_no_question_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match="line 1: not a question with kind, query, choices and answer"):
        read_questions(path, ["u0"])


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("")
    with pytest.raises(UserError, match="not a single question"):
        read_questions(path, ["u0"])
