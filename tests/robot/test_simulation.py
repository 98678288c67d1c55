"""Simulated robots for real: physics, drawing, processes; skipped without the packages of the extra [robot]."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import egohod
from egohod.errors import UserError
from egohod.robot.kitchen import read_recordings
from egohod.robot.simulation import Scene, Simulators
from tests.support import ROOT, Command, environment

WITH_METAWORLD = importlib.util.find_spec("metaworld") is not None
WITH_KITCHEN = importlib.util.find_spec("gymnasium_robotics") is not None
WITH_H5PY = importlib.util.find_spec("h5py") is not None
SCENE = Scene("metaworld", "drawer-open", 64, 2, 150, 0.0, None)
STILL = np.zeros(4, np.float32)
# The simulators may be in a folder of their own (.ci/run), which further processes then need too.
PATHS = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}

metaworld = pytest.mark.skipif(not WITH_METAWORLD, reason="needs metaworld: pip install '.[robot]'")
kitchen = pytest.mark.skipif(not (WITH_KITCHEN and WITH_H5PY), reason="needs gymnasium-robotics and h5py")


@pytest.fixture(scope="module")
def simulators() -> Iterator[Simulators]:
    try:
        with Simulators(SCENE, 2, 4) as started:
            yield started
    except UserError as error:
        # Any other error is a fault of the simulators.
        if "cannot draw" not in str(error):
            raise
        pytest.skip(f"no renderer: {error}")


def equal(one: Any, other: Any) -> bool:
    return all(np.array_equal(first, second) for first, second in zip(one, other, strict=True))


@metaworld
def test_an_episode_follows_from_its_seed_in_every_process(simulators: Simulators) -> None:
    first = simulators.call(dict.fromkeys(range(4), ("reset", 7, True)))
    # The slots of one process share a renderer, those of two do not.
    assert equal(first[0], first[1])
    assert equal(first[0], first[2])
    push = np.array([1, 0.5, -0.5, 0], np.float32)
    for _ in range(3):
        after = simulators.call(dict.fromkeys((0, 1), ("step", push, True)))
    assert equal(after[0], after[1])
    assert not np.array_equal(after[0].frame, first[0].frame)
    # Nothing of the episode before is left, and another seed is another start, which the state and the picture show.
    again = simulators.call({0: ("reset", 7, True), 1: ("reset", 8, True)})
    assert equal(again[0], first[0])
    assert not np.array_equal(again[1].state, first[0].state)
    assert not np.array_equal(again[1].frame, first[0].frame)
    assert first[0].proprioception.shape == (4,)
    assert first[0].state.shape == (39,)
    assert first[0].state[-3:].any(), "the goal is part of the full state"
    assert simulators.call({3: ("reset", 7, False)})[3].frame is None


@metaworld
def test_the_expert_succeeds_and_its_demonstration_can_be_played_again(simulators: Simulators) -> None:
    one, two = simulators.call({0: ("demonstrate", 3), 1: ("demonstrate", 3)}).values()
    assert equal(one, two)
    steps = len(one.actions)
    assert one.frames.shape == (steps, 64, 64, 3)
    assert np.abs(one.actions).max() <= 1
    # Drawn before the action that is recorded with it.
    seen = simulators.call({0: ("reset", 3, True)})[0]
    for step, action in enumerate(one.actions):
        np.testing.assert_array_equal(seen.state, one.state[step])
        np.testing.assert_array_equal(seen.frame, one.frames[step])
        seen = simulators.call({0: ("step", action, True)})[0]
    assert seen.success


@metaworld
def test_noise_moves_the_robot_and_not_what_is_learned(simulators: Simulators) -> None:
    with Simulators(SCENE._replace(noise=0.3), 1, 1) as noisy:
        (one,) = noisy.call({0: ("demonstrate", 3)}).values()
    (clean,) = simulators.call({0: ("demonstrate", 3)}).values()
    np.testing.assert_array_equal(one.actions[0], clean.actions[0])
    assert not np.array_equal(one.state[1], clean.state[1])


@metaworld
def test_an_action_that_is_not_finite_ends_the_episode(simulators: Simulators) -> None:
    simulators.call({0: ("reset", 1, False)})
    after = simulators.call({0: ("step", STILL + np.nan, False)})[0]
    assert (after.success, after.diverged) == (False, True)
    assert not simulators.call({0: ("reset", 1, False)})[0].diverged


@metaworld
def test_a_simulator_that_dies_is_reported() -> None:
    with Simulators(SCENE, 1, 1) as simulators:
        os.kill(simulators._children[0][0].pid, signal.SIGKILL)
        with pytest.raises(ConnectionError, match=r"a simulator of drawer-open ended with exit code -9 .* to resume"):
            simulators.call({0: ("reset", 0, False)})


@metaworld
def test_simulators_end_with_a_parent_that_is_killed() -> None:
    lines = ["import os", "from tests.robot.test_simulation import SCENE, Simulators"]
    lines += ["simulators = Simulators(SCENE, 2, 2).__enter__()"]
    lines += ["print(*(child.pid for child, _ in simulators._children), flush=True)", "os.kill(os.getpid(), 9)"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=ROOT, env=environment(**PATHS), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(done.stdout.split()) == 2
    deadline = time.monotonic() + 30
    while alive := [pid for pid in done.stdout.split() if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


@metaworld
@pytest.mark.parametrize(
    ("task", "backend", "message"),
    [
        ("drawer-opne", "osmesa", r"Meta-World has no task 'drawer-opne' \(did you mean 'drawer-open'\?\)"),
        ("drawer-open", "glfw", r"cannot draw with MUJOCO_GL=glfw .*apt-get install libosmesa6"),
    ],
)
def test_what_cannot_be_simulated_is_explained(
    task: str, backend: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUJOCO_GL", backend)
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(UserError, match=message), Simulators(SCENE._replace(task=task), 1, 1):
        pass


def test_a_simulator_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mujoco.py").write_text("raise ModuleNotFoundError(\"No module named 'mujoco'\", name='mujoco')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    message = r"the simulator of metaworld is not installed \(No module named 'mujoco'\): pip install '\.\[robot\]'"
    with pytest.raises(UserError, match=message), Simulators(SCENE, 1, 1):
        pass


@metaworld
@pytest.mark.ci
def test_a_smoke_run_of_the_program(tmp_path: Path, program: Command) -> None:
    torch.manual_seed(1)
    torch.save(egohod.create_model("DEMO", num_frames=4).state_dict(), tmp_path / "weights.pt")
    command: list[object] = ["tools/robot.py", "--checkpoint", tmp_path / "weights.pt", "--output", tmp_path / "out"]
    command += ["--model", "DEMO", "scene.tasks=[drawer-open]", "demonstrations=[3]", "scene.image_size=64"]
    command += ["policy.steps=200", "policy.checkpoint_every=100", "policy.checkpoints=1", "seeds=2", "rollouts=2"]
    command += ["features.frames=2", "scene.horizon=100", "slots=4", f"cache={tmp_path}/cache", "device=cpu"]
    done = program(*command, **PATHS)
    assert done.returncode == 0, done.stderr
    assert "| 3 | full state |" in done.stdout
    results = (tmp_path / "out" / "results.json").read_bytes()
    assert "<video" in (tmp_path / "out" / "report.html").read_text()
    # From the start, with what is on disk, and with nothing: the same numbers.
    assert program(*command, **PATHS).stdout == done.stdout
    command[-2] = f"cache={tmp_path}/cache2"
    command[4] = tmp_path / "again"
    assert program(*command, **PATHS).stdout == done.stdout
    assert (tmp_path / "again" / "results.json").read_bytes().replace(b"cache2", b"cache") == results


# --------------------------------------------------------------------------------------------------
# Franka Kitchen
# --------------------------------------------------------------------------------------------------


# Roughly the suite's start: the robot's joints, then those of the objects, of which the microwave's door is number 22.
START = [0.148, -1.768, 1.844, -2.477, 0.26, 0.713, 1.595, 0.048, 0.037, *[0.0] * 14]
START = [*START, -0.269, 0.35, 1.619, 1.006, 0.004, -0.007, 0.0]
DOOR, OPEN, STEPS = 22, -0.75, 12


def positions() -> np.ndarray:
    """Joint positions of an episode in which the door of the microwave opens."""
    rows = np.tile(START, (STEPS, 1))
    rows[:, DOOR] = np.linspace(0, OPEN, STEPS)
    return rows


def write(path: Path, layout: str, episodes: int = 3) -> Path:
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    rows = positions()
    with h5py.File(path, "w") as file:
        if layout == "d4rl":
            file["observations"] = np.tile(np.concatenate((rows, rows), axis=1), (episodes, 1))
            file["actions"] = np.zeros((episodes * STEPS, 9), np.float32)
            file["terminals"] = np.arange(episodes * STEPS) % STEPS == STEPS - 1
            file["timeouts"] = np.zeros(episodes * STEPS, bool)
        else:
            for number in range(episodes):
                still = np.zeros((STEPS + 1, 9)), np.zeros((STEPS + 1, 20))
                longer = np.concatenate((rows, rows[-1:]))
                seen = np.concatenate((longer[:, :9], still[0], longer[:, 9:], still[1]), axis=1)
                file[f"episode_{number}/observations/observation"] = seen
                file[f"episode_{number}/actions"] = np.full((STEPS, 9), number / 100, np.float32)
    return path


@pytest.mark.parametrize("layout", ["d4rl", "minari"])
def test_recordings_are_read_in_both_layouts(tmp_path: Path, layout: str) -> None:
    episodes = read_recordings(str(write(tmp_path / "file.hdf5", layout, episodes=12)))
    assert len(episodes) == 12
    for number, each in enumerate(episodes):
        np.testing.assert_allclose(each.positions, positions())
        assert each.velocities.shape == (STEPS, 29)
        np.testing.assert_allclose(each.actions, number / 100 if layout == "minari" else 0)


def test_a_file_that_holds_no_recordings_is_named(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    (tmp_path / "text.hdf5").write_text("no HDF5")
    with h5py.File(tmp_path / "empty.hdf5", "w"):
        pass
    with h5py.File(write(tmp_path / "short.hdf5", "d4rl"), "a") as file:
        del file["actions"]
        file["actions"] = np.zeros((5, 9))
    with h5py.File(write(tmp_path / "nan.hdf5", "minari"), "a") as file:
        file["episode_1/observations/observation"][0, 0] = np.nan
    for name, reason in (("text", ""), ("empty", "no episode"), ("short", "5 actions"), ("nan", "episode 1 has")):
        with pytest.raises(UserError, match=rf"{name}\.hdf5: no recordings of Franka Kitchen .*{reason}"):
            read_recordings(str(tmp_path / f"{name}.hdf5"))


@kitchen
def test_recorded_episodes_are_drawn_and_tried(tmp_path: Path) -> None:
    path = write(tmp_path / "file.hdf5", "minari")
    with Simulators(Scene("kitchen", "microwave", 64, 1, 40, 0.0, str(path)), 1, 2) as simulators:
        one, beyond = simulators.call({0: ("demonstrate", 1), 1: ("demonstrate", 3)}).values()
        assert beyond is None
        np.testing.assert_allclose(one.state[:, :30], positions()[: len(one.state)], atol=1e-6)
        assert not np.array_equal(one.frames[0], one.frames[-1]), "the door moves"
        first = simulators.call(dict.fromkeys(range(2), ("reset", 5, False)))
        assert equal(first[0][:2], first[1][:2])
        after = simulators.call({slot: ("step", np.ones(9, np.float32), False) for slot in range(2)})
        assert equal(after[0][:2], after[1][:2])
        assert not after[0].success
    with (
        pytest.raises(UserError, match=r"no task 'microwav' \(did you mean 'microwave'\?\)"),
        Simulators(Scene("kitchen", "microwav", 64, 1, 40, 0.0, str(path)), 1, 1),
    ):
        pass
