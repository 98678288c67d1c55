"""Reading weights: OpenAI's two file kinds, strictness, and files that mean harm."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from egohod.config import ModelConfig, UserError
from egohod.model.egovideo import DualEncoder, create_model
from egohod.model.weights import load_openai, load_state


def openai_state(model: DualEncoder) -> dict[str, Tensor]:
    """Random weights under OpenAI's names and shapes, in half precision, with its odd extra entries."""
    state: dict[str, Tensor] = {}
    for number, (name, value) in enumerate(model.state_dict().items()):
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(number)).half()
        if name == "visual.temporal_embedding":
            continue
        if name == "visual.conv1.weight":
            noise = noise.view(len(noise), 3, model.geometry.patch_size, -1)
        name = name.replace("visual.image_projection", "visual.proj").removeprefix("textual.")
        state[name] = noise
    return state | {key: torch.tensor(1) for key in ("input_resolution", "context_length", "vocab_size")}


class Holder(nn.Module):
    """A module tree with the given dotted names, so that they can be scripted into an archive."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            head, _, rest = name.partition(".")
            if not rest:
                self.register_buffer(name, value)
            elif head not in self._modules:
                inside = {key.partition(".")[2]: each for key, each in state.items() if key.startswith(f"{head}.")}
                self.add_module(head, Holder(inside))

    def forward(self) -> int:
        return 0


@pytest.mark.parametrize("kind", ["archive", "state dict", "state dict in a mapping"])
def test_openai_weights_are_taken_over_but_for_projections_and_temperature(
    demo_model: DualEncoder, tmp_path: Path, kind: str
) -> None:
    path, state = tmp_path / "clip.pt", openai_state(demo_model)
    if kind == "archive":
        torch.jit.script(Holder(state)).save(str(path))
    else:
        torch.save(state if kind == "state dict" else {"state_dict": state}, path)
    before = {name: value.clone() for name, value in demo_model.state_dict().items()}
    report = load_openai(demo_model, path)
    after = demo_model.state_dict()
    kept = {name for name in after if torch.equal(after[name], before[name])}
    assert kept == set(report.fresh)
    assert kept == {
        "visual.image_projection",
        "textual.text_projection",
        "logit_scale",
        "visual.temporal_embedding",
    }
    assert report.loaded == len(after) - len(kept)
    torch.testing.assert_close(after["visual.conv1.weight"], state["visual.conv1.weight"].flatten(1).float())
    torch.testing.assert_close(after["textual.ln_final.bias"], state["ln_final.bias"].float())
    assert str(path) in str(report)
    assert "visual.temporal_embedding" in str(report)


def test_patch_embedding_of_a_convolution_means_the_same(demo_model: DualEncoder, tmp_path: Path) -> None:
    state = openai_state(demo_model)
    torch.save(state, tmp_path / "clip.pt")
    load_openai(demo_model, tmp_path / "clip.pt")
    size, stride = demo_model.geometry.image_size, demo_model.geometry.patch_size
    frame = torch.randn(1, 3, size, size)
    convolved = torch.nn.functional.conv2d(frame, state["visual.conv1.weight"].float(), stride=stride).flatten(2).mT
    visual = demo_model.visual
    nn.init.zeros_(visual.positional_embedding)
    nn.init.zeros_(visual.temporal_embedding)
    ours = visual.embed(frame.unsqueeze(2))[:, 1:]
    torch.testing.assert_close(ours, visual.ln_pre(convolved), atol=1e-4, rtol=1e-4)


def test_another_geometry_is_named_with_both_shapes(demo_model: DualEncoder, tmp_path: Path) -> None:
    state = openai_state(demo_model)
    places, width = demo_model.visual.positional_embedding.shape
    state["visual.positional_embedding"] = torch.zeros(places + 1, width)
    torch.save(state, tmp_path / "clip.pt")
    before = demo_model.visual.class_embedding.clone()
    shapes = rf"positional_embedding is \[{places + 1}, {width}\] there and \[{places}, {width}\] here"
    with pytest.raises(UserError, match=rf"clip\.pt.*DEMO.*{shapes}"):
        load_openai(demo_model, tmp_path / "clip.pt")
    assert torch.equal(demo_model.visual.class_embedding, before), "half loaded"


def test_checkpoint_of_another_frame_count_lacking_or_unknown_tensors(demo_model: DualEncoder) -> None:
    other = create_model(ModelConfig(name="DEMO", num_frames=4)).state_dict()
    with pytest.raises(UserError, match=r"temporal_embedding is \[4, \d+\] there and \[8, \d+\] here"):
        load_state(demo_model, other)
    state: dict[str, Any] = dict(demo_model.state_dict())
    del state["visual.ln_pre.bias"]
    with pytest.raises(UserError, match=r"it lacks visual\.ln_pre\.bias"):
        load_state(demo_model, state)
    state = {**demo_model.state_dict(), "visual.adapter.gamma": torch.ones(1)}
    with pytest.raises(UserError, match=r"unknown tensors visual\.adapter\.gamma"):
        load_state(demo_model, state)


def test_state_round_trip(demo_model: DualEncoder) -> None:
    other = create_model(ModelConfig(name="DEMO", num_frames=8))
    assert load_state(other, demo_model.state_dict()).loaded == len(demo_model.state_dict())
    for name, value in demo_model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "old pickle", "bare pickle"])
def test_hostile_pickle_is_refused_by_name_and_never_run(demo_model: DualEncoder, tmp_path: Path, kind: str) -> None:
    path, sprung = tmp_path / "clip.pt", tmp_path / "sprung"
    content = {"visual.proj": torch.zeros(2), "trap": Trap(sprung)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(content["trap"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=r"posix\.mkdir") as caught:
        load_openai(demo_model, path)
    assert "\n" not in str(caught.value)
    assert not sprung.exists()


def test_pickle_of_another_protocol_is_not_run_either(demo_model: DualEncoder, tmp_path: Path) -> None:
    path, sprung = tmp_path / "clip.pt", tmp_path / "sprung"
    path.write_bytes(pickle.dumps(Trap(sprung), protocol=4))
    with pytest.raises(UserError, match=r"clip\.pt: refused") as caught:
        load_openai(demo_model, path)
    assert "weights_only" not in str(caught.value), "advice to load it unsafely"
    assert not sprung.exists()


@pytest.mark.parametrize(
    "content", [b"", b"not weights at all", b"PK\x03\x04 a torn archive"], ids=["empty", "text", "torn"]
)
def test_unreadable_files_are_named(demo_model: DualEncoder, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.pt"
    with pytest.raises(UserError, match=r"clip\.pt: no such file"):
        load_openai(demo_model, path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"clip\.pt: ") as caught:
        load_openai(demo_model, path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_state_dict(demo_model: DualEncoder, tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "clip.pt")
    with pytest.raises(UserError, match="no state dict"):
        load_openai(demo_model, tmp_path / "clip.pt")


def test_code_in_a_torchscript_archive_is_never_run(demo_model: DualEncoder, tmp_path: Path) -> None:
    class Loud(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))

        def forward(self) -> int:
            return 0

        @torch.jit.export
        def __getstate__(self) -> tuple[torch.Tensor, bool]:
            return self.weight, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
            self.weight, self.training = state[0], state[1]
            assert False, "code of the file was run"  # noqa: B011, PT015

    path = tmp_path / "hostile.pt"
    torch.jit.script(Loud()).save(str(path))
    with pytest.raises(Exception, match="code of the file was run"):
        torch.jit.load(str(path))
    with pytest.raises(UserError) as caught:
        load_openai(demo_model, path)
    assert "code of the file was run" not in str(caught.value)
