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

from mass_dpo_jax.data import splits, tables
from mass_dpo_jax.data.checks import check_id, kind
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.readers import questions
from mass_dpo_jax.data.readers.questions import Question, check_text
from mass_dpo_jax.errors import UserError

PATTERNS = ("{}.jsonl", "{}.jsonl.gz")


def load(data: Any, split: str, seed: int) -> list[Example]:
    """The examples of a split of `data.path`; candidates are in an order drawn by seed and row.

    Raises:
      UserError: names the file, the line and the field: something is missing, the answer key is no
        choice, or another choice has the answer's text. Repeated wrong choices count once.
    """
    table = questions.open_table(data.path, split, PATTERNS, lambda row: bool(row.get("answerKey")))

    def make(row: Any, index: int, place: str) -> Question:
        return _question(row, index, f"{table.source.name}-{index}", place)

    found = tables.collect(table, make, data, seed)
    found = splits.limit(found, data, split, seed)
    return [
        questions.to_example(q, np.random.default_rng([seed, q.index, 3]), data.list_candidates)
        for q in found
    ]


def _question(row: Any, index: int, default_id: str, place: str) -> Question:
    questions.check_object(row, ("question", "answerKey"), place)
    if isinstance(row["question"], Mapping):
        text, choices = row["question"].get("stem"), row["question"].get("choices")
    else:
        text, choices = row["question"], row.get("choices")
    text = check_text(text, "question", place)
    labels, texts = _choices(choices, place)
    key = row["answerKey"]
    if labels.count(key) != 1:
        raise UserError(
            f"{place}: field 'answerKey' must be one of the labels {', '.join(map(str, labels))}, "
            f"found {kind(key)}"
        )
    answer = texts.pop(labels.index(key))
    wrong = questions.distinct(texts, without=[answer])
    if len(wrong) < len(questions.distinct(texts)):
        raise UserError(f"{place}: field 'choices': another choice is {answer!r} too")
    if not wrong:
        raise UserError(f"{place}: field 'choices' has no wrong choice")
    return Question(check_id(row.get("id"), default_id, place), index, text, answer, wrong, place)


def _choices(value: Any, place: str) -> tuple[list[Any], list[str]]:
    """Labels and texts, of a list of objects or of an object with two lists."""
    if isinstance(value, Mapping):
        labels, texts = value.get("label"), value.get("text")
    elif isinstance(value, list) and all(isinstance(choice, Mapping) for choice in value):
        labels = [choice.get("label") for choice in value]
        texts = [choice.get("text") for choice in value]
    else:
        labels = texts = None
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        raise UserError(
            f"{place}: field 'choices' must be a list of objects with label and text, "
            f"found {kind(value)}"
        )
    return labels, [check_text(text, f"choices[{i}].text", place) for i, text in enumerate(texts)]
