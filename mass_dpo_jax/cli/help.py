"""The text of --help and of --config.print, and refusals.

The descriptions of settings are the comments in config.py; there is no second list to maintain.
"""

from __future__ import annotations

import ast
import functools
import inspect
import io
import os
import shlex
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError

WIDTH = 100
# Settings whose values are described one by one.
SUMMARIES = {
    "method": config_lib.METHOD_SUMMARIES,
    "selection.criterion": config_lib.CRITERION_SUMMARIES,
}
HELP = ("-h", "-?", "--h", "-help", "--help", "--helpshort", "-helpshort")


@functools.cache
def comments() -> dict[str, str]:
    """Returns the comment of each group and setting by dotted name, `train` or `train.steps`.

    A comment stands on the lines before its setting and at the end of the setting's own line.
    """
    source = inspect.getsource(config_lib.default)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {
        token.start[0]: token.string.removeprefix("#").strip().removeprefix("---- ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    texts, last = {}, 0
    for node in function.body:
        end = node.end_lineno or node.lineno
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0]).partition(".")[2]
            texts[name] = " ".join(lines[n] for n in range(last + 1, end + 1) if n in lines)
        last = end
    return texts


def describe(
    doc: str, command_flags: Iterable[flags.Flag], config: ConfigDict | None, source: str
) -> str:
    """Returns a command's --help.

    Args:
        doc: the command's docstring.
        command_flags: the command's flags.
        config: the settings to list, with their values; None: the command takes no configuration.
        source: origin of the values: "the defaults" or a file.
    """
    parts = [inspect.cleandoc(doc), "\n".join(["Flags:", *map(_describe_flag, command_flags)])]
    if config is not None:
        parts.append(f"Settings, with {source}:")
        parts += _describe_settings(config)
    parts.append("--helpfull lists the flags of the libraries, too.")
    return "\n\n".join(parts)


def _describe_flag(flag: flags.Flag) -> str:
    kinds = {"config object": "file or name", "string": "str"}
    kind, about = kinds.get(flag.flag_type(), flag.flag_type()), flag.help or ""
    if isinstance(flag, flags.EnumFlag):
        kind, about = " | ".join(flag.parser.enum_values), about.partition(">: ")[2]
    if flag.name != "config" and flag.default not in (None, ""):
        kind += f", {str(flag.default)!r}" if kind == "path" else f", {flag.default!r}"
    return _format_entry(flag.name, kind, about)


def _describe_settings(config: ConfigDict) -> Iterator[str]:
    """Yields a paragraph for each group of settings."""
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
        lines.append(_format_entry(f"config.{name}", kind, about))
    yield "\n".join(lines)


def as_flags(config: ConfigDict) -> Iterator[str]:
    """Yields every setting as a shell takes it, those that differ from the defaults first."""
    values = dict(config_lib.flatten(config))
    defaults = dict(config_lib.flatten(config_lib.default()))
    lines: dict[bool, list[str]] = {True: [], False: []}
    for name in filter(values.__contains__, comments()):
        line = f"--config.{name}={shlex.quote(str(values[name]))}"
        lines[values[name] != defaults[name]].append(line)
    yield f"# {len(lines[True])} settings differ from the defaults:"
    yield from lines[True]
    yield f"# {len(lines[False])} have their defaults:"
    yield from lines[False]


def _format_entry(name: str, kind: str, about: str) -> str:
    return textwrap.fill(
        f"--{name}  {kind}: {about}",
        WIDTH,
        initial_indent="  ",
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
    )


def examples(doc: str) -> str:
    """Returns the indented lines of a docstring."""
    return "\n".join(line for line in doc.splitlines() if line.startswith(" " * 4))


def echo(text: str) -> None:
    """Prints a text, also to a reader that closes early, such as `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_with_error(message: str, doc: str | None) -> NoReturn:
    """Ends the command with one line on standard error and exit status 2.

    Without any arguments, prints the examples of the command's docstring first.
    """
    if len(sys.argv) == 1 and doc and examples(doc):
        print(f"For example, and more with --help:\n\n{examples(doc)}\n", file=sys.stderr)
    print(f"error: {UserError(message)}", file=sys.stderr)
    raise SystemExit(2)
