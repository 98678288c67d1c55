"""Features that were computed before, by content: never those of another checkpoint, clip or protocol.

    <folder>/<group>/<process and number>.npz    keys [n] and features float32 [n, D]

The group is the checksum of everything that all features of an evaluation share (weights, protocol, resolution,
precision), a key that of one clip under one order of frames, or of one text. Files are only ever added, each as a
whole, so that an interrupted evaluation and several processes leave nothing broken behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from egohod.model.config import IMAGE_STATS

log = logging.getLogger(__name__)

# So many new features are written at a time.
_FILE_ROWS = 256


class FeatureCache:
    """One group of features below ``folder``; ``shared`` is whatever tells it from other groups."""

    def __init__(self, folder: Path, shared: Mapping[str, Any]) -> None:
        self.group = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = folder / self.group
        self._waiting: dict[str, NDArray[np.float32]] = {}

    def read(self, keys: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The features that are there, by key."""
        wanted, found = set(keys), dict[str, NDArray[np.float32]]()
        for path in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as content:
                    names, features = map(str, content["keys"]), np.asarray(content["features"], np.float32)
                rows = dict(zip(names, features, strict=True))
            except Exception as error:  # a damaged file can raise anything
                log.warning("%s: not readable (%.200s), its features are computed again", path, error)
                continue
            found |= {key: row for key, row in rows.items() if key in wanted}
        return found

    def add(self, key: str, feature: NDArray[np.float32]) -> None:
        """Keep a feature; it is on the disk after the next :meth:`flush` at the latest."""
        self._waiting[key] = feature
        if len(self._waiting) >= _FILE_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is not on the disk yet. A full disk costs the cache, not the evaluation."""
        if not self._waiting:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            final = self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.npz"
            part = final.with_suffix(".part")
            with part.open("wb") as file:
                np.savez(file, keys=np.array(list(self._waiting)), features=np.stack(list(self._waiting.values())))
            part.replace(final)
        except OSError as error:
            log.warning("%s: features are not kept: %s", self.folder, error.strerror or error)
        self._waiting.clear()


def feature_key(*parts: str) -> str:
    """The key of one clip or text."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, types and bytes of all weights of a model, and over its kind.

    Statistics of its input other than CLIP's count too: with them the same weights give other features.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    if (stats := getattr(model, "image_stats", IMAGE_STATS["clip"])) != IMAGE_STATS["clip"]:
        digest.update(repr(stats).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
