"""Examples as text: a chat template's, or their own.

With a template the prompt is rendered with the generation prompt and the response is what the
template writes after that for the assistant's message, up to its end token (`<|eot_id|>`,
`<|im_end|>`): what TRL renders, but for what a template writes after that token. Thinking is off,
and every date a template can ask for is the configured one, unless its arguments say otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from mass_dpo_jax.data import probe
from mass_dpo_jax.data.examples import Example, History, Message, Text
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.files import read_text, shorten

# Of `apply_chat_template` itself.
ARGUMENTS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "documents"
}
PROBE = "response"  # Stands for any answer when we look at what the template writes around it.
MOST_KNOWN = 100_000  # Answers whose text is kept.
# How texts begin that chat templates have written, also those of other models.
RENDERED = re.compile(
    r"\s*(<[|\uff5c][^|\uff5c>]+[|\uff5c]>|<start_of_turn>|<bos>|<s>|\[INST\]|<<SYS>>)"
)
TAGS = ("<think>", "</think>")
_THINK = "--config.data.chat_template_kwargs='{\"enable_thinking\": true}' lets it"


class Renderer(Protocol):
    """Turns examples into the texts that are tokenized."""

    special_tokens: bool  # Does the tokenizer add its own special tokens to the prompt?
    end_id: int | None  # Appended to the tokens of a response; None: the end is in its text.

    def prompt(self, prompt: Text | History, place: str) -> str:
        """The prompt's text, up to where the response starts."""

    def responses(self, example: Example, prompt: str) -> list[str]:
        """The texts of the chosen response and of all rejected ones, after this text of the
        example's prompt."""

    def doubt(self, prompt: Text | History, place: str) -> str:
        """What is odd about a prompt, in a word or two to count by; "" is nothing.

        Raises:
          UserError: it cannot be meant.
        """


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

    def responses(self, example: Example, prompt: str) -> list[str]:
        return [
            _without_end(self._string(response, field, example.place), self._end, field, example)
            for field, response in _named(example)
        ]

    def doubt(self, prompt: Text | History, place: str) -> str:
        """Special tokens are what a text that is rendered already should have, but for its end."""
        text = self.prompt(prompt, place).rstrip()
        return f"that end with {self._end}" if text.endswith(self._end) else ""

    def _string(self, text: Text, field: str, place: str) -> str:
        if isinstance(text, str):
            return text
        raise UserError(
            f"{place}: field {field!r} is a list of chat messages, which need a template: set "
            "data.chat_template to tokenizer or to a template file, or write strings"
        )


@dataclasses.dataclass
class Kind:
    """What the template writes for answers after prompts of one kind.

    Attributes:
      end: the token that ends a response.
      rule: says what is written for most answers, without rendering them.
      known: the texts of answers that were rendered.
    """

    end: str
    rule: probe.Rule | None
    known: dict[str, str] = dataclasses.field(default_factory=dict)


class Template:
    """A chat template; a prompt that is a string is the user's only message."""

    special_tokens = False  # The template writes them all itself.
    end_id: int | None = None

    def __init__(self, tokenizer: Any, template: str, arguments: Mapping[str, Any]):
        # Only a template's own macro can replace strftime_now: transformers turns a function that
        # is handed to it into a string. The newline after the block is not part of the output.
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
        self._kinds: dict[str, Kind] = {}  # What is written for PROBE -> what that says.

    def prompt(self, prompt: Text | History, place: str) -> str:
        return self._render(_messages(prompt), place, generation_prompt=True)

    def responses(self, example: Example, prompt: str) -> list[str]:
        """Answers repeat (titles, letters), so each is rendered once per kind of prompt, and most
        not at all.

        The kind of a prompt is what the template writes for the probe after it: an empty block of
        thoughts, say, where it follows the last question.
        """
        messages = _messages(example.prompt)
        written = self._after(messages, prompt, PROBE, example.place)
        kind = self._kinds.get(written) or self._look_at(written, messages, prompt, example.place)
        texts = []
        for field, response in _named(example):
            content = response if isinstance(response, str) else response[-1]["content"]
            text = kind.known.get(content)
            if text is None:
                text = self._response(kind, messages, prompt, content, field, example)
            texts.append(text)
        return texts

    def doubt(self, prompt: Text | History, place: str) -> str:
        found = ""
        for message in _messages(prompt):
            text = message["content"]
            start = text.lstrip()
            token = self._special.match(start)
            if token and token[0] in self._openers:
                raise UserError(
                    f"{place}: the prompt begins with {token[0]}, which the chat template writes "
                    "itself, so it is rendered already: set --config.data.chat_template=none, or "
                    "write the text alone"
                )
            if RENDERED.match(start) or (self._header and start.startswith(self._header)):
                found = "that look rendered already"
            elif not found and self._special.search(text):
                found = "with special tokens in their text"
        return found

    @functools.cached_property
    def _opening(self) -> str:
        """What the template writes before the text of a user's only message."""
        try:
            return self.prompt(probe.TEXT, "").partition(probe.TEXT)[0]
        except UserError:
            return ""  # It wants other messages; those of the data will tell.

    @functools.cached_property
    def _openers(self) -> set[str]:
        bos = self._tokenizer.bos_token
        return {*self._special.findall(self._opening), *([bos] if bos else [])}

    @functools.cached_property
    def _header(self) -> str:
        """The user's header where it is no special token, "### Instruction:" say."""
        lines = self._special.sub("\n", self._opening).strip().splitlines()
        header = lines[-1].strip() if lines else ""
        return header if re.search(r"[^\w\s]", header) else ""

    def _response(
        self,
        kind: Kind,
        messages: list[Message],
        prompt: str,
        content: str,
        field: str,
        example: Example,
    ) -> str:
        answer = _without_end(content, kind.end, field, example)
        # The templates that end the prompt with an empty block of thoughts.
        if prompt.rstrip().endswith(TAGS[1]) and any(tag in answer for tag in TAGS):
            raise UserError(
                f"{example.place}: field {field!r} has {TAGS[0]}, and the chat template is told "
                f"not to think: {_THINK}"
            )
        if kind.rule is not None and kind.rule.holds(answer):
            text = kind.rule.before + answer + kind.rule.after
        else:
            text = self._after(messages, prompt, answer, example.place)
        text = text[: text.index(kind.end) + len(kind.end)]
        if len(kind.known) >= MOST_KNOWN:
            kind.known.clear()
        kind.known[content] = text
        return text

    def _after(self, messages: list[Message], prompt: str, answer: str, place: str) -> str:
        """What the template writes after the generation prompt for an answer."""
        message = {"role": "assistant", "content": answer}
        text = self._render([*messages, message], place, generation_prompt=False)
        if not text.startswith(prompt):
            advice = f"; {_THINK}" if any(tag in answer for tag in TAGS) else ""
            raise UserError(
                f"{place}: the chat template's text with the answer {shorten(answer)} does not "
                f"start with its generation prompt, which ends with {shorten(prompt[-40:])}{advice}"
            )
        return text[len(prompt) :]

    def _look_at(self, written: str, messages: list[Message], prompt: str, place: str) -> Kind:
        _, found, tail = written.partition(PROBE)
        ends = [
            (tail.index(token), -len(token), token) for token in self._specials if token in tail
        ]
        if not found or not ends:
            raise UserError(
                f"{place}: the chat template writes no special token at the end of the assistant's "
                f"message, so nothing says where a response ends: {shorten(written)}; write "
                "{{ eos_token }} after that message's content in the template"
            )
        if len(self._kinds) >= MOST_KNOWN:
            self._kinds.clear()
        rule = self._find_rule(written, messages, prompt)
        return self._kinds.setdefault(written, Kind(min(ends)[2], rule))

    def _find_rule(self, written: str, messages: list[Message], prompt: str) -> probe.Rule | None:
        # `apply_chat_template` would make an ordinary string of the probe.
        compiled = chat_template_utils._compile_jinja_template(self._template)
        context = {**self._tokenizer.special_tokens_map, **self._arguments}

        def render(answer: str) -> str:
            talk = [*messages, {"role": "assistant", "content": answer}]
            text: str = compiled.render(
                messages=talk, tools=None, documents=None, add_generation_prompt=False, **context
            )
            return text.removeprefix(prompt)

        try:
            if render(PROBE) == written:
                return probe.find_rule(render, compiled.environment.parse(self._source))
        except Exception:  # A template can do anything with a probe, but be told of it by a user.
            pass
        return None

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


def _without_end(text: str, end: str, field: str, example: Example) -> str:
    """The text of a response without the end token that it may have at its end."""
    if end not in text:
        return text
    text = text.rstrip().removesuffix(end) if text.rstrip().endswith(end) else text
    if end in text:
        raise UserError(
            f"{example.place}: field {field!r} contains the end-of-sequence token {end}, which is "
            "added to every response: leave it out of the text"
        )
    return text
