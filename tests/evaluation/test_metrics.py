"""Metrics against reference numbers, against independent few-line definitions, and against enumeration."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from egohod.errors import UserError
from egohod.evaluation import metrics
from egohod.evaluation.metrics import (
    expected_graded_scores,
    expected_recall,
    first_relevant_rank,
    graded_per_query,
    graded_scores,
    mean_average_precision,
    mean_class_accuracy,
    median_rank,
    multilabel_average_precision,
    multiple_choice_accuracy,
    ndcg,
    rank_items,
    recall_at_k,
    topk_accuracy,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[2] / "../shared/golden/loss_metrics.npz"
NUMBERS = json.loads((GOLDEN / "loss_metrics.json").read_text())
ARRAYS = np.load(GOLDEN / "metrics.npz")


def ap_by_definition(scores: np.ndarray, relevancy: np.ndarray) -> float:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    hits = [sum(relevancy[order[: k + 1]]) / (k + 1) for k, item in enumerate(order) if relevancy[item] == 1]
    return sum(hits) / len(hits) if hits else float("nan")


def ndcg_by_definition(scores: np.ndarray, relevancy: np.ndarray) -> float:
    def gain(items: list[int]) -> float:
        return sum(relevancy[item] / np.log2(rank + 2) for rank, item in enumerate(items))

    positives = int((relevancy > 0).sum())
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:positives]
    ideal = sorted(range(len(scores)), key=lambda i: -relevancy[i])[:positives]
    return gain(order) / gain(ideal) if positives else float("nan")


def some_case(seed: int, shape: tuple[int, int] = (13, 17), *, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sim = rng.standard_normal(shape)
    return np.round(sim) if ties else sim, rng.choice([0, 0.25, 0.5, 0.75, 1], p=[0.5, 0.1, 0.2, 0.1, 0.1], size=shape)


@pytest.mark.parametrize("case", ["small", "binary", "mid"])
def test_graded_metrics_equal_the_reference_numbers(case: str) -> None:
    if case == "mid" and not SHARED.exists():
        pytest.skip("needs ../shared/golden (too large to copy)")
    arrays = np.load(SHARED) if case == "mid" else ARRAYS
    scores = graded_scores(arrays[f"{case}_sim"], arrays[f"{case}_rel"])
    for metric, name in ((scores.mean_average_precision, "mAP"), (scores.ndcg, "nDCG")):
        assert [metric.v2t, metric.t2v, metric.mean] == pytest.approx(NUMBERS[case][f"{name}_v2t_t2v_avg"], abs=1e-12)
        assert metric.left_out == (0, 0)


def test_ties_go_to_the_lower_index_and_lie_in_the_possible_range() -> None:
    scores, want = graded_scores(ARRAYS["ties_sim"], ARRAYS["ties_rel"]), NUMBERS["ties"]
    ours = want["lower_index_first"]
    assert scores.mean_average_precision.v2t == pytest.approx(ours["mAP_v2t"], abs=1e-12)
    assert scores.mean_average_precision.t2v == pytest.approx(ours["mAP_t2v"], abs=1e-12)
    assert scores.ndcg.v2t == pytest.approx(ours["nDCG_v2t"], abs=1e-12)
    assert scores.ndcg.t2v == pytest.approx(ours["nDCG_t2v"], abs=1e-12)
    assert want["worst_case"]["mAP_v2t"] < scores.mean_average_precision.v2t < want["best_case"]["mAP_v2t"]


def test_published_self_check_of_ndcg() -> None:
    sim = [[1, 0.7, 0.4, 0], [0.3, 0.9, 0.6, 0.1], [0.2, 0.5, 0.8, 0.4]]
    rel = [[1, 0.5, 0.25, 0], [0, 1, 0.4, 0], [0.5, 0.3, 1, 0]]
    assert ndcg(sim, rel).v2t == pytest.approx(0.9371789900735429, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_graded_metrics_equal_their_definition(ties: bool, dtype: type) -> None:
    for seed in range(5):
        sim, rel = some_case(seed, ties=ties)
        sim = sim.astype(dtype)
        rel[0] = 0
        ap, gain = graded_per_query(sim, rel)
        np.testing.assert_allclose(ap, [ap_by_definition(s, r) for s, r in zip(sim, rel, strict=True)], atol=1e-12)
        np.testing.assert_allclose(gain, [ndcg_by_definition(s, r) for s, r in zip(sim, rel, strict=True)], atol=1e-12)


def test_queries_without_a_relevant_item_are_left_out_and_counted() -> None:
    sim, rel = some_case(3, ties=False)
    rel[2], rel[5] = 0, 0.5  # nothing relevant; nothing fully relevant
    rel[:, 1] = 0
    ap, gain = graded_per_query(sim, rel)
    assert np.isnan(ap[[2, 5]]).all()
    assert np.isnan(gain[2])
    assert gain[5] > 0
    scores = graded_scores(sim, rel)
    assert scores.mean_average_precision.v2t == pytest.approx(np.nanmean(ap))
    assert scores.mean_average_precision.left_out[0] == np.isnan(ap).sum()
    assert scores.ndcg.left_out == (1, 1)


def test_the_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sim, rel = some_case(7, (29, 11), ties=True)
    whole = graded_scores(sim, rel)
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 35)
    assert graded_scores(sim, rel) == whole


def test_memory_does_not_grow_with_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 2**14)
    # Whether the blocks of two threads meet is a matter of chance.
    monkeypatch.setattr(metrics, "THREADS", 1)

    def peak(rows: int) -> int:
        sim, rel = (array.astype(np.float32) for array in some_case(0, (rows, 400), ties=False))
        tracemalloc.start()
        graded_scores(sim, rel)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    # One full-size float32 array of the larger case alone would be 3.2 MB.
    assert peak(2000) - peak(500) < 400_000


def test_ranking_is_a_stable_sort_for_every_kind_of_float() -> None:
    rng = np.random.default_rng(1)
    tiny = np.array([[0.0, -0.0, 1e-45, -1e-45, 0.0, 3e38, -3e38, 1, -1, 1, -0.0]], dtype=np.float32)
    coarse = rng.integers(-3, 4, (50, 40)).astype(np.float32)
    for scores in (tiny, coarse, rng.standard_normal((20, 30), dtype=np.float32), coarse.astype(np.float64)):
        np.testing.assert_array_equal(rank_items(scores), np.argsort(-scores, axis=1, kind="stable"))


def test_oracle_is_perfect() -> None:
    _, rel = some_case(11, ties=False)
    scores = graded_scores(rel, rel)
    assert scores.mean_average_precision.mean == 1
    assert scores.ndcg.mean == pytest.approx(1, abs=1e-12)
    assert mean_average_precision(-rel, rel).mean < 0.5


def test_chance_of_graded_metrics_is_the_mean_over_all_orders() -> None:
    rel = np.array([[1, 0.5, 0, 1, 0, 0.25], [0, 1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0]])
    orders = np.array(list(itertools.permutations(range(6))), dtype=np.float64)
    per_order = [graded_per_query(np.tile(order, (3, 1)), rel) for order in orders]
    expected = expected_graded_scores(rel)
    ap, gain = (np.mean([entry[i] for entry in per_order], axis=0) for i in (0, 1))
    assert expected.mean_average_precision.v2t == pytest.approx(np.nanmean(ap))
    assert expected.mean_average_precision.left_out == (1, 3)
    assert expected.ndcg.v2t == pytest.approx(np.nanmean(gain))


def test_chance_of_recall_is_the_share_of_all_orders() -> None:
    counts = [1, 3, 0]
    orders = list(itertools.permutations(range(5)))
    for k in range(1, 6):
        share = [np.mean([min(order[:c]) < k for order in orders]) for c in counts if c]
        assert expected_recall(counts, 5)[k - 1] == pytest.approx(np.mean(share))


def test_ranks_equal_the_reference_numbers() -> None:
    want = NUMBERS["compute_metrics"]
    ranks = first_relevant_rank(ARRAYS["cmx"], np.eye(len(ARRAYS["cmx"]), dtype=bool))
    np.testing.assert_array_equal(ranks - 1, want["cols"])
    for k in (1, 5, 10):
        assert 100 * recall_at_k(ranks, k) == pytest.approx(want[f"R{k}"])
    assert median_rank(ranks) == want["MedianR"]


def test_rank_of_the_first_relevant_item() -> None:
    sim = np.array([[3, 3, 1, 0], [3, 3, 1, 0], [0, 1, 2, 3], [1, 1, 1, 1], [-5, -6, -7, -8]], dtype=np.float32)
    relevant = np.array([[0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=bool)
    ranks = first_relevant_rank(sim, relevant)
    assert ranks.tolist() == [2, 1, 2, 0, 4]
    assert recall_at_k(ranks, 2) == 3 / 4
    assert median_rank(ranks) == 2


def test_topk_accuracy_equals_the_reference_numbers() -> None:
    scores, labels = ARRAYS["acc_output"], ARRAYS["acc_target"]
    assert [100 * topk_accuracy(scores, labels, k) for k in (1, 5)] == pytest.approx(NUMBERS["accuracy_top1_top5"])


def test_topk_accuracy_with_ties_follows_the_lower_index() -> None:
    scores, labels = ARRAYS["acc_output_ties"], ARRAYS["acc_target"]
    order = [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i)) for row in scores]
    for k in (1, 5):
        want = np.mean([label in best[:k] for best, label in zip(order, labels, strict=True)])
        assert topk_accuracy(scores, labels, k) == pytest.approx(want)


def test_mean_class_accuracy_leaves_out_classes_without_a_clip() -> None:
    confusion = ARRAYS["cm"]
    truth, prediction = (np.repeat(index.ravel(), confusion.ravel()) for index in np.indices(confusion.shape))
    with_empty_as_zero, top1 = NUMBERS["mean_accuracy(meanclass,top1)"]
    occurring = (confusion.sum(axis=1) > 0).sum()
    assert occurring < len(confusion)
    want = with_empty_as_zero * len(confusion) / occurring
    assert 100 * mean_class_accuracy(prediction, truth) == pytest.approx(want)
    assert 100 * np.mean(prediction == truth) == pytest.approx(top1)


@pytest.mark.parametrize(("scores", "key"), [("mcq_preds", "egomcq"), ("mcq_preds_ties", "egomcq_ties(first argmax)")])
def test_multiple_choice_equals_the_reference_numbers(scores: str, key: str) -> None:
    accuracy = multiple_choice_accuracy(ARRAYS[scores], ARRAYS["mcq_labels"], ARRAYS["mcq_types"])
    want = {"1": NUMBERS[key]["Inter-video"], "2": NUMBERS[key]["Intra-video"]}
    assert {kind: 100 * value for kind, value in accuracy.items()} == pytest.approx(want)


def test_a_metric_unpacks_into_both_directions_and_their_mean() -> None:
    sim, rel = some_case(2, ties=False)
    v2t, t2v, mean = mean_average_precision(sim, rel)
    want = [np.nanmean(graded_per_query(sim, rel)[0]), np.nanmean(graded_per_query(sim.T, rel.T)[0])]
    assert [v2t, t2v] == pytest.approx(want)
    assert mean == (v2t + t2v) / 2


def test_multilabel_average_precision_equals_its_definition() -> None:
    rng = np.random.default_rng(4)
    scores, labels = np.round(rng.standard_normal((40, 6)), 1), rng.random((40, 6)) < 0.2
    labels[:, 3] = False
    told = labels.any(axis=1)
    assert not told.all()
    got = multilabel_average_precision(scores, labels)
    want = [ap_by_definition(s, label.astype(float)) for s, label in zip(scores[told].T, labels[told].T, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert np.isnan(got[3])
    assert np.nanmean(multilabel_average_precision(labels * 1.0, labels)) == 1
    # A video without any class ranks behind all others, however high its scores are.
    scores[~told] = 100
    np.testing.assert_array_equal(multilabel_average_precision(scores, labels), got)


def test_multiple_choice_with_fewer_choices() -> None:
    scores = np.array([[-3, -2, -np.inf], [0.1, 0.2, 0.3]])
    assert multiple_choice_accuracy(scores, [1, 0], ["pair", "triple"]) == {"pair": 1, "triple": 0}


def test_scores_that_cannot_be_ranked_are_refused() -> None:
    sim, rel = some_case(0, ties=False)
    for bad in (np.nan, np.inf):
        broken = sim.copy()
        broken[4, 4] = bad
        with pytest.raises(UserError, match="not finite"):
            graded_scores(broken, rel)
        with pytest.raises(UserError, match="not finite"):
            first_relevant_rank(broken, rel == 1)
        with pytest.raises(UserError, match="not finite"):
            multiple_choice_accuracy(broken, np.zeros(len(broken), dtype=int), ["a"] * len(broken))


def test_shapes_and_labels_that_do_not_fit_are_refused() -> None:
    sim, rel = some_case(0, ties=False)
    with pytest.raises(UserError, match=r"\[13, 17\] and relevancies \[17, 13\]"):
        graded_scores(sim, rel.T)
    with pytest.raises(UserError, match="labels run from 0 to 17, but there are 17 columns"):
        topk_accuracy(sim, np.array([0] * 12 + [17]))
    with pytest.raises(UserError, match="one label per row"):
        topk_accuracy(sim, np.zeros(3, dtype=int))
    with pytest.raises(UserError, match="not among its choices"):
        multiple_choice_accuracy(np.array([[1.0, -np.inf]]), [1], ["pair"])
