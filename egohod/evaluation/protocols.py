"""Protocols by name: which frames of a clip a model is shown, how often, and what classes are told with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is run; resolution, activation and the like come from the checkpoint, never from here.

    ``frames`` per view. ``sampling``: *segments* takes the middle of each of ``frames`` equal parts of the clip (SPEC
    5); *midpoints* the floored midpoints of equal parts of the whole file; *windows* runs of frames ``stride`` apart,
    their starts spread evenly over the file. A clip has ``windows`` x ``crops`` views, whose similarities are averaged.
    ``prompts``: narrations of which split stand for a class.
    """

    name: str
    source: str
    frames: int = 16
    sampling: str = "segments"
    windows: int = 1
    stride: int = 1
    crops: int = 1
    prompts: str = "train"

    @property
    def views(self) -> int:
        """Views of each clip."""
        return self.windows * self.crops


PROTOCOLS = {
    each.name: each
    for each in (
        Protocol("clean", "this project: 16 frames, one centre crop; class prompts from training narrations only"),
        Protocol(
            "upstream", "upstream EgoHOD: class prompts from training and validation narrations", prompts="train+val"
        ),
        Protocol("upstream_4", "upstream EgoHOD's base config: 4 frames", frames=4, prompts="train+val"),
        Protocol("whole_clip", "upstream EgoHOD on EGTEA: one view, floored midpoints", sampling="midpoints"),
        Protocol(
            "lavila_10x3", "LaViLa on EGTEA: 10 clips of 16 frames 2 apart x 3 crops",
            sampling="windows", windows=10, stride=2, crops=3,
        ),
    )
}  # fmt: skip
