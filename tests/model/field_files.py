"""Files as the projects of the field write them: their key names, shapes and the content beside the weights."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from egohod.model.config import GEOMETRIES, Geometry, geometry

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
