"""Formats of trainers: a better and one or several worse answers, in columns or conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mass_dpo_jax.data.fields import describe_value, has_content, make_type_error, to_json_value
from mass_dpo_jax.data.formats.conversations import read_messages
from mass_dpo_jax.data.formats.raw_row import (
    Answer,
    Format,
    RawRow,
    Row,
    add_context,
    check_length,
    find_one,
    get,
    list_answers,
    list_numbered,
    need,
    read_list,
    read_number,
    read_prompt_text,
)
from mass_dpo_jax.data.readers.columns import contains_prompt
from mass_dpo_jax.data.readers.literals import parse_literal
from mass_dpo_jax.data.readers.messages import is_data, parse_messages
from mass_dpo_jax.data.readers.tools import join_calls, read_tools, wrap_tool
from mass_dpo_jax.errors import UserError

SCORES = ("score_chosen", "score_rejected")
# Columns of which one has the question, beside chosen and rejected.
QUESTIONS = ("prompt", "input", "question", "instruction")


def _pair(row: Row, chosen: str, rejected: str, location: str) -> list[Answer]:
    """Returns the answers of two columns; that of the worse may have a list of them."""
    best = to_json_value(need(row, chosen, location))
    worse = to_json_value(need(row, rejected, location))
    single = isinstance(best, Mapping) and isinstance(worse, list)
    if single or is_data(best):
        worst = worse if isinstance(worse, list) else [worse]
        names = [f"{rejected}[{i}]" for i in range(len(worst))] if worst is worse else [rejected]
        answers = [Answer(name, text, 1) for name, text in zip(names, worst, strict=True)]
    else:
        answers = list_answers(worse, rejected, 1, location)
    return _add_scores(row, [Answer(chosen, best, 0), *answers], location)


def _add_scores(row: Row, answers: list[Answer], location: str) -> list[Answer]:
    """Returns answers with the scores of `score_chosen` and `score_rejected`, if all have one."""
    if any(get(row, field) is None for field in SCORES):
        return answers
    rejected = get(row, "score_rejected")
    rejected = rejected if isinstance(rejected, list) else [rejected]
    check_length(rejected, "score_rejected", len(answers) - 1, "rejected", location)
    scores = [read_number(row["score_chosen"], "score_chosen", location)]
    for i, score in enumerate(rejected):
        scores.append(read_number(score, f"score_rejected[{i}]", location))
    return [answer._replace(score=score) for answer, score in zip(answers, scores, strict=True)]


def _asked(row: Row, fields: tuple[str, ...], chosen: str = "chosen") -> bool:
    """Whether a question stands beside answers that do not repeat it."""
    field = next((f for f in fields if has_content(row.get(f))), None)
    return field is not None and not contains_prompt(row[field], get(row, chosen))


# ---- LLaMA-Factory: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md


def _is_alpaca(row: Row) -> bool:
    if has_content(row.get("prompt")):
        return False
    if get(row, "chosen") is not None:
        return _asked(row, ("instruction",))
    output = get(row, "output")
    if isinstance(output, str) and output[:1] == "[":
        output = parse_literal(output)
    return isinstance(output, list)


def _read_alpaca(row: Row, location: str) -> RawRow:
    prompt = read_prompt_text(row, ("instruction", "input"), location)
    if get(row, "chosen") is not None or get(row, "output") is None:
        answers = _pair(row, "chosen", "rejected", location)
    else:
        outputs = read_list(row["output"], "output", location)
        if len(outputs) < 2:
            raise UserError(
                f"{location}: field 'output' must have a chosen and a rejected answer, found 1"
            )
        answers = [Answer(f"output[{i}]", text, min(i, 1)) for i, text in enumerate(outputs)]
    return RawRow(add_context(row, prompt, location), "instruction", answers)


def _is_sharegpt(row: Row) -> bool:
    if has_content(row.get("prompt")):
        return False
    value = get(row, "conversations" if has_content(row.get("conversations")) else "chosen")
    if isinstance(value, str) and value[:1] == "[":
        value = parse_literal(value)
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and ("from" in first or "conversations" in row)


def _read_sharegpt(row: Row, location: str) -> RawRow:
    chosen = read_messages(need(row, "chosen", location), "chosen", location)
    rejected = to_json_value(need(row, "rejected", location))
    lists = [("rejected", rejected)]
    if isinstance(rejected, list) and rejected and all(isinstance(x, list) for x in rejected):
        lists = [(f"rejected[{i}]", value) for i, value in enumerate(rejected)]
    elif isinstance(rejected, list) and len(chosen) == 1:
        lists = [(f"rejected[{i}]", value) for i, value in enumerate(rejected) if value is not None]
    answers = [Answer(name, read_messages(value, name, location), 1) for name, value in lists]
    if has_content(row.get("conversations")):
        prompt = read_messages(row["conversations"], "conversations", location)
        prompt_field = "conversations"
    elif len(chosen) > 1:
        prompt, prompt_field = chosen[:-1], "chosen"
    else:
        need(row, "conversations", location)
        raise UserError(f"{location}: field 'conversations' is empty")
    answers = [Answer("chosen", chosen, 0), *answers]
    # LLaMA-Factory has the bare functions, and wraps them so for its templates.
    tools = [wrap_tool(tool) for tool in read_tools(row.get("tools"), "tools", location)]
    return RawRow(add_context(row, prompt, location), prompt_field, answers, tools)


# ---- ms-swift: https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html


def _read_swift(row: Row, location: str) -> RawRow:
    if get(row, "messages") is None:
        question = find_one(row, ("query", "instruction", "messages"), location)
        response = find_one(row, ("response", "output"), location)
        inputs = ("instruction", "input") if question == "instruction" else (question,)
        prompt = add_context(row, read_prompt_text(row, inputs, location), location)
        best = [Answer(response, row[response], 0)]
        prompt_field = question
    else:
        messages = read_list(row["messages"], "messages", location)
        messages = join_calls(messages, "messages", location)
        prompt, prompt_field = messages, "messages"
        if get(row, "negative_messages") is not None:
            best = _list_texts(
                need(row, "positive_messages", location), "positive_messages", 0, location
            )
            worst = _list_texts(row["negative_messages"], "negative_messages", 1, location)
            return RawRow(add_context(row, prompt, location), prompt_field, [*best, *worst])
        last = to_json_value(messages[-1])
        role = last.get("role") if isinstance(last, Mapping) else None
        if role != "assistant" or len(messages) < 2:
            raise UserError(
                f"{location}: field 'messages' must end with the chosen answer, a message of role "
                f"'assistant' behind a question; found {describe_value(role or last)} in "
                f"messages[{len(messages) - 1}]"
            )
        prompt = messages[:-1]
        best = [Answer(f"messages[{len(messages) - 1}]", [last], 0)]
        prompt = add_context(row, prompt, location)
    has_messages = get(row, "rejected_messages") is not None
    lacks_response = get(row, "rejected_response") is None
    name = "rejected_messages" if has_messages and lacks_response else "rejected_response"
    worst = list_answers(need(row, name, location), name, 1, location)
    if name == "rejected_messages" and len(worst) == 1 and isinstance(worst[0].text, list):
        worst = [Answer(name, join_calls(worst[0].text, name, location), 1)]
    return RawRow(prompt, prompt_field, [*best, *worst])


def _list_texts(value: Any, field: str, rank: float, location: str) -> list[Answer]:
    """Returns the answers in a list of conversations of one message, whoever says it."""
    answers = []
    for i, item in enumerate(read_list(value, field, location)):
        name, item = f"{field}[{i}]", to_json_value(item)
        if item is None:
            continue
        messages = item if isinstance(item, list) else [item]
        if len(messages) != 1 or not isinstance(messages[0], (Mapping, str)):
            raise make_type_error(location, name, "a list of one message", item)
        message = messages[0]
        if isinstance(message, Mapping):
            message = {**message, "role": "assistant"}
        answers.append(Answer(name, [message] if isinstance(message, dict) else message, rank))
    return answers


# ---- OpenAI: https://platform.openai.com/docs/guides/direct-preference-optimization


def _read_openai(row: Row, location: str) -> RawRow:
    given = need(row, "input", location)
    if isinstance(given, str):
        given = parse_literal(given) if given.lstrip()[:1] == "{" else given
    if not isinstance(given, Mapping):
        raise make_type_error(location, "input", "an object with messages", row["input"])
    if to_json_value(given.get("messages")) is None:
        raise UserError(f"{location}: field 'input.messages' is missing")
    answers = []
    for rank, field in enumerate(("preferred_output", "non_preferred_output")):
        answers.append(Answer(field, need(row, field, location), rank))
    tools = to_json_value(given.get("tools"))
    return RawRow(given["messages"], "input.messages", answers, tools or [], "input.tools")


# ---- axolotl: https://docs.axolotl.ai/docs/rlhf.html


def _is_axolotl(row: Row) -> bool:
    if get(row, "instruction") is not None and get(row, "chosen") is not None:
        return False
    if get(row, "chosen_response") is not None:
        return get(row, "chosen") is None
    if has_content(row.get("messages")) and get(row, "prompt") is None:
        chosen = get(row, "chosen")
        return _ends_open(row["messages"]) and not (isinstance(chosen, list) and len(chosen) > 1)
    if not isinstance(get(row, "chosen"), str) and "system" not in row:
        return _asked(row, ("question",)) and get(row, "prompt") is None
    if has_content(row.get("prompt")):
        return isinstance(row["prompt"], str) and isinstance(get(row, "system"), str)
    return _asked(row, ("question", "input"))


def _ends_open(messages: Any) -> bool:
    """Whether a conversation, or the text of a question, is waiting for an answer."""
    if isinstance(messages, str):
        messages = parse_messages(messages, "messages", "")
    last = to_json_value(messages)
    last = last[-1] if isinstance(last, list) and last else last
    return isinstance(last, str) or (isinstance(last, Mapping) and last.get("role") != "assistant")


def _read_axolotl(row: Row, location: str) -> RawRow:
    if get(row, "chosen_response") is not None:
        answers = _pair(row, "chosen_response", "rejected_response", location)
    else:
        answers = _pair(row, "chosen", "rejected", location)
    field = find_one(row, ("messages", *QUESTIONS), location)
    prompt = row[field] if field == "messages" else read_prompt_text(row, (field,), location)
    return RawRow(add_context(row, prompt, location), field, answers)


# ---- Columns rejected_1, rejected_2, ...


def _read_numbered(row: Row, location: str) -> RawRow:
    columns = list_numbered(row, "rejected")
    need(row, columns[0] if columns else "rejected_1", location)
    worst = [Answer(column, row[column], 1) for column in columns]
    if get(row, "rejected") is not None:
        worst = [*list_answers(row["rejected"], "rejected", 1, location), *worst]
    answers = [Answer("chosen", need(row, "chosen", location), 0), *worst]
    return RawRow(need(row, "prompt", location), "prompt", answers)


CONTEXT = ("system", "history")
FORMATS = (
    Format(
        "alpaca", "LLaMA-Factory's alpaca format",
        (("instruction", "chosen", "rejected"), ("instruction", "output")),
        _read_alpaca, _is_alpaca, (*CONTEXT, *SCORES, "input"),
    ),
    Format(
        "sharegpt", "LLaMA-Factory's ShareGPT format",
        (("conversations", "chosen", "rejected"), ("chosen", "rejected")),
        _read_sharegpt, _is_sharegpt, ("system",),
    ),
    Format(
        "ms-swift", "ms-swift's format",
        (
            ("messages", "rejected_response"), ("messages", "rejected_messages"),
            ("messages", "positive_messages", "negative_messages"),
            ("query", "response", "rejected_response"),
            ("instruction", "output", "rejected_response"),
        ),
        _read_swift, optional=(*CONTEXT, "input"),
    ),
    Format(
        "openai", "OpenAI's format",
        (("input", "preferred_output", "non_preferred_output"),),
        _read_openai, lambda row: not isinstance(row["input"], str) or row["input"][:1] == "{",
    ),
    Format(
        "axolotl", "axolotl's format",
        (
            ("messages", "chosen", "rejected"), ("system", "prompt", "chosen", "rejected"),
            ("question", "chosen", "rejected"), ("system", "input", "chosen", "rejected"),
            ("input", "chosen", "rejected"),
            *((question, "chosen_response", "rejected_response") for question in QUESTIONS),
        ),
        _read_axolotl, _is_axolotl, ("system", *SCORES),
    ),
    Format(
        "numbered", "numbered columns",
        (("prompt", "chosen"),),
        _read_numbered, lambda row: bool(list_numbered(row, "rejected")), ("rejected",), "rejected",
    ),
)  # fmt: skip
