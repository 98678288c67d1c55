"""Every knob of the HOD pipeline, with the reason for each default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egohod.config import load_as
from egohod.data.config import SourceConfig
from egohod.hod.detectors import DETECTORS
from egohod.hod.pipeline import COLUMNS
from egohod.hod.settings import CheckSettings, NarratorSettings
from egohod.knobs import knob, out_of_range, part

# Settings of a training's source that this pipeline has no use for.
_IDLE = ("weight", "detections")


@dataclass
class WindowsConfig:
    """Videos without narrations, cut into clips; used where source.metadata is empty."""

    seconds: float = knob(4.0, "length of a window", above=0)
    stride: float = knob(4.0, "from one window's start to the next; less than the length overlaps them", above=0)


@dataclass
class DemoConfig:
    """The demo world, rendered before anything else if it is not there."""

    folder: str | None = knob(None, "where it lies; null is no demo")
    scale: float = knob(1.0, "its size; 1 has 2,000 clips to train on", above=0, high=100)


@dataclass
class DetectorConfig:
    """Who finds hands and objects."""

    kind: str = knob(
        "mediapipe",
        "mediapipe: hands, on any CPU; detections: files made elsewhere; torchvision: your own checkpoint; oracle: "
        "files again, spoiled on purpose to see what the rest bears",
        choices=tuple(DETECTORS),
    )
    options: dict[str, Any] = knob({}, "arguments of the detector, docs/hod.md; e.g. {path: detections.parquet}")


@dataclass
class TracksConfig:
    """How boxes become tracks."""

    camera: bool = knob(True, "take the camera's own motion out, told from what lies outside of the boxes")
    min_score: float = knob(0.3, "boxes of which the detector is less sure are not looked at", low=0, high=1)
    max_gap: float = knob(
        0.6, "seconds without a box that are bridged; a hand that is longer unseen may be anywhere", low=0
    )
    smooth: float = knob(0.04, "seconds that jitter is smoothed over; a quick tap lasts a quarter of one", low=0)
    max_jump: float = knob(0.35, "share of the picture that a box moves at most between two frames", above=0)


@dataclass
class SlurmConfig:
    """What --submit asks of a Slurm for each shard; null leaves it to the cluster."""

    partition: str | None = knob(None, "where the jobs go")
    minutes: int | None = knob(None, "longest time of a job; one that was cut off goes on when it is run again", low=1)
    memory_gb: float | None = knob(None, "memory of a job", above=0)
    gpus: int | None = knob(None, "for a torchvision detector", low=0)
    at_once: int | None = knob(None, "jobs that run side by side", low=1)


@dataclass
class HodConfig:
    """The pipeline as a whole."""

    output: str = knob("hod.csv", "the narrations; what the stages found out lies beside, in OUTPUT.work")
    source: SourceConfig = part(SourceConfig)
    windows: WindowsConfig = part(WindowsConfig)
    demo: DemoConfig = part(DemoConfig)
    detector: DetectorConfig = part(DetectorConfig)
    tracks: TracksConfig = part(TracksConfig)
    narrator: NarratorSettings = part(NarratorSettings)
    check: CheckSettings = part(CheckSettings)
    slurm: SlurmConfig = part(SlurmConfig)
    frames: int = knob(16, "frames looked at in each clip, as published", low=1)
    decoder: str = knob("auto", "as data.decoder of a training", choices=("auto", "torchcodec", "pyav", "decord"))
    cache: str | None = knob(None, "as data.cache of a training: a folder that keeps files of remote roots")
    cache_gb: float = knob(50.0, "size of cache in GB (1e9 bytes)", above=0)
    workers: int = knob(
        2,
        "processes that decode and detect; 0 does so in the main process, which a clip that makes it crash ends",
        low=0,
    )
    clip_seconds: float = knob(
        600.0, "a clip that a worker is at for longer is a failure: a damaged video may hang its decoder", above=0
    )
    keep: list[str] = knob(
        [], "further columns of the metadata that the output has too, for instance to group hard negatives by"
    )
    dataset: str = knob("", "dataset column of rows whose metadata has none; a training chooses the video root by it")
    seed: int = knob(0, "draws one of several narrations of a clip, where source.list_text=random", low=0)
    block: int = knob(
        256,
        "clips whose results share a file, and the least that a shard has; another value does not find what is done",
        low=1,
    )
    max_bad_fraction: float = knob(
        0.05,
        "stop when more than this share of the rows, or of the clips a stage was tried on, fails; fewer than a "
        "thousand are judged as a thousand",
        low=0,
        high=1,
    )


def load(path: str | Path, overrides: Sequence[str] = ()) -> HodConfig:
    """Read a file as :func:`egohod.config.load` does. Raises :class:`~egohod.errors.UserError`."""
    return load_as(HodConfig, path, overrides, check)


def check(config: HodConfig) -> list[tuple[str, str]]:
    """Everything that is out of range or contradicts itself, as (key, what is wrong with it)."""
    problems = out_of_range(config)
    unused = SourceConfig()
    problems += [
        (f"source.{name}", f"source.{name} is a setting of trainings, the pipeline has no use for it")
        for name in _IDLE
        if getattr(config.source, name) != getattr(unused, name)
    ]
    for name in dict.fromkeys(config.keep):
        if name in COLUMNS or config.keep.count(name) > 1:
            why = "which the output has anyway" if name in COLUMNS else "twice"
            problems.append(("keep", f"keep names the column '{name}', {why}"))
    return problems
