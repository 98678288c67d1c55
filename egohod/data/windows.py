"""Videos of a folder, and windows that slide over them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from egohod.data import containers
from egohod.data.decoders import choose_decoder
from egohod.data.files import VideoError
from egohod.data.video import ENDINGS
from egohod.errors import UserError


def sliding(
    root: str, window: float, stride: float, decoder: str = "auto"
) -> tuple[list[tuple[str, float, float]], list[str]]:
    """Windows of ``window`` seconds every ``stride`` seconds over every video below a local folder.

    (video, start, end) of each, and why some videos have none. Raises :class:`UserError` if there is no video.
    """
    _, opener = choose_decoder(decoder)
    clips = list[tuple[str, float, float]]()
    files, faults = video_files(root)
    for video, path in files.items():
        try:
            opened = opener(path, str(path))
        except VideoError as error:
            faults.append(str(error))
            continue
        duration = opened.duration
        opened.close()
        clips += [(video, *each) for each in spans(duration, window, stride)]
    return clips, faults


def spans(duration: float, window: float, stride: float) -> list[tuple[float, float]]:
    """The windows over a video of that many seconds: (start, end)."""
    if not (window > 0 and stride > 0):
        raise UserError(f"--window and --stride must be above 0, not {window:g} and {stride:g}")
    # A frame's rounding must not add a window of next to nothing.
    count = 1 + max(0, int(np.ceil((duration - window) / stride - 1e-3)))
    return [(k * stride, min(k * stride + window, duration)) for k in range(count)]


def video_files(root: str) -> tuple[dict[str, Path], list[str]]:
    """Videos below a folder by their id, which is the path without its ending, and why some can have none."""
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"{root}: no such video folder" + ("; a remote one needs --clips" if "://" in root else ""))
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in containers.ENDINGS and path.is_file())
    if not paths:
        raise UserError(f"{root}: not a single video file in it or below ({', '.join(containers.ENDINGS)})")
    found, faults = dict[str, Path](), list[str]()
    for path in paths:
        if path.suffix not in ENDINGS:  # by its id alone it could not be found again
            faults.append(f"{path}: its ending is in mixed case; rename it to {path.suffix.lower()}")
            continue
        video = path.relative_to(folder).with_suffix("").as_posix()
        if video in found:
            raise UserError(f"{path}: {found[video].name} is there as well; rename one")
        try:
            video.encode()  # no csv, index or features file can hold another name
        except UnicodeEncodeError:
            faults.append(f"{os.fsencode(path)!r}: its name is not UTF-8; rename it")
            continue
        found[video] = path
    return found, faults
