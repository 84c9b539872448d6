"""Preference rows: `{"id"?, "prompt"?, "chosen", "rejected", ...}`, a superset of TRL's format.

`load` reads files and datasets, `read_preferences` also the library's own rows; `read_row` says
what a row may look like.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mass_dpo_jax.data import formats, sources
from mass_dpo_jax.data.examples import Example, Message, Text, check_not_rejected
from mass_dpo_jax.data.fields import (
    check_id,
    describe_value,
    make_type_error,
    to_json_value,
)
from mass_dpo_jax.data.grouping import Completion, group_by_prompt
from mass_dpo_jax.data.readers.columns import (
    check_unsupported,
    describe_absent,
    has_prompt_elsewhere,
    parse_columns,
    rename_columns,
)
from mass_dpo_jax.data.readers.conversations import (
    check_prompt_end,
    complete_prompt,
    read_answer,
)
from mass_dpo_jax.data.readers.messages import is_data, is_simple, parse_responses, read_text
from mass_dpo_jax.data.readers.row_warnings import RowWarnings
from mass_dpo_jax.data.readers.tools import read_tools
from mass_dpo_jax.data.rows import Table, read_items, take_part
from mass_dpo_jax.errors import UserError

MAX_SCORE = 3e38  # Above it, float32 overflows.
_log = logging.getLogger(__name__)


def load(data: ConfigDict, split: str, seed: int) -> list[Example]:
    """Loads a split of the files or the dataset `data.path`, see `sources` and `splits`.

    An example without an id is named after its split (or file) and its row, counted from 0. Reads
    `path`, `subset`, `splits` and `validation_share` of `data`, and what `read_preferences` reads.

    Raises:
        UserError: the data cannot be read, or a row is wrong: names it and the field.
    """
    table = sources.open_table(data, split)
    examples = read_preferences(table, f"{table.source.name}-", data, log_once=True)
    return take_part(table, examples, data, seed)


def read_preferences(
    table: Table, prefix: str, data: ConfigDict, log_once: bool = False
) -> list[Example]:
    """Reads all examples of a table, and logs what looks wrong with its rows as a whole.

    With `data.group` = "prompt" there is one for each prompt.

    Args:
        table: the rows; those that are Examples already are taken as they are.
        prefix: an example without an id is named by it and the row's index.
        data: the configuration's `data`. Reads `columns`, `format`, `group`, `chat_template`,
            `on_bad_row`.
        log_once: whether not to repeat a warning for another split of the same rows.

    Raises:
        UserError: a row cannot be used or an id occurs twice, unless `data.on_bad_row` is "skip";
            or no row is left.
    """
    names = parse_columns(data.columns)
    has_rejected = names.get("rejected") != ""
    row_format, table = _tell_format(table, names, data.format)
    warnings = RowWarnings(table.name, data.chat_template != "none", row_format)
    grouped = data.group == "prompt"
    if row_format is not None and row_format.unpaired and not grouped:
        raise UserError(
            f"{table.name}: has one answer a row, with a label that says whether it is good "
            f"({row_format.title}): set --config.data.group=prompt, which makes one pool of all "
            "answers to a prompt"
        )

    def make(row: Any, i: int, location: str) -> Example | Completion:
        if isinstance(row, Example):
            return row
        row = rename_columns(row, names, location)
        example: Example | Completion
        if row_format is None:
            example = read_row(row, f"{prefix}{i}", location, has_rejected)
        elif row_format.unpaired:
            example = formats.read_completion(row, row_format, f"{prefix}{i}", location)
        else:
            example = formats.read_formatted(row, row_format, f"{prefix}{i}", location)
        warnings.add(row, example)
        return example

    renamings = [f"{ours}={theirs}" for ours, theirs in names.items() if ours != "id"]
    setting = ",".join(["id=", *renamings])
    advice = (
        f"; several rows of one prompt? --config.data.columns={setting} numbers rows instead; "
        "--config.data.group=prompt makes one pool of them"
    )
    rows = read_items(table, make, data.on_bad_row, advice, unique_ids=not grouped)
    warnings.log(log_once)
    if grouped:
        return group_by_prompt(rows, table.name)
    return [row for row in rows if isinstance(row, Example)]


def _tell_format(
    table: Table, names: Mapping[str, str], name: str
) -> tuple[formats.Format | None, Table]:
    """Returns the format that `data.format` names or the first rows tell, and the whole table."""
    if name != "auto":
        return formats.FORMATS.get(name), table
    first, rows = formats.look_at(table.rows)
    known = [rename_columns(row, names, "") for row in first if _has_columns(row, names)]
    row_format, columns = formats.tell_format(known, table.name)
    if row_format is not None:
        _log.info("%s: read as %s (%s)", table.name, row_format.title, ", ".join(columns))
    return row_format, table._replace(rows=rows)


def _has_columns(row: Any, names: Mapping[str, str]) -> bool:
    return isinstance(row, Mapping) and all(name in row for name in names.values() if name)


def read_row(row: Any, default_id: str, location: str, has_rejected: bool = True) -> Example:
    """Reads the example in a row `{"id"?, "prompt"?, "chosen", "rejected", ...}`.

    Prompt and responses are strings or chat messages; one message stands for a list of it.
    `rejected` is one response or a list of them, in which a null is no response; a list of messages
    is one response. Without a `prompt`, it is the beginning that chosen and rejected share: in
    conversations all but the last message; in strings the common characters, except for a space
    before the responses, as in TRL. A conversation may repeat the prompt before its answer, also
    where the prompt is the text of its last question.

    A string that is a list of messages, as JSON or as Python prints it, is read as that list. A
    string in `rejected` that is a list of strings, or of lists of messages, is read as that list,
    unless chosen is a list or an object written as a string: then these are answers in JSON. All
    other JSON in strings is text.

    `score_chosen`, a number, and `score_rejected`, a list with a number for each rejected response
    (or one number, for one), are optional grades; a row in which one is null or not finite has
    none. `mined_probabilities`, likewise a list, has the probability with which each rejected
    response was drawn, as `mine` writes it. `tools` are functions that the model may call (module
    `tools`). Other columns are ignored, see `RowWarnings`, except for UNSUPPORTED_COLUMNS. Without
    rejected responses (`has_rejected`) none of the columns about them is read.

    Raises:
        UserError: a field is missing, empty or of the wrong type, the chosen response is also among
            the rejected ones, or there is a wrong number of scores. Rejected responses may repeat
            (drawn twice from a model, say).
    """
    if not isinstance(row, Mapping):
        raise UserError(
            f"{location}: expected an object with prompt, chosen, rejected; found "
            f"{describe_value(row)}"
        )
    for field in ("chosen", "rejected") if has_rejected else ("chosen", "prompt"):
        if to_json_value(row.get(field)) is None:
            raise UserError(f"{location}: {describe_absent(row, field)}")
    check_unsupported(row, location)
    chosen = read_text(row["chosen"], "chosen", location)
    single = isinstance(to_json_value(row["chosen"]), Mapping)
    listed = _read_rejected(row["rejected"], chosen, single, location) if has_rejected else []
    rejected = [text for text in listed if text is not None]
    prompt: Text
    if to_json_value(row.get("prompt")) is not None:
        prompt = complete_prompt(read_text(row["prompt"], "prompt", location), chosen)
    elif has_prompt_elsewhere(row, chosen):
        raise UserError(f"{location}: {describe_absent(row, 'prompt')}")
    elif isinstance(chosen, str):
        prompt, chosen, rejected = _split_common_start(chosen, rejected, location)
    else:
        prompt = _split_last_message(chosen, location)
    check_prompt_end(prompt, "prompt", location)
    chosen = read_answer(prompt, chosen, "chosen", location)
    indices = (i for i, text in enumerate(listed) if text is not None)
    rejected = [
        read_answer(prompt, text, f"rejected[{i}]", location)
        for i, text in zip(indices, rejected, strict=True)
    ]
    check_not_rejected(chosen, rejected, location)
    name = check_id(row.get("id"), default_id, location)
    scores = _read_scores(row, listed, location) if has_rejected else None
    probabilities = _read_probabilities(row, listed, location) if has_rejected else None
    tools = read_tools(row.get("tools"), "tools", location)
    return Example(
        name, prompt, chosen, tuple(rejected), location, scores,
        probabilities=probabilities, tools=tools,
    )  # fmt: skip


def _read_scores(
    row: Mapping[str, Any], listed: Sequence[Text | None], location: str
) -> tuple[float, ...] | None:
    """Reads the scores of the chosen and the rejected responses; None where one has none."""
    fields = ("score_chosen", "score_rejected")
    present = [field for field in fields if to_json_value(row.get(field)) is not None]
    if len(present) == 1 and len(set(fields) & set(row)) == 1:
        [missing] = set(fields) - set(present)
        raise UserError(f"{location}: field {present[0]!r} is there, but {missing!r} is missing")
    if len(present) < 2:
        return None
    scores = _read_list(row, "score_rejected", listed, location)
    scores.insert(0, _read_number(row["score_chosen"], "score_chosen", location))
    return None if None in scores else tuple(score for score in scores if score is not None)


def _read_probabilities(
    row: Mapping[str, Any], listed: Sequence[Text | None], location: str
) -> tuple[float, ...] | None:
    """Reads `mined_probabilities`; None without them."""
    field = "mined_probabilities"
    if to_json_value(row.get(field)) is None:
        return None
    values = _read_list(row, field, listed, location)
    for value in values:
        if value is None or not 0 < value <= 1:
            raise UserError(
                f"{location}: field {field!r}: found {'null' if value is None else value}, "
                "expected a probability above 0 and at most 1 for each rejected response; "
                f"--config.data.columns={field}= reads none"
            )
    return tuple(value for value in values if value is not None)


def _read_list(
    row: Mapping[str, Any], field: str, listed: Sequence[Text | None], location: str
) -> list[float | None]:
    """Reads a field with a number for each rejected response that is not null."""
    values = to_json_value(row[field])
    values = values if isinstance(values, list) else [values]
    if len(values) != len(listed):
        raise UserError(
            f"{location}: field {field!r} must have a number for each of the {len(listed)} "
            f"rejected response(s), found {len(values)}"
        )
    return [
        _read_number(value, f"{field}[{i}]", location)
        for i, (value, response) in enumerate(zip(values, listed, strict=True))
        if response is not None
    ]


def _read_number(value: Any, field: str, location: str) -> float | None:
    """Reads a number; None for null, and for what is not finite as float32."""
    value = to_json_value(value)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise make_type_error(location, field, "a number", value)
    return float(value) if abs(value) <= MAX_SCORE else None


def _read_rejected(value: Any, chosen: Text, single: bool, location: str) -> list[Text | None]:
    """Reads the rejected responses; None where a list of them has null.

    A list of messages is one response, or several where responses are `single` messages.
    """
    value = to_json_value(value)
    if isinstance(value, str) and not is_data(chosen):
        value = parse_responses(value, location)
    if isinstance(value, str) or (isinstance(value, Mapping) and "role" in value):
        return [read_text(value, "rejected", location)]
    if not isinstance(value, list):
        expected = "a response or a list of responses"
        raise make_type_error(location, "rejected", expected, value)
    if all(map(is_simple, value)) and value:
        return value
    value = [to_json_value(v) for v in value]
    present = [v for v in value if v is not None]
    if not present:
        raise UserError(f"{location}: field 'rejected' is empty")
    if not single and all(isinstance(v, Mapping) and ("role" in v or "from" in v) for v in present):
        return [read_text(present, "rejected", location)]
    return [
        None if v is None else read_text(v, f"rejected[{i}]", location) for i, v in enumerate(value)
    ]


def _split_common_start(
    chosen: str, rejected: Sequence[Text], location: str
) -> tuple[str, str, list[Text]]:
    """Splits off the prompt that all texts start with; returns it and what is left of them."""
    check_not_rejected(chosen, rejected, location)
    texts = [chosen]
    for i, response in enumerate(rejected):
        if not isinstance(response, str):
            raise UserError(
                f"{location}: field 'prompt' is missing, and 'chosen' is a string where "
                f"'rejected[{i}]' is a conversation: expected all of one kind"
            )
        texts.append(response)
    first, last = min(texts), max(texts)  # In sorted order, what these two share all texts share.
    length = next((i for i, c in enumerate(first) if c != last[i]), len(first))
    if length and chosen[length - 1] == " ":
        length -= 1
    responses = [text[length:] for text in texts]
    if not chosen[:length].strip():
        raise UserError(
            f"{location}: field 'prompt' is missing, and chosen and rejected have no text in "
            "common at their start"
        )
    for i, text in enumerate(responses):
        if not text.strip():
            field = f"rejected[{i - 1}]" if i else "chosen"
            raise UserError(
                f"{location}: field 'prompt' is missing, and all of {field!r} is the start of the "
                "others: nothing is left for a response"
            )
    return chosen[:length], responses[0], list(responses[1:])


def _split_last_message(chosen: list[Message], location: str) -> list[Message]:
    if len(chosen) < 2:
        raise UserError(
            f"{location}: field 'prompt' is missing and 'chosen' has one message only, so there is "
            "nothing before the answer"
        )
    if chosen[-2]["role"] == "assistant":
        raise UserError(
            f"{location}: field 'chosen' ends with two messages of role 'assistant', and field "
            "'prompt' is missing: expected a question, or a tool's answer, before the last one"
        )
    return chosen[:-1]
