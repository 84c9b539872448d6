"""JSON lines: what a row may be, which rows a split has, and what a wrong row is told."""

from __future__ import annotations

import gzip
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from mass_dpo_jax.config import default
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.errors import UserError

GOOD: dict[str, Any] = {"prompt": "p", "chosen": "a", "rejected": ["b", "c"]}
USER = {"role": "user", "content": "p"}
SYSTEM = {"role": "system", "content": "s"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASSISTANT = [assistant("a")]
CALLING = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}


def settings(path: Path, **changes: Any) -> ConfigDict:
    data = default().data
    data.update({"name": "jsonl", "path": str(path), "max_validation": 0, "max_test": 0, **changes})
    return data


def write(path: Path, *rows: Any) -> Path:
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def read(folder: Path, *rows: Any, split: str = "all") -> list[Example]:
    return load_examples(settings(write(folder / "file.jsonl", *rows)), split, seed=0)


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        (GOOD, "p", "a", ("b", "c")),
        ({**GOOD, "rejected": "b"}, "p", "a", ("b",)),
        ({**GOOD, "rejected": ["b", "b"]}, "p", "a", ("b", "b")),
        ({**GOOD, "rejected": [assistant("b")]}, "p", "a", ([assistant("b")],)),
        (
            {"prompt": [USER], "chosen": [assistant("a")], "rejected": [[assistant("b")]]},
            [USER],
            [assistant("a")],
            ([assistant("b")],),
        ),
        (  # Whole conversations that share the prompt, with and without a prompt beside them.
            {
                "prompt": None,
                "chosen": [USER, assistant("a")],
                "rejected": [[USER, assistant("b")], [USER, assistant("c")]],
            },
            [USER],
            [assistant("a")],
            ([assistant("b")], [assistant("c")]),
        ),
        (
            {"prompt": "p", "chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]},
            "p",
            [assistant("a")],
            ([assistant("b")],),
        ),
        (  # A conversation before the last question, which alone stands beside it.
            {
                "prompt": "p",
                "chosen": [SYSTEM, USER, assistant("a")],
                "rejected": [[SYSTEM, USER, assistant("b")]],
            },
            [SYSTEM, USER],
            [assistant("a")],
            ([assistant("b")],),
        ),
        (  # Texts with a common start. A space goes to the responses, as in TRL.
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            "The sky is",
            " blue.",
            (" green.",),
        ),
        (
            {
                "chosen": "Q: 2+2\nA: 4",
                "rejected": ["Q: 2+2\nA: 5", "Q: 2+2\nA: 6", "Q: 2+2\nA: x"],
            },
            "Q: 2+2\nA:",
            " 4",
            (" 5", " 6", " x"),
        ),
        *[  # A table's row and message have every key, most of them empty.
            (
                {**GOOD, "prompt": [{**USER, "tool_calls": empty}], "tools": empty, "image": empty},
                [USER],
                "a",
                ("b", "c"),
            )
            for empty in (None, [], {}, "", [None], [{"name": None, "of": []}], math.nan)
        ],
        (  # Single messages, and content in parts.
            {
                "prompt": {**USER, "content": [{"type": "text", "text": "p"}, "q", {"text": "r"}]},
                "chosen": assistant("a"),
                "rejected": [None, assistant("b"), None],
            },
            [{**USER, "content": "pqr"}],
            [assistant("a")],
            ([assistant("b")],),
        ),
        ({**GOOD, "rejected": assistant("b")}, "p", "a", ([assistant("b")],)),
        (
            {**GOOD, "chosen": assistant("a"), "rejected": [assistant("b"), assistant("c")]},
            "p",
            [assistant("a")],
            ([assistant("b")], [assistant("c")]),
        ),
        ({**GOOD, "rejected": ["b", None, "c"]}, "p", "a", ("b", "c")),
        (
            {**GOOD, "prompt": [{**SYSTEM, "content": " \n"}, USER]},
            [{**SYSTEM, "content": ""}, USER],
            "a",
            ("b", "c"),
        ),
    ],
)
def test_row_formats(tmp_path: Path, row: Any, prompt: Any, chosen: Any, rejected: Any) -> None:
    [example] = read(tmp_path, row)
    assert (example.prompt, example.chosen, example.rejected) == (prompt, chosen, rejected)
    assert example.place == f"{tmp_path / 'file.jsonl'}:1"


def test_ids_are_given_or_count_rows_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    examples = read(tmp_path, GOOD, "", {"id": 7, **GOOD}, "  ", {"id": "x", **GOOD}, GOOD)
    assert [e.id for e in examples] == ["file-0", "7", "x", "file-3"]
    assert examples[-1].place.endswith("file.jsonl:6")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "rejected": ["b"]}, "field 'chosen' is missing; found prompt, rejected"),
        ({"prompt": "p", "chosen": "a"}, "field 'rejected' is missing"),
        ({**GOOD, "chosen": None}, "field 'chosen' is null"),
        ({**GOOD, "rejected": None}, "field 'rejected' is null"),
        ({**GOOD, "rejected": [None, None]}, "field 'rejected' is empty"),
        ({**GOOD, "prompt": ""}, "field 'prompt' is empty"),
        ({"chosen": "a", "rejected": ["b"]}, "'prompt' is missing, and .* no text in common"),
        *[  # What answers begin with is no prompt where there is one by another name.
            (
                {name: "What?", "chosen": "It is a", "rejected": ["It is b"]},
                f"'prompt' is missing; found .*; --config.data.columns=prompt={name} reads these",
            )
            for name in ("question", "Prompt", "prompts", "Instruction", "query")
        ],
        (
            {"question": "p", "chosen": [assistant("a")], "rejected": [assistant("b")]},
            "--config.data.columns=prompt=question reads these",
        ),
        (
            {"prompt": "p", "choosen": "a", "Rejected": "b"},
            "--config.data.columns=chosen=choosen,rejected=Rejected reads these",
        ),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "rejected": "c"}', "'rejected' is there"),
        ('{"prompt": [{"role": "user", "role": "system", "content": "p"}]}', "'role' is there twi"),
        ({"chosen": "p", "rejected": ["pa"]}, "'prompt' is missing, and all of 'chosen' is the"),
        ({"chosen": "pab", "rejected": ["pb", "p"]}, r"all of 'rejected\[1\]' is the start of"),
        ({"chosen": "pa", "rejected": [[assistant("b")]]}, "expected all of one kind"),
        ({"chosen": "pa", "rejected": ["pb", "pa"]}, r"chosen response is also rejected\[1\]"),
        (
            {**GOOD, "tools": [{"type": "f"}]},
            r"'tools\[0\]' needs the 'name' of a function; found type",
        ),
        ({**GOOD, "tools": [{"function": {"x": 1}}]}, r"'tools\[0\].function' needs the 'name'"),
        ({**GOOD, "tools": [{"function": 3}]}, r"'tools\[0\].function' must be an object with a"),
        ({**GOOD, "tools": [3]}, r"'tools\[0\]' must be a function, as a JSON schema, found the"),
        ({**GOOD, "tools": "moons"}, "'tools' must be a list of functions, as JSON schemas, found"),
        ({**GOOD, "chat_template_kwargs": {"x": 1}}, "set config.data.chat_template_kwargs"),
        ({**GOOD, "rejected": []}, "field 'rejected' is empty"),
        ({**GOOD, "rejected": ""}, "field 'rejected' is empty"),
        ({**GOOD, "rejected": ["b", " "]}, r"field 'rejected\[1\]' is empty"),
        ({**GOOD, "rejected": [[]]}, r"field 'rejected\[0\]' is empty"),
        ({**GOOD, "rejected": ["b", "a"]}, r"chosen response is also rejected\[1\]: 'a'"),
        ({**GOOD, "rejected": {"text": "b"}}, "'rejected' must be a response or a list .* object"),
        ({**GOOD, "rejected": ["b", 3]}, r"'rejected\[1\]' must be a string .* the number 3"),
        ({**GOOD, "prompt": 3.5}, "'prompt' must be a string or .* found the number 3.5"),
        ({**GOOD, "prompt": "\ud800"}, "'prompt' has half a surrogate pair"),
        ({**GOOD, "prompt": [USER, SYSTEM]}, "end with .* 'user', .* found 'system'"),
        ({**GOOD, "prompt": [USER, assistant("a")]}, "'chosen' is the prompt's last message, too"),
        (
            {**GOOD, "prompt": [USER, CALLING]},
            "'prompt' ends with .* that has tool_calls: expected",
        ),
        (
            {"chosen": [USER, *ASSISTANT * 2], "rejected": [USER, *ASSISTANT, assistant("b")]},
            "'chosen' ends with two messages of role 'assistant'",
        ),
        ({**GOOD, "prompt": ["p"]}, r"'prompt\[0\]' must be a chat message, found the string 'p'"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "needs a string 'content', found null"),
        (
            {**GOOD, "prompt": [{**USER, "weight": 1}]},
            "has role, content, tool_calls,.* found 'weight'",
        ),
        ({**GOOD, "prompt": [{**USER, "name": 3}]}, r"'prompt\[0\].name' must be a string, found"),
        (
            {**GOOD, "tools": {"a": [None, {"b": "c"}]}},
            "'tools' must be a list of functions, as JSON",
        ),
        *[
            ({**GOOD, name: value}, f"field '{name}' is not read here: models with images, videos")
            for name in ("image", "images", "video", "videos", "audio")
            for value in ("a.png", {"bytes": "x"}, ["a.png"])
        ],
        (
            {**GOOD, "chosen": [{**assistant("a"), "content": None, "tool_calls": [{"id": 1}]}]},
            r"'chosen\[0\].tool_calls\[0\]' needs the 'name' of a function; found id",
        ),
        (
            {**GOOD, "chosen": [{**assistant("a"), "function_call": {"name": "f"}}]},
            "'function_call': is not read: write it as tool_calls",
        ),
        *[
            ({**GOOD, "chosen": [{**assistant("a"), "tool_calls": value}]}, f"tool_calls{message}")
            for value, message in (
                ("f(x)", "' must be a call of a function, .* found the string"),
                ([3], r"\[0\]' must be a call, with a function, found the number 3"),
                ([{"function": "f"}], r"\[0\].function' must be an object with a name, found"),
                ([{"name": " "}], r"\[0\].name' is empty"),
                ([{"name": "f", "arguments": "x=1"}], r"\[0\].arguments' must be an object, or JS"),
                ([{"name": "f", "arguments": [1]}], r"\[0\].arguments' must be .* found a list"),
            )
        ],
        (
            {**GOOD, "prompt": [{**USER, "reasoning_content": "hm"}]},
            "'reasoning_content' belongs to a message of role 'assistant', found it in 'user'",
        ),
        (
            {**GOOD, "prompt": [USER, {**assistant("a"), "tool_call_id": "1"}, USER]},
            "'tool_call_id' belongs to a message of role 'tool', found it in 'assistant'",
        ),
        ({**GOOD, "chosen": [{**assistant("a"), "reasoning_content": 3}]}, "must be a string, fou"),
        (
            {**GOOD, "prompt": [{**USER, "content": [{"type": "image_url", "image_url": "u"}]}]},
            "content has a part of type 'image_url'; only text is read",
        ),
        (
            {**GOOD, "prompt": [{**USER, "content": [{"text": 3}]}]},
            "needs a string 'text', found t",
        ),
        ({**GOOD, "prompt": [{**USER, "content": []}]}, "needs a string 'content', found a list"),
        (
            {**GOOD, "prompt": [{"from": "human", "value": "p"}]},
            "needs role and content, found ShareGPT's from, value",
        ),
        ({**GOOD, "rejected": [{"text": "b", "score": 1}]}, "found an object with text, score"),
        (  # Conversations that go apart before the last answer.
            {
                "chosen": [USER, assistant("a"), USER, assistant("c")],
                "rejected": [USER, assistant("b"), USER, assistant("d")],
            },
            r"'rejected\[0\]' .* found 4 messages that differ from the prompt's at the second: "
            "they differ before the last answer",
        ),
        (
            {**GOOD, "chosen": [assistant("a"), {**USER, "content": "q"}, assistant("c")]},
            "'chosen' must be one assistant message.*; found 3 messages: of an answer of several",
        ),
        (
            {**GOOD, "chosen": [USER, assistant("a"), USER, assistant("c")], "prompt": [USER]},
            "found 3 messages behind the prompt's",
        ),
        ({"id": "", **GOOD}, "field 'id' is empty; leave it out, or set --config.data.columns=id="),
        ({"id": math.inf, **GOOD}, "'id' must be a string or an integer, found the number inf"),
        ({**GOOD, "chosen": [USER]}, "'chosen' must be a message of role 'assistant'"),
        ({**GOOD, "rejected": [assistant("b"), assistant("c")]}, "a list of lists"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "one message only"),
        (
            {"chosen": [USER, assistant("a")], "rejected": [{**USER, "content": "q"}, USER]},
            "'rejected.0.' must be one assistant message",
        ),
        ({"id": 1.5, **GOOD}, "'id' must be a string or an integer, found the number 1.5"),
        ({"id": "\ud800", **GOOD}, "'id' has half a surrogate pair"),
        ([GOOD], "expected an object with prompt, chosen, rejected; found a list"),
        ('{"prompt": "p", "chosen"', "invalid JSON: .* column"),
        ({"id": "first", **GOOD}, "id 'first' is taken by .*file.jsonl:1"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, {"id": "first", **GOOD}, "", row)
    assert str(error.value).startswith(f"{tmp_path / 'file.jsonl'}:3: ")
    assert "\n" not in str(error.value)


def test_columns_by_other_names(tmp_path: Path) -> None:
    row = {"q": "p", "good": "a", "bad": ["b", "c"], "prompt": "another's", "id": "x"}
    file = write(tmp_path / "file.jsonl", row)

    def load(columns: str) -> Example:
        [example] = load_examples(settings(file, columns=columns), "all", seed=0)
        return example

    assert load("prompt=q, chosen=good,rejected=bad") == Example(
        "x", "p", "a", ("b", "c"), f"{file}:1"
    )
    assert load("chosen=good,rejected=bad").prompt == "another's"
    assert load("prompt=good,chosen=q,rejected=bad").chosen == "p"
    with pytest.raises(UserError, match=r"jsonl:1: column 'worse' is missing .* takes 'rejected'"):
        load("prompt=q,chosen=good,rejected=worse")
    for wrong in ("question=q", "prompt", "prompt=q,prompt=good", "prompt=", "id", ",", "=q"):
        with pytest.raises(UserError, match=r"config.data.columns=.* expected each of id, prompt"):
            load(wrong)
    with pytest.raises(UserError, match=r"config.data.name=qasc has columns of its own"):
        load_examples(settings(file, columns="prompt=q", name="qasc"), "all", seed=0)


def test_wrong_rows_are_skipped_and_counted(tmp_path: Path, caplog: Any) -> None:
    rows = [GOOD, {**GOOD, "rejected": []}, "{", {"id": "x", **GOOD}, {"id": "x", **GOOD}, "", GOOD]
    file = write(tmp_path / "file.jsonl", *rows)
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        examples = load_examples(settings(file, on_bad_row="skip"), "all", seed=0)
    assert [e.id for e in examples] == ["file-0", "x", "file-5"]  # Named by their own places.
    said = [r.getMessage() for r in caplog.records]
    assert said[:2] == [
        f"{file}: skipped 3 of 6 rows in all",
        f"{file}: skipped 1 of 6 rows; first: {file}:2: field 'rejected' is empty",
    ]
    assert said[2].startswith(f"{file}: skipped 1 of 6 rows; first: {file}:3: invalid JSON")
    assert said[3].startswith(f"{file}: skipped 1 of 6 rows; first: {file}:5: id 'x' is taken by")
    with pytest.raises(
        UserError, match=r"file.jsonl:2: .*on_bad_row=skip leaves .* \(3 of the 6 rows read"
    ):
        load_examples(settings(file), "all", seed=0)
    write(file, "{", "[]")
    with pytest.raises(
        UserError, match=r"none of its 2 rows can be used; first: .*file.jsonl:1: in"
    ):
        load_examples(settings(file, on_bad_row="skip"), "all", seed=0)


@pytest.mark.parametrize(
    ("chosen", "rejected", "scores"),
    [
        (3, [2, 0.5], (3.0, 2.0, 0.5)),
        (-1.5, [0, 0], (-1.5, 0.0, 0.0)),
        (None, None, None),
        (1, None, None),
        (None, [1, 2], None),
        (math.nan, [1, 2], None),
        (1, [1, None], None),
        (1, [1, math.inf], None),
        (1e300, [1, 2], None),
    ],
)
def test_scores(tmp_path: Path, chosen: Any, rejected: Any, scores: Any) -> None:
    [example] = read(tmp_path, {**GOOD, "score_chosen": chosen, "score_rejected": rejected})
    assert example.scores == scores
    [single] = read(tmp_path, {**GOOD, "rejected": "b", "score_chosen": 2, "score_rejected": 1})
    assert single.scores == (2.0, 1.0)
    [without] = read(tmp_path, GOOD)
    assert without.scores is None


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (1, [1], "'score_rejected' must have a number for each of the 2 rejected .* found 1"),
        (1, 0.5, "'score_rejected' must have a number for each of the 2 rejected .* found 1"),
        (1, [1, 2, 3], "'score_rejected' must have a number for each of the 2 .* found 3"),
        (1, [1, "2"], r"'score_rejected\[1\]' must be a number, found the string '2'"),
        (True, [1, 2], "'score_chosen' must be a number, found the boolean true"),
    ],
)
def test_wrong_scores(tmp_path: Path, chosen: Any, rejected: Any, message: str) -> None:
    row = {**GOOD, "score_chosen": chosen, "score_rejected": rejected}
    with pytest.raises(UserError, match=f"file.jsonl:1: field {message}"):
        read(tmp_path, row)


@pytest.mark.parametrize("field", ["score_chosen", "score_rejected"])
def test_a_column_of_scores_without_the_other_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(UserError, match=f"field '{field}' is there, but 'score_.*' is missing"):
        read(tmp_path, {**GOOD, field: [1, 2] if field == "score_rejected" else 1})


def test_scores_of_nulls_among_the_rejected_go_with_them(tmp_path: Path) -> None:
    for of_null in (None, 2):
        scores = {"score_chosen": 9, "score_rejected": [1, of_null, 3]}
        [example] = read(tmp_path, {**GOOD, "rejected": ["b", None, "c"], **scores})
        assert (example.rejected, example.scores) == (("b", "c"), (9.0, 1.0, 3.0))


@pytest.mark.parametrize(
    ("rejected", "given", "want"),
    [
        (["b", "c"], [0.5, 1], (0.5, 1.0)),
        (["b", None, "c"], [0.5, 0.25, 1], (0.5, 1.0)),
        ("b", 0.5, (0.5,)),
        (["b", "c"], None, None),
        (["b", "c"], [0.5], "must have a number for each of the 2 rejected"),
        (["b", "c"], [0.5, 0], "found 0.0, expected a probability above 0"),
        (["b", "c"], [0.5, 1.5], "found 1.5, expected a probability above 0"),
        (["b", "c"], [0.5, None], "found null, expected a probability above 0"),
    ],
)
def test_probabilities_of_a_draw(tmp_path: Path, rejected: Any, given: Any, want: Any) -> None:
    row = {**GOOD, "rejected": rejected, "mined_probabilities": given}
    if isinstance(want, str):
        with pytest.raises(UserError, match=f"file.jsonl:1: field 'mined_probabilities'.*{want}"):
            read(tmp_path, row)
        return
    [example] = read(tmp_path, row)
    assert example.probabilities == want


def test_ids_of_tables_with_gaps(tmp_path: Path) -> None:
    rows = [{"id": i, **GOOD} for i in (0.0, 3.0, math.nan, None)]
    assert [e.id for e in read(tmp_path, *rows)] == ["0", "3", "file-2", "file-3"]


def test_ids_that_are_there_twice_can_be_left_out(tmp_path: Path) -> None:
    rows = [{"prompt_id": f"x{i // 2}", **GOOD, "chosen": f"a{i}"} for i in range(4)]
    file = write(tmp_path / "file.jsonl", *rows)
    advice = r"id 'x0' is taken by .*; several rows of one prompt\? --config.data.columns=id= num"
    with pytest.raises(UserError, match=advice):
        load_examples(settings(file, columns="id=prompt_id"), "all", seed=0)
    write(file, *({"id": "x", "q": row.pop("prompt"), **row} for row in rows))
    advice = r"several rows of one prompt\? --config.data.columns=id=,prompt=q numbers rows instead"
    with pytest.raises(UserError, match=advice):
        load_examples(settings(file, columns="prompt=q"), "all", seed=0)
    found = load_examples(settings(file, columns="id=,prompt=q"), "all", seed=0)
    assert [e.id for e in found] == [f"file-{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"question": "p", "response_j": "a", "response_k": "b"},
            "prompt=question,chosen=response_",
        ),
        (
            {"question": "p", "chosen": "a", "neg_answer": ["b", "c"]},
            "prompt=question,rejected=neg_",
        ),
        (
            {"input": "p", "preferred_output": [assistant("a")], "non_preferred_output": "b"},
            "prompt",
        ),
        (
            {"instruction": "p", "chosen_response": "a", "rejected_responses": ["b"]},
            "prompt=instruc",
        ),
    ],
)
def test_columns_of_other_programs_get_the_setting_that_reads_them(
    tmp_path: Path, row: Any, columns: str
) -> None:
    file = write(tmp_path / "file.jsonl", row)
    with pytest.raises(UserError, match=r"is missing; found .*; --config.data.columns=") as error:
        load_examples(settings(file), "all", seed=0)
    flag = str(error.value).partition("--config.data.columns=")[2].partition(" ")[0]
    assert flag.startswith(columns)
    [example] = load_examples(settings(file, columns=flag), "all", seed=0)
    assert example.prompt in ("p", [USER]) and example.chosen in ("a", [assistant("a")])
    assert example.rejected[0] == "b"
    with pytest.raises(
        UserError, match=r"--config.data.columns=rejected=NAME reads it from another"
    ):
        read(tmp_path, {"prompt": "p", "chosen": "a"})


def test_limits_that_leave_rows_out_are_said_and_no_others(tmp_path: Path, caplog: Any) -> None:
    rows = [{**GOOD, "prompt": f"p{i}"} for i in range(20)]
    file = write(tmp_path / "file.jsonl", *rows)
    with caplog.at_level(logging.INFO, "mass_dpo_jax.data"):
        for most in (0, 1, 17, 18, 19):
            load_examples(settings(file, max_train=most), "train", seed=0)
        load_examples(settings(file, max_test=1), "test", seed=0)
        load_examples(settings(file, max_validation=1), "validation", seed=0)
        load_examples(settings(file, max_train=1, max_validation=1, max_test=1), "all", seed=0)
    said = [r.getMessage() for r in caplog.records if "max_" in r.getMessage()]
    assert said == [
        "train: 1 of 18 rows are used (config.data.max_train)",
        "train: 17 of 18 rows are used (config.data.max_train)",
        "test: 1 of 2 rows are used (config.data.max_test)",
        "validation: 1 of 2 rows are used (config.data.max_validation)",
    ]


def test_a_prompt_inside_the_answers_may_be_a_column_too(tmp_path: Path) -> None:
    row = {"question": "Why?", "chosen": "Q: Why? A: So.", "rejected": "Q: Why? A: No."}
    talk = {"question": "p", "chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]}
    found = [example.prompt for example in read(tmp_path, row, talk, {**row, "question": None})]
    assert found == ["Q: Why? A:", [USER], "Q: Why? A:"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def error(path: Path) -> str:
        with pytest.raises(UserError) as error:
            load_examples(settings(path), "train", seed=0)
        return str(error.value)

    assert "file.jsonl: is empty" in error(write(tmp_path / "file.jsonl"))
    assert "file.jsonl: is empty" in error(write(tmp_path / "file.jsonl", "", " "))
    (tmp_path / "file.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}')
    assert "file.jsonl:2: not UTF-8" in error(tmp_path / "file.jsonl")
    whole = gzip.compress(b"".join(b'{"x": %d}' % i for i in range(999)))
    (tmp_path / "broken.jsonl.gz").write_bytes(whole[:-9])
    message = error(tmp_path / "broken.jsonl.gz")
    assert "broken.jsonl.gz:1: cannot be read" in message and "the file whole? gzip -t" in message
    assert "nowhere: no such file or folder" in error(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    assert error(tmp_path / "folder") == (
        f"{tmp_path / 'folder'}: expected files called train, validation or test, as train.jsonl; "
        "found nothing"
    )
    write(tmp_path / "folder" / "test.jsonl", GOOD)
    assert "no split 'train'; found test" in error(tmp_path / "folder")
    write(tmp_path / "folder" / "train.jsonl", GOOD)
    write(tmp_path / "folder" / "train.jsonl.gz", GOOD)
    assert "train.jsonl and train.jsonl.gz could both be" in error(tmp_path / "folder")


def test_compressed_and_marked_files(tmp_path: Path) -> None:
    [plain] = read(tmp_path, {**GOOD, "prompt": "Júpiter Maçã"})
    zipped = write(tmp_path / "file.jsonl.gz", {**GOOD, "prompt": "Júpiter Maçã"})
    [example] = load_examples(settings(zipped), "all", seed=0)
    assert (example.prompt, example.id) == (plain.prompt, plain.id)
    (tmp_path / "marked.jsonl").write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert len(load_examples(settings(tmp_path / "marked.jsonl"), "all", seed=0)) == 1


def test_one_file_is_split_by_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "file.jsonl", *[{"id": i, **GOOD} for i in range(50)])

    def ids(split: str, seed: int = 0, **changes: Any) -> list[int]:
        return [int(e.id) for e in load_examples(settings(path, **changes), split, seed)]

    train, validation = ids("train"), ids("validation")
    assert len(validation) == 5
    assert sorted(train + validation) == list(range(50))
    assert train == sorted(train)
    assert ids("test") == validation
    assert ids("validation", seed=1) != validation
    assert ids("all") == list(range(50))
    few = ids("train", max_train=10)
    assert len(few) == 10
    assert few == sorted(few) != ids("train", seed=1, max_train=10)
    assert few != ids("train")[:10]
    assert set(few) <= set(train)
    assert ids("train", max_train=10) == few


def test_nothing_is_held_out_where_validation_share_is_zero(tmp_path: Path) -> None:
    data = settings(write(tmp_path / "file.jsonl", *[GOOD] * 8))
    data.validation_share = 0.0
    assert len(load_examples(data, "train", seed=0)) == 8
    assert load_examples(data, "validation", seed=0) == []


def test_smallest_files(tmp_path: Path) -> None:
    assert len(read(tmp_path, GOOD, split="train")) == 1
    assert len(read(tmp_path, GOOD, split="validation")) == 1
    assert len(read(tmp_path, GOOD, GOOD, split="train")) == 1
    assert len(read(tmp_path, GOOD, GOOD, split="validation")) == 1


def test_folders(tmp_path: Path) -> None:
    rows = [{**GOOD, "prompt": f"p{i}"} for i in range(20)]

    def ids(split: str) -> list[str]:
        return [e.id for e in load_examples(settings(tmp_path), split, seed=0)]

    write(tmp_path / "train.jsonl.gz", *rows)
    assert (len(ids("train")), len(ids("validation"))) == (18, 2)
    write(tmp_path / "test.jsonl", *rows[:3])
    assert ids("test") == ["test-0", "test-1", "test-2"]
    assert (len(ids("train")), len(ids("validation"))) == (18, 2)
    write(tmp_path / "dev.jsonl", *rows[:4])
    assert (len(ids("train")), len(ids("validation"))) == (20, 4)
    (tmp_path / "test.jsonl").unlink()
    assert ids("test") == ids("validation") == [f"validation-{i}" for i in range(4)]


def test_history_drops_the_oldest() -> None:
    history = History("<", ("a", "b", "c"), ">", "; ")
    assert history.text == "<a; b; c>"
    assert history.without_oldest(2).text == "<c>"
