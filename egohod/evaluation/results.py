"""What is shown of the results: a console table, results.json and its sidecars, and results.md.

<output>/results.json            every number with interval, chance, protocol, checksums and versions
<output>/results.md              a row for each benchmark, to be pasted into a README
<output>/details/<name>.json     what they are made of, clip by clip, for galleries and plots
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from egohod.config import Config, to_yaml
from egohod.distributed import Distributed
from egohod.evaluation.embed import PLAIN
from egohod.evaluation.features import write_json, write_text
from egohod.evaluation.metrics import CHANCE, DROP, Score
from egohod.evaluation.models import CONTROLS
from egohod.evaluation.runner import Benchmark, Measured

log = logging.getLogger(__name__)

RESULTS_FILE, MARKDOWN_FILE, DETAILS_FOLDER = "results.json", "results.md", "details"
FORMAT = 1
_PACKAGES = ("egohod", "torch", "numpy", "torchvision", "open_clip_torch")


def report(
    folder: str | Path,
    cfg: Config,
    dist: Distributed,
    found: Sequence[tuple[Benchmark, Measured]],
    *,
    checkpoint: Mapping[str, Any],
    also: Mapping[str, float] | None = None,
    published: str | None = None,
) -> None:
    """Log the table and write ``results.json``, its sidecars and ``results.md``; only the first process does.

    ``checkpoint`` says what was evaluated (path, sha256). ``also`` are numbers by name that were measured elsewhere,
    such as those on the val world while training. ``published`` is a model of :mod:`~egohod.evaluation.results`
    whose numbers stand beside ours. Raises :class:`OSError` when a file cannot be written; an older one is then
    untouched.
    """
    if not dist.is_main:
        return
    flat = dict(also or {})
    for benchmark, measured in found:
        flat |= {f"{benchmark.name}/{name}": value for name, value in measured.flat().items()}
    log.info("results\n%s", table(flat))
    for benchmark, measured in found:
        for note in _notes(benchmark, measured):
            log.info("%s: %s", benchmark.name, note)
    described = {
        benchmark.name: describe(benchmark, measured, PUBLISHED.get(published or "", {}))
        for benchmark, measured in found
    }
    if published:
        log.info("beside %s, as published\n%s", published, comparison(described))
    settings = to_yaml(cfg)
    results = {
        "format": FORMAT,
        "checkpoint": dict(checkpoint),
        "config": {"sha256": hashlib.sha256(settings.encode()).hexdigest(), "model": cfg.model.name},
        "versions": _versions(),
        "device": str(dist),
        "metrics": flat,
        "benchmarks": described,
    }
    for benchmark, measured in found:
        write_json(Path(folder) / DETAILS_FOLDER / f"{benchmark.name}.json", details(benchmark, measured))
    write_json(Path(folder) / RESULTS_FILE, results)
    if found:
        rows = markdown(results)
        write_text(Path(folder) / MARKDOWN_FILE, rows)
        log.info("for a README (%s)\n%s", Path(folder) / MARKDOWN_FILE, rows.rstrip())


def describe(benchmark: Benchmark, measured: Measured, published: Mapping[str, float]) -> dict[str, Any]:
    """A benchmark in ``results.json``: protocol, coverage, notes, timing and every metric."""
    plain, protocol = measured.scores[PLAIN], benchmark.dataset.protocol
    metrics = {}
    for name, score in plain.items():
        controls = {
            control: _number(scores[name]) | _drop(score, scores[name])
            for control, scores in measured.scores.items()
            if control != PLAIN
        }
        metrics[name] = _number(score) | {"chance": score.chance, "controls": controls}
        if (known := published.get(f"{benchmark.name}/{name}")) is not None:
            metrics[name] |= {"published": known, "difference": score.value - known}
    report, seconds = measured.report, measured.report.seconds
    encoded = report.clips - report.from_cache - len(report.faults)
    return {
        "protocol": dataclasses.asdict(protocol) | {"size": benchmark.dataset.size},
        "heads": benchmark.classes is not None,
        "clips": report.clips,
        "evaluated": len(measured.kept),
        "partial": len(measured.kept) < report.clips,
        "missing": [report.faults[i] for i in sorted(report.faults)],
        "notes": _notes(benchmark, measured),
        "timing": {
            "seconds": seconds,
            "clips_per_second": encoded / seconds if seconds and encoded else None,
            "waiting_for_clips": report.waiting / seconds if seconds and encoded else None,
            "from_cache": report.from_cache,
            "decoder": benchmark.dataset.decoder,
            "precision": str(benchmark.execution.precision).removeprefix("torch."),
        },
        "metrics": metrics,
        "details": f"{DETAILS_FOLDER}/{benchmark.name}.json",
    }


def details(benchmark: Benchmark, measured: Measured) -> dict[str, Any]:
    """The sidecar of a benchmark: its clips, and what each table says about every one of them."""
    clips, rows = benchmark.dataset.clips, measured.kept
    ends = [float(clips.end[i]) for i in rows]
    return {
        "format": FORMAT,
        "clips": {
            "root": clips.root,
            "layout": clips.layout,
            "chunk_seconds": clips.chunk_seconds,
            "min_clip_seconds": clips.min_clip_seconds,
            "id": [clips.ids[i] for i in rows],
            "video": [clips.videos[i] for i in rows],
            "start": [float(clips.start[i]) for i in rows],
            "end": [end if end != float("inf") else None for end in ends],
        },
        "tables": list(measured.details),
    }


def table(results: Mapping[str, float], title: str = "") -> str:
    """Results as a console table; beside each number its chance level and the scores under the temporal controls."""
    controls = [name for name in CONTROLS if any(_control(key) == name for key in results)]
    shown = [(key, value) for key, value in results.items() if not key.endswith((CHANCE, DROP)) and not _control(key)]
    width = max([len(key) for key, _ in shown] + [len(title)])
    lines = ["  ".join([f"{title:<{width}}", *(f"{name:>8}" for name in ("result", "chance", *controls))])]
    for key, value in shown:
        group, slash, metric = key.rpartition("/")
        beside = [results.get(key + CHANCE), *(results.get(f"{group}{slash}{name}/{metric}") for name in controls)]
        cells = [value, *beside]
        unit = " " if "rank" in key else "%"
        lines.append(
            "  ".join([f"{key:<{width}}", *(f"{'-' if cell is None else f'{cell:.1f}{unit}':>8}" for cell in cells)])
        )
    return "\n".join(line.rstrip() for line in lines)


def comparison(described: Mapping[str, Mapping[str, Any]]) -> str:
    """Our number, the published one and the difference, a line each."""
    lines = [f"{'':<28}  {'ours':>8}  {'published':>9}  {'difference':>10}"]
    for name, each in described.items():
        for metric, number in each["metrics"].items():
            if "published" in number:
                lines.append(
                    f"{name + '/' + metric:<28}  {number['value']:7.1f}%  {number['published']:8.1f}%  "
                    f"{number['difference']:+10.1f}"
                )
    return "\n".join(lines) if len(lines) > 1 else "no number of these benchmarks is published for it"


def _number(score: Score) -> dict[str, Any]:
    return {"value": score.value, "unit": "rank" if score.is_rank else "percent", "interval": list(score.interval())}


def _drop(plain: Score, under: Score) -> dict[str, Any]:
    value, interval = plain.drop_to(under)
    return {"drop": value, "drop_interval": list(interval)}


def _notes(benchmark: Benchmark, measured: Measured) -> list[str]:
    """What a report must not hide."""
    lengths = benchmark.dataset.length_note()
    return [*benchmark.notes, *([lengths] if lengths else []), *_coverage(measured)]


def _coverage(measured: Measured) -> list[str]:
    total, kept = measured.report.clips, len(measured.kept)
    return [] if kept == total else [f"PARTIAL: {kept} of {total} clips ({100 * kept / total:.1f} %) could be read"]


def _control(key: str) -> str | None:
    """The temporal control that a result was measured under."""
    return next((part for part in key.split("/")[:-1] if part in CONTROLS), None)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


_NAMES = ("ek100_mir/map", "ek100_mir/ndcg", "ek100_cls/action_top1", "egtea/action_top1", "egtea/action_mean_class")
_MCQ = ("egomcq/inter", "egomcq/intra")


def _published(*numbers: float | None) -> dict[str, float]:
    return {name: value for name, value in zip(_NAMES + _MCQ, numbers, strict=True) if value is not None}


PUBLISHED: dict[str, dict[str, float]] = {
    "EgoVideo-L": _published(41.8, None, 24.0, 51.7, 47.1, 95.9, 65.5),
    "EgoVideo-G": _published(47.1, None, 28.5, 63.0, None, None, 69.1),
    "EVA02-AT-B": _published(34.3, 34.1, None, None, None, 95.0, 63.2),
    "EVA02-AT-L": _published(38.9, 36.2, None, None, None, 95.9, 66.5),
    "EgoVideo-2024": _published(45.9, 38.6, None, None, None, None, None),
    "AVION-B": _published(32.9, 32.7, None, None, None, 94.5, 61.4),
    "AVION-L": _published(37.6, 35.3, None, None, None, 95.4, 64.5),
    "LaViLa-B": _published(30.9, 32.0, None, None, 28.9, 93.8, 59.9),
    "LaViLa-L": _published(36.1, 34.6, None, None, 34.1, 94.5, 63.1),
}


# What a benchmark is told by, with the names of the field; one without any of these is told by its first number.
_HEADLINES = {
    "map": "mAP",
    "ndcg": "nDCG",
    "action_top1": "top-1",
    "action_mean_class": "mean class",
    "inter": "inter",
    "intra": "intra",
}


def markdown(results: Mapping[str, Any]) -> str:
    """The table for ``results`` as ``results.json`` has them.

    Each row holds the benchmark's main numbers with their 95 % intervals, protocol, clips and the checksum of the
    weights; of a partial evaluation it says so.
    """
    model = f"{results['config']['model']} `{results['checkpoint']['sha256'][:12]}`"
    lines = [
        "| benchmark | result, % [95 % interval] | protocol | clips | weights |",
        "|---|---|---|---|---|",
    ]
    for name, each in results["benchmarks"].items():
        protocol = each["protocol"]
        views = protocol["windows"] * protocol["crops"]
        shown = f"{protocol['name']}: {protocol['frames']} frames, {protocol['size']} px"
        shown += f", {views} views" if views > 1 else ""
        shown += ", classification heads" if each.get("heads") else ""
        clips = (
            f"{each['clips']:,}" if not each["partial"] else f"**partial**: {each['evaluated']:,} of {each['clips']:,}"
        )
        cells = [name, _numbers(each["metrics"]), shown, clips, model]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _numbers(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    names = {name: title for name, title in _HEADLINES.items() if name in metrics}
    names = names or {name: name for name in list(metrics)[:1]}
    return ", ".join(f"{title} {_interval_text(metrics[name])}" for name, title in names.items())


def _interval_text(metric: Mapping[str, Any]) -> str:
    low, high = metric["interval"]
    # A metric without a single query has no value, and NaN is unequal to itself.
    return f"{metric['value']:.1f} [{low:.1f}, {high:.1f}]" if metric["value"] == metric["value"] else "-"
