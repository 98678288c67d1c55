"""Settings of benchmarks and of evaluation during and after training."""

from __future__ import annotations

from dataclasses import dataclass

from egohod.knobs import knob

PROTOCOL_NAMES = (
    *("clean", "whole_clip", "upstream", "upstream_4", "upstream_egtea"),
    *("avion", "lavila", "lavila_10x3"),
)


@dataclass
class BenchmarkConfig:
    """A benchmark of main_eval.py and where its data lies; NAME is one of the known ones or yours to choose."""

    kind: str = knob(
        "auto",
        "format of the annotations (docs/evaluation.md): custom, labels, ek100_mir, ek100_cls, egtea, egomcq, "
        "charades_ego or one that you added to egohod/data/formats; auto is NAME, or custom if no format has this name",
        old_values={"own": "custom"},
    )
    metadata: str | None = knob(
        None, "folder of the benchmark's annotation files; for custom and labels, the csv of its clips"
    )
    root: str | None = knob(None, "folder of its videos, or an fsspec URI")
    columns: dict[str, str] = knob({}, "custom and labels: as data.train.NAME.columns")
    layout: str = knob("auto", "as data.train.NAME.layout", choices=("auto", "chunks", "avion", "whole"))
    chunk_seconds: float = knob(15.0, "length of a chunk", above=0)
    min_clip_seconds: float | None = knob(
        None,
        "a shorter clip is widened to this; null is what the protocol's source does: upstream's and ours widen to 1 in "
        "chunks, no other, and no one in whole files; 0: never",
        low=0,
    )
    test_split: int | None = knob(
        None,
        "egtea: the only split to test, as a model fine-tuned on its training part needs; null is all",
        low=1,
        high=3,
    )
    protocol: str = knob(
        "auto",
        "frames, resizing, views and class prompts by name, docs/evaluation.md; auto is evaluate.protocol",
        choices=("auto", *PROTOCOL_NAMES),
    )


@dataclass
class EvaluateConfig:
    """Held-out evaluation during and after training."""

    every: str = knob("1 epochs", "how often the val set is evaluated while training")
    demo_val: str | None = knob(None, "folder of the demo world used for tuning and for choosing the best checkpoint")
    demo_test: str | None = knob(
        None, "folder of the demo world that is opened once, at the end, for the reported table"
    )
    batch_size: int = knob(32, "clips encoded at a time", low=1)
    best: str = knob("val/choice_across_clips", "metric that keep_best ranks by (higher is better)")
    benchmarks: dict[str, BenchmarkConfig] = knob({}, "what main_eval.py --benchmark can be asked for")
    protocol: str = knob(
        "auto",
        "of the benchmarks that name none: upstream, avion or lavila reproduces that project's numbers; auto is this "
        "project's own, whole_clip for egtea and clean for others",
        choices=("auto", *PROTOCOL_NAMES),
    )
    during: list[str] = knob([], "benchmarks of evaluate.benchmarks that are measured while training, as demo_val is")
    final: list[str] = knob([], "benchmarks that are measured once, when training is done, as demo_test is")
    num_frames: int | None = knob(None, "frames a benchmark shows of each clip; null is the protocol's number", low=1)
    precision: str = knob(
        "fp32",
        "autocast type of features, as train.precision; fp32 makes numbers independent of batches and processes, and "
        "here never multiplies in TF32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    cache: str | None = knob(
        "features", "folder in which main_eval.py keeps features, by checkpoint, clip and protocol; null keeps none"
    )
    controls: list[str] = knob(
        [],
        "temporal controls of the final evaluation, each the same clips with their time destroyed: shuffle puts the "
        "frames of a clip in a fixed random order, reverse plays them backwards, freeze repeats the middle one",
        choices=("shuffle", "reverse", "freeze"),
    )
