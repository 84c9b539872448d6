"""Files without rows: each is named by what it is, with a command that helps."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import read_json
from tests.support.data import load

ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {i}, Zoë?", "chosen": "a", "rejected": "b"} for i in range(20)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def error(path: Path, content: bytes | str, name: str = "jsonl", **changes: Any) -> str:
    """What is said of a file, with on_bad_row=skip too: skipping all of it is no help."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as first:
        load(name, path, **changes)
    with pytest.raises(UserError) as second:
        load(name, path, on_bad_row="skip", **changes)
    assert str(first.value) == str(second.value)
    assert "on_bad_row" not in str(first.value)
    assert "\n" not in str(first.value) and str(first.value).startswith(f"{path}: ")
    return str(first.value)


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, LINES)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"))
    return file.getvalue()


def database(tmp_path: Path) -> bytes:
    with sqlite3.connect(tmp_path / "database") as connection:
        connection.execute("create table rows (prompt)")
    return (tmp_path / "database").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINES.encode("utf-16"), "in UTF-16, expected UTF-8: iconv -f UTF-16 -t UTF-8 "),
        (LINES.encode("utf-16-be"), "in UTF-16BE, expected UTF-8: iconv -f UTF-16BE "),
        (LINES.encode("utf-16-le"), "in UTF-16LE, expected UTF-8: iconv -f UTF-16LE "),
        (b"\xfe\xff" + LINES.encode("utf-16-be"), "in UTF-16, expected UTF-8"),
        (LINES.encode("utf-32"), "in UTF-32, expected UTF-8"),
        (gzip.compress(gzip.compress(LINES.encode())), "compressed with gzip, twice"),
        (zipped("rows.jsonl"), "a zip archive: unzip "),
        (zipped("[Content_Types].xml"), "an Excel workbook"),
        (tarred(), "a tar archive: tar -xf "),
        (pickle.dumps(ROWS), "a Python pickle, which is not opened"),
        (b"  <!DOCTYPE html><html>404", "an HTML or XML page, perhaps of an error"),
        (b"<?xml version='1.0'?><Error>", "an HTML or XML page, perhaps of an error"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in error(tmp_path / "my rows.jsonl", content)
    if b"\x00" not in content[:8]:
        assert message in error(tmp_path / "my rows.json", content, "lastfm")


def test_a_database_is_named(tmp_path: Path) -> None:
    assert "an SQLite database" in error(tmp_path / "rows.jsonl", database(tmp_path))


def test_gzip_is_read_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(LINES.encode()))
    assert len(load("jsonl", tmp_path / "rows.jsonl")) == 20


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        json.dumps(ROWS[0]),
        '{"prompt": "p", "chosen": "a, b", "rejected": "c"}',
        '{"prompt": "p", "chosen": "[", "rejected": "{\'"}\n',
    ],
)
def test_json_lines_are_not_taken_for_anything_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    assert load("jsonl", tmp_path / "rows.jsonl")


@pytest.mark.parametrize("broken", ['{"prompt": "p', "{", "[]", "oops", '{"prompt": "p"} trailing'])
def test_a_broken_first_line_is_a_bad_row_and_no_other_format(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{broken}\n{LINES}")
    assert len(load("jsonl", path, on_bad_row="skip")) == 20
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*skip leaves .* \(1 of the 21 rows read"):
        load("jsonl", path)


def test_a_line_in_another_encoding_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = LINES.splitlines(keepends=True)
    path.write_bytes("".join(lines[:3]).encode() + lines[3].encode("latin-1") + lines[4].encode())
    with pytest.raises(
        UserError, match=r"rows.jsonl:4: not UTF-8: .*iconv -f WINDOWS-1252 -t UTF-8"
    ):
        load("jsonl", path)
    assert len(load("jsonl", path, on_bad_row="skip")) == 4


def test_an_lfs_pointer_in_place_of_a_json_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    with pytest.raises(UserError, match=r"config.json: a Git LFS pointer"):
        read_json(tmp_path / "config.json")
