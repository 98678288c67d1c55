"""``report.html``: what ``results.json`` and ``details/*.json`` of an evaluation say, as one page to look at."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from egohod.errors import UserError
from egohod.evaluation.gallery import Gallery, gallery
from egohod.evaluation.page import data_uri, render
from egohod.evaluation.plots import SHOWN_CLASSES, confusion_plot
from egohod.evaluation.report import FORMAT, RESULTS_FILE, read_json, write_text
from egohod.evaluation.thumbnails import Thumbnails

log = logging.getLogger(__name__)

PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Classes:
    """How each class fared: (name, clips, percent), the worst first; and what it was taken for, as data URI."""

    rows: Sequence[tuple[str, int, float]]
    measure: str
    confusion: str | None
    confusion_of: int


@dataclass(frozen=True)
class Section:
    """One benchmark: its entry of ``results.json`` and what was made of its sidecar."""

    name: str
    said: Mapping[str, Any]
    controls: Sequence[str]
    classes: Sequence[Classes]
    galleries: Sequence[Gallery]
    pictures: Thumbnails | None


def write_report(folder: str | Path, *, decoder: str = "auto") -> Path:
    """Write ``report.html`` into the output folder of an evaluation, and return where it is.

    Thumbnails are decoded from the clips that the sidecars name; those that are gone have none. Raises
    :class:`UserError` if the folder holds no results, or such as cannot be read.
    """
    folder = Path(folder)
    results, path = _read(folder / RESULTS_FILE), folder / RESULTS_FILE
    sections = []
    try:
        for name, said in results["benchmarks"].items():
            path = folder / said["details"]
            sections.append(_section(name, said, _read(path) if path.is_file() else None, decoder))
            path = folder / RESULTS_FILE
        html = render("report.html.jinja", results=results, sections=sections, shown_classes=SHOWN_CLASSES)
    except UserError:  # which is a ValueError, and clear already
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        raise UserError(f"{path}: not what an evaluation writes ({type(error).__name__}: {error})") from error
    write_text(folder / PAGE_FILE, html)
    log.info("wrote %s (%.1f MB)", folder / PAGE_FILE, (folder / PAGE_FILE).stat().st_size / 1e6)
    return folder / PAGE_FILE


def _section(name: str, said: Mapping[str, Any], details: Mapping[str, Any] | None, decoder: str) -> Section:
    controls = list(dict.fromkeys(control for each in said["metrics"].values() for control in each["controls"]))
    if details is None:
        return Section(name, said, controls, [], [], None)
    tables = details["tables"]
    return Section(
        name,
        said,
        controls,
        [_classes(table) for table in tables if table.get("per_class")],
        [gallery(table, details["clips"]) for table in tables],
        Thumbnails(details["clips"], decoder),
    )


def _classes(table: Mapping[str, Any]) -> Classes:
    measure = "accuracy" if "accuracy" in table["per_class"][0] else "average_precision"
    rows = [(table["classes"][each["class"]], each["clips"], each[measure]) for each in table["per_class"]]
    # Of two equally bad classes the one that more clips speak for is worse news.
    rows.sort(key=lambda row: (row[2], -row[1], row[0]))
    confusion = table.get("confusion")
    png = confusion_plot(confusion, table["classes"]) if confusion else None
    plot = None if png is None else data_uri(png, "image/png")
    seen = len({code for true, told, _ in confusion for code in (true, told)}) if confusion else 0
    return Classes(rows, measure.replace("_", " "), plot, seen)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, FORMAT, "give the --output folder of main_eval.py")
