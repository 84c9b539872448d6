"""Metrics and names of runs as text, for every table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

# The ranking metrics that tables show, without "policy/" or "reward/", and their titles.
HEADLINE_METRICS = {
    "accuracy": "Accuracy (R@1)",
    "recall@3": "Recall@3",
    "mrr": "MRR",
    "ndcg@3": "NDCG@3",
}

BY_GRADE = ("map", "gain_ndcg@")  # What names of metrics begin with that only graded data has.


def list_headline_metrics(columns: Iterable[Mapping[str, float]]) -> dict[str, str]:
    """Returns the titles of the metrics that a table shows: `HEADLINE_METRICS`, then any by grade.

    Args:
        columns: the metrics of each column of a table, by whole names such as `policy/mrr`.
    """
    names = dict.fromkeys(name.partition("/")[2] for column in columns for name in column)
    graded = [n for n in names if n.startswith(BY_GRADE) and not n.endswith("_se")]
    titles = {n: "MAP" if n == "map" else n.replace("gain_ndcg", "NDCG of gains") for n in graded}
    return {**HEADLINE_METRICS, **titles}


def format_percent(mean: float, error: float, sign: str = "") -> str:
    """Formats a mean and its standard error in percent, such as "12.3 ± 0.4".

    Args:
        mean: the mean; 1 is 100%.
        error: its standard error.
        sign: "+" shows the sign of positive means too.
    """
    return f"{100 * mean:{sign}.1f} ± {100 * error:.1f}"


def format_metric(metrics: Mapping[str, float], name: str) -> str:
    """Formats a metric and its standard error, `NAME_se`, in percent; "" where it is missing."""
    error = f"{name}_se"
    return format_percent(metrics[name], metrics[error]) if {name, error} <= set(metrics) else ""


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1, padded: bool = False
) -> str:
    """Formats a table in Markdown.

    Args:
        header: the title of every column.
        rows: the cells.
        labels: columns that name the row, and are aligned left.
        padded: whether columns are aligned in the text too, for terminals.
    """
    lines = [[cell.replace("|", chr(92) + "|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) if padded else 0 for column in zip(*lines, strict=True)]
    rules = ["---"] * labels + ["---:"] * (len(header) - labels)
    if padded:
        rules = [
            rule.replace("---", "-" * max(3, width - rule.count(":")))
            for rule, width in zip(rules, widths, strict=True)
        ]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i < labels else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in (lines[0], rules, *lines[1:])
    )


def short_names(folders: Sequence[Path]) -> list[str]:
    """Returns a name for each folder: the shortest end of its path that no other path shares."""
    paths = [folder.absolute().parts for folder in folders]

    def name(path: tuple[str, ...]) -> str:
        others = [other for other in paths if other != path]
        length = 1
        while any(other[-length:] == path[-length:] for other in others):
            length += 1
        return Path(*path[-length:]).as_posix()

    return [name(path) for path in paths]
