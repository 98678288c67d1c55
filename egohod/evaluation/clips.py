"""The clips of a benchmark: what they are, which files they lie in, and their views as a model is given them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from egohod.config import UserError
from egohod.data.annotations import MIN_SECONDS
from egohod.data.decoders import KeptOpen, choose_decoder
from egohod.data.files import LocalCache, Source, VideoError, open_root
from egohod.data.frames import frame_times
from egohod.data.transforms import spatial_crops
from egohod.data.video import ENDINGS, VideoStore
from egohod.evaluation.protocols import Protocol


@dataclass(frozen=True)
class ClipList:
    """N clips below one video folder. ``start`` and ``end`` float64 [N] in seconds; an infinite end is the file's.

    ``ids`` are for people; ``root``, ``layout`` and ``chunk_seconds`` as in :class:`~egohod.config.SourceConfig`.
    """

    ids: Sequence[str]
    videos: Sequence[str]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    root: str
    layout: str = "auto"
    chunk_seconds: float = 15.0

    def __len__(self) -> int:
        return len(self.ids)

    def restricted(self, kept: NDArray[np.bool_]) -> ClipList:
        """The clips where ``kept`` [N] is true."""
        rows = np.flatnonzero(kept).tolist()
        return replace(
            self,
            ids=[self.ids[row] for row in rows],
            videos=[self.videos[row] for row in rows],
            start=self.start[kept],
            end=self.end[kept],
        )


def widened(start: NDArray[np.float64], end: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Ends such that no clip is shorter than a second (SPEC 5, as upstream does), and how many that changed."""
    short = end - start < MIN_SECONDS
    return np.where(short, start + MIN_SECONDS, end), int(short.sum())


class _Store(VideoStore):
    """A video store that can be asked for files without decoding anything."""

    def file(self, video: str, second: float) -> Source:
        """The file in which ``second`` of a video lies. Raises :class:`VideoError`."""
        try:
            return self._find(self._checked(video), int(second // self._chunk_seconds))[1]
        except OSError as error:
            raise VideoError(f"{self.root}/{video}: cannot be read: {error.strerror or error}") from error


class EvaluationDataset(Dataset[dict[str, Any]]):
    """Map-style: ``dataset[i]`` is a dict of ``video`` [views, 3, T, size, size], ``index`` and ``fault``.

    Pixels are 0..255, uint8 or, for protocols that resize without rounding, float32.

    A clip that cannot be read has no video, and a ``fault`` that names the file and the reason. Raises
    :class:`UserError` at once if the video folder or the decoder is missing.
    """

    def __init__(
        self,
        clips: ClipList,
        protocol: Protocol,
        *,
        size: int,
        decoder: str = "auto",
        cache: LocalCache | None = None,
    ) -> None:
        self.clips = clips
        self.protocol = protocol
        self.size = size
        self.num_frames = protocol.frames
        self.decoder, opener = choose_decoder(decoder)
        self._opener = KeptOpen(opener)
        self._store = _Store(clips.root, clips.layout, clips.chunk_seconds, self._opener, cache)
        self._files = open_root(clips.root, cache)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {"video": self._views(index), "index": index, "fault": None}
        except VideoError as error:
            return {"video": None, "index": index, "fault": f"clip {self.clips.ids[index]}: {error}"}

    def missing(self) -> dict[int, str]:
        """Clips whose file is not there, by index, with a message that names the file; opens no video."""
        faults = {}
        for index, (video, start) in enumerate(zip(self.clips.videos, self.clips.start.tolist(), strict=True)):
            try:
                self._store.file(video, start)
            except VideoError as error:
                faults[index] = str(error)
        return faults

    @cached_property
    def identities(self) -> list[str]:
        """What tells each clip from all others, its files included: a change of any gives other features.

        Local files are known by name, size and time of change, remote ones by name. Clips that are missing have none.
        """
        return [self._identity(index) for index in range(len(self))]

    @cached_property
    def numbers(self) -> list[int]:
        """A number for each clip that follows from its video and times alone, for what is random about it.

        It is the same in every benchmark and whichever other clips there are, as features that are kept must be.
        """
        clips = self.clips
        told = zip(clips.videos, clips.start.tolist(), clips.end.tolist(), strict=True)
        return [zlib.crc32(f"{video} {start:.3f} {end:.3f}".encode()) for video, start, end in told]

    def _identity(self, index: int) -> str:
        video, start, end = self.clips.videos[index], self.clips.start[index], self.clips.end[index]
        said = [self.clips.root, video, repr(float(start)), repr(float(end)), repr(self.clips.chunk_seconds)]
        for second in (start, np.nextafter(end, start)) if np.isfinite(end) else (start,):
            try:
                file = self._store.file(video, float(second))
            except VideoError:  # a clip may end beyond the video
                continue
            if isinstance(file, Path):
                state = file.stat()
                said += [str(file), str(state.st_size), str(state.st_mtime_ns)]
        return hashlib.sha256("\0".join(said).encode()).hexdigest()

    def restricted(self, kept: NDArray[np.bool_]) -> EvaluationDataset:
        """The clips where ``kept`` [N] is true."""
        made = EvaluationDataset.__new__(EvaluationDataset)
        made.__dict__.update(
            {name: value for name, value in vars(self).items() if name not in ("identities", "numbers")}
        )
        made.clips = self.clips.restricted(kept)
        return made

    def _views(self, index: int) -> Tensor:
        """[views, 3, T, size, size]: all crops of the first window first."""
        video, start, end = self.clips.videos[index], float(self.clips.start[index]), float(self.clips.end[index])
        protocol = self.protocol
        if protocol.whole_files:
            frames = self._whole_file(video)
        else:
            frames = self._store.read(video, start, end, self.num_frames, rule=protocol.sampling).pictures[None]
        return torch.cat([spatial_crops(window, self.size, protocol.crops, protocol.resize) for window in frames])

    def _whole_file(self, video: str) -> NDArray[np.uint8]:
        """Frames of a whole file, uint8 [windows, T, H, W, 3]."""
        for ending in ENDINGS:
            try:
                source = self._files.open(f"{video}{ending}")
            except FileNotFoundError:
                continue
            decoder = self._opener(source, self._files.name_of(f"{video}{ending}"))
            try:
                total = max(1, round(decoder.duration * decoder.fps))
                wanted = frame_numbers(self.protocol, total)
                # Windows overlap: each frame is decoded once.
                distinct, place = np.unique(np.minimum(wanted, total - 1), return_inverse=True)
                pictures = decoder.read_at(frame_times(distinct, decoder.fps))[place.reshape(wanted.shape)]
                pictures[wanted >= total] = 0
                return pictures
            finally:
                decoder.close()
        raise VideoError(f"{self._files.name_of(video)}.mp4: no such file")


def frame_numbers(protocol: Protocol, total: int) -> NDArray[np.int64]:
    """Frames of a file of ``total`` frames that a protocol for whole files shows, int64 [windows, frames].

    *midpoints*: floor((i + 1/2) total / n). *windows*: starts spread evenly over what leaves room for a window, then
    every ``stride``-th frame. Numbers from ``total`` on stand for black frames, with which LaViLa fills up a file that
    is too short for one window.
    """
    if protocol.sampling == "midpoints":
        return np.floor((np.arange(protocol.frames) + 0.5) * total / protocol.frames).astype(np.int64)[None]
    assert protocol.sampling == "windows", protocol.sampling
    starts = np.linspace(0, max(total - protocol.frames * protocol.stride, 0), protocol.windows).astype(np.int64)
    return starts[:, None] + np.arange(protocol.frames) * protocol.stride


def collate_views(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples -> ``video`` [B, views, 3, T, S, S] and ``index`` int64 [B] of those that could be read; faults."""
    good = [sample for sample in samples if sample["fault"] is None]
    return {
        "video": torch.stack([sample["video"] for sample in good]) if good else None,
        "index": np.array([sample["index"] for sample in good], dtype=np.int64),
        "faults": {sample["index"]: sample["fault"] for sample in samples if sample["fault"] is not None},
    }


def require_all(faults: Mapping[int, str], total: int) -> None:
    """Raise one :class:`UserError` that names everything that cannot be read, a line each."""
    if faults:
        lines = list(dict.fromkeys(faults[index] for index in sorted(faults)))
        lines.append(
            f"{len(faults)} of {total} clips cannot be read; main_eval.py --allow_missing evaluates the others and "
            "marks the numbers as partial"
        )
        raise UserError(*lines)
