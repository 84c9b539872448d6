"""Writes the paper's tables and figures from run folders, with paired comparisons.

    python -m mass_dpo_jax.report runs/paper --output=runs/paper/report
    python -m mass_dpo_jax.report runs/sdpo runs/mass-dpo --output=report
    python -m mass_dpo_jax.report runs/paper --paper=numbers.csv --output=report

Takes any number of folders and finds the runs in and below them. Writes report.html (one page,
nothing else needed), report.md, table1.csv to table5.csv, paired.csv, seconds.csv, runs.csv and
figures/. The same runs give the same bytes. Runs that are not finished are marked and listed; runs
that were tested on different rows are never compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mass_dpo_jax.cli.parser import Parser, expand_argument
from mass_dpo_jax.utils.files import expand_path


def make_report(folders: Sequence[Path], output: Path, numbers: Path | None = None) -> None:
    """Writes the report on all runs in and below the folders into the folder `output`.

    Args:
        numbers: a CSV file with the paper's own numbers; None: the one of the package.

    Raises:
        UserError: there are no runs, or `numbers` is not a table of the paper's numbers.
    """
    from mass_dpo_jax.reports.paper import report

    report.make_report(
        [expand_path(folder, "folders") for folder in folders],
        expand_path(output, "output"),
        None if numbers is None else expand_path(numbers, "numbers"),
    )


def main() -> None:
    """Writes the report on the folders that the command line names."""
    parser = Parser(__doc__)
    parser.add_argument(
        "folder", nargs="+", type=expand_argument, help="folder with runs in it, or a run"
    )
    parser.add_argument("--output", type=expand_argument, required=True, help="the folder to write")
    parser.add_argument("--paper", type=expand_argument, help="the paper's numbers, as CSV")
    arguments = parser.parse_args()
    with parser.user_errors(arguments.output):
        make_report(arguments.folder, arguments.output, arguments.paper)
    print(f"Report: {arguments.output / 'report.html'}")


if __name__ == "__main__":
    main()
