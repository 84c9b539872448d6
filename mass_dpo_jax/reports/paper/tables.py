"""Tables 1 to 5 of the paper, from the cells of our runs and the paper's own numbers."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports.paper.cells import Cell, Estimate, dataset_order, estimate, main_setting
from mass_dpo_jax.reports.paper.runs import Run

NUMBERS = Path(__file__).with_name("numbers.csv")
QUESTIONS = ("medmcqa", "qasc")  # Multiple choice; every other data set counts as recommendation.
RANKINGS = {"policy": "by log-probability", "reward": "by log-ratio to the reference"}
RECORD = (
    "model dataset method n beta metric percent se_seeds se_rows seeds_finished seeds state paper"
).split()


@dataclasses.dataclass
class Block:
    """Rows of text under a heading; the first `labels` columns name the row."""

    title: str
    header: list[str]
    rows: list[list[str]]
    labels: int = 1


@dataclasses.dataclass
class Table:
    """A table: `blocks` to read, `records` with the same figures, one a line, for programs."""

    name: str
    title: str
    blocks: list[Block] = dataclasses.field(default_factory=list)
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    fields: Sequence[str] = tuple(RECORD)

    def csv(self) -> str:
        return to_csv(self.records, self.fields)


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
        """The paper's figure in per cent as printed, or ""."""
        for row in self._rows:
            same = (row["table"], row["dataset"], row["method"], row["metric"]) == (
                table, cell.dataset, cell.method, metric.partition("/")[2],
            )  # fmt: skip
            if same and row["model"].lower() in cell.model.lower():
                if row["n"] in ("", _plain(cell.n)) and row["beta"] in ("", _plain(cell.beta)):
                    return row["percent"]
        return ""


def paper_tables(cells: Sequence[Cell], paper: PaperNumbers) -> list[Table]:
    """Tables 1 to 5, in this order."""
    main = main_setting(cells)
    questions = [cell for cell in main if cell.dataset in QUESTIONS]
    others = [cell for cell in main if cell.dataset not in QUESTIONS]
    return [
        _accuracy(main, paper),
        _ablation("2", "Accuracy at different beta", cells, "beta", paper),
        _ranking("3", "Recall and NDCG, recommendation", others, paper),
        _ablation("4", "Accuracy at different numbers of negatives n", cells, "n", paper),
        _ranking("5", "Recall and NDCG, multiple-choice questions", questions, paper),
    ]


def _accuracy(cells: Sequence[Cell], paper: PaperNumbers) -> Table:
    table = Table("table1", "Table 1: accuracy (%)")
    for model in dict.fromkeys(cell.model for cell in cells):
        ours = [cell for cell in cells if cell.model == model]
        datasets = sorted({cell.dataset for cell in ours}, key=dataset_order)
        for kind, words in RANKINGS.items():
            metric = f"{kind}/accuracy"
            if kind == "reward" and not any(cell.estimate(metric) for cell in ours):
                continue
            rows = []
            if kind == "policy":
                rows.append(["before training", "", "", *(_start(ours, d) for d in datasets)])
            names = dict.fromkeys((c.method, c.n, c.beta) for c in _by_method(ours))
            for name in names:
                found = {c.dataset: c for c in ours if (c.method, c.n, c.beta) == name}
                entries = [
                    _entry(found[d], metric, paper.find("1", found[d], metric))
                    if d in found
                    else ""
                    for d in datasets
                ]
                if any(entries):  # Supervised training has no rewards.
                    rows.append([name[0], _plain(name[1]), _plain(name[2]), *entries])
            header = ["method", "n", "beta", *datasets]
            table.blocks.append(Block(f"{model}, {words}", header, rows, labels=3))
            table.records += [_record("1", cell, metric, paper) for cell in ours]
    return table


def _ablation(
    number: str, title: str, cells: Sequence[Cell], varied: str, paper: PaperNumbers
) -> Table:
    """Experiments that differ in nothing but `varied`, in one row."""
    table = Table(f"table{number}", f"Table {number}: {title.lower()} (%)")
    kept = "n" if varied == "beta" else "beta"
    groups: dict[Any, dict[str, Cell]] = {}
    for cell in cells:
        if getattr(cell, varied) not in (None, "all"):
            key = (cell.model, cell.dataset, cell.method, getattr(cell, kept))
            groups.setdefault(key, {})[_plain(getattr(cell, varied))] = cell
    groups = {key: found for key, found in groups.items() if len(found) > 1}
    for model in dict.fromkeys(key[0] for key in groups):
        ours = {key: found for key, found in groups.items() if key[0] == model}
        values = sorted({value for found in ours.values() for value in found}, key=float)
        for kind, words in RANKINGS.items():
            metric = f"{kind}/accuracy"
            rows = []
            for (_, dataset, method, other), found in ours.items():
                entries = [
                    _entry(found[v], metric, paper.find(number, found[v], metric))
                    if v in found
                    else ""
                    for v in values
                ]
                rows.append([dataset, method, _plain(other), *entries])
            header = ["data", "method", kept, *(f"{varied} = {value}" for value in values)]
            table.blocks.append(Block(f"{model}, {words}", header, rows, labels=3))
            table.records += [
                _record(number, found[v], metric, paper)
                for found in ours.values()
                for v in values
                if v in found
            ]
    return table


def _ranking(number: str, title: str, cells: Sequence[Cell], paper: PaperNumbers) -> Table:
    table = Table(f"table{number}", f"Table {number}: {title} (%)")
    columns = {"recall@1": "R@1", "recall@3": "R@3", "ndcg@3": "N@3", "mrr": "MRR"}
    for model in dict.fromkeys(cell.model for cell in cells):
        for kind, words in RANKINGS.items():
            ours = [cell for cell in cells if cell.model == model]
            if kind == "reward":
                ours = [c for c in ours if not c.finished or c.estimate("reward/accuracy")]
                if not any(cell.finished for cell in ours):
                    continue
            rows = []
            for cell in ours:
                metrics = [f"{kind}/{name}" for name in columns]
                entries = [_entry(cell, m, paper.find(number, cell, m)) for m in metrics]
                rows.append(
                    [cell.dataset, cell.method, _plain(cell.n), _plain(cell.beta), *entries]
                )
                table.records += [_record(number, cell, m, paper) for m in metrics]
            header = ["data", "method", "n", "beta", *columns.values()]
            table.blocks.append(Block(f"{model}, {words}", header, rows, labels=4))
    return table


def seconds_table(cells: Sequence[Cell], seconds: dict[Path, float]) -> Table:
    """Time of a training step: of each run the median over its steps, averaged over runs."""
    fields = "model dataset method n beta seconds_per_step runs".split()
    table = Table("seconds", "Seconds per training step", fields=fields)
    for model in dict.fromkeys(cell.model for cell in cells):
        rows = []
        for cell in (c for c in cells if c.model == model):
            times = [seconds[run.folder] for run in cell.runs if run.folder in seconds]
            if times:
                mean = sum(times) / len(times)
                names = [cell.dataset, cell.method, _plain(cell.n), _plain(cell.beta)]
                rows.append([*names, f"{mean:.3g}", str(len(times))])
                line = [model, *names, f"{mean:.6g}", len(times)]
                table.records.append(dict(zip(fields, line, strict=True)))
        if rows:
            header = ["data", "method", "n", "beta", "seconds", "runs"]
            table.blocks.append(Block(model, header, rows, labels=4))
    return table


def runs_table(runs: Sequence[Run], repeats: Sequence[tuple[Run, Run]]) -> Table:
    """Every run that was found, and what became of it."""
    fields = "folder model dataset method n beta seed state split examples".split()
    table = Table("runs", "All runs", fields=fields)
    repeated = {run.folder: f"repeats {other.folder.as_posix()}" for run, other in repeats}
    for run in runs:
        state = "; ".join(word for word in (run.state, repeated.get(run.folder, "")) if word)
        line = [
            run.folder.as_posix(), run.model, run.dataset, run.method, _plain(run.n),
            _plain(run.beta), _plain(run.seed if run.settings else None), state,
            _plain(run.metrics.get("split")), _plain(run.metrics.get("examples")),
        ]  # fmt: skip
        table.records.append(dict(zip(fields, line, strict=True)))
    rows = [[str(record[f]) for f in fields] for record in table.records]
    table.blocks.append(Block("", [*fields[:-1], "rows"], rows, labels=8))
    return table


def to_csv(records: Iterable[dict[str, Any]], fields: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _by_method(cells: Sequence[Cell]) -> list[Cell]:
    """In the order in which the longest list of methods, of all data sets, has them."""
    datasets = dict.fromkeys(cell.dataset for cell in cells)
    longest = max(datasets, key=lambda d: sum(cell.dataset == d for cell in cells))
    return sorted(cells, key=lambda cell: cell.dataset != longest)


def _start(cells: Sequence[Cell], dataset: str) -> str:
    """The model itself: of the runs that do not go on from another run, one a seed."""
    runs = [r for c in cells if c.dataset == dataset for r in c.runs if not r.start]
    measured = {run.seed: run for run in runs if run.at_start("policy/accuracy") is not None}
    found = estimate(list(measured.values()), Run.at_start, "policy/accuracy")
    return found.text if found else ""


def _entry(cell: Cell, metric: str, paper: str) -> str:
    found = cell.estimate(metric)
    words = found.text if found else ""
    if words and cell.state:
        words += f" ({len(cell.finished)} of {len(cell.runs)})"
    words = words or cell.state
    return f"{words} [{paper}]".strip() if paper else words


def _record(number: str, cell: Cell, metric: str, paper: PaperNumbers) -> dict[str, Any]:
    found = cell.estimate(metric)
    figures = _figures(found) if found else ["", "", ""]
    line = [
        cell.model, cell.dataset, cell.method, _plain(cell.n), _plain(cell.beta), metric,
        *figures, found.seeds if found else 0, len(cell.runs), cell.state,
        paper.find(number, cell, metric),
    ]  # fmt: skip
    return dict(zip(RECORD, line, strict=True))


def _figures(found: Estimate) -> list[str]:
    spread = "" if found.se_seeds is None else f"{100 * found.se_seeds:.4f}"
    return [f"{100 * found.mean:.4f}", spread, f"{100 * found.se_rows:.4f}"]


def _plain(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
