"""The Python interface: a clip and a sentence become vectors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU

import egohod
from egohod.data.videos import VideoError
from egohod.errors import UserError
from tests.support import ShortRun, environment


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


def test_many_clips_and_sentences_are_embedded_in_batches(demo_world: Path, tmp_path: Path) -> None:
    loaded = egohod.create_model_and_transforms("DEMO", num_frames=4)
    model, preprocess, tokenizer = loaded
    first = video_of(demo_world)
    (tmp_path / "copy.mkv").write_bytes(first.read_bytes())
    # Of two folders in turn, so that the order is not theirs.
    paths = [(first, 1.0, 3.0), tmp_path / "copy.mkv", first, (str(first), 0.5, 0.75)]
    sentences = ["#C C opens the jar", "#C C cuts", "#C C opens the jar"]
    clips, texts = egohod.embed(paths, sentences, model=loaded, batch_size=2, workers=1)
    assert (clips.shape, clips.dtype, texts.shape) == ((4, 128), np.float32, (3, 128))
    with torch.no_grad():
        for row, (start, end) in {0: (1.0, 3.0), 3: (0.5, 0.75)}.items():
            single = model.encode_video(preprocess(egohod.load_clip(first, start, end, 4))[None])[0].numpy()
            np.testing.assert_allclose(clips[row], single, atol=1e-5)
        np.testing.assert_allclose(texts, model.encode_text(tokenizer(sentences)).numpy(), atol=1e-5)
    np.testing.assert_allclose(clips[1], clips[2], atol=1e-5)
    assert np.abs(clips[0] - clips[2]).max() > 1e-4
    np.testing.assert_allclose(np.linalg.norm(clips, axis=1), 1, atol=1e-5)
    none, empty = egohod.embed([], model=loaded)
    assert (none.shape, empty.shape) == ((0, 128), (0, 128))
    # Fewer or more frames than the model was trained with.
    assert egohod.embed([first], model=loaded, frames=2, workers=0)[0].shape == (1, 128)


def test_all_clips_that_cannot_be_embedded_are_named(demo_world: Path, tmp_path: Path) -> None:
    loaded = egohod.create_model_and_transforms("DEMO", num_frames=4)
    first = video_of(demo_world)
    for name, content in (("broken.mp4", b"no video"), ("two.mp4", b""), ("two.mkv", b""), ("text.txt", b"")):
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / "gone.mp4", first, tmp_path / "text.txt", tmp_path / "two.mkv", (first, 3.0, 1.0)]
    with pytest.raises(UserError) as error:
        egohod.embed(paths, model=loaded, workers=0)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path / 'gone.mp4'}: no such file"
    assert "not a video by its ending" in lines[1]
    assert "two.mp4 is there as well; rename one" in lines[2]
    assert "a clip needs 0 <= start < end, not 3.0 and 1.0" in lines[3]
    assert lines[4] == "4 of 5 clips cannot be read; allow_missing=True leaves them NaN"
    clips, _ = egohod.embed([*paths, tmp_path / "broken.mp4"], model=loaded, workers=0, allow_missing=True)
    assert np.isfinite(clips).all(axis=1).tolist() == [False, True, False, False, False, False]
    with pytest.raises(UserError, match=r"broken.mp4"):
        egohod.embed([tmp_path / "broken.mp4", first], model=loaded, workers=0)
    # Not a single one, in words for callers of a function.
    with pytest.raises(UserError, match="1 of 1 clips cannot be read; allow_missing=True leaves them NaN") as error:
        egohod.embed([tmp_path / "broken.mp4"], model=loaded, workers=0)
    assert "main_eval" not in str(error.value)
    clips, texts = egohod.embed([tmp_path / "broken.mp4"], ["#C C cuts"], model=loaded, workers=0, allow_missing=True)
    assert np.isnan(clips).all()
    assert np.isfinite(texts).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": "a.mp4"}, "paths and sentences are lists, even of one"),
        ({"sentences": "#C C cuts"}, "paths and sentences are lists, even of one"),
        ({"frames": 0}, "frames at least 1"),
        ({"device": "cuda:1"}, "device is cpu, cuda or mps"),
        # Random weights, whose features mean nothing.
        ({"model": "DEMO"}, "model=DEMO: no such weights"),
        ({"model": "runs/gone"}, "model=runs/gone: no such weights"),
        ({"paths": ["https://user:secret@host/a.txt"]}, r"^paths\[0\]: not a video by its ending"),
        ({"paths": ["https://host/a.mp4?key=secret"]}, r"^paths\[0\]: not a video by its ending"),
        ({"paths": [("https://user:secret@host/a.mp4", 3, 1)]}, r"^paths\[0\]: a clip needs"),
        ({"paths": ["https://user:secret@host/a.mp4"]}, "holds a password or a query"),
    ],
)
def test_arguments_that_would_give_other_features_than_meant_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"paths": [], "model": egohod.create_model_and_transforms("DEMO", num_frames=2)} | arguments
    with pytest.raises(UserError, match=message) as error:
        egohod.embed(**given, workers=0)
    assert "secret" not in str(error.value)


def test_a_slow_fast_model_takes_the_fast_frames_and_derives_the_slow_ones() -> None:
    model = egohod.create_model("DEMO_Slowfast", num_frames=8, fast={"slow_frames": 2, "pool": "both"}).eval()
    assert (model.num_frames, model.geometry.name) == (8, "DEMO_Slowfast")
    video, tokens = torch.randn(2, 3, 8, 40, 40), torch.tensor([[49406, 320, 49407]])
    with torch.no_grad():
        unit, plain = model.encode_video(video), model.encode_video(video, normalize=False)
        expected = torch.cat((model.visual(video[:, :, [2, 6]]), model.visual.fast(video)), 1)
        torch.testing.assert_close(plain, expected @ model.slowfast_projection)
        torch.testing.assert_close(unit, torch.nn.functional.normalize(plain))
        text, plain = model.encode_text(tokens), model.encode_text(tokens, normalize=False)
        torch.testing.assert_close(text, torch.nn.functional.normalize(plain))
    assert (unit.shape, text.shape) == ((2, 128), (1, 128))
    with pytest.raises(UserError, match="num_frame"):
        egohod.create_model("DEMO", num_frame=8)


def test_weights_go_into_a_model_with_a_report(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, model = egohod.create_model("DEMO", num_frames=4), egohod.create_model("DEMO_Slowfast", num_frames=8)
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"temporal_embedding is \[4, 128\] there and \[8, 128\] here"):
        egohod.load_weights(model, tmp_path / "model.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = egohod.load_weights(model, tmp_path / "model.pt", adapt=True)
    assert list(report.resized) == ["visual.temporal_embedding"]
    assert len(report.taken) + 1 == len(state)
    assert report.missing.keys() == model.state_dict().keys() - source.state_dict().keys()
    assert not report.dropped
    assert torch.equal(model.visual.conv1.weight, source.visual.conv1.weight)


def test_a_run_of_this_project_knows_its_frames(short_run: ShortRun) -> None:
    for weights in (short_run.folder, short_run.folder / "checkpoints" / "step-00000001"):
        model, _, _ = egohod.create_model_and_transforms("DEMO", weights)
        assert model.num_frames == 5
        assert model.visual.temporal_embedding.shape[0] == 5
        assert isinstance(model.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)
    with pytest.raises(UserError, match="holds a DEMO, not a CLIP_VITB16"):
        egohod.create_model_and_transforms("CLIP_VITB16", short_run.folder)


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
