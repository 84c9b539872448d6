"""Renders examples with a chat template.

The prompt is rendered with the generation prompt. A response is what the template writes after that
for the assistant's message, up to its end token (`<|eot_id|>`, `<|im_end|>`): as in TRL, except for
what a template writes after that token. A prompt that ends with a message of the assistant has the
beginning of that message, and responses go on with it. Thinking is off, and every date that a
template can ask for is the configured one, unless `data.chat_template_kwargs` says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers.utils import chat_template_utils

from mass_dpo_jax.data import template_probe
from mass_dpo_jax.data.examples import (
    REASONING,
    Example,
    Message,
    Prompt,
    Text,
    as_answer,
    as_messages,
    identify_answer,
)
from mass_dpo_jax.data.template_checks import PromptChecks
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import shorten

PLACEHOLDER = "response"  # An answer for which we look at what the template writes around it.
MAX_CACHED = 100_000  # Answers, and kinds of prompts, whose text is remembered.
THINK_TAGS = ("<think>", "</think>")
_THINK = "--config.data.chat_template_kwargs='{\"enable_thinking\": true}' lets it"
_log = logging.getLogger(__name__)


class Conversation(NamedTuple):
    """A prompt with its text.

    Attributes:
        messages: the prompt.
        tools: the functions that the model may call.
        text: both, rendered; the generation prompt included.
        location: of the row.
    """

    messages: list[Message]
    tools: Sequence[Mapping[str, Any]]
    text: str
    location: str

    @property
    def beginning(self) -> str:
        """The beginning of the answer, where the prompt ends with it."""
        last = self.messages[-1]
        return str(last["content"]) if last["role"] == "assistant" else ""


@dataclasses.dataclass
class PromptKind:
    """What the template writes for answers after one kind of prompt.

    Attributes:
        end: the token that ends a response.
        rule: gives what is written for most answers, without rendering them.
        texts: the texts of answers that were rendered.
    """

    end: str
    rule: template_probe.Rule | None
    texts: dict[str, str] = dataclasses.field(default_factory=dict)


class ChatTemplate:
    """A renderer with a chat template; a prompt that is a string is the user's only message.

    Args:
        tokenizer: a tokenizer of transformers.
        template: the template's text.
        arguments: values that the template gets besides messages.
    """

    special_tokens = False  # The template writes all of them itself.
    end_id: int | None = None

    def __init__(self, tokenizer: Any, template: str, arguments: Mapping[str, Any]):
        # Only a macro of the template can replace strftime_now: transformers turns a function that
        # it is given into a string. The newline after the block is not part of the output.
        date = arguments["date_string"]
        macro = "{%- macro strftime_now(format) -%}{{ " + json.dumps(date) + " }}{%- endmacro %}\n"
        self._source = template
        self._template = macro + template
        self._arguments = arguments
        self._tokenizer = tokenizer
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._specials = sorted({*special, *tokenizer.all_special_tokens} - {""})
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # By what is written for PLACEHOLDER, and what answers to it begin with and can call.
        self._kinds: dict[tuple[str, str, str], PromptKind] = {}
        self._checks = PromptChecks(self._render, template, self._special, tokenizer.bos_token)
        self._with_special: set[str] = set()  # Answers with special tokens.
        self._starts: set[str] = set()  # Beginnings of responses that were warned of.

    def render_prompt(
        self, prompt: Prompt, location: str, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """Returns the prompt's text, generation prompt included."""
        return self._render(as_messages(prompt), tools, location)

    def render_responses(self, example: Example, prompt: str) -> list[str]:
        """Renders responses: each answer once for a kind of prompt, and most of them not at all.

        Answers repeat (titles, letters). The kind of a prompt is what the template writes for the
        placeholder after it: an empty block of thoughts, say, if it follows the last question.
        """
        talk = Conversation(as_messages(example.prompt), example.tools, prompt, example.place)
        written = self._write_answer(talk, PLACEHOLDER)
        key = (written, talk.beginning, json.dumps(example.tools) if example.tools else "")
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) >= MAX_CACHED:
                self._kinds.clear()
            kind = self._kinds[key] = self._make_kind(written, talk)
        texts = []
        for field, response in example.named_responses:
            name = identify_answer(response)
            text = kind.texts.get(name)
            if text is None:
                text = self._render_response(kind, talk, response, field)
                if len(kind.texts) >= MAX_CACHED:
                    kind.texts.clear()
                kind.texts[name] = text
            texts.append(text)
        return texts

    def find_warnings(self, example: Example, prompt: Prompt) -> list[str]:
        """Returns what looks wrong with an example, see `render.Renderer`."""
        messages = as_messages(example.prompt)
        warnings = [
            self._checks.check_texts(messages, example.place),
            self._checks.check_roles(as_messages(prompt), example.tools),
            *self._checks.check_calls(messages, example.tools, example.place),
        ]
        if self._with_special and any(
            identify_answer(response) in self._with_special
            for _, response in example.named_responses
        ):
            warnings.append("with special tokens in their responses")
        return [warning for warning in warnings if warning]

    def _render_response(
        self, kind: PromptKind, talk: Conversation, response: Text, field: str
    ) -> str:
        answer = as_answer(response)
        if not isinstance(answer, str):
            return self._render_calls(kind, talk, answer, field)
        name, answer = answer, remove_end_token(answer, kind.end, field, talk.location)
        self._look_for_special(answer, name)
        self._check_thoughts(talk, any(tag in answer for tag in THINK_TAGS), "<think>", field)
        if kind.rule is not None and kind.rule.holds(answer):
            text = kind.rule.before + answer + kind.rule.after
        else:
            text = self._write_answer(talk, answer)
        return text[: text.index(kind.end) + len(kind.end)]

    def _render_calls(
        self, kind: PromptKind, talk: Conversation, answer: Sequence[Message], field: str
    ) -> str:
        """Renders a message that has more than a text: calls of functions, thoughts."""
        if len(answer) > 1:
            raise UserError(
                f"{talk.location}: field {field!r} has {len(answer)} messages: one turn is scored; "
                "put those before it into the prompt"
            )
        [message] = answer
        content = message["content"]
        if content:
            content = remove_end_token(content, kind.end, field, talk.location)
        message = {**message, "content": content}
        if kind.end in json.dumps(message, ensure_ascii=False):
            raise UserError(
                f"{talk.location}: field {field!r} contains the end-of-sequence token {kind.end}, "
                "which is added to every response: leave it out"
            )
        thoughts = next((key for key in REASONING if key in message), "")
        self._look_for_special(json.dumps(message), identify_answer(list(answer)))
        self._checks.check_answer(talk.messages, message, talk.tools, field, talk.location)
        self._check_thoughts(talk, bool(thoughts), thoughts, field)
        text = self._write(talk, message, f"the answer with {', '.join(message)}")
        if kind.end in text:
            return text[: text.index(kind.end) + len(kind.end)]
        if not text.strip().endswith(tuple(self._specials)):
            raise UserError(
                f"{talk.location}: the chat template writes no special token at the end of field "
                f"{field!r}, so nothing says where it ends: {shorten(text)}"
            )
        return text.rstrip()

    def _look_for_special(self, answer: str, name: str) -> None:
        """Remembers the name of an answer with special tokens."""
        if any(token not in THINK_TAGS for token in self._special.findall(answer)):
            self._with_special.add(name)

    def _check_thoughts(self, talk: Conversation, thinks: bool, what: str, field: str) -> None:
        """Raises UserError where an answer thinks and its prompt ends with an empty block."""
        if thinks and talk.text.rstrip().endswith(THINK_TAGS[1]):
            raise UserError(
                f"{talk.location}: field {field!r} has {what}, and the chat template is told "
                f"not to think: {_THINK}"
            )

    def _write_answer(self, talk: Conversation, answer: str) -> str:
        """Returns what the template writes after the generation prompt for an answer's text."""
        return self._write(
            talk, {"role": "assistant", "content": answer}, f"the answer {shorten(answer)}"
        )

    def _write(self, talk: Conversation, message: Message, what: str) -> str:
        """Returns what the template writes after the generation prompt for an answer."""
        messages = [*talk.messages, message]
        if talk.messages[-1]["role"] == "assistant":
            whole = {**message, "content": talk.beginning + message["content"]}
            messages = [*talk.messages[:-1], whole]
        text = self._render(messages, talk.tools, talk.location, complete=True)
        if not text.startswith(talk.text):
            thinks = any(tag in message["content"] for tag in THINK_TAGS)
            thinks = thinks or any(key in message for key in REASONING)
            advice = "" if self._arguments.get("enable_thinking") or not thinks else f"; {_THINK}"
            raise UserError(
                f"{talk.location}: the chat template's text with {what} does not start with its "
                f"generation prompt, which ends with {shorten(talk.text[-40:])}{advice}"
            )
        return text[len(talk.text) :]

    def _make_kind(self, written: str, talk: Conversation) -> PromptKind:
        """Makes the kind of prompt for which `written` follows the prompt."""
        start, placeholder, tail = written.partition(PLACEHOLDER)
        if not placeholder:
            raise UserError(
                f"{talk.location}: the chat template does not write an answer as it is: for "
                f"{PLACEHOLDER!r} {shorten(written)}"
            )
        ends = [
            (tail.index(token), -len(token), token) for token in self._specials if token in tail
        ]
        if not ends:
            raise UserError(
                f"{talk.location}: the chat template writes no special token at the end of the "
                f"assistant's message, so nothing says where a response ends: {shorten(written)}; "
                "write {{ eos_token }} after that message's content in the template"
            )
        if start.strip() and start not in self._starts and not talk.beginning:
            self._starts.add(start)
            if self._render(talk.messages, talk.tools, talk.location, complete=True) == talk.text:
                _log.warning(
                    "the chat template has no generation prompt: all responses begin with %s, "
                    "which is trained too; write that under {%% if add_generation_prompt %%}",
                    shorten(start),
                )
        return PromptKind(min(ends)[2], self._find_rule(written, talk))

    def _find_rule(self, written: str, talk: Conversation) -> template_probe.Rule | None:
        if talk.beginning:
            return None  # What the template asks of the whole answer, it asks of a part.
        # `apply_chat_template` would turn the probe into an ordinary string.
        compiled = chat_template_utils._compile_jinja_template(self._template)
        context = {**self._tokenizer.special_tokens_map, **self._arguments}

        def render(answer: str) -> str:
            conversation = [*talk.messages, {"role": "assistant", "content": answer}]
            text: str = compiled.render(
                messages=conversation,
                tools=list(talk.tools) or None,
                documents=None,
                add_generation_prompt=False,
                **context,
            )
            return text.removeprefix(talk.text)

        try:
            if render(PLACEHOLDER) == written:
                return template_probe.find_rule(render, compiled.environment.parse(self._source))
        except Exception:  # A template can do anything with a probe; that is no user's mistake.
            pass
        return None

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        location: str = "",
        complete: bool = False,
    ) -> str:
        """Returns the text of messages, up to where an answer begins or, if complete, to its end.

        An answer that is there already, the last of messages that are not complete, goes on.
        """
        goes_on = not complete and messages[-1]["role"] == "assistant"
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=not (complete or goes_on),
                continue_final_message=goes_on,
                **self._arguments,
            )
            text.encode()
        # A template is a program: it can divide by zero, add strings to numbers, recurse for ever.
        except Exception as error:
            roles = ", ".join(m["role"] for m in messages)
            message = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{location}: the chat template fails on ({roles}): {message}"
            ) from None
        return text


def remove_end_token(text: str, end: str, field: str, location: str) -> str:
    """Returns a response's text without the end token that may be at its end.

    Raises:
        UserError: the text contains the token elsewhere.
    """
    if end not in text:
        return text
    text = text.rstrip().removesuffix(end) if text.rstrip().endswith(end) else text
    if end in text:
        raise UserError(
            f"{location}: field {field!r} contains the end-of-sequence token {end}, which is "
            "added to every response: leave it out of the text"
        )
    return text
