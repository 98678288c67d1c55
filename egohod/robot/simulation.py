"""Simulated robots, stepped and drawn in processes of their own that never import PyTorch.

PyTorch's Triton and Mesa's software renderer each bring their LLVM, and a process that loads Triton behind Mesa
crashes; torch.optim loads it. The parent therefore never imports MuJoCo, and a child imports this module, a suite
(:mod:`egohod.robot.metaworld`, :mod:`egohod.robot.kitchen`) and nothing that needs PyTorch.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from egohod.errors import UserError

INSTALL = "pip install '.[robot]' (docs/robot.md)"
RENDERER = "apt-get install libosmesa6, or MUJOCO_GL=egl on a machine with a GPU (docs/robot.md)"
# Actions that a demonstration continues after its success: the policy learns to stay there.
_AFTER_SUCCESS = 5


class Scene(NamedTuple):
    """What a simulator needs to know; see :class:`egohod.robot.config.SceneConfig`."""

    suite: str
    task: str
    image_size: int
    repeat: int
    horizon: int
    noise: float
    recordings: str | None


class Observation(NamedTuple):
    """What there is after a reset or an action."""

    proprioception: NDArray[np.float32]
    state: NDArray[np.float32]
    frame: NDArray[np.uint8] | None
    """[S, S, 3], if frames were requested."""
    success: bool
    diverged: bool
    """The action or the state is not finite, or MuJoCo gave up: the episode is over."""


class Demonstration(NamedTuple):
    """One episode of T actions: what was seen before each of them, and the action, from -1 to 1."""

    proprioception: NDArray[np.float32]
    state: NDArray[np.float32]
    frames: NDArray[np.uint8]
    actions: NDArray[np.float32]


class Task(Protocol):
    """A task of a suite, whose module has it as the class ``Environment(scene)``. Raises :class:`UserError`."""

    model: Any
    data: Any
    camera: Mapping[str, Any]
    """MuJoCo's free camera, which all models look through."""

    def reset(self, seed: int) -> None:
        """Start an episode that follows from the seed alone."""

    def step(self, action: NDArray[np.float32]) -> bool:
        """One simulator step; whether the task is solved."""

    def observe(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Proprioception and full state."""

    def demonstration(self, number: int) -> Iterator[NDArray[Any]]:
        """Actions of the expert's episode ``number``; with each the task is in the state in front of it."""


# --------------------------------------------------------------------------------------------------
# The parent's side
# --------------------------------------------------------------------------------------------------


class Simulators:
    """``count`` processes with ``slots`` simulators of ``scene`` between them, as a context.

    Raises :class:`UserError` if the simulator is not installed, cannot draw or has no such task, and
    :class:`ConnectionError` when a process dies.
    """

    def __init__(self, scene: Scene, count: int, slots: int) -> None:
        self.scene, self._slots, self._count = scene, slots, min(count, slots)
        self._children: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def __enter__(self) -> Simulators:
        # Software rendering works everywhere. A thread for each process: there is one for every core already.
        environment = {"MUJOCO_GL": "osmesa", **os.environ, "LP_NUM_THREADS": "0", "OMP_NUM_THREADS": "1"}
        here = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        try:
            for _ in range(self._count):
                ours, theirs = Pipe()
                code = f"from egohod.robot.simulation import serve; serve({theirs.fileno()})"
                with theirs:
                    child = subprocess.Popen(
                        [sys.executable, "-c", code],
                        pass_fds=[theirs.fileno()],
                        env=environment,
                        # MuJoCo writes its warnings to a file in the working directory.
                        cwd=tempfile.gettempdir(),
                    )
                self._children.append((child, ours))
                ours.send(self.scene)
            # Whether it can draw: the first answer of all.
            self.call(dict.fromkeys(range(self._count), ("ready",)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for _, connection in self._children:
            connection.close()  # at which a child ends by itself
        for child, _ in self._children:
            try:
                child.wait(timeout=5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children.clear()

    def call(self, work: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call a method of the simulators in the slots, ``(name, *arguments)``; results by slot, in the same order."""
        # All get their work before the first answer is awaited.
        parts: list[dict[int, tuple[Any, ...]]] = [{} for _ in range(self._count)]
        for slot, each in work.items():
            assert 0 <= slot < self._slots, slot
            parts[slot % self._count][slot] = each
        answers = dict[int, Any]()
        busy = [(connection, part) for (_, connection), part in zip(self._children, parts, strict=True) if part]
        try:
            for connection, part in busy:
                connection.send(part)
            for connection, _ in busy:
                answer = connection.recv()
                if isinstance(answer, UserError):
                    raise answer
                answers |= answer
        except (EOFError, BrokenPipeError, ConnectionResetError):
            time.sleep(1.0)  # a process closes its end shortly before it is gone
            codes = [code for child, _ in self._children if (code := child.poll()) is not None]
            raise ConnectionError(
                f"a simulator of {self.scene.task} ended with exit code {', '.join(map(str, codes)) or 'unknown'} "
                "(what it printed is above); rerun the same command to resume"
            ) from None
        return {slot: answers[slot] for slot in work}


# --------------------------------------------------------------------------------------------------
# The child's side
# --------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Answer :meth:`Simulators.call` on an inherited socket until the parent closes it or dies."""
    warnings.filterwarnings("ignore", module="metaworld|gymnasium")
    connection, robots, pen = Connection(descriptor), dict[int, Robot](), dict[str, Any]()
    # The parent's end: Ctrl-C reaches all processes of a terminal, and the parent says what happens then.
    with suppress(EOFError, KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        scene = connection.recv()
        while True:
            answer: Any = {}
            try:
                for slot, (name, *arguments) in connection.recv().items():
                    # Made when first used: a few demonstrations need few of them.
                    if slot not in robots:
                        robots[slot] = Robot(scene, pen)
                    answer[slot] = getattr(robots[slot], name)(*arguments)
            except UserError as error:
                answer = error
            connection.send(answer)
    if "renderer" in pen:
        pen["renderer"].close()  # EGL complains about one that is left open


class Robot:
    """One simulator. ``pen`` holds the renderer that all those of a process share: their models have equal meshes."""

    def __init__(self, scene: Scene, pen: dict[str, Any]) -> None:
        self.scene, self.pen = scene, pen
        try:
            import mujoco

            suite = importlib.import_module(f"egohod.robot.{scene.suite}")
            self.task: Task = suite.Environment(scene)
        except ModuleNotFoundError as error:
            raise UserError(f"the simulator of {scene.suite} is not installed ({error}): {INSTALL}") from error
        except (ImportError, AttributeError, OSError) as error:  # of PyOpenGL without OpenGL's libraries
            raise UserError(_no_renderer(error)) from error
        self.mujoco = mujoco
        if "renderer" in pen:
            return
        model = self.task.model
        # Multisampling and shadows take ten times as long as everything else that software rendering does.
        model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        try:
            renderer = mujoco.Renderer(model, scene.image_size, scene.image_size)
        except Exception as error:
            raise UserError(_no_renderer(error)) from error
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        camera, options = mujoco.MjvCamera(), mujoco.MjvOption()
        camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        for name, value in self.task.camera.items():
            setattr(camera, name, value)
        # Sites mark the goal, which a real camera would not see.
        options.sitegroup[:] = False
        pen |= {"renderer": renderer, "camera": camera, "options": options}

    def ready(self) -> None:
        """Do nothing; by then there is a renderer."""

    def reset(self, seed: int, draw: bool) -> Observation:
        """Start an episode."""
        self.task.reset(seed)
        return self._observe(False, draw)

    def step(self, action: NDArray[np.float32], draw: bool) -> Observation:
        """Hold an action for ``repeat`` simulator steps; success in any of them counts."""
        if not np.isfinite(action).all():
            return self._observe(False, draw)._replace(diverged=True)
        # In one type: what an environment computes from float32 differs in the last bits from float64.
        action = np.clip(action, -1, 1).astype(np.float32)
        success = [self.task.step(action) for _ in range(self.scene.repeat)]  # all of them, also after a success
        return self._observe(any(success), draw)

    def demonstrate(self, number: int) -> Demonstration | None:
        """The episode of the suite's expert from the start ``number``; None if it does not succeed in time."""
        expert, rng = self.task.demonstration(number), np.random.default_rng(number)
        rows, left = list[tuple[Any, ...]](), -1
        for action in itertools.islice(expert, self.scene.horizon // self.scene.repeat):
            seen, action = self._observe(False, True), np.clip(action, -1, 1).astype(np.float32)
            if seen.diverged:
                return None
            rows.append((seen.proprioception, seen.state, seen.frame, action))
            # The clean action is what is learned: of noisy ones only where they lead to.
            after = self.step(action + self.scene.noise * rng.standard_normal(len(action)), draw=False)
            if after.success and left < 0:
                left = _AFTER_SUCCESS + 1
            left -= 1
            if left == 0:
                break
        return Demonstration(*map(np.stack, zip(*rows, strict=True))) if left >= 0 else None

    def _observe(self, success: bool, draw: bool) -> Observation:
        model, data, frame = self.task.model, self.task.data, None
        proprioception, state = (part.astype(np.float32) for part in self.task.observe())
        # MuJoCo resets a simulation whose numbers explode, and continues as if nothing had happened.
        bad = ("mjWARN_BADQPOS", "mjWARN_BADQVEL", "mjWARN_BADQACC")
        gave_up = any(data.warning[getattr(self.mujoco.mjtWarning, name)].number for name in bad)
        if draw:
            scene, pen = self.pen["renderer"].scene, self.pen
            everything = self.mujoco.mjtCatBit.mjCAT_ALL
            self.mujoco.mjv_updateScene(model, data, pen["options"], None, pen["camera"], everything, scene)
            frame = pen["renderer"].render()
        diverged = bool(gave_up or not np.isfinite(state).all())
        return Observation(proprioception, state, frame, bool(success) and not diverged, diverged)


def _no_renderer(error: Exception) -> str:
    backend, reason = os.environ.get("MUJOCO_GL"), " ".join(str(error).split())
    return f"the simulator cannot draw with MUJOCO_GL={backend} ({type(error).__name__}: {reason}): {RENDERER}"
