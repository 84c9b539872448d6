"""Writes the paper's tables and figures from run folders, with paired comparisons.

    python -m mass_dpo_jax.report runs/paper
    python -m mass_dpo_jax.report runs/paper --output=runs/paper/report
    python -m mass_dpo_jax.report runs/sdpo runs/mass-dpo --output=report

Takes any number of folders and finds the runs in and below them. Prints Tables 1 to 5 with every
number of the paper and, in brackets, ours. --output writes report.html (one page, nothing else
needed), report.md, table1.csv to table5.csv and figures/ instead, with paired comparisons and a
list of all runs. The same runs give the same bytes. Runs that are not finished are marked and
listed; runs that were tested on different rows are never compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mass_dpo_jax.cli.help import echo
from mass_dpo_jax.cli.parser import Parser, expand_argument
from mass_dpo_jax.utils.files import expand_path


def format_tables(folders: Sequence[Path]) -> str:
    """Returns the paper's tables in Markdown, with all runs in and below the folders beside them.

    Raises:
        UserError: there are no runs.
    """
    from mass_dpo_jax.reports.paper import page

    return page.format_tables([expand_path(folder, "folders") for folder in folders])


def make_report(folders: Sequence[Path], output: Path) -> None:
    """Writes the report on all runs in and below the folders into the folder `output`.

    Raises:
        UserError: there are no runs, or `output` cannot be a folder.
    """
    from mass_dpo_jax.reports.paper import report

    report.make_report(
        [expand_path(folder, "folders") for folder in folders], expand_path(output, "output")
    )


def main() -> None:
    """Prints or writes the report on the folders that the command line names."""
    parser = Parser(__doc__)
    parser.add_argument(
        "folder", nargs="+", type=expand_argument, help="folder with runs in it, or a run"
    )
    parser.add_argument("--output", type=expand_argument, help="a folder to write the report to")
    arguments = parser.parse_args()
    with parser.user_errors(arguments.output):
        if arguments.output is None:
            echo(format_tables(arguments.folder))
        else:
            make_report(arguments.folder, arguments.output)
            print(f"Report: {arguments.output / 'report.html'}")


if __name__ == "__main__":
    main()
