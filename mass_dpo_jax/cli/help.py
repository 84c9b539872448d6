"""What the commands say of themselves: --help, the examples of their docstrings, and refusals.

The settings' descriptions are the comments in config.py; there is no second list to keep.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import inspect
import io
import os
import shlex
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils import suggestions
from mass_dpo_jax.utils.files import expand_path

WIDTH = 100
# Settings whose values are described one by one.
SUMMARIES = {
    "method": config_lib.METHOD_SUMMARIES,
    "selection.criterion": config_lib.CRITERION_SUMMARIES,
}
HELP = ("-h", "-?", "--h", "-help", "--help", "--helpshort", "-helpshort")


@functools.cache
def comments() -> dict[str, str]:
    """By dotted name, `train` or `train.steps`, the comment of each group and setting: what stands
    on the lines before it and at the end of its own."""
    source = inspect.getsource(config_lib.default)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {
        token.start[0]: token.string.removeprefix("#").strip().removeprefix("---- ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    found, last = {}, 0
    for node in function.body:
        end = node.end_lineno or node.lineno
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0]).partition(".")[2]
            found[name] = " ".join(lines[n] for n in range(last + 1, end + 1) if n in lines)
        last = end
    return found


def describe(doc: str, ours: Iterable[flags.Flag], config: ConfigDict | None, place: str) -> str:
    """A command's --help.

    Args:
      doc: the command's docstring.
      ours: its flags.
      config: whose values are shown; None: the command takes no configuration.
      place: what they are: "the defaults" or a file.
    """
    parts = [inspect.cleandoc(doc), "\n".join(["Flags:", *map(_of_flag, ours)])]
    if config is not None:
        parts.append(f"Settings, with {place}:")
        parts += _settings(config)
    parts.append("--helpfull lists the flags of the libraries, too.")
    return "\n\n".join(parts)


def _of_flag(flag: flags.Flag) -> str:
    kinds = {"config object": "file or name", "string": "str"}
    kind, about = kinds.get(flag.flag_type(), flag.flag_type()), flag.help or ""
    if isinstance(flag, flags.EnumFlag):
        kind, about = " | ".join(flag.parser.enum_values), about.partition(">: ")[2]
    if flag.name != "config" and flag.default not in (None, ""):
        kind += f", {str(flag.default)!r}" if kind == "path" else f", {flag.default!r}"
    return _entry(flag.name, kind, about)


def _settings(config: ConfigDict) -> Iterator[str]:
    """A paragraph a group, with what it is."""
    values, lines = dict(config_lib.flatten(config)), list[str]()
    for name, about in comments().items():
        if name not in values:
            if lines:
                yield "\n".join(lines)
            lines = [f"{name}: {about}".removesuffix(": ")] if name else []
            continue
        if name in SUMMARIES:
            about += f" {'; '.join(map(': '.join, SUMMARIES[name].items()))}."
        choices = config_lib.CHOICES.get(name, ())
        if not all(choice in about for choice in choices):
            about += f" One of {' | '.join(choices)}."
        kind = f"{type(values[name]).__name__}, {values[name]!r}"
        lines.append(_entry(f"config.{name}", kind, about))
    yield "\n".join(lines)


def as_flags(config: ConfigDict) -> Iterator[str]:
    """Every setting as a shell takes it, those that are not the defaults first."""
    values = dict(config_lib.flatten(config))
    usual = dict(config_lib.flatten(config_lib.default()))
    lines: dict[bool, list[str]] = {True: [], False: []}
    for name in filter(values.__contains__, comments()):
        line = f"--config.{name}={shlex.quote(str(values[name]))}"
        lines[values[name] != usual[name]].append(line)
    yield f"# {len(lines[True])} settings differ from the defaults:"
    yield from lines[True]
    yield f"# {len(lines[False])} have their defaults:"
    yield from lines[False]


def _entry(name: str, kind: str, about: str) -> str:
    return textwrap.fill(
        f"--{name}  {kind}: {about}",
        WIDTH,
        initial_indent="  ",
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
    )


def examples(doc: str) -> str:
    """The indented lines of a docstring."""
    return "\n".join(line for line in doc.splitlines() if line.startswith(" " * 4))


def echo(text: str) -> None:
    """Prints it, also to a reader that does not want it all, as `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_with_error(message: str, doc: str | None) -> NoReturn:
    """Ends the command with a user's mistake: one line on standard error and exit status 2; before
    it, to who gave no arguments at all, the examples of the docstring."""
    if len(sys.argv) == 1 and doc and examples(doc):
        print(f"For example, and more with --help:\n\n{examples(doc)}\n", file=sys.stderr)
    print(f"error: {UserError(message)}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """For commands without a configuration: says and refuses as the others do."""

    def __init__(self, doc: str):
        program = next(line for line in doc.splitlines() if "python -m" in line).split()[:3]
        super().__init__(
            prog=" ".join(program),
            description=doc,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=WIDTH),
            allow_abbrev=False,
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but a flag that does not exist is said first, with what was meant."""
        ours = [option.lstrip("-") for option in self._option_string_actions]
        for word in sys.argv[1:] if args is None else args:
            name = word.lstrip("-").partition("=")[0]
            if word.startswith("--") and name and name not in ours:
                self.error(self._unknown(name, [other for other in ours if len(other) > 1]))
        return super().parse_args(args, namespace)

    def _unknown(self, name: str, ours: Sequence[str]) -> str:
        if name in ("workdir", "run", "runs", "folder", "folders"):
            return f"--{name}: no such flag; runs are given without one: {self.prog} RUN"
        if name.partition(".")[0] == "config":
            return f"--{name}: this command has no settings; it reads what runs wrote"
        found = [f"--{other}" for other in suggestions.suggest_names(name, (), ours)]
        return f"--{name}: no such flag{suggestions.did_you_mean(found)}"

    def error(self, message: str) -> NoReturn:
        exit_with_error(message, self.description)

    @contextlib.contextmanager
    def user_errors(self, output: Path | None = None) -> Iterator[None]:
        """Where a user's mistake is one line, and so is a file that cannot be read or written.

        Args:
          output: what is written, for libraries' errors that do not name a file.
        """
        try:
            yield
        except UserError as error:
            self.error(str(error))
        except OSError as error:  # A full disk, a folder that may not be written.
            self.error(f"{error.filename or output or self.prog}: {error.strerror or error}")


def expand_argument(value: str) -> Path:
    """The type of an argument of `Parser` that names a file or folder."""
    try:
        return expand_path(value, "argument")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def png_path(value: str) -> Path:
    """The type of a flag of `Parser` that names a PNG to write: what it is refused for is known
    before anything is computed."""
    file = expand_argument(value)
    if file.suffix != ".png" or file.is_dir():
        raise argparse.ArgumentTypeError(f"{value!r}, expected a file that ends in .png")
    return file
