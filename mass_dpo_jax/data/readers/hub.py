"""Preference data as a Hugging Face dataset; `preferences` says what a row may look like.

`data.path` is a name on the hub, a `save_to_disk` folder, a folder with Parquet or Arrow files
(such as a download of a hub dataset), or one such file.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard
from ml_collections import ConfigDict

from mass_dpo_jax.data import splits
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.readers import preferences
from mass_dpo_jax.data.rows import Table
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import check_links, read_json, read_text


def load(data: ConfigDict, split: str, seed: int) -> list[Example]:
    """Loads a split of the dataset `data.path`; see `splits` for missing splits.

    Reads `path` of `data`, and what `preferences.read_split` reads.

    Raises:
        UserError: the dataset cannot be read, or a row is wrong: names it and the field.
    """
    return preferences.read_split(open_dataset(data.path, split), data, seed)


def open_dataset(path: str, split: str, without: Collection[str] = ()) -> Table:
    """Opens the rows of a dataset's split, as if it had none of the splits `without`."""
    from datasets import Dataset

    dataset = _load(path)
    if isinstance(dataset, Dataset):
        part = "all" if split == "all" else splits.resolve(split, ["train"], path).part
        source, rows = splits.Source("row", part), dataset
    else:
        names = splits.match_splits({name: name for name in dataset}, path)
        if not names:
            raise UserError(_describe_missing_splits(path, list(dataset)))
        unread = tuple(name for name in dataset if name not in names.values())
        splits.log_unread(path, unread, tuple(names))
        source = splits.resolve(split, [name for name in names if name not in without], path)
        rows = dataset[names[source.name]]
    name = path if isinstance(dataset, Dataset) else f"{path} {source.name}"
    locations = (f"{name} row {i}" for i in range(len(rows)))
    return Table(name, source, zip(locations, rows.with_format(None), strict=True))


def _describe_missing_splits(path: str, names: Sequence[str]) -> str:
    """Describes a dataset none of whose splits has one of our names, with advice."""
    parts = {}
    for split, aliases in splits.NAMES.items():
        parts[split] = next((n for n in names if n.lower().startswith(aliases)), "")
    mapping = ", ".join(f'{split}=d["{name}"]' for split, name in parts.items() if name)
    function = "load_from_disk" if splits.is_saved(Path(path)) else "load_dataset"
    code = (
        f'import datasets; d = datasets.{function}("{path}"); '
        f'datasets.DatasetDict({mapping or "train=d[...]"}).save_to_disk("NEW")'
    )
    return (
        f"{path}: no split train, validation or test; found {', '.join(names)}. Write those you "
        f"need by these names: python -c {shlex.quote(code)}, then --config.data.path=NEW"
    )


def _check_names(folder: Path) -> None:
    """Raises UserError where a folder's own descriptions name files elsewhere.

    `datasets` opens whatever they name: files anywhere on this machine, and addresses on the
    network.
    """
    for file in (*folder.glob("**/dataset_dict.json"), *folder.glob("**/state.json")):
        content = read_json(file)
        if isinstance(content, dict):
            for name in _find_strings([content.get("splits"), content.get("_data_files")]):
                _check_name(name, file)
    for file in (folder / "README.md", folder / ".huggingface.yaml"):
        if file.is_file():
            text = read_text(file)
            card = DatasetCard(text if file.suffix == ".md" else f"---\n{text}\n---\n")
            for name in _find_strings(card.data.to_dict().get("configs")):
                _check_name(name, file)


def _check_name(name: str, file: Path) -> None:
    if name.startswith(("/", "~")) or ".." in name or ":" in name or "\\" in name:
        raise UserError(f"{file}: names {name!r}, expected files of this folder only")


def _find_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _find_strings(value.values())
    elif isinstance(value, Iterable):
        for part in value:
            yield from _find_strings(part)


def _load(path: str) -> Any:
    from datasets import Dataset, load_dataset, load_from_disk

    folder = Path(path)
    try:
        if folder.suffix == ".parquet" and folder.is_file():
            return Dataset.from_parquet(path)
        if folder.suffix == ".arrow" and folder.is_file():
            return Dataset.from_file(path)
        if folder.is_dir():
            check_links(folder)
            _check_names(folder)
        if splits.is_saved(folder):
            return load_from_disk(path)
        if folder.exists() and not splits.is_dataset(folder):
            raise UserError(
                f"{path}: is no folder written by save_to_disk, and no Parquet or Arrow files are "
                "there (config.data.name=hub); for JSON lines set config.data.name=jsonl"
            )
        return load_dataset(path)
    except UserError:
        raise
    except Exception as error:  # Anything from no network to a broken file.
        message = " ".join(str(error).split())[:300]
        if "Config name is missing" in message:
            message += "; subsets cannot be named here: give the folder of one, downloaded"
        raise UserError(f"{path}: the dataset cannot be read: {message}") from None
