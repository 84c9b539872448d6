"""Preference data as a Hugging Face dataset: a name on the hub, or a `save_to_disk` folder.

The columns are those of the JSON lines: prompt, chosen, rejected and perhaps id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mass_dpo_jax.data import examples, splits
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError


def load(path: str, split: str, seed: int, held_out: float) -> list[Example]:
    """The examples of a split; see `splits` for a dataset without splits and for missing ones.

    Raises:
      UserError: the dataset cannot be read, or names the row and the field.
    """
    from datasets import Dataset

    data = _read(path)
    if isinstance(data, Dataset):
        part = "all" if split == "all" else splits.resolve(split, ["train"], path).part
        source, rows = splits.Source("row", part), data
    else:
        tables = {
            name: data[alias]
            for name, aliases in splits.NAMES.items()
            for alias in aliases
            if alias in data
        }
        if not tables:
            raise UserError(f"{path}: no split train, validation or test; found {', '.join(data)}")
        source = splits.resolve(split, tables, path)
        rows = tables[source.name]
    found = [
        examples.from_row(row, f"{source.name}-{i}", f"{path} {source.name} row {i}")
        for i, row in enumerate(rows.with_format(None))
    ]
    taken = splits.take(found, source.part, held_out, seed, path)
    examples.check_ids(found)
    return taken


def _read(path: str) -> Any:
    from datasets import load_dataset, load_from_disk

    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return load_from_disk(path)
        if folder.exists():
            raise UserError(
                f"{path}: is no folder written by save_to_disk (config.data.name=hub); for JSON "
                "lines set config.data.name=jsonl"
            )
        return load_dataset(path)
    except UserError:
        raise
    except Exception as error:  # Anything from no network to a broken file.
        message = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: the dataset cannot be read: {message}") from None
