"""The words behind a command: each flag and setting known, its value of the right kind.

absl and ml_collections parse them after this, and find nothing to complain of: their messages are
those of Python's own conversions, and name no setting of ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.utils import suggestions
from mass_dpo_jax.utils.files import expand, read_text
from mass_dpo_jax.utils.run_paths import check_run, is_run

BOOLEANS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), "true"),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), "false"),
}
PRINT = "config.print"
Pair = tuple[str, str]


class PathParser(flags.ArgumentParser[Path]):
    """Of a flag that names a file or folder, in which `~` and variables are replaced."""

    syntactic_help = "a path"

    def parse(self, argument: str | Path) -> Path:
        return Path(argument)

    def flag_type(self) -> str:
        return "path"


def configurations() -> dict[str, Path]:
    """The configurations that come with the program: folder configs/ of the project, which is
    inside the package where that is installed."""
    inside = Path(config_lib.__file__).parent / "configs"
    folder = inside if inside.is_dir() else inside.parent.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def read(argv: Sequence[str], default: str | None = None, starts: bool = False) -> list[Pair]:
    """Returns the flags and settings in `argv`, with the file of --config first and its full path.

    Args:
      argv: the program's name, and what is behind it.
      default: a configuration where neither --config nor a run gives one.
      starts: the command can start a run: a --workdir without one is no mistake.

    Raises:
      UserError: a name that there is not, a value of another kind, no such file or run.
    """
    pairs = list(_pairs(argv[1:]))
    if "config" not in flags.FLAGS:
        return pairs
    given = dict(pairs)  # Of several values the last.
    others = [(name, value) for name, value in pairs if name != "config"]
    config, workdir = given.get("config"), given.get("workdir")
    if config is not None:
        config = _config_file(config)
    elif workdir is not None and not (starts and not (Path(workdir) / "config.json").exists()):
        _check_workdir(Path(workdir))
        run_config.load_config(Path(workdir))  # What is wrong with it, said without ml_collections.
        config = f"{run_config.__file__}:{workdir}"
    elif default is not None and pairs:
        config = default
    return others if config is None else [("config", config), *others]


def own_flags() -> list[flags.Flag]:
    """The flags that the package, or the command's own, defines; settings are none of them."""
    packages = ("mass_dpo_jax", (sys.modules["__main__"].__package__ or "mass_dpo_jax"))
    return [
        flag
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module == sys.argv[0] or module.startswith(packages)
        for flag in defined
        if not flag.name.startswith("config.")
    ]


def _check_workdir(workdir: Path) -> None:
    try:
        check_run(workdir)
    except UserError as error:
        raise UserError(f"--workdir={error}") from None


def _pairs(words: Sequence[str]) -> Iterator[Pair]:
    """Each flag with its value as absl reads it; `--flag value` and `--noflag` as `--flag=value`.

    Raises:
      UserError: as `read`.
    """
    settings = dict(config_lib.flatten(config_lib.default())) if "config" in flags.FLAGS else {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or not word.strip("-"):
            raise UserError(f"unexpected argument {word!r}; {_as_flag(word)}")
        name, equals, value = word.lstrip("-").partition("=")
        usual = _usual(name, settings)
        if usual is None and not equals and (other := _denied(name)):
            if isinstance(_usual(other, settings), bool):
                yield other, "false"
                continue
        if usual is None:
            raise UserError(_unknown(name, list(settings)))
        if not equals:
            if isinstance(usual, bool) and not (rest and rest[0].lower() in BOOLEANS):
                value = "true"
            elif not rest or rest[0].startswith("--"):
                raise UserError(f"--{name}: its value is missing, as in --{name}=VALUE")
            else:
                value = rest.pop(0)
                if value == "=":
                    raise UserError(f"--{name} =: expected --{name}=VALUE without blanks")
        yield name, _converted(name, value, usual)


def _usual(name: str, settings: dict[str, Any]) -> Any:
    """A value of the kind that a flag or setting has; None: there is none of this name."""
    if name == PRINT:
        return False if settings else None
    if name.startswith("config."):
        field = name.removeprefix("config.")
        if any(other.startswith(f"{field}.") for other in settings):
            raise UserError(f"--{name}: is a group of settings; set one of its fields")
        return settings.get(field)
    if name not in flags.FLAGS:
        return None
    parser = flags.FLAGS[name].parser
    kinds: list[tuple[type, Any]] = [
        (flags.BooleanParser, False),
        (flags.IntegerParser, 0),
        (flags.FloatParser, 0.0),
        (flags.EnumParser, parser),
        (PathParser, Path()),
    ]
    return next((usual for kind, usual in kinds if isinstance(parser, kind)), "")


def _denied(name: str) -> str | None:
    """The flag that --noNAME sets to false."""
    return name.removeprefix("no") if name.startswith("no") else None


def _converted(name: str, value: str, usual: Any) -> str:
    """A value as absl takes it.

    Raises:
      UserError: it is not of the kind of `usual`.
    """
    place = f"--{name}"
    if isinstance(usual, str):
        if not value and not name.startswith("config."):
            raise UserError(f"{place}=: is empty; a variable that is not set?")
        return value
    if not value:
        raise UserError(f"{place}=: is empty; a variable that is not set?")
    if isinstance(usual, bool):
        if value.lower() not in BOOLEANS:
            raise UserError(f"{place}={value}: expected true or false")
        return BOOLEANS[value.lower()]
    if isinstance(usual, (int, float)):
        return _number(place, value, usual)
    if isinstance(usual, Path):
        return expand(value, place)
    known = usual.enum_values
    if value not in known:
        raise UserError(
            f"{place}={value}: expected one of {', '.join(known)}"
            + suggestions.suggest_choice(value, known)
        )
    return value


def _number(place: str, value: str, usual: float) -> str:
    """Whole numbers may be written as 1e3 or 1000.0."""
    kind = type(usual)
    try:
        return str(int(value))
    except ValueError:
        pass
    try:
        number = float(value)
    except ValueError:
        number = None
    if number is not None and kind is float:
        return value
    if number is not None and number.is_integer():
        return str(int(number))
    what = "an integer" if kind is int else "a number"
    raise UserError(f"{place}={value}: expected {what}" + (f", as {usual}" if usual else ""))


def _unknown(name: str, settings: Sequence[str]) -> str:
    """What is wrong with a name that there is not, and which are meant perhaps."""
    ours = [flag.name for flag in own_flags()]
    if name.startswith("config.") and not settings:
        return (
            f"--{name}: this command has no settings of its own, it takes the run's; its flags are "
            + ", ".join(f"--{flag}" for flag in ours)
        )
    kind = "setting" if name.startswith("config.") else "flag"
    found = [f"--{other}=..." for other in suggestions.suggest_names(name, settings, ours)]
    more = " --help lists all" if found else "; --help lists all"
    return f"--{name}: no such {kind}{suggestions.did_you_mean(found)}{more}"


def _as_flag(word: str) -> str:
    if word[0] in "\u2010\u2011\u2012\u2013\u2014\u2015\u2212":
        return "it begins with a dash that is none on the keyboard; write --"
    if word.partition("=")[0] in flags.FLAGS or word.startswith("config."):
        return f"did you mean --{word}?"
    if word in configurations():
        return f"did you mean --config={word}?"
    if "workdir" in flags.FLAGS and is_run(Path(word)):
        return f"did you mean --workdir={word}?"
    return "flags look like --name=value"


def _config_file(value: str) -> str:
    """The path of the file that --config names, with what is behind a colon.

    Raises:
      UserError: there is no such file.
    """
    named = configurations()
    file, colon, rest = value.partition(":")
    if file.endswith(".py") or os.sep in file:
        path = Path(expand(file, "--config"))
    else:
        path = named.get(file, Path(file))
    if path.is_dir() or (path.is_file() and path.suffix != ".py"):
        run = path if path.is_dir() else path.parent
        theirs = f"; a run's own settings come with --workdir={run}" if is_run(run) else ""
        raise UserError(f"--config={value}: not a Python file{theirs}")
    if not path.is_file():
        beside = path.with_name(f"{path.name}.py")
        near = suggestions.did_you_mean([str(beside)] if beside.is_file() else [])
        raise UserError(
            f"--config={value}: no such file; a name alone can be {', '.join(named)}, as in "
            f"--config=tiny{near or suggestions.suggest_choice(path.stem, list(named))}"
        )
    if "get_config" not in read_text(path):
        raise UserError(f"--config={value}: has no function get_config() that returns the settings")
    return f"{path}{colon}{rest}"
