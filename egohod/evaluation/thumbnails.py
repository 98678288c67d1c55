"""Clips as small pictures: a few moments side by side, as a JPEG that lies in the page itself."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from egohod.data.decoders import choose_decoder
from egohod.data.videos import VideoStore
from egohod.errors import UserError
from egohod.evaluation.page import data_uri

log = logging.getLogger(__name__)

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
