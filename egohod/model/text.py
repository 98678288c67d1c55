"""Text tower: open_clip's causal transformer, set up to match the published checkpoints key by key."""

from __future__ import annotations

import torch
from open_clip.transformer import TextTransformer
from torch import Tensor

from egohod.model.video import ACTIVATIONS


class TextTower(TextTransformer):
    """open_clip's ``TextTransformer``, which also takes tokens cut off behind the longest text.

    The feature is the projected end-of-text token, the one with the largest id. Attention is causal, so what
    follows that token changes nothing and need not be computed.
    """

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        context_length: int,
        vocab_size: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            context_length=context_length,
            vocab_size=vocab_size,
            width=width,
            heads=heads,
            layers=layers,
            mlp_ratio=mlp_ratio,
            output_dim=embed_dim,
            pool_type="argmax",
            act_layer=ACTIVATIONS[activation],
        )
        for block in self.transformer.resblocks:
            torch.nn.init.zeros_(block.attn.in_proj_bias)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                torch.nn.init.zeros_(linear.bias)
        self.set_grad_checkpointing(gradient_checkpointing)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` int64 [B, L], L up to the context length -> features [B, E], not normalised."""
        B, L = tokens.shape
        x = self.token_embedding(tokens) + self.positional_embedding[:L]
        x = self.transformer(x, attn_mask=self.attn_mask[:L, :L])
        end_of_text = x[torch.arange(B, device=x.device), tokens.argmax(dim=1)]
        return self.ln_final(end_of_text) @ self.text_projection
