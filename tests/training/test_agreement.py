"""Nodes of different code or configuration do not train together; a slow process is told by name."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import egohod
from egohod import config
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.training import agreement
from egohod.training.agreement import require_agreement, source_hash
from egohod.training.checkpoint import Checkpoint
from egohod.training.loop import _require_same
from egohod.training.telemetry import Lap, Share, Stragglers

HOST = "node-b"


class Pair(Distributed):
    """This process and another one, which said ``other``; collectives of two real processes are in test_ranks.py."""

    other: object = None

    def gather_objects(self, value: object) -> list[object]:
        return [value, self.other]


def pair(other: object) -> Pair:
    made = Pair(0, 2, torch.device("cpu"), "gloo")
    object.__setattr__(made, "other", other)
    return made


def told_by(cfg: config.Config) -> tuple[str, dict[str, object]]:
    """What the other process says when it runs ``cfg``."""
    said: list[tuple[str, dict[str, object]]] = []

    class Listener(Pair):
        def gather_objects(self, value: object) -> list[object]:
            said.append(value)  # type: ignore[arg-type]
            return [value]

    require_agreement(cfg, Listener(0, 1, torch.device("cpu"), None))
    return "node-b", said[0][1]


def test_a_knob_that_differs_is_named_with_the_nodes(tiny_config: Path) -> None:
    mine, other = config.load(tiny_config), config.load(tiny_config, ["train.lr=2e-3"])
    require_agreement(mine, pair(told_by(mine)))
    with pytest.raises(UserError) as caught:
        require_agreement(mine, pair(told_by(other)))
    text = str(caught.value)
    assert "disagree on train.lr: 0.001 on " in text
    assert "0.002 on node-b (rank 1)" in text
    assert text.count("disagree") == 1


def test_videos_may_lie_elsewhere_on_each_node(tiny_config: Path) -> None:
    mine, other = config.load(tiny_config), config.load(tiny_config, ["data.train.demo.root=/local/b"])
    require_agreement(mine, pair(told_by(other)))


def test_code_that_differs_is_noticed(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = config.load(tiny_config)
    other = told_by(mine)
    monkeypatch.setattr(agreement, "source_hash", lambda: "0123456789ab")
    with pytest.raises(UserError, match=r"disagree on the code of egohod: 0123456789ab on .* on node-b"):
        require_agreement(mine, pair(other))


def test_the_hash_of_the_code_follows_every_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "one.py").write_text("x = 1\n")
    assert source_hash(tmp_path / "a") == source_hash(tmp_path / "b")
    (tmp_path / "b" / "part" / "one.py").write_text("x = 2\n")
    assert source_hash(tmp_path / "a") != source_hash(tmp_path / "b")
    assert source_hash() == source_hash(Path(egohod.__file__).parent)


def shares(*own: tuple[float, float]) -> list[Share]:
    """Of processes that wait and compute so many seconds in each of ten steps."""
    return [
        Share(f"node-{rank}", Lap(10, 20.0, 10 * waited, 10 * forward), 1.0, 0)
        for rank, (waited, forward) in enumerate(own)
    ]


def test_a_process_that_is_late_again_and_again_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    watch = Stragglers(ratio=1.5, windows=3)
    even, late = shares((0.1, 0.5), (0.1, 0.5), (0.1, 0.5)), shares((0.1, 0.5), (0.1, 0.5), (0.9, 0.5))
    for window in (late, late, even, late, late):
        watch.update(window)
    assert not caplog.records
    told = watch.update(late)
    assert "rank 2 on node-2 is the slowest for 3 windows: 1.40 s" in caplog.text
    assert "waiting for clips" in caplog.text
    assert told["slowest_rank"] == 2
    assert told["own_seconds_median"] == pytest.approx(0.6)
    assert told["own_seconds_max"] == pytest.approx(1.4)


def test_processes_that_see_other_checkpoints_do_not_train(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    _require_same(None, folder, pair((HOST, (0, {}))))
    mine = Checkpoint(folder / "step-00000500", 500, {}, {}, {"sha256": {"model.safetensors": "ab"}})
    _require_same(mine, folder, pair((HOST, (500, {"model.safetensors": "ab"}))))
    for other in ((0, {}), (500, {"model.safetensors": "cd"})):
        with pytest.raises(UserError, match=r"do not see the same checkpoint .*rank 1 on node-b: step \d"):
            _require_same(mine, folder, pair((HOST, other)))
