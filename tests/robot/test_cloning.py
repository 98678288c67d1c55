"""Policies, windows of frames and rollouts, on a toy robot that needs no simulator."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import egohod
from egohod.errors import UserError
from egohod.evaluation.adapters import SentenceModel
from egohod.robot.cloning import Policies, StateInput, VideoInput, clone, roll_out
from egohod.robot.config import FeaturesConfig, PolicyConfig
from egohod.robot.simulation import Demonstration
from tests.robot.toy import SIZE, ToySimulators

CPU = torch.device("cpu")
# Of episodes in which the toy expert succeeds.
NUMBERS = [0, 1, 2, 3, 5, 6, 7, 8]
SHORT = PolicyConfig(steps=400, checkpoint_every=100, checkpoints=2, width=32)


class Pixels(nn.Module):
    """An encoder whose feature is where the hand and the target are, from 0 to 1, in each frame."""

    size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("version", torch.ones(1))  # by which later runs know it
        self.calls = 0

    def encode_video(self, video: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        self.calls += 1
        columns = video[:, 0].unflatten(2, (2, SIZE // 2)).mean(dim=3)
        columns = columns - columns.amin(dim=-1, keepdim=True)
        return (columns * torch.linspace(0, 1, SIZE)).sum(dim=-1).div(columns.sum(dim=-1)).flatten(1)


def video(tmp_path: Path, model: Any = None, freeze: bool = False, **options: Any) -> VideoInput:
    return VideoInput("video", model or Pixels(), FeaturesConfig(**options), tmp_path, CPU, freeze)


def episode(number: int = 0) -> Demonstration:
    (answer,) = ToySimulators().call({0: ("demonstrate", number)}).values()
    assert answer is not None
    return answer


def test_batch_norm_and_layers_are_pytorchs() -> None:
    x = torch.randn(2, 16, 5)
    policies = Policies.fresh(2, 5, 3, 8, CPU)
    for _ in range(3):
        trained = policies(x, training=True)
    for seed in range(2):
        linear = [nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)]
        for i, layer in enumerate(linear):
            layer.weight.data = policies.weights[2 + 2 * i][seed].detach().T
            layer.bias.data = policies.weights[3 + 2 * i][seed, 0].detach()
        twin = nn.Sequential(nn.BatchNorm1d(5), linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])
        for _ in range(3):
            expected = twin(x[seed])
        torch.testing.assert_close(trained[seed], expected)
        torch.testing.assert_close(policies(x)[seed], twin.eval()(x[seed]))


def test_a_seed_learns_the_same_alone_and_beside_others() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(50, 2)).astype(np.float32)
    config = PolicyConfig(steps=20, checkpoint_every=10, checkpoints=2, width=16)
    one, three = clone(x, y, config, 1), clone(x, y, config, 3)
    torch.testing.assert_close(one(torch.from_numpy(x)[None]), three(torch.from_numpy(x)[None])[[0, 3]])
    # Another seed starts elsewhere, and a later checkpoint is another policy.
    assert not torch.equal(three.weights[2][0], three.weights[2][1])
    assert not torch.equal(three.weights[2][0], three.weights[2][3])


def test_cloning_that_diverges_is_reported() -> None:
    x = np.full((8, 2), np.nan, np.float32)
    with pytest.raises(UserError, match=r"diverged within 1 steps; lower policy.lr=0.001"):
        clone(x, np.zeros((8, 1), np.float32), PolicyConfig(steps=1, checkpoint_every=1, checkpoints=1), 1)


@pytest.mark.parametrize(
    ("freeze", "options"), [(False, {}), (False, {"stride": 2}), (True, {}), (False, {"frames": 1})]
)
def test_windows_of_rollouts_are_those_of_demonstrations(tmp_path: Path, freeze: bool, options: dict[str, int]) -> None:
    demonstration, source = episode(), video(tmp_path, freeze=freeze, **options)
    expected, simulators, rows = source.of_demonstration("toy/0", demonstration), ToySimulators(), []
    rows.append(source.of_rollouts(simulators.call({5: ("reset", 0, True)}), {5})[0])
    for action in demonstration.actions[:-1]:
        rows.append(source.of_rollouts(simulators.call({5: ("step", action, True)}), set())[0])
    np.testing.assert_array_equal(np.stack(rows), expected)


def test_one_frame_hides_motion_and_the_window_shows_it(tmp_path: Path) -> None:
    demonstration = episode()
    frozen = video(tmp_path, freeze=True).of_demonstration("toy/0", demonstration)[:, :-1]
    shown = video(tmp_path).of_demonstration("toy/0", demonstration)[:, :-1]
    oldest, newest = slice(None, 2), slice(-2, None)
    np.testing.assert_array_equal(frozen[:, oldest], frozen[:, newest])
    np.testing.assert_array_equal(shown[3:, oldest], shown[:-3, newest])
    assert not np.array_equal(shown[:, oldest], shown[:, newest])


def test_features_are_computed_once_and_are_the_models_own(tmp_path: Path) -> None:
    first, again = Pixels(), Pixels()
    features = video(tmp_path, first).of_demonstration("toy/0", episode())
    np.testing.assert_array_equal(video(tmp_path, again).of_demonstration("toy/0", episode()), features)
    assert (first.calls, again.calls) == (1, 0)
    # Other weights, another window, other frames.
    other = Pixels()
    other.register_buffer("weight", torch.ones(1))
    for source, key in ((video(tmp_path, other), "toy/0"), (video(tmp_path, again, stride=2), "toy/0")):
        source.of_demonstration(key, episode())
    video(tmp_path, again).of_demonstration("toy/1", episode(1))
    assert (other.calls, again.calls) == (1, 2)
    # Two models without weights may be alike in all that can be seen.
    for row in torch.eye(2):
        alike = SentenceModel(SimpleNamespace(encode_video=lambda frames, row=row: row.expand(len(frames), -1)))
        shown = video(tmp_path, alike).of_demonstration("toy/0", episode())[:, :-1]
        np.testing.assert_array_equal(shown, row.expand(len(shown), -1))
    for path in (tmp_path / "features").rglob("*.npz"):
        path.write_bytes(b"damaged")
    np.testing.assert_array_equal(video(tmp_path, again).of_demonstration("toy/0", episode()), features)


def test_features_that_are_not_finite_name_the_row(tmp_path: Path) -> None:
    model = Pixels()
    model.encode_video = lambda video, normalize: torch.full((len(video), 2), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="features of 'video' are not finite"):
        video(tmp_path, model).of_demonstration("toy/0", episode())


def test_the_grid_is_of_the_last_frames_patches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = egohod.create_model("DEMO", num_frames=4).eval()
    grid = video(tmp_path, model, readout="grid")
    demonstration = episode()
    rows = grid.of_demonstration("toy/0", demonstration)
    assert rows.shape == (len(demonstration.actions), 16 * model.geometry.vision_width + 1)
    # As the tower computes it: the feature of all its tokens is the same.
    tower, hook = model.visual, []
    handle = tower.transformer.register_forward_hook(lambda module, inputs, output: hook.append(output))
    grid.of_demonstration("toy/other", demonstration)
    handle.remove()
    cells = hook[0][:, 1:].unflatten(1, (4, 5, 5))[:, -1]
    expected = nn.functional.adaptive_avg_pool2d(cells.permute(0, 3, 1, 2), 4).flatten(1)
    np.testing.assert_allclose(rows[:, :-1], expected.detach().numpy(), rtol=1e-6)
    with pytest.raises(UserError, match=r"features.readout=grid needs a vision tower of this project"):
        video(tmp_path, Pixels(), readout="grid")


@pytest.fixture
def policies(tmp_path: Path) -> tuple[VideoInput, Policies]:
    source = video(tmp_path)
    episodes = [(f"toy/{number}", episode(number)) for number in NUMBERS]
    x = np.concatenate([source.of_demonstration(*each) for each in episodes])
    return source, clone(x, np.concatenate([each.actions for _, each in episodes]), SHORT, 2)


def test_a_policy_that_sees_the_target_reaches_it(policies: tuple[VideoInput, Policies]) -> None:
    source, learned = policies
    outcome = roll_out(ToySimulators(), learned, source, starts=6, actions=30, slots=4, films=2)  # type: ignore[arg-type]
    assert outcome.success.shape == (4, 6)
    assert outcome.success[2:].mean() >= 0.9
    assert sorted(outcome.films) == [0, 1]
    # From the frame of the start to that of the success.
    assert outcome.films[0].shape[1:] == (SIZE, SIZE, 3)
    assert 2 < len(outcome.films[0]) <= 31
    # It is not in its proprioception.
    blind = StateInput("proprioception", full=False)
    episodes = [episode(number) for number in NUMBERS]
    x, y = (np.concatenate([getattr(each, name) for each in episodes]) for name in ("proprioception", "actions"))
    outcome = roll_out(ToySimulators(), clone(x, y, SHORT, 2), blind, starts=6, actions=30, slots=4)  # type: ignore[arg-type]
    assert outcome.success.mean() < 0.7
    assert not outcome.films


def test_rollouts_are_paired_bounded_and_the_same_again(policies: tuple[VideoInput, Policies]) -> None:
    source, learned = policies
    ended: list[int] = []
    runs = []
    for slots in (3, 3, 50):
        simulators = ToySimulators()
        options: dict[str, Any] = {"starts": 5, "actions": 7, "slots": slots, "on_episode": ended.append}
        runs.append(roll_out(simulators, learned, source, **options).success)  # type: ignore[arg-type]
        assert ended == list(range(1, 21))
        ended.clear()
        # Each policy begins at each start once, and acts at most seven times.
        assert sorted(simulators.seeds) == sorted([1_000_000 + start for start in range(5)] * 4)
        assert max(simulators.steps) <= 7
    np.testing.assert_array_equal(runs[0], runs[1])


def test_a_rollout_that_diverges_is_a_failure(policies: tuple[VideoInput, Policies]) -> None:
    source, learned = policies
    learned.weights[-1][0] = torch.nan  # the bias of the first policy's last layer
    outcome = roll_out(ToySimulators(), learned, source, starts=4, actions=30, slots=4)  # type: ignore[arg-type]
    assert outcome.diverged[0].all()
    assert not outcome.success[0].any()
    assert not outcome.diverged[1:].any()
