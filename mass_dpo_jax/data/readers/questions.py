"""What multiple-choice readers share: opening rows, comparing texts, and making examples.

The response is the text of an answer, never its letter: letters say nothing without their list.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.data import sources
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.fields import check_string, describe_value
from mass_dpo_jax.data.rows import Table
from mass_dpo_jax.errors import UserError

LISTED = "{}\n\nOne of these is the answer:\n{}\n\nAnswer:\n"
UNLISTED = "{}\n\nAnswer:\n"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its right answer and different wrong ones.

    Attributes:
        id: unique within a split.
        index: its row in the file, from 0.
        text: the question.
        answer: the right answer.
        wrong: wrong answers.
        location: the file and the row, for messages.
    """

    id: str
    index: int
    text: str
    answer: str
    wrong: tuple[str, ...]
    location: str

    @property
    def question(self) -> str:
        """Equal for rows that must not be on both sides of a split."""
        return normalize(self.text)


def open_table(
    data: ConfigDict, split: str, has_answer: Callable[[Mapping[str, Any]], bool]
) -> Table:
    """Opens the rows of a split (see `sources`); a test split needs answers.

    Test splits are published without answers. If no row has one, the split counts as absent, so
    that validation (or what is held out for it) serves as test; the log says so.
    """
    table = sources.open_table(data, split)
    if split != "test" or not sources.has_splits(data):
        return table
    if table.source.name == "test":
        rows = list(table.rows)
        if any(has_answer(row) for _, row in rows if isinstance(row, Mapping)):
            return table._replace(rows=rows)
        _log.info("%s: no row has an answer", table.name)
        table = sources.open_table(data, split, without=("test",))
    rows_used = "rows held out of it" if table.source.part == "held_out" else "its rows"
    _log.info("%s: %s serve as test", table.name, rows_used)
    return table


def check_object(row: Any, fields: Iterable[str], location: str) -> None:
    """Raises UserError where the row is no object or lacks one of the fields."""
    if not isinstance(row, Mapping):
        raise UserError(f"{location}: expected an object, found {describe_value(row)}")
    for field in fields:
        if row.get(field) is None:
            raise UserError(
                f"{location}: field {field!r} is missing; found {', '.join(map(str, row))}"
            )


def check_text(value: Any, field: str, location: str) -> str:
    """Returns the string of `check_string` without white space around it."""
    return check_string(value, field, location).strip()


def normalize(text: str) -> str:
    """Returns a text that is equal for texts that differ in case and white space only."""
    return " ".join(text.casefold().split())


def find_distinct(texts: Iterable[str], without: Iterable[str] = ()) -> tuple[str, ...]:
    """Returns the first of all texts that are equal when normalized, except those in `without`."""
    seen = {normalize(text) for text in without}
    distinct = []
    for text in texts:
        if normalize(text) not in seen:
            seen.add(normalize(text))
            distinct.append(text)
    return tuple(distinct)


def make_example(question: Question, rng: np.random.Generator, list_candidates: bool) -> Example:
    """Makes an example whose candidates are in a random order, the same in prompt and pool."""
    # Sorted first, so that nothing of the file's order is left.
    candidates = sorted((question.answer, *question.wrong))
    candidates = [candidates[i] for i in rng.permutation(len(candidates))]
    prompt = UNLISTED.format(question.text)
    if list_candidates:
        prompt = LISTED.format(question.text, "\n".join(candidates))
    rejected = tuple(text for text in candidates if text != question.answer)
    return Example(question.id, prompt, question.answer, rejected, question.location)
