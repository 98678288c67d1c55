"""Train the rows of a study, each with several seeds, and write its tables, its plot and its result file.

    python tools/ablate.py --config_file configs/ablation_demo.yml --dry_run    list the runs to do, with their cost
    python tools/ablate.py --config_file configs/ablation_demo.yml              all runs, then the tables
    python tools/ablate.py --config_file configs/ablation_demo.yml --tables     only the tables, from finished runs

Every run has its own folder. Rerun to resume a study after an interruption; ``--only egovideo --seeds 0`` runs a part
of it, ``--jobs 2`` trains two at a time. ``--tune`` never uses the test world, so that choices cannot overfit to it,
and keeps its runs apart.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from _common import markdown_table, run_tool, save_picture, tool_parser

from egohod import cli, config
from egohod.config import Config
from egohod.data.formats.base import read_lines
from egohod.demo import make_world
from egohod.demo.world import Variant
from egohod.demo.write import write_benchmarks
from egohod.errors import UserError
from egohod.evaluation.embed import CONTROLS
from egohod.evaluation.features import write_json
from egohod.evaluation.report import new_figure
from egohod.evaluation.results import RESULTS_FILE
from egohod.model.cost import clip_flops
from egohod.model.dual_encoder import create_model
from egohod.runtime import time_left, usable_cores
from egohod.training.build import freeze
from egohod.training.telemetry import git_commit
from egohod.training.train import Schedule

log = logging.getLogger("ablate")

# Created in a run's folder when the run is complete.
DONE_FILE = "done"
# Text tokens of a typical batch of the demo's narrations, to count the operations of a step.
TEXT_LENGTH = 40
METRICS = {
    "motion_state_changing": "state-changing pairs",
    "motion_transient": "transient pairs",
    "object": "objects",
    "verb_noun_top1": "verb-noun",
}
CHANCE = {"motion_state_changing": 50.0, "motion_transient": 50.0, "object": 50.0}


@dataclass
class World:
    """The demo world that all rows share; rendered if absent."""

    folder: str = "demo_motion"
    scale: float = 1.0
    variant: Variant = field(default_factory=Variant)


@dataclass
class Row:
    """One row of the tables."""

    title: str = "???"
    overrides: list[str] = field(default_factory=list)
    # Not trained: the weights that the other rows start from (model.weights.path), measured once.
    start: bool = False
    # Measured with one thread on the machine of the study's header: what --dry_run predicts times from.
    seconds_per_step: float | None = None


@dataclass
class Study:
    """A study as its YAML describes it."""

    base: str = "???"
    output: str = "???"
    world: World = field(default_factory=World)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    rows: dict[str, Row] = field(default_factory=dict)
    # The program that the runs start, and the overrides that all of them share.
    program: str = "main_pretrain.py"
    overrides: list[str] = field(default_factory=list)
    # Seconds that a run takes beside its steps: the start, evaluations, controls.
    seconds_besides: float = 0.0
    # Metrics of the val and the test world with their titles ("a+b" is the mean of a and b); and those that are plotted
    # and measured under controls, with their chance level. Default: the metrics of the demo's questions; a study that
    # names its own replaces them.
    metrics: dict[str, str] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run, or the evaluation of a start: a row with a seed."""

    row: str
    seed: int
    folder: Path
    command: list[str]
    cfg: Config
    trains: bool = True

    @property
    def done(self) -> bool:
        """Whether it was trained and evaluated to the end.

        Raises :class:`UserError` if the folder holds a run of another recipe: rows of two recipes are no table.
        """
        recipe = self.folder / "config.yml"
        if recipe.exists() and recipe.read_text() != config.to_yaml(self.cfg):
            raise UserError(f"{self.folder}: holds a run of another configuration; move it away to train this one")
        return (self.folder / DONE_FILE).exists()


def read_study(path: Path) -> Study:
    """Raises :class:`UserError` naming the file."""
    study = config.load_as(Study, path, (), lambda _: [])
    # Not as defaults of the dataclass: a study that names its own replaces them all.
    if not study.metrics:
        study.metrics, study.chance = dict(METRICS), dict(CHANCE)
    return study


def plan(study: Study, path: Path, tune: bool) -> list[Run]:
    """All runs, seed by seed: every row has its first run before any has its second, so that a table appears early.

    Raises :class:`UserError` for a configuration that cannot be used or whose length is not in steps.
    """
    base, output = path.parent / study.base, Path(study.output) / ("tune" if tune else "final")
    runs = []
    for seed in study.seeds:
        for name, row in study.rows.items():
            # What is not trained has no seed: it is measured with the first.
            if row.start and seed != study.seeds[0]:
                continue
            folder = output / f"{name}-{seed}"
            overrides = [*study.overrides, *row.overrides, f"train.seed={seed}", f"train.output={folder}"]
            # While tuning the test set stays unread.
            overrides += ["evaluate.final=[]"] if tune else [f"evaluate.controls=[{','.join(CONTROLS)}]"]
            cfg = config.load(base, overrides)
            if not cfg.train.duration.endswith("steps"):
                raise UserError(f"{base}: train.duration is '{cfg.train.duration}'; rows are compared by their steps")
            program = "eval" if row.start else study.program.removeprefix("main_").removesuffix(".py")
            command = [*config.program(program), "--config_file", str(base), *overrides]
            if row.start:
                if not cfg.model.weights.path:
                    raise UserError(f"{path}: row '{name}' is a start, but model.weights.path is not set")
                command += ["--checkpoint", cfg.model.weights.path, "--benchmark", "val" if tune else "test"]
                command += ["--output", str(folder)]
            runs.append(Run(name, seed, folder, command, cfg, trains=not row.start))
    return runs


def select(runs: Sequence[Run], rows: Sequence[str], seeds: Sequence[str]) -> list[Run]:
    """The runs of some rows and seeds, all if none is named. Raises :class:`UserError` for unknown names."""
    for requested, allowed, what in (
        (rows, [run.row for run in runs], "row"),
        (seeds, [str(run.seed) for run in runs], "seed"),
    ):
        if unknown := [name for name in requested if name not in allowed]:
            raise UserError(f"no {what} '{unknown[0]}'; there are {', '.join(dict.fromkeys(allowed))}")
    return [run for run in runs if run.row in (rows or [run.row]) and str(run.seed) in (seeds or [str(run.seed)])]


def cost(cfg: Config) -> dict[str, float]:
    """Operations of a training step and number of trainable parameters, the same on every machine."""
    heads = cfg.model.heads != "none"
    # One class represents all: heads cost next to nothing, and their number is in the data, which is not read here.
    model = create_model(cfg.model, cfg.loss, {"action": 1} if heads else None)
    freeze(model, cfg)
    text = 0 if heads else TEXT_LENGTH
    sizes = model.geometry, cfg.model.num_frames, text, cfg.model.patch_dropout, cfg.model.fast
    flops = clip_flops(
        *sizes, boxes=cfg.loss.boxes > 0, texts=1 + cfg.loss.negatives, motion_stem=cfg.model.motion_stem
    ).step
    return {
        "gflop_per_step": cfg.train.global_batch_size * flops / 1e9,
        "million_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6,
    }


def forecast(study: Study, runs: Sequence[Run], jobs: int) -> str:
    """The runs to do as a Markdown table, with their operations and, where the study has measured it, their time."""
    lines, minutes, unknown = [], 0.0, 0
    # Of one run of each row: to count, the model is built.
    costs = {row: cost(cfg) for row, cfg in {run.row: run.cfg for run in runs if run.trains}.items()}
    for run in runs:
        if not run.trains:
            lines.append([run.row, str(run.seed), "-", "-", "-", "-", str(run.folder)])
            continue
        steps, gflop = Schedule.of(run.cfg, steps_per_epoch=1).total, costs[run.row]["gflop_per_step"]
        seconds, time_text = study.rows[run.row].seconds_per_step, "-"
        if seconds is not None:
            expected = (steps * seconds + study.seconds_besides) / 60
            minutes += expected
            time_text = f"{expected:.1f}"
        unknown += seconds is None
        work = f"{steps * gflop / 1e3:.1f}"
        lines.append([run.row, str(run.seed), str(steps), f"{gflop:.1f}", work, time_text, str(run.folder)])
    head = ["row", "seed", "steps", "GFLOP a step", "TFLOP", "minutes", "folder"]
    total = f"{len(runs)} runs"
    if minutes:
        total += f", {minutes / jobs:.0f} minutes with {jobs} at a time on a core each"
        total += f", and {unknown} of unknown time" if unknown else ""
    return "\n".join([*markdown_table(head, lines), "", total])


def train_all(runs: Sequence[Run], jobs: int) -> None:
    """Run all to the end, ``jobs`` at a time on as many equal parts of the cores.

    When a run fails, those under way are finished, no other is started, and its :class:`UserError` is raised.
    """
    # A thread for each core: runs that compete for cores take longer than one after the other.
    threads = max(1, usable_cores() // jobs) if jobs > 1 else None
    begin, done, stopped = time.monotonic(), 0, Event()

    def train_next(number: int, run: Run) -> None:
        nonlocal done
        if stopped.is_set():
            return
        # By the mean of this call's runs: resumed studies may be on another machine than their first runs.
        mean = (time.monotonic() - begin) / max(1, done)
        left = f", {time_left(mean * (len(runs) - done), 1.0)} left" if done else ""
        log.info("run %d of %d: %s, seed %d%s", number, len(runs), run.row, run.seed, left)
        try:
            train(run, threads)
        except BaseException:
            # Here, before this thread takes the next run.
            stopped.set()
            raise
        done += 1

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train_next, *numbered) for numbered in enumerate(runs, start=1)]
        try:
            for future in futures:
                future.result()
        finally:
            # Also when a signal asks this program to stop: the runs have got it too, and save.
            stopped.set()


def train(run: Run, threads: int | None = None) -> None:
    """Run to the end. Raises :class:`UserError` if the run ended early."""
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    # Appended: a resumed run keeps the log of its first part.
    with (run.folder / "log.txt").open("a") as out:
        # In a process of its own: its memory is freed, and a crash costs this run alone.
        code = subprocess.run(run.command, stdout=out, stderr=out, check=False, env=environment).returncode
    # Exit code 0 is not enough: a run that a signal stopped has saved and left in good order.
    if code or (run.trains and int(steps_of(run)[-1]["step"]) < Schedule.of(run.cfg, steps_per_epoch=1).total):
        raise UserError(f"{run.folder}: the run ended early (exit code {code}); see {run.folder}/log.txt")
    if not run.trains:
        (run.folder / "config.yml").write_text(config.to_yaml(run.cfg))
    # Last, so that a run that was killed before this line counts as unfinished and is resumed.
    (run.folder / DONE_FILE).touch()


def steps_of(run: Run) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    path = run.folder / "metrics.jsonl"
    return [json.loads(line) for line in read_lines(path)] if path.exists() else []


def gather(study: Study, runs: Sequence[Run], tuned: bool) -> dict[str, Any]:
    """The results of all finished runs, as the study's JSON file has them."""
    rows: dict[str, Any] = {}
    for name, row in study.rows.items():
        of_row = [run for run in runs if run.row == name]
        of_seed = {run.seed: _of_run(run, tuned, study.metrics) for run in of_row if run.done}
        # All seeds of a row cost the same.
        spent = {"start": True} if row.start else cost(of_row[0].cfg)
        rows[name] = {"title": row.title, **spent, "seeds": of_seed}
    # A 16-frame step costs four 4-frame steps: at equal steps alone the comparison would favour it.
    least = at_equal_flops(rows)
    return {
        "commit": git_commit(),
        # Seconds a step mean nothing without it.
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "world": {"scale": study.world.scale, **asdict(study.world.variant)},
        "note": "tuned on the val world alone"
        + ("" if tuned else "; the test world was evaluated once per run, at its end"),
        "world_of_the_numbers": "val" if tuned else "test",
        "equal_flops": f"val world, at the step nearest to {least / 1e3:.0f} TFLOP, rates not yet at their end",
        "metrics": study.metrics,
        "chance": study.chance,
        "rows": rows,
    }


def at_equal_flops(rows: dict[str, Any]) -> float:
    """Add to each run its val metrics at the compute of the cheapest complete run; returns that compute in GFLOP."""
    trained = [(row["gflop_per_step"], run) for row in rows.values() for run in row["seeds"].values() if _trains(row)]
    least = min((gflop * run["steps"] for gflop, run in trained), default=0.0)
    for gflop, run in trained:
        # The nearest step that was evaluated.
        run["at_equal_flops"] = run["val"][min(run["val"], key=lambda step: abs(step - least / gflop))]
    return least


def _trains(row: dict[str, Any]) -> bool:
    return not row.get("start")


def _of_run(run: Run, tuned: bool, names: Iterable[str]) -> dict[str, Any]:
    def metrics(line: dict[str, float], prefix: str) -> dict[str, float]:
        parts = {name: [prefix + part for part in name.split("+")] for name in names}
        means = {name: [line[key] for key in keys if key in line] for name, keys in parts.items()}
        return {name: sum(values) / len(values) for name, values in means.items() if len(values) == len(parts[name])}

    final = {} if tuned and run.trains else json.loads((run.folder / RESULTS_FILE).read_text())["metrics"]
    if not run.trains and tuned:
        return {"steps": 0, "val": {0: metrics(final, "val/")}}
    test = {"test": metrics(final, "test/"), "controls": {name: metrics(final, f"test/{name}/") for name in CONTROLS}}
    if not run.trains:
        return test
    lines = steps_of(run)
    val = {int(line["step"]): scores for line in lines if (scores := metrics(line, "val/"))}
    # The median: a first step compiles, and some steps wait for an evaluation.
    speed = np.median([line["train/clips_per_second"] for line in lines if "train/clips_per_second" in line])
    result = {
        # Of the run: a study may take days, in which the code changes.
        "commit": json.loads((run.folder / "environment.json").read_text())["commit"],
        "steps": max(val),
        "seconds_per_step": run.cfg.train.global_batch_size / float(speed),
        "val": val,
    }
    return result if tuned else result | test


def tables(results: dict[str, Any]) -> str:
    """The study as Markdown."""
    world, metrics, chance = results["world_of_the_numbers"], results["metrics"], results["chance"]
    equal_steps, equal_flops, controls = [], [], []
    for row in results["rows"].values():
        title, seeds = row["title"], list(row["seeds"].values())
        last = [run["test"] if world == "test" else run["val"][run["steps"]] for run in seeds]
        costs = ["-", "-", "-"]
        if _trains(row):
            seconds = _spread([run["seconds_per_step"] for run in seeds], "{:.2f}")
            costs = [f"{row['gflop_per_step']:.0f}", seconds, f"{row['million_trainable']:.1f}"]
            equal_flops.append([title, *_spreads([run["at_equal_flops"] for run in seeds], metrics)])
        # With the number of seeds: a table of an unfinished study is honest about its rows.
        equal_steps.append([title, *_spreads(last, metrics), *costs, str(len(seeds))])
        for name in chance if world == "test" else ():
            under = [_spread([run["controls"][control][name] for run in seeds]) for control in CONTROLS]
            controls.append([title, metrics[name], _spread([run["test"][name] for run in seeds]), *under])
    head = ["row", *metrics.values()]
    lines = [f"{results['note']}; mean ± standard deviation over seeds, {world} world, equal steps:", ""]
    lines += markdown_table([*head, "GFLOP a step", "s a step", "M trainable", "seeds"], equal_steps)
    lines += ["", f"At equal training FLOPs ({results['equal_flops']}):", "", *markdown_table(head, equal_flops)]
    if world == "test":
        lines += ["", "With time destroyed (test world, both paths alike):", ""]
        lines += markdown_table(["row", "questions", "as filmed", *CONTROLS], controls)
    return "\n".join(lines) + "\n"


def _spreads(runs: Sequence[dict[str, float]], metrics: Iterable[str]) -> list[str]:
    return [_spread([run[name] for run in runs if name in run]) for name in metrics]


def _spread(values: Sequence[float], form: str = "{:.1f}") -> str:
    # No run of this row is finished yet.
    if not values:
        return "-"
    mean = form.format(float(np.mean(values)))
    # Of the sample (ddof=1): three seeds stand for all.
    return f"{mean} ± {form.format(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the metrics over training: a line per row, and the range of its seeds."""
    metrics, chance = results["metrics"], results["chance"]
    figure = new_figure((13, 4.8), layout="constrained")
    # Without matplotlib the tables are written all the same.
    if figure is None:
        return
    ((*axes,),) = figure.subplots(1, len(chance), sharey=True, squeeze=False)
    for axis, name in zip(axes, chance, strict=True):
        for row in filter(_trains, results["rows"].values()):
            curves = [run["val"] for run in row["seeds"].values()]
            # Only steps that every seed has reached: a mean over fewer seeds would jump.
            steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
            values = np.array([[curve[step].get(name, np.nan) for step in steps] for curve in curves])
            if steps:
                (line,) = axis.plot(steps, values.mean(axis=0), label=row["title"])
                axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15)
        axis.axhline(chance[name], color="grey", linestyle=":", linewidth=1)
        axis.set(title=metrics[name], xlabel="steps")
    axes[0].set_ylabel("val world (%)")
    # Below all of them: of ten rows it would cover the curves.
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_picture(figure, path)


def main(argv: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    cli.add_config_file(parser, "configs/ablation_demo.yml")
    add("--only", default="", metavar="ROW,ROW", help="these rows only")
    add("--seeds", default="", metavar="N,N", help="these seeds only")
    add("--tune", action="store_true", help="use the val world only; separate runs under OUTPUT/tune")
    add("--tables", action="store_true", help="train nothing")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, each with its share of the cores")
    add("--dry_run", action="store_true", help="list the runs to do with their cost and expected time, and exit")
    args = parser.parse_args(argv)
    path = config.config_path(args.config_file)
    study = read_study(path)
    world, runs = study.world, plan(study, path, args.tune)
    chosen = select(runs, *([name for name in text.split(",") if name] for text in (args.only, args.seeds)))
    todo = [run for run in chosen if not run.done]
    log.info("%d of %d runs are done", len(chosen) - len(todo), len(chosen))
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least one run at a time")
    if args.dry_run:
        print(forecast(study, todo, args.jobs))
        return cli.DONE
    if not args.tables:
        # Here and not in the runs: two of them must not render the same world.
        make_world(Path(world.folder), scale=world.scale, variant=world.variant)
        if study.program != Study.program:
            # Fine-tuning reads the benchmarks' formats.
            for split in ("val", "test"):
                write_benchmarks(Path(world.folder), split)
        train_all(todo, args.jobs)
    # All finished runs, not only the chosen: the files always show the whole study.
    results = gather(study, runs, args.tune)
    output = Path(study.output) / ("tune" if args.tune else "final")
    markdown = tables(results)
    write_json(output.with_suffix(".json"), results)
    output.with_suffix(".md").write_text(markdown)
    plot(results, output.with_suffix(".png"))
    print(markdown)
    log.info("wrote %s.json, .md and .png", output)
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
