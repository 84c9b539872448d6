"""What the commands share: flags with a configuration, and errors without tracebacks.

JAX and all that needs it is imported where it is used: --help and a refused flag do without.
"""

from __future__ import annotations

import functools
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
from mass_dpo_jax.cli import command_line
from mass_dpo_jax.cli import help as help_lib
from mass_dpo_jax.cli.command_line import configurations
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils import signals
from mass_dpo_jax.utils.files import DISK_FULL, write_whole
from mass_dpo_jax.utils.process_group import ProcessGroup
from mass_dpo_jax.utils.run_paths import explain_non_run, find_enclosing_run

_log = logging.getLogger(__name__)
# Settings of which nothing but training takes notice. Sizes of batches are compared by all.
TRAINING = (
    "train.epochs train.steps train.learning_rate train.warmup train.clip train.weight "
    "train.moments train.offload train.eval train.checkpoint train.keep train.max log. dry_run "
    "device_memory sft_weight"
).split()
CHOOSING = ("selection.", "num_negatives", "odpo.")  # Training and `select`.
LIMITS = ("data.max_train", "data.max_validation", "data.max_test")


def define_config() -> flags.FlagHolder[ConfigDict]:
    about = (
        f"A file, or the name of one of ours: {', '.join(configurations())}. Change a field by "
        "--config.FIELD=VALUE; --config.print=True prints what comes of it, as flags, and ends. "
        "Left out where --workdir names a run: that run's own configuration."
    )
    try:
        return config_flags.DEFINE_config_file("config", None, about)
    except flags.Error as error:  # It reads a --flagfile.
        _refuse(str(error))


def define_path(name: str, about: str, default: str | None = None) -> flags.FlagHolder[Path | None]:
    """A flag that names a file or folder."""
    return flags.DEFINE(command_line.PathParser(), name, default, about)


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
    usual = ProcessGroup()
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
    config = config_lib.validate(_given(holder.value))
    from mass_dpo_jax.utils.cache import keep_compiled

    keep_compiled(config.cache_dir)
    return config


def _given(config: ConfigDict | None) -> ConfigDict:
    if config is None:
        missing, other = "--config is missing", ""
        if "workdir" in flags.FLAGS:
            workdir: Any = flags.FLAGS["workdir"].value
            if flags.FLAGS["workdir"].present:
                missing += (
                    f", and --workdir={workdir} is no run that has one ({explain_non_run(workdir)})"
                )
            elif workdir is None:
                other = "; or the --workdir of a run, which has its own"
        raise UserError(
            f"{missing}: expected a file or one of {', '.join(configurations())}, as in "
            f"--config=tiny{other}"
        )
    return config


def output_file(path: Path | None, kind: str, *inputs: str | Path) -> Path:
    """The file that --output names, in a folder that exists.

    Args:
      inputs: files that the command reads, which it must not replace; empty ones are none.

    Raises:
      UserError: nothing can be written there, or an input or a part of a run would be lost.
    """
    if path is None:
        raise UserError(f"--output is missing: the {kind} file to write")
    if str(path) == "-" or path.is_relative_to("/dev"):  # /dev/stdout would become a file itself.
        raise UserError(f"--output={path}: no ordinary file; expected the {kind} file to write")
    from mass_dpo_jax.utils import distributed

    if not distributed.is_primary():
        return path
    if not path.parent.is_dir():
        raise UserError(f"--output={path}: its folder does not exist")
    if path.exists() and not path.is_file():  # A folder, or a device.
        raise UserError(f"--output={path}: no ordinary file; expected the {kind} file to write")
    if path.exists() and (run := find_enclosing_run(path.resolve())):
        raise UserError(f"--output={path}: is a part of the run {run}; name another file")
    for read in (Path(name) for name in inputs if name):
        inside = read.is_dir() and path.resolve().is_relative_to(read.resolve())
        if path.exists() and read.exists() and (inside or path.samefile(read)):
            what = f"a file in the folder of the data, {read}" if inside else f"the input {read}"
            raise UserError(f"--output={path}: would replace {what}; name another file")
    return path


def write_lines(path: Path, rows: Iterable[Any]) -> int:
    """Writes a JSON object a line, whole or not at all; how many. Of several processes the first
    one does, and the others take their part in computing the rows."""
    from mass_dpo_jax.utils import distributed

    if not distributed.is_primary():
        return sum(1 for _ in rows)
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for row in rows:
            count += 1
            yield json.dumps(row) + "\n"

    write_whole(path, lines())
    return count


def run(
    main: Callable[[], None],
    goes_on: bool = False,
    default: str | None = None,
    unread: Sequence[str] = (),
) -> None:
    """Runs a command: a user's mistake is one line on standard error and exit status 2.

    Args:
      main: what it does.
      goes_on: the same command goes on with what was interrupted; others write all or nothing.
      unread: beginnings of settings that have no effect on it, which is said where one is given.
      default: the configuration where neither --config nor a run gives one.
    """
    hint = "the same command goes on from what was saved" if goes_on else "nothing was written"
    signals.ctrl_c.line = interrupted = f"interrupted; {hint}"

    def guarded(argv: Sequence[str]) -> None:
        _quiet()
        try:
            several = _join()
            say_unread("this command", unread)
            if several:
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

    app.run(guarded, flags_parser=functools.partial(_parse, starts=goes_on, default=default))


def _join() -> bool:
    """Joins the other processes if the flags say that there are any; whether they do."""
    values = flags.FLAGS.flag_values_dict()
    group = ProcessGroup(
        values.get("coordinator_address"),
        values.get("num_processes"),
        values.get("process_id"),
        values.get("start_timeout", ProcessGroup.start_timeout),
        values.get("peer_timeout", ProcessGroup.peer_timeout),
    )
    group.check()
    if not values.get("distributed") and group.coordinator is None:
        return False
    from mass_dpo_jax.utils import distributed

    distributed.start(group)
    try:
        distributed.check_same_settings(_settings())
    except UserError as error:
        distributed.fail(str(error), 2)
    if not distributed.is_primary():  # One of them speaks.
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        logging.getLogger("mass_dpo_jax").setLevel(logging.WARNING)
    return True


def _settings() -> dict[str, Any]:
    """The values of our own flags and settings, but for what may differ between processes."""
    own = {flag.name for flag in command_line.own_flags()} - {*HOSTS, "config"}
    values = {name: flags.FLAGS[name].value for name in own}
    values = {n: str(value) if isinstance(value, Path) else value for n, value in values.items()}
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    for name, value in config_lib.flatten(config or ConfigDict()):
        if name != "cache_dir":
            values[f"config.{name}"] = value
    return values


def say_unread(reader: str, unread: Sequence[str]) -> None:
    """Says which settings on the command line have no effect.

    Args:
      reader: on what.
      unread: beginnings of the names of such settings.
    """
    names = [word.partition("=")[0] for word in sys.argv[1:]]
    if ignored := [n for n in names if n.startswith(tuple(f"--config.{u}" for u in unread))]:
        _log.info(f"no effect on {reader}: {', '.join(dict.fromkeys(ignored))}")


def _together(main: Callable[[], None], interrupted: str) -> None:
    """Runs a command; if it fails on one of several processes, ends all of them."""
    from mass_dpo_jax.utils import distributed

    signals.ctrl_c.end = lambda: distributed.fail(interrupted, signals.STATUS)
    try:
        _within_limits(main)
        distributed.finish()
    except BaseException as error:
        if not distributed.is_multiprocess():
            raise
        if isinstance(error, UserError):
            distributed.fail(str(error), 2)
        if isinstance(error, KeyboardInterrupt) or signals.ctrl_c.noticed:
            distributed.fail(interrupted, signals.STATUS)
        if not distributed.is_lost_peer(error):
            traceback.print_exc()
        distributed.fail(distributed.describe_error(error), 1)


def _within_limits(main: Callable[[], None]) -> None:
    """Runs a command; what memory, disks and permissions do not allow is for the user to mend."""
    try:
        main()
    except (MemoryError, OSError, ImportError, RuntimeError) as error:  # The last also JAX's own.
        message = str(error).partition("\n")[0]
        if isinstance(error, MemoryError) or any(words in message for words in NO_MEMORY):
            raise UserError(_host_needs_memory(error, message)) from error
        if isinstance(error, OSError) and (error.filename or error.errno in DISK_FULL):
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
        elif Path(frame.filename).name in ("weights.py", "policy.py", "checkpoint_reading.py"):
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
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Of orbax's tasks, too.
        sys.unraisablehook = _but_for_closed_loops(sys.unraisablehook)
    ours = logging.getLogger("mass_dpo_jax")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours.addHandler(handler)


def _but_for_closed_loops(usual: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """After a save that failed, which is said, tensorstore's threads find orbax's loop closed."""

    def hook(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            usual(found)

    return hook


def _doc() -> str:
    return sys.modules["__main__"].__doc__ or ""


def _refuse(message: str) -> NoReturn:
    help_lib.exit_with_error(message, _doc())


def _parse(argv: list[str], starts: bool, default: str | None) -> list[str]:
    """Parses the flags; --help and --config.print=True end here, before anything is done."""
    asked = [word for word in argv[1:] if word in help_lib.HELP]
    path = ""
    try:
        words = [word for word in argv if word not in help_lib.HELP]
        pairs = command_line.read(words, default, starts)
        printing = dict(pairs).get(command_line.PRINT) == "true"
        path = dict(pairs).get("config", "")
        # Where ml_collections looks for the fields. No run is to remember that it was printed.
        sys.argv[1:] = [f"--{n}={value}" for n, value in pairs if n != command_line.PRINT]
        if "config" in flags.FLAGS and not path:
            fields = [word for word in sys.argv if word.startswith("--config.")]
            flags.FLAGS([word for word in sys.argv if word not in fields])
            if fields:  # Of a configuration that there is not, which is what is missing.
                _given(None)
        rest = flags.FLAGS(sys.argv)
        if path and flags.FLAGS["config"].value is None:
            raise UserError(f"--config={path}: get_config() returns None; expected the settings")
    except Exception as error:  # Mostly of the configuration, which is a program.
        _refuse(_what_failed(error, path))
    if not asked and not printing:
        return rest
    try:
        if asked:
            help_lib.echo(_help(path))
        else:
            config = _given(flags.FLAGS["config"].value)
            help_lib.echo("\n".join(help_lib.as_flags(config)))
            config_lib.validate(config)
    except UserError as error:
        _refuse(str(error))
    raise SystemExit(0)


def _what_failed(error: Exception, path: str) -> str:
    """Of an error in the configuration file at `path`, what it was and its line there; absl and
    ml_collections wrap it in errors that have its traceback as text."""
    chain: list[BaseException] = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    for found in chain:
        if isinstance(found, UserError):
            return str(found)
        for frame in reversed(traceback.extract_tb(found.__traceback__)):
            if frame.filename == path:
                return f"--config={path}:{frame.lineno}: {type(found).__name__}: {found}"
    if isinstance(error, flags.Error) and len(chain) == 1:
        return str(error)
    return f"--config={path}: {type(chain[-1]).__name__}: {chain[-1]}"


def _help(path: str) -> str:
    if "config" not in flags.FLAGS:
        return help_lib.describe(_doc(), command_line.own_flags(), None, "")
    place = f"the values of {path}" if path else "the defaults"
    config = flags.FLAGS["config"].value or config_lib.default()
    return help_lib.describe(_doc(), command_line.own_flags(), config, place)
