"""Rules of the repository that no linter checks; tests/tools/test_house.py holds the limits on its shape."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import egohod

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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # What requirements.txt installs: all but simulators and the tools of the checks.
    (together,) = map(Requirement, project["optional-dependencies"]["all"])
    extras = [each for name in together.extras for each in project["optional-dependencies"][name]]
    declared = {Requirement(each).name.lower() for each in project["dependencies"] + extras}
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line
    }
    assert declared == pinned


def test_what_has_no_wheel_everywhere_is_optional() -> None:
    """decord is for Linux on x86-64: installed nowhere else, and imported only where it is used."""
    (declared,) = (
        each
        for each in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["decord"]
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


def test_the_citation_is_the_readmes() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    bibtex = dict(re.findall(r"^  (\w+)=\{(.*)\}", (ROOT / "README.md").read_text(), re.MULTILINE))
    paper = citation["preferred-citation"]
    authors = " and ".join(f"{each['family-names']}, {each['given-names']}" for each in paper["authors"])
    stated = {"title": paper["title"], "author": authors, "booktitle": paper["collection-title"]}
    assert stated | {"year": str(paper["year"])} == bibtex
    assert citation["version"] == egohod.__version__


def test_hooks_and_workflows_run_the_checks_of_the_scripts() -> None:
    """By the tools that tests/requirements.txt pins, so that there are no second versions."""
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    checks = (ROOT / "exps" / "test.sh").read_text()
    for hook in local["hooks"]:
        entry = hook["entry"].removeprefix("python -m ").removesuffix(" --fix")
        assert hook["language"] == "system"
        assert f" -m {entry}" in checks or f"/{entry}" in checks.replace('"', ""), entry
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())["jobs"]
    parts = re.findall(r"^(\w+)\(\)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert jobs["fast"]["steps"][-1]["run"] == ".ci/run fast"
    assert ["fast", *jobs["slow"]["strategy"]["matrix"]["part"]] == parts
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = [each.split()[-1] for each in project["classifiers"] if "Python ::" in each]
    assert jobs["fast"]["strategy"]["matrix"]["python"] == versions
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        content = yaml.safe_load(form.read_text())
        assert {"name", "description", "body"} <= set(content)
        assert all({"type", "id", "attributes"} <= set(each) for each in content["body"])


def test_containers_copy_what_the_wheel_is_built_from() -> None:
    """No engine builds them here; hadolint, where it is installed, has read the Dockerfile."""
    docker, apptainer = ((ROOT / name).read_text() for name in ("Dockerfile", "apptainer.def"))
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", docker, re.MULTILINE) for name in line.split()]
    section = apptainer.split("%files\n")[1].split("\n\n")[0]
    assert sorted(line.split()[0] for line in section.splitlines()) == sorted(copied)
    assert all((ROOT / name).exists() for name in copied)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {"egohod", *settings["tool"]["setuptools"]["package-dir"].values()} < set(copied)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert sorted(line[1:] for line in ignored if line.startswith("!")) == sorted(copied)
    (base,) = re.findall(r"^ARG BASE=(.*)$", docker, re.MULTILINE)
    assert f"\nFrom: {base}\n" in apptainer
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", docker, re.MULTILINE), "root"
    if shutil.which("hadolint"):
        subprocess.run(["hadolint", ROOT / "Dockerfile"], check=True)


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
