"""The command line: from the words that somebody types to flags with values, or one line of help.

absl and ml_collections parse flags and settings. `parse` prepares the words for them.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from absl import flags

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import config_checks
from mass_dpo_jax.cli import help as help_lib
from mass_dpo_jax.cli.flags import find_configurations, find_own_flags, require_config
from mass_dpo_jax.cli.words import PRINT, read_pairs
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.utils import suggestions
from mass_dpo_jax.utils.files import expand, read_text
from mass_dpo_jax.utils.run_paths import check_run, is_run


def parse(argv: list[str], *, resumes: bool, default: str | None, group: str) -> list[str]:
    """Parses the command line; --help and --config.print=True end the command here.

    Before absl parses, the words are rewritten in this order:

    1. --help is set aside, so that it can show the values of the --config beside it.
    2. Each word becomes a known flag or setting with a value of its type (`words.read_pairs`).
    3. --config becomes the path of a file. Where it is left out, the run in --workdir or the
       command's default gives it. It comes first, so that settings override it.
    4. --config.print is set aside: it is no setting, and no run should remember it.
    5. The result replaces sys.argv, where ml_collections looks for the values of settings.

    Args:
        argv: the program's name and the words behind it.
        resumes: the command can start a run, so a --workdir without one is no mistake.
        default: a configuration for when neither --config nor a run gives one.
        group: a group of settings that may be typed like flags; "" for none.

    Returns:
        The words that are no flags.
    """
    asks_help = any(word in help_lib.HELP for word in argv[1:])
    path = ""
    try:
        pairs = list(read_pairs([word for word in argv[1:] if word not in help_lib.HELP], group))
        if "config" in flags.FLAGS:
            pairs = _put_config_first(pairs, resumes, default)
        prints = dict(pairs).get(PRINT) == "true"
        path = dict(pairs).get("config", "")
        sys.argv[1:] = [f"--{name}={value}" for name, value in pairs if name != PRINT]
        if "config" in flags.FLAGS and not path:
            settings = [word for word in sys.argv if word.startswith("--config.")]
            flags.FLAGS([word for word in sys.argv if word not in settings])
            if settings:  # The configuration itself is missing, not its settings.
                require_config()
        rest = flags.FLAGS(sys.argv)
        if path and flags.FLAGS["config"].value is None:
            raise UserError(f"--config={path}: get_config() returns None; expected the settings")
    except Exception as error:  # A configuration is a program, and can raise anything.
        exit_with_error(_explain(error, path))
    if not asks_help and not prints:
        return rest
    try:
        if asks_help:
            help_lib.echo(_describe_command(path))
        else:
            config = require_config()
            help_lib.echo("\n".join(help_lib.as_flags(config)))
            config_checks.validate(config)
    except UserError as error:
        exit_with_error(str(error))
    raise SystemExit(0)


def exit_with_error(message: str) -> NoReturn:
    """Ends the running command as `help.exit_with_error`, with the examples of its docstring."""
    help_lib.exit_with_error(message, sys.modules["__main__"].__doc__)


def _put_config_first(
    pairs: list[tuple[str, str]], resumes: bool, default: str | None
) -> list[tuple[str, str]]:
    """Returns the pairs with the file of --config in front, if any configuration is given."""
    given = dict(pairs)  # Of several values the last.
    config, workdir = given.get("config"), given.get("workdir")
    if config is not None:
        config = _find_config_file(config)
    elif workdir is not None and not (resumes and not (Path(workdir) / "config.json").exists()):
        _check_workdir(Path(workdir))
        run_config.load_config(Path(workdir))  # Its mistakes, without ml_collections' traceback.
        config = f"{run_config.__file__}:{workdir}"
    elif default is not None and pairs:
        config = default
    rest = [(name, value) for name, value in pairs if name != "config"]
    return rest if config is None else [("config", config), *rest]


def _check_workdir(workdir: Path) -> None:
    try:
        check_run(workdir)
    except UserError as error:
        raise UserError(f"--workdir={error}") from None


def _find_config_file(value: str) -> str:
    """Returns the path of the file that --config names, with what is behind a colon.

    Raises:
        UserError: there is no such file, or it is no configuration.
    """
    named = find_configurations()
    file, colon, rest = value.partition(":")
    if file.endswith(".py") or os.sep in file:
        path = Path(expand(file, "--config"))
    else:
        path = named.get(file, Path(file))
    if path.is_dir() or (path.is_file() and path.suffix != ".py"):
        run = path if path.is_dir() else path.parent
        advice = f"; a run's own settings come with --workdir={run}" if is_run(run) else ""
        raise UserError(f"--config={value}: not a Python file{advice}")
    if not path.is_file():
        with_suffix = path.with_name(f"{path.name}.py")
        meant = suggestions.did_you_mean([str(with_suffix)] if with_suffix.is_file() else [])
        raise UserError(
            f"--config={value}: no such file; a name alone can be {', '.join(named)}, as in "
            f"--config=tiny{meant or suggestions.suggest_choice(path.stem, list(named))}"
        )
    if "get_config" not in read_text(path):
        raise UserError(f"--config={value}: has no function get_config() that returns the settings")
    return f"{path}{colon}{rest}"


def _explain(error: Exception, path: str) -> str:
    """Returns what went wrong and, for an error in the configuration file at `path`, its line.

    absl and ml_collections wrap such an error in others, which have its traceback as text.
    """
    chain: list[BaseException] = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    for cause in chain:
        if isinstance(cause, UserError):
            return str(cause)
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if frame.filename == path:
                return f"--config={path}:{frame.lineno}: {type(cause).__name__}: {cause}"
    if isinstance(error, flags.Error) and len(chain) == 1:
        return str(error)
    return f"--config={path}: {type(chain[-1]).__name__}: {chain[-1]}"


def _describe_command(path: str) -> str:
    """Returns the --help of the running command, with the settings' values of a file."""
    doc = sys.modules["__main__"].__doc__ or ""
    if "config" not in flags.FLAGS:
        return help_lib.describe(doc, find_own_flags(), None, "")
    source = f"the values of {path}" if path else "the defaults"
    config = flags.FLAGS["config"].value or config_lib.default()
    return help_lib.describe(doc, find_own_flags(), config, source)
