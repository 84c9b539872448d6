"""MedMCQA: which option is right, and which others join the pool."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars

from mass_dpo_jax.errors import UserError
from tests.support.data import candidates, listed, load, write_lines

disable_progress_bars()


def row(i: int, cop: Any, subject: Any = "Anatomy", **changes: Any) -> dict[str, Any]:
    """A question whose options are a0, b0, c0, d0 in row 0, and so on."""
    options = {f"op{letter}": f"{letter}{i}" for letter in "abcd"}
    texts = {"id": f"q{i}", "question": f"Which, {i}?", "subject_name": subject, "exp": "..."}
    return {**texts, **options, "cop": cop, "choice_type": "single", **changes}


ANATOMY = [row(i, 1 + i % 4) for i in range(6)]
SKIN = [row(i, 1 + i % 4, "Skin") for i in range(10, 14)]


def read(path: Path, split: str = "train", seed: int = 0, **changes: Any) -> Any:
    settings = {"num_candidates": 8, "validation_share": 0.0}
    return load("medmcqa", path, split, seed, **{**settings, **changes})


def test_rows(tmp_path: Path) -> None:
    examples = read(write_lines(tmp_path / "train.json", ANATOMY + SKIN))
    assert [e.id for e in examples] == [r["id"] for r in ANATOMY + SKIN]
    for example, given in zip(examples, ANATOMY + SKIN, strict=True):
        own = [given[f"op{letter}"] for letter in "abcd"]
        assert example.chosen == own[given["cop"] - 1]
        assert set(own) < set(candidates(example))
        assert len(set(candidates(example))) == 8
        numbers = {int(text[1:]) for text in candidates(example)}
        assert all((number < 10) == (given["subject_name"] == "Anatomy") for number in numbers)
        assert str(example.prompt).startswith(f"{given['question']}\n\nOne of these")
        assert [t for t in listed(example) if t != example.chosen] == list(example.rejected)
    bare = read(tmp_path / "train.json", list_candidates=False)
    assert [e.rejected for e in bare] == [e.rejected for e in examples]
    assert bare[0].prompt == "Which, 0?\n\nAnswer:\n"
    assert read(tmp_path / "train.json", seed=1)[0].rejected != examples[0].rejected
    few = read(tmp_path / "train.json", max_train=3)
    assert [e for e in examples if e.id in {f.id for f in few}] == few


def test_evaluation_keeps_the_own_options(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.json", ANATOMY)
    write_lines(tmp_path / "dev.json", SKIN)
    for split in ("validation", "test"):
        for example, given in zip(read(tmp_path, split), SKIN, strict=True):
            assert sorted(candidates(example)) == [given[f"op{letter}"] for letter in "abcd"]
        expanded = read(tmp_path, split, native_eval=False)
        assert {len(e.rejected) for e in expanded} == {7}
    # Nothing of a small subject is needed then.
    assert len(read(tmp_path, "validation", num_candidates=100)) == 4


@pytest.mark.parametrize(("first", "last"), [(0, 3), (1, 4)])
def test_where_cop_counts_from(tmp_path: Path, caplog: Any, first: int, last: int) -> None:
    rows = [row(0, first), row(1, last), row(2, 2), row(3, str(first))]
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        examples = read(write_lines(tmp_path / "train.json", rows))
    assert [e.chosen for e in examples] == ["a0", "d1", f"{'bc'[1 - first]}2", "a3"]
    assert f"train.json: field 'cop' counts options from {first}" in caplog.text


def test_the_hub(tmp_path: Path, caplog: Any) -> None:
    answered = [row(i, i % 4) for i in range(6)]
    unanswered = [row(i, -1) for i in range(3)]
    DatasetDict(
        train=Dataset.from_list(answered),
        validation=Dataset.from_list(answered[:4]),
        test=Dataset.from_list(unanswered),
    ).save_to_disk(tmp_path / "saved")
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        examples = read(tmp_path / "saved", "test")
    assert [e.chosen for e in examples] == ["a0", "b1", "c2", "d3"]
    assert f"{tmp_path / 'saved'} test: no row has an answer" in caplog.text
    assert f"{tmp_path / 'saved'} validation: its rows serve as test" in caplog.text
    assert examples[2].place == f"{tmp_path / 'saved'} validation row 2"
    assert len(read(tmp_path / "saved")) == 6


def test_parquet_files_as_on_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "medmcqa" / "data"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        rows = Dataset.from_list([row(i, i % 4) for i in range(5)])
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    assert [e.chosen for e in read(folder.parent)] == ["a0", "b1", "c2", "d3", "a4"]
    assert len(read(folder.parent, "validation")) == 5


def test_texts_that_differ_in_case_and_space_are_one(tmp_path: Path) -> None:
    rows = [
        row(0, 1, opa="Left  lung", opb="left lung", opc="Heart", opd="heart "),
        row(1, 4, opa="LEFT LUNG", opb="HEART", opc="Liver", opd="Spleen"),
        row(2, 2, opa="Kidney", opb="Skin", opc="liver", opd="spleen"),
    ]
    examples = read(write_lines(tmp_path / "train.json", rows), num_candidates=6)
    assert [e.chosen for e in examples] == ["Left  lung", "Spleen", "Skin"]
    for example in examples:
        texts = [" ".join(text.lower().split()) for text in candidates(example)]
        assert sorted(texts) == ["heart", "kidney", "left lung", "liver", "skin", "spleen"]
    assert "Heart" in examples[0].rejected and "HEART" in examples[1].rejected
    assert "liver" in examples[2].rejected  # The own spelling stays.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row(9, 5), "field 'cop' must be an option's number from 1 to 4, found the number 5"),
        (row(9, 1.5), "field 'cop' must be an option's number from 1 to 4, found the number 1.5"),
        (row(9, "b"), "field 'cop' must be .* found the string 'b'"),
        (row(9, None), "field 'cop' is None, so no option is the right one"),
        (row(9, -1), "field 'cop' is -1, so no option is the right one"),
        (row(9, 1, opb=None), "field 'opb' is missing"),
        (row(9, 1, opb=" "), "field 'opb' is empty"),
        (row(9, 1, question=3), "field 'question' must be a string, found the number 3"),
        (row(9, 1, **{f"op{x}": "Yes" for x in "abcd"}), "every option is 'Yes'"),
        (row(9, 1, None), "field 'subject_name' is missing"),
        (row(9, 1, "Dental"), "subject_name 'Dental' has 4 different answers .*num_candidates=8"),
        (row(3, 1), "id 'q3' is taken by .*train.json:4"),
        ([], "expected an object, found a list"),
        ('{"question": ', "invalid JSON: "),
    ],
)
def test_a_wrong_row_is_named_or_skipped(
    tmp_path: Path, caplog: Any, wrong: Any, message: str
) -> None:
    file = write_lines(tmp_path / "train.json", [*ANATOMY, wrong, *SKIN])
    with pytest.raises(UserError, match=message) as error:
        read(file)
    assert str(error.value).startswith(f"{file}:7: ")
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        kept = read(file, on_bad_row="skip")
    assert [e.id for e in kept] == [r["id"] for r in ANATOMY + SKIN]
    assert f"{file}: skipped 1 of 11 rows; first: {file}:7: " in caplog.text


@pytest.mark.parametrize(("values", "found"), [((1, 2, 3), "1, 2, 3"), ((0, 2, 4), "0, 2, 4")])
def test_where_cop_counts_from_must_be_clear(
    tmp_path: Path, values: tuple[int, ...], found: str
) -> None:
    file = write_lines(tmp_path / "train.json", [row(i, cop) for i, cop in enumerate(values)])
    with pytest.raises(UserError, match=f"counts from 0 or from 1: .* not both, found {found}$"):
        read(file)
