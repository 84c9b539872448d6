"""Paths as people type them, and what is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import expand, expand_path, whole_folder


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "data")
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~", "/home/me"),
        ("~/run", "/home/me/run"),
        ("~root/run", f"{Path('~root').expanduser()}/run"),
        ("$HOME/run", "/home/me/run"),
        ("${DATA}/$DATA.jsonl", "data/data.jsonl"),
        ("~/$DATA", "/home/me/data"),
        ("a/~/b", "a/~/b"),
        ("owner/name", "owner/name"),
        ("with blanks inside/it's.jsonl", "with blanks inside/it's.jsonl"),
        ("price$", "price$"),
        ("", ""),
    ],
)
def test_a_path_is_expanded(path: str, expected: str) -> None:
    assert expand(path, "--workdir") == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$UNSET/run", "the variable UNSET is not set"),
        ("a/${UNSET}", "the variable UNSET is not set"),
        ("~nobody_of_this_name/x", "no user of that name; a file is ./~nobody_of_this_name"),
        ('"run"', "without quotes or blanks"),
        ("'run'", "without quotes or blanks"),
        ("run ", "without quotes or blanks"),
        ("\trun", "without quotes or blanks"),
        ("run\n", "without quotes or blanks"),
        ("\u201crun\u201d", "without quotes or blanks"),
        ("ru\0n", "without NUL"),
    ],
)
def test_a_path_that_nobody_means(path: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^--workdir=.*{message}"):
        expand(path, "--workdir")


@pytest.mark.parametrize("name", ["$UNSET", "~me", " a", "'b'", "~x/"])
def test_a_file_that_is_there_is_meant(name: str) -> None:
    Path(name).mkdir()
    assert expand(name, "--workdir") == name


def test_the_home_is_meant_though_there_is_a_folder_of_that_name() -> None:
    Path("~/run").mkdir(parents=True)
    assert expand_path(Path("~/run"), "workdir") == Path("/home/me/run")
    with pytest.raises(UserError, match="workdir: expected a path, found an empty"):
        expand_path("", "workdir")


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for shared in (False, True):
        with pytest.raises(KeyError), whole_folder(path, shared=shared) as folder:
            (folder / "half").touch()
            raise KeyError
        assert not list(tmp_path.iterdir())
    with whole_folder(path) as folder:
        (folder / "a").touch()
        assert not path.exists()
    with pytest.raises(OSError, match="folder"), whole_folder(path, shared=True) as folder:
        (folder / "b").touch()  # Another process was faster.
    assert [found.name for found in tmp_path.rglob("*")] == ["folder", "a"]
