"""An annotation row and a seed become a uint8 clip with its tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from egohod.data.config import SourceConfig
from egohod.data.decoders import choose_decoder
from egohod.data.files import LocalCache, one_clip
from egohod.data.table import ClipRow, ClipSource, ClipTable, choose_text
from egohod.data.text import Tokenizer, swap_sides, trim
from egohod.data.transforms import Box, center_crop, crop, crop_boxes, flip, flip_boxes, random_box
from egohod.data.video import VideoError
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
