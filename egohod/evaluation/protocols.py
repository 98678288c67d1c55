"""Protocols by name: which frames of a clip a model sees, how they are resized, and what stands for a class.

A published number is reproduced by the protocol of its family and no other: docs/evaluation.md has the table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from egohod.data.dataset import EvalProtocol

# AVION and LaViLa resize as torchvision's default is, bilinear, and their torchvision (0.14, 0.11) not antialiased.
_UPSTREAM: dict[str, Any] = {"resize": "bicubic", "image_stats": "clip", "prompts": "train+val"}
_LAVILA: dict[str, Any] = {"resize": "bilinear", "image_stats": "avion", "prompts": "train+val"}

PROTOCOLS = {
    each.name: each
    for each in (
        EvalProtocol("clean", "this project: 16 frames, one centre crop; class prompts from training narrations only"),
        EvalProtocol("whole_clip", "this project on EGTEA: as clean, floored midpoints", sampling="midpoints"),
        EvalProtocol("upstream", "upstream EgoHOD", sampling="upstream", **_UPSTREAM),
        EvalProtocol(
            "upstream_4", "upstream EgoHOD's base config: 4 frames", frames=4, sampling="upstream", **_UPSTREAM
        ),
        EvalProtocol("upstream_egtea", "upstream EgoHOD on EGTEA", sampling="midpoints", **_UPSTREAM),
        EvalProtocol("avion", "AVION", sampling="avion", **_LAVILA),
        EvalProtocol("lavila", "LaViLa", sampling="lavila", **_LAVILA),
        EvalProtocol(
            "lavila_10x3", "LaViLa on EGTEA: 10 clips of 16 frames 2 apart x 3 crops",
            sampling="windows", windows=10, stride=2, crops=3, merge="max", **_LAVILA,
        ),
    )
}  # fmt: skip

# EGTEA's clips are files of their own, which published code samples in another way than moments of long videos.
_ON_EGTEA = {"upstream": "upstream_egtea", "upstream_4": "upstream_egtea", "lavila": "lavila_10x3"}


def protocol_for(name: str, kind: str) -> EvalProtocol:
    """The protocol called ``name`` for a benchmark of a kind (``egtea``, ...); ``auto`` is this project's own.

    On EGTEA the name of a family means what that family does there.
    """
    if name == "auto":
        name = "whole_clip" if kind == "egtea" else "clean"
    chosen = PROTOCOLS[name]
    if kind == "egtea" and name in _ON_EGTEA:
        return replace(PROTOCOLS[_ON_EGTEA[name]], frames=chosen.frames)
    return chosen
