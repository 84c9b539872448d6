"""Functions that a model may call (`tools`), and the calls in its messages (`tool_calls`).

Both become the objects that chat templates of transformers take; a call's arguments are an object,
too, not JSON text. Nulls in objects are left out, since tables write one for every key that another
row has; nulls in JSON text are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mass_dpo_jax.data.fields import check_string, has_content, make_type_error, to_json_value
from mass_dpo_jax.data.readers.literals import parse_literal
from mass_dpo_jax.errors import UserError

Tool = dict[str, Any]
# Roles of other programs, for messages that are calls and for what calls returned.
CALL_ROLES = ("tool_call", "function_call")
RETURN_ROLES = ("tool_response", "observation")


def read_tools(value: Any, field: str, location: str) -> tuple[Tool, ...]:
    """Reads the schemas of functions: a list, the list as JSON text, or a list of JSON texts.

    Raises:
        UserError: it is no list of objects that each name a function.
    """
    if not has_content(value):
        return ()
    expected = "a list of functions, as JSON schemas"
    tools = _parse(value)
    if not isinstance(tools, list):
        raise make_type_error(location, field, expected, tools)
    read = []
    for i, given in enumerate(tools):
        if not has_content(given):
            continue
        tool, name = _parse(given), f"{field}[{i}]"
        if not isinstance(tool, Mapping):
            raise make_type_error(location, name, "a function, as a JSON schema", tool)
        _read_name(tool, name, location)
        read.append(
            _check_json(tool if isinstance(value, str) else drop_nulls(tool), name, location)
        )
    return tuple(read)


def wrap_tool(tool: Tool) -> Tool:
    """Returns a schema in the layout of transformers and OpenAI, with its `type`."""
    return tool if "function" in tool else {"type": "function", "function": tool}


def read_calls(value: Any, field: str, location: str) -> list[Tool]:
    """Reads the calls of a message: `{"function": {"name", "arguments"}}`, or the inner object.

    Raises:
        UserError: a call has no name, or its arguments are no object and not one as JSON text.
    """
    calls = _parse(value)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise make_type_error(
            location, field, "a call of a function, as JSON, or a list of calls", calls
        )
    read = []
    for i, call in enumerate(calls):
        call, name = _parse(call), f"{field}[{i}]"
        if not isinstance(call, Mapping):
            raise make_type_error(location, name, "a call, with a function", call)
        function = _read_name(call, name, location)
        arguments = _read_arguments(function.get("arguments"), f"{name}.arguments", location)
        rest = drop_nulls({key: call[key] for key in ("id", "type") if key in call})
        called = {"name": function["name"], "arguments": arguments}
        read.append(_check_json({"type": "function", **rest, "function": called}, name, location))
    return read


def join_calls(messages: list[Any], field: str, location: str) -> list[Any]:
    """Returns a conversation with its calls in the assistant's messages, as in transformers.

    ms-swift and LLaMA-Factory write each call as a message of its own, whose content is JSON.

    Raises:
        UserError: such a content is no call.
    """
    joined: list[Any] = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role in RETURN_ROLES:
            message = {**message, "role": "tool"}
        elif role in CALL_ROLES:
            calls = read_calls(message.get("content"), f"{field}[{i}]", location)
            last = joined[-1] if joined else None
            if isinstance(last, Mapping) and last.get("role") == "assistant":
                earlier = last.get("tool_calls")
                earlier = earlier if isinstance(earlier, list) else []
                joined[-1] = {**last, "tool_calls": [*earlier, *calls]}
                continue
            message = {"role": "assistant", "content": "", "tool_calls": calls}
        joined.append(message)
    return joined


def drop_nulls(value: Any) -> Any:
    """Returns a value whose objects have no nulls, at any depth."""
    value = to_json_value(value)
    if isinstance(value, Mapping):
        pairs = ((key, drop_nulls(item)) for key, item in value.items())
        return {key: item for key, item in pairs if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def _parse(value: Any) -> Any:
    """Returns a value, or what it stands for where it is a list or an object as text."""
    value = to_json_value(value)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        parsed = parse_literal(value)
        return value if parsed is None else parsed
    return value


def _read_name(value: Mapping[str, Any], field: str, location: str) -> Mapping[str, Any]:
    """Returns the function of a schema or a call; raises UserError where it has no name."""
    function = to_json_value(value.get("function"))
    if function is None:
        function = value
    elif isinstance(function, Mapping):
        field = f"{field}.function"
    else:
        raise make_type_error(location, f"{field}.function", "an object with a name", function)
    if to_json_value(function.get("name")) is None:
        raise UserError(
            f"{location}: field {field!r} needs the 'name' of a function; found "
            f"{', '.join(map(str, function)) or 'nothing'}"
        )
    check_string(function["name"], f"{field}.name", location)
    return function


def _read_arguments(value: Any, field: str, location: str) -> Any:
    """Reads the arguments of a call; null or an empty text means none."""
    arguments = _parse(value)
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if not isinstance(arguments, Mapping):
        raise make_type_error(location, field, "an object, or JSON of one", arguments)
    return arguments if isinstance(value, str) else drop_nulls(arguments)


def _check_json(value: Any, field: str, location: str) -> Any:
    """Returns a value if a file of JSON can hold it; tables and Python literals may hold others."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"{location}: field {field!r} is not for JSON: {error}") from None
    return value
