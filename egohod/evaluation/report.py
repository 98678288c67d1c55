"""``report.html``: the results of an evaluation as one page; and the pictures and plots of pages and tools.

A page is one file: pictures, style and script are inside, nothing is fetched, and all text is escaped.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from egohod.data.decoders import choose_decoder
from egohod.data.videos import VideoStore
from egohod.errors import UserError
from egohod.evaluation.features import Hit, read_json, span
from egohod.evaluation.grounding import OVERLAPS
from egohod.evaluation.page import data_uri, jpeg, render
from egohod.evaluation.results import FORMAT, RESULTS_FILE, headlines
from egohod.runtime import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

PAGE_FILE = "report.html"

# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------


def write_report(folder: str | Path, *, decoder: str = "auto") -> Path:
    """Write ``report.html`` into the output folder of an evaluation, and return its path.

    Thumbnails are decoded from the clips that the details name; a clip whose video is gone has none. Raises
    :class:`UserError` if the folder has no results, or such as cannot be read.
    """
    folder = Path(folder)
    path, hint = folder / RESULTS_FILE, "give the --output folder of main_eval.py"
    results, sections = read_json(path, FORMAT, hint), []
    try:
        for name, result in results["benchmarks"].items():
            controls = list(dict.fromkeys(name for each in result["metrics"].values() for name in each["controls"]))
            section = {"name": name, "result": result, "controls": controls, "classes": [], "galleries": []}
            section["headlines"] = headlines(result["metrics"])
            path = folder / result["details"]
            # Details are large, and may be left behind where results are kept: the page shows the numbers without them.
            if path.is_file():
                details = read_json(path, FORMAT, hint)
                clips, tables = details["clips"], details["tables"]
                section["classes"] = [_class_table(table) for table in tables if table.get("per_class")]
                section["galleries"] = [gallery(table, clips) for table in tables]
                if clips["id"]:  # a simulation has none
                    section["pictures"] = Thumbnails(clips, decoder)
            sections.append(section)
            path = folder / RESULTS_FILE
        controls = list(dict.fromkeys(name for section in sections for name in section["controls"]))
        html = render(
            "report.html.jinja", results=results, sections=sections, controls=controls, shown_classes=SHOWN_CLASSES
        )
    except UserError:  # a ValueError, too, whose message is clear already
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, jinja2.UndefinedError) as error:
        # A file that was edited, cut or written by something else can break anywhere: ``path`` is the one being read.
        raise UserError(f"{path}: not what an evaluation writes ({type(error).__name__}: {error})") from error
    write_text(folder / PAGE_FILE, html)
    log.info("wrote %s (%.1f MB)", folder / PAGE_FILE, (folder / PAGE_FILE).stat().st_size / 1e6)
    return folder / PAGE_FILE


def _class_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of a task as (name, clips, percent), lowest first, and their confusion matrix as a data URI."""
    measure = "accuracy" if "accuracy" in table["per_class"][0] else "average_precision"
    rows = [(table["classes"][each["class"]], each["clips"], each[measure]) for each in table["per_class"]]
    # Of equally bad classes the one with more clips comes first: its number is the more certain.
    rows.sort(key=lambda row: (row[2], -row[1], row[0]))
    confusion = table.get("confusion") or []  # clips with several classes have none
    png = confusion_plot(confusion, table["classes"]) if confusion else None
    return {
        "rows": rows,
        "measure": measure.replace("_", " "),
        "confusion": None if png is None else data_uri(png, "image/png"),
        "confusion_of": len({code for pair in confusion for code in pair[:2]}),
    }


# --------------------------------------------------------------------------------------------------
# Galleries: some clips with a correct answer and some with an incorrect one, spread evenly over all of them
# --------------------------------------------------------------------------------------------------

# Cards of each sort, and answers on a card; without a limit the page of a large benchmark would grow to gigabytes.
CARDS, _ANSWERS = 6, 3


@dataclass(frozen=True)
class Answer:
    """A model's answer, its similarity, and whether it is correct."""

    text: str
    similarity: float | None
    right: bool
    relevancy: float | None = None


@dataclass(frozen=True)
class Card:
    """One clip or question: its pictures with captions (rows of the clips), the truth, and the answers."""

    right: bool
    title: str
    pictures: Sequence[tuple[str, int]]
    truth: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Gallery:
    """Cards of one task, and how many clips or questions are answered correctly and incorrectly."""

    title: str
    right: Sequence[Card]
    wrong: Sequence[Card]
    right_of_all: int
    wrong_of_all: int


def gallery(table: Mapping[str, Any], clips: Mapping[str, Any]) -> Gallery:
    """The cards of one of the ``tables`` of ``details/*.json`` over its ``clips``."""
    every, shown = cards_of(table, clips), []
    groups = [card for card in every if card.right], [card for card in every if not card.right]
    for group in groups:
        # Evenly over all clips rather than the first ones, which are often of one video.
        places = np.linspace(0, len(group) - 1, min(len(group), CARDS)).round().astype(int)
        shown.append([group[i] for i in places])
    return Gallery(_KINDS[table["kind"]][0], shown[0], shown[1], len(groups[0]), len(groups[1]))


def cards_of(table: Mapping[str, Any], clips: Mapping[str, Any]) -> list[Card]:
    """All cards of a table, in the order of its clips or questions."""
    return _KINDS[table["kind"]][1](table, clips)


def _retrieval(table: Mapping[str, Any], clips: Mapping[str, Any]) -> list[Card]:
    texts, cards = table["texts"], []
    columns = (table[name] for name in ("best_texts", "similarity", "relevancy", "most_relevant_text"))
    for row, (best, similarity, relevancy, truth) in enumerate(zip(*columns, strict=True)):
        # A text of partial relevancy is no correct answer: mAP counts relevancy 1 alone as a hit.
        answers = [
            Answer(texts[text], value, rel >= 1, rel)
            for text, value, rel in zip(best, similarity, relevancy, strict=True)
        ]
        cards.append(Card(answers[0].right, _name(clips, row), [("", row)], texts[truth], answers[:_ANSWERS]))
    return cards


def _classification(table: Mapping[str, Any], clips: Mapping[str, Any]) -> list[Card]:
    classes, cards = table["classes"], []
    # Tables of several classes a clip come without similarities.
    similarities = table.get("similarity") or [[None] * len(best) for best in table["best_classes"]]
    columns = zip(table["best_classes"], similarities, table["labels"], strict=True)
    for row, (best, similarity, label) in enumerate(columns):
        true = set(label) if table["kind"] == "multilabel" else {label}
        answers = [Answer(classes[c], value, c in true) for c, value in zip(best, similarity, strict=True)]
        truth = ", ".join(classes[c] for c in sorted(true)) or "none of the classes"
        cards.append(Card(answers[0].right, _name(clips, row), [("", row)], truth, answers[:_ANSWERS]))
    return cards


def _multiple_choice(table: Mapping[str, Any], clips: Mapping[str, Any]) -> list[Card]:
    texts, cards = table["texts"], []
    for question in table["questions"]:
        taken, answer = question["taken"], question["answer"]
        # Some have several correct choices, of which one is enough.
        right = taken in (answer, *question.get("also", ()))
        # The choice, and a correct one beside it if it is wrong.
        shown = [taken] if right else [taken, answer]
        chosen = [question["choices"][i] for i in shown]
        kind, query = question["kind"].replace("_", " "), question["query"]
        if question["query_is_clip"]:
            title, pictures, truth = f"{kind}: {_name(clips, query)}", [("", query)], ""
        else:
            title, pictures, truth = kind, [], texts[query]
        # Results of earlier releases have no clips that ask for clips.
        if question["query_is_clip"] and not question.get("of_clips"):
            names = [texts[text] for text in chosen]
        else:  # the pictures are the answers
            names = [_name(clips, clip) for clip in chosen]
            captions = ["chosen" if i == taken else "correct" for i in shown]
            pictures += zip(captions, chosen, strict=True)
        truth = truth or names[-1]
        answers = [
            Answer(name, question["similarity"][i], right or i != taken) for name, i in zip(names, shown, strict=True)
        ]
        cards.append(Card(right, title, pictures, truth, answers))
    return cards


def _grounding(table: Mapping[str, Any], clips: Mapping[str, Any]) -> list[Card]:
    cards = []
    for query in table["queries"]:
        spans = [f"{start:.1f}–{end:.1f} s" for start, end, *_ in (query["best"], *query["moments"])]
        right = query["overlap"] >= OVERLAPS[-1]
        pictures = [("chosen", query["shown"]), ("correct", query["true"])]
        answer = Answer(f"{spans[0]}, overlap {query['overlap']:.2f}", None, right)
        text = table["texts"][query["text"]]
        cards.append(Card(right, f"{text}: {clips['video'][query['true']]}", pictures, ", ".join(spans[1:]), [answer]))
    return cards


_KINDS: dict[str, tuple[str, Callable[[Mapping[str, Any], Mapping[str, Any]], list[Card]]]] = {
    "retrieval": ("Retrieval: most similar texts of a clip", _retrieval),
    "classification": ("Classification: best classes of a clip", _classification),
    "multilabel": ("Classification: best classes of a clip", _classification),
    "multiple_choice": ("Multiple choice", _multiple_choice),
    "unlabelled": ("", lambda table, clips: []),  # nothing is known to be correct
    "grounding": ("Grounding: the best segment of a query", _grounding),
}


def _name(clips: Mapping[str, Any], row: int) -> str:
    start, end = clips["start"][row], clips["end"][row]
    return clips["id"][row] if end is None else f"{clips['id'][row]}, {start:.2f}–{end:.2f} s"


# --------------------------------------------------------------------------------------------------
# Plots
# --------------------------------------------------------------------------------------------------

# Of the confusion matrix: more classes would not be readable.
SHOWN_CLASSES = 20
_INK = "#22313f"
# Of overlaid histograms: distinct for colour-blind readers, too.
_HISTOGRAM_COLOURS = ("#2f6db5", "#d9822b", "#5b8c5a")


def new_figure(size: tuple[float, float], **options: Any) -> Figure | None:
    """An empty figure of ``size`` inches for ``savefig``; None, with a warning, where matplotlib cannot be used.

    ``options`` are those of :class:`matplotlib.figure.Figure`.
    """
    kind = _figure_class()
    return None if kind is None else kind(figsize=size, **options)


@cache
def _figure_class() -> type[Figure] | None:
    # MPLBACKEND of a notebook's terminal names a backend that may not be installed here, and then matplotlib cannot
    # even be imported. A figure that is only saved needs none.
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
        # For other code of this process that shows figures, such as a notebook.
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return Figure


def most_confused(confusion: Sequence[Sequence[int]], limit: int = SHOWN_CLASSES) -> list[int]:
    """The ``limit`` classes with most mistakes, ascending; ``confusion`` has [true class, predicted class, clips]."""
    # As true or as predicted: a class that attracts others' clips is as confused as one that loses its own.
    mistakes: Counter[int] = Counter()
    for true, predicted, clips in confusion:
        for code in (true, predicted):
            mistakes[code] += clips if true != predicted else 0
    return sorted(sorted(mistakes, key=lambda code: (-mistakes[code], code))[:limit])


def confusion_plot(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> bytes | None:
    """The confusion matrix in percent of the true class, as PNG; None where matplotlib cannot be used.

    Of many classes the most confused are shown.
    """
    shown = most_confused(confusion)
    place = {code: i for i, code in enumerate(shown)}
    share, totals = np.zeros((len(shown), len(shown))), np.zeros(len(shown))
    for true, predicted, clips in confusion:
        if true in place:
            totals[place[true]] += clips
            if predicted in place:
                share[place[true], place[predicted]] += clips
    share = 100 * share / np.maximum(totals, 1)[:, None]
    side = 2.0 + 0.24 * len(shown)
    figure = new_figure((side, side), dpi=150, layout="constrained")
    if figure is None:
        return None
    axes = figure.add_subplot()
    axes.imshow(share, vmin=0, vmax=100, cmap="Blues")
    # Class names are data: parse_math=False, or a $ in one would start a formula.
    names = [textwrap.shorten(classes[code], 26, placeholder="…") for code in shown]
    axes.set_xticks(range(len(shown)), names, rotation=55, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(shown)), names, parse_math=False)
    axes.tick_params(labelsize=8, length=0, colors=_INK)
    axes.set_xlabel("predicted class", color=_INK, fontsize=9)
    axes.set_ylabel("true class", color=_INK, fontsize=9)
    # What would be drawn as 0 is left empty.
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
    return _png(figure)


def histogram_plot(values: Mapping[str, np.ndarray], label: str, mark: float | None = None) -> bytes | None:
    """Overlaid histograms of named values [N] over ``label``, as PNG; None where matplotlib cannot be used.

    Each is in percent of its own values, as there may be more of one than of another; ``mark`` is a vertical line.
    """
    figure = new_figure((7.2, 2.6), dpi=150, layout="constrained")
    if figure is None:
        return None
    axes = figure.add_subplot()
    low, high = (extreme(np.concatenate(list(values.values()))) for extreme in (np.min, np.max))
    # The same bins for all, or their heights could not be compared. A blind model has all values in one place.
    edges = np.linspace(low, high if high - low > 1e-4 else low + 1e-4, 41).tolist()
    for (name, each), colour in zip(values.items(), _HISTOGRAM_COLOURS, strict=False):
        weights = np.full(len(each), 100 / max(len(each), 1))
        axes.hist(each, edges, weights=weights, color=colour, alpha=0.25)
        axes.hist(each, edges, weights=weights, histtype="step", color=colour, label=name)
    if mark is not None:
        axes.axvline(mark, color=_INK, linewidth=1, linestyle="--")
    axes.set_xlabel(label, color=_INK, fontsize=9)
    axes.set_ylabel("percent", color=_INK, fontsize=9)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of matplotlib, so that equal results give equal pages.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------
# Pictures of clips
# --------------------------------------------------------------------------------------------------

# Frames of a clip on the page, and their height in pixels.
MOMENTS, HEIGHT = 3, 96
# A wider picture is cropped to this aspect ratio, or three of them would not fit a phone's width.
_MAX_ASPECT = 4 / 3
# Of a contact sheet.
_SHEET_MOMENTS, _SHEET_HEIGHT, _CAPTION, _GAP = 4, 110, 34, 8


class Thumbnails:
    """Thumbnails of the ``clips`` of ``details/*.json``: root, layout, video, start, end."""

    def __init__(self, clips: Mapping[str, Any], decoder: str = "auto") -> None:
        self._clips = clips
        self._store: VideoStore | None = None
        self._strips: dict[int, str | None] = {}  # questions share clips
        try:
            _, opener = choose_decoder(decoder)
            self._store = VideoStore(
                clips["root"], clips["layout"], float(clips["chunk_seconds"]), opener,
                min_clip_seconds=clips.get("min_clip_seconds"),
            )  # fmt: skip
        except UserError as error:
            # Results are often looked at on a machine without the videos: numbers before pictures.
            log.warning("no thumbnails: %s", error)

    def strip(self, row: int) -> str | None:
        """A data URI of the clip's moments from left to right, None where its video cannot be read."""
        if row not in self._strips and self._store is not None:
            video, start, end = (self._clips[name][row] for name in ("video", "start", "end"))
            try:
                frames = self._store.read(video, start, np.inf if end is None else end, MOMENTS).pictures
                self._strips[row] = data_uri(jpeg(strip(frames)), "image/jpeg")
            except UserError as error:
                log.warning("no thumbnail: %s", error)
                self._strips[row] = None
        return self._strips.get(row)


def strip(frames: np.ndarray, height: int = HEIGHT) -> Image.Image:
    """Frames uint8 [T, H, W, 3] side by side, ``height`` pixels high."""
    pictures = []
    for frame in frames:
        image = Image.fromarray(frame)
        width = min(image.width, round(image.height * _MAX_ASPECT))
        left = (image.width - width) // 2
        image = image.crop((left, 0, left + width, image.height))
        size = max(1, round(width * height / image.height)), height  # of a sliver of an image at least a pixel
        pictures.append(image.resize(size, Image.Resampling.LANCZOS))
    sheet = Image.new("RGB", (sum(picture.width for picture in pictures) + 2 * (len(pictures) - 1), height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + 2
    return sheet


def contact_sheet(
    hits: Sequence[Hit], index: Mapping[str, Any], decoder: str = "auto", root: str | None = None
) -> Image.Image:
    """A few moments of every hit, two hits a row; ``index`` is the content of ``index.json``.

    ``root`` is the folder of the videos if it is another one now. A hit whose video cannot be read has an empty place.
    Raises :class:`UserError` if the folder is gone.
    """
    _, opener = choose_decoder(decoder)
    # Never widened: a hit shows the moment that was encoded.
    store = VideoStore(
        root or index["root"], index["layout"], float(index["chunk_seconds"]), opener, min_clip_seconds=0.0
    )
    strips = []
    for hit in hits:
        try:
            strips.append(strip(store.read(hit.video, hit.start, hit.end, _SHEET_MOMENTS).pictures, _SHEET_HEIGHT))
        except UserError as error:
            log.warning("no picture: %s", error)
            # An empty place of the same size, or all that follow would move.
            strips.append(Image.new("RGB", (_SHEET_MOMENTS * _SHEET_HEIGHT, _SHEET_HEIGHT), "#dddddd"))
    width, height = max(each.width for each in strips) + _GAP, _SHEET_HEIGHT + _CAPTION + _GAP
    columns = min(2, len(strips))
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "#fafaf7")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, (hit, picture) in enumerate(zip(hits, strips, strict=True)):
        left, top = _GAP + place % columns * width, _GAP + place // columns * height
        caption = f"{place + 1}.  {hit.similarity:.3f}  {hit.video}  {span(hit)}"
        # About six pixels a letter.
        lines = [textwrap.shorten(line, width // 6, placeholder="...") for line in (caption, hit.text) if line]
        pen.multiline_text((left, top), "\n".join(lines), "#141414", font, spacing=1)
        sheet.paste(picture, (left, top + _CAPTION))
    return sheet
