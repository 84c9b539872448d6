"""LastFM in S-DPO's format, made up here, and the real files."""

from __future__ import annotations

import collections
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax.config import default
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.errors import UserError

ROW = {"historyList": "A::B, C::D", "itemList": ["x", "y", "z; w", "v"], "trueSelection": "y"}


def load(path: Path, split: str = "all", seed: int = 0, **changes: Any) -> list[Example]:
    data = default().data
    data.update(name="lastfm", path=str(path), max_validation=0, max_test=0, **changes)
    return load_examples(data, split, seed)


def write(folder: Path, content: Any) -> Path:
    path = folder / "lastfm-test.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def history(example: Example) -> History:
    assert isinstance(example.prompt, History)
    return example.prompt


def listed(example: Example) -> list[str]:
    """The candidates in the prompt, in order."""
    return history(example).after.split("next:\n")[1].split("\n\n")[0].split("\n")


def test_a_row(tmp_path: Path) -> None:
    [example] = load(write(tmp_path, [ROW]))
    assert history(example).items == ("A", "B, C", "D")
    assert "\nA\nB, C\nD\n" in history(example).text
    assert example.chosen == "y"
    assert sorted(example.rejected) == ["v", "x", "z; w"]
    assert (example.id, example.place) == ("lastfm-test-0", f"{tmp_path}/lastfm-test.json row 0")
    [bare] = load(tmp_path / "lastfm-test.json", list_candidates=False)
    assert bare.rejected == example.rejected
    assert "y" not in history(bare).after


def test_order_does_not_tell_the_answer(tmp_path: Path) -> None:
    # In the files the true item's place follows from the item; here it must be any, equally often.
    rows = [{**ROW, "itemList": list("abcde"), "trueSelection": "b"}] * 1000
    examples = load(write(tmp_path, rows))
    places = collections.Counter(listed(e).index("b") for e in examples)
    assert len(places) == 5
    assert max(places.values()) < 260  # 200 are expected, with a standard deviation of 13.
    turned = load(write(tmp_path, [{**row, "itemList": list("edcba")} for row in rows]))
    assert [listed(e) for e in turned] == [listed(e) for e in examples]
    assert [e.rejected for e in load(tmp_path / "lastfm-test.json", seed=1)] != [
        e.rejected for e in examples
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lastfm-test.json: is empty"),
        ([], "lastfm-test.json: is empty"),
        ('[\n{"historyList": }]', "lastfm-test.json:2: invalid JSON"),
        ({"rows": []}, "json:1: field 'historyList' is missing; found rows"),
        ([ROW, 3], "row 1: expected an object, found int"),
        ([{"historyList": "A"}], "row 0: field 'itemList' is missing; found historyList"),
        ([{**ROW, "historyList": ["A"]}], "field 'historyList' must be a string, found a list"),
        ([{**ROW, "itemList": ["y"]}], "'itemList' must be a list of two names or more"),
        ([{**ROW, "itemList": ["y", 3]}], r"'itemList\[1\]' must be a string, found the number 3"),
        ([{**ROW, "trueSelection": "q"}], "trueSelection 'q' once, found it 0 times"),
        ([{**ROW, "itemList": ["y", "x", "y"]}], "trueSelection 'y' once, found it 2 times"),
    ],
)
def test_a_wrong_file_or_row_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, content))


def test_wrong_rows_are_skipped_and_counted(tmp_path: Path, caplog: Any) -> None:
    file = write(tmp_path, [ROW, {**ROW, "trueSelection": "q"}, 3, ROW])
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        examples = load(file, on_bad_row="skip")
    assert [e.id for e in examples] == ["lastfm-test-0", "lastfm-test-3"]
    assert f"{file}: skipped 2 of 4 rows in all" in caplog.text
    assert f"{file}: skipped 1 of 4 rows; first: {file} row 1: field 'itemList'" in caplog.text
    assert f"{file}: skipped 1 of 4 rows; first: {file} row 2: expected an object" in caplog.text


def test_folder(tmp_path: Path) -> None:
    write(tmp_path, [ROW] * 3)
    (tmp_path / "lastfm-val.json.gz").write_bytes(gzip.compress(json.dumps([ROW] * 2).encode()))
    assert [e.id for e in load(tmp_path, "validation")] == ["validation-0", "validation-1"]
    assert len(load(tmp_path, "test")) == 3
    with pytest.raises(UserError, match=r"no split .train.; found test, validation"):
        load(tmp_path, "train")


@pytest.mark.slow(reason="reads all of the real LastFM")
def test_the_real_files(real_data: Path) -> None:
    for split, rows in (("train", 47872), ("validation", 2767), ("test", 2495)):
        examples = load(real_data / "lastfm", split)
        assert len(examples) == rows
        assert {len(e.rejected) for e in examples} == {19}
        assert all(sorted([e.chosen, *e.rejected]) == sorted(listed(e)) for e in examples[:300])
    # With the files' own order, the same artist is always at the same place.
    places = collections.defaultdict(set)
    for example in examples:
        places[example.chosen].add(listed(example).index(str(example.chosen)))
    often = [p for name, p in places.items() if sum(e.chosen == name for e in examples) >= 8]
    assert often
    assert min(len(p) for p in often) >= 3
