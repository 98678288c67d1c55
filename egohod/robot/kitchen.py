"""Franka Kitchen of gymnasium-robotics as a suite, with demonstrations recorded by people. Needs no PyTorch.

They are an HDF5 file in one of two layouts, which the user has on disk (scene.recordings):

    Minari   D4RL/kitchen/*/data/main_data.hdf5      episode_0/observations/observation [T + 1, 59]
                                                     episode_0/actions [T, 9]
    D4RL     kitchen_microwave_*.hdf5                observations [N, 60]  actions [N, 9]  terminals  timeouts [N]

Positions of all joints are the first 30 numbers of D4RL; of Minari the robot's 9 and, behind its velocities, 21 more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from egohod.errors import UserError, nearest
from egohod.robot.simulation import INSTALL, Scene

# Joints of the robot and of everything, and velocities of everything.
_ROBOT, _POSITIONS, _VELOCITIES = 9, 30, 29
_MINARI_COLUMNS = 59


class Recording(NamedTuple):
    """One recorded episode: joint positions [T, 30] and velocities [T, 29] before each action [T, 9], from -1 to 1."""

    positions: NDArray[np.float64]
    velocities: NDArray[np.float64]
    actions: NDArray[np.float32]


def read_recordings(path: str) -> list[Recording]:
    """The episodes of a file of Minari or D4RL, in its order.

    Raises :class:`UserError` naming the file if it is of neither layout, or h5py is not installed.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading HDF5 needs h5py: {INSTALL}") from error

    episodes = []
    try:
        with h5py.File(path, "r") as file:
            if "observations" in file:
                seen, actions = file["observations"][()], file["actions"][()]
                ends = np.asarray(file["terminals"][()], bool) | np.asarray(file["timeouts"][()], bool)
                if not len(seen) == len(actions) == len(ends):
                    raise ValueError(f"{len(seen)} observations, {len(actions)} actions and {len(ends)} ends")
                borders = [0, *(np.flatnonzero(ends) + 1).tolist(), len(seen)]
                for start, end in itertools.pairwise(borders):
                    still = np.zeros((end - start, _VELOCITIES))  # not recorded
                    if end > start:
                        episodes.append(Recording(seen[start:end, :_POSITIONS], still, actions[start:end]))
            else:
                # By number: HDF5 sorts episode_10 in front of episode_2.
                for name in sorted(file, key=lambda name: int(name.removeprefix("episode_"))):
                    actions = file[name]["actions"][()]
                    seen = file[name]["observations"]["observation"][: len(actions)]
                    if seen.shape != (len(actions), _MINARI_COLUMNS):
                        raise ValueError(f"{name} has observations of the shape {seen.shape}")
                    hand, objects = 2 * _ROBOT, _ROBOT + _POSITIONS
                    positions = np.concatenate((seen[:, :_ROBOT], seen[:, hand:objects]), axis=1)
                    velocities = np.concatenate((seen[:, _ROBOT:hand], seen[:, objects:]), axis=1)
                    episodes.append(Recording(positions, velocities, actions))
        for number, each in enumerate(episodes):
            if each.positions.shape[1:] != (_POSITIONS,) or each.actions.shape[1:] != (_ROBOT,):
                raise ValueError(f"episode {number} has actions of the shape {each.actions.shape}")
            if not all(np.isfinite(part).all() for part in each):
                raise ValueError(f"episode {number} has numbers that are not finite")
        if not episodes:
            raise ValueError("no episode")
    except Exception as error:  # HDF5 raises any kind for a damaged file
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no recordings of Franka Kitchen by Minari or D4RL: {reason}") from error
    return episodes


class Environment:
    """A task by its name, e.g. ``microwave``; see :class:`egohod.robot.simulation.Task`."""

    # The suite's own.
    camera: Mapping[str, Any] = {"lookat": (-0.2, 0.5, 2.0), "distance": 2.2, "azimuth": 70.0, "elevation": -35.0}

    def __init__(self, scene: Scene) -> None:
        from gymnasium_robotics.envs.franka_kitchen import kitchen_env as suite

        names = list(suite.OBS_ELEMENT_GOALS)
        if scene.task not in names:
            raise UserError(f"scene.tasks: Franka Kitchen has no task '{scene.task}'{nearest(scene.task, names)}")
        assert scene.recordings is not None
        self._recordings = read_recordings(scene.recordings)
        self._env: Any = suite.KitchenEnv(tasks_to_complete=[scene.task]).robot_env
        self._places, self._goal = suite.OBS_ELEMENT_INDICES[scene.task], suite.OBS_ELEMENT_GOALS[scene.task]
        self._near = suite.BONUS_THRESH
        self.model, self.data = self._env.model, self._env.data

    def reset(self, seed: int) -> None:
        """Start where a recorded episode does, drawn by the seed, as does the noise of the robot's sensors."""
        start = self._recordings[np.random.default_rng(seed).integers(len(self._recordings))]
        self._env.reset(seed=seed)
        self._set(start, 0)

    def step(self, action: NDArray[np.float32]) -> bool:
        """See the protocol."""
        self._env.step(action)
        return bool(np.linalg.norm(self.data.qpos[self._places] - self._goal) < self._near)

    def observe(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Positions of the robot's joints [9]; positions and velocities of all joints [59]."""
        return self.data.qpos[:_ROBOT].copy(), np.concatenate((self.data.qpos, self.data.qvel))

    def demonstration(self, number: int) -> Iterator[NDArray[Any]]:
        """The recorded states and actions of an episode. Replayed actions would drift from what was recorded."""
        self._env.reset(seed=number)
        if number < len(self._recordings):
            for step, action in enumerate(self._recordings[number].actions):
                self._set(self._recordings[number], step)
                yield action

    def _set(self, recording: Recording, step: int) -> None:
        self._env.set_state(recording.positions[step], recording.velocities[step])
        # Actions are velocities, which its controller adds to the last position that it saw.
        self._env._last_robot_qpos = recording.positions[step, :_ROBOT].copy()
