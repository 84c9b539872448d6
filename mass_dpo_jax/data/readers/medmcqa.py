"""MedMCQA, four-way questions of medical entrance exams, with pools enlarged by their subject.

Read from the original JSON lines, `{train,dev,test}.json`, or from the columns of the hub's dataset
`openlifescienceai/medmcqa`, which have the same names:

    {"id", "question", "opa", "opb", "opc", "opd", "cop", "subject_name", ...}

`cop`, the right option, counts from 1 in the original files and from 0 on the hub: from 1 if a 4
occurs in the file, from 0 if a 0 does. The published test split has none (the hub writes -1), so
validation stands in for it.

Candidates are the answer, the question's own wrong options and, up to `data.num_candidates`, others
drawn by seed from the options, right or wrong, of the file's questions of the same subject. Texts
that differ in case and white space only count as one, and only the answer has its own text.
Validation and test keep a question's own options if `data.native_eval`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.data import splits
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.fields import check_id, make_type_error
from mass_dpo_jax.data.readers import questions
from mass_dpo_jax.data.readers.questions import Question, check_text
from mass_dpo_jax.data.rows import Table, collect
from mass_dpo_jax.errors import UserError

OPTIONS = ("opa", "opb", "opc", "opd")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _SubjectQuestion(Question):
    subject: str


def load(data: ConfigDict, split: str, seed: int) -> list[Example]:
    """Loads a split of `data.path`; candidates are in an order drawn by seed and row.

    Reads `path`, `num_candidates`, `native_eval`, `list_candidates`, `on_bad_row`,
    `validation_share` and `max_*` of `data`.

    Raises:
        UserError: it is unclear where `cop` counts from; or names the file, the line and the field:
            something is missing, `cop` is no option, every option has the answer's text, or the
            subject has fewer than `data.num_candidates` different answers.
    """
    table = questions.open_table(data, split, lambda row: _read_cop(row) is not None)
    table = table._replace(rows=list(table.rows))
    first = _find_first_option(table)
    enlarge = split in ("train", "all") or not data.native_eval
    pools = _make_pools(table) if enlarge else {}

    def make(row: Any, index: int, location: str) -> _SubjectQuestion:
        question = _read_question(row, index, f"{table.source.name}-{index}", first, location)
        if enlarge:
            size = len(pools[question.subject])
            if size < data.num_candidates:
                raise UserError(
                    f"{location}: subject_name {question.subject!r} has {size} different answers "
                    f"in the file, config.data.num_candidates={data.num_candidates}"
                )
        return question

    rows = collect(table, make, data, seed)
    examples = []
    for question in splits.limit(rows, data, split, seed):
        rng = np.random.default_rng([seed, question.index, 3])
        if enlarge:
            question = _enlarge(question, pools[question.subject], data.num_candidates, rng)
        examples.append(questions.make_example(question, rng, data.list_candidates))
    return examples


def _read_question(
    row: Any, index: int, default_id: str, first: int, location: str
) -> _SubjectQuestion:
    questions.check_object(row, ("question", *OPTIONS, "subject_name"), location)
    text = check_text(row["question"], "question", location)
    options = [check_text(row[field], field, location) for field in OPTIONS]
    cop = _read_cop(row)
    if cop is None:
        raise UserError(
            f"{location}: field 'cop' is {row.get('cop')!r}, so no option is the right one"
        )
    if not _is_integer(cop) or not first <= cop < first + len(options):
        expected = f"an option's number from {first} to {first + len(options) - 1}"
        raise make_type_error(location, "cop", expected, cop)
    answer = options[cop - first]
    wrong = questions.find_distinct(options, without=[answer])
    if not wrong:
        raise UserError(f"{location}: every option is {answer!r}")
    subject = check_text(row["subject_name"], "subject_name", location)
    name = check_id(row.get("id"), default_id, location)
    return _SubjectQuestion(name, index, text, answer, wrong, location, subject)


def _enlarge(
    question: _SubjectQuestion, pool: Sequence[str], num_candidates: int, rng: np.random.Generator
) -> _SubjectQuestion:
    """Adds wrong answers of the subject, up to `num_candidates` candidates."""
    options = (question.answer, *question.wrong)
    missing = max(0, num_candidates - len(options))
    sample = rng.choice(len(pool), min(len(pool), missing + len(options)), replace=False)
    drawn = questions.find_distinct((pool[i] for i in sample), without=options)
    return dataclasses.replace(question, wrong=(*question.wrong, *drawn[:missing]))


def _make_pools(table: Table) -> dict[str, tuple[str, ...]]:
    """Collects each subject's different answers, in the order of the file.

    Ignores rows that cannot be read: `_read_question` reports what is wrong with them.
    """
    texts: dict[str, list[str]] = {}
    for _, row in table.rows:
        if isinstance(row, Mapping) and isinstance(row.get("subject_name"), str):
            options = [row.get(field) for field in OPTIONS]
            filled = [text.strip() for text in options if isinstance(text, str) and text.strip()]
            texts.setdefault(row["subject_name"].strip(), []).extend(filled)
    return {subject: questions.find_distinct(answers) for subject, answers in texts.items()}


def _find_first_option(table: Table) -> int:
    """Returns the number of the first option in this file: 0 or 1."""
    rows = [row for _, row in table.rows if isinstance(row, Mapping)]
    seen = {cop for cop in map(_read_cop, rows) if _is_integer(cop)}
    if not seen:
        return 1  # No row can be used, which the first one's error will say.
    if (0 in seen) == (4 in seen):
        raise UserError(
            f"{table.name}: cannot tell whether field 'cop' counts from 0 or from 1: expected a 0 "
            f"or a 4 in some row, and not both, found {', '.join(map(str, sorted(seen)))}"
        )
    first = 0 if 0 in seen else 1
    _log.info("%s: field 'cop' counts options from %d", table.name, first)
    return first


def _read_cop(row: Mapping[str, Any]) -> Any:
    """Returns the field `cop`, also from a number in quotes; None where there is no answer."""
    cop = row.get("cop")
    if isinstance(cop, str) and cop.strip() in tuple("01234"):
        return int(cop)
    return None if cop in (None, "", -1) else cop


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
