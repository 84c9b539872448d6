"""Rows of JSON lines and of Hugging Face datasets alike, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from mass_dpo_jax.data import examples, splits
from mass_dpo_jax.data.bad_rows import BadRows
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.files import parse_json


class Table(NamedTuple):
    """The rows that a split is taken from.

    `rows` are (place, row), where a row that could not even be parsed is its UserError.
    """

    name: str  # For messages: the file, or the dataset and its split.
    source: splits.Source
    rows: Iterable[tuple[str, Any]]


class Named(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=Named)


def open_files(
    path: Path, split: str, patterns: Sequence[str], without: Collection[str] = ()
) -> Table:
    """JSON lines of a file or folder; see `splits.find_file`. Blank lines are no rows."""
    file, source = splits.find_file(path, split, patterns, without)
    return Table(str(file), source, _objects(file))


def preferences(table: Table, data: Any, seed: int) -> list[Example]:
    """`collect` for rows in the format of `examples.from_row`.

    An example without an id is called after its split (or file) and its row, counted from 0.
    """
    return collect(
        table,
        lambda row, i, place: examples.from_row(row, f"{table.source.name}-{i}", place),
        data,
        seed,
    )


def collect(
    table: Table, make: Callable[[Any, int, str], Item], data: Any, seed: int
) -> list[Item]:
    """The items of a table's part, where `make(row, index, place)` turns a row into an item.

    `index` counts the rows from 0. Of a part that is held out, or the rest of one, see `splits`.

    Raises:
      UserError: what `make` raises, or an id is there twice, unless `data.on_bad_row` is "skip";
        no row is left.
    """
    rows = BadRows(table.name, data.on_bad_row)
    found = []
    for place, row in table.rows:
        with rows:
            if isinstance(row, UserError):
                raise row
            item = make(row, rows.count - 1, place)
            rows.check_id(item.id, place)
            found.append(item)
    rows.done()
    return splits.take(found, table.source.part, data.validation_share, seed, table.name)


def _objects(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in splits.read_lines(file):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            row = parse_json(line, file, number)
        except UserError as error:
            row = error
        yield place, row
