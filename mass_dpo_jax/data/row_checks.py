"""What can be wrong with a row that only its tokens show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mass_dpo_jax.errors import UserError


class Rows(NamedTuple):
    """The tokens of m rows, counted.

    Attributes:
      places: where each row came from.
      prompts: int [m], lengths.
      responses: int [m, C], lengths, the chosen one's first; 0: there is no such response.
      kinds: int [m, C], equal in a row where tokens are; -1: there is no such response.
    """

    places: list[str]
    prompts: np.ndarray
    responses: np.ndarray
    kinds: np.ndarray


def check_rows(rows: Rows, data: Any, max_positions: int | None) -> Iterator[tuple[int, UserError]]:
    """Yields the number of each row that cannot be used, and why.

    Args:
      rows: under the limit of prompts already.
      data: the configuration's `data`.
      max_positions: most tokens of a prompt with a response that the model can tell apart.
    """
    twice = (rows.kinds[:, 1:] == rows.kinds[:, :1]) & (rows.kinds[:, 1:] >= 0)
    for k in np.flatnonzero(twice.any(1)).tolist():
        yield (
            k,
            UserError(
                f"{rows.places[k]}: the chosen response has the same tokens as "
                f"rejected[{twice[k].argmax()}]"
            ),
        )
    limit = data.max_response_length
    long = rows.responses > limit
    if data.long_response != "drop":
        for k in np.flatnonzero(long.any(1)).tolist():
            c = int(long[k].argmax())
            yield (
                k,
                UserError(
                    f"{rows.places[k]}: field {_field(c)!r} has {rows.responses[k, c]} tokens, "
                    f"config.data.max_response_length is {limit}: raise it, or leave such "
                    "responses out with config.data.long_response=drop"
                ),
            )
    if max_positions is not None:
        lengths = np.where(long, 0, rows.responses)  # Of what is left.
        longest = lengths.max(1, initial=0)
        for k in np.flatnonzero(rows.prompts + longest > max_positions).tolist():
            yield (
                k,
                UserError(
                    f"{rows.places[k]}: the prompt and field {_field(int(lengths[k].argmax()))!r} "
                    f"have {rows.prompts[k]} + {longest[k]} tokens, more than the model's "
                    f"{max_positions} positions (max_position_embeddings of its config.json): "
                    "lower config.data.max_prompt_length to cut the prompt, or "
                    "config.data.max_response_length"
                ),
            )


def _field(column: int) -> str:
    return f"rejected[{column - 1}]" if column else "chosen"
