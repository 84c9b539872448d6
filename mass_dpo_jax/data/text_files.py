"""Text files, plain or compressed (gzip, zstd, bzip2, xz): their first bytes and their lines."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import shlex
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils import file_kinds

# First bytes of compressed files, and the program that tests whether a file is whole.
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
}
BUFFER_BYTES = 1 << 16
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


def read_head(path: Path) -> bytes:
    """Returns the first bytes of a file, decompressed.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with _open(path) as file:
            return file.read(file_kinds.HEAD_BYTES)
    except _BROKEN as error:
        raise _make_error(path, 1, error) from None


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line) of a file; `decode` turns a line into text.

    Raises:
        UserError: the file cannot be read or is no text: a database, an image, ...
    """
    if what := file_kinds.describe_binary(read_head(path), path):
        raise UserError(f"{path}: {what}")
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except _BROKEN as error:
        raise _make_error(path, number + 1, error) from None


def read_text(path: Path) -> str:
    """Returns the text of a file, as `read_lines` reads it and `decode` decodes it."""
    return "".join(decode(line, f"{path}:{number}") for number, line in read_lines(path))


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


def _open(path: Path) -> io.BufferedReader:
    """Opens a file's bytes, decompressed whatever the file's name."""
    openers: dict[str, Callable[[Path], Any]] = {
        "": functools.partial(Path.open, mode="rb", buffering=0),
        "gzip": gzip.open,
        "bzip2": bz2.open,
        "xz": lzma.open,
        "zstd": _open_zstd,
    }
    file = openers[_find_compression(path)](path)
    return io.BufferedReader(file, BUFFER_BYTES)


def _open_zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


def _find_compression(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(6)
    return next((name for start, name in COMPRESSIONS.items() if head.startswith(start)), "")


def _make_error(path: Path, line: int, error: Exception) -> UserError:
    message = f"{path}:{line}: cannot be read: {error}"
    compression = _find_compression(path) if path.is_file() else ""
    if compression:
        message += f"; is the file whole? {compression} -t {shlex.quote(str(path))}"
    return UserError(message)
