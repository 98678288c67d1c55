"""The scripts of exps/: what each one starts, with a stand-in for Python that prints its command line."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT

STAND_IN = """#!/usr/bin/env bash
case "$*" in
    *"${STOPPED:-none}"*) echo "$*"; touch "$EGOHOD_UNFINISHED" ;;
    *"${FAILED:-none}"*) exit 3 ;;
    *main_*.py*|*tools/*|*" egohod demo"*) echo "$*" ;;
    *torch.cuda.device_count*) echo 1 ;;
esac
"""


# Without uv, wherever its installer put it.
PATH = "/usr/bin:/bin"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of exps/ and an environment without packages, so that nothing is installed and nothing runs."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "exps", folder / "exps")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return folder


def commands(project: Path, script: str, *arguments: str, code: int = 0, **variables: str) -> list[str]:
    """The command lines that a script starts."""
    names = ("PATH", "CONFIG", "START_WEIGHTS", "EGO4D_ROOT", "DEMO_DATA", "DEMO_CHECKPOINT", "PROCESSES")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment = {name: value for name, value in environment.items() if not name.startswith("SLURM")}
    environment |= {"VIRTUAL_ENV": str(project.parent / "environment"), "PATH": PATH} | variables
    command = ["bash", str(project / script), *arguments]
    done = subprocess.run(command, env=environment, cwd=project.parent, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return [line for line in done.stdout.splitlines() if ".py" in line or "egohod" in line]


@pytest.mark.parametrize(
    ("script", "benchmark"),
    [
        ("eval_mir", "ek100_mir"),
        ("eval_ekcls", "ek100_cls"),
        ("eval_egtea", "egtea"),
        ("eval_egomcq", "egomcq"),
        ("eval_charades", "charades_ego"),
        ("eval_all", "all"),
    ],
)
def test_each_evaluation_script_runs_its_benchmark(project: Path, script: str, benchmark: str) -> None:
    (line,) = commands(project, f"exps/{script}.sh", "--checkpoint", "a file.pt")
    assert line == f"main_eval.py --benchmark {benchmark} --checkpoint a file.pt"
    world, checkpoint, last = commands(project, f"exps/{script}.sh")
    assert world == "tools/make_demo_data.py --output demo_data --scale 1.0 --benchmarks"
    assert checkpoint == "-m egohod demo --scale 1.0 train.output=runs/demo"
    assert last.startswith(f"main_eval.py --benchmark {benchmark} --config_file configs/demo_eval.yml")


def test_a_demo_that_is_stopped_or_fails_is_the_last_command(project: Path) -> None:
    """A run that a signal stops exits with 0; what comes next would begin with the weights of half a run."""
    assert commands(project, "exps/demo.sh", "--short", "train.seed=1") == ["-m egohod demo --short train.seed=1"]
    for script in ("eval_mir", "finetune_mir"):
        _, demo = commands(project, f"exps/{script}.sh", STOPPED="egohod demo")
        assert demo == "-m egohod demo --scale 1.0 train.output=runs/demo"
        (_,) = commands(project, f"exps/{script}.sh", code=3, FAILED="egohod demo")
    assert len(commands(project, "exps/eval_mir.sh")) == 3


@pytest.mark.parametrize(("script", "task"), [("finetune_mir", "ek100_mir"), ("finetune_ekcls", "ek100_cls")])
def test_each_fine_tuning_script_runs_its_task(project: Path, script: str, task: str) -> None:
    (line,) = commands(project, f"exps/{script}.sh", "train.lr=1e-4")
    assert line == f"main_finetune.py --config_file configs/finetune/{task}.yml train.lr=1e-4"
    demo = commands(project, f"exps/{script}.sh")[-1].split()[-1]
    assert (ROOT / demo).is_file()
    assert f"configs/finetune/demo_{task.removeprefix('ek100_')}.yml" == demo


def test_egtea_trains_three_splits_and_prints_their_mean(project: Path) -> None:
    *splits, mean = commands(project, "exps/finetune_egtea.sh", START_WEIGHTS="runs/demo")
    assert [line.split("train.output=")[1] for line in splits] == [f"runs/egtea_split{n}" for n in (1, 2, 3)]
    assert mean == "tools/mean_results.py runs/egtea_split1 runs/egtea_split2 runs/egtea_split3"
    assert commands(project, "exps/finetune_egtea.sh", "train.output=runs/mine", code=2) == []


def test_pretraining_scripts_choose_the_recipe_or_the_demo(project: Path) -> None:
    for script, recipe in (
        ("pretrain", "clip_base"),
        ("pretrain_adapter", "egovideo_base"),
        ("pretrain_large", "clip_large"),
    ):
        (line,) = commands(project, f"exps/{script}.sh", "--dry_run")
        assert line == f"main_pretrain.py --config_file configs/config/{recipe}.yml --dry_run"
    for script, config in (("pretrain", "demo"), ("pretrain_adapter", "demo_egovideo")):
        assert commands(project, f"exps/{script}.sh")[-1] == f"main_pretrain.py --config_file configs/{config}.yml"


def test_a_released_checkpoint_is_evaluated_by_the_protocol_of_its_family(project: Path) -> None:
    (line,) = commands(project, "exps/reproduce_released.sh", "avion.pt", "AVION-L", "--allow_missing")
    assert line.startswith("main_eval.py --benchmark all --config_file configs/config/clip_large_eval.yml")
    assert line.endswith("--published AVION-L --output results/AVION-L evaluate.protocol=avion --allow_missing")


def test_a_copy_elsewhere_as_sbatch_makes_it_finds_the_project(project: Path, tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    for script in ("eval_mir", "finetune_mir", "pretrain", "pretrain_adapter"):
        shutil.copy(project / "exps" / f"{script}.sh", tmp_path / "spool" / "slurm_script")
        (line,) = commands(project, "../spool/slurm_script", "--x", SLURM_SUBMIT_DIR=str(project))
        assert line.endswith(" --x")


INSTALLING = """#!/usr/bin/env bash
case "$*" in
    *"pip install"*requirements.txt*) echo "$*" >>"$PIP_CALLS"; exit "${PIP_CODE:-0}" ;;
    *"import pip"*) exit "${NO_PIP:-0}" ;;
    *torch_problem*) echo "$PROBLEM" ;;
esac
"""


def set_up(project: Path, code: int = 0, **variables: str) -> tuple[str, list[str]]:
    """Run exps/setup.sh: what it prints as errors, and the options of each pip install of the requirements."""
    python = project.parent / "environment" / "bin" / "python"
    python.write_text(INSTALLING)
    calls = project.parent / "pip_calls"
    calls.write_text("")
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_INDEX"}
    environment |= {
        "PATH": PATH,
        "VIRTUAL_ENV": str(python.parents[1]),
        "PIP_CALLS": str(calls),
        "PROBLEM": "",
    } | variables
    command = ["bash", "-eu", str(project / "exps" / "setup.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr, calls.read_text().splitlines()


def test_the_build_of_torch_is_chosen_by_one_variable(project: Path) -> None:
    _, (call,) = set_up(project)
    assert "--constraint" not in call
    assert set_up(project) == ("", []), "once"
    builds = project.parent / "environment" / ".torch-build.txt"
    _, (call,) = set_up(project, TORCH_INDEX="cu126")
    assert f"--constraint {builds} -r requirements.txt" in call
    assert "--extra-index-url" not in call
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch")]
    assert builds.read_text().splitlines() == [f"{pin}+cu126" for pin in pins if not pin.startswith("torchcodec")]
    _, (call,) = set_up(project, TORCH_INDEX="https://mirror.example/torch/cu126/")
    assert "--extra-index-url https://mirror.example/torch/cu126/ --constraint" in call
    assert builds.read_text().startswith("torch==")
    assert builds.read_text().count("+cu126\n") == 2


def test_the_first_failure_names_the_build_to_choose(project: Path) -> None:
    errors, calls = set_up(project, code=2, PROBLEM="driver 535 is too old: TORCH_INDEX=cu126 helps")
    assert errors.startswith("error: driver 535 is too old: TORCH_INDEX=cu126 helps; TORCH_INDEX=cpu installs the ")
    assert not calls, "nothing is downloaded"
    # An explicit choice is installed without a question, and a build that pip lacks is explained.
    errors, calls = set_up(project, code=1, PROBLEM="too old", TORCH_INDEX="cu130", PIP_CODE="1")
    assert len(calls) == 1
    assert "+cu130, give the address of PyTorch's own index" in errors
    assert set_up(project, code=1, PIP_CODE="1")[0] == "", "pip's message is all there is"


def test_uv_installs_where_there_is_one_and_pip_what_it_cannot(project: Path) -> None:
    """uv reads none of pip's configuration, where a site's mirror may be named; an environment of uv has no pip."""
    uv = project.parent / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(
        '#!/bin/sh\ncase "$*" in *requirements.txt*) echo "uv $*" >>"$PIP_CALLS" ;; esac\nexit ${UV_CODE:-0}\n'
    )
    uv.chmod(0o755)
    path = f"{uv.parent}:{PATH}"
    errors, (call,) = set_up(project, PATH=path, NO_PIP="1", TORCH_INDEX="https://mirror.example/torch/cu126")
    assert call.startswith(f"uv pip install --quiet --python {project.parent}/environment/bin/python --index-strategy ")
    assert "--extra-index-url https://mirror.example/torch/cu126 --constraint" in call
    assert errors == ""
    (stamp,) = (project.parent / "environment").glob(".egohod-run-*")
    stamp.unlink()
    errors, calls = set_up(project, PATH=path, UV_CODE="2")
    assert [call.split()[0] for call in calls] == ["uv", "-m"]
    assert errors == 2 * "uv cannot install this; trying pip\n"
    stamp.unlink(missing_ok=True)
    errors, _ = set_up(project, code=2, NO_PIP="1")
    assert "has no Python 3.11 with pip or uv" in errors


def test_all_scripts_are_valid_bash() -> None:
    for path in (ROOT / "exps").glob("*.sh"):
        subprocess.run(["bash", "-n", path], check=True)
