"""Where hands and the active object are, read off the patch tokens: an auxiliary task that trains the video tower.

The head is deliberately weak: a patch says how much it speaks for a hand or the object and where the box lies relative
to the patch; each frame's box is the mean over its patches. So the tokens themselves must know where things are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROLES = 3
"""Left hand, right hand, active object."""


class BoxHead(nn.Module):
    """Boxes of every frame from the patch tokens, by a soft arg-max over the frame's patches."""

    def __init__(self, width: int, patches_per_frame: int) -> None:
        super().__init__()
        self.side = round(patches_per_frame**0.5)
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, ROLES)
        self.box = nn.Linear(width, 4 * ROLES)

    def forward(self, patches: Tensor, chosen: Tensor | None, frames: int) -> Tensor:
        """Boxes in shares of the picture: float32 [B, T, 3, 4], left, top, right, bottom.

        ``patches`` [B, N, D] are the patch tokens, frame by frame; ``chosen`` int64 [B, N] tells which of the T * P
        patches they are, None means all of them. A frame without a single token is told nothing about.
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
        said = shares.gather(1, chosen.unsqueeze(2).expand_as(scores)).unsqueeze(3) * boxes
        total = said.new_zeros(B, frames, ROLES, 4)
        frame = (chosen // P).view(B, N, 1, 1).expand_as(said)
        return total.scatter_add(1, frame, said)
