"""Columns of preference data: our names, the user's (`data.columns`) and other programs'."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Any

from mass_dpo_jax.data.examples import Text
from mass_dpo_jax.data.fields import has_content, to_json_value
from mass_dpo_jax.errors import UserError

COLUMNS = (
    "id", "prompt", "chosen", "rejected", "score_chosen", "score_rejected", "mined_probabilities",
    "tools",
)  # fmt: skip
# Columns that `data.columns` can leave out. Rows without `rejected` can only be mined for.
OPTIONAL = tuple(name for name in COLUMNS if name not in ("prompt", "chosen"))
RENAMABLE = (*COLUMNS, "completion", "label")  # Those of unpaired rows, too.
# Columns that change what a prompt is, so they are refused where they have content.
UNSUPPORTED_COLUMNS = {
    "chat_template_kwargs": "set config.data.chat_template_kwargs, the same for all rows",
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"),
        "models with images, videos or audio are not supported; leave the column out where the "
        "text says it all",
    ),
}
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


def parse_columns(text: str) -> dict[str, str]:
    """Parses `data.columns`, as in `prompt=question,chosen=answer`.

    Returns:
        The data's name by our name, "" for a column not to be read (`id=` has rows numbered).

    Raises:
        UserError: the text is something else.
    """
    names = {}
    for part in text.split(",") if text else []:
        ours, equals, theirs = (word.strip() for word in part.partition("="))
        missing = not theirs and not (equals and ours in OPTIONAL)
        if ours not in RENAMABLE or missing or ours in names:
            raise UserError(
                f"config.data.columns={text!r}: {part!r}, expected each of "
                f"{', '.join(RENAMABLE)} at most once, as in prompt=question,chosen=answer; "
                f"and {', '.join(f'{name}=' for name in OPTIONAL)} to read no such column"
            )
        names[ours] = theirs
    return names


def rename_columns(row: Any, names: Mapping[str, str], location: str) -> Any:
    """Returns a row with our names of columns; `names` are those of `parse_columns`."""
    if not names or not isinstance(row, Mapping):
        return row  # A row that is no object is reported by whoever reads it.
    for ours, theirs in names.items():
        if theirs and theirs not in row:
            raise UserError(
                f"{location}: column {theirs!r} is missing (config.data.columns takes {ours!r} "
                f"from it); found {', '.join(map(str, row)) or 'nothing'}"
            )
    other_columns = {
        name: value
        for name, value in row.items()
        if name not in names.values() and names.get(name) != ""
    }
    return other_columns | {ours: row[theirs] for ours, theirs in names.items() if theirs}


def check_unsupported(row: Mapping[str, Any], location: str) -> None:
    """Raises UserError where a row has a column that changes what its prompt is."""
    for field, advice in UNSUPPORTED_COLUMNS.items():
        if field in row and has_content(row[field]):
            raise UserError(f"{location}: field {field!r} is not read here: {advice}")


def describe_absent(row: Mapping[str, Any], field: str) -> str:
    """Describes a field that is missing or null, with advice."""
    if field in row and not _find_other_name(tuple(row), field):
        return f"field {field!r} is null"
    columns = ", ".join(map(str, row)) or "nothing"
    renamings = {
        name: _find_other_name(tuple(row), name)
        for name in ("prompt", "chosen", "rejected")
        if to_json_value(row.get(name)) is None
    }
    setting = ",".join(f"{name}={other}" for name, other in renamings.items() if other)
    advice = f"--config.data.columns={field}=NAME reads it from another column"
    if renamings.get(field):
        advice = f"--config.data.columns={setting} reads these"
    if field == "rejected":
        advice += "; mine takes rows without, --config.data.columns=rejected="
    return f"field {field!r} is missing; found {columns}; {advice}"


def has_prompt_elsewhere(row: Mapping[str, Any], chosen: Text) -> bool:
    """Whether a column of another name has the prompt, and the chosen response lacks its text."""
    other = _find_other_name(tuple(row), "prompt")
    return bool(other) and has_content(row[other]) and not contains_prompt(row[other], chosen)


def contains_prompt(prompt: Any, chosen: Any) -> bool:
    """Whether a chosen response has its prompt in it: as text, or as earlier messages."""
    if isinstance(chosen, str):
        return str(prompt).strip() in chosen
    return isinstance(chosen, list) and len(chosen) > 1


@functools.lru_cache  # Rows have the same columns.
def _find_other_name(row: tuple[str, ...], field: str) -> str:
    """Returns the column that holds a field by another or misspelt name; "" if there is none."""
    columns = {str(column).lower(): str(column) for column in row if column not in COLUMNS}
    known = [name for name in (field, *OTHER_NAMES[field]) if name in columns]
    close = difflib.get_close_matches(field, columns, n=1, cutoff=0.85)
    return next((columns[name] for name in (*known, *close)), "")
