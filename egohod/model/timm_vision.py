"""Vision towers on timm's backbones: plain vision transformers (CLIP, SigLIP, DINOv2) and EVA (EVA-CLIP, PE, DINOv3).

A backbone embeds patches and places as it does those of a picture; the frames' patches then go through its blocks
together, behind its prefix tokens, and its own norm and pooling make one vector of them. A clip of one frame so has the
features of timm's image model. Rotary positions (RoPE) are those of a picture in each frame.

Parameters have timm's names, with ``transformer.resblocks`` for its ``blocks``. Initial weights are timm's, from
torch's global generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import timm
import torch
from timm.layers import LayerNorm, apply_rot_embed_cat, global_pool_nlc
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import SDPBackend

from egohod.errors import UserError
from egohod.model.config import Geometry, ModelConfig
from egohod.model.vision import (
    BoxHead,
    LowPrecisionLayerNorm,
    MotionStem,
    SlowFastTower,
    Transformer,
    VisionTower,
    attend,
    call_frozen,
)

# Slowest rotation by time in radians a frame is 1 / TIME_BASE, as in language models and EVA's rotations by place.
TIME_BASE = 10000.0


class TimmBlock(nn.Module):
    """A block of timm with its parts under their names, which attends as this project's blocks do.

    That is: by the kernels of ``model.attention``, for the first tokens only where no others are read, and with
    residuals in the type of the tokens. Norms are in front of attention and MLP or behind them.
    """

    norm1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, _low_precision_norms(part))
        # EVA's layer scale.
        for name in ("gamma_1", "gamma_2"):
            self.register_parameter(name, getattr(block, name, None))
        self.norm_first = type(block).__name__ in ("Block", "EvaBlock")
        # A MotionAdapter of the fast path; the block itself does not use it.
        self.adapter: nn.Module | None = None
        self.kernels: list[SDPBackend] = []

    def forward(self, x: Tensor, keep: int | None = None, rotation: Tensor | None = None) -> Tensor:
        """``x`` [B, N, D] -> [B, keep or N, D]; ``rotation`` [N - prefix, 2 d] or with dimensions in front of these."""
        if self.norm_first:
            x = x[:, :keep] + self.drop_path1(self._scaled(1, self._attention(self.norm1(x), keep, rotation)))
            return x + self.drop_path2(self._scaled(2, self.mlp(self.norm2(x))))
        x = x[:, :keep] + self.drop_path1(self.norm1(self._attention(x, keep, rotation)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))

    def _scaled(self, which: int, x: Tensor) -> Tensor:
        """Layer scale of the attention (1) or the MLP (2), in the type of ``x``: float32 would widen the residuals."""
        gamma = getattr(self, f"gamma_{which}")
        if gamma is None:
            gamma = getattr(getattr(self, f"ls{which}", None), "gamma", None)
        return x if gamma is None else x * gamma.to(x.dtype)

    def _attention(self, x: Tensor, keep: int | None, rotation: Tensor | None) -> Tensor:
        attn: Any = self.attn
        B, N, _ = x.shape
        heads, d = attn.num_heads, attn.head_dim
        groups = getattr(attn, "num_kv_heads", heads)
        if attn.qkv is None:
            query, key, value = attn.q_proj(x[:, :keep]), attn.k_proj(x), attn.v_proj(x)
        else:
            weight, bias = attn.qkv.weight, attn.qkv.bias
            if getattr(attn, "q_bias", None) is not None:  # EVA's keys have none
                bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            if keep is None:
                query, key, value = nn.functional.linear(x, weight, bias).chunk(3, dim=2)
            else:
                inner = heads * d
                biases = (None, None) if bias is None else bias.split((inner, 2 * inner))
                query = nn.functional.linear(x[:, :keep], weight[:inner], biases[0])
                key, value = nn.functional.linear(x, weight[inner:], biases[1]).chunk(2, dim=2)
        query = attn.q_norm(query.reshape(B, -1, heads, d).transpose(1, 2))
        key = attn.k_norm(key.reshape(B, N, groups, d).transpose(1, 2))
        value = value.reshape(B, N, groups, d).transpose(1, 2)
        if rotation is not None:
            # The queries of CLS alone have no place.
            query = query if keep else _rotated(query, rotation, attn.rotate_half)
            key = _rotated(key, rotation, attn.rotate_half)
        # A norm in float32 leaves its type, and kernels need one of all three.
        query, key = query.to(value.dtype), key.to(value.dtype)
        if groups != heads:
            key, value = (each.repeat_interleave(heads // groups, dim=1) for each in (key, value))
        mixed = attn.norm(attend(query, key, value, self.kernels).transpose(1, 2).flatten(2))
        if attn.gate is not None:
            mixed = mixed * attn.gate(x[:, :keep]).sigmoid()
        return attn.proj(mixed)


class TimmTransformer(VisionTower):
    """A tower on the backbone ``shape.backbone``; see the module."""

    STEM = (*VisionTower.STEM, "patch_embed.", "cls_token", "reg_token", "pos_embed", "norm_pre.", "rope.")
    HEAD = (*VisionTower.HEAD, "norm.", "fc_norm.", "attn_pool.")
    NORM = "norm_pre"
    BOTH_PATHS = (*VisionTower.BOTH_PATHS, "patch_embed.")

    def __init__(self, shape: Geometry, config: ModelConfig, boxes: bool = False) -> None:
        super().__init__(shape, config)
        model = _backbone(shape, config)
        width, side = shape.vision_width, shape.image_size // shape.patch_size
        self.global_pool, self.rope_time = shape.pool, config.rope_time
        self.num_frames = config.num_frames
        self.patch_embed = model.patch_embed
        self.cls_token, self.reg_token, self.pos_embed = model.cls_token, model.reg_token, model.pos_embed
        self.rope = getattr(model, "rope", None)
        self.norm_pre = _low_precision_norms(model.norm_pre)
        self.temporal_embedding = nn.Parameter(torch.empty(config.num_frames, width))
        self.transformer = Transformer((TimmBlock(block) for block in model.blocks), config)
        self.norm, self.fc_norm = _low_precision_norms(model.norm), _low_precision_norms(model.fc_norm)
        self.attn_pool = None if model.attn_pool is None else _low_precision_norms(model.attn_pool)
        # EVA's attention pooling reads registers too, and CLS; that of the plain family does not.
        self.pools_prefix = bool(getattr(model, "pool_include_prefix", True))
        self.pooled_prefix = bool(getattr(model, "pool_include_prefix", False))
        self.image_projection = None
        self.image_projection_bias = None
        if shape.projection != "none":
            self.image_projection = nn.Parameter(torch.empty(width, shape.embed_dim))
        if shape.projection == "linear":
            self.image_projection_bias = nn.Parameter(torch.zeros(shape.embed_dim))
        self.box_head = BoxHead(width, side**2) if boxes else None
        self.motion_stem = None
        with torch.no_grad():
            if self.image_projection is not None:
                nn.init.normal_(self.image_projection, std=width**-0.5)
            self.init_temporal(config)
            if config.spatial_init == "sinusoidal":
                if self.pos_embed is None:
                    raise UserError(f"model.spatial_init=sinusoidal: {shape.name} has no learned positions to fill")
                self.pos_embed[0, -(side**2) :] = self.spatial_waves(config, width)
        # Last, so that the tower's other weights are those of the same seed without a stem.
        if config.motion_stem:
            self.motion_stem = MotionStem(width, side, shape.patch_size, config.motion_stem)

    def embed_patches(self, patches: Tensor) -> Tensor:
        """See the base class."""
        convolution = self.patch_embed.proj
        # A convolution whose stride is its kernel is a product with flattened patches.
        embedded = nn.functional.linear(patches, convolution.weight.flatten(1), convolution.bias)
        normed: Tensor = self.patch_embed.norm(embedded)
        return normed

    def places(self) -> tuple[Tensor, Tensor]:
        """CLS and registers, with their positions where the backbone has any, and the places of a frame."""
        tokens = [each[0] for each in (self.cls_token, self.reg_token) if each is not None]
        first = torch.cat(tokens) if tokens else self.temporal_embedding[:0]
        number = (self.image_size // self.patch_size) ** 2
        if self.pos_embed is None:
            return first, self.temporal_embedding.new_zeros(number, 1)
        positions: Tensor = self.pos_embed[0]
        if len(positions) > number:
            first = first + positions[: len(first)]
        return first, positions[-number:]

    def rotations(self, frames: int, chosen: Tensor | None) -> Sequence[Tensor] | None:
        """Sine and cosine for each block, [N, 2 d] or with heads, or clips of patch dropout, in front of these."""
        if self.rope is None:
            return None
        # Those of models without a grid of their own need it.
        has_grid = getattr(self.rope, "feat_shape", None) is not None
        places = self.rope.get_embed() if has_grid else self.rope.get_embed(shape=self.patch_embed.grid_size)
        rotation = places.repeat(*(1,) * (places.dim() - 2), frames, 1)
        if self.rope_time:
            rotation = self._with_time(rotation, frames)
        depth = len(self.transformer.resblocks)
        # Of the kind "mixed" each block and head has its own.
        each = list(rotation.unbind(0)) if rotation.dim() == 4 else [rotation] * depth
        if chosen is None:
            return each
        # [N, 2 d] -> [B, 1, n, 2 d], and [heads, N, 2 d] -> [B, heads, n, 2 d]; once where all blocks have the same.
        if rotation.dim() == 2:
            return [rotation[chosen].unsqueeze(1)] * depth
        return [one[:, chosen.flatten()].unflatten(1, chosen.shape).transpose(0, 1) for one in each]

    def _with_time(self, rotation: Tensor, frames: int) -> Tensor:
        """Rotations by place turned on by time, on all channels: the sine and cosine of the sum of both angles."""
        sine, cosine = rotation.chunk(2, dim=-1)
        d = sine.shape[-1]
        rates = TIME_BASE ** (-torch.arange(0, d, 2, device=sine.device, dtype=torch.float32) / d)
        # Pairs of channels are neighbours, or one in each half.
        half = self.transformer.resblocks[0].attn.rotate_half  # type: ignore[union-attr]
        rates = rates.repeat(2) if half else rates.repeat_interleave(2)
        # Another number of frames covers the same clip, as for the temporal embedding.
        times = (torch.arange(frames, device=sine.device) + 0.5) * (self.num_frames / frames) - 0.5
        angles = (times.unsqueeze(1) * rates).repeat_interleave(sine.shape[-2] // frames, dim=0)
        by_time, along = angles.sin(), angles.cos()
        return torch.cat((sine * along + cosine * by_time, cosine * along - sine * by_time), dim=-1)

    def pooled(self, x: Tensor, frozen: bool = False, pool: str = "cls") -> Tensor:
        """See the base class; ``cls`` is the backbone's own pooling, of CLS or otherwise."""

        def run(module: nn.Module, *inputs: Tensor) -> Tensor:
            output: Tensor = call_frozen(module, *inputs) if frozen else module(*inputs)
            return output

        prefix = self.prefix_tokens
        x = run(self.norm, x)
        ways = []
        if pool in ("cls", "both"):
            if self.attn_pool is not None:
                ways.append(run(self.attn_pool, x if self.pools_prefix else x[:, prefix:]))
            else:
                ways.append(global_pool_nlc(x, self.global_pool, prefix, self.pooled_prefix))
        if pool in ("mean", "both"):
            ways.append(x[:, prefix:].mean(dim=1))
        x = run(self.fc_norm, ways[0] if len(ways) == 1 else (ways[0] + ways[1]) / 2)
        if self.image_projection is None:
            return x
        # The projection is trained by both paths.
        x = x @ self.image_projection
        return x if self.image_projection_bias is None else x + self.image_projection_bias


class TimmSlowFast(SlowFastTower, TimmTransformer):
    """A tower on a timm backbone on two paths."""


def _backbone(shape: Geometry, config: ModelConfig) -> Any:
    """timm's model with fresh weights; also on fake tensors, as for predictions of memory."""
    with ExitStack() as stack:
        # timm reads numbers from tensors while it builds, which fake ones do not have.
        is_fake = stack.enter_context(unset_fake_temporarily()) is not None
        if is_fake:
            stack.enter_context(torch.device("meta"))
        model = timm.create_model(
            shape.backbone,
            num_classes=0,
            # Rotations are then computed once.
            dynamic_img_size=False,
            drop_path_rate=config.drop_path,
            **dict(shape.backbone_options),
        )
    for part in model.modules() if is_fake else ():
        for name, value in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(value.shape, dtype=value.dtype)))
        for name, value in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(value.shape, dtype=value.dtype))
    return model


def _rotated(x: Tensor, rotation: Tensor, half: bool) -> Tensor:
    """``x`` [B, heads, N, d] with all tokens but those in front of the places of ``rotation`` turned by them."""
    prefix = x.shape[2] - rotation.shape[-2]
    return torch.cat((x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rotation, half=half)), dim=2)


def _low_precision_norms(module: nn.Module) -> nn.Module:
    """``module`` with its layer norms replaced by those that keep the type of half-precision tokens."""
    # Exactly these classes: subclasses compute in float32 on purpose.
    if isinstance(module, nn.LayerNorm) and type(module) in (nn.LayerNorm, LayerNorm) and module.weight is not None:
        norm = LowPrecisionLayerNorm(module.normalized_shape, eps=module.eps)
        norm.weight, norm.bias = module.weight, module.bias
        return norm
    for name, part in module.named_children():
        setattr(module, name, _low_precision_norms(part))
    return module
