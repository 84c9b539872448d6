"""The whole report: tables and figures of the runs in some folders, written into another."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports.paper import cells as cells_lib
from mass_dpo_jax.reports.paper import extra_tables, figures, page, paired, tables
from mass_dpo_jax.reports.paper.cells import Cell
from mass_dpo_jax.reports.paper.layout import FIGURES, TITLES
from mass_dpo_jax.reports.paper.runs import Run, find_runs, paper_differences
from mass_dpo_jax.runs.metrics_files import Series
from mass_dpo_jax.utils.files import write_whole

MAX_DIFFERENCES = 12  # Settings that a note names.
BY_REWARD = "Tables 1 to 5 with ours by the log-ratio to the reference"
BOOTSTRAP = (
    "In brackets: 95% intervals of a paired bootstrap with fixed random numbers. A draw takes "
    "seeds with replacement and test rows with replacement, the same rows in every seed. With one "
    "seed the interval says how sure the difference is on other test rows, not in other trainings. "
    "With two or three it is too narrow where trainings differ much more than test rows do, and a "
    "little where the seed also draws the test rows (config.data.max_test). Many pairs are "
    "compared: of twenty intervals of equal methods, one will miss 0."
)
# What the paper's numbers say about its test sets; docs/paper.md has the computation.
DATASET_NOTES = {
    "qasc": "the paper's numbers fit 906 rows. The public dev split has 926, the public test "
    "split no answers: how the paper chose its rows is not known",
    "medmcqa": "the paper's numbers fit 1,996 rows in Tables 1 and 4, 1,995 in Table 5, and four "
    "candidates each, though it says that pools were expanded to 20",
    "movielens": "the paper's numbers fit 1,984 rows",
    "lastfm": "the paper's numbers fit 2,000 rows",
}


def make_report(folders: Sequence[Path], output: Path) -> None:
    """Implements `mass_dpo_jax.report.make_report`."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: is a file, expected the folder to write")
    runs = find_runs(folders)
    cells, repeats = cells_lib.gather(runs)
    logs = figures.read_logs(runs)
    content = page.PageContent(
        title="MASS-DPO: tables and figures",
        warnings=[f"{run.folder.as_posix()}: {run.state}" for run in runs if not run.finished],
        notes=[
            *page.NOTES,
            figures.CAPTION,
            *_dataset_notes(runs),
            *_difference_notes(runs),
        ],
        tables=tables.paper_tables(cells),
        pictures=_paper_figures(cells, logs),
        extra=_extra(runs, cells, repeats, logs),
    )
    _write(content, output)


def _dataset_notes(runs: Sequence[Run]) -> list[str]:
    """Says on how many rows the paper's numbers are, and ours."""
    notes = []
    for dataset, note in DATASET_NOTES.items():
        tested = {
            f"{run.metrics.get('examples')} rows of the split {run.metrics.get('split')}"
            for run in runs
            if run.dataset == dataset and run.finished
        }
        if tested:
            notes.append(f"{TITLES[dataset]}: {note}; ours are on {', '.join(sorted(tested))}.")
    return notes


def _difference_notes(runs: Sequence[Run]) -> list[str]:
    """Says which settings of ours are not the paper's."""
    known = [run for run in runs if run.settings]
    counts = collections.Counter(
        f"{name}={value}" for run in known for name, value in paper_differences(run).items()
    )
    if not counts:
        return []
    named = [
        setting if count == len(known) else f"{setting} ({count} of {len(known)} runs)"
        for setting, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    more = len(named) - MAX_DIFFERENCES
    words = named[:MAX_DIFFERENCES] + ([f"and {more} more, see runs.csv"] if more > 0 else [])
    return [f"Settings of our runs that are not the paper's: {', '.join(words)}."]


def _paper_figures(
    cells: Sequence[Cell], logs: Mapping[Path, Mapping[str, Series]]
) -> list[page.Picture]:
    pictures = []
    for figure in FIGURES:
        png = figures.draw_figure(figure, cells, logs)
        if png:
            title = f"Figure {figure.number}: {figure.caption}"
            pictures.append(page.Picture(title, f"figure{figure.number}.png", png))
    return pictures


def _extra(
    runs: Sequence[Run],
    cells: Sequence[Cell],
    repeats: Sequence[tuple[Run, Run]],
    logs: Mapping[Path, Mapping[str, Series]],
) -> list[page.Group]:
    """Returns what the paper does not have."""
    main = cells_lib.main_setting(cells)
    paired_table, not_compared = paired.compare_all(main)
    times = {
        run.folder: seconds
        for run in runs
        if run.settings and run.folder in logs
        if (seconds := figures.seconds_per_step(run, logs[run.folder])) is not None
    }
    alone = [
        (extra_tables.other_data_table(cells), []),
        (paired_table, [BOOTSTRAP, *not_compared]),
        (extra_tables.seconds_table(cells, times), []),
        (extra_tables.runs_table(runs, repeats), []),
    ]
    groups = [
        page.Group(BY_REWARD, tables=_by_reward(cells)),
        page.Group("Curves", pictures=_curves(main, logs)),
        *(page.Group(table.title, notes, [table]) for table, notes in alone),
    ]
    return [g for g in groups if g.pictures or g.notes[1:] or any(t.blocks for t in g.tables)]


def _by_reward(cells: Sequence[Cell]) -> list[tables.Table]:
    """Returns the paper's tables with ours by reward; none where no run has rewards."""
    if not any(cell.estimate("reward/accuracy") for cell in cells if cell.dataset in TITLES):
        return []
    return tables.paper_tables(cells, "reward")


def _curves(cells: Sequence[Cell], logs: Mapping[Path, Mapping[str, Series]]) -> list[page.Picture]:
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
    for picture in (*content.pictures, *(p for group in content.extra for p in group.pictures)):
        write_whole(output / "figures" / picture.name, [picture.png])
    for table in (*content.tables, *(t for group in content.extra for t in group.tables)):
        if table.name:
            write_whole(output / f"{table.name}.csv", [table.csv()])
    write_whole(output / "report.md", [page.to_markdown(content)])
    write_whole(output / "report.html", [page.to_html(content)])
