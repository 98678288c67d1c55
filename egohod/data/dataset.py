"""Clips for training and evaluation: rows of annotation tables become pixels, tokens and targets."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from egohod import hub
from egohod.data.config import SourceConfig
from egohod.data.decoders import CachingOpener, ReusingOpener, choose_decoder
from egohod.data.replacements import Verbs
from egohod.data.storage import LocalCache, VideoError, one_clip
from egohod.data.table import ClipReader, ClipRow, ClipTable, choose_text, swap_sides
from egohod.data.videos import MIN_SECONDS, RULES, VideoStore
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.model.config import GEOMETRIES, IMAGE_STATS, Geometry, ImageStats, ModelConfig
from egohod.runtime import is_above_share

log = logging.getLogger(__name__)

# So many unreadable clips in a row are no accident but a wrong folder.
_MAX_REPLACEMENTS = 10
# Decoded pictures of overlapping clips that wait for their turn: ten seconds of 1080p at four frames a second.
_WAITING_BYTES = 1 << 28
# Part of what cached features depend on; counts up when the same settings show other frames.
_SAMPLING = "2"

Key = int | tuple[int, int]
Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""

WHOLE_FILES = ("midpoints", "windows")
"""Samplings of clips that are files of their own, see :func:`frame_numbers`."""


@dataclass(frozen=True)
class EvalProtocol:
    """How clips are shown in an evaluation; resolution, activation and the like come from the checkpoint.

    ``frames`` per view. ``sampling``: a rule of :func:`egohod.data.videos.clip_indices`; or, where clips are files of
    their own, *midpoints*, the floored midpoints of equal parts of the file, or *windows*, runs of frames ``stride``
    apart whose starts are spread evenly over the file. A clip has ``windows`` x ``crops`` views. ``merge``: whether the
    *mean* or the *max* of the views' similarities to a text counts. ``resize``: one of :data:`RESIZES`.
    ``image_stats``: the ``model.image_stats`` of the weights whose numbers this protocol reproduces, None for any;
    frames are always normalised as the model expects. ``prompts``: narrations of which split describe a class.
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
    negatives: tuple[str | None, ...] = ()
    """Captions that are false of the clip, those that are requested: ``text`` with its motion run backwards, and with
    other verbs; None where there is none."""
    tags: tuple[tuple[str, ...], ...] | None = None
    """Verbs and nouns, if they are requested."""


# Verbs or nouns of a clip that count; a narration rarely has more than three.
MOST_TAGS = 8
# Captions of a source of which the verbs are taken: as good as all of millions.
_CAPTIONS_FOR_VERBS = 50_000


@lru_cache(32768)
def tag_number(word: str) -> int:
    """A number for a verb or noun, the same in every process; 0 is none."""
    # 63 bits: among the words of any vocabulary no two get the same.
    return int.from_bytes(hashlib.blake2b(word.lower().encode(), digest_size=8).digest(), "big") >> 1 or 1


def _some_captions(source: ClipReader) -> Iterator[str]:
    rows = np.unique(np.linspace(0, len(source.table) - 1, _CAPTIONS_FOR_VERBS).astype(int))
    return (text for row in rows.tolist() for text in source.table.row(row).texts)


class Labels(Protocol):
    """Training targets of the clips of one source."""

    def draw(self, index: int, rng: np.random.Generator) -> tuple[str, dict[str, Tensor]]:
        """The text for clip ``index`` of the source, and values of the same shapes for every clip, by name."""
        ...


class ClipDataset(Dataset[dict[str, Any]]):
    """Clips of one or several annotation tables, numbered one table after the other.

    With ``train=True``, ``dataset[(epoch, index)]`` is a dict of ``video`` uint8 [3, num_frames, size, size],
    ``tokens`` int64 [context], ``index`` (of the clip that is delivered), ``fault`` (``None``, or which clips could
    not be read and why, one per line), with ``boxes`` those of :class:`View` (NaN where a table has no detections),
    with ``labels``, one for each table, their values. With ``opposites`` or ``replacements`` it has ``negatives`` int64
    [K, context], the tokens of the opposite and of captions with another verb, and ``has_negative`` bool [K] (where
    false, the tokens are the caption's); with ``tags`` numbers of the verbs and nouns, ``verb_tags`` and ``noun_tags``
    int64 [8], among its labels. All randomness (frames, crop, flip, choice of texts) is a function of (seed, epoch,
    index), so it depends neither on the number of workers nor on where a run was resumed. An unreadable clip is
    replaced by another one of its table, chosen by the same randomness.

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
        frame_cache: str | None = None,
        seed: int = 0,
        train: bool = False,
        crop_scale_min: float = 0.5,
        flip: float = 0.0,
        boxes: bool = False,
        labels: Sequence[Labels] | None = None,
        opposites: bool = False,
        replacements: int = 0,
        tags: bool = False,
        read_ahead: int = 0,
    ) -> None:
        assert sources, "a dataset needs a table"
        assert labels is None or len(labels) == len(sources), "each table has labels, or none has"
        assert tokenizer is not None or not train, "training clips come with tokens"
        self.size, self.num_frames, self.train = size, num_frames, train
        self.protocol = protocol or EvalProtocol(frames=num_frames)
        self.decoder, opener = choose_decoder(decoder)
        opener = CachingOpener(frame_cache, opener) if frame_cache else opener
        # Evaluation goes through the clips of a video in order; training almost never needs a file twice. With cuda
        # threads read, which cannot share an open file.
        opener = opener if train or self.decoder == "cuda" else ReusingOpener(opener)
        self.sources = [ClipReader(table, config, opener, cache, boxes) for table, config in sources]
        self.starts = np.cumsum([0, *(len(source.table) for source in self.sources)])
        """Number of the first clip of each table, and the number of all clips."""
        self.read_ahead = read_ahead if any(store.reads_ahead for store in self.stores) else 0
        """Clips of a batch to :meth:`request` before one is read; 0 where nothing is remote."""
        self.origin, self.rows = self, np.arange(len(self))
        """The dataset that this one is a part of, itself if none, and the places of the clips there, ascending."""
        self.upcoming: Sequence[Key] = ()
        """The clips of a batch that will be read next, in order: of those that overlap each frame is decoded once."""
        self._waiting: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by clip: pictures of several, and its own rows
        self._picture = ("", 0)  # the last video that was read, and the bytes of its pictures
        self.labels = labels
        self._tokenizer = tokenizer
        self._seed = seed
        self._crop_scale_min = crop_scale_min
        self._flip = flip
        self._with_opposites, self._replacements, self._with_tags = opposites, replacements, tags
        self.verbs = Verbs(chain.from_iterable(map(_some_captions, self.sources))) if replacements else None
        """The verbs of the captions, which replace one another; None where none is requested."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def clips(self) -> ClipTable:
        """The table of a dataset that has one, as those of evaluation."""
        assert len(self.sources) == 1, "which of the tables?"
        return self.sources[0].table

    @property
    def config(self) -> SourceConfig:
        """Where the videos of a dataset of one table are."""
        assert len(self.sources) == 1, "which of the sources?"
        return self.sources[0].config

    def _place(self, index: int) -> tuple[int, int]:
        """The number of a clip's table, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, index - int(self.starts[number])

    def row(self, index: int) -> ClipRow:
        """The annotation of a clip."""
        number, place = self._place(index)
        return self.sources[number].table.row(place)

    def where(self, index: int) -> str:
        """File and place of a clip's annotation, for messages."""
        number, place = self._place(index)
        return self.sources[number].table.where(place)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if self.train:
            return self._training_sample(epoch, index)
        # Never replaced in an evaluation: another clip would change what is measured.
        number, place = self._place(index)
        try:
            with one_clip(self.row(index).video_id):
                return {"video": self._eval_views(index), "index": index, "fault": None}
        except VideoError as error:
            fault = f"clip {self.sources[number].table.id(place)}: {error}"
            return {"video": None, "index": index, "fault": fault}

    # ---------------------------------------------------------------------------------------------
    # Training
    # ---------------------------------------------------------------------------------------------

    def _training_sample(self, epoch: int, index: int) -> dict[str, Any]:
        assert self._tokenizer is not None
        rng, faults = self._randomness(epoch, index), list[str]()
        while True:
            try:
                with one_clip(self.row(index).video_id):
                    view = self.view((epoch, index), rng)
                    tokens = self._tokenizer([view.text])[0]
                break
            except VideoError as error:
                faults.append(f"{self.where(index)}: {error}")
            if len(faults) > _MAX_REPLACEMENTS:
                raise VideoError(f"{len(faults)} clips in a row could not be read; the last: {faults[-1]}")
            # Of the same table, so that the share of each source in a batch follows its weight.
            number, _ = self._place(index)
            index = int(rng.integers(self.starts[number], self.starts[number + 1]))
        sample = {"video": view.video, "tokens": tokens, "index": index, "fault": "\n".join(faults) or None}
        labels = dict(view.labels or {})
        for name, words in zip(("verb_tags", "noun_tags"), view.tags or (), strict=False):
            numbers = [tag_number(word) for word in words[:MOST_TAGS]]
            labels[name] = torch.tensor(numbers + [0] * (MOST_TAGS - len(numbers)))
        sample |= {"labels": labels} if labels else {}
        if view.negatives:
            # Every clip has tokens, for batches of one shape; those of a clip without a negative are its caption's and
            # count nothing. A long text may be changed behind its last token only.
            negatives: Tensor = self._tokenizer([text or view.text for text in view.negatives])
            sample |= {"negatives": negatives, "has_negative": (negatives != tokens).any(dim=1)}
        return sample if view.boxes is None else sample | {"boxes": torch.from_numpy(view.boxes)}

    def _randomness(self, epoch: int, index: int) -> np.random.Generator:
        # A generator for each sample: nothing is left over from the sample that a worker made before.
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, epoch, index))))

    def view(self, key: tuple[int, int], rng: np.random.Generator | None = None) -> View:
        """The steps of ``dataset[key]`` when training. Raises :class:`VideoError`."""
        rng, index = self._randomness(*key) if rng is None else rng, key[1]
        # The order of the draws (frames, text, crop, flip) is part of the recipe: another one gives other clips.
        number, place = self._place(index)
        source = self.sources[number]
        row = source.table.row(place)
        frames, seconds, _ = source.read(row, self.num_frames, rng)
        if self.labels:
            text, labels = self.labels[number].draw(place, rng)
        else:
            text, labels = choose_text(row.texts, source.config.list_text, rng), None
        negatives = [source.opposite(place, text)] if self._with_opposites else []
        tags = source.tags(place, text) if self._with_tags else None
        height, width = frames.shape[1:3]
        box = random_box(height, width, self._crop_scale_min, rng)
        video, flipped = crop(frames, box, self.size), rng.random() < self._flip
        if self.verbs is not None:
            # Drawn last: the other draws are those of a run without replacements.
            others = source.replacements(place, text, self._replacements, self.verbs, rng)
            negatives += [*others, *[None] * (self._replacements - len(others))]
        boxes = source.boxes(row, seconds)
        if boxes is not None:
            boxes = crop_boxes(boxes, box, height, width)
            boxes = flip_boxes(boxes) if flipped else boxes
        if flipped:
            # "the left hand" is the right one in the mirror.
            video, text, negatives = video.flip(-1), swap_sides(text), [each and swap_sides(each) for each in negatives]
            tags = tags and [[swap_sides(word) for word in words] for words in tags]
        words = None if tags is None else tuple(map(tuple, tags))
        return View(row, frames, box, flipped, video, text, boxes, labels, tuple(negatives), words)

    # ---------------------------------------------------------------------------------------------
    # Evaluation
    # ---------------------------------------------------------------------------------------------

    def _eval_views(self, index: int) -> Tensor:
        """[views, 3, T, size, size]: all crops of the first window first."""
        source, row, protocol = self.sources[self._place(index)[0]], self.row(index), self.protocol
        # Only the decoder knows how long a file is, so the number of frames is passed to it.
        if protocol.whole_files:
            frames = source.store(row).read_file(row.video_id, lambda total: frame_numbers(protocol, total))
        else:
            together = self._waiting.pop(index, None) or self._read_overlapping(index)
            if together is None:
                pictures = source.read(row, protocol.frames, None, protocol.sampling).pictures
                self._picture = row.video_id, pictures[0].nbytes
            else:
                pictures = together[0][together[1]]
            frames = pictures[None]
        return torch.cat([spatial_crops(window, self.size, protocol.crops, protocol.resize) for window in frames])

    def _read_overlapping(self, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Read a clip and those of ``upcoming`` that overlap one after the other; None if it is to be read alone."""
        row, waiting = self.row(index), list[int]()
        # The first clip of a video is read alone, which shows how large its pictures are.
        room = _WAITING_BYTES // self._picture[1] if self._picture[0] == row.video_id else 0
        end = row.end
        for key in self.upcoming:
            if not isinstance(key, int) or key <= index:
                continue
            later = self.row(key)
            # Decoded apart, sliding windows would decode most pictures twice, and those between a key frame and the
            # window many times. Up to the first that does not overlap: looking at all for each would cost more than
            # a small picture where none does.
            if later.video_id != row.video_id or not row.start <= later.start < end:
                break
            if self.protocol.frames * (len(waiting) + 2) > room:
                break
            waiting.append(key)
            end = max(end, later.end)
        if not waiting:
            return None
        rows = [row, *map(self.row, waiting)]
        spans, store = [(each.start, each.end) for each in rows], self.sources[self._place(index)[0]].store(row)
        read = None
        with contextlib.suppress(VideoError):  # reading each alone shows which of them it is
            read = store.read_together(row.video_id, spans, self.protocol.frames, self.protocol.sampling)
        if read is None:
            # All of the batch, or as many pictures would be decoded for nothing for each of them.
            self.upcoming = ()
            return None
        pictures, places = read
        self._waiting = {key: (pictures, place) for key, place in zip(waiting, places[1:], strict=True)}
        return pictures, places[0]

    def restricted(self, mask: NDArray[np.bool_]) -> ClipDataset:
        """The clips where ``mask`` [N] is true."""
        # Shallow: the opened folders and what they remember of the videos are shared.
        dataset = copy.copy(self)
        for cached in ("identities", "numbers"):
            dataset.__dict__.pop(cached, None)
        dataset.upcoming, dataset._waiting = (), {}
        masks = np.split(mask, self.starts[1:-1])
        dataset.sources = [source.restricted(each) for source, each in zip(self.sources, masks, strict=True)]
        dataset.starts = np.cumsum([0, *(len(source.table) for source in dataset.sources)])
        dataset.rows = self.rows[mask]
        return dataset

    def missing(self, part: int = 0, parts: int = 1) -> dict[int, str]:
        """Clips whose file is not there, by index, with a message that names the file; opens no video.

        With ``parts`` those of one part of the videos alone: what several processes look for is shared by video, since
        the clips of one are in one folder, which is listed once.
        """
        rows = [self.row(index) for index in range(len(self))]
        videos = sorted({row.video_id for row in rows})
        mine = set(videos[len(videos) * part // parts : len(videos) * (part + 1) // parts])
        faults = {}
        for index, row in enumerate(rows):
            if row.video_id not in mine:
                continue
            try:
                self.sources[self._place(index)[0]].store(row).states(row.video_id, row.start)
            except VideoError as error:
                faults[index] = str(error)
        return faults

    @property
    def stores(self) -> list[VideoStore]:
        """The folders of the videos, in an order that is the same on every process."""
        return [store for source in self.sources for store in source.stores.values()]

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample's pixels."""
        if self.train:
            return 3 * self.num_frames * self.size**2
        protocol = self.protocol
        # Protocols that resize without rounding give float32.
        return protocol.views * 3 * protocol.frames * self.size**2 * (1 if RESIZES[protocol.resize][1] else 4)

    def forget_requests(self) -> None:
        """Drop what was requested and not read, as of clips that could not be."""
        for store in self.stores:
            store.forget_requests()

    def request(self, key: Key) -> None:
        """Begin to fetch the files of a sample that will be read soon, if they are remote."""
        index = key[1] if isinstance(key, tuple) else key
        source, row = self.sources[self._place(index)[0]], self.row(index)
        # A clip that is a file of its own is read whole, whatever its times.
        end = row.start if not self.train and self.protocol.whole_files else row.end
        source.store(row).request(row.video_id, row.start, end, "middle" if self.train else self.protocol.sampling)

    def length_note(self) -> str | None:
        """How many clips are short, and how many of them were widened; None if none is short. Of one table only."""
        # What is short is a setting of each table's source.
        least = self.config.min_clip_seconds or MIN_SECONDS
        short = np.flatnonzero(self.clips.end - self.clips.start < least)
        if not len(short):
            return None
        widened = 0
        for index in short.tolist():
            row = self.row(index)
            with contextlib.suppress(VideoError):
                store = self.sources[self._place(index)[0]].store(row)
                widened += store.end_of(row.video_id, row.start, row.end, self.protocol.sampling) > row.end
        return f"{len(short)} clips are shorter than {least:g} s: {widened} of them were widened to it"

    @cached_property
    def identities(self) -> list[str]:
        """A hash of each clip and its files: a change of any of them gives other features.

        Local files count by name, size and time of change, remote ones by name, those in tar shards by their place;
        missing ones not at all.
        """
        hashes = []
        for index in range(len(self)):
            source, row = self.sources[self._place(index)[0]], self.row(index)
            store, end = source.store(row), row.end
            # A missing clip keeps its annotated end: it is never embedded, but its identity must not fail.
            states: list[tuple[str, ...]] = []
            with contextlib.suppress(VideoError):
                end = store.end_of(row.video_id, row.start, row.end, self.protocol.sampling)
                states = store.states(row.video_id, row.start, end)
            clip = [row.video_id, repr(row.start), repr(end), repr(source.config.chunk_seconds)]
            parts = [_SAMPLING, str(store.root), *clip, *(part for state in states for part in state)]
            hashes.append(hashlib.sha256("\0".join(parts).encode()).hexdigest())
        return hashes

    @cached_property
    def numbers(self) -> list[int]:
        """A number for each clip that follows from its video and times alone, to seed what is random about it.

        It is the same in every benchmark and whichever other clips there are, as cached features must be.
        """
        # Not the index: with clips left out, or in another benchmark, that would be another one.
        rows = (self.row(index) for index in range(len(self)))
        return [zlib.crc32(f"{row.video_id} {row.start:.3f} {row.end:.3f}".encode()) for row in rows]


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


# --------------------------------------------------------------------------------------------------
# Batches, and what to do about clips that cannot be read
# --------------------------------------------------------------------------------------------------


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Training samples -> ``video`` uint8 [B, 3, T, H, W], ``tokens`` int64 [B, L] trimmed, ``index`` int64 [B],
    ``faults``, and, if there are any, ``boxes`` float32 [B, T, 3, 4], ``labels`` (values by name, each stacked) and
    ``negatives`` int64 [B, K, L] with ``has_negative`` bool [B, K].
    """
    # Frames come out of the decoder channels-last; stacking them that way is a plain copy of memory.
    video = torch.stack([sample["video"].permute(1, 2, 3, 0) for sample in samples]).permute(0, 4, 1, 2, 3)
    negatives = [sample["negatives"] for sample in samples if "negatives" in sample]
    # Trimmed here, on the CPU: reading the length back from the device would wait for it. Together with the negatives,
    # as the text tower embeds all in one pass.
    tokens: Tensor = trim(torch.cat([torch.stack([sample["tokens"] for sample in samples]), *negatives]))
    batch = {
        "video": video,
        "tokens": tokens[: len(samples)].contiguous(),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "faults": [sample["fault"] for sample in samples if sample["fault"]],
    }
    if negatives:
        batch["negatives"] = tokens[len(samples) :].unflatten(0, (len(samples), -1)).contiguous()
        batch["has_negative"] = torch.stack([sample["has_negative"] for sample in samples])
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


class UnreadableError(UserError):
    """Clips that cannot be read; ``faults`` are the reasons by clip."""

    faults: Mapping[int, str]


def require_all(faults: Mapping[int, str], total: int) -> None:
    """Raise one :class:`UnreadableError` that names everything that cannot be read, a line each."""
    if faults:
        # One line for a file that several clips need.
        lines = list(dict.fromkeys(faults[index] for index in sorted(faults)))
        lines.append(
            f"{len(faults)} of {total} clips cannot be read; main_eval.py --allow_missing (tools/probe_order.py has it "
            "too) evaluates the others and marks the numbers as partial"
        )
        error = UnreadableError(*lines)
        error.faults = faults
        raise error


class FaultLedger:
    """Counts this process's unreadable training clips, logs each once, and stops a run that has too many.

    ``max_fraction`` is the largest tolerated share of the clips that were read, by all processes. Fewer than a thousand
    clips are judged as a thousand, so that with 1 % the eleventh bad clip stops a run at the earliest; with 0 the first
    one does.
    """

    def __init__(self, max_fraction: float) -> None:
        self._max_fraction = max_fraction
        self.seen = 0
        """Clips that were tried: those of the batches, and those whose place they took."""
        self.bad = 0
        """Clips among them that could not be read."""
        self._last: str | None = None
        self._logged: set[str] = set()

    def update(self, batch: Mapping[str, Any]) -> None:
        """Take note of a batch of :func:`collate`."""
        faults = [line for fault in batch["faults"] for line in fault.split("\n")]
        self.seen += len(batch["index"]) + len(faults)
        self.bad += len(faults)
        self._last = faults[-1] if faults else self._last
        # Once each: a bad clip comes back every epoch.
        for fault in faults:
            if fault not in self._logged:
                self._logged.add(fault)
                log.warning("unreadable clip, another one takes its place: %s", fault)

    def check_share(self, seen: int, bad: int, dist: Distributed) -> None:
        """Raise the same :class:`UserError` on all processes if ``bad`` of ``seen`` clips, their sums, are too many."""
        # A share of what was read so far: it does not depend on the size of the data.
        if is_above_share(bad, seen, self._max_fraction):
            last = next((fault for fault in dist.gather_objects(self._last) if fault), "before the resume")
            # Not exclude alone: other clips are another run, and a checkpoint of this one does not fit it.
            raise UserError(
                f"{bad} of {seen} clips could not be read, more than data.max_bad_fraction={self._max_fraction:g} "
                "allows; to resume this run, raise data.max_bad_fraction; for a new run, tools/verify_dataset.py lists "
                f"them all for the source's exclude; the last: {last}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        # Sorted: checkpoints of equal runs are equal files.
        return {"seen": self.seen, "bad": self.bad, "logged": sorted(self._logged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the counts of a checkpoint."""
        self.seen, self.bad, self._logged = int(state["seen"]), int(state["bad"]), set(state["logged"])


# --------------------------------------------------------------------------------------------------
# Pixels: crop and flip in the loader, normalise on the device. Clips stay uint8 until they are there: a quarter of the
# bytes to move, and the integer resize is several times faster than the float one.
# --------------------------------------------------------------------------------------------------

RESIZES = {
    **{"bicubic_antialias": ("bicubic", True), "squash": ("bicubic", True)},
    **{"bicubic": ("bicubic", False), "bilinear": ("bilinear", False)},
}
"""Interpolation, and whether it is antialiased, see :func:`spatial_crops`."""
# Aspect ratios of a training crop, torchvision's and upstream's default.
ASPECT_RATIO = (3 / 4, 4 / 3)


def random_box(height: int, width: int, scale_min: float, rng: np.random.Generator) -> Box:
    """A box with at least ``scale_min`` of the picture's area and a random aspect ratio, as RandomResizedCrop draws."""
    low, high = np.log(ASPECT_RATIO)
    # As torchvision's, but from numpy's generator: all randomness of a sample is a function of (seed, epoch, index).
    for _ in range(10):
        area = height * width * rng.uniform(scale_min, 1.0)
        ratio = np.exp(rng.uniform(low, high))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # A very long or tall picture: the largest box of an allowed ratio in its middle.
    ratio = min(max(width / height, ASPECT_RATIO[0]), ASPECT_RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def crop(frames: np.ndarray, box: Box, size: int) -> Tensor:
    """Cut one box out of all frames and resize it: ``frames`` uint8 [T, H, W, 3] -> uint8 [3, T, size, size]."""
    top, left, height, width = box
    return _resize(frames[:, top : top + height, left : left + width], size, size)


def center_crop(frames: np.ndarray, size: int) -> Tensor:
    """Resize the short side to ``size`` and cut out the middle square.

    ``frames`` uint8 [T, H, W, 3] -> uint8 [3, T, size, size].
    """
    return spatial_crops(frames, size, 1)[0]


def spatial_crops(frames: np.ndarray, size: int, count: int, resize: str = "bicubic_antialias") -> Tensor:
    """Resize the short side to ``size``; cut ``count`` squares spread evenly along the long side, or the middle one.

    ``frames`` uint8 [T, H, W, 3] -> [count, 3, T, size, size], uint8 for *bicubic_antialias* and *squash*, which makes
    the whole picture a square, so that all crops are the same. *bicubic* and *bilinear* are what torchvision before
    0.17 made of float32 frames: no antialiasing, and float32 that is neither rounded nor clipped to 0..255.
    """
    height, width = frames.shape[1:3]
    short = min(height, width)
    height, width = (size if resize == "squash" else int(size * side / short) for side in (height, width))
    shares = [0.5] if count == 1 else np.linspace(0, 1, count).tolist()
    # Half a pixel is rounded to even as torchvision's centre crop does, of several crops up, as LaViLa does.
    whole = round if count == 1 else math.ceil
    places = [(whole((height - size) * share), whole((width - size) * share)) for share in shares]
    # Resized once, then cut: crops overlap.
    resized = _resize(frames, height, width, resize)
    return torch.stack([resized[..., top : top + size, left : left + size] for top, left in places])


def _resize(frames: np.ndarray, height: int, width: int, resize: str = "bicubic_antialias") -> Tensor:
    """uint8 [T, H, W, 3] -> [3, T, height, width]; see :func:`spatial_crops` for ``resize``."""
    mode, antialias = RESIZES[resize]
    # A channels-last view: torchvision's integer kernel works on it as it is, nothing is copied first.
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    video = video if antialias else video.float()
    return F.resize(video, [height, width], InterpolationMode(mode), antialias=antialias).transpose(0, 1)


def crop_boxes(boxes: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """Clip boxes of a ``height`` x ``width`` picture to the crop ``box``.

    ``boxes`` float32 [..., 4]: left, top, right, bottom as shares of the picture, NaN where there is none. The result
    is in shares of the crop, NaN also where nothing is left.
    """
    top, left, rows, columns = box
    corner, size = np.array([left, top] * 2), np.array([columns, rows] * 2)
    # Comparisons with NaN are false, so a missing box never counts as empty, and NaN stays NaN.
    clipped = ((boxes * np.array([width, height] * 2) - corner) / size).clip(0, 1)
    is_empty = (clipped[..., 2:] <= clipped[..., :2]).any(axis=-1)
    return np.where(is_empty[..., None], np.nan, clipped).astype(np.float32)


def flip_boxes(boxes: np.ndarray) -> np.ndarray:
    """Mirror boxes [T, 3, 4] of left hand, right hand and object; the hands swap their rows too."""
    mirrored = boxes[:, [1, 0, 2]]
    return np.stack((1 - mirrored[..., 2], mirrored[..., 1], 1 - mirrored[..., 0], mirrored[..., 3]), axis=-1)


def normalise(video: Tensor, stats: ImageStats = IMAGE_STATS["clip"]) -> Tensor:
    """Normalise pixels 0..255 [B, 3, T, H, W], uint8 or float32 in any memory order -> contiguous float32.

    ``stats`` are the mean and deviation that a model's weights expect, its ``image_stats``. The result is on the same
    device.
    """
    scale, shift = _statistics(video.device, stats)
    pixels = video.to(torch.float32, memory_format=torch.contiguous_format).contiguous()
    # In place where there is a copy: a second buffer of this size costs more on a CPU than the arithmetic.
    return torch.addcmul(shift, pixels, scale, out=None if pixels is video else pixels)


@cache
def _statistics(device: torch.device, stats: ImageStats) -> tuple[Tensor, Tensor]:
    # Factor and offset per channel [3, 1, 1, 1]; cached by device, because a copy to it would wait for its queue.
    mean, std = torch.tensor(stats.mean, dtype=torch.float64), torch.tensor(stats.std, dtype=torch.float64)
    # One multiply-add per pixel instead of a division, a subtraction and a division; exact in float64 first.
    scale, shift = 1 / (255 * std), -mean / std
    return tuple(each.to(torch.float32).view(3, 1, 1, 1).to(device) for each in (scale, shift))  # type: ignore[return-value]


# --------------------------------------------------------------------------------------------------
# Tokens
# --------------------------------------------------------------------------------------------------

# Text lengths in a batch are rounded up to this, so that few different shapes reach the device.
LENGTH_MULTIPLE = 8
# Narrations repeat within an epoch far less than across; this many per process cost about 20 MB.
_CACHED_TEXTS = 32768


class Tokenizer:
    """Texts as the text tower of ``shape`` reads them, through open_clip's tokenizers: always from local files.

    CLIP's byte pairs are in open_clip's package; for a tower with a Hugging Face tokenizer (SigLIP, CLIPA) ``folder``
    has its files, see :func:`tokenizer_for`. Raises :class:`UserError` for files that are none, or without the package
    transformers.
    """

    def __init__(self, shape: Geometry = GEOMETRIES["CLIP_VITB16"], folder: Path | None = None) -> None:
        self.context_length, self._vocab_size, self.folder = shape.context_length, shape.vocab_size, folder
        self._shape = shape
        self.inner: Any
        if not shape.text.tokenizer:
            self.inner = SimpleTokenizer(context_length=shape.context_length, clean=shape.text.clean)
        else:
            assert folder is not None, "tokenizer_for looks for the files"
            options: dict[str, Any] = {"clean": shape.text.clean, "strip_sep_token": shape.text.strip_sep_token}
            # Some folders ask for Python files of their own, and Gemma's class (SigLIP 2) pads in front of the text
            # unless its files say otherwise, which no text tower of open_clip was trained with.
            options |= {"trust_remote_code": False, "padding_side": "right"}
            try:
                # As open_clip does, but from a folder: whether anything is downloaded is decided by tokenizer_for.
                self.inner = HFTokenizer(str(folder), shape.context_length, local_files_only=True, **options)
            except ImportError as error:
                raise UserError(
                    f"the text tower of {shape.name} has a Hugging Face tokenizer, which needs the package "
                    "transformers: pip install transformers sentencepiece"
                ) from error
            except Exception as error:  # damaged files raise anything in their readers
                raise UserError(f"{folder}: no readable tokenizer ({' '.join(str(error).split())[:300]})") from error
        # int32 halves the cache; ids are far below its limit.
        self._one = lru_cache(_CACHED_TEXTS)(lambda text: self._tokens(text).astype(np.int32))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._shape, self.folder)  # without the cache of texts, for a spawned worker

    def _tokens(self, text: str) -> np.ndarray:
        tokens: np.ndarray = self.inner([text])[0].numpy()
        # An embedding of fewer tokens would end a GPU's process with no more than an assertion of the device.
        if (largest := int(tokens.max())) >= self._vocab_size:
            raise UserError(
                f"{self.folder}: its tokenizer has a token {largest}, but the text tower has only "
                f"{self._vocab_size:,}; it is that of another model"
            )
        return tokens

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens of texts, int64 [len(texts), context_length]: CLIP's are start, words, end-of-text and zeros.

        Longer texts are cut, the end-of-text token stays last.
        """
        texts = [texts] if isinstance(texts, str) else texts
        return torch.from_numpy(np.stack([self._one(text) for text in texts]).astype(np.int64))


def tokenizer_for(config: ModelConfig) -> Tokenizer:
    """The tokenizer of the configured model's text tower.

    A Hugging Face tokenizer is looked for in ``model.tokenizer``, beside ``model.weights.path`` and in the local cache
    of Hugging Face, in this order; it is downloaded with ``model.weights.download`` alone. Raises :class:`UserError` if
    its files are not there.
    """
    shape = config.geometry()
    repository = shape.text.tokenizer
    if not repository:
        if config.tokenizer:
            log.warning("model.tokenizer does nothing: the text tower of %s has CLIP's tokenizer", shape.name)
        return Tokenizer(shape)
    if config.tokenizer and not Path(config.tokenizer).is_dir():
        raise UserError(f"model.tokenizer={config.tokenizer}: no such folder")
    # A tag of open_clip is no path.
    path = config.weights.path or ""
    weights = Path(path) if path and Path(path).exists() else None
    beside = weights and (weights if weights.is_dir() else weights.parent)
    if path.startswith(hub.PREFIX):
        beside = hub.folder_of(path, hub.tokenizer_files)
    for folder in (config.tokenizer, repository, beside):
        # Whatever its kind is, a tokenizer has this file.
        if folder and (Path(folder) / "tokenizer_config.json").is_file():
            return Tokenizer(shape, Path(folder))
    if config.tokenizer:
        raise UserError(f"model.tokenizer={config.tokenizer}: it has no tokenizer_config.json, so no tokenizer")
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(repository, "tokenizer_config.json")
    except ValueError as error:  # a path, of which configurations in folders may have any
        raise UserError(
            f"the tokenizer of {shape.name} is {repository!r}, no repository; set model.tokenizer"
        ) from error
    if isinstance(cached, str):
        return Tokenizer(shape, Path(cached).parent)
    if not config.weights.download:
        raise UserError(
            f"the tokenizer of {shape.name} ({repository}) is not in the local cache ({constants.HF_HUB_CACHE}), and "
            "nothing is downloaded unless asked: set model.tokenizer to a folder with its files "
            "(tokenizer_config.json, tokenizer.json), or model.weights.download=true; reading them needs the package "
            "transformers"
        )
    folder = hub.folder_of(hub.PREFIX + repository, hub.tokenizer_files)
    if folder is None:
        raise UserError(f"{repository}: has no tokenizer")
    return Tokenizer(shape, folder)


def trim(tokens: Tensor) -> Tensor:
    """[B, L] -> [B, l]: columns of zeros behind the longest text of the batch are cut, l a multiple of 8 or L.

    In a causal text tower tokens after the end-of-text token have no effect; other towers put the zeros back. Call it
    on the CPU: the new length is a number the host must know.
    """
    filled = tokens.any(dim=0).nonzero()
    needed = int(filled[-1]) + 1 if len(filled) else 1
    return tokens[:, : -(-needed // LENGTH_MULTIPLE) * LENGTH_MULTIPLE]
