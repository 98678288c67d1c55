"""Train the rows of a study, each with several seeds, and write its tables, its plot and its result file.

    python tools/ablate.py --config_file configs/ablation_demo.yml --dry_run    list the runs to do
    python tools/ablate.py --config_file configs/ablation_demo.yml              all runs, then the tables
    python tools/ablate.py --config_file configs/ablation_demo.yml --tables     only the tables, from finished runs

Every run has its own folder. Rerun to resume a study after an interruption; ``--only egovideo --seeds 0`` runs a part
of it. ``--tune`` never uses the test world, so that choices cannot overfit to it, and keeps its runs apart.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from _common import run_tool, tool_parser

from egohod import cli, config
from egohod.config import PROJECT, Config
from egohod.data.formats.base import read_lines
from egohod.demo import make_world
from egohod.demo.world import Variant
from egohod.demo.write import write_benchmarks
from egohod.errors import UserError
from egohod.evaluation.features import write_json
from egohod.evaluation.models import CONTROLS
from egohod.evaluation.report import new_figure
from egohod.evaluation.results import RESULTS_FILE
from egohod.model.cost import step_flops
from egohod.model.dual_encoder import create_model
from egohod.training.build import Schedule, freeze
from egohod.training.telemetry import git_commit

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
    # Metrics of the val and the test world with their titles; and those that are plotted and measured under controls,
    # with their chance level. Default: the metrics of the demo's questions; a study that names its own replaces them.
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
            if row.start and seed != study.seeds[0]:
                continue
            folder = output / f"{name}-{seed}"
            overrides = [*study.overrides, *row.overrides, f"train.seed={seed}", f"train.output={folder}"]
            # While tuning the test set stays unread.
            overrides += ["evaluate.final=[]"] if tune else [f"evaluate.controls=[{','.join(CONTROLS)}]"]
            cfg = config.load(base, overrides)
            if not cfg.train.duration.endswith("steps"):
                raise UserError(f"{base}: train.duration is '{cfg.train.duration}'; rows are compared by their steps")
            program = "main_eval.py" if row.start else study.program
            command = [sys.executable, str(PROJECT / program), "--config_file", str(base), *overrides]
            if row.start:
                if not cfg.model.weights.path:
                    raise UserError(f"{path}: row '{name}' is a start, but model.weights.path is not set")
                command += ["--checkpoint", cfg.model.weights.path, "--benchmark", "val" if tune else "test"]
                command += ["--output", str(folder)]
            runs.append(Run(name, seed, folder, command, cfg, trains=not row.start))
    return runs


def select(runs: Sequence[Run], rows: Sequence[str], seeds: Sequence[str]) -> list[Run]:
    """The runs of some rows and seeds, all if none is named. Raises :class:`UserError` for unknown names."""
    all_rows, all_seeds = [run.row for run in runs], [str(run.seed) for run in runs]
    for requested, allowed, what in ((rows, all_rows, "row"), (seeds, all_seeds, "seed")):
        if unknown := [name for name in requested if name not in allowed]:
            raise UserError(f"no {what} '{unknown[0]}'; there are {', '.join(dict.fromkeys(allowed))}")
    return [run for run in runs if run.row in (rows or [run.row]) and str(run.seed) in (seeds or [str(run.seed)])]


def cost(cfg: Config) -> dict[str, float]:
    """Operations of a training step and number of trainable parameters, the same on every machine."""
    heads = cfg.model.heads != "none"
    # One class stands for all: heads cost next to nothing, and their number is only known once the data is read.
    model = create_model(cfg.model, cfg.loss, {"action": 1} if heads else None)
    freeze(model, cfg)
    text = 0 if heads else TEXT_LENGTH
    sizes = model.geometry, cfg.model.num_frames, text, cfg.model.patch_dropout, cfg.model.fast
    return {
        "gflop_per_step": cfg.train.global_batch_size * step_flops(*sizes, boxes=cfg.loss.boxes > 0) / 1e9,
        "million_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6,
    }


def train(run: Run) -> float:
    """Run to the end; returns the seconds it took. Raises :class:`UserError` if the run ended early."""
    begin = time.monotonic()
    run.folder.mkdir(parents=True, exist_ok=True)
    # Appended: a resumed run keeps the log of its first part.
    with (run.folder / "log.txt").open("a") as out:
        code = subprocess.run(run.command, stdout=out, stderr=out, check=False).returncode
    if code or (run.trains and int(steps_of(run)[-1]["step"]) < Schedule.of(run.cfg, steps_per_epoch=1).total):
        raise UserError(f"{run.folder}: the run ended early (exit code {code}); see {run.folder}/log.txt")
    if not run.trains:
        (run.folder / "config.yml").write_text(config.to_yaml(run.cfg))
    # Last, so that a run that was killed before this line counts as unfinished and is resumed.
    (run.folder / DONE_FILE).touch()
    return time.monotonic() - begin


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
        spent = {"start": True} if row.start else cost(of_row[0].cfg)
        rows[name] = {"title": row.title, **spent, "seeds": of_seed}
    least = at_equal_flops(rows)
    return {
        "commit": git_commit(),
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
    trained = [row for row in rows.values() if not row.get("start")]
    spent = [row["gflop_per_step"] * one["steps"] for row in trained for one in row["seeds"].values()]
    least = min(spent, default=0.0)
    for row in trained:
        for one in row["seeds"].values():
            one["at_equal_flops"] = _nearest(one["val"], least / row["gflop_per_step"])
    return least


def _of_run(run: Run, tuned: bool, names: Iterable[str]) -> dict[str, Any]:
    if not run.trains:
        metrics = json.loads((run.folder / RESULTS_FILE).read_text())["metrics"]
        if tuned:
            return {"steps": 0, "val": {0: _metrics(metrics, "val/", names)}}
        return _test(metrics, names)
    lines = steps_of(run)
    val = {int(line["step"]): metrics for line in lines if (metrics := _metrics(line, "val/", names))}
    speeds = [line["train/clips_per_second"] for line in lines if "train/clips_per_second" in line]
    result = {
        "commit": json.loads((run.folder / "environment.json").read_text())["commit"],
        "steps": max(val),
        "seconds_per_step": run.cfg.train.global_batch_size / float(np.median(speeds)),
        "val": val,
    }
    if not tuned:
        result |= _test(json.loads((run.folder / RESULTS_FILE).read_text())["metrics"], names)
    return result


def _test(metrics: dict[str, float], names: Iterable[str]) -> dict[str, Any]:
    controls = {name: _metrics(metrics, f"test/{name}/", names) for name in CONTROLS}
    return {"test": _metrics(metrics, "test/", names), "controls": controls}


def _metrics(line: dict[str, float], prefix: str, names: Iterable[str]) -> dict[str, float]:
    return {name: line[prefix + name] for name in names if prefix + name in line}


def _nearest(val: dict[int, dict[str, float]], step: float) -> dict[str, float]:
    return val[min(val, key=lambda each: abs(each - step))]


def tables(results: dict[str, Any]) -> str:
    """The study as Markdown."""
    world, metrics, chance = results["world_of_the_numbers"], results["metrics"], results["chance"]
    head = ["row", *metrics.values(), "GFLOP a step", "s a step", "M trainable", "seeds"]
    lines = [
        f"{results['note']}; mean ± standard deviation over seeds, {world} world, equal steps:",
        "",
        *_header(head),
    ]
    for row in results["rows"].values():
        seeds = list(row["seeds"].values())
        last = [one["test"] if world == "test" else one["val"][one["steps"]] for one in seeds]
        cells = [_spread([each[name] for each in last if name in each]) for name in metrics]
        if row.get("start"):
            costs = ["-", "-", "-", str(len(seeds))]
        else:
            seconds = _spread([one["seconds_per_step"] for one in seeds], "{:.2f}")
            costs = [f"{row['gflop_per_step']:.0f}", seconds, f"{row['million_trainable']:.1f}", str(len(seeds))]
        lines.append(_line([row["title"], *cells, *costs]))
    lines += ["", f"At equal training FLOPs ({results['equal_flops']}):", "", *_header(["row", *metrics.values()])]
    for row in (each for each in results["rows"].values() if not each.get("start")):
        equal = [one["at_equal_flops"] for one in row["seeds"].values()]
        lines.append(_line([row["title"], *(_spread([e[name] for e in equal if name in e]) for name in metrics)]))
    if world == "test":
        lines += ["", "With time destroyed (test world, both paths alike):", ""]
        lines += _header(["row", "questions", "as filmed", *CONTROLS])
        for row in results["rows"].values():
            for name in chance:
                seeds = list(row["seeds"].values())
                under = [[one["controls"][control][name] for one in seeds] for control in CONTROLS]
                cells = [_spread(values) for values in ([one["test"][name] for one in seeds], *under)]
                lines.append(_line([row["title"], metrics[name], *cells]))
    return "\n".join(lines) + "\n"


def _header(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float], form: str = "{:.1f}") -> str:
    if not values:
        return "-"
    mean = form.format(float(np.mean(values)))
    return f"{mean} ± {form.format(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the metrics over training: a line per row, and the range of its seeds."""
    metrics, chance = results["metrics"], results["chance"]
    figure = new_figure((13, 4))
    if figure is None:
        return
    ((*axes,),) = figure.subplots(1, len(chance), sharey=True, squeeze=False)
    for axis, name in zip(axes, chance, strict=True):
        for row in (each for each in results["rows"].values() if not each.get("start")):
            curves = [one["val"] for one in row["seeds"].values()]
            steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
            values = np.array([[curve[step].get(name, np.nan) for step in steps] for curve in curves])
            if steps:
                (line,) = axis.plot(steps, values.mean(axis=0), label=row["title"])
                axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15)
        axis.axhline(chance[name], color="grey", linestyle=":", linewidth=1)
        axis.set(title=metrics[name], xlabel="steps")
    axes[0].set_ylabel("val world (%)")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(argv: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    cli.add_config_file(parser, "configs/ablation_demo.yml")
    add("--only", default="", metavar="ROW,ROW", help="these rows only")
    add("--seeds", default="", metavar="N,N", help="these seeds only")
    add("--tune", action="store_true", help="use the val world only; separate runs under OUTPUT/tune")
    add("--tables", action="store_true", help="train nothing")
    add("--dry_run", action="store_true", help="list the runs to do, and exit")
    args = parser.parse_args(argv)
    study = read_study(Path(args.config_file))
    world, runs = study.world, plan(study, Path(args.config_file), args.tune)
    chosen = select(runs, *([name for name in text.split(",") if name] for text in (args.only, args.seeds)))
    todo = [run for run in chosen if not run.done]
    log.info("%d of %d runs are done", len(chosen) - len(todo), len(chosen))
    if args.dry_run:
        for run in todo:
            what = f"{cost(run.cfg)['gflop_per_step']:.0f} GFLOP a step" if run.trains else "measured, not trained"
            print(f"{run.row}, seed {run.seed}: {what}, {run.folder}")
        return cli.DONE
    if not args.tables:
        make_world(Path(world.folder), scale=world.scale, variant=world.variant)
        if study.program != Study.program:
            # Fine-tuning reads the benchmarks' formats.
            for split in ("val", "test"):
                write_benchmarks(Path(world.folder), split)
        seconds = []
        for number, run in enumerate(todo):
            left = f", {timedelta(seconds=round(np.mean(seconds) * (len(todo) - number)))} left" if seconds else ""
            log.info("run %d of %d: %s, seed %d%s", number + 1, len(todo), run.row, run.seed, left)
            seconds.append(train(run))
    results = gather(study, runs, args.tune)
    output = Path(study.output)
    output.mkdir(parents=True, exist_ok=True)
    name = "tune" if args.tune else "final"
    write_json(output / f"{name}.json", results)
    (output / f"{name}.md").write_text(tables(results))
    plot(results, output / f"{name}.png")
    print(tables(results))
    log.info("wrote %s/%s.json, .md and .png", output, name)
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
