"""Preference data as a Hugging Face dataset.

That is a name on the hub, a `save_to_disk` folder, a folder with Parquet or Arrow files, such as a
download of a hub dataset, or one such file. The columns are those of the JSON lines: prompt,
chosen, rejected and perhaps id, score_chosen and score_rejected.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard

from mass_dpo_jax.data import splits, tables
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import check_links, read_json, read_text


def load(data: Any, split: str, seed: int) -> list[Example]:
    """The examples of a split; see `splits` for a dataset without splits and for missing ones.

    Raises:
      UserError: the dataset cannot be read, or names the row and the field.
    """
    return tables.preferences(open_dataset(data.path, split), data, seed)


def open_dataset(path: str, split: str, without: Collection[str] = ()) -> tables.Table:
    """The rows of a dataset's split, as if it had none of the splits `without`."""
    from datasets import Dataset

    data = _read(path)
    if isinstance(data, Dataset):
        part = "all" if split == "all" else splits.resolve(split, ["train"], path).part
        source, rows = splits.Source("row", part), data
    else:
        names = splits.by_split({name: name for name in data}, path)
        if not names:
            raise UserError(_no_split(path, list(data)))
        left = tuple(name for name in data if name not in names.values())
        splits.say_not_read(path, left, tuple(names))
        source = splits.resolve(split, [name for name in names if name not in without], path)
        rows = data[names[source.name]]
    name = path if isinstance(data, Dataset) else f"{path} {source.name}"
    places = (f"{name} row {i}" for i in range(len(rows)))
    return tables.Table(name, source, zip(places, rows.with_format(None), strict=True))


def _no_split(path: str, names: Sequence[str]) -> str:
    """What to say of a dataset none of whose splits is called as ours are."""
    parts = {}
    for split, aliases in splits.NAMES.items():
        parts[split] = next((n for n in names if n.lower().startswith(aliases)), "")
    wanted = ", ".join(f'{split}=d["{name}"]' for split, name in parts.items() if name)
    read = "load_from_disk" if splits.is_saved(Path(path)) else "load_dataset"
    code = (
        f'import datasets; d = datasets.{read}("{path}"); '
        f'datasets.DatasetDict({wanted or "train=d[...]"}).save_to_disk("NEW")'
    )
    return (
        f"{path}: no split train, validation or test; found {', '.join(names)}. Write those you "
        f"need by these names: python -c {shlex.quote(code)}, then --config.data.path=NEW"
    )


def _check_names(folder: Path) -> None:
    """Raises UserError where a folder's own descriptions name files elsewhere.

    Of a folder, `datasets` opens whatever they name: files anywhere on this machine, and addresses
    on the network.
    """
    for file in (*folder.glob("**/dataset_dict.json"), *folder.glob("**/state.json")):
        content = read_json(file)
        if isinstance(content, dict):
            for name in _strings([content.get("splits"), content.get("_data_files")]):
                _check_name(name, file)
    for file in (folder / "README.md", folder / ".huggingface.yaml"):
        if file.is_file():
            text = read_text(file)
            card = DatasetCard(text if file.suffix == ".md" else f"---\n{text}\n---\n")
            for name in _strings(card.data.to_dict().get("configs")):
                _check_name(name, file)


def _check_name(name: str, file: Path) -> None:
    if name.startswith(("/", "~")) or ".." in name or ":" in name or "\\" in name:
        raise UserError(f"{file}: names {name!r}, expected files of this folder only")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(value.values())
    elif isinstance(value, Iterable):
        for part in value:
            yield from _strings(part)


def _read(path: str) -> Any:
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
