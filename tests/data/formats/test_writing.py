"""Rows that `select` and `mine` write for other programs are read as the same examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.examples import Example, as_answer, as_text
from mass_dpo_jax.data.formats.writing import WRITTEN, convert_rows
from mass_dpo_jax.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Why?", "chosen": "So.", "rejected": ["No.", "Yes.", "Émile, \"x\"\n"],
     "mined_scores": [0.5, 0.25, -1.0], "mined_probabilities": [1.0, 0.5, 0.1]},
    {"id": "b", "prompt": "When?", "chosen": "Now.", "rejected": ["Never."],
     "mined_scores": [0.125], "mined_probabilities": [1.0]},
]  # fmt: skip
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}


def read_again(rows: list[dict[str, Any]], folder: Path, name: str) -> list[Example]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_lib.default()
    config.data.update(path=str(path), format=name, validation_share=0.0)
    config.data.columns = "mined_probabilities="
    return list(load_examples(config.data, "train", 0))


def question(example: Example) -> str:
    prompt = as_text(example.prompt)
    if isinstance(prompt, str):
        return prompt
    [message] = prompt
    return str(message["content"])


def test_the_formats_that_are_offered_are_those_that_are_written() -> None:
    assert tuple(WRITTEN) == config_lib.WRITTEN_FORMATS


@pytest.mark.parametrize("name", list(config_lib.WRITTEN_FORMATS))
@pytest.mark.parametrize("as_messages", [False, True])
def test_rows_are_read_as_what_was_written(tmp_path: Path, name: str, as_messages: bool) -> None:
    rows = ROWS
    if as_messages:
        rows = [
            {
                **row,
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [[{"role": "assistant", "content": x}] for x in row["rejected"]],
            }
            for row in ROWS
        ]
    written = list(convert_rows(rows, name, chat=False))
    examples = read_again(written, tmp_path, "auto")
    found = [
        (question(e), as_answer(e.chosen), [as_answer(x) for x in e.rejected]) for e in examples
    ]
    wanted = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
    if name == "pairs":
        wanted = [(q, chosen, [x]) for q, chosen, rejected in wanted for x in rejected]
        assert [row["mined_score"] for row in written] == [0.5, 0.25, -1.0, 0.125]
    else:
        assert [row["mined_scores"] for row in written] == [row["mined_scores"] for row in ROWS]
    assert found == wanted
    assert [e.id for e in examples] == [row["id"] for row in written]


@pytest.mark.parametrize(
    ("row", "name", "message"),
    [
        ({"prompt": [{"role": "user", "content": "a"}] * 3}, "flagembedding", "several messages"),
        ({"prompt": [{"role": "user", "content": "a"}] * 3}, "sentence-transformers", "queries"),
        ({"tools": [{"name": "f"}]}, "flagembedding", "row 'a': the prompt has tools"),
        ({"chosen": [CALL]}, "flagembedding", r"has more than a text \(calls or thoughts\)"),
        ({"rejected": [[CALL]]}, "ms-swift", "expected --format=lists or pairs"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(
    row: dict[str, Any], name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(convert_rows([ROWS[0] | row], name, chat=False))


def test_numbers_without_texts_are_lists_or_pairs() -> None:
    numbers = {"id": 0, "selected": [3, 1], "gains": [2.0, 1.0]}
    assert list(convert_rows([numbers], "lists", chat=False)) == [numbers]
    assert [row["selected"] for row in convert_rows([numbers], "pairs", chat=False)] == [3, 1]
    with pytest.raises(UserError, match=r"expected --config\.data\.path"):
        list(convert_rows([numbers], "ms-swift", chat=False))
