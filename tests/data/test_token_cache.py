"""Tokens kept on disk: the same ones, read only where nothing changed that they depend on."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mass_dpo_jax
from mass_dpo_jax.data import token_cache
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.tokenization import tokenize
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.utils.cache import load_or_compute
from tests.support.tokenizers import settings, small

SEEN = History("seen ", ("amber", "fjord"), " next ")
ROWS = [
    Example("a", "amber basil", "cedar", ("delta", "ember"), "x:1", (3.0, 2.0, 1.0)),
    Example("b", SEEN, "basil", ("ember",), "x:2", (1.0, 0.0)),
]


@pytest.fixture(autouse=True)
def _every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "MIN_RESPONSES", 0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever something is tokenized."""
    found: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tokens:
        found.append(1)
        return tokenize(*args, **kwargs)

    monkeypatch.setattr(token_cache, "tokenize", counted)
    return found


def once(folder: Path, rows: list[Example] = ROWS, tokenizer: Any = None, **changes: Any) -> Tokens:
    data = settings("none", changes)
    return token_cache.tokenize_once(folder, rows, tokenizer or small(), data, progress=False)


def assert_same(found: Tokens, expected: Tokens) -> None:
    for field in dataclasses.fields(Tokens):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, np.ndarray):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        else:
            assert ours == theirs
    assert found.digest() == expected.digest()


def test_the_second_time_tokens_are_read(tmp_path: Path, made: list[int]) -> None:
    first, second = once(tmp_path), once(tmp_path)
    assert len(made) == 1
    assert isinstance(second.prompt_tokens, np.memmap)
    assert_same(second, first)
    assert second.responses(1).tolist() == first.responses(1).tolist()


def test_without_scores(tmp_path: Path, made: list[int]) -> None:
    rows = [dataclasses.replace(row, scores=None) for row in ROWS]
    assert_same(once(tmp_path, rows), once(tmp_path, rows))
    assert len(made) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"id": "c"},
        {"prompt": "amber cedar"},
        {"chosen": "fjord"},
        {"rejected": ("delta", "fjord")},
        {"scores": (3.0, 2.0, 0.5)},
        {"probabilities": (1.0, 0.5)},
    ],
)
def test_other_rows_are_tokenized(tmp_path: Path, made: list[int], change: dict[str, Any]) -> None:
    rows = [dataclasses.replace(ROWS[0], **change), ROWS[1]]
    once(tmp_path)
    assert_same(once(tmp_path, rows), tokenize(rows, small(), settings("none", {}), progress=False))
    assert len(made) == 2


def test_a_history_cut_elsewhere_is_another_prompt(tmp_path: Path, made: list[int]) -> None:
    other = dataclasses.replace(SEEN, items=("amber, fjord",))
    assert other.text == SEEN.text
    once(tmp_path)
    once(tmp_path, [ROWS[0], dataclasses.replace(ROWS[1], prompt=other)])
    assert len(made) == 2


@pytest.mark.parametrize("change", [{"max_prompt_length": 900}, {"date": "1 May 2020"}])
def test_other_settings_and_tokenizers(
    tmp_path: Path, made: list[int], change: dict[str, Any]
) -> None:
    once(tmp_path)
    once(tmp_path, **change)
    other = copy.deepcopy(small())
    other.add_tokens(["amber basil"])
    assert once(tmp_path, tokenizer=other).prompt(0).tolist() != once(tmp_path).prompt(0).tolist()
    assert len(made) == 3


def test_what_cannot_be_read_is_made_again(
    tmp_path: Path, made: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = once(tmp_path)
    [folder] = tmp_path.iterdir()
    file = folder / "prompt_tokens.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with caplog.at_level(logging.WARNING):
        assert_same(once(tmp_path), first)
    assert str(folder) in caplog.text and "tokenizing again" in caplog.text
    assert_same(once(tmp_path), first)
    assert len(made) == 2


def test_a_folder_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    with caplog.at_level(logging.WARNING):
        found = once(file)
    assert_same(found, tokenize(ROWS, small(), settings("none", {}), progress=False))
    assert "not kept" in caplog.text


def test_few_responses_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "MIN_RESPONSES", 6)
    once(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(token_cache, "MIN_RESPONSES", 5)
    once(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_another_version_looks_for_other_files(
    tmp_path: Path,
    made: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And says nothing of those of the version before, here and with the reference's."""
    first = once(tmp_path / "tokens")
    assert load_or_compute(tmp_path / "refs", "refs", "key", lambda: np.zeros(3)).sum() == 0
    monkeypatch.setattr(mass_dpo_jax, "__version__", "0.0.1")
    with caplog.at_level(logging.WARNING):
        assert_same(once(tmp_path / "tokens"), first)
        assert load_or_compute(tmp_path / "refs", "refs", "key", lambda: np.ones(3)).sum() == 3
    assert len(made) == 2 and not caplog.records
    assert [len(list(folder.iterdir())) for folder in sorted(tmp_path.iterdir())] == [2, 2]
