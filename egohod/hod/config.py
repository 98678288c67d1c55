"""Settings of the HOD pipeline, each with the reason for its default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egohod.config import load_as
from egohod.data.config import SourceConfig
from egohod.errors import UserError
from egohod.knobs import knob, out_of_range, part

# The registries: a detector or narrator is a class in a module of its package and a line here. As text: each module
# imports packages that the others do without (torchvision, protobuf, an HTTP client), and --help needs none of them.
DETECTORS = {
    "mediapipe": "mediapipe_hands.MediapipeHands",
    "detections": "files.DetectionFiles",
    "doh100": "doh100.Doh100",
    "torchvision": "torchvision_boxes.TorchvisionBoxes",
    "oracle": "files.Oracle",
}
NARRATORS = {
    "template": "template.TemplateNarrator",
    "llm": "llm.LanguageModelNarrator",
    "vlm": "llm.LanguageModelNarrator",
}
# Of the output, before those of keep. Here, since keep must not repeat one: the pipeline imports this module.
COLUMNS = ("video_id", "start_second", "end_second", "text", "dataset", "uid")
# What narrator.captions may name beside fine, which is the column text; each is a column of its own, after those of
# keep.
FURTHER_CAPTIONS = ("coarse", "opposite")


@dataclass
class WindowsConfig:
    """Clips of videos without narrations; used if source.metadata is empty."""

    seconds: float = knob(4.0, "length of a window", above=0)
    stride: float = knob(4.0, "from one window's start to the next; windows overlap if less than seconds", above=0)


@dataclass
class DemoConfig:
    """The demo world, rendered first if it does not exist."""

    folder: str | None = knob(None, "its folder; null for other videos")
    scale: float = knob(1.0, "its size; 1 has 2,000 training clips", above=0, high=100)


@dataclass
class DetectorConfig:
    """The detector of hands and objects."""

    kind: str = knob(
        "mediapipe",
        "mediapipe: hands, on any CPU; doh100: hands, contact and objects, with a checkpoint that you have; "
        "detections: boxes from files; torchvision: your own checkpoint; oracle: files with synthetic noise, to "
        "measure how much the other stages tolerate",
        choices=tuple(DETECTORS),  # a new detector needs no change here
    )
    # Not dataclasses of their own: the constructor of a detector declares its options, and they are checked against it.
    options: dict[str, Any] = knob({}, "arguments of the detector, docs/hod.md; e.g. {path: detections.parquet}")


@dataclass
class TracksConfig:
    """Tracks from boxes."""

    camera: str = knob(
        "homography",
        "remove the motion of the camera, estimated from the picture outside the boxes, as a shift, an affine map or a "
        "homography; none leaves it in",
        choices=("none", "shift", "affine", "homography"),
    )
    min_score: float = knob(0.3, "boxes with a lower confidence are ignored", low=0, high=1)
    max_gap: float = knob(
        0.6, "longest interpolated gap without a box, in seconds; after a longer one a hand may be anywhere", low=0
    )
    smooth: float = knob(0.04, "seconds over which jitter is smoothed; a quick tap lasts a quarter of a second", low=0)
    max_jump: float = knob(0.35, "farthest that a box moves between two frames, as a share of the picture", above=0)
    hand_metres: float = knob(
        0.12,
        "real size of a hand's box, the square root of its area in metres, by which distances are estimated: a flat "
        "adult hand has 0.13, a fist 0.09",
        above=0,
    )
    hands3d: str | None = knob(
        None, "parquet file of 3-D hands, docs/hod.md: true distances, and depth for away and closer; null has none"
    )

    @staticmethod
    def convert_old_keys(section: dict[str, Any], below: dict[str, Any]) -> list[tuple[str, str]]:
        """Replace a truth value of ``camera``, which was a switch, in place."""
        old = str(section.get("camera")).lower()
        new = "homography" if old in ("true", "yes", "on") else "none" if old in ("false", "no", "off") else None
        if new is None:
            return []
        section["camera"] = new
        return [(f"tracks.camera={old}", f"tracks.camera={new}")]


@dataclass
class NarratorConfig:
    """The narrator, which turns facts into sentences."""

    kind: str = knob(
        "template",
        "template: sentences from phrases, offline; llm: a language model rewrites the narration; vlm: a "
        "vision-language model sees the frames too, for videos without narrations",
        choices=tuple(NARRATORS),  # as for detectors; settings of its own are added below
    )
    # --- template, which also replaces refused captions of the others ---
    seed: int = knob(0, "varies the template's wording, and is sent to the model", low=0)
    varied: bool = knob(
        True,
        "template: several wordings for the same facts; false uses one, and only for what moves where, which a text "
        "tower that is trained from scratch learns sooner",
    )
    captions: list[str] = knob(
        ["fine"],
        "captions of each clip, all by one request. fine: hands, directions and contact, the column text; coarse: what "
        "is done, without them, the column coarse; opposite: the fine one with its motion run backwards, the column "
        "opposite for data.train.NAME.opposite_column. A model's answer is as many times as long; the template writes "
        "opposites by rule",
        choices=("fine", *FURTHER_CAPTIONS),
    )
    distances: bool = knob(
        False,
        "state how far hands move, in centimetres, which is an estimate unless there are 3-D hands (tracks.hands3d)",
    )
    # --- language models ---
    endpoint: str = knob(
        "http://127.0.0.1:8000/v1", "base address of any OpenAI-compatible server (vLLM, Ollama, llama.cpp, a service)"
    )
    model: str = knob("", "the server's name for the model; may be empty for servers with a single model")
    api_key_env: str | None = knob(
        None, "environment variable with the API key; null sends none. The key is never written to a file or log"
    )
    prompt: str | None = knob(
        None, "Jinja file of the prompt; null is configs/hod/prompts/llm.jinja or vlm.jinja, by kind"
    )
    batch: int = knob(
        8, "clips in a request; small models confuse many clips, large ones need the prompt less often", low=1
    )
    concurrency: int = knob(4, "requests in flight at most", low=1)
    timeout_seconds: float = knob(120.0, "a request without a complete answer after this time is retried", above=0)
    retries: int = knob(5, "retries of a request that times out, is rejected for load or breaks off", low=0)
    give_up_seconds: float = knob(
        600.0, "stop the run, which can be resumed, when no request has succeeded for this long", above=0
    )
    temperature: float = knob(
        0.7, "sampling temperature; 0 makes uniform captions, worse to train on; above 1 models invent", low=0, high=2
    )
    max_tokens: int = knob(128, "maximum tokens of the answer for each clip", low=16)
    answer_format: str = knob(
        "json_schema",
        "how a request names the schema of its answer, by which the server guides the decoding: json_schema "
        "(response_format of vLLM, llama.cpp, Ollama, OpenAI), json_object_schema (llama-cpp-python), "
        "structured_outputs (vLLM's own field since 0.10.2), guided_json (vLLM's before; 0.12 and later ignore it), "
        "json_object for servers without schemas, none to use the prompt alone; the answer is always validated",
        choices=("json_schema", "json_object_schema", "structured_outputs", "guided_json", "json_object", "none"),
    )
    price_per_million_input: float | None = knob(
        None, "price of a million tokens of prompts, for --dry_run; null reports tokens alone", low=0
    )
    price_per_million_output: float | None = knob(None, "price of a million tokens of answers, for --dry_run", low=0)
    # --- vision-language models ---
    frames: int = knob(4, "vlm: frames of a clip that are sent, evenly spaced", low=1)
    frame_size: int = knob(448, "vlm: longer side of a sent frame in pixels; tokens grow with its square", low=32)
    jpeg_quality: int = knob(85, "vlm: JPEG quality of the sent frames", low=10, high=100)

    @staticmethod
    def convert_old_keys(section: dict[str, Any], below: dict[str, Any]) -> list[tuple[str, str]]:
        """Replace ``opposites``, in place: it is one of ``captions`` now."""
        if "opposites" not in section:
            return []
        value = str(section.pop("opposites")).lower()
        if value not in ("true", "false"):
            raise UserError(f"narrator.opposites is '{value}', but must be true or false; it is now narrator.captions")
        captions = section.get("captions", below["captions"])
        if isinstance(captions, list):  # anything else is an error that its own check reports
            others = [name for name in captions if name != "opposite"]
            section["captions"] = [*others, "opposite"] if value == "true" else others
        return [("narrator.opposites", "narrator.captions=[fine, opposite]")]


@dataclass
class CheckConfig:
    """What a caption must satisfy."""

    # --- form ---
    min_words: int = knob(3, "shorter captions carry no information", low=1)
    max_words: int = knob(60, "the text tower reads 77 tokens and cuts longer captions off", low=4)
    # Applied before narrating too: such a hand is not in the narrator's input.
    min_seen: float = knob(
        0.1, "a hand that was detected in a smaller share of the frames may not be mentioned", low=0, high=1
    )
    # Each half can be switched off: narrations may be in another language, videos without usable boxes.
    vocabulary: str | None = knob(
        None, "YAML file that adds to the words and patterns of the check, or replaces some; null for none"
    )
    words: bool = knob(True, "compare verbs, objects and sides with the narration before")
    tracks: bool = knob(True, "compare hands, directions and contact with the tracks")
    language: float = knob(0.6, "least share of English words in a caption; 0 allows any language", low=0, high=1)
    ask_again: bool = knob(True, "request a refused caption once more, with the reasons, before the template is used")
    # --- a second opinion ---
    judge: str = knob(
        "none",
        "a model's second opinion on the captions of language models: none; endpoint, a chat server; cross_encoder, a "
        "model for natural-language inference in judge_folder",
        choices=("none", "endpoint", "cross_encoder"),
    )
    judge_mode: str = knob(
        "both",
        "rescue: the judge may pass captions that only the word rules refuse; veto: it may refuse captions that the "
        "rules pass; both",
        choices=("rescue", "veto", "both"),
    )
    judge_endpoint: str | None = knob(None, "base address of the judge's server; null is the narrator's, with its key")
    judge_api_key_env: str | None = knob(None, "environment variable with the key of judge_endpoint; null sends none")
    judge_model: str = knob("", "the server's name for the judge's model; empty is the narrator's on its own server")
    judge_prompt: str | None = knob(None, "Jinja file of the judge's prompt; null is configs/hod/prompts/judge.jinja")
    judge_folder: str | None = knob(
        None, "cross_encoder: folder of the model and its tokenizer, safetensors only; nothing is downloaded"
    )
    judge_threshold: float = knob(
        0.5, "cross_encoder: least probability of entailment for a caption to be entailed", low=0, high=1
    )


@dataclass
class SlurmConfig:
    """What --submit requests from Slurm for each shard; null leaves it to the cluster."""

    partition: str | None = knob(None, "partition of the jobs")
    minutes: int | None = knob(None, "time limit of a job; rerun a job that hit it to resume", low=1)
    memory_gb: float | None = knob(None, "memory of a job", above=0)
    gpus: int | None = knob(None, "for a torchvision detector", low=0)
    at_once: int | None = knob(None, "jobs that run at the same time", low=1)


@dataclass
class HodConfig:
    """The whole pipeline."""

    output: str = knob("hod.csv", "the narrations; results of the stages are in the folder OUTPUT.work")
    # The same section as in training configurations, so that it can be copied between the two.
    source: SourceConfig = part(SourceConfig)
    windows: WindowsConfig = part(WindowsConfig)
    # Rendered by tools/generate_hod.py, so that the demo is one command.
    demo: DemoConfig = part(DemoConfig)
    detector: DetectorConfig = part(DetectorConfig)
    tracks: TracksConfig = part(TracksConfig)
    narrator: NarratorConfig = part(NarratorConfig)
    check: CheckConfig = part(CheckConfig)
    slurm: SlurmConfig = part(SlurmConfig)
    frames: int = knob(16, "frames of each clip that are searched for hands, as published", low=1)
    decoder: str = knob("auto", "as data.decoder of main_pretrain.py", choices=("auto", "torchcodec", "pyav", "decord"))
    cache: str | None = knob(None, "as data.cache of main_pretrain.py: a folder for files of remote roots")
    cache_gb: float = knob(50.0, "size of cache in GB (1e9 bytes)", above=0)
    workers: int = knob(
        2,
        "processes that decode and detect; 0 uses the main process, which then ends if a clip crashes the decoder",
        low=0,
    )
    # A decoder that hangs does so in native code: its process cannot be interrupted, only killed.
    clip_seconds: float = knob(
        600.0, "a clip that takes longer fails, since a damaged video may hang its decoder", above=0
    )
    keep: list[str] = knob(
        [], "further columns of the metadata to copy to the output, for instance to group hard negatives by"
    )
    dataset: str = knob("", "dataset column of rows whose metadata has none; training chooses the video root by it")
    seed: int = knob(0, "draws one of several narrations of a clip, if source.list_text=random", low=0)
    block: int = knob(256, "shards are multiples of this many clips", low=1)  # for a resumed run the same one
    # A wrong root or a broken mount fails every clip: the run stops after fifty of them, not after a day.
    max_bad_fraction: float = knob(
        0.05,
        "stop when more than this share of the rows, or of the clips that a stage has tried, fails; fewer than a "
        "thousand count as a thousand",
        low=0,
        high=1,
    )


def load(path: str | Path, overrides: Sequence[str] = ()) -> HodConfig:
    """Read a file as :func:`egohod.config.load` does. Raises :class:`~egohod.errors.UserError`."""
    return load_as(HodConfig, path, overrides, check)


def check(config: HodConfig) -> list[tuple[str, str]]:
    """Everything that is out of range or contradicts itself, as (key, what is wrong with it)."""
    problems = out_of_range(config)
    # The section is shared with training. What has no effect here is an error rather than a silent surprise.
    default = SourceConfig()
    for name in ("weight", "detections"):
        if getattr(config.source, name) != getattr(default, name):
            key = f"source.{name}"
            problems.append((key, f"{key} is for training only, the pipeline does not use it"))
    captions = config.narrator.captions
    if "fine" not in captions or len(set(captions)) < len(captions):
        why = "names one twice" if "fine" in captions else "must hold fine, the column text of the output"
        problems.append(("narrator.captions", f"narrator.captions is [{', '.join(captions)}], but {why}"))
    if config.check.judge != "none" and config.narrator.kind == "template":
        problems.append(("check.judge", "check.judge judges language models only, and narrator.kind is template"))
    columns = (*COLUMNS, *(name for name in FURTHER_CAPTIONS if name in captions))
    for name in dict.fromkeys(config.keep):
        if name in columns or config.keep.count(name) > 1:
            why = "which the output has anyway" if name in columns else "twice"
            problems.append(("keep", f"keep names the column '{name}', {why}"))
    return problems
