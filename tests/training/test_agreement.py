"""Nodes of different code or configuration do not train together; a slow process is named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from egohod.errors import UserError
from egohod.training.checkpoint import Checkpoint
from egohod.training.telemetry import Share, Stragglers
from egohod.training.train import _require_same
from tests.ranks import pair

HOST = "node-b"


def shares(*own: tuple[float, float]) -> list[Share]:
    """Of processes that wait and compute so many seconds in each of ten steps."""
    return [
        Share(f"node-{rank}", 10, 20.0, {"data": 10 * waited, "features": 10 * forward, "backward": 9.0}, 1.0, 0)
        for rank, (waited, forward) in enumerate(own)
    ]


def test_a_process_that_is_late_again_and_again_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    watch = Stragglers(ratio=1.5, windows=3)
    even, late = shares((0.1, 0.5), (0.1, 0.5), (0.1, 0.5)), shares((0.1, 0.5), (0.1, 0.5), (0.9, 0.5))
    for window in (late, late, even, late, late):
        watch.update(window)
    assert not caplog.records
    summary = watch.update(late)
    assert "rank 2 on node-2 is the slowest for 3 windows: 1.40 s" in caplog.text
    assert "waiting for clips" in caplog.text
    assert summary["slowest_rank"] == 2
    assert summary["compute_seconds_median"] == pytest.approx(0.6)
    assert summary["compute_seconds_max"] == pytest.approx(1.4)


def test_processes_that_see_other_checkpoints_do_not_train(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    _require_same(None, folder, pair((HOST, (0, {}))))
    mine = Checkpoint(folder / "step-00000500", 500, {}, {}, {"sha256": {"model.safetensors": "ab"}})
    _require_same(mine, folder, pair((HOST, (500, {"model.safetensors": "ab"}))))
    for other in ((0, {}), (500, {"model.safetensors": "cd"})):
        with pytest.raises(UserError, match=r"do not see the same checkpoint .*rank 1 on node-b: step \d"):
            _require_same(mine, folder, pair((HOST, other)))
