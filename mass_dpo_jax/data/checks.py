"""Checks of single values of a row, with messages that name the place and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import shorten

_PLAIN = (str, list, dict, int, bool, type(None))  # What most values are, for speed.


def check_string(value: Any, field: str, place: str) -> str:
    """The value, if it is a string with something in it that can be written as UTF-8."""
    if not isinstance(value, str):
        raise UserError(f"{place}: field {field!r} must be a string, found {kind(value)}")
    if not value.strip():
        raise UserError(f"{place}: field {field!r} is empty")
    return check_encodable(value, field, place)


def check_encodable(value: str, field: str, place: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: field {field!r} has half a surrogate pair at character {error.start}"
        ) from None
    return value


def check_id(value: Any, default: str, place: str) -> str:
    """A row's own id as a string, or the default where it has none.

    Tables with gaps hold integers as floats: whole ones are integers.
    """
    value = plain(value)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{place}: field 'id' must be a string or an integer, found {kind(value)}")
    if value == "":
        raise UserError(
            f"{place}: field 'id' is empty; leave it out, or set --config.data.columns=id= to "
            "number all rows"
        )
    return check_encodable(str(value), "id", place)


def plain(value: Any) -> Any:
    """The value as JSON has it: NumPy's as Python's, a tuple as a list, a gap, NaN say, as null."""
    if type(value) in _PLAIN:
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, tuple):
        return list(value)
    is_gap = type(value).__name__ == "NAType" or (isinstance(value, float) and math.isnan(value))
    return None if is_gap else value


def has_content(value: Any) -> bool:
    """Is there anything in a value? Tables fill what a row does not have with nulls and empties."""
    value = plain(value)
    if isinstance(value, Mapping):
        return any(map(has_content, value.values()))
    if isinstance(value, list):
        return any(map(has_content, value))
    return value is not None and value != "" and value is not False


def kind(value: Any) -> str:
    """The value's type in JSON's words, with a short one shown."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {value}".lower()
    if isinstance(value, str):
        return f"the string {shorten(value)}"
    if not isinstance(value, Mapping):
        return "a list" if isinstance(value, list) else f"a value of type {type(value).__name__}"
    return f"an object with {', '.join(map(str, value))}" if value else "an empty object"
