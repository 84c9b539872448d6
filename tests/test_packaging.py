"""The source archive and the wheel have what they need, and asking for them brings no PyTorch."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.packages import ROOT, build, install

NAMES = ("llama3", "paper", "qlora", "qwen3", "smollm2", "smollm3", "tiny")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("built"))


def project() -> set[str]:
    """The files of the checkout, without what tools leave there."""
    folders = ("benchmarks", "configs", "docs", "examples", "launch", "mass_dpo_jax", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths += [
        path for kind in ("md", "cfg", "toml", "cff", "yml") for path in ROOT.glob(f"*.{kind}")
    ]
    names = {path.relative_to(ROOT).as_posix() for path in [*paths, ROOT / "LICENSE"]}
    return {name for name in names if "__pycache__" not in name}


def test_the_wheel_has_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        inside = set(wheel.namelist())
    code = {name for name in inside if ".dist-info/" not in name}
    wanted = {name for name in project() if name.startswith("mass_dpo_jax/")}
    wanted |= {f"mass_dpo_jax/configs/{name}.py" for name in NAMES}
    assert code == wanted
    assert {"mass_dpo_jax/py.typed", "mass_dpo_jax/reports/paper/numbers.csv"} < code
    assert any(name.endswith("/licenses/LICENSE") for name in inside)


def test_the_source_archive_is_the_project(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        inside = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    assert not project() - inside


def test_every_configuration_is_found_by_name_without_a_checkout(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    site.mkdir()
    empty.mkdir()
    install(built[1], site)
    code = (
        "import runpy; from mass_dpo_jax.cli import flags\n"
        "for name, path in flags.find_configurations().items():\n"
        "    print(name, runpy.run_path(path)['get_config']().method, path)"
    )
    env = {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=empty, env=env, capture_output=True, text=True, check=True
    )
    wanted = [f"{name} mass_dpo {site}/mass_dpo_jax/configs/{name}.py" for name in NAMES]
    assert done.stdout.splitlines() == wanted


def closure(requirements: Iterable[str]) -> set[str]:
    """Names of all that is installed with these, without extras that nobody asks for."""
    todo = [(Requirement(text), "") for text in requirements]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for asked in ("", *requirement.extras):
            if (name, asked) not in seen:
                seen.add((name, asked))
                more = importlib.metadata.requires(name) or []
                todo += [(Requirement(text), asked) for text in more]
    return {name for name, _ in seen}


def test_no_requirement_brings_pytorch(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    found = closure(metadata.get_all("Requires-Dist") or [])
    assert {"jaxlib", "transformers", "tokenizers", "qwix", "etils"} <= found
    assert not {"torch", "torchvision", "torchaudio", "tensorflow"} & found
    # Extras are followed where they are asked for, and not where they are not.
    assert "fsspec" in found and "pytest" not in found
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert closure(setup["options"]["install_requires"].split("\n")[1:]) == found
