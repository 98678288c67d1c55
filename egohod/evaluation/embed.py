"""Features of clips and texts on any number of processes: for an evaluation, or into an index of videos."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from egohod.data.config import DataConfig
from egohod.data.dataset import ClipDataset, collate_views, normalise, require_all, trim
from egohod.data.loader import eval_loader
from egohod.distributed import Distributed, inference_precision
from egohod.errors import UserError
from egohod.evaluation.features import FeatureCache, feature_key, is_written, write_video
from egohod.evaluation.models import PLAIN, VideoTextModel, apply_control, image_stats_of
from egohod.runtime import Interrupted, Progress

log = logging.getLogger(__name__)

TokenizerLike = Callable[[Sequence[str]], Tensor]
"""Texts to int64 [B, L]: start, words, end-of-text (the largest id), zeros."""


@dataclass(frozen=True)
class Execution:
    """How features are computed: clips of a batch, decoding processes, this process, autocast type.

    ``cache`` is the folder of cached features and ``identity`` what they depend on beside the clips and the protocol,
    above all the checksum of the weights. ``allow_missing`` leaves out clips that cannot be read; ``timeout`` is how
    many seconds a batch may take to decode.
    """

    batch_size: int
    workers: int
    dist: Distributed
    precision: torch.dtype = torch.float32
    cache: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    allow_missing: bool = False
    timeout: float = DataConfig.timeout


@dataclass
class EmbedReport:
    """How the features of a benchmark were computed."""

    clips: int = 0
    from_cache: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    """Seconds of them in which the first process waited for decoded clips."""
    faults: dict[int, str] = field(default_factory=dict)
    """Clips that could not be read, by index."""


@dataclass(frozen=True)
class Batch:
    """Encoded clips: their index int64 [B], features [B, orders, D] or [B, orders, V, D], and the unreadable ones."""

    index: NDArray[np.int64]
    features: Tensor
    faults: dict[int, str] = field(default_factory=dict)


def embed_clips(
    model: VideoTextModel,
    dataset: ClipDataset,
    run: Execution,
    *,
    controls: Sequence[str] = (),
    cache: FeatureCache | None = None,
) -> tuple[dict[str, Tensor], EmbedReport]:
    """Features of every clip of ``dataset``: float32 [N, D] on the CPU, row i is clip i, the same on every process.

    The result has those of the original order (``plain``) and those under each temporal control; a clip is decoded once
    for all of them. The features of several views are averaged, which averages their similarities; a protocol that
    merges by the maximum gets them all, [N, V, D].

    Raises :class:`UserError` on every process, naming all clips that cannot be read; with ``run.allow_missing`` their
    rows are NaN and the report names them.
    """
    orders, report = (PLAIN, *controls), EmbedReport(clips=len(dataset))
    # So that views of long protocols need no more memory than one view of others.
    at_a_time = max(1, run.batch_size // dataset.protocol.views)

    def encode(rows: NDArray[np.int64]) -> Iterator[Batch]:
        return _encode_clips(model, dataset, rows, at_a_time, run, orders, report)

    # By content, not by benchmark: another one with the same clips reads these.
    keys = [[feature_key("clip", clip, order) for order in orders] for clip in dataset.identities] if cache else []
    features = _encode_shared(model, encode, len(dataset), at_a_time, "clip", run, cache, keys, report)
    if not run.allow_missing:
        require_all(report.faults, len(dataset))
    return dict(zip(orders, features.unbind(dim=1), strict=True)), report


def embed_texts(
    model: VideoTextModel,
    texts: Sequence[str],
    tokenizer: TokenizerLike,
    run: Execution,
    *,
    cache: FeatureCache | None = None,
) -> Tensor:
    """Features of ``texts``: float32 [len(texts), D] on the CPU, the same on every process."""
    # Equal texts are encoded once.
    distinct, place = np.unique(np.asarray(texts, dtype=object).astype(str), return_inverse=True)
    # Texts of similar length share a batch, so that little padding is computed.
    by_length = np.argsort([len(text) for text in distinct], kind="stable")
    ordered = [str(distinct[row]) for row in by_length]

    def encode(rows: NDArray[np.int64]) -> Iterator[Batch]:
        for start in range(0, len(rows), run.batch_size):
            index = rows[start : start + run.batch_size]
            tokens = trim(tokenizer([ordered[row] for row in index]))
            yield Batch(index, model.encode_text(tokens.to(run.dist.device), normalize=True)[:, None])

    keys = [[feature_key("text", text)] for text in ordered] if cache else []
    features = _encode_shared(model, encode, len(ordered), run.batch_size, "text", run, cache, keys, EmbedReport())
    return features[torch.from_numpy(np.argsort(by_length)[place]), 0]


def _encode_clips(
    model: VideoTextModel,
    dataset: ClipDataset,
    rows: NDArray[np.int64],
    batch_size: int,
    run: Execution,
    orders: Sequence[str],
    report: EmbedReport,
) -> Iterator[Batch]:
    """Decode and encode the clips ``rows`` in their order; ``report`` gets the seconds of waiting for clips."""
    views, stats = dataset.protocol.views, image_stats_of(model)
    batches = iter(
        eval_loader(
            dataset, rows.tolist(), batch_size, run.workers,
            collate=collate_views, timeout=run.timeout, stop=run.dist.stop,
        )
    )  # fmt: skip
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        report.waiting += time.perf_counter() - start
        if batch is None:
            return
        if batch["video"] is None:  # not one of its clips can be read
            yield Batch(batch["index"], torch.zeros(0, len(orders), 0), batch["faults"])
            continue
        # Normalised here and not by the workers: bytes are a quarter of floats on the way to the device.
        video = normalise(batch["video"].to(run.dist.device, non_blocking=True).flatten(0, 1), stats)
        numbers = [dataset.numbers[i] for i in np.repeat(batch["index"], views)]
        # All orders from one decoding of the clip.
        features = [
            model.encode_video(apply_control(name, video, numbers) if name != PLAIN else video, normalize=True)
            for name in orders
        ]
        stacked = torch.stack(features).float().unflatten(1, (-1, views)).transpose(0, 1)
        merged = stacked if dataset.protocol.merge == "max" else stacked.mean(dim=2)
        yield Batch(batch["index"], merged, batch["faults"])


def _encode_shared(
    model: VideoTextModel,
    encode: Callable[[NDArray[np.int64]], Iterator[Batch]],
    total: int,
    batch_size: int,
    unit: str,
    run: Execution,
    cache: FeatureCache | None,
    keys: Sequence[Sequence[str]],
    report: EmbedReport,
) -> Tensor:
    """Features [total, orders, ...] of all rows: from the cache, the others by ``encode`` on all processes together."""
    if total == 0:
        raise UserError(f"nothing to evaluate: there is not a single {unit}")
    start, dist = time.perf_counter(), run.dist
    cached: dict[int, NDArray[np.float32]] = {}
    if cache:
        if dist.is_main:
            on_disk = cache.read([key for orders in keys for key in orders])
            # All orders or none: a clip is decoded once for all of them.
            complete = [row for row, orders in enumerate(keys) if all(key in on_disk for key in orders)]
            cached = {row: np.stack([on_disk[key] for key in keys[row]]) for row in complete}
        # The first process decides for all: another one may see files that were written since.
        cached = dist.gather_objects(cached)[0]
    todo = np.setdiff1d(np.arange(total), np.fromiter(cached, dtype=np.int64, count=len(cached)))
    # Processes take turns at the same batches as one process would have, so that every clip is encoded exactly once and
    # in the same batch whatever their number: a batch's composition changes the last bits of its features.
    mine = todo[np.arange(len(todo)) // batch_size % dist.world_size == dist.rank]
    rows: list[NDArray[np.int64]] = []
    features: list[NDArray[np.float32]] = []
    fault: str | None = None
    interrupted: str | None = None
    try:
        with _inference(model, dist.device, run.precision):
            for batch in encode(mine):
                dist.stop.check()
                report.faults |= batch.faults
                if not len(batch.index):
                    continue
                rows.append(batch.index)
                features.append(batch.features.float().cpu().numpy())
                for i, orders in zip(batch.index.tolist(), features[-1], strict=True):
                    # Features that are not finite are refused below and must not come back from the cache.
                    if cache and np.isfinite(orders).all():
                        for key, feature in zip(keys[i], orders, strict=True):
                            cache.add(key, feature)
    except UserError as error:  # raised below
        fault = str(error)
    except Interrupted as request:  # processes have more or fewer batches, but all of them get to the gather below
        interrupted = str(request)
    finally:  # also where it was interrupted: what is encoded is not encoded again
        if cache:
            cache.flush()
    if requests := [text for text in dist.gather_objects(interrupted) if text is not None]:
        raise Interrupted(requests[0])
    shares = _gather_or_raise(dist, (rows, features, report.faults), fault)
    for _, _, faults in shares:
        report.faults |= faults
    report.from_cache, report.seconds = len(cached), time.perf_counter() - start
    index = [np.fromiter(cached, dtype=np.int64), *(each for share, _, _ in shares for each in share)]
    values = [np.stack(list(cached.values()))] if cached else []
    values += [each for _, share, _ in shares for each in share]
    if not values:
        require_all(report.faults, total)
    return _in_order(np.concatenate(index), np.concatenate(values), total, unit, report.faults)


def _gather_or_raise(dist: Distributed, value: Any, fault: str | None) -> list[Any]:
    """The values of all processes; the faults of any are raised on all, or the others would wait for it for ever."""
    shares = dist.gather_objects((value, fault))
    # Each line once: a folder that is gone is gone for every process.
    if lines := dict.fromkeys(line for _, text in shares if text is not None for line in text.split("\n")):
        raise UserError(*lines)
    return [each for each, _ in shares]


def _in_order(
    index: NDArray[np.int64], values: NDArray[np.float32], total: int, unit: str, faults: dict[int, str]
) -> Tensor:
    """Features in the order of their rows, NaN for those of ``faults``. Raises :class:`UserError` for other NaN."""
    counts = np.bincount(index, minlength=total)
    counts[list(faults)] += 1
    assert (counts == 1).all(), f"each {unit} must be encoded exactly once"
    # Refused, as ranks of NaN are arbitrary: a broken checkpoint would get a plausible number.
    broken = np.sort(index[~np.isfinite(values).reshape(len(values), -1).all(axis=1)])
    if broken.size:
        raise UserError(
            f"the features of {broken.size} of {total} {unit}s are NaN or infinite, first of {unit} {broken[0]}: "
            "the model's weights are broken or the precision is too low"
        )
    ordered = np.full((total, *values.shape[1:]), np.nan, dtype=np.float32)
    ordered[index] = values
    return torch.from_numpy(ordered)


@contextlib.contextmanager
def _inference(model: VideoTextModel, device: torch.device, precision: torch.dtype) -> Iterator[None]:
    """Evaluation mode without gradients; the mode and the random state are restored afterwards."""
    training = model.training
    model.train(False)
    try:
        # A DataLoader draws a seed from the global generator: without the fork, training would go on with other random
        # numbers after an evaluation than without one.
        with torch.random.fork_rng(devices=[]), torch.no_grad(), inference_precision(device, precision):
            yield
    finally:
        model.train(training)


# --------------------------------------------------------------------------------------------------
# Extraction into an index, a file for each video
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extracted:
    """How many videos and clips were embedded, and the clips that could not be read."""

    videos: int = 0
    clips: int = 0
    faults: list[str] = field(default_factory=list)


def remaining(dataset: ClipDataset, folder: Path) -> dict[str, str]:
    """Videos whose features are not in ``folder`` yet, or are of other clips, with the identity of their clips."""
    identities = {
        video: hashlib.sha256("\0".join([dataset.identities[row] for row in rows]).encode()).hexdigest()
        for video, rows in dataset.clips.rows_of_videos().items()
    }
    return {video: identity for video, identity in identities.items() if not is_written(folder, video, identity)}


def shares(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Videos with ``sizes`` clips each, distributed over ``count`` processes with about the same number of clips."""
    dealt, load = [list[str]() for _ in range(count)], [0] * count
    # The largest first: whatever comes last can only unbalance by its own size.
    for video in sorted(sizes, key=lambda name: -sizes[name]):
        least = load.index(min(load))
        dealt[least].append(video)
        load[least] += sizes[video]
    return dealt


def extract(
    model: VideoTextModel, dataset: ClipDataset, folder: Path, todo: Mapping[str, str], run: Execution
) -> Extracted:
    """Embed the videos ``todo`` (see :func:`remaining`) into ``folder``, a file each. Collective over all processes.

    Each process embeds and writes its share of the videos; the result counts those of all. A clip that cannot be read
    raises :class:`UserError` on every process once the other shares are done, or is left out of its video's file with
    ``run.allow_missing``.
    """
    sizes = {video: len(rows) for video, rows in dataset.clips.rows_of_videos().items() if video in todo}
    mine = set(shares({video: sizes[video] for video in todo}, run.dist.world_size)[run.dist.rank])
    share = {video: identity for video, identity in todo.items() if video in mine}
    done, fault = Extracted(), None
    try:
        with _inference(model, run.dist.device, run.precision):
            done = _extract_share(model, dataset, folder, share, run)
    except UserError as error:  # raised below
        fault = str(error)
    results = _gather_or_raise(run.dist, done, fault)
    videos, clips = (sum(getattr(each, name) for each in results) for name in ("videos", "clips"))
    return Extracted(videos, clips, [line for each in results for line in each.faults])


def _extract_share(
    model: VideoTextModel, dataset: ClipDataset, folder: Path, todo: Mapping[str, str], run: Execution
) -> Extracted:
    clips, rows_of = dataset.clips, dataset.clips.rows_of_videos()
    rows = np.array([row for video in todo for row in rows_of[video]], dtype=np.int64)
    encoded: dict[int, NDArray[np.float32]] = {}
    pending, faults, written, done, complete = list(todo), list[str](), 0, 0, 0
    with Progress("extract", len(rows)) as progress:
        for batch in _encode_clips(model, dataset, rows, run.batch_size, run, (PLAIN,), EmbedReport()):
            failed = [batch.faults[row] for row in sorted(batch.faults)]
            if failed and not run.allow_missing:
                hint = "--allow_missing leaves such clips out; finished videos stay, rerun to resume"
                raise UserError(*failed, hint)
            for line in failed:
                log.warning("left out: %s", line)
            faults += failed
            features = batch.features.float().cpu().numpy()
            if not np.isfinite(features).all():
                raise UserError("features are NaN or infinite: the weights are broken or the precision is too low")
            encoded |= {row: feature[0] for row, feature in zip(batch.index.tolist(), features, strict=True)}
            done += len(batch.index) + len(failed)
            # Written as soon as it is whole, so that an interrupted run loses one video and memory holds few.
            # Clips come in order, so a video is complete when all up to its last have come.
            while pending and complete + len(rows_of[pending[0]]) <= done:
                video = pending.pop(0)
                complete += len(rows_of[video])
                # A video without a readable clip gets no file, or a search would find an empty one.
                if readable := [row for row in rows_of[video] if row in encoded]:
                    # A video that lacks a clip is tried again by a later run.
                    identity = todo[video] if len(readable) == len(rows_of[video]) else "incomplete"
                    stacked = np.stack([encoded.pop(row) for row in readable])
                    texts = [clips.value("text", row) for row in readable]
                    write_video(folder, video, stacked, clips.start[readable], clips.end[readable], texts, identity)
                    written += 1
            progress.update(done)
    assert not encoded, "every feature belongs to a video"
    return Extracted(written, done - len(faults), faults)
