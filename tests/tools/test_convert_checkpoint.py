"""tools/convert_checkpoint.py: its description of a file, and what it writes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import main_eval
from egohod import cli, config
from egohod.evaluation.runner import resolve_benchmarks
from egohod.model.checkpoints import Family, read_weights
from egohod.model.config import GEOMETRIES, geometry
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
        monkeypatch.setitem(convert_checkpoint.CONFIGS, two_blocks(monkeypatch, name), name)
    printed = inspected(capsys, write_archive(tmp_path / "ViT.pt", openai_state(DEMO)))
    assert "OpenAI CLIP (TorchScript archive, plain spelling)" in printed
    assert "DEMO: ViT of 4 blocks x 128, 40 px in patches of 8" in printed
    assert "3 tensors (numbers, no weights)" in printed
    assert "an image model: no temporal embedding" in printed
    assert "model.activation=quick_gelu" in printed

    printed = inspected(capsys, write_safetensors(tmp_path / "open_clip.safetensors", open_clip_state(DEMO)))
    assert "open_clip (safetensors, plain spelling)" in printed
    assert "model.weights.source=clip" in printed

    printed = inspected(capsys, write_upstream(tmp_path / "large_best.pt", upstream_state("l14_336_flash")))
    assert "upstream EgoHOD (pickle (zip), flash spelling)" in printed
    assert "CLIP_VITL14_336PX_2: ViT of 2 blocks x 1024, 336 px in patches of 14; text 2 blocks x 768" in printed
    assert "none: a dual encoder without adapters" in printed
    assert "omegaconf.dictconfig.DictConfig: model={2 values}, lr=1e-05" in printed
    assert f"main_eval.py --config_file CLIP_VITL14_336PX_eval.yml --checkpoint {tmp_path}/large_best.pt" in printed
    assert "model.num_frames=4 model.activation=gelu\n" in printed

    names = SCHEMA["b16_flash"]["first_two_blocks"]
    cut = {name: [shape[0], 256] for name, shape in names.items() if name.endswith("_projection")}
    printed = inspected(capsys, write_avion(tmp_path / "avion.pt", noise(names | cut)))
    assert "AVION (pickle (zip), flash spelling)" in printed
    assert "argparse.Namespace: model=CLIP_VITB16" in printed
    assert "model.image_stats=avion" in printed
    assert "model.embed_dim=256" in printed

    printed = inspected(capsys, write_upstream(tmp_path / "slowfast.pt", upstream_state("slowfast_b16_flash")))
    assert "motion adapters (slow-fast)" in printed
    assert "26 tensors (never used by upstream)" in printed
    assert "model.fast.position=after model.fast.pool=cls" in printed
    assert "16" in next(line for line in printed.splitlines() if line.startswith("frames"))

    printed = inspected(capsys, short_run.folder)
    assert "EgoHOD (this project) (safetensors, plain spelling)" in printed
    assert "checkpoints/step-00000001" in printed
    assert "model.activation=quick_gelu" in printed
    assert "model.activation=gelu" not in printed


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("CLIP_VITB16", "b16_flash"),
        ("CLIP_VITL14_336PX", "l14_336_flash"),
        ("CLIP_VITB16_Slowfast", "slowfast_b16_flash"),
    ],
)
def test_the_printed_evaluation_needs_only_the_benchmarks(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    schema: str,
) -> None:
    """The printed config exists and evaluates the file without any variable of training data, up to the videos."""
    stem = convert_checkpoint.CONFIGS[name]
    shallow = replace(GEOMETRIES[name], vision_layers=2, text_layers=2)  # under its own name, as knobs need
    monkeypatch.setitem(GEOMETRIES, name, shallow)
    path = write_upstream(tmp_path / "best.pt", upstream_state(schema))
    (command,) = (line for line in inspected(capsys, path).splitlines() if line.startswith("evaluate"))
    assert f"--config_file {stem}_eval.yml" in command
    monkeypatch.chdir(config.PROJECT)
    options = [*command.split()[2:], "--benchmark", "all", "--output", str(tmp_path / "results")]
    assert cli.run(main_eval.main, options) == 2
    # The message after the model was built and loaded: no benchmark's variable is set here.
    assert "no benchmark's data is found" in capsys.readouterr().err


def test_every_geometry_with_a_config_has_one_for_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EK100_ANNOTATIONS", "annotations")
    for name, stem in convert_checkpoint.CONFIGS.items():
        # The geometry and its frames are spelled out in the command, as --inspect does.
        frames = 16 if name.endswith("_Slowfast") else 4
        knobs = ["model.weights.source=checkpoint", "model.weights.path=x", f"model.name={name}"]
        cfg = config.load(config.PROJECT / f"{stem}_eval.yml", [*knobs, f"model.num_frames={frames}"])
        assert resolve_benchmarks(cfg, "ek100_mir")["ek100_mir"].metadata


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
        written = json.loads((output / "results.json").read_text())
        results.append((written["metrics"], written["checkpoint"]["sha256"]))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
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
    assert message.format(tmp_path) in error
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
