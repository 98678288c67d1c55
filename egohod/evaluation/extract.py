"""Features of anyone's clips, written video by video, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from egohod.data.config import DataConfig
from egohod.data.dataset import EvaluationDataset, collate_views
from egohod.data.loader import eval_loader
from egohod.data.transforms import normalise
from egohod.distributed import Distributed, inference_precision
from egohod.errors import UserError
from egohod.evaluation.embed import VideoTextModel, image_stats_of
from egohod.evaluation.feature_index import is_written, write_video
from egohod.evaluation.listing import Listing

log = logging.getLogger(__name__)

# Seconds between two lines of progress.
_EVERY = 2.0


@dataclass(frozen=True)
class Extracted:
    """How many videos and clips were embedded, and what could not be read."""

    videos: int = 0
    clips: int = 0
    faults: list[str] = field(default_factory=list)


class Progress:
    """A line every two seconds, with the time left."""

    def __init__(self, total: int, say: Callable[..., None] = log.info) -> None:
        self._total, self._say, self._begin = total, say, time.monotonic()
        self._said = self._begin

    def __call__(self, done: int) -> None:
        """Say how far it is, if it is time to."""
        now = time.monotonic()
        if done == self._total or now - self._said > _EVERY:
            rate = done / max(now - self._begin, 1e-9)
            left = timedelta(seconds=round((self._total - done) / max(rate, 1e-9)))
            self._say("%s of %s clips, %.1f a second, ETA %s", f"{done:,}", f"{self._total:,}", rate, left)
            self._said = now


def remaining(listing: Listing, dataset: EvaluationDataset, folder: Path) -> dict[str, str]:
    """Videos whose features are not in ``folder`` yet, or are of other clips, with the identity of their clips."""
    identities = {
        video: hashlib.sha256("\0".join([dataset.identities[row] for row in rows]).encode()).hexdigest()
        for video, rows in listing.videos().items()
    }
    return {video: identity for video, identity in identities.items() if not is_written(folder, video, identity)}


def shares(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Videos with ``sizes`` clips each, dealt out to ``count`` processes: each video once, the work about even."""
    dealt, load = [list[str]() for _ in range(count)], [0] * count
    for video in sorted(sizes, key=lambda name: -sizes[name]):
        least = load.index(min(load))
        dealt[least].append(video)
        load[least] += sizes[video]
    return dealt


def extract(
    model: VideoTextModel,
    listing: Listing,
    dataset: EvaluationDataset,
    folder: Path,
    todo: Mapping[str, str],
    *,
    batch_size: int,
    workers: int,
    dist: Distributed,
    precision: torch.dtype = torch.float32,
    allow_missing: bool = False,
    timeout: float = DataConfig.timeout,
) -> Extracted:
    """Embed the videos ``todo`` (see :func:`remaining`) into ``folder``, a file each. Collective over all processes.

    Each process embeds and writes its share of the videos; the answer counts those of all. A clip that cannot be read
    raises :class:`UserError` on every process once the other shares are done, or is left out of its video's file with
    ``allow_missing``.
    """
    sizes = {video: len(listing.videos()[video]) for video in todo}
    mine = set(shares(sizes, dist.world_size)[dist.rank])
    share = {video: identity for video, identity in todo.items() if video in mine}
    done, fault = Extracted(), None
    try:
        encoded = _Encoder(model, dataset, batch_size, workers, dist, precision, timeout)
        done = _extract_share(encoded, listing, folder, share, allow_missing)
    except UserError as error:  # told to all, or the other processes would wait for this one for ever
        fault = str(error)
    told = dist.gather_objects((done, fault))
    faults = [line for _, text in told if text is not None for line in text.split("\n")]
    if faults:
        raise UserError(*dict.fromkeys(faults))
    return Extracted(
        sum(each.videos for each, _ in told),
        sum(each.clips for each, _ in told),
        [line for each, _ in told for line in each.faults],
    )


def _extract_share(
    encoded: _Encoder, listing: Listing, folder: Path, todo: Mapping[str, str], allow_missing: bool
) -> Extracted:
    rows_of = listing.videos()
    rows = [row for video in todo for row in rows_of[video]]
    progress, done, written, faults = Progress(len(rows)), 0, 0, list[str]()
    kept: dict[int, NDArray[np.float32]] = {}
    waiting = list(todo)
    seen = 0
    for index, features, failed in encoded(rows):
        if failed and not allow_missing:
            raise UserError(*failed, "--allow_missing leaves such clips out; what is done is kept, run again to go on")
        faults += failed
        for line in failed:
            log.warning("left out: %s", line)
        kept |= dict(zip(index, features, strict=True))
        done += len(index) + len(failed)
        # Clips come in order, so a video is complete when all up to its last were seen.
        while waiting and seen + len(rows_of[waiting[0]]) <= done:
            video = waiting.pop(0)
            seen += len(rows_of[video])
            good = [row for row in rows_of[video] if row in kept]
            if good:
                clips, texts = listing.clips, [listing.texts[row] for row in good]
                # What lacks a clip is tried again by a later run.
                identity = todo[video] if len(good) == len(rows_of[video]) else "incomplete"
                stacked = np.stack([kept.pop(row) for row in good])
                write_video(folder, video, stacked, clips.start[good], clips.end[good], texts, identity)
                written += 1
        progress(done)
    assert not kept, "every feature belongs to a video"
    return Extracted(written, done - len(faults), faults)


@dataclass(frozen=True)
class _Encoder:
    """Features of rows of a dataset, batch by batch."""

    model: VideoTextModel
    dataset: EvaluationDataset
    batch_size: int
    workers: int
    dist: Distributed
    precision: torch.dtype
    timeout: float

    def __call__(self, rows: list[int]) -> Iterator[tuple[list[int], NDArray[np.float32], list[str]]]:
        """Per batch: rows that could be read, their features [n, D], and what is wrong with the others."""
        self.model.train(False)
        loader = eval_loader(
            self.dataset,
            rows,
            self.batch_size,
            self.workers,
            collate=collate_views,
            timeout=self.timeout,
            stop=self.dist.stop,
        )
        with torch.inference_mode(), inference_precision(self.dist.device, self.precision):
            for batch in loader:
                faults = [batch["faults"][row] for row in sorted(batch["faults"])]
                if batch["video"] is None:
                    yield [], np.zeros((0, 0), np.float32), faults
                    continue
                video = batch["video"].to(self.dist.device, non_blocking=True).flatten(0, 1)
                video = normalise(video, image_stats_of(self.model))
                features = self.model.encode_video(video, normalize=True).float().cpu().numpy()
                if not np.isfinite(features).all():
                    raise UserError("features are NaN or infinite: the weights are broken or the precision is too low")
                yield batch["index"].tolist(), features, faults
