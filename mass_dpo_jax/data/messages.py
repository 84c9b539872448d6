"""Texts of a row: a string, or chat messages with role and content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mass_dpo_jax.data.checks import check_string, has_content, kind, plain
from mass_dpo_jax.data.written import decode_messages
from mass_dpo_jax.errors import UserError

Message = dict[str, str]  # {"role": ..., "content": ...}
Text = str | list[Message]

# Keys of messages that change what is said, and what to say of them.
_NOT_READ = {
    **dict.fromkeys(("tool_calls", "function_call"), "tool calls are not supported"),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "is not read: write it into content as the model does, <think>...</think>",
    ),
    **dict.fromkeys(("images", "image", "videos", "audio"), "models with images are not supported"),
}


def is_simple(value: Any) -> bool:
    """Is it a string that `read_text` returns as it is? Quick, and false for some that are."""
    return type(value) is str and value.isascii() and value[:1].isalnum()


def read_text(value: Any, field: str, place: str) -> Text:
    """A string, or the messages of a list, of a single message, or of a text that holds those.

    Raises:
      UserError: it is empty or something else.
    """
    value = plain(value)
    if isinstance(value, str):
        value = check_string(value, field, place)
        if value[0] in "[{" or value[0].isspace():
            value = decode_messages(value, field, place)
        if isinstance(value, str):
            return value
    if isinstance(value, Mapping) and "role" in value and "content" in value:
        value = [value]
    if not isinstance(value, list):
        raise UserError(
            f"{place}: field {field!r} must be a string or a list of chat messages (role, "
            f"content), found {kind(value)}"
        )
    if not value:
        raise UserError(f"{place}: field {field!r} is empty")
    return [_message(m, f"{field}[{i}]", place) for i, m in enumerate(value)]


def _message(value: Any, field: str, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise UserError(f"{place}: field {field!r} must be a chat message, found {kind(value)}")
    if "role" not in value and "from" in value:
        raise UserError(
            f"{place}: field {field!r}: a chat message needs role and content, found ShareGPT's "
            f"{', '.join(map(str, value))}"
        )
    # Columns of a table hold every key in every row; only one with a value means something.
    extra = [k for k, v in value.items() if k not in ("role", "content") and has_content(v)]
    for key in extra:
        if key in _NOT_READ:
            raise UserError(f"{place}: field {field!r}: {key!r}: {_NOT_READ[key]}")
    content = _content(plain(value.get("content")), field, place)
    for key, found in (("role", value.get("role")), ("content", content)):
        if not isinstance(found, str):
            raise UserError(
                f"{place}: field {field!r}: a chat message needs a string {key!r}, "
                f"found {kind(found)}"
            )
    role = check_string(value["role"], f"{field}.role", place)
    if extra:
        raise UserError(
            f"{place}: field {field!r}: a chat message has role and content only, "
            f"found {extra[0]!r}"
        )
    if role == "system" and not content.strip():
        return {"role": role, "content": ""}
    return {"role": role, "content": check_string(content, f"{field}.content", place)}


def _content(content: Any, field: str, place: str) -> Any:
    """The content, where a list of parts of text is those joined."""
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        sort = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if sort != "text":
            raise UserError(
                f"{place}: field {field!r}: content has a part of type {sort!r}; only text is read"
            )
        if not isinstance(text, str):
            raise UserError(
                f"{place}: field {field!r}: a part of content needs a string 'text', "
                f"found {kind(text)}"
            )
        texts.append(text)
    return "".join(texts)
