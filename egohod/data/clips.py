"""An annotation row and a seed become a uint8 clip with its tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from egohod.config import SourceConfig, UserError
from egohod.data.decoders import choose_decoder
from egohod.data.files import LocalCache
from egohod.data.table import ClipRow, ClipTable
from egohod.data.text import Tokenizer, choose_text, swap_sides, trim
from egohod.data.transforms import center_crop, flip, random_crop
from egohod.data.video import VideoError, VideoStore

log = logging.getLogger(__name__)

# So many unreadable clips in a row are no accident but a wrong folder.
_MAX_REPLACEMENTS = 10
# The share of bad clips is judged as if at least so many had been seen: a few at the start stop nothing.
_GRACE_CLIPS = 1000

Key = int | tuple[int, int]


class ClipDataset(Dataset[dict[str, Any]]):
    """Map-style: ``dataset[(epoch, index)]`` when training, ``dataset[index]`` otherwise.

    All randomness of a sample (frames, crop, flip, choice of text) is a function of (seed, epoch, index), so it does
    not depend on the number of workers, nor on where a run was resumed.

    A sample is a dict: ``video`` uint8 [3, num_frames, size, size], ``tokens`` int64 [context], ``index`` (of the clip
    that is delivered), ``fault`` (``None``, or which clips could not be read and why, one per line). When training, an
    unreadable clip is replaced by another one, chosen by the same randomness; otherwise its :class:`VideoError` is
    raised.

    Raises :class:`UserError` at once if a video folder or the decoder is missing.
    """

    def __init__(
        self,
        table: ClipTable,
        source: SourceConfig,
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
    ) -> None:
        self.table = table
        self.size = size
        self.num_frames = num_frames
        self.train = train
        self.decoder, opener = choose_decoder(decoder)
        self._tokenizer = tokenizer
        self._seed = seed
        self._list_text = source.list_text
        self._crop_scale_min = crop_scale_min
        self._flip = flip
        self._stores = {
            name: VideoStore(root, source.layout, source.chunk_seconds, opener, cache)
            for name, root in _roots(table, source).items()
        }

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, epoch, index))))
        if not self.train:
            return self._sample(index, None, rng)
        faults: list[str] = []
        while True:
            try:
                return self._sample(index, "\n".join(faults) or None, rng)
            except VideoError as error:
                faults.append(f"{self.table.path} row {self.table.row(index).row}: {error}")
            if len(faults) > _MAX_REPLACEMENTS:
                raise VideoError(f"{len(faults)} clips in a row could not be read; the last: {faults[-1]}")
            index = int(rng.integers(len(self)))

    def _sample(self, index: int, fault: str | None, rng: np.random.Generator) -> dict[str, Any]:
        row = self.table.row(index)
        frames = self._store(row).read(row.video_id, row.start, row.end, self.num_frames, rng if self.train else None)
        text = choose_text(row.texts, self._list_text, rng)
        if self.train:
            video = random_crop(frames, self.size, self._crop_scale_min, rng)
            if rng.random() < self._flip:
                video, text = flip(video), swap_sides(text)
        else:
            video = center_crop(frames, self.size)
        return {"video": video, "tokens": self._tokenizer([text])[0], "index": index, "fault": fault}

    def _store(self, row: ClipRow) -> VideoStore:
        return self._stores.get(row.dataset) or self._stores[""]


def _roots(table: ClipTable, source: SourceConfig) -> dict[str, str]:
    """Video folder by dataset name; the name '' stands for all others."""
    datasets = set(np.unique(table.column("dataset").astype(str))) if "dataset" in table.column_names else {""}
    roots = {name: root for name, root in source.dataset_roots.items() if name in datasets}
    others = sorted(datasets - set(roots))
    if others:
        if not source.root:
            what = f"the rows of dataset '{others[0]}'" if others[0] else "its rows"
            raise UserError(f"{table.path}: {what} need a video folder; set root (or dataset_roots.NAME)")
        roots[""] = source.root
    return roots


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples -> ``video`` uint8 [B, 3, T, H, W], ``tokens`` int64 [B, L] trimmed, ``index`` int64 [B], ``faults``.

    Trimming happens here, on the CPU, so that the device never has to be asked for a length.
    """
    # Frames come out of the decoder channels-last; stacking them that way is a plain copy of memory.
    video = torch.stack([sample["video"].permute(1, 2, 3, 0) for sample in samples]).permute(0, 4, 1, 2, 3)
    tokens: Tensor = trim(torch.stack([sample["tokens"] for sample in samples]))
    return {
        "video": video,
        "tokens": tokens.contiguous(),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "faults": [sample["fault"] for sample in samples if sample["fault"]],
    }


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

    def update(self, batch: Mapping[str, Any]) -> None:
        """Take note of a batch of :func:`collate`. Raises :class:`UserError` above the tolerated share."""
        faults = [line for fault in batch["faults"] for line in fault.splitlines()]
        self._seen += len(batch["index"])
        self._bad += len(faults)
        for fault in faults:
            if fault not in self._logged:
                self._logged.add(fault)
                log.warning("unreadable clip, another one takes its place: %s", fault)
        if self._bad > self._max_fraction * max(self._seen, _GRACE_CLIPS):
            raise UserError(
                f"{self._bad} of {self._seen} clips could not be read, more than data.max_bad_fraction="
                f"{self._max_fraction:g} allows; the last: {faults[-1] if faults else 'before the resume'}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"seen": self._seen, "bad": self._bad, "logged": sorted(self._logged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where the checkpoint stood."""
        self._seen, self._bad, self._logged = int(state["seen"]), int(state["bad"]), set(state["logged"])
