"""QASC, eight-way questions of grade school science.

Read from AllenAI's JSON lines, `{train,dev,test}.jsonl`, plain or gzip:

    {"id", "question": {"stem", "choices": [{"text", "label"}, ...]}, "answerKey"}

or from the columns of the hub's dataset `allenai/qasc`, where `question` is the stem itself and
`choices` is beside it as {"text": [...], "label": [...]}. The facts, which give the answer away,
and `formatted_question`, which lists the choices with letters, are not used. The published test
split has no answers: validation stands in for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.data import splits
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.fields import check_id, make_type_error
from mass_dpo_jax.data.readers import questions
from mass_dpo_jax.data.readers.questions import Question, check_text
from mass_dpo_jax.data.rows import collect
from mass_dpo_jax.errors import UserError


def load(data: ConfigDict, split: str, seed: int) -> list[Example]:
    """Loads a split of `data.path`; candidates are in an order drawn by seed and row.

    Repeated wrong choices count once. Reads `path`, `list_candidates`, `on_bad_row`,
    `validation_share` and `max_*` of `data`.

    Raises:
        UserError: names the file, the line and the field: something is missing, the answer key is
            no choice, or another choice has the answer's text.
    """
    table = questions.open_table(data, split, lambda row: bool(row.get("answerKey")))

    def make(row: Any, index: int, location: str) -> Question:
        return _read_question(row, index, f"{table.source.name}-{index}", location)

    rows = collect(table, make, data, seed)
    rows = splits.limit(rows, data, split, seed)
    return [
        questions.make_example(q, np.random.default_rng([seed, q.index, 3]), data.list_candidates)
        for q in rows
    ]


def _read_question(row: Any, index: int, default_id: str, location: str) -> Question:
    questions.check_object(row, ("question", "answerKey"), location)
    if isinstance(row["question"], Mapping):
        text, choices = row["question"].get("stem"), row["question"].get("choices")
    else:
        text, choices = row["question"], row.get("choices")
    text = check_text(text, "question", location)
    labels, texts = _read_choices(choices, location)
    key = row["answerKey"]
    if labels.count(key) != 1:
        expected = f"one of the labels {', '.join(map(str, labels))}"
        raise make_type_error(location, "answerKey", expected, key)
    answer = texts.pop(labels.index(key))
    wrong = questions.find_distinct(texts, without=[answer])
    if len(wrong) < len(questions.find_distinct(texts)):
        raise UserError(f"{location}: field 'choices': another choice is {answer!r} too")
    if not wrong:
        raise UserError(f"{location}: field 'choices' has no wrong choice")
    return Question(
        check_id(row.get("id"), default_id, location), index, text, answer, wrong, location
    )


def _read_choices(value: Any, location: str) -> tuple[list[Any], list[str]]:
    """Reads labels and texts from a list of objects, or from an object with two lists."""
    if isinstance(value, Mapping):
        labels, texts = value.get("label"), value.get("text")
    elif isinstance(value, list) and all(isinstance(choice, Mapping) for choice in value):
        labels = [choice.get("label") for choice in value]
        texts = [choice.get("text") for choice in value]
    else:
        labels = texts = None
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        expected = "a list of objects with label and text"
        raise make_type_error(location, "choices", expected, value)
    return labels, [
        check_text(text, f"choices[{i}].text", location) for i, text in enumerate(texts)
    ]
