"""A robot for tests of everything but physics: a dot on a line; its target is drawn, and not in proprioception."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from egohod.robot.simulation import Demonstration, Observation, Scene

SIZE = 40
SPEED, NEAR = 0.1, 0.06
SCENE = Scene("toy", "reach", SIZE, 1, 30, 0.0, None)


class ToySimulators:
    """What :class:`egohod.robot.simulation.Simulators` does, in this process."""

    def __init__(self, scene: Scene = SCENE, count: int = 1, slots: int = 64) -> None:
        self.scene, self.slots = scene, slots
        self.places: dict[int, tuple[float, float]] = {}
        self.seeds: list[int] = []
        self.demonstrated: list[int] = []
        self.steps: list[int] = []  # of every episode
        self.episodes: dict[int, int] = {}

    def __enter__(self) -> ToySimulators:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, work: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        assert all(slot < self.slots for slot in work)
        return {slot: getattr(self, name)(slot, *arguments) for slot, (name, *arguments) in work.items()}

    def reset(self, slot: int, seed: int, draw: bool) -> Observation:
        self.seeds.append(seed)
        self.episodes[slot] = len(self.steps)
        self.steps.append(0)
        hand, target = np.random.default_rng(seed).uniform([0.4, 0.0], [0.6, 1.0])
        self.places[slot] = hand, target
        return self.observe(slot, draw)._replace(success=False)

    def step(self, slot: int, action: np.ndarray, draw: bool) -> Observation:
        hand, target = self.places[slot]
        if not np.isfinite(action).all():
            return self.observe(slot, draw)._replace(success=False, diverged=True)
        self.steps[self.episodes[slot]] += 1
        self.places[slot] = float(np.clip(hand + SPEED * np.clip(action[0], -1, 1), 0, 1)), target
        return self.observe(slot, draw)

    def demonstrate(self, slot: int, number: int) -> Demonstration | None:
        self.demonstrated.append(number)
        if number % 5 == 4:  # an expert that sometimes fails
            return None
        seen, rows = self.reset(slot, number, True), []
        for _ in range(12):
            hand, target = self.places[slot]
            action = np.clip([(target - hand) / SPEED], -1, 1).astype(np.float32)
            rows.append((seen.proprioception, seen.state, seen.frame, action))
            seen = self.step(slot, action, True)
        return Demonstration(*map(np.stack, zip(*rows, strict=True)))  # type: ignore[arg-type]

    def observe(self, slot: int, draw: bool) -> Observation:
        hand, target = self.places[slot]
        frame = np.zeros((SIZE, SIZE, 3), np.uint8)
        for place, rows in ((hand, slice(0, 20)), (target, slice(20, 40))):
            middle = round(place * (SIZE - 1))
            frame[rows, max(0, middle - 2) : middle + 3] = 255
        state = np.array([hand, target], np.float32)
        return Observation(state[:1], state, frame if draw else None, abs(hand - target) < NEAR, False)
