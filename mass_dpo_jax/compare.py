"""Runs beside each other on the same test examples, and beside rankings without a model.

    python -m mass_dpo_jax.compare runs/mine
    python -m mass_dpo_jax.compare runs/sdpo runs/mass-dpo
    python -m mass_dpo_jax.compare runs/warm-start runs/mass-dpo runs/sdpo

Prints the ranking at the start of the first run and at the end of each, and what every later run
gained over its own start and over the run before it, with paired standard errors. Baselines are
counted in the training split: how often an item was chosen at all, and after the items of the
history.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mass_dpo_jax.cli.help import Parser, path, say
from mass_dpo_jax.utils.files import expand_path


def compare(runs: Sequence[Path]) -> str:
    """Writes a table of finished runs on the same data, as text.

    Raises:
      UserError: a run is not finished, or was tested on other examples than the first.
    """
    from mass_dpo_jax.reports import comparison

    return comparison.compare([expand_path(run, "runs") for run in runs])


def main() -> None:
    """The command: folders of runs in, a table to the terminal."""
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="+", type=path, help="folder of a finished run")
    runs = parser.parse_args().run
    with parser.refusing():
        text = compare(runs)
    say(text)


if __name__ == "__main__":
    main()
