"""Answers with labels become pools, one for each prompt; without `data.group` they are refused."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax.errors import UserError
from tests.data.formats.cases import UNPAIRED, calls, label_rows, says, user
from tests.support.data import load, write_lines


@pytest.mark.parametrize("case", UNPAIRED)
def test_answers_to_a_prompt_are_its_pool(tmp_path: Path, case: str, caplog: Any) -> None:
    rows = [row for i in range(10) for row in label_rows(case, i)]
    file = write_lines(tmp_path / "file.jsonl", rows)
    with pytest.raises(UserError, match=r"file.jsonl: .*label.*--config.data.group=prompt"):
        load("preferences", file)
    with caplog.at_level(logging.INFO):
        found = load("preferences", file, group="prompt")
    assert "read as single answers with labels (" in caplog.text
    assert load("preferences", file, group="prompt", format="unpaired") == found
    assert [e.prompt for e in found] == [UNPAIRED[case][1](i) for i in range(10)]
    for i, pool in enumerate(found):
        texts = [t if isinstance(t, str) else t[0]["content"] for t in pool.responses]
        assert texts == [f"{answer}{i}" for answer in "abcd"]
        assert len(pool.also_chosen) == 1 and pool.scores is None and pool.ranks is None
        assert (pool.id, pool.place) == (f"file-{4 * i}", f"{file}:{4 * i + 1}")


def test_a_table_of_text_has_words_for_labels(tmp_path: Path) -> None:
    with (tmp_path / "file.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "completion", "label"])
        table.writeheader()
        for row in label_rows("TRL", 0):
            table.writerow(row)
    [pool] = load("preferences", tmp_path / "file.csv", group="prompt")
    assert (pool.chosen, pool.rejected, pool.also_chosen) == ("a0", ("b0", "c0"), ("d0",))


def test_prompts_of_one_kind_of_answer_and_contradictions_are_left_out(
    tmp_path: Path, caplog: Any
) -> None:
    rows = [*label_rows("TRL", 0), *label_rows("TRL", 1)[:1], label_rows("TRL", 0)[1]]
    rows[-1]["label"] = True
    with caplog.at_level(logging.WARNING):
        [pool] = load("preferences", write_lines(tmp_path / "f.jsonl", rows), group="prompt")
    assert (pool.chosen, pool.rejected, pool.also_chosen) == ("a0", ("c0",), ("d0",))
    assert "1 responses are chosen in one row and rejected" in caplog.text
    assert "1 prompts have no chosen or no rejected response left" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "completion": "a", "label": "good"}, "'label' must be true, .* 'good'"),
        ({"prompt": "q", "completion": "a", "label": 2}, "'label' must be true, .* the number 2"),
        ({"prompt": "q", "completion": "a", "label": None}, "'label' or 'kto_tag' is missing"),
        ({"prompt": "q", "completion": None, "label": True}, "'completion' or .* is missing"),
        ({"prompt": "q", "completion": " ", "label": True}, "'completion' is empty"),
        ({"prompt": "q", "completion": [user("a")], "label": True}, "message of role 'assistant'"),
        ({"completion": [says("a")], "label": True}, "'prompt' is missing"),
        ({"completion": "a", "label": True}, "'prompt' is missing"),
        ({"messages": [says("a")], "label": True}, "'messages' has one message only"),
        ({"messages": [user("q")] * 2, "label": True}, r"'messages\[1\]' must be a message of rol"),
        ({"prompt": 3, "completion": "a", "label": True}, "'prompt' must be a string"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    file = write_lines(tmp_path / "file.jsonl", [*label_rows("TRL", 0), row])
    with pytest.raises(UserError, match=f":5: .*{message}"):
        load("preferences", file, group="prompt")
    [pool] = load("preferences", file, group="prompt", on_bad_row="skip")
    assert pool.rejected == ("b0", "c0")


def test_labels_of_pairs_and_classes_are_no_format(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [{**pair, "label": True, "messages": [user("q"), says("a")]}, {**pair, "prompt": "r"}]
    assert len(load("preferences", write_lines(tmp_path / "file.jsonl", rows))) == 2
    classes = [{"messages": [user("q"), says("a")], "label": 1}]
    with pytest.raises(UserError, match="field 'chosen' is missing"):
        load("preferences", write_lines(tmp_path / "file.jsonl", classes))


def test_columns_are_renamed(tmp_path: Path) -> None:
    rows = [{"q": "p", "text": t, "good": t == "a"} for t in "abc"]
    columns = "prompt=q,completion=text,label=good"
    file = write_lines(tmp_path / "file.jsonl", rows)
    [pool] = load("preferences", file, group="prompt", columns=columns)
    assert (pool.prompt, pool.chosen, pool.rejected) == ("p", "a", ("b", "c"))


def test_pools_are_of_one_prompt_with_the_same_tools_and_calls_are_answers(tmp_path: Path) -> None:
    tools = [{"name": "f"}, {"name": "g"}]
    answers = [calls({"a": 1}), calls({"a": 2}), calls({"a": 1}), says("x")]
    labels = [True, False, True, False]
    rows = [
        {"prompt": "q", "completion": [answer], "label": label, "tools": [tool]}
        for tool in tools
        for answer, label in zip(answers, labels, strict=True)
    ]
    pools = load("preferences", write_lines(tmp_path / "file.jsonl", rows), group="prompt")
    assert [pool.tools for pool in pools] == [(tool,) for tool in tools]
    for pool in pools:
        assert (pool.chosen, pool.also_chosen) == ([calls({"a": 1})], ())
        assert pool.rejected == ([calls({"a": 2})], "x")
