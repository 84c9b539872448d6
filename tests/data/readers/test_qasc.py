"""QASC: AllenAI's lines and the hub's columns, and the test split without answers."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars

from mass_dpo_jax.errors import UserError
from tests.support.data import candidates, listed, load, write_lines

disable_progress_bars()

TEXTS = ("rain", "sand", "wind", "ice")


def row(i: int, key: str | None, *texts: str) -> dict[str, Any]:
    choices = [{"text": t, "label": "ABCDEFGH"[n]} for n, t in enumerate(texts or TEXTS)]
    found = {"id": f"q{i}", "question": {"stem": f"What falls, {i}?", "choices": choices}}
    return found if key is None else {**found, "answerKey": key, "fact1": "Rain falls."}


def on_the_hub(given: dict[str, Any]) -> dict[str, Any]:
    choices = given["question"]["choices"]
    return {
        "id": given["id"],
        "question": given["question"]["stem"],
        "choices": {key: [choice[key] for choice in choices] for key in ("text", "label")},
        "answerKey": given.get("answerKey", ""),
        "combinedfact": "Rain falls.",
        "formatted_question": "What falls? (A) rain (B) sand",
    }


ROWS = [row(i, "ABCD"[i % 4]) for i in range(8)]


def read(path: Path, split: str = "all", seed: int = 0, **changes: Any) -> Any:
    return load("qasc", path, split, seed, **changes)


def test_rows(tmp_path: Path) -> None:
    examples = read(write_lines(tmp_path / "train.jsonl", ROWS))
    for i, example in enumerate(examples):
        assert example.id == f"q{i}"
        assert example.chosen == TEXTS[i % 4]
        assert sorted(candidates(example)) == sorted(TEXTS) == sorted(listed(example))
        assert str(example.prompt).startswith(f"What falls, {i}?\n\nOne of these")
        assert "Rain falls" not in str(example.prompt)
    assert len({listed(e).index(e.chosen) for e in examples}) > 1
    assert read(tmp_path / "train.jsonl", list_candidates=False)[0].prompt == (
        "What falls, 0?\n\nAnswer:\n"
    )
    # The order of the file leaves no trace.
    turned = [row(i, "DCBA"[i % 4], *TEXTS[::-1]) for i in range(8)]
    assert read(write_lines(tmp_path / "other.jsonl", turned))[3].prompt == examples[3].prompt


def test_both_layouts_and_a_test_split_without_answers(tmp_path: Path, caplog: Any) -> None:
    unanswered = [row(i, None) for i in range(20, 23)]
    tables = {"train": ROWS, "validation": ROWS[:3], "test": unanswered}
    lines, saved = tmp_path / "lines", tmp_path / "saved"
    lines.mkdir()
    for split, rows in tables.items():
        write_lines(lines / f"{'dev' if split == 'validation' else split}.jsonl", rows)
    hub = {s: Dataset.from_list([on_the_hub(r) for r in rows]) for s, rows in tables.items()}
    DatasetDict(hub).save_to_disk(saved)
    for split in ("train", "validation", "test"):
        first, second = read(lines, split), read(saved, split)
        assert [(e.id, e.prompt, e.chosen) for e in first] == [
            (e.id, e.prompt, e.chosen) for e in second
        ]
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        assert read(lines, "test") == read(lines, "validation")
    assert "test.jsonl: no row has an answer" in caplog.text
    assert "dev.jsonl: its rows serve as test" in caplog.text
    # A test split with answers is one; and without a validation split, rows are held out.
    write_lines(lines / "test.jsonl", ROWS[4:])
    assert [e.id for e in read(lines, "test")] == [f"q{i}" for i in range(4, 8)]
    write_lines(lines / "test.jsonl", unanswered)
    (lines / "dev.jsonl").unlink()
    assert [e.id for e in read(lines, "test")] == [e.id for e in read(lines, "validation")]
    assert len(read(lines, "train")) == 7
    with pytest.raises(UserError, match=r"test.jsonl:1: field 'answerKey' is missing"):
        read(lines / "test.jsonl")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row(9, "E"), "'answerKey' must be one of the labels A, B, C, D, found the string 'E'"),
        (row(9, None), "field 'answerKey' is missing; found id, question"),
        (row(9, "A", "rain", "sand", "Rain "), "field 'choices': another choice is 'rain' too"),
        (row(9, "A", "rain"), "field 'choices' has no wrong choice"),
        (row(9, "A", "rain", ""), r"field 'choices\[1\].text' is empty"),
        ({**row(9, "A"), "question": {"stem": "?"}}, "'choices' must be a list of .* found null"),
        ({**row(9, "A"), "question": {"choices": []}}, "'question' must be a string, found null"),
        ({**row(9, "A"), "question": "?", "choices": {"text": ["a"]}}, "'choices' must be a list"),
        (row(2, "A"), "id 'q2' is taken by .*train.jsonl:3"),
        (3, "expected an object, found the number 3"),
    ],
)
def test_a_wrong_row_is_named_or_skipped(
    tmp_path: Path, caplog: Any, wrong: Any, message: str
) -> None:
    file = write_lines(tmp_path / "train.jsonl", [*ROWS[:4], wrong, *ROWS[4:]])
    with pytest.raises(UserError, match=message) as error:
        read(file)
    assert str(error.value).startswith(f"{file}:5: ")
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        assert [e.id for e in read(file, on_bad_row="skip")] == [r["id"] for r in ROWS]
    assert f"{file}: skipped 1 of 9 rows; first: {file}:5: " in caplog.text


def test_repeated_wrong_choices_count_once(tmp_path: Path) -> None:
    rows = [row(0, "A", "rain", "sand", "SAND", "ice")]
    [example] = read(write_lines(tmp_path / "train.jsonl", rows))
    assert sorted(example.rejected) == ["ice", "sand"]


def test_the_real_files(real_data: Path, caplog: Any) -> None:
    folder = real_data / "qasc"
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        found = {split: read(folder, split) for split in ("train", "validation", "test")}
        read(folder, "train", max_train=20_000)
        read(folder, "train", max_train=8000)
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 8134, "validation": 926, "test": 926,
    }  # fmt: skip
    assert found["test"] == found["validation"]
    assert "test.jsonl.gz: no row has an answer" in caplog.text
    said = [r.getMessage() for r in caplog.records if "max_train" in r.getMessage()]
    assert said == ["train: 8000 of 8134 rows are used (config.data.max_train)"]
    lines = gzip.decompress((folder / "dev.jsonl.gz").read_bytes()).splitlines()
    given = [json.loads(line) for line in lines]
    for example, line in zip(found["test"], given, strict=True):
        texts = {c["label"]: c["text"].strip() for c in line["question"]["choices"]}
        assert example.id == line["id"]
        assert example.chosen == texts[line["answerKey"]]
        assert sorted(candidates(example)) == sorted(texts.values()) == sorted(listed(example))
