"""The file that a command writes: checked before anything is computed, written whole or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import list_paths, write_whole
from mass_dpo_jax.utils.run_paths import find_enclosing_run

PARQUET = ".parquet"
# Endings of files that are read as data, and not written.
NOT_WRITTEN = (".csv", ".tsv", ".arrow", ".gz", ".zst", ".bz2", ".xz")


def check_output(path: Path | None, kind: str, *inputs: str | Path) -> Path:
    """Returns the file that --output names, in a folder that exists.

    Args:
        path: the flag's value.
        kind: kind of file, for messages.
        inputs: files that the command reads, which it must not replace; empty ones are none.

    Raises:
        UserError: nothing can be written there, or an input or a part of a run would be lost.
    """
    if path is None:
        raise UserError(f"--output is missing: the {kind} file to write")
    if str(path) == "-" or path.is_relative_to("/dev"):  # /dev/stdout would become a file itself.
        raise UserError(f"--output={path}: no ordinary file; expected the {kind} file to write")
    if path.suffix.lower() in NOT_WRITTEN:
        raise UserError(f"--output={path}: expected a name with .jsonl, or {PARQUET} for Parquet")
    from mass_dpo_jax.utils import distributed

    if not distributed.is_primary():
        return path
    if not path.parent.is_dir():
        raise UserError(f"--output={path}: its folder does not exist")
    if path.exists() and not path.is_file():  # A folder, or a device.
        raise UserError(f"--output={path}: no ordinary file; expected the {kind} file to write")
    if path.exists() and (run := find_enclosing_run(path.resolve())):
        raise UserError(f"--output={path}: is a part of the run {run}; name another file")
    for read in (file for names in inputs if names for file in list_paths(str(names))):
        inside = read.is_dir() and path.resolve().is_relative_to(read.resolve())
        if path.exists() and read.exists() and (inside or path.samefile(read)):
            target = f"a file in the folder of the data, {read}" if inside else f"the input {read}"
            raise UserError(f"--output={path}: would replace {target}; name another file")
    return path


def write_rows(path: Path, rows: Iterable[Any]) -> int:
    """Writes objects with the same keys, whole or not at all, and returns how many.

    They become Parquet where the file's name ends so, and lines of JSON otherwise; see
    `write_lines`.

    Raises:
        UserError: in Parquet a column would have values of several kinds.
    """
    from mass_dpo_jax.utils import distributed

    if path.suffix.lower() != PARQUET or not distributed.is_primary():
        return write_lines(path, rows)
    import pyarrow
    from pyarrow import parquet

    objects = list(rows)
    columns = {}
    for name in dict.fromkeys(name for row in objects for name in row):
        try:
            columns[name] = pyarrow.array([row.get(name) for row in objects])
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise UserError(
                f"--output={path}: {name!r} has values of several kinds, which no column of "
                "Parquet can have; expected a name with .jsonl"
            ) from error
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), buffer)
    write_whole(path, [buffer.getvalue().to_pybytes()])
    return len(objects)


def write_lines(path: Path, rows: Iterable[Any]) -> int:
    """Writes one JSON object per line, whole or not at all, and returns how many.

    Of several processes the primary one writes; the others take part in computing the rows.
    """
    from mass_dpo_jax.utils import distributed

    if not distributed.is_primary():
        return sum(1 for _ in rows)
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for row in rows:
            count += 1
            yield json.dumps(row) + "\n"

    write_whole(path, lines())
    return count
