"""Tables 1 to 5 of the paper, from the cells of our runs and the paper's own numbers."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports.paper.cells import Cell, dataset_order, estimate, main_setting
from mass_dpo_jax.reports.paper.runs import Run

NUMBERS = Path(__file__).with_name("numbers.csv")
QUESTIONS = ("medmcqa", "qasc")  # Multiple choice; every other dataset counts as recommendation.
RANKINGS = {"policy": "by log-probability", "reward": "by log-ratio to the reference"}
FIELDS = (
    "model dataset method n beta metric percent se_seeds se_rows seeds_finished seeds state paper"
).split()


@dataclasses.dataclass
class Block:
    """Rows of text under a heading.

    Attributes:
        title: the heading; "" for none.
        header: the title of every column.
        rows: the cells.
        labels: columns that name the row.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    labels: int = 1


@dataclasses.dataclass
class Table:
    """A table for people and for programs.

    Attributes:
        name: name of its CSV file.
        title: the heading.
        blocks: the formatted text for readers.
        records: the same figures, one a line.
        fields: the names of a record's values, in their order.
    """

    name: str
    title: str
    blocks: list[Block] = dataclasses.field(default_factory=list)
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    fields: Sequence[str] = tuple(FIELDS)

    def add_record(self, *values: Any) -> None:
        """Adds a record, its values in the order of the fields."""
        self.records.append(dict(zip(self.fields, values, strict=True)))

    def csv(self) -> str:
        """Returns the records as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        return text.getvalue()


class PaperNumbers:
    """The paper's numbers that are known: rows of a file with the header of `numbers.csv`.

    `model` is a word in the name of the model's folder (llama, qwen, smollm); `method` is written
    as our tables write it; an empty n or beta stands for any. `metric` has no policy/ or reward/
    before it, since the paper does not say which of the two it means.
    """

    def __init__(self, path: Path = NUMBERS):
        try:
            with path.open(newline="") as file:
                self._rows = list(csv.DictReader(file))
            for row in self._rows:
                float(row["percent"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a table like {NUMBERS.name}: {error}") from None

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, table: str, cell: Cell, metric: str) -> str:
        """Returns the paper's figure in percent as printed, or ""."""
        key = (table, cell.dataset, cell.method, metric.partition("/")[2])
        for row in self._rows:
            if (row["table"], row["dataset"], row["method"], row["metric"]) != key:
                continue
            if row["model"].lower() not in cell.model.lower():
                continue
            if row["n"] in ("", _plain(cell.n)) and row["beta"] in ("", _plain(cell.beta)):
                return row["percent"]
        return ""


def paper_tables(cells: Sequence[Cell], paper: PaperNumbers) -> list[Table]:
    """Returns tables 1 to 5, in this order."""
    main = main_setting(cells)
    questions = [cell for cell in main if cell.dataset in QUESTIONS]
    others = [cell for cell in main if cell.dataset not in QUESTIONS]
    return [
        _accuracy(main, paper),
        _ablation("2", "accuracy at different beta", cells, "beta", paper),
        _ranking("3", "Recall and NDCG, recommendation", others, paper),
        _ablation("4", "accuracy at different numbers of negatives n", cells, "n", paper),
        _ranking("5", "Recall and NDCG, multiple-choice questions", questions, paper),
    ]


def _accuracy(cells: Sequence[Cell], paper: PaperNumbers) -> Table:
    """Returns a row for each method, a column for each dataset."""
    table = Table("table1", "Table 1: accuracy (%)")
    for model, model_cells in _by_model(cells).items():
        datasets = sorted({cell.dataset for cell in model_cells}, key=dataset_order)
        # Methods in the order of the dataset with the most of them.
        count = {d: sum(cell.dataset == d for cell in model_cells) for d in datasets}
        first = max(dict.fromkeys(cell.dataset for cell in model_cells), key=lambda d: count[d])
        methods = dict.fromkeys(
            (c.method, c.n, c.beta) for c in sorted(model_cells, key=lambda c: c.dataset != first)
        )
        for ranking, words in RANKINGS.items():
            metric = f"{ranking}/accuracy"
            if ranking == "reward" and not any(cell.estimate(metric) for cell in model_cells):
                continue
            rows = []
            if ranking == "policy":
                starts = [_start_accuracy(model_cells, dataset) for dataset in datasets]
                rows.append(["before training", "", "", *starts])
            for method in methods:
                row = {c.dataset: c for c in model_cells if (c.method, c.n, c.beta) == method}
                entries = [_entry("1", row.get(d), metric, paper) for d in datasets]
                if any(entries):  # Supervised training has no rewards.
                    rows.append([*map(_plain, method), *entries])
            header = ["method", "n", "beta", *datasets]
            table.blocks.append(Block(f"{model}, {words}", header, rows, labels=3))
            for cell in model_cells:
                _add_record(table, "1", cell, metric, paper)
    return table


def _ablation(
    number: str, title: str, cells: Sequence[Cell], varied: str, paper: PaperNumbers
) -> Table:
    """Returns a row for experiments that differ only in `varied`, a column for each value."""
    table = Table(f"table{number}", f"Table {number}: {title} (%)")
    other = "n" if varied == "beta" else "beta"
    groups: dict[Any, dict[str, Cell]] = {}
    for cell in cells:
        if getattr(cell, varied) not in (None, "all"):
            key = (cell.model, cell.dataset, cell.method, getattr(cell, other))
            groups.setdefault(key, {})[_plain(getattr(cell, varied))] = cell
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    for model in dict.fromkeys(key[0] for key in groups):
        model_groups = {key: group for key, group in groups.items() if key[0] == model}
        values = sorted({value for group in model_groups.values() for value in group}, key=float)
        header = ["data", "method", other, *(f"{varied} = {value}" for value in values)]
        for ranking, words in RANKINGS.items():
            metric = f"{ranking}/accuracy"
            rows = []
            for (_, dataset, method, fixed), group in model_groups.items():
                entries = [_entry(number, group.get(v), metric, paper) for v in values]
                rows.append([dataset, method, _plain(fixed), *entries])
                for value in values:
                    if value in group:
                        _add_record(table, number, group[value], metric, paper)
            table.blocks.append(Block(f"{model}, {words}", header, rows, labels=3))
    return table


def _ranking(number: str, title: str, cells: Sequence[Cell], paper: PaperNumbers) -> Table:
    """Returns a row for each experiment, a column for each metric."""
    table = Table(f"table{number}", f"Table {number}: {title} (%)")
    columns = {"recall@1": "R@1", "recall@3": "R@3", "ndcg@3": "N@3", "mrr": "MRR"}
    header = ["data", "method", "n", "beta", *columns.values()]
    for model, model_cells in _by_model(cells).items():
        for ranking, words in RANKINGS.items():
            selected = model_cells
            if ranking == "reward":
                selected = [
                    c for c in model_cells if not c.finished or c.estimate("reward/accuracy")
                ]
                if not any(cell.finished for cell in selected):
                    continue
            rows = []
            for cell in selected:
                metrics = [f"{ranking}/{name}" for name in columns]
                rows.append(
                    [*_names(cell), *(_entry(number, cell, metric, paper) for metric in metrics)]
                )
                for metric in metrics:
                    _add_record(table, number, cell, metric, paper)
            table.blocks.append(Block(f"{model}, {words}", header, rows, labels=4))
    return table


def seconds_table(cells: Sequence[Cell], seconds: Mapping[Path, float]) -> Table:
    """Returns the time of a training step: a run's median over its steps, averaged over runs."""
    fields = "model dataset method n beta seconds_per_step runs".split()
    table = Table("seconds", "Seconds per training step", fields=fields)
    header = ["data", "method", "n", "beta", "seconds", "runs"]
    for model, model_cells in _by_model(cells).items():
        rows = []
        for cell in model_cells:
            times = [seconds[run.folder] for run in cell.runs if run.folder in seconds]
            if times:
                mean = sum(times) / len(times)
                rows.append([*_names(cell), f"{mean:.3g}", str(len(times))])
                table.add_record(model, *_names(cell), f"{mean:.6g}", len(times))
        if rows:
            table.blocks.append(Block(model, header, rows, labels=4))
    return table


def runs_table(runs: Sequence[Run], repeats: Sequence[tuple[Run, Run]]) -> Table:
    """Returns every run that was found, and its state."""
    fields = "folder model dataset method n beta seed state split examples".split()
    table = Table("runs", "All runs", fields=fields)
    repeated = {run.folder: f"repeats {other.folder.as_posix()}" for run, other in repeats}
    for run in runs:
        state = "; ".join(word for word in (run.state, repeated.get(run.folder, "")) if word)
        seed = run.seed if run.settings else None
        values = (
            run.folder.as_posix(), run.model, run.dataset, run.method, run.n, run.beta, seed,
            state, run.metrics.get("split"), run.metrics.get("examples"),
        )  # fmt: skip
        table.add_record(*map(_plain, values))
    rows = [[record[field] for field in fields] for record in table.records]
    table.blocks.append(Block("", [*fields[:-1], "rows"], rows, labels=8))
    return table


def _by_model(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.model, []).append(cell)
    return groups


def _names(cell: Cell) -> list[str]:
    return [cell.dataset, cell.method, _plain(cell.n), _plain(cell.beta)]


def _start_accuracy(cells: Sequence[Cell], dataset: str) -> str:
    """Formats the model's own accuracy, from one run for each seed that starts from no run."""
    runs = [r for c in cells if c.dataset == dataset for r in c.runs if not r.start]
    measured = {run.seed: run for run in runs if run.at_start("policy/accuracy") is not None}
    mean = estimate(list(measured.values()), Run.at_start, "policy/accuracy")
    return mean.text if mean else ""


def _entry(number: str, cell: Cell | None, metric: str, paper: PaperNumbers) -> str:
    """Formats a metric of a cell; "" where there is no such cell."""
    if cell is None:
        return ""
    mean = cell.estimate(metric)
    text = mean.text if mean else cell.state
    if mean and cell.state:
        text += f" ({len(cell.finished)} of {len(cell.runs)})"
    printed = paper.find(number, cell, metric)
    return f"{text} [{printed}]".strip() if printed else text


def _add_record(table: Table, number: str, cell: Cell, metric: str, paper: PaperNumbers) -> None:
    mean = cell.estimate(metric)
    figures: list[str] = ["", "", ""]
    if mean:
        spread = "" if mean.se_seeds is None else f"{100 * mean.se_seeds:.4f}"
        figures = [f"{100 * mean.mean:.4f}", spread, f"{100 * mean.se_rows:.4f}"]
    table.add_record(
        cell.model, *_names(cell), metric, *figures, mean.seeds if mean else 0, len(cell.runs),
        cell.state, paper.find(number, cell, metric),
    )  # fmt: skip


def _plain(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
