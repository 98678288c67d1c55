"""The package as others install it: one command, one list of what it does, and everything that it needs inside."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from egohod.__main__ import COMMANDS, MODULES, in_commands, main
from egohod.commands import demo
from egohod.runtime import Interrupted
from tests.support import ROOT, environment

# Programs of the project's own development, which a user of the package has no use for.
DEVELOPMENT = {"_common", "house", "reword_demo", "scaling"}
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_program_is_a_command_with_its_own_line() -> None:
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - DEVELOPMENT
    modules = {path.stem for path in (ROOT / "egohod" / "commands").glob("*.py")} - {"__init__"}
    assert sorted(MODULES.values()) == sorted([*(f"tools.{n}" for n in tools), *(f"commands.{n}" for n in modules)])
    assert len(MODULES) == sum(map(len, COMMANDS.values())), "a command is in two groups"
    assert {path.stem.removeprefix("main_") for path in ROOT.glob("main_*.py")} <= set(MODULES)


@pytest.mark.parametrize("command", MODULES)
def test_every_command_explains_itself(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"usage: egohod {command} " in text
    # Files that only a checkout has are named as commands; those of development have none.
    files = [f"tools/{name.split('.')[1]}.py" for name in MODULES.values() if name.startswith("tools.")]
    assert not [each for each in (*files, "main_pretrain.py", "main_eval.py", "main_finetune.py") if each in text]


def test_the_overview_needs_no_library_and_the_package_no_torch() -> None:
    """Both are what a user meets first, and what completion and other packages call."""
    code = (
        "import sys, egohod.__main__ as e; e.main(['--help']); print({'torch', 'numpy', 'omegaconf'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.endswith("\nset()\n")
    for group, commands in COMMANDS.items():
        assert f"\n{group}:\n" in done.stdout
        assert all(f"  {name} " in done.stdout for name in commands)
    code = "import sys, egohod; print(egohod.__version__, dir(egohod)); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, env=environment(), check=True).stdout.endswith(b"\nFalse\n")


def test_help_in_commands() -> None:
    text = "python tools/extract_features.py -o x; torchrun --nproc_per_node=2 main_eval.py; as main_eval.py does"
    assert in_commands(text) == "egohod extract -o x; torchrun --nproc_per_node=2 -m egohod eval; as egohod eval does"


def test_setuptools_packs_every_folder_of_the_tree() -> None:
    folders = {path.parent for top in ("egohod", "tools") for path in (ROOT / top).rglob("*.py")}
    names = {".".join(path.relative_to(ROOT).parts) for path in folders}
    names = {name if name.startswith("egohod") else f"egohod.{name}" for name in names}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == names | {"egohod.configs"}


def test_both_stages_of_the_demo_get_the_settings_and_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    for name in ("DEMO_DATA", "DEMO_START", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("egohod.demo.make_world", lambda folder, scale, replace: stages.append([f"{folder} {scale}"]))
    monkeypatch.setattr(demo.pretrain, "main", stages.append)
    (tmp_path / "runs" / "mine_frames").mkdir(parents=True)
    assert demo.main(["train.output=runs/mine", "train.seed=1"]) == 0
    world, first, second = stages
    assert world == ["demo_data 1.0"]
    shared = ["data.frame_cache=runs/mine_frames", "train.output=runs/mine", "train.seed=1"]
    assert first[1] == f"{ROOT}/configs/demo.yml"
    assert first[-4:] == [*shared, "train.output=runs/mine_start"]
    assert second[1:] == [f"{ROOT}/configs/demo_order.yml", *shared, "train.output=runs/mine"]
    assert os.environ["DEMO_START"] == "runs/mine_start"
    assert not (tmp_path / "runs" / "mine_frames").exists()

    # A stage that a signal stops is the last, and the decoded frames are there for the next try.
    def stop(_: list[str]) -> None:
        raise Interrupted("SIGTERM received")

    monkeypatch.setattr(demo.pretrain, "main", stop)
    (tmp_path / "runs" / "demo_short_frames").mkdir(parents=True)
    with pytest.raises(Interrupted):
        demo.main(["--short"])
    assert (tmp_path / "runs" / "demo_short_frames").exists()
