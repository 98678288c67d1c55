"""The motion adapter: a temporal convolution beside a transformer that looks at each frame's patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL = 3
"""Frames that the temporal convolution sees at once."""


class MotionAdapter(nn.Module):
    """Bottleneck with a depth-wise convolution over time at each location (EgoHOD, section 3.3).

    ``x + gamma * up(h + pointwise(depthwise(h)))`` with ``h = gelu(down(x))``, on patch tokens only; CLS passes
    untouched. ``up`` starts at zero, so a fresh adapter changes nothing. ``spatial`` adds a 3 x 3 convolution over
    each frame before the temporal one, which upstream has in commented form.
    """

    def __init__(self, width: int, spatial: bool = False) -> None:
        super().__init__()
        hidden = width // 2
        self.gamma = nn.Parameter(torch.ones(1))
        self.down_proj = nn.Linear(width, hidden)
        self.dwconv = nn.Conv1d(hidden, hidden, KERNEL, padding=KERNEL // 2, groups=hidden)
        self.conv = nn.Conv1d(hidden, hidden, 1)
        self.conv2d = nn.Conv2d(hidden, hidden, 3, padding=1) if spatial else None
        self.up_proj = nn.Linear(hidden, width)
        # Upstream says truncated normal, whose default bounds lie a hundred standard deviations away.
        nn.init.normal_(self.down_proj.weight, std=0.02)
        nn.init.normal_(self.dwconv.weight, std=(2 / KERNEL) ** 0.5)
        nn.init.normal_(self.conv.weight, std=(2 / hidden) ** 0.5)
        nn.init.zeros_(self.up_proj.weight)
        for layer in (self.down_proj, self.dwconv, self.conv, self.up_proj):
            bias = layer.bias
            assert bias is not None
            nn.init.zeros_(bias)
        if self.conv2d is not None:
            nn.init.normal_(self.conv2d.weight, std=(2 / (9 * hidden)) ** 0.5)
            assert self.conv2d.bias is not None
            nn.init.zeros_(self.conv2d.bias)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """``x`` [B, 1 + frames * P, D], CLS first, then frame by frame with P patches each -> the same shape."""
        B, N, _ = x.shape
        P = (N - 1) // frames
        assert frames * P == N - 1, f"{N - 1} patch tokens are no {frames} frames"
        cls, patches = x[:, :1], x[:, 1:]
        h = F.gelu(self.down_proj(patches)).view(B, frames, P, -1)
        # A point-wise convolution is a product with a matrix.
        mixed = F.linear(self._over_time(self._over_space(h)), self.conv.weight.squeeze(2), self.conv.bias)
        # Scaling the few weights instead of all tokens spares keeping the tokens for gamma's gradient.
        up = F.linear((h + mixed).flatten(1, 2), self.gamma * self.up_proj.weight, self.gamma * self.up_proj.bias)
        return torch.cat((cls, patches + up), dim=1)

    def _over_space(self, h: Tensor) -> Tensor:
        if self.conv2d is None:
            return h
        B, T, P, C = h.shape
        side = round(P**0.5)
        assert side * side == P, "the spatial branch needs whole frames, so no patch dropout"
        return self.conv2d(h.reshape(B * T, side, side, C).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(B, T, P, C)

    def _over_time(self, h: Tensor) -> Tensor:
        """The depth-wise convolution of ``h`` [B, T, P, C] as shifted products: the channels need not be moved."""
        assert self.dwconv.bias is not None
        weight = self.dwconv.weight.squeeze(1).T.to(h.dtype)
        padded = F.pad(h, (0, 0, 0, 0, KERNEL // 2, KERNEL // 2))
        frames = h.shape[1]
        mixed = self.dwconv.bias.to(h.dtype) + padded[:, :frames] * weight[0]
        for shift in range(1, KERNEL):
            mixed = mixed + padded[:, shift : shift + frames] * weight[shift]
        return mixed
