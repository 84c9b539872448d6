"""Files in the formats of other programs: ten rows each as they document them, and broken ones."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax.config import CHOICES
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.formats import FORMATS
from mass_dpo_jax.errors import UserError
from tests.support.data import load, write_lines

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def says(text: str) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def share(name: str, text: str) -> Row:
    return {"from": name, "value": text}


def example(
    i: int, prompt: Any, chosen: str, *rejected: str, **fields: Any
) -> tuple[Any, str, tuple[str, ...], dict[str, Any]]:
    return prompt, chosen, rejected, {"scores": None, "also_chosen": (), "ranks": None, **fields}


def ultra(i: int, *scores: Any, key: str = "overall_score") -> Row:
    completions = [
        {"model": f"m{k}", "response": f"r{k} {i}", key: score, "critique": "x"}
        for k, score in enumerate(scores)
    ]
    return {"source": "x", "instruction": f"q{i}", "models": ["a"], "completions": completions}


def ratings(i: int) -> Row:
    def rated(*values: str) -> Row:
        names = ("helpfulness", "honesty")
        return {name: {"Rating": v, "Rationale": "x"} for name, v in zip(names, values)}

    row = ultra(i, None, None)
    row["completions"][0]["annotations"] = rated("2", "N/A")
    row["completions"][1]["annotations"] = rated("4", "5")
    return row


# By format and variant: what row i is, and the example that it stands for, written by hand.
CASES: dict[str, tuple[str, Callable[[int], Row], Callable[[int], Any]]] = {
    "LLaMA-Factory": (
        "alpaca",
        lambda i: {"instruction": f"q{i}", "input": "in", "chosen": f"a{i}", "rejected": f"b{i}"},
        lambda i: example(i, f"q{i}\nin", f"a{i}", f"b{i}"),
    ),
    "LLaMA-Factory, several rejected, nulls": (
        "alpaca",
        lambda i: {
            "instruction": f"q{i}",
            "input": "",
            "system": None,
            "history": [],
            "chosen": f"a{i}",
            "rejected": [f"b{i}", None, "c"],
            "note": 1,
        },
        lambda i: example(i, f"q{i}", f"a{i}", f"b{i}", "c"),
    ),
    "LLaMA-Factory, history and system": (
        "alpaca",
        lambda i: {
            "instruction": f"q{i}",
            "system": "s",
            "history": [["x", "y"], ["z", "w"]],
            "chosen": f"a{i}",
            "rejected": f"b{i}",
        },
        lambda i: example(
            i,
            [system("s"), user("x"), says("y"), user("z"), says("w"), user(f"q{i}")],
            f"a{i}",
            f"b{i}",
        ),
    ),
    "LLaMA-Factory, list of outputs": (
        "alpaca",
        lambda i: {"instruction": f"q{i}", "input": None, "output": [f"a{i}", f"b{i}", "c"]},
        lambda i: example(i, f"q{i}", f"a{i}", f"b{i}", "c"),
    ),
    "ShareGPT": (
        "sharegpt",
        lambda i: {
            "conversations": [share("human", "x"), share("gpt", "y"), share("human", f"q{i}")],
            "chosen": share("gpt", f"a{i}"),
            "rejected": share("gpt", f"b{i}"),
        },
        lambda i: example(i, [user("x"), says("y"), user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "ShareGPT, system and several rejected": (
        "sharegpt",
        lambda i: {
            "conversations": [share("human", f"q{i}")],
            "system": "s",
            "chosen": share("gpt", f"a{i}"),
            "rejected": [share("gpt", f"b{i}"), share("gpt", "c")],
        },
        lambda i: example(i, [system("s"), user(f"q{i}")], f"a{i}", f"b{i}", "c"),
    ),
    "ShareGPT, whole conversations": (
        "sharegpt",
        lambda i: {
            "chosen": [share("human", f"q{i}"), share("gpt", f"a{i}")],
            "rejected": [share("human", f"q{i}"), share("gpt", f"b{i}")],
        },
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "ms-swift": (
        "ms-swift",
        lambda i: {"messages": [user(f"q{i}"), says(f"a{i}")], "rejected_response": f"b{i}"},
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "ms-swift, list": (
        "ms-swift",
        lambda i: {
            "messages": [system("s"), user(f"q{i}"), says(f"a{i}")],
            "rejected_response": [f"b{i}", "c"],
            "images": [],
        },
        lambda i: example(i, [system("s"), user(f"q{i}")], f"a{i}", f"b{i}", "c"),
    ),
    "ms-swift, rejected messages": (
        "ms-swift",
        lambda i: {
            "messages": [user(f"q{i}"), says(f"a{i}")],
            "rejected_messages": [user(f"q{i}"), says(f"b{i}")],
        },
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "ms-swift, positive and negative": (
        "ms-swift",
        lambda i: {
            "messages": [user(f"q{i}")],
            "positive_messages": [[user(f"a{i}")], [user("d")]],
            "negative_messages": [[user(f"b{i}")], [says("c")]],
        },
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}", "c", also_chosen=("d",)),
    ),
    "ms-swift, query and response": (
        "ms-swift",
        lambda i: {"query": f"q{i}", "response": f"a{i}", "rejected_response": f"b{i}"},
        lambda i: example(i, f"q{i}", f"a{i}", f"b{i}"),
    ),
    "OpenAI": (
        "openai",
        lambda i: {
            "input": {"messages": [user(f"q{i}")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [says(f"a{i}")],
            "non_preferred_output": [says(f"b{i}")],
        },
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "axolotl": (
        "axolotl",
        lambda i: {"system": "s", "question": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"},
        lambda i: example(i, [system("s"), user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "axolotl, empty system": (
        "axolotl",
        lambda i: {"system": "", "prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"},
        lambda i: example(i, f"q{i}", f"a{i}", f"b{i}"),
    ),
    "axolotl, messages": (
        "axolotl",
        lambda i: {"messages": [user(f"q{i}")], "chosen": says(f"a{i}"), "rejected": says(f"b{i}")},
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "axolotl, argilla": (
        "axolotl",
        lambda i: {"instruction": f"q{i}", "chosen_response": "a", "rejected_response": f"b{i}"},
        lambda i: example(i, f"q{i}", "a", f"b{i}"),
    ),
    "numbered": (
        "numbered",
        lambda i: {
            "prompt": f"q{i}",
            "chosen": "a",
            "rejected10": "z",
            "rejected1": "b",
            "rejected2": None if i % 2 else "c",
        },
        lambda i: example(i, f"q{i}", "a", *(("b", "z") if i % 2 else ("b", "c", "z"))),
    ),
    "NeMo": (
        "nemo",
        lambda i: {
            "context": [user(f"q{i}")],
            "completions": [
                {"rank": 1, "completion": [says(f"b{i}")]},
                {"rank": 0, "completion": [says(f"a{i}")]},
            ],
        },
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "NeMo, three": (
        "nemo",
        lambda i: {
            "context": f"q{i}",
            "completions": [
                {"rank": 3, "completion": [says("c")]},
                {"rank": 1, "completion": [says("a")]},
                {"rank": 2, "completion": [says("b")]},
            ],
        },
        lambda i: example(i, f"q{i}", "a", "c", "b", ranks=(0, 2, 1)),
    ),
    "UltraFeedback": (
        "ultrafeedback",
        lambda i: ultra(i, 3.0, 8.5, 7, 8.5),
        lambda i: example(
            i,
            f"q{i}",
            f"r1 {i}",
            f"r0 {i}",
            f"r2 {i}",
            scores=(8.5, 3.0, 7.0, 8.5),
            also_chosen=(f"r3 {i}",),
            ranks=(0, 2, 1, 0),
        ),
    ),
    "UltraFeedback, fine-grained": (
        "ultrafeedback",
        lambda i: ultra(i, 1.25, 4.75, key="fine-grained_score"),
        lambda i: example(i, f"q{i}", f"r1 {i}", f"r0 {i}", scores=(4.75, 1.25)),
    ),
    "UltraFeedback, ratings": (
        "ultrafeedback",
        ratings,
        lambda i: example(i, f"q{i}", f"r1 {i}", f"r0 {i}", scores=(4.5, 2.0)),
    ),
    "UltraFeedback, columns": (
        "ultrafeedback",
        lambda i: {
            "instruction": f"q{i}",
            "completions": {"response": ["b", "a"], "overall_score": [1.0, 2.0]},
        },
        lambda i: example(i, f"q{i}", "a", "b", scores=(2.0, 1.0)),
    ),
    "Nectar": (
        "nectar",
        lambda i: {
            "prompt": f"\n\nHuman: q{i}\n\nAssistant: ",
            "answers": [
                {"answer": "c", "model": "x", "rank": 3.0},
                {"answer": "a", "model": "y", "rank": 1.0},
                {"answer": "b", "model": "z", "rank": 2.0},
            ],
            "turns": 1,
        },
        lambda i: example(i, f"q{i}", "a", "c", "b", ranks=(0, 2, 1)),
    ),
    "Nectar, turns": (
        "nectar",
        lambda i: {
            "prompt": f"\n\nHuman: x\n\nAssistant: y: z\n\nHuman: q{i}\n\nAssistant:",
            "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}],
        },
        lambda i: example(i, [user("x"), says("y: z"), user(f"q{i}")], "a", "b"),
    ),
    "HelpSteer 2": (
        "helpsteer",
        lambda i: {
            "prompt": f"q{i}",
            "response_1": "x",
            "response_2": "y",
            "split": "train",
            "preference_strength": -2 if i % 2 else 3,
        },
        lambda i: (
            example(i, f"q{i}", "x", "y", scores=(2.0, 0.0))
            if i % 2
            else example(i, f"q{i}", "y", "x", scores=(3.0, 0.0))
        ),
    ),
    "HelpSteer 3": (
        "helpsteer",
        lambda i: {
            "domain": "general",
            "context": [user(f"q{i}")],
            "response1": "x",
            "response2": "y",
            "overall_preference": -1,
            "individual_preference": [{"score": -1, "reasoning": "z"}],
        },
        lambda i: example(i, [user(f"q{i}")], "x", "y", scores=(1.0, 0.0)),
    ),
    "RewardBench 2": (
        "rewardbench2",
        lambda i: {
            "id": str(i),
            "prompt": f"q{i}",
            "chosen": ["a", "d"],
            "rejected": ["b", "c", "e"],
            "num_correct": 2,
            "num_incorrect": 3,
            "total_completions": 5,
            "subset": "Ties",
        },
        lambda i: example(i, f"q{i}", "a", "b", "c", "e", also_chosen=("d",)),
    ),
    "objects": (
        "objects",
        lambda i: {
            "prompt": f"q{i}",
            "chosen": "a",
            "rejected": [{"text": "b", "score": 0}, {"text": "c", "score": 1}],
        },
        lambda i: example(i, f"q{i}", "a", "b", "c", ranks=(0, 2, 1)),
    ),
    "objects, dict of lists": (
        "objects",
        lambda i: {"prompt": f"q{i}", "chosen": "a", "rejected": {"text": ["b", "c"]}},
        lambda i: example(i, f"q{i}", "a", "b", "c"),
    ),
    "objects, all with scores": (
        "objects",
        lambda i: {
            "prompt": f"q{i}",
            "chosen": {"answer": "a", "score": 1.0},
            "rejected": [{"answer": "b", "score": 0.0}, {"answer": "c", "score": 0.0}],
        },
        lambda i: example(i, f"q{i}", "a", "b", "c", scores=(1.0, 0.0, 0.0)),
    ),
    "ranked responses": (
        "responses",
        lambda i: {"prompt": f"q{i}", "responses": ["a", "b", "c"]},
        lambda i: example(i, f"q{i}", "a", "b", "c", ranks=(0, 1, 2)),
    ),
    "graded responses": (
        "responses",
        lambda i: {"prompt": f"q{i}", "responses": ["a", "b", "c"], "scores": [1, 5, 1]},
        lambda i: example(i, f"q{i}", "b", "a", "c", scores=(5.0, 1.0, 1.0)),
    ),
    "responses with ranks": (
        "responses",
        lambda i: {"prompt": f"q{i}", "responses": ["a", "b", "c"], "ranks": [2, 1, 3]},
        lambda i: example(i, f"q{i}", "b", "a", "c", ranks=(0, 1, 2)),
    ),
    "FlagEmbedding": (
        "flagembedding",
        lambda i: {"query": f"q{i}", "pos": ["a", "d"], "neg": ["b", "c"], "type": "normal"},
        lambda i: example(i, f"q{i}", "a", "b", "c", also_chosen=("d",)),
    ),
    "FlagEmbedding, scores and prompt": (
        "flagembedding",
        lambda i: {
            "query": f"q{i}",
            "pos": ["a"],
            "neg": ["b", "c"],
            "prompt": "Find it.",
            "pos_scores": [0.9],
            "neg_scores": [0.1, 0.2],
        },
        lambda i: example(i, f"Find it.\nq{i}", "a", "b", "c", scores=(0.9, 0.1, 0.2)),
    ),
    "sentence-transformers, triplets": (
        "sentence-transformers",
        lambda i: {"anchor": f"q{i}", "positive": "a", "negative": "b"},
        lambda i: example(i, f"q{i}", "a", "b"),
    ),
    "sentence-transformers, n-tuples": (
        "sentence-transformers",
        lambda i: {"query": f"q{i}", "positive": "a", "negative_2": "c", "negative_1": "b"},
        lambda i: example(i, f"q{i}", "a", "b", "c"),
    ),
    "sentence-transformers, labelled lists": (
        "sentence-transformers",
        lambda i: {"query": f"q{i}", "docs": ["b", "a", "c", "d"], "labels": [0, 1, 0, 1]},
        lambda i: example(
            i, f"q{i}", "a", "b", "c", scores=(1.0, 0.0, 0.0, 1.0), also_chosen=("d",)
        ),
    ),
}


def describe(found: Example) -> Any:
    fields = {name: getattr(found, name) for name in ("scores", "also_chosen", "ranks")}
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
    assert {name for name, _, _ in CASES.values()} == set(FORMATS)


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
    ("OpenAI", {**row_of("OpenAI"), "input": {"messages": [], "tools": [{"a": 1}]}}, "input.tools"),
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
