"""Shared fixtures: one small demo world, the real data of ``../shared``, and runs of the main programs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

# Before torch is imported. A thread that waits must not spin: tests share the cores with the processes they start, and
# small models wait more than they compute (a third of the processor time on two busy cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import main_pretrain
from egohod import cli
from egohod.demo import make_world
from egohod.demo.world import Variant
from tests.support import ROOT, SHARED, Command, ShortRun, environment, write_tiny_config

# Beside other test processes one thread is faster than two.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


# One test of some minutes each. Begun last, it would leave the other test processes without work.
LONGEST = ("test_gpu_check.py", "test_elsewhere.py", "test_fuzz.py")


@pytest.hookimpl(trylast=True)  # after the choice by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order in which test processes take them: those with the longest tests, then those with the most."""
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONGEST, -counts[item.path]))


@pytest.fixture(scope="session")
def demo_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo world of some 60 training, 9 validation and 15 test clips."""
    folder = tmp_path_factory.mktemp("demo") / "world"
    # The plain version: recorded losses and narrations are of its pictures, and it renders and decodes fastest.
    make_world(folder, seed=0, scale=0.03, workers=1, variant=Variant(version=5))
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real annotations and clips, which are not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("needs the real data in ../shared")
    return SHARED


@pytest.fixture
def program() -> Command:
    """Run ``python <program> <arguments>`` in the project and return its output and exit code."""

    def run(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=environment(**more),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


@pytest.fixture
def inside(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The same in this process, for what needs none of its own: starting one costs seconds."""
    monkeypatch.chdir(ROOT)

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        main = importlib.import_module(name.removesuffix(".py")).main
        code = cli.run(main, [str(each) for each in arguments])
        output = capsys.readouterr()
        return subprocess.CompletedProcess([name, *map(str, arguments)], code, output.out, output.err)

    return run


@pytest.fixture
def tiny_config(demo_world: Path, tmp_path: Path) -> Path:
    """A configuration that trains the demo model on the small world for twelve steps of eight clips."""
    return write_tiny_config(tmp_path, demo_world)


@pytest.fixture(scope="session")
def short_run(demo_world: Path, tmp_path_factory: pytest.TempPathFactory) -> ShortRun:
    """One step of training that differs from the defaults in frames and activation; not to be changed."""
    folder = tmp_path_factory.mktemp("short")
    command = ["--config_file", str(write_tiny_config(folder, demo_world)), "train.duration=1 steps"]
    command += ["model.num_frames=5", "model.activation=quick_gelu"]
    assert main_pretrain.main(command) == 0
    return ShortRun(folder / "run", command)
