"""Kinds of file, recognized by their first bytes: messages where text or JSON was expected."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

HEAD_BYTES = 1 << 16  # How much of a file is looked at.

_TO_UTF8 = "in {0}, expected UTF-8: iconv -f {0} -t UTF-8 {{}} > NEW"
_HUB = "; --config.data.name=hub reads it"
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
    (b"PAR1", "a Parquet file" + _HUB),
    (b"ARROW1", "an Arrow file" + _HUB),
    (b"\xff\xff\xff\xff", "an Arrow stream" + _HUB),
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
_COLUMNS = re.compile(r"[\w .\-]{1,40}")
_TO_LINES = "expected one object a line: {} > NEW.jsonl"


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


def describe_text(head: str, path: Path) -> str:
    """Returns what a text that starts with `head` is and how to convert it; "" for JSON lines.

    One broken line does not make another format: the reader of lines reports it.
    """
    file = shlex.quote(str(path))
    lines = [line for line in head.lstrip("\ufeff").splitlines() if line.strip()]
    if not lines:
        return ""
    first = lines[0].strip()
    value, rest = _parse_start(first)
    if isinstance(value, dict) and rest.startswith("{"):
        return "several objects in a line; " + _TO_LINES.format(f"jq -c . {file}")
    if isinstance(value, dict) and rest == ",":
        return "objects with commas between them; " + _TO_LINES.format(f"sed 's/,$//' {file}")
    if value is not None and not rest:
        if isinstance(value, list) and len(lines) == 1 and _is_array(first):
            return "a JSON array; " + _TO_LINES.format(f"jq -c '.[]' {file}")
        return ""
    if first.startswith("["):
        if _is_array("".join(lines[:2])):
            return "a JSON array; " + _TO_LINES.format(f"jq -c '.[]' {file}")
        return ""
    if re.match(r"\{\s*'", first):
        code = "import ast, json, sys; [print(json.dumps(ast.literal_eval(x))) for x in sys.stdin]"
        return "Python's dicts, with single quotes, as print() writes them; " + _TO_LINES.format(
            f"python -c {shlex.quote(code)} < {file}"
        )
    if first.startswith("{"):
        if value is not None:
            return ""  # A whole object, and something behind it.
        value, _ = _parse_start("\n".join(lines))
        if value is not None or (first == "{" and len(lines) > 1 and lines[1].strip()[0] == '"'):
            return "JSON over several lines; " + _TO_LINES.format(f"jq -c . {file}")
        return ""
    return _describe_table(first, path)


def _describe_table(first: str, path: Path) -> str:
    """Returns that a file is CSV or TSV, judged by its line of column names, or ""."""
    for separator, name in (("\t", "TSV"), (",", "CSV"), (";", "CSV")):
        columns = [column.strip().strip('"') for column in first.split(separator)]
        if len(columns) > 1 and all(_COLUMNS.fullmatch(column) for column in columns):
            arguments = {",": "", ";": ', sep=";"', "\t": r', sep="\t"'}[separator]
            code = (
                f'import pandas as pd; pd.read_csv("{path}"{arguments})'
                '.to_json("NEW.jsonl", orient="records", lines=True)'
            )
            return (
                f"a {name} file with the columns {', '.join(columns)}? Expected one JSON object a "
                f"line: python -c {shlex.quote(code)}"
            )
    return ""


def _is_array(text: str) -> bool:
    """Whether a JSON text starts like an array of objects, or an empty one."""
    return re.match(r"\[\s*(?:[{\]]|$)", text) is not None


def _parse_start(text: str) -> tuple[object, str]:
    """Returns the JSON value that a text starts with, or None, and the text behind it."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, text
    return value, text[end:].strip()
