"""The one exception that stands for a user's mistake."""

from __future__ import annotations


class UserError(ValueError):
    """Something in the user's input is wrong: a file, a row, a setting.

    Its message is one line that says where, what was found and what is expected. Commands print it
    without a traceback and exit with status 2.
    """
