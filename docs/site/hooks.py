"""What mkdocs cannot do alone: the menu from the tables of docs/README.md, and roles of docstrings as code."""

import re
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """The index is the menu, so that a new page has one place to be listed in."""
    index = (Path(config.docs_dir) / "README.md").read_text(encoding="utf-8")
    menu: list[dict[str, Any]] = [{"Home": "README.md"}]
    for table in index.split("\n\n"):
        if pages := re.findall(r"\(([\w./]+\.md)\)", table):
            menu.append({"Tasks" if table.startswith("| task") else "Reference": pages})
    config.nav = menu
    return config


def on_page_content(html: str, **_: Any) -> str:
    """``:func:`name```, which Sphinx would make a link, is the name alone."""
    return re.sub(r":(?:func|class|mod|meth):<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)
