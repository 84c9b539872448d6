"""Lists and messages that a table wrote as text are read as such or refused; other JSON is text."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.readers import row_warnings
from mass_dpo_jax.data.readers.preferences import read_row
from mass_dpo_jax.errors import UserError
from tests.support.data import load, write_lines

USER = {"role": "user", "content": 'What\'s "it"?\nSay it.'}
ANSWERS = [[{"role": "assistant", "content": text}] for text in ('It\'s a "café".', "b", "c\n'd'")]
ROW: dict[str, Any] = {"prompt": [USER], "chosen": ANSWERS[0], "rejected": ANSWERS[1:]}
PLAIN: dict[str, Any] = {"prompt": "p", "chosen": "a", "rejected": ["it's b", 'say "c"']}
TWICE = {"prompt": "2 + 2", "chosen": "2 + 2 = 4", "rejected": ["2 + 2 = 5"]}


def read(row: Any) -> Example:
    return read_row(row, "0", "row")


@pytest.mark.parametrize("write", [json.dumps, str, lambda x: json.dumps(x, indent=1)])
@pytest.mark.parametrize("fields", [("prompt",), ("chosen",), ("rejected",), tuple(ROW)])
def test_messages_and_lists_as_text_are_read_as_those(write: Any, fields: tuple[str, ...]) -> None:
    for row in (ROW, {**ROW, "rejected": ANSWERS[1]}, {**ROW, "prompt": "p", "chosen": "a"}):
        text = {
            f: write(row[f]) if f in fields and row[f] not in ("p", "a") else row[f] for f in row
        }
        assert read(text) == read(row)
    if "rejected" in fields:
        assert read({**PLAIN, "rejected": write(PLAIN["rejected"])}) == read(PLAIN)
        assert read({**ROW, "rejected": [write(text) for text in ROW["rejected"]]}) == read(ROW)
    whole = {"chosen": [USER, *ANSWERS[0]], "rejected": [USER, *ANSWERS[1]]}
    assert read({field: write(value) for field, value in whole.items()}) == read(whole)
    single = {**ROW, "chosen": ANSWERS[0][0]}
    assert read({**single, "chosen": write(single["chosen"])}) == read(ROW)


def test_a_round_trip_through_csv_changes_no_example(tmp_path: Path) -> None:
    for row in (ROW, PLAIN):
        pd.DataFrame([row] * 3).to_csv(tmp_path / "rows.csv")
        back = pd.read_csv(tmp_path / "rows.csv").to_dict("records")
        assert [read(text) for text in back] == [read(row)] * 3


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ('{"a": 1}', '{"a": 2}'),
        ("[1, 2]", "[1]"),
        ('["red", "blue"]', '["red"]'),
        ("['red']", "['red', 'blue']"),
        ('[{"a": 1}]', "[]"),
        ('[{"role": "cook", "content": "soup"}]', '[{"role": "cook"}]'),
        ('{"role": "admin", "name": "Ann"}', '{"role": "user", "name": "Ann"}'),
        ('{"role": "user", "content": "x", "id": 3}', "No."),
        ("x = ['a' 'b']", "x = ['a', 'b']"),
        ("a", "[1, 2, 3]"),
        ('{"tags": ["b"]}', '["b", "c"]'),
        ('```json\n{"tags": ["b"]}\n```', '["b", "c"]'),
        ('```\n["b"]\n```\n', "['b', 'c']"),
        ("{'tags': ['b']}", "['b', 'c']"),
        ("a", '{"b": ["c"]}'),
        ("a", "['b', 'c'] is a list."),
        ("a", "[b](http://c)"),
        ("a", "[" * 100_000),
        ("a", "[" * 1000 + "]" * 1000),
        ("a", "['\\d', "),
        ("a", '[{"role": "user", "content": "b"}] are chat messages.'),
        ("{'a', 'b'}", "{"),
    ],
)
def test_answers_that_are_json_or_code_stay_text(chosen: str, rejected: str) -> None:
    example = read({"prompt": "p", "chosen": chosen, "rejected": rejected})
    assert (example.chosen, example.rejected) == (chosen, (rejected,))
    example = read({"prompt": "p", "chosen": "other", "rejected": [chosen, rejected, '["x"]']})
    assert example.rejected == (chosen, rejected, '["x"]')


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**ROW, "prompt": "[{'role': 'user', 'content': 'p'}\n {'role': 'user'}]"},
            "'prompt' looks",
        ),
        (
            {**ROW, "chosen": "[{'content': 'p', 'role': 'assistant'} {}]"},
            "'chosen' looks like chat m",
        ),
        ({**ROW, "chosen": str(np.array(ANSWERS[0] * 2))}, "'chosen' looks like chat messages"),
        (
            {**ROW, "chosen": '[{"role": "assistant", "content": "a" "b"}]'},
            "cannot be read as JSON",
        ),
        (
            {**ROW, "chosen": '[{"from": "gpt", "value": "a"}]'},
            "'chosen' is a ShareGPT conversation",
        ),
        (
            {**PLAIN, "rejected": str(np.array(PLAIN["rejected"]))},
            "as NumPy prints it, without comm",
        ),
        ({**PLAIN, "rejected": "['b'\n 'c']"}, "as NumPy prints it, without commas"),
        ({**PLAIN, "rejected": "[]"}, "field 'rejected' is empty"),
        (
            {**ROW, "chosen": json.dumps([{**ANSWERS[0][0], "tool_calls": [1]}])},
            r"'chosen\[0\].tool_calls\[0\]' must be a call",
        ),
        ({**ROW, "chosen": json.dumps([USER])}, "must be a message of role 'assistant'"),
    ],
)
def test_what_cannot_be_read_is_refused_and_never_text(row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(row)


def test_rows_of_arrays_are_rows_of_lists() -> None:
    row = {
        "id": np.int64(3),
        "prompt": np.array([USER]),
        "chosen": np.array(ANSWERS[0]),
        "rejected": np.array([np.array(answer) for answer in ANSWERS[1:]] + [None], dtype=object),
        "score_chosen": np.float32(2.0),
        "score_rejected": np.array([1.0, 0.5, np.nan]),
    }
    assert read(row) == read({**ROW, "id": 3, "score_chosen": 2, "score_rejected": [1, 0.5]})
    assert read({**PLAIN, "rejected": ("b", "c")}).rejected == ("b", "c")
    gaps = {"id": pd.NA, "score_chosen": pd.NA, "score_rejected": pd.NA}
    assert read({**PLAIN, "rejected": ["b", pd.NA], **gaps}) == read({**PLAIN, "rejected": "b"})


def notes(folder: Path, caplog: Any, *rows: Any, **changes: Any) -> list[str]:
    caplog.clear()
    row_warnings._logged.clear()
    file = write_lines(folder / "rows.jsonl", rows)
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        load("jsonl", file, **changes)
    return [
        f"{r.levelname[0]} {r.getMessage().removeprefix(f'{file}: ')}"
        for r in caplog.records
        if "skipped" not in r.getMessage()
    ]


def test_columns_that_are_not_read_are_said_once(tmp_path: Path, caplog: Any) -> None:
    rows = [
        {**PLAIN, "image": None, "score": 3},
        {**PLAIN, "meta": {"a": 1}, "tags": [], "score": 1},
    ]
    assert notes(tmp_path, caplog, *rows) == ["I not read: score, meta"]
    assert notes(tmp_path, caplog, PLAIN, {**PLAIN, "id": "x"}) == []
    [said] = notes(tmp_path, caplog, {**PLAIN, "context": "Be kind."})
    assert said.startswith("W not read: context; where it belongs to the prompt, write it into")
    renamed = {"question": "p", "chosen": "a", "rejected": "b", "instruction": "c"}
    [said] = notes(tmp_path, caplog, renamed, columns="prompt=question")
    assert said.startswith("W not read: instruction; ")
    assert notes(tmp_path, caplog, {**PLAIN, "id": ""}, columns="id=") == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{**PLAIN, "rejected": ["b", None]}, PLAIN],
            "1 of 2 rows have null among the rejected resp",
        ),
        (
            [{**PLAIN, "rejected": "['b', 'c']"}],
            "1 of 1 rows have a list written as text in rejected",
        ),
        (
            [{**PLAIN, "chosen": '["x"]', "rejected": '["b"]'}, PLAIN],
            "1 of 2 rows have a list written as text in rejected and another, or an object",
        ),
        (
            [{**ROW, "chosen": str(ANSWERS[0])}, ROW],
            "1 of 2 rows have chat messages written as text",
        ),
        (
            [{**PLAIN, "score_chosen": float("nan"), "score_rejected": [1, 2]}, PLAIN],
            "1 of 2 rows have scores that are null or not finite, which are not read",
        ),
        (
            [{**PLAIN, "score_chosen": 1, "score_rejected": [0, 2]}, PLAIN],
            "1 of 2 rows have a score_rejected above score_chosen: are the columns swapped?",
        ),
        (
            [{**PLAIN, "prompt": "\n\nHuman: Hi!\n\nAssistant:"}, PLAIN],
            "1 of 2 rows have a prompt with turns in it, Human: and Assistant:, which the chat",
        ),
        (
            [{"chosen": "Human: Hi\nAssistant: a", "rejected": "Human: Hi\nAssistant: b"}],
            "1 of 1 rows have a prompt with turns in it",
        ),
        (
            [{"prompt": "Once", "chosen": "Once a", "rejected": ["Once b", "Once"]}, PLAIN, TWICE],
            "2 of 3 rows have responses that all begin with the prompt, which the model then gets",
        ),
        (
            [{"chosen": "Say: Paris", "rejected": ["Say: Parma", "Say: Pa!"]}, PLAIN],
            "1 of 2 rows have no prompt, and answers that differ first in the middle of a word",
        ),
    ],
)
def test_what_looks_wrong_is_counted_once(
    tmp_path: Path, caplog: Any, rows: list[Any], message: str
) -> None:
    [said] = notes(tmp_path, caplog, *rows)
    assert said.startswith(f"W {message}")


def test_a_file_that_is_read_for_three_splits_is_noted_once(tmp_path: Path, caplog: Any) -> None:
    rows = [{**PLAIN, "prompt": f"p{i}", "rejected": ["b", None], "more": i} for i in range(20)]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        for split in ("train", "validation", "test"):
            load("jsonl", file, split)
    said = [r.getMessage() for r in caplog.records if "held out" not in r.getMessage()]
    assert said == [
        f"{file}: not read: more",
        f"{file}: 20 of 20 rows have null among the rejected responses, which is left out",
    ]


def test_what_looks_right_is_not_warned_of(tmp_path: Path, caplog: Any) -> None:
    turns = {**PLAIN, "prompt": "\n\nHuman: Hi!\n\nAssistant:"}
    assert notes(tmp_path, caplog, turns, chat_template="none") == []
    rows = [
        {**PLAIN, "prompt": "Human rights: explain. Assistant: who?"},
        {**PLAIN, "score_chosen": 2, "score_rejected": [2, 1]},
        {**PLAIN, "score_chosen": None, "score_rejected": None},
        {"prompt": "p", "chosen": '{"a": 1}', "rejected": '{"a": 2}'},
        {"prompt": "p", "chosen": "a", "rejected": "[1]"},
        {"chosen": "Say: Paris", "rejected": ["Say: Rome", "Say: Oslo"]},
        TWICE,  # Of few rows that means nothing.
        {"chosen": "Is it I am?", "rejected": "Is it I'm?"},
        ROW,
        {**ROW, "prompt": USER["content"], "chosen": [USER, *ANSWERS[0]]},
    ]
    assert notes(tmp_path, caplog, *rows) == []
