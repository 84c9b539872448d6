"""Warnings about all rows of a split together: columns that are not read, and what looks wrong."""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.fields import has_content, to_json_value
from mass_dpo_jax.data.formats.raw_row import Format
from mass_dpo_jax.data.grouping import Completion
from mass_dpo_jax.data.readers.columns import COLUMNS
from mass_dpo_jax.data.readers.messages import is_data, is_response_list

# Columns that other programs make part of the prompt.
_PROMPT_COLUMNS = ("system", "system_prompt", "history", "input", "context", "instruction")
_TURNS = re.compile(r"(?:^|\n)\s*Human:.*\n\s*Assistant:", re.S)

_logged: set[str] = set()
_log = logging.getLogger(__name__)


class RowWarnings:
    """Counts what looks wrong with rows: `add` takes each row and its example, `log` reports.

    Args:
        name: the table's name, which begins every message.
        has_template: whether a chat template will render the examples.
        row_format: the rows' format; None for TRL's.
    """

    def __init__(self, name: str, has_template: bool, row_format: Format | None = None):
        self._format = row_format
        self._name = name
        self._has_template = has_template
        self._rows = 0
        self._unread: dict[str, None] = {}  # Columns, in order.
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, row: Mapping[str, Any], example: Example | Completion) -> None:
        """Looks at a row and the example that was read from it."""
        self._rows += 1
        for column, value in row.items():
            if not self._is_read(column) and column not in self._unread and has_content(value):
                self._unread[column] = None
        if isinstance(example.prompt, list):
            self._counts["begun"] += example.prompt[-1]["role"] == "assistant"
        if isinstance(example, Completion):
            return
        if self._format is None:
            self._add_lists(row, example)
        prompt = example.prompt
        is_implicit = self._format is None and to_json_value(row.get("prompt")) is None
        if is_implicit and isinstance(prompt, str):
            starts = (str(text[0]) for text in example.responses)
            split = prompt[-1].isalnum() and any(start.isalnum() for start in starts)
            self._counts["letters"] += split
        if isinstance(prompt, str) and all(
            isinstance(text, str) and text.startswith(prompt) for text in example.responses
        ):
            self._counts["repeated"] += 1
        if example.scores is not None:
            self._counts["inverted"] += example.scores[0] < max(
                example.scores[1 : 1 + len(example.rejected)]
            )
        elif example.rejected and any(
            row.get(field) is not None for field in ("score_chosen", "score_rejected")
        ):
            self._counts["unscored"] += 1
        if self._has_template and isinstance(prompt, str):
            self._counts["turns"] += _TURNS.search(prompt) is not None

    def _is_read(self, column: str) -> bool:
        if self._format is None:
            return column in COLUMNS
        return column in ("id", "tools") or self._format.reads(column)

    def _add_lists(self, row: Mapping[str, Any], example: Example) -> None:
        """Counts nulls in lists, and lists that were written as text."""
        rejected = to_json_value(row.get("rejected"))
        if isinstance(rejected, list):
            if len(rejected) != len(example.rejected):  # Otherwise it has no null.
                self._counts["null"] += any(to_json_value(text) is None for text in rejected)
        elif is_response_list(rejected):
            is_text = isinstance(example.chosen, str) and is_data(row["chosen"])
            self._counts["lists" if is_text else "decoded"] += 1
        for given, read in ((row.get("prompt"), example.prompt), (row["chosen"], example.chosen)):
            if isinstance(read, list) and isinstance(given, str) and given.lstrip()[:1] in "[{":
                self._counts["messages"] += 1
                break

    def messages(self) -> Iterator[tuple[int, str]]:
        """Yields the level of logging and the message of each warning."""
        unread = [str(column) for column in self._unread if column not in _PROMPT_COLUMNS]
        if unread:
            yield logging.INFO, f"{self._name}: not read: {', '.join(unread)}"
        for column in self._unread:
            if column in _PROMPT_COLUMNS:
                yield (
                    logging.WARNING,
                    f"{self._name}: not read: {column}; where it belongs to the prompt, write it "
                    "into prompt, or name it in config.data.columns",
                )
        for warning, message in _MESSAGES.items():
            count = self._counts[warning]
            if warning == "repeated" and 2 * count <= self._rows:
                continue  # All answers may repeat a sum, say; in most rows it is a mistake.
            if count:
                yield logging.WARNING, f"{self._name}: {count} of {self._rows} rows {message}"

    def log(self, once: bool) -> None:
        """Logs the messages; with `once` only those not logged before, for another split."""
        for level, message in self.messages():
            if not (once and message in _logged):
                _log.log(level, "%s", message)
            if once:
                _logged.add(message)


_MESSAGES = {
    "begun": "have a prompt that ends with a message of the assistant, which is taken for the "
    "beginning of all their answers",
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
