"""What a clip costs: floating point operations by formula and by count, memory by counting saved bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from egohod.model.zoo import Geometry

_aten = torch.ops.aten


def forward_flops(geometry: Geometry, num_frames: int, text_length: int, patch_dropout: float = 0.0) -> int:
    """Operations (2 per multiply-add) of the matrix products of one clip and one text, forward.

    Args:
        geometry: sizes of both towers.
        num_frames: frames per clip.
        text_length: tokens computed per text, padding included.
        patch_dropout: share of patch tokens left out.
    """
    return round(sum(_parts(geometry, num_frames, text_length, patch_dropout)))


def step_flops(geometry: Geometry, num_frames: int, text_length: int, patch_dropout: float = 0.0) -> int:
    """Operations of one clip and one text, forward and backward; without recomputation of blocks.

    The backward pass costs twice the forward pass, but pixels need no gradient, and attention recomputes
    its scores (five products for two).
    """
    embedding, attention, rest = _parts(geometry, num_frames, text_length, patch_dropout)
    return round(2 * embedding + 3.5 * attention + 3 * rest)


def _parts(geometry: Geometry, num_frames: int, text_length: int, patch_dropout: float) -> tuple[float, float, float]:
    """Patch embedding, attention (scores and mixing), all other products."""
    W, M = geometry.vision_width, geometry.mlp_ratio
    patches = max(1, round(num_frames * geometry.patches_per_frame * (1 - patch_dropout)))
    N = patches + 1
    embedding = 2 * patches * 3 * geometry.patch_size**2 * W
    # The last block computes keys and values of all tokens, but queries and all that follows for CLS only.
    full = geometry.vision_layers - 1
    attention = 4.0 * N * N * W * full + 4 * N * W
    linear = 2 * W * W * (4 + 2 * M)
    rest = N * linear * full + N * 4 * W * W + linear - 4 * W * W + 2 * W * geometry.embed_dim
    V, L = geometry.text_width, text_length
    attention += 4 * L * L * V * geometry.text_layers
    rest += L * 2 * V * V * (4 + 2 * M) * geometry.text_layers + 2 * V * geometry.embed_dim
    return embedding, attention, rest


def count_flops(run: Callable[[], Any]) -> int:
    """Operations of the matrix products that ``run()`` performs, counted as they happen."""

    # PyTorch counts the attention kernels of GPUs only.
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )
    with counter:
        run()
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass of what ``run()`` computes, parameters left out.

    Each storage counts once. A measure of memory that is the same on every machine.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Transposed weights and the like are views that share the parameter's storage.
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # kept alive, so that no storage is freed and its address used twice
    del result
    return sum(storages.values())
