"""Prompts and answers that are chat messages: where one ends and the other begins."""

from __future__ import annotations

from collections.abc import Sequence

from mass_dpo_jax.data.examples import Message, Text
from mass_dpo_jax.errors import UserError


def check_prompt_end(prompt: Text, field: str, location: str) -> None:
    """Raises UserError where a conversation does not end with a message of the user."""
    if not isinstance(prompt, str) and prompt[-1]["role"] != "user":
        raise UserError(
            f"{location}: field {field!r} must end with a message of role 'user', "
            f"found {prompt[-1]['role']!r}"
        )


def complete_prompt(prompt: Text, chosen: Text) -> Text:
    """Returns the conversation before the answer, if the prompt is its last question's text."""
    if isinstance(prompt, str) and isinstance(chosen, list) and len(chosen) > 2:
        if chosen[-2] == {"role": "user", "content": prompt}:
            return chosen[:-1]
    return prompt


def read_answer(prompt: Text, response: Text, field: str, location: str) -> Text:
    """Returns the response without the prompt's messages, where it repeats them."""
    if isinstance(response, str):
        return response
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if len(response) > 1 and response[:-1] == asked:
        response = response[-1:]
    if len(response) > 1:
        raise UserError(f"{location}: field {field!r} {_describe_messages(asked, response)}")
    if response[0]["role"] != "assistant":
        raise UserError(
            f"{location}: field {field!r} must be a message of role 'assistant', "
            f"found {response[0]['role']!r}"
        )
    return response


def _describe_messages(asked: Sequence[Message], response: Sequence[Message]) -> str:
    """Describes what is wrong with messages that are not the prompt's followed by one answer."""
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
    ordinal = {1: "first", 2: "second", 3: "third"}.get(same + 1, f"{same + 1}th")
    return (
        f"{expected}; found {len(response)} messages that differ from the prompt's at the "
        f"{ordinal}: they differ before the last answer"
    )
