"""Hooks of mkdocs for equations, the list of settings, and files of the repository as pages.

Equations are written between dollars, which GitHub renders; for the site they become MathML, which
browsers render. A link that leaves docs/ (`../mass_dpo_jax/theory.py`) works on GitHub; the site
gets a page with that file, and pages of the repository's root.
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
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")  # In the root and in the navigation.


def on_files(files: Files, config: Any) -> Files:
    """Adds pages for files of the repository: `ROOT_PAGES`, and those that pages link to."""
    for name in ROOT_PAGES:
        content = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=content))
    linked = set()
    for file in files.documentation_pages():
        for link in LINK.findall(file.content_string):
            path = _repository_path(file.src_uri, link)
            if path and path not in ROOT_PAGES:
                linked.add(path)
    for name in sorted(linked):
        content = f"# `{name}`\n\n```{_language(name)}\n{(ROOT / name).read_text().rstrip()}\n```\n"
        page = File.generated(config, f"source/{name}.md", content=content)
        page.inclusion = page.inclusion.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links that leave docs/ to the pages of `on_files`, and lists the settings."""

    def to_site(link: re.Match) -> str:
        path = _repository_path(page.file.src_uri, link[1])
        if not path:
            return link[1]
        file = path if path in ROOT_PAGES else f"source/{path}.md"
        return posixpath.relpath(file, posixpath.dirname(page.file.src_uri))

    return LINK.sub(to_site, markdown).replace(SETTINGS, _settings())


def on_page_content(content: str, **_: Any) -> str:
    """Replaces equations by MathML."""

    def to_mathml(equation: re.Match) -> str:
        # The converter calls this arrangement by another name.
        tex = html.unescape(equation[2]).replace("{aligned}", "{split}")
        mathml = convert(tex.strip(), display="block" if equation[1] == "div" else "inline")
        # It takes relations such as >= for identifiers.
        mathml = re.sub(r"<mi>(&#x02AB[0-9A-F];)</mi>", r"<mo>\1</mo>", mathml)
        # A function needs a space before an argument without parentheses.
        function = r"(<mi>(?:log|exp|det)</mi>)(?=<m[^o])"
        return re.sub(function, r'\1<mspace width="0.17em"/>', mathml)

    return MATH.sub(to_mathml, content)


def _settings() -> str:
    rows = ["| | default | |", "|---|---|---|"]
    defaults = dict(config_lib.flatten(config_lib.default()))
    for name, text in help_lib.comments().items():  # In the order of the file.
        text = text.replace("|", "\\|").replace("*", "\\*")
        if name in defaults:
            rows.append(f"| `{name}` | `{defaults[name]!r}` | {text} |")
    return "\n".join(rows)


def _repository_path(page: str, link: str) -> str:
    """Returns the path in the repository of a file that a page links to; "" for one of docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return "" if path.startswith("docs/") else path


def _language(name: str) -> str:
    languages = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".cfg": "ini"}
    return languages.get(Path(name).suffix, "text")
