"""What is said once of all rows of a split: columns that are not read, and what looks wrong."""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mass_dpo_jax.data.checks import has_content, plain
from mass_dpo_jax.data.columns import COLUMNS
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.written import is_data, is_response_list

# Columns that other programs put into the prompt.
_OF_PROMPTS = ("system", "system_prompt", "history", "input", "context", "instruction")
_TURNS = re.compile(r"(?:^|\n)\s*Human:.*\n\s*Assistant:", re.S)

_said: set[str] = set()
_log = logging.getLogger(__name__)


class RowNotes:
    """Looks at every row and its example with `add`, and says at the end what there was."""

    def __init__(self, name: str, has_template: bool):
        self._name = name
        self._has_template = has_template
        self._rows = 0
        self._unread: dict[str, None] = {}  # In order.
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, row: Mapping[str, Any], example: Example) -> None:
        self._rows += 1
        for column, value in row.items():
            if column not in COLUMNS and column not in self._unread and has_content(value):
                self._unread[column] = None
        rejected = plain(row["rejected"])
        if isinstance(rejected, list):
            if len(rejected) != len(example.rejected):  # Or it is one conversation.
                self._counts["null"] += any(plain(text) is None for text in rejected)
        elif is_response_list(rejected):
            is_text = isinstance(example.chosen, str) and is_data(row["chosen"])
            self._counts["lists" if is_text else "decoded"] += 1
        for given, read in ((row.get("prompt"), example.prompt), (row["chosen"], example.chosen)):
            if isinstance(read, list) and isinstance(given, str) and given.lstrip()[:1] in "[{":
                self._counts["messages"] += 1
                break
        if plain(row.get("prompt")) is None and isinstance(example.prompt, str):
            starts = (str(text[0]) for text in (example.chosen, *example.rejected))
            split = example.prompt[-1].isalnum() and any(start.isalnum() for start in starts)
            self._counts["letters"] += split
        prompt, answers = example.prompt, (example.chosen, *example.rejected)
        if isinstance(prompt, str) and all(
            isinstance(text, str) and text.startswith(prompt) for text in answers
        ):
            self._counts["repeated"] += 1
        if example.scores is not None:
            self._counts["inverted"] += example.scores[0] < max(example.scores[1:])
        elif any(row.get(field) is not None for field in ("score_chosen", "score_rejected")):
            self._counts["unscored"] += 1
        if self._has_template and isinstance(example.prompt, str):
            self._counts["turns"] += _TURNS.search(example.prompt) is not None

    def lines(self) -> Iterator[tuple[int, str]]:
        """What there is to say: the level of logging, and the message."""
        unread = [str(column) for column in self._unread if column not in _OF_PROMPTS]
        if unread:
            yield logging.INFO, f"{self._name}: not read: {', '.join(unread)}"
        for column in self._unread:
            if column in _OF_PROMPTS:
                yield (
                    logging.WARNING,
                    f"{self._name}: not read: {column}; where it belongs to the prompt, write it "
                    "into prompt, or name it in config.data.columns",
                )
        for what, message in _MESSAGES.items():
            count = self._counts[what]
            if what == "repeated" and 2 * count <= self._rows:
                continue  # Answers to a sum may all begin with it, but not those to most prompts.
            if count:
                yield logging.WARNING, f"{self._name}: {count} of {self._rows} rows {message}"

    def log(self, once: bool) -> None:
        """Logs that; with `once` only what was not said before, of another part of the file."""
        for level, message in self.lines():
            if not (once and message in _said):
                _log.log(level, "%s", message)
            if once:
                _said.add(message)


_MESSAGES = {
    "null": "have null among the rejected responses, which is left out",
    "messages": "have chat messages written as text, which are read as messages",
    "decoded": "have a list written as text in rejected, which is read as that list; where it is "
    'an answer, write a list of one: ["[...]"]',
    "lists": "have a list written as text in rejected and another, or an object, in chosen, which "
    "are taken for answers",
    "letters": "have no prompt, and answers that differ first in the middle of a word, whose "
    "beginning is taken for a part of the prompt: write prompt in a field of its own",
    "repeated": "have responses that all begin with the prompt, which the model then gets twice: "
    "write the responses without it",
    "unscored": "have scores that are null or not finite, which are not read",
    "inverted": "have a score_rejected above score_chosen: are the columns swapped?",
    "turns": "have a prompt with turns in it, Human: and Assistant:, which the chat template makes "
    "one message; write chat messages, or set --config.data.chat_template=none",
}
