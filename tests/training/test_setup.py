"""What the package says of itself, and the scripts that set it up."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import mass_dpo_jax

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def import_names(requirements: str) -> set[str]:
    """What is imported for the requirements in a block of setup.cfg."""
    names = {re.split(r"[\[<>=!~;]", line)[0].strip() for line in requirements.strip().splitlines()}
    differ = {"absl-py": "absl", "orbax-checkpoint": "orbax"}
    return {differ.get(name, name) for name in names}


def test_pyproject_holds_the_build_system_only():
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"build-system"}


def test_the_version_stands_in_one_place(setup_cfg: configparser.ConfigParser):
    assert setup_cfg["metadata"]["version"] == "attr: mass_dpo_jax.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", mass_dpo_jax.__version__)
    sources = [ROOT / "setup.cfg", ROOT / "pyproject.toml", *ROOT.glob("mass_dpo_jax/**/*.py")]
    holders = [s.name for s in sources if f'"{mass_dpo_jax.__version__}"' in s.read_text()]
    assert holders == ["__init__.py"]


def test_every_import_is_a_requirement(setup_cfg: configparser.ConfigParser):
    imported = set()
    for source in [*ROOT.glob("mass_dpo_jax/**/*.py"), *ROOT.glob("configs/*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"mass_dpo_jax"}
    required = import_names(setup_cfg["options"]["install_requires"])
    # Asked for by name, and only imported then.
    optional = import_names(setup_cfg["options.extras_require"]["wandb"])
    assert {"jax", "flax", "numpy"} <= foreign - optional <= required
    assert "torch" not in required


def test_every_folder_with_code_is_a_package():
    folders = {source.parent for source in ROOT.glob("mass_dpo_jax/**/*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh"])
def test_without_a_new_enough_python_the_scripts_say_so(script: str, tmp_path: Path):
    environment = os.environ | {
        "PYTHON": "python-that-is-not-there",
        "MASS_DPO_VENV": str(tmp_path),
    }
    result = subprocess.run(
        ["bash", ROOT / script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "No usable Python 3.11 or newer was found" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_citation_names_the_program_and_the_paper():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= set(found)
    assert "version" not in found  # It stands in one place.
    (paper,) = found["references"]
    assert paper["title"].startswith("MASS-DPO: ") and len(paper["authors"]) == 10
    # The page that goes through the paper names the same one.
    number = paper["url"].removeprefix("https://arxiv.org/abs/")
    assert f"arXiv {number}" in (ROOT / "docs" / "theory.md").read_text()


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms(name: str):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert set(form) == {"name", "description", "labels", "body"}
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", ".github/pull_request_template.md"])
def test_what_contributors_are_sent_to_is_there(page: str):
    text = (ROOT / page).read_text()
    folders = ["", "tests", "tests/scripts", "tests/support", "mass_dpo_jax"]
    folders += [f"mass_dpo_jax/{name}" for name in ("data", "models", "selection", "training")]
    for name in re.findall(r"[\w/]+\.(?:py|sh)\b", text):
        if "X" not in name:
            assert any((ROOT / folder / name).is_file() for folder in folders), name
