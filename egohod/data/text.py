"""Narrations to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

# Text lengths in a batch are rounded up to this, so that few different shapes reach the device.
LENGTH_MULTIPLE = 8
# Narrations repeat within an epoch far less than across; this many per process cost about 20 MB.
_CACHED_TEXTS = 32768


class Tokenizer:
    """CLIP's byte-pair tokens through open_clip's tokenizer (works offline)."""

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length
        self._inner = SimpleTokenizer(context_length=context_length)
        self._one = lru_cache(_CACHED_TEXTS)(self._encode)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens of texts, int64 [len(texts), context_length]: start, words, end-of-text (the largest id), zeros.

        Longer texts are cut, the end-of-text token stays last.
        """
        texts = [texts] if isinstance(texts, str) else texts
        return torch.from_numpy(np.stack([self._one(text) for text in texts]).astype(np.int64))

    def _encode(self, text: str) -> np.ndarray:
        return self._inner([text])[0].numpy().astype(np.int32)


def trim(tokens: Tensor) -> Tensor:
    """[B, L] -> [B, l]: the columns after the last end-of-text token of the batch are cut, l a multiple of 8 or L.

    What stands after the end-of-text token of a causal text tower changes nothing. Call it on the CPU: the new
    length is a number the host must know.
    """
    needed = int(tokens.argmax(dim=1).max()) + 1
    return tokens[:, : -(-needed // LENGTH_MULTIPLE) * LENGTH_MULTIPLE]
