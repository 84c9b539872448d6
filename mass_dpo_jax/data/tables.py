"""Rows of JSON lines and of Hugging Face datasets alike, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from mass_dpo_jax.data import columns, examples, lines, splits
from mass_dpo_jax.data.bad_rows import BadRows
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.row_notes import RowNotes
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import parse_json

OPTIONAL = ("id", "score_chosen", "score_rejected")  # Columns that `data.columns` can leave out.


class Table(NamedTuple):
    """The rows that a split is taken from.

    `rows` are (place, row), where a row that could not even be parsed is its UserError.
    """

    name: str  # For messages: the file, or the dataset and its split.
    source: splits.Source
    rows: Iterable[tuple[str, Any]]


class Row(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def question(self) -> Hashable:
        """Equal for rows that must not be on both sides of a split."""


Item = TypeVar("Item", bound=Row)


def open_files(
    path: Path, split: str, patterns: Sequence[str], without: Collection[str] = ()
) -> Table:
    """JSON lines of a file or folder; see `splits.find_file`. Blank lines are no rows."""
    file, source = splits.find_file(path, split, patterns, without)
    lines.check_json_lines(file)
    return Table(str(file), source, _objects(file))


def preferences(table: Table, data: Any, seed: int) -> list[Example]:
    """`collect` for rows in the format of `examples.from_row`, by the names of `data.columns`.

    An example without an id is called after its split (or file) and its row, counted from 0.
    """
    found = read_preferences(table, f"{table.source.name}-", data, say_once=True)
    return _part_of(table, found, data, seed)


def read_preferences(table: Table, prefix: str, data: Any, say_once: bool = False) -> list[Example]:
    """All examples of a table; those without an id are called `prefix` and their row's number.

    Rows that are Examples already are taken as they are. What there is to say of the rows together
    is logged, see `RowNotes`; with `say_once` not again for another split of the same rows.

    Raises:
      UserError: as `collect`.
    """
    names = _columns(data.columns)
    notes = RowNotes(table.name, data.chat_template != "none")

    def make(row: Any, i: int, place: str) -> Example:
        if isinstance(row, Example):
            return row
        row = _renamed(row, names, place)
        example = examples.from_row(row, f"{prefix}{i}", place)
        notes.add(row, example)
        return example

    others = [f"{ours}={theirs}" for ours, theirs in names.items() if ours != "id"]
    columns = ",".join(["id=", *others])
    advice = f"; several rows of one prompt? --config.data.columns={columns} numbers rows instead"
    found = _read(table, make, data.on_bad_row, advice)
    notes.log(say_once)
    return found


def _columns(text: str) -> dict[str, str]:
    """Our names of columns and those of the data, from `prompt=question,chosen=answer`.

    A column may be left out where the data needs none: `id=` has rows numbered.
    """
    names = {}
    for part in text.split(",") if text else []:
        ours, equals, theirs = (word.strip() for word in part.partition("="))
        missing = not theirs and not (equals and ours in OPTIONAL)
        if ours not in columns.COLUMNS or missing or ours in names:
            raise UserError(
                f"config.data.columns={text!r}: {part!r}, expected each of "
                f"{', '.join(columns.COLUMNS)} at most once, as in prompt=question,chosen=answer; "
                f"and {', '.join(f'{name}=' for name in OPTIONAL)} to read no such column"
            )
        names[ours] = theirs
    return names


def _renamed(row: Any, names: Mapping[str, str], place: str) -> Any:
    if not names or not isinstance(row, Mapping):
        return row  # What is no object gets its error where rows are read.
    for ours, theirs in names.items():
        if theirs and theirs not in row:
            raise UserError(
                f"{place}: column {theirs!r} is missing (config.data.columns takes {ours!r} from "
                f"it); found {', '.join(map(str, row)) or 'nothing'}"
            )
    left = {
        name: value
        for name, value in row.items()
        if name not in names.values() and names.get(name) != ""
    }
    return left | {ours: row[theirs] for ours, theirs in names.items() if theirs}


def collect(
    table: Table, make: Callable[[Any, int, str], Item], data: Any, seed: int
) -> list[Item]:
    """The items of a table's part, where `make(row, index, place)` turns a row into an item.

    `index` counts the rows from 0. Of a part that is held out, or the rest of one, see `splits`.

    Raises:
      UserError: what `make` raises, or an id is there twice, unless `data.on_bad_row` is "skip";
        no row is left.
    """
    return _part_of(table, _read(table, make, data.on_bad_row), data, seed)


def _read(
    table: Table,
    make: Callable[[Any, int, str], Item],
    on_bad_row: str,
    advice: str = "",  # On an id that is there twice.
) -> list[Item]:
    rows = BadRows(table.name, on_bad_row)
    found = []
    for place, row in table.rows:
        with rows:
            if isinstance(row, UserError):
                raise row
            item = make(row, rows.count - 1, place)
            rows.check_id(item.id, place, advice)
            found.append(item)
    rows.done()
    return found


def _part_of(table: Table, rows: list[Item], data: Any, seed: int) -> list[Item]:
    questions = [row.question for row in rows]
    return splits.take(rows, questions, table.source.part, data.validation_share, seed, table.name)


def _objects(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in lines.read_lines(file):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            row = parse_json(lines.decode(line, place), file, number, unique_keys=True)
        except UserError as error:
            row = error
        yield place, row
