"""``results.md``: a row for each benchmark, to be pasted into a README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    return ", ".join(f"{title} {_number(metrics[name])}" for name, title in names.items())


def _number(metric: Mapping[str, Any]) -> str:
    low, high = metric["interval"]
    # A metric without a single query has no value, and NaN is unequal to itself.
    return f"{metric['value']:.1f} [{low:.1f}, {high:.1f}]" if metric["value"] == metric["value"] else "-"
