"""What every format turns a row into: a prompt and answers with ranks, and readers of fields."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mass_dpo_jax.data.fields import describe_value, has_content, make_type_error, to_json_value
from mass_dpo_jax.data.readers.literals import parse_literal
from mass_dpo_jax.data.readers.messages import is_messages, parse_responses
from mass_dpo_jax.errors import UserError

Row = Mapping[str, Any]
MAX_SCORE = 3e38  # Above it, float32 overflows.
TEXT_KEYS = ("text", "response", "answer", "content", "completion", "output", "value")
SCORE_KEYS = ("score", "overall_score", "rating", "reward")


class Answer(NamedTuple):
    """An answer as a row has it.

    Attributes:
        field: where it stands, for messages: "completions[2].response".
        text: a string or chat messages; null where there is none.
        rank: smaller for better, equal where the row prefers neither.
        score: the data's own number for it, larger for better; None without one.
    """

    field: str
    text: Any
    rank: float
    score: float | None = None


class RawRow(NamedTuple):
    """A row of any format: a prompt and the answers to it, in the order of the row.

    Attributes:
        prompt: a string or chat messages.
        prompt_field: where it stands, for messages.
        answers: the answers.
        tools: the functions that the model may call; null for those of the column `tools`.
        tools_field: where they stand.
    """

    prompt: Any
    prompt_field: str
    answers: Sequence[Answer]
    tools: Any = None
    tools_field: str = "tools"


class Format(NamedTuple):
    """One way of writing preferences down.

    Attributes:
        name: its value of `data.format`.
        title: what the log calls it.
        columns: which columns tell it: every set of them that suffices.
        convert: turns a row and its location into a RawRow; raises UserError.
        fits: whether a row with such columns is of this format.
        optional: further columns that are read.
        numbered: begins the names of columns that are numbered: rejected_1, rejected_2, ...
        unpaired: whether a row has a single answer, of rank 0 or 1.
    """

    name: str
    title: str
    columns: tuple[tuple[str, ...], ...]
    convert: Callable[[Row, str], RawRow]
    fits: Callable[[Row], bool] = lambda row: True
    optional: tuple[str, ...] = ()
    numbered: str = ""
    unpaired: bool = False

    def find_columns(self, row: Row) -> tuple[str, ...]:
        """Returns the columns by which a row is of this format; none where it is not."""
        for columns in self.columns:
            if all(to_json_value(row.get(column)) is not None for column in columns):
                if self.fits(row):
                    numbered = list_numbered(row, self.numbered) if self.numbered else []
                    return (*columns, *numbered)
        return ()

    def reads(self, column: str) -> bool:
        """Whether a column is read in some row."""
        if column in self.optional or any(column in columns for columns in self.columns):
            return True
        return bool(self.numbered and _number_of(column, self.numbered) is not None)


def get(row: Row, field: str) -> Any:
    """Returns a field's value in JSON's types, None where it is missing."""
    return to_json_value(row.get(field))


def need(row: Row, field: str, location: str) -> Any:
    """Returns a field's value; raises UserError where it is missing or null."""
    value = get(row, field)
    if value is None:
        if field in row:
            raise UserError(f"{location}: field {field!r} is null")
        columns = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{location}: field {field!r} is missing; found {columns}")
    return value


def find_one(row: Row, fields: Sequence[str], location: str) -> str:
    """Returns the first of some fields that a row has; raises UserError without one."""
    for field in fields:
        if get(row, field) is not None:
            return field
    columns = ", ".join(map(str, row)) or "nothing"
    raise UserError(
        f"{location}: field {' or '.join(map(repr, fields))} is missing; found {columns}"
    )


def read_list(value: Any, field: str, location: str) -> list[Any]:
    """Reads a list that is not empty, also one that a table wrote as text."""
    value = to_json_value(value)
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = parse_literal(value) or value
    if not isinstance(value, list):
        raise make_type_error(location, field, "a list", value)
    if not value:
        raise UserError(f"{location}: field {field!r} is empty")
    return value


def read_objects(value: Any, field: str, location: str) -> list[Row]:
    """Reads a list of objects, also as one object that has a list for each key."""
    value = to_json_value(value)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = parse_literal(value) or value
    if isinstance(value, Mapping):
        columns = {key: to_json_value(column) for key, column in value.items()}
        lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
        if len(lengths) == 1 and min(lengths) > 0:
            rows = zip(*columns.values(), strict=True)
            value = [dict(zip(columns, row, strict=True)) for row in rows]
    for i, item in enumerate(items := read_list(value, field, location)):
        if not isinstance(item, Mapping):
            raise make_type_error(location, f"{field}[{i}]", "an object", item)
    return items


def read_number(value: Any, field: str, location: str) -> float | None:
    """Reads a number, also as text; None for null, and for what is not finite as float32."""
    value = to_json_value(value)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise make_type_error(location, field, "a number", value)
    return float(value) if abs(value) <= MAX_SCORE else None


def need_number(row: Row, key: str, field: str, location: str) -> float:
    """Returns a finite number; raises UserError for a missing one, too."""
    number = read_number(row.get(key), f"{field}{key}", location)
    if number is None:
        raise UserError(
            f"{location}: field {field + key!r} must be a number, found "
            f"{describe_value(to_json_value(row.get(key))) if key in row else 'none'}"
        )
    return number


def check_length(values: Sequence[Any], field: str, expected: int, of: str, location: str) -> None:
    """Raises UserError where a list does not have a value for each answer."""
    if len(values) != expected:
        raise UserError(
            f"{location}: field {field!r} must have a value for each of the {expected} in {of!r}, "
            f"found {len(values)}"
        )


def list_answers(value: Any, field: str, rank: float, location: str) -> list[Answer]:
    """Returns the answers of a field that has one or a list of them, all of one rank.

    A list of messages is one answer; a list of strings written as text is that list.
    """
    value = to_json_value(value)
    if isinstance(value, str):
        value = parse_responses(value, location)
    if not isinstance(value, list) or (value and all(_is_message(item) for item in value)):
        return [Answer(field, value, rank)]
    if not value:
        raise UserError(f"{location}: field {field!r} is empty")
    return [Answer(f"{field}[{i}]", item, rank) for i, item in enumerate(value)]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def list_numbered(row: Row, name: str) -> list[str]:
    """Returns the columns name1, name_2, ... of a row, by their numbers."""
    numbers = {column: _number_of(str(column), name) for column in row}
    return sorted((c for c, n in numbers.items() if n is not None), key=lambda c: numbers[c] or 0)


def _number_of(column: str, name: str) -> int | None:
    match = re.fullmatch(rf"{name}[-_]?(\d+)", column)
    return int(match[1]) if match else None


def add_context(row: Row, prompt: Any, location: str) -> Any:
    """Returns a prompt with the row's `system` and `history` before it, where it has them."""
    system, history = get(row, "system"), get(row, "history")
    messages: list[Any] = []
    if has_content(system):
        if not isinstance(system, str):
            raise make_type_error(location, "system", "a string", system)
        if system.strip():
            messages.append({"role": "system", "content": system})
    if has_content(history):
        for i, turn in enumerate(read_list(history, "history", location)):
            turn = to_json_value(turn)
            if not isinstance(turn, list) or len(turn) != 2 or not all(map(_is_text, turn)):
                expected = "a list of a question and an answer"
                raise make_type_error(location, f"history[{i}]", expected, turn)
            messages.append({"role": "user", "content": turn[0]})
            messages.append({"role": "assistant", "content": turn[1]})
    if not messages:
        return prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if is_messages(prompt) and prompt[0]["role"] == "system" and messages[0]["role"] == "system":
        raise UserError(f"{location}: field 'system' is there, and a system message in the prompt")
    return [*messages, *prompt]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def read_prompt_text(row: Row, fields: Sequence[str], location: str) -> str:
    """Returns the text of one or several fields with line breaks between them; nulls are left out.

    Raises:
        UserError: a field is no string, or all are empty.
    """
    texts = []
    for field in fields:
        value = get(row, field)
        if value is not None and not isinstance(value, str):
            raise make_type_error(location, field, "a string", value)
        if value and value.strip():
            texts.append(value)
    if not texts:
        need(row, fields[0], location)
        raise UserError(f"{location}: field {fields[0]!r} is empty")
    return "\n".join(texts)


def find_text(item: Row, field: str, location: str) -> tuple[str, Any]:
    """Returns the field and the value of an object's text, whatever it is called."""
    for key in TEXT_KEYS:
        if key in item:
            return f"{field}.{key}", item[key]
    raise UserError(
        f"{location}: field {field!r} must have a text ({', '.join(TEXT_KEYS[:4])}, ...), found "
        f"{describe_value(item)}"
    )
