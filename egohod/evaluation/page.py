"""Pages of HTML without a server: the template, pictures that are part of the page, numbers for people.

Apart from :mod:`egohod.evaluation.report`, whose PyTorch takes seconds to load, for pages that need none.
"""

from __future__ import annotations

import base64
import hashlib
import io
from typing import Any

import jinja2
from PIL import Image

_JPEG_QUALITY = 72


def render(template: str, **content: Any) -> str:
    """The HTML of a template of this package; it extends ``page.html.jinja``, which has style and script."""
    loader = jinja2.PackageLoader("egohod.evaluation", "templates")
    # All of ``content`` is escaped. Should anything slip through, the page's Content-Security-Policy still forbids
    # every script but its own, known by its checksum, and every request.
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    # The policy names the script's checksum instead of allowing inline scripts, so both come from the same bytes.
    script = loader.get_source(environment, "page.js")[0]
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=script, script_checksum=checksum, **content)


def data_uri(content: bytes, media_type: str) -> str:
    """A picture as an address that contains it."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number for people; a dash for None."""
    # Adding zero turns -0.0 into 0.0.
    return "–" if value is None else f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"


def jpeg(image: Image.Image) -> bytes:
    """The picture as a small JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
