"""Typed access to the fields of a `config.json`, without JAX."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.folder import warn_once

MAX_AXIS_SIZE = 2**31 - 1  # XLA counts in int32.


class FieldReader:
    """Typed access to one `config.json`; every error names file and field."""

    def __init__(self, config: Mapping[str, Any], location: str):
        self.config = config
        self.location = location

    def error(self, field: str, found: Any, expected: str) -> UserError:
        """Makes the error of a field, to be raised."""
        return UserError(f"{self.location}: {field}: found {found!r}, expected {expected}")

    def read_integer(
        self,
        field: str,
        default: int | None = None,
        *,
        none: int | None = None,
        minimum: int = 1,
        maximum: int = MAX_AXIS_SIZE,
    ) -> int:
        """Reads an integer: `default` if the field is absent, `none` if it is null."""
        value = self.config.get(field, default)
        value = none if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            kind = "a positive integer" if minimum == 1 else f"an integer from {minimum}"
            raise self.error(field, value, f"{kind} up to {maximum}")
        return value

    def read_list(self, field: str) -> Sequence[Any]:
        """Reads a list, empty if the field is absent or null."""
        value = self.config.get(field)
        if value is not None and not isinstance(value, list):
            raise self.error(field, value, "a list")
        return value or []

    def read_object(self, field: str) -> Mapping[str, Any]:
        """Reads an object, empty if the field is absent or null."""
        value = self.config.get(field)
        if value is not None and not isinstance(value, dict):
            raise self.error(field, value, "an object")
        return value or {}

    def read_token_ids(self, field: str, size: int) -> tuple[int, ...]:
        """Reads one or several token ids of a vocabulary of `size`; none if absent or null.

        Ids outside of it, like the -1 of converted models, are left out with a warning.
        """
        value = self.config.get(field)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise self.error(field, value, "an integer or a list of integers")
        outside = [v for v in values if not 0 <= v < size]
        if outside:
            warn_once(
                f"{self.location}: {field}: {outside[0]} is outside of the vocabulary (vocab_size "
                f"is {size}), so it names no token and is left out"
            )
        return tuple(v for v in values if v not in outside)

    def read_number(self, field: str, default: float) -> float:
        """Reads a positive number."""
        return self.check_positive(field, self.config.get(field, default))

    def read_optional_number(self, field: str) -> float | None:
        """Reads a positive number, None if the field is absent or null."""
        value = self.config.get(field)
        return None if value is None else self.check_positive(field, value)

    def check_positive(self, field: str, value: Any) -> float:
        """Checks that a field's value is a positive number."""
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value <= sys.float_info.max
        ):
            raise self.error(field, value, "a positive number")
        return float(value)

    def read_flag(self, field: str, default: bool | None = None) -> bool:
        """Reads a boolean."""
        value = self.config.get(field, default)
        if not isinstance(value, bool):
            raise self.error(field, value, "true or false")
        return value
