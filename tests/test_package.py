"""The package as others install it: one command, one list of what it does, and everything that it needs inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from egohod.__main__ import COMMANDS, MODULES, in_commands, main
from egohod.commands import demo
from egohod.errors import UserError
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


def test_commands_need_no_extra_but_their_own() -> None:
    extras = {"decord", "torchcodec", "requests", "jsonschema", "simplemma", "s3fs", "h5py", "tensorboard"}
    extras |= {"cv2", "fastapi", "uvicorn", "pydantic", "metaworld"}
    code = (
        "import contextlib, io, sys\n"
        f"sys.modules.update(dict.fromkeys({extras}))\n"
        "from egohod.__main__ import MODULES, main\n"
        "for command in MODULES:\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(io.StringIO()): main([command, '--help'])\n"
        "    except ModuleNotFoundError as error: print(command, error.name)\n"
        "    except SystemExit: pass\n"
        "import egohod.serve.index\n"  # of a server without tracks
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    # The narrations; and bench, which measures them, too.
    assert done.stdout.split() == ["hod", "simplemma", "show-hod", "simplemma", "bench", "simplemma"]


def test_help_in_commands() -> None:
    text = "python tools/extract_features.py -o x; torchrun --nproc_per_node=2 main_eval.py; as main_eval.py does"
    assert in_commands(text) == "egohod extract -o x; torchrun --nproc_per_node=2 -m egohod eval; as egohod eval does"
    assert in_commands("/my/tools/serve.py: no such file") == "/my/tools/serve.py: no such file"
    with pytest.raises(UserError, match=r"^nowhere/index\.json: .* egohod extract makes such folders"):
        main(["search", "a sentence", "--index", "nowhere"])


def test_setuptools_packs_every_folder_of_the_tree() -> None:
    folders = {path.parent for top in ("egohod", "tools") for path in (ROOT / top).rglob("*.py")}
    names = {".".join(path.relative_to(ROOT).parts) for path in folders}
    names = {name if name.startswith("egohod") else f"egohod.{name}" for name in names}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == names | {"egohod.configs", "egohod.docs"}


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


# --------------------------------------------------------------------------------------------------
# The wheel, in an environment that has this one's packages but no checkout
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment with the built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools leaves a folder build/ in what it packs, and would pack that the next time.
    for name in ("egohod", "tools", "configs", "docs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "./source"]
    subprocess.run(build, cwd=folder, check=True)
    (wheel,) = folder.glob("egohod-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "environment")], check=True)
    (site,) = folder.glob("environment/lib/python3*/site-packages")
    # A line of a .pth file adds a folder without reading the .pth files in it, such as that of an editable egohod.
    (site / "packages.pth").write_text("".join(f"{sysconfig.get_path(lib)}\n" for lib in ("purelib", "platlib")))
    python = folder / "environment" / "bin" / "python"
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True)
    return python.parent


@pytest.mark.ci
def test_a_wheel_alone_renders_trains_evaluates_and_searches(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    variables = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    variables["DEMO_DATA"] = "demo_data"

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(installed / program), *arguments]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        return done

    code = (
        "import importlib.metadata, egohod; from egohod.config import IS_CHECKOUT, PROJECT\n"
        "from egohod.hod.config import NarratorConfig; from egohod.hod.narrators import FURTHER_PROMPTS, prompt_path\n"
        "assert importlib.metadata.version('egohod') == egohod.__version__ and not IS_CHECKOUT\n"
        "for path in (*FURTHER_PROMPTS.values(), *(prompt_path(NarratorConfig(kind=k)) for k in ('llm', 'vlm'))):\n"
        "    assert path.is_relative_to(PROJECT) and '{' in path.read_text()\n"
        "print(PROJECT)"
    )
    package = Path(run("python", "-c", code).stdout.strip())
    assert package == next(installed.parent.glob("lib/python3*/site-packages/egohod"))
    before = {path for path in package.rglob("*") if path.suffix != ".pyc" and path.name != "__pycache__"}
    for path in (ROOT / "configs").rglob("*.*"):
        assert package / path.relative_to(ROOT) in before, "not in the wheel"
    overview = run("egohod", "--help").stdout
    assert overview.startswith("usage: egohod COMMAND")
    assert overview.endswith(f" {package / 'docs'}\n")
    assert {path.name for path in (package / "docs").iterdir()} >= {path.name for path in (ROOT / "docs").glob("*.md")}
    tiny = ["train.duration=2 steps", "train.warmup=1 steps", "train.global_batch_size=8", "data.workers=0"]
    done = run("egohod", "demo", "--short", "--scale", "0.02", "model.num_frames=4", *tiny)
    assert "| test | mAP " in done.stderr, "no table"
    assert (tmp_path / "runs" / "demo_short" / "report.html").is_file()
    run("egohod", "demo-world", "--scale", "0.02", "--benchmarks")
    # A configuration of the wheel, by its name in the documentation.
    checkpoint = ["--checkpoint", "runs/demo_short"]
    done = run("egohod", "eval", "--config_file", "configs/demo_eval.yml", *checkpoint, "--benchmark", "egomcq")
    assert f"configs/demo_eval.yml is not in the working directory; reading the project's, {package}" in done.stderr
    assert (tmp_path / "results" / "results.json").is_file()
    run("egohod", "extract", "--videos", "demo_data/test/videos/demo_test_0000", *checkpoint, "--output", "features")
    assert "0000" in run("egohod", "search", "opens the jar", "--index", "features").stdout
    run("egohod", "show", "--clips", "2", "train.global_batch_size=4")
    assert (tmp_path / "batch.png").is_file()
    # On Slurm: what a job runs exists where there is no checkout.
    done = run("egohod", "submit", "configs/demo.yml", "--dry_run")
    assert "-m egohod pretrain --config_file " in done.stdout
    after = {path for path in package.rglob("*") if path.suffix != ".pyc" and path.name != "__pycache__"}
    assert after == before, "a program wrote into the package"
