"""Every knob of the HOD pipeline, with the reason for each default."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egohod.config import load_as
from egohod.data.config import SourceConfig
from egohod.hod.detectors import DETECTORS
from egohod.knobs import knob, out_of_range, part

log = logging.getLogger(__name__)

_ENDPOINT = (
    *("endpoint", "model", "api_key_env", "prompt", "batch", "concurrency", "timeout_seconds", "retries"),
    *("give_up_seconds", "temperature", "max_tokens", "answer_format"),
)
_FRAMES = ("frames", "frame_size", "jpeg_quality")
_TEMPLATE = ("seed", "varied")
_USED = {"template": _TEMPLATE, "llm": (*_TEMPLATE, *_ENDPOINT), "vlm": (*_TEMPLATE, *_ENDPOINT, *_FRAMES)}


@dataclass
class NarratorSettings:
    """Who words the facts."""

    kind: str = knob(
        "template",
        "template: sentences put together here, offline; llm: a language model rewrites the narration; vlm: a "
        "vision-language model is shown the frames too, for videos without narrations",
        choices=("template", "llm", "vlm"),
    )
    seed: int = knob(0, "varies the template's wording, and is handed to the model", low=0)
    varied: bool = knob(
        True,
        "template: say the same in several ways; false keeps to one, and to what moves where, which a text tower that "
        "starts from nothing learns sooner",
    )
    endpoint: str = knob(
        "http://127.0.0.1:8000/v1", "base address of any OpenAI-compatible server (vLLM, Ollama, llama.cpp, a service)"
    )
    model: str = knob("", "what the server calls the model; empty is right for servers that have only one")
    api_key_env: str | None = knob(
        None, "environment variable that holds the key; null sends none. The key itself belongs in no file and no log"
    )
    prompt: str | None = knob(
        None, "Jinja file of the prompt; null is configs/hod/prompts/llm.jinja or vlm.jinja, by kind"
    )
    batch: int = knob(8, "clips a request; a small model mixes up many, a large one saves the prompt's tokens", low=1)
    concurrency: int = knob(4, "requests in flight at most", low=1)
    timeout_seconds: float = knob(120.0, "a request that has no whole answer by then is tried again", above=0)
    retries: int = knob(5, "further tries of a request that times out, is refused for load or breaks off", low=0)
    give_up_seconds: float = knob(
        600.0, "stop the run, which then can be resumed, when no request at all has worked for so long", above=0
    )
    temperature: float = knob(0.7, "0 makes captions alike, which teaches less; above 1 models invent", low=0, high=2)
    max_tokens: int = knob(128, "tokens of the answer a clip", low=16)
    answer_format: str = knob(
        "json_schema",
        "how the server is asked to keep to the schema: json_schema (vLLM, llama.cpp, Ollama, OpenAI), "
        "json_object_schema (llama-cpp-python), json_object for those that know no schema, none to say it in the "
        "prompt alone; the answer is held to it in any case",
        choices=("json_schema", "json_object_schema", "json_object", "none"),
    )
    frames: int = knob(4, "vlm: frames of a clip that are sent, evenly spaced", low=1)
    frame_size: int = knob(448, "vlm: longer side of a sent frame in pixels; tokens grow with its square", low=32)
    jpeg_quality: int = knob(85, "vlm: of the sent frames", low=10, high=100)


@dataclass
class CheckSettings:
    """What a caption must keep to."""

    min_words: int = knob(3, "shorter says nothing", low=1)
    max_words: int = knob(60, "the text tower reads 77 tokens; what is longer is cut off there", low=4)
    min_seen: float = knob(
        0.1, "a hand that was found in a smaller share of the frames may not be spoken of", low=0, high=1
    )
    words: bool = knob(True, "hold verbs, objects and sides to the source narration's")
    tracks: bool = knob(True, "hold hands, directions and contact to the tracks")
    language: float = knob(0.6, "least share of a caption's words that are English; 0 asks for none", low=0, high=1)
    ask_again: bool = knob(True, "a refused caption is asked for once more, with the reasons, before the template")


def used(settings: NarratorSettings) -> dict[str, Any]:
    """The knobs that the chosen narrator looks at, and which it is."""
    return {name: getattr(settings, name) for name in ("kind", *_USED[settings.kind])}


def warn_of_unused(settings: NarratorSettings) -> list[str]:
    """Say which knobs differ from their default though the chosen narrator does not look at them; their names."""
    plain, heeded = NarratorSettings(), used(settings)
    unused = [
        each.name
        for each in dataclasses.fields(settings)
        if each.name not in heeded and getattr(settings, each.name) != getattr(plain, each.name)
    ]
    for name in unused:
        log.warning("narrator.%s is ignored: narrator.kind=%s has no use for it", name, settings.kind)
    return unused


COLUMNS = ("video_id", "start_second", "end_second", "text", "dataset", "uid")
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
