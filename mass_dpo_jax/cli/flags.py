"""Flags that several commands have, and the configuration that they give."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import config_checks
from mass_dpo_jax.cli.help import exit_with_error
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.process_group import ProcessGroup
from mass_dpo_jax.utils.run_paths import explain_non_run

# Beginnings of settings that only some commands read, for `run(unread=...)`. Batch sizes are not
# among them: every command checks them.
TRAINING = (
    "train.epochs train.steps train.learning_rate train.warmup train.clip train.weight "
    "train.moments train.offload train.eval train.checkpoint train.keep train.max log. dry_run "
    "device_memory sft_weight"
).split()
# Read by training and `select`.
CHOOSING = (
    "selection. num_negatives odpo. pl_rank. loss.link loss.margin loss.gamma loss.label_smoothing"
).split()
RANKING = ("eval.cutoffs",)  # Read by training, `evaluate` and `compare`.
MINING = ("mine.",)  # Read by training and `mine`.
LIMITS = ("data.max_train", "data.max_validation", "data.max_test")

PROCESS_FLAGS = (
    "distributed", "coordinator_address", "num_processes", "process_id", "start_timeout",
    "peer_timeout",
)  # fmt: skip


class PathParser(flags.ArgumentParser[Path]):
    """Parses a flag that names a file or folder; `command_line` expands `~` and variables."""

    syntactic_help = "a path"

    def parse(self, argument: str | Path) -> Path:
        """Returns the path that was typed."""
        return Path(argument)

    def flag_type(self) -> str:
        """Returns the type that --help shows."""
        return "path"


def define_config() -> None:
    """Defines --config and, by way of ml_collections, --config.FIELD for every setting."""
    about = (
        f"A file, or the name of a built-in configuration: {', '.join(find_configurations())}. "
        "--config.FIELD=VALUE changes a field; --config.print=True prints the resolved "
        "configuration as flags and exits. Default, if --workdir names a run: that run's own "
        "configuration."
    )
    try:
        config_flags.DEFINE_config_file("config", None, about)
    except flags.Error as error:  # It reads a --flagfile.
        exit_with_error(str(error), sys.modules["__main__"].__doc__)


def define_path(name: str, about: str, default: str | None = None) -> None:
    """Defines a flag that names a file or folder."""
    flags.DEFINE(PathParser(), name, default, about)


def define_split(default: str = "test") -> None:
    """Defines --split; `default` is the split that the command uses of data with several."""
    flags.DEFINE_enum(
        "split",
        None,
        ["train", "validation", "test", "all"],
        f"Rows to use. Default: {default}, or all if the data is a single file. For a run's own "
        "single file, the held-out rows are test.",
    )


def define_format() -> None:
    """Defines --format, of rows with chosen negatives."""
    flags.DEFINE_enum(
        "format",
        "lists",
        config_lib.WRITTEN_FORMATS,
        "A row for each prompt; pairs: for each pair.",
    )


def define_processes() -> None:
    """Defines the flags of a command that several processes can run together."""
    defaults = ProcessGroup()
    flags.DEFINE_bool(
        "distributed",
        False,
        "Whether this is one of several processes, on one host or many. Cloud TPU, SLURM, "
        "Kubernetes and Open MPI provide the addresses of the others.",
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0, the same for all processes, if the cluster does not provide it.",
    )
    flags.DEFINE_integer(
        "num_processes", None, "Number of processes, if the cluster does not provide it."
    )
    flags.DEFINE_integer(
        "process_id",
        None,
        "Number of this process, from 0, if the cluster does not provide it.",
    )
    flags.DEFINE_integer(
        "start_timeout", defaults.start_timeout, "Seconds to wait for the others to start."
    )
    flags.DEFINE_integer(
        "peer_timeout",
        defaults.peer_timeout,
        "Seconds without a heartbeat after which a process counts as dead and all others end.",
    )


def find_configurations() -> dict[str, Path]:
    """Returns the files of the project's folder configs/ by name.

    In an installed package that folder is inside the package; in a checkout, beside it.
    """
    inside = Path(config_lib.__file__).parent / "configs"
    folder = inside if inside.is_dir() else inside.parent.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def find_own_flags() -> list[flags.Flag]:
    """Returns the flags of this package and of the command itself; settings are not among them."""
    packages = ("mass_dpo_jax", (sys.modules["__main__"].__package__ or "mass_dpo_jax"))
    return [
        flag
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module == sys.argv[0] or module.startswith(packages)
        for flag in defined
        if not flag.name.startswith("config.")
    ]


def read_config() -> ConfigDict:
    """Returns the checked configuration, and has compiled programs kept where it says.

    Raises:
        UserError: there is no --config (and no --workdir that has one), or a value is wrong.
    """
    config = config_checks.validate(require_config())
    from mass_dpo_jax.utils.cache import keep_compiled

    keep_compiled(config.cache_dir)
    return config


def require_config() -> ConfigDict:
    """Returns the configuration as the command line gives it, or raises UserError without one."""
    config: ConfigDict | None = flags.FLAGS["config"].value
    if config is not None:
        return config
    missing, alternative = "--config is missing", ""
    if "workdir" in flags.FLAGS:
        workdir: Any = flags.FLAGS["workdir"].value
        if flags.FLAGS["workdir"].present:
            missing += f", and --workdir={workdir} is no run that has one"
            missing += f" ({explain_non_run(workdir)})"
        elif workdir is None:
            alternative = "; or the --workdir of a run, which has its own"
    raise UserError(
        f"{missing}: expected a file or one of {', '.join(find_configurations())}, as in "
        f"--config=tiny{alternative}"
    )
