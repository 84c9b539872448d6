"""What `data.path` can name: files, lists, patterns, folders with splits, saved datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars

from mass_dpo_jax.errors import UserError
from tests.support.data import load, write_lines

disable_progress_bars()


def rows(name: str, count: int = 20) -> list[dict[str, Any]]:
    return [{"prompt": f"{name}{i}", "chosen": "a", "rejected": ["b"]} for i in range(count)]


def prompts(path: Path | str, split: str, **changes: Any) -> list[str]:
    return [str(e.prompt) for e in load("preferences", Path(path), split, **changes)]


def named(name: str, count: int = 20) -> list[str]:
    return [row["prompt"] for row in rows(name, count)]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_lines(tmp_path / "a.jsonl", rows("a"))
    (tmp_path / "b.json").write_text(json.dumps(rows("b")))
    Dataset.from_list(rows("c")).to_parquet(tmp_path / "c.parquet")
    return tmp_path


def test_several_files_and_patterns(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = named("a") + named("b") + named("c")
    assert prompts(f"{files}/a.jsonl, {files}/b.json,{files}/c.parquet", "all") == everything
    assert prompts(f"{files}/*", "all") == prompts(f"{files}/**/?.*", "all") == everything
    assert prompts(f"{files}/[ab].*,{files}/a.jsonl", "all") == named("a") + named("b")
    monkeypatch.chdir(files)
    examples = load("preferences", Path("*.js*"), "train")
    assert len(examples) == 36 and {str(e.prompt)[0] for e in examples} == {"a", "b"}
    assert examples[0].place == "a.jsonl:1" and examples[-1].place == "b.json row 19"
    assert len({e.id for e in examples}) == 36
    (files / "odd,[name].jsonl").write_bytes((files / "a.jsonl").read_bytes())
    assert prompts("odd,[name].jsonl", "all") == named("a")
    with pytest.raises(UserError, match=r"\. *: is a folder, expected a file beside others"):
        prompts("a.jsonl,.", "all")


def test_parts_need_a_folder_or_a_dataset(files: Path) -> None:
    for setting in ("splits", "subset"):
        with pytest.raises(UserError, match=f"config.data.{setting}='train:a': .* is no folder"):
            prompts(files / "a.jsonl", "all", **{setting: "train:a"})


def test_files_of_splits_of_any_kind(tmp_path: Path) -> None:
    write_lines(tmp_path / "pairs-train.jsonl", rows("train"))
    (tmp_path / "pairs-dev.json").write_text(json.dumps(rows("dev")))
    Dataset.from_list(rows("test")).to_parquet(tmp_path / "pairs_test.parquet")
    for split, name in {"train": "train", "validation": "dev", "test": "test"}.items():
        assert prompts(tmp_path, split) == named(name)


@pytest.mark.parametrize(
    "name",
    ["train-0000{}-of-00002.jsonl", "train_{}.jsonl", "train.{}.jsonl", "data/train-{}.json"],
)
def test_numbered_files_are_one_split(tmp_path: Path, name: str) -> None:
    for i in range(2):
        path = tmp_path / name.format(i)
        path.parent.mkdir(exist_ok=True)
        write_lines(path, rows(f"n{i}-"))
        write_lines(Path(str(path).replace("train", "test")), rows(f"t{i}-"))
    assert prompts(tmp_path, "test") == named("t0-") + named("t1-")
    assert set(prompts(tmp_path, "train")) < set(named("n0-") + named("n1-"))
    (tmp_path / name.format(1)).unlink()
    if "-of-" in name:
        with pytest.raises(
            UserError, match=r"train: of 2 files train-\*.jsonl number 00001 is mis"
        ):
            prompts(tmp_path, "train")
    else:
        assert set(prompts(tmp_path, "train")) < set(named("n0-"))


def test_folders_called_like_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for part in ("one", "two"):
            write_lines(tmp_path / split / f"{part}.jsonl", rows(f"{split} {part} "))
    (tmp_path / "runs" / "x").mkdir(parents=True)
    write_lines(tmp_path / "runs" / "x" / "test.jsonl", rows("no"))
    assert prompts(tmp_path, "test") == named("test one ") + named("test two ")


def test_a_folder_saved_by_datasets_split_by_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        Dataset.from_list(rows(split)).save_to_disk(tmp_path / split)
    assert prompts(tmp_path, "test") == named("test")


def test_what_could_be_one_split_twice_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", rows("a"))
    write_lines(tmp_path / "train.json", rows("b"))
    with pytest.raises(
        UserError, match=r"train.json and train.jsonl could both be the train split"
    ):
        prompts(tmp_path, "train")
    assert prompts(tmp_path, "train", splits="train:train.jsonl", validation_share=0.0) == named(
        "a"
    )


def test_subsets_are_folders(tmp_path: Path) -> None:
    for name in ("helpful", "harmless"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "train.jsonl", rows(name))
        write_lines(tmp_path / name / "test.jsonl", rows(f"{name} test "))
    with pytest.raises(UserError, match=r"several folders .* harmless, helpful; .*subset=harmless"):
        prompts(tmp_path, "train")
    assert prompts(tmp_path, "test", subset="helpful") == named("helpful test ")
    with pytest.raises(UserError, match=r"subset='helpfull': no such folder .* harmless, helpful"):
        prompts(tmp_path, "test", subset="helpfull")


def test_splits_by_names_of_files(tmp_path: Path) -> None:
    for name in ("train_prefs-0", "train_prefs-1", "train_sft", "test_prefs"):
        write_lines(tmp_path / f"{name}.jsonl", rows(name))
    (tmp_path / "more").mkdir()
    write_lines(tmp_path / "more" / "x.jsonl", rows("x"))
    settings = {
        "train_prefs": named("train_prefs-0") + named("train_prefs-1"),
        "train_*": named("train_prefs-0") + named("train_prefs-1") + named("train_sft"),
        "train_sft.jsonl+more": named("train_sft") + named("x"),
        f"{tmp_path}/more/x.jsonl": named("x"),
    }
    for name, expected in settings.items():
        splits = f"train:{name},test:test_prefs"
        assert prompts(tmp_path, "train", splits=splits, validation_share=0.0) == expected
        assert prompts(tmp_path, "test", splits=splits) == named("test_prefs")
    with pytest.raises(
        UserError, match=r"splits: 'nothing' is no file in .*found x, test_prefs, train"
    ):
        prompts(tmp_path, "train", splits="train:nothing")
    with pytest.raises(UserError, match=r"no split 'train'; found test"):
        prompts(tmp_path, "train", splits="test:test_prefs")


def test_a_folder_of_the_hub(tmp_path: Path) -> None:
    """A download with a card that describes subsets, and one with a file of another name."""
    for subset in ("one", "two"):
        (tmp_path / "cards" / subset).mkdir(parents=True)
        Dataset.from_list(rows(subset)).to_parquet(tmp_path / "cards" / subset / "0.parquet")
    card = {
        "configs": [
            {"config_name": s, "data_files": [{"split": "test_prefs", "path": f"{s}/*.parquet"}]}
            for s in ("one", "two")
        ]
    }
    (tmp_path / "cards" / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    with pytest.raises(
        UserError, match=r"Config name is missing.*; name one by --config.data.subs"
    ):
        prompts(tmp_path / "cards", "test")
    named_splits = "test:test_prefs"
    assert prompts(tmp_path / "cards", "test", subset="two", splits=named_splits) == named("two")
    (tmp_path / "plain").mkdir()
    Dataset.from_list(rows("ranked")).to_parquet(tmp_path / "plain" / "ranked.parquet")
    assert set(prompts(tmp_path / "plain", "train")) < set(named("ranked"))


def test_a_saved_dataset_without_splits_has_none_to_name(tmp_path: Path) -> None:
    Dataset.from_list(rows("a")).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match=r"splits: .* has no splits that it could name"):
        prompts(tmp_path / "one", "train", splits="train:a")
    DatasetDict(train=Dataset.from_list(rows("a"))).save_to_disk(tmp_path / "dict")
    with pytest.raises(UserError, match=r"no split 'test'; found train"):
        prompts(tmp_path / "dict", "train", splits="train:test")
