"""The report as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence

from mass_dpo_jax.reports import templates
from mass_dpo_jax.reports.format import markdown_table
from mass_dpo_jax.reports.paper.tables import Table

MAX_OPEN_ROWS = 12  # Longer lists, and longer tables that the paper does not have, are folded.
CAPTION = (
    "Validation split. A line is the mean over seeds, its band goes from the smallest seed to "
    "the largest."
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        title: the picture's heading.
        name: its file's name.
        png: its bytes.
    """

    title: str
    name: str
    png: bytes

    @property
    def base64(self) -> str:
        """The bytes as a data URL has them."""
        return base64.b64encode(self.png).decode()


@dataclasses.dataclass(frozen=True)
class PageContent:
    """What the page says, in its order.

    Attributes:
        title: the title.
        warnings: runs that are not finished, or cannot be read.
        notes: hints for reading the tables.
        main: the paper's tables.
        pictures: the paper's figures.
        extra: tables that the paper does not have.
        remarks: lines below the table of `extra` with this name.
    """

    title: str
    warnings: Sequence[str]
    notes: Sequence[str]
    main: Sequence[Table]
    pictures: Sequence[Picture]
    extra: Sequence[Table]
    remarks: dict[str, list[str]]


def to_html(content: PageContent) -> str:
    """Returns the page as one file, with its pictures inside."""
    return templates.render(
        "paper/page.html", **vars(content), caption=CAPTION, max_open_rows=MAX_OPEN_ROWS
    )


def to_markdown(content: PageContent) -> str:
    """Returns the page as text; its pictures are files in figures/."""
    parts = [f"# {content.title}", _markdown_list(content.notes)]
    if content.warnings:
        parts += [
            "Runs that are not finished, or cannot be read:",
            _markdown_list(content.warnings),
        ]
    for table in content.main:
        parts += _markdown_blocks(table)
    if content.pictures:
        parts += ["## Figures 2 and 3", CAPTION]
        parts += [f"### {p.title}\n\n![{p.title}](figures/{p.name})" for p in content.pictures]
    for table in content.extra:
        parts += [*_markdown_blocks(table), _markdown_list(content.remarks.get(table.name, []))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _markdown_blocks(table: Table) -> list[str]:
    parts = [f"## {table.title}"]
    for block in table.blocks:
        parts.append(f"### {block.title}" if block.title else "")
        parts.append(markdown_table(block.header, block.rows, block.labels))
    return parts if table.blocks else [*parts, "No runs for this table."]
