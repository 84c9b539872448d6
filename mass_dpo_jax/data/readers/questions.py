"""What sets of multiple-choice questions share: where rows come from, and what a row becomes.

The response is the text of an answer, never its letter: letters say nothing without their list.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mass_dpo_jax.data import splits, tables
from mass_dpo_jax.data.checks import check_string, kind
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.readers import hub
from mass_dpo_jax.errors import UserError

LISTED = "{}\n\nOne of these is the answer:\n{}\n\nAnswer:\n"
UNLISTED = "{}\n\nAnswer:\n"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its right answer and different wrong ones."""

    id: str
    index: int  # Its row in the file, from 0.
    text: str
    answer: str
    wrong: tuple[str, ...]
    place: str

    @property
    def question(self) -> str:
        """What rows must not share across a split."""
        return same(self.text)


def open_table(
    path: str, split: str, patterns: Sequence[str], has_answer: Callable[[Mapping[str, Any]], bool]
) -> tables.Table:
    """The rows of JSON lines or of a dataset (see `hub`); a test split needs answers.

    Test splits are published without them. Where no row of one has an answer, it counts as absent,
    so that validation (or what is held out for it) serves as test; the log says so.
    """
    table = _open(path, split, patterns, ())
    if split != "test" or Path(path).is_file():
        return table
    if table.source.name == "test":
        rows = list(table.rows)
        if any(has_answer(row) for _, row in rows if isinstance(row, Mapping)):
            return table._replace(rows=rows)
        _log.info("%s: no row has an answer", table.name)
        table = _open(path, split, patterns, ("test",))
    rows_of = "rows held out of it" if table.source.part == "held_out" else "its rows"
    _log.info("%s: %s serve as test", table.name, rows_of)
    return table


def _open(path: str, split: str, patterns: Sequence[str], without: Collection[str]) -> tables.Table:
    folder = Path(path)
    if folder.exists() and not splits.is_dataset(folder):
        return tables.open_files(folder, split, patterns, without)
    return hub.open_dataset(path, split, without)


def check_object(row: Any, fields: Iterable[str], place: str) -> None:
    """Raises UserError where the row is no object or lacks one of the fields."""
    if not isinstance(row, Mapping):
        raise UserError(f"{place}: expected an object, found {kind(row)}")
    for field in fields:
        if row.get(field) is None:
            raise UserError(
                f"{place}: field {field!r} is missing; found {', '.join(map(str, row))}"
            )


def check_text(value: Any, field: str, place: str) -> str:
    """`check_string`, without white space around it."""
    return check_string(value, field, place).strip()


def same(text: str) -> str:
    """Equal for two texts that differ in case and white space only."""
    return " ".join(text.casefold().split())


def distinct(texts: Iterable[str], without: Iterable[str] = ()) -> tuple[str, ...]:
    """The first of each text in the sense of `same`, but for those in `without`."""
    seen = {same(text) for text in without}
    found = []
    for text in texts:
        if same(text) not in seen:
            seen.add(same(text))
            found.append(text)
    return tuple(found)


def to_example(question: Question, rng: np.random.Generator, list_candidates: bool) -> Example:
    """The question with its candidates in an order drawn by `rng`, the same in prompt and pool."""
    # Sorted first, so that nothing of the file's order is left.
    candidates = sorted((question.answer, *question.wrong))
    candidates = [candidates[i] for i in rng.permutation(len(candidates))]
    prompt = UNLISTED.format(question.text)
    if list_candidates:
        prompt = LISTED.format(question.text, "\n".join(candidates))
    rejected = tuple(text for text in candidates if text != question.answer)
    return Example(question.id, prompt, question.answer, rejected, question.place)
