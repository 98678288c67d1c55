"""Any videos: the files of a folder, windows that slide over them, or the rows of a csv without annotations.

Clips of one video are side by side. They are used as they are, so read them with ``min_clip_seconds=0``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from egohod.data.table import ClipTable
from egohod.data.text_files import read_csv, seconds, text_column
from egohod.data.videos import list_videos, sliding_windows
from egohod.errors import UserError

_COLUMNS = ("video_id", "start_second", "end_second")


def whole_files(root: str) -> tuple[ClipTable, list[str]]:
    """Every video below a local folder as one clip, and why some videos have none.

    Raises :class:`UserError` if there is no video.
    """
    files, faults = list_videos(root)
    return _grouped(Path(root), [(video, 0.0, np.inf) for video in files]), faults


def windows(root: str, window: float, stride: float, decoder: str = "auto") -> tuple[ClipTable, list[str]]:
    """Windows of ``window`` seconds every ``stride`` seconds over every video below a local folder.

    They start at 0, stride, 2 x stride, ... until one reaches the end of the video, where it is cut. Also returns why
    some videos have none. Raises :class:`UserError` if there is no video.
    """
    clips, faults = sliding_windows(root, window, stride, decoder)
    return _grouped(Path(root), clips), faults


def rows_of_csv(path: Path) -> ClipTable:
    """The clips of a csv with video_id, start_second and end_second (seconds or HH:MM:SS.ss), and perhaps text.

    Raises :class:`UserError` naming file, row and column.
    """
    table = read_csv(path, _COLUMNS)
    start, end = (seconds(text_column(table[name].tolist())) for name in _COLUMNS[1:])
    clips = list(zip(table["video_id"], start.tolist(), end.tolist(), strict=True))
    for row, (video, first, last) in enumerate(clips):
        where, parts = f"{path}: row {row + 1}", PurePosixPath(video)
        # Feature files are called like the videos: none may lead out of the folder.
        if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\0" in video:
            raise UserError(f"{where}: video_id '{video}' leads out of the folder")
        if not 0 <= first < last:
            times = f"{table['start_second'][row]}' to '{table['end_second'][row]}"
            raise UserError(f"{where}: '{times}' is no stretch of time: 0 <= start_second < end_second is needed")
    return _grouped(path, clips, table["text"].tolist() if "text" in table.columns else None)


def _grouped(path: Path, clips: Sequence[tuple[str, float, float]], texts: Sequence[str] | None = None) -> ClipTable:
    """A table of (video, start, end), videos in the order in which they first occur."""
    # Stable: features are written video by video, whatever the order of the csv.
    first = {video: row for row, (video, _, _) in reversed(list(enumerate(clips)))}
    order = sorted(range(len(clips)), key=lambda row: first[clips[row][0]])
    ordered = [clips[row] for row in order]
    ids = [video if np.isinf(end) else f"{video} {start:.2f}-{end:.2f} s" for video, start, end in ordered]
    return ClipTable.of(
        path,
        [video for video, _, _ in ordered],
        [start for _, start, _ in ordered],
        [end for _, _, end in ordered],
        uid=ids,
        text=[texts[row] for row in order] if texts else [""] * len(ids),
    )
