"""HTML pages that need nothing else: one template with the style, and one for each kind of page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, **values: Any) -> str:
    """Returns the page that a template of this folder makes of the values.

    Text is escaped, except where a template calls it safe.
    """
    return _TEMPLATES.get_template(template).render(values)
