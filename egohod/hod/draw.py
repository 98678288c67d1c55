"""Draw detections into pictures, and write films."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from egohod.data.detections import CONTACT, EDGES, LEFT, NO_CONTACT, ROLE_COLOURS, UNKNOWN_STATE, link_objects

_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)


def draw_boxes(picture: np.ndarray | Image.Image, boxes: pd.DataFrame, is_small: bool = False) -> Image.Image:
    """A picture uint8 [H, W, 3] with the rows of ``SCHEMA`` that were seen in it.

    Hands have the colour of their side, and are labelled with it, their contact in words and their score, or with L or
    R alone where the picture ``is_small``. The edge of one that touches something is thicker, and a line leads to that
    object, or to where its offset points if no object was detected.
    """
    image = (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).copy()
    # Legible on a screen, whatever the picture's size is.
    line, letters = max(2, min(image.size) // 200), max(11, min(image.size) // 30)
    pen, font, size = ImageDraw.Draw(image), ImageFont.load_default(letters), np.array(image.size)
    boxes = boxes.reset_index(drop=True)
    # One moment, though detections made elsewhere may be of several between two frames.
    links = link_objects(boxes.assign(video_id="", second=0.0), image.width / image.height)
    corners = np.round(boxes[list(EDGES)].to_numpy(np.float64).reshape(-1, 2, 2) * (size - 1))
    # The surest last, above the others; all lines above all boxes, and words above both.
    order = boxes.index[np.argsort(boxes["score"].to_numpy(), kind="stable")]
    colours = []
    for kind, side in zip(boxes["kind"], boxes["side"], strict=True):
        colours.append(ROLE_COLOURS[2 if kind == "object" else 0 if side == LEFT else 1])
    touches = (boxes["kind"] == "hand") & (boxes["state"] > NO_CONTACT)
    for i in order:
        (low, high), width = corners[i], line + line // 2 * touches[i]
        pen.rectangle([*low, *high], outline=_WHITE, width=width + 2)
        pen.rectangle([*(low + 1), *np.maximum(high - 1, low + 1)], outline=colours[i], width=width)
    for i in order:
        box = boxes.loc[i]
        if touches[i] and pd.notna(box["offset_x"]):
            start, offset = corners[i].mean(axis=0), box[["offset_x", "offset_y"]].to_numpy(np.float64)
            end = corners[links[i]].mean(axis=0) if links[i] >= 0 else start + offset * size
            for ink, more in ((_WHITE, 2), (colours[i], 0)):
                pen.line([*start, *end], fill=ink, width=line + 1 + more)
                pen.ellipse([*(end - 2 * line - more), *(end + 2 * line + more)], fill=ink)
    for i in order:
        box, low, colour = boxes.loc[i], corners[i, 0], colours[i]
        if is_small:
            if box["kind"] == "hand":
                pen.text((low + line + 2).tolist(), "L" if box["side"] == LEFT else "R", colour, font)
            continue
        if box["kind"] == "hand":
            words = "left hand" if box["side"] == LEFT else "right hand"
            words += f", {CONTACT.get(box['state'], box['state'])}" if box["state"] != UNKNOWN_STATE else ""
        else:
            words = box["name"] if pd.notna(box["name"]) else "object"
        words += f" {box['score']:.2f}"
        _, _, right, bottom = pen.textbbox((0, 0), words, font)
        # Above its box and within the picture.
        x = min(max(0.0, low[0]), max(0.0, image.width - right - 4))
        y = max(0.0, low[1] - (bottom + 4))
        pen.rectangle((x, y, x + right + 4, y + bottom + 4), fill=colour)
        is_bright = np.dot(colour, (0.299, 0.587, 0.114)) > 120
        pen.text((x + 2, y + 1), words, _BLACK if is_bright else _WHITE, font)
    return image


def write_film(pictures: Iterable[np.ndarray], rate: float, path: Path) -> None:
    """Write pictures uint8 [H, W, 3] of one size as H.264, ``rate`` a second. Raises :class:`OSError`."""
    with av.open(str(path), "w") as container:
        # One thread: the same file on every machine.
        stream = container.add_stream(
            "libx264", rate=Fraction(rate).limit_denominator(1000), options={"crf": "20", "threads": "1"}
        )
        stream.pix_fmt = "yuv420p"
        for number, picture in enumerate(pictures):
            # H.264 halves the resolution of colours: its pictures have even sides.
            height, width = (max(2, side // 2 * 2) for side in picture.shape[:2])
            if number == 0:
                stream.height, stream.width = height, width
            even = np.ascontiguousarray(picture[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode(None))
