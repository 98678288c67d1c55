"""Detections that were made elsewhere, and the same spoiled on purpose."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from egohod.data import detections
from egohod.data.detections import EDGES, NEAREST_SECONDS, SCHEMA, DetectionError
from egohod.hod.detectors.base import DetectorError, Undetectable

EPIC_ENDINGS = (".pkl", ".pickle")


class DetectionFiles:
    """Boxes from ``path``: a parquet file or a folder of them, or a folder of EPIC-KITCHENS' files, one a video.

    EPIC's files count frames and know no seconds: ``fps`` is the frame rate of their videos, or None to take it from
    the frames that are asked for. They are read when their video comes up. A picture takes the boxes of the nearest
    moment there is, each moment counts once, and none is farther than half the way to the next picture.
    """

    needs_pictures = False

    def __init__(self, path: str, fps: float | None = None) -> None:
        if fps is not None and not fps > 0:
            raise DetectorError(f"fps must be above 0, not {fps:g}")
        if not Path(path).exists():
            raise DetectorError(f"{path}: no such file or folder of detections")
        self._fps = fps
        self._videos: dict[str, pd.DataFrame] = {}
        self._epic = {}
        if Path(path).is_dir() and not any(Path(path).glob("*.parquet")):
            self._epic = {each.stem: each for each in sorted(Path(path).rglob("*")) if each.suffix in EPIC_ENDINGS}
            if not self._epic:
                raise DetectorError(f"{path}: holds neither parquet files nor EPIC-KITCHENS' .pkl files")
            try:
                # Here: nothing else in the pipeline needs protobuf, and many environments have one that is broken.
                from egohod.data.epic_protobuf import read as read_epic
            except Exception as error:
                raise DetectorError(
                    f"{path}: EPIC-KITCHENS' files need protobuf, which cannot be used ({error}); pip install "
                    "--force-reinstall protobuf"
                ) from error
            self._read_epic = read_epic
        else:
            self._videos = _by_video(detections.read(path))

    def videos(self) -> set[str]:
        """Those of which there are detections."""
        return {*self._epic, *self._videos}

    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None = None
    ) -> pa.Table:
        """See :class:`~egohod.hod.detectors.base.Detector`. Raises :class:`Undetectable` where a file is damaged."""
        if video_id in self._epic and video_id not in self._videos:
            fps = self._fps if self._fps is not None else float((frame_numbers[-1] + 0.5) / seconds[-1])
            try:
                found = self._read_epic(self._epic[video_id], fps)
            except DetectionError as error:
                raise Undetectable(str(error)) from error
            # Clips come video by video: the last one is enough.
            self._videos = {video_id: _sorted(found.to_pandas())}
        rows = self._videos.get(video_id)
        if rows is None or not len(seconds):
            return SCHEMA.empty_table()
        return pa.Table.from_pandas(self._nearest(rows, np.unique(seconds)), SCHEMA, preserve_index=False)

    def close(self) -> None:
        """See :class:`~egohod.hod.detectors.base.Detector`."""
        self._videos = {}

    @staticmethod
    def _nearest(rows: pd.DataFrame, seconds: np.ndarray) -> pd.DataFrame:
        step = float(np.median(np.diff(seconds))) / 2 if len(seconds) > 1 else NEAREST_SECONDS
        reach = min(NEAREST_SECONDS, step) + 1e-6
        times = rows["second"].to_numpy()
        low, high = np.searchsorted(times, (seconds[0] - reach, seconds[-1] + reach))
        moments = np.unique(times[low:high])
        if not len(moments):
            return rows.iloc[:0]
        distance = np.abs(moments[:, None] - seconds[None])
        # The nearest moment of a picture that is also nearest to it; half of the moments lie between pictures.
        chosen = {int(i) for j, i in enumerate(distance.argmin(axis=0)) if distance[i, j] <= reach}
        return rows.iloc[low:high][np.isin(times[low:high], moments[sorted(chosen)])]


class Oracle(DetectionFiles):
    """True boxes, spoiled by noise that follows from ``seed``, video and frame alone.

    ``jitter`` is the standard deviation of a box's place and of its width and height, relative to its own size;
    ``drop`` the share of frames in which nothing is found.
    """

    def __init__(
        self, path: str, fps: float | None = None, jitter: float = 0.0, drop: float = 0.0, seed: int = 0
    ) -> None:
        if not 0 <= jitter <= 1 or not 0 <= drop <= 1:
            raise DetectorError(f"oracle: jitter and drop must be from 0 to 1; got {jitter} and {drop}")
        if seed < 0:
            raise DetectorError(f"oracle: seed must be at least 0, not {seed}")
        super().__init__(path, fps)
        self._jitter, self._drop, self._seed = jitter, drop, seed

    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None = None
    ) -> pa.Table:
        """See :class:`~egohod.hod.detectors.base.Detector`."""
        found = super().detect(video_id, frame_numbers, seconds, pictures)
        if not self._jitter and not self._drop:
            return found
        rows = found.to_pandas()
        kept = []
        for frame, boxes in rows.groupby("frame_number", sort=True):
            rng = np.random.default_rng((self._seed, zlib.crc32(video_id.encode()), frame))
            if rng.random() >= self._drop:
                kept.append(boxes.assign(**_jittered(boxes, self._jitter, rng)))
        rows = pd.concat(kept) if kept else rows.iloc[:0]
        return pa.Table.from_pandas(rows, SCHEMA, preserve_index=False)


def _jittered(boxes: pd.DataFrame, jitter: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    edges = boxes[list(EDGES)].to_numpy(dtype=np.float64)
    size = edges[:, 2:] - edges[:, :2]
    centre = (edges[:, 2:] + edges[:, :2]) / 2 + size * rng.normal(0, jitter, size.shape)
    size = size * np.exp(rng.normal(0, jitter, size.shape))
    moved = np.clip(np.concatenate([centre - size / 2, centre + size / 2], axis=1), 0, 1)
    return dict(zip(EDGES, moved.astype(np.float32).T, strict=True))


def _by_video(found: pa.Table) -> dict[str, pd.DataFrame]:
    return {str(video): _sorted(rows) for video, rows in found.to_pandas().groupby("video_id", sort=False)}


def _sorted(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sort_values("second", kind="stable")
