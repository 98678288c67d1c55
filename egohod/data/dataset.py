"""An annotation row and a seed become a uint8 clip with its tokens."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from egohod.data.config import SourceConfig
from egohod.data.decoders import ReusingOpener, choose_decoder
from egohod.data.frames import MIN_SECONDS, RULES
from egohod.data.storage import LocalCache, VideoError, VideoFile, one_clip
from egohod.data.table import ClipRow, ClipSource, ClipTable, choose_text
from egohod.data.text import Tokenizer, swap_sides, trim
from egohod.data.transforms import Box, center_crop, crop, crop_boxes, flip, flip_boxes, random_box, spatial_crops
from egohod.data.videos import VideoStore
from egohod.errors import UserError

log = logging.getLogger(__name__)

# So many unreadable clips in a row are no accident but a wrong folder.
_MAX_REPLACEMENTS = 10
# The share of bad clips is judged as if at least so many had been seen: a few at the start stop nothing.
_GRACE_CLIPS = 1000

Key = int | tuple[int, int]


@dataclass(frozen=True)
class View:
    """A clip as a model is given it, and where that came from."""

    row: ClipRow
    frames: np.ndarray
    """The whole pictures, uint8 [num_frames, H, W, 3]."""
    box: Box | None
    """What is cut out of them when training, before any flip; None is the middle square."""
    flipped: bool
    video: Tensor
    """uint8 [3, num_frames, size, size]."""
    text: str
    boxes: np.ndarray | None
    """Hands and active object in ``video``, float32 [num_frames, 3, 4], see :class:`~egohod.data.detections.BoxTable`;
    None where no boxes are asked for."""
    labels: Mapping[str, Tensor] | None = None
    """What is known of the clip's classes, see :class:`Labels`; None where nothing is asked for."""


class Labels(Protocol):
    """What the clips of a source are matched with when training."""

    def draw(self, index: int, rng: np.random.Generator) -> tuple[str, dict[str, Tensor]]:
        """The text for clip ``index`` of the source, and values of the same shapes for every clip, by name."""
        ...


class ClipDataset(Dataset[dict[str, Any]]):
    """Map-style: ``dataset[(epoch, index)]`` when training, ``dataset[index]`` otherwise.

    The clips of several ``sources`` are numbered one source after the other. All randomness of a sample (frames,
    crop, flip, choice of text) is a function of (seed, epoch, index), so it does not depend on the number of workers,
    nor on where a run was resumed.

    A sample is a dict: ``video`` uint8 [3, num_frames, size, size], ``tokens`` int64 [context], ``index`` (of the clip
    that is delivered), ``fault`` (``None``, or which clips could not be read and why, one per line), and with ``boxes``
    (training only) the ``boxes`` of :class:`View`, all NaN where a source has no detections; with ``labels`` (training
    only), one for each source, what they draw. When training, an
    unreadable clip is replaced by another one of its source, chosen by the same randomness; otherwise its
    :class:`VideoError` is raised.

    Raises :class:`UserError` at once if a video folder or the decoder is missing.
    """

    def __init__(
        self,
        sources: Sequence[tuple[ClipTable, SourceConfig]],
        *,
        size: int,
        num_frames: int,
        tokenizer: Tokenizer,
        decoder: str = "auto",
        cache: LocalCache | None = None,
        seed: int = 0,
        train: bool = False,
        crop_scale_min: float = 0.5,
        flip: float = 0.0,
        boxes: bool = False,
        labels: Sequence[Labels] | None = None,
    ) -> None:
        assert sources, "a dataset needs a source"
        assert labels is None or len(labels) == len(sources), "each source has labels, or none has"
        self.size = size
        self.num_frames = num_frames
        self.train = train
        self.decoder, opener = choose_decoder(decoder)
        self.sources = [ClipSource(table, config, opener, cache, boxes) for table, config in sources]
        self.starts = np.cumsum([0, *(len(source.table) for source in self.sources)])
        """Number of the first clip of each source, and the number of all clips."""
        self._tokenizer = tokenizer
        self._seed = seed
        self._crop_scale_min = crop_scale_min
        self._flip = flip
        self.labels = labels

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng, faults = self._randomness(epoch, index), list[str]()
        while True:
            try:
                with one_clip(self.row(index).video_id):
                    view = self._view(index, rng)
                    tokens = self._tokenizer([view.text])[0]
                break
            except VideoError as error:
                if not self.train:
                    raise
                faults.append(f"{self.where(index)}: {error}")
            if len(faults) > _MAX_REPLACEMENTS:
                raise VideoError(f"{len(faults)} clips in a row could not be read; the last: {faults[-1]}")
            source = self._source(index)
            index = int(rng.integers(self.starts[source], self.starts[source + 1]))
        sample = {"video": view.video, "tokens": tokens, "index": index, "fault": "\n".join(faults) or None}
        sample |= {} if view.labels is None else {"labels": view.labels}
        return sample if view.boxes is None else sample | {"boxes": torch.from_numpy(view.boxes)}

    def view(self, key: Key) -> View:
        """What ``dataset[key]`` is made of. Raises :class:`VideoError`, also when training."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self._view(index, self._randomness(epoch, index))

    def row(self, index: int) -> ClipRow:
        """The annotation of a clip."""
        source = self._source(index)
        return self.sources[source].table.row(index - int(self.starts[source]))

    def where(self, index: int) -> str:
        """File and place of a clip's annotation, for messages."""
        source = self._source(index)
        return self.sources[source].table.where(index - int(self.starts[source]))

    def _source(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _randomness(self, epoch: int, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, epoch, index))))

    def _view(self, index: int, rng: np.random.Generator) -> View:
        number, row = self._source(index), self.row(index)
        source = self.sources[number]
        frames, seconds, _ = source.read(row, self.num_frames, rng if self.train else None)
        if self.labels and self.train:
            text, labels = self.labels[number].draw(index - int(self.starts[number]), rng)
        else:
            text, labels = choose_text(row.texts, source.list_text, rng), None
        if not self.train:
            return View(row, frames, None, False, center_crop(frames, self.size), text, None)
        height, width = frames.shape[1:3]
        box = random_box(height, width, self._crop_scale_min, rng)
        video, flipped = crop(frames, box, self.size), rng.random() < self._flip
        boxes = source.boxes(row, seconds)
        if boxes is not None:
            boxes = crop_boxes(boxes, box, height, width)
            boxes = flip_boxes(boxes) if flipped else boxes
        if flipped:
            video, text = flip(video), swap_sides(text)
        return View(row, frames, box, flipped, video, text, boxes, labels)


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples -> ``video`` uint8 [B, 3, T, H, W], ``tokens`` int64 [B, L] trimmed, ``index`` int64 [B], ``faults``,
    and ``boxes`` float32 [B, T, 3, 4] and ``labels`` (values by name, each stacked) if there are any.

    Trimming happens here, on the CPU, so that the device never has to be asked for a length.
    """
    # Frames come out of the decoder channels-last; stacking them that way is a plain copy of memory.
    video = torch.stack([sample["video"].permute(1, 2, 3, 0) for sample in samples]).permute(0, 4, 1, 2, 3)
    tokens: Tensor = trim(torch.stack([sample["tokens"] for sample in samples]))
    batch = {
        "video": video,
        "tokens": tokens.contiguous(),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "faults": [sample["fault"] for sample in samples if sample["fault"]],
    }
    if "boxes" in samples[0]:
        batch["boxes"] = torch.stack([sample["boxes"] for sample in samples])
    if "labels" in samples[0]:
        each = [sample["labels"] for sample in samples]
        batch["labels"] = {name: torch.stack([labels[name] for labels in each]) for name in each[0]}
    return batch


class FaultLedger:
    """Counts unreadable training clips, logs each once, and stops the run when they are too many.

    ``max_fraction`` is the largest tolerated share of the clips asked for. Fewer than a thousand clips are judged as
    a thousand, so that with 1 % the eleventh bad clip stops a run at the earliest; with 0 the first one does.
    """

    def __init__(self, max_fraction: float) -> None:
        self._max_fraction = max_fraction
        self._seen = 0
        self._bad = 0
        self._logged: set[str] = set()

    @property
    def bad(self) -> int:
        """Clips that could not be read."""
        return self._bad

    def update(self, batch: Mapping[str, Any]) -> None:
        """Take note of a batch of :func:`collate`. Raises :class:`UserError` above the tolerated share."""
        faults = [line for fault in batch["faults"] for line in fault.split("\n")]
        self._seen += len(batch["index"])
        self._bad += len(faults)
        for fault in faults:
            if fault not in self._logged:
                self._logged.add(fault)
                log.warning("unreadable clip, another one takes its place: %s", fault)
        if self._bad > self._max_fraction * max(self._seen, _GRACE_CLIPS):
            raise UserError(
                f"{self._bad} of {self._seen} clips could not be read, more than data.max_bad_fraction="
                f"{self._max_fraction:g} allows; tools/verify_dataset.py lists them all for the source's "
                f"exclude; the last: {faults[-1] if faults else 'before the resume'}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"seen": self._seen, "bad": self._bad, "logged": sorted(self._logged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where the checkpoint stood."""
        self._seen, self._bad, self._logged = int(state["seen"]), int(state["bad"]), set(state["logged"])


WHOLE_FILES = ("midpoints", "windows")
"""Samplings of clips that are files of their own, see :func:`frame_numbers`."""


@dataclass(frozen=True)
class EvalProtocol:
    """How a benchmark is run; resolution, activation and the like come from the checkpoint, never from here.

    ``frames`` per view. ``sampling``: a rule of :func:`egohod.data.frames.clip_indices`; or, where clips are files of
    their own, *midpoints*, the floored midpoints of equal parts of the file, or *windows*, runs of frames ``stride``
    apart whose starts are spread evenly over the file. A clip has ``windows`` x ``crops`` views. ``merge``: whether the
    *mean* or the *max* of the views' similarities to a text counts. ``resize``: one of
    :data:`egohod.data.transforms.RESIZES`. ``image_stats``: the ``model.image_stats`` of the weights whose numbers this
    protocol reproduces, None for any; frames are always normalised as the model expects. ``prompts``: narrations of
    which split stand for a class.
    """

    name: str
    source: str
    frames: int = 16
    sampling: str = "middle"
    windows: int = 1
    stride: int = 1
    crops: int = 1
    merge: str = "mean"
    resize: str = "bicubic_antialias"
    image_stats: str | None = None
    prompts: str = "train"

    def __post_init__(self) -> None:
        assert self.sampling in (*RULES, *WHOLE_FILES), self.sampling
        assert self.merge in ("mean", "max"), self.merge

    @property
    def views(self) -> int:
        """Views of each clip."""
        return self.windows * self.crops

    @property
    def whole_files(self) -> bool:
        """Whether it is for clips that are files of their own."""
        return self.sampling in WHOLE_FILES


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
        protocol: EvalProtocol,
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
            clips.root, clips.layout, clips.chunk_seconds, ReusingOpener(opener), cache, clips.min_clip_seconds
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
        files: list[VideoFile] = []
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


def frame_numbers(protocol: EvalProtocol, total: int) -> NDArray[np.int64]:
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
