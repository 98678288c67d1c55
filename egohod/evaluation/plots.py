"""Plots for pages, as PNG files in memory."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# More classes than this nobody can read.
SHOWN_CLASSES = 20
_INK = "#22313f"


def most_confused(confusion: Sequence[Sequence[int]], limit: int = SHOWN_CLASSES) -> list[int]:
    """Classes of the most mistakes, as truth or as answer, at most ``limit``, ascending.

    ``confusion`` holds [true class, told class, clips].
    """
    mistakes: dict[int, int] = {}
    for true, told, clips in confusion:
        for code in (true, told):
            mistakes[code] = mistakes.get(code, 0) + (clips if true != told else 0)
    return sorted(sorted(mistakes, key=lambda code: (-mistakes[code], code))[:limit])


def confusion_plot(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> bytes:
    """What clips of each class were taken for, in percent of the class, as PNG; of many classes the most confused.

    Takes no names for markup: they are drawn letter by letter.
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
    figure = Figure(figsize=(side, side), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
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
