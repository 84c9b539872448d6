"""From examples to text: with a chat template (chat_template.py) or as they are.

Both renderers give a prompt up to where the response begins, and responses from there to their end
token. A response never depends on the other ones.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from mass_dpo_jax.data.chat_template import ChatTemplate, remove_end_token
from mass_dpo_jax.data.examples import Example, Prompt, Text, as_text
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import read_text

# Arguments of `apply_chat_template` itself, which are not the template's.
RESERVED_ARGUMENTS = set(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
) - {"documents"}


class Renderer(Protocol):
    """Turns examples into the texts that are tokenized.

    Attributes:
        special_tokens: whether the tokenizer adds its own special tokens to the prompt.
        end_id: the token id that is appended to a response; None if its text contains the end.
    """

    special_tokens: bool
    end_id: int | None

    def render_prompt(
        self, prompt: Prompt, location: str, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """Returns the prompt's text, up to where the response starts.

        Args:
            prompt: the prompt as the model sees it.
            location: of the row, for errors.
            tools: the functions that the model may call.
        """

    def render_responses(self, example: Example, prompt: str) -> list[str]:
        """Returns the texts of the chosen response and of all rejected ones.

        Args:
            example: an example with its prompt as the model sees it.
            prompt: the text of that prompt.
        """

    def find_warnings(self, example: Example, prompt: Prompt) -> list[str]:
        """Returns what looks wrong with an example, as phrases by which prompts are counted.

        Args:
            example: an example that was rendered.
            prompt: the shortened prompt.

        Raises:
            UserError: the example cannot be meant as it is.
        """


def make_renderer(tokenizer: Any, data: ConfigDict) -> Renderer:
    """Returns the renderer for `data.chat_template`: "tokenizer", "none" or a template file.

    Args:
        tokenizer: a tokenizer of transformers.
        data: the configuration's `data`. Reads `chat_template`, `chat_template_kwargs`, `date`.

    Raises:
        UserError: there is no such template, or the tokenizer lacks what the renderer needs.
    """
    name = data.chat_template
    if name == "none":
        return PlainRenderer(tokenizer)
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
    else:
        try:
            template = read_text(Path(name))
        except UserError as error:
            raise UserError(
                f"config.data.chat_template={name!r}: expected tokenizer, none or a readable "
                f"template file: {error}"
            ) from None
    return ChatTemplate(tokenizer, template, read_template_arguments(data))


def read_template_arguments(data: ConfigDict) -> dict[str, Any]:
    """Returns what a chat template is given besides messages; `data.chat_template_kwargs` wins."""
    field = "config.data.chat_template_kwargs"
    try:
        arguments = json.loads(data.chat_template_kwargs or "{}")
    except ValueError as error:
        raise UserError(f"{field}={data.chat_template_kwargs!r}: not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise UserError(
            f"{field}={data.chat_template_kwargs!r}: expected a JSON object, for example "
            '{"enable_thinking": true}'
        )
    for name in arguments:
        if name in RESERVED_ARGUMENTS:
            raise UserError(f"{field}: {name!r} is not for a user to set")
    return {"enable_thinking": False, "date_string": data.date, **arguments}


class PlainRenderer:
    """Leaves texts as they are, and ends each response with the end-of-sequence token.

    A response that ends with the text of that token already gets it once.
    """

    special_tokens = True

    def __init__(self, tokenizer: Any):
        if tokenizer.eos_token_id is None:
            raise UserError(
                "config.data.chat_template='none' ends every response with the end-of-sequence "
                "token, but the model's tokenizer and config.json name none (eos_token; null in "
                "tokenizer_config.json is none, whatever config.json says): name one there"
            )
        self.end_id: int | None = tokenizer.eos_token_id
        self._end = tokenizer.eos_token

    def render_prompt(
        self, prompt: Prompt, location: str, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """Returns the prompt, which must be a text or a history, without tools."""
        if tools:
            raise UserError(
                f"{location}: field 'tools' has functions, which need a template: set "
                "data.chat_template to tokenizer or to a template file, or leave the column out "
                "with --config.data.columns=tools="
            )
        return self._check_string(as_text(prompt), "prompt", location)

    def render_responses(self, example: Example, prompt: str) -> list[str]:
        """Returns the responses, which must be texts, without the end-of-sequence token."""
        texts = []
        for field, response in example.named_responses:
            text = self._check_string(response, field, example.place)
            texts.append(remove_end_token(text, self._end, field, example.place))
        return texts

    def find_warnings(self, example: Example, prompt: Prompt) -> list[str]:
        """Returns whether the prompt ends with the end-of-sequence token, as a warning.

        Other special tokens belong into a text that was rendered elsewhere.
        """
        text = self.render_prompt(prompt, example.place).rstrip()
        return [f"that end with {self._end}"] if text.endswith(self._end) else []

    def _check_string(self, text: Text, field: str, location: str) -> str:
        if isinstance(text, str):
            return text
        raise UserError(
            f"{location}: field {field!r} is a list of chat messages, which need a template: set "
            "data.chat_template to tokenizer or to a template file, or write strings"
        )
