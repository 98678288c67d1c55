"""Low-rank training (LoRA, Hu et al., 2106.09685): frozen weights, each with the product of two small trained matrices.

A weight W [out, in] of a block acts as ``W + alpha / rank * up @ down``, with ``down`` [rank, in] random and ``up``
[out, rank] zero at the start, so that a fresh product changes nothing. :func:`add_low_rank` gives layers of a model
such products in place; :func:`merge_low_rank` adds those of a state dict to their weights.

Names of the model stay: beside ``mlp.c_fc.weight`` there are ``mlp.c_fc.lora.down``, ``.up`` and ``.scale``, beside
``attn.in_proj_weight`` those of ``attn.lora``. So every file loads as before, and a checkpoint is the base and a few
tensors more. The PEFT library moves the weight to ``c_fc.base_layer.weight`` below ``base_model.model.``, adds to the
weights of ``nn.MultiheadAttention`` and subtracts again in each forward pass, which rounds the base, and has no effect
on layers whose weight a model reads without calling them, as timm's EVA does (docs/finetuning.md#low-rank-training).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from egohod.errors import UserError
from egohod.model.config import LoraConfig
from egohod.model.dual_encoder import DualEncoder
from egohod.model.vision import Attention

# A layer within a block of any tower, ours, open_clip's or timm's; those of motion adapters are elsewhere.
_LAYER = re.compile(r"(?:.*\.)?(?:res)?blocks\.\d+\.(attn|mlp)(?:\.(.+))?")
# Projections of attention by their names in open_clip and timm.
_QKV = ("qkv", "q_proj", "k_proj", "v_proj")
_PROJ = ("out_proj", "proj")


class LowRank(nn.Module):
    """What is added to a weight [out, in]: ``scale * up @ down``."""

    scale: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, inputs))
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))
        # Saved with the weights: a file without it could not be merged.
        self.register_buffer("scale", torch.tensor(alpha / rank, device=weight.device))
        # That of nn.Linear, as in the paper's code.
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> what the product adds to the layer's output [..., out]."""
        # Scaling the few weights spares a pass over all tokens.
        return F.linear(F.linear(x, self.down), self.scale * self.up)

    def added_to(self, weight: Tensor) -> Tensor:
        """The whole weight [out, in]."""
        # Outside of a block's call fully_shard looks up its part of the parameter by this name, a DTensor.
        return weight if hasattr(weight, "device_mesh") else weight + self.scale * self.up @ self.down


class LowRankLinear(nn.Linear):
    """A linear layer whose weight has a low-rank part.

    Called, it adds the product's output: then the backward pass computes no gradient of the whole weight, which is a
    third of a layer's work. ``weight`` is the sum, for modules that read it without calling the layer.
    """

    lora: LowRank

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Base and low-rank part [out, in]."""
        return self.lora.added_to(cast(Tensor, self._parameters["weight"]))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        return F.linear(x, cast(Tensor, self._parameters["weight"]), self.bias) + self.lora(x)


class LowRankMultiheadAttention(nn.MultiheadAttention):
    """PyTorch's attention (open_clip's text towers) whose ``in_proj_weight`` has a low-rank part.

    PyTorch takes weights, not layers, so the sum is computed; that is little work beside a batch of texts.
    """

    lora: LowRank

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """Base and low-rank part [3 D, D]."""
        return self.lora.added_to(cast(Tensor, self._parameters["in_proj_weight"]))


def add_low_rank(model: DualEncoder, config: LoraConfig) -> None:
    """Give the layers that ``config`` names a low-rank part, in place, with values from torch's global generator.

    Queries, keys and values that are one matrix share one product. What of the model is trained is left to
    :meth:`DualEncoder.freeze`. Raises :class:`UserError` if the model has no such layer.
    """
    count = 0
    for tower in config.towers:
        # With heads the text tower computes nothing: DistributedDataParallel would wait for its gradients.
        if tower == "textual" and model.heads is not None:
            continue
        for name, module in list(getattr(model, tower).named_modules()):
            if not (match := _LAYER.fullmatch(name)):
                continue
            part, inner = match.groups()
            is_fused = isinstance(module, (Attention, nn.MultiheadAttention))
            if is_fused or (part == "attn" and inner in _QKV):
                kind = "qkv"
            elif isinstance(module, nn.Linear) and (part == "mlp" or inner in _PROJ):
                kind = "mlp" if part == "mlp" else "proj"
            else:
                continue
            if kind not in config.layers:
                continue
            weight = module.in_proj_weight if is_fused else module.weight
            module.lora = LowRank(weight.detach(), config.rank, config.alpha)
            # The class and not the module: its parameters, and who else refers to it, stay as they are. Our own
            # attention has a place for a low-rank part.
            if isinstance(module, nn.MultiheadAttention):
                module.__class__ = LowRankMultiheadAttention
            elif not is_fused:
                assert type(module) in (nn.Linear, NonDynamicallyQuantizableLinear), f"{name} is a {type(module)}"
                module.__class__ = LowRankLinear
            count += 1
    if not count:
        raise UserError(
            f"train.trainable=lora: the model trains no layer of train.lora.layers={list(config.layers)} in "
            f"train.lora.towers={list(config.towers)}"
        )


def merge_low_rank(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """A state dict with every low-rank part added to its weight, under the base model's names; and their number.

    Merged weights are float32, and the same bits on every machine. Raises :class:`UserError` for a part without its
    weight, or of another shape.
    """
    parts = [name.removesuffix(".lora.up") for name in tensors if name.endswith(".lora.up")]
    merged = {name: value for name, value in tensors.items() if ".lora." not in name}
    for layer in parts:
        up, down, scale = (tensors.get(f"{layer}.lora.{name}") for name in ("up", "down", "scale"))
        target = next((name for name in (f"{layer}.weight", f"{layer}.in_proj_weight") if name in merged), None)
        if target is None or up is None or down is None or scale is None:
            raise UserError(
                f"holds a low-rank part of {layer} without all else of it; open the run or checkpoint folder, whose "
                "manifest.json names the file with the other weights"
            )
        base = merged[target].float()
        if up.dim() != 2 or down.dim() != 2 or (up.shape[0], down.shape[1]) != base.shape or scale.numel() != 1:
            raise UserError(f"holds a low-rank part of {layer} of another shape than {target}")
        total = torch.zeros_like(base)
        # A matrix product adds up in an order of its own on each machine, and a run that starts from these weights
        # keeps their checksum (egohod.model.checkpoints.base_of).
        for column, row in zip(up.float().T, down.float(), strict=True):
            total += column.unsqueeze(1) * row
        merged[target] = base + scale.float().reshape(()) * total
    return merged, len(parts)
