"""Where rows come from: the files, or the dataset, that `data.path` names, and their splits.

`data.path` is a file, several with commas between them, a pattern such as `pairs/*.jsonl`, a folder
with files for each split, a folder written by `save_to_disk` or downloaded from the Hugging Face
hub, or the name of a dataset there. Files are of any kind that `row_files` reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from mass_dpo_jax.data import hf_datasets, split_files, splits
from mass_dpo_jax.data.row_files import Rows, read_rows
from mass_dpo_jax.data.rows import Table
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import expand, is_pattern, list_paths, split_paths


def open_table(data: ConfigDict, split: str, without: Collection[str] = ()) -> Table:
    """Opens the rows from which a split is taken; see `splits` for missing splits.

    Args:
        data: the configuration's `data`. Reads `path`, `subset`, `splits`.
        split: "train", "validation", "test" or, for files without splits, "all".
        without: splits to ignore.

    Raises:
        UserError: nothing is there, or no rows for this split; says what was looked for.
    """
    names = splits.parse_splits(data.splits)
    if is_dataset(data):
        return hf_datasets.open_dataset(data.path, data.subset, split, names, without)
    files = find_files(data.path)
    if files is None:
        folder, by_split = _find_split_files(data)
        source = splits.resolve(split, [name for name in by_split if name not in without], folder)
        files = by_split[source.name]
        name = str(files[0]) if len(files) == 1 else f"{folder} {source.name}"
        return Table(name, source, _read_files(files))
    check_has_parts(data)
    part = "all" if split == "all" else splits.resolve(split, ["train"], data.path).part
    source = splits.Source(files[0].name.split(".")[0], part)
    return Table(data.path, source, _read_files(files))


def has_splits(data: ConfigDict) -> bool:
    """Whether `data.path` names what can have splits: a folder or a dataset, not a list of files.

    Raises:
        UserError: no such file.
    """
    return is_dataset(data) or find_files(data.path) is None


def check_has_parts(data: ConfigDict) -> None:
    """Raises UserError where `data.splits` or `data.subset` is set, and there are no such parts."""
    for setting in ("splits", "subset"):
        if data[setting]:
            raise UserError(
                f"config.data.{setting}={data[setting]!r}: config.data.path={data.path} is no "
                "folder and no dataset, whose parts it could name"
            )


def is_dataset(data: ConfigDict) -> bool:
    """Whether `datasets` is to open `data.path`: a folder of its own, or a name on the hub."""
    path = Path(data.path)
    return (
        hf_datasets.is_dataset(path)
        if path.is_dir()
        else not path.exists() and hf_datasets.is_name(data.path)
    )


def list_files(data: ConfigDict) -> list[Path]:
    """Returns the files that the rows of all splits are in; none for a name on the hub."""
    if is_dataset(data):
        folder = Path(data.path)
        return sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    files = find_files(data.path)
    if files is None:
        files = [file for group in _find_split_files(data)[1].values() for file in group]
    return files


def find_files(path: str) -> list[Path] | None:
    """Returns the files that a path, a list of them or a pattern names; None for a folder.

    Raises:
        UserError: no such file.
    """
    if Path(path).is_dir():
        return None
    return list(dict.fromkeys(_iterate_files(path)))


def _iterate_files(path: str) -> Iterator[Path]:
    for part in split_paths(path):
        part = expand(part, "config.data.path")
        if is_pattern(part):
            files = [file for file in list_paths(part) if file.is_file()]
            if not files:
                raise UserError(f"{part}: no file has such a name (config.data.path)")
            yield from files
        else:
            yield _check_file(part)


def _check_file(path: str) -> Path:
    """Returns a path that is one of an ordinary file; else raises UserError."""
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise UserError(
            f"{path}: is a folder, expected a file beside others; {path}/* names its files"
        )
    if file.exists():
        raise UserError(
            f"{path}: is a pipe or a device, and config.data.path is read several times; write it "
            "to a file, as in zcat FILE.gz > pairs.jsonl"
        )
    advice = "" if file.suffix else "; a dataset on the Hugging Face hub is OWNER/NAME"
    raise UserError(f"{path}: no such file or folder (config.data.path){advice}")


def _find_split_files(data: ConfigDict) -> tuple[str, dict[str, list[Path]]]:
    """Returns the folder that has files of splits, as text, and the files of each."""
    folder = Path(data.path)
    if data.subset:
        folder = folder / data.subset
        if not folder.is_dir():
            raise UserError(
                f"config.data.subset={data.subset!r}: no such folder in {data.path}; expected one "
                "of " + (", ".join(sorted(p.name for p in Path(data.path).iterdir() if p.is_dir())))
            )
    return str(folder), split_files.find_split_files(folder, splits.parse_splits(data.splits))


def _read_files(files: Sequence[Path]) -> Rows:
    for file in files:
        yield from read_rows(file)
