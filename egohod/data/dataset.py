"""Clips for training and evaluation: rows of annotation tables become pixels, tokens and targets."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from egohod.data.storage import LocalCache, VideoError, VideoFile, one_clip
from egohod.data.table import ClipReader, ClipRow, ClipTable, choose_text
from egohod.data.text import Tokenizer, swap_sides, trim
from egohod.data.transforms import Box, crop, crop_boxes, flip, flip_boxes, random_box, spatial_crops
from egohod.data.videos import MIN_SECONDS, RULES
from egohod.errors import UserError

log = logging.getLogger(__name__)

# So many unreadable clips in a row are no accident but a wrong folder.
_MAX_REPLACEMENTS = 10
# The share of bad clips is judged as if at least so many had been seen: a few at the start stop nothing.
_GRACE_CLIPS = 1000
# Part of what cached features depend on; counts up when the same settings show other frames.
_SAMPLING = "2"

Key = int | tuple[int, int]


WHOLE_FILES = ("midpoints", "windows")
"""Samplings of clips that are files of their own, see :func:`frame_numbers`."""


@dataclass(frozen=True)
class EvalProtocol:
    """How clips are shown in an evaluation; resolution, activation and the like come from the checkpoint.

    ``frames`` per view. ``sampling``: a rule of :func:`egohod.data.videos.clip_indices`; or, where clips are files of
    their own, *midpoints*, the floored midpoints of equal parts of the file, or *windows*, runs of frames ``stride``
    apart whose starts are spread evenly over the file. A clip has ``windows`` x ``crops`` views. ``merge``: whether the
    *mean* or the *max* of the views' similarities to a text counts. ``resize``: one of
    :data:`egohod.data.transforms.RESIZES`. ``image_stats``: the ``model.image_stats`` of the weights whose numbers this
    protocol reproduces, None for any; frames are always normalised as the model expects. ``prompts``: narrations of
    which split describe a class.
    """

    name: str = "plain"
    source: str = ""
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


@dataclass(frozen=True)
class View:
    """A training clip as the model's input, and where it came from."""

    row: ClipRow
    frames: np.ndarray
    """The whole pictures, uint8 [num_frames, H, W, 3]."""
    box: Box
    """The crop, before any flip."""
    flipped: bool
    video: Tensor
    """uint8 [3, num_frames, size, size]."""
    text: str
    boxes: np.ndarray | None
    """Hands and active object in ``video``, float32 [num_frames, 3, 4], see :class:`~egohod.data.detections.BoxTable`;
    None where no boxes are requested."""
    labels: Mapping[str, Tensor] | None = None
    """Values for the loss by name, see :class:`Labels`; None where there are none."""


class Labels(Protocol):
    """Training targets of the clips of one source."""

    def draw(self, index: int, rng: np.random.Generator) -> tuple[str, dict[str, Tensor]]:
        """The text for clip ``index`` of the source, and values of the same shapes for every clip, by name."""
        ...


class ClipDataset(Dataset[dict[str, Any]]):
    """Clips of one or several annotation tables, numbered one table after the other.

    With ``train=True``, ``dataset[(epoch, index)]`` is a dict of ``video`` uint8 [3, num_frames, size, size],
    ``tokens`` int64 [context], ``index`` (of the clip that is delivered), ``fault`` (``None``, or which clips could
    not be read and why, one per line), with ``boxes`` those of :class:`View` (NaN where a table has no detections) and
    with ``labels``, one for each table, their values. All randomness (frames, crop, flip, choice of text) is a
    function of (seed, epoch, index), so it depends neither on the number of workers nor on where a run was resumed. An
    unreadable clip is replaced by another one of its table, chosen by the same randomness.

    Otherwise ``dataset[index]`` is a dict of ``video`` [views, 3, T, size, size] as ``protocol`` shows it (default: one
    centre crop of ``num_frames`` frames), ``index`` and ``fault``. Pixels are 0..255, uint8 or, for protocols that
    resize without rounding, float32. A clip that cannot be read has no video, and a ``fault`` that names the file and
    the reason.

    Raises :class:`UserError` at once if a video folder or the decoder is missing.
    """

    def __init__(
        self,
        sources: Sequence[tuple[ClipTable, SourceConfig]],
        *,
        size: int,
        num_frames: int = 4,
        tokenizer: Tokenizer | None = None,
        protocol: EvalProtocol | None = None,
        decoder: str = "auto",
        cache: LocalCache | None = None,
        seed: int = 0,
        train: bool = False,
        crop_scale_min: float = 0.5,
        flip: float = 0.0,
        boxes: bool = False,
        labels: Sequence[Labels] | None = None,
    ) -> None:
        assert sources, "a dataset needs a table"
        assert labels is None or len(labels) == len(sources), "each table has labels, or none has"
        assert tokenizer is not None or not train, "training clips come with tokens"
        self.size, self.num_frames, self.train = size, num_frames, train
        self.protocol = protocol or EvalProtocol(frames=num_frames)
        self.decoder, opener = choose_decoder(decoder)
        # Evaluation goes through the clips of a video in order; training almost never needs a file twice.
        opener = opener if train else ReusingOpener(opener)
        self.sources = [ClipReader(table, config, opener, cache, boxes) for table, config in sources]
        self.starts = np.cumsum([0, *(len(source.table) for source in self.sources)])
        """Number of the first clip of each table, and the number of all clips."""
        self.labels = labels
        self._tokenizer = tokenizer
        self._seed = seed
        self._crop_scale_min = crop_scale_min
        self._flip = flip

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if self.train:
            return self._training_sample(epoch, index)
        source, place = self._place(index)
        try:
            with one_clip(self.row(index).video_id):
                return {"video": self._eval_views(index), "index": index, "fault": None}
        except VideoError as error:
            return {"video": None, "index": index, "fault": f"clip {source.table.id(place)}: {error}"}

    @property
    def clips(self) -> ClipTable:
        """The table of a dataset that has one."""
        return self.sources[0].table

    @property
    def config(self) -> SourceConfig:
        """Where the videos of the first table are."""
        return self.sources[0].config

    def row(self, index: int) -> ClipRow:
        """The annotation of a clip."""
        source, place = self._place(index)
        return source.table.row(place)

    def where(self, index: int) -> str:
        """File and place of a clip's annotation, for messages."""
        source, place = self._place(index)
        return source.table.where(place)

    def _place(self, index: int) -> tuple[ClipReader, int]:
        """The table of a clip, and its row there."""
        number = self._number(index)
        return self.sources[number], index - int(self.starts[number])

    def _number(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    # ---------------------------------------------------------------------------------------------
    # Training
    # ---------------------------------------------------------------------------------------------

    def view(self, key: tuple[int, int]) -> View:
        """The steps of ``dataset[key]`` when training. Raises :class:`VideoError`."""
        epoch, index = key
        return self._view(index, self._randomness(epoch, index))

    def _training_sample(self, epoch: int, index: int) -> dict[str, Any]:
        assert self._tokenizer is not None
        rng, faults = self._randomness(epoch, index), list[str]()
        while True:
            try:
                with one_clip(self.row(index).video_id):
                    view = self._view(index, rng)
                    tokens = self._tokenizer([view.text])[0]
                break
            except VideoError as error:
                faults.append(f"{self.where(index)}: {error}")
            if len(faults) > _MAX_REPLACEMENTS:
                raise VideoError(f"{len(faults)} clips in a row could not be read; the last: {faults[-1]}")
            # Of the same table, so that the share of each source in a batch stays what its weight says.
            number = self._number(index)
            index = int(rng.integers(self.starts[number], self.starts[number + 1]))
        sample = {"video": view.video, "tokens": tokens, "index": index, "fault": "\n".join(faults) or None}
        sample |= {} if view.labels is None else {"labels": view.labels}
        return sample if view.boxes is None else sample | {"boxes": torch.from_numpy(view.boxes)}

    def _randomness(self, epoch: int, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, epoch, index))))

    def _view(self, index: int, rng: np.random.Generator) -> View:
        # The order of the draws (frames, text, crop, flip) is part of the recipe: another one gives other clips.
        source, place = self._place(index)
        row = source.table.row(place)
        frames, seconds, _ = source.read(row, self.num_frames, rng)
        if self.labels:
            text, labels = self.labels[self._number(index)].draw(place, rng)
        else:
            text, labels = choose_text(row.texts, source.config.list_text, rng), None
        height, width = frames.shape[1:3]
        box = random_box(height, width, self._crop_scale_min, rng)
        video, flipped = crop(frames, box, self.size), rng.random() < self._flip
        boxes = source.boxes(row, seconds)
        if boxes is not None:
            boxes = crop_boxes(boxes, box, height, width)
            boxes = flip_boxes(boxes) if flipped else boxes
        if flipped:
            # "the left hand" is the right one in the mirror.
            video, text = flip(video), swap_sides(text)
        return View(row, frames, box, flipped, video, text, boxes, labels)

    # ---------------------------------------------------------------------------------------------
    # Evaluation
    # ---------------------------------------------------------------------------------------------

    def _eval_views(self, index: int) -> Tensor:
        """[views, 3, T, size, size]: all crops of the first window first."""
        source, row, protocol = self._place(index)[0], self.row(index), self.protocol
        # Only the decoder knows how long a file is, so it is asked for the frames of a total.
        if protocol.whole_files:
            frames = source.store(row).read_file(row.video_id, lambda total: frame_numbers(protocol, total))
        else:
            frames = source.read(row, protocol.frames, None, protocol.sampling).pictures[None]
        return torch.cat([spatial_crops(window, self.size, protocol.crops, protocol.resize) for window in frames])

    def restricted(self, mask: NDArray[np.bool_]) -> ClipDataset:
        """The clips where ``mask`` [N] is true."""
        # Shallow: the opened folders and what they remember of the videos are shared.
        dataset = copy.copy(self)
        for cached in ("identities", "numbers"):
            dataset.__dict__.pop(cached, None)
        masks = np.split(mask, self.starts[1:-1])
        dataset.sources = [source.restricted(each) for source, each in zip(self.sources, masks, strict=True)]
        dataset.starts = np.cumsum([0, *(len(source.table) for source in dataset.sources)])
        return dataset

    def missing(self) -> dict[int, str]:
        """Clips whose file is not there, by index, with a message that names the file; opens no video."""
        faults = {}
        for index in range(len(self)):
            row = self.row(index)
            try:
                self._place(index)[0].store(row).locate(row.video_id, row.start)
            except VideoError as error:
                faults[index] = str(error)
        return faults

    def length_note(self) -> str | None:
        """How many clips are short, and how many of them were widened; None if none is short."""
        least = self.config.min_clip_seconds or MIN_SECONDS
        short = np.flatnonzero(np.concatenate([each.table.end - each.table.start for each in self.sources]) < least)
        widened = 0
        for index in short.tolist():
            row = self.row(index)
            with contextlib.suppress(VideoError):
                store = self._place(index)[0].store(row)
                widened += store.end_of(row.video_id, row.start, row.end, self.protocol.sampling) > row.end
        if not len(short):
            return None
        return f"{len(short)} clips are shorter than {least:g} s: {widened} of them were widened to it"

    @cached_property
    def identities(self) -> list[str]:
        """A hash of each clip and its files: a change of any of them gives other features.

        Local files count by name, size and time of change, remote ones by name; missing ones not at all.
        """
        return [self._identity(index) for index in range(len(self))]

    @cached_property
    def numbers(self) -> list[int]:
        """A number for each clip that follows from its video and times alone, to seed what is random about it.

        It is the same in every benchmark and whichever other clips there are, as cached features must be.
        """
        # Not the index: with clips left out, or in another benchmark, that would be another one.
        rows = (self.row(index) for index in range(len(self)))
        return [zlib.crc32(f"{row.video_id} {row.start:.3f} {row.end:.3f}".encode()) for row in rows]

    def _identity(self, index: int) -> str:
        source, row = self._place(index)[0], self.row(index)
        store, end = source.store(row), row.end
        # A missing clip keeps its annotated end: it is never embedded, but its identity must not fail.
        files: list[VideoFile] = []
        with contextlib.suppress(VideoError):
            end = store.end_of(row.video_id, row.start, row.end, self.protocol.sampling)
            files = store.locate(row.video_id, row.start, end)
        parts = [
            _SAMPLING,
            str(store.root),
            row.video_id,
            repr(row.start),
            repr(end),
            repr(source.config.chunk_seconds),
        ]
        for file in files:
            if isinstance(file, Path):
                state = file.stat()
                parts += [str(file), str(state.st_size), str(state.st_mtime_ns)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


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


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Training samples -> ``video`` uint8 [B, 3, T, H, W], ``tokens`` int64 [B, L] trimmed, ``index`` int64 [B],
    ``faults``, and ``boxes`` float32 [B, T, 3, 4] and ``labels`` (values by name, each stacked) if there are any.

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


def collate_views(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Evaluation samples -> ``video`` [B, views, 3, T, S, S] and ``index`` int64 [B] of those that can be read."""
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
        # Once each: a bad clip comes back every epoch.
        for fault in faults:
            if fault not in self._logged:
                self._logged.add(fault)
                log.warning("unreadable clip, another one takes its place: %s", fault)
        # Clips asked for, replacements included: a share that does not depend on the size of the data.
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
