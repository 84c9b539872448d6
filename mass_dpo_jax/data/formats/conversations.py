"""Conversations as ShareGPT and ms-swift write them, as chat messages with role and content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mass_dpo_jax.data.fields import describe_value, make_type_error, to_json_value
from mass_dpo_jax.data.formats.raw_row import read_list
from mass_dpo_jax.data.readers.literals import parse_literal
from mass_dpo_jax.data.readers.tools import join_calls
from mass_dpo_jax.errors import UserError

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system", "observation": "tool", "tool": "tool", "function_call": "tool_call",
}  # fmt: skip


def read_messages(value: Any, field: str, location: str) -> list[Any]:
    """Returns the messages of a list, of a single one, or of a text, which is an answer's.

    Calls of functions in messages of their own become those of a message of the assistant.
    """
    value = to_json_value(value)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = parse_literal(value) or value
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = [value] if isinstance(value, Mapping) else read_list(value, field, location)
    converted = [
        _read_message(message, f"{field}[{i}]" if messages is value else field, location)
        for i, message in enumerate(messages)
    ]
    return join_calls(converted, field, location)


def _read_message(value: Any, field: str, location: str) -> Any:
    if not isinstance(value, Mapping) or ("from" not in value and "role" not in value):
        raise make_type_error(location, field, "a message with from and value", value)
    if "from" not in value:
        return value
    role = SHAREGPT_ROLES.get(str(value["from"]).lower())
    if role is None or "value" not in value:
        raise UserError(
            f"{location}: field {field!r} must have from (human, gpt, system, function_call, "
            "observation) and value, found "
            f"{describe_value(value['from'] if role is None else value)}"
        )
    return {"role": role, "content": value["value"]}
