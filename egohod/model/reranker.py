"""The second stage of retrieval: a small head that reads a clip and a text together, on the tokens of frozen towers.

A dual encoder compresses a clip before it knows the text; here parts of the text attend to places and times of the
clip. It is too slow for all pairs, so it orders the first candidates of the dual encoder anew (``evaluate.rerank``;
tools/train_reranker.py trains one).

Legend: C clips of T frames, G x G regions of each frame, S = T G G tokens of a clip, M texts of L tokens, K parts of a
text, D width.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from egohod.errors import UserError
from egohod.model.dual_encoder import DualEncoder
from egohod.model.weight_files import write_safetensors
from egohod.runtime import atomic_write

_LARGEST = 1 << 14  # sizes that a file may claim


@dataclass(frozen=True)
class RerankerShape:
    """Sizes of a head, the dual encoder that it belongs to, and what it was trained on; saved with its weights."""

    video_width: int
    text_width: int
    frames: int
    grid: int
    width: int = 128
    parts: int = 2
    """Averages of a text's words that attend to a clip, each by weights of its own: what is done, and to what."""
    heads: int = 4
    dropout: float = 0.1
    encoder: str = ""
    """The checksum of the dual encoder's weights: tokens of others mean something else."""
    trained: str = ""
    """How it was trained, for people."""


def grid_tokens(model: DualEncoder, video: Tensor, grid: int) -> Tensor:
    """Patch tokens behind the last block, averaged over ``grid`` x ``grid`` regions: [B, 3, T, H, W] -> [B, S, D].

    Of a tower with two paths they are the fast path's. All patches of a large tower would be gigabytes for a benchmark.
    """
    tokens, frames = model.visual.tokens(video), video.shape[2]
    side = math.isqrt(tokens.shape[1] // frames)
    # [B, T P, D] -> [B T, D, h, w]
    places = tokens.unflatten(1, (frames, side, side)).flatten(0, 1).permute(0, 3, 1, 2)
    pooled = F.adaptive_avg_pool2d(places.float(), min(grid, side))
    return pooled.flatten(2).transpose(1, 2).unflatten(0, (len(video), frames)).flatten(1, 2)


class Reranker(nn.Module):
    """Scores of pairs: the dual encoder's cosine, scaled, plus what the head reads in the tokens; at first nothing."""

    def __init__(self, shape: RerankerShape) -> None:
        super().__init__()
        self.shape, width = shape, shape.width
        self.video_in = nn.Sequential(nn.LayerNorm(shape.video_width), nn.Linear(shape.video_width, width))
        self.text_in = nn.Sequential(nn.LayerNorm(shape.text_width), nn.Linear(shape.text_width, width))
        self.times = nn.Parameter(torch.randn(shape.frames, 1, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, shape.grid**2, width) * 0.02)
        self.part_of_word, self.parts = (
            nn.Linear(width, shape.parts),
            nn.Parameter(torch.randn(shape.parts, width) * 0.02),
        )
        self.query, self.key_value, self.target = (nn.Linear(width, n * width) for n in (1, 2, 1))
        self.norm = nn.LayerNorm(width)
        # Starts as the dual encoder's own ranking, from which it can only be moved by what it learns.
        nn.init.zeros_(self.target.weight)
        nn.init.zeros_(self.target.bias)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, clips: Tensor, words: Tensor, mask: Tensor, cosines: Tensor) -> Tensor:
        """All pairs of C clips and M texts.

        Args:
            clips: [C, S, video width], of :func:`grid_tokens`.
            words: [M, L, text width], of :meth:`egohod.model.dual_encoder.TextTower.states`.
            mask: bool [M, L], true for words, false for padding.
            cosines: [C, M] of the dual encoder.

        Returns:
            Scores [C, M]; of one clip or one text they are comparable.
        """
        x = self.video_in(clips) + (self.times + self.places).flatten(0, 1)
        texts = self.text_in(words)
        # [M, L, K], padding without weight
        weights = self.part_of_word(texts).masked_fill(~mask[:, :, None], -torch.inf).softmax(dim=1)
        parts = weights.transpose(1, 2) @ texts + self.parts
        # [heads, M K, D / heads], the same for all clips; keys and values are the same for all texts.
        query = self.query(parts).flatten(0, 1).unflatten(1, (self.shape.heads, -1)).transpose(0, 1)
        key, value = self.key_value(x).unflatten(2, (2, self.shape.heads, -1)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(query.expand(len(clips), -1, -1, -1), key, value)
        # [C, M K, D]
        read = F.dropout(self.norm(read.transpose(1, 2).flatten(2)), self.shape.dropout, self.training)
        # A product, not an MLP of both: how well what was read fits the text also holds for texts that are new.
        evidence = torch.einsum("cmkd,mkd->cm", read.unflatten(1, parts.shape[:2]), self.target(parts))
        return self.log_scale.exp() * cosines + evidence

    def save(self, path: Path) -> None:
        """Weights and :class:`RerankerShape` in one safetensors file. Raises :class:`OSError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            write_safetensors(self.state_dict(), temporary, {"reranker": json.dumps(asdict(self.shape))})


def load_reranker(path: str | Path) -> Reranker:
    """What :meth:`Reranker.save` wrote, in evaluation mode. Raises :class:`UserError` for any other file."""
    try:
        with safe_open(path, "pt") as file:
            shape = RerankerShape(**json.loads((file.metadata() or {})["reranker"]))
            sizes = (shape.video_width, shape.text_width, shape.frames, shape.grid, shape.width, shape.parts)
            if not all(type(size) is int and 0 < size <= _LARGEST for size in (*sizes, shape.heads)):
                raise ValueError("its sizes are not valid")
            if shape.width % shape.heads or not isinstance(shape.encoder, str):
                raise ValueError("its settings contradict each other")
            # Without memory of their own until the file's tensors fit: sizes are only claims.
            with torch.device("meta"):
                head = Reranker(shape)
            tensors = {name: file.get_tensor(name).float() for name in head.state_dict()}
            head.load_state_dict(tensors, assign=True)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a reranker of tools/train_reranker.py ({reason})") from error
    if not all(value.isfinite().all() for value in tensors.values()):
        raise UserError(f"{path}: has weights that are NaN or infinite, by which nothing can be ordered")
    return head.eval()
