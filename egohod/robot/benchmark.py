"""The robot benchmark: demonstrations on disk, a row for each input, intervals, results.json and report.html.

    <cache>/demonstrations/<suite>-<task>-<hash>/<number>.npz    drawn once, for all models
    <cache>/features/<hash>/<hash>.npz                           of each model, computed once
    <cache>/rows/<task>-<demonstrations>-<row>-<hash>.json       how each rollout ended
    <cache>/films/*.mp4
    <output>/results.json  report.html  films/*.mp4

A hash is of everything that its file depends on: a rerun repeats only the row in which it was killed, and the next
checkpoint of a tower finds the baselines measured.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from egohod.config import PROJECT, Config
from egohod.distributed import pick_device
from egohod.errors import UserError
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.embed import PLAIN, EmbedReport, Execution, fingerprint
from egohod.evaluation.features import read_json, write_json
from egohod.evaluation.metrics import RESAMPLES, Score
from egohod.evaluation.page import number, render
from egohod.evaluation.report import PAGE_FILE
from egohod.evaluation.results import RESULTS_FILE
from egohod.evaluation.runner import BenchmarkResult
from egohod.model.dual_encoder import DualEncoder, create_model
from egohod.robot.cloning import Input, StateInput, VideoInput, clone, roll_out
from egohod.robot.config import RobotConfig, load
from egohod.robot.simulation import INSTALL, Demonstration, Scene, Simulators
from egohod.runtime import Progress, atomic_write, content_hash, file_hash, usable_cores, write_text

log = logging.getLogger(__name__)

FORMAT = 1
# Starts of demonstrations that are tried for each that is needed.
_TRIES = 4
# What a film shows a second: actions of two simulator steps, of which there are 80 a second, at half their speed.
_FILM_RATE = 20
# Episodes of which a film may be kept.
_FILMED = 12
CHECKPOINT = "checkpoint"


def run(cfg: RobotConfig, model: Any, random: Any, checkpoint: Mapping[str, str], output: Path) -> dict[str, Any]:
    """Measure a model and the baselines, write ``results.json`` and ``report.html``, and return the results.

    Args:
        cfg: the protocol (docs/robot.md).
        model: anything with ``encode_video``, see :class:`egohod.robot.cloning.VideoInput`, on the chosen device.
        random: the same architecture with random weights, or None to go without this row.
        checkpoint: path and sha256 of the weights, for the results.
        output: folder of the results; what a rerun resumes from is in ``cfg.cache``.

    Raises:
        UserError: see :class:`egohod.robot.simulation.Simulators`; too few demonstrations; a policy that diverges.
    """
    sources, policies = inputs(cfg, model, random), cfg.seeds * cfg.policy.checkpoints
    counts, outcomes = sorted(cfg.demonstrations), dict[tuple[str, int, str], dict[str, Any]]()
    drawn = sum(source.draws for source in sources) * len(counts) * len(cfg.scene.tasks)
    done, what, versions, processes = 0, "", _versions(cfg), _processes(cfg)
    # Rows without pictures take seconds: counted, they would promise that the others do, too.
    with Progress("rollouts", total=drawn * policies * cfg.rollouts, unit="rollouts", seconds=10.0) as progress:
        # Of the row that is being measured.
        def report(ended: int) -> None:
            progress.update(done + ended * source.draws, note=what)

        for task in cfg.scene.tasks:
            scene = scene_of(cfg, task)
            with Simulators(scene, processes, cfg.slots) as simulators:
                folder = Path(cfg.cache) / "demonstrations" / _scene_name(scene, versions)
                # Also of fewer the first ones, so that a larger number only adds to them.
                episodes = demonstrations(simulators, scene, folder, counts[-1], processes)
                for count in counts:
                    for source in sources:
                        what = f"{task}, {count} demonstrations, {source.name}"
                        key = json.dumps(
                            [source.identity, versions, scene, asdict(cfg.policy), cfg.seeds, cfg.rollouts, cfg.slots]
                        )
                        name = f"{task}-{count}-{source.name.replace(' ', '_')}-{content_hash(key, length=12)}"
                        path = Path(cfg.cache) / "rows" / f"{name}.json"
                        if not _is_finished(path):
                            start = time.monotonic()
                            row = _measure(cfg, simulators, source, episodes[:count], name, report)
                            write_json(path, {"format": FORMAT, **row})
                            success = 100 * np.mean(row["success"])
                            log.info("%s: %.0f %% (%.0f s)", what, success, time.monotonic() - start)
                        done += source.draws * policies * cfg.rollouts
                        outcomes[task, count, source.name] = row = read_json(path, FORMAT, "run again")
                        for film in row["films"]:
                            (output / "films").mkdir(parents=True, exist_ok=True)
                            with suppress(FileNotFoundError):  # a row without its films is still a row
                                shutil.copyfile(
                                    Path(cfg.cache) / "films" / film["file"], output / "films" / film["file"]
                                )
    results = summarise(cfg, [source.name for source in sources], outcomes)
    results |= {"checkpoint": dict(checkpoint), "versions": versions, "settings": asdict(cfg)}
    write_json(output / RESULTS_FILE, results)
    write_page(output)
    return results


def inputs(cfg: RobotConfig, model: Any, random: Any) -> list[Input]:
    """A row of the table each, baselines first."""
    device, cache = pick_device(cfg.device), Path(cfg.cache)
    rows: list[Input] = [StateInput("full state", full=True), StateInput("proprioception", full=False)]
    if random is not None:
        rows.append(VideoInput("random weights", random, cfg.features, cache, device))
    if cfg.features.frames > 1:
        rows.append(VideoInput("one frame", model, cfg.features, cache, device, freeze=True))
    return [*rows, VideoInput(CHECKPOINT, model, cfg.features, cache, device)]


def scene_of(cfg: RobotConfig, task: str) -> Scene:
    """What the simulators of a task are started with."""
    each = cfg.scene
    recordings = str(Path(each.recordings).resolve()) if each.recordings else None
    horizon = each.horizons.get(task, each.horizon)
    return Scene(each.suite, task, each.image_size, each.repeat, horizon, each.noise, recordings)


def _is_finished(path: Path) -> bool:
    """Whether there is a row that can be read; another one is measured again."""
    try:
        return bool(read_json(path, FORMAT, ""))
    except UserError:
        return False


def _processes(cfg: RobotConfig) -> int:
    # More would have no simulator.
    return min(cfg.processes or usable_cores(), cfg.slots)


def _versions(cfg: RobotConfig) -> dict[str, str]:
    names = ("mujoco", "metaworld" if cfg.scene.suite == "metaworld" else "gymnasium-robotics")
    try:
        versions = {name: importlib.metadata.version(name) for name in names}
        # Another file of the same name has other demonstrations.
        return versions | ({"recordings": file_hash(cfg.scene.recordings)} if cfg.scene.recordings else {})
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"the simulator {error.name} is not installed: {INSTALL}") from error


def _scene_name(scene: Scene, versions: Mapping[str, str]) -> str:
    return f"{scene.suite}-{scene.task}-{content_hash(json.dumps([scene, versions]), length=12)}".replace(" ", "_")


def demonstrations(
    simulators: Simulators, scene: Scene, folder: Path, count: int, processes: int
) -> list[tuple[str, Demonstration]]:
    """The first ``count`` episodes in which the expert succeeds, each with its key; drawn and written if not on disk.

    Raises :class:`UserError` if it hardly ever succeeds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    episodes, tried = list[tuple[str, Demonstration]](), 0
    with Progress(f"{scene.task}: demonstrations", total=count, unit="demonstrations", seconds=10.0) as progress:
        while len(episodes) < count:
            if tried >= _TRIES * count + 8:
                raise UserError(
                    f"the expert of {scene.task} succeeded in {len(episodes)} of {tried} demonstrations within "
                    f"{scene.horizon} steps; raise scene.horizons.{scene.task}, or lower demonstrations or "
                    f"scene.noise={scene.noise:g}"
                )
            numbers = range(tried, tried + processes)
            batch = {each: _read(folder / f"{each:05d}.npz") for each in numbers}
            absent = [each for each in numbers if batch[each] is None]
            answers = simulators.call({slot: ("demonstrate", each) for slot, each in enumerate(absent)})
            for slot, each in enumerate(absent):
                # A failure is a file too, of no steps: it is not tried again.
                empty = Demonstration(*(np.zeros((0, 1), np.float32) for _ in Demonstration._fields))  # type: ignore[arg-type]
                batch[each] = episode = answers[slot] or empty
                with atomic_write(folder / f"{each:05d}.npz") as temporary:
                    np.savez_compressed(temporary, **episode._asdict())  # a tenth of the pixels
            for each, one in batch.items():
                if one is not None and len(one.actions):
                    episodes.append((f"{folder.name}/{each}", one))
            tried += processes
            progress.update(min(len(episodes), count))
    return episodes[:count]


def _read(path: Path) -> Demonstration | None:
    """A demonstration on disk; None if there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return Demonstration(*(content[name] for name in Demonstration._fields))
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file can raise anything
        log.warning("%s: not readable (%.200s); it is simulated again", path, error)
        return None


def _measure(
    cfg: RobotConfig,
    simulators: Simulators,
    source: Input,
    episodes: Sequence[tuple[str, Demonstration]],
    name: str,
    on_episode: Callable[[int], None],
) -> dict[str, Any]:
    """Train the policies of a row and roll them out; how the rollouts ended, [checkpoints, seeds, rollouts]."""
    x = np.concatenate([source.of_demonstration(key, episode) for key, episode in episodes])
    policies = clone(x, np.concatenate([episode.actions for _, episode in episodes]), cfg.policy, cfg.seeds)
    scene = simulators.scene
    outcome = roll_out(
        simulators, policies, source, starts=cfg.rollouts, actions=scene.horizon // scene.repeat, slots=cfg.slots,
        films=_FILMED if cfg.films else 0, on_episode=on_episode,
    )  # fmt: skip
    if outcome.diverged.any():
        log.warning("%s: %d rollouts diverged, and count as failures", name, outcome.diverged.sum())
    shown = []
    for success in (True, False):
        ended = [start for start in sorted(outcome.films) if bool(outcome.success[-1, start]) == success]
        for start in ended[: cfg.films]:
            file = f"{name}-{start}-{'success' if success else 'failure'}.mp4"
            write_film(Path(cfg.cache) / "films" / file, outcome.films[start])
            shown.append({"file": file, "success": success, "start": start})
    shape = cfg.policy.checkpoints, cfg.seeds, cfg.rollouts
    return {
        "success": outcome.success.reshape(shape).astype(int).tolist(),
        "diverged": int(outcome.diverged.sum()),
        "films": shown,
    }


def write_film(path: Path, frames: NDArray[np.uint8]) -> None:
    """Write frames uint8 [T, S, S, 3] as H.264, which every browser plays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # its colours are of 2 x 2 pixels
    with atomic_write(path) as temporary, av.open(str(temporary), "w") as container:
        # One thread: the bytes depend on their number.
        stream = container.add_stream("libx264", rate=_FILM_RATE, options={"crf": "24", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


# --------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------


def score(outcomes: Sequence[NDArray[np.float64]]) -> Score:
    """Mean success in percent over tasks, whose outcomes are [checkpoints, seeds, rollouts] each.

    Its bootstrap resamples the seeds and the starts of every task; equal generators draw the same ones, so that the
    difference of two rows is paired. Checkpoints of a seed are no independent runs, and are averaged first.
    """
    values = [np.mean(each, axis=0) for each in outcomes]

    def draw(rng: np.random.Generator) -> NDArray[np.float64]:
        means = []
        for each in values:
            seeds = rng.integers(0, each.shape[0], (RESAMPLES, each.shape[0], 1))
            starts = rng.integers(0, each.shape[1], (RESAMPLES, 1, each.shape[1]))
            means.append(each[seeds, starts].mean(axis=(1, 2)))
        return 100 * np.mean(means, axis=0)

    return Score(100 * float(np.mean([each.mean() for each in values])), None, draw)


def summarise(
    cfg: RobotConfig, rows: Sequence[str], outcomes: Mapping[tuple[str, int, str], Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of ``results.json``: success of every row by demonstrations and task, and differences of rows."""
    tables, differences = list[dict[str, Any]](), list[dict[str, Any]]()
    for count in sorted(cfg.demonstrations):
        scores = dict[str, Score]()
        for row in rows:
            parts = {task: outcomes[task, count, row] for task in cfg.scene.tasks}
            success = {task: np.asarray(each["success"], np.float64) for task, each in parts.items()}
            cells = {}
            for name, arrays in {
                **{task: [each] for task, each in success.items()},
                "mean": [*success.values()],
            }.items():
                each, seeds = score(arrays), np.mean([array.mean(axis=(0, 2)) for array in arrays], axis=0)
                # Of the best checkpoint of every seed, chosen by its own rollouts: for comparison with such numbers.
                best = 100 * float(np.mean([array.mean(axis=2).max(axis=0) for array in arrays]))
                cells[name] = {"value": each.value, "interval": each.interval(), "best": best}
                cells[name]["seeds"] = (100 * seeds).tolist()
                # Of every rollout, [checkpoints, seeds, rollouts], for statistics of one's own.
                cells[name]["outcomes"] = [array.astype(int).tolist() for array in arrays]
            scores[row] = score([*success.values()])
            films = {task: each["films"] for task, each in parts.items() if each["films"]}
            diverged = sum(each["diverged"] for each in parts.values())
            tables.append({"demonstrations": count, "row": row, "cells": cells, "films": films, "diverged": diverged})
        for row in rows:
            if row != CHECKPOINT:
                difference = scores[CHECKPOINT].value - scores[row].value, scores[CHECKPOINT].interval(scores[row])
                differences.append(
                    {"demonstrations": count, "minus": row, "value": difference[0], "interval": difference[1]}
                )
    return {"format": FORMAT, "benchmark": cfg.scene.suite, "rows": tables, "differences": differences}


def markdown(results: Mapping[str, Any]) -> str:
    """The table of ``results.json``: success in percent with its 95 % interval."""
    tasks = results["settings"]["scene"]["tasks"]
    head = ["demonstrations", "input", *tasks, "mean", "best of last checkpoints"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in results["rows"]:
        cells = [row["cells"][name] for name in (*tasks, "mean")]
        shown = [f"{number(each['value'])} ({' to '.join(map(number, each['interval']))})" for each in cells]
        best = number(row["cells"]["mean"]["best"])
        lines.append("| " + " | ".join([str(row["demonstrations"]), row["row"], *shown, best]) + " |")
    for each in results["differences"]:
        interval = " to ".join(number(bound, sign=True) for bound in each["interval"])
        difference = f"checkpoint minus {each['minus']}: {number(each['value'], sign=True)} ({interval})"
        lines.append(f"\n{each['demonstrations']} demonstrations, {difference}")
    return "\n".join(lines)


def write_page(output: Path) -> Path:
    """Write ``report.html`` from ``results.json`` and the films, and return its path."""
    results = read_json(output / RESULTS_FILE, FORMAT, "run the benchmark first")
    films = dict[str, str]()
    for row in results["rows"]:
        for each in (film for shown in row["films"].values() for film in shown if row["row"] == CHECKPOINT):
            path = output / "films" / each["file"]
            if path.is_file():  # a page without a film is better than none
                films[each["file"]] = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    write_text(output / PAGE_FILE, render("robot.html.jinja", results=results, films=films, checkpoint=CHECKPOINT))
    log.info("wrote %s", output / PAGE_FILE)
    return output / PAGE_FILE


# --------------------------------------------------------------------------------------------------
# A benchmark of main_eval.py
# --------------------------------------------------------------------------------------------------


class RobotBenchmark:
    """What an evaluation needs of a benchmark; ``metadata`` is a YAML file of this one's settings.

    Numbers are of the checkpoint's row; its row of one frame is the temporal control ``freeze``, which is always
    measured, and the baselines are notes. The full table is in a folder of its own.
    """

    def __init__(self, cfg: Config, name: str, config: BenchmarkConfig, execution: Execution, **options: Any) -> None:
        if execution.dist.world_size > 1:
            raise UserError(f"{name}: runs in one process, which starts the simulators; run it without torchrun")
        if not options.get("need_videos", True):
            raise UserError(f"{name}: draws its own frames, so stored features cannot be evaluated; give a model")
        self.name, self._cfg, self._dist = name, cfg, execution.dist
        self._robot = load(config.metadata or PROJECT / "configs" / "robot" / "metaworld.yml")
        self._robot.device = execution.dist.device.type
        self._notes = list[str]()

    def measure(self, model: Any) -> BenchmarkResult:
        """Run it for a model, and for its tower with random weights if it is one of this project's."""
        random, sha256 = self._untrained(model), fingerprint(model)
        output = Path(self._robot.cache) / "pages" / sha256[:12]
        output.mkdir(parents=True, exist_ok=True)
        checkpoint = {"path": str(self._cfg.model.weights.path), "sha256": sha256}
        results = run(self._robot, model.eval(), random, checkpoint, output)
        self._notes = [f"all rows, and films: {output / PAGE_FILE}"]
        if random is None:
            self._notes.append("no row of random weights: the configuration does not describe this model")
        scores: dict[str, dict[str, Score]] = {}
        for row in results["rows"]:
            count, mean = row["demonstrations"], row["cells"]["mean"]
            order = {CHECKPOINT: PLAIN, "one frame": "freeze"}.get(row["row"])
            if order is None:
                low, high = (number(bound) for bound in mean["interval"])
                text = f"{count} demonstrations, {row['row']}: {number(mean['value'])} % ({low} to {high})"
                self._notes.append(text)
                continue
            # The mean first: a benchmark is summarised by its first number.
            for task in ("mean", *self._robot.scene.tasks):
                cell = row["cells"][task]
                key = f"success_{count}" if task == "mean" else f"success_{count}_{task}"
                scores.setdefault(order, {})[key] = score([np.asarray(each, np.float64) for each in cell["outcomes"]])
        return BenchmarkResult(scores, [], [], EmbedReport())

    def _untrained(self, model: Any) -> DualEncoder | None:
        """The tower that the configuration describes with random weights, if ``model`` is one."""
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                twin = create_model(self._cfg.model).to(self._dist.device).eval()
        except UserError:  # from Python a model comes without its configuration
            return None
        shapes = [{name: each.shape for name, each in one.state_dict().items()} for one in (model, twin)]
        return twin if shapes[0] == shapes[1] else None

    def about(self) -> dict[str, Any]:
        """How it is measured, in ``results.json``."""
        shown = {"frames": self._robot.features.frames, "size": self._robot.scene.image_size, "windows": 1, "crops": 1}
        return {
            "protocol": {"name": "robot", "source": "docs/robot.md", **shown},
            "heads": False,
            "scoring": [],
            "notes": list(self._notes),  # the baselines, without which the numbers say little
            "timing": {"precision": "float32"},
        }

    def clips_of(self, rows: Sequence[int]) -> dict[str, Any]:
        """No clips: episodes are simulated."""
        places: dict[str, Any] = {"root": "", "layout": "whole", "chunk_seconds": 15.0, "min_clip_seconds": None}
        return {**places, "id": [], "video": [], "start": [], "end": []}


# --------------------------------------------------------------------------------------------------
# Cost
# --------------------------------------------------------------------------------------------------


def estimate(cfg: RobotConfig, model: Any, random: Any) -> dict[str, float]:
    """Seconds of each part of a run in which every rollout fails, from a few measured steps of the first task.

    Most take less: an episode ends with its success. The first demonstrations are made where a run looks for them.
    """
    sources, counts = inputs(cfg, model, random), sorted(cfg.demonstrations)
    scene, processes = scene_of(cfg, cfg.scene.tasks[0]), _processes(cfg)
    folder = Path(cfg.cache) / "demonstrations" / _scene_name(scene, _versions(cfg))
    clock, seconds = time.monotonic, dict[str, float]()
    with Simulators(scene, processes, cfg.slots) as simulators:
        start = clock()
        episodes = demonstrations(simulators, scene, folder, min(processes, counts[-1]), processes)
        seconds["demonstrations"] = (clock() - start) * counts[-1] / len(episodes)
        slots = range(cfg.slots)
        seen = simulators.call({slot: ("reset", slot, True) for slot in slots})  # the first makes the simulators
        times = dict[str, float]()
        action = np.zeros_like(episodes[0][1].actions[0])
        for name, draws in (("pictures", True), ("physics", False)):
            start = clock()
            for _ in range(3):
                simulators.call(dict.fromkeys(slots, ("step", action, draws)))
            times[name] = (clock() - start) / 3 / cfg.slots
    actions = sum(scene_of(cfg, task).horizon // cfg.scene.repeat for task in cfg.scene.tasks) * len(counts)
    actions *= cfg.seeds * cfg.policy.checkpoints * cfg.rollouts
    seconds["demonstrations"] *= len(cfg.scene.tasks)
    seconds |= {"simulation and drawing": 0.0, "features": 0.0, "training": 0.0}
    short = type(cfg.policy)(**{**asdict(cfg.policy), "steps": 50, "checkpoint_every": 50, "checkpoints": 1})
    for source in sources:
        seconds["simulation and drawing"] += actions * times["pictures" if source.draws else "physics"]
        source.of_rollouts(seen, set(slots))  # warms up
        start = clock()
        x = source.of_rollouts(seen, set(slots))
        seconds["features"] += actions * (clock() - start) / cfg.slots
        start = clock()
        clone(np.repeat(x, 8, axis=0), np.zeros((8 * len(x), len(action)), np.float32), short, cfg.seeds)
        trained = (clock() - start) / short.steps * cfg.policy.steps
        seconds["training"] += trained * len(cfg.scene.tasks) * len(counts)
    return seconds | {"at most": sum(seconds.values())}
