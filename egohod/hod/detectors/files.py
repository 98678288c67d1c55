"""Detections from files made elsewhere, as they are or with synthetic noise."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from egohod.data import detections
from egohod.data.detections import EDGES, NEAREST_SECONDS, SCHEMA
from egohod.data.videos import VideoError
from egohod.errors import UserError
from egohod.hod.detectors import Detector
from egohod.runtime import UNFINISHED_PREFIX

# Videos whose boxes are in memory: workers take clips of neighbouring ones in turns.
_VIDEOS = 8
_EPIC_ENDINGS = (".pkl", ".pickle")


class DetectionFiles(Detector):
    """Boxes from ``path``: a parquet file or a folder of them, or a folder of EPIC-KITCHENS' files, one a video.

    EPIC's files count frames and hold no seconds: ``fps`` is the frame rate of their videos, None to take it from the
    frames that are requested. Boxes are read when their video comes up: memory holds those of a few videos. A picture
    takes the boxes of the nearest moment, each moment is used once, and none that is farther than half the way to the
    next picture.
    """

    reads_files = True

    def __init__(self, path: str, fps: float | None = None) -> None:
        if fps is not None and not fps > 0:
            raise UserError(f"fps must be above 0, not {fps:g}")
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or folder of detections")
        self._fps = fps
        self._videos: dict[str, pd.DataFrame] = {}  # in memory, the last one used at the end
        self._groups: dict[str, list[tuple[Path, int]]] = {}  # parquet: files and row groups in which a video has boxes
        self._epic: dict[str, Path] = {}
        if Path(path).is_dir() and not any(Path(path).glob("*.parquet")):
            every = sorted(each for each in Path(path).rglob("*") if not each.name.startswith(UNFINISHED_PREFIX))
            files = [each for each in every if each.suffix in _EPIC_ENDINGS]
            # EPIC's folders are of participants, and no part of a video's id; those of write_epic are.
            self._epic = {each.relative_to(path).with_suffix("").as_posix(): each for each in files}
            self._epic = {each.stem: each for each in files} | self._epic
            if not self._epic:
                raise UserError(f"{path}: holds neither parquet files nor EPIC-KITCHENS' .pkl files")
            try:
                detections.epic_message_class()  # protobuf may be missing or broken: fail before the first clip
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
        else:
            for file, group, table in detections.parts(path):
                for video in table["video_id"].drop_null().unique().to_pylist():
                    self._groups.setdefault(video, []).append((file, group))

    def videos(self) -> set[str]:
        """See :meth:`Detector.videos`."""
        return {*self._epic, *self._groups}

    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None = None
    ) -> pa.Table:
        """See :meth:`Detector.detect`. Raises :class:`VideoError` where a file is damaged."""
        if not len(seconds) or (rows := self._boxes(video_id, frame_numbers, seconds)) is None:
            return SCHEMA.empty_table()
        seconds = np.unique(seconds)
        # The median: the last interval of a clip may be shorter.
        step = float(np.median(np.diff(seconds))) / 2 if len(seconds) > 1 else NEAREST_SECONDS
        reach = min(NEAREST_SECONDS, step) + 1e-6  # times of frames are rounded differently by decoders and files
        times = rows["second"].to_numpy()
        low, high = np.searchsorted(times, (seconds[0] - reach, seconds[-1] + reach))
        rows, times = rows.iloc[low:high], times[low:high]
        moments = np.unique(times)
        if len(moments):
            distance = np.abs(moments[:, None] - seconds[None])
            # argmin by picture, so that each picture has one moment: of files with a higher frame rate than the
            # clip's sampling, half of the moments are between pictures.
            nearest = {int(i) for j, i in enumerate(distance.argmin(axis=0)) if distance[i, j] <= reach}
            rows = rows[np.isin(times, moments[sorted(nearest)])]
        return pa.Table.from_pandas(rows, SCHEMA, preserve_index=False)

    def _boxes(self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray) -> pd.DataFrame | None:
        """All boxes of a video by time, None if it has no detections."""
        if video_id in self._videos:
            self._videos[video_id] = self._videos.pop(video_id)  # to the end
            return self._videos[video_id]
        if video_id in self._groups:
            tables = [detections.read_part(file, group, video_id) for file, group in self._groups[video_id]]
            rows = pa.concat_tables(tables).to_pandas()
        elif video_id in self._epic:
            if self._fps is None and not seconds[-1] > 0:
                # An infinite rate would put the boxes of all frames at second 0, for later clips of the video too.
                raise VideoError(
                    f"{video_id}: a frame at second 0 does not show the frame rate; set detector.options.fps"
                )
            fps = self._fps if self._fps is not None else float((frame_numbers[-1] + 0.5) / seconds[-1])
            try:
                rows = detections.read_epic(self._epic[video_id], fps).to_pandas()
            except UserError as error:
                raise VideoError(str(error)) from error
        else:
            return None
        # stable: boxes of one moment keep the order of the file
        self._videos[video_id] = rows.sort_values("second", kind="stable")
        # Clips mostly come video by video.
        if len(self._videos) > _VIDEOS:
            del self._videos[next(iter(self._videos))]
        return self._videos[video_id]


class Oracle(DetectionFiles):
    """True boxes with synthetic noise, to measure how much the stages after the detector tolerate.

    ``jitter`` is the standard deviation of a box's place and of its width and height, relative to its own size;
    ``drop`` the share of frames without any detection. The noise depends on ``seed``, video and frame alone.
    """

    def __init__(
        self, path: str, fps: float | None = None, jitter: float = 0.0, drop: float = 0.0, seed: int = 0
    ) -> None:
        if not 0 <= jitter <= 1 or not 0 <= drop <= 1:
            raise UserError(f"oracle: jitter and drop must be from 0 to 1; got {jitter} and {drop}")
        if seed < 0:
            raise UserError(f"oracle: seed must be at least 0, not {seed}")
        super().__init__(path, fps)
        self._jitter, self._drop, self._seed = jitter, drop, seed

    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None = None
    ) -> pa.Table:
        """See :meth:`Detector.detect`."""
        true = super().detect(video_id, frame_numbers, seconds, pictures)
        if not self._jitter and not self._drop:
            return true
        rows = true.to_pandas()
        noisy = []
        for frame, boxes in rows.groupby("frame_number", sort=True):
            # A generator a frame: overlapping clips, shards and reruns see the same noise.
            rng = np.random.default_rng((self._seed, zlib.crc32(video_id.encode()), frame))
            if rng.random() < self._drop:
                continue
            edges = boxes[list(EDGES)].to_numpy(dtype=np.float64)
            size = edges[:, 2:] - edges[:, :2]
            centre = (edges[:, 2:] + edges[:, :2]) / 2 + size * rng.normal(0, self._jitter, size.shape)
            # The logarithm of the size is jittered: it stays positive.
            size = size * np.exp(rng.normal(0, self._jitter, size.shape))
            moved = np.clip(np.concatenate([centre - size / 2, centre + size / 2], axis=1), 0, 1)
            noisy.append(boxes.assign(**dict(zip(EDGES, moved.astype(np.float32).T, strict=True))))
        rows = pd.concat(noisy) if noisy else rows.iloc[:0]
        return pa.Table.from_pandas(rows, SCHEMA, preserve_index=False)
