"""Vision towers: a ViT with joint attention over space and time, and EgoVideo's, which runs it on two paths.

Shape legend: B clips, C channels, T frames, H x W pixels, P patch side, N = T * (H/P) * (W/P) patch tokens
(frame-major), D width, E shared embedding. Parameter names are those of the published checkpoints (and of
OpenAI CLIP inside the blocks), so a state dict needs no renaming.

Initial weights come from torch's global generator in the order in which the parts are written here; another order would
be another model for every seed that a result names.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from timm.layers import DropPath
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from egohod.errors import UserError
from egohod.model.config import Geometry, ModelConfig, checkpointed_blocks

# Left hand, right hand, active object.
ROLES = 3
# Frames that the temporal convolution of a motion adapter sees at once.
KERNEL = 3
# Tokens up to which a CPU attends by plain matrix products (docs/benchmarks.md).
SHORT = 320
# Kernels of attention by the names of ``model.attention``, in the order in which a GPU tries them.
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Most groups of channels in the motion stem's norms.
GROUPS = 8
# OpenAI trained CLIP with the sigmoid approximation of GELU; upstream and AVION load its weights and train on with the
# exact one, so the released video models need "gelu".
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class LowPrecisionLayerNorm(nn.LayerNorm):
    """Layer norm whose output has its input's type; its sums are in float32 whatever that type is."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., D] -> the same shape and type."""
        if x.dtype == self.weight.dtype == torch.float32:
            return super().forward(x)
        # Autocast runs layer norms of a GPU in float32: it would copy the tokens to float32, keep the copy for the
        # backward pass, and the next product would copy the result back. The kernel itself sums in float32.
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention; the names of ``nn.MultiheadAttention``, without its detours."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        assert width % heads == 0, "width must be a multiple of heads"
        self.heads = heads
        # Kernels that are tried, the first first (attention_order); empty is PyTorch's order.
        self.kernels: list[SDPBackend] = []
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        # A low-rank part of in_proj_weight (egohod.model.lora): a call gives what it adds to the product [B, N, 3 D].
        self.lora: nn.Module | None = None

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        """``x`` [B, N, D] -> [B, keep or N, D]: the first ``keep`` tokens ask, all tokens answer."""
        B, N, D = x.shape
        added = None if self.lora is None else self.lora(x)
        if keep is None:
            # One product for all three is faster than three.
            qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
            qkv = (qkv if added is None else qkv + added).view(B, N, 3, self.heads, -1)
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            query_weight, memory_weight = self.in_proj_weight.split((D, 2 * D))
            query_bias, memory_bias = self.in_proj_bias.split((D, 2 * D))
            query, memory = F.linear(x[:, :keep], query_weight, query_bias), F.linear(x, memory_weight, memory_bias)
            if added is not None:
                query, memory = query + added[:, :keep, :D], memory + added[:, :, D:]
            query = query.view(B, keep, self.heads, -1).transpose(1, 2)
            key, value = memory.view(B, N, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(query, key, value, self.kernels)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # [B, heads, keep or N, d] -> [B, keep or N, D]


def attend(query: Tensor, key: Tensor, value: Tensor, kernels: list[SDPBackend]) -> Tensor:
    """Attention of ``query`` [B, heads, M, d] over N tokens -> [B, heads, M, d]; ``kernels`` are tried in order."""
    if query.device.type == "cpu" and key.shape[2] <= SHORT:
        # A third of a small model's step: PyTorch's fused kernel for CPUs is slow on few tokens going backward.
        scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)
        return scores.softmax(dim=3) @ value
    # Here and not around the model: a checkpointed block must be computed again by the same kernel.
    with sdpa_kernel(kernels, set_priority=True) if kernels else nullcontext():
        return F.scaled_dot_product_attention(query, key, value)


def attention_order(
    name: str, device: torch.device, dtype: torch.dtype, head_width: int
) -> tuple[list[SDPBackend], str]:
    """Kernels of attention that load on ``device``, in the order of ``model.attention=name``, and a line for the log.

    "auto" activates FlashAttention 3 where it is installed; it is for compute capability 9.0 alone.
    """
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    version, notes = "2", []
    # Earlier versions of PyTorch cannot use it.
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if on_hopper and name in ("auto", "flash") and activate and importlib.util.find_spec("flash_attn_interface"):
        try:
            activate("FA3")
            version = "3"
        except Exception as error:  # built for another PyTorch or CUDA, it raises many kinds
            notes.append(f"; flash_attn_interface is installed but does not load: {error}")
    faults = {kernel: kernel_fault(backend, device, dtype, head_width) for kernel, backend in KERNELS.items()}
    if faults.get(name):
        notes.append(f"; model.attention={name} does not: {faults[name]}")
    loads, first = [kernel for kernel, fault in faults.items() if not fault], name
    if name == "auto":
        # cuDNN has kernels for Hopper and later, FlashAttention 2 is of the time of Ampere.
        is_recent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        first = "cudnn" if is_recent and version == "2" else "flash"
    order = sorted(loads, key=lambda kernel: kernel != first)
    names = {kernel: "FlashAttention " + version if kernel == "flash" else kernel for kernel in KERNELS}
    line = f"attention: {names[order[0]]} is tried first; loads: {', '.join(names[kernel] for kernel in order)}"
    return [KERNELS[kernel] for kernel in order], line + "".join(notes)


def kernel_fault(backend: SDPBackend, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """Why a kernel of attention does not load, that is, run forward and backward on such inputs; empty if it does."""
    query = torch.zeros(1, 1, 64, head_width, device=device, dtype=dtype, requires_grad=True)
    try:
        # PyTorch warns of every reason against a kernel that it is not to use.
        with warnings.catch_warnings(action="ignore"), sdpa_kernel(backend):
            F.scaled_dot_product_attention(query, query, query).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth, initialised for a stack of ``shape.vision_layers`` of them."""

    def __init__(self, shape: Geometry, activation: str, drop_path: float) -> None:
        super().__init__()
        width, heads, mlp_ratio, depth = shape.vision_width, shape.vision_heads, shape.mlp_ratio, shape.vision_layers
        hidden = int(width * mlp_ratio)
        self.ln_1 = LowPrecisionLayerNorm(width, eps=shape.norm_eps)
        self.attn = Attention(width, heads)
        self.ln_2 = LowPrecisionLayerNorm(width, eps=shape.norm_eps)
        c_fc, c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)
        # OpenAI's names: the activation is called gelu whichever it is.
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=ACTIVATIONS[activation](), c_proj=c_proj))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        # A MotionAdapter of the fast path; the block itself does not use it.
        self.adapter: nn.Module | None = None
        # CLIP's scheme: what adds to the residual stream shrinks with the number of additions, two a block, so that
        # the stream's variance does not grow with depth.
        residual_std = width**-0.5 * (2 * depth) ** -0.5
        for weight, bias, std in (
            (self.attn.in_proj_weight, self.attn.in_proj_bias, width**-0.5),
            (self.attn.out_proj.weight, self.attn.out_proj.bias, residual_std),
            (c_fc.weight, c_fc.bias, (2 * width) ** -0.5),
            (c_proj.weight, c_proj.bias, residual_std),
        ):
            nn.init.normal_(weight, std=std)
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        """``x`` [B, N, D] -> [B, keep or N, D]; tokens that nobody reads afterwards need not leave the block."""
        x = x[:, :keep] + self.drop_path(self.attn(self.ln_1(x), keep))
        return x + self.drop_path(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """A stack of blocks, of which the first ``checkpoint_blocks`` are computed again in the backward pass.

    The first and not the last: the backward pass has freed what the others kept when it gets to them, so that the
    tensors of a block that is computed again need no memory beyond that.
    """

    def __init__(self, blocks: Iterable[nn.Module], config: ModelConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)
        self.checkpoint_blocks = checkpointed_blocks(config.checkpoint_blocks, len(self.resblocks))

    def forward(self, x: Tensor, keep: int | None = None, rotations: Sequence[Tensor] | None = None) -> Tensor:
        """``x`` [B, N, D] -> [B, keep or N, D]; each block has its own of :meth:`VisionTower.rotations`."""
        last = len(self.resblocks) - 1
        for i, block in enumerate(self.resblocks):
            inputs = (x, keep if i == last else None, *(() if rotations is None else (rotations[i],)))
            # Without gradients nothing is saved, so there is nothing to recompute.
            if i < self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return x


class BoxHead(nn.Module):
    """Boxes of every frame from the patch tokens, by a soft arg-max over the frame's patches.

    Deliberately weak: a patch says how much it counts for a hand or the object and where the box is relative to the
    patch; a frame's box is the weighted mean. So the tokens themselves must encode positions.
    """

    def __init__(self, width: int, patches_per_frame: int) -> None:
        super().__init__()
        self.side = round(patches_per_frame**0.5)
        self.norm = LowPrecisionLayerNorm(width)
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
        # Half precision has too few digits for a softmax and for positions of a pixel or so.
        scores = self.score(x).float()
        centre, size = self.box(x).float().view(B, N, ROLES, 2, 2).unbind(3)
        if chosen is None:
            chosen = torch.arange(N, device=x.device).expand(B, N)
        place = chosen % P
        patch = (torch.stack((place % self.side, place // self.side), dim=2) + 0.5) / self.side
        centre, size = patch.unsqueeze(2) + centre, size.sigmoid()
        boxes = torch.cat((centre - size / 2, centre + size / 2), dim=3)
        # Frames differ in how many tokens patch dropout leaves them: absent patches have no weight. Not minus infinity,
        # whose softmax over a frame without any token is NaN.
        shares = scores.new_full((B, frames * P, ROLES), -1e4).scatter(1, chosen.unsqueeze(2).expand_as(scores), scores)
        shares = shares.view(B, frames, P, ROLES).softmax(dim=2).flatten(1, 2)
        weighted = shares.gather(1, chosen.unsqueeze(2).expand_as(scores)).unsqueeze(3) * boxes
        total = weighted.new_zeros(B, frames, ROLES, 4)
        frame = (chosen // P).view(B, N, 1, 1).expand_as(weighted)
        return total.scatter_add(1, frame, weighted)


class MotionStem(nn.Module):
    """Convolutions over frames and their differences: one vector for each patch of each frame.

    The patch embedding sees one frame at a time, so a transformer compares frames only after it has learned to match
    patches by position and content, which a short run does not learn. Here the difference to the frame before is an
    input, and what it means is learned by convolutions over 3 x 3 patches and 3 frames at each of two layers.

    ``project`` starts at zero, so a fresh stem changes nothing. It is linear in features that are not zero, so it
    learns from the first step and all other parameters from the second.
    """

    def __init__(self, width: int, grid: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.grid = grid
        # Positions of the second layer along a patch. The input has four times as many pixels: half the frame's
        # resolution, or the nearest one at which each position belongs to one patch, whatever the patch size is.
        self.fine = max(1, round(patch_size / 8))

        def layer(inputs: int, outputs: int, kernel: tuple[int, int, int], stride: int) -> nn.Sequential:
            padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
            conv = nn.Conv3d(inputs, outputs, kernel, (1, stride, stride), padding, bias=False)
            # Not batch norm: with statistics of a clip alone, a clip's features do not depend on the micro-batch or
            # process that it is in, and so cached accumulation is exact. Not a layer norm of each position either: it
            # would give positions without motion the same norm as those with motion.
            return nn.Sequential(conv, nn.GroupNorm(math.gcd(GROUPS, outputs), outputs), nn.ReLU())

        # 3 colours, and as many differences.
        self.spatial = layer(6, channels, (1, 5, 5), stride=2)
        self.motion = layer(channels, 2 * channels, (3, 3, 3), stride=2)
        self.patches = layer(2 * channels, width, (3, 3, 3), stride=1)
        self.project = nn.Linear(width, width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, video: Tensor) -> Tensor:
        """``video`` [B, 3, T, H, W], normalised -> features in front of ``project`` [B, N, D], frame by frame."""
        side = 4 * self.fine * self.grid
        # In two dimensions, which torch.compile has a kernel for: time stands where channels would.
        frames = F.adaptive_avg_pool2d(video.flatten(0, 1), side).unflatten(0, video.shape[:2])
        # The first frame has none before it, and no difference.
        change = frames - torch.cat((frames[:, :, :1], frames[:, :, :-1]), dim=2)
        # Neighbouring frames are alike: twice the difference has about the frames' own variance.
        x = self.motion(self.spatial(torch.cat((frames, 2 * change), dim=1)))
        # Averaged before the widest layer, which then costs the same for every patch size. In two dimensions here too:
        # on a GPU the gradient of avg_pool3d adds up in no fixed order.
        x = self.patches(F.avg_pool2d(x.flatten(1, 2), self.fine).unflatten(1, x.shape[1:3]))
        return x.flatten(2).transpose(1, 2)  # [B, D, T, grid, grid] -> [B, N, D]


class VisionTower(nn.Module):
    """ViT over the patches of all frames and prefix tokens (CLS, registers), which are there once per clip.

    A patch's position is a spatial embedding (shared by the frames) plus a temporal one (shared by the patches of a
    frame). The tower's own parts, such as its patch embedding, norms and pooling, are a subclass's:
    :class:`VideoTransformer` or :class:`egohod.model.timm_vision.TimmTransformer`. ``boxes`` gives it a head for
    :meth:`forward_with_boxes`; ``config.motion_stem`` a :class:`MotionStem`, whose vectors are added to the patches.
    """

    # How the names of parameters begin: in front of the blocks (the stem of layer-wise decay), behind them, and those
    # in front that both paths of a slow-fast tower train.
    STEM: tuple[str, ...] = ("motion_stem", "temporal_embedding")
    HEAD: tuple[str, ...] = ("image_projection",)
    NORM = "ln_pre"  # the norm in front of the blocks
    BOTH_PATHS: tuple[str, ...] = ("temporal_embedding", "image_projection", "motion_stem.", "box_head.")

    temporal_embedding: nn.Parameter  # [T, D]
    transformer: Transformer
    box_head: BoxHead | None
    motion_stem: MotionStem | None

    def __init__(self, shape: Geometry, config: ModelConfig) -> None:
        super().__init__()
        assert shape.image_size % shape.patch_size == 0, "the image must be whole patches"
        self.image_size, self.patch_size = shape.image_size, shape.patch_size
        self.prefix_tokens = shape.prefix_tokens
        # Tokens that must leave the last block; where only CLS is pooled this spares most of a block, and is exact.
        self.keep = 1 if shape.pool == "token" else None
        self.residual, self.patch_dropout = config.residual, config.patch_dropout
        # Motion adapters convolve each location over time, so it must be there in all frames or in none.
        self.patch_dropout_tubes = config.patch_dropout_tubes or shape.slowfast

    # What a subclass gives. ``frozen`` is the fast path, on which the backbone's weights are constants.

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Flattened patches [B, N, C P P], order (C, h, w) -> [B, N, D]."""
        raise NotImplementedError

    def places(self) -> tuple[Tensor, Tensor]:
        """Prefix tokens with their positions [prefix_tokens, D], and the embedding of a frame's places [P, D or 1]."""
        raise NotImplementedError

    def pooled(self, x: Tensor, frozen: bool = False, pool: str = "cls") -> Tensor:
        """Tokens behind the last block, [B, keep or 1 + N, D], -> [B, E], not normalised.

        ``pool`` is ``model.fast.pool``: the tower's own pooling (``cls``), the ``mean`` of the patches, or ``both``.
        """
        raise NotImplementedError

    def rotations(self, frames: int, chosen: Tensor | None) -> Sequence[Tensor] | None:
        """Rotary positions for each block of the patches ``chosen`` (see :meth:`embed`); None without any."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, such as the moving average of the weights, must not take compiled methods along: they would still
        # compute with the weights of this tower.
        return {name: value for name, value in super().__getstate__().items() if not hasattr(type(self), name)}

    def set_attention(self, kernels: list[SDPBackend]) -> None:
        """Let all blocks try these kernels of attention, in the order of :func:`attention_order`."""
        for module in self.transformer.modules():
            if hasattr(module, "kernels"):
                module.kernels = kernels  # type: ignore[assignment]

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile the blocks, and the motion stem, each by itself with ``options``."""
        for part in (*self.transformer.resblocks, self.motion_stem):
            if part is not None:
                part.compile(**options)

    def forward(self, video: Tensor) -> Tensor:
        """``video`` [B, 3, T, H, W], normalised -> [B, E], not normalised."""
        x, chosen = self.embed(video, self.motion(video))
        return self.pooled(self.transformer(x, self.keep, self.rotations(video.shape[2], chosen)))

    def forward_with_boxes(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """As calling it, and the boxes of all frames from the same tokens: [B, E] and [B, T, 3, 4]."""
        assert self.box_head is not None, "the tower was built without boxes"
        x, chosen = self.embed(video, self.motion(video))
        x = self.transformer(x, None, self.rotations(video.shape[2], chosen))
        boxes: Tensor = self.box_head(x[:, self.prefix_tokens :], chosen, video.shape[2])
        return self.pooled(x), boxes

    def tokens(self, video: Tensor) -> Tensor:
        """Patch tokens behind the last block, [B, T P, D]: ``video`` as for calling it. Not for training."""
        x, chosen = self.embed(video, self.motion(video))
        return self.transformer(x, None, self.rotations(video.shape[2], chosen))[:, self.prefix_tokens :]

    def motion(self, video: Tensor) -> Tensor | None:
        """The motion stem's features of all patches, [B, N, D]; None without a stem."""
        if self.motion_stem is None:
            return None
        if self.transformer.checkpoint_blocks and torch.is_grad_enabled():
            features: Tensor = checkpoint(self.motion_stem, video, use_reentrant=False)
            return features
        return self.motion_stem(video)

    def embed(self, video: Tensor, motion: Tensor | None = None, frozen: bool = False) -> tuple[Tensor, Tensor | None]:
        """Tokens in front of the first block: [B, prefix + N, D], fewer with patch dropout while training.

        The second value tells which of the T * P patches they are, int64 [B, N], None for all. ``motion`` is what
        :meth:`motion` gives for these frames; without it nothing is added to the tokens.

        Any frame count is taken; the temporal embedding is interpolated to it. ``frozen`` (of the fast path, see
        :class:`SlowFastTower`) takes the prefix and spatial embedding and the norm as constants.
        """
        B, C, T, H, W = video.shape
        P = self.patch_size
        assert H == W == self.image_size, f"expected {self.image_size} px frames, got {H} x {W}"
        # [B, C, T, H, W] -> [B, N, C P P], by reshaping alone: a product with a matrix then replaces a convolution.
        patches = video.view(B, C, T, H // P, P, W // P, P).permute(0, 2, 3, 5, 1, 4, 6).reshape(B, -1, C * P * P)
        positions, chosen = self.positions(T, frozen), None
        if self.training and self.patch_dropout > 0:
            # Dropping pixels instead of embedded tokens spares their embedding too.
            chosen = self._chosen(B, T, patches.shape[1] // T, video.device)
            patches = patches.gather(1, chosen.unsqueeze(2).expand(-1, -1, patches.shape[2]))
            if motion is not None:
                # The convolutions need whole frames, the projection does not.
                motion = motion.gather(1, chosen.unsqueeze(2).expand(-1, -1, motion.shape[2]))
        placed = self.embed_patches(patches)
        # A sum with float32 is float32, as would then be all that the blocks add to.
        if self.residual == "autocast" or (self.residual == "auto" and video.device.type == "cuda"):
            positions = positions.to(placed.dtype)
        placed = placed + (positions if chosen is None else F.embedding(chosen, positions))
        if motion is not None and self.motion_stem is not None:
            placed = placed + self.motion_stem.project(motion)
        # Prefix tokens have no time.
        first = self.places()[0].expand(B, -1, -1)
        x = torch.cat(((first.detach() if frozen else first).to(placed.dtype), placed), dim=1)
        norm = getattr(self, self.NORM)
        return (call_frozen(norm, x) if frozen else norm(x)), chosen

    def _chosen(self, B: int, T: int, P: int, device: torch.device) -> Tensor:
        """Numbers of the patches that dropout leaves of T frames with P patches each: int64 [B, fewer]."""
        share = 1 - self.patch_dropout
        # Unsorted: attention has no order of tokens, so sorting would be for nothing.
        if not self.patch_dropout_tubes:
            return torch.rand(B, T * P, device=device).topk(max(1, round(T * P * share)), dim=1, sorted=False).indices
        # The same places in all frames, so that what moves there can be followed.
        places = torch.rand(B, P, device=device).topk(max(1, round(P * share)), dim=1, sorted=False).indices
        frames = P * torch.arange(T, device=device)
        return (frames.view(1, T, 1) + places.unsqueeze(1)).flatten(1)

    def positions(self, frames: int, frozen: bool = False) -> Tensor:
        """Spatial plus temporal embedding of every patch of ``frames`` frames: [N, D]."""
        temporal: Tensor = self.temporal_embedding
        # A model may be shown more or fewer frames than it was trained with: they cover the same clip.
        if frames != temporal.shape[0]:
            shape: dict[str, Any] = {"size": frames, "mode": "linear", "align_corners": False}
            if torch.are_deterministic_algorithms_enabled():
                # On a GPU the gradient of F.interpolate adds up in no fixed order: the same by its matrix [frames, T].
                matrix = F.interpolate(torch.eye(len(temporal), device=temporal.device)[None], **shape)[0].T
                temporal = (matrix.unsqueeze(2) * temporal).sum(dim=1)
            else:
                temporal = F.interpolate(temporal.T[None], **shape)[0].T
        spatial = self.places()[1]
        return ((spatial.detach() if frozen else spatial) + temporal.unsqueeze(1)).flatten(0, 1)

    def init_temporal(self, config: ModelConfig) -> None:
        """Fill the temporal embedding by ``model.temporal_init``; call without gradients."""
        # Zeros make a clip of CLIP's image model at the start; a short run from scratch needs an order of frames.
        if config.temporal_init == "zeros":
            nn.init.zeros_(self.temporal_embedding)
        else:
            self.temporal_embedding.copy_(config.sinusoid_scale * sinusoids(*self.temporal_embedding.shape))

    def spatial_waves(self, config: ModelConfig, width: int) -> Tensor:
        """The spatial embedding of ``model.spatial_init=sinusoidal``: [P, D]."""
        side = self.image_size // self.patch_size
        waves = config.sinusoid_scale * sinusoids(side, width // 2)
        # Half of the channels tell the row, half the column.
        return torch.cat((waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)), dim=1)


class VideoTransformer(VisionTower):
    """The project's own tower, CLIP's ViT with one CLS token.

    Patch embedding is a Linear without bias over flattened patches: CLIP's convolution with stride P as the matrix that
    upstream saves.
    """

    STEM = (*VisionTower.STEM, "conv1", "class_embedding", "positional_embedding", "ln_pre")
    HEAD = (*VisionTower.HEAD, "ln_post.")
    BOTH_PATHS = (*VisionTower.BOTH_PATHS, "conv1.")

    def __init__(self, shape: Geometry, config: ModelConfig, boxes: bool = False) -> None:
        super().__init__(shape, config)
        width, depth, side = shape.vision_width, shape.vision_layers, shape.image_size // shape.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + side**2, width))
        self.temporal_embedding = nn.Parameter(torch.empty(config.num_frames, width))
        self.conv1 = nn.Linear(3 * shape.patch_size**2, width, bias=False)
        self.ln_pre = LowPrecisionLayerNorm(width, eps=shape.norm_eps)
        # Later blocks refine what earlier ones computed, so they are dropped more often (Huang et al., 1603.09382).
        rates = [config.drop_path * i / max(1, depth - 1) for i in range(depth)]
        blocks = (Block(shape, config.activation_of(shape), rate) for rate in rates)
        self.transformer = Transformer(blocks, config)
        self.ln_post = LowPrecisionLayerNorm(width, eps=shape.norm_eps)
        self.image_projection = nn.Parameter(torch.empty(width, shape.embed_dim))
        self.box_head = BoxHead(width, side**2) if boxes else None
        self.motion_stem = None
        with torch.no_grad():
            # CLIP's scheme: standard deviations from the width.
            nn.init.normal_(self.class_embedding, std=width**-0.5)
            nn.init.normal_(self.positional_embedding, std=width**-0.5)
            nn.init.normal_(self.image_projection, std=width**-0.5)
            nn.init.normal_(self.conv1.weight, std=self.conv1.in_features**-0.5)
            self.init_temporal(config)
            if config.spatial_init == "sinusoidal":
                self.positional_embedding[1:] = self.spatial_waves(config, width)
        # Last, so that the tower's other weights are those of the same seed without a stem.
        if config.motion_stem:
            self.motion_stem = MotionStem(width, side, shape.patch_size, config.motion_stem)

    def embed_patches(self, patches: Tensor) -> Tensor:
        """See the base class."""
        embedded: Tensor = self.conv1(patches)
        return embedded

    def places(self) -> tuple[Tensor, Tensor]:
        """CLS, whose place is the first of the spatial embedding, and the other places."""
        return (self.class_embedding + self.positional_embedding[0]).unsqueeze(0), self.positional_embedding[1:]

    def pooled(self, x: Tensor, frozen: bool = False, pool: str = "cls") -> Tensor:
        """See the base class."""
        # CLS passes the adapters untouched; the mean of the patches sees directly what they have written.
        if pool == "cls":
            x = x[:, 0]
        elif pool == "mean":
            x = x[:, 1:].mean(dim=1)
        else:
            x = (x[:, 0] + x[:, 1:].mean(dim=1)) / 2
        # The norm belongs to the backbone, the projection is trained by both paths.
        return (call_frozen(self.ln_post, x) if frozen else self.ln_post(x)) @ self.image_projection


# --------------------------------------------------------------------------------------------------
# EgoVideo: the tower on two paths, trained together (EgoHOD, section 3.3)
#
# The slow path is the plain tower on few frames; it trains the backbone. The fast path runs many frames through the
# same weights, frozen, with a motion adapter at each block; it trains the adapters, the patch and temporal embedding,
# the motion stem and the projections. Frozen means that weights receive no gradient from this path; activations do, so
# every adapter learns.
# --------------------------------------------------------------------------------------------------


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
        # Upstream says truncated normal, whose default bounds are a hundred standard deviations away.
        nn.init.normal_(self.down_proj.weight, std=0.02)
        # He's scheme for the convolutions: 2 / inputs that one output reads.
        nn.init.normal_(self.dwconv.weight, std=(2 / KERNEL) ** 0.5)
        nn.init.normal_(self.conv.weight, std=(2 / hidden) ** 0.5)
        if self.conv2d is not None:
            nn.init.normal_(self.conv2d.weight, std=(2 / (9 * hidden)) ** 0.5)
        nn.init.zeros_(self.up_proj.weight)
        for layer in (self.down_proj, self.dwconv, self.conv, self.up_proj, self.conv2d):
            if layer is not None and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, frames: int, prefix: int = 1) -> Tensor:
        """``x`` [B, prefix + frames * P, D], frame by frame with P patches each -> the same shape."""
        B, N, _ = x.shape
        P = (N - prefix) // frames
        assert frames * P == N - prefix, f"{N - prefix} patch tokens are no {frames} frames"
        first, patches = x[:, :prefix], x[:, prefix:]
        h = F.gelu(self.down_proj(patches)).view(B, frames, P, -1)
        spatial = h
        if self.conv2d is not None:
            side = round(P**0.5)
            assert side * side == P, "the spatial branch needs whole frames, so no patch dropout"
            grid = h.reshape(B * frames, side, side, -1).permute(0, 3, 1, 2)
            spatial = self.conv2d(grid).permute(0, 2, 3, 1).reshape(h.shape)
        # The depth-wise convolution over time as shifted products: the channels need not be moved to where Conv1d wants
        # them, and products follow autocast's type, which the parameters do not.
        assert self.dwconv.bias is not None
        weight = self.dwconv.weight.squeeze(1).T.to(h.dtype)
        padded = F.pad(spatial, (0, 0, 0, 0, KERNEL // 2, KERNEL // 2))
        mixed = self.dwconv.bias.to(h.dtype) + padded[:, :frames] * weight[0]
        for shift in range(1, KERNEL):
            mixed = mixed + padded[:, shift : shift + frames] * weight[shift]
        # A point-wise convolution is a product with a matrix.
        mixed = F.linear(mixed, self.conv.weight.squeeze(2), self.conv.bias)
        # Scaling the few weights instead of all tokens spares keeping the tokens for gamma's gradient.
        up = F.linear((h + mixed).flatten(1, 2), self.gamma * self.up_proj.weight, self.gamma * self.up_proj.bias)
        return torch.cat((first, patches + up), dim=1)


class SlowFastTower(VisionTower):
    """What makes a tower one with an adapter at each block; calling it is the slow path, :meth:`fast` the fast one.

    It is put in front of the tower among a class's bases, as in :class:`SlowFastTransformer`.

    ``config.fast.position`` is where an adapter is: ``before`` its block, whose attention then reads what it writes, or
    ``after`` it, as published. ``config.fast.pool`` is what the fast path projects: ``cls``, the ``mean`` of the patch
    tokens, or the mean of ``both``. Published are ``after`` and ``cls``, which leave the last adapter without effect.
    """

    def __init__(self, shape: Geometry, config: ModelConfig, boxes: bool = False) -> None:
        super().__init__(shape, config, boxes)  # type: ignore[call-arg]
        self.position, self.pool = config.fast.position, config.fast.pool
        self.stem_paths = config.fast.stem_paths
        for block in self.transformer.resblocks:
            block.adapter = MotionAdapter(shape.vision_width, config.fast.spatial)
        if (self.position, self.pool, shape.pool) == ("after", "cls", "token"):
            # What the last adapter writes is never read: DistributedDataParallel must not wait for its gradients.
            self.transformer.resblocks[-1].adapter.requires_grad_(False)

    def compile_blocks(self, **options: Any) -> None:
        """As the base class, and a block with its adapter on the fast path."""
        super().compile_blocks(**options)
        # From the class, since the instance's own method may be compiled already.
        method = type(self)._adapted.__get__(self)
        self._adapted = torch.compile(method, **options)  # type: ignore[method-assign]

    def forward(self, video: Tensor, motion: Tensor | None = None) -> Tensor:
        """The slow path: ``video`` [B, 3, T, H, W], normalised -> [B, E], not normalised.

        ``motion`` are the stem's features of these frames, if this path is to have them.
        """
        x, chosen = self.embed(video, motion)
        return self.pooled(self.transformer(x, self.keep, self.rotations(video.shape[2], chosen)))

    def fast(self, video: Tensor, motion: Tensor | None = None) -> Tensor:
        """``video`` [B, 3, T, H, W], normalised -> [B, E], not normalised.

        ``motion`` are the stem's features of these frames if they were computed already.
        """
        # Where only CLS is read in the end, only CLS needs the last block; an adapter after it reads all tokens.
        x, _ = self._tokens(video, motion, whole=self.pool != "cls" or self.position != "before")
        return self.pooled(x, frozen=True, pool=self.pool)

    def fast_with_boxes(self, video: Tensor, motion: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`fast`, and the boxes of all frames from the same tokens: [B, E] and [B, T, 3, 4]."""
        assert self.box_head is not None, "the tower was built without boxes"
        x, chosen = self._tokens(video, motion, whole=True)
        boxes: Tensor = self.box_head(x[:, self.prefix_tokens :], chosen, video.shape[2])
        return self.pooled(x, frozen=True, pool=self.pool), boxes

    def tokens(self, video: Tensor) -> Tensor:
        """Those of the fast path, which has all frames."""
        return self._tokens(video, None, whole=True)[0][:, self.prefix_tokens :]

    def backbone(self) -> list[nn.Parameter]:
        """What only the slow path trains: blocks without adapters, norms, class and spatial embedding."""
        named = self.named_parameters()
        return [each for name, each in named if ".adapter." not in name and not name.startswith(self.BOTH_PATHS)]

    def _tokens(self, video: Tensor, motion: Tensor | None, whole: bool) -> tuple[Tensor, Tensor | None]:
        """Tokens behind the last block and which patches they are; unless ``whole``, of these CLS alone."""
        frames = video.shape[2]
        x, chosen = self.embed(video, self.motion(video) if motion is None else motion, frozen=True)
        blocks, rotations = self.transformer.resblocks, self.rotations(frames, chosen)
        for i, block in enumerate(blocks):
            keep = self.keep if i == len(blocks) - 1 and not whole else None
            # Learned rotations are the backbone's.
            inputs = (block, x, frames, keep, *(() if rotations is None else (rotations[i].detach(),)))
            if i < self.transformer.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(self._adapted, *inputs, use_reentrant=False)
            else:
                x = self._adapted(*inputs)
        return x, chosen

    def _adapted(self, block: nn.Module, x: Tensor, frames: int, keep: int | None, *rotation: Tensor) -> Tensor:
        adapter = block.adapter
        assert isinstance(adapter, MotionAdapter)
        if self.position == "before":
            return call_frozen(block, adapter(x, frames, self.prefix_tokens), keep, *rotation)
        return adapter(call_frozen(block, x, keep, *rotation), frames, self.prefix_tokens)


class SlowFastTransformer(SlowFastTower, VideoTransformer):
    """The project's own tower on two paths."""


def slow_frames(fast: int, slow: int) -> slice:
    """Which of ``fast`` frames the slow path sees: the middle one of each of ``slow`` equal parts.

    Raises :class:`UserError` if the parts are not equal.
    """
    if fast % slow:
        raise UserError(
            f"{fast} frames (model.num_frames, or those of a clip) are no multiple of model.fast.slow_frames={slow}; "
            "the slow path takes one of each so many"
        )
    step = fast // slow
    return slice(step // 2, None, step)


def call_frozen(module: nn.Module, *inputs: Any) -> Tensor:
    """Call ``module`` with its weights as constants: gradients pass through to the inputs, none reaches the weights."""
    if (sharded := getattr(module, "frozen_call", None)) is not None:
        # Its weights are here only while it computes (egohod.training.sharding).
        result: Tensor = sharded(*inputs)
        return result
    # An adapter is named as a part of its block, but is called outside of it and trained.
    weights = {name: value.detach() for name, value in module.named_parameters() if not name.startswith("adapter.")}
    output: Tensor = functional_call(module, weights, inputs)
    return output


def sinusoids(positions: int, width: int) -> Tensor:
    """Sine and cosine waves over a position (frame, row or column): [positions, width], values in [-1, 1].

    Periods run from two positions (neighbours differ) to four times the range (it never wraps around).
    """
    # Evenly in logarithms: as many waves for neighbouring frames as for the halves of a clip.
    rates = torch.logspace(math.log10(math.pi), math.log10(math.pi / (2 * positions)), (width + 1) // 2)
    angles = torch.arange(positions).unsqueeze(1) * rates
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)[:, :width]
