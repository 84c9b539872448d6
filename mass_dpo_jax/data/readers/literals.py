"""Values that a table wrote as text: in JSON, or as Python prints them."""

from __future__ import annotations

import ast
import io
import json
import tokenize
import warnings
from typing import Any

from mass_dpo_jax.utils.files import is_deep

MAX_PARSED_CHARS = 1 << 20  # Longer texts are never parsed.


def parse_literal(text: str) -> Any:
    """Returns what a text stands for in JSON or as a Python literal; None if it is neither.

    What is nested too deeply for JSON in a file is neither.
    """
    if len(text) > MAX_PARSED_CHARS or text.strip()[-1:] not in ("]", "}"):
        return None
    value = _parse(text)
    return None if is_deep(text, value) else value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if has_adjacent_strings(text):
        return None  # Python would join them.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of unknown escape sequences.
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def has_adjacent_strings(text: str) -> bool:
    """Whether Python code has two strings with nothing in between, as NumPy prints arrays."""
    try:
        last_type = 0
        for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
            if token.type == last_type == tokenize.STRING:
                return True
            if token.type not in (tokenize.NL, tokenize.COMMENT):
                last_type = token.type
    except (tokenize.TokenError, SyntaxError):
        pass
    return False
