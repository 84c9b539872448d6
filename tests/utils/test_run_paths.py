"""Paths that are given as a run's folder and are none: what is said instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.utils.run_paths import check_new_run, check_run
from tests.support.processes import refused


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two runs, a model, adapters, a broken link and a file."""
    for name in ("runs/first", "runs/second"):
        (tmp_path / name / "checkpoints" / "7").mkdir(parents=True)
        (tmp_path / name / "model").mkdir()
        settings = config_lib.default().to_dict()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        (tmp_path / name / "metrics.jsonl").write_text("")
    for folder, file in (("model", "config.json"), ("adapters", "adapter_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text('{"model_type": "llama"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "link").symlink_to("/not/mounted")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/frist", "no such folder; did you mean runs/first?"),
        ("run/first", "no such folder; did you mean runs/first?"),
        ("runs/fisrt/", "did you mean runs/first?"),
        ("runs/zzz", "no such folder"),
        ("zzz/zzz", "no such folder"),
        ("runs", "has runs in it; expected one of them: runs/first, runs/second"),
        ("runs/first/checkpoints/7", "inside of the run runs/first; expected runs/first, whose"),
        ("runs/first/checkpoints/7", "export's --step=7, and can be config.model.path"),
        ("runs/first/checkpoints/7/params", "inside of the run runs/first"),
        ("runs/first/checkpoints", "inside of the run runs/first"),
        ("runs/first/model", "inside of the run runs/first"),
        ("runs/first/metrics.jsonl", "inside of the run runs/first"),
        ("runs/first/config.json", "inside of the run runs/first"),
        ("data.jsonl", "a file; expected a run's folder"),
        ("link", "a link to /not/mounted, which is not there"),
        ("adapters", "expected them as --config.model.lora.path"),
        ("empty", "not a run folder"),
    ],
)
def test_what_is_no_run(here: Path, path: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_run(Path(path))
    assert str(caught.value).startswith(f"{Path(path)}: ") and message in str(caught.value)
    with pytest.raises(UserError):
        run_config.load_config(Path(path))


def test_runs_are_runs(here: Path) -> None:
    for name in ("runs/first", "runs/second", here / "runs" / "first"):
        check_run(Path(name))
    (here / "runs/first/again").mkdir()  # A run in another one's folder.
    (here / "runs/first/again/config.json").write_text("{}")
    check_run(Path("runs/first/again"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/first/checkpoints/8", "inside of the run runs/first; expected a folder beside it"),
        ("runs/first/model", "inside of the run runs/first"),
        ("data.jsonl", "a file stands where a folder is expected"),
        ("data.jsonl/run", "data.jsonl is a file, expected a folder"),
        ("link", "a link to /not/mounted, which is not there"),
    ],
)
def test_where_no_run_can_be_written(here: Path, path: str, message: str) -> None:
    before = sorted(here.rglob("*"))
    with pytest.raises(UserError, match=f"^--workdir={path}: .*{message}"):
        check_new_run(Path(path))
    line = refused("mass_dpo_jax.train", "--config=tiny", f"--workdir={here / path}")
    assert message.replace("runs/first", f"{here}/runs/first") in line
    assert sorted(here.rglob("*")) == before


def test_where_a_run_can_be_written(here: Path) -> None:
    for name in ("new", "new/deep/er", "empty", "runs/first", "runs/third"):
        check_new_run(Path(name))


def test_a_folder_that_may_not_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "empty")
    with pytest.raises(UserError, match=r"^--workdir=empty/run: nothing may be written in .*empty"):
        check_new_run(Path("empty/run"))


@pytest.mark.parametrize(
    "line",
    [
        "evaluate --workdir={}",
        "evaluate --workdir={} --config=tiny",
        "score --output=scores --workdir={}",
        "select --output=selected --workdir={}",
        "export --output=exported --workdir={}",
        "compare {}",
        "compare --plot=x.png {}",
        "report --output=paper {}",
        "train --workdir={}",
    ],
)
def test_every_command_says_which_run_was_meant(here: Path, line: str) -> None:
    name, *words = line.format(here / "runs" / "frist").split()
    found = refused(f"mass_dpo_jax.{name}", *words)
    assert f"no such folder; did you mean {here}/runs/first?" in found
