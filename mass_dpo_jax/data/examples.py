"""One row of a preference data set: a prompt, the chosen response and the rejected ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.files import shorten

Message = dict[str, str]  # {"role": ..., "content": ...}
Text = str | list[Message]
LARGEST_SCORE = 3e38  # What float32 holds.
COLUMNS = ("id", "prompt", "chosen", "rejected", "score_chosen", "score_rejected")
# Columns of TRL's that change what a prompt is; other ones are ignored.
NOT_READ = {
    "tools": "leave it out, or write what the template makes of it into the prompt",
    "chat_template_kwargs": "set config.data.chat_template_kwargs, the same for all rows",
    "images": "models with images are not supported",
}


@dataclasses.dataclass(frozen=True)
class History:
    """A prompt that lists past items, oldest first: the oldest go where it is too long."""

    before: str
    items: tuple[str, ...]
    after: str
    separator: str = ", "

    @property
    def text(self) -> str:
        return self.before + self.separator.join(self.items) + self.after

    def without_oldest(self, count: int) -> History:
        return dataclasses.replace(self, items=self.items[count:])


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with one chosen and at least one rejected response.

    `id` is unique within a split; `place` says where the row came from ("train.jsonl:17").
    `scores` are grades of the responses, the chosen one's first, where the data has them.
    """

    id: str
    prompt: Text | History
    chosen: Text
    rejected: tuple[Text, ...]
    place: str
    scores: tuple[float, ...] | None = None

    @property
    def question(self) -> Hashable:
        """Of the prompt, equal for rows that must not be on both sides of a split: its items, or
        its messages, where one from the user is the same as its text."""
        if isinstance(self.prompt, History):
            return self.prompt.items
        if isinstance(self.prompt, str):
            return self.prompt.strip()
        messages = tuple((m["role"], m["content"].strip()) for m in self.prompt)
        return messages[0][1] if len(messages) == 1 else messages


def from_row(row: Any, default_id: str, place: str) -> Example:
    """The example in a row `{"id"?, "prompt"?, "chosen", "rejected", ...}`.

    Prompt and responses are strings or chat messages. `rejected` is one response or a list of
    them; a list of messages is one response. Without a `prompt` it is what chosen and rejected
    begin with in common: of conversations all but the last message; of strings the characters,
    but for a space before the responses, as in TRL. A conversation that repeats the prompt before
    its answer is understood too, also where the prompt is the text of its last question.
    `score_chosen`, a number, and `score_rejected`, a list with a number for each rejected response
    (or one number, for one), are optional grades. Other columns are ignored.

    Raises:
      UserError: a field is missing, empty or of the wrong type, or the chosen response is also
        among the rejected ones; one score without the other, of the wrong length or no finite
        number. Rejected responses may repeat (drawn twice from a model, say).
    """
    if not isinstance(row, Mapping):
        raise UserError(
            f"{place}: expected an object with prompt, chosen, rejected; found {kind(row)}"
        )
    for field in ("chosen", "rejected"):
        if row.get(field) is None:
            found = ", ".join(map(str, row)) or "nothing"
            raise UserError(f"{place}: field {field!r} is missing; found {found}")
    for field, instead in NOT_READ.items():
        if row.get(field):
            raise UserError(f"{place}: field {field!r} is not read here: {instead}")
    chosen = _text(row["chosen"], "chosen", place)
    rejected = _rejected(row["rejected"], place)
    prompt: Text
    if row.get("prompt") is not None:
        prompt = _whole_prompt(_text(row["prompt"], "prompt", place), chosen)
    elif isinstance(chosen, str):
        prompt, chosen, rejected = _common_start(chosen, rejected, place)
    else:
        prompt = _shared_prompt(chosen, place)
    if not isinstance(prompt, str) and prompt[-1]["role"] != "user":
        raise UserError(
            f"{place}: field 'prompt' must end with a message of role 'user', "
            f"found {prompt[-1]['role']!r}"
        )
    chosen = _answer(prompt, chosen, "chosen", place)
    rejected = [_answer(prompt, r, f"rejected[{i}]", place) for i, r in enumerate(rejected)]
    check_not_rejected(chosen, rejected, place)
    name = check_id(row.get("id"), default_id, place)
    scores = _scores(row, len(rejected), place)
    return Example(name, prompt, chosen, tuple(rejected), place, scores)


def check_not_rejected(chosen: Any, rejected: Sequence[Any], place: str) -> None:
    """Raises UserError where the chosen response is also a rejected one."""
    for i, response in enumerate(rejected):
        if response == chosen:
            shown = chosen if isinstance(chosen, str) else chosen[-1]["content"]
            raise UserError(f"{place}: the chosen response is also rejected[{i}]: {shorten(shown)}")


def digest(examples: Iterable[Example]) -> str:
    """Equal for the same rows in the same order, whatever tokenizer reads them."""
    sha = hashlib.sha256()
    for example in examples:
        prompt = example.prompt.text if isinstance(example.prompt, History) else example.prompt
        row = [example.id, prompt, example.chosen, *example.rejected]
        sha.update(json.dumps(row).encode())
    return sha.hexdigest()[:32]


def check_string(value: Any, field: str, place: str) -> str:
    """The value, if it is a string with something in it that can be written as UTF-8."""
    if not isinstance(value, str):
        raise UserError(f"{place}: field {field!r} must be a string, found {kind(value)}")
    if not value.strip():
        raise UserError(f"{place}: field {field!r} is empty")
    return _encodable(value, field, place)


def _encodable(value: str, field: str, place: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: field {field!r} has half a surrogate pair at character {error.start}"
        ) from None
    return value


def check_id(value: Any, default: str, place: str) -> str:
    """A row's own id as a string, or the default where it has none."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise UserError(f"{place}: field 'id' must be a string or an integer, found {kind(value)}")
    return _encodable(str(value), "id", place)


def _scores(row: Mapping[str, Any], count: int, place: str) -> tuple[float, ...] | None:
    """The scores of the chosen and of `count` rejected responses."""
    fields = ("score_chosen", "score_rejected")
    there = [field for field in fields if row.get(field) is not None]
    if not there:
        return None
    if len(there) == 1:
        [missing] = set(fields) - set(there)
        raise UserError(f"{place}: field {there[0]!r} is there, but {missing!r} is missing")
    rejected = row["score_rejected"]
    if not isinstance(rejected, list):
        rejected = [rejected]
    if len(rejected) != count:
        raise UserError(
            f"{place}: field 'score_rejected' must have a number for each of the {count} rejected "
            f"response(s), found {len(rejected)}"
        )
    named = [("score_chosen", row["score_chosen"])]
    named += [(f"score_rejected[{i}]", score) for i, score in enumerate(rejected)]
    return tuple(_number(value, field, place) for field, value in named)


def _number(value: Any, field: str, place: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Also false for NaN; and scores are kept as float32.
    if not is_number or not abs(value) <= LARGEST_SCORE:
        raise UserError(f"{place}: field {field!r} must be a finite number, found {kind(value)}")
    return float(value)


def _rejected(value: Any, place: str) -> list[Text]:
    if isinstance(value, str):
        return [_text(value, "rejected", place)]
    if not isinstance(value, list):
        raise UserError(
            f"{place}: field 'rejected' must be a response or a list of responses, "
            f"found {kind(value)}"
        )
    if not value:
        raise UserError(f"{place}: field 'rejected' is empty")
    if all(isinstance(v, Mapping) for v in value):
        return [_text(value, "rejected", place)]
    return [_text(v, f"rejected[{i}]", place) for i, v in enumerate(value)]


def _text(value: Any, field: str, place: str) -> Text:
    if not isinstance(value, list):
        if not isinstance(value, str):
            raise UserError(
                f"{place}: field {field!r} must be a string or a list of chat messages, "
                f"found {kind(value)}"
            )
        return check_string(value, field, place)
    if not value:
        raise UserError(f"{place}: field {field!r} is empty")
    return [_message(m, f"{field}[{i}]", place) for i, m in enumerate(value)]


def _message(value: Any, field: str, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise UserError(f"{place}: field {field!r} must be a chat message, found {kind(value)}")
    for key in ("role", "content"):
        if not isinstance(value.get(key), str):
            raise UserError(
                f"{place}: field {field!r}: a chat message needs a string {key!r}, "
                f"found {kind(value.get(key))}"
            )
    check_string(value["role"], f"{field}.role", place)
    # Columns of a table hold every key in every row; only one with a value means something.
    extra = [k for k, v in value.items() if k not in ("role", "content") and v is not None]
    if extra:
        raise UserError(
            f"{place}: field {field!r}: a chat message has role and content only, "
            f"found {extra[0]!r}"
        )
    if value["role"] == "system" and not value["content"]:
        return {"role": "system", "content": ""}
    content = check_string(value["content"], f"{field}.content", place)
    return {"role": value["role"], "content": content}


def _whole_prompt(prompt: Text, chosen: Text) -> Text:
    """The conversation before the answer, where the prompt is the text of its last question."""
    if isinstance(prompt, str) and isinstance(chosen, list) and len(chosen) > 2:
        if chosen[-2] == {"role": "user", "content": prompt}:
            return chosen[:-1]
    return prompt


def _common_start(chosen: str, rejected: Sequence[Text], place: str) -> tuple[str, str, list[Text]]:
    """The prompt that all of the texts start with, and what is left of them."""
    check_not_rejected(chosen, rejected, place)
    texts = [chosen]
    for i, response in enumerate(rejected):
        if not isinstance(response, str):
            raise UserError(
                f"{place}: field 'prompt' is missing, and 'chosen' is a string where "
                f"'rejected[{i}]' is a conversation: expected all of one kind"
            )
        texts.append(response)
    first, last = min(texts), max(texts)  # In order, what these share all of them do.
    length = next((i for i, c in enumerate(first) if c != last[i]), len(first))
    if length and chosen[length - 1] == " ":
        length -= 1
    left = [text[length:] for text in texts]
    if not chosen[:length].strip():
        raise UserError(
            f"{place}: field 'prompt' is missing, and chosen and rejected have no text in common "
            "at their start"
        )
    for i, text in enumerate(left):
        if not text.strip():
            field = f"rejected[{i - 1}]" if i else "chosen"
            raise UserError(
                f"{place}: field 'prompt' is missing, and all of {field!r} is the start of the "
                "others: nothing is left for a response"
            )
    return chosen[:length], left[0], list(left[1:])


def _shared_prompt(chosen: list[Message], place: str) -> list[Message]:
    if len(chosen) < 2:
        raise UserError(
            f"{place}: field 'prompt' is missing and 'chosen' has one message only, so there is "
            "nothing before the answer"
        )
    return chosen[:-1]


def _answer(prompt: Text, response: Text, field: str, place: str) -> Text:
    """The response without the prompt's messages, where it repeats them."""
    if isinstance(response, str):
        return response
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if len(response) > 1 and response[:-1] == asked:
        response = response[-1:]
    if len(response) > 1:
        raise UserError(
            f"{place}: field {field!r} must be one assistant message, or the prompt's messages "
            f"and then one; found {len(response)} messages (several responses are a list of lists)"
        )
    if response[0]["role"] != "assistant":
        raise UserError(
            f"{place}: field {field!r} must be a message of role 'assistant', "
            f"found {response[0]['role']!r}"
        )
    return response


def kind(value: Any) -> str:
    """The value's type in JSON's words, with a short one shown."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {value}".lower()
    if isinstance(value, str):
        return f"the string {shorten(value)}"
    return "an object" if isinstance(value, Mapping) else "a list"
