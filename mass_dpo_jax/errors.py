"""The one exception that stands for a user's mistake, and what raises it of an argument."""

from __future__ import annotations

from typing import Any

MAX_MESSAGE_CHARS = 1000  # Characters of a message; what is longer loses its middle.


class UserError(ValueError):
    """Something in the user's input is wrong: a file, a row, a setting.

    Its message is one line that says where, what was found and what is expected. Commands print it
    without a traceback and exit with status 2. Names and values out of broken files go into it as
    they are: characters that a terminal would obey or cannot show are written as escapes.
    """

    def __init__(self, message: str):
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[: MAX_MESSAGE_CHARS - 200]} ... {message[-195:]}"
        if not message.isprintable():
            shown = (c if c.isprintable() else repr(c)[1:-1] for c in message)
            message = "".join(shown)
        super().__init__(message)


def check_type(value: Any, kind: type | tuple[type, ...], name: str, what: str) -> None:
    """Raises UserError where an argument, called by `name`, is of another kind than `what`."""
    if not isinstance(value, kind):
        raise UserError(f"{name}: found a {type(value).__name__}, expected {what}")
