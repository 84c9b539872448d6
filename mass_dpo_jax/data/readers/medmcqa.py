"""MedMCQA, four-way questions of medical entrance exams, with pools enlarged by their subject.

Read from the original JSON lines, `{train,dev,test}.json`, or from the columns of the hub's dataset
`openlifescienceai/medmcqa`, which have the same names:

    {"id", "question", "opa", "opb", "opc", "opd", "cop", "subject_name", ...}

`cop`, the right option, counts from 1 in the original files and from 0 on the hub: from 1 if a 4
occurs in the file, from 0 if a 0 does. The published test split has none (the hub writes -1):
validation stands in for it.

Candidates are the answer, the question's own wrong options and, up to `data.num_candidates`, others
drawn by seed from the options of the file's questions of the same subject, right or wrong ones.
Texts that differ in case and white space only are one, and none but the answer has its text.
Validation and test keep a question's own options if `data.native_eval`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mass_dpo_jax.data import splits, tables
from mass_dpo_jax.data.checks import check_id, kind
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.readers import questions
from mass_dpo_jax.data.readers.questions import Question, check_text
from mass_dpo_jax.errors import UserError

PATTERNS = ("{}.json", "{}.json.gz", "{}.jsonl", "{}.jsonl.gz")
OPTIONS = ("opa", "opb", "opc", "opd")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Asked(Question):
    subject: str


def load(data: Any, split: str, seed: int) -> list[Example]:
    """The examples of a split of `data.path`; candidates are in an order drawn by seed and row.

    Raises:
      UserError: it cannot be told where `cop` counts from; or names the file, the line and the
        field: something is missing, `cop` is no option, every option has the answer's text, the
        subject has fewer than `data.num_candidates` different answers.
    """
    table = questions.open_table(data.path, split, PATTERNS, lambda row: _cop(row) is not None)
    table = table._replace(rows=list(table.rows))
    first = _first_option(table)
    enlarge = split in ("train", "all") or not data.native_eval
    pools = _pools(table) if enlarge else {}

    def make(row: Any, index: int, place: str) -> _Asked:
        question = _question(row, index, f"{table.source.name}-{index}", first, place)
        if enlarge:
            size = len(pools[question.subject])
            if size < data.num_candidates:
                raise UserError(
                    f"{place}: subject_name {question.subject!r} has {size} different answers in "
                    f"the file, config.data.num_candidates={data.num_candidates}"
                )
        return question

    found = tables.collect(table, make, data, seed)
    examples = []
    for question in splits.limit(found, data, split, seed):
        rng = np.random.default_rng([seed, question.index, 3])
        if enlarge:
            question = _enlarged(question, pools[question.subject], data.num_candidates, rng)
        examples.append(questions.to_example(question, rng, data.list_candidates))
    return examples


def _question(row: Any, index: int, default_id: str, first: int, place: str) -> _Asked:
    questions.check_object(row, ("question", *OPTIONS, "subject_name"), place)
    text = check_text(row["question"], "question", place)
    options = [check_text(row[field], field, place) for field in OPTIONS]
    cop = _cop(row)
    if cop is None:
        raise UserError(
            f"{place}: field 'cop' is {row.get('cop')!r}, so no option is the right one"
        )
    if not _is_integer(cop) or not first <= cop < first + len(options):
        raise UserError(
            f"{place}: field 'cop' must be an option's number from {first} to "
            f"{first + len(options) - 1}, found {kind(cop)}"
        )
    answer = options[cop - first]
    wrong = questions.distinct(options, without=[answer])
    if not wrong:
        raise UserError(f"{place}: every option is {answer!r}")
    subject = check_text(row["subject_name"], "subject_name", place)
    name = check_id(row.get("id"), default_id, place)
    return _Asked(name, index, text, answer, wrong, place, subject)


def _enlarged(
    question: _Asked, pool: Sequence[str], num_candidates: int, rng: np.random.Generator
) -> _Asked:
    """The question with wrong answers of its subject, so that it has so many candidates."""
    own = (question.answer, *question.wrong)
    missing = max(0, num_candidates - len(own))
    sample = rng.choice(len(pool), min(len(pool), missing + len(own)), replace=False)
    others = questions.distinct((pool[i] for i in sample), without=own)
    return dataclasses.replace(question, wrong=(*question.wrong, *others[:missing]))


def _pools(table: tables.Table) -> dict[str, tuple[str, ...]]:
    """The different answers to a subject's questions, in the order of the file.

    A row that cannot be read adds nothing here: it is `_question` that says what is wrong with it.
    """
    found: dict[str, list[str]] = {}
    for _, row in table.rows:
        if isinstance(row, Mapping) and isinstance(row.get("subject_name"), str):
            options = [row.get(field) for field in OPTIONS]
            texts = [text.strip() for text in options if isinstance(text, str) and text.strip()]
            found.setdefault(row["subject_name"].strip(), []).extend(texts)
    return {subject: questions.distinct(texts) for subject, texts in found.items()}


def _first_option(table: tables.Table) -> int:
    """The number of the first option in this file: 0 or 1."""
    rows = [row for _, row in table.rows if isinstance(row, Mapping)]
    seen = {cop for cop in map(_cop, rows) if _is_integer(cop)}
    if not seen:
        return 1  # No row can be used, which the first one's message will say.
    if (0 in seen) == (4 in seen):
        raise UserError(
            f"{table.name}: cannot tell whether field 'cop' counts from 0 or from 1: expected a 0 "
            f"or a 4 in some row, and not both, found {', '.join(map(str, sorted(seen)))}"
        )
    first = 0 if 0 in seen else 1
    _log.info("%s: field 'cop' counts options from %d", table.name, first)
    return first


def _cop(row: Mapping[str, Any]) -> Any:
    """The field, a number in quotes as a number; None where it says that there is no answer."""
    cop = row.get("cop")
    if isinstance(cop, str) and cop.strip() in tuple("01234"):
        return int(cop)
    return None if cop in (None, "", -1) else cop


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
