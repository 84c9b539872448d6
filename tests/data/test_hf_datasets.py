"""Hugging Face datasets: saved folders with and without splits, and wrong rows in them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars

from mass_dpo_jax.config import default
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError

disable_progress_bars()


def load(path: Path | str, split: str) -> list[Example]:
    data = default().data
    data.update(name="hub", path=str(path))
    return load_examples(data, split, seed=0)


def table(count: int, **changes: Any) -> Dataset:
    row = {"prompt": "p", "chosen": "a", "rejected": ["b", "c"], **changes}
    return Dataset.from_list([{**row, "prompt": f"p{i}"} for i in range(count)])


def test_a_dataset_with_splits(tmp_path: Path) -> None:
    DatasetDict(train=table(4), val=table(3), test=table(2)).save_to_disk(tmp_path)
    assert [e.id for e in load(tmp_path, "validation")] == [f"validation-{i}" for i in range(3)]
    assert load(tmp_path, "test")[1] == Example(
        "test-1", "p1", "a", ("b", "c"), f"{tmp_path} test row 1"
    )
    assert len(load(tmp_path, "train")) == 4


def test_a_dataset_without_splits(tmp_path: Path) -> None:
    table(20).save_to_disk(tmp_path)
    assert [len(load(tmp_path, s)) for s in ("train", "validation", "all")] == [18, 2, 20]


def test_chat_messages(tmp_path: Path) -> None:
    user, answers = (
        {"role": "user", "content": "q"},
        [{"role": "assistant", "content": c} for c in "ab"],
    )
    rows = [{"chosen": [user, answers[0]], "rejected": [user, answers[1]]}]
    Dataset.from_list(rows).save_to_disk(tmp_path)
    [example] = load(tmp_path, "all")
    assert (example.prompt, example.chosen, example.rejected) == (
        [user],
        [answers[0]],
        ([answers[1]],),
    )


def test_wrong_rows_are_skipped_and_scores_are_read(tmp_path: Path, caplog: Any) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": ["b"], "score_chosen": 2.0}
    rows = [{**row, "score_rejected": [1.0]}, {**row, "score_rejected": [1.0, 2.0]}]
    Dataset.from_list(rows).save_to_disk(tmp_path)
    data = default().data
    data.update(name="hub", path=str(tmp_path), on_bad_row="skip")
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        [example] = load_examples(data, "all", seed=0)
    assert example.scores == (2.0, 1.0)
    assert f"{tmp_path}: skipped 1 of 2 rows; first: {tmp_path} row 1: " in caplog.text


def test_errors(tmp_path: Path) -> None:
    table(3, rejected=[]).save_to_disk(tmp_path / "bad")
    with pytest.raises(UserError, match="bad row 0: field 'rejected' is empty"):
        load(tmp_path / "bad", "all")
    DatasetDict(train_sft=table(1)).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="no split train, validation or test; found train_sft"):
        load(tmp_path / "other", "train")
    with pytest.raises(UserError, match="expected files called train, validation or test"):
        load(tmp_path, "train")
    with pytest.raises(
        UserError, match="no-such/dataset: no such file or folder, and as a dataset"
    ):
        load("no-such/dataset", "train")
