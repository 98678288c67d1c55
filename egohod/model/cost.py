"""What a clip costs: floating point operations by formula and by count, memory by counting saved bytes."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from egohod.loss.config import LossConfig
from egohod.model.config import FastPathConfig, ModelConfig
from egohod.model.dual_encoder import create_model
from egohod.model.vision import ROLES, SHORT, Block
from egohod.model.zoo import Geometry

_aten = torch.ops.aten


Part = tuple[float, float]
"""Operations forward, and how many times as many the backward pass takes."""

PIXELS, FUSED, TRAINED, FROZEN = 1.0, 2.5, 2.0, 1.0
"""Pixels need no gradient; fused attention computes its scores again (five products for two); a product with trained
weights has two gradients, as has one of two activations; one with frozen weights has only that of its input."""


def forward_flops(
    geometry: Geometry,
    num_frames: int,
    text_length: int,
    patch_dropout: float = 0.0,
    fast: FastPathConfig | None = None,
    boxes: bool = False,
) -> int:
    """Operations (2 per multiply-add) of the matrix products of one clip and one text, forward.

    Args:
        geometry: sizes of both towers.
        num_frames: frames per clip.
        text_length: tokens computed per text, padding included.
        patch_dropout: share of patch tokens left out.
        fast: the paths of a slow-fast geometry (default: as the configuration's).
        boxes: whether there is a box head, which reads all tokens behind the last block.
    """
    return round(sum(work for work, _ in _parts(geometry, num_frames, text_length, patch_dropout, fast, boxes)))


def step_flops(
    geometry: Geometry,
    num_frames: int,
    text_length: int,
    patch_dropout: float = 0.0,
    fast: FastPathConfig | None = None,
    boxes: bool = False,
) -> int:
    """Operations of one clip and one text, forward and backward; without recomputation of blocks."""
    parts = _parts(geometry, num_frames, text_length, patch_dropout, fast, boxes)
    return round(sum(work * (1 + backward) for work, backward in parts))


def _parts(
    geometry: Geometry,
    num_frames: int,
    text_length: int,
    patch_dropout: float,
    fast: FastPathConfig | None,
    boxes: bool,
) -> list[Part]:
    V, L, E = geometry.text_width, text_length, geometry.embed_dim
    text = [
        (4.0 * L * L * V * geometry.text_layers, FUSED),
        (L * 2.0 * V * V * (4 + 2 * geometry.mlp_ratio) * geometry.text_layers + 2 * V * E, TRAINED),
    ]
    head = [(_patches(geometry, num_frames, patch_dropout) * 2.0 * geometry.vision_width * 5 * ROLES, TRAINED)]
    if not geometry.slowfast:
        return [*text, *_path(geometry, num_frames, patch_dropout, boxes), *(head if boxes else [])]
    fast = fast or FastPathConfig()
    return [
        *text,
        *_path(geometry, fast.slow_frames, patch_dropout, whole=False),
        *_fast_path(geometry, num_frames, patch_dropout, fast, boxes),
        (2.0 * 2 * E * E, TRAINED),
        *(head if boxes else []),
    ]


def _patches(geometry: Geometry, frames: int, patch_dropout: float) -> int:
    if geometry.slowfast:  # whose dropout leaves the same places in all frames
        return frames * max(1, round(geometry.patches_per_frame * (1 - patch_dropout)))
    return max(1, round(frames * geometry.patches_per_frame * (1 - patch_dropout)))


def _path(geometry: Geometry, frames: int, patch_dropout: float, whole: bool) -> list[Part]:
    """The plain tower; unless it is ``whole``, its last block computes all but keys and values for CLS only."""
    W, patches = geometry.vision_width, _patches(geometry, frames, patch_dropout)
    N, linear = patches + 1, 2.0 * W * W * (4 + 2 * geometry.mlp_ratio)
    attention, blocks = 4.0 * N * N * W * geometry.vision_layers, N * linear * geometry.vision_layers
    if not whole:
        attention -= 4.0 * N * (N - 1) * W
        blocks -= (N - 1) * (linear - 4.0 * W * W)
    return [
        (patches * 6.0 * geometry.patch_size**2 * W, PIXELS),
        (attention, FUSED if N > SHORT else TRAINED),
        (blocks + 2.0 * W * geometry.embed_dim, TRAINED),
    ]


def _fast_path(geometry: Geometry, frames: int, patch_dropout: float, fast: FastPathConfig, boxes: bool) -> list[Part]:
    """The tower with frozen blocks and trained adapters."""
    W, patches, layers = geometry.vision_width, _patches(geometry, frames, patch_dropout), geometry.vision_layers
    whole = boxes or fast.pool != "cls" or fast.position != "before"
    pixels, attention, (blocks, _) = _path(geometry, frames, patch_dropout, whole)
    projection = 2.0 * W * geometry.embed_dim
    adapter = patches * (2.5 + (4.5 if fast.spatial else 0)) * W * W
    return [pixels, attention, (blocks - projection, FROZEN), (adapter * layers, TRAINED), (projection, TRAINED)]


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


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of what ``run()`` computes, the weights of ``model`` left out.

    Each storage counts once. A measure of memory that is the same on every machine.
    """
    # By storage, because transposed and frozen weights are other tensors.
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # kept alive, so that no storage is freed and its address used twice
    del result
    return sum(storages.values())


# What batches may take of a device: the rest is for copies of weights, fragmentation and the next batch.
SHARE = 0.8


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    state: int
    """Weights, and of those that learn gradients and the optimizer's averages, in float32; and what else does not
    depend on the batch."""
    per_clip: int
    """Kept for the backward pass of one clip with its text."""
    working: int
    """Needed besides per clip while a checkpointed block is computed again."""

    def peak(self, micro_batch: int) -> int:
        """Most memory in use with ``micro_batch`` clips at a time."""
        return self.state + micro_batch * (self.per_clip + self.working)

    def fits(self, memory: float) -> int:
        """Clips at a time that a device of ``memory`` bytes holds, with some room to spare."""
        return int((memory * SHARE - self.state) // (self.per_clip + self.working))


def predict(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    loss: LossConfig | None = None,
    heads: Mapping[str, int] | None = None,
    learning: Container[str] | None = None,
    averages: int = 2,
    ema: bool = False,
) -> Memory:
    """Memory of training the model of ``config`` with classification ``heads`` under autocast to ``dtype``.

    Of its parameters, ``learning`` are trained (None: all that the model trains by itself), with ``averages`` of the
    optimizer for each (AdamW's two), and ``ema`` says whether there is a moving average of all.

    Autograd is asked what it keeps, on tensors without content; nothing is allocated and no device is touched.
    """
    with FakeTensorMode():
        model = create_model(config, loss, heads)
        if learning is not None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in learning)
        geometry = model.geometry
        frame, length = (geometry.image_size, geometry.image_size), 1 + config.num_frames * geometry.patches_per_frame

        def saved(run: Callable[[], Any]) -> int:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                return saved_bytes(run, model)

        def whole(clips: int) -> int:
            video = torch.empty(clips, 3, config.num_frames, *frame)
            tokens = torch.zeros(clips, geometry.context_length, dtype=torch.long)
            return saved(lambda: model(video, tokens))

        def block(clips: int) -> int:
            x, first = torch.empty(clips, length, geometry.vision_width), model.visual.transformer.resblocks[0]
            x.requires_grad_()
            assert isinstance(first, Block)
            adapter = first.adapter
            return saved(lambda: first(x if adapter is None else adapter(x, config.num_frames)))

        # Of the difference nothing is shared, such as autocast's copies of the weights; one clip alone spares copies.
        two, three = whole(2), whole(3)
        working = block(3) - block(2) if config.gradient_checkpointing else 0
    held, trained = (2 if ema else 1), 1 + averages
    copies = (
        (held + trained if parameter.requires_grad else held, parameter.numel()) for parameter in model.parameters()
    )
    state = 4 * sum(count * size for count, size in copies)
    return Memory(state + 3 * two - 2 * three, three - two, working)
