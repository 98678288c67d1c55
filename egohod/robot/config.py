"""Settings of the robot benchmark, each with the reason for its default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from egohod.config import load_as
from egohod.knobs import knob, out_of_range, part

SUITES = ("metaworld", "kitchen")


@dataclass
class SceneConfig:
    """What is simulated and drawn; demonstrations on disk are of these values."""

    suite: str = knob("metaworld", "a module of egohod/robot: Meta-World v3 or Franka Kitchen", choices=SUITES)
    # R3M's five.
    tasks: list[str] = knob(
        ["assembly", "bin-picking", "button-press-topdown", "drawer-open", "hammer"],
        "names of the suite's tasks; the default is R3M's selection from Meta-World",
    )
    image_size: int = knob(
        128, "pixels of a drawn frame; models resize it, so that all see the same picture. R3M draws 256", low=32
    )
    repeat: int = knob(
        2, "simulator steps for which an action is held; 3 makes bin-picking's expert fail", low=1, high=10
    )
    # Meta-World ends an episode at 500 steps.
    horizon: int = knob(
        150, "simulator steps of an episode: experts need 60 to 113 (median of a task)", low=10, high=500
    )
    horizons: dict[str, int] = knob({"bin-picking": 250}, "of tasks that need another one, 10 to 500")
    noise: float = knob(
        0.0,
        "standard deviation of noise on the expert's actions, which range from -1 to 1, while it demonstrates: "
        "it shows how to recover (DART). R3M's demonstrations have none",
        low=0,
        high=1,
    )
    recordings: str | None = knob(
        None, "kitchen: an HDF5 file of D4RL or Minari with demonstrations, which this suite has no expert for"
    )


@dataclass
class FeaturesConfig:
    """What the policy sees of the pictures."""

    frames: int = knob(4, "frames of the sliding window that ends at the newest frame", low=1)
    stride: int = knob(1, "actions between two frames of the window", low=1)
    readout: str = knob(
        "embedding",
        "embedding is encode_video's, not normalised, of any model; grid is the last frame's patches of this project's "
        "vision towers, averaged to 4 x 4 cells, which knows where things are",
        choices=("embedding", "grid"),
    )


@dataclass
class PolicyConfig:
    """Behaviour cloning: R3M's network and optimizer, a shorter training run."""

    steps: int = knob(5000, "of training; R3M trains 20,000", low=1)
    batch_size: int = knob(32, "demonstrated steps in a batch, as R3M", low=2)
    lr: float = knob(1e-3, "of Adam, as R3M", above=0)
    width: int = knob(256, "of both hidden layers, as R3M", low=1)
    checkpoint_every: int = knob(1000, "training steps between checkpoints, as R3M", low=1)
    # A policy's success jumps between checkpoints; the best of five would lift a floor of 56 % to 67 %.
    checkpoints: int = knob(
        3, "last checkpoints whose success is averaged; R3M takes the best of all, which is biased upwards", low=1
    )


@dataclass
class RobotConfig:
    """A whole benchmark."""

    scene: SceneConfig = part(SceneConfig)
    features: FeaturesConfig = part(FeaturesConfig)
    policy: PolicyConfig = part(PolicyConfig)
    demonstrations: list[int] = knob([10, 25], "numbers of demonstrations to learn from; R3M: 5, 10 and 25", low=1)
    seeds: int = knob(3, "policies for each row, trained together; they differ in start and batches", low=1)
    rollouts: int = knob(25, "episodes of each policy, whose starts are the same in all rows; R3M: 50", low=1)
    slots: int = knob(24, "simulators that run side by side; features are computed in batches of as many clips", low=1)
    processes: int | None = knob(None, "that simulate and draw; null is one per core", low=1)
    device: str = knob("auto", "auto: a GPU where there is one", choices=("auto", "cpu", "cuda"))
    cache: str = knob("features/robot", "folder of demonstrations and of their features, for all models")
    films: int = knob(2, "successes and failures of each task and row that the page shows", low=0)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RobotConfig:
    """Read a file as :func:`egohod.config.load` does. Raises :class:`~egohod.errors.UserError`."""
    return load_as(RobotConfig, path, overrides, check)


def check(config: RobotConfig) -> list[tuple[str, str]]:
    """Everything that is out of range or contradicts itself, as (key, what is wrong with it)."""
    problems = out_of_range(config)
    for key, names in (("scene.tasks", config.scene.tasks), ("demonstrations", config.demonstrations)):
        if not names or len(set(names)) < len(names):
            problems.append((key, f"{key} is {names}, but needs at least one entry, and none twice"))
    policy, scene = config.policy, config.scene
    wrong = {task: steps for task, steps in scene.horizons.items() if not 10 <= steps <= 500}
    if wrong:
        problems.append(("scene.horizons", f"scene.horizons is {wrong}, but must be at least 10 and at most 500"))
    if policy.checkpoints * policy.checkpoint_every > policy.steps:
        text = f"policy.checkpoints={policy.checkpoints} of every {policy.checkpoint_every} steps need more steps than"
        problems.append(("policy.checkpoints", f"{text} policy.steps={policy.steps}"))
    if scene.suite == "kitchen" and scene.recordings is None:
        problems.append(("scene.recordings", "scene.suite=kitchen needs scene.recordings (docs/robot.md)"))
    if scene.suite == "kitchen" and scene.repeat != 1:
        problems.append(("scene.repeat", f"scene.repeat is {scene.repeat}, but a recorded action is of 1 step"))
    if scene.suite != "kitchen" and scene.recordings is not None:
        problems.append(("scene.recordings", "scene.recordings is for scene.suite=kitchen; metaworld has experts"))
    return problems
