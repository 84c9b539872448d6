"""What commands share: their flags, --help, the command line, and errors in one line.

A command is a module with `main`, which ends in the flags it has and a call of `run`:

    if __name__ == "__main__":
        cli.define_config()
        cli.define_path("output", "The file to write: JSON lines, or .parquet.")
        cli.run(main)

`main` reads flags from absl's `flags.FLAGS`. Commands that take run folders as plain arguments and
no settings (compare, report) parse them with `parser.Parser` instead.

Everything heavy, JAX above all, is imported inside the functions that need it, so that --help and
refusals come at once.
"""

from __future__ import annotations

from mass_dpo_jax.cli.flags import (
    CHOOSING,
    LIMITS,
    MINING,
    RANKING,
    TRAINING,
    define_config,
    define_format,
    define_path,
    define_processes,
    define_split,
    read_config,
)
from mass_dpo_jax.cli.output import check_output, write_lines, write_rows
from mass_dpo_jax.cli.running import log_unread, run

__all__ = [
    "CHOOSING",
    "LIMITS",
    "MINING",
    "RANKING",
    "TRAINING",
    "check_output",
    "define_config",
    "define_format",
    "define_path",
    "define_processes",
    "define_split",
    "log_unread",
    "read_config",
    "run",
    "write_lines",
    "write_rows",
]
