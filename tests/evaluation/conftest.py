"""The split that the evaluation tests run on, in every format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from evaluation_cases import ALONE, config, settings, small_model

from egohod.demo.write import write_benchmarks
from egohod.evaluation.report import write_report
from egohod.evaluation.results import write_results
from egohod.evaluation.runner import benchmark, execution_of


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two threads, which wait for each other, and many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world(demo_world: Path) -> Path:
    """The test split of the small demo world."""
    return demo_world / "test"


@pytest.fixture(scope="session")
def formats(demo_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same split with ``benchmarks/``, in a copy of its own."""
    copy = tmp_path_factory.mktemp("formats") / "world"
    shutil.copytree(demo_world, copy)
    assert write_benchmarks(copy)
    assert not write_benchmarks(copy)
    return copy / "test"


@pytest.fixture(scope="session")
def evaluated(formats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of an evaluation with every kind of table; not to be changed."""
    folder, cfg, model = tmp_path_factory.mktemp("evaluated"), config(), small_model()
    results = []
    for kind in ("custom", "ek100_mir", "ek100_cls", "egomcq", "charades_ego"):
        bench = benchmark(cfg, kind, settings(formats, kind), execution_of(cfg, ALONE), controls=["shuffle", "freeze"])
        results.append((bench, bench.measure(model)))
    write_results(
        folder, cfg, ALONE, results, checkpoint={"path": "a <run>", "sha256": "0f" * 32}, published="EgoVideo-L"
    )
    write_report(folder)
    return folder


@pytest.fixture
def tiny_outside(tmp_path: Path) -> str:
    """The name of a small open_clip model with random weights."""
    settings = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny_outside.json").write_text(json.dumps(settings))
    open_clip.add_model_config(tmp_path / "tiny_outside.json")
    return "open_clip:tiny_outside"
