"""Renders examples with a chat template.

The prompt is rendered with the generation prompt. A response is what the template writes after that
for the assistant's message, up to its end token (`<|eot_id|>`, `<|im_end|>`): as in TRL, except for
what a template writes after that token. Thinking is off, and every date that a template can ask for
is the configured one, unless `data.chat_template_kwargs` says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from transformers.utils import chat_template_utils

from mass_dpo_jax.data import template_probe
from mass_dpo_jax.data.examples import Example, Message, Prompt, as_messages, last_content
from mass_dpo_jax.data.template_checks import PromptChecks
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import shorten

PLACEHOLDER = "response"  # An answer for which we look at what the template writes around it.
MAX_CACHED = 100_000  # Answers, and kinds of prompts, whose text is remembered.
THINK_TAGS = ("<think>", "</think>")
_THINK = "--config.data.chat_template_kwargs='{\"enable_thinking\": true}' lets it"
_log = logging.getLogger(__name__)


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
        self._kinds: dict[str, PromptKind] = {}  # By what is written for PLACEHOLDER.
        self._checks = PromptChecks(
            lambda messages: self._render(messages, "", generation_prompt=True),
            template, self._special, tokenizer.bos_token,
        )  # fmt: skip
        self._with_special: set[str] = set()  # Answers with special tokens.
        self._starts: set[str] = set()  # Beginnings of responses that were warned of.

    def render_prompt(self, prompt: Prompt, location: str) -> str:
        """Returns the prompt's text, generation prompt included."""
        return self._render(as_messages(prompt), location, generation_prompt=True)

    def render_responses(self, example: Example, prompt: str) -> list[str]:
        """Renders responses: each answer once for a kind of prompt, and most of them not at all.

        Answers repeat (titles, letters). The kind of a prompt is what the template writes for the
        placeholder after it: an empty block of thoughts, say, if it follows the last question.
        """
        messages = as_messages(example.prompt)
        written = self._write_answer(messages, prompt, PLACEHOLDER, example.place)
        kind = self._kinds.get(written)
        if kind is None:
            kind = self._make_kind(written, messages, prompt, example.place)
        texts = []
        for field, response in example.named_responses:
            content = last_content(response)
            text = kind.texts.get(content)
            if text is None:
                text = self._render_response(kind, messages, prompt, content, field, example.place)
            texts.append(text)
        return texts

    def find_warnings(self, example: Example, prompt: Prompt) -> list[str]:
        """Returns what looks wrong with an example, see `render.Renderer`."""
        warnings = [
            self._checks.check_texts(as_messages(example.prompt), example.place),
            self._checks.check_roles(as_messages(prompt)),
        ]
        if self._with_special and any(
            last_content(response) in self._with_special for _, response in example.named_responses
        ):
            warnings.append("with special tokens in their responses")
        return [warning for warning in warnings if warning]

    def _render_response(
        self,
        kind: PromptKind,
        messages: list[Message],
        prompt: str,
        content: str,
        field: str,
        location: str,
    ) -> str:
        answer = remove_end_token(content, kind.end, field, location)
        if any(token not in THINK_TAGS for token in self._special.findall(answer)):
            self._with_special.add(content)
        # Such a prompt ends with an empty block of thoughts.
        if prompt.rstrip().endswith(THINK_TAGS[1]) and any(tag in answer for tag in THINK_TAGS):
            raise UserError(
                f"{location}: field {field!r} has {THINK_TAGS[0]}, and the chat template is told "
                f"not to think: {_THINK}"
            )
        if kind.rule is not None and kind.rule.holds(answer):
            text = kind.rule.before + answer + kind.rule.after
        else:
            text = self._write_answer(messages, prompt, answer, location)
        text = text[: text.index(kind.end) + len(kind.end)]
        if len(kind.texts) >= MAX_CACHED:
            kind.texts.clear()
        kind.texts[content] = text
        return text

    def _write_answer(
        self, messages: list[Message], prompt: str, answer: str, location: str
    ) -> str:
        """Returns what the template writes after the generation prompt for an answer."""
        message = {"role": "assistant", "content": answer}
        text = self._render([*messages, message], location, generation_prompt=False)
        if not text.startswith(prompt):
            advice = f"; {_THINK}" if any(tag in answer for tag in THINK_TAGS) else ""
            raise UserError(
                f"{location}: the chat template's text with the answer {shorten(answer)} does not "
                f"start with its generation prompt, which ends with {shorten(prompt[-40:])}{advice}"
            )
        return text[len(prompt) :]

    def _make_kind(
        self, written: str, messages: list[Message], prompt: str, location: str
    ) -> PromptKind:
        """Makes and remembers the kind of prompt for which `written` follows the prompt."""
        start, placeholder, tail = written.partition(PLACEHOLDER)
        if not placeholder:
            raise UserError(
                f"{location}: the chat template does not write an answer as it is: for "
                f"{PLACEHOLDER!r} {shorten(written)}"
            )
        ends = [
            (tail.index(token), -len(token), token) for token in self._specials if token in tail
        ]
        if not ends:
            raise UserError(
                f"{location}: the chat template writes no special token at the end of the "
                f"assistant's message, so nothing says where a response ends: {shorten(written)}; "
                "write {{ eos_token }} after that message's content in the template"
            )
        if start.strip() and start not in self._starts:
            self._starts.add(start)
            if self._render(messages, location, generation_prompt=False) == prompt:
                _log.warning(
                    "the chat template has no generation prompt: all responses begin with %s, "
                    "which is trained too; write that under {%% if add_generation_prompt %%}",
                    shorten(start),
                )
        if len(self._kinds) >= MAX_CACHED:
            self._kinds.clear()
        rule = self._find_rule(written, messages, prompt)
        return self._kinds.setdefault(written, PromptKind(min(ends)[2], rule))

    def _find_rule(
        self, written: str, messages: list[Message], prompt: str
    ) -> template_probe.Rule | None:
        # `apply_chat_template` would turn the probe into an ordinary string.
        compiled = chat_template_utils._compile_jinja_template(self._template)
        context = {**self._tokenizer.special_tokens_map, **self._arguments}

        def render(answer: str) -> str:
            conversation = [*messages, {"role": "assistant", "content": answer}]
            text: str = compiled.render(
                messages=conversation,
                tools=None,
                documents=None,
                add_generation_prompt=False,
                **context,
            )
            return text.removeprefix(prompt)

        try:
            if render(PLACEHOLDER) == written:
                return template_probe.find_rule(render, compiled.environment.parse(self._source))
        except Exception:  # A template can do anything with a probe; that is no user's mistake.
            pass
        return None

    def _render(self, messages: list[Message], location: str, generation_prompt: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
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
