"""Features, once per clip and once per distinct text, on any number of processes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from egohod.data.config import DataConfig
from egohod.data.dataset import EvaluationDataset, collate_views, require_all
from egohod.data.loader import eval_loader
from egohod.data.text import trim
from egohod.data.transforms import normalise
from egohod.distributed import Distributed, inference_precision
from egohod.errors import UserError
from egohod.evaluation.features import FeatureCache, feature_key, is_written, write_video
from egohod.evaluation.listing import Listing
from egohod.evaluation.models import VideoTextModel, apply_control, image_stats_of
from egohod.runtime import Interrupted

# What the clips as they are are called among the temporal controls.
PLAIN = "plain"

TokenizerLike = Callable[[Sequence[str]], Tensor]
"""Texts to int64 [B, L]: start, words, end-of-text (the largest id), zeros."""


@dataclass
class Report:
    """How the features of a benchmark came about."""

    clips: int = 0
    from_cache: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    """Seconds of them in which the first process waited for decoded clips."""
    faults: dict[int, str] = field(default_factory=dict)
    """Clips that could not be read, by index."""


def embed_clips(
    model: VideoTextModel,
    dataset: EvaluationDataset,
    *,
    batch_size: int,
    workers: int,
    dist: Distributed,
    precision: torch.dtype,
    controls: Sequence[str] = (),
    cache: FeatureCache | None = None,
    allow_missing: bool = False,
    timeout: float = DataConfig.timeout,
) -> tuple[dict[str, Tensor], Report]:
    """Features of every clip of ``dataset``: float32 [N, D] on the CPU, row i is clip i, the same on every process.

    The result holds those of the clips as they are (``plain``) and those under each temporal control; every clip is
    decoded once for all of them. The features of several views are averaged, which averages their similarities; a
    protocol that merges by the maximum keeps them apart, [N, V, D]. What is not in ``cache`` is cut into the same
    batches on any number of processes, which take turns: each clip counts exactly once, and stands in the same company.

    ``precision`` is the autocast type (``torch.float32``: none). Raises :class:`UserError` on every process, naming
    all clips that cannot be read; with ``allow_missing`` their rows are NaN and the report names them. A batch that
    takes longer than ``timeout`` seconds to decode is an error too.
    """
    orders, views, report = (PLAIN, *controls), dataset.protocol.views, Report(clips=len(dataset))
    at_a_time, apart = max(1, batch_size // views), dataset.protocol.merge == "max"

    def encode(mine: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        loader = eval_loader(
            dataset, mine.tolist(), at_a_time, workers, collate=collate_views, timeout=timeout, stop=dist.stop
        )
        batches = iter(loader)
        while (batch := _next(batches, report)) is not None:
            report.faults |= batch["faults"]
            if batch["video"] is None:
                continue
            index = batch["index"]
            video = normalise(batch["video"].to(dist.device, non_blocking=True).flatten(0, 1), image_stats_of(model))
            of_view = [dataset.numbers[i] for i in np.repeat(index, views)]
            features = [
                model.encode_video(apply_control(name, video, of_view) if name != PLAIN else video, normalize=True)
                for name in orders
            ]
            stacked = torch.stack(features).float().unflatten(1, (-1, views)).transpose(0, 1)
            yield index, stacked if apart else stacked.mean(dim=2)

    keys = [[feature_key("clip", clip, order) for order in orders] for clip in dataset.identities] if cache else None
    features = _encode_shards(model, encode, len(dataset), at_a_time, "clip", dist, precision, cache, keys, report)
    if not allow_missing:
        require_all(report.faults, len(dataset))
    return dict(zip(orders, features.unbind(dim=1), strict=True)), report


def embed_texts(
    model: VideoTextModel,
    texts: Sequence[str],
    tokenizer: TokenizerLike,
    *,
    batch_size: int,
    dist: Distributed,
    precision: torch.dtype,
    cache: FeatureCache | None = None,
) -> Tensor:
    """Features of ``texts``: float32 [len(texts), D] on the CPU, the same on every process.

    Equal texts are encoded once. Texts of similar length share a batch, so that little padding is computed.
    """
    distinct, place = np.unique(np.asarray(texts, dtype=object).astype(str), return_inverse=True)
    by_length = np.argsort([len(text) for text in distinct], kind="stable")
    ordered = [str(distinct[row]) for row in by_length]

    def encode(mine: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        for start in range(0, len(mine), batch_size):
            rows = mine[start : start + batch_size]
            tokens = trim(tokenizer([ordered[row] for row in rows]))
            yield rows, model.encode_text(tokens.to(dist.device), normalize=True)[:, None]

    keys = [[feature_key("text", text)] for text in ordered] if cache else None
    features = _encode_shards(model, encode, len(ordered), batch_size, "text", dist, precision, cache, keys, Report())
    return features[torch.from_numpy(np.argsort(by_length)[place]), 0]


def _next(batches: Iterator[dict[str, Any]], report: Report) -> dict[str, Any] | None:
    start = time.perf_counter()
    batch = next(batches, None)
    report.waiting += time.perf_counter() - start
    return batch


def _encode_shards(
    model: VideoTextModel,
    encode: Callable[[NDArray[np.int64]], Iterator[tuple[NDArray[np.int64], Tensor]]],
    total: int,
    batch_size: int,
    what: str,
    dist: Distributed,
    precision: torch.dtype,
    cache: FeatureCache | None,
    keys: list[list[str]] | None,
    report: Report,
) -> Tensor:
    """Run ``encode`` on this process's share of what is not in the cache; the shares of all together [N, orders, D]."""
    if total == 0:
        raise UserError(f"nothing to evaluate: there is not a single {what}")
    start = time.perf_counter()
    known = _known(dist, cache, keys)
    todo = np.setdiff1d(np.arange(total), np.fromiter(known, dtype=np.int64, count=len(known)))
    rows: list[NDArray[np.int64]] = []
    features: list[NDArray[np.float32]] = []
    fault: str | None = None
    interrupted: str | None = None
    try:
        with _inference(model, dist.device, precision):
            batches = np.arange(len(todo)) // batch_size
            for index, encoded in encode(todo[batches % dist.world_size == dist.rank]):
                dist.stop.check()
                rows.append(index)
                features.append(encoded.float().cpu().numpy())
                if cache and keys:
                    for i, orders in zip(index.tolist(), features[-1], strict=True):
                        # What is not finite is refused below and must not come back from the cache.
                        if np.isfinite(orders).all():
                            for key, feature in zip(keys[i], orders, strict=True):
                                cache.add(key, feature)
    except UserError as error:  # told to all, or the other processes would wait for this one for ever
        fault = str(error)
    except Interrupted as request:  # processes have more or fewer batches: here they all meet
        interrupted = str(request)
    finally:
        if cache:
            cache.flush()
    if reasons := [text for text in dist.gather_objects(interrupted) if text is not None]:
        raise Interrupted(reasons[0])
    shares = dist.gather_objects((rows, features, fault, report.faults))
    failed = [text for _, _, text, _ in shares if text is not None]
    if failed:
        raise UserError(*(line for text in failed for line in text.split("\n")))
    for _, _, _, faults in shares:
        report.faults |= faults
    report.from_cache, report.seconds = len(known), time.perf_counter() - start
    if known:
        rows, features = [np.fromiter(known, dtype=np.int64)], [np.stack(list(known.values()))]
    else:
        rows, features = [], []
    rows += [row for share, _, _, _ in shares for row in share]
    features += [row for _, share, _, _ in shares for row in share]
    return _assemble(rows, features, total, what, report.faults)


def _known(
    dist: Distributed, cache: FeatureCache | None, keys: list[list[str]] | None
) -> dict[int, NDArray[np.float32]]:
    """Rows whose features the cache holds in all orders; the first process decides for all."""
    if cache is None or keys is None:
        return {}
    found = None
    if dist.is_main:
        kept = cache.read([key for orders in keys for key in orders])
        found = {
            row: np.stack([kept[key] for key in orders])
            for row, orders in enumerate(keys)
            if all(key in kept for key in orders)
        }
    return dist.gather_objects(found)[0]


def _assemble(
    rows: list[NDArray[np.int64]], features: list[NDArray[np.float32]], total: int, what: str, faults: dict[int, str]
) -> Tensor:
    """Features in the order of their rows, NaN where one could not be read.

    Raises :class:`UserError` naming rows whose features are not finite.
    """
    if not rows:
        require_all(faults, total)
    index, values = np.concatenate(rows), np.concatenate(features)
    counts = np.bincount(index, minlength=total)
    counts[list(faults)] += 1
    assert (counts == 1).all(), f"each {what} must be encoded exactly once"
    broken = np.sort(index[~np.isfinite(values).reshape(len(values), -1).all(axis=1)])
    if broken.size:
        raise UserError(
            f"the features of {broken.size} of {total} {what}s are NaN or infinite, first of {what} {broken[0]}: "
            "the model's weights are broken or the precision is too low"
        )
    ordered = np.full((total, *values.shape[1:]), np.nan, dtype=np.float32)
    ordered[index] = values
    return torch.from_numpy(ordered)


@contextlib.contextmanager
def _inference(model: VideoTextModel, device: torch.device, precision: torch.dtype) -> Iterator[None]:
    """Evaluation mode without gradients, leaving mode and random state as they were.

    A DataLoader draws a seed from the global generator: without the fork, training would go on with
    other random numbers after an evaluation than without one.
    """
    training = model.training
    model.train(False)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), inference_precision(device, precision):
            yield
    finally:
        model.train(training)


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
