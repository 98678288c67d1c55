"""README and docs: short enough to be read, every link leads somewhere, what they show to do works, and the site."""

import html.parser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest

import egohod
from tests.browser import CHROMIUM, browser
from tests.support import ROOT, environment

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_WORDS = 1000
# Pages of a task: each shows what comes out.
TASKS = (
    *("search", "evaluation", "motion_check", "robot", "pretraining", "finetuning"),
    *("hod", "narrate", "bring_your_own_data"),
)


def test_the_readme_has_at_most_a_thousand_words() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").split()) <= MAX_WORDS


def test_links_between_pages_lead_to_files_and_headings() -> None:
    broken = []
    for page in [*PAGES, *NOTEBOOKS]:
        for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
            if target.startswith(("http://", "https://")):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in _anchors(file)):
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name})" not in index]
    assert missing == ["README.md"]


def test_the_map_of_the_code_equals_the_tree() -> None:
    tree = re.search(r"^egohod/\n(.*?)^```", PAGES[1].read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert tree, "no map"
    named, variants, folders = set[Path](), set[Path](), {0: ROOT / "egohod"}
    for line in tree[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        for word in line.split():
            if word.endswith("/") and (folders[depth - 1] / word).is_dir():
                folders[depth] = folders[depth - 1] / word
                if "a module per" in line:  # a new one needs no line here
                    variants.add(folders[depth])
            elif word.endswith(".py") and word != "*/config.py":
                named.add(folders[depth - 1] / word)
    present = {
        path
        for path in (ROOT / "egohod").rglob("*.py")
        if path.parent not in variants and path.name != "config.py" and path.name != "__init__.py"
    }
    named = {path for path in named if path.parent not in variants and path.name not in ("config.py", "__init__.py")}
    assert named == present


def test_programs_that_pages_name_exist() -> None:
    program = re.compile(r"(?:python|bash) ((?:\w+/)*\w+\.(?:py|sh))\b")
    named = {(page.name, each) for page in PAGES for each in program.findall(page.read_text(encoding="utf-8"))}
    assert [each for each in sorted(named) if not (ROOT / each[1]).exists()] == []


def test_the_page_of_each_task_shows_a_picture() -> None:
    for task in TASKS:
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "docs" / f"{task}.md").read_text())
        assert pictures, f"{task}.md has no picture"


def test_the_reference_lists_the_public_functions() -> None:
    listed = re.findall(r"^::: egohod\.(.*)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert {name for name in listed if "." not in name} == {name for name in egohod.__all__ if name != "__version__"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_small_and_have_no_output(path: Path) -> None:
    assert path.stat().st_size < 20_000
    for cell in _cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


# --------------------------------------------------------------------------------------------------
# What a reader does with README, notebooks and the site
# --------------------------------------------------------------------------------------------------

# Lines of the README's blocks that are run as something else, and why. All others run as they are.
INSTEAD = {
    "bash exps/demo.sh": ("test -f runs/demo/report.html", "ten minutes: the fixture runs two steps of it"),
    "bash exps/test.sh": ("bash -n exps/test.sh", "it is what runs this test"),
    "torchrun --nproc_per_node=8 main_pretrain.py --config_file configs/config/clip_base.yml": (
        """python -c 'import sys; from torch.distributed.run import parse_args; parse_args(sys.argv[1:])' \
            --nproc_per_node=8 main_pretrain.py --config_file configs/config/clip_base.yml
        python main_pretrain.py --config_file configs/config/clip_base.yml --dry_run 2>missing.txt || [ $? = 2 ]
        [ "$(grep -c '^error: [.][.][.]: no such ' missing.txt)" = 3 ]""",
        "eight GPUs, and the paths are left out: both command lines are parsed, and all that is missing is named",
    ),
}
STAND_INS = {
    # What setup.sh would install is there, or this test would not run.
    "uv": "exit 0",
    "python": 'case "$*" in *"pip install"*) exit 0 ;; esac; exec "$REAL_PYTHON" "$@"',
    # tests/slurm/run.sh submits scripts to a real Slurm.
    "sbatch": r"""while [[ $1 =~ ^(-N|--(ntasks|gpus)-per-node=|--cpus-per-task=)[0-9]+$ ]]; do shift; done
        [ "$#" = 1 ] && grep -q "^#SBATCH" "$1" && bash -n "$1"
        """,
}


Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shell]:
    """A folder like a fresh checkout where the demo has trained for two steps, and how a command is run there."""
    folder = tmp_path_factory.mktemp("reader")
    sandbox, programs = folder / "checkout", folder / "environment" / "bin"
    sandbox.mkdir()
    programs.mkdir(parents=True)
    parts = ["configs", "exps", "tools", "requirements.txt", "pyproject.toml"]
    for name in [*parts, *(path.name for path in ROOT.glob("main_*.py"))]:
        (sandbox / name).symlink_to(ROOT / name)
    for name, script in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (programs / name).chmod(0o755)
    variables = environment(PATH=f"{programs}:{os.environ['PATH']}", VIRTUAL_ENV=str(programs.parent))
    variables = {name: value for name, value in variables.items() if not name.startswith(("DEMO_", "SLURM"))}
    variables["REAL_PYTHON"] = sys.executable

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=sandbox, env=variables, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
        return done

    tiny = ["train.duration=2 steps", "train.warmup=1 steps", "train.global_batch_size=8"]
    run("bash", "exps/demo.sh", "--scale", "0.02", *tiny)
    return sandbox, run


@pytest.mark.ci
def test_every_code_block_of_the_readme_runs(checkout: tuple[Path, Shell]) -> None:
    """In their order."""
    sandbox, run = checkout
    used = set[str]()
    for language, block in re.findall(
        r"^```(\w*)\n(.*?)^```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        if language == "python":
            assert len([line for line in block.splitlines() if line.strip()]) <= 10
            scores = run(sys.executable, "-c", block).stdout
            assert len(re.findall(r"^ *-?0\.\d+ +\d+\.\d s$", scores, re.MULTILINE)) == 5
        elif language == "bash":
            plain = [re.sub(r"\s+#.*", "", line) for line in block.splitlines()]
            used |= {*plain} & INSTEAD.keys()
            run("bash", "-euo", "pipefail", "-c", "\n".join(INSTEAD.get(line, (line,))[0] for line in plain))
        elif language == "":
            _bring(sandbox, block)
        else:
            assert language == "bibtex", f"a block of {language} is not run"
    assert used == INSTEAD.keys(), "a line of the table is not in the README any more"


def _bring(folder: Path, layout: str) -> None:
    """The files that the README's "Your own data" shows: a path in each line, and behind it or below it the content."""
    video, table, row = (line.split(None, 1) for line in layout.splitlines())
    for path in (video[0], table[0]):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "demo_data" / "test" / "videos" / "demo_test_0000" / "0000.mp4", folder / video[0])
    # As many as a step takes, each of another moment.
    name, start, end, text = " ".join(row).split(",")
    rows = [f"{name},{float(start) + n / 100:.2f},{float(end) + n / 100:.2f},{text}" for n in range(64)]
    (folder / table[0]).write_text("\n".join([table[1], *rows]) + "\n")


@pytest.mark.ci
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, checkout: tuple[Path, Shell], tmp_path: Path) -> None:
    for name in ("nbclient", "ipykernel"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install -r docs/requirements.txt")
    import nbclient
    import nbformat

    folder = checkout[0] / "docs" / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    client = nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment(STEPS="3", MPLBACKEND="", IPYTHONDIR=str(tmp_path / "ipython")))
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    wanted = {"search": "image/png", "evaluate": "text/markdown", "finetune": "text/html"}[path.stem]
    assert any(wanted in output.get("data", {}) for output in outputs)
    # IPython ignores how a command of the shell ends.
    assert not [output.text for output in outputs if "error:" in output.get("text", "")]


class _Links(html.parser.HTMLParser):
    """What a page of the site refers to, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links, self.anchors = list[str](), set[str]()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


@pytest.mark.ci
def test_the_site_is_built_and_its_links_lead_to_pages_and_anchors(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("needs mkdocs: pip install -r docs/requirements.txt")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "docs/site/mkdocs.yml"]
    done = subprocess.run([*command, "--site-dir", str(site)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path: _Links(path) for path in site.rglob("*.html")}
    assert {path.stem for path in pages} >= {page.stem for page in PAGES if page.parent.name == "docs"} - {"README"}
    outside, broken = set[str](), []
    for path, page in pages.items():
        for link in page.links:
            target = urllib.parse.urlsplit(link)
            if target.scheme:
                outside.add(link)
                continue
            # 404.html is served for addresses of any depth, so its links begin at the root.
            file = site / target.path.lstrip("/") if target.path.startswith("/") else path.parent / target.path
            file = (file / "index.html" if file.is_dir() and target.path else file if target.path else path).resolve()
            anchor = urllib.parse.unquote(target.fragment)
            if not file.exists() or (anchor and file in pages and anchor not in pages[file].anchors):
                broken.append(f"{path.name}: {link}")
    assert not broken
    reference = (site / "api.html").read_text(encoding="utf-8")
    assert all(f'id="egohod.{name}"' in reference for name in ("embed", "load_benchmark", "api.Results.to_html"))
    assert ":func:" not in reference
    if CHROMIUM is None:
        return
    with browser(tmp_path / "profile") as page:
        page.open(site / "index.html")
        assert page.run("document.querySelector('nav a[href=\"search.html\"]') !== null")
        assert page.requests
        assert not [each for each in page.requests if not each.startswith(("file:", "data:", "blob:"))]


def _cells(notebook: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def _prose(page: Path) -> str:
    """The text without code blocks, in which brackets and # mean other things."""
    if page.suffix == ".ipynb":
        return "\n\n".join("".join(cell["source"]) for cell in _cells(page, "markdown"))
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """Anchors of the headings by GitHub's rule: lower case, no punctuation, blanks become hyphens."""
    headings = re.findall(r"^#+ +(.*)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
