"""Programs started from another folder, from a checkout that cannot be written to, by a user without a home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import extract_features
import generate_hod
import pytest
import show_batch
import verify_dataset

import main_eval
from egohod.config import load
from egohod.errors import UserError
from tests.hod.runs import head
from tests.support import ROOT, ShortRun, environment


@pytest.fixture
def elsewhere(tmp_path: Path, demo_world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of the user, as working directory."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DEMO_DATA", str(demo_world))
    (folder / "clips.csv").write_text("\n".join(head(demo_world, 3)) + "\n")
    return folder


def commands(world: Path, run: Path) -> dict[str, list[str]]:
    """Programs without ``--config_file``; what they write is relative to the working directory."""
    boxes = [f"detector.options.path={world}/train/detections.parquet", "detector.kind=oracle", "workers=0"]
    return {
        "extract_features": [
            *("--videos", str(next((world / "test" / "videos").iterdir()))),
            *("--checkpoint", str(run), "--output", "features"),
        ],
        "generate_hod": ["--metadata", "clips.csv", "--root", f"{world}/train/videos", "--output", "hod.csv", *boxes],
        "main_eval": ["--checkpoint", str(run), "--output", "results"],
        "show_batch": ["--output", "batch.png", "train.global_batch_size=8"],
        "verify_dataset": ["--dry_run"],
    }


WRITTEN = ("features/index.json", "hod.csv", "results/results.json", "batch.png")


def test_default_configurations_are_those_of_the_project(
    elsewhere: Path, demo_world: Path, short_run: ShortRun
) -> None:
    for program in (extract_features, generate_hod, main_eval, show_batch, verify_dataset):
        assert program.main(commands(demo_world, short_run.folder)[program.__name__]) == 0, program.__name__
    assert [name for name in WRITTEN if (elsewhere / name).is_file()] == list(WRITTEN)


def test_a_config_of_the_project_is_read_where_the_working_directory_has_none(
    elsewhere: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    # With its bases, which are beside it.
    assert load("configs/demo.yml", ["train.seed=3"]).train.output == "runs/demo"
    assert f"configs/demo.yml is not in the working directory; reading the project's, {ROOT}/configs" in caplog.text
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs" / "demo.yml").write_text("train: {seed: 7}\n")
    assert load("configs/demo.yml").train.seed == 7
    with pytest.raises(UserError, match=r"configs/dmo\.yml: no such config file; did you mean configs/demo\.yml\?"):
        load("configs/dmo.yml")


@pytest.mark.ci
def test_a_user_without_home_or_name_uses_a_read_only_checkout(
    elsewhere: Path, demo_world: Path, short_run: ShortRun
) -> None:
    """As user 12345, who may read everything but write only here."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        pytest.skip("needs root and setpriv to become another user")
    os.chown(elsewhere, 12345, 12345)
    user = [setpriv, "--reuid=12345", "--regid=12345", "--clear-groups"]
    user += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    names: dict[str, Any] = dict.fromkeys(("HOME", "USER", "LOGNAME", "MPLCONFIGDIR", "XDG_CACHE_HOME"))
    variables = {name: value for name, value in environment().items() if name not in names}

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*user, sys.executable, str(ROOT / program), *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=variables, capture_output=True, text=True, timeout=300)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    for name, arguments in commands(demo_world, short_run.folder).items():
        done = run(f"{'' if name == 'main_eval' else 'tools/'}{name}.py", *arguments)
        assert done.returncode == 0, done.stderr
    assert [name for name in WRITTEN if (elsewhere / name).is_file()] == list(WRITTEN)
    video = str(next((demo_world / "test" / "videos").rglob("*.mp4")))
    more = {
        "main_pretrain.py": ["train.duration=1 steps", "train.global_batch_size=8", "evaluate.every=1000 steps"],
        "tools/predict.py": [video, "--checkpoint", "runs/demo", "--sentences", "takes", "puts"],
        "tools/search.py": ["--index", "features", "takes the cup"],
    }
    for name, arguments in more.items():
        done = run(name, *arguments)
        assert done.returncode == 0, done.stderr
    done = run("tools/convert_checkpoint.py", "--inspect", "ViT-B-16:openai")
    assert (done.returncode, "not in its local cache" in done.stderr) == (2, True)
