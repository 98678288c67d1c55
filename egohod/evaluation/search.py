"""Which clips of an index show what a sentence says, and a contact sheet of them."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from egohod.data.decoders import choose_decoder
from egohod.data.videos import VideoStore
from egohod.errors import UserError
from egohod.evaluation.feature_index import Features
from egohod.evaluation.metrics import rank_items
from egohod.evaluation.thumbnails import strip

log = logging.getLogger(__name__)

_MOMENTS, _HEIGHT, _CAPTION, _GAP = 4, 110, 34, 8


@dataclass(frozen=True)
class Hit:
    """A clip with its cosine similarity; an infinite ``end`` is the file's."""

    video: str
    start: float
    end: float
    similarity: float
    text: str


def search(query: NDArray[np.float32], found: Features, top: int, overlapping: bool = False) -> list[Hit]:
    """The ``top`` clips nearest to a query [D], the best first; ties go to the earlier one.

    Of clips of one video that overlap only the best is a hit, unless ``overlapping``: windows that slide see every
    moment several times. Raises :class:`UserError` for features of another width than the query's.
    """
    if found.features.shape[1:] != query.shape:
        raise UserError(f"the index has features of {found.features.shape[1]} dimensions, the query {len(query)}")
    similarity = found.features @ query
    hits: list[Hit] = []
    for row in rank_items(similarity[None])[0].tolist():
        hit = Hit(
            found.videos[row], float(found.start[row]), float(found.end[row]), float(similarity[row]), found.texts[row]
        )
        if overlapping or not any(_overlap(hit, other) for other in hits):
            hits.append(hit)
        if len(hits) == top:
            break
    return hits


def clock(second: float) -> str:
    """Seconds as H:MM:SS.s."""
    tenths = round(10 * second)
    return f"{tenths // 36000}:{tenths // 600 % 60:02d}:{tenths // 10 % 60:02d}.{tenths % 10}"


def span(hit: Hit) -> str:
    """The times of a hit for people."""
    return "whole" if np.isinf(hit.end) else f"{clock(hit.start)} - {clock(hit.end)}"


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


def _overlap(one: Hit, other: Hit) -> bool:
    return one.video == other.video and one.start < other.end and other.start < one.end
