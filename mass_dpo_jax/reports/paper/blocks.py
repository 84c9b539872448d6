"""Tables as text: cells that show the paper's figure and ours, rows, headings, CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

BEST, SECOND = "best", "second"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A cell with the paper's figure and ours.

    Attributes:
        paper: the paper's figure as printed; "" where it has none.
        error: its standard error as printed; "" where it has none.
        paper_mark: "best" where it is bold, "second" where it is underlined, else "".
        ours: our figure with its standard error, or what is missing; "" where there is no run.
        mark: what `paper_mark` is for ours.
    """

    paper: str = ""
    error: str = ""
    paper_mark: str = ""
    ours: str = ""
    mark: str = ""


Row = Sequence[str | Entry]


@dataclasses.dataclass(frozen=True)
class Section:
    """Rows that belong together.

    Attributes:
        rows: the rows.
        title: what they are, above them; "" for nothing.
    """

    rows: Sequence[Row]
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows under a heading.

    Attributes:
        title: the heading; "" for none.
        header: the title of every column.
        sections: the rows, with a line between sections.
        labels: columns that name the row.
        groups: the heading above every column, the same for neighbours that share it; empty where
            there are none.
    """

    title: str
    header: Sequence[str]
    sections: Sequence[Section]
    labels: int = 1
    groups: Sequence[str] = ()

    @property
    def rows(self) -> list[Row]:
        """The rows of all sections."""
        return [row for section in self.sections for row in section.rows]

    @property
    def spans(self) -> list[tuple[str, int]]:
        """The headings above columns, and how many columns each is above."""
        spans: list[tuple[str, int]] = []
        for group in self.groups:
            if spans and spans[-1][0] == group:
                spans[-1] = (group, spans[-1][1] + 1)
            else:
                spans.append((group, 1))
        return spans


@dataclasses.dataclass
class Table:
    """A table for people and for programs.

    Attributes:
        name: name of its CSV file; "" where it has none.
        title: the heading.
        fields: the names of a record's values, in their order.
        blocks: the text for readers.
        records: the same figures, one a line.
    """

    name: str
    title: str
    fields: Sequence[str] = ()
    blocks: list[Block] = dataclasses.field(default_factory=list)
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)

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


def plain(value: Any) -> str:
    """Formats a label: None as nothing, numbers without trailing zeros."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
