"""Plots for pages and tools, drawn to files and never shown."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# More classes than this nobody can read.
SHOWN_CLASSES = 20
_INK = "#22313f"


def new_figure(size: tuple[float, float], **options: Any) -> Figure | None:
    """An empty figure of ``size`` inches for ``savefig``; None, with a warning, where matplotlib cannot be used.

    ``options`` are those of :class:`matplotlib.figure.Figure`.
    """
    kind = _figure_class()
    return None if kind is None else kind(figsize=size, **options)


@cache
def _figure_class() -> type[Figure] | None:
    # A terminal that a notebook opened names the notebook's backend, which may not be installed here: then matplotlib
    # cannot even be imported. A figure of its own needs none.
    fresh = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None) if fresh else None
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except Exception as error:  # a broken installation can raise anything
        log.warning("no plots: matplotlib cannot be used (%s); pip install --force-reinstall matplotlib", error)
        return None
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        # For whoever shows figures in this process, such as a notebook.
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return Figure


def most_confused(confusion: Sequence[Sequence[int]], limit: int = SHOWN_CLASSES) -> list[int]:
    """Classes of the most mistakes, as truth or as answer, at most ``limit``, ascending.

    ``confusion`` holds [true class, told class, clips].
    """
    mistakes: dict[int, int] = {}
    for true, told, clips in confusion:
        for code in (true, told):
            mistakes[code] = mistakes.get(code, 0) + (clips if true != told else 0)
    return sorted(sorted(mistakes, key=lambda code: (-mistakes[code], code))[:limit])


def confusion_plot(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> bytes | None:
    """What clips of each class were taken for, in percent of the class, as PNG; of many classes the most confused.

    Takes no names for markup: they are drawn letter by letter. None where matplotlib cannot be used.
    """
    shown = most_confused(confusion)
    place = {code: i for i, code in enumerate(shown)}
    share, totals = np.zeros((len(shown), len(shown))), np.zeros(len(shown))
    for true, told, clips in confusion:
        if true in place:
            totals[place[true]] += clips
            if told in place:
                share[place[true], place[told]] += clips
    share = 100 * share / np.maximum(totals, 1)[:, None]
    side = 2.0 + 0.24 * len(shown)
    figure = new_figure((side, side), dpi=150, layout="constrained")
    if figure is None:
        return None
    axes = figure.add_subplot()
    axes.imshow(share, vmin=0, vmax=100, cmap="Blues")
    names = [textwrap.shorten(classes[code], 26, placeholder="…") for code in shown]
    axes.set_xticks(range(len(shown)), names, rotation=55, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(shown)), names, parse_math=False)
    axes.tick_params(labelsize=8, length=0, colors=_INK)
    axes.set_xlabel("taken for", color=_INK, fontsize=9)
    axes.set_ylabel("true class", color=_INK, fontsize=9)
    for row, column in zip(*np.nonzero(share >= 0.5), strict=True):
        value = share[row, column]
        colour = "white" if value > 55 else _INK
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    borders = np.arange(len(shown) + 1) - 0.5
    axes.set_xticks(borders, minor=True)
    axes.set_yticks(borders, minor=True)
    axes.grid(which="minor", color="#dfe5ea", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_color("#dfe5ea")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
