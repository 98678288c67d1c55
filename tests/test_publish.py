"""Exported towers against the model, by torch.export and ONNX Runtime, and the example of the docs without egohod."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import egohod
from egohod import cli
from egohod.data.dataset import Tokenizer
from egohod.errors import UserError
from egohod.publish import _clip_tokenizer, export, preprocessing
from tests.data.video_files import encode
from tests.model.field_files import write_safetensors
from tests.support import ROOT, environment
from tools import convert_checkpoint

BACKBONE = {"depth": 2}
MODELS: dict[str, dict[str, Any]] = {
    "DEMO_SMALL_Slowfast": {"num_frames": 8, "motion_stem": 8, "fast": {"position": "after", "pool": "both"}},
    "timm/vit_tiny_patch16_224": {"num_frames": 2, "image_size": 32, "backbone": BACKBONE},
    "timm/eva02_tiny_patch14_224": {"num_frames": 2, "image_size": 28, "backbone": BACKBONE, "rope_time": True},
}


def saved(folder: Path, name: str) -> Path:
    """Weights of a model in which nothing is zero, with the settings that this project's files have."""
    torch.manual_seed(0)
    model = egohod.create_model(name, **MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    settings: dict[str, Any] = {"model.name": name}
    for key, value in MODELS[name].items():
        settings |= {f"model.{key}.{k}": v for k, v in value.items()} if key == "fast" else {f"model.{key}": value}
    metadata = {"family": "EgoHOD (this project)", "settings": json.dumps(settings)}
    return write_safetensors(folder / "model.safetensors", model.state_dict(), format="pt", **metadata)


SLOW = pytest.mark.ci


@pytest.mark.parametrize("name", [name if "DEMO" in name else pytest.param(name, marks=SLOW) for name in MODELS])
def test_exported_towers_give_the_models_features(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, name)
    differences = export(path, tmp_path / "towers", "torch")
    assert differences.keys() == {"video", "text"}
    assert max(differences.values()) < 1e-5
    model = egohod.create_model_and_transforms(str(path))[0]
    side = model.geometry.image_size
    video = torch.rand(5, 3, model.num_frames, side, side)
    tower = torch.export.load(tmp_path / "towers" / "video.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(tower(video), model.encode_video(video), rtol=0, atol=1e-5)
        # Another file of the same model gives other features: the weights are those of the file.
        assert (tower(video) - egohod.create_model(name, **MODELS[name]).eval().encode_video(video)).abs().max() > 1e-2
    about = json.loads((tmp_path / "towers" / "preprocessor_config.json").read_text())
    assert (about["num_frames"], about["crop_size"]["width"]) == (model.num_frames, side)


@SLOW
@pytest.mark.parametrize("name", MODELS)
def test_onnx_runtime_gives_the_models_features(tmp_path: Path, name: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    differences = export(saved(tmp_path, name), tmp_path / "towers", "onnx")
    assert differences.keys() == {"video", "text"}
    assert max(differences.values()) < 1e-4


@SLOW
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close(tmp_path: Path, dtype: str) -> None:
    differences = export(saved(tmp_path, "DEMO_SMALL_Slowfast"), tmp_path / "towers", "torch", dtype=dtype)
    limit = {"float16": 5e-3, "bfloat16": 4e-2}[dtype]
    assert all(1e-6 < value < limit for value in differences.values()), differences
    assert (tmp_path / "towers" / "video.pt2").stat().st_size < 0.7 * (tmp_path / "model.safetensors").stat().st_size


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, "DEMO_SMALL_Slowfast")
    with pytest.raises(UserError, match="cannot export tflite in float32; there are torch and onnx"):
        export(path, tmp_path / "a", "tflite")
    with pytest.raises(UserError, match="is not an empty folder"):
        export(path, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install onnx onnxscript onnxruntime"):
        export(path, tmp_path / "a", "onnx")
    with pytest.raises(UserError, match="ONNX is exported in float32 only"):
        export(path, tmp_path / "a", "onnx", dtype="float16")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        (["--push", "org/a", "--export", "onnx"], "--export"),
        (["--inspect", "--export", "torch"], "--export"),
        (["b.safetensors", "--dtype", "float16"], "--dtype or --model"),
        (["b.safetensors", "--licence", "mit"], "--results or --licence"),
        (["folder", "--export", "torch", "--private"], "--private"),
        (["folder", "--export", "hub", "--to", "upstream"], "--download, --force or --to"),
    ],
)
def test_an_option_without_effect_is_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], ignored: str
) -> None:
    assert cli.run(convert_checkpoint.main, ["a.pt", *options]) == 2
    assert f"{ignored} has no effect with the other options" in capsys.readouterr().err


@SLOW
def test_the_tokenizer_of_the_folder_is_clips(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer()
    (tmp_path / "tokenizer.json").write_text(json.dumps(_clip_tokenizer(ours)))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = ["#C C cuts", "  It's  TWO cups,\n and 12 plates!? ", "", "an é, ü, 手 and \U0001f600 here", "word " * 200]
    texts += ["#O man X opens-the_drawer's left (hand)", "don't we'll I'd you've they're I'm"]
    assert [each.ids for each in theirs.encode_batch(texts)] == ours(texts).tolist()


def example() -> str:
    """The code of docs/export.md."""
    return re.findall(r"```python\n(import av.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)[0]


# Sides whose ratio is no exact float, and an odd number of pixels to cut off.
@pytest.mark.parametrize("size", [(110, 142), (142, 98), (96, 64)])
def test_the_example_of_the_docs_reads_the_frames_and_pixels_that_egohod_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    model, preprocess, _ = egohod.create_model_and_transforms("DEMO", num_frames=4)
    encode(tmp_path / "kitchen.mp4", 30, size=size)
    (tmp_path / "towers").mkdir()
    (tmp_path / "towers/preprocessor_config.json").write_text(json.dumps(preprocessing(model)))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example().partition("tokenizer = ")[0].replace(", onnxruntime, tokenizers", ""), names)
    ours = preprocess(egohod.load_clip("kitchen.mp4", 0, 3, 4))
    # Pillow's and torchvision's resizing round differently, by a level of 255.
    np.testing.assert_allclose(names["video"][0], ours, atol=0.02)


@SLOW
def test_the_example_of_the_docs_runs_without_egohod(tmp_path: Path, demo_world: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime", "tokenizers"):
        pytest.importorskip(package)
    path = saved(tmp_path, "DEMO_SMALL_Slowfast")
    assert cli.run(convert_checkpoint.main, [str(path), str(tmp_path / "towers"), "--export", "onnx"]) == 0
    code = example()
    assert len(code.splitlines()) <= 30
    assert "egohod" not in code
    assert "torch" not in code
    video = next((demo_world / "train" / "videos").glob("*/0000.mp4"))
    (tmp_path / "kitchen.mp4").write_bytes(video.read_bytes())
    (tmp_path / "example.py").write_text(code + "\nnumpy.save('features.npy', numpy.concatenate([clip, texts]))\n")
    done = subprocess.run(
        *([sys.executable, "example.py"],), cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    features = np.load(tmp_path / "features.npy")
    sentences = re.findall(r'"(#C C [^"]*)"', code)
    clips, texts = egohod.embed([tmp_path / "kitchen.mp4"], sentences, model=path, workers=0)
    # Another decoder and another resizing of the same frames.
    assert (features[:1] @ clips.T).item() > 0.99
    np.testing.assert_allclose(features[1:], texts, atol=1e-4)
