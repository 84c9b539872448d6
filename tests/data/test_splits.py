"""Which rows are held out, which files and splits are read, and what is said of all others."""

from __future__ import annotations

import collections
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from mass_dpo_jax.data import splits, warn_of_shared_prompts
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError
from tests.support.data import load, write_lines

ROW: dict[str, Any] = {"chosen": "a", "rejected": ["b", "c"]}


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", **ROW, **changes} for i in range(count)]


def parts(prompts: Sequence[str], share: float = 0.1, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of the rest and of what is held out."""
    numbers = range(len(prompts))
    rest = splits.take(numbers, prompts, "rest", share, seed, "file")
    return rest, splits.take(numbers, prompts, "held_out", share, seed, "file")


@pytest.mark.parametrize(
    ("sizes", "share"),
    [
        ([4] * 10, 0.1),
        ([1] * 50 + [2] * 50, 0.1),
        ([100] + [1] * 100, 0.1),
        ([7, 5, 3, 2, 1], 0.3),
        ([3] * 40, 0.2),
        ([1, 1], 0.1),
        ([3, 1], 0.9),
        ([10, 10], 0.1),
        ([20] * 3, 0.01),
    ],
)
def test_rows_that_share_a_prompt_are_on_one_side(sizes: list[int], share: float) -> None:
    prompts = [f"p{i}" for i, size in enumerate(sizes) for _ in range(size)]
    wanted = share * len(prompts)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(prompts))
        shuffled = [prompts[i] for i in order]
        rest, held_out = parts(shuffled, share, seed)
        assert sorted(rest + held_out) == list(range(len(prompts)))
        assert rest and held_out
        assert not {shuffled[i] for i in rest} & {shuffled[i] for i in held_out}

        near = max(size for size in sizes if size < 2 * max(1, wanted) or size == min(sizes))
        assert abs(len(held_out) - wanted) <= near  # Whole prompts come no nearer, in general.
        assert parts(shuffled, share, seed) == (rest, held_out)


def test_rows_with_prompts_of_their_own_are_held_out_as_they_were_before() -> None:
    """What the numbers in docs/ were made with: a permutation's first rows."""
    for count, share, seed in ((50, 0.1, 0), (997, 0.2, 3), (2, 0.5, 1), (10, 0.99, 7)):
        _, held_out = parts([f"p{i}" for i in range(count)], share, seed)
        most = min(max(1, round(share * count)), count - 1)
        order = np.random.default_rng([seed, 1]).permutation(count)
        assert held_out == sorted(order[:most].tolist())


def test_one_prompt_in_all_rows_is_said(caplog: pytest.LogCaptureFixture) -> None:
    rest, held_out = parts(["p"] * 20)
    assert (len(rest), len(held_out)) == (18, 2)
    assert (
        "file: all 20 rows have the same prompt, which is trained and evaluated on" in caplog.text
    )
    caplog.clear()
    assert parts(["p"] * 20, share=0.0) == (list(range(20)), [])
    assert not caplog.records


@pytest.mark.parametrize("name", ["jsonl", "hub", "chat", "mixed", "qasc"])
def test_every_reader_keeps_a_prompt_on_one_side(tmp_path: Path, name: str) -> None:
    if name == "qasc":
        choices = [{"text": t, "label": t} for t in "AB"]
        found = [
            {
                "question": {"stem": f"Why {i // 4}?" + " " * (i % 2), "choices": choices},
                "answerKey": "A",
            }
            for i in range(40)
        ]
    else:
        found = [{"prompt": f"p{i // 4}", **ROW} for i in range(40)]
    for i, row in enumerate(found):
        if name == "chat" or (name == "mixed" and i % 2):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    path = tmp_path / "rows.jsonl"
    if name == "hub":
        path = tmp_path / "saved"
        Dataset.from_list(found).save_to_disk(path)
    else:
        write_lines(path, found)
    reader = "hub" if name == "hub" else "qasc" if name == "qasc" else "jsonl"
    sides = [load(reader, path, split, list_candidates=False) for split in ("train", "validation")]
    assert [len(side) for side in sides] == [36, 4]
    train, validation = ({json.dumps(e.question) for e in side} for side in sides)
    assert not train & validation and (len(train), len(validation)) == (9, 1)


def test_what_is_held_out_says_how_many_prompts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        parts([f"p{i // 4}" for i in range(40)])
        parts([f"p{i}" for i in range(40)])
    assert [r.getMessage() for r in caplog.records] == [
        "file: 4 of 40 rows (1 of 10 prompts) are held out for evaluation",
        "file: 4 of 40 rows are held out for evaluation",
    ]


def test_prompts_of_evaluation_that_are_trained_on_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def examples(prompts: str) -> list[Example]:
        return [Example(str(i), p, "a", ("b",), "row") for i, p in enumerate(prompts)]

    warn_of_shared_prompts(
        {"train": examples("abb"), "validation": examples("c"), "test": examples("bbd")}
    )
    warn_of_shared_prompts({"test": examples("bbd")})
    [record] = caplog.records
    assert record.getMessage() == "test: the prompts of 2 of its 3 rows are trained on too"


@pytest.mark.parametrize(
    "word", ["validation", "val", "valid", "dev", "eval", "evaluation", "Eval"]
)
def test_a_split_by_another_name_is_validation(tmp_path: Path, word: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write_lines(folder / "train.jsonl", rows(20))
    write_lines(folder / f"{word}.jsonl", rows(3, chosen="x"))
    DatasetDict(
        {"train": Dataset.from_list(rows(20)), word: Dataset.from_list(rows(3))}
    ).save_to_disk(tmp_path / "saved")
    for name, path in (("jsonl", folder), ("hub", tmp_path / "saved")):
        sizes = [len(load(name, path, split)) for split in ("train", "validation", "test")]
        assert sizes == [20, 3, 3]


def test_two_that_are_the_same_split_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", rows(2))
    write_lines(tmp_path / "dev.jsonl", rows(2))
    write_lines(tmp_path / "eval.jsonl", rows(2))
    with pytest.raises(
        UserError, match=r"dev.jsonl and eval.jsonl could both be the validation sp"
    ):
        load("jsonl", tmp_path, "train")
    table = Dataset.from_list(rows(2))
    DatasetDict(train=table, validation=table, val=table).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"validation and val could both be the validation split"):
        load("hub", tmp_path / "saved", "train")


def test_what_lies_beside_the_splits_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_lines(tmp_path / "train.jsonl", rows(20))
    for name in ("extra.jsonl", "README.md", ".hidden", "train.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "more").mkdir()
    table = Dataset.from_list(rows(20))
    DatasetDict(train=table, train_sft=table).save_to_disk(tmp_path / "more" / "saved")
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        for split in ("train", "validation", "test"):
            load("jsonl", tmp_path, split)
            load("hub", tmp_path / "more" / "saved", split)
    said = collections.Counter(
        r.getMessage() for r in caplog.records if "not read" in r.getMessage()
    )
    assert said == {
        f"{tmp_path}: not read: extra.jsonl, more/, train.txt": 1,
        f"{tmp_path / 'more' / 'saved'}: not read: train_sft": 1,
    }


def test_splits_of_other_names_are_told_the_setting(tmp_path: Path) -> None:
    table = Dataset.from_list(rows(3))
    DatasetDict(train_prefs=table, test_prefs=table, train_sft=table).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError) as error:
        load("hub", tmp_path / "d", "train")
    message = str(error.value)
    assert "found train_prefs, test_prefs, train_sft" in message
    setting = message.partition("--config.data.splits=")[2].partition(" ")[0]
    assert setting == "train:train_prefs,test:test_prefs"
    sizes = [len(load("hub", tmp_path / "d", split, splits=setting)) for split in ("train", "test")]
    assert sizes == [2, 3]
    setting = "train:train_prefs+train_sft,test:train_sft"
    joined = load("hub", tmp_path / "d", "train", splits=setting, validation_share=0.0)
    assert len(joined) == 6 and joined[5].place == f"{tmp_path / 'd'} train_prefs+train_sft row 5"
    for wrong, message in {
        "train:train_pref": "no split 'train_pref'; found .* did you mean train_prefs",
        "train": "'train', expected each of train, validation, test at most once",
        "dev:test_prefs": "'dev:test_prefs', expected each",
        "train:test_prefs,train:train_sft": "'train:train_sft', expected each",
        "train:": "'train:', expected each",
    }.items():
        with pytest.raises(UserError, match=f"config.data.splits.*{message}"):
            load("hub", tmp_path / "d", "train", splits=wrong)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "found nothing$"),
        (["a.jsonl"], r"found a.jsonl; --config.data.path=\S+/a.jsonl reads rows without splits$"),
        (
            ["a.jsonl", "b.jsonl"],
            r"found a.jsonl, b.jsonl; --config.data.path='?\S+/\*.jsonl'? reads",
        ),
        (["a.jsonl", "b.csv"], r"--config.data.path=\S+/a.jsonl reads"),
        (["train_x.jsonl", "dev_x.jsonl"], r"--config.data.splits=train:train_x,validation:dev_x "),
        (["notes.txt"], "found notes.txt$"),
        (["dataset_infos.json"], "found dataset_infos.json$"),
    ],
)
def test_a_folder_without_splits_is_told_what_it_has(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=message) as error:
        load("jsonl", tmp_path, "train")
    assert "expected files called train, validation or test, as train.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("*.jsonx", r"\*.jsonx: no file has such a name \(config.data.path\)$"),
        ("part-[0-9].jsonl", r"part-\[0-9\].jsonl: no file has such a name"),
        ("gone.jsonl", r"gone.jsonl: no such file or folder \(config.data.path\)$"),
        (
            "gone",
            r"gone: no such file or folder .*; a dataset on the Hugging Face hub is OWNER/NAME",
        ),
    ],
)
def test_a_path_with_nothing_there(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("jsonl", tmp_path / name, "train")
    write_lines(tmp_path / "there.jsonl", rows(3))
    with pytest.raises(UserError, match=message):
        load("jsonl", Path(f"{tmp_path}/there.jsonl,{tmp_path}/{name}"), "train")


def test_pipes_and_devices_are_told_apart_from_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UserError, match=r"is a pipe or a device, .* write it to a file"):
            load("jsonl", path, "train")


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (("test.txt",), ["test"]),
        (("test.xlsx", "dev.html"), ["validation", "test"]),
        (("train.txt", "extra.jsonl", "test_data.csv", "more.test.json", "README.md"), []),
    ],
)
def test_a_split_in_another_format_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], warned: list[str]
) -> None:
    write_lines(tmp_path / "train.jsonl", rows(20))
    for name in names:
        (tmp_path / name).write_text("[]")
    for split in ("train", "validation", "test"):
        load("jsonl", tmp_path, split)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    found = [line.partition("no ")[2].partition("and no ")[2].split()[0] for line in said]
    assert found == warned, said


def test_a_name_of_the_hub_that_cannot_be_read(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"someone/pairs: no such file .* Hugging Face hub it cannot"
    ):
        load("preferences", Path("someone/pairs"), "train")
    with pytest.raises(UserError, match=r"someone/pairs.jsonl: no such file or folder \(config"):
        load("preferences", Path("someone/pairs.jsonl"), "train")
