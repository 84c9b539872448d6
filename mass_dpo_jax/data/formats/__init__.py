"""Formats of preference data, told by their columns: what other programs write and read.

A file for each family, with a table `FORMATS` at its end: `pairs` (trainers), `graded` (ranked and
graded answers), `retrieval` (queries and passages), `unpaired` (answers with labels). `raw_row` has
what a row becomes. TRL's format is `readers.preferences`; every row that no format here claims is
read as that.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mass_dpo_jax.data.examples import Example, Text, as_answer, check_not_rejected
from mass_dpo_jax.data.fields import check_id, to_json_value
from mass_dpo_jax.data.formats import graded, pairs, retrieval, unpaired
from mass_dpo_jax.data.formats.raw_row import Answer, Format, RawRow
from mass_dpo_jax.data.grouping import Completion
from mass_dpo_jax.data.readers.columns import check_unsupported
from mass_dpo_jax.data.readers.conversations import check_prompt_end, complete_prompt, read_answer
from mass_dpo_jax.data.readers.messages import read_text
from mass_dpo_jax.data.readers.tools import Tool, read_tools
from mass_dpo_jax.errors import UserError

FAMILIES = (pairs, graded, retrieval, unpaired)
FORMATS = {f.name: f for family in FAMILIES for f in family.FORMATS}
TRL = ("chosen", "rejected")
NUM_FIRST_ROWS = 10  # By which a table's format is told.


def tell_format(rows: Iterable[Any], name: str) -> tuple[Format | None, tuple[str, ...]]:
    """Tells the format of a table by its first rows; None for TRL's, or where none fits.

    A format whose columns are all among another's gives way to it: TRL's to what reads a question
    besides. Rows of most of which one format holds are of it.

    Args:
        rows: the first rows; those that are no objects say nothing.
        name: of the table, for messages.

    Returns:
        The format and the columns that told it.

    Raises:
        UserError: a row has the columns of two formats.
    """
    told: list[tuple[Mapping[str, Any], str, tuple[str, ...]]] = []
    for row in rows:
        if not isinstance(row, Mapping):
            continue
        found = {f.name: columns for f in FORMATS.values() if (columns := f.find_columns(row))}
        if all(to_json_value(row.get(column)) is not None for column in TRL):
            found["trl"] = TRL
        names = [one for one in found if not _gives_way(one, found)]
        if len(names) > 1:
            kinds = " and ".join(f"{one} ({', '.join(found[one])})" for one in names)
            raise UserError(
                f"{name}: has the columns of {kinds}; name one of them, as in "
                f"--config.data.format={names[0]}"
            )
        if names:
            told.append((row, names[0], found[names[0]]))
    if not told:
        return None, ()
    counts = Counter((one, columns) for _, one, columns in told)
    [((winner, columns), _)] = counts.most_common(1)
    # Rows in which a column is null, such as a system prompt that not all have, say nothing of it.
    for other, more in counts:
        extra = set(more) - set(columns)
        rows_told = [row for row, one, _ in told if one == winner]
        if set(more) > set(columns) and all(_has_some(row, extra) for row in rows_told):
            winner, columns = other, more
    return FORMATS.get(winner), columns


def _has_some(row: Mapping[str, Any], columns: Iterable[str]) -> bool:
    """Whether some, but not all, of the columns are null or missing."""
    return len({to_json_value(row.get(column)) is None for column in columns}) == 2


def _gives_way(name: str, found: Mapping[str, Sequence[str]]) -> bool:
    """Whether another format has all columns of this one; of two with the same, the first stays."""
    names, own = list(found), set(found[name])
    return any(
        own < set(columns) or (own == set(columns) and names.index(other) < names.index(name))
        for other, columns in found.items()
    )


def look_at(rows: Iterable[tuple[str, Any]]) -> tuple[list[Any], Iterator[tuple[str, Any]]]:
    """Returns the first rows of a table, and an iterator over all with their locations."""
    iterator = iter(rows)
    first = list(itertools.islice(iterator, NUM_FIRST_ROWS))
    return [row for _, row in first], itertools.chain(first, iterator)


def read_formatted(row: Any, row_format: Format, default_id: str, location: str) -> Example:
    """Reads a row of a format.

    Answers become strings, unless they have more than a text. The best ones are chosen, the first
    of them as `Example.chosen`; all others are rejected, in the order of the row. Null answers are
    left out.

    Raises:
        UserError: a field is missing or wrong, an answer is among the chosen and the rejected ones,
            or no answer is better than another.
    """
    raw, answers = _convert(row, row_format, location)
    prompt, texts = _read_texts(raw, answers, location)
    ranks = [answer.rank for answer in answers]
    levels = {rank: level for level, rank in enumerate(sorted(set(ranks)))}
    order = [levels[rank] for rank in ranks]
    best = [i for i, level in enumerate(order) if level == 0]
    worse = [i for i, level in enumerate(order) if level > 0]
    if not worse:
        listed = ", ".join(answer.field for answer in answers[:3])
        what = "is the only answer" if len(answers) == 1 else "are equally good"
        raise UserError(f"{location}: {listed} {what}: expected one that is rejected, or worse")
    for i in best:
        check_not_rejected(texts[i], [texts[j] for j in worse], location)
    indices = [best[0], *worse, *best[1:]]
    scores = [answers[i].score for i in indices]
    return Example(
        check_id(row.get("id"), default_id, location),
        prompt,
        texts[best[0]],
        tuple(texts[i] for i in worse),
        location,
        None if None in scores else tuple(score for score in scores if score is not None),
        tuple(texts[i] for i in best[1:]),
        tuple(order[i] for i in indices) if len(levels) > 2 else None,
        tools=_read_tools(raw, row, location),
    )


def read_completion(row: Any, row_format: Format, default_id: str, location: str) -> Completion:
    """Reads a row of an unpaired format: one answer, which is good or bad.

    Raises:
        UserError: a field is missing or wrong.
    """
    raw, answers = _convert(row, row_format, location)
    prompt, [text] = _read_texts(raw, answers, location)
    name = check_id(row.get("id"), default_id, location)
    tools = _read_tools(raw, row, location)
    return Completion(name, prompt, text, not answers[0].rank, location, tools)


def _convert(row: Any, row_format: Format, location: str) -> tuple[RawRow, list[Answer]]:
    """Returns what a format makes of a row, and those of its answers that are not null."""
    if not isinstance(row, Mapping):
        raise UserError(f"{location}: expected an object in {row_format.title}, found no object")
    check_unsupported(row, location)
    raw = row_format.convert(row, location)
    answers = [answer for answer in raw.answers if to_json_value(answer.text) is not None]
    if not answers:
        raise UserError(f"{location}: field {raw.answers[0].field!r} is null")
    return raw, answers


def _read_tools(raw: RawRow, row: Mapping[str, Any], location: str) -> tuple[Tool, ...]:
    given = row.get("tools") if raw.tools is None else raw.tools
    return read_tools(given, raw.tools_field, location)


def _read_texts(raw: RawRow, answers: Sequence[Answer], location: str) -> tuple[Text, list[Text]]:
    """Reads the prompt and the answers, the prompt's messages removed where they repeat them."""
    prompt = read_text(raw.prompt, raw.prompt_field, location)
    texts: list[Text] = []
    for answer in answers:
        text = read_text(answer.text, answer.field, location)
        if not texts:
            prompt = complete_prompt(prompt, text)
            check_prompt_end(prompt, raw.prompt_field, location)
        texts.append(as_answer(read_answer(prompt, text, answer.field, location)))
    return prompt, texts
