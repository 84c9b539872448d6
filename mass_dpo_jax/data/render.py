"""Examples as text: a chat template's, or their own.

With a template the prompt is rendered with the generation prompt and the response is what the
template writes after that for the assistant's message, up to its end token (`<|eot_id|>`,
`<|im_end|>`): what TRL renders, but for what a template writes after that token. Thinking is off,
and every date a template can ask for is the configured one, unless its arguments say otherwise.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from mass_dpo_jax.data import probe
from mass_dpo_jax.data.doubts import Doubts
from mass_dpo_jax.data.examples import Example, History, Message, Text
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import read_text, shorten

# Of `apply_chat_template` itself.
ARGUMENTS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "documents"
}
PROBE = "response"  # Stands for any answer when we look at what the template writes around it.
MOST_KNOWN = 100_000  # Answers whose text is kept.
TAGS = ("<think>", "</think>")
_log = logging.getLogger(__name__)
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

    def doubts(self, example: Example, prompt: Text | History) -> list[str]:
        """What is odd about an example that is rendered, in words to count its prompt by.

        Args:
          prompt: what is left of its prompt.

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

    def doubts(self, example: Example, prompt: Text | History) -> list[str]:
        """Special tokens are what a text that is rendered already should have, but for its end."""
        text = self.prompt(prompt, example.place).rstrip()
        return [f"that end with {self._end}"] if text.endswith(self._end) else []

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
        self._doubts = Doubts(
            lambda messages: self._render(messages, "", generation_prompt=True),
            template, self._special, tokenizer.bos_token,
        )  # fmt: skip
        self._with_special: set[str] = set()  # Answers.
        self._starts: set[str] = set()  # Of responses, that we warned of.

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
            content = _content(response)
            text = kind.known.get(content)
            if text is None:
                text = self._response(kind, messages, prompt, content, field, example)
            texts.append(text)
        return texts

    def doubts(self, example: Example, prompt: Text | History) -> list[str]:
        found = [
            self._doubts.of_texts(_messages(example.prompt), example.place),
            self._doubts.of_roles(_messages(prompt)),
        ]
        if self._with_special and any(
            _content(response) in self._with_special for _, response in _named(example)
        ):
            found.append("with special tokens in their responses")
        return [doubt for doubt in found if doubt]

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
        if any(token not in TAGS for token in self._special.findall(answer)):
            self._with_special.add(content)
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
        start, found, tail = written.partition(PROBE)
        if not found:
            raise UserError(
                f"{place}: the chat template does not write an answer as it is: for {PROBE!r} "
                f"{shorten(written)}"
            )
        ends = [
            (tail.index(token), -len(token), token) for token in self._specials if token in tail
        ]
        if not ends:
            raise UserError(
                f"{place}: the chat template writes no special token at the end of the assistant's "
                f"message, so nothing says where a response ends: {shorten(written)}; write "
                "{{ eos_token }} after that message's content in the template"
            )
        if start.strip() and start not in self._starts:
            self._starts.add(start)
            if self._render(messages, place, generation_prompt=False) == prompt:
                _log.warning(
                    "the chat template has no generation prompt: all responses begin with %s, "
                    "which is trained too; write that under {%% if add_generation_prompt %%}",
                    shorten(start),
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


def _content(response: Text) -> str:
    return response if isinstance(response, str) else response[-1]["content"]


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
