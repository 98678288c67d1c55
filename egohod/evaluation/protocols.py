"""Protocols by name: which frames of a clip a model sees, how they are resized, and what stands for a class.

A published number is reproduced by the protocol of its family and no other: docs/evaluation.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from egohod.data.frames import RULES

WHOLE_FILES = ("midpoints", "windows")
"""Samplings of clips that are files of their own, see :func:`egohod.evaluation.clips.frame_numbers`."""


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is run; resolution, activation and the like come from the checkpoint, never from here.

    ``frames`` per view. ``sampling``: a rule of :func:`egohod.data.frames.clip_indices`; or, where clips are files of
    their own, *midpoints*, the floored midpoints of equal parts of the file, or *windows*, runs of frames ``stride``
    apart whose starts are spread evenly over the file. A clip has ``windows`` x ``crops`` views. ``merge``: whether the
    *mean* or the *max* of the views' similarities to a text counts. ``resize``: one of
    :data:`egohod.data.transforms.RESIZES`. ``image_stats``: the ``model.image_stats`` of the weights whose numbers this
    protocol reproduces, None for any; frames are always normalised as the model expects. ``prompts``: narrations of
    which split stand for a class.
    """

    name: str
    source: str
    frames: int = 16
    sampling: str = "middle"
    windows: int = 1
    stride: int = 1
    crops: int = 1
    merge: str = "mean"
    resize: str = "bicubic_antialias"
    image_stats: str | None = None
    prompts: str = "train"

    def __post_init__(self) -> None:
        assert self.sampling in (*RULES, *WHOLE_FILES), self.sampling
        assert self.merge in ("mean", "max"), self.merge

    @property
    def views(self) -> int:
        """Views of each clip."""
        return self.windows * self.crops

    @property
    def whole_files(self) -> bool:
        """Whether it is for clips that are files of their own."""
        return self.sampling in WHOLE_FILES


# AVION and LaViLa resize as torchvision's default is, bilinear, and their torchvision (0.14, 0.11) not antialiased.
_UPSTREAM: dict[str, Any] = {"resize": "bicubic", "image_stats": "clip", "prompts": "train+val"}
_LAVILA: dict[str, Any] = {"resize": "bilinear", "image_stats": "avion", "prompts": "train+val"}

PROTOCOLS = {
    each.name: each
    for each in (
        Protocol("clean", "this project: 16 frames, one centre crop; class prompts from training narrations only"),
        Protocol("whole_clip", "this project on EGTEA: as clean, floored midpoints", sampling="midpoints"),
        Protocol("upstream", "upstream EgoHOD", sampling="upstream", **_UPSTREAM),
        Protocol("upstream_4", "upstream EgoHOD's base config: 4 frames", frames=4, sampling="upstream", **_UPSTREAM),
        Protocol("upstream_egtea", "upstream EgoHOD on EGTEA", sampling="midpoints", **_UPSTREAM),
        Protocol("avion", "AVION", sampling="avion", **_LAVILA),
        Protocol("lavila", "LaViLa", sampling="lavila", **_LAVILA),
        Protocol(
            "lavila_10x3", "LaViLa on EGTEA: 10 clips of 16 frames 2 apart x 3 crops",
            sampling="windows", windows=10, stride=2, crops=3, merge="max", **_LAVILA,
        ),
    )
}  # fmt: skip

# EGTEA's clips are files of their own, which published code samples in another way than moments of long videos.
_ON_EGTEA = {"upstream": "upstream_egtea", "upstream_4": "upstream_egtea", "lavila": "lavila_10x3"}


def protocol_for(name: str, kind: str) -> Protocol:
    """The protocol called ``name`` for a benchmark of a kind (``egtea``, ...); ``auto`` is this project's own.

    On EGTEA the name of a family means what that family does there.
    """
    if name == "auto":
        name = "whole_clip" if kind == "egtea" else "clean"
    chosen = PROTOCOLS[name]
    if kind == "egtea" and name in _ON_EGTEA:
        return replace(PROTOCOLS[_ON_EGTEA[name]], frames=chosen.frames)
    return chosen
