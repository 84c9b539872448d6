"""Typed access to the fields of a `config.json`. No JAX."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.folder import warn_once

MOST_OF_AN_AXIS = 2**31 - 1  # What XLA counts an axis with.


class Reader:
    """Typed access to the fields of one `config.json`; every error names file and field."""

    def __init__(self, config: Mapping[str, Any], place: str):
        self.config = config
        self.place = place

    def error(self, field: str, found: Any, expected: str) -> UserError:
        return UserError(f"{self.place}: {field}: found {found!r}, expected {expected}")

    def integer(
        self,
        field: str,
        default: int | None = None,
        *,
        none: int | None = None,
        most: int = MOST_OF_AN_AXIS,
    ) -> int:
        """A positive integer; `default` where the field is absent, `none` where it is null."""
        value = self.config.get(field, default)
        value = none if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise self.error(field, value, f"a positive integer up to {most}")
        return value

    def list(self, field: str) -> Sequence[Any]:
        """A list; empty where the field is absent or null."""
        value = self.config.get(field)
        if value is not None and not isinstance(value, list):
            raise self.error(field, value, "a list")
        return value or []

    def token_ids(self, field: str, size: int) -> tuple[int, ...]:
        """A token id or several of a vocabulary of `size`; none where the field is absent or null.

        An id outside, as -1 of converted models, is warned of and left out.
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
                f"{self.place}: {field}: {outside[0]} is outside of the vocabulary (vocab_size is "
                f"{size}), so it names no token and is left out"
            )
        return tuple(v for v in values if v not in outside)

    def number(self, field: str, default: float) -> float:
        return self.positive(field, self.config.get(field, default))

    def positive(self, field: str, value: Any) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value <= sys.float_info.max
        ):
            raise self.error(field, value, "a positive number")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        value = self.config.get(field, default)
        if not isinstance(value, bool):
            raise self.error(field, value, "true or false")
        return value
