"""Rows of files of every kind are the same rows; a broken file or row is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, disable_progress_bars

from mass_dpo_jax.data.row_files import read_rows
from mass_dpo_jax.errors import UserError

disable_progress_bars()

# Texts that guessing types would change, and what separates values.
TEXTS = ("None", "1", "1.50", "true", "NA", 'a "b", c', "x\ty; z", "two\nlines", "é 🙂", "[1, 2]")
ROWS = [{"prompt": f"p{i}", "chosen": text, "rejected": "no"} for i, text in enumerate(TEXTS)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(separator: str, **options: Any) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=separator, **options)
            writer.writeheader()
            writer.writerows(ROWS)

    return write


def written(content: bytes | str) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def arrow_stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file:
        whole = pa.Table.from_pylist(ROWS)
        with pa.ipc.new_stream(file, whole.schema) as writer:
            writer.write_table(whole)


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
KINDS: dict[str, Callable[[Path], Any]] = {
    "lines": written(lines(ROWS)),
    "lines with a mark": written(b"\xef\xbb\xbf" + lines(ROWS)),
    "gzip": written(gzip.compress(lines(ROWS))),
    "zstd": written(pa.compress(lines(ROWS), codec="zstd", asbytes=True)),
    "bzip2": written(bz2.compress(lines(ROWS))),
    "xz": written(lzma.compress(lines(ROWS))),
    "array": written(json.dumps(ROWS)),
    "indented array": written("\n\n" + json.dumps(ROWS, indent=2)),
    "array, one to a line": written("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n"),
    "compressed array": written(gzip.compress(json.dumps(ROWS).encode())),
    "indented objects": written("\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "objects in a line": written(" ".join(map(json.dumps, ROWS))),
    "commas": written(lines(ROWS).replace(b"}\n", b"},\n")),
    "list in an object": written(json.dumps({"version": "1", "data": ROWS})),
    "columns": written(json.dumps(COLUMNS)),
    "indented columns": written(json.dumps(COLUMNS, indent=1)),
    "columns by index": written(pd.DataFrame(ROWS).to_json()),
    "Python's dicts": written("".join(f"{row}\n" for row in ROWS)),
    "CSV": table(","),
    "CSV, all quoted": table(",", quoting=csv.QUOTE_ALL),
    "CSV, semicolons": table(";"),
    "TSV": table("\t"),
    "CSV with an index": lambda path: pd.DataFrame(ROWS).to_csv(path),
    "Parquet": lambda path: pd.DataFrame(ROWS).to_parquet(path),
    "Arrow": arrow_stream,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rows.jsonl", "my rows"])
def test_every_kind_has_the_same_rows(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    KINDS[kind](path)
    located = list(read_rows(path))
    assert [row for _, row in located] == ROWS
    assert len({location for location, _ in located}) == len(ROWS)
    assert all(location.startswith(str(path)) for location, _ in located)


def test_locations_are_lines_or_rows(tmp_path: Path) -> None:
    def locate(kind: str, row: int) -> str:
        KINDS[kind](tmp_path / "x")
        return list(read_rows(tmp_path / "x"))[row][0].removeprefix(f"{tmp_path}/x")

    assert locate("lines", 3) == ":4"
    assert locate("CSV", 3) == ":5" and locate("CSV", 8) == ":11"  # Row 7 takes two lines.
    assert locate("indented array", 3) == locate("columns", 3) == locate("Parquet", 3) == " row 3"


def test_an_empty_cell_is_null_and_long_texts_are_read(tmp_path: Path) -> None:
    long = "x" * 300_000
    (tmp_path / "rows.csv").write_text(f'prompt,chosen\n{long},\n"",b\n\n')
    rows = [row for _, row in read_rows(tmp_path / "rows.csv")]
    assert rows == [{"prompt": long, "chosen": None}, {"prompt": None, "chosen": "b"}]


def test_a_row_of_a_table_with_too_few_values_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen\na,b\nc\nd,e,f\ng,h\n")
    rows = dict(read_rows(path))
    assert rows[f"{path}:2"] == {"prompt": "a", "chosen": "b"}
    assert rows[f"{path}:5"] == {"prompt": "g", "chosen": "h"}
    for line, count in ((3, 1), (4, 3)):
        error = rows[f"{path}:{line}"]
        assert isinstance(error, UserError)
        assert f":{line}: {count} values in a table of 2 columns" in str(error)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [{"role": "user", "content": "q"}], "rejected": [{"role": "user"}]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": [{"from": "gpt"}]},
        {"query": "q", "pos": ["a"], "neg": ["b"]},
        {"prompt": "p", "completions": [{"text": "a"}, {"text": "b"}]},
        {"pos": ["a"], "neg": ["b", "c"]},
    ],
)
def test_a_row_with_lists_is_no_table(tmp_path: Path, row: Any) -> None:
    for text in (json.dumps(row), json.dumps(row, indent=1)):
        (tmp_path / "x").write_text(text)
        assert [found for _, found in read_rows(tmp_path / "x")] == [row]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(ROWS)[:-1], r"x: the JSON array has no end, \]: is the file whole"),
        (json.dumps(ROWS)[:-20], "x:1: invalid JSON: "),
        ('[\n{"a": 1},\n{"a": }\n]', "x:3: invalid JSON: Expecting value at column 7"),
        ('[\n{"a": 1},\n{"a": 1, "a": 2}\n]', "x:3: invalid JSON: the key 'a' is there twice"),
        ('[\n{"a": ' + "[" * 200 + "]" * 200 + "},\n{}]", "x:2: invalid JSON: nested too deeply"),
        ('a,b\n"c,d\n', "x:2: cannot be read as a table: unexpected end of data"),
        ('a,b\n"c"d,e\n', "x:2: cannot be read as a table: "),
        ("a,b,a\n1,2,3\n", "x: the column 'a' is there twice"),
        (gzip.compress(lines(ROWS))[:-30], "x:1: cannot be read: .* gzip -t"),
        (lzma.compress(lines(ROWS))[:-30], "x:1: cannot be read: .* xz -t"),
        (bz2.compress(lines(ROWS))[:-30], "x:1: cannot be read: .* bzip2 -t"),
        (
            pa.compress(lines(ROWS), codec="zstd", asbytes=True)[:-30],
            "x:1: cannot be read: .* zstd -t",
        ),
        (b"PAR1 and more", "x: cannot be read: "),
        (b"ARROW1 and more", "x: cannot be read: "),
        (lines(ROWS[:2]).decode().encode("utf-16"), "x: in UTF-16, expected UTF-8"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes | str, message: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        list(read_rows(path))
    assert "\n" not in str(error.value)


def test_lines_that_are_no_dicts_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("{'a': None}\n{'a': f()}\n{'a': nan}\n")
    rows = [row for _, row in read_rows(path)]
    assert rows[0] == {"a": None}
    assert [str(row)[:40] for row in rows[1:]] == [
        f"{path}:{line}: no dict as Python prints it"[:40] for line in (2, 3)
    ]


def test_features_of_datasets_are_decoded(tmp_path: Path) -> None:
    rows = [{"chosen": [{"role": "user", "content": "q"}], "score": 1.5, "tags": []}] * 2500
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    located = list(read_rows(tmp_path / "x.parquet"))
    assert [row for _, row in located] == rows
    assert located[2400][0] == f"{tmp_path / 'x.parquet'} row 2400"
