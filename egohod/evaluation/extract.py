"""Features of anyone's clips, written video by video, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from egohod.config import UserError
from egohod.data.loader import eval_loader
from egohod.data.transforms import normalise
from egohod.evaluation.clips import EvaluationDataset, collate_views
from egohod.evaluation.embed import VideoTextModel
from egohod.evaluation.feature_index import is_written, write_video
from egohod.evaluation.listing import Listing

log = logging.getLogger(__name__)

# Seconds between two lines of progress.
_EVERY = 2.0


@dataclass(frozen=True)
class Extracted:
    """How many videos and clips were embedded, and what could not be read."""

    videos: int
    clips: int
    faults: list[str]


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


def extract(
    model: VideoTextModel,
    listing: Listing,
    dataset: EvaluationDataset,
    folder: Path,
    todo: Mapping[str, str],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    allow_missing: bool = False,
) -> Extracted:
    """Embed the videos ``todo`` (see :func:`remaining`) into ``folder``, a file each.

    A clip that cannot be read raises :class:`UserError`, or is left out of its video's file with ``allow_missing``.
    """
    rows_of = listing.videos()
    rows = [row for video in todo for row in rows_of[video]]
    progress, done, written, faults = Progress(len(rows)), 0, 0, list[str]()
    kept: dict[int, NDArray[np.float32]] = {}
    waiting = list(todo)
    seen = 0
    for index, features, failed in _encoded(model, dataset, rows, batch_size, workers, device, precision):
        if failed and not allow_missing:
            raise UserError(
                "\n".join([*failed, "--allow_missing leaves such clips out; what is done is kept, run again to go on"])
            )
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


def _encoded(
    model: VideoTextModel,
    dataset: EvaluationDataset,
    rows: list[int],
    batch_size: int,
    workers: int,
    device: torch.device,
    precision: torch.dtype,
) -> Iterator[tuple[list[int], NDArray[np.float32], list[str]]]:
    """Per batch: rows that could be read, their features [n, D], and what is wrong with the others."""
    model.train(False)
    with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        for batch in eval_loader(dataset, rows, batch_size, workers, collate=collate_views):
            faults = [batch["faults"][row] for row in sorted(batch["faults"])]
            if batch["video"] is None:
                yield [], np.zeros((0, 0), np.float32), faults
                continue
            video = normalise(batch["video"].to(device, non_blocking=True).flatten(0, 1))
            features = model.encode_video(video, normalize=True).float().cpu().numpy()
            if not np.isfinite(features).all():
                raise UserError("features are NaN or infinite: the weights are broken or the precision is too low")
            yield batch["index"].tolist(), features, faults
