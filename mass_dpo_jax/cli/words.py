"""The words behind a command as pairs of a flag's or setting's name and a value of its type.

absl and ml_collections parse the pairs afterwards and find nothing wrong with them. Left to
themselves they would report Python's own conversion errors, which do not name the setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.cli.flags import PathParser, find_configurations, find_own_flags
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils import suggestions
from mass_dpo_jax.utils.files import expand
from mass_dpo_jax.utils.run_paths import is_run

BOOLEANS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), "true"),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), "false"),
}
PRINT = "config.print"
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # What word processors make of a hyphen.


def read_pairs(words: Sequence[str], group: str = "") -> Iterator[tuple[str, str]]:
    """Yields each flag or setting with its value; `--flag value` and `--noflag` count as well.

    Args:
        words: what was typed.
        group: a group of settings whose names count without `config.` and the group's own.

    Raises:
        UserError: a name does not exist, or a value is missing or of another type.
    """
    settings = dict(config_lib.flatten(config_lib.default())) if "config" in flags.FLAGS else {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or not word.strip("-"):
            raise UserError(f"unexpected argument {word!r}; {_suggest_flag(word)}")
        name, equals, value = word.lstrip("-").partition("=")
        if name not in flags.FLAGS and f"{group}.{name}" in settings:
            name = f"config.{group}.{name}"
        example = _find_example(name, settings)
        if example is None and not equals and name.startswith("no"):
            positive = name.removeprefix("no")
            if isinstance(_find_example(positive, settings), bool):
                yield positive, "false"
                continue
        if example is None:
            raise UserError(_explain_unknown(name, list(settings)))
        if not equals:
            if isinstance(example, bool) and not (rest and rest[0].lower() in BOOLEANS):
                value = "true"
            elif not rest or rest[0].startswith("--"):
                raise UserError(f"--{name}: its value is missing, as in --{name}=VALUE")
            else:
                value = rest.pop(0)
                if value == "=":
                    raise UserError(f"--{name} =: expected --{name}=VALUE without blanks")
        yield name, _convert(name, value, example)


def _find_example(name: str, settings: dict[str, Any]) -> Any:
    """Returns a value of the type that a flag or setting has, or None if there is none."""
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
    examples: list[tuple[type, Any]] = [
        (flags.BooleanParser, False),
        (flags.IntegerParser, 0),
        (flags.FloatParser, 0.0),
        (flags.EnumParser, parser),
        (PathParser, Path()),
    ]
    return next((example for kind, example in examples if isinstance(parser, kind)), "")


def _convert(name: str, value: str, example: Any) -> str:
    """Returns a value as absl takes it, or raises UserError if its type is not the example's."""
    location = f"--{name}"
    if not value and not (isinstance(example, str) and name.startswith("config.")):
        raise UserError(f"{location}=: is empty; a variable that is not set?")
    if isinstance(example, str):
        return value
    if isinstance(example, bool):
        if value.lower() not in BOOLEANS:
            raise UserError(f"{location}={value}: expected true or false")
        return BOOLEANS[value.lower()]
    if isinstance(example, (int, float)):
        return _convert_number(location, value, example)
    if isinstance(example, Path):
        return expand(value, location)
    choices = example.enum_values
    if value not in choices:
        raise UserError(
            f"{location}={value}: expected one of {', '.join(choices)}"
            + suggestions.suggest_choice(value, choices)
        )
    return value


def _convert_number(location: str, value: str, example: float) -> str:
    """Returns a number as absl takes it: whole ones may be written as 1e3 or 1000.0."""
    number_type = type(example)
    try:
        return str(int(value))
    except ValueError:
        pass
    try:
        number = float(value)
    except ValueError:
        number = None
    if number is not None and number_type is float:
        return value
    if number is not None and number.is_integer():
        return str(int(number))
    expected = "an integer" if number_type is int else "a number"
    raise UserError(
        f"{location}={value}: expected {expected}" + (f", as {example}" if example else "")
    )


def _explain_unknown(name: str, settings: Sequence[str]) -> str:
    """Returns what is wrong with a name that does not exist, and which may be meant."""
    command_flags = [flag.name for flag in find_own_flags()]
    if name.startswith("config.") and not settings:
        return (
            f"--{name}: this command has no settings of its own, it takes the run's; its flags are "
            + ", ".join(f"--{flag}" for flag in command_flags)
        )
    kind = "setting" if name.startswith("config.") else "flag"
    meant = [f"--{other}=..." for other in suggestions.suggest_names(name, settings, command_flags)]
    advice = " --help lists all" if meant else "; --help lists all"
    return f"--{name}: no such {kind}{suggestions.did_you_mean(meant)}{advice}"


def _suggest_flag(word: str) -> str:
    """Returns what a word that is no flag may have been meant for."""
    if word[0] in DASHES:
        return "it begins with a dash that is none on the keyboard; write --"
    if word.partition("=")[0] in flags.FLAGS or word.startswith("config."):
        return f"did you mean --{word}?"
    if word in find_configurations():
        return f"did you mean --config={word}?"
    if "workdir" in flags.FLAGS and is_run(Path(word)):
        return f"did you mean --workdir={word}?"
    return "flags look like --name=value"
