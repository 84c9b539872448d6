"""Kinds of file, recognized by their first bytes: messages where text or JSON was expected."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

HEAD_BYTES = 1 << 16  # How much of a file is looked at.

_TO_UTF8 = "in {0}, expected UTF-8: iconv -f {0} -t UTF-8 {{}} > NEW"
# First bytes, and what a file is that starts with them and what to do; {} is the file.
_BINARY = (
    (b"\xff\xfe\x00\x00", _TO_UTF8.format("UTF-32")),
    (b"\x00\x00\xfe\xff", _TO_UTF8.format("UTF-32")),
    (b"\xff\xfe", _TO_UTF8.format("UTF-16")),
    (b"\xfe\xff", _TO_UTF8.format("UTF-16")),
    (b"\x1f\x8b", "compressed with gzip, twice: gunzip -c {} > NEW.gz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: zstd -dc {} > NEW"),
    (b"BZh", "compressed with bzip2: bunzip2 -c {} > NEW"),
    (b"\xfd7zXZ\x00", "compressed with xz: xz -dc {} > NEW"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: 7z x {}"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"SQLite format 3\x00", "an SQLite database: export the table that has the rows"),
    (b"\x93NUMPY", "an array of NumPy"),
    (b"\x80\x02", "a Python pickle, which is not opened: a pickle can run code"),
    (b"\x80\x03", "a Python pickle, which is not opened: a pickle can run code"),
    (b"\x80\x04", "a Python pickle, which is not opened: a pickle can run code"),
    (b"\x80\x05", "a Python pickle, which is not opened: a pickle can run code"),
    (b"%PDF-", "a PDF"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer in place of the file: run `git lfs pull` there, or download it again",
    ),
)
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|body|\?xml|error\b)", re.I)
_COLUMN = re.compile(r"[\w .\-/()]{1,60}")


def describe_binary(head: bytes, path: Path) -> str:
    """Returns what a file that starts with `head` is and how to convert it; "" for UTF-8.

    A Git LFS pointer and an HTML page are text, but stand in for another file.
    """
    file = shlex.quote(str(path))
    if head.startswith(b"PK\x03\x04"):
        if path.suffix == ".xlsx" or b"xl/" in head or b"[Content_Types].xml" in head[:200]:
            return "an Excel workbook: save its table as CSV, and that as JSON lines"
        return f"a zip archive: unzip {file}"
    if head[257:262] == b"ustar":
        return f"a tar archive: tar -xf {file}"
    if _MARKUP.match(head):
        return "an HTML or XML page, perhaps of an error, in place of the file: download it again"
    for start, what in _BINARY:
        if head.startswith(start):
            return what.format(file)
    # UTF-16 without a mark: every other byte of English text, and of JSON, is 0.
    for odd, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if len(head) >= 8 and not any(head[odd:64:2]) and all(head[1 - odd : 64 : 2]):
            return _TO_UTF8.format(name).format(file)
    return ""


def find_text_kind(head: str) -> str:
    r"""Returns the kind of rows in a text that starts with `head`.

    That is "lines" (JSON lines), "json" (an array, or objects that are not one to a line), a
    table's separator ("," or ";" or "\t"), or "python" (Python's dicts, one to a line). One broken
    line does not make another format: the reader of lines reports it.
    """
    lines = [line for line in head.lstrip("\ufeff").splitlines() if line.strip()]
    if not lines:
        return "lines"
    first = lines[0].strip()
    if first.startswith("[") and re.match(r"\[\s*(?:[{\]]|$)", "".join(lines[:2])):
        is_row = len(lines) > 1 and first.endswith("]") and lines[1].lstrip()[:1] == "{"
        return "lines" if is_row else "json"
    if re.match(r"\{\s*'", first):
        return "python"
    if not first.startswith("{"):
        return _find_separator(first)
    value, rest = _parse_start(first)
    if value is not None:
        return "json" if rest.startswith("{") or rest == "," else "lines"
    value, _ = _parse_start("\n".join(lines))
    if value is not None or (first == "{" and len(lines) > 1 and lines[1].strip()[0] == '"'):
        return "json"
    return "lines"


def _find_separator(first: str) -> str:
    """Returns what stands between the column names in a table's first line; else "lines"."""
    for separator in ("\t", ",", ";"):
        columns = [column.strip().strip('"') for column in first.split(separator)]
        index_columns = columns[0] == ""  # Pandas writes the index as a column without a name.
        columns = columns[index_columns:]
        if len(columns) + index_columns > 1 and all(map(_COLUMN.fullmatch, columns)):
            return separator
    return "lines"


def _parse_start(text: str) -> tuple[object, str]:
    """Returns the JSON value that a text starts with, or None, and the text behind it."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, text
    return value, text[end:].strip()
