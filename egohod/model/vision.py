"""Vision tower: a ViT with joint attention over space and time.

Shape legend: B clips, C channels, T frames, H x W pixels, P patch side, N = T * (H/P) * (W/P) patch tokens
(frame-major), D width, E shared embedding. Parameter names are those of the published checkpoints (and of
OpenAI CLIP inside the blocks), so a state dict needs no renaming.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

ROLES = 3
"""Left hand, right hand, active object."""


class BoxHead(nn.Module):
    """Boxes of every frame from the patch tokens, by a soft arg-max over the frame's patches.

    Deliberately weak: a patch says how much it counts for a hand or the object and where the box is relative to the
    patch; a frame's box is the weighted mean. So the tokens themselves must encode positions.
    """

    def __init__(self, width: int, patches_per_frame: int) -> None:
        super().__init__()
        self.side = round(patches_per_frame**0.5)
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, ROLES)
        self.box = nn.Linear(width, 4 * ROLES)

    def forward(self, patches: Tensor, chosen: Tensor | None, frames: int) -> Tensor:
        """Boxes in shares of the picture: float32 [B, T, 3, 4], left, top, right, bottom.

        ``patches`` [B, N, D] are the patch tokens, frame by frame; ``chosen`` int64 [B, N] tells which of the T * P
        patches they are, None means all of them. Boxes of a frame without a single token are zero.
        """
        B, N, _ = patches.shape
        P = self.side**2
        x = self.norm(patches)
        scores = self.score(x).float()
        centre, size = self.box(x).float().view(B, N, ROLES, 2, 2).unbind(3)
        if chosen is None:
            chosen = torch.arange(N, device=x.device).expand(B, N)
        place = chosen % P
        patch = (torch.stack((place % self.side, place // self.side), dim=2) + 0.5) / self.side
        centre, size = patch.unsqueeze(2) + centre, size.sigmoid()
        boxes = torch.cat((centre - size / 2, centre + size / 2), dim=3)
        # Frames differ in how many tokens patch dropout leaves them: absent patches get no say.
        shares = scores.new_full((B, frames * P, ROLES), -1e4).scatter(1, chosen.unsqueeze(2).expand_as(scores), scores)
        shares = shares.view(B, frames, P, ROLES).softmax(dim=2).flatten(1, 2)
        weighted = shares.gather(1, chosen.unsqueeze(2).expand_as(scores)).unsqueeze(3) * boxes
        total = weighted.new_zeros(B, frames, ROLES, 4)
        frame = (chosen // P).view(B, N, 1, 1).expand_as(weighted)
        return total.scatter_add(1, frame, weighted)


LAYER_NORM_EPS = 1e-6
"""Of every LayerNorm in the vision tower; the text tower keeps PyTorch's 1e-5."""

SHORT = 320
"""Tokens up to which a CPU attends by plain matrix products (docs/benchmarks.md)."""


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI trained CLIP with."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class Attention(nn.Module):
    """Multi-head self-attention; the names of ``nn.MultiheadAttention``, without its detours."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        assert width % heads == 0, "width must be a multiple of heads"
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        """``x`` [B, N, D] -> [B, keep or N, D]: the first ``keep`` tokens ask, all tokens answer."""
        B, N, D = x.shape
        if keep is None:
            qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, N, 3, self.heads, -1)
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            (query_weight, memory_weight) = self.in_proj_weight.split((D, 2 * D))
            (query_bias, memory_bias) = self.in_proj_bias.split((D, 2 * D))
            query = F.linear(x[:, :keep], query_weight, query_bias).view(B, keep, self.heads, -1).transpose(1, 2)
            memory = F.linear(x, memory_weight, memory_bias).view(B, N, 2, self.heads, -1)
            key, value = memory.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(query, key, value)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention: ``query`` [B, heads, Q, d], ``key`` and ``value`` [B, heads, N, d] -> [B, heads, Q, d]."""
    if query.device.type == "cpu" and key.shape[2] <= SHORT:
        # A third of a small model's step: PyTorch's fused kernel for CPUs is slow on few tokens going backward.
        scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)
        return scores.softmax(dim=3) @ value
    return F.scaled_dot_product_attention(query, key, value)


class MLP(nn.Module):
    """Two layers with the activation between."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., D] -> [..., D]."""
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth, initialised for a stack of ``depth`` of them."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: str, drop_path: float, depth: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        hidden = int(width * mlp_ratio)
        self.ln_1 = norm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = norm(width)
        self.mlp = MLP(width, hidden, activation)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.adapter: nn.Module | None = None
        """Of the fast path, see :mod:`egohod.model.slowfast`; the block itself does not use it."""
        residual_std = width**-0.5 * (2 * depth) ** -0.5
        self._initialise(self.attn.in_proj_weight, self.attn.in_proj_bias, width**-0.5)
        self._initialise(self.attn.out_proj.weight, self.attn.out_proj.bias, residual_std)
        self._initialise(self.mlp.c_fc.weight, self.mlp.c_fc.bias, (2 * width) ** -0.5)
        self._initialise(self.mlp.c_proj.weight, self.mlp.c_proj.bias, residual_std)

    @staticmethod
    def _initialise(weight: Tensor, bias: Tensor, std: float) -> None:
        nn.init.normal_(weight, std=std)
        nn.init.zeros_(bias)

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        """``x`` [B, N, D] -> [B, keep or N, D]; tokens that nobody reads afterwards need not leave the block."""
        x = x[:, :keep] + self.drop_path(self.attn(self.ln_1(x), keep))
        return x + self.drop_path(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """A stack of blocks, optionally recomputed in the backward pass."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        activation: str,
        drop_path: float,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        rates = [drop_path * i / max(1, layers - 1) for i in range(layers)]
        self.resblocks = nn.ModuleList(Block(width, heads, mlp_ratio, activation, rate, layers) for rate in rates)
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        """``x`` [B, N, D] -> [B, keep or N, D]."""
        last = len(self.resblocks) - 1
        for i, block in enumerate(self.resblocks):
            tokens_out = keep if i == last else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, tokens_out, use_reentrant=False)
            else:
                x = block(x, tokens_out)
        return x


class VideoTransformer(nn.Module):
    """ViT over the patches of all frames and one CLS token.

    A patch's position is a spatial embedding (shared by the frames) plus a temporal one (shared by the
    patches of a frame). Patch embedding is a Linear without bias over flattened patches, order (C, h, w).
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        num_frames: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        temporal_init: str = "zeros",
        spatial_init: str = "random",
        sinusoid_scale: float = 0.5,
        patch_dropout: float = 0.0,
        patch_dropout_tubes: bool = False,
        drop_path: float = 0.0,
        gradient_checkpointing: bool = False,
        boxes: bool = False,
    ) -> None:
        super().__init__()
        assert image_size % patch_size == 0, "the image must be whole patches"
        self.image_size, self.patch_size = image_size, patch_size
        self.patch_dropout, self.patch_dropout_tubes = patch_dropout, patch_dropout_tubes
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + (image_size // patch_size) ** 2, width))
        self.temporal_embedding = nn.Parameter(torch.empty(num_frames, width))
        self.conv1 = nn.Linear(3 * patch_size**2, width, bias=False)
        self.ln_pre = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.transformer = Transformer(width, layers, heads, mlp_ratio, activation, drop_path, gradient_checkpointing)
        self.ln_post = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.image_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.box_head = BoxHead(width, (image_size // patch_size) ** 2) if boxes else None
        self._initialise(temporal_init, spatial_init, sinusoid_scale)

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled methods: in a copy they would still compute with this tower's weights."""
        return {name: value for name, value in super().__getstate__().items() if not hasattr(type(self), name)}

    @torch.no_grad()
    def _initialise(self, temporal_init: str, spatial_init: str, sinusoid_scale: float) -> None:
        """CLIP's scheme: standard deviations from the width."""
        frames, width = self.temporal_embedding.shape
        nn.init.normal_(self.class_embedding, std=width**-0.5)
        nn.init.normal_(self.positional_embedding, std=width**-0.5)
        nn.init.normal_(self.image_projection, std=width**-0.5)
        nn.init.normal_(self.conv1.weight, std=self.conv1.in_features**-0.5)
        if temporal_init == "zeros":
            nn.init.zeros_(self.temporal_embedding)
        else:
            self.temporal_embedding.copy_(sinusoid_scale * sinusoids(frames, width))
        if spatial_init == "sinusoidal":
            side = self.image_size // self.patch_size
            waves = sinusoid_scale * sinusoids(side, width // 2)
            # Half of the channels tell the row, half the column.
            rows, columns = waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)
            self.positional_embedding[1:] = torch.cat((rows, columns), dim=1)

    def forward(self, video: Tensor) -> Tensor:
        """``video`` [B, 3, T, H, W], normalised -> [B, E], not normalised.

        Only CLS is pooled, so only CLS passes the last block; that is exact and spares most of a block.
        """
        x, _ = self.embed(video)
        return self.ln_post(self.transformer(x, keep=1)[:, 0]) @ self.image_projection

    def forward_with_boxes(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """As calling it, and the boxes of all frames from the same tokens: [B, E] and [B, T, 3, 4]."""
        assert self.box_head is not None, "the tower was built without boxes"
        x, chosen = self.embed(video)
        x = self.transformer(x)
        boxes: Tensor = self.box_head(x[:, 1:], chosen, video.shape[2])
        return self.ln_post(x[:, 0]) @ self.image_projection, boxes

    def tokens(self, video: Tensor) -> Tensor:
        """All tokens behind the last block, CLS first, then frame by frame: [B, 1 + N, D]."""
        x: Tensor = self.transformer(self.embed(video)[0])
        return x

    def embed(self, video: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor | None]:
        """Tokens in front of the first block: [B, 1 + N, D], fewer with patch dropout while training.

        The second value tells which of the T * P patches they are, int64 [B, N], None for all.

        Any frame count is taken; the temporal embedding is interpolated to it. ``frozen`` (of the fast path, see
        :mod:`egohod.model.slowfast`) takes the class and spatial embedding and ``ln_pre`` as constants.
        """
        B, C, T, H, W = video.shape
        P = self.patch_size
        assert H == W == self.image_size, f"expected {self.image_size} px frames, got {H} x {W}"
        patches = video.view(B, C, T, H // P, P, W // P, P).permute(0, 2, 3, 5, 1, 4, 6).reshape(B, -1, C * P * P)
        positions, chosen = self.positions(T, frozen), None
        if self.training and self.patch_dropout > 0:
            # Dropping pixels instead of embedded tokens spares their embedding too.
            chosen = self._chosen(B, T, patches.shape[1] // T, video.device)
            patches = patches.gather(1, chosen.unsqueeze(2).expand(-1, -1, patches.shape[2]))
            placed = self.conv1(patches) + F.embedding(chosen, positions)
        else:
            placed = self.conv1(patches) + positions
        first = (self.class_embedding + self.positional_embedding[0]).expand(B, 1, -1)
        if frozen:
            x = torch.cat((first.detach().to(placed.dtype), placed), dim=1)
            return functional_call(self.ln_pre, detached(self.ln_pre), x), chosen
        return self.ln_pre(torch.cat((first.to(placed.dtype), placed), dim=1)), chosen

    def _chosen(self, B: int, T: int, P: int, device: torch.device) -> Tensor:
        """Numbers of the patches that dropout leaves of T frames with P patches each: int64 [B, kept]."""
        share = 1 - self.patch_dropout
        if not self.patch_dropout_tubes:
            return torch.rand(B, T * P, device=device).topk(max(1, round(T * P * share)), dim=1, sorted=False).indices
        # The same places in all frames, so that what moves there can be followed.
        places = torch.rand(B, P, device=device).topk(max(1, round(P * share)), dim=1, sorted=False).indices
        frames = P * torch.arange(T, device=device)
        return (frames.view(1, T, 1) + places.unsqueeze(1)).flatten(1)

    def positions(self, frames: int, frozen: bool = False) -> Tensor:
        """Spatial plus temporal embedding of every patch of ``frames`` frames: [N, D]."""
        temporal: Tensor = self.temporal_embedding
        if frames != temporal.shape[0]:
            temporal = F.interpolate(temporal.T[None], size=frames, mode="linear", align_corners=False)[0].T
        spatial = self.positional_embedding[1:]
        return ((spatial.detach() if frozen else spatial) + temporal.unsqueeze(1)).flatten(0, 1)


def detached(module: nn.Module) -> dict[str, Tensor]:
    """A module's own weights as constants, for ``functional_call``: gradients pass through, none is theirs."""
    return {name: value.detach() for name, value in module.named_parameters() if not name.startswith("adapter.")}


def sinusoids(positions: int, width: int) -> Tensor:
    """Sine and cosine waves over a position (frame, row or column): [positions, width], values in [-1, 1].

    Periods run from two positions (neighbours differ) to four times the range (it never wraps around).
    """
    rates = torch.logspace(math.log10(math.pi), math.log10(math.pi / (2 * positions)), (width + 1) // 2)
    angles = torch.arange(positions).unsqueeze(1) * rates
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)[:, :width]
