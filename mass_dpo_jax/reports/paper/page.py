"""The report as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from mass_dpo_jax.reports import templates
from mass_dpo_jax.reports.format import markdown_table
from mass_dpo_jax.reports.paper import cells, tables
from mass_dpo_jax.reports.paper.blocks import BEST, SECOND, Block, Entry, Section, Table
from mass_dpo_jax.reports.paper.runs import find_runs

MAX_OPEN_ROWS = 12  # Longer lists, and longer tables that the paper does not have, are folded.
NOTES = (
    "A cell shows the paper's number as printed and, in square brackets, ours. The paper's stand "
    "alone where we have no run, ours in rows and for models that the paper does not have. Our "
    "average is over all four datasets, or left out.",
    "Ours are ranked by the policy's own log-probability; the report has them by its log-ratio to "
    "the reference, too. The paper does not say which it uses. A tie counts as lost. Margins are "
    "the reward of the chosen response minus the mean reward of the others, no per cents.",
    "± is the standard error over seeds; with a star, of a single seed, over its test rows. The "
    "paper has small numbers in Table 4, which it does not name: they are small on the "
    "page, and after ± in text. (2 of 3): two of three seeds have finished, and the figures are of "
    "those two.",
    "Bold is the best of a model's column in Table 1, underlined the second best. The paper's "
    "underlines are as printed; its bold is where the caption puts it. docs/paper.md has where "
    "they do not fit its numbers. Ours are among the paper's methods.",
)  # How the tables are read.
AROUND = {BEST: "**{}**", SECOND: "<u>{}</u>", "": "{}"}


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
class Group:
    """Tables or pictures that the paper does not have, under a heading; folded if they are long.

    Attributes:
        title: the heading.
        notes: hints for reading them.
        tables: the tables.
        pictures: the pictures.
    """

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


@dataclasses.dataclass(frozen=True)
class PageContent:
    """What the page says, in its order.

    Attributes:
        title: the title.
        warnings: runs that are not finished, or cannot be read.
        notes: hints for reading the tables.
        tables: the paper's tables.
        pictures: the paper's figures.
        extra: what the paper does not have.
    """

    title: str
    warnings: Sequence[str]
    notes: Sequence[str]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    extra: Sequence[Group]


def to_html(content: PageContent) -> str:
    """Returns the page as one file, with its pictures inside."""
    return templates.render("paper/page.html", **vars(content), max_open_rows=MAX_OPEN_ROWS)


def to_markdown(content: PageContent) -> str:
    """Returns the page as text; its pictures are files in figures/."""
    parts = [f"# {content.title}", _markdown_list(content.notes)]
    if content.warnings:
        parts += [
            "Runs that are not finished, or cannot be read:",
            _markdown_list(content.warnings),
        ]
    parts += map(_table_to_markdown, content.tables)
    parts += map(_picture_to_markdown, content.pictures)
    for group in content.extra:
        parts += [f"## {group.title}", _markdown_list(group.notes)]
        for table in group.tables:
            several = len(group.tables) > 1
            parts.append(f"### {table.title}" if several else "")
            parts.append(_blocks_to_markdown(table, "####" if several else "###"))
        parts += [_picture_to_markdown(picture, "###") for picture in group.pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def format_tables(folders: Sequence[Path]) -> str:
    """Implements `mass_dpo_jax.report.format_tables`."""
    found, _ = cells.gather(find_runs(folders))
    return "\n\n".join(
        [_markdown_list(NOTES), *map(_table_to_markdown, tables.paper_tables(found))]
    )


def _table_to_markdown(table: Table) -> str:
    return f"## {table.title}\n\n{_blocks_to_markdown(table, '###')}"


def _blocks_to_markdown(table: Table, level: str) -> str:
    parts = []
    for block in table.blocks:
        parts.append(f"{level} {block.title}" if block.title else "")
        groups = block.groups or [""] * len(block.header)
        header = [f"{g} {h}".strip() for g, h in zip(groups, block.header, strict=True)]
        parts.append(markdown_table(header, list(_markdown_rows(block)), block.labels, padded=True))
    return "\n\n".join(part for part in parts if part)


def _markdown_rows(block: Block) -> Iterator[list[str]]:
    for section in block.sections:
        if section.title:
            yield _title_row(block, section)
        for row in section.rows:
            yield [_entry_to_markdown(cell) if isinstance(cell, Entry) else cell for cell in row]


def _title_row(block: Block, section: Section) -> list[str]:
    """Returns a row that says what the rows below it are, as Markdown has no lines in tables."""
    blank = ["—"] * len(block.header)
    blank[block.labels - 1] = f"*{section.title}:*"
    return blank


def _entry_to_markdown(entry: Entry) -> str:
    paper = AROUND[entry.paper_mark].format(entry.paper) if entry.paper else ""
    paper += f" ± {entry.error}" if entry.error else ""
    ours = AROUND[entry.mark].format(entry.ours) if entry.ours else ""
    return f"{paper} [{ours}]" if paper and ours else paper or ours


def _picture_to_markdown(picture: Picture, level: str = "##") -> str:
    return f"{level} {picture.title}\n\n![{picture.title}](figures/{picture.name})"


def _markdown_list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
