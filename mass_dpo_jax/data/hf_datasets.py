"""Datasets that Hugging Face's `datasets` opens: folders that it wrote or knows, and the hub.

Those are `save_to_disk` folders, folders with Parquet or Arrow files or with a dataset card that
describes them (such as a download from the hub), and names on the hub.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard

from mass_dpo_jax.data import split_files, splits
from mass_dpo_jax.data.row_files import COMPRESSED, SUFFIXES, iterate_dataset
from mass_dpo_jax.data.rows import Table
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils import hub
from mass_dpo_jax.utils.files import check_links, read_json, read_text
from mass_dpo_jax.utils.suggestions import suggest_choice


def is_name(path: str) -> bool:
    """Whether a path may be a dataset's name on the hub, OWNER/NAME or OWNER/NAME@REVISION."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    return hub.is_name(path) and suffix not in (*SUFFIXES, *COMPRESSED, "txt")


def is_dataset(folder: Path) -> bool:
    """Whether the folder is one dataset: saved, described by a card, or Parquet or Arrow files.

    Files that are named after splits are read one by one, whatever they are.
    """
    return (
        is_saved(folder)
        or any(folder.glob("*.arrow"))
        or any("configs" in card for _, card in _read_cards(folder))
        or (any(folder.rglob("*.parquet")) and not split_files.has_splits(folder))
    )


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_dataset(
    path: str,
    subset: str,
    split: str,
    names: Mapping[str, Sequence[str]],
    without: Collection[str] = (),
) -> Table:
    """Opens the rows of a dataset's split.

    Args:
        path: a folder or a name on the hub.
        subset: the name of one of its subsets; "" where it has none.
        split: "train", "validation", "test" or, where there are no splits, "all".
        names: the dataset's own names of each split; empty to know splits by `splits.NAMES`.
        without: splits to ignore.

    Raises:
        UserError: the dataset cannot be read, or has no rows for this split.
    """
    from datasets import Dataset, concatenate_datasets

    dataset = _load(path, subset)
    if isinstance(dataset, Dataset):
        if names:
            raise UserError(f"config.data.splits: {path} has no splits that it could name")
        part = "all" if split == "all" else splits.resolve(split, ["train"], path).part
        return Table(path, splits.Source("row", part), iterate_dataset(dataset, path))
    if not names:
        matches = splits.match_splits(dataset, path)
        if not matches:
            raise UserError(
                f"{path}: no split train, validation or test; found "
                f"{', '.join(dataset)}; {splits.suggest_splits(list(dataset)) or _ADVICE}"
            )
        names = {ours: [theirs] for ours, theirs in matches.items()}
    listed = [name for theirs in names.values() for name in theirs]
    for name in listed:
        if name not in dataset:
            raise UserError(
                f"config.data.splits: {path} has no split {name!r}; found {', '.join(dataset)}"
                + suggest_choice(name, list(dataset))
            )
    splits.log_unread(path, tuple(n for n in dataset if n not in listed), tuple(names))
    source = splits.resolve(split, [name for name in names if name not in without], path)
    rows = concatenate_datasets([dataset[name] for name in names[source.name]])
    name = f"{path} {'+'.join(names[source.name])}"
    return Table(name, source, iterate_dataset(rows, name))


_ADVICE = "--config.data.splits=train:NAME says which one to take"


def find_fingerprint(path: str, subset: str) -> str:
    """Returns a text that is equal for the same rows of a dataset, across processes.

    Raises:
        UserError: the dataset cannot be read.
    """
    from datasets import Dataset

    dataset = _load(path, subset)
    parts = {"": dataset} if isinstance(dataset, Dataset) else dataset
    return " ".join(f"{name}={part._fingerprint}" for name, part in parts.items())


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
    for file, card in _read_cards(folder):
        for name in _find_strings(card.get("configs")):
            _check_name(name, file)


def _read_cards(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the descriptions of a dataset that its folder has, and their files."""
    for file in (folder / "README.md", folder / ".huggingface.yaml"):
        if file.is_file():
            text = read_text(file)
            if file.suffix != ".md":
                text = f"---\n{text}\n---\n"
            if text.lstrip().startswith("---"):  # Otherwise it describes nothing.
                try:
                    card = DatasetCard(text).data.to_dict()
                except Exception as error:  # ValueError, or those of the parser of YAML.
                    message = " ".join(str(error).split())[:200]
                    raise UserError(f"{file}: its head is no YAML: {message}") from None
                yield file, card


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


def _load(path: str, subset: str) -> Any:
    from datasets import load_dataset, load_from_disk

    folder = Path(path)
    try:
        if folder.is_dir():
            check_links(folder)
            _check_names(folder)
        if is_saved(folder):
            return load_from_disk(path)
        name, revision = (path, None) if folder.exists() else hub.split_name(path)
        return load_dataset(name, subset or None, revision=revision)
    except UserError:
        raise
    except Exception as error:  # Anything from no network to a broken file.
        message = " ".join(str(error).split())[:300]
        if "Config name is missing" in message:
            message += "; name one by --config.data.subset"
        missing = "" if folder.exists() else "no such file or folder, and as "
        kind = "dataset of the Hugging Face hub" if missing else "dataset"
        raise UserError(
            f"{path}: {missing}{'a' if missing else 'the'} {kind}{' it' * bool(missing)} cannot be "
            f"read: {message}"
        ) from None
