"""The results of an evaluation: console table, results.json with its details, and results.md.

<output>/results.json            every number with interval, chance level, protocol, checksums and versions
<output>/results.md              a row for each benchmark, for a README
<output>/details/<name>.json     the answers clip by clip, from which report.html is made
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from egohod.config import Config, to_yaml
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.evaluation.cards import PUBLISHED
from egohod.evaluation.embed import CONTROLS, PLAIN
from egohod.evaluation.features import read_json, write_json
from egohod.evaluation.metrics import CHANCE, DROP
from egohod.evaluation.runner import BenchmarkResult, Measured
from egohod.runtime import write_text

log = logging.getLogger(__name__)

RESULTS_FILE, MARKDOWN_FILE, DETAILS_FOLDER = "results.json", "results.md", "details"
FORMAT = 1
# What a number depends on beside the code: decoding, image resizing and kernels change with versions.
_PACKAGES = ("egohod", "torch", "numpy", "torchvision", "open_clip_torch")

# Main metrics of a benchmark and their names in papers; of a benchmark without any of them all are shown.
_HEADLINES = {
    "map": "mAP",
    "ndcg": "nDCG",
    "action_top1": "top-1",
    "action_mean_class": "mean class",
    "inter": "inter",
    "intra": "intra",
    "action": "action",
    "verb": "verb",
    "noun": "noun",
    "process": "process",
    "location": "location",
    "state": "state",
    "parts": "parts",
    "objects": "objects AP",
    "recall_1_mean": "recall@1",
}


def write_results(
    folder: str | Path,
    cfg: Config,
    dist: Distributed,
    evaluated: Sequence[tuple[Measured, BenchmarkResult]],
    *,
    checkpoint: Mapping[str, Any],
    also: Mapping[str, float] | None = None,
    published: str | None = None,
) -> None:
    """Log the table and write ``results.json``, its details and ``results.md``; only the first process does.

    ``checkpoint`` is what was evaluated (path, sha256, and of an ensemble the members, each with its path, sha256 and
    model); ``also`` further numbers by name, such as those of the
    validation benchmarks while training; ``published`` a model of ``PUBLISHED`` to compare with. Raises
    :class:`OSError` when a file cannot be written; an older one is then untouched.
    """
    if not dist.is_main:
        return
    folder = Path(folder)
    results = contents(cfg, dist, evaluated, checkpoint=checkpoint, also=also, published=published)
    log.info("results\n%s", table(results["metrics"]))
    for name, described in results["benchmarks"].items():
        for note in described["notes"]:
            log.info("%s: %s", name, note)
    if published:
        log.info("comparison with %s, as published\n%s", published, comparison(results["benchmarks"]))
    for benchmark, result in evaluated:
        write_json(folder / DETAILS_FOLDER / f"{benchmark.name}.json", details(benchmark, result))
    # After its details: whoever finds results.json finds all that it names.
    write_json(folder / RESULTS_FILE, results)
    if evaluated:  # a training run may end without a benchmark
        rows = markdown(results)
        write_text(folder / MARKDOWN_FILE, rows)
        log.info("for a README (%s)\n%s", folder / MARKDOWN_FILE, rows.rstrip())


def contents(
    cfg: Config,
    dist: Distributed,
    evaluated: Sequence[tuple[Measured, BenchmarkResult]],
    *,
    checkpoint: Mapping[str, Any],
    also: Mapping[str, float] | None = None,
    published: str | None = None,
) -> dict[str, Any]:
    """The content of ``results.json``; arguments as of :func:`write_results`."""
    flat, described = dict(also or {}), {}
    for benchmark, result in evaluated:
        flat |= {f"{benchmark.name}/{name}": value for name, value in result.flat().items()}
        described[benchmark.name] = describe(benchmark, result, PUBLISHED.get(published or "", {}))
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        # egohod itself is not installed where it runs from a checkout.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "format": FORMAT,
        "checkpoint": dict(checkpoint),
        # Of the configuration that took effect: overrides of the command line are in no file.
        "config": {"sha256": hashlib.sha256(to_yaml(cfg).encode()).hexdigest(), "model": cfg.model.name},
        "versions": versions,
        "device": str(dist),
        "metrics": flat,
        "benchmarks": described,
    }


def describe(benchmark: Measured, result: BenchmarkResult, published: Mapping[str, float]) -> dict[str, Any]:
    """A benchmark in ``results.json``: protocol, coverage, notes, timing and every metric."""
    metrics: dict[str, Any] = {}
    for name, plain in result.scores[PLAIN].items():
        numbers = {}
        for order, scores in result.scores.items():
            score, unit = scores[name], "rank" if scores[name].is_rank else "percent"
            numbers[order] = {"value": score.value, "unit": unit, "interval": list(score.interval())}
            if order != PLAIN:
                # The interval is of the drop itself: two orders of the same clips vary together.
                interval = list(plain.interval(minus=score))
                numbers[order] |= {"drop": plain.value - score.value, "drop_interval": interval}
        metrics[name] = numbers.pop(PLAIN) | {"chance": plain.chance, "controls": numbers}
        if (reference := published.get(f"{benchmark.name}/{name}")) is not None:
            metrics[name] |= {"published": reference, "difference": plain.value - reference}
    report, seconds, evaluated = result.report, result.report.seconds, len(result.rows)
    # Rates are of what was computed: reading the cache is no throughput.
    encoded = report.clips - report.from_cache - len(report.faults)
    about, partial = benchmark.about(), evaluated < report.clips
    notes = list(about["notes"])
    if partial:
        # Loud, as such a number is easily taken for the benchmark's.
        share = 100 * evaluated / report.clips
        notes.append(f"PARTIAL: {evaluated} of {report.clips} clips ({share:.1f} %) could be read")
    reranked, scoring = {}, list(about["scoring"])
    if (stage := result.reranking) is not None:
        scoring.append(f"top {stage.top_k} reranked")
        notes.append(
            f"RERANKED: the first {stage.top_k} candidates of every query, {stage.gflop_per_query:.3g} GFLOP a query, "
            f"{stage.seconds:.1f} s; not comparable with numbers of a dual encoder alone"
        )
        gains = {name: result.scores[PLAIN][name].interval(minus=each) for name, each in stage.first_stage.items()}
        reranked["rerank"] = {
            "top_k": stage.top_k,
            "gflop_per_query": stage.gflop_per_query,
            "seconds": stage.seconds,
            "trained": stage.trained,
            # Of the same queries, which vary together: the interval is of the gain itself.
            "first_stage": {
                name: {"value": each.value, "gain": result.scores[PLAIN][name].value - each.value}
                | {"gain_interval": list(gains[name])}
                for name, each in stage.first_stage.items()
            },
        }
    return reranked | {
        "protocol": about["protocol"],
        "heads": about["heads"],
        "scoring": scoring,
        "clips": report.clips,
        "evaluated": evaluated,
        "partial": partial,
        "missing": [report.faults[i] for i in sorted(report.faults)],
        "notes": notes,
        "timing": {
            "seconds": seconds,
            "clips_per_second": encoded / seconds if seconds and encoded else None,
            "waiting_for_clips": report.waiting / seconds if seconds and encoded else None,
            "from_cache": report.from_cache,
            **about["timing"],
        },
        "metrics": metrics,
        "details": f"{DETAILS_FOLDER}/{benchmark.name}.json",
    }


def details(benchmark: Measured, result: BenchmarkResult) -> dict[str, Any]:
    """The content of ``details/<name>.json``: the clips, and the details of each task."""
    return {"format": FORMAT, "clips": benchmark.clips_of(result.rows), "tables": list(result.details)}


def table(results: Mapping[str, float], title: str = "") -> str:
    """Results as a console table: each number, its chance level and its values under the temporal controls."""

    # The temporal control of each number: a folder of its name, wherever that is.
    control_of = {key: next((part for part in key.split("/")[:-1] if part in CONTROLS), None) for key in results}
    # Only the controls that were measured get a column.
    controls = [name for name in CONTROLS if name in control_of.values()]
    shown = [(key, value) for key, value in results.items() if not key.endswith((CHANCE, DROP)) and not control_of[key]]
    width = max([len(key) for key, _ in shown] + [len(title)])
    lines = ["  ".join([f"{title:<{width}}", *(f"{name:>8}" for name in ("result", "chance", *controls))])]
    for key, value in shown:
        group, slash, metric = key.rpartition("/")
        others = [results.get(key + CHANCE), *(results.get(f"{group}{slash}{name}/{metric}") for name in controls)]
        # Ranks are no percentages.
        unit = " " if "rank" in key else "%"
        cells = [f"{'-' if cell is None else f'{cell:.1f}{unit}':>8}" for cell in (value, *others)]
        lines.append("  ".join([f"{key:<{width}}", *cells]))
    return "\n".join(line.rstrip() for line in lines)


def comparison(described: Mapping[str, Mapping[str, Any]]) -> str:
    """Our number, the published one and the difference, a line each."""
    # Only numbers that exist on both sides; a paper has few of ours.
    lines = [f"{'':<28}  {'ours':>8}  {'published':>9}  {'difference':>10}"]
    for name, each in described.items():
        for metric, number in each["metrics"].items():
            if "published" in number:
                lines.append(
                    f"{name + '/' + metric:<28}  {number['value']:7.1f}%  {number['published']:8.1f}%  "
                    f"{number['difference']:+10.1f}"
                )
    return "\n".join(lines) if len(lines) > 1 else "no number of these benchmarks is published for it"


def markdown(results: Mapping[str, Any]) -> str:
    """The content of ``results.md`` for that of ``results.json``.

    A row has the benchmark's main metrics with their 95 % intervals, protocol, clips and the checksum of the weights;
    a partial evaluation is marked.
    """
    checkpoint, name = results["checkpoint"], results["config"]["model"]
    members = checkpoint.get("members") or [{"model": name, "sha256": checkpoint["sha256"]}]
    model = " + ".join(f"{each['model']} `{each['sha256'][:12]}`" for each in members)
    lines = ["| benchmark | result, % [95 % interval] | protocol | clips | weights |", "|---|---|---|---|---|"]
    for name, each in results["benchmarks"].items():
        metrics, protocol, clips = each["metrics"], each["protocol"], f"{each['clips']:,}"
        numbers = []
        for key, title in headlines(metrics).items():
            value, (low, high) = metrics[key]["value"], metrics[key]["interval"]
            # NaN, the value of a metric without a single query, is unequal to itself.
            numbers.append(f"{title} {value:.1f} [{low:.1f}, {high:.1f}]" if value == value else f"{title} -")
        views = protocol["windows"] * protocol["crops"]
        shown = f"{protocol['name']}: {protocol['frames']} frames, {protocol['size']} px"
        shown += f", {views} views" if views > 1 else ""
        shown += ", classification heads" if each.get("heads") else ""
        shown += "".join(f", {words}" for words in each.get("scoring", []))
        clips = f"**partial**: {each['evaluated']:,} of {clips}" if each["partial"] else clips
        # A | in a name would end the cell.
        cells = [cell.replace("|", "\\|") for cell in (name, ", ".join(numbers), shown, clips, model)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def headlines(metrics: Iterable[str]) -> dict[str, str]:
    """The main ones of a benchmark's ``metrics``, and their titles; all of them where none is known."""
    names = list(metrics)
    return {key: title for key, title in _HEADLINES.items() if key in names} or {name: name for name in names}


def mean_table(folders: Sequence[Path]) -> str:
    """A table of every metric that all evaluations in ``folders`` have: of each, and the mean.

    Raises :class:`UserError` if they have none in common.
    """
    metrics = []
    for folder in folders:
        content = read_json(folder / RESULTS_FILE, FORMAT, "main_eval.py and main_finetune.py write it").get("metrics")
        named = content.items() if isinstance(content, dict) else ()
        # A metric of not a single query is null.
        metrics.append({name: value for name, value in named if isinstance(value, (int, float))})
    # Chance levels are left out: their mean over seeds says nothing.
    common = [name for name in metrics[0] if all(name in each for each in metrics) and not name.endswith(CHANCE)]
    if not common:
        raise UserError(f"{', '.join(map(str, folders))}: have no metric in common")
    lines = [f"{'metric':<32}" + "".join(f"{each.name[-14:]:>16}" for each in folders) + f"{'mean':>10}"]
    for name in common:
        values = [each[name] for each in metrics]
        lines.append(f"{name:<32}" + "".join(f"{value:>16.2f}" for value in values) + f"{np.mean(values):>10.2f}")
    return "\n".join(lines)
