"""Texts of a preference row: strings, chat messages, and lists of them written as text.

Tables write lists as text, as CSV does: `[{"role": "user", ...}]`, in JSON or as Python prints
them. An answer may itself be JSON, so little is taken for anything but text: chat messages with a
known role and nothing else beside them; and a list of responses in place of several ones, where the
chosen response is no list or object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from mass_dpo_jax.data.examples import REASONING, Message, Text
from mass_dpo_jax.data.fields import (
    check_string,
    describe_value,
    has_content,
    make_type_error,
    to_json_value,
)
from mass_dpo_jax.data.readers.literals import has_adjacent_strings, parse_literal
from mass_dpo_jax.data.readers.tools import CALL_ROLES, RETURN_ROLES, join_calls, read_calls
from mass_dpo_jax.errors import UserError

TOOL_ROLES = ("tool", "function", "ipython")  # What a function returned.
ROLES = ("system", "developer", "user", "assistant", *TOOL_ROLES, *CALL_ROLES, *RETURN_ROLES)

# Keys of messages that change what is said, and what to do about them.
_UNSUPPORTED_KEYS = {
    "function_call": "is not read: write it as tool_calls, a list of calls",
    **dict.fromkeys(("images", "image", "videos", "audio"), "models with images are not supported"),
}
_READ_KEYS = ("tool_calls", "tool_call_id", "name", *REASONING)
_READ_OF = {  # The roles whose messages have a key.
    "tool_call_id": TOOL_ROLES,
    **dict.fromkeys(("tool_calls", *REASONING), ("assistant",)),
}
# The start of a list of objects with such a first key, and a known role.
_MESSAGES = re.compile(r"""\s*\[[\s\[]*\{\s*(['"])(?:role|content)\1\s*:""")
_ROLE = re.compile(rf"""(['"])role\1\s*:\s*(['"])(?:{"|".join(ROLES)})\2""")
_FENCED = re.compile(r"\s*```\w*\n(.*?)```\s*", re.S)
_SHAREGPT = re.compile(r"""\s*\[[\s\[]*\{\s*(['"])(?:from|value)\1\s*:""")


def is_simple(value: Any) -> bool:
    """Whether `read_text` surely returns a value as it is: quick, and False for some it does."""
    return type(value) is str and value.isascii() and value[:1].isalnum()


def read_text(value: Any, field: str, location: str) -> Text:
    """Reads a string, or the messages of a list, of a single message, or of a text with those.

    Raises:
        UserError: the value is empty or something else.
    """
    value = to_json_value(value)
    if isinstance(value, str):
        value = check_string(value, field, location)
        if value[0] in "[{" or value[0].isspace():
            value = parse_messages(value, field, location)
        if isinstance(value, str):
            return value
    if isinstance(value, Mapping) and "role" in value and _says(value):
        value = [value]
    if not isinstance(value, list):
        expected = "a string or a list of chat messages (role, content)"
        raise make_type_error(location, field, expected, value)
    if not value:
        raise UserError(f"{location}: field {field!r} is empty")
    value = join_calls(value, field, location)
    return [_read_message(m, f"{field}[{i}]", location) for i, m in enumerate(value)]


def _read_message(value: Any, field: str, location: str) -> Message:
    start = f"{location}: field {field!r}"
    if not isinstance(value, Mapping):
        raise make_type_error(location, field, "a chat message", value)
    if "role" not in value and "from" in value:
        raise UserError(
            f"{start}: a chat message needs role and content, found ShareGPT's "
            f"{', '.join(map(str, value))}"
        )
    role = value.get("role")
    if not isinstance(role, str) or not role.strip():
        raise UserError(
            f"{start}: a chat message needs a string 'role', found {describe_value(role)}"
        )
    check_string(role, f"{field}.role", location)
    # Columns of a table hold every key in every row; only one with a value means something.
    other_keys = [k for k, v in value.items() if k not in ("role", "content") and has_content(v)]
    for key in other_keys:
        if key in _UNSUPPORTED_KEYS:
            raise UserError(f"{start}: {key!r}: {_UNSUPPORTED_KEYS[key]}")
        if key not in _READ_KEYS:
            raise UserError(
                f"{start}: a chat message has role, content, {', '.join(_READ_KEYS)}; found {key!r}"
            )
        if key in _READ_OF and role not in _READ_OF[key]:
            owner = _READ_OF[key][0]
            raise UserError(
                f"{start}: {key!r} belongs to a message of role {owner!r}, found it in {role!r}"
            )
    message: Message = {"role": role, "content": ""}
    for key in other_keys:
        read: Callable[[Any, str, str], Any] = read_calls if key == "tool_calls" else check_string
        message[key] = read(value[key], f"{field}.{key}", location)
    content = _join_parts(to_json_value(value.get("content")), start)
    if content is None and "tool_calls" in message:
        return message
    if not isinstance(content, str):
        advice = "; write what a tool returns as JSON" if role in TOOL_ROLES else ""
        raise UserError(
            f"{start}: a chat message needs a string 'content', found {describe_value(content)}"
            f"{advice}"
        )
    may_be_empty = role in ("system", *TOOL_ROLES) or "tool_calls" in message
    if content.strip() or not may_be_empty:
        message["content"] = check_string(content, f"{field}.content", location)
    return message


def _join_parts(content: Any, start: str) -> Any:
    """Joins a content that is a list of parts of text; `start` begins error messages."""
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        part_type = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if part_type != "text":
            raise UserError(f"{start}: content has a part of type {part_type!r}; only text is read")
        if not isinstance(text, str):
            raise UserError(
                f"{start}: a part of content needs a string 'text', found {describe_value(text)}"
            )
        texts.append(text)
    return "".join(texts)


def parse_messages(text: str, field: str, location: str) -> Any:
    """Returns the message or messages that a text stands for, or the text itself.

    Raises:
        UserError: it starts like messages, but cannot be parsed.
    """
    value = parse_literal(text)
    if is_messages(value) and (isinstance(value, list) or _has_only_ours(value)):
        return value
    ends = text.rstrip()[-1] == "]"
    if ends and value is None and _MESSAGES.match(text) and _ROLE.search(text):
        raise UserError(
            f"{location}: field {field!r} looks like chat messages written as text, but cannot be "
            "read as JSON or a Python list; expected a list of messages"
        )
    if ends and _SHAREGPT.match(text) and (value is None or _all_have(value, "from", "value")):
        raise UserError(
            f"{location}: field {field!r} is a ShareGPT conversation written as text; expected a "
            "list of messages with role and content"
        )
    return text


def parse_responses(text: str, location: str) -> Any:
    """Returns the list of responses that the text of `rejected` stands for, or the text itself.

    Raises:
        UserError: it looks like a list as NumPy prints it, without commas.
    """
    if text.lstrip()[:1] != "[":
        return text
    value = parse_literal(text)
    if _is_response_list(value):
        return value
    if value is None and text.rstrip()[-1] == "]" and has_adjacent_strings(text):
        raise UserError(
            f"{location}: field 'rejected' is a list as NumPy prints it, without commas, where "
            "responses cannot be told apart; write a list, as with json.dumps"
        )
    return text


def is_messages(value: Any) -> bool:
    """Whether a value is a chat message, or a list of some."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, Mapping) and is_messages(v) for v in value)
    return isinstance(value, Mapping) and _says(value) and value.get("role") in ROLES


def _says(message: Mapping[str, Any]) -> bool:
    """Whether an object has what a message says: its content, or calls in place of it."""
    return "content" in message or has_content(message.get("tool_calls"))


def _has_only_ours(message: Mapping[str, Any]) -> bool:
    """Whether an object has nothing but a message's role, content and calls."""
    return set(message) <= {"role", "content", "tool_calls"}


def is_data(text: Any) -> bool:
    """Whether a text is a list or object of JSON or Python, perhaps in a Markdown code block."""
    if not isinstance(text, str):
        return False
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1]
    return text.lstrip()[:1] in ("[", "{") and parse_literal(text) is not None


def is_response_list(text: Any) -> bool:
    """Whether a text is a list of responses, or would be if it were not an answer itself."""
    return (
        isinstance(text, str)
        and text.lstrip()[:1] == "["
        and _is_response_list(parse_literal(text))
    )


def _is_response_list(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, str) or (isinstance(v, list) and is_messages(v)) for v in value
    )


def _all_have(value: Any, *keys: str) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, Mapping) and all(key in v for key in keys) for v in value
    )
