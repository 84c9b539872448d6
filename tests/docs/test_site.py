"""The site builds without a warning and names all that is public; links lead to what is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mass_dpo_jax as mdj

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_equations_and_examples_are_rendered(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "arithmatex" not in text, page
        text = re.sub(r"<(pre|code|math)\b.*?</\1>", "", text, flags=re.DOTALL)
        for left_over in ("$$", ":math:", ".. math", "&gt;&gt;&gt;", "Args:", "\\sigma"):
            assert left_over not in text, (page, left_over)
    assert "<code>train.learning_rate</code>" in (site / "api/settings.html").read_text()
    assert "<math" in (site / "theory.html").read_text()
    assert "<math" in (site / "api/losses.html").read_text()


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link)[^>]*?(?:src|href)="(https?:[^"]*)"', page.read_text()
        )
        assert not fetched, page


def test_the_api_pages_list_all_that_is_public(site: Path) -> None:
    pages = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    anchors = set(re.findall(r'id="(mass_dpo_jax[.\w]*)"', pages))
    for name in mdj.__all__:
        thing = getattr(mdj, name)
        inner = getattr(thing, "__all__", None)
        expected = [f"{name}.{x}" for x in inner] if inner else [name]
        for place in expected:
            assert {f"mass_dpo_jax.{place}", f"mass_dpo_jax.{place.split('.')[-1]}"} & anchors, (
                place
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    """In the repository, where GitHub shows the pages; mkdocs checks those of the site."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {link}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors_of(file), f"{page.name}: {link}"


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_links_are_found() -> None:
    assert len(PAGES) > 10
    assert "devices" in anchors_of(ROOT / "docs/performance.md")
