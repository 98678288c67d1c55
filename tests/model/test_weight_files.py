"""Opening files: five families, three containers, files that mean harm, and half-downloaded ones."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import pwd
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import open_clip
import pytest
import torch
from omegaconf import OmegaConf

from egohod.errors import UserError
from egohod.model.checkpoints import Family, load_weights, read_weights
from egohod.model.config import geometry
from egohod.model.dual_encoder import DualEncoder
from egohod.training.checkpoint import open_weights
from tests.model.field_files import (
    SCHEMA,
    State,
    noise,
    open_clip_state,
    openai_state,
    plain,
    upstream_state,
    write_archive,
    write_avion,
    write_safetensors,
    write_upstream,
)

DEMO = geometry("DEMO")


def avion_state() -> State:
    """Released AVION models share a space of 256 dimensions."""
    names = SCHEMA["b16_flash"]["first_two_blocks"]
    cut = {name: [shape[0], 256] for name, shape in names.items() if name.endswith("_projection")}
    return noise(names | cut)


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


WRITERS: dict[str, tuple[Family, Callable[[Path], Path]]] = {
    "OpenAI's archive": (Family.OPENAI, lambda path: write_archive(path, openai_state(DEMO))),
    "OpenAI's state dict": (Family.OPENAI, lambda path: save(path, openai_state(DEMO))),
    "open_clip, pickle": (Family.OPEN_CLIP, lambda path: save(path, open_clip_state(DEMO))),
    "open_clip, training": (Family.OPEN_CLIP, lambda path: write_upstream(path, open_clip_state(DEMO))),
    "open_clip, safetensors": (Family.OPEN_CLIP, lambda path: write_safetensors(path, open_clip_state(DEMO))),
    "open_clip, text apart": (Family.OPEN_CLIP, lambda path: save(path, open_clip_state(DEMO, custom_text=True))),
    "upstream, flash": (Family.UPSTREAM, lambda path: write_upstream(path, upstream_state("b16_flash"))),
    "upstream, plain": (Family.UPSTREAM, lambda path: write_upstream(path, upstream_state("b16_plain"))),
    "upstream, convolution": (Family.UPSTREAM, lambda path: write_upstream(path, upstream_state("b16_plain_conv"))),
    "upstream, older format": (
        Family.UPSTREAM,
        lambda path: write_upstream(path, upstream_state("b16_flash"), zipped=False),
    ),
    "upstream, slow-fast": (Family.UPSTREAM, lambda path: write_upstream(path, upstream_state("slowfast_b16_flash"))),
    "AVION": (Family.AVION, lambda path: write_avion(path, avion_state())),
    "AVION, weights alone": (Family.AVION, lambda path: save(path, avion_state())),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_families_are_recognised_and_renamed(tmp_path: Path, kind: str) -> None:
    family, write = WRITERS[kind]
    weights = read_weights(write(tmp_path / "weights.pt"))
    assert weights.family is family
    ours = set(SCHEMA["b16_plain"]["first_two_blocks"])
    blocks = {name for name in weights.tensors if ".resblocks.0." in name and ".adapter." not in name}
    assert blocks == {name for name in ours if ".resblocks.0." in name}
    assert {name for name in weights.tensors if ".resblocks." not in name} - {"slowfast_projection"} == {
        name
        for name in ours
        if ".resblocks." not in name and (name != "visual.temporal_embedding" or not family.is_clip)
    }
    assert weights.tensors["visual.conv1.weight"].dim() == 2
    shape = weights.shape
    assert shape is not None
    if family.is_clip:
        assert (shape.name, shape.num_frames) == ("DEMO", None)
    else:
        assert (shape.image_size, shape.patch_size, shape.vision_width, shape.vision_layers) == (224, 16, 768, 2)
        assert shape.num_frames == (16 if "slow-fast" in kind else 4)
        assert shape.embed_dim == (256 if family is Family.AVION else 512)
        assert shape.slowfast == ("slow-fast" in kind)


def test_what_lies_beside_the_weights_is_described(tmp_path: Path) -> None:
    beside = read_weights(write_upstream(tmp_path / "large_best.pt", upstream_state("b16_flash"))).beside
    assert beside["epoch"] == "7"
    assert beside["best_acc1"] == "0.418"
    assert beside["scores"] == "array (3,)"
    assert beside["args"].startswith("omegaconf.dictconfig.DictConfig: model={2 values}, lr=1e-05, betas=[0.9, 0.999]")
    assert "state={1 values}" in beside["optimizer"]
    beside = read_weights(write_avion(tmp_path / "avion.pt", avion_state())).beside
    assert beside["args"].startswith("argparse.Namespace: model=CLIP_VITB16, pretrain_zoo=openai")


@pytest.mark.parametrize(("style", "stats"), [(None, "avion"), ("openai", "avion"), ("timm", "imagenet")])
def test_avions_files_tell_what_its_script_normalised_pixels_with(
    tmp_path: Path, style: str | None, stats: str
) -> None:
    path = write_avion(tmp_path / "avion.pt", avion_state(), **({"norm_style": style} if style else {}))
    weights = read_weights(path)
    assert weights.settings == {"model.image_stats": stats}
    assert weights.model_knobs["image_stats"] == stats
    assert read_weights(write_upstream(tmp_path / "upstream.pt", upstream_state("b16_flash"))).settings == {}


@pytest.mark.parametrize("name", ["slowfast_b16_flash", "slowfast_l14_336_flash"])
def test_dead_weights_of_upstreams_slow_fast_files_are_dropped(tmp_path: Path, name: str) -> None:
    state = upstream_state(name)
    weights = read_weights(write_upstream(tmp_path / "slowfast.pt", state))
    dead = {key for key in state if ".adapter_2." in key or ".adapter.conv2d." in key}
    assert set(weights.dropped) == dead
    assert len(dead) == 2 * (11 + 2)
    adapter = {key.rpartition("adapter.")[2] for key in weights.tensors if ".adapter." in key}
    layers = ("dwconv", "conv", "down_proj", "up_proj")
    assert adapter == {"gamma", *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))}


def test_a_spatial_branch_of_our_own_is_no_dead_weight(tmp_path: Path) -> None:
    state = {name: value for name, value in upstream_state("slowfast_b16_flash").items() if ".adapter_2." not in name}
    assert not read_weights(write_safetensors(tmp_path / "own.safetensors", plain(state))).dropped


# --------------------------------------------------------------------------------------------------
# Wrappers and companions
# --------------------------------------------------------------------------------------------------


def renamed(state: State, change: Callable[[str], str]) -> State:
    return {change(name): value for name, value in state.items()}


def in_blocks(wrapper: str) -> Callable[[str], str]:
    """As a wrapper around each block puts its name into those of the block's weights."""
    return lambda name: re.sub(r"(resblocks\.\d+\.)", rf"\1{wrapper}.", name)


WRAPPED: dict[str, Callable[[State], Any]] = {
    "compiled": lambda state: renamed(state, lambda name: f"_orig_mod.{name}"),
    "a compiled tower": lambda state: renamed(state, lambda name: name.replace("visual.", "visual._orig_mod.")),
    "compiled, then distributed": lambda state: renamed(state, lambda name: f"module._orig_mod.{name}"),
    "distributed, then compiled": lambda state: renamed(state, lambda name: f"_orig_mod.module.{name}"),
    "compiled blocks": lambda state: renamed(state, in_blocks("_orig_mod")),
    "FSDP with activation checkpoints": lambda state: renamed(
        state,
        lambda name: "_fsdp_wrapped_module." + in_blocks("_fsdp_wrapped_module._checkpoint_wrapped_module")(name),
    ),
    "Lightning": lambda state: {
        "state_dict": renamed(state, lambda name: f"model.{name}"),
        "epoch": 3,
        "pytorch-lightning_version": "2.5",
        "hyper_parameters": {"lr": 1e-4},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}],
    },
    "Lightning, compiled, with its loss and an average": lambda state: {
        "state_dict": renamed(state, lambda name: f"model._orig_mod.{name}")
        | renamed(state, lambda name: f"model_ema.module.{name}")
        | {"criterion.weight": torch.ones(3)}
    },
    "DeepSpeed": lambda state: {"module": renamed(state, lambda name: f"_forward_module.net.{name}")},
    "averaged by PyTorch": lambda state: (
        renamed(state, lambda name: f"module.{name}") | {"n_averaged": torch.tensor(5)}
    ),
    "model_state_dict": lambda state: {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "model and optimizer": lambda state: {
        "epoch": 3,
        "optimizer": {"state": {"visual.conv1.weight": {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]},
        "model": state,
    },
    "model and its average": lambda state: {"model_ema": doubled(state), "model": state},
    "state dict and its average": lambda state: {"state_dict_ema": doubled(state), "state_dict": state},
    "an average alone": lambda state: {"args": argparse.Namespace(lr=1), "state_dict_ema": state},
    "within a key of no name": lambda state: {"run": {"at_the_end": {"model": state, "step": torch.tensor(3)}}},
    "a state beside the weights": lambda state: state | {"visual.transformer._extra_state": None},
}
REMARKS = {
    "Lightning, compiled, with its loss and an average": (
        "taken is the model under 'model.', not that under 'model_ema.'"
    ),
    "model and its average": "taken is 'model', not 'model_ema'",
    "state dict and its average": "taken is 'state_dict', not 'state_dict_ema'",
}


def doubled(state: State) -> State:
    return {name: value * 2 for name, value in state.items()}


@pytest.mark.parametrize("names", ["upstream", "open_clip"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_anywhere_in_a_name_are_taken_off(tmp_path: Path, kind: str, names: str) -> None:
    state = upstream_state("b16_flash") if names == "upstream" else open_clip_state(DEMO)
    plain_file = read_weights(save(tmp_path / "plain.pt", state))
    weights = read_weights(save(tmp_path / "wrapped.pt", WRAPPED[kind](state)))
    assert weights.tensors.keys() == plain_file.tensors.keys()
    assert all(torch.equal(value, plain_file.tensors[name]) for name, value in weights.tensors.items())
    assert (weights.family, weights.spelling) == (plain_file.family, plain_file.spelling)
    assert weights.remarks == ([REMARKS[kind]] if kind in REMARKS else [])
    others = {"outside of 'model.'": len(state) + 1} if kind.startswith("Lightning, compiled") else {}
    others |= {"constants": 1} if kind == "averaged by PyTorch" else {}
    reasons = list(weights.dropped.values())
    assert {each: reasons.count(each) for each in reasons if each != "numbers, no weights"} == others


def test_which_of_two_models_was_taken_is_reported(tmp_path: Path, demo_model: DualEncoder) -> None:
    state = demo_model.state_dict()
    torch.save({"model_ema": doubled(state), "model": state}, tmp_path / "both.pt")
    report = load_weights(demo_model, read_weights(tmp_path / "both.pt"))
    assert "taken is 'model', not 'model_ema'" in str(report)


def test_flat_parameters_are_named_as_what_they_are(tmp_path: Path) -> None:
    state = {
        "_fsdp_wrapped_module._flat_param": torch.zeros(9),
        "_fsdp_wrapped_module.visual._flat_param": torch.zeros(9),
    }
    with pytest.raises(UserError, match=r"flat\.pt: holds the flat parameters of FSDP; save a full state dict"):
        read_weights(save(tmp_path / "flat.pt", state))


# --------------------------------------------------------------------------------------------------
# Shards
# --------------------------------------------------------------------------------------------------


def write_shards(folder: Path, state: State, ending: str) -> Path:
    """Three shards and their index, as the hub's clients write them; returns the index."""
    stem = "model" if ending == "safetensors" else "pytorch_model"
    folder.mkdir(exist_ok=True)
    shards: dict[str, State] = {}
    for number, (name, value) in enumerate(state.items()):
        shards.setdefault(f"{stem}-{number % 3 + 1:05d}-of-00003.{ending}", {})[name] = value.contiguous()
    for shard, part in shards.items():
        (write_safetensors if ending == "safetensors" else save)(folder / shard, part)
    places = {name: shard for shard, part in shards.items() for name in part}
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_put_together_by_their_index(tmp_path: Path, ending: str) -> None:
    state = {f"module.{name}": value for name, value in open_clip_state(DEMO).items()}
    index = write_shards(tmp_path / "hub", state, ending)
    (tmp_path / "hub" / "config.json").write_text("{}")
    whole = read_weights(save(tmp_path / "whole.pt", state))
    for source in (index, index.parent):
        weights = read_weights(source)
        assert weights.source == str(source)
        assert weights.family is Family.OPEN_CLIP
        assert weights.tensors.keys() == whole.tensors.keys()
        assert all(torch.equal(value, whole.tensors[name]) for name, value in weights.tensors.items())
        assert open_weights(source).tensors.keys() == whole.tensors.keys()


def test_shards_that_are_not_whole_are_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "hub", open_clip_state(DEMO), "safetensors")
    content = json.loads(index.read_text())
    last = "model-00003-of-00003.safetensors"

    def refuses(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            read_weights(index.parent)
        assert "\n" not in str(caught.value)

    whole = (index.parent / last).read_bytes()
    (index.parent / last).write_bytes(whole[:-10])
    refuses(rf"hub: {last}: cut off after")
    (index.parent / last).unlink()
    refuses(rf"hub: 1 of its 3 shards are not there, such as {last}")
    (index.parent / last).write_bytes(whole)
    places = content["weight_map"]
    for change, message in (
        (places | {"more": last}, f"{last}: lacks more, which model.safetensors.index.json says is in it"),
        (
            places | {"more": "../model.safetensors"},
            r"names the shard '\.\./model\.safetensors', which is no plain file",
        ),
        (places | {"more": str(tmp_path / "x.bin")}, "which is no plain file name"),
        (places | {"more": 3}, "names the shard '3'"),
        ([], "no index of shards"),
        ({}, "names no tensors"),
    ):
        index.write_text(json.dumps(content | {"weight_map": change}))
        refuses(message)
    index.write_text("[" * 100_000)
    refuses("no index of shards")


def test_errors_for_folders_without_weights_list_their_content(tmp_path: Path) -> None:
    for open_ in (read_weights, open_weights):
        with pytest.raises(UserError, match="not a file of weights, and neither a checkpoint nor an index"):
            open_(tmp_path)
    write_safetensors(tmp_path / "epoch_10.safetensors", open_clip_state(DEMO))
    with pytest.raises(UserError, match=r"; name the file, such as epoch_10\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(UserError, match=r"convert it first: python -m torch\.distributed\.checkpoint\.format_utils"):
        open_weights(tmp_path)


# --------------------------------------------------------------------------------------------------
# Harm
# --------------------------------------------------------------------------------------------------


def test_a_few_numbers_repeated_beyond_any_memory_are_refused(tmp_path: Path) -> None:
    state = open_clip_state(DEMO) | {"visual.positional_embedding": torch.zeros(1).expand(1 << 40, 64)}
    with pytest.raises(
        UserError, match=r"weights\.pt: its tensors have [\d,]+ bytes, in [\d,]+ bytes of file; damaged"
    ):
        read_weights(save(tmp_path / "weights.pt", state))


def test_tensors_without_numbers_are_refused(tmp_path: Path) -> None:
    for odd in (torch.zeros(3, device="meta"), torch.eye(3).to_sparse()):
        state = open_clip_state(DEMO) | {"visual.class_embedding": odd}
        with pytest.raises(UserError, match=r"weights\.pt: 'visual\.class_embedding' is no plain tensor"):
            read_weights(save(tmp_path / "weights.pt", state))


def test_what_lies_beside_is_described_however_often_it_holds_the_same(tmp_path: Path) -> None:
    def write(levels: int) -> Path:
        nested: Any = argparse.Namespace(value=1)
        for _ in range(levels):
            nested = argparse.Namespace(one=[nested] * 9, two={"again": nested, (1, 2): 3})
        return save(tmp_path / "weights.pt", {"model": open_clip_state(DEMO), "nested": nested})

    start = time.monotonic()
    assert read_weights(write(4)).beside["nested"].startswith("argparse.Namespace: one=[9 values], two=")
    with pytest.raises(UserError, match=r"refused: .*nothing in it was run"):
        read_weights(write(25))
    assert time.monotonic() - start < 10


class Reduced:
    """Unpickling it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Stateful:
    """Unpickling it calls a method of a class that the reader may know."""

    def __init__(self) -> None:
        self.value = 1

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("code of the file was run")


def write_gadget(path: Path, module: str, name: str, archive_of_code: bool) -> None:
    """A file of torch.save, or a TorchScript archive, whose pickle asks for a dotted name and calls it with a text."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {each: archive.read(each) for each in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in parts.items():
            asks = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X\x01\x00\x00\x00x\x85R."
            archive.writestr(each, asks if each.endswith("data.pkl") else content)
        if archive_of_code:
            archive.writestr(f"{next(iter(parts)).split('/')[0]}/code/model.py", "")


TRAPS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "os.system": (lambda mark: Reduced(os.system, f"touch {mark}"), "posix.system"),
    "a made folder": (lambda mark: Reduced(os.mkdir, str(mark)), "posix.mkdir"),
    "a class with __setstate__": (lambda mark: Stateful(), "Stateful"),
    "eval": (lambda mark: Reduced(eval, f"open({str(mark)!r}, 'w')"), "eval"),
    "getattr": (lambda mark: Reduced(getattr, argparse.Namespace(), "__class__"), "getattr"),
    "a path": (lambda mark: mark, "pathlib"),
}


@pytest.mark.parametrize("place", ["alone", "beside", "deep beside", "in an argparse object", "among the weights"])
@pytest.mark.parametrize("trap", TRAPS)
def test_whatever_asks_for_more_is_refused_by_name_and_never_run(tmp_path: Path, trap: str, place: str) -> None:
    make, named = TRAPS[trap]
    mark, path = tmp_path / "sprung", tmp_path / "weights.pt"
    evil, state = make(mark), {"visual.proj": torch.zeros(2)}
    content: Any = {
        "alone": evil,
        "beside": {"state_dict": state, "args": evil},
        "deep beside": {"state_dict": state, "args": OmegaConf.create({"a": 1}), "more": [{"deep": (1, evil)}]},
        "in an argparse object": {"state_dict": state, "args": argparse.Namespace(model="x", evil=evil)},
        "among the weights": {"state_dict": state | {"evil": evil}},
    }[place]
    torch.save(content, path)
    with pytest.raises(UserError, match=rf"weights\.pt: refused: it asks for .*{named}.*nothing was run") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value), "advice to load it unsafely"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("argparse", "Namespace.__init__.__globals__"),
        ("argparse", "_sys.modules"),
        ("omegaconf.dictconfig", "DictConfig.__init__.__globals__"),
        ("numpy", "core.multiarray.os.system"),
        ("collections", "defaultdict.fromkeys"),
        ("builtins", "getattr"),
        ("builtins", "exec"),
        ("torch.serialization", "load"),
        ("importlib", "import_module"),
        ("posix", "system"),
        ("collections", "OrderedDict.__init__"),
    ],
)
@pytest.mark.parametrize("archive_of_code", [False, True], ids=["pickle", "TorchScript archive"])
def test_dotted_ways_around_the_list_are_refused(tmp_path: Path, module: str, name: str, archive_of_code: bool) -> None:
    path = tmp_path / "weights.pt"
    write_gadget(path, module, name, archive_of_code)
    with pytest.raises(UserError, match=r"weights\.pt: refused: it asks for") as caught:
        read_weights(path)
    assert name.rpartition(".")[2] in str(caught.value)


def test_listed_objects_are_held_and_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the classes on the list are stand-ins: their own code is not run."""
    path = write_upstream(tmp_path / "weights.pt", upstream_state("b16_flash"))

    def run(*_: Any) -> None:
        raise AssertionError("code of the real class was run")

    monkeypatch.setattr(type(OmegaConf.create({})), "__setstate__", run)
    monkeypatch.setattr(argparse.Namespace, "__setstate__", run, raising=False)
    assert read_weights(path).family is Family.UPSTREAM
    write_avion(path, avion_state())
    assert read_weights(path).family is Family.AVION


def test_stand_ins_hold_whatever_they_are_given(tmp_path: Path) -> None:
    """A numpy scalar that claims a strange type, and an object that holds itself."""
    loop = argparse.Namespace()
    loop.again = loop
    content = {"state_dict": open_clip_state(DEMO), "loop": loop, "odd": np.float32(0.5), "none": np.bool_(True)}
    torch.save(content, tmp_path / "weights.pt")
    beside = read_weights(tmp_path / "weights.pt").beside
    assert beside["odd"] == "0.5"
    assert beside["loop"].startswith("argparse.Namespace: again=")


def test_a_pickle_of_another_protocol_is_not_run_either(tmp_path: Path) -> None:
    path, mark = tmp_path / "weights.pt", tmp_path / "sprung"
    for protocol in (0, 4):
        path.write_bytes(pickle.dumps(Reduced(os.mkdir, str(mark)), protocol=protocol))
        with pytest.raises(UserError, match=r"weights\.pt: refused"):
            read_weights(path)
        assert not mark.exists()


def test_code_in_a_torchscript_archive_is_never_run(tmp_path: Path) -> None:
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
        read_weights(path)
    assert "code of the file was run" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# Damage, and what is no checkpoint
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["OpenAI's archive", "open_clip, pickle", "open_clip, safetensors", "older format"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_half_downloaded_files_are_reported_as_such(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "weights.pt"
    if kind == "older format":
        write_upstream(path, openai_state(DEMO), zipped=False)
    else:
        WRITERS[kind][1](path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"weights\.pt: (cut off after .* not complete|the file is empty)") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    if kind == "open_clip, safetensors" and share:
        assert f"of {len(whole):,} bytes" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"not weights at all", "refused: not a weights file"),
        (b"PK\x03\x04 a torn archive", "cut off"),
    ],
)
def test_what_is_no_weights_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights.pt"
    with pytest.raises(UserError, match=r"weights\.pt: no such file"):
        read_weights(path)
    with pytest.raises(UserError, match="not a file of weights"):
        read_weights(tmp_path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"weights\.pt: .*{message}"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "no state dict"),
        ({}, "no state dict"),
        ({"state_dict": {"visual.proj": 3.0}}, "'visual.proj' is no tensor"),
        ({"a.weight": torch.zeros(2)}, "a.weight.* are those of no known model"),
        ({"vision_model.embeddings.class_embedding": torch.zeros(2)}, "no known model"),
        ({"visual.trunk.stages.0.downsample.0.bias": torch.zeros(2)}, "convolutional tower"),
        ({"text.transformer.embeddings.word_embeddings.weight": torch.zeros(2)}, "text tower of Hugging Face"),
        ({"video_model.blocks.0.norm1.weight": torch.zeros(2)}, "EgoVLP's TimeSformer"),
        ({"model.blocks.0.temporal_attn.qkv.weight": torch.zeros(2)}, "TimeSformer"),
        ({"blocks.0.timeattn.qkv.weight": torch.zeros(2)}, "TimeSformer"),
        ({"module.visual.blocks.0.norm1.weight": torch.zeros(2)}, "TimeSformer"),
        ({"visual.transformer.resblocks.0.ln_1.bias": torch.zeros(2)}, "no known model"),
    ],
)
def test_what_is_no_checkpoint_of_these_families(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=rf"weights\.pt: .*{message}"):
        read_weights(tmp_path / "weights.pt")


def test_the_same_weight_in_two_spellings(tmp_path: Path) -> None:
    state = upstream_state("b16_flash")
    twice = state | {"visual.transformer.resblocks.0.mlp.c_fc.bias": torch.zeros(3072)}
    with pytest.raises(UserError, match=r"visual\.transformer\.resblocks\.0\.mlp\.c_fc\.bias twice"):
        read_weights(save(tmp_path / "weights.pt", twice))


# --------------------------------------------------------------------------------------------------
# Tags of open_clip
# --------------------------------------------------------------------------------------------------


def test_a_tag_is_read_from_the_local_cache_and_never_downloaded_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    requests: list[dict[str, Any]] = []

    def download(entry: dict[str, Any]) -> str:
        requests.append(entry)
        return str(write_safetensors(tmp_path / "fetched.safetensors", open_clip_state(DEMO)))

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", download)
    tag = "ViT-B-16:laion2b_s34b_b88k"
    with pytest.raises(
        UserError, match=rf"not in its local cache \({tmp_path}\), and nothing is downloaded unless asked"
    ):
        read_weights(tag)
    assert not requests
    # A plain file, under the names that the hub's client gives a cache.
    repository = open_clip.pretrained.get_pretrained_cfg(*tag.split(":"))["hf_hub"].rstrip("/")
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123")
    (folder / "snapshots" / "0123").mkdir(parents=True)
    cached = write_safetensors(folder / "snapshots" / "0123" / "open_clip_model.safetensors", open_clip_state(DEMO))
    weights = read_weights(tag)
    assert (weights.source, weights.family) == (tag, Family.OPEN_CLIP)
    assert weights.settings == {"model.image_stats": "clip"}
    assert not requests
    cached.unlink()
    assert read_weights(tag, download=True).family is Family.OPEN_CLIP
    assert len(requests) == 1


def test_unknown_tags_are_named_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"knows no such tag; its tags are .*laion2b_s34b_b88k"):
        read_weights("ViT-B-16:laion2b")
    with pytest.raises(UserError, match="knows no model 'ViT-Q-16' either"):
        read_weights("ViT-Q-16:openai")


def test_a_tag_is_looked_for_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under any user id."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match=r"ViT-B-16:openai: open_clip knows it, but it is not in its local cache"):
        read_weights("ViT-B-16:openai")
    with pytest.raises(UserError, match="no home folder to download it to; set HOME"):
        read_weights("ViT-B-16:openai", download=True)
    assert not list(tmp_path.iterdir())
