"""Compares runs on the same test examples, with baselines, and draws their curves.

    python -m mass_dpo_jax.compare runs/mine
    python -m mass_dpo_jax.compare runs/warm-start runs/sdpo runs/mass-dpo
    python -m mass_dpo_jax.compare runs/sdpo runs/mass-dpo --plot=curves.png

Prints the ranking at the start of the first run and at the end of each, and what every run but the
first gained over its own start and over the run before it, where that is not its start, with paired
standard errors. Baselines are training-set counts: how often each item was chosen, and how often it
followed the items of the history. --plot draws loss, accuracy, margins and rewards; with it, runs
may be unfinished, and the table is left out if they cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mass_dpo_jax.cli.help import echo
from mass_dpo_jax.cli.parser import Parser, expand_argument, png_path
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import expand_path
from mass_dpo_jax.utils.run_paths import check_run


def compare(runs: Sequence[Path]) -> str:
    """Writes a table of finished runs on the same data, as text.

    Raises:
        UserError: a run is not finished, or was tested on other examples than the first.
    """
    from mass_dpo_jax.reports import comparison

    return comparison.compare([expand_path(run, "runs") for run in runs])


def plot(runs: Sequence[Path], output: Path) -> None:
    """Draws the training curves of runs, finished or not, into a PNG.

    Raises:
        UserError: a folder is no run, or there is nothing to draw yet.
    """
    from mass_dpo_jax.reports import curves
    from mass_dpo_jax.reports.format import short_names

    for run in runs:
        if not (run / "metrics.jsonl").exists():
            check_run(run)
    logs = [run / "metrics.jsonl" for run in runs]
    curves.plot(dict(zip(short_names(runs), logs, strict=True)), output)


def main() -> None:
    """Prints the table of the runs on the command line, and draws their curves if asked to."""
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="+", type=expand_argument, help="folder of a run")
    parser.add_argument("--plot", type=png_path, help="a PNG to write the training curves to")
    arguments = parser.parse_args()
    with parser.user_errors(arguments.plot):
        if arguments.plot is None:
            text = compare(arguments.run)
        else:
            plot(arguments.run, arguments.plot)
            try:
                text = compare(arguments.run)
            except UserError as error:
                text = f"No table: {error}"
            text += f"\nCurves: {arguments.plot}"
    echo(text)


if __name__ == "__main__":
    main()
