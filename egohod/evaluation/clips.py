"""The clips of a benchmark: what they are, which files they lie in, and their views as a model is given them."""

from __future__ import annotations

import contextlib
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

from egohod.data.decoders import KeptOpen, choose_decoder
from egohod.data.files import LocalCache, Source, VideoError, one_clip
from egohod.data.frames import MIN_SECONDS
from egohod.data.transforms import spatial_crops
from egohod.data.video import VideoStore
from egohod.errors import UserError
from egohod.evaluation.protocols import Protocol

# Part of what kept features depend on; counts up when the same settings show other frames.
_SAMPLING = "2"


@dataclass(frozen=True)
class ClipList:
    """N clips below one video folder. ``start`` and ``end`` float64 [N] in seconds; an infinite end is the file's.

    ``ids`` are for people; ``root``, ``layout``, ``chunk_seconds`` and ``min_clip_seconds`` as in
    :class:`~egohod.data.config.SourceConfig`.
    """

    ids: Sequence[str]
    videos: Sequence[str]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    root: str
    layout: str = "auto"
    chunk_seconds: float = 15.0
    min_clip_seconds: float | None = None

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
        self._store = VideoStore(
            clips.root, clips.layout, clips.chunk_seconds, KeptOpen(opener), cache, clips.min_clip_seconds
        )

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            with one_clip(self.clips.videos[index]):
                return {"video": self._views(index), "index": index, "fault": None}
        except VideoError as error:
            return {"video": None, "index": index, "fault": f"clip {self.clips.ids[index]}: {error}"}

    def missing(self) -> dict[int, str]:
        """Clips whose file is not there, by index, with a message that names the file; opens no video."""
        faults = {}
        for index, (video, start) in enumerate(zip(self.clips.videos, self.clips.start.tolist(), strict=True)):
            try:
                self._store.locate(video, start)
            except VideoError as error:
                faults[index] = str(error)
        return faults

    def length_note(self) -> str | None:
        """How many clips are short, and how many of them were widened; None if none is short."""
        clips, least = self.clips, self.clips.min_clip_seconds or MIN_SECONDS
        short = np.flatnonzero(clips.end - clips.start < least).tolist()
        widened = 0
        for index in short:
            video, start, end = self._clip(index)
            with contextlib.suppress(VideoError):
                widened += self._store.end_of(video, start, end, self.protocol.sampling) > end
        if not short:
            return None
        return f"{len(short)} clips are shorter than {least:g} s: {widened} of them were widened to it"

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
        video, start, end = self._clip(index)
        files: list[Source] = []
        with contextlib.suppress(VideoError):
            end = self._store.end_of(video, start, end, self.protocol.sampling)
            files = self._store.locate(video, start, end)
        told = [_SAMPLING, self.clips.root, video, repr(start), repr(end), repr(self.clips.chunk_seconds)]
        for file in files:
            if isinstance(file, Path):
                state = file.stat()
                told += [str(file), str(state.st_size), str(state.st_mtime_ns)]
        return hashlib.sha256("\0".join(told).encode()).hexdigest()

    def _clip(self, index: int) -> tuple[str, float, float]:
        return self.clips.videos[index], float(self.clips.start[index]), float(self.clips.end[index])

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
        video, start, end = self._clip(index)
        protocol = self.protocol
        if protocol.whole_files:
            frames = self._store.read_file(video, lambda total: frame_numbers(protocol, total))
        else:
            frames = self._store.read(video, start, end, self.num_frames, rule=protocol.sampling).pictures[None]
        return torch.cat([spatial_crops(window, self.size, protocol.crops, protocol.resize) for window in frames])


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
