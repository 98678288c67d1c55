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
    expected_graded_per_query,
    expected_recall,
    first_relevant_rank,
    graded_per_query,
    label_ranks,
    mean_class_accuracy,
    median,
    multilabel_average_precision,
    multiple_choice_right,
    percent,
    rank_items,
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


def both_directions(sim: np.ndarray, rel: np.ndarray) -> dict[str, list[float]]:
    """mAP and nDCG in percent from video to text, from text to video, and their mean."""
    per_query = zip(graded_per_query(sim, rel), graded_per_query(sim.T, rel.T), strict=True)
    return {
        name: [percent(parts, None).value for parts in ([v2t], [t2v], [v2t, t2v])]
        for name, (v2t, t2v) in zip(("mAP", "nDCG"), per_query, strict=True)
    }


@pytest.mark.parametrize("case", ["small", "binary", "mid"])
def test_graded_metrics_equal_the_reference_numbers(case: str) -> None:
    if case == "mid" and not SHARED.exists():
        pytest.skip("needs ../shared/golden (too large to copy)")
    arrays = np.load(SHARED) if case == "mid" else ARRAYS
    sim, rel = arrays[f"{case}_sim"], arrays[f"{case}_rel"]
    for name, values in both_directions(sim, rel).items():
        assert [value / 100 for value in values] == pytest.approx(NUMBERS[case][f"{name}_v2t_t2v_avg"], abs=1e-12)
    assert not any(np.isnan(values).any() for values in (*graded_per_query(sim, rel), *graded_per_query(sim.T, rel.T)))


def test_ties_go_to_the_lower_index_and_lie_in_the_possible_range() -> None:
    want = NUMBERS["ties"]
    for name, (v2t, t2v, _) in both_directions(ARRAYS["ties_sim"], ARRAYS["ties_rel"]).items():
        assert v2t / 100 == pytest.approx(want["lower_index_first"][f"{name}_v2t"], abs=1e-12)
        assert t2v / 100 == pytest.approx(want["lower_index_first"][f"{name}_t2v"], abs=1e-12)
        if name == "mAP":
            assert want["worst_case"]["mAP_v2t"] < v2t / 100 < want["best_case"]["mAP_v2t"]


def test_published_self_check_of_ndcg() -> None:
    sim = [[1, 0.7, 0.4, 0], [0.3, 0.9, 0.6, 0.1], [0.2, 0.5, 0.8, 0.4]]
    rel = [[1, 0.5, 0.25, 0], [0, 1, 0.4, 0], [0.5, 0.3, 1, 0]]
    assert np.mean(graded_per_query(sim, rel)[1]) == pytest.approx(0.9371789900735429, abs=1e-12)


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


def test_queries_without_a_relevant_item_are_left_out() -> None:
    sim, rel = some_case(3, ties=False)
    rel[2], rel[5] = 0, 0.5  # nothing relevant; nothing fully relevant
    rel[:, 1] = 0
    ap, gain = graded_per_query(sim, rel)
    assert np.isnan(ap[[2, 5]]).all()
    assert np.isnan(gain[2])
    assert gain[5] > 0
    assert percent([ap], None).value == pytest.approx(100 * np.nanmean(ap))


def test_the_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sim, rel = some_case(7, (29, 11), ties=True)
    whole = graded_per_query(sim, rel)
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 35)
    np.testing.assert_array_equal(graded_per_query(sim, rel), whole)


def test_memory_does_not_grow_with_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 2**14)
    # Whether the blocks of two threads meet is a matter of chance.
    monkeypatch.setattr(metrics, "THREADS", 1)

    def peak(rows: int) -> int:
        sim, rel = (array.astype(np.float32) for array in some_case(0, (rows, 400), ties=False))
        tracemalloc.start()
        both_directions(sim, rel)
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
    scores = both_directions(rel, rel)
    assert scores["mAP"][2] == 100
    assert scores["nDCG"][2] == pytest.approx(100, abs=1e-10)
    assert both_directions(-rel, rel)["mAP"][2] < 50


def test_chance_of_graded_metrics_is_the_mean_over_all_orders() -> None:
    rel = np.array([[1, 0.5, 0, 1, 0, 0.25], [0, 1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0]])
    orders = np.array(list(itertools.permutations(range(6))), dtype=np.float64)
    per_order = [graded_per_query(np.tile(order, (3, 1)), rel) for order in orders]
    ap, gain = (np.mean([entry[i] for entry in per_order], axis=0) for i in (0, 1))
    np.testing.assert_allclose(expected_graded_per_query(rel), [ap, gain], atol=1e-12)
    assert [np.isnan(expected_graded_per_query(each)[0]).sum() for each in (rel, rel.T)] == [1, 3]


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
        assert 100 * np.mean(ranks <= k) == pytest.approx(want[f"R{k}"])
    assert median(ranks, None).value == want["MedianR"]


def test_rank_of_the_first_relevant_item() -> None:
    sim = np.array([[3, 3, 1, 0], [3, 3, 1, 0], [0, 1, 2, 3], [1, 1, 1, 1], [-5, -6, -7, -8]], dtype=np.float32)
    relevant = np.array([[0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=bool)
    ranks = first_relevant_rank(sim, relevant)
    assert ranks.tolist() == [2, 1, 2, 0, 4]
    assert median(ranks, None).value == 2, "the query without a relevant item is left out"


def test_topk_accuracy_equals_the_reference_numbers() -> None:
    scores, labels = ARRAYS["acc_output"], ARRAYS["acc_target"]
    ranks = label_ranks(scores, labels)
    assert [100 * np.mean(ranks <= k) for k in (1, 5)] == pytest.approx(NUMBERS["accuracy_top1_top5"])


def test_topk_accuracy_with_ties_follows_the_lower_index() -> None:
    scores, labels = ARRAYS["acc_output_ties"], ARRAYS["acc_target"]
    order = [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i)) for row in scores]
    for k in (1, 5):
        want = np.mean([label in best[:k] for best, label in zip(order, labels, strict=True)])
        assert np.mean(label_ranks(scores, labels) <= k) == pytest.approx(want)


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
    right = multiple_choice_right(ARRAYS[scores], ARRAYS["mcq_labels"])
    for kind, name in ((1, "Inter-video"), (2, "Intra-video")):
        assert 100 * right[ARRAYS["mcq_types"] == kind].mean() == pytest.approx(NUMBERS[key][name])


def test_multilabel_average_precision_equals_its_definition() -> None:
    rng = np.random.default_rng(4)
    scores, labels = np.round(rng.standard_normal((40, 6)), 1), rng.random((40, 6)) < 0.2
    labels[:, 3] = False
    labelled = labels.any(axis=1)
    assert not labelled.all()
    got = multilabel_average_precision(scores, labels)
    want = [
        ap_by_definition(s, label.astype(float))
        for s, label in zip(scores[labelled].T, labels[labelled].T, strict=True)
    ]
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert np.isnan(got[3])
    assert np.nanmean(multilabel_average_precision(labels * 1.0, labels)) == 1
    # A video without any class ranks behind all others, however high its scores are.
    scores[~labelled] = 100
    np.testing.assert_array_equal(multilabel_average_precision(scores, labels), got)


def test_multiple_choice_with_fewer_choices() -> None:
    scores = np.array([[-3, -2, -np.inf], [0.1, 0.2, 0.3]])
    assert multiple_choice_right(scores, [1, 0]).tolist() == [True, False]


def test_scores_that_cannot_be_ranked_are_refused() -> None:
    sim, rel = some_case(0, ties=False)
    for bad in (np.nan, np.inf):
        broken = sim.copy()
        broken[4, 4] = bad
        with pytest.raises(UserError, match="not finite"):
            graded_per_query(broken, rel)
        with pytest.raises(UserError, match="not finite"):
            first_relevant_rank(broken, rel == 1)
        with pytest.raises(UserError, match="not finite"):
            multiple_choice_right(broken, np.zeros(len(broken), dtype=int))


def test_shapes_and_labels_that_do_not_fit_are_refused() -> None:
    sim, rel = some_case(0, ties=False)
    with pytest.raises(UserError, match=r"\[13, 17\] and relevancies \[17, 13\]"):
        graded_per_query(sim, rel.T)
    with pytest.raises(UserError, match="labels run from 0 to 17, but there are 17 columns"):
        label_ranks(sim, np.array([0] * 12 + [17]))
    with pytest.raises(UserError, match="one label per row"):
        label_ranks(sim, np.zeros(3, dtype=int))
    with pytest.raises(UserError, match="not among its choices"):
        multiple_choice_right(np.array([[1.0, -np.inf]]), [1])


def test_intervals_hold_the_true_value_about_as_often_as_their_level() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = percent([rng.random(80) < 0.3], None).interval()
        inside += low <= 30 <= high
    assert 178 <= inside <= 199


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
