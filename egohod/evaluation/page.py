"""Pages that are one file: pictures, style and script inside, nothing fetched, whatever is said on them escaped."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import jinja2

_SCRIPT = "page.js"


def render(template: str, **content: Any) -> str:
    """The HTML of a template of this package; it extends ``page.html.jinja``, which holds style and script.

    All of ``content`` is escaped. Should anything slip through, the page's own policy still forbids every script but
    its own, known by its checksum, and every request.
    """
    loader = jinja2.PackageLoader("egohod.evaluation", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    script = loader.get_source(environment, _SCRIPT)[0]
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=script, script_checksum=checksum, **content)


def data_uri(content: bytes, kind: str) -> str:
    """A picture as the address that holds it; ``kind`` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number for people; a dash where there is none."""
    # Adding zero turns -0.0 into 0.0.
    return "–" if value is None else f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"
