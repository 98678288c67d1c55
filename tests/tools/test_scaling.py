"""docs/scaling.md has the tables that tools/scaling.py prints, and describes its arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
from scaling import LINK, RECIPES, cost, plan, table

ROOT = Path(__file__).parents[2]


@pytest.mark.ci
def test_the_page_holds_what_the_tool_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "scaling.md").read_text()
    for recipe in RECIPES:
        assert table(recipe, 312e12, 0.4) in page, recipe.name


def test_a_plan_matches_a_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-B/16, batch 2,048, on 64 GPUs of 100 TFLOP/s of which half are used."""
    monkeypatch.chdir(ROOT)
    base = RECIPES[0]
    assert cost(base).trained == pytest.approx(149.6e6, rel=0.001)
    # docs/benchmarks.md: what a step of four clips really does.
    assert cost(base).work == pytest.approx(1.860e12 / 4, rel=0.01)
    made = plan(base, 64, 100e12, 0.5)
    assert made.clips_per_second == pytest.approx(50e12 / cost(base).work)
    assert made.per_gpu == 32
    assert made.gathered == 2 * 2 * 2048 * 512 * 4 * 63 / 64
    assert made.reduced == 2 * cost(base).trained * 4 * 63 / 64
    assert made.network_seconds == pytest.approx((made.gathered + made.reduced) / LINK)
    step = max(made.compute_seconds, made.network_seconds)
    assert made.hours == pytest.approx(15 * 4e6 / 2048 * step / 3600)
    assert made.storage == pytest.approx(2048 / step * 1.3e6)
