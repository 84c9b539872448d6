"""One row of a preference data set: a prompt, the chosen response and the rejected ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from mass_dpo_jax.data.checks import check_id, has_content, kind, plain
from mass_dpo_jax.data.columns import describe_absent, has_prompt_elsewhere
from mass_dpo_jax.data.messages import Message as Message
from mass_dpo_jax.data.messages import Text as Text
from mass_dpo_jax.data.messages import is_simple, read_text
from mass_dpo_jax.data.written import decode_responses, is_data
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import shorten

LARGEST_SCORE = 3e38  # What float32 holds.
# Columns that change what a prompt is, and so are refused where there is something in them.
NOT_READ = {
    "tools": "leave it out, or write what the template makes of it into the prompt",
    "chat_template_kwargs": "set config.data.chat_template_kwargs, the same for all rows",
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"),
        "models with images, videos or audio are not supported; leave the column out where the "
        "text says it all",
    ),
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

    Prompt and responses are strings or chat messages; one message stands for a list of it.
    `rejected` is one response or a list of them, where a null is none; a list of messages is one
    response. Without a `prompt` it is what chosen and rejected begin with in common: of
    conversations all but the last message; of strings the characters, but for a space before the
    responses, as in TRL. A conversation that repeats the prompt before its answer is understood
    too, also where the prompt is the text of its last question.

    A string that is a list of messages, as JSON or as Python prints it, is that list. The string
    of `rejected` that is a list of strings, or of lists of messages, is that list, unless chosen
    is a list or an object as a string: then these are answers in JSON. All other JSON in strings is
    text.

    `score_chosen`, a number, and `score_rejected`, a list with a number for each rejected response
    (or one number, for one), are optional grades; a row where one is null or not finite has none.
    Other columns are ignored, see `RowNotes`, but for those in NOT_READ.

    Raises:
      UserError: a field is missing, empty or of the wrong type, or the chosen response is also
        among the rejected ones; scores are of the wrong number. Rejected responses may repeat
        (drawn twice from a model, say).
    """
    if not isinstance(row, Mapping):
        raise UserError(
            f"{place}: expected an object with prompt, chosen, rejected; found {kind(row)}"
        )
    for field in ("chosen", "rejected"):
        if plain(row.get(field)) is None:
            raise UserError(f"{place}: {describe_absent(row, field)}")
    for field, instead in NOT_READ.items():
        if field in row and has_content(row[field]):
            raise UserError(f"{place}: field {field!r} is not read here: {instead}")
    chosen = read_text(row["chosen"], "chosen", place)
    single = isinstance(plain(row["chosen"]), Mapping)
    listed = _rejected(row["rejected"], chosen, single, place)
    rejected = [text for text in listed if text is not None]
    prompt: Text
    if plain(row.get("prompt")) is not None:
        prompt = _whole_prompt(read_text(row["prompt"], "prompt", place), chosen)
    elif has_prompt_elsewhere(row, chosen):
        raise UserError(f"{place}: {describe_absent(row, 'prompt')}")
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
    numbers = (i for i, text in enumerate(listed) if text is not None)
    rejected = [
        text if isinstance(text, str) else _answer(prompt, text, f"rejected[{i}]", place)
        for i, text in zip(numbers, rejected, strict=True)
    ]
    check_not_rejected(chosen, rejected, place)
    name = check_id(row.get("id"), default_id, place)
    scores = _scores(row, listed, place)
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


def _scores(
    row: Mapping[str, Any], listed: Sequence[Text | None], place: str
) -> tuple[float, ...] | None:
    """The scores of the chosen and of the rejected responses; None where one has none."""
    fields = ("score_chosen", "score_rejected")
    there = [field for field in fields if plain(row.get(field)) is not None]
    if len(there) == 1 and len(set(fields) & set(row)) == 1:
        [missing] = set(fields) - set(there)
        raise UserError(f"{place}: field {there[0]!r} is there, but {missing!r} is missing")
    if len(there) < 2:
        return None
    scores = plain(row["score_rejected"])
    scores = scores if isinstance(scores, list) else [scores]
    if len(scores) != len(listed):
        raise UserError(
            f"{place}: field 'score_rejected' must have a number for each of the {len(listed)} "
            f"rejected response(s), found {len(scores)}"
        )
    named = [("score_chosen", row["score_chosen"])]
    for i, (score, response) in enumerate(zip(scores, listed, strict=True)):
        if response is not None:
            named.append((f"score_rejected[{i}]", score))
    found = [_number(value, field, place) for field, value in named]
    return None if None in found else tuple(score for score in found if score is not None)


def _number(value: Any, field: str, place: str) -> float | None:
    """The number; None for null, and what is not finite as float32."""
    value = plain(value)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UserError(f"{place}: field {field!r} must be a number, found {kind(value)}")
    return float(value) if abs(value) <= LARGEST_SCORE else None


def _rejected(value: Any, chosen: Text, single: bool, place: str) -> list[Text | None]:
    """The rejected responses; None where a list of them has null.

    A list of messages is one response, or several where responses are `single` messages.
    """
    value = plain(value)
    if isinstance(value, str) and not is_data(chosen):
        value = decode_responses(value, place)
    if isinstance(value, str) or (isinstance(value, Mapping) and "role" in value):
        return [read_text(value, "rejected", place)]
    if not isinstance(value, list):
        raise UserError(
            f"{place}: field 'rejected' must be a response or a list of responses, "
            f"found {kind(value)}"
        )
    if all(map(is_simple, value)) and value:
        return value
    value = [plain(v) for v in value]
    there = [v for v in value if v is not None]
    if not there:
        raise UserError(f"{place}: field 'rejected' is empty")
    if not single and all(isinstance(v, Mapping) and ("role" in v or "from" in v) for v in there):
        return [read_text(there, "rejected", place)]
    return [
        None if v is None else read_text(v, f"rejected[{i}]", place) for i, v in enumerate(value)
    ]


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
        raise UserError(f"{place}: field {field!r} {_not_one_answer(asked, response)}")
    if response[0]["role"] != "assistant":
        raise UserError(
            f"{place}: field {field!r} must be a message of role 'assistant', "
            f"found {response[0]['role']!r}"
        )
    return response


def _not_one_answer(asked: Sequence[Message], response: Sequence[Message]) -> str:
    """What is wrong with several messages that are not the prompt's and then one."""
    expected = "must be one assistant message, or the prompt's messages and then one"
    if response[0]["role"] == "assistant":
        return (
            f"{expected}; found {len(response)} messages: an answer of several turns is not read "
            "(several responses are a list of lists)"
        )
    pairs = zip(asked, response, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(asked), len(response)))
    if same == len(asked):
        return f"{expected}; found {len(response) - same} messages behind the prompt's"
    return (
        f"{expected}; found {len(response)} messages that differ from the prompt's at the "
        f"{_ordinal(same + 1)}: they differ before the last answer"
    )


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
