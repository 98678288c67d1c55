"""What a clip costs: floating point operations by formula and by count, memory by counting saved bytes."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from egohod.loss.config import LossConfig
from egohod.model.config import FastPathConfig, Geometry, LoraConfig, ModelConfig
from egohod.model.dual_encoder import DualEncoder, EgoVideo, create_model
from egohod.model.lora import add_low_rank
from egohod.model.vision import ROLES, SHORT

# How many times the forward pass a backward pass takes. Pixels need no gradient but that of the weights; fused
# attention computes its scores again (five products for two); a product with trained weights has two gradients, as has
# one of two activations; one with frozen weights has only that of its input.
PIXELS, FUSED, TRAINED, FROZEN = 1.0, 2.5, 2.0, 1.0
# What batches may take of a device: the rest is for copies of weights, fragmentation and the next batch.
SHARE = 0.8


class Flops(NamedTuple):
    """Operations of one clip and one text: 2 per multiply-add of the matrix products."""

    forward: int
    step: int
    """Forward and backward, without recomputation of blocks; the mean over steps with and without the slow path."""


def clip_flops(
    geometry: Geometry,
    num_frames: int,
    text_length: int,
    patch_dropout: float = 0.0,
    fast: FastPathConfig | None = None,
    boxes: bool = False,
    texts: int = 1,
    motion_stem: int | None = None,
) -> Flops:
    """Operations by formula, within 3 % of those that PyTorch counts (tests/model/test_cost.py).

    Args:
        geometry: sizes of both towers.
        num_frames: frames per clip.
        text_length: tokens computed per text, padding included.
        patch_dropout: share of patch tokens left out.
        fast: the paths of a slow-fast geometry (default: as the configuration's).
        boxes: whether there is a box head, which reads all tokens behind the last block.
        texts: texts per clip, two with opposite captions.
        motion_stem: channels of the motion stem's first layer, if there is one.
    """
    V, L, E, W = geometry.text_width, text_length, geometry.embed_dim, geometry.vision_width
    # A block's linear layers per token: 4 of the attention's V x V, and the MLP's two.
    linear = 4 + 2 * geometry.text.mlp_ratio
    # Each with how many times as many operations its backward pass takes.
    products = [
        (texts * 4.0 * L * L * V * geometry.text_layers, FUSED),
        (texts * (L * 2.0 * V * V * linear * geometry.text_layers + 2 * V * E), TRAINED),
    ]
    per_frame, share = geometry.patches_per_frame, 1 - patch_dropout
    fast = fast or FastPathConfig()
    # Adapters need the same places in all frames.
    places = max(1, round(per_frame * share))
    if motion_stem:
        C, fine = motion_stem, max(1, round(geometry.patch_size / 8)) ** 2
        # The convolutions see all patches of all frames, the projection those that dropout leaves.
        positions = num_frames * per_frame * 2.0 * C
        projected = num_frames * (places if geometry.slowfast else per_frame * share)
        products += [
            (positions * 4 * fine * 6 * 25, PIXELS),
            (positions * fine * 2 * C * 27 + positions * 2 * W * 27 + projected * 2 * W * W, TRAINED),
        ]
    skipped = 0.0
    if not geometry.slowfast:
        products += _path(geometry, max(1, round(num_frames * per_frame * share)), boxes, boxes)
    else:
        whole = boxes or fast.pool != "cls" or fast.position != "before"
        pixels, attention, blocks, pooling, *rest = _path(geometry, num_frames * places, whole, boxes)
        # The backbone's weights are constants here.
        blocks, pooling = (blocks[0], FROZEN), (pooling[0], FROZEN)
        # Down and up are half of W x W each, the point-wise convolution a quarter, the spatial one nine quarters.
        adapter = num_frames * places * (2.5 + (4.5 if fast.spatial else 0)) * W * W
        slow = _path(geometry, fast.slow_frames * places, whole=False, boxes=False)
        if motion_stem and fast.stem_paths == "both":
            slow.append((fast.slow_frames * places * 2 * W * W, TRAINED))
        # Evaluation has it always, training on a share of the steps.
        skipped = (1 - 1 / fast.slow_every) * sum(work * (1 + backward) for work, backward in slow)
        products += [
            *(pixels, attention, blocks, (adapter * geometry.vision_layers, TRAINED), pooling, *rest),
            *(*slow, (2.0 * 2 * E * E, TRAINED)),
        ]
    forward = round(sum(work for work, _ in products))
    return Flops(forward, round(sum(work * (1 + backward) for work, backward in products) - skipped))


def _path(geometry: Geometry, patches: int, whole: bool, boxes: bool) -> list[tuple[float, float]]:
    """One pass of the vision tower: pixels, attention, blocks, pooling, projection and, with ``boxes``, their head."""
    W, N = geometry.vision_width, patches + geometry.prefix_tokens
    linear = 2.0 * (geometry.block_weights or W * W * (4 + 2 * geometry.mlp_ratio))
    attention, blocks = 4.0 * N * N * W * geometry.vision_layers, N * linear * geometry.vision_layers
    if not whole and geometry.pool == "token":
        # The last block computes all but keys and values for CLS only.
        attention -= 4.0 * N * (N - 1) * W
        blocks -= (N - 1) * (linear - 2.0 * (geometry.memory_weights or 2 * W * W))
    # Attention pooling makes keys and values of all tokens; its other matrices see one.
    pooling = N * 4.0 * W * (W + 1) + 2.0 * (geometry.pool_weights - 2 * W * W) if geometry.pool_weights else 0.0
    products = [
        (patches * 6.0 * geometry.patch_size**2 * W, PIXELS),
        (attention, FUSED if N > SHORT else TRAINED),
        (blocks, TRAINED),
        (pooling, TRAINED),
        (0.0 if geometry.projection == "none" else 2.0 * W * geometry.embed_dim, TRAINED),
    ]
    return [*products, (patches * 2.0 * W * 5 * ROLES, TRAINED)] if boxes else products


def count_flops(run: Callable[[], Any]) -> int:
    """Operations of the matrix products that ``run()`` performs, counted as they happen."""
    aten = torch.ops.aten
    # PyTorch counts the attention kernels of GPUs only.
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
            query, key, value
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, value, *_, **__: (
            sdpa_backward_flop_count(grad, query, key, value)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        run()
    return int(counter.get_total_flops())


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


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    # Weights, and of the trained ones gradients and the optimizer's averages, in float32; and what else does not depend
    # on the batch.
    state: int
    # Kept for the backward pass of one clip with its text.
    per_clip: int
    # Needed besides per clip while a checkpointed block is computed again.
    working: int

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
    blocks: int | None = None,
    on_gpu: bool = True,
    lora: LoraConfig | None = None,
    processes: int = 1,
) -> Memory:
    """Memory of training the model of ``config`` with classification ``heads`` under autocast to ``dtype``.

    Of its parameters, ``learning`` are trained (None: all that the model trains by itself), with ``averages`` of the
    optimizer for each (AdamW's two), and ``ema`` says whether there is a moving average of all. The first ``blocks``
    are checkpointed (None: as configured). ``on_gpu`` says which device ``model.residual=auto`` means. With ``lora``
    the model has its low-rank parts. ``processes`` is
    over how many the weights are split (``train.sharding``).

    What autograd saves is counted on tensors without content; nothing is allocated and no device is touched.
    """
    if config.residual == "auto":
        # Counted on tensors of a CPU: that a GPU saves the same, but for its attention, is tested.
        config = replace(config, residual="autocast" if on_gpu else "float32")
    with FakeTensorMode():
        model = _stand_in(config, loss, heads, learning, lora)
        geometry, block = model.geometry, model.visual.transformer.resblocks[0]
        prefix, size = geometry.prefix_tokens, geometry.image_size
        length = prefix + config.num_frames * geometry.patches_per_frame
        if blocks is None:
            blocks = model.visual.transformer.checkpoint_blocks

        def step(clips: int) -> Any:
            video = torch.empty(clips, 3, config.num_frames, size, size)
            # Opposites and replaced captions are embedded with the clips' own.
            texts = clips * (1 + (loss.negatives if loss is not None else 0))
            return model(video, torch.zeros(texts, geometry.context_length, dtype=torch.long))

        def recomputed(clips: int) -> Tensor:
            # The tokens that a block starts from are kept in any case.
            x = torch.empty(clips, length, geometry.vision_width, requires_grad=True)
            adapter, rotations = block.adapter, model.visual.rotations(config.num_frames, None)
            x = adapter(x, config.num_frames, prefix) if isinstance(adapter, nn.Module) else x
            output: Tensor = block(x) if rotations is None else block(x, None, rotations[0])
            return output

        def line(run: Callable[[int], Any]) -> tuple[int, int]:
            """Saved bytes of no clips, and of each."""
            saved = []
            # What clips share, such as autocast's copies of the weights, cancels out in the difference. Not from one
            # clip, for which some copies are not made.
            for clips in (2, 3):
                # A context for each: autocast's copies of weights live as long as it does.
                with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                    saved.append(saved_bytes(partial(run, clips), model))
            return 3 * saved[0] - 2 * saved[1], saved[1] - saved[0]

        model.set_grad_checkpointing(blocks)
        shared, per_clip = line(step)
        working = line(recomputed)[1] if blocks else 0
        if 0 < blocks < geometry.vision_layers:
            # The other blocks come first in the backward pass, and what they kept is free again when it is needed.
            model.set_grad_checkpointing(geometry.vision_layers)
            working = max(0, working - (per_clip - line(step)[1]))
    held, trained = (2 if ema else 1), 1 + averages
    copies = (
        (held + trained if parameter.requires_grad else held, parameter.numel()) for parameter in model.parameters()
    )
    state = 4 * sum(count * size for count, size in copies)
    if processes > 1:
        # Copies for autocast, which the clips of a pass share, are not made: blocks are gathered in its type.
        return Memory(split_state(model, state, dtype, processes), per_clip, working)
    return Memory(state + shared, per_clip, working)


def _stand_in(
    config: ModelConfig,
    loss: LossConfig | None,
    heads: Mapping[str, int] | None,
    learning: Container[str] | None,
    lora: LoraConfig | None,
) -> DualEncoder:
    """The model of :func:`predict`, on the fake tensors of its caller."""
    model = create_model(config, loss, heads)
    if lora is not None:
        add_low_rank(model, lora)
    for name, parameter in model.named_parameters():
        if learning is not None:
            parameter.requires_grad_(name in learning)
    return model


def count_step(
    config: ModelConfig,
    text_length: int,
    *,
    loss: LossConfig | None = None,
    heads: Mapping[str, int] | None = None,
    learning: Container[str] | None = None,
    lora: LoraConfig | None = None,
) -> int:
    """Operations of one clip and its text in a training step, as :func:`clip_flops`, where not all is trained.

    Which gradients are computed depends on where trained weights are, so that no formula is simpler than counting. The
    arguments are those of :func:`predict`; nothing is allocated.
    """
    clips = 2
    # What would be computed twice is no work of the model.
    config = replace(config, checkpoint_blocks="none")
    with FakeTensorMode():
        model = _stand_in(config, loss, heads, learning, lora)
        size = model.geometry.image_size
        video = torch.empty(clips, 3, config.num_frames, size, size)
        texts = 2 * clips if loss is not None and loss.has_opposites else clips
        tokens = torch.zeros(texts, text_length, dtype=torch.long)

        def step() -> None:
            sum(each.sum() for each in model(video, tokens).values()).backward()

        total, every = count_flops(step), config.fast.slow_every
        if isinstance(model, EgoVideo) and every > 1:
            with model.without_slow_path():
                total = (total + (every - 1) * count_flops(step)) // every
    return total // clips


def split_state(model: DualEncoder, state: int, dtype: torch.dtype, processes: int) -> int:
    """Bytes of one process if ``state`` of weights, gradients and averages is split over ``processes``.

    With what is gathered at a time: of the largest block the weights, and those of the next one meanwhile, its gradient
    and the float32 copy that is reduced. What is not in blocks is whole in float32, with its gradient, during all of a
    pass.
    """
    blocks = [*model.visual.transformer.resblocks, *model.textual.transformer.resblocks]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    rest = sum(parameter.numel() for parameter in model.parameters()) - sum(sizes)
    return state // processes + (3 * dtype.itemsize + 4) * max(sizes) + 2 * 4 * rest
