"""A small index: videos of several kinds, features that are axes, and a text tower that reads the axis's number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from egohod.evaluation.features import open_index, write_video
from tests.data.video_files import encode, remux

AXES = 8
# A name is data, whatever it looks like.
HOSTILE = '"><img src=x onerror=alert(1)>'
# Six seconds, ten pictures a second.
VIDEOS = {
    "kitchen/a": ("a.mp4", {}),
    HOSTILE: (f"{HOSTILE}.mp4", {}),
    "hevc": ("hevc.mp4", {"codec": "libx265", "x264": "keyint=10"}),
    "old": ("old.avi", {"codec": "mpeg4", "x264": ""}),
    "gone": ("gone.mp4", {}),
}


def axis(number: int, width: int = AXES) -> np.ndarray:
    return np.eye(width, dtype=np.float32)[number % width]


def write_index(folder: Path, root: Path, videos: list[str], width: int = AXES, seconds: float = 2.0) -> Path:
    """Windows every second: the one that starts at second s of video v is like axis s + v."""
    settings = {
        "format": 1, "model": "none", "weights": "none", "protocol": {}, "root": str(root), "layout": "whole",
        "chunk_seconds": 15.0, "videos": {video: f"{video}.npz" for video in videos},
    }  # fmt: skip
    open_index(folder, settings)
    start = np.arange(5.0)
    for number, video in enumerate(videos):
        features = np.stack([axis(number + int(second), width) for second in start])
        # No two moments are equally good: of equals the first would always win.
        features = features + 0.01 * axis(number + 5, width)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        texts = [f"second {second:g}" if video == "old" else "" for second in start]
        write_video(folder, video, features.astype(np.float32), start, start + seconds, texts, "id")
    return folder


class AxisTower:
    """Stands in for the text tower of a checkpoint: ``axis 3`` is the third axis."""

    def __init__(self, width: int = AXES) -> None:
        self.width = width

    def encode(self, text: str) -> np.ndarray:
        return axis(int(text.split()[-1]), self.width)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "videos"
    (folder / "kitchen").mkdir(parents=True)
    for video, (name, options) in VIDEOS.items():
        path = folder / "kitchen" / name if video.startswith("kitchen") else folder / name
        encoded = encode(path.with_suffix(".mp4"), 60, size=(160, 120), **options)  # type: ignore[arg-type]
        if path.suffix == ".avi":
            remux(encoded, path)
            encoded.unlink()
    return folder


@pytest.fixture(scope="session")
def new_index(videos: Path) -> Callable[..., Path]:
    """Write an index of the videos, the last of which is gone then."""

    def write(folder: Path, **options: object) -> Path:
        write_index(folder, videos, list(VIDEOS), **options)  # type: ignore[arg-type]
        (videos / "gone.mp4").unlink(missing_ok=True)
        return folder

    return write
