"""Meta-World v3 (MIT) as a suite: its tasks, and scripted experts that demonstrate them. Needs no PyTorch.

What its interface hides: ``reset(seed)`` ignores the seed; the observation after a reset is of the objects' places in
the episode before; a cached bound clips the goal to zero; the goal is drawn into the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egohod.errors import UserError, nearest
from egohod.robot.simulation import Scene


class Environment:
    """A task by its name without version, e.g. ``drawer-open``; see :class:`egohod.robot.simulation.Task`."""

    # Over the robot's right shoulder, on the whole table: the suite's own cameras are upside down or too close.
    camera: Mapping[str, Any] = {"lookat": (0.0, 0.65, 0.1), "distance": 1.3, "azimuth": 145.0, "elevation": -25.0}

    def __init__(self, scene: Scene) -> None:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        names = [name.removesuffix("-v3") for name in ALL_V3_ENVIRONMENTS]
        if scene.task not in names:
            raise UserError(f"scene.tasks: Meta-World has no task '{scene.task}'{nearest(scene.task, names)}")
        self._forward = mujoco.mj_forward
        self._env: Any = ALL_V3_ENVIRONMENTS[f"{scene.task}-v3"]()
        self._expert = ENV_POLICY_MAP[f"{scene.task}-v3"]
        # Its own seed draws objects and goal, instead of a fixed list of tasks; the goal is part of the full state.
        self._env._set_task_called, self._env.seeded_rand_vec = True, True
        self._env._freeze_rand_vec = self._env._partially_observable = False
        self._env.__dict__.pop("sawyer_observation_space", None)  # cached with bounds of zero for the goal
        self.model, self.data = self._env.model, self._env.data
        self._state: NDArray[np.float64] = np.zeros(0)

    def reset(self, seed: int) -> None:
        """See the protocol."""
        self._env.seed(seed)
        self._env.reset()
        # Objects were moved in the model; only this computes where they are.
        self._forward(self.model, self.data)
        self._env._prev_obs = self._env._get_curr_obs_combined_no_goal()
        self._state = self._env._get_obs()

    def step(self, action: NDArray[np.float32]) -> bool:
        """See the protocol."""
        self._state, _, _, _, info = self._env.step(action)
        return bool(info["success"])

    def observe(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Position of the hand and opening of the gripper [4]; also objects, the same of the step before, goal [39]."""
        return self._state[:4], self._state

    def demonstration(self, number: int) -> Iterator[NDArray[Any]]:
        """The scripted expert's actions, without end."""
        self.reset(number)
        expert = self._expert()  # some have a memory
        while True:
            yield expert.get_action(self._state)
