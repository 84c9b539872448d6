"""Formats of single answers with a label, good or bad, as for KTO: grouped by prompt, pools.

https://huggingface.co/docs/trl/dataset_formats, https://docs.axolotl.ai/docs/rlhf.html,
https://swift.readthedocs.io, https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from __future__ import annotations

from typing import Any

from mass_dpo_jax.data.fields import describe_value, has_content, to_json_value
from mass_dpo_jax.data.formats.conversations import read_messages
from mass_dpo_jax.data.formats.raw_row import (
    Answer,
    Format,
    RawRow,
    Row,
    add_context,
    find_one,
    get,
    need,
    read_prompt_text,
)
from mass_dpo_jax.data.readers.messages import parse_messages
from mass_dpo_jax.data.readers.tools import read_tools, wrap_tool
from mass_dpo_jax.errors import UserError

LABELS = ("label", "kto_tag")
CONVERSATIONS = ("messages", "conversations")
QUESTIONS = ("question", "instruction", "query")
_WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def _is_labelled(row: Row) -> bool:
    label = next((get(row, name) for name in LABELS if get(row, name) is not None), None)
    pairs = ("chosen", "rejected", "rejected_response", "rejected_messages")
    if any(get(row, name) is not None for name in pairs) or isinstance(get(row, "output"), list):
        return False
    if get(row, "label") is not None and has_content(row.get("messages")):
        # A class of a conversation may be called so, too: then it is a number.
        return isinstance(label, bool) or str(label).lower() in ("true", "false")
    return _find_label(label) is not None


def _find_label(label: Any) -> bool | None:
    """Returns whether a label says that an answer is good; None where it says nothing."""
    return _WORDS.get(str(label).lower()) if isinstance(label, (bool, int, float, str)) else None


def _read_unpaired(row: Row, location: str) -> RawRow:
    name = find_one(row, LABELS, location)
    is_good = _find_label(to_json_value(row[name]))
    if is_good is None:
        raise UserError(
            f"{location}: field {name!r} must be true, for a good answer, or false, found "
            f"{describe_value(to_json_value(row[name]))}"
        )
    prompt, prompt_field, field, text = _read_answer(row, location)
    answer = Answer(field, text, not is_good)
    tools = None
    if has_content(row.get("conversations")):  # LLaMA-Factory's, which wraps them so itself.
        tools = [wrap_tool(tool) for tool in read_tools(row.get("tools"), "tools", location)]
    return RawRow(add_context(row, prompt, location), prompt_field, [answer], tools)


def _read_answer(row: Row, location: str) -> tuple[Any, str, str, Any]:
    """Returns a row's prompt, its field, the answer's field, and the answer."""
    conversation = next((name for name in CONVERSATIONS if has_content(row.get(name))), "")
    field = find_one(row, ("completion", "response", "output", *CONVERSATIONS), location)
    text = row[field]
    if conversation and field == conversation:
        return _split_end(read_messages(text, field, location), field, location)
    if get(row, "prompt") is not None:
        return row["prompt"], "prompt", field, text
    if question := next((name for name in QUESTIONS if get(row, name) is not None), ""):
        fields = (question, "input") if question == "instruction" else (question,)
        return read_prompt_text(row, fields, location), question, field, text
    value = parse_messages(text, field, location) if isinstance(text, str) else text
    if not isinstance(to_json_value(value), list) or len(value) < 2:
        need(row, "prompt", location)
    return _split_end(read_messages(value, field, location), field, location)


def _split_end(messages: list[Any], field: str, location: str) -> tuple[Any, str, str, Any]:
    if len(messages) < 2:
        raise UserError(
            f"{location}: field {field!r} has one message only, so there is nothing before the "
            "answer"
        )
    return messages[:-1], field, f"{field}[{len(messages) - 1}]", messages[-1:]


FORMATS = (
    Format(
        "unpaired", "single answers with labels",
        (
            *((question, answer, "label") for question in ("prompt", *QUESTIONS)
              for answer in ("completion", "response")),
            ("completion", "label"), ("messages", "label"),
            ("instruction", "output", "kto_tag"), *((name, "kto_tag") for name in CONVERSATIONS),
        ),
        _read_unpaired, _is_labelled, ("system", "history", "input"), unpaired=True,
    ),
)  # fmt: skip
