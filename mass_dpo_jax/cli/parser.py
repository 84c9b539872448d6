"""The command line of commands that take run folders as plain arguments, and no settings."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mass_dpo_jax.cli.help import WIDTH, exit_with_error
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils import suggestions
from mass_dpo_jax.utils.files import expand_path


class Parser(argparse.ArgumentParser):
    """An argparse parser whose help and refusals look like those of the other commands."""

    def __init__(self, doc: str):
        program = next(line for line in doc.splitlines() if "python -m" in line).split()[:3]
        super().__init__(
            prog=" ".join(program),
            description=doc,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=WIDTH),
            allow_abbrev=False,
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses as argparse does, but reports a flag that does not exist before anything else."""
        flag_names = [option.lstrip("-") for option in self._option_string_actions]
        for word in sys.argv[1:] if args is None else args:
            name = word.lstrip("-").partition("=")[0]
            if word.startswith("--") and name and name not in flag_names:
                self.error(self._explain_unknown(name, [n for n in flag_names if len(n) > 1]))
        return super().parse_args(args, namespace)

    def _explain_unknown(self, name: str, flag_names: Sequence[str]) -> str:
        if name in ("workdir", "run", "runs", "folder", "folders"):
            return f"--{name}: no such flag; runs are given without one: {self.prog} RUN"
        if name.partition(".")[0] == "config":
            return f"--{name}: this command has no settings; it reads what runs wrote"
        meant = [f"--{flag}" for flag in suggestions.suggest_names(name, (), flag_names)]
        return f"--{name}: no such flag{suggestions.did_you_mean(meant)}"

    def error(self, message: str) -> NoReturn:
        """Ends the command with one line."""
        exit_with_error(message, self.description)

    @contextlib.contextmanager
    def user_errors(self, output: Path | None = None) -> Iterator[None]:
        """Ends the command with one line where the body raises a UserError or an OSError.

        Args:
            output: the file being written, for libraries' errors that do not name one.
        """
        try:
            yield
        except UserError as error:
            self.error(str(error))
        except OSError as error:  # A full disk, a folder that may not be written.
            self.error(f"{error.filename or output or self.prog}: {error.strerror or error}")


def expand_argument(value: str) -> Path:
    """Returns the path in an argument, with `~` and variables expanded: a type for `Parser`."""
    try:
        return expand_path(value, "argument")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def png_path(value: str) -> Path:
    """Returns the path of a PNG to write, checked before anything is computed: a type."""
    file = expand_argument(value)
    if file.suffix != ".png" or file.is_dir():
        raise argparse.ArgumentTypeError(f"{value!r}, expected a file that ends in .png")
    return file
