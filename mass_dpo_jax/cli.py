"""What the commands share: flags with a configuration, and errors without tracebacks.

JAX and all that needs it is imported where it is used: --help and a refused flag do without.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import help as help_lib
from mass_dpo_jax import signals
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.files import FULL, write_whole
from mass_dpo_jax.process_group import Group


def define_config(default: str | None = None) -> flags.FlagHolder[ConfigDict]:
    if default is not None:  # Of which ml_collections takes the fields here, not in `_parse`.
        try:
            _check_names(sys.argv)
        except UserError as error:
            _refuse(str(error))
    return config_flags.DEFINE_config_file(
        "config",
        default,
        f"A file, or the name of one of ours: {', '.join(configurations())}. Change a field by "
        "--config.FIELD=VALUE; --config.print=True prints what comes of it, as flags, and ends. "
        "Left out where --workdir names a run: that run's own configuration.",
    )


def configurations() -> dict[str, Path]:
    """The configurations that come with the program: folder configs/ of the project, which is
    inside the package where that is installed."""
    inside = Path(config_lib.__file__).parent / "configs"
    folder = inside if inside.is_dir() else inside.parent.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


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
    usual = Group()
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


HOSTS = (
    "distributed", "coordinator_address", "num_processes", "process_id", "start_timeout",
    "peer_timeout",
)  # fmt: skip


# What systems, C++ and the loader of shared libraries say where the host has no more memory.
NO_MEMORY = ("annot allocate memory", "bad_alloc", "failed to map segment")


def required(holder: flags.FlagHolder[ConfigDict]) -> ConfigDict:
    """The parsed configuration, which also says where compiled programs are kept.

    Raises:
      UserError: there is no --config (and no --workdir that has one).
    """
    config = _given(holder.value)
    config_lib.check(config)
    from mass_dpo_jax.training.compiled import keep_compiled

    keep_compiled(config.cache_dir)
    return config


def _given(config: ConfigDict | None) -> ConfigDict:
    if config is None:
        missing, other = "--config is missing", ""
        workdir = flags.FLAGS["workdir"].value if "workdir" in flags.FLAGS else None
        if "workdir" in flags.FLAGS and flags.FLAGS["workdir"].present:
            missing += f", and {workdir} is no run that has its own"
        elif "workdir" in flags.FLAGS and workdir is None:
            other = "; or the --workdir of a run, which has its own"
        raise UserError(
            f"{missing}: expected a file or one of {', '.join(configurations())}, as in "
            f"--config=tiny{other}"
        )
    return config


def output_file(value: str | None, kind: str, *inputs: str | Path) -> Path:
    """The file that --output names, in a folder that exists.

    Args:
      inputs: files that the command reads, which it must not replace; empty ones are none.

    Raises:
      UserError: nothing can be written there, or an input would be lost.
    """
    if not value:
        raise UserError(f"--output is missing: the {kind} file to write")
    from mass_dpo_jax import hosts

    path = Path(value)
    if not hosts.first():
        return path
    if not path.parent.is_dir():
        raise UserError(f"--output={value}: its folder does not exist")
    if path.exists() and not path.is_file():  # A folder, or a device.
        raise UserError(f"--output={value}: no ordinary file; expected the {kind} file to write")
    for read in inputs:
        if read and path.exists() and Path(read).exists() and path.samefile(read):
            raise UserError(f"--output={value}: would replace the input {read}; name another file")
    return path


def write_lines(path: Path, rows: Iterable[Any]) -> int:
    """Writes a JSON object a line, whole or not at all; how many. Of several processes the first
    one does, and the others take their part in computing the rows."""
    from mass_dpo_jax import hosts

    if not hosts.first():
        return sum(1 for _ in rows)
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for row in rows:
            count += 1
            yield json.dumps(row) + "\n"

    write_whole(path, lines())
    return count


def run(main: Callable[[], None], goes_on: bool = False) -> None:
    """Runs a command: a user's mistake is one line on standard error and exit status 2.

    Args:
      main: what it does.
      goes_on: the same command goes on with what was interrupted; others write all or nothing.
    """
    hint = "the same command goes on from what was saved" if goes_on else "nothing was written"
    signals.ctrl_c.line = interrupted = f"interrupted; {hint}"

    def guarded(argv: Sequence[str]) -> None:
        _quiet()
        if len(argv) > 1:
            _refuse(f"unexpected argument {argv[1]!r}; flags look like --name=value")
        try:
            if _join():
                _together(main, interrupted)
            else:
                _within_limits(main)
        except (Exception, KeyboardInterrupt) as error:
            # Libraries turn an interruption into errors of their own.
            if isinstance(error, KeyboardInterrupt) or signals.ctrl_c.noticed:
                print(interrupted, file=sys.stderr)
                raise SystemExit(signals.STATUS) from None
            if isinstance(error, UserError):
                _refuse(str(error))
            raise

    app.run(guarded, flags_parser=_parse)


def _join() -> bool:
    """Joins the other processes if the flags say that there are any; whether they do."""
    values = flags.FLAGS.flag_values_dict()
    group = Group(
        values.get("coordinator_address"),
        values.get("num_processes"),
        values.get("process_id"),
        values.get("start_timeout", Group.start_timeout),
        values.get("peer_timeout", Group.peer_timeout),
    )
    group.check()
    if not values.get("distributed") and group.coordinator is None:
        return False
    from mass_dpo_jax import hosts

    hosts.start(group)
    try:
        hosts.check_same(_settings())
    except UserError as error:
        hosts.fail(str(error), 2)
    if not hosts.first():  # One of them speaks.
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        logging.getLogger("mass_dpo_jax").setLevel(logging.WARNING)
    return True


def _settings() -> dict[str, Any]:
    """The values of our own flags and settings, but for what may differ between processes."""
    own = {flag.name for flag in _our_flags()} - {*HOSTS, "config"}
    values = {name: flags.FLAGS[name].value for name in own}
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    for name, value in config_lib.flat(config or ConfigDict()):
        if name != "cache_dir":
            values[f"config.{name}"] = value
    return values


def _together(main: Callable[[], None], interrupted: str) -> None:
    """Runs a command; if it fails on one of several processes, ends all of them."""
    from mass_dpo_jax import hosts

    signals.ctrl_c.end = lambda: hosts.fail(interrupted, signals.STATUS)
    try:
        _within_limits(main)
        hosts.finish()
    except BaseException as error:
        if not hosts.several():
            raise
        if isinstance(error, UserError):
            hosts.fail(str(error), 2)
        if isinstance(error, KeyboardInterrupt) or signals.ctrl_c.noticed:
            hosts.fail(interrupted, signals.STATUS)
        if not hosts.lost(error):
            traceback.print_exc()
        hosts.fail(hosts.describe(error), 1)


def _within_limits(main: Callable[[], None]) -> None:
    """Runs a command; what memory, disks and permissions do not allow is for the user to mend."""
    try:
        main()
    except (MemoryError, OSError, ImportError, RuntimeError) as error:  # The last also JAX's own.
        message = str(error).partition("\n")[0]
        if isinstance(error, MemoryError) or any(words in message for words in NO_MEMORY):
            raise UserError(_host_needs_memory(error, message)) from error
        if isinstance(error, OSError) and (error.filename or error.errno in FULL):
            # A full disk, a folder that may not be written, a long name.
            raise UserError(f"{error.filename or 'writing'}: {error.strerror}") from error
        if not message.startswith("RESOURCE_EXHAUSTED") or "memory" not in message:
            raise
        raise UserError(
            f"not enough memory on a device: lower config.train.micro_batch_size (training) or "
            "config.eval.batch_size (scoring), or split the model by config.mesh.fsdp; "
            f"--config.dry_run=True says what a step needs ({message})"
        ) from error


def _host_needs_memory(error: BaseException, message: str) -> str:
    """What to say where the host's memory, or the limit of a batch system, was not enough."""
    what, helps = "", "a host with more, or a higher limit (ulimit -v, --mem of SLURM)"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "mass_dpo_jax/data/" in Path(frame.filename).as_posix():
            what, helps = " to read the data", f"fewer rows by config.data.max_train, {helps}"
        elif Path(frame.filename).name in ("weights.py", "policy.py", "checkpoint.py"):
            what = " to load the weights"
            helps = f"a smaller model, LoRA on config.model.lora.base=int8, {helps}"
        if what:
            break
    return f"not enough memory on the host{what}; what helps: {helps} ({message or 'MemoryError'})"


def _quiet() -> None:
    """Our own messages on standard output; of the libraries' only errors, unless asked for."""
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.ERROR)
        # With tracebacks, of what is said in a line where it concerns the user.
        logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    ours = logging.getLogger("mass_dpo_jax")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours.addHandler(handler)


def _doc() -> str:
    return sys.modules["__main__"].__doc__ or ""


def _refuse(message: str) -> NoReturn:
    help_lib.refuse(message, _doc())


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; --help and --config.print=True end here, before anything is done."""
    asked = [word for word in argv[1:] if word in help_lib.HELP]
    argv = [word for word in argv if word not in help_lib.HELP]
    path = _value(argv, "config") or ""
    try:
        argv, printing = _without_print(argv)
        _check_names(argv)
        argv = _with_run_config(_with_path(argv))
        path = _value(argv, "config") or ""
        sys.argv[:] = argv  # Where ml_collections looks for the fields.
        rest = flags.FLAGS(argv)
    except (flags.Error, UserError) as error:
        _refuse(str(error))
    except Exception as error:  # Of the configuration, which is a program.
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        place = f"{path}:{lines[-1]}" if lines else path
        _refuse(f"--config={place}: {type(error).__name__}: {error}")
    if not asked and not printing:
        return rest
    try:
        if asked:
            help_lib.say(_help())
        else:
            config = _given(flags.FLAGS["config"].value)
            help_lib.say("\n".join(help_lib.as_flags(config)))
            config_lib.check(config)
    except UserError as error:
        _refuse(str(error))
    raise SystemExit(0)


def _help() -> str:
    ours = _our_flags()
    if "config" not in flags.FLAGS:
        return help_lib.describe(_doc(), ours, None, "")
    path = _value(sys.argv, "config")
    place = "the defaults" if path is None else f"the values of {path}"
    return help_lib.describe(
        _doc(), ours, flags.FLAGS["config"].value or config_lib.default(), place
    )


def _our_flags() -> list[flags.Flag]:
    """Those that the package, or the command's own, defines, without fields of --config."""
    packages = ("mass_dpo_jax", (sys.modules["__main__"].__package__ or "mass_dpo_jax"))
    return [
        flag
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module == sys.argv[0] or module.startswith(packages)
        for flag in defined
        if not flag.name.startswith("config.")
    ]


def _value(argv: Sequence[str], flag: str) -> str | None:
    """The value of `--flag=value` or `--flag value`, of several the last, as absl will take it,
    before it has parsed anything."""
    found = None
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name == flag:
            found = value if equals else following
    return found


def _without_print(argv: list[str]) -> tuple[list[str], bool]:
    """Takes out --config.print, which is no setting: no run is to remember it."""
    rest, printing = [], False
    for word in argv:
        name, equals, value = word.partition("=")
        if name.lstrip("-") == "config.print" and word.startswith("-") and "config" in flags.FLAGS:
            printing = bool(flags.BooleanParser().parse(value if equals else "true"))
        else:
            rest.append(word)
    return rest, printing


def _with_path(argv: list[str]) -> list[str]:
    """The file of --config in place of its name; of several the last, and before its fields.

    Raises:
      UserError: there is no such file.
    """
    others, value = [], None
    words = iter(argv[1:])
    for word in words:
        if word in ("-config", "--config"):
            value = next(words, None)
        elif word.startswith(("-config=", "--config=")):
            value = word.partition("=")[2]
        else:
            others.append(word)
    if value is None or "config" not in flags.FLAGS:
        return argv
    named = configurations()
    file, colon, rest = value.partition(":")
    path = Path(file) if file.endswith(".py") or os.sep in file else named.get(file, Path(file))
    if not path.is_file():
        raise UserError(
            f"--config={value}: no such file; a name alone can be {', '.join(named)}, as in "
            "--config=tiny"
        )
    if path.suffix != ".py":
        raise UserError(f"--config={value}: not a Python file")
    return [argv[0], f"--config={path}{colon}{rest}", *others]


def _with_run_config(argv: list[str]) -> list[str]:
    workdir = _value(argv, "workdir")
    if workdir and _value(argv, "config") is None and "config" in flags.FLAGS:
        if (Path(workdir) / "config.json").exists():
            config_lib.load(Path(workdir))  # What is wrong with it, said without ml_collections.
            return [argv[0], f"--config={config_lib.__file__}:{workdir}", *argv[1:]]
    return argv


def _check_names(argv: Sequence[str]) -> None:
    """A misspelt field, said before ml_collections raises its own traceback."""
    known = {"print", *(name for name, _ in config_lib.flat(config_lib.default()))}
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
            raise UserError(
                f"--{name}: no such setting; the nearest is --config.{near}, and --help lists all"
            )
