"""What a dataset consists of: `Example`, a prompt with its chosen and its rejected responses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import shorten

# Role and content, two strings, and what more a chat template reads: calls, names, thoughts.
Message = dict[str, Any]
Text = str | list[Message]
REASONING = ("reasoning_content", "reasoning", "thinking")  # Where a message has its thoughts.


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
    """A prompt with responses, of which some are better than others: a partial order.

    One of the best is the chosen response, and those below it are the rejected ones. Others as good
    as the chosen one are never its negatives; methods that look at the best alone leave them out.

    Attributes:
        id: unique within a split.
        prompt: a text, chat messages, or a history of items.
        chosen: a response that no other is better than.
        rejected: the responses that are worse.
        place: origin of the row, for messages: "train.jsonl:17".
        scores: the data's own numbers for `responses`, larger for better, where it has them. They
            may contradict the order.
        also_chosen: the responses that are as good as the chosen one.
        ranks: the order of `responses`: 0 for the best, larger for worse, equal where the data
            prefers neither. None: all that is known is which are chosen, see `order`.
        probabilities: of each rejected response, to be among them, where they were drawn from more;
            in (0, 1]. None: they were not drawn.
        tools: the functions that the model may call, as JSON schemas.
    """

    id: str
    prompt: Prompt
    chosen: Text
    rejected: tuple[Text, ...]
    place: str
    scores: tuple[float, ...] | None = None
    also_chosen: tuple[Text, ...] = ()
    ranks: tuple[int, ...] | None = None
    probabilities: tuple[float, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def responses(self) -> tuple[Text, ...]:
        """The chosen response, the rejected ones, and those as good as the chosen one."""
        return (self.chosen, *self.rejected, *self.also_chosen)

    @property
    def order(self) -> tuple[int, ...]:
        """The rank of each response: `ranks`, or 0 for chosen and 1 for rejected ones."""
        if self.ranks is not None:
            return self.ranks
        return (0, *[1] * len(self.rejected), *[0] * len(self.also_chosen))

    @property
    def named_responses(self) -> list[tuple[str, Text]]:
        """The responses, each with the name of its field: "chosen", "rejected[0]"."""
        names = [name_response(i, len(self.rejected)) for i in range(len(self.responses))]
        return list(zip(names, self.responses, strict=True))

    @property
    def question(self) -> Hashable:
        """Equal for rows whose prompts ask the same, which must be on one side of a split.

        That is a history's items; for messages, a single one counts as its text.
        """
        return identify_prompt(self.prompt)


def identify_prompt(prompt: Prompt) -> Hashable:
    """Returns what is equal for prompts that ask the same, see `Example.question`."""
    if isinstance(prompt, History):
        return prompt.items
    if isinstance(prompt, str):
        return prompt.strip()
    messages = tuple(
        (m["role"], m["content"].strip(), *([json.dumps(more)] if (more := list_more(m)) else ()))
        for m in prompt
    )
    return messages[0][1] if len(messages) == 1 else messages


def list_more(message: Message) -> dict[str, Any]:
    """Returns what a message has besides its role and content: calls, names, thoughts."""
    return {key: value for key, value in message.items() if key not in ("role", "content")}


def format_message(message: Message) -> str:
    """Returns what a message says, calls and thoughts included."""
    more = [f"{key}: {json.dumps(value)}" for key, value in list_more(message).items()]
    return "\n".join(([message["content"]] if message["content"] or not more else []) + more)


def name_response(candidate: int, num_rejected: int) -> str:
    """Returns the field of a response, by its index in `Example.responses`."""
    if candidate > num_rejected:
        return f"chosen[{candidate - num_rejected}]"
    return f"rejected[{candidate - 1}]" if candidate else "chosen"


def format_text(text: Prompt) -> str:
    """Returns a prompt or an answer as one text: what its messages say, one below the other."""
    return "\n".join(map(format_message, as_messages(text)))


def as_text(text: Prompt) -> Text:
    """Returns a history as its text, and everything else as it is."""
    return text.text if isinstance(text, History) else text


def as_messages(text: Prompt, role: str = "user") -> list[Message]:
    """Returns a prompt or an answer as chat messages: a text becomes the only one, of that role."""
    text = as_text(text)
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def last_content(text: Text) -> str:
    """Returns a text, or the content of the last of its messages."""
    content: str = text if isinstance(text, str) else text[-1]["content"]
    return content


def as_answer(text: Text) -> Text:
    """Returns an answer as its text, or as messages where these have more than that."""
    if isinstance(text, str) or len(text) > 1 or list_more(text[0]):
        return text
    content: str = text[0]["content"]
    return content


def identify_answer(text: Text) -> str:
    """Returns a string that is equal for equal answers: the text of those that are no more."""
    answer = as_answer(text)
    return answer if isinstance(answer, str) else json.dumps(answer)


def check_not_rejected(chosen: Any, rejected: Sequence[Any], location: str) -> None:
    """Raises UserError where the chosen response is also a rejected one."""
    for i, response in enumerate(rejected):
        if response == chosen:
            text = shorten(identify_answer(chosen))
            raise UserError(f"{location}: the chosen response is also rejected[{i}]: {text}")


def digest_examples(examples: Iterable[Example]) -> str:
    """Returns a digest that is equal for the same rows in the same order, before any tokenizer."""
    sha = hashlib.sha256()
    for example in examples:
        row: list[Any] = [example.id, as_text(example.prompt), *example.responses]
        if example.also_chosen or example.ranks is not None:
            row.append(example.order)
        if example.tools:
            row.append(example.tools)
        sha.update(json.dumps(row).encode())
    return sha.hexdigest()[:32]
