"""Features, once per clip and once per distinct text, on any number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from egohod.config import UserError
from egohod.data.clips import ClipDataset
from egohod.data.loader import eval_loader
from egohod.data.text import Tokenizer, trim
from egohod.data.transforms import normalise
from egohod.distributed import Distributed
from egohod.evaluation.temporal import apply_control

# What the clips as they are are called among the temporal controls.
PLAIN = "plain"


@runtime_checkable
class VideoTextModel(Protocol):
    """What an evaluation needs of a model: two towers into one space, L2-normalised with ``normalize=True``."""

    training: bool

    def train(self, mode: bool = True) -> Any:
        """Switch dropout and the like on or off."""

    def encode_video(self, video: Tensor, normalize: bool = ...) -> Tensor:
        """Normalised frames [B, 3, T, H, W] to features [B, D]."""

    def encode_text(self, tokens: Tensor, normalize: bool = ...) -> Tensor:
        """Token ids [B, L] to features [B, D]."""


def embed_clips(
    model: VideoTextModel,
    dataset: ClipDataset,
    *,
    batch_size: int,
    workers: int,
    dist: Distributed,
    precision: torch.dtype,
    controls: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Features of every clip of ``dataset``: float32 [N, D] on the CPU, row i is clip i, the same on every process.

    The result holds those of the clips as they are (``plain``) and those under each temporal control; every clip is
    decoded once for all of them. Each process encodes every ``world_size``-th clip, so each clip counts exactly once
    on any number of processes.
    ``precision`` is the autocast type (``torch.float32``: none). Raises :class:`UserError` on every process when
    one of them cannot read a clip; nothing is ever replaced.
    """

    def encode(mine: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        for batch in eval_loader(dataset, mine.tolist(), batch_size, workers):
            video, index = normalise(batch["video"].to(dist.device, non_blocking=True)), batch["index"].numpy()
            orders = [video, *(apply_control(name, video, index) for name in controls)]
            yield index, torch.stack([model.encode_video(order, normalize=True) for order in orders], dim=1)

    features = _encode_shards(model, encode, len(dataset), "clip", dist, precision)
    return dict(zip((PLAIN, *controls), features.unbind(dim=1), strict=True))


def embed_texts(
    model: VideoTextModel,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    dist: Distributed,
    precision: torch.dtype,
) -> Tensor:
    """Features of ``texts``: float32 [len(texts), D] on the CPU, the same on every process.

    Equal texts are encoded once. Texts of similar length share a batch, so that little padding is computed.
    """
    distinct, place = np.unique(np.asarray(texts, dtype=object).astype(str), return_inverse=True)
    by_length = np.argsort([len(text) for text in distinct], kind="stable")

    def encode(mine: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        for start in range(0, len(mine), batch_size):
            rows = by_length[mine[start : start + batch_size]]
            tokens = trim(tokenizer([str(distinct[row]) for row in rows]))
            yield rows, model.encode_text(tokens.to(dist.device), normalize=True)

    features = _encode_shards(model, encode, len(distinct), "text", dist, precision)
    return features[torch.from_numpy(place)]


def _encode_shards(
    model: VideoTextModel,
    encode: Callable[[NDArray[np.int64]], Iterator[tuple[NDArray[np.int64], Tensor]]],
    total: int,
    what: str,
    dist: Distributed,
    precision: torch.dtype,
) -> Tensor:
    """Run ``encode`` on this process's share of ``range(total)`` and put the shares of all processes together."""
    if total == 0:
        raise UserError(f"nothing to evaluate: there is not a single {what}")
    rows: list[NDArray[np.int64]] = []
    features: list[NDArray[np.float32]] = []
    fault: str | None = None
    try:
        with _inference(model, dist.device, precision):
            for index, encoded in encode(np.arange(dist.rank, total, dist.world_size)):
                rows.append(index)
                features.append(encoded.float().cpu().numpy())
    except UserError as error:  # told to all, or the other processes would wait for this one for ever
        fault = str(error)
    shares = dist.gather_objects((rows, features, fault))
    faults = [text for _, _, text in shares if text is not None]
    if faults:
        raise UserError("\n".join(faults))
    return _assemble(
        [row for share, _, _ in shares for row in share], [row for _, share, _ in shares for row in share], total, what
    )


def _assemble(rows: list[NDArray[np.int64]], features: list[NDArray[np.float32]], total: int, what: str) -> Tensor:
    """Features in the order of their rows. Raises :class:`UserError` naming rows whose features are not finite."""
    index, values = np.concatenate(rows), np.concatenate(features)
    order = np.argsort(index, kind="stable")
    assert np.array_equal(index[order], np.arange(total)), f"each {what} must be encoded exactly once"
    values = values[order]
    broken = np.flatnonzero(~np.isfinite(values).reshape(total, -1).all(axis=1))
    if broken.size:
        raise UserError(
            f"the features of {broken.size} of {total} {what}s are NaN or infinite, first of {what} {broken[0]}: "
            "the model's weights are broken or the precision is too low"
        )
    return torch.from_numpy(values)


@contextlib.contextmanager
def _inference(model: VideoTextModel, device: torch.device, precision: torch.dtype) -> Iterator[None]:
    """Evaluation mode without gradients, leaving mode and random state as they were.

    A DataLoader draws a seed from the global generator: without the fork, training would go on with
    other random numbers after an evaluation than without one.
    """
    training = model.training
    model.train(False)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            torch.autocast(device.type, precision, enabled=precision != torch.float32),
        ):
            yield
    finally:
        model.train(training)
