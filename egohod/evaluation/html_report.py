"""``report.html``: what ``results.json`` and ``details/*.json`` of an evaluation say, as one page to look at."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from jinja2 import UndefinedError
from PIL import ImageDraw, ImageFont

from egohod.errors import UserError
from egohod.evaluation.features import Hit, read_json, span, write_text
from egohod.evaluation.results import FORMAT, RESULTS_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from PIL import Image

from egohod.data.decoders import choose_decoder
from egohod.data.videos import VideoStore

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


# So many cards of each sort, or the page of a large benchmark would grow without bound.
CARDS, _ANSWERS = 6, 3


@dataclass(frozen=True)
class Answer:
    """What a model said, how similar it found it, and whether that is right."""

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
    """Cards of one table, and how many there would be."""

    title: str
    right: Sequence[Card]
    wrong: Sequence[Card]
    right_of_all: int
    wrong_of_all: int


def gallery(table: Mapping[str, Any], clips: Mapping[str, Any]) -> Gallery:
    """The cards of a table of ``details/*.json`` over the ``clips`` there."""
    title, right, card = _KINDS[table["kind"]](table, clips)
    hits, misses = np.flatnonzero(right), np.flatnonzero(~right)
    return Gallery(title, [card(i) for i in _evenly(hits)], [card(i) for i in _evenly(misses)], len(hits), len(misses))


_Cards = tuple[str, np.ndarray, Callable[[int], Card]]


def _retrieval(table: Mapping[str, Any], clips: Mapping[str, Any]) -> _Cards:
    texts, best, similarity, relevancy = (table[name] for name in ("texts", "best_texts", "similarity", "relevancy"))
    right = np.array([row[0] >= 1 for row in relevancy], dtype=bool)

    def card(row: int) -> Card:
        answers = [
            Answer(texts[text], sim, rel >= 1, rel)
            for text, sim, rel in zip(best[row], similarity[row], relevancy[row], strict=True)
        ]
        truth = texts[table["most_relevant_text"][row]]
        return Card(bool(right[row]), _name(clips, row), [("", row)], truth, answers[:_ANSWERS])

    return "Retrieval: the texts nearest to a clip", right, card


def _classification(table: Mapping[str, Any], clips: Mapping[str, Any]) -> _Cards:
    classes, best = table["classes"], table["best_classes"]
    several = table["kind"] == "multilabel"
    labels = [set(each) if several else {each} for each in table["labels"]]
    right = np.array([row[0] in true for row, true in zip(best, labels, strict=True)], dtype=bool)

    def card(row: int) -> Card:
        similarity = table["similarity"][row] if "similarity" in table else [None] * len(best[row])
        answers = [Answer(classes[c], sim, c in labels[row]) for c, sim in zip(best[row], similarity, strict=True)]
        truth = ", ".join(classes[c] for c in sorted(labels[row])) or "none of the classes"
        return Card(bool(right[row]), _name(clips, row), [("", row)], truth, answers[:_ANSWERS])

    return "Classification: the classes nearest to a clip", right, card


def _multiple_choice(table: Mapping[str, Any], clips: Mapping[str, Any]) -> _Cards:
    texts, questions = table["texts"], table["questions"]
    right = np.array([each["taken"] == each["answer"] for each in questions], dtype=bool)

    def card(row: int) -> Card:
        asked = questions[row]
        taken, answer = asked["taken"], asked["answer"]
        shown = [taken] if taken == answer else [taken, answer]

        def answers(names: Sequence[str]) -> list[Answer]:
            return [Answer(name, asked["similarity"][i], i == answer) for name, i in zip(names, shown, strict=True)]

        kind = asked["kind"].replace("_", " ")
        if asked["query_is_clip"]:
            said = [texts[asked["choices"][i]] for i in shown]
            clip = asked["query"]
            return Card(taken == answer, f"{kind}: {_name(clips, clip)}", [("", clip)], said[-1], answers(said))
        # A text asks for its clip: the pictures are the answers.
        rows = [asked["choices"][i] for i in shown]
        captions = ["taken" if i == taken else "right" for i in shown]
        names = [_name(clips, clip) for clip in rows]
        pictures = list(zip(captions, rows, strict=True))
        return Card(taken == answer, kind, pictures, texts[asked["query"]], answers(names))

    return "Multiple choice: what was taken", right, card


_KINDS = {
    "retrieval": _retrieval,
    "classification": _classification,
    "multilabel": _classification,
    "multiple_choice": _multiple_choice,
}


def _name(clips: Mapping[str, Any], row: int) -> str:
    start, end = clips["start"][row], clips["end"][row]
    return clips["id"][row] if end is None else f"{clips['id'][row]}, {start:.2f}–{end:.2f} s"


def _evenly(rows: np.ndarray) -> list[int]:
    count = min(len(rows), CARDS)
    return [int(row) for row in rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]] if count else []


_SCRIPT = "page.js"


def render(template: str, **content: Any) -> str:
    """The HTML of a template of this package; it extends ``page.html.jinja``, which holds style and script.

    All of ``content`` is escaped. Should anything slip through, the page's own policy still forbids every script but
    its own, known by its checksum, and every request.
    """
    loader = jinja2.PackageLoader("egohod.evaluation", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    script = loader.get_source(environment, _SCRIPT)[0]
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=script, script_checksum=checksum, **content)


def data_uri(content: bytes, kind: str) -> str:
    """A picture as the address that holds it; ``kind`` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number for people; a dash where there is none."""
    # Adding zero turns -0.0 into 0.0.
    return "–" if value is None else f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"


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


MOMENTS, HEIGHT = 3, 96
_QUALITY = 72
# A wide picture is cut to this many times its height, or three moments fill no phone's width.
_WIDEST = 4 / 3


class Thumbnails:
    """Thumbnails of the clips in ``clips``, as ``details/*.json`` tells them: root, layout, video, start, end."""

    def __init__(self, clips: Mapping[str, Any], decoder: str = "auto") -> None:
        self._clips = clips
        self._store: VideoStore | None = None
        self._strips: dict[int, str | None] = {}
        self.lacking = 0
        """Clips of which there is no picture because they could not be read."""
        try:
            _, opener = choose_decoder(decoder)
            self._store = VideoStore(
                clips["root"], clips["layout"], float(clips["chunk_seconds"]), opener,
                min_clip_seconds=clips.get("min_clip_seconds"),
            )  # fmt: skip
        except UserError as error:
            log.warning("no thumbnails: %s", error)

    def strip(self, row: int) -> str | None:
        """A data URI of the clip's moments from left to right, None where its video cannot be read."""
        if row not in self._strips:
            self._strips[row] = self._draw(row)
            self.lacking += self._strips[row] is None
        return self._strips[row]

    def _draw(self, row: int) -> str | None:
        if self._store is None:
            return None
        video, start, end = (self._clips[name][row] for name in ("video", "start", "end"))
        try:
            frames = self._store.read(video, start, np.inf if end is None else end, MOMENTS).pictures
        except UserError as error:
            log.warning("no thumbnail: %s", error)
            return None
        return data_uri(jpeg(strip(frames)), "image/jpeg")


def strip(frames: np.ndarray, height: int = HEIGHT) -> Image.Image:
    """Frames uint8 [T, H, W, 3] side by side, ``height`` pixels high."""
    pictures = [_small(frame, height) for frame in frames]
    sheet = Image.new("RGB", (sum(picture.width for picture in pictures) + 2 * (len(pictures) - 1), height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + 2
    return sheet


def _small(frame: np.ndarray, height: int) -> Image.Image:
    image = Image.fromarray(frame)
    width = min(image.width, round(image.height * _WIDEST))
    left = (image.width - width) // 2
    image = image.crop((left, 0, left + width, image.height))
    return image.resize((max(1, round(width * height / image.height)), height), Image.Resampling.LANCZOS)


def jpeg(image: Image.Image) -> bytes:
    """The picture as a small JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


_MOMENTS, _HEIGHT, _CAPTION, _GAP = 4, 110, 34, 8


def contact_sheet(hits: Sequence[Hit], index: Any, decoder: str = "auto", root: str | None = None) -> Image.Image:
    """A few moments of every hit, two hits a row; ``index`` is what ``index.json`` says, ``root`` the videos' folder.

    A hit whose video cannot be read has an empty place. Raises :class:`UserError` if the folder is gone.
    """
    _, opener = choose_decoder(decoder)
    store = VideoStore(
        root or index["root"], index["layout"], float(index["chunk_seconds"]), opener, min_clip_seconds=0.0
    )
    strips = []
    for hit in hits:
        try:
            strips.append(strip(store.read(hit.video, hit.start, hit.end, _MOMENTS).pictures, _HEIGHT))
        except UserError as error:
            log.warning("no picture: %s", error)
            strips.append(Image.new("RGB", (_MOMENTS * _HEIGHT, _HEIGHT), "#dddddd"))
    wide = max(each.width for each in strips) + _GAP
    columns = min(2, len(strips))
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (columns * wide + _GAP, rows * (_HEIGHT + _CAPTION + _GAP) + _GAP), "#fafaf7")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, (hit, picture) in enumerate(zip(hits, strips, strict=True)):
        left, top = _GAP + place % columns * wide, _GAP + place // columns * (_HEIGHT + _CAPTION + _GAP)
        said = f"{place + 1}.  {hit.similarity:.3f}  {hit.video}  {span(hit)}"
        lines = [textwrap.shorten(line, wide // 6, placeholder="...") for line in (said, hit.text) if line]
        pen.multiline_text((left, top), "\n".join(lines), "#141414", font, spacing=1)
        sheet.paste(picture, (left, top + _CAPTION))
    return sheet
