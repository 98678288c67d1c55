"""The ten lines of the README: a clip and a sentence become vectors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import egohod
import main_pretrain
from egohod.config import UserError
from egohod.data.video import VideoError
from tests.support import ROOT, environment


def video_of(world: Path) -> Path:
    return next((world / "train" / "videos").glob("*/0000.mp4"))


def test_a_clip_and_sentences_become_unit_vectors(demo_world: Path) -> None:
    model, preprocess, tokenizer = egohod.create_model_and_transforms("DEMO", num_frames=4)
    frames = egohod.load_clip(video_of(demo_world), 1.0, 3.0, 4)
    assert frames.shape == (4, 120, 160, 3)
    assert frames.dtype == np.uint8
    assert len({frame.tobytes() for frame in frames}) == 4
    with torch.no_grad():
        video = model.encode_video(preprocess(frames)[None])
        text = model.encode_text(tokenizer(["#C C opens the jar", "#C C closes the jar"]))
    assert video.shape == (1, 128)
    assert text.shape == (2, 128)
    torch.testing.assert_close(torch.cat([video, text]).norm(dim=1), torch.ones(3))
    assert not model.training


def test_a_run_of_this_project_knows_its_frames(tiny_config: Path, tmp_path: Path) -> None:
    overrides = ["train.duration=1 steps", "model.num_frames=5", "model.activation=quick_gelu"]
    assert main_pretrain.main(["--config_file", str(tiny_config), *overrides]) == 0
    for weights in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000001"):
        model, _, _ = egohod.create_model_and_transforms("DEMO", weights)
        assert model.num_frames == 5
        assert model.visual.temporal_embedding.shape[0] == 5
    with pytest.raises(UserError, match="holds a DEMO, not a CLIP_VITB16"):
        egohod.create_model_and_transforms("CLIP_VITB16", tmp_path / "run")


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'VITB', but must be one of CLIP_VITB16"):
        egohod.create_model_and_transforms("VITB")
    with pytest.raises(UserError, match=r"none\.pt: no such file"):
        egohod.create_model_and_transforms("DEMO", tmp_path / "none.pt")
    with pytest.raises(VideoError, match=r"none\.mp4: no such file"):
        egohod.load_clip(tmp_path / "none.mp4", 0, 2, 4)
    with pytest.raises(UserError, match="needs 0 <= start < end"):
        egohod.load_clip(tmp_path / "none.mp4", 2, 2, 4)
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        egohod.create_modle  # noqa: B018


def test_importing_the_package_alone_is_cheap() -> None:
    code = "import sys, egohod; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_example_of_the_readme_runs(demo_world: Path, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    example = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_clip" in code)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    # The same lines with the small world and without the demo's run.
    example = example.replace(', "runs/demo"', "").replace("demo_data/test", str(demo_world / "test"))
    done = subprocess.run(
        [sys.executable, "-c", example], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert re.search(r"-?0\.\d+", done.stdout)
