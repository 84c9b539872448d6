"""Single fields of a row: their values, and checks whose messages name the location and field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import shorten

_JSON_TYPES = (str, list, dict, int, bool, type(None))  # The types of most values, for speed.


def check_string(value: Any, field: str, location: str) -> str:
    """Returns the value if it is a string that is not blank and can be written as UTF-8."""
    if not isinstance(value, str):
        raise make_type_error(location, field, "a string", value)
    if not value.strip():
        raise UserError(f"{location}: field {field!r} is empty")
    return check_encodable(value, field, location)


def check_encodable(value: str, field: str, location: str) -> str:
    """Returns the value if it can be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{location}: field {field!r} has half a surrogate pair at character {error.start}"
        ) from None
    return value


def check_id(value: Any, default: str, location: str) -> str:
    """Returns a row's own id as a string, or the default where it has none.

    Tables with gaps store integers as floats, so whole floats count as integers.
    """
    value = to_json_value(value)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise make_type_error(location, "id", "a string or an integer", value)
    if value == "":
        raise UserError(
            f"{location}: field 'id' is empty; leave it out, or set --config.data.columns=id= to "
            "number all rows"
        )
    return check_encodable(str(value), "id", location)


def to_json_value(value: Any) -> Any:
    """Converts a table's value to JSON's types: NumPy's, tuples, and gaps (NaN, NA) as null."""
    if type(value) in _JSON_TYPES:
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, tuple):
        return list(value)
    is_gap = type(value).__name__ == "NAType" or (isinstance(value, float) and math.isnan(value))
    return None if is_gap else value


def has_content(value: Any) -> bool:
    """Whether a value says anything: tables fill what a row lacks with nulls and empty values."""
    value = to_json_value(value)
    if isinstance(value, Mapping):
        return any(map(has_content, value.values()))
    if isinstance(value, list):
        return any(map(has_content, value))
    return value is not None and value != "" and value is not False


def make_type_error(location: str, field: str, expected: str, value: Any) -> UserError:
    """Returns the error that a field's value is not what it must be."""
    return UserError(
        f"{location}: field {field!r} must be {expected}, found {describe_value(value)}"
    )


def describe_value(value: Any) -> str:
    """Describes a value in JSON's terms, for messages; a short one is shown."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {value}".lower()
    if isinstance(value, str):
        return f"the string {shorten(value)}"
    if not isinstance(value, Mapping):
        return "a list" if isinstance(value, list) else f"a value of type {type(value).__name__}"
    return f"an object with {', '.join(map(str, value))}" if value else "an empty object"
