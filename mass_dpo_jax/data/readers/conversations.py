"""Prompts and answers that are chat messages: where one ends and the other begins."""

from __future__ import annotations

from collections.abc import Sequence

from mass_dpo_jax.data.examples import Message, Text, last_content, list_more
from mass_dpo_jax.data.readers.messages import TOOL_ROLES
from mass_dpo_jax.errors import UserError


def check_prompt_end(prompt: Text, field: str, location: str) -> None:
    """Raises UserError where no answer can follow a conversation's last message.

    That is one of the user, of a tool, or the beginning of the answer itself.
    """
    if isinstance(prompt, str) or prompt[-1]["role"] in ("user", *TOOL_ROLES):
        return
    role = prompt[-1]["role"]
    if role != "assistant":
        raise UserError(
            f"{location}: field {field!r} must end with a message of role 'user', 'tool', or "
            f"'assistant' with the beginning of the answers, found {role!r}"
        )
    if more := list_more(prompt[-1]):
        raise UserError(
            f"{location}: field {field!r} ends with a message of role 'assistant' that has "
            f"{', '.join(more)}: expected the answer of the tool, or the text that answers begin "
            "with"
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
        return _check_beginning(prompt, response, field, location)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    start = int(asked[0]["role"] == "system")  # It may stand in a column of its own.
    if len(response) > 1 and response[:-1] in (asked, asked[start:]):
        response = response[-1:]
    if len(response) > 1:
        raise UserError(f"{location}: field {field!r} {_describe_messages(asked, response)}")
    if response[0]["role"] != "assistant":
        raise UserError(
            f"{location}: field {field!r} must be a message of role 'assistant', "
            f"found {response[0]['role']!r}"
        )
    return _check_beginning(prompt, response, field, location)


def _check_beginning(prompt: Text, response: Text, field: str, location: str) -> Text:
    """Returns a response; raises UserError where the prompt has it as the answer's beginning."""
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        if prompt[-1]["content"].strip() == last_content(response).strip():
            raise UserError(
                f"{location}: field {field!r} is the prompt's last message, too: leave it out of "
                "the prompt, or write in each answer how that message goes on"
            )
    return response


def _describe_messages(asked: Sequence[Message], response: Sequence[Message]) -> str:
    """Describes what is wrong with messages that are not the prompt's followed by one answer."""
    expected = "must be one assistant message, or the prompt's messages and then one"
    if response[0]["role"] == "assistant":
        return (
            f"{expected}; found {len(response)} messages: of an answer of several turns, what a "
            "user or a tool says would be scored as the model's; put the turns that all answers "
            "share into the prompt (several responses are a list of lists)"
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
