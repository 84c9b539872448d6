"""Names of columns: ours, and what other programs call them."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Any

from mass_dpo_jax.data.checks import has_content, plain
from mass_dpo_jax.data.messages import Text

COLUMNS = ("id", "prompt", "chosen", "rejected", "score_chosen", "score_rejected")
# What other programs call these columns.
OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "problem"),
    "chosen": (
        "chosen_response", "response_chosen", "response_j", "chosen_answer", "answer_chosen",
        "preferred", "preferred_output", "pos_answer", "accepted", "answer", "messages", "output",
    ),
    "rejected": (
        "rejected_response", "rejected_responses", "response_rejected", "response_k",
        "rejected_answer", "rejected_answers", "answer_rejected", "dispreferred",
        "non_preferred_output", "neg_answer", "wrong_answers", "negatives",
    ),
}  # fmt: skip


def describe_absent(row: Mapping[str, Any], field: str) -> str:
    """What to say of a field that is missing or null."""
    if field in row and not _other_name(tuple(row), field):
        return f"field {field!r} is null"
    found = ", ".join(map(str, row)) or "nothing"
    wanted = {
        name: _other_name(tuple(row), name)
        for name in ("prompt", "chosen", "rejected")
        if plain(row.get(name)) is None
    }
    known = ",".join(f"{name}={other}" for name, other in wanted.items() if other)
    advice = f"--config.data.columns={field}=NAME reads it from another column"
    if wanted.get(field):
        advice = f"--config.data.columns={known} reads these"
    return f"field {field!r} is missing; found {found}; {advice}"


def has_prompt_elsewhere(row: Mapping[str, Any], chosen: Text) -> bool:
    """Is there a column for the prompt by another name, whose text the chosen response lacks?"""
    other = _other_name(tuple(row), "prompt")
    if not other or not has_content(row[other]):
        return False
    if isinstance(chosen, list):
        return len(chosen) < 2
    return str(row[other]).strip() not in chosen


@functools.lru_cache  # Rows have the same columns.
def _other_name(row: tuple[str, ...], field: str) -> str:
    """The column that has a field by another name, or by a misspelt one; "" where there is none."""
    columns = {str(column).lower(): str(column) for column in row if column not in COLUMNS}
    known = [name for name in (field, *OTHER_NAMES[field]) if name in columns]
    close = difflib.get_close_matches(field, columns, n=1, cutoff=0.85)
    return next((columns[name] for name in (*known, *close)), "")
