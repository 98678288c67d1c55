"""The dual encoder: a vision tower and a text tower that meet in one embedding space."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import LayerNorm, TextTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from egohod.loss.config import LOSSES, LossConfig
from egohod.model.config import IMAGE_STATS, Geometry, ImageStats, ModelConfig, checkpointed_blocks, image_stats
from egohod.model.timm_vision import TimmSlowFast, TimmTransformer
from egohod.model.vision import (
    ACTIVATIONS,
    SlowFastTower,
    SlowFastTransformer,
    VideoTransformer,
    VisionTower,
    slow_frames,
)

log = logging.getLogger(__name__)

# Variants of a block's code that may be compiled: with and without gradients, of all tokens and of CLS alone, and with
# stochastic depth for each block, because its rate is a constant of the graph.
RECOMPILE_LIMIT = 128


class TextTower(TextTransformer):
    """open_clip's ``TextTransformer``, which also takes tokens cut off behind the longest text.

    The feature is that of one token, projected: of CLIP's the end of text, the token with the largest id. Where
    attention is causal, what follows that token changes nothing and need not be computed.
    """

    def __init__(self, shape: Geometry, config: ModelConfig) -> None:
        options = shape.text
        # nn.GELU's approximation is an argument, open_clip builds activations without any.
        kinds: dict[str, Callable[[], nn.Module]] = {**ACTIVATIONS, "gelu_tanh": partial(nn.GELU, approximate="tanh")}
        super().__init__(
            context_length=shape.context_length,
            vocab_size=shape.vocab_size,
            width=shape.text_width,
            heads=shape.text_heads,
            layers=shape.text_layers,
            mlp_ratio=options.mlp_ratio,
            output_dim=shape.embed_dim,
            no_causal_mask=not options.causal,
            pool_type=options.pool,
            eos_id=options.eos_id,
            proj_type="none" if options.projection == "none" else "linear",
            proj_bias=options.projection == "linear",
            act_layer=kinds[options.activation or config.activation_of(shape)],
            norm_layer=partial(LayerNorm, eps=options.norm_eps),
        )
        # SigLIP's tokens attend to the padding behind them, with which it was trained.
        self.needs_padding = not options.causal or options.pool == "last"
        # CLIP's scheme, of which open_clip sets the weights only: PyTorch starts biases of linear layers at random.
        for block in self.transformer.resblocks:
            nn.init.zeros_(block.attn.in_proj_bias)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)
        self.set_grad_checkpointing(checkpointed_blocks(config.checkpoint_blocks, shape.vision_layers) > 0)

    def states(self, tokens: Tensor) -> Tensor:
        """Of every token behind the last block, [B, L, D]: ``tokens`` int64 [B, L], padded if :attr:`needs_padding`."""
        L = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:L]
        # PyTorch's fused kernel for CPUs takes twice as long over a text tower's few tokens in bf16. Not where blocks
        # are recomputed: the backward pass is outside of this context and would recompute with the other kernel.
        is_plain = x.device.type == "cpu" and not self.transformer.grad_checkpointing
        plain = sdpa_kernel(SDPBackend.MATH) if is_plain else nullcontext()
        with plain:
            states: Tensor = self.transformer(x, attn_mask=None if self.attn_mask is None else self.attn_mask[:L, :L])
        return states

    def padded(self, tokens: Tensor) -> Tensor:
        """Tokens as the tower reads them: columns of zeros that were cut on the host (egohod.data.dataset.trim)."""
        return F.pad(tokens, (0, self.context_length - tokens.shape[1])) if self.needs_padding else tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` int64 [B, L], L up to the context length -> features [B, E], not normalised."""
        tokens = self.padded(tokens)
        B, L = tokens.shape
        x = self.states(tokens)
        if self.pool_type == "argmax":
            place = tokens.argmax(dim=1)
        elif self.pool_type == "eos":
            place = (tokens == self.eos_id).int().argmax(dim=1)
        else:
            place = torch.full((B,), L - 1 if self.pool_type == "last" else 0, device=x.device)
        # The norm and the projection see one token of each text instead of all L.
        feature: Tensor = self.ln_final(x[torch.arange(B, device=x.device), place])
        if self.text_projection is None:
            return feature
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(feature)
        return feature @ self.text_projection


@dataclass(frozen=True)
class Base:
    """Tensors of the file ``path`` that a model has unchanged and does not train, with their checksum."""

    path: str
    names: tuple[str, ...]
    sha256: str


class DualEncoder(nn.Module):
    """``visual``, ``textual`` and ``logit_scale`` = log(1 / temperature), named as in published checkpoints.

    ``logit_bias`` exists only for the sigmoid loss.
    """

    visual: VisionTower
    textual: TextTower

    def __init__(
        self,
        visual: VisionTower,
        textual: TextTower,
        *,
        geometry: Geometry,
        num_frames: int,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        bias: float | None = None,
        activation: str = "gelu",
        image_stats: ImageStats = IMAGE_STATS["clip"],
    ) -> None:
        super().__init__()
        self.visual, self.textual = visual, textual
        self.geometry, self.num_frames = geometry, num_frames
        self.activation = activation  # of both towers, unless a timm backbone has its own
        self.image_stats = image_stats  # what the pixels of its input must be normalised with
        # In logarithms, so that no step can make the temperature negative, and a parameter even when fixed, so that it
        # is saved with the weights.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)), requires_grad=learn_temperature)
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.heads: nn.ModuleDict | None = None
        self.classes: dict[str, int] = {}  # how many classes each head has
        self.base: Base | None = None  # weights that are not trained and stay in the file they came from
        self.is_sharded = False  # set by egohod.training.sharding: blocks have weights only while they compute

    def add_heads(self, outputs: Mapping[str, int], dropout: float = 0.0) -> None:
        """Give it classification heads, by name with their classes; it then trains them instead of the text tower."""
        self.heads, self.classes = nn.ModuleDict(), dict(outputs)
        for name, classes in outputs.items():
            linear = nn.Linear(self.geometry.embed_dim, classes)
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            self.heads[name] = nn.Sequential(nn.Dropout(dropout), linear)
        # What no loss reads must not wait for a gradient.
        self.textual.requires_grad_(False)
        self.logit_scale.requires_grad_(False)
        if self.logit_bias is not None:
            self.logit_bias.requires_grad_(False)

    def classify(self, video: Tensor) -> dict[str, Tensor]:
        """``video`` [B, 3, T, H, W] -> logits of each head by name, float32 [B, C]."""
        assert self.heads is not None, "the model was built without heads"
        # The scale of a unit vector's entries would make the heads learn slowly.
        features = self.encode_video(video) * self.geometry.embed_dim**0.5
        return {name: head(features).float() for name, head in self.heads.items()}

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        """``video`` [B, 3, T, H, W], pixels normalised by ``image_stats`` -> float32 [B, E]."""
        return _finish(self._video_features(video, with_boxes=False)[0], normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """``tokens`` int64 [B, L], L up to the context length -> float32 [B, E]."""
        return _finish(self.textual(tokens), normalize)

    def forward(self, video: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Both features, normalised, and the scale (1 / temperature) and bias, if any, of their similarities.

        With a box head also ``boxes`` [B, T, 3, 4]: left hand, right hand and active object of each frame. With
        classification heads only ``<head>_logits`` [B, C].
        """
        if self.heads is not None:
            return {f"{name}_logits": logits for name, logits in self.classify(video).items()}
        # Text first: which draws of the random generators an encoder gets is a part of what a seed means.
        output = {"text_features": self.encode_text(tokens), "logit_scale": self.logit_scale.exp()}
        features, boxes = self._video_features(video, with_boxes=self.visual.box_head is not None)
        if boxes is not None:
            output["boxes"] = boxes
        output["video_features"] = _finish(features, normalize=True)
        return output if self.logit_bias is None else output | {"logit_bias": self.logit_bias}

    def _video_features(self, video: Tensor, with_boxes: bool) -> tuple[Tensor, Tensor | None]:
        return self.visual.forward_with_boxes(video) if with_boxes else (self.visual(video), None)

    def freeze(self, trainable: str, last_blocks: int = 0) -> None:
        """Train the part ``trainable`` alone.

        Args:
            trainable: ``all``; ``vision``, all but the text tower; ``adapters`` with the temporal embedding and the
                projections, as upstream's class does, and the motion stem; ``lora``, the same and the low-rank parts of
                :mod:`egohod.model.lora`; ``heads``; or ``last_blocks`` of the vision tower.
            last_blocks: how many; what follows them is trained with them.
        """
        depth = len(self.visual.transformer.resblocks)
        last = "|".join(str(i) for i in range(max(0, depth - last_blocks), depth)) or "none"
        behind = rf"{self._named(self.visual.HEAD)}|visual\.box_head\.|slowfast_projection|heads\."
        # What weights of another model do not have, and is small.
        added = r"\.adapter\.|\.motion_stem\.|temporal_embedding|_projection|logit_|\.box_head\.|heads\."
        pattern = {
            "all": "",
            "vision": r"^(?!textual\.)",
            "adapters": added,
            "lora": rf"\.lora\.|{added}",
            "last_blocks": rf"^(visual\.transformer\.resblocks\.({last})\.|{behind})",
            "heads": r"^heads\.",
        }[trainable]
        for name, parameter in self.named_parameters():
            # Frozen from the start (a fixed temperature, an adapter without effect) stays frozen.
            if not re.search(pattern, name):
                parameter.requires_grad_(False)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter is of, as timm's layer-wise decay asks; the text tower counts as the last."""
        return {"stem": "^" + self._named(self.visual.STEM), "blocks": r"^visual\.transformer\.resblocks\.(\d+)"}

    @staticmethod
    def _named(starts: Iterable[str]) -> str:
        """A regular expression of the vision tower's parameters whose names begin so."""
        return rf"visual\.(?:{'|'.join(map(re.escape, starts))})"

    def set_grad_checkpointing(self, blocks: int) -> None:
        """Compute the first ``blocks`` blocks of the vision tower again in the backward pass, 0 for none of them.

        With any of them also the motion stem and the text tower, which is narrower and so frees more memory for each
        operation that is computed again.
        """
        self.visual.transformer.checkpoint_blocks = blocks
        self.textual.set_grad_checkpointing(blocks > 0)

    def compile_towers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """torch.compile both towers in place, block by block, without graph breaks; names in the state dict stay.

        Blocks are alike, so that all of a tower share one compiled graph: a start takes as long as that of one block.
        What is between them is a small part of a step. Nothing is compiled before its first call.
        """
        # PyTorch counts the variants of all blocks together, as they run the same code. By its former name, which
        # every supported version has.
        torch._dynamo.config.cache_size_limit = RECOMPILE_LIMIT
        # Within DistributedDataParallel it would cut each block again, at the borders of 25 MB buckets of gradients.
        # Gradients are ready block by block as it is, and are exchanged while the blocks before them are computed.
        torch._dynamo.config.optimize_ddp = False
        options: dict[str, Any] = {"fullgraph": True, "backend": backend}
        # Clips have one size, or two with a slow and a fast path: kernels of fixed sizes are faster.
        self.visual.compile_blocks(dynamic=False, **options)
        # The text length changes from batch to batch.
        for block in self.textual.transformer.resblocks:
            block.compile(dynamic=True, **options)


class EgoVideo(DualEncoder):
    """The dual encoder with a slow and a fast path, merged by ``slowfast_projection`` [2 E, E].

    It starts as the mean of both paths, so that co-training from a dual encoder begins where that one ended.
    """

    visual: SlowFastTower

    def __init__(self, visual: SlowFastTower, textual: TextTower, *, slow: int, **options: Any) -> None:
        super().__init__(visual, textual, **options)
        embed_dim = self.geometry.embed_dim
        self.slow = slow
        self.skips_slow = False  # set by without_slow_path
        slow_frames(self.num_frames, slow)  # refuses frame counts that cannot be shared evenly, before any clip
        self.slowfast_projection = nn.Parameter(torch.eye(embed_dim).repeat(2, 1) / 2)

    @contextmanager
    def without_slow_path(self) -> Iterator[None]:
        """Forward and backward passes in training mode that leave out the slow path; the backbone gets no gradient.

        The feature of a clip is then the fast path's part of the merge, which the loss normalises.
        """
        self.skips_slow = True
        try:
            yield
        finally:
            self.skips_slow = False
            for parameter in self.visual.backbone():
                # Not zeros, which _video_features makes: momentum and weight decay would still move the weights.
                parameter.grad = None

    def _video_features(self, video: Tensor, with_boxes: bool) -> tuple[Tensor, Tensor | None]:
        # The slow frames are taken from the fast ones, so a clip is read and decoded once; upstream samples them apart.
        taken = slow_frames(video.shape[2], self.slow)
        # Convolved over all frames for both paths: the slow path's own are too far apart to differ by one motion.
        motion = self.visual.motion(video) if self.visual.stem_paths == "both" else None
        boxes: Tensor | None = None
        if with_boxes:
            fast, boxes = self.visual.fast_with_boxes(video, motion)
        else:
            fast = self.visual.fast(video, motion)
        if self.training and self.skips_slow and self.is_sharded:
            # Nothing waits for gradients, and the weights of blocks are not here.
            return fast @ self.slowfast_projection[self.geometry.embed_dim :], boxes
        if self.training and self.skips_slow:
            # Zero, and a function of all weights that are left out: DistributedDataParallel expects a gradient of every
            # parameter. Searching for unused ones instead would make the host wait for the device.
            zero = torch.stack([parameter.flatten()[:0].sum() for parameter in self.visual.backbone()]).sum()
            return fast @ self.slowfast_projection[self.geometry.embed_dim :] + zero, boxes
        if motion is not None:
            motion = motion.unflatten(1, (video.shape[2], -1))[:, taken].flatten(1, 2)
        slow = self.visual(video[:, :, taken], motion)
        return torch.cat((slow, fast), dim=1) @ self.slowfast_projection, boxes


def _finish(features: Tensor, normalize: bool) -> Tensor:
    # Similarities need float32 whatever the towers computed in.
    features = features.float()
    return F.normalize(features, dim=-1) if normalize else features


def compiles(choice: str, device: torch.device) -> bool:
    """Whether a run on ``device`` is compiled with ``model.compile=choice``; logs why ``auto`` does not on a GPU."""
    if choice != "auto" or device.type != "cuda":
        return choice == "true"
    # What PyTorch's compiler needs for a GPU, and a slim container may lack: a default must not end a run.
    lacks = [] if importlib.util.find_spec("triton") else ["the package triton"]
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        lacks.append("a C compiler")
    # Triton compiles what starts its kernels against it; Debian's Python has it in a package of its own.
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file():
        lacks.append("Python.h (apt-get install python3-dev)")
    if torch.cuda.get_device_capability(device) < (7, 0):
        lacks.append("a GPU of compute capability 7.0")
    if lacks:
        log.warning("model.compile=auto: the model is not compiled, for lack of %s", " and ".join(lacks))
    return not lacks


def create_model(
    config: ModelConfig, loss: LossConfig | None = None, classes: Mapping[str, int] | None = None
) -> DualEncoder:
    """A dual encoder with fresh weights (CLIP's initialisation, from torch's global generator).

    ``loss`` says what else the model needs: the temperature, the sigmoid loss's offset, a head for boxes; None is the
    default loss, with the scale and offset of ``open_clip/...`` models. ``classes`` are the outputs of its
    classification heads by name.

    ``config.weights``, ``config.compile`` and ``config.attention`` are left to the caller: weights are read by
    :mod:`egohod.model.checkpoints`, compiling is :meth:`DualEncoder.compile_towers`, and both others need a device.
    """
    shape = config.geometry()
    stats = shape.image_stats or IMAGE_STATS["clip"]
    # Without a loss, as for embedding alone, a model of open_clip has its own scale and offset of similarities.
    temperature, bias = (LossConfig.temperature, shape.logit_bias) if loss is None else (loss.temperature, None)
    if loss is None and shape.logit_scale is not None:
        temperature = math.exp(-shape.logit_scale)
    loss = loss or LossConfig()
    # In this order, text tower first: both draw their weights from the same generator.
    textual = TextTower(shape, config)
    options: dict[str, Any] = {
        "geometry": shape,
        "num_frames": config.num_frames,
        "temperature": temperature,
        # What no loss reads must not wait for a gradient.
        "learn_temperature": loss.learn_temperature and LOSSES[loss.name].has_temperature,
        "bias": loss.bias if LOSSES[loss.name].has_bias else bias,
        "activation": config.activation_of(shape),
        "image_stats": stats if config.image_stats == "auto" else image_stats(config.image_stats),
    }
    model: DualEncoder
    boxes = loss.boxes > 0
    if shape.slowfast:
        two_paths = TimmSlowFast if shape.backbone else SlowFastTransformer
        model = EgoVideo(two_paths(shape, config, boxes), textual, slow=config.fast.slow_frames, **options)
    else:
        one_path = TimmTransformer if shape.backbone else VideoTransformer
        model = DualEncoder(one_path(shape, config, boxes), textual, **options)
    if classes:
        model.add_heads(classes, config.head_dropout)
    return model
