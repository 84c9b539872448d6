"""Splits kept on disk: the same examples, read again only where bytes or settings changed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from mass_dpo_jax.config import default
from mass_dpo_jax.data import load_examples, split_cache
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.errors import UserError

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def _every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_cache, "MIN_RESPONSES", 0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that were read."""
    found: list[str] = []

    def counted(data: Any, split: str, seed: int) -> list[Example]:
        found.append(split)
        return load_examples(data, split, seed)

    monkeypatch.setattr(split_cache, "load_examples", counted)
    return found


def write(path: Path, count: int = 30, **changes: Any) -> Any:
    rows: list[dict[str, Any]] = [
        {"prompt": f"say {i}", "chosen": "amber", "rejected": ["basil", "cedar"]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": 3}\n')
    data = default().data
    data.update({"path": str(path), "on_bad_row": "skip", "max_test": 2, **changes})
    return data


def test_the_second_time_nothing_is_read(
    tmp_path: Path, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = write(tmp_path / "data.jsonl")
    with caplog.at_level(logging.INFO):
        first = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
        said = [(r.levelno, r.getMessage()) for r in caplog.records]
        caplog.clear()
        second = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    assert len(reads) == 3
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == said
    assert any("skipped 1 of 31 rows" in message for _, message in said)
    for split in SPLITS:
        assert list(second[split]) == list(first[split]) == load_examples(data, split, 0)
        assert len(second[split]) == len(first[split])
        assert second[split][0] == first[split][0] and second[split][:2] == first[split][:2]
    assert len(reads) == 3


def test_large_splits_are_read_where_they_are_looked_at(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_cache, "MAX_STORED_ROWS", 10)
    data = write(tmp_path / "data.jsonl")
    first = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    second = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    assert len(second["train"]) == len(first["train"]) > 10 and len(reads) == 3
    assert list(second["test"]) == list(first["test"]) and len(reads) == 3
    assert list(second["train"]) == list(first["train"])
    assert reads[3:] == ["train"]
    third = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    write(tmp_path / "data.jsonl", 31)
    with pytest.raises(UserError, match=r"data.jsonl: has been changed since this run began"):
        list(third["train"])


@pytest.mark.parametrize(
    "change",
    [
        lambda path, data: path.write_text(path.read_text().replace("amber", "ember")),
        lambda path, data: data.update(validation_share=0.3),
        lambda path, data: data.update(max_train=3),
        lambda path, data: data.update(on_bad_row="skip", columns="prompt=prompt"),
    ],
)
def test_whatever_changes_is_read(
    tmp_path: Path, reads: list[str], change: Callable[[Path, Any], Any]
) -> None:
    data = write(tmp_path / "data.jsonl")
    split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    split_cache.open_splits(tmp_path / "kept", data, SPLITS, 1)
    assert len(reads) == 6
    change(tmp_path / "data.jsonl", data)
    found = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    assert len(reads) == 9
    assert list(found["train"]) == load_examples(data, "train", 0)


def test_every_file_of_a_folder_counts(tmp_path: Path, reads: list[str]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    data = write(folder / "train.jsonl")
    write(folder / "test.jsonl", 4)
    data.path = str(folder)
    split_cache.open_splits(tmp_path / "kept", data, ("train", "test"), 0)
    split_cache.open_splits(tmp_path / "kept", data, ("train", "test"), 0)
    assert len(reads) == 2
    write(folder / "validation.jsonl", 5)
    found = split_cache.open_splits(tmp_path / "kept", data, ("train", "test"), 0)
    assert len(reads) == 4 and len(found["train"]) == 30


def _as_patterns(folder: Path) -> Path:
    write(folder / "a.jsonl", 15)
    (folder / "b.json").write_text(json.dumps([{**ROW, "prompt": f"b{i}"} for i in range(15)]))
    return folder / "*.js*"


def _as_table(folder: Path) -> Path:
    (folder / "rows.csv").write_text(
        "prompt,chosen,rejected\n" + "".join(f"{i},amber,basil\n" for i in range(30))
    )
    return folder / "rows.csv"


def _as_shards(folder: Path) -> Path:
    for i in range(2):
        rows = [{**ROW, "prompt": f"{i} {j}"} for j in range(15)]
        Dataset.from_list(rows).to_parquet(folder / f"train-0000{i}-of-00002.parquet")
    return folder


def _as_saved(folder: Path) -> Path:
    table = Dataset.from_list([{**ROW, "prompt": str(i)} for i in range(30)])
    DatasetDict(train=table).save_to_disk(folder / "saved")
    return folder / "saved"


ROW = {"chosen": "amber", "rejected": ["basil", "cedar"]}


@pytest.mark.parametrize("make", [_as_patterns, _as_table, _as_shards, _as_saved])
def test_files_of_any_kind_are_read_once(
    tmp_path: Path, reads: list[str], make: Callable[[Path], Path]
) -> None:
    (tmp_path / "data").mkdir()
    data = default().data
    data.update(path=str(make(tmp_path / "data")), on_bad_row="skip")
    first = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    second = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    assert len(reads) == 3
    assert all(list(second[split]) == list(first[split]) for split in SPLITS)
    assert len(first["train"]) == 27
    changed = next(p for p in sorted((tmp_path / "data").rglob("*")) if p.suffix != ".json")
    if changed.is_dir():
        changed = next(p for p in changed.rglob("*.arrow"))
    if changed.suffix == ".parquet":
        Dataset.from_list([{**ROW, "prompt": "new"}]).to_parquet(changed)
    else:
        changed.write_bytes(changed.read_bytes() + b"\n")
    split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    assert len(reads) == 6


def test_a_dataset_of_the_hub_is_read_once_by_its_fingerprint(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for the hub with the function that opens it, which tests cannot reach."""
    table = Dataset.from_list([{**ROW, "prompt": str(i)} for i in range(30)])
    loaded = [DatasetDict(train=table)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, revision: loaded[0])
    data = default().data
    data.update(path="someone/pairs@v1")
    first = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    second = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    assert len(reads) == 3 and list(second["train"]) == list(first["train"])
    loaded[0] = DatasetDict(train=table.select(range(20)))
    third = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    assert len(reads) == 6 and len(third["train"]) == 18


def test_all_that_an_example_has_is_kept() -> None:
    rows = [
        Example("a", History("x", ("y", "z"), "w", "; "), "c", ("d",), "file:1", (2.0, 1.0)),
        Example("b", [{"role": "user", "content": "q"}], "c", ("d",), "file:2"),
        Example("c", "q", [{"role": "assistant", "content": "x"}], ("d",), "file:3"),
        Example("d", "q", "c", ("d", "e"), "file:4", None, ("f",), (0, 2, 1, 0)),
        Example("e", "q", "c", ("d", "e"), "file:5", probabilities=(0.25, 1.0)),
    ]
    for row in rows:
        again = split_cache._from_json(json.loads(json.dumps(split_cache._to_json(row))))
        assert again == row and type(again.prompt) is type(row.prompt)


def test_a_damaged_file_is_made_again(
    tmp_path: Path, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = write(tmp_path / "data.jsonl")
    split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    [file] = (tmp_path / "kept").iterdir()
    text = file.read_text()
    for content in ("", "{}", "[[], []]", text[:-20], text.replace("amber", "cedar", 1)):
        file.write_text(content)
        with caplog.at_level(logging.WARNING):
            found = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
        assert all(list(found[s]) == load_examples(data, s, 0) for s in SPLITS)
        assert "reading the data again" in caplog.text


@pytest.mark.parametrize("worth", [0, 1000])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth: int
) -> None:
    """The splits would be of two files, and kept as if they were of the first."""
    monkeypatch.setattr(split_cache, "MIN_RESPONSES", worth)
    data = write(tmp_path / "data.jsonl")

    def load(data: Any, split: str, seed: int) -> list[Example]:
        found = load_examples(data, split, seed)
        write(tmp_path / "data.jsonl", 20)
        return found

    monkeypatch.setattr(split_cache, "load_examples", load)
    with pytest.raises(UserError, match="has been changed while it was read"):
        split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    found = split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)
    assert {s: list(rows) for s, rows in found.items()} == {
        s: load_examples(data, s, 0) for s in SPLITS
    }


def test_what_lies_beside_the_splits_changes_nothing(tmp_path: Path, reads: list[str]) -> None:
    folder = tmp_path / "data"
    (folder / "runs").mkdir(parents=True)
    data = write(folder / "train.jsonl")
    data.path = str(folder)
    for text in ("step 1", "step 2"):
        (folder / "runs" / "metrics.jsonl").write_text(text)
        (folder / "train_log.txt").write_text(text)
        split_cache.open_splits(tmp_path / "kept", data, ("train",), 0)
    assert len(reads) == 1
    (folder / "test.csv").write_text("prompt,chosen,rejected")  # It is warned of.
    split_cache.open_splits(tmp_path / "kept", data, ("train",), 0)
    assert len(reads) == 2


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    data = write(tmp_path / "data.jsonl")
    data.path = str(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe or a device"):
        split_cache.open_splits(tmp_path / "kept", data, SPLITS, 0)


def test_few_responses_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_cache, "MIN_RESPONSES", 1000)
    found = split_cache.open_splits(tmp_path / "kept", write(tmp_path / "data.jsonl"), SPLITS, 0)
    assert isinstance(found["train"], list) and not (tmp_path / "kept").exists()
