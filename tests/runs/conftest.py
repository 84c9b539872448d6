"""Runs that the tests of this folder start from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mass_dpo_jax.train import train
from tests.support.helpers import write_jsonl
from tests.support.run_homes import (
    TEMPLATE,
    settings,
    write_adapters,
    write_base,
)


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a base, data, a template, adapters and a run that was started there: of all
    weights ("full"), and of adapters in nf4 that began from others ("lora")."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("full", "lora"):
            home = found[kind] = tmp_path_factory.mktemp(kind)
            write_base(home / "base")
            write_adapters(home / "adapters", home / "base")
            write_jsonl(home / "data.jsonl", examples=40)
            (home / "t.jinja").write_text(TEMPLATE)
            patch.chdir(home)
            lora = {"model.lora.path": "adapters", "model.lora.base": "nf4"}
            train(settings(home, **(lora if kind == "lora" else {})), Path("run"))
    return found


@pytest.fixture
def home(request: pytest.FixtureRequest, homes: dict[str, Path], tmp_path: Path) -> Path:
    """One of them, in its own place; a copy of what it was is beside it."""
    there = homes[request.param]
    shutil.copytree(there, tmp_path / "kept")
    request.addfinalizer(lambda: restore(there, tmp_path / "kept"))
    return there


def restore(there: Path, kept: Path) -> None:
    shutil.rmtree(there)
    shutil.copytree(kept, there)
