"""Rules of the repository that no linter checks; tests/tools/test_house.py holds the limits on its shape."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()


def test_requirements_and_environment_pin_the_same_versions() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {line for line in lines if line and not line.startswith("#")}
    tree = yaml.safe_load((ROOT / "environment.yml").read_text())
    (conda,) = (each["pip"] for each in tree["dependencies"] if isinstance(each, dict))
    assert pins == set(conda)
    assert all("==" in pin for pin in pins)
    assert "python=3.11" in tree["dependencies"]


def test_every_pinned_package_is_declared_in_pyproject() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # What requirements.txt installs: all but the tools of the checks.
    wanted = project["dependencies"] + project["optional-dependencies"]["s3"]
    declared = {re.split(r"[<>=]", each)[0].lower() for each in wanted}
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line
    }
    assert declared == pinned


def test_what_has_no_wheel_everywhere_is_optional() -> None:
    """decord is for Linux on x86-64: installed nowhere else, and imported only where it is used."""
    import tomllib

    (declared,) = (
        each
        for each in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if each.startswith("decord")
    )
    (pinned,) = (line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("decord"))
    for requirement in (declared, pinned):
        marker = Requirement(requirement).marker
        assert marker is not None
        for system, machine, wanted in (
            ("linux", "x86_64", True),
            ("linux", "aarch64", False),
            ("darwin", "arm64", False),
            ("darwin", "x86_64", False),
        ):
            assert marker.evaluate({"sys_platform": system, "platform_machine": machine}) == wanted
    for path in [*(ROOT / "egohod").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *ROOT.glob("main_*.py")]:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert "decord" not in names, path


def test_calls_that_macos_lacks_are_in_one_place() -> None:
    for path in [*(ROOT / "egohod").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *ROOT.glob("main_*.py")]:
        if path.name != "runtime.py":
            assert "sched_getaffinity" not in path.read_text(), path


# _common.py is no program: all tools share it.
PROGRAMS = [*ROOT.glob("main_*.py"), *(path for path in (ROOT / "tools").glob("*.py") if path.stem != "_common")]


@pytest.mark.parametrize("path", sorted(PROGRAMS), ids=lambda p: p.name)
def test_programs_are_not_imported_by_anything(path: Path) -> None:
    """Programs stand on top: neither the package nor another program imports them."""
    for other in [*(ROOT / "egohod").rglob("*.py"), *ROOT.glob("main_*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(other.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            # A module of the package may be called like a program.
            assert not {path.stem, f"tools.{path.stem}"} & set(names), f"{other} imports {path.name}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("main_*.py")), ids=lambda p: p.name)
def test_main_programs_open_with_their_launch_recipe(path: Path) -> None:
    for file in (path, ROOT / "egohod" / "commands" / path.name.removeprefix("main_")):
        assert f"python {path.name}" in (ast.get_docstring(ast.parse(file.read_text())) or "")


@pytest.mark.skipif(not TRACKED, reason="not a git checkout")
def test_no_large_file_and_no_private_path_in_git() -> None:
    private = re.compile(r"(^|[^A-Za-z0-9_.])/(work|root|home)/")
    for name in TRACKED:
        path = ROOT / name
        if not path.is_file():
            continue
        assert path.stat().st_size < 1_000_000, name
        if path.suffix in {".py", ".md", ".yml", ".sh", ".toml", ".txt"}:
            assert not private.search(path.read_text()), f"{name} names a path of somebody's machine"
