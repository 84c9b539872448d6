"""Tables 1 to 5 as the paper prints them, with its numbers and, beside them, our runs'."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mass_dpo_jax.reports.paper import cells as cells_lib
from mass_dpo_jax.reports.paper.blocks import BEST, SECOND, Block, Entry, Row, Section, Table, plain
from mass_dpo_jax.reports.paper.cells import Cell, Estimate
from mass_dpo_jax.reports.paper.layout import BETA, METHODS, TABLES, Column, Layout, Part
from mass_dpo_jax.reports.paper.numbers import AVERAGE, Number, Place, read_numbers
from mass_dpo_jax.reports.paper.runs import Run

RANKINGS = {"policy": "by log-probability", "reward": "by log-ratio to the reference"}
EXTRA = "not in the paper"
FIELDS = (
    "table model dataset method n beta metric unit value se_seeds se_rows seeds_finished seeds "
    "state paper paper_se"
).split()


class _Line(NamedTuple):
    """A row before it is formatted.

    Attributes:
        title: what it is called.
        method: the method, for the CSV.
        n: its negatives.
        beta: its beta.
        cells: our cells by dataset; without a cell where we have none.
        numbers: the paper's numbers by dataset and metric.
    """

    title: str
    method: str
    n: int | str | None
    beta: float | None
    cells: Mapping[str, Cell]
    numbers: Mapping[tuple[str, str], Number]


def paper_tables(cells: Sequence[Cell], ranking: str = "policy") -> list[Table]:
    """Returns Tables 1 to 5, in this order.

    Args:
        cells: our experiments.
        ranking: what ours are ranked by: "policy" or "reward". The records of the former have both;
            the latter has none, and no name.
    """
    return [_table(layout, cells, ranking) for layout in TABLES]


def _table(layout: Layout, cells: Sequence[Cell], ranking: str) -> Table:
    name = f"table{layout.number}" if ranking == "policy" else ""
    table = Table(name, f"Table {layout.number}: {layout.caption}", FIELDS)
    for part in layout.parts:
        sections = []
        for model, short, members in cells_lib.group_by_model(cells):
            lines = [
                _Line(
                    row.title, row.method, row.n, row.beta, _row_cells(members, part, row),
                    _row_numbers(part, short, row),
                )
                for row in part.rows
            ]  # fmt: skip
            extra = _extra_lines(members, part, lines)
            known = [line for line in (*lines, *extra) if line.numbers or line.cells]
            if len(known) < (2 if part.varied else 1):
                continue  # A model of ours without runs for this table.
            marks = _Marks(part, lines, ranking) if part.marks else None
            rows = [_format_row(part, line, ranking, marks) for line in lines]
            sections.append(
                Section([[model if i == 0 else "", *row] for i, row in enumerate(rows)])
            )
            extra_rows = [_format_row(part, line, ranking, None) for line in extra]
            if part.name == "1" and ranking == "policy":
                extra_rows += _start_rows(part, members)
            if extra_rows:
                sections.append(Section([["", *row] for row in extra_rows], EXTRA))
            for line in (*lines, *extra) if table.name else ():
                _add_records(table, part, model, line)
        header = [*part.labels, *(column.title for column in part.columns)]
        groups = ["", "", *(column.group for column in part.columns)]
        table.blocks.append(
            Block(part.title, header, sections, labels=2, groups=groups if any(groups) else ())
        )
    return table


def _datasets(part: Part) -> list[str]:
    return list(dict.fromkeys(c.dataset for c in part.columns if c.dataset != AVERAGE))


def _row_cells(cells: Sequence[Cell], part: Part, row: cells_lib.Row) -> dict[str, Cell]:
    found = {dataset: cells_lib.find_cell(cells, dataset, row) for dataset in _datasets(part)}
    return {dataset: cell for dataset, cell in found.items() if cell}


def _row_numbers(part: Part, model: str, row: cells_lib.Row) -> dict[tuple[str, str], Number]:
    """Returns the paper's numbers of a row; none where the model is not the paper's."""
    if not model:
        return {}
    numbers = read_numbers()
    return {
        (column.dataset, metric): numbers[
            Place(part.name, model, column.dataset, row.method, row.n, row.beta, metric)
        ]
        for column in part.columns
        for metric in column.metrics
    }


def _extra_lines(cells: Sequence[Cell], part: Part, lines: Iterable[_Line]) -> list[_Line]:
    """Returns the rows of a model's cells that none of the paper's rows has."""
    taken = {id(cell) for line in lines for cell in line.cells.values()}
    datasets = _datasets(part)
    candidates = [cell for cell in cells if cell.dataset in datasets and id(cell) not in taken]
    if part.varied:
        candidates = [c for c in candidates if _is_ablated(c, cells, part.varied)]
    else:
        main = {id(cell) for cell in cells_lib.main_setting(cells)}
        candidates = [c for c in candidates if id(c) in main]
    rows: dict[Any, dict[str, Cell]] = {}
    for cell in candidates:
        rows.setdefault((cell.method, cell.n, cell.beta), {})[cell.dataset] = cell
    return [
        _Line(_extra_title(part, next(iter(members.values()))), method, n, beta, members, {})
        for (method, n, beta), members in rows.items()
    ]


def _is_ablated(cell: Cell, cells: Sequence[Cell], varied: str) -> bool:
    """Whether there are cells that differ from this one in the varied setting only."""

    def fixed(cell: Cell) -> tuple[object, ...]:
        return cell.dataset, cell.method, cell.n if varied == "beta" else cell.beta

    values = {getattr(other, varied) for other in cells if fixed(other) == fixed(cell)}
    return getattr(cell, varied) in values - {None, "all"} and len(values - {None, "all"}) > 1


def _extra_title(part: Part, cell: Cell) -> str:
    """Names a row: what is varied, the method, and n and beta where they are not the paper's."""
    words = [str(getattr(cell, part.varied))] if part.varied else []
    # The paper's methods have the paper's names here too.
    title = next((row.title for row in METHODS if cells_lib.is_variant(cell, row)), cell.variant)
    words.append(title + cell.method.removeprefix(cell.variant))
    if part.varied != "n" and cell.n not in (None, "all", cells_lib.main_n(cell)):
        words.append(f"n={cell.n}")
    if part.varied != "beta" and cell.beta not in (None, BETA):
        words.append(f"beta={plain(cell.beta)}")
    return ", ".join(words)


class _Marks:
    """Which figures of a model are the best and the second best of their column.

    The paper's bold is not in the text that its numbers are from: it is where its caption says. Its
    underlines are those of the text.
    """

    def __init__(self, part: Part, lines: Sequence[_Line], ranking: str):
        self._paper: dict[str, list[float]] = {}
        self._ours: dict[str, list[float]] = {}
        for column in part.columns:
            (metric,) = column.metrics
            for line in lines:
                if number := line.numbers.get((column.dataset, metric)):
                    self._paper.setdefault(column.dataset, []).append(number.value)
                if estimate := _estimate(part, line, column.dataset, metric, ranking):
                    self._ours.setdefault(column.dataset, []).append(estimate.mean)

    def paper(self, dataset: str, number: Number) -> str:
        """Returns the mark of a number of the paper."""
        if number.value == max(self._paper[dataset]):
            return BEST
        return SECOND if number.underlined else ""

    def ours(self, dataset: str, mean: float) -> str:
        """Returns the mark of a mean of ours; "" where there is nothing to compare it with."""
        ordered = sorted(set(self._ours[dataset]), reverse=True)
        if len(ordered) < 2 or mean not in ordered[:2]:
            return ""
        return BEST if mean == ordered[0] else SECOND


def _format_row(part: Part, line: _Line, ranking: str, marks: _Marks | None) -> Row:
    return [line.title, *(_entry(part, line, c, ranking, marks) for c in part.columns)]


def _entry(part: Part, line: _Line, column: Column, ranking: str, marks: _Marks | None) -> Entry:
    printed = [line.numbers.get((column.dataset, metric)) for metric in column.metrics]
    numbers = [number for number in printed if number]
    estimates = [
        (metric, _estimate(part, line, column.dataset, metric, ranking))
        for metric in column.metrics
    ]
    texts = [
        estimate.text("logits" if metric == "margin" else "percent") if estimate else "—"
        for metric, estimate in estimates
    ]
    ours, mark = "", ""
    cell = line.cells.get(column.dataset)
    if any(estimate for _, estimate in estimates):
        ours = " / ".join(texts)
        if cell and cell.state:
            ours += f" ({len(cell.finished)} of {len(cell.runs)})"
        if marks and (first := estimates[0][1]):
            mark = marks.ours(column.dataset, first.mean)
    elif cell:
        ours = cell.state or "—"
    return Entry(
        " / ".join(number.text for number in numbers),
        numbers[0].error if numbers else "",
        marks.paper(column.dataset, numbers[0]) if marks and numbers else "",
        ours,
        mark,
    )


def _estimate(part: Part, line: _Line, dataset: str, metric: str, ranking: str) -> Estimate | None:
    """Returns what we measured; of the average, only where all datasets were."""
    if dataset == AVERAGE:
        members = [_estimate(part, line, d, metric, ranking) for d in _datasets(part)]
        known = [member for member in members if member]
        return cells_lib.average(known) if len(known) == len(members) else None
    cell = line.cells.get(dataset)
    return cell.estimate(_metric(metric, ranking)) if cell else None


def _metric(metric: str, ranking: str) -> str:
    """Returns our name of a metric of the paper."""
    return "rewards/margins" if metric == "margin" else f"{ranking}/{metric}"


def _start_rows(part: Part, cells: Sequence[Cell]) -> list[Row]:
    """Returns a row of the model's own accuracy, from one run per seed that starts from no run."""
    entries = []
    for column in part.columns:
        runs = [r for c in cells if c.dataset == column.dataset for r in c.runs if not r.start]
        measured = {r.seed: r for r in runs if r.at_start("policy/accuracy") is not None}
        mean = cells_lib.estimate(list(measured.values()), Run.at_start, "policy/accuracy")
        entries.append(Entry(ours=mean.text() if mean else ""))
    return [["before training", *entries]] if any(entry.ours for entry in entries) else []


def _add_records(table: Table, part: Part, model: str, line: _Line) -> None:
    for column in part.columns:
        cell = line.cells.get(column.dataset)
        for metric, ranking in itertools.product(column.metrics, RANKINGS):
            number = line.numbers.get((column.dataset, metric))
            mean = _estimate(part, line, column.dataset, metric, ranking)
            # The paper's numbers stand once, beside our first ranking.
            if ranking != "policy" and (mean is None or metric == "margin"):
                continue
            if number is None and mean is None and cell is None:
                continue
            unit = "logits" if metric == "margin" else "percent"
            figures = ["", "", ""]
            if mean:
                scale = 100 if unit == "percent" else 1
                values = (mean.mean, mean.se_seeds, mean.se_rows)
                figures = ["" if x is None else f"{scale * x:.4f}" for x in values]
            table.add_record(
                part.name, model, column.dataset, line.method, plain(line.n), plain(line.beta),
                _metric(metric, ranking), unit, *figures, mean.seeds if mean else 0,
                len(cell.runs) if cell else 0, cell.state if cell else "",
                number.text if number else "", number.error if number else "",
            )  # fmt: skip
