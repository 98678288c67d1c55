"""tools/convert_checkpoint.py: what it says of a file, and what it writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import main_eval
from egohod import cli
from egohod.model.checkpoints import Family, read_weights
from egohod.model.config import geometry
from tests.model.field_files import (
    SCHEMA,
    noise,
    open_clip_state,
    openai_state,
    plain,
    two_blocks,
    upstream_state,
    write_archive,
    write_avion,
    write_safetensors,
    write_upstream,
)
from tests.support import Command, ShortRun
from tools import convert_checkpoint

DEMO = geometry("DEMO")


def run(*arguments: object) -> int:
    return cli.run(convert_checkpoint.main, [str(each) for each in arguments])


def inspected(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    assert run("--inspect", path) == 0
    return capsys.readouterr().out


def test_all_five_families_are_named(
    tmp_path: Path, short_run: ShortRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CLIP_VITB16", "CLIP_VITL14_336PX", "CLIP_VITB16_Slowfast"):
        monkeypatch.setitem(convert_checkpoint.CONFIGS, two_blocks(monkeypatch, name), f"{name}.yml")
    said = inspected(capsys, write_archive(tmp_path / "ViT.pt", openai_state(DEMO)))
    assert "OpenAI CLIP (TorchScript archive, plain spelling)" in said
    assert "DEMO: ViT of 4 blocks x 128, 40 px in patches of 8" in said
    assert "3 tensors (numbers, no weights)" in said
    assert "an image model: no temporal embedding" in said
    assert "model.activation=quick_gelu" in said

    said = inspected(capsys, write_safetensors(tmp_path / "open_clip.safetensors", open_clip_state(DEMO)))
    assert "open_clip (safetensors, plain spelling)" in said
    assert "model.weights.source=clip" in said

    said = inspected(capsys, write_upstream(tmp_path / "large_best.pt", upstream_state("l14_336_flash")))
    assert "upstream EgoHOD (pickle (zip), flash spelling)" in said
    assert "CLIP_VITL14_336PX_2: ViT of 2 blocks x 1024, 336 px in patches of 14; text 2 blocks x 768" in said
    assert "none: a dual encoder without adapters" in said
    assert "omegaconf.dictconfig.DictConfig: model={2 values}, lr=1e-05" in said
    assert f"main_eval.py --config_file CLIP_VITL14_336PX.yml --checkpoint {tmp_path}/large_best.pt" in said
    assert "model.num_frames=4 model.activation=gelu\n" in said

    names = SCHEMA["b16_flash"]["first_two_blocks"]
    cut = {name: [shape[0], 256] for name, shape in names.items() if name.endswith("_projection")}
    said = inspected(capsys, write_avion(tmp_path / "avion.pt", noise(names | cut)))
    assert "AVION (pickle (zip), flash spelling)" in said
    assert "argparse.Namespace: model=CLIP_VITB16" in said
    assert "model.image_stats=avion" in said
    assert "model.embed_dim=256" in said

    said = inspected(capsys, write_upstream(tmp_path / "slowfast.pt", upstream_state("slowfast_b16_flash")))
    assert "motion adapters (slow-fast)" in said
    assert "26 tensors (never used by upstream)" in said
    assert "model.fast.position=after model.fast.pool=cls" in said
    assert "16" in next(line for line in said.splitlines() if line.startswith("frames"))

    said = inspected(capsys, short_run.folder)
    assert "EgoHOD (this project) (safetensors, plain spelling)" in said
    assert "checkpoints/step-00000001" in said
    assert "model.activation=quick_gelu" in said
    assert "model.activation=gelu" not in said


def test_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_blocks(monkeypatch, "CLIP_VITB16")
    state = upstream_state("b16_flash")
    source = write_upstream(tmp_path / "base_best.pt", state)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    assert run(source, ours) == 0
    first = read_weights(ours)
    assert (first.family, first.spelling, first.container) == (Family.UPSTREAM, "plain", "safetensors")
    assert {name: value.shape for name, value in first.tensors.items()} == {
        name: value.shape for name, value in plain(state).items()
    }
    assert run(ours, theirs, "--to", "upstream") == 0
    from safetensors.torch import load_file

    again = load_file(theirs)
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(again[name], value), name
        assert again[name].dtype is value.dtype
    assert read_weights(theirs).family is Family.UPSTREAM
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base_best.pt",
        "ours.safetensors",
        "theirs.safetensors",
    ]


def test_a_converted_clip_stays_a_clip(tmp_path: Path) -> None:
    """The recipe's exceptions belong to the weights, not to the file's names."""
    source = write_archive(tmp_path / "ViT.pt", openai_state(DEMO))
    assert run(source, tmp_path / "clip.safetensors") == 0
    weights = read_weights(tmp_path / "clip.safetensors")
    assert (weights.family, weights.family.is_clip) == (Family.OPENAI, True)
    assert weights.tensors.keys() == read_weights(source).tensors.keys()


def test_a_converted_run_evaluates_as_the_run_does(
    tmp_path: Path, short_run: ShortRun, demo_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = [tmp_path / f"{to}.safetensors" for to in ("egohod", "upstream")]
    for path in converted:
        assert run(short_run.folder, path, "--to", path.stem) == 0
    results = []
    for checkpoint in (short_run.folder, *converted):
        output = tmp_path / f"results-{checkpoint.name}"
        arguments = ["--checkpoint", str(checkpoint), "--output", str(output)]
        knobs = [f"evaluate.demo_test={demo_world}/test", "evaluate.cache=null"]
        assert main_eval.main([*short_run.command, *arguments, *knobs]) == 0
        found = json.loads((output / "results.json").read_text())
        results.append((found["metrics"], found["checkpoint"]["sha256"]))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.pt", "out.safetensors"], "none.pt: no such file"),
        (["clip.pt", "out.pt"], "must end in .safetensors, such as out.safetensors"),
        (["clip.pt", "no/out.safetensors"], "the folder {}/no does not exist"),
        (["clip.pt", "there.safetensors"], "exists; --force replaces it"),
        (["clip.pt"], "give either --inspect or an OUTPUT"),
        (["clip.pt", "out.safetensors", "--inspect"], "give either --inspect or an OUTPUT"),
        (["evil.pt", "out.safetensors"], "refused: it asks for posix.system"),
        (["cut.pt", "out.safetensors"], "cut off after"),
        (["empty", "out.safetensors"], "neither a checkpoint nor an index of shards is in it"),
    ],
)
def test_mistakes_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/sprung",)

    torch.save({"visual.proj": torch.zeros(2)}, tmp_path / "clip.pt")
    torch.save({"state_dict": {}, "args": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "clip.pt").read_bytes()[:300])
    (tmp_path / "there.safetensors").write_text("precious")
    (tmp_path / "empty").mkdir()
    paths = [each if each.startswith("--") else tmp_path / each for each in arguments]
    assert run(*paths) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said.format(tmp_path) in error
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "out.safetensors").exists()
    assert (tmp_path / "there.safetensors").read_text() == "precious"


def test_force_replaces(tmp_path: Path) -> None:
    torch.save(open_clip_state(DEMO), tmp_path / "clip.pt")
    (tmp_path / "out.safetensors").write_text("old")
    assert run(tmp_path / "clip.pt", tmp_path / "out.safetensors", "--force") == 0
    assert read_weights(tmp_path / "out.safetensors").family is Family.OPEN_CLIP


def test_the_help_teaches_and_the_program_runs_by_itself(program: Command) -> None:
    done = program("tools/convert_checkpoint.py", "--help")
    assert done.returncode == 0
    for part in (
        "--inspect large_best.pt",
        "--to upstream",
        "attn.Wqkv.weight",
        "nothing is downloaded",
        "Exit code 2",
    ):
        assert part in done.stdout
