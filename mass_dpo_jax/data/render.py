"""Examples as text: a chat template's, or their own.

With a template the prompt is rendered with the generation prompt and the response is what the
template writes after that for the assistant's message, up to its end token (`<|eot_id|>`,
`<|im_end|>`): what TRL renders, but for what a template writes after that token. Thinking is off,
and every date a template can ask for is the configured one, unless its arguments say otherwise.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from mass_dpo_jax.data.examples import Example, History, Message, Text
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.files import read_text, shorten

# Of `apply_chat_template` itself.
ARGUMENTS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "documents"
}
PROBE = "response"  # Stands for any answer when we look at what the template writes around it.


class Renderer(Protocol):
    """Turns examples into the texts that are tokenized."""

    special_tokens: bool  # Does the tokenizer add its own special tokens to the prompt?
    end_id: int | None  # Appended to the tokens of a response; None: the end is in its text.

    def prompt(self, prompt: Text | History, place: str) -> str:
        """The prompt's text, up to where the response starts."""

    def responses(self, example: Example) -> list[str]:
        """The texts of the chosen response and of all rejected ones."""


def make_renderer(tokenizer: Any, data: Any) -> Renderer:
    """The renderer that `data.chat_template` names: "tokenizer", "none" or a template file."""
    name = data.chat_template
    if name == "none":
        return Plain(tokenizer)
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise UserError(
                "config.data.chat_template='tokenizer', but the model's tokenizer has no chat "
                "template: set it to none, or to the path of a template file"
            )
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:  # It has several, and none is called "default".
            raise UserError(f"config.data.chat_template='tokenizer': {error}") from None
        return Template(tokenizer, template, template_arguments(data))
    try:
        template = read_text(Path(name))
    except UserError as error:
        raise UserError(
            f"config.data.chat_template={name!r}: expected tokenizer, none or a readable template "
            f"file: {error}"
        ) from None
    return Template(tokenizer, template, template_arguments(data))


def template_arguments(data: Any) -> dict[str, Any]:
    """What a chat template is given beside the messages: `data.chat_template_kwargs`, over ours."""
    field = "config.data.chat_template_kwargs"
    try:
        given = json.loads(data.chat_template_kwargs or "{}")
    except ValueError as error:
        raise UserError(f"{field}={data.chat_template_kwargs!r}: not JSON: {error}") from None
    if not isinstance(given, dict):
        raise UserError(
            f"{field}={data.chat_template_kwargs!r}: expected a JSON object, for example "
            '{"enable_thinking": true}'
        )
    for name in given:
        if name in ARGUMENTS:
            raise UserError(f"{field}: {name!r} is not for a user to set")
    return {"enable_thinking": False, "date_string": data.date, **given}


class Plain:
    """No template: texts as they are, the end-of-sequence token after each response (once, where
    the text has it already)."""

    special_tokens = True

    def __init__(self, tokenizer: Any):
        if tokenizer.eos_token_id is None:
            raise UserError(
                "config.data.chat_template='none' ends every response with the end-of-sequence "
                "token, but the model's tokenizer and config.json name none (eos_token; null in "
                "tokenizer_config.json is none, whatever config.json says)"
            )
        self.end_id: int | None = tokenizer.eos_token_id
        self._end = tokenizer.eos_token

    def prompt(self, prompt: Text | History, place: str) -> str:
        if isinstance(prompt, History):
            return prompt.text
        return self._string(prompt, "prompt", place)

    def responses(self, example: Example) -> list[str]:
        texts = []
        for field, response in _named(example):
            text = self._string(response, field, example.place).removesuffix(self._end)
            _check_no_end(text, self._end, field, example.place)
            texts.append(text)
        return texts

    def _string(self, text: Text, field: str, place: str) -> str:
        if isinstance(text, str):
            return text
        raise UserError(
            f"{place}: field {field!r} is a list of chat messages, which need a template: set "
            "data.chat_template to tokenizer or to a template file, or write strings"
        )


class Template:
    """A chat template; a prompt that is a string is the user's only message."""

    special_tokens = False  # The template writes them all itself.
    end_id: int | None = None

    def __init__(self, tokenizer: Any, template: str, arguments: Mapping[str, Any]):
        # Only a template's own macro can replace strftime_now: transformers turns a function that
        # is handed to it into a string. The newline after the block is not part of the output.
        date = arguments["date_string"]
        macro = "{%- macro strftime_now(format) -%}{{ " + json.dumps(date) + " }}{%- endmacro %}\n"
        self._template = macro + template
        self._arguments = arguments
        self._tokenizer = tokenizer
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._specials = sorted({*special, *tokenizer.all_special_tokens} - {""})
        self._ends: dict[str, str] = {}  # What is written for the probe -> the end token in it.
        self._known: dict[tuple[str, str], str] = {}  # (written for the probe, answer) -> text.

    def prompt(self, prompt: Text | History, place: str) -> str:
        return self._render(_messages(prompt), place, generation_prompt=True)

    def responses(self, example: Example) -> list[str]:
        """Answers repeat (titles, letters), so each is rendered once per kind of prompt.

        The kind of a prompt is what the template writes for the probe after it: an empty block of
        thoughts, say, where it follows the last question.
        """
        messages = _messages(example.prompt)
        prompt = self._render(messages, example.place, generation_prompt=True)
        kind = self._after(messages, prompt, PROBE, example.place)
        end = self._ends.get(kind) or self._find_end(kind, example.place)
        texts = []
        for field, response in _named(example):
            content = response if isinstance(response, str) else response[-1]["content"]
            if (kind, content) not in self._known:
                _check_no_end(content, end, field, example.place)
                text = self._after(messages, prompt, content, example.place)
                self._known[kind, content] = text[: text.index(end) + len(end)]
            texts.append(self._known[kind, content])
        return texts

    def _after(self, messages: list[Message], prompt: str, answer: str, place: str) -> str:
        """What the template writes after the generation prompt for an answer."""
        message = {"role": "assistant", "content": answer}
        text = self._render([*messages, message], place, generation_prompt=False)
        if not text.startswith(prompt):
            raise UserError(
                f"{place}: the chat template's text with the answer {shorten(answer)} does not "
                f"start with its generation prompt, which ends with {shorten(prompt[-40:])}"
            )
        return text[len(prompt) :]

    def _find_end(self, written: str, place: str) -> str:
        _, found, tail = written.partition(PROBE)
        ends = [
            (tail.index(token), -len(token), token) for token in self._specials if token in tail
        ]
        if not found or not ends:
            raise UserError(
                f"{place}: the chat template writes no special token at the end of the assistant's "
                f"message, so nothing says where a response ends: {shorten(written)}"
            )
        self._ends[written] = min(ends)[2]
        return self._ends[written]

    def _render(self, messages: list[Message], place: str, generation_prompt: bool) -> str:
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
            raise UserError(f"{place}: the chat template fails on ({roles}): {message}") from None
        return text


def _messages(prompt: Text | History) -> list[Message]:
    if isinstance(prompt, History):
        prompt = prompt.text
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _named(example: Example) -> list[tuple[str, Text]]:
    rejected = [(f"rejected[{i}]", r) for i, r in enumerate(example.rejected)]
    return [("chosen", example.chosen), *rejected]


def _check_no_end(text: str, end: str, field: str, place: str) -> None:
    if end in text:
        raise UserError(
            f"{place}: field {field!r} contains the end-of-sequence token {end}, which is added to "
            "every response: leave it out of the text"
        )
