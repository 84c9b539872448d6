"""Lists and chat messages that a table wrote as text, as CSV does: `[{"role": "user", ...}]`.

Both JSON and Python's way to print lists are read. An answer may be JSON of its own, so little is
taken for anything but text: chat messages with a role that there is, and nothing else beside them;
and a list of responses in place of several, where the chosen response is no list or object.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
import warnings
from collections.abc import Mapping
from typing import Any

from mass_dpo_jax.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
LONGEST = 1 << 20  # Characters; nothing longer is decoded.

# The start of a list of objects with such a first key, and a role that there is.
_MESSAGES = re.compile(r"""\s*\[[\s\[]*\{\s*(['"])(?:role|content)\1\s*:""")
_ROLE = re.compile(rf"""(['"])role\1\s*:\s*(['"])(?:{"|".join(ROLES)})\2""")
_FENCED = re.compile(r"\s*```\w*\n(.*?)```\s*", re.S)
_SHAREGPT = re.compile(r"""\s*\[[\s\[]*\{\s*(['"])(?:from|value)\1\s*:""")


def decode_messages(text: str, field: str, place: str) -> Any:
    """The message or list of messages that a text is; the text itself where it is something else.

    Raises:
      UserError: it starts like messages, but cannot be read.
    """
    value = _parse(text)
    if is_messages(value) and (isinstance(value, list) or set(value) == {"role", "content"}):
        return value
    ends = text.rstrip()[-1] == "]"
    if ends and value is None and _MESSAGES.match(text) and _ROLE.search(text):
        raise UserError(
            f"{place}: field {field!r} looks like chat messages written as text, but cannot be "
            "read as JSON or a Python list; expected a list of messages"
        )
    if ends and _SHAREGPT.match(text) and (value is None or _all_have(value, "from", "value")):
        raise UserError(
            f"{place}: field {field!r} is a ShareGPT conversation written as text; expected a list "
            "of messages with role and content"
        )
    return text


def decode_responses(text: str, place: str) -> Any:
    """The list of responses that the text of `rejected` is; the text itself where it is none.

    Raises:
      UserError: it looks like a list that NumPy printed, without commas.
    """
    if text.lstrip()[:1] != "[":
        return text
    value = _parse(text)
    if _are_responses(value):
        return value
    if value is None and text.rstrip()[-1] == "]" and _no_commas(text):
        raise UserError(
            f"{place}: field 'rejected' is a list as NumPy prints it, without commas, where "
            "responses cannot be told apart; write a list, as with json.dumps"
        )
    return text


def is_messages(value: Any) -> bool:
    """Is it a chat message, or a list of some?"""
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, Mapping) and is_messages(v) for v in value)
    return isinstance(value, Mapping) and "content" in value and value.get("role") in ROLES


def is_data(text: Any) -> bool:
    """Is a text a list or an object of JSON or Python, also fenced as a block of Markdown?"""
    if not isinstance(text, str):
        return False
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1]
    return text.lstrip()[:1] in ("[", "{") and _parse(text) is not None


def is_response_list(text: Any) -> bool:
    """Is a text a list of responses, or would it be if it were no answer?"""
    return isinstance(text, str) and text.lstrip()[:1] == "[" and _are_responses(_parse(text))


def _are_responses(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, str) or (isinstance(v, list) and is_messages(v)) for v in value
    )


def _all_have(value: Any, *keys: str) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, Mapping) and all(key in v for key in keys) for v in value
    )


def _parse(text: str) -> Any:
    """What a text stands for as JSON or as a literal of Python; None where it is neither."""
    if len(text) > LONGEST or text.strip()[-1:] not in ("]", "}"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if _no_commas(text):
        return None  # Python would join strings beside each other.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of backslashes.
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _no_commas(text: str) -> bool:
    """Does a text of Python have two strings with nothing between, as NumPy prints arrays?"""
    try:
        last = 0
        for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
            if token.type == last == tokenize.STRING:
                return True
            if token.type not in (tokenize.NL, tokenize.COMMENT):
                last = token.type
    except (tokenize.TokenError, SyntaxError):
        pass
    return False
