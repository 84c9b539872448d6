"""The report as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from html import escape

from mass_dpo_jax.reports.paper.tables import Block, Table

FOLDED_ROWS = 12  # Longer tables that are no table of the paper open at a click.
STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; vertical-align: bottom; }
.name { text-align: left; }
td { white-space: nowrap; }
tbody tr:hover { background: var(--faint); }
img { max-width: 100%; min-width: 40rem; height: auto; background: white; border-radius: 4px; }
summary { cursor: pointer; font-weight: 600; margin: .8rem 0; }
.warn { border-left: 4px solid #d55e00; padding-left: .8rem; overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG, its file's name and what it shows."""

    title: str
    name: str
    png: bytes


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is on the page, in its order.

    Attributes:
      warnings: what is missing or broken.
      notes: how to read the tables.
      main: the paper's tables.
      extra: what the paper does not have.
      remarks: below the table of `extra` with this name.
    """

    title: str
    warnings: Sequence[str]
    notes: Sequence[str]
    main: Sequence[Table]
    pictures: Sequence[Picture]
    extra: Sequence[Table]
    remarks: dict[str, list[str]]


CAPTION = (
    "Validation split. A line is the mean over seeds, its band goes from the smallest seed to "
    "the largest."
)


def to_markdown(report: Report) -> str:
    """The report as text; pictures are files in figures/."""
    parts = [f"# {report.title}", _items(report.notes)]
    if report.warnings:
        parts += ["Runs that are not finished, or cannot be read:", _items(report.warnings)]
    for table in report.main:
        parts += _markdown_table(table)
    if report.pictures:
        parts += ["## Figures 2 and 3", CAPTION]
        parts += [f"### {p.title}\n\n![{p.title}](figures/{p.name})" for p in report.pictures]
    for table in report.extra:
        parts += [*_markdown_table(table), _items(report.remarks.get(table.name, []))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _markdown_table(table: Table) -> list[str]:
    parts = [f"## {table.title}"]
    for block in table.blocks:
        signs = ["---"] * block.labels + ["---:"] * (len(block.header) - block.labels)
        rows = [block.header, signs, *block.rows]
        lines = ["| " + " | ".join(word.replace("|", "\\|") for word in row) + " |" for row in rows]
        parts += [f"### {block.title}" if block.title else "", "\n".join(lines)]
    return parts if table.blocks else [*parts, "No runs for this table."]


def to_html(report: Report) -> str:
    """The report as one file: pictures are inside, nothing is fetched."""
    parts = [f"<h1>{escape(report.title)}</h1>"]
    if report.warnings:
        count = f"{len(report.warnings)} runs are not finished, or cannot be read"
        fold = "" if len(report.warnings) > FOLDED_ROWS else " open"
        parts.append(
            f'<details class="warn"{fold}><summary>{count}</summary>\n'
            f"{_list(report.warnings)}</details>"
        )
    parts.append(_list(report.notes))
    for table in report.main:
        parts.append(_html_table(table, fold=False))
    if report.pictures:
        parts.append(f"<h2>Figures 2 and 3</h2>\n<p>{CAPTION}</p>")
    for picture in report.pictures:
        data = base64.b64encode(picture.png).decode()
        parts.append(
            f'<h3>{escape(picture.title)}</h3>\n<div class="wide"><img '
            f'alt="{escape(picture.title)}" src="data:image/png;base64,{data}"></div>'
        )
    for table in report.extra:
        parts.append(_html_table(table, fold=True))
        parts.append(_list(report.remarks.get(table.name, [])))
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _list(lines: Sequence[str]) -> str:
    items = "\n".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>\n{items}\n</ul>" if items else ""


def _html_table(table: Table, fold: bool) -> str:
    parts = [f"<h2>{escape(table.title)}</h2>"]
    for block in table.blocks:
        text = f'<div class="wide"><table>\n{_html_rows(block)}\n</table></div>'
        if fold and len(block.rows) > FOLDED_ROWS:
            title = block.title or f"{len(block.rows)} rows"
            text = f"<details><summary>{escape(title)}</summary>\n{text}\n</details>"
        elif block.title:
            text = f"<h3>{escape(block.title)}</h3>\n{text}"
        parts.append(text)
    return "\n".join(parts if table.blocks else [*parts, "<p>No runs for this table.</p>"])


def _html_rows(block: Block) -> str:
    def row(tag: str, words: Sequence[str]) -> str:
        cells = [
            f"<{tag}{' class=name' if i < block.labels else ''}>{escape(word)}</{tag}>"
            for i, word in enumerate(words)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join(row("td", words) for words in block.rows)
    return f"<thead>{row('th', block.header)}</thead>\n<tbody>\n{body}\n</tbody>"
