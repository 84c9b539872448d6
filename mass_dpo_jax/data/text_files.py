"""Lines of text files, plain or gzip; errors say what another kind of file is."""

from __future__ import annotations

import gzip
import io
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils import file_kinds


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line) of a file; `decode` turns a line into text.

    Raises:
        UserError: the file cannot be read or is no text: compressed in another way, Parquet, ...
    """
    number = 0
    try:
        with _open(path) as file:
            head = file.read(file_kinds.HEAD_BYTES)
            if what := file_kinds.describe_binary(head, path):
                raise UserError(f"{path}: {what}")
            file.seek(0)
            for number, line in enumerate(file, 1):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}:{number + 1}: cannot be read: {error}; is the file whole? "
            f"gzip -t {shlex.quote(str(path))}"
        ) from None
    except OSError as error:
        raise UserError(f"{path}:{number + 1}: cannot be read: {error}") from None


def decode(line: bytes, location: str, encoding: str = "utf-8") -> str:
    """Returns a line's text, without the byte-order mark that some Windows programs write first.

    Raises:
        UserError: the line is not in this encoding.
    """
    try:
        return line.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{location}: not UTF-8: {error.reason} at byte {error.start} of the line; an older "
            "encoding? iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        ) from None


def check_json_lines(path: Path) -> None:
    """Raises UserError where a file is JSON or a table, but does not hold one object per line."""
    try:
        with _open(path) as file:
            head = file.read(file_kinds.HEAD_BYTES)
    except (OSError, EOFError, zlib.error):
        return  # `read_lines` reports it.
    if what := file_kinds.describe_text(head.decode(errors="replace"), path):
        raise UserError(f"{path}: {what}")


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Opens a file's bytes, decompressed if they are gzip, whatever the file's name."""
    with path.open("rb") as file:
        is_gzip = path.suffix == ".gz" or file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if is_gzip else path.open("rb")
