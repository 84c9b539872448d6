"""The exception that stands for a user's mistake."""

from __future__ import annotations

from typing import Any

MAX_MESSAGE_CHARS = 1000  # A longer message loses its middle.


class UserError(ValueError):
    """Something in the user's input is wrong: a file, a row, a setting.

    Its message is one line that says where, what was found and what is expected. Commands print it
    without a traceback and exit with status 2. It may quote names and values from broken files:
    characters that a terminal would interpret or cannot show become escapes.
    """

    def __init__(self, message: str):
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[: MAX_MESSAGE_CHARS - 200]} ... {message[-195:]}"
        if not message.isprintable():
            characters = (c if c.isprintable() else repr(c)[1:-1] for c in message)
            message = "".join(characters)
        super().__init__(message)


def check_type(
    value: Any, expected_type: type | tuple[type, ...], name: str, description: str
) -> None:
    """Raises UserError if an argument has another type than expected.

    Args:
        value: the argument.
        expected_type: the type it must have, or several.
        name: the argument's name, for the message.
        description: a description of the type, for the message.
    """
    if not isinstance(value, expected_type):
        raise UserError(f"{name}: found a {type(value).__name__}, expected {description}")
