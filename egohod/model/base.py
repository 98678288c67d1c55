"""Weights that a small training leaves as they were: they stay in the file they came from, known by a checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from egohod.model.weight_files import WeightFile


@dataclass(frozen=True)
class Base:
    """Tensors of the file ``path`` that a model has unchanged and does not train, with their checksum."""

    path: str
    names: tuple[str, ...]
    sha256: str


def base_of(model: nn.Module, content: WeightFile) -> Base | None:
    """What ``model`` keeps of the file it was started from; None if it trains everything."""
    kept = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
        and name in content.tensors
        and content.tensors[name].shape == parameter.shape
        and bool((content.tensors[name].to(parameter) == parameter).all())
    ]
    # A fixed temperature is not worth a second file.
    if all(content.tensors[name].dim() == 0 for name in kept):
        return None
    # Whoever opens the checkpoint may stand in another folder.
    file = Path(content.source)
    return Base(str(file.resolve() if file.exists() else file), tuple(kept), checksum(content.tensors, kept))


def checksum(tensors: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """SHA-256 of some tensors as float32, whatever type a file holds them in."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
