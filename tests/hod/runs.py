"""What tests of the HOD programs share: arguments of a small run, its output, and made-up videos."""

from __future__ import annotations

import csv
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np

from egohod.hod.config import CheckConfig
from egohod.hod.narrators import Checked, Narrator, Request, check_narrations
from egohod.hod.narrators.template import TemplateNarrator


def head(world: Path, rows: int) -> list[str]:
    return (world / "train" / "narrations.csv").read_text().splitlines()[: rows + 1]


def command(world: Path, folder: Path, lines: list[str]) -> list[str]:
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    knobs = ["demo.folder=null", "workers=0", "frames=8", "block=3", "keep=[]"]
    knobs += [f"detector.options.path={world}/train/detections.parquet"]
    places = ["--metadata", f"{folder}/clips.csv", "--root", f"{world}/train/videos", "--output", f"{folder}/hod.csv"]
    return ["--config_file", "configs/hod/demo.yml", *places, *knobs]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def encode(path: Path, frames: int, level: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            picture = np.full((48, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def narrate_checked(
    narrator: Narrator,
    requests: Sequence[Request],
    settings: CheckConfig | None = None,
    captions: Sequence[str] = ("fine",),
) -> dict[int, Checked]:
    """Both stages that make captions, as the pipeline runs them; by the number of the request."""
    answers = dict(narrator.narrate(requests))
    first = [answers[number] for number in range(len(requests))]
    return dict(check_narrations(requests, first, narrator, settings or CheckConfig(), TemplateNarrator(), captions))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Within, no file of this process can grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
