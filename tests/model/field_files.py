"""Files as the projects of the field write them: their key names, shapes and the content beside the weights."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import Eva, _create_eva
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import Tensor, nn

from egohod.model.config import GEOMETRIES, IMAGE_STATS, Geometry, geometry

GOLDEN = Path(__file__).parents[1] / "golden"
SCHEMA: dict[str, Any] = json.loads((GOLDEN / "upstream_names.json").read_text())

State = dict[str, Tensor]


def noise(shapes: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> State:
    """Random weights; a token table is one row, repeated without taking space."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        rows = 1 if "token_embedding" in name else (shape[0] if shape else None)
        value = torch.randn([] if rows is None else [rows, *shape[1:]], generator=generator) * 0.02
        state[name] = value.to(dtype).expand(shape) if rows == 1 else value.to(dtype)
    return state


def upstream_state(kind: str) -> State:
    """Two blocks deep, with the names and shapes of upstream's own modules; see upstream_names.json."""
    return noise(SCHEMA[kind]["first_two_blocks"])


def plain(state: State) -> State:
    """The flash spelling of blocks -> the plain one."""
    pairs = ((r"\.attn\.Wqkv\.", ".attn.in_proj_"), (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."))
    for flash, usual in pairs:
        state = {re.sub(flash, usual, name): value for name, value in state.items()}
    return state


def two_blocks(monkeypatch: pytest.MonkeyPatch, name: str, **more: Any) -> str:
    """Register a geometry that is ``name`` two blocks deep; returns what it is called."""
    shallow = replace(geometry(name), name=f"{name}_2", vision_layers=2, text_layers=2, **more)
    monkeypatch.setitem(GEOMETRIES, shallow.name, shallow)
    return shallow.name


def open_clip_state(geometry: Geometry, embed_dim: int | None = None, custom_text: bool = False) -> State:
    """Random weights under the names of open_clip's own model; ``custom_text`` is its class with a separate tower."""
    with torch.device("meta"):
        model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(
            embed_dim or geometry.embed_dim,
            {
                "image_size": geometry.image_size,
                "patch_size": geometry.patch_size,
                "width": geometry.vision_width,
                "layers": geometry.vision_layers,
                "head_width": geometry.vision_width // geometry.vision_heads,
            },
            {"width": geometry.text_width, "layers": geometry.text_layers, "heads": geometry.text_heads},
        )
    return noise({name: list(value.shape) for name, value in model.state_dict().items()}, torch.float32)


def openai_state(geometry: Geometry, embed_dim: int | None = None) -> State:
    """OpenAI's names are open_clip's, and three numbers; weights in half precision."""
    state = {name: value.half() for name, value in open_clip_state(geometry, embed_dim).items()}
    numbers = {
        "input_resolution": geometry.image_size,
        "context_length": geometry.context_length,
        "vocab_size": geometry.vocab_size,
    }
    return state | {name: torch.tensor(value) for name, value in numbers.items()}


class _Holder(nn.Module):
    """A module tree with the given dotted names, so that they can be scripted into an archive."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, value in state.items():
            head, _, rest = name.partition(".")
            if not rest:
                self.register_buffer(name, value)
            elif head not in self._modules:
                inside = {key.partition(".")[2]: each for key, each in state.items() if key.startswith(f"{head}.")}
                self.add_module(head, _Holder(inside))

    def forward(self) -> int:
        return 0


def write_archive(path: Path, state: State) -> Path:
    """A TorchScript archive, as OpenAI releases its models."""
    torch.jit.script(_Holder(state)).save(str(path))
    return path


def write_upstream(path: Path, state: State, *, zipped: bool = True) -> Path:
    """A pickle with OmegaConf and numpy objects beside the weights and DistributedDataParallel's prefix."""
    config = OmegaConf.create(
        {"model": {"name": "CLIP_VITB16", "clip_length": 4}, "lr": 1e-5, "betas": [0.9, 0.999], "resume": None}
    )
    content = {
        "epoch": 7,
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]},
        "best_acc1": np.float64(0.418),
        "scores": np.arange(3.0),
        "args": config,
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def write_avion(path: Path, state: State, **options: str) -> Path:
    """A pickle with the command line's argparse object beside the weights."""
    args = argparse.Namespace(
        model="CLIP_VITB16", pretrain_zoo="openai", project_embed_dim=256, clip_length=4, gpu=None, **options
    )
    content = {
        "epoch": 5,
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 12},
        "best_acc1": np.float64(0.329),
        "args": args,
    }
    torch.save(content, path)
    return path


def write_safetensors(path: Path, state: State, **metadata: str) -> Path:
    """Contiguous copies, as the format wants them."""
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata=metadata or None)
    return path


# --------------------------------------------------------------------------------------------------
# Tiny models of open_clip, by family
# --------------------------------------------------------------------------------------------------

_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}


# timm's functions of these families with other sizes: open_clip builds a backbone by its name alone.
@register_model
def tiny_siglip(pretrained: bool = False, **options: Any) -> VisionTransformer:
    return _create_vision_transformer(
        "vit_base_patch16_siglip_224", pretrained, **(_SMALL | {"class_token": False, "global_pool": "map"} | options)
    )


@register_model
def tiny_eva_clip(pretrained: bool = False, **options: Any) -> Eva:
    kind = {"qkv_fused": False, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
    kind |= {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
    return _create_eva("eva02_base_patch16_clip_224", pretrained, **(_SMALL | kind | options))


@register_model
def tiny_pe_core(pretrained: bool = False, **options: Any) -> Eva:
    kind = {"attn_type": "rope", "use_pre_transformer_norm": True, "use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
    kind |= {"rope_grid_offset": 1.0, "rope_grid_indexing": "xy", "attn_pool_num_heads": 4, "attn_pool_mlp_ratio": 4.0}
    kind |= {"global_pool": "map", "norm_layer": partial(nn.LayerNorm, eps=1e-5)}
    return _create_eva("vit_pe_core_base_patch16_224", pretrained, **(_SMALL | kind | options))


TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
OWN_VIT = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 12, "layers": 2, "mlp_ratio": 3.0}
SIGLIP = {
    "context_length": 16, "vocab_size": 90, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
    "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 48, "heads": 4, "layers": 2, "mlp_ratio": 3.7362,
    "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
}  # fmt: skip


def on_timm(name: str, pool: str, projection: str | None) -> dict[str, Any]:
    options = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": pool, "timm_proj": projection}
    return {"image_size": 32, **options}


def siglip(**text: Any) -> dict[str, Any]:
    vision = on_timm("tiny_siglip", "map", "none")
    both = {"vision_cfg": vision, "text_cfg": SIGLIP | text}
    return {"embed_dim": 48, "init_logit_bias": -10, "custom_text": True, **both}


HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
CLIP = {"mean": list(IMAGE_STATS["clip"].mean), "std": list(IMAGE_STATS["clip"].std)}
OPEN_CLIP_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "CLIP": ({"embed_dim": 40, "vision_cfg": OWN_VIT, "text_cfg": TEXT}, CLIP),
    "CLIP, quick GELU": ({"embed_dim": 40, "quick_gelu": True, "vision_cfg": OWN_VIT, "text_cfg": TEXT}, CLIP),
    "SigLIP": (siglip(), HALVES),
    "SigLIP 2": (siglip(act_kwargs={"approximate": "tanh"}), HALVES),
    "SigLIP, no text projection": (siglip(proj_type="none"), HALVES),
    "EVA-CLIP": (
        {
            "embed_dim": 40,
            "vision_cfg": on_timm("tiny_eva_clip", "token", None),
            "text_cfg": TEXT,
            "custom_text": True,
        },
        CLIP,
    ),
    "PE": (
        {"embed_dim": 40, "vision_cfg": on_timm("tiny_pe_core", "map", None), "text_cfg": TEXT, "custom_text": True},
        HALVES,
    ),
    "a projection behind the backbone": (
        {"embed_dim": 40, "vision_cfg": on_timm("tiny_siglip", "", "linear"), "text_cfg": TEXT},
        HALVES,
    ),
    "tokens by their end": (
        {"embed_dim": 40, "vision_cfg": OWN_VIT, "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 2}},
        CLIP,
    ),
}


def write_open_clip(folder: Path, family: str) -> nn.Module:
    """open_clip's own model with random weights, which are in ``folder`` with its configuration, as on the Hub."""
    config, pixels = OPEN_CLIP_FAMILIES[family]
    folder.mkdir(exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": pixels | {"interpolation": "bicubic", "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    model: nn.Module = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        # Also what starts at zero or one: a part that is left out must show.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    write_safetensors(folder / "open_clip_model.safetensors", model.state_dict(), format="pt")
    return model
