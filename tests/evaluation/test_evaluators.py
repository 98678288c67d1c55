"""The three evaluators and the result table on features whose score is known."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from evaluation_cases import assert_at_chance, evaluate, random_features
from torch.nn.functional import normalize

from egohod.data.formats.base import Question
from egohod.errors import UserError
from egohod.evaluation.embed import EmbedReport
from egohod.evaluation.metrics import (
    RESAMPLES,
    Score,
    expected_graded_per_query,
    median,
    percent,
)
from egohod.evaluation.results import table
from egohod.evaluation.runner import BenchmarkResult
from egohod.evaluation.tasks import (
    ClassificationTask,
    MultiLabelTask,
    MultipleChoiceTask,
    RetrievalTask,
    class_features,
)


def retrieval_case(clips: int = 60, texts: int = 40, actions: int = 8) -> RetrievalTask:
    rng = np.random.default_rng(0)
    text_of_clip = np.concatenate([np.arange(texts), rng.integers(0, texts, clips - texts)])
    action = rng.integers(0, actions, texts)
    return RetrievalTask(
        [f"text {i}" for i in range(texts)], text_of_clip, (action[text_of_clip][:, None] == action).astype(np.float32)
    )


def test_retrieval_by_an_oracle_is_perfect() -> None:
    case = retrieval_case()
    # Texts of one action share a direction, each text has a smaller one of its own; a clip looks like its text.
    relevancy = torch.from_numpy(case.relevancy[: len(case.texts)])
    text = normalize(torch.cat([relevancy, 0.5 * torch.eye(len(case.texts))], dim=1), dim=-1)
    scores = evaluate(case, text[torch.from_numpy(case.text_of_clip)], text)
    for key in ("map", "map_v2t", "map_t2v", "ndcg", "recall_1_v2t", "recall_5_v2t", "recall_1_t2v", "recall_5_t2v"):
        assert scores[key] == pytest.approx(100)
    assert scores["median_rank_v2t"] == scores["median_rank_t2v"] == 1


def test_the_two_directions_of_retrieval_are_told_apart() -> None:
    case = RetrievalTask(["a", "b"], np.arange(2), np.eye(2, dtype=np.float32))
    # Each clip finds its text, but the second text prefers the first clip.
    scores = evaluate(case, torch.tensor([[3.0, 2.0], [0.0, 1.0]]), torch.eye(2))
    assert (scores["recall_1_v2t"], scores["recall_1_t2v"]) == (100, 50)
    assert (scores["median_rank_v2t"], scores["median_rank_t2v"]) == (1, 1.5)
    assert (scores["map_v2t"], scores["map_t2v"], scores["map"]) == (100, 75, 87.5)


@pytest.mark.parametrize("direction", ["v2t", "t2v"])
def test_retrieval_by_random_features_is_at_chance(direction: str) -> None:
    # 24 queries search 6 items, one of which is theirs.
    own = np.arange(24) % 6
    relevancy = np.eye(6)[own]
    if direction == "v2t":
        case = RetrievalTask([f"text {i}" for i in range(6)], own, relevancy)
    else:
        case = RetrievalTask([f"text {i}" for i in range(24)], np.arange(6), relevancy.T)
    clips, texts = case.relevancy.shape
    runs = [
        evaluate(case, random_features(clips, 2 * seed), random_features(texts, 2 * seed + 1)) for seed in range(500)
    ]
    # Beside each chance level that of an item too few, for the queries that have theirs among the others.
    for name, fewer in zip(("map", "ndcg"), expected_graded_per_query(relevancy[:, 1:]), strict=True):
        key = f"{name}_{direction}"
        assert_at_chance([run[key] for run in runs], runs[0][f"{key}_chance"], 100 * np.nanmean(fewer), said=key)
    if direction == "v2t":
        assert runs[0]["recall_1_v2t_chance"] == pytest.approx(100 / 6)
        assert_at_chance([run["recall_1_v2t"] for run in runs], 100 / 6, 100 / 5)
        assert_at_chance([run["recall_5_v2t"] for run in runs], 500 / 6, 100, 500 / 7)


def test_the_median_rank_of_chance_is_the_middle() -> None:
    assert evaluate(retrieval_case(), random_features(60, 0), random_features(40, 1))["median_rank_v2t_chance"] == 20


def test_retrieval_tells_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    case = retrieval_case()
    case.relevancy[3] = 0
    with caplog.at_level(logging.WARNING):
        evaluate(case, random_features(60, 0), random_features(40, 1))
    assert "map leaves out 1 clips and 0 texts" in caplog.text


def grid(seed: int = 0, clips: int = 200) -> ClassificationTask:
    """4 verbs x 5 nouns, two prompts each."""
    verb, noun = (part.ravel() for part in np.indices((4, 5)))
    classes = np.arange(20)
    return ClassificationTask(
        "verb_noun",
        [f"prompt {i}" for i in range(40)],
        np.concatenate([classes, classes]),
        np.random.default_rng(seed).integers(0, 20, clips),
        {"verb": verb, "noun": noun},
    )


def test_classification_by_an_oracle_is_perfect_and_knows_its_parts() -> None:
    case = grid()
    prompts = random_features(40, 5, width=64)
    video = class_features(prompts, case.class_of_text)[torch.from_numpy(case.labels)]
    scores = evaluate(case, video, prompts)
    for key in ("verb_noun_top1", "verb_noun_top5", "verb_noun_mean_class", "verb_top1", "noun_top1"):
        assert scores[key] == 100
    assert [scores[f"{key}_top1_chance"] for key in ("verb_noun", "verb", "noun")] == [5, 25, 20]
    assert scores["verb_noun_top5_chance"] == 25


def test_classification_sees_which_part_is_wrong() -> None:
    case = grid()
    prompts = torch.eye(20).repeat(2, 1)
    verb, noun = case.parts["verb"], case.parts["noun"]
    mistaken = np.array([np.flatnonzero((verb == (verb[c] + 1) % 4) & (noun == noun[c]))[0] for c in case.labels])
    scores = evaluate(case, torch.eye(20)[torch.from_numpy(mistaken)], prompts)
    assert (scores["verb_noun_top1"], scores["verb_top1"], scores["noun_top1"]) == (0, 0, 100)


def test_parts_are_marginalised_not_taken_from_the_best_class() -> None:
    # The best class has verb 0, but two nearly as good classes have verb 1: together they outweigh it.
    case = ClassificationTask("c", ["a", "b", "c"], np.arange(3), np.array([1]), {"verb": np.array([0, 1, 1])})
    text = torch.eye(3)
    video = normalize(torch.tensor([[1.0, 0.99, 0.99]]), dim=-1)
    scores = evaluate(case, video, text)
    assert (scores["c_top1"], scores["verb_top1"]) == (0, 100)


def test_classification_by_random_features_is_at_chance() -> None:
    verb, noun = (part.ravel() for part in np.indices((2, 3)))
    classes = np.arange(6)
    prompts = [f"prompt {i}" for i in range(12)]
    case = ClassificationTask("c", prompts, np.tile(classes, 2), np.tile(classes, 50), {"verb": verb, "noun": noun})
    runs = [evaluate(case, random_features(300, 2 * seed), random_features(12, 2 * seed + 1)) for seed in range(150)]
    # Beside each chance level those of a class (a verb, a noun) too few and too many.
    for key, chance, *wrong in (
        ("c_top1", 100 / 6, 100 / 5, 100 / 7),
        ("c_mean_class", 100 / 6, 100 / 5, 100 / 7),
        ("c_top5", 500 / 6, 100, 500 / 7),
        ("verb_top1", 50, 100, 100 / 3),
        ("noun_top1", 100 / 3, 50, 25),
    ):
        assert runs[0][f"{key}_chance"] == pytest.approx(chance)
        assert_at_chance([run[key] for run in runs], chance, *wrong, said=key)


def test_multilabel_map_of_random_features_is_at_chance() -> None:
    labels = np.zeros((10, 4), dtype=bool)
    for name in range(4):
        labels[name : name + 3 + name, name] = True
    case = MultiLabelTask("map", [f"class {i}" for i in range(4)], labels)
    runs = [evaluate(case, random_features(10, 2 * seed), random_features(4, 2 * seed + 1)) for seed in range(1500)]
    told = labels[labels.any(axis=1)]
    wrong = told.copy()
    wrong[np.arange(4), np.arange(4)] = False  # each class with a video too few
    chances = [100 * float(np.nanmean(expected_graded_per_query(1.0 * each.T)[0])) for each in (told, wrong)]
    assert runs[0]["map_chance"] == pytest.approx(chances[0])
    assert_at_chance([run["map"] for run in runs], *chances)


def test_class_features_are_renormalised_means() -> None:
    text = normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), dim=-1)
    features = class_features(text, np.array([0, 0, 1]))
    torch.testing.assert_close(features, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))
    with pytest.raises(UserError, match="class 1 has no prompt"):
        class_features(text, np.array([0, 0, 2]))


def questions() -> MultipleChoiceTask:
    pairs = [Question("pair", True, clip, (clip, (clip + 1) % 50), 0) for clip in range(50)]
    steps = (3, 2, 1, 0, 4)
    clips = [Question("clips", False, text, tuple((text + step) % 50 for step in steps), 3) for text in range(50)]
    return MultipleChoiceTask([f"text {i}" for i in range(50)], pairs + clips)


def test_multiple_choice_both_ways() -> None:
    features = random_features(50, 1, width=64)
    assert evaluate(questions(), features, features) == pytest.approx(
        {"pair": 100, "pair_chance": 50, "clips": 100, "clips_chance": 20}
    )
    opposite = evaluate(questions(), -features, features)
    assert (opposite["pair"], opposite["clips"]) == (0, 0)


def test_multiple_choice_by_random_features_is_at_chance() -> None:
    table = questions()
    runs = [evaluate(table, random_features(50, 2 * s), random_features(50, 2 * s + 1)) for s in range(300)]
    # A choice too few or too many.
    for kind, chance, *wrong in (("pair", 50, 100 / 3), ("clips", 20, 25, 100 / 6)):
        assert runs[0][f"{kind}_chance"] == pytest.approx(chance)
        assert_at_chance([run[kind] for run in runs], chance, *wrong, said=kind)


def test_table_shows_the_chance_beside_each_number() -> None:
    results = {"test/map": 12.34, "test/map_chance": 1.26, "test/median_rank_v2t": 3.0, "test/other": 2.0}
    assert table(results, "demo").splitlines() == [
        "demo                    result    chance",
        "test/map                 12.3%      1.3%",
        "test/median_rank_v2t      3.0          -",
        "test/other                2.0%         -",
    ]


def number(value: float, chance: float | None = None, is_rank: bool = False) -> Score:
    return Score(value, chance, lambda _: np.full(RESAMPLES, value), is_rank)


def test_table_shows_the_temporal_controls_as_columns() -> None:
    scores = {
        "plain": {"map": number(12.34, 1.26), "median_rank": number(3.0, is_rank=True)},
        "freeze": {"map": number(10.0, 1.26), "median_rank": number(7.0, is_rank=True)},
        "shuffle": {"map": number(12.5)},
    }
    results = BenchmarkResult(scores, [], [], EmbedReport()).flat()
    assert results == {
        "map": 12.34,
        "map_chance": 1.26,
        "median_rank": 3.0,
        "freeze/map": 10.0,
        "freeze/map_drop": pytest.approx(2.34),
        "freeze/median_rank": 7.0,
        "shuffle/map": 12.5,
        "shuffle/map_drop": pytest.approx(-0.16),
    }
    assert table({f"test/{key}": value for key, value in results.items()}).splitlines() == [
        "                    result    chance   shuffle    freeze",
        "test/map             12.3%      1.3%     12.5%     10.0%",
        "test/median_rank      3.0          -         -      7.0",
    ]


def test_intervals_hold_the_true_value_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = percent([rng.random(80) < 0.3], None).interval()
        inside += low <= 30 <= high
    assert 178 <= inside <= 199


def test_the_interval_of_a_mean_class_accuracy_is_wide_when_classes_have_one_clip() -> None:
    labels = np.arange(20)
    case = ClassificationTask("c", [f"prompt {i}" for i in range(20)], labels, labels)
    video = torch.eye(20)[torch.from_numpy(np.where(labels < 8, labels, 19 - labels))]
    score = case.measure(video, torch.eye(20))["c_mean_class"]
    low, high = score.interval()
    assert score.value == 40
    # About two standard errors of 8 in 20 to either side.
    assert 12 <= low <= 28
    assert 52 <= high <= 68


def test_a_drop_is_judged_on_the_same_clips() -> None:
    right = np.random.default_rng(1).random(300) < 0.5
    worse = right.copy()
    worse[np.flatnonzero(right)[:30]] = False
    before, after = percent([right], None), percent([worse], None)
    low, high = before.interval(minus=after)
    assert before.value - after.value == pytest.approx(10)
    # Were the two resampled apart, the interval would be about 16 wide.
    assert 6 < low < 10 < high < 14
    assert high - low < 8


def test_a_number_without_a_query_has_no_interval() -> None:
    for score in (percent([[np.nan]], None), percent([], None), median([0, 0], None)):
        assert np.isnan([score.value, *score.interval()]).all()
