"""Files in the formats of other programs: ten rows each as they document them, and broken ones."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax.config import CHOICES
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.formats import FORMATS
from mass_dpo_jax.errors import UserError
from tests.data.formats.cases import CASES, DEFAULTS, Row, says, share, system, ultra, user
from tests.support.data import load, write_lines


def describe(found: Example) -> Any:
    fields = {name: getattr(found, name) for name in DEFAULTS}
    return found.prompt, found.chosen, found.rejected, fields


@pytest.mark.parametrize("case", CASES)
def test_ten_rows_are_read_as_documented(tmp_path: Path, case: str, caplog: Any) -> None:
    name, make_row, expected = CASES[case]
    file = write_lines(tmp_path / "file.jsonl", [make_row(i) for i in range(10)])
    with caplog.at_level(logging.INFO):
        found = load("preferences", file)
    assert [describe(row) for row in found] == [expected(i) for i in range(10)]
    assert [row.place for row in found] == [f"{file}:{i + 1}" for i in range(10)]
    [said] = [r.message for r in caplog.records if ": read as " in r.message]
    assert f"read as {FORMATS[name].title} (" in said
    assert load("preferences", file, format=name) == found
    numbers = [row | {"id": str(i)} for i, row in enumerate(map(make_row, range(10)))]
    named = load("preferences", write_lines(tmp_path / "file.jsonl", numbers))
    assert [row.id for row in named] == [str(i) for i in range(10)]


def test_every_format_is_a_setting_and_has_a_case() -> None:
    assert set(CHOICES["data.format"]) == {"auto", "trl", *FORMATS}
    assert {name for name, _, _ in CASES.values()} | {"unpaired"} == set(FORMATS)


@pytest.mark.parametrize(
    "case",
    [
        "LLaMA-Factory, list of outputs", "ms-swift, rejected messages", "OpenAI", "NeMo, three",
        "UltraFeedback", "RewardBench 2", "FlagEmbedding, scores and prompt", "Nectar",
        "sentence-transformers, labelled lists", "numbered", "objects", "graded responses",
        "LLaMA-Factory, history and system", "ShareGPT",
    ],
)  # fmt: skip
@pytest.mark.parametrize("write", [json.dumps, str])
def test_tables_of_text_are_read_alike(tmp_path: Path, case: str, write: Any) -> None:
    _, make_row, expected = CASES[case]
    rows = [make_row(i) for i in range(10)]
    with (tmp_path / "file.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        for row in rows:
            texts = {k: v if isinstance(v, str) else write(v) for k, v in row.items()}
            table.writerow({k: "" if row[k] is None else text for k, text in texts.items()})
    found = load("preferences", tmp_path / "file.csv")
    assert [describe(row) for row in found] == [expected(i) for i in range(10)]


def without(row: Row, *fields: str) -> Row:
    return {name: value for name, value in row.items() if name not in fields}


def row_of(case: str) -> Row:
    return CASES[case][1](0)


def completions(*items: Any) -> Row:
    return {"context": "q", "completions": list(items)}


BROKEN: list[tuple[str, Row, str]] = [
    ("LLaMA-Factory", without(row_of("LLaMA-Factory"), "rejected"), "'rejected' is missing"),
    ("LLaMA-Factory", {**row_of("LLaMA-Factory"), "input": 3}, "'input' must be a string"),
    ("LLaMA-Factory", {**row_of("LLaMA-Factory"), "rejected": []}, "'rejected' is empty"),
    ("LLaMA-Factory", {**row_of("LLaMA-Factory"), "history": [["x"]]}, r"'history\[0\]' must be"),
    ("LLaMA-Factory, list of outputs", {"instruction": "q", "output": ["a"]}, "'output' must have"),
    ("ShareGPT", {**row_of("ShareGPT"), "rejected": share("robot", "b")}, "'rejected' must have"),
    ("ShareGPT", without(row_of("ShareGPT"), "conversations"), "'conversations' is missing"),
    ("ShareGPT", {**row_of("ShareGPT"), "conversations": 3}, "'conversations' must be"),
    ("ms-swift", {"messages": [user("q")], "rejected_response": "b"}, "'messages' must end"),
    ("ms-swift", without(row_of("ms-swift"), "rejected_response"), "'rejected_response' is miss"),
    ("ms-swift", {**row_of("ms-swift"), "rejected_response": "a0"}, "is also rejected"),
    ("ms-swift", {**row_of("ms-swift"), "images": ["x.png"]}, "'images' is not read here"),
    ("OpenAI", {**row_of("OpenAI"), "input": {}}, "'input.messages' is missing"),
    ("OpenAI", without(row_of("OpenAI"), "preferred_output"), "'preferred_output' is missing"),
    ("OpenAI", {**row_of("OpenAI"), "input": {"messages": [user("q")], "tools": 3}}, "input.tools"),
    ("ms-swift", {**row_of("ms-swift"), "tools": '[{"a": 1}]'}, r"'tools\[0\]' needs the 'name'"),
    (
        "ms-swift, a call chosen",
        {
            "messages": [user("q"), {"role": "tool_call", "content": "moons()"}],
            "rejected_response": "b",
        },
        r"'messages\[1\]' must be a call of a function, as JSON, .* found the string",
    ),
    ("axolotl", {**row_of("axolotl"), "question": None}, "'question'.* is missing"),
    ("axolotl", {**row_of("axolotl"), "system": 4}, "'system' must be a string"),
    ("numbered", {"prompt": "q", "chosen": "a"}, "'rejected_1' is missing"),
    ("NeMo", completions({"rank": 0, "completion": [says("a")]}), "is the only answer"),
    ("NeMo", completions({"rank": 0, "completion": [says("a")]}, {"completion": "b"}), r"1\].rank"),
    (
        "NeMo",
        completions({"rank": 1, "completion": "a"}, {"rank": 1, "completion": "b"}),
        "field 'completions': answers 0 and 1 have the same rank, 1",
    ),
    ("NeMo", {"context": "q", "completions": "x"}, "'completions' must be a list"),
    ("NeMo", completions({"rank": "x", "completion": "a"}), r"\[0\].rank' must be a"),
    ("UltraFeedback", ultra(0, 1.0, None), r"'completions\[1\].overall_score' is missing"),
    ("UltraFeedback", ultra(0, 1.0, 1.0), r"completions\[1\].response are equally good"),
    ("UltraFeedback", {"instruction": "q", "completions": []}, "'completions' is empty"),
    ("Nectar", {"prompt": "q", "answers": [{"answer": "a"}]}, r"answers\[0\].rank' must be a num"),
    ("HelpSteer 2", {**row_of("HelpSteer 2"), "preference_strength": 0}, "is 0: neither"),
    ("HelpSteer 2", without(row_of("HelpSteer 2"), "response_2"), "'response_2' or .* is missing"),
    ("RewardBench 2", {**row_of("RewardBench 2"), "rejected": []}, "'rejected' is empty"),
    ("RewardBench 2", {**row_of("RewardBench 2"), "rejected": ["b", "d"]}, r"rejected\[1\]"),
    ("objects", {"prompt": "q", "chosen": "a", "rejected": [{"x": 1}]}, r"rejected\[0\]' must"),
    ("graded responses", {**row_of("graded responses"), "scores": [1, 2]}, "'scores' must"),
    ("graded responses", {**row_of("graded responses"), "scores": [1, "x", 2]}, r"\[1\]' must"),
    ("graded responses", {**row_of("graded responses"), "scores": [1, None, 2]}, r"\[1\]' is null"),
    ("FlagEmbedding", {"query": "q", "pos": ["a"], "neg": None}, "'neg' is null"),
    ("FlagEmbedding", {"query": "q", "pos": ["a"], "neg": [3]}, r"'neg\[0\]' must be a string"),
    (
        "FlagEmbedding, scores and prompt",
        {**row_of("FlagEmbedding, scores and prompt"), "neg_scores": [0.5]},
        "'neg_scores' must have a value for each of the 2",
    ),
    ("sentence-transformers, triplets", {"anchor": "q", "positive": "a"}, "'negative' is missing"),
    (
        "sentence-transformers, labelled lists",
        {"query": "q", "docs": ["a", "b"], "labels": [0, 0]},
        r"docs\[0\], docs\[1\] are equally good",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("case", "row", "message"), BROKEN)
def test_a_broken_row_is_named(tmp_path: Path, case: str, row: Row, message: str) -> None:
    make_row = CASES[case][1]
    file = write_lines(tmp_path / "file.jsonl", [*map(make_row, range(1, 5)), row])
    with pytest.raises(UserError, match=f":5: .*{message}") as error:
        load("preferences", file)
    assert "\n" not in str(error.value)
    assert len(load("preferences", file, on_bad_row="skip")) == 4


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"query": "q", "pos": ["a"], "neg": ["b"], "chosen": "a", "rejected": "b"}, "flagembed"),
        ({"query": "q", "pos": ["a"], "neg": ["b"], "positive": "a", "negative": "b"}, "sentence"),
    ],
)
def test_columns_of_two_formats_are_refused_and_a_name_decides(
    tmp_path: Path, row: Row, names: str
) -> None:
    file = write_lines(tmp_path / "file.jsonl", [row])
    with pytest.raises(UserError, match=f"columns of .* and .*{names}|columns of .*{names}"):
        load("preferences", file)
    [found] = load("preferences", file, format="flagembedding")
    assert (found.prompt, found.chosen, found.rejected) == ("q", "a", ("b",))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": ["b"], "instruction": "x", "score": 1},
        {
            "prompt": "q",
            "prompt_id": "1",
            "chosen": [user("q"), says("a")],
            "rejected": [user("q"), says("b")],
            "messages": [user("q"), says("a")],
        },
        {"chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")], "question": "q"},
        {"chosen": "Is it q? a", "rejected": "Is it q? b", "instruction": "q"},
        {"prompt": "q", "chosen": '["a"]', "rejected": '["b"]'},
    ],
)
def test_rows_of_trl_stay_those(tmp_path: Path, row: Row, caplog: Any) -> None:
    file = write_lines(tmp_path / "file.jsonl", [row])
    with caplog.at_level(logging.INFO):
        found = load("preferences", file)
    assert not [r for r in caplog.records if "read as" in r.message]
    assert found == load("preferences", file, format="trl")
    assert found[0].rejected[0] in ("b", [says("b")], " b", '["b"]')


def test_the_format_of_most_first_rows_is_the_table_s(tmp_path: Path) -> None:
    rows = [CASES["Nectar"][1](i) for i in range(20)]
    rows[0] = {"prompt": "q", "answers": None}
    rows[15] = {"prompt": "q", "chosen": "a", "rejected": "b"}
    file = write_lines(tmp_path / "file.jsonl", rows)
    assert len(load("preferences", file, on_bad_row="skip")) == 18
    with pytest.raises(UserError, match=":1: field 'answers' is null"):
        load("preferences", file)


def test_columns_are_renamed_before_they_are_looked_at(tmp_path: Path) -> None:
    row = {
        "question": "q",
        "pos_answer": {"answer": "a", "score": 1.0},
        "neg_answer": [{"answer": "b", "score": 0.0}, {"answer": "c", "score": 0.5}],
    }
    file = write_lines(tmp_path / "file.jsonl", [row])
    columns = "prompt=question,chosen=pos_answer,rejected=neg_answer"
    [found] = load("preferences", file, columns=columns)
    assert (found.chosen, found.rejected, found.scores) == ("a", ("b", "c"), (1.0, 0.0, 0.5))


def test_other_readers_have_no_formats(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{"format": "trl"}, {"group": "prompt"}]
    for setting in settings:
        with pytest.raises(UserError, match="has a format of its own"):
            load("qasc", tmp_path, **setting)


def test_a_system_prompt_that_only_some_rows_have_is_read(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": ["b", "c"]}
    scores = {"score_chosen": 3, "score_rejected": [2, 1]}
    rows = [{**row, **scores, "system": None}] * 6 + [{**row, "system": "s"}, row]
    found = load("preferences", write_lines(tmp_path / "file.jsonl", rows))
    assert [e.prompt for e in found] == ["q"] * 6 + [[system("s"), user("q")], "q"]
    assert [e.scores for e in found] == [(3.0, 2.0, 1.0)] * 6 + [None] * 2
    wrong = {**row, "system": "s", "score_chosen": 3, "score_rejected": [2]}
    with pytest.raises(UserError, match="'score_rejected' must have a value for each of the 2"):
        load("preferences", write_lines(tmp_path / "file.jsonl", [wrong]))


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "file.jsonl", [row_of("NeMo")])
    settings: list[dict[str, Any]] = [{"format": "swift"}, {"group": "prompts"}]
    for setting in settings:
        with pytest.raises(UserError, match="expected one of "):
            load("preferences", file, **setting)
