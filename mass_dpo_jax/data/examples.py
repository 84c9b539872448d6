"""What a dataset consists of: `Example`, a prompt with its chosen and its rejected responses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import shorten

Message = dict[str, str]  # {"role": ..., "content": ...}
Text = str | list[Message]


@dataclasses.dataclass(frozen=True)
class History:
    """A prompt that lists past items, oldest first; if it is too long, the oldest are removed.

    Attributes:
        before: the text before the items.
        items: the items' names.
        after: the text after them.
        separator: the text between two items.
    """

    before: str
    items: tuple[str, ...]
    after: str
    separator: str = ", "

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.before + self.separator.join(self.items) + self.after

    def without_oldest(self, count: int) -> History:
        """Returns the prompt without its `count` oldest items."""
        return dataclasses.replace(self, items=self.items[count:])


Prompt = Text | History


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with one chosen and at least one rejected response.

    Attributes:
        id: unique within a split.
        prompt: a text, chat messages, or a history of items.
        chosen: the chosen response.
        rejected: the rejected responses.
        place: origin of the row, for messages: "train.jsonl:17".
        scores: grades of the responses, the chosen one's first, where the data has them.
    """

    id: str
    prompt: Prompt
    chosen: Text
    rejected: tuple[Text, ...]
    place: str
    scores: tuple[float, ...] | None = None

    @property
    def responses(self) -> tuple[Text, ...]:
        """The chosen response and the rejected ones."""
        return (self.chosen, *self.rejected)

    @property
    def named_responses(self) -> list[tuple[str, Text]]:
        """The responses, each with the name of its field: "chosen", "rejected[0]"."""
        names = ["chosen", *(f"rejected[{i}]" for i in range(len(self.rejected)))]
        return list(zip(names, self.responses, strict=True))

    @property
    def question(self) -> Hashable:
        """Equal for rows whose prompts ask the same, which must be on one side of a split.

        That is a history's items; for messages, a single one counts as its text.
        """
        if isinstance(self.prompt, History):
            return self.prompt.items
        if isinstance(self.prompt, str):
            return self.prompt.strip()
        messages = tuple((m["role"], m["content"].strip()) for m in self.prompt)
        return messages[0][1] if len(messages) == 1 else messages


def as_text(text: Prompt) -> Text:
    """Returns a history as its text, and everything else as it is."""
    return text.text if isinstance(text, History) else text


def as_messages(prompt: Prompt) -> list[Message]:
    """Returns a prompt as chat messages: a text becomes the user's only message."""
    text = as_text(prompt)
    return [{"role": "user", "content": text}] if isinstance(text, str) else text


def last_content(text: Text) -> str:
    """Returns a text, or the content of the last of its messages."""
    return text if isinstance(text, str) else text[-1]["content"]


def check_not_rejected(chosen: Any, rejected: Sequence[Any], location: str) -> None:
    """Raises UserError where the chosen response is also a rejected one."""
    for i, response in enumerate(rejected):
        if response == chosen:
            text = shorten(last_content(chosen))
            raise UserError(f"{location}: the chosen response is also rejected[{i}]: {text}")


def digest_examples(examples: Iterable[Example]) -> str:
    """Returns a digest that is equal for the same rows in the same order, before any tokenizer."""
    sha = hashlib.sha256()
    for example in examples:
        row = [example.id, as_text(example.prompt), *example.responses]
        sha.update(json.dumps(row).encode())
    return sha.hexdigest()[:32]
