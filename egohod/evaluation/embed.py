"""What an evaluation takes for a model, and its features of clips and texts, on any number of processes.

Features are for an evaluation, or go into an index of videos.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from egohod.data.config import DataConfig
from egohod.data.dataset import ClipDataset, collate_views, normalise, require_all, tokenizer_for, trim
from egohod.data.labels import ClassSpace
from egohod.data.loader import EvalLoader, eval_loader
from egohod.data.table import swap_sides
from egohod.distributed import Distributed, inference_precision
from egohod.errors import UserError
from egohod.evaluation.adapters import StoredFeatures, TransformersModel, mean_of_frames
from egohod.evaluation.features import FeatureCache, feature_key, is_written, write_video
from egohod.model.config import IMAGE_STATS, ImageStats, ModelConfig, WeightsConfig
from egohod.model.cost import count_flops
from egohod.model.dual_encoder import DualEncoder
from egohod.model.reranker import Reranker, grid_tokens
from egohod.runtime import Interrupted, Progress, content_hash

log = logging.getLogger(__name__)

TokenizerLike = Callable[[Sequence[str]], Any]
"""Texts to what the text tower reads: int64 [B, L], CLIP's being start, words, end-of-text and zeros; or the texts as
they are (``list``)."""


# --------------------------------------------------------------------------------------------------
# Models: a video and a text tower, heads, an open_clip baseline
# --------------------------------------------------------------------------------------------------


@runtime_checkable
class VideoTextModel(Protocol):
    """Two towers into one space, whose features are L2-normalised with ``normalize=True``."""

    training: bool

    def train(self, mode: bool = True) -> Any:
        """Switch dropout and the like on or off."""

    def encode_video(self, video: Tensor, normalize: bool = ...) -> Tensor:
        """Frames [B, 3, T, H, W], normalised with :func:`image_stats_of`, to features [B, D]."""

    def encode_text(self, tokens: Any, normalize: bool = ...) -> Tensor:
        """What the tokenizer makes of B texts, mostly token ids [B, L], to features [B, D]."""


def image_stats_of(model: object) -> ImageStats:
    """The mean and standard deviation that a model's input is normalised with: its own, else CLIP's."""
    return getattr(model, "image_stats", IMAGE_STATS["clip"])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over a model's class and the names, types and bytes of its weights."""
    if isinstance(model, StoredFeatures):
        return model.weights
    digest = hashlib.sha256(type(model).__qualname__.encode())
    # The same weights give other features with other image statistics. CLIP's are left out, so that fingerprints from
    # before there were any others stay valid.
    if (stats := image_stats_of(model)) != IMAGE_STATS["clip"]:
        digest.update(repr(stats).encode())
    # By name, as the order of a state dict is that of construction.
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # Viewed as bytes, as NumPy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def identity_of(model: object) -> str:
    """Names a model's features in a cache: its weights, and what the same weights can be used with.

    Of a model without weights nothing tells it from another one of its class, and no two names are alike.
    """
    if not isinstance(model, nn.Module) or not model.state_dict():
        return uuid.uuid4().hex
    # The same weights give other features on another path or with another activation.
    settings = [getattr(model, name, "") for name in ("geometry", "activation", "num_frames", "size")]
    return content_hash(fingerprint(model), f"{model!r} {settings}", length=32)


class ClassProbabilities(nn.Module):
    """A model with classification heads, whose feature of a clip is the probability of every class, [B, C].

    With heads for verb and noun a class has the product of both, normalised over the classes that exist. Where there is
    also one for all classes, it gives these probabilities, and those of verb and noun follow in the same row.
    """

    mirrored: Tensor

    def __init__(self, model: DualEncoder, space: ClassSpace) -> None:
        super().__init__()
        self.model, self.image_stats = model, model.image_stats
        # A clip of "left hand pick", mirrored, is one of "right hand pick": where each probability is then.
        words = [name.replace("_", " ") for name in space.names]
        number = {name: i for i, name in enumerate(words)}
        mirrored = np.array([number.get(swap_sides(name), i) for i, name in enumerate(words)])
        columns = [mirrored]
        # They follow from the class list, so they are no part of the state dict.
        for name, (values, code) in space.parts.items():
            self.register_buffer(f"{name}_of_class", torch.from_numpy(code), persistent=False)
            if "action" in model.classes and name in model.classes and name != "action":
                of_part = np.arange(len(values))
                of_part[code] = code[mirrored]
                columns.append(of_part + sum(map(len, columns)))
        self.register_buffer("mirrored", torch.from_numpy(np.concatenate(columns)), persistent=False)
        self.to(model.logit_scale.device)

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        """Frames normalised with ``image_stats`` [B, 3, T, H, W] -> probabilities float32 [B, C or more]."""
        logits = self.model.classify(video)
        if "action" in logits:
            return torch.cat([each.softmax(dim=1) for each in logits.values()], dim=1)
        # Products of probabilities as sums of logarithms, which do not underflow.
        joint = [each.log_softmax(dim=1)[:, getattr(self, f"{name}_of_class")] for name, each in logits.items()]
        return torch.stack(joint).sum(dim=0).softmax(dim=1)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """The model's text features, which the evaluation of heads does not use."""
        return self.model.encode_text(tokens, normalize)


class FrameAverage(nn.Module):
    """A baseline: the mean of an open_clip image tower's features of the frames, blind to their order.

    ``spec`` is ``open_clip:NAME[:PRETRAINED]``, e.g. ``open_clip:ViT-B-16:/path/to/weights.pt``. The latter is a tag in
    open_clip's local cache or a file; without it the weights are random. Raises :class:`UserError` for a name or
    weights that open_clip does not have.
    """

    def __init__(self, spec: str) -> None:
        super().__init__()
        name, _, pretrained = spec.removeprefix("open_clip:").partition(":")
        try:
            self.inner = open_clip.create_model(name, pretrained=pretrained or None)
            text = open_clip.get_model_config(name)["text_cfg"]
            if text.get("hf_tokenizer_name") and not text.get("hf_model_name"):
                # open_clip would fetch it; from local files alone, as for our own models.
                config = ModelConfig(text=name, weights=WeightsConfig(path=pretrained or None))
                self.tokenizer: TokenizerLike = tokenizer_for(config)
            else:
                self.tokenizer = open_clip.get_tokenizer(name)
        except (ImportError, RuntimeError, ValueError, OSError, AssertionError) as error:
            raise UserError(f"open_clip:{name}: {' '.join(str(error).split())}") from error
        # Its own resolution and statistics: a baseline is measured as it was trained, not as our models are.
        config = open_clip.get_model_preprocess_cfg(self.inner)
        size = config["size"]
        self.size = int(size[0] if isinstance(size, (tuple, list)) else size)
        self.image_stats = ImageStats(tuple(config["mean"]), tuple(config["std"]))

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        """Frames normalised with ``image_stats`` [B, 3, T, H, W] -> [B, D]."""
        return mean_of_frames(self.inner.encode_image, video, normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Token ids [B, L] -> [B, D]."""
        # open_clip's text towers take the whole context; ours come trimmed.
        full = tokens.new_zeros(len(tokens), self.inner.context_length)
        full[:, : tokens.shape[1]] = tokens
        return self.inner.encode_text(full, normalize=normalize)


class WithTokens(nn.Module):
    """A dual encoder whose feature of a clip is followed by the tokens that a reranker reads, [B, E + S D]."""

    def __init__(self, model: DualEncoder, head: Reranker) -> None:
        super().__init__()
        self.model, self.grid, self.image_stats = model, head.shape.grid, model.image_stats

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        """Frames normalised with ``image_stats`` [B, 3, T, H, W] -> float32 [B, E + S D], E of unit length."""
        # Two passes: of most towers the last block of the first one computes nothing but the feature, so that its
        # numbers are those of an evaluation without a reranker, to the bit.
        feature = self.model.encode_video(video, normalize)
        return torch.cat((feature, grid_tokens(self.model, video, self.grid).flatten(1)), dim=1)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """As the dual encoder's."""
        return self.model.encode_text(tokens, normalize)


# What a name begins with that is no checkpoint of ours, and what is made of the rest.
_OUTSIDE: dict[str, Callable[[str], nn.Module]] = {
    "open_clip:": lambda rest: FrameAverage(f"open_clip:{rest}"),
    "transformers:": TransformersModel,
    "features:": StoredFeatures,
}
OUTSIDE = tuple(_OUTSIDE)


def outside_model(spec: str) -> Any:
    """The model that ``open_clip:NAME[:WEIGHTS]``, ``transformers:FOLDER`` or ``features:FOLDER`` names.

    It has ``size``, the resolution in pixels, and ``tokenizer`` if it reads tokens. Raises :class:`UserError`.
    """
    family = next(each for each in OUTSIDE if spec.startswith(each))
    return _OUTSIDE[family](spec.removeprefix(family))


# --------------------------------------------------------------------------------------------------
# Temporal controls: the same clips with their time destroyed, to measure how much of a score is due to motion
# --------------------------------------------------------------------------------------------------

CONTROLS = ("shuffle", "reverse", "freeze")
# The name of the original order of frames, beside those of the temporal controls.
PLAIN = "plain"
# Behind the name of an order: of the same frames, mirrored left to right.
MIRRORED = " mirrored"
# A clip's shuffled order is a function of this and of the clip's number.
SEED = 0


def apply_control(name: str, video: Tensor, numbers: Sequence[int]) -> Tensor:
    """``video`` [B, 3, T, H, W], uint8 or normalised, under the temporal control ``name``.

    ``shuffle`` is a random order that is never the original, a function of the clip's number alone; ``reverse`` plays
    the clip backwards; ``freeze`` repeats the middle frame, of an even number the later one. ``numbers`` [B] identify
    the clips. Raises :class:`UserError` for an unknown name, and for clips of one frame.
    """
    if name not in CONTROLS:
        raise UserError(f"no temporal control '{name}'; there are {', '.join(CONTROLS)}")
    frames = video.shape[2]
    if frames < 2:
        raise UserError(f"the temporal control '{name}' needs clips of at least two frames")
    # On the frames that are given to the model, so that a slow and a fast pathway see the same order.
    if name == "shuffle":
        order = torch.from_numpy(np.stack([shuffled_order(int(i), frames) for i in numbers])).to(video.device)
        return video.gather(2, order[:, None, :, None, None].expand_as(video))
    if name == "reverse":
        return video.flip(2)
    # Copied: a backbone may view the frames as if they were contiguous.
    return video[:, :, frames // 2 : frames // 2 + 1].expand_as(video).contiguous()


def shuffled_order(number: int, frames: int, seed: int = SEED) -> np.ndarray:
    """A permutation of ``frames`` >= 2 frames that is not the identity, int64 [frames]; a function of its arguments."""
    assert frames > 1
    # A generator of its own: neither the batch nor the process that a clip comes to changes its order.
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number))))
    while True:
        order = rng.permutation(frames)
        # Of two frames every second permutation changes nothing.
        if not np.array_equal(order, np.arange(frames)):
            return order


# --------------------------------------------------------------------------------------------------
# Features of clips and texts
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Execution:
    """How features are computed: clips of a batch, decoding processes, this process, autocast type.

    ``cache`` is the folder of cached features and ``identity`` what they depend on beside the clips and the protocol,
    above all the checksum of the weights. ``allow_missing`` leaves out clips that cannot be read; ``timeout`` is how
    many seconds a batch may take to decode. ``pin_memory`` is for a GPU. With a ``loader`` all benchmarks that were
    added to it share decoding processes.
    """

    batch_size: int
    workers: int
    dist: Distributed
    precision: torch.dtype = torch.float32
    cache: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    allow_missing: bool = False
    timeout: float = DataConfig.timeout
    pin_memory: bool = False
    loader: EvalLoader | None = None


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
    flip: bool = False,
    cache: FeatureCache | None = None,
) -> tuple[dict[str, Tensor], EmbedReport]:
    """Features of every clip of ``dataset``: float32 [N, D] on the CPU, row i is clip i, the same on every process.

    The result has those of the original order (``plain``) and those under each temporal control, and with ``flip`` also
    those of the mirrored clips, each name followed by ``MIRRORED``; a clip is decoded once for all of them. The
    features of several views are averaged, which averages their similarities; a protocol that merges by the maximum
    gets them all, [N, V, D].

    Raises :class:`UserError` on every process, naming all clips that cannot be read; with ``run.allow_missing`` their
    rows are NaN and the report names them.
    """
    orders, report = (PLAIN, *controls), EmbedReport(clips=len(dataset))
    orders += tuple(name + MIRRORED for name in orders) if flip else ()
    if isinstance(model, StoredFeatures):
        stored, report.faults = model.of_clips(dataset.clips)
        report.from_cache = len(dataset) - len(report.faults)
        if not run.allow_missing:
            require_all(report.faults, len(dataset))
        return {PLAIN: stored}, report
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
            read = tokenizer([ordered[row] for row in index])
            if isinstance(read, Tensor):
                read = trim(read).to(run.dist.device)
            yield Batch(index, model.encode_text(read, normalize=True)[:, None])

    keys = [[feature_key("text", text)] for text in ordered] if cache else []
    features = _encode_shared(model, encode, len(ordered), run.batch_size, "text", run, cache, keys, EmbedReport())
    return features[torch.from_numpy(np.argsort(by_length)[place]), 0]


def rerank(
    model: DualEncoder,
    head: Reranker,
    clips: Tensor,
    texts: Sequence[str],
    tokenizer: TokenizerLike,
    sim: Tensor,
    top_k: int,
    run: Execution,
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """The first ``top_k`` candidates of each clip and of each text in the order of a reranker's scores.

    Args:
        clips: tokens of the clips, float32 [N, S D], as of :class:`WithTokens`.
        sim: cosines of the dual encoder [N, M].

    Returns:
        Scores of texts by clip [N, M] and of clips by text [M, N], the same on every process, in which the candidates
        are in front of all others, which have their cosines; and the operations of a query's pairs. Collective.
    """
    device, dist = run.dist.device, run.dist
    head = head.to(device)
    orders: list[dict[int, NDArray[np.int64]]] = [{}, {}]
    flops, queries = 0, 0
    with _inference(model, device, run.precision):
        for direction, scores in enumerate((sim, sim.T)):
            # Queries are shared out one by one, and each is a batch of its own: the number of processes changes no bit.
            for row in range(dist.rank, len(scores), dist.world_size):
                dist.stop.check()
                # Stable, as ties of cosines are broken by the lower index in the metrics too.
                candidates = scores[row].argsort(descending=True, stable=True)[:top_k]
                clip_rows, text_rows = (torch.tensor([row]), candidates) if direction == 0 else (candidates, [row])
                tokens = trim(tokenizer([texts[i] for i in text_rows])).to(device)
                tokens = model.textual.padded(tokens)
                inputs = (
                    clips[clip_rows].unflatten(1, (-1, head.shape.video_width)).to(device),
                    model.textual.states(tokens).float(),
                    tokens != 0,
                    scores[row, candidates].view(len(clip_rows), -1).to(device),
                )
                if not queries:
                    flops = count_flops(partial(head, *inputs))
                queries += 1
                order = head(*inputs).flatten().argsort(descending=True, stable=True).cpu()
                orders[direction][row] = candidates[order].numpy()
    results = []
    for direction, scores in enumerate((sim, sim.T)):
        ranked = scores.numpy().copy()
        for row, best in (item for share in dist.gather_objects(orders[direction]) for item in share.items()):
            # Cosines are at most 1, and the reranker's scores may be anything: its order alone counts.
            ranked[row, best] = 3 - np.arange(len(best), dtype=np.float32) / len(best)
        results.append(ranked)
    return results[0], results[1], float(flops)


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
    options: dict[str, Any] = {"timeout": run.timeout, "stop": run.dist.stop, "pin_memory": run.pin_memory}
    if run.loader is not None and dataset.origin in run.loader.datasets:
        batches = run.loader.read(dataset, rows.tolist(), batch_size, run.workers, **options)
    else:
        batches = iter(eval_loader(dataset, rows.tolist(), batch_size, run.workers, collate=collate_views, **options))
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
        features = []
        for name in orders:
            order, mirrored = name.removesuffix(MIRRORED), name.endswith(MIRRORED)
            ordered = apply_control(order, video, numbers) if order != PLAIN else video
            features.append(model.encode_video(ordered.flip(-1) if mirrored else ordered, normalize=True))
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
    """Features [total, orders, ...] of all rows: from the cache, the others by ``encode`` on all processes together.

    Raises :class:`UserError` for features that are not finite.
    """
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
    shares = gather_or_raise(dist, (rows, features, report.faults), fault)
    for _, _, faults in shares:
        report.faults |= faults
    report.from_cache, report.seconds = len(cached), time.perf_counter() - start
    index = [np.fromiter(cached, dtype=np.int64), *(each for share, _, _ in shares for each in share)]
    values = [np.stack(list(cached.values()))] if cached else []
    values += [each for _, share, _ in shares for each in share]
    if not values:
        require_all(report.faults, total)
    # In the order of the rows, NaN for clips that could not be read.
    joined, place = np.concatenate(values), np.concatenate(index)
    counts = np.bincount(place, minlength=total)
    counts[list(report.faults)] += 1
    assert (counts == 1).all(), f"each {unit} must be encoded exactly once"
    # Refused, as ranks of NaN are arbitrary: a broken checkpoint would get a plausible number.
    broken = np.sort(place[~np.isfinite(joined).reshape(len(joined), -1).all(axis=1)])
    if broken.size:
        raise UserError(
            f"the features of {broken.size} of {total} {unit}s are NaN or infinite, first of {unit} {broken[0]}: "
            "the model's weights are broken or the precision is too low"
        )
    ordered = np.full((total, *joined.shape[1:]), np.nan, dtype=np.float32)
    ordered[place] = joined
    return torch.from_numpy(ordered)


def gather_or_raise(dist: Distributed, value: Any, fault: str | None) -> list[Any]:
    """The values of all processes; the faults of any are raised on all, or the others would wait for it for ever."""
    shares = dist.gather_objects((value, fault))
    # Each line once: a folder that is gone is gone for every process.
    if lines := dict.fromkeys(line for _, text in shares if text is not None for line in text.split("\n")):
        raise UserError(*lines)
    return [each for each, _ in shares]


@contextlib.contextmanager
def _inference(model: VideoTextModel, device: torch.device, precision: torch.dtype) -> Iterator[None]:
    """Evaluation mode without gradients; the mode and the random state are restored afterwards."""
    training = model.training
    model.train(False)
    try:
        # A DataLoader draws a seed from the global generator: without the fork, training would go on with other random
        # numbers after an evaluation than without one.
        #
        # A benchmark has its own batch sizes, frames and text lengths, and each would be compiled anew in a model that
        # is compiled for training: without the stance a few of them take minutes, and the limit on variants is reached.
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            inference_precision(device, precision),
        ):
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
    results = gather_or_raise(run.dist, done, fault)
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
