"""Nodes of different code or configuration do not train together; a slow process is named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.runtime import file_hash
from egohod.training import checkpoint
from egohod.training.checkpoint import CheckpointStore, read
from egohod.training.telemetry import Share, Stragglers
from egohod.training.train import _open_on_all
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
    store = CheckpointStore(tmp_path)
    assert _open_on_all(store, "auto", pair((HOST, "", (0, {})))) is None
    store.save(500, {"w": torch.zeros(2)}, {}, metrics={}, identity={})
    sums = store.newest().manifest["sha256"]  # type: ignore[union-attr]
    # The other process is on another node, which has read it, or on this one, which leaves that to this process.
    for other in ((500, sums), None):
        assert _open_on_all(store, "auto", pair((HOST, "", other))).step == 500  # type: ignore[union-attr]
    for other in ((0, {}), (500, sums | {"model.safetensors": "cd"})):
        with pytest.raises(UserError, match=r"do not see the same checkpoint .*rank 1 on node-b: step \d"):
            _open_on_all(store, "auto", pair((HOST, "", other)))
    with pytest.raises(UserError, match="no permission there"):
        _open_on_all(store, "auto", pair((HOST, "no permission there", (0, {}))))


def test_one_process_of_a_node_reads_a_checkpoint_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others open the same files: neither do they compute checksums, nor look for the newest one that is whole."""

    class Second(Distributed):
        """The second process of the node."""

        def gather_objects(self, value: object) -> list[object]:
            return [(HOST, "", (500, sums)), value]

    store = CheckpointStore(tmp_path)
    path = store.save(500, {"w": torch.arange(3.0)}, {"note": "x"}, metrics={}, identity={})
    sums, computed = read(path).manifest["sha256"], list[Path]()
    monkeypatch.setattr(checkpoint, "file_hash", lambda path: computed.append(path) or file_hash(path))
    for local_rank, count in ((0, 2), (1, 0)):
        computed.clear()
        opened = _open_on_all(store, "auto", Second(1, 2, torch.device("cpu"), "gloo", local_rank=local_rank))
        assert opened is not None
        assert opened.weights["w"].tolist() == [0, 1, 2]
        assert len(computed) == count
