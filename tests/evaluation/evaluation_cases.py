"""The demo benchmark in small, and models with expected scores on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from egohod.config import Config, load
from egohod.data.dataset import ClipDataset, Tokenizer, normalise
from egohod.data.table import ClipTable
from egohod.demo.world import NOUNS, VERBS, phrase
from egohod.distributed import Distributed
from egohod.evaluation import runner
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.embed import PLAIN, EmbedReport, Execution
from egohod.evaluation.runner import Benchmark, BenchmarkResult, benchmark, execution_of
from egohod.evaluation.tasks import EvaluationTask
from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import DualEncoder, create_model
from tests.support import ROOT

FRAMES = 4

ALONE = Distributed(0, 1, torch.device("cpu"), None)


def config(**evaluate: Any) -> Config:
    """The demo model at few frames, decoded in this process."""
    cfg = Config()
    cfg.model.name, cfg.model.num_frames, cfg.data.decoder, cfg.data.workers = "DEMO", FRAMES, "pyav", 0
    cfg.evaluate.cache, cfg.evaluate.num_frames = None, FRAMES
    vars(cfg.evaluate).update(evaluate)
    return cfg


def world_split(folder: Path) -> BenchmarkConfig:
    """A split of a demo world as a benchmark, as configs/demo.yml has it."""
    settings = load(ROOT / "configs" / "demo.yml").evaluate.benchmarks["test"]
    return dataclasses.replace(settings, metadata=f"{folder}/hod.csv", root=f"{folder}/videos")


def demo_benchmark(folder: Path, dist: Distributed = ALONE, batch_size: int = 7, workers: int = 0) -> Benchmark:
    """The demo benchmark at the size of the demo model, in this process alone by default."""
    execution = Execution(batch_size=batch_size, workers=workers, dist=dist)
    return runner.benchmark(config(), "test", world_split(folder), execution)


def evaluate(task: EvaluationTask, video: Tensor, text: Tensor) -> dict[str, float]:
    """The numbers of a task alone, as a training loop gets them."""
    scores = task.measure(video, text)
    # By these names a benchmark finds out before it computes anything that two tasks use the same.
    assert sorted(scores) == sorted({*task.metric_names})
    return BenchmarkResult({PLAIN: scores}, [], [], EmbedReport()).flat()


def small_model() -> DualEncoder:
    """The demo model with seeded random weights."""
    torch.manual_seed(0)
    return create_model(ModelConfig(name="DEMO", num_frames=FRAMES))


def random_features(rows: int, seed: int, width: int = 16) -> Tensor:
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def assert_at_chance(values: list[float], chance: float | None, *wrong: float, name: str = "") -> None:
    """Independent runs without knowledge average ``chance``, and would not pass for any of ``wrong``.

    The interval is four standard errors to either side. Wrong values must be outside whichever way the runs fell,
    so the test cannot pass by being blunt.
    """
    assert chance is not None
    error = 4 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    assert abs(np.mean(values) - chance) < error, f"{name}: {np.mean(values):.2f} is not {chance:.2f} +- {error:.2f}"
    for other in wrong:
        assert abs(other - chance) > 2 * error, f"{name}: cannot tell {chance:.2f} from {other:.2f} +- {error:.2f}"


class Oracle(nn.Module):
    """Knows each clip by its pixels and each text by its tokens; features tell the action and the exact text."""

    def __init__(self, dataset: ClipDataset, table: ClipTable, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.of_clip: dict[bytes, tuple[str, str]] = {}
        actions: dict[str, str] = {}
        for row, action in enumerate(table.column("action")):
            text = table.row(row).texts[0]
            self.of_clip[_key(normalise(dataset[row]["video"])[0])] = (text, action)
            actions[text] = action
        for verb in VERBS:
            for noun in NOUNS:
                actions |= {phrase(verb, noun, hand): f"{verb} {noun}" for hand in (None, "left", "right")}
        self.of_tokens = {_ids(tokenizer([text])[0]): (text, action) for text, action in actions.items()}
        self.codes = {name: i for i, name in enumerate(sorted({*actions, *actions.values()}))}

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        return torch.stack([self._feature(*self.of_clip[_key(clip)]) for clip in video])

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        return torch.stack([self._feature(*self.of_tokens[_ids(row)]) for row in tokens])

    def _feature(self, text: str, action: str) -> Tensor:
        feature = torch.zeros(len(self.codes))
        feature[self.codes[action]] += 1
        feature[self.codes[text]] += 0.5
        return normalize(feature, dim=0)


def _key(clip: Tensor) -> bytes:
    return clip.numpy().tobytes()


def _ids(tokens: Tensor) -> tuple[int, ...]:
    return tuple(token for token in tokens.tolist() if token)


def settings(test: Path, kind: str) -> BenchmarkConfig:
    """Annotations and videos of a benchmark of the demo world."""
    folder = test / "benchmarks"
    own_videos = {"egtea": folder / "egtea/videos", "charades_ego": folder / "charades_ego/videos"}
    own_videos |= dict.fromkeys(("handyvqa", "chirality", "egoexolearn_mcq"), folder / "egtea/videos")
    metadata = {"ek100_mir": "ek100", "ek100_cls": "ek100"}.get(kind, kind)
    path = test / "hod.csv" if kind == "custom" else folder / metadata
    return BenchmarkConfig(kind=kind, metadata=str(path), root=str(own_videos.get(kind, test / "videos")))


def made(test: Path, kind: str, **evaluate: object) -> Benchmark:
    cfg = config(**evaluate)
    return benchmark(cfg, kind, settings(test, kind), execution_of(cfg, ALONE), controls=cfg.evaluate.controls)


def cached(test: Path, kind: str, cache: Path, identity: str = "weights", **more: Any) -> Benchmark:
    cfg = config()
    execution = dataclasses.replace(execution_of(cfg, ALONE), cache=cache, identity={"weights": identity}, **more)
    return benchmark(cfg, kind, settings(test, kind), execution, controls=["reverse"])


class Counting(nn.Module):
    """The small model, which counts its calls and may stop working."""

    def __init__(self, limit: int = 10**9) -> None:
        super().__init__()
        self.inner, self.limit, self.videos, self.texts = small_model(), limit, 0, 0

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        if self.videos + len(video) > self.limit:
            raise KeyboardInterrupt
        self.videos += len(video)
        return self.inner.encode_video(video, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        self.texts += len(tokens)
        return self.inner.encode_text(tokens, normalize=normalize)
