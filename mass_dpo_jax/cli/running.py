"""`run`: a command from its first word to its exit status, on one process or several.

A user's mistake is one line on standard error and exit status 2, and so is what memory, disks and
permissions do not allow. Ctrl-C is one line and exit status 130.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.cli import command_line
from mass_dpo_jax.cli.flags import PROCESS_FLAGS, find_own_flags
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils import signals
from mass_dpo_jax.utils.files import DISK_FULL
from mass_dpo_jax.utils.process_group import ProcessGroup

# What operating systems, C++ and the dynamic linker say when the host has no memory left.
NO_MEMORY = ("annot allocate memory", "bad_alloc", "failed to map segment")
_log = logging.getLogger(__name__)


def run(
    main: Callable[[], None],
    *,
    resumes: bool = False,
    default: str | None = None,
    group: str = "",
    unread: Sequence[str] = (),
) -> None:
    """Parses the command line and runs a command.

    Args:
        main: the command's work.
        resumes: the same command resumes what was interrupted; others write everything or nothing.
        default: the configuration where neither --config nor a run gives one.
        group: a group of settings that may be typed like flags, `--n` for `--config.mine.n`.
        unread: beginnings of settings that the command does not read; it names those that are
            given.
    """
    hint = "the same command goes on from what was saved" if resumes else "nothing was written"
    signals.ctrl_c.line = interrupted = f"interrupted; {hint}"

    def guarded_main(argv: Sequence[str]) -> None:
        _set_up_logging()
        try:
            joined = _join_processes()
            log_unread("this command", unread)
            if joined:
                _run_on_every_process(main, interrupted)
            else:
                run_within_limits(main)
        except (Exception, KeyboardInterrupt) as error:
            # Libraries turn an interruption into errors of their own.
            if isinstance(error, KeyboardInterrupt) or signals.ctrl_c.noticed:
                print(interrupted, file=sys.stderr)
                raise SystemExit(signals.EXIT_STATUS) from None
            if isinstance(error, UserError):
                command_line.exit_with_error(str(error))
            raise

    parse = functools.partial(command_line.parse, resumes=resumes, default=default, group=group)
    app.run(guarded_main, flags_parser=parse)


def _join_processes() -> bool:
    """Joins the other processes if the flags name any, and returns whether they do."""
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
        distributed.check_same_settings(_find_shared_values())
    except UserError as error:
        distributed.fail(str(error), 2)
    if not distributed.is_primary():  # Only one process prints.
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        logging.getLogger("mass_dpo_jax").setLevel(logging.WARNING)
    return True


def _find_shared_values() -> dict[str, Any]:
    """Returns the values of the command's flags and settings that all processes must share."""
    names = {flag.name for flag in find_own_flags()} - {*PROCESS_FLAGS, "config"}
    values = {name: flags.FLAGS[name].value for name in names}
    values = {n: str(value) if isinstance(value, Path) else value for n, value in values.items()}
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    for name, value in config_lib.flatten(config or ConfigDict()):
        if name != "cache_dir":
            values[f"config.{name}"] = value
    return values


def log_unread(reader: str, unread: Sequence[str]) -> None:
    """Logs which settings on the command line have no effect.

    Args:
        reader: the part of the program that does not read them.
        unread: beginnings of the names of such settings.
    """
    names = [word.partition("=")[0] for word in sys.argv[1:]]
    if ignored := [n for n in names if n.startswith(tuple(f"--config.{u}" for u in unread))]:
        _log.info(f"no effect on {reader}: {', '.join(dict.fromkeys(ignored))}")


def _run_on_every_process(main: Callable[[], None], interrupted: str) -> None:
    """Runs a command; where it fails on one process, ends all of them."""
    from mass_dpo_jax.utils import distributed

    signals.ctrl_c.end = lambda: distributed.fail(interrupted, signals.EXIT_STATUS)
    try:
        run_within_limits(main)
        distributed.finish()
    except BaseException as error:
        if not distributed.is_multiprocess():
            raise
        if isinstance(error, UserError):
            distributed.fail(str(error), 2)
        if isinstance(error, KeyboardInterrupt) or signals.ctrl_c.noticed:
            distributed.fail(interrupted, signals.EXIT_STATUS)
        if not distributed.is_lost_peer(error):
            traceback.print_exc()
        distributed.fail(distributed.describe_error(error), 1)


def run_within_limits(main: Callable[[], None]) -> None:
    """Runs a command, and raises UserError where memory, disks or permissions do not allow it."""
    try:
        main()
    except (MemoryError, OSError, ImportError, RuntimeError) as error:  # JAX raises the last.
        message = str(error).partition("\n")[0]
        if isinstance(error, MemoryError) or any(words in message for words in NO_MEMORY):
            raise UserError(_explain_host_memory(error, message)) from error
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


def _explain_host_memory(error: BaseException, message: str) -> str:
    """Returns what needed more memory than the host or its batch system allows, and what helps."""
    task, advice = "", "a host with more, or a higher limit (ulimit -v, --mem of SLURM)"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "mass_dpo_jax/data/" in Path(frame.filename).as_posix():
            task, advice = " to read the data", f"fewer rows by config.data.max_train, {advice}"
        elif Path(frame.filename).name in ("weights.py", "policy.py", "checkpoint_reading.py"):
            task = " to load the weights"
            advice = f"a smaller model, LoRA on config.model.lora.base=int8, {advice}"
        if task:
            break
    return f"not enough memory on the host{task}; what helps: {advice} ({message or 'MemoryError'})"


def _set_up_logging() -> None:
    """Prints this package's messages; those of libraries only if errors, or with --verbosity."""
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.ERROR)
        # Orbax logs tracebacks of errors that are reported in one line where users need to know.
        logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Orbax's tasks.
        sys.unraisablehook = _ignore_closed_loops(sys.unraisablehook)
    ours = logging.getLogger("mass_dpo_jax")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours.addHandler(handler)


def _ignore_closed_loops(previous: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a hook without what tensorstore's threads raise after a save that failed.

    They find orbax's event loop closed; the failure itself is reported.
    """

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    return hook
