"""The tasks on features with an expected score, and probes on features of given classes."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import assert_at_chance, evaluate, random_features
from torch.nn.functional import normalize

from egohod.data.formats.base import Question
from egohod.errors import UserError
from egohod.evaluation.features import INDEX_FORMAT, file_of, open_index, write_video
from egohod.evaluation.metrics import expected_graded_per_query
from egohod.evaluation.tasks import (
    ClassificationTask,
    MultiLabelTask,
    MultipleChoiceTask,
    RetrievalTask,
    class_features,
    knn_probe,
    linear_probe,
)
from tests.support import Command


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


def test_the_two_directions_of_retrieval_differ() -> None:
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
        assert_at_chance([run[key] for run in runs], runs[0][f"{key}_chance"], 100 * np.nanmean(fewer), name=key)
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
        assert_at_chance([run[key] for run in runs], chance, *wrong, name=key)


def test_multilabel_map_of_random_features_is_at_chance() -> None:
    labels = np.zeros((10, 4), dtype=bool)
    for name in range(4):
        labels[name : name + 3 + name, name] = True
    case = MultiLabelTask("map", [f"class {i}" for i in range(4)], labels)
    runs = [evaluate(case, random_features(10, 2 * seed), random_features(4, 2 * seed + 1)) for seed in range(1500)]
    labelled = labels[labels.any(axis=1)]
    wrong = labelled.copy()
    wrong[np.arange(4), np.arange(4)] = False  # each class with a video too few
    chances = [100 * float(np.nanmean(expected_graded_per_query(1.0 * each.T)[0])) for each in (labelled, wrong)]
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
        assert_at_chance([run[kind] for run in runs], chance, *wrong, name=kind)


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


# Two views of a clip and three texts: one view is sure of the first text, both half like the third.
# max over views: 0.9, 0.1, 0.5 (text 0); mean: 0.45, 0.05, 0.5 (text 2).
VIEWS = torch.tensor([[[0.9, 0.0, 0.5], [0.0, 0.1, 0.5]]])

MEAN = VIEWS.mean(dim=1)

TEXT = torch.eye(3)


def test_the_maximum_over_views_counts_for_every_kind_of_table() -> None:
    texts = ["a", "b", "c"]
    classes = ClassificationTask("action", texts, np.arange(3), np.array([0]))
    assert evaluate(classes, VIEWS, TEXT)["action_top1"] == 100
    assert evaluate(classes, MEAN, TEXT)["action_top1"] == 0
    assert classes.details(VIEWS, TEXT)["similarity"][0] == pytest.approx([0.9, 0.5, 0.1])
    retrieval = RetrievalTask(texts, np.array([0]), np.eye(3, dtype=np.float32)[:1])
    assert evaluate(retrieval, VIEWS, TEXT)["recall_1_v2t"] == 100
    assert evaluate(retrieval, MEAN, TEXT)["recall_1_v2t"] == 0
    assert retrieval.details(VIEWS, TEXT)["best_texts"] == [[0, 2, 1]]
    questions = MultipleChoiceTask(texts, [Question("q", True, 0, (0, 1, 2), 0)])
    assert evaluate(questions, VIEWS, TEXT)["q"] == 100
    assert evaluate(questions, MEAN, TEXT)["q"] == 0
    assert questions.details(VIEWS, TEXT)["questions"][0]["similarity"] == pytest.approx([0.9, 0.1, 0.5])
    # Two clips and a text: the second clip's mean is nearer, the first one's best view.
    both = torch.cat([VIEWS, torch.tensor([[[0.6, 0.0, 0.0], [0.6, 0.0, 0.0]]])])
    task = MultipleChoiceTask(texts, [Question("q", False, 0, (0, 1), 0)])
    assert (evaluate(task, both, TEXT)["q"], evaluate(task, both.mean(dim=1), TEXT)["q"]) == (100, 0)
    labels = MultiLabelTask("map", texts, np.array([[True, False, False], [False, True, False]]))
    # The first class ranks first or second, the other one second.
    assert (evaluate(labels, both, TEXT)["map"], evaluate(labels, both.mean(dim=1), TEXT)["map"]) == (75, 50)


def test_the_maximum_of_one_view_is_the_mean() -> None:
    labels = np.arange(30) % 5
    table = ClassificationTask("action", [f"{i}" for i in range(5)], np.arange(5), labels)
    video, text = random_features(30, 0), random_features(5, 1)
    assert evaluate(table, video[:, None], text) == pytest.approx(evaluate(table, video, text))


def clusters(count: int, classes: int, width: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.arange(count) % classes
    return centres[labels] + noise * torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_probes_tell_clusters_apart(probe: object) -> None:
    features, labels = clusters(300, 5, 16, 0.5)
    result = probe(features[:200], labels[:200], features[200:], 5)  # type: ignore[operator]
    assert (result.classes == labels[200:]).float().mean() > 0.95


def test_the_linear_probe_reads_what_neighbours_cannot() -> None:
    """The class is in one direction of small spread; all others are noise."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(600, 32, generator=generator)
    labels = (features[:, 0] > 0).long()
    features[:, 0] *= 0.2
    right = {
        name: (probe(features[:400], labels[:400], features[400:], 2).classes == labels[400:]).float().mean()
        for name, probe in (("linear", linear_probe), ("knn", knn_probe))
    }
    assert right["linear"] > 0.9 > right["knn"]


def features(folder: Path, weights: str, values: np.ndarray, texts: list[str], videos: int = 1) -> Path:
    """As tools/extract_features.py leaves them; of several videos only the first has been embedded yet."""
    folder.mkdir()
    names = {f"v{i}": file_of(f"v{i}") for i in range(videos)}
    protocol = {"frames": 4, "size": 32, "crop": "centre"}
    index = {"format": INDEX_FORMAT, "weights": weights, "protocol": protocol, "root": "videos", "videos": names}
    open_index(folder, index | {"layout": "auto", "chunk_seconds": 15.0})
    times = np.arange(len(texts), dtype=float)
    write_video(folder, "v0", values.astype(np.float32), times, times + 1, texts, "these")
    return folder


def test_the_program_compares_like_with_like(tmp_path: Path, inside: Command) -> None:
    values, labels = clusters(60, 3, 8, 0.1)
    rows, texts = values.numpy(), [f"class {int(label)}" for label in labels]
    train = features(tmp_path / "train", "a", rows[:40], texts[:40], videos=2)
    test = features(tmp_path / "test", "a", rows[40:], texts[40:])
    done = inside("probe.py", "--train", train, "--test", test)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "40 training clips, 20 test clips, 3 classes"
    assert done.stdout.count("top-1 100.00, mean class 100.00") == 2
    assert "train: 1 videos have no features yet" in done.stderr
    other = features(tmp_path / "other", "b", rows[40:], texts[40:])
    broken = features(tmp_path / "broken", "a", rows[40:] * np.nan, texts[40:])
    strange = features(tmp_path / "strange", "a", rows[40:], ["class 9"] * 20)
    for folder, message in (
        (other, "hold features of another weights"),
        (broken, "broken: the features of v0 are not finite"),
        (strange, "class 'class 9' has test clips, but no training clip"),
    ):
        done = inside("probe.py", "--train", train, "--test", folder)
        assert done.returncode == 2, done.stdout
        assert message in done.stderr
