"""Checks of the prompts that a chat template renders: warnings to count, or errors."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mass_dpo_jax.data import template_probe
from mass_dpo_jax.data.examples import REASONING, Message, list_more
from mass_dpo_jax.errors import UserError

# The start of texts that a chat template has rendered, of this model or others.
RENDERED = re.compile(
    r"\s*(<[|\uff5c][^|\uff5c>]+[|\uff5c]>|<start_of_turn>|<bos>|<s>|\[INST\]|<<SYS>>)"
)
# What other programs call roles; most templates skip a message with an unknown role.
OTHER_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bot", "ai"), "assistant")}
OTHER_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}  # In any case.
MAX_CACHED = 10_000  # Sequences of messages that are remembered.


class PromptChecks:
    """Checks messages before a template renders them.

    Args:
        render: returns what the template writes for messages and tools, with the generation prompt.
        source: the template's text.
        special: matches special tokens.
        bos: the token that begins a sequence, if there is one.
    """

    def __init__(
        self,
        render: Callable[..., str],
        source: str,
        special: re.Pattern[str],
        bos: str | None,
    ):
        self._render = render
        self._source = source
        self._special = special
        self._bos = bos
        self._unwritten: dict[tuple[Any, ...], tuple[tuple[int, str], ...]] = {}

    def check_texts(self, messages: Sequence[Message], location: str) -> str:
        """Returns what looks wrong with a prompt's messages, as a phrase to count by, or "".

        Raises:
            UserError: the messages cannot be meant as they are.
        """
        warning = ""
        for message in messages:
            role, text = message["role"], message["content"]
            meant = OTHER_ROLES.get(role.lower(), role)
            if meant != role and not re.search(rf"""['"]{re.escape(role)}['"]""", self._source):
                raise UserError(
                    f"{location}: a message of the prompt has the role {role!r}, which the chat "
                    f"template does not know: write {meant!r}"
                )
            start = text.lstrip()
            token = self._special.match(start)
            if token and token[0] in self._openers:
                raise UserError(
                    f"{location}: the prompt begins with {token[0]}, which the chat template "
                    "writes itself, so it is rendered already: set "
                    "--config.data.chat_template=none, or write the text alone"
                )
            if RENDERED.match(start) or (self._header and start.startswith(self._header)):
                warning = "that look rendered already"
            elif not warning and self._special.search(text + _more_text(message)):
                warning = "with special tokens in their text"
        return warning

    def check_roles(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """Returns which message the template does not write, as a phrase to count by, or ""."""
        for i, part in self._find_unwritten(messages, tools):
            if part == "content" and "tool_calls" in messages[i]:
                return "with text beside tool calls that the chat template does not write"
            if part == "content":
                return f"with a {messages[i]['role']} message that the chat template does not write"
        return ""

    def check_calls(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], location: str
    ) -> list[str]:
        """Returns what the template leaves out of a prompt's messages, as phrases to count by.

        Raises:
            UserError: it never writes calls, thoughts or tools.
        """
        if not tools and not any(map(list_more, messages)):
            return []
        warnings = set()
        for i, part in self._find_unwritten(messages, tools):
            if part in REASONING and self._writes_thoughts(part):
                warnings.add(f"with {part} in earlier turns that the chat template does not write")
            elif part in ("name", "tool_call_id"):
                role = messages[i]["role"]
                what = f"with a {part} of a {role} message"
                warnings.add(f"{what} that the chat template does not write")
            elif part != "content":
                name = "tools" if part == "tools" else f"prompt[{i}].{part}"
                raise UserError(f"{location}: field {name!r}: {_describe(part)}")
        return sorted(warnings)

    def check_answer(
        self,
        messages: Sequence[Message],
        answer: Message,
        tools: Sequence[Mapping[str, Any]],
        field: str,
        location: str,
    ) -> None:
        """Raises UserError where the template leaves anything out of an answer."""
        for i, part in self._find_unwritten([*messages, answer], tools):
            if i == len(messages):
                raise UserError(f"{location}: field '{field}.{part}': {_describe(part)}")

    def _find_unwritten(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[tuple[int, str], ...]:
        """Returns the index and the key of everything that the template leaves out of messages.

        Messages are told apart by which keys they have, and by how many calls and arguments.
        """
        shape = (*map(_describe_shape, messages), len(tools))
        if shape not in self._unwritten:
            if len(self._unwritten) >= MAX_CACHED:
                self._unwritten.clear()
            self._unwritten[shape] = tuple(self._look_for_marks(messages, tools))
        return self._unwritten[shape]

    def _look_for_marks(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, str]]:
        marked = [_mark(message, i) for i, message in enumerate(messages)]
        marked_tools = [_mark_tool(tool, k) for k, tool in enumerate(tools)]
        complete = messages[-1]["role"] == "assistant"
        try:
            text = self._render(marked, marked_tools, complete=complete)
        except UserError:
            return  # The template needs other texts.
        written = text.lower()
        if not all(_tool_name(k) in written for k in range(len(tools))):
            yield -1, "tools"
        for i, message in enumerate(marked):
            for key in message:
                if key in ("name", "tool_call_id"):
                    rest = {k: v for k, v in message.items() if k != key}
                    others = [*marked[:i], rest, *marked[i + 1 :]]
                    with contextlib.suppress(UserError):  # The template needs it.
                        if text == self._render(others, marked_tools, complete=complete):
                            yield i, key
                elif key != "role" and not all(mark in written for mark in _marks(message[key])):
                    yield i, key

    def _writes_thoughts(self, key: str) -> bool:
        """Whether the template writes the thoughts of some message: that of the last answer."""
        question = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": "[text]", key: "[thought]"}
        return not self._find_unwritten([question, answer], ())

    @functools.cached_property
    def _opening(self) -> str:
        """The text that the template writes before a user's only message."""
        try:
            return self._render([{"role": "user", "content": template_probe.TEXT}]).partition(
                template_probe.TEXT
            )[0]
        except UserError:
            return ""  # The template needs other messages; the data will show whether it works.

    @functools.cached_property
    def _openers(self) -> set[str]:
        return {*self._special.findall(self._opening), *([self._bos] if self._bos else [])}

    @functools.cached_property
    def _header(self) -> str:
        """The header of a user's message that is no special token, as in "### Instruction:"."""
        lines = self._special.sub("\n", self._opening).strip().splitlines()
        header = lines[-1].strip() if lines else ""
        return header if re.search(r"[^\w\s]", header) else ""


def _more_text(message: Message) -> str:
    more = list_more(message)
    return json.dumps(more) if more else ""


def _describe_shape(message: Message) -> tuple[Any, ...]:
    calls = tuple(len(call["function"]["arguments"]) for call in message.get("tool_calls", ()))
    return message["role"], bool(message["content"]), calls, tuple(list_more(message))


def _mark(message: Message, i: int) -> Message:
    """Returns a message with other texts, which are told apart wherever they are written."""
    marked = {**message, "content": f"[text {i}]" if message["content"] else ""}
    for key in message.keys() & set(REASONING):
        marked[key] = f"[thought {i}]"
    if "tool_calls" in message:
        marked["tool_calls"] = [
            {**call, "function": _mark_call(call["function"], f"{i}_{k}")}
            for k, call in enumerate(message["tool_calls"])
        ]
    return marked


def _mark_call(function: Mapping[str, Any], number: str) -> dict[str, Any]:
    count = len(function["arguments"])
    arguments = {f"key_{number}_{j}_": f"value_{number}_{j}_" for j in range(count)}
    return {"name": f"call_{number}_", "arguments": arguments}


def _mark_tool(tool: Mapping[str, Any], k: int) -> dict[str, Any]:
    if "function" in tool:
        return {**tool, "function": {**tool["function"], "name": _tool_name(k)}}
    return {**tool, "name": _tool_name(k)}


def _tool_name(k: int) -> str:
    return f"tool_{k}_"


def _marks(value: Any) -> list[str]:
    """Returns the texts of a marked message's content, thoughts or calls."""
    if isinstance(value, str):
        return [value]
    functions = [call["function"] for call in value]
    names = [function["name"] for function in functions]
    return names + [text for f in functions for pair in f["arguments"].items() for text in pair]


def _describe(part: str) -> str:
    """Describes what a template lacks, with advice."""
    if part in REASONING:
        return (
            "the chat template does not write it; write it into content as the model does, "
            "<think>...</think>"
        )
    if part == "name":
        return "the chat template does not write it; leave it out"
    what = "a text beside calls" if part == "content" else "it"
    return (
        f"the chat template does not write {what}; take a model whose template does, or such a "
        "template as --config.data.chat_template=FILE"
    )
