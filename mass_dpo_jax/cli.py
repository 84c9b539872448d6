"""What the commands share: flags with a configuration, and errors without tracebacks."""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import hosts
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training.compiled import keep_compiled


def define_config(default: str | None = None) -> flags.FlagHolder[ConfigDict]:
    return config_flags.DEFINE_config_file(
        "config",
        default,
        "A file of configs/, e.g. configs/llama3.py; change a field by --config.FIELD=VALUE. "
        "Left out when --workdir names a run: then that run's own configuration is used.",
    )


def define_split() -> flags.FlagHolder[str | None]:
    return flags.DEFINE_enum(
        "split",
        None,
        ["train", "validation", "test", "all"],
        "Which rows. Left out: test or, of a single file, all. A run's own single file keeps its "
        "held-out rows as test.",
    )


def define_hosts() -> None:
    """The flags of a command that several processes can run together."""
    usual = hosts.Group()
    flags.DEFINE_bool(
        "distributed",
        False,
        "One of several processes, on one host or many; who the others are is known from Cloud "
        "TPU, SLURM, Kubernetes or Open MPI.",
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0, the same for all processes, where no cluster says it.",
    )
    flags.DEFINE_integer("num_processes", None, "How many processes there are, likewise.")
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0, likewise.")
    flags.DEFINE_integer(
        "start_timeout", usual.start_timeout, "Seconds to wait for the other processes to start."
    )
    flags.DEFINE_integer(
        "peer_timeout",
        usual.peer_timeout,
        "Seconds after which a process without a sign of life counts as dead; all others end.",
    )


def required(holder: flags.FlagHolder[ConfigDict]) -> ConfigDict:
    """The parsed configuration, which also says where compiled programs are kept.

    Raises:
      UserError: there is no --config (and no --workdir that has one).
    """
    if holder.value is None:
        raise UserError("--config is missing, for example --config=configs/tiny.py")
    config_lib.check(holder.value)
    keep_compiled(holder.value.cache_dir)
    return holder.value


def output_file(value: str | None, kind: str) -> Path:
    """The file that --output names, in a folder that exists."""
    if not value:
        raise UserError(f"--output is missing: the {kind} file to write")
    if hosts.first() and not Path(value).parent.is_dir():
        raise UserError(f"--output={value}: its folder does not exist")
    return Path(value)


def write_lines(path: Path, rows: Iterable[Any]) -> int:
    """Writes a JSON object a line, whole or not at all; how many. Of several processes the first
    one does, and the others take their part in computing the rows."""
    if not hosts.first():
        return sum(1 for _ in rows)
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    try:
        with temporary.open("w") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
                count += 1
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def run(main: Callable[[], None]) -> None:
    """Runs a command: a user's mistake is one line on standard error and exit status 2."""

    def guarded(argv: Sequence[str]) -> None:
        _quiet()
        if len(argv) > 1:
            raise SystemExit(
                _fail(f"unexpected argument {argv[1]!r}; flags look like --name=value")
            )
        try:
            _join()
            _together(main)
        except UserError as error:
            raise SystemExit(_fail(str(error))) from None
        except OSError as error:  # A full disk, a folder that may not be written, a long name.
            if error.filename is None:
                raise
            raise SystemExit(_fail(f"{error.filename}: {error.strerror}")) from None
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from what was saved", file=sys.stderr)
            raise SystemExit(130) from None

    app.run(guarded, flags_parser=_parse)


def _join() -> None:
    """Joins the other processes if the flags say that there are any."""
    values = flags.FLAGS.flag_values_dict()
    group = hosts.Group(
        values.get("coordinator_address"),
        values.get("num_processes"),
        values.get("process_id"),
        values.get("start_timeout", hosts.Group.start_timeout),
        values.get("peer_timeout", hosts.Group.peer_timeout),
    )
    group.check()
    if values.get("distributed") or group.coordinator is not None:
        hosts.start(group)
        if not hosts.first():  # One of them speaks.
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
            logging.getLogger("mass_dpo_jax").setLevel(logging.WARNING)


def _together(main: Callable[[], None]) -> None:
    """Runs a command; if it fails on one of several processes, ends all of them."""
    try:
        main()
        hosts.finish()
    except BaseException as error:
        if not hosts.several():
            raise
        if isinstance(error, UserError):
            hosts.fail(str(error), 2)
        if isinstance(error, KeyboardInterrupt):
            hosts.fail("interrupted; the same command goes on from what was saved", 130)
        if not hosts.lost(error):
            traceback.print_exc()
        hosts.fail(hosts.describe(error), 1)


def _quiet() -> None:
    """Our own messages on standard output; of the libraries' only errors, unless asked for."""
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.ERROR)
    ours = logging.getLogger("mass_dpo_jax")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours.addHandler(handler)


def _fail(message: str) -> int:
    print(f"error: {UserError(message)}", file=sys.stderr)
    return 2


def _parse(argv: list[str]) -> list[str]:
    try:
        _check_names(argv)
        return flags.FLAGS(_with_run_config(argv))
    except (flags.Error, UserError) as error:
        raise SystemExit(_fail(str(error))) from None
    except Exception as error:  # Of the configuration, which is a program.
        path = _value(argv, "config") or ""
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        place = f"{path}:{lines[-1]}" if lines else path
        raise SystemExit(_fail(f"--config={place}: {type(error).__name__}: {error}")) from None


def _value(argv: Sequence[str], flag: str) -> str | None:
    """The value of `--flag=value` or `--flag value`, before absl has parsed anything."""
    for i, word in enumerate(argv):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name == flag:
            return value if equals else (argv[i + 1] if i + 1 < len(argv) else None)
    return None


def _with_run_config(argv: list[str]) -> list[str]:
    workdir = _value(argv, "workdir")
    if workdir and _value(argv, "config") is None and "config" in flags.FLAGS:
        if (Path(workdir) / "config.json").exists():
            return [argv[0], f"--config={config_lib.__file__}:{workdir}", *argv[1:]]
    return argv


def _check_names(argv: Sequence[str]) -> None:
    """A misspelt field or a missing file, said before ml_collections raises its own traceback."""
    known = {name for name, _ in config_lib.flat(config_lib.default())}
    sections = {name.rpartition(".")[0] for name in known} - {""}
    for word in argv[1:]:
        name = word.lstrip("-").partition("=")[0]
        if not word.startswith("-") or not name.startswith("config."):
            continue
        field = name.removeprefix("config.")
        if field in sections:
            raise UserError(f"--{name}: is a group of settings; set one of its fields")
        # --noFIELD is absl's other spelling of a false boolean.
        if field not in known and field.removeprefix("no") not in known:
            near = difflib.get_close_matches(field, known, n=1, cutoff=0.0)[0]
            raise UserError(f"--{name}: no such setting; the nearest is --config.{near}")
    path = _value(argv, "config")
    if path is not None:
        file = path.partition(":")[0]
        if not Path(file).is_file():
            raise UserError(f"--config={path}: no such file")
        if not file.endswith(".py"):
            raise UserError(f"--config={path}: not a Python file")
