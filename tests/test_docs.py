"""README and docs: short enough to be read, and every link leads somewhere."""

import re
from pathlib import Path

from tests.support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_WORDS = 1000


def test_the_readme_has_at_most_a_thousand_words() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").split()) <= MAX_WORDS


def test_links_between_pages_lead_to_files_and_headings() -> None:
    broken = []
    for page in PAGES:
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


def _prose(page: Path) -> str:
    """The text without code blocks, in which brackets and # mean other things."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """Anchors of the headings by GitHub's rule: lower case, no punctuation, blanks become hyphens."""
    headings = re.findall(r"^#+ +(.*)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
