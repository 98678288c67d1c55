"""Console table, results.json with its details, and the rows for a README."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import ALONE, FRAMES, config, made, small_model

from egohod.evaluation.embed import EmbedReport, fingerprint
from egohod.evaluation.metrics import RESAMPLES, Score
from egohod.evaluation.results import RESULTS_FILE, markdown, table, write_results
from egohod.evaluation.runner import BenchmarkResult


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


def test_results_hold_every_number_with_all_it_depends_on(formats: Path, tmp_path: Path) -> None:
    cfg, bench = config(), made(formats, "ek100_cls", controls=["freeze"])
    measured = bench.measure(small_model())
    checkpoint = {"path": "run", "sha256": fingerprint(small_model())}
    write_results(
        tmp_path, cfg, ALONE, [(bench, measured)], checkpoint=checkpoint, also={"val/x": 1.0}, published="EgoVideo-L"
    )
    results = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert results["checkpoint"] == checkpoint
    assert len(results["config"]["sha256"]) == 64
    assert {"egohod", "torch", "python"} <= results["versions"].keys()
    assert results["metrics"]["val/x"] == 1
    each = results["benchmarks"]["ek100_cls"]
    assert each["protocol"]["name"] == "clean"
    assert each["protocol"]["size"] == bench.dataset.size
    top1 = each["metrics"]["action_top1"]
    assert top1["interval"][0] <= top1["value"] <= top1["interval"][1]
    assert top1["published"] == 24.0
    freeze = top1["controls"]["freeze"]
    assert freeze["drop"] == pytest.approx(top1["value"] - freeze["value"])
    assert freeze["drop_interval"][0] <= freeze["drop"] <= freeze["drop_interval"][1]
    sidecar = json.loads((tmp_path / each["details"]).read_text())
    assert sidecar["clips"]["id"] == bench.dataset.clips.ids
    assert sidecar["tables"][0]["kind"] == "classification"


def test_a_row_says_what_is_partial_and_names_no_number_that_there_is_not() -> None:
    metrics = {"order|of": {"value": float("nan"), "interval": [float("nan")] * 2}}
    protocol = {"name": "lavila_10x3", "frames": 16, "size": 224, "windows": 10, "crops": 3}
    each = {"protocol": protocol, "partial": True, "evaluated": 900, "clips": 1000, "metrics": metrics}
    table = markdown({"config": {"model": "B"}, "checkpoint": {"sha256": "ab" * 32}, "benchmarks": {"mine": each}})
    assert table.splitlines()[2] == (
        "| mine | order\\|of - | lavila_10x3: 16 frames, 224 px, 30 views | **partial**: 900 of 1,000 "
        "| B `abababababab` |"
    )


def test_a_readme_gets_a_row_for_each_benchmark(evaluated: Path) -> None:
    results = json.loads((evaluated / "results.json").read_text())
    header, rule, *rows = (evaluated / "results.md").read_text().splitlines()
    assert {line.count("|") for line in (header, rule, *rows)} == {6}
    cells = {(row := [cell.strip() for cell in line.strip("|").split("|")])[0]: row[1:] for line in rows}
    assert list(cells) == list(results["benchmarks"])
    numbers, protocol, clips, weights = cells["ek100_mir"]
    measured = [results["benchmarks"]["ek100_mir"]["metrics"][name] for name in ("map", "ndcg")]
    assert numbers == ", ".join(
        f"{title} {metric['value']:.1f} [{metric['interval'][0]:.1f}, {metric['interval'][1]:.1f}]"
        for title, metric in zip(("mAP", "nDCG"), measured, strict=True)
    )
    assert protocol == f"clean: {FRAMES} frames, 40 px"
    assert clips == str(results["benchmarks"]["ek100_mir"]["clips"])
    assert weights == "DEMO `0f0f0f0f0f0f`"
    assert "intra " in cells["egomcq"][0]
