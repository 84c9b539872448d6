"""The whole report: tables and figures of the runs in some folders, written into another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports.paper import cells as cells_lib
from mass_dpo_jax.reports.paper import figures, page, paired, tables
from mass_dpo_jax.reports.paper.cells import Cell
from mass_dpo_jax.reports.paper.runs import Run, find_runs
from mass_dpo_jax.runs.metrics_files import Series
from mass_dpo_jax.utils.files import write_whole

NOTES = [
    "Accuracy is the share of test rows whose chosen response is ranked first among all "
    "candidates; a tie counts as lost. The ranking is by the policy's own log-probability or, "
    "where stated, by its log-ratio to the reference. The paper does not say which it uses.",
    "± is the standard error over seeds; with a star, of a single seed, over its test rows. "
    "(2 of 3): two of three seeds have finished, and the figures are of those two.",
]
UNCHECKED = (
    "The paper's tables were not available when this program was written, and what is said about "
    "them here is second-hand. That Tables 2 and 4 are the ablations of beta and n, and how Tables "
    "3 and 5 share the datasets, is our arrangement."
)
NO_PAPER_NUMBERS = (
    "So none of the paper's own numbers is shown; none was made up. Rows added to "
    "mass_dpo_jax/reports/paper/numbers.csv, or to a file given as --paper, appear in square "
    "brackets."
)
PAPER_NUMBERS = "The paper's own numbers, where they are known, are in square brackets."
BOOTSTRAP = (
    "In brackets: 95% intervals of a paired bootstrap with fixed random numbers. A draw takes "
    "seeds with replacement and test rows with replacement, the same rows in every seed. With one "
    "seed the interval says how sure the difference is on other test rows, not in other trainings. "
    "With two or three it is too narrow where trainings differ much more than test rows do, and a "
    "little where the seed also draws the test rows (config.data.max_test). Many pairs are "
    "compared: of twenty intervals of equal methods, one will miss 0."
)
DATASET_NOTES = {
    "qasc": "QASC: every cell of the paper is a multiple of 1/906, so it was tested on 906 rows. "
    "The public dev split has 926, the public test split no answers: how the paper chose its rows "
    "is not known.",
    "medmcqa": "MedMCQA: the paper says its pools were expanded to 20 candidates, but reports "
    "numbers at the level of 4 (DMPO: 24.4 to 26.0% R@1, 75% R@3).",
}


def make_report(folders: Sequence[Path], output: Path, numbers: Path | None = None) -> None:
    """Implements `mass_dpo_jax.report.make_report`."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: is a file, expected the folder to write")
    paper = tables.PaperNumbers(numbers or tables.NUMBERS)
    runs = find_runs(folders)
    cells, repeats = cells_lib.gather(runs)
    main = cells_lib.main_setting(cells)
    logs = figures.read_logs(runs)
    paired_table, not_compared = paired.compare_all(main)
    times = {
        run.folder: seconds
        for run in runs
        if run.settings and run.folder in logs
        if (seconds := figures.seconds_per_step(run, logs[run.folder])) is not None
    }
    notes = [*NOTES, UNCHECKED, PAPER_NUMBERS if len(paper) else NO_PAPER_NUMBERS]
    content = page.PageContent(
        title="MASS-DPO: tables and figures",
        warnings=[f"{run.folder.as_posix()}: {run.state}" for run in runs if not run.finished],
        notes=[*notes, *_dataset_notes(runs)],
        main=tables.paper_tables(cells, paper),
        pictures=_draw_pictures(main, logs),
        extra=[
            paired_table,
            tables.seconds_table(cells, times),
            tables.runs_table(runs, repeats),
        ],
        remarks={"paired": [BOOTSTRAP, *not_compared]},
    )
    _write(content, output)


def _dataset_notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    for dataset, note in DATASET_NOTES.items():
        tested = {
            f"{run.metrics.get('examples')} rows of its split {run.metrics.get('split')}"
            for run in runs
            if run.dataset == dataset and run.finished
        }
        if tested:
            notes.append(f"{note} Tested here: {', '.join(sorted(tested))}.")
    return notes


def _draw_pictures(
    cells: Sequence[Cell], logs: Mapping[Path, Mapping[str, Series]]
) -> list[page.Picture]:
    """Draws a picture for each model and dataset with curves."""
    pictures = []
    for model, dataset in dict.fromkeys((cell.model, cell.dataset) for cell in cells):
        png = figures.draw([c for c in cells if (c.model, c.dataset) == (model, dataset)], logs)
        if png:
            name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{model}-{dataset}").strip("-.")
            pictures.append(page.Picture(f"{model}, {dataset}", f"{name}.png", png))
    return pictures


def _write(content: page.PageContent, output: Path) -> None:
    try:
        (output / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be a folder: {error.strerror}") from None
    for picture in content.pictures:
        write_whole(output / "figures" / picture.name, [picture.png])
    for table in [*content.main, *content.extra]:
        write_whole(output / f"{table.name}.csv", [table.csv()])
    write_whole(output / "report.md", [page.to_markdown(content)])
    write_whole(output / "report.html", [page.to_html(content)])
