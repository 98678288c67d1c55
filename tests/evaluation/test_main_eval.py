"""The program: two processes as one, what it refuses, and the scripts around it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluation_cases import FRAMES, settings, small_model

import main_eval
from egohod.data.formats import BENCHMARKS
from egohod.model.config import ModelConfig, geometry
from egohod.model.dual_encoder import create_model
from egohod.training.checkpoint import CheckpointStore
from tests.support import ROOT, environment


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A checkpoint of the small model, and a configuration that fits it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.save({"state_dict": small_model().state_dict()}, folder / "model.pt")
    knobs = ["model.name=DEMO", f"model.num_frames={FRAMES}", f"evaluate.num_frames={FRAMES}", "data.workers=0"]
    (folder / "eval.yml").write_text("{}")
    command = ["--config_file", f"{folder}/eval.yml", "--checkpoint", f"{folder}/model.pt", *knobs]
    return [*command, "data.decoder=pyav", "evaluate.batch_size=4", "evaluate.cache=null"]


def where(formats: Path, kind: str) -> list[str]:
    source = settings(formats, kind)
    return ["--benchmark", kind, "--metadata", str(source.metadata), "--root", str(source.root)]


def test_a_benchmark_is_chosen_on_the_command_line(formats: Path, tmp_path: Path, arguments: list[str]) -> None:
    more = ["--controls", "freeze", "--output", str(tmp_path), "--published", "EgoVideo-L"]
    assert main_eval.main([*arguments, *where(formats, "egtea"), *more]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"egtea/action_top1", "egtea/freeze/action_top1_drop"} <= results["metrics"].keys()
    assert results["benchmarks"]["egtea"]["protocol"]["name"] == "whole_clip"
    assert (tmp_path / "details/egtea.json").exists()


def test_the_model_is_that_of_the_checkpoint(formats: Path, tmp_path: Path) -> None:
    """The configuration names another geometry, activation and number of frames; the checkpoint knows better."""
    identity = {
        "model.name": "DEMO",
        "model.num_frames": FRAMES,
        "model.activation": "quick_gelu",
        "loss.name": "infonce",
    }
    weights = create_model(ModelConfig(name="DEMO", num_frames=FRAMES)).state_dict()
    (tmp_path / "run").mkdir()
    CheckpointStore(tmp_path / "run").save(1, weights, {}, metrics={}, identity=identity)
    (tmp_path / "eval.yml").write_text("data: {workers: 0, decoder: pyav}\nevaluate: {cache: null}")
    command = ["--config_file", f"{tmp_path}/eval.yml", "--checkpoint", f"{tmp_path}/run", "--output", str(tmp_path)]
    assert main_eval.main([*command, *where(formats, "ek100_mir")]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["model"] == "DEMO"
    assert results["benchmarks"]["ek100_mir"]["protocol"]["size"] == geometry("DEMO").image_size
    knobs = main_eval.cli.model_of(f"{tmp_path}/run")
    assert {"model.activation=quick_gelu", f"model.num_frames={FRAMES}"} <= set(knobs)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--benchmark", "mri"], "--benchmark mri: no such benchmark; choose all, ek100_mir"),
        (["--benchmark", "egtea"], "evaluate.benchmarks.egtea.metadata is not set; give --metadata"),
        (["--benchmark", "egtea", "--metadata", "/nowhere", "--root", "."], "/nowhere: no action_idx.txt there"),
        (["--root", "x"], "--root and --metadata need --benchmark"),
        (["--controls", "blur"], "must be one of shuffle, reverse, freeze"),
        (["--benchmark", "all"], "no benchmark's data is found"),
        (["--checkpoint", "none.pt"], "none.pt: no such file"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], more: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main_eval.cli.run(main_eval.main, [*arguments, *more, "--output", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len([line for line in message.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.ci
def test_two_processes_give_the_numbers_of_one(formats: Path, tmp_path: Path, arguments: list[str]) -> None:
    metrics = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        command = [
            *("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "main_eval.py"),
            *arguments,
            *where(formats, "custom"),
            *("--controls", "shuffle,reverse,freeze", "--output", str(output)),
        ]
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        metrics.append(json.loads((output / "results.json").read_text())["metrics"])
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-6)


@pytest.mark.ci
def test_all_benchmarks_of_the_demo_world_are_on_one_page_whatever_the_processes(
    formats: Path, tmp_path: Path, arguments: list[str]
) -> None:
    """The two commands of docs/motion_check.md on a small world: ``egohod eval --benchmark all``."""
    metrics = []
    overrides = arguments[arguments.index("--checkpoint") :]
    for processes in (1, 2):
        output = tmp_path / str(processes)
        command = [
            *("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "egohod", "eval"),
            *("--config_file", "configs/demo_eval.yml", *overrides, "--benchmark", "all"),
            *("--controls", "reverse", "--output", str(output)),
        ]
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(DEMO_DATA=str(formats.parent)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results = json.loads((output / "results.json").read_text())
        assert set(results["benchmarks"]) == {
            "val",
            "test",
            *(set(BENCHMARKS) - {"custom", "labels", "ek100_cls_test"}),
        }
        page = (output / "report.html").read_text()
        for name, each in results["benchmarks"].items():
            assert f"<h2>{name}" in page
            for metric, numbers in each["metrics"].items():
                assert numbers["chance"] is not None, (name, metric)
                assert "reverse" in numbers["controls"], (name, metric)
        metrics.append(results["metrics"])
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-6)
