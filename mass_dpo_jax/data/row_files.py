"""Rows of files of any kind: JSON lines, other JSON, CSV and TSV, Parquet, Arrow.

What a file is, its first bytes say, whatever its name. Parquet and Arrow are read by `datasets`.
Tables of text are not, since it guesses types: an answer "None" would become a null, and "1" a
number. They are read by Python's `csv`, where a value is its text and an empty one is null.
"""

from __future__ import annotations

import ast
import csv
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mass_dpo_jax.data import text_files
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils import file_kinds
from mass_dpo_jax.utils.files import parse_json, parse_json_values, shorten

if TYPE_CHECKING:
    from datasets import Dataset

# Formats of files by their suffixes, behind which those of `COMPRESSED` may follow.
SUFFIXES = ("jsonl", "json", "ndjson", "csv", "tsv", "parquet", "arrow")
COMPRESSED = ("gz", "zst", "bz2", "xz")
LISTS = ("data", "rows", "examples", "instances")  # What an object around all rows calls them.
BATCH_ROWS = 1000

Rows = Iterator[tuple[str, Any]]


def read_rows(path: Path) -> Rows:
    """Yields pairs (location, row) of a file; a row that cannot be parsed is its UserError.

    JSON is one object to a line, objects one after another in any layout, an array of objects, or
    an object that has the rows in a list, as in `{"data": [...]}`, or the columns,
    `{"prompt": [...], ...}`. Python's dicts, one to a line as `print` writes them, are read too.

    Raises:
        UserError: the file cannot be read, or has no rows in it.
    """
    head = text_files.read_head(path)
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        yield from iterate_dataset(_open_dataset(path, head), str(path))
        return
    if what := file_kinds.describe_binary(head, path):
        raise UserError(f"{path}: {what}")
    kind = file_kinds.find_text_kind(head.decode(errors="replace"))
    suffixes = path.name.lower().split(".")[1:]
    if kind == "lines" and ("csv" in suffixes or "tsv" in suffixes):
        kind = "\t" if "tsv" in suffixes else ","
    if kind in ("lines", "python"):
        yield from _parse_lines(path, _parse_python if kind == "python" else _parse_json)
    elif kind == "json":
        values = parse_json_values(text_files.read_text(path), path)
        yield from _unpack(((f"{path} row {i}", value) for i, value in enumerate(values)), path)
    else:
        yield from _parse_table(path, kind)


def iterate_dataset(dataset: Dataset, name: str) -> Rows:
    """Yields pairs (location, row) of a Hugging Face dataset; `name` begins the locations."""
    plain = dataset.with_format(None)
    count = 0
    for batch in plain.iter(BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield f"{name} row {count}", dict(zip(batch, values, strict=True))
            count += 1


def _open_dataset(path: Path, head: bytes) -> Dataset:
    from datasets import Dataset

    try:
        if head.startswith(b"PAR1"):
            return Dataset.from_parquet(str(path))
        return Dataset.from_file(str(path))
    except Exception as error:  # Whatever the libraries meet in a broken file.
        message = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot be read: {message}") from None


def _parse_lines(path: Path, parse: Callable[[str, Path, int], Any]) -> Rows:
    def rows() -> Rows:
        for number, line in text_files.read_lines(path):
            if not line.strip():
                continue
            location = f"{path}:{number}"
            try:
                row = parse(text_files.decode(line, location), path, number)
            except UserError as error:
                row = error
            yield location, row

    return _unpack(rows(), path)


def _parse_json(text: str, path: Path, number: int) -> Any:
    return parse_json(text, path, number, unique_keys=True)


def _parse_python(text: str, path: Path, number: int) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}:{number}: no dict as Python prints it: {error}") from None


def _unpack(rows: Rows, path: Path) -> Rows:
    """Yields rows, or those that the only one of them has in it."""
    first = list(itertools.islice(rows, 2))
    if len(first) == 1 and isinstance(first[0][1], Mapping):
        inner = _find_rows(first[0][1])
        if inner is not None:
            return ((f"{path} row {i}", row) for i, row in enumerate(inner))
    return itertools.chain(first, rows)


def _find_rows(value: Mapping[str, Any]) -> Sequence[Any] | None:
    """Returns the rows that an object has in a list or as columns; None for a row itself."""
    for name in LISTS:
        rows = value.get(name)
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
            return rows
    columns = dict(value)
    if columns and all(_is_index(column) for column in columns.values()):  # As pandas writes them.
        columns = {name: list(column.values()) for name, column in columns.items()}
    lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
    if len(lengths) != 1 or min(lengths) < 1 or any(map(_is_conversation, columns.values())):
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_index(column: Any) -> bool:
    return isinstance(column, Mapping) and bool(column) and all(key.isdecimal() for key in column)


def _is_conversation(column: Sequence[Any]) -> bool:
    """Whether a list is one of chat messages, and so a value of a row and not a column."""
    return all(
        isinstance(value, Mapping) and bool({"role", "from", "content"} & set(value))
        for value in column
    )


def _parse_table(path: Path, separator: str) -> Rows:
    lines = (
        text_files.decode(line, f"{path}:{number}") for number, line in text_files.read_lines(path)
    )
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # Prompts may be longer than its 131,072.
    table = csv.reader(lines, delimiter=separator, strict=True)
    line = 1
    try:
        names = [name.strip() for name in next(table, [])]
        _check_names(names, path)
        while True:
            line = table.line_num + 1
            values = next(table, None)
            if values is None:
                return
            if not values:
                continue
            location = f"{path}:{line}"
            if len(values) != len(names):
                problem = f"{len(values)} values in a table of {len(names)} columns"
                advice = f"texts with {separator!r} or line breaks in them need quotes around them"
                yield location, UserError(f"{location}: {problem}; {advice}")
                continue
            cells = zip(names, values, strict=True)
            yield location, {name: text if text else None for name, text in cells if name}
    except csv.Error as error:
        raise UserError(f"{path}:{line}: cannot be read as a table: {error}") from None


def _check_names(names: Sequence[str], path: Path) -> None:
    repeated = next((name for name in names if name and names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"{path}: the column {shorten(repeated)} is there twice")
