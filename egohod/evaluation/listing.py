"""Anyone's clips: the files of a folder, the rows of a csv, or windows that slide over long videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from egohod.data.dataset import ClipList
from egohod.data.text_files import read_csv, seconds
from egohod.data.videos import list_videos, sliding_windows
from egohod.errors import UserError

CLIP_COLUMNS = ("video_id", "start_second", "end_second")


@dataclass(frozen=True)
class Listing:
    """Clips, those of one video side by side; ``texts`` [N] are empty where nothing is said about a clip.

    ``faults`` are videos that could not be opened, a message each.
    """

    clips: ClipList
    texts: Sequence[str]
    faults: Sequence[str] = field(default_factory=list)

    def restricted(self, kept: NDArray[np.bool_]) -> Listing:
        """The clips where ``kept`` [N] is true."""
        texts = [text for text, keep in zip(self.texts, kept.tolist(), strict=True) if keep]
        return replace(self, clips=self.clips.restricted(kept), texts=texts)

    def videos(self) -> dict[str, range]:
        """The rows of each video, in their order."""
        names, rows = self.clips.videos, dict[str, range]()
        borders = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
        for start, end in zip(borders, [*borders[1:], len(names)], strict=True):
            assert names[start] not in rows, "the clips of a video must lie side by side"
            rows[names[start]] = range(start, end)
        return rows


def whole_files(root: str) -> Listing:
    """Every video below a local folder as one clip. Raises :class:`UserError` if there is none."""
    files, faults = list_videos(root)
    return _listed(root, [(video, 0.0, np.inf) for video in files], "whole", 15.0, faults=faults)


def windows(root: str, window: float, stride: float, decoder: str = "auto") -> Listing:
    """Windows of ``window`` seconds every ``stride`` seconds over every video below a local folder.

    They start at 0, stride, 2 x stride, ... until one reaches the end of the video, where it is cut. Raises
    :class:`UserError` if there is no video.
    """
    clips, faults = sliding_windows(root, window, stride, decoder)
    return _listed(root, clips, "whole", 15.0, faults=faults)


def rows_of_csv(path: Path, root: str, layout: str = "auto", chunk_seconds: float = 15.0) -> Listing:
    """The clips of a csv with video_id, start_second and end_second (seconds or HH:MM:SS.ss), and perhaps text.

    Raises :class:`UserError` naming file, row and column.
    """
    table = read_csv(path, CLIP_COLUMNS)
    start, end = (
        seconds(pa.chunked_array([pa.array(table[name].tolist(), pa.large_string())])) for name in CLIP_COLUMNS[1:]
    )
    for row, (video, first, last) in enumerate(zip(table["video_id"], start.tolist(), end.tolist(), strict=True)):
        where, parts = f"{path}: row {row + 1}", PurePosixPath(video)
        # Feature files are called like the videos: none may lead out of the folder.
        if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\0" in video:
            raise UserError(f"{where}: video_id '{video}' leads out of the folder")
        if not 0 <= first < last:
            times = f"{table['start_second'][row]}' to '{table['end_second'][row]}"
            raise UserError(f"{where}: '{times}' is no stretch of time: 0 <= start_second < end_second is needed")
    texts = table["text"].tolist() if "text" in table.columns else None
    clips = list(zip(table["video_id"], start.tolist(), end.tolist(), strict=True))
    return _listed(root, clips, layout, chunk_seconds, texts)


def _listed(
    root: str,
    clips: Sequence[tuple[str, float, float]],
    layout: str,
    chunk_seconds: float,
    texts: Sequence[str] | None = None,
    faults: Sequence[str] = (),
) -> Listing:
    first = {video: row for row, (video, _, _) in reversed(list(enumerate(clips)))}
    order = sorted(range(len(clips)), key=lambda row: first[clips[row][0]])
    videos = [clips[row][0] for row in order]
    starts, ends = ([clips[row][part] for row in order] for part in (1, 2))
    ids = [
        video if np.isinf(end) else f"{video} {start:.2f}-{end:.2f} s"
        for video, start, end in zip(videos, starts, ends, strict=True)
    ]
    # Never widened: a window of half a second is meant to be one.
    made = ClipList(ids, videos, np.array(starts, float), np.array(ends, float), root, layout, chunk_seconds, 0.0)
    return Listing(made, [texts[row] for row in order] if texts else [""] * len(clips), list(faults))
