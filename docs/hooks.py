"""What mkdocs does not do itself: equations, the settings, files of the repository as pages.

Equations stand between dollars, which GitHub renders; here they become MathML, which browsers
render. A link that leaves docs/ (`../mass_dpo_jax/theory.py`) works on GitHub; here that file is
put into the site as a page, and so are pages of the repository's root.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.cli import help as help_lib

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)(?=[)#])")
MATH = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)
SETTINGS = "<!-- all settings -->"
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")  # Of the repository's root, in the navigation.


def on_files(files: Files, config: Any) -> Files:
    """Adds pages for files of the repository: `PAGES`, and those that pages link to."""
    for name in PAGES:
        content = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=content))
    linked = set()
    for file in files.documentation_pages():
        for link in LINK.findall(file.content_string):
            target = _outside(file.src_uri, link)
            if target is not None and target not in PAGES:
                linked.add(target)
    for name in sorted(linked):
        content = f"# `{name}`\n\n```{_language(name)}\n{(ROOT / name).read_text().rstrip()}\n```\n"
        page = File.generated(config, f"source/{name}.md", content=content)
        page.inclusion = page.inclusion.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ lead to the pages of `on_files`; the settings are listed."""

    def inside(link: re.Match) -> str:
        target = _outside(page.file.src_uri, link[1])
        if target is None:
            return link[1]
        file = target if target in PAGES else f"source/{target}.md"
        return posixpath.relpath(file, posixpath.dirname(page.file.src_uri))

    return LINK.sub(inside, markdown).replace(SETTINGS, _settings())


def on_page_content(content: str, **_: Any) -> str:
    """Equations as MathML."""

    def mathml(found: re.Match) -> str:
        # Its name for the same arrangement.
        tex = html.unescape(found[2]).replace("{aligned}", "{split}")
        made = convert(tex.strip(), display="block" if found[1] == "div" else "inline")
        made = re.sub(r"<mi>(&#x02AB[0-9A-F];)</mi>", r"<mo>\1</mo>", made)  # Relations.
        # A space between a function and its argument, where no parenthesis follows.
        return re.sub(r"(<mi>(?:log|exp|det)</mi>)(?=<m[^o])", r'\1<mspace width="0.17em"/>', made)

    return MATH.sub(mathml, content)


def _settings() -> str:
    rows = ["| | default | |", "|---|---|---|"]
    defaults = dict(config_lib.flatten(config_lib.default()))
    for name, text in help_lib.comments().items():  # In the order of the file.
        text = text.replace("|", "\\|").replace("*", "\\*")
        if name in defaults:
            rows.append(f"| `{name}` | `{defaults[name]!r}` | {text} |")
    return "\n".join(rows)


def _outside(page: str, link: str) -> str | None:
    """The file of the repository that a page links to; None: it is one of docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def _language(name: str) -> str:
    known = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".cfg": "ini"}
    return known.get(Path(name).suffix, "text")
