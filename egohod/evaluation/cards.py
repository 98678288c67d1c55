"""Cards of benchmarks: what each measures, its size and chance level, licence, source, and published numbers."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import NamedTuple


class PublishedNumber(NamedTuple):
    """A number that somebody else reports, in percent, for comparison and never for tests."""

    model: str
    metric: str
    value: float
    source: str


@dataclass(frozen=True)
class BenchmarkCard:
    """A benchmark before any file of it is read."""

    name: str
    """Of ``--benchmark`` and of ``egohod.load_benchmark``."""
    task: str
    size: str
    chance: str
    """What random answers reach, in percent; results state it exactly for the files that were read."""
    licence: str
    """As its publisher states it, else ``unknown``; no substitute for reading it."""
    source: str
    """Where annotations and videos come from."""
    paper: str
    builder: str = ""
    """``module:function`` of a benchmark that is not read by :mod:`egohod.data.formats`, such as a simulation: a
    function with the parameters of :func:`egohod.evaluation.runner.benchmark` that returns a
    :class:`~egohod.evaluation.runner.Measured`."""

    @property
    def published(self) -> tuple[PublishedNumber, ...]:
        """Published numbers of its metrics."""
        return tuple(
            PublishedNumber(model, metric.removeprefix(f"{self.name}/"), value, _SOURCES[model])
            for model, numbers in PUBLISHED.items()
            for metric, value in numbers.items()
            if metric.startswith(f"{self.name}/")
        )


_EK100 = "annotations: github.com/epic-kitchens/epic-kitchens-100-annotations; videos: epic-kitchens.github.io"
CARDS = {
    card.name: card
    for card in (
        BenchmarkCard(
            "ek100_mir", "text-video retrieval, both ways, graded by verb and nouns", "9,668 clips, 3,842 texts",
            "mAP 5.6, nDCG 10.8", "CC BY-NC 4.0", _EK100, "2006.13256",
        ),
        BenchmarkCard(
            "ek100_cls", "action recognition, 3,806 verb-noun classes", "9,668 clips", "0.03", "CC BY-NC 4.0", _EK100,
            "2006.13256",
        ),
        BenchmarkCard(
            "ek100_cls_test", "the same for the challenge: the test split, whose labels are secret", "13,092 clips",
            "none, as nothing is measured", "CC BY-NC 4.0", _EK100, "2006.13256",
        ),
        BenchmarkCard(
            "egtea", "action recognition, 106 classes, three splits", "2,022 clips of split 1", "0.9", "research only",
            "cbs.ic.gatech.edu/fpv", "1910.09165",
        ),
        BenchmarkCard(
            "egomcq", "which of five clips a narration describes, of different videos or of one", "39,751 questions",
            "20", "Ego4D licence", "github.com/showlab/EgoVLP; videos: ego4d-data.org", "2206.01670",
        ),
        BenchmarkCard(
            "charades_ego", "which of 157 actions occur in a video", "846 videos", "about 5", "non-commercial",
            "prior.allenai.org/projects/charades-ego", "1804.09627",
        ),
        BenchmarkCard(
            "handyvqa", "questions about hand-object dynamics: action, process, location, state, parts; objects by AP",
            "11.1 k questions", "20; objects by their share", "unknown",
            "masatate.github.io/HanDyVQA-project-page; videos: ego4d-data.org", "2512.00885",
        ),
        BenchmarkCard(
            "egohoibench", "a clip's caption against the same with the verb or the noun replaced", "29 k clips",
            "9.1; action 4.8", "MIT (code); Ego4D licence (videos)", "github.com/xuboshen/EgoNCEpp", "2405.17719",
        ),
        BenchmarkCard(
            "chirality", "opposite actions on the same object (CiA): the text of a clip, and the clips of a text",
            "SSv2, EPIC-KITCHENS and Charades", "50", "unknown",
            "huggingface.co/datasets/bpiyush/chirality-in-action", "2509.08502, 2512.13511",
        ),
        BenchmarkCard(
            "egoexolearn_mcq", "questions about what each hand does", "depends on the file", "about 24", "MIT",
            "github.com/OpenGVLab/EgoExoLearn", "2403.16182",
        ),
        BenchmarkCard(
            "egoexolearn_association", "the clip of the other view that shows the same action", "depends on the file",
            "5", "MIT", "github.com/OpenGVLab/EgoExoLearn", "2403.16182",
        ),
        BenchmarkCard(
            "hd_epic_vqa", "questions about one clip: actions, how, why, gaze; which moment shows an action",
            "those of 26 k that a dual encoder can answer", "20", "CC BY-NC 4.0",
            "github.com/hd-epic/hd-epic-annotations; videos: hd-epic.github.io", "2502.04144",
        ),
        BenchmarkCard(
            "egotempo", "the answer to a question about time, among those of its type", "500 questions", "about 2",
            "CC BY 4.0", "github.com/google-research-datasets/egotempo; videos: ego4d-data.org", "2503.13646",
        ),
        BenchmarkCard(
            "ssv2_temporal", "templates of Something-Something v2 that need time, read as a benchmark of your own",
            "those of the validation part", "by the number of templates", "research only",
            "developer.qualcomm.com; docs/motion_check.md has the conversion", "1706.04261, 1907.08340",
        ),
        BenchmarkCard(
            "ego4d_nlq", "when a question about the past is answered in a clip of minutes", "validation part of 19 k",
            "by random segments", "Ego4D licence", "ego4d-data.org", "2110.07058",
        ),
        BenchmarkCard(
            "ego4d_mq", "when each of 110 activities happens in a clip of minutes", "validation of 2,488 clips",
            "by random segments", "Ego4D licence", "ego4d-data.org", "2110.07058",
        ),
        BenchmarkCard(
            "metaworld", "success of a simulated robot that learns from demonstrations on frozen features",
            "3 tasks x 3 seeds x 25 rollouts", "by proprioception alone, which is measured with it", "MIT",
            "simulated: pip install '.[robot]', docs/robot.md", "1910.10897, 2203.12601",
            builder="egohod.robot.benchmark:RobotBenchmark",
        ),
    )
}  # fmt: skip

# Zero-shot numbers of released models. None: not reported.
_COLUMNS = (
    *("ek100_mir/map", "ek100_mir/ndcg", "ek100_cls/action_top1", "egtea/action_top1", "egtea/action_mean_class"),
    *("egomcq/inter", "egomcq/intra"),
)
_ROWS: dict[str, tuple[float | None, ...]] = {
    "EgoVideo-L": (41.8, None, 24.0, 51.7, 47.1, 95.9, 65.5),
    "EgoVideo-G": (47.1, None, 28.5, 63.0, None, None, 69.1),
    "EVA02-AT-B": (34.3, 34.1, None, None, None, 95.0, 63.2),
    "EVA02-AT-L": (38.9, 36.2, None, None, None, 95.9, 66.5),
    "EgoVideo-2024": (45.9, 38.6, None, None, None, None, None),
    "AVION-B": (32.9, 32.7, None, None, None, 94.5, 61.4),
    "AVION-L": (37.6, 35.3, None, None, None, 95.4, 64.5),
    "LaViLa-B": (30.9, 32.0, None, None, 28.9, 93.8, 59.9),
    "LaViLa-L": (36.1, 34.6, None, None, 34.1, 94.5, 63.1),
}
_SOURCES = {
    "EgoVideo-L": "ICLR 2025, zero-shot tables (2503.00986)",
    "EgoVideo-G": "ICLR 2025, zero-shot tables (2503.00986)",
    "EVA02-AT-B": "2506.14356",
    "EVA02-AT-L": "2506.14356",
    "EgoVideo-2024": "2406.18070",
    "AVION-B": "AVION, docs/MODEL_ZOO.md",
    "AVION-L": "AVION, docs/MODEL_ZOO.md",
    "LaViLa-B": "LaViLa, docs/MODEL_ZOO.md",
    "LaViLa-L": "LaViLa, docs/MODEL_ZOO.md",
    **dict.fromkeys(("EgoVLP", "EgoVLP++", "EgoVLPv2", "LaViLa", "LaViLa++"), "EgoNCE++, README.md (2405.17719)"),
    "Qwen2.5-VL-72B": "HanDyVQA, README.md (2512.00885)",
}


# Of the benchmarks' own papers. EgoHOIBench: the table of its repository's README.
_FURTHER: dict[str, dict[str, float]] = {
    "EgoVLP": {"egohoibench/verb": 40.27, "egohoibench/noun": 68.6, "egohoibench/action": 30.16},
    "EgoVLP++": {"egohoibench/verb": 56.11, "egohoibench/noun": 69.05, "egohoibench/action": 41.63},
    "EgoVLPv2": {"egohoibench/verb": 36.1, "egohoibench/noun": 63.4, "egohoibench/action": 26.4},
    "LaViLa": {"egohoibench/verb": 46.61, "egohoibench/noun": 74.33, "egohoibench/action": 36.85},
    "LaViLa++": {"egohoibench/verb": 80.63, "egohoibench/noun": 75.3, "egohoibench/action": 63.17},
    "Qwen2.5-VL-72B": {
        "handyvqa/action": 77.3, "handyvqa/process": 73.0, "handyvqa/location": 61.4, "handyvqa/state": 71.1,
        "handyvqa/parts": 61.2, "handyvqa/objects": 73.5,
    },
}  # fmt: skip


PUBLISHED: dict[str, dict[str, float]] = {
    model: {name: value for name, value in zip(_COLUMNS, _ROWS.get(model, ()), strict=False) if value is not None}
    | _FURTHER.get(model, {})
    for model in _SOURCES
}
"""Numbers by model and ``BENCHMARK/METRIC``."""


def list_benchmarks(pattern: str = "*") -> list[BenchmarkCard]:
    """Cards of the benchmarks whose name matches ``pattern``, as in a shell: task, size, licence, source, numbers."""
    return [card for name, card in CARDS.items() if fnmatch.fnmatch(name, pattern)]
