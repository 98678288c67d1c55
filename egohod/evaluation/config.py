"""Settings of benchmarks and of evaluation during and after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from egohod.knobs import knob, part

# Known here, too, so that the configuration can be checked without importing torch: runner.py has what they mean.
PROTOCOL_NAMES = (
    *("as_trained", "clean", "squash", "whole_clip", "upstream", "upstream_4", "upstream_egtea"),
    *("avion", "lavila", "lavila_10x3"),
)


@dataclass
class BenchmarkConfig:
    """A benchmark of main_eval.py and its data; NAME is one of the known ones or yours to choose."""

    kind: str = knob(
        "auto",
        "format of the annotations (docs/evaluation.md): custom, labels, a name that 'egohod benchmarks' lists or one "
        "that you added to egohod/data/formats; auto is NAME, or custom if no format has this name",
    )
    metadata: str | None = knob(
        None, "folder of the benchmark's annotation files; for custom and labels, the csv of its clips"
    )
    root: str | None = knob(None, "folder of its videos, or an fsspec URI")
    columns: dict[str, str] = knob({}, "custom and labels: as data.train.NAME.columns")
    metric_names: dict[str, str] = knob(
        {},
        "custom: metrics by the kinds of questions in questions.jsonl, e.g. {hands: choice_hands}; a kind that is not "
        "in it is its own metric's name",
    )
    layout: str = knob("auto", "as data.train.NAME.layout", choices=("auto", "chunks", "avion", "whole"))
    chunk_seconds: float = knob(15.0, "length of a chunk", above=0)
    min_clip_seconds: float | None = knob(
        None,
        "a shorter clip is widened to this; null is what the protocol's source does: upstream's and ours widen to 1 in "
        "chunks, no other, and no one in whole files; 0: never",
        low=0,
    )
    # Test clips of one split are training clips of another, so a fine-tuned model has seen those of the others.
    test_split: int | None = knob(
        None,
        "egtea: the only split to test, as a model fine-tuned on its training part needs; null is all",
        low=1,
        high=3,
    )
    # Half a window is the finest border that features can tell. Ego4D's own features are of 1.07 s, which costs twice.
    window_seconds: float = knob(
        2.0, "ego4d_nlq and ego4d_mq: length of the windows that cover a recording; they overlap by half", above=0
    )
    protocol: str = knob(
        "auto",
        "frames, resizing, views and class prompts by name, docs/evaluation.md; auto is evaluate.protocol",
        choices=("auto", *PROTOCOL_NAMES),
    )


@dataclass
class RerankConfig:
    """Retrieval in two stages."""

    path: str | None = knob(
        None,
        "a reranker of tools/train_reranker.py, which main_eval.py uses for retrieval; null, as published: the dual "
        "encoder alone",
    )
    top_k: int = knob(50, "candidates of the dual encoder that it orders anew, for each clip and each text", low=1)


@dataclass
class EvaluateConfig:
    """Held-out evaluation during and after training."""

    every: str = knob("1 epochs", "how often the benchmarks of evaluate.during are measured while training")
    batch_size: int = knob(32, "clips encoded at a time", low=1)
    best: str | None = knob(
        None, "metric that keep_best ranks by, BENCHMARK/METRIC of a benchmark in evaluate.during (higher is better)"
    )
    benchmarks: dict[str, BenchmarkConfig] = knob({}, "names that main_eval.py --benchmark accepts")
    protocol: str = knob(
        "auto",
        "of the benchmarks that name none: upstream, avion or lavila reproduces that project's numbers; auto is this "
        "project's own, whole_clip for egtea and clean for others",
        choices=("auto", *PROTOCOL_NAMES),
    )
    # Two lists, because a number that a step is chosen by is no longer an estimate of how good it is.
    during: list[str] = knob([], "benchmarks that are measured while training, to tune and to choose a step")
    final: list[str] = knob([], "benchmarks that are measured once, when training is done, for the reported table")
    num_frames: int | None = knob(None, "frames a benchmark shows of each clip; null is the protocol's number", low=1)
    # A benchmark is small beside a training run: reproducible numbers are worth the time.
    precision: str = knob(
        "fp32",
        "autocast type of features, as train.precision; fp32 makes numbers independent of batches and processes, and "
        "here never multiplies in TF32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    # Decoding is most of an evaluation, and most evaluations share clips with an earlier one.
    cache: str | None = knob(
        "features", "folder in which main_eval.py keeps features, by checkpoint, clip and protocol; null keeps none"
    )
    controls: list[str] = knob(
        [],
        "temporal controls of the final evaluation, each the same clips with their time destroyed: shuffle puts the "
        "frames of a clip in a fixed random order, reverse plays them backwards, freeze repeats the middle one",
        choices=("shuffle", "reverse", "freeze"),
    )
    # Everything below makes other numbers than a single pass of one model, which results name.
    ensemble: list[str] = knob(
        [], "main_eval.py: further checkpoints, as --checkpoint, whose similarities are averaged with its own"
    )
    combine: str = knob(
        "standardised",
        "similarities that an ensemble averages: standardised to mean 0 and deviation 1 over all pairs, since models "
        "spread theirs differently, or raw; probabilities of heads are always averaged as they are",
        choices=("standardised", "raw"),
    )
    flip: bool = knob(
        False,
        "average with the similarities of mirrored clips to the texts with left and right exchanged; twice the compute",
    )
    dual_softmax: float | None = knob(
        None,
        "retrieval: temperature of a softmax of the similarities over texts times one over clips (0.01 to 0.1; null is "
        "none); it knows all queries at once, so such a number is not comparable with others",
        above=0,
    )
    submission: str | None = knob(
        None, "main_eval.py: folder for files in the format of the challenges (EK100 retrieval and action recognition)"
    )
    supervision: list[int] = knob(
        [],
        "supervision levels that a challenge wants declared, [pretraining, training labels, training data], 0 to 5 "
        "each (docs/evaluation.md)",
    )

    rerank: RerankConfig = part(RerankConfig)

    @staticmethod
    def convert_old_keys(section: dict[str, Any], below: dict[str, Any]) -> list[tuple[str, str]]:
        """Replace what earlier releases called ``kind: own``, ``demo_val`` and ``demo_test``, in place.

        ``below`` are the values that ``section`` is merged into. Returns (old, new) names for a warning.
        """
        renamed = []
        benchmarks = section.get("benchmarks")
        for name, benchmark in benchmarks.items() if isinstance(benchmarks, dict) else ():
            if isinstance(benchmark, dict) and benchmark.get("kind") == "own":
                benchmark["kind"] = "custom"
                renamed.append((f"evaluate.benchmarks.{name}.kind=own", "custom"))
        # Folders of demo worlds, which had keys of their own, are benchmarks as others.
        # A base file may have the old keys and the file on it the new ones, or the other way round.
        for old, name, when in (("demo_val", "val", "during"), ("demo_test", "test", "final")):
            if old not in section:
                continue
            folder = section.pop(old)
            names = [other for other in section.get(when) or below.get(when) or [] if other != name]
            if folder is not None:
                section["benchmarks"] = (section.get("benchmarks") or {}) | {
                    name: {
                        "kind": "custom",
                        "metadata": f"{folder}/hod.csv",
                        "root": f"{folder}/videos",
                        "layout": "chunks",
                        "protocol": "as_trained",
                        # Kinds of questions of those worlds, and what their metrics were called.
                        "metric_names": {
                            "across_clips": "choice_across_clips",
                            "state_changing": "motion_state_changing",
                            "transient": "motion_transient",
                        },
                    }
                }
                section[when] = [name, *names]
                if when == "during" and not (section.get("best") or below.get("best")):
                    section["best"] = "val/choice_across_clips"  # the default of those releases
            elif when not in section:  # null took back what a base had set
                section[when] = names
            renamed.append((f"evaluate.{old}", f"evaluate.benchmarks.{name} and evaluate.{when}"))
        return renamed
